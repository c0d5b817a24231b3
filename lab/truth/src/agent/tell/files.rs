//! Open files from `/proc/<pid>/fd` and `/proc/<pid>/fdinfo`.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use secmon_truth::{ByteString, FileKind, OpenFile};

use super::{link, numbers, pids, split_mark};

/// Every descriptor of every process.
pub fn files() -> io::Result<Vec<OpenFile>> {
    let mut files = Vec::new();
    for pid in pids()? {
        for fd in numbers(&format!("/proc/{pid}/fd")).unwrap_or_default() {
            files.extend(open_file(pid, fd));
        }
    }
    Ok(files)
}

fn open_file(pid: i32, fd: i32) -> Option<OpenFile> {
    let link_path = format!("/proc/{pid}/fd/{fd}");
    // The link first: in the agent's own list, the number of the folder that
    // was just read is free by now, and would be the next file's.
    let link = link(&link_path)?;
    let metadata = fs::metadata(&link_path).ok()?;
    let information = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
    let mut flags = 0;
    let mut position = 0;
    let mut mount_id = 0;
    let mut details = Vec::new();
    for line in information.lines() {
        let Some((key, value)) = line.split_once(':') else {
            details.push(line.to_owned());
            continue;
        };
        let value = value.trim();
        match key {
            "flags" => flags = u32::from_str_radix(value, 8).ok()?,
            "pos" => position = value.parse().ok()?,
            "mnt_id" => mount_id = value.parse().ok()?,
            _ => details.push(line.to_owned()),
        }
    }
    let kind = kind(metadata.mode(), &link);
    let (path, deleted) = split_mark(pid, &link, &metadata);
    let node = matches!(kind, FileKind::CharacterDevice | FileKind::BlockDevice)
        .then(|| device(metadata.rdev()));
    Some(OpenFile {
        pid,
        fd: fd as u32,
        path,
        link,
        deleted,
        kind,
        flags,
        position,
        mount_id,
        inode: metadata.ino(),
        device: device(metadata.dev()),
        mode: metadata.mode(),
        links: metadata.nlink(),
        size: metadata.size(),
        node,
        details,
    })
}

fn kind(mode: u32, link: &ByteString) -> FileKind {
    let link = link.as_bytes();
    match mode & libc::S_IFMT {
        _ if link.starts_with(b"/memfd:") => FileKind::Memfd,
        _ if link.starts_with(b"anon_inode:") => FileKind::AnonymousInode,
        _ if link.starts_with(b"pidfd:") => FileKind::Pidfd,
        _ if namespace(link) => FileKind::Namespace,
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFLNK => FileKind::SymbolicLink,
        libc::S_IFCHR => FileKind::CharacterDevice,
        libc::S_IFBLK => FileKind::BlockDevice,
        libc::S_IFSOCK => FileKind::Socket,
        libc::S_IFIFO if link.starts_with(b"pipe:") => FileKind::Pipe,
        libc::S_IFIFO => FileKind::Fifo,
        // Anonymous inodes have no type bits in some kernels.
        0 => FileKind::AnonymousInode,
        _ => FileKind::Regular,
    }
}

fn namespace(link: &[u8]) -> bool {
    ["mnt", "net", "pid", "user", "uts", "ipc", "cgroup", "time"]
        .iter()
        .any(|kind| {
            link.strip_prefix(kind.as_bytes())
                .is_some_and(|rest| rest.starts_with(b":["))
        })
}

/// `major:minor` in decimal.
pub fn device(number: u64) -> String {
    format!("{}:{}", libc::major(number), libc::minor(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_descriptors_are_told() {
        let (_reader, writer) = io::pipe().unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&writer);
        let own = open_file(std::process::id() as i32, fd).expect("own pipe");
        assert_eq!(own.kind, FileKind::Pipe);
        assert!(!own.deleted);
        assert_eq!(own.flags & 3, libc::O_WRONLY as u32);
        assert_ne!(own.flags & libc::O_CLOEXEC as u32, 0);
    }
}
