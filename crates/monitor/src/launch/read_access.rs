//! The right of one user to read a file, and not to write it.
//!
//! QEMU opens a RAM file by itself, through `/proc/self/fd/N`; the system then
//! asks whether QEMU's user may, whatever the descriptor allows. A POSIX ACL
//! entry gives the monitor's user reading and nothing else, and leaves the
//! file's owner, group and mode as they are. Where a file system has no ACLs
//! (hugetlbfs, memfds of older kernels) the file is made readable to others,
//! who still can't reach it: a memfd has no name, and hugetlbfs a folder that
//! only QEMU's user may enter.

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use rustix::io::Errno;

use super::account::Account;
use super::acl;

/// How a user came to be able to read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// The user may read it anyway.
    Needless,
    /// An ACL entry for the user.
    Entry,
    /// The file is readable for all who can reach it.
    Others,
}

/// Lets `account` read the file, and only read it.
///
/// # Errors
/// The system's; `PermissionDenied` if the user could write the file, too.
pub fn allow_reading(file: &File, account: Account) -> io::Result<Grant> {
    let metadata = file.metadata()?;
    if metadata.uid() == account.id || metadata.mode() & 0o002 != 0 {
        // A memfd is open to all who reach it; nobody else's file is.
        if metadata.nlink() == 0 && metadata.uid() != account.id {
            let mode = (metadata.mode() & 0o775) | 0o004;
            file.set_permissions(std::fs::Permissions::from_mode(mode))?;
            return Ok(Grant::Others);
        }
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "the monitor's user {} could write it (mode {:o})",
                account.id,
                metadata.mode() & 0o7777
            ),
        ));
    }
    if metadata.mode() & 0o004 != 0 {
        return Ok(Grant::Needless);
    }
    match acl::give(file, metadata.mode(), account.id, acl::READ) {
        Ok(()) => Ok(Grant::Entry),
        Err(Errno::OPNOTSUPP) => open_to_others(file, metadata.mode()),
        Err(error) => Err(error.into()),
    }
}

/// Takes the entry away again.
///
/// # Errors
/// The system's.
pub fn forbid_reading(file: &File, account: Account) -> io::Result<()> {
    acl::take(file, account.id)
}

fn open_to_others(file: &File, mode: u32) -> io::Result<Grant> {
    file.set_permissions(std::fs::Permissions::from_mode((mode & 0o7777) | 0o004))?;
    Ok(Grant::Others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_file_is_made_readable_to_one() {
        // The file system that RAM files lie on.
        let file = tempfile::tempfile_in("/dev/shm").expect("a file");
        let account = Account { id: 61200 };
        let private = std::fs::Permissions::from_mode(0o600);
        file.set_permissions(private).expect("chmod");
        assert_eq!(
            allow_reading(&file, account).expect("granted"),
            Grant::Entry
        );
        forbid_reading(&file, account).expect("taken away");
    }

    #[test]
    fn a_file_that_all_may_write_is_refused() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file");
        let open = std::fs::Permissions::from_mode(0o666);
        file.as_file().set_permissions(open).expect("chmod");
        let error = allow_reading(file.as_file(), Account { id: 61200 }).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
}
