//! POSIX access control lists, as far as one user is to be given, or lose, one
//! right to a file whose owner, group and mode stay as they are.
//!
//! The attribute's form: `include/uapi/linux/posix_acl_xattr.h`.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::command_line::descriptor_path;

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
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// The right to read a file.
pub(super) const READ: u16 = 4;
/// The right to write a file, or to connect to a socket.
pub(super) const WRITE: u16 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: u16,
    permissions: u16,
    id: u32,
}

/// Gives a user these permissions, and no others, to what is open. `mode` is
/// its mode, which counts where it has no ACL yet.
///
/// # Errors
/// The system's; [`Errno::OPNOTSUPP`] if its file system has no ACLs.
pub(super) fn give(file: &impl AsFd, mode: u32, user: u32, permissions: u16) -> Result<(), Errno> {
    let entries = read_entries(file)?.unwrap_or_else(|| from_mode(mode));
    write_entries(file, &with_user(&entries, user, permissions))
}

/// Takes a user's entry away.
///
/// # Errors
/// The system's.
pub(super) fn take(file: &impl AsFd, user: u32) -> io::Result<()> {
    let Ok(Some(entries)) = read_entries(file) else {
        return Ok(());
    };
    let left: Vec<Entry> = entries
        .into_iter()
        .filter(|entry| !(entry.tag == USER && entry.id == user))
        .collect();
    Ok(write_entries(file, &left)?)
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

/// The entries with one more for a user, in the order that the kernel wants:
/// by tag, then by id.
fn with_user(entries: &[Entry], user: u32, permissions: u16) -> Vec<Entry> {
    // Named users and groups have no more than the mask, which has to let the
    // new one through: the others keep what they had within the old one.
    let mask = entries.iter().find(|entry| entry.tag == MASK);
    let mask = mask.map_or(u16::MAX, |entry| entry.permissions);
    let mut widest = permissions;
    let mut kept: Vec<Entry> = Vec::new();
    for entry in entries {
        let mut entry = *entry;
        match entry.tag {
            MASK => continue,
            USER if entry.id == user => continue,
            USER | GROUP | GROUP_OBJECT => {
                entry.permissions &= mask;
                widest |= entry.permissions;
            }
            _ => {}
        }
        kept.push(entry);
    }
    kept.push(Entry {
        tag: USER,
        permissions,
        id: user,
    });
    kept.push(Entry {
        tag: MASK,
        permissions: widest,
        id: NOBODY,
    });
    kept.sort_by_key(|entry| (entry.tag, entry.id));
    kept
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

/// The ACL of what is open, if only as a place (`O_PATH`); `None` if it has
/// none but its mode.
fn read_entries(file: &impl AsFd) -> Result<Option<Vec<Entry>>, Errno> {
    let mut bytes = vec![0; MAX_ACL];
    let path = descriptor_path(file.as_fd().as_raw_fd());
    match rustix::fs::getxattr(path, ATTRIBUTE, &mut bytes[..]) {
        Ok(length) => {
            let bytes = bytes.get(..length).unwrap_or_default();
            decode(bytes).map(Some).ok_or(Errno::INVAL)
        }
        Err(Errno::NODATA) => Ok(None),
        Err(error) => Err(error),
    }
}

fn write_entries(file: &impl AsFd, entries: &[Entry]) -> Result<(), Errno> {
    let path = descriptor_path(file.as_fd().as_raw_fd());
    rustix::fs::setxattr(path, ATTRIBUTE, &encode(entries), XattrFlags::empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_reader_gets_reading_and_nobody_gets_more() {
        let owner = from_mode(0o600);
        let entries = with_user(&owner, 61200, READ);
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
        assert_eq!(with_user(&entries, 61200, READ), entries, "once is enough");
        let two = with_user(&entries, 61199, READ);
        assert_eq!(two.len(), 6);
        assert_eq!(two[1].id, 61199, "in the kernel's order");
    }

    #[test]
    fn a_wider_mask_gives_others_nothing() {
        let mut entries = with_user(&from_mode(0o670), 61200, READ | WRITE);
        for entry in &mut entries {
            if entry.tag == MASK {
                entry.permissions = READ;
            }
        }
        let entries = with_user(&entries, 61201, WRITE);
        let of = |tag, id| {
            let mut found = entries.iter().filter(|e| e.tag == tag && e.id == id);
            found.next().map(|entry| entry.permissions)
        };
        assert_eq!(of(MASK, NOBODY), Some(READ | WRITE));
        assert_eq!(of(USER, 61201), Some(WRITE));
        assert_eq!(of(USER, 61200), Some(READ), "as the old mask had it");
        assert_eq!(of(GROUP_OBJECT, NOBODY), Some(READ));
    }

    #[test]
    fn what_is_given_is_there_and_can_be_taken() {
        // The file system that RAM files lie on.
        let file = tempfile::tempfile_in("/dev/shm").expect("a file");
        give(&file, 0o600, 61200, READ).expect("given");
        let entries = read_entries(&file).expect("an ACL").expect("entries");
        let has = |entry: &Entry| entry.id == 61200 && entry.permissions == READ;
        assert!(entries.iter().any(has));
        take(&file, 61200).expect("taken away");
        let entries = read_entries(&file).expect("an ACL").unwrap_or_default();
        assert!(entries.iter().all(|entry| entry.id != 61200));
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
