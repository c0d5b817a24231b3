//! The right of one user to read a file, and not to write it.
//!
//! QEMU opens a RAM file by itself, through `/proc/self/fd/N`; the system then
//! asks whether QEMU's user may, whatever the descriptor allows. A POSIX ACL
//! entry gives the monitor's user reading and nothing else, and leaves the
//! file's owner, group and mode as they are. Where a file system has no ACLs
//! (hugetlbfs, memfds of older kernels) the file is made readable to others,
//! who still can't reach it: a memfd has no name, and hugetlbfs a folder that
//! only QEMU's user may enter.
//!
//! The attribute's form: `include/uapi/linux/posix_acl_xattr.h`.

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::account::Account;

const ATTRIBUTE: &str = "system.posix_acl_access";

/// Version of the attribute's form.
const VERSION: u32 = 2;
/// The id of entries that name nobody.
const NOBODY: u32 = u32::MAX;
/// The most bytes of an ACL that are read; there are 8 bytes an entry.
const MAX_ACL: usize = 64 << 10;

const USER_OBJECT: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJECT: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

const READ: u16 = 4;

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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: u16,
    permissions: u16,
    id: u32,
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
    let entries = match read_entries(file) {
        Ok(entries) => entries.unwrap_or_else(|| from_mode(metadata.mode())),
        Err(Errno::OPNOTSUPP) => return open_to_others(file, metadata.mode()),
        Err(error) => return Err(error.into()),
    };
    let entries = with_reader(&entries, account.id);
    match rustix::fs::fsetxattr(file, ATTRIBUTE, &encode(&entries), XattrFlags::empty()) {
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
    let Ok(Some(entries)) = read_entries(file) else {
        return Ok(());
    };
    let left: Vec<Entry> = entries
        .into_iter()
        .filter(|entry| !(entry.tag == USER && entry.id == account.id))
        .collect();
    rustix::fs::fsetxattr(file, ATTRIBUTE, &encode(&left), XattrFlags::empty())?;
    Ok(())
}

fn open_to_others(file: &File, mode: u32) -> io::Result<Grant> {
    file.set_permissions(std::fs::Permissions::from_mode((mode & 0o7777) | 0o004))?;
    Ok(Grant::Others)
}

/// The entries that a file without an ACL has by its mode.
fn from_mode(mode: u32) -> Vec<Entry> {
    let part = |shift: u32| u16::try_from((mode >> shift) & 7).unwrap_or(0);
    let entry = |tag, permissions| Entry {
        tag,
        permissions,
        id: NOBODY,
    };
    vec![
        entry(USER_OBJECT, part(6)),
        entry(GROUP_OBJECT, part(3)),
        entry(OTHER, part(0)),
    ]
}

/// The entries with one more that lets a user read, in the order that the
/// kernel wants: by tag, then by id.
fn with_reader(entries: &[Entry], user: u32) -> Vec<Entry> {
    let mut entries: Vec<Entry> = entries
        .iter()
        .copied()
        .filter(|entry| !(entry.tag == USER && entry.id == user))
        .collect();
    entries.push(Entry {
        tag: USER,
        permissions: READ,
        id: user,
    });
    // Named users and the group have no more than the mask.
    let group = entries.iter().find(|entry| entry.tag == GROUP_OBJECT);
    let group = group.map_or(0, |entry| entry.permissions);
    match entries.iter_mut().find(|entry| entry.tag == MASK) {
        Some(mask) => mask.permissions |= READ,
        None => entries.push(Entry {
            tag: MASK,
            permissions: group | READ,
            id: NOBODY,
        }),
    }
    entries.sort_by_key(|entry| (entry.tag, entry.id));
    entries
}

fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for Entry {
        tag,
        permissions,
        id,
    } in entries
    {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn decode(bytes: &[u8]) -> Option<Vec<Entry>> {
    let (version, rest) = bytes.split_first_chunk::<4>()?;
    let whole = rest.len() % 8 == 0 && u32::from_le_bytes(*version) == VERSION;
    whole.then(|| {
        let entries = rest.chunks_exact(8).filter_map(|entry| {
            let (tag, entry) = entry.split_first_chunk::<2>()?;
            let (permissions, id) = entry.split_first_chunk::<2>()?;
            Some(Entry {
                tag: u16::from_le_bytes(*tag),
                permissions: u16::from_le_bytes(*permissions),
                id: u32::from_le_bytes(id.try_into().ok()?),
            })
        });
        entries.collect()
    })
}

/// The file's ACL; `None` if it has none but its mode.
fn read_entries(file: &File) -> Result<Option<Vec<Entry>>, Errno> {
    let mut bytes = vec![0; MAX_ACL];
    match rustix::fs::fgetxattr(file, ATTRIBUTE, &mut bytes[..]) {
        Ok(length) => {
            let bytes = bytes.get(..length).unwrap_or_default();
            decode(bytes).map(Some).ok_or(Errno::INVAL)
        }
        Err(Errno::NODATA) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_reader_gets_reading_and_nobody_gets_more() {
        let owner = from_mode(0o600);
        let entries = with_reader(&owner, 61200);
        let said: Vec<_> = entries.iter().map(|e| (e.tag, e.permissions)).collect();
        assert_eq!(
            said,
            [
                (USER_OBJECT, 6),
                (USER, READ),
                (GROUP_OBJECT, 0),
                (MASK, READ),
                (OTHER, 0)
            ]
        );
        assert_eq!(with_reader(&entries, 61200), entries, "once is enough");
        let two = with_reader(&entries, 61199);
        assert_eq!(two.len(), 6);
        assert_eq!(two[1].id, 61199, "in the kernel's order");
    }

    #[test]
    fn a_file_with_an_acl_is_readable_and_can_be_closed_again() {
        // The file system that RAM files lie on.
        let file = tempfile::tempfile_in("/dev/shm").expect("a file");
        let account = Account { id: 61200 };
        let private = std::fs::Permissions::from_mode(0o600);
        file.set_permissions(private).expect("chmod");
        assert_eq!(
            allow_reading(&file, account).expect("granted"),
            Grant::Entry
        );
        let entries = read_entries(&file).expect("an ACL").expect("entries");
        assert!(
            entries
                .iter()
                .any(|entry| entry.id == account.id && entry.permissions == READ)
        );
        forbid_reading(&file, account).expect("taken away");
        let entries = read_entries(&file).expect("an ACL").unwrap_or_default();
        assert!(entries.iter().all(|entry| entry.id != account.id));
        let open = std::fs::Permissions::from_mode(0o644);
        file.set_permissions(open).expect("chmod");
    }

    #[test]
    fn a_file_that_all_may_write_is_refused() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file");
        let open = std::fs::Permissions::from_mode(0o666);
        file.as_file().set_permissions(open).expect("chmod");
        let error = allow_reading(file.as_file(), Account { id: 61200 }).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_acl_or_none(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Some(entries) = decode(&bytes) {
                prop_assert_eq!(encode(&entries), bytes);
            }
        }
    }
}
