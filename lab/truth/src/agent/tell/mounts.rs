//! Mounts of every mount namespace, from one member's `mountinfo` each.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use secmon_truth::{ByteString, Mount};

use super::{link, namespace_inode, pids, unescape_octal};

/// Every mount of every mount namespace that has a process in it.
pub fn mounts() -> io::Result<Vec<Mount>> {
    let mut mounts = Vec::new();
    for (namespace, pid) in readers()? {
        let text = fs::read(format!("/proc/{pid}/mountinfo"))?;
        mounts.extend(
            text.split(|byte| *byte == b'\n')
                .filter_map(|line| mount(namespace, pid, line)),
        );
    }
    Ok(mounts)
}

/// The member of each mount namespace whose view is the widest: one whose
/// root is the namespace's own, told by the number of lines it sees. Kernel
/// threads, whose roots programs have left behind, count only where there is
/// nobody else.
fn readers() -> io::Result<BTreeMap<u64, i32>> {
    let mut best: BTreeMap<u64, ((bool, usize), i32)> = BTreeMap::new();
    let mut seen = std::collections::BTreeSet::new();
    for pid in pids()? {
        let Some(namespace) = namespace_inode(&format!("/proc/{pid}/ns/mnt")) else {
            continue;
        };
        let Some(root) = link(&format!("/proc/{pid}/root")) else {
            continue;
        };
        let is_program = link(&format!("/proc/{pid}/exe")).is_some();
        if !seen.insert((namespace, root, is_program)) {
            continue;
        }
        let lines = fs::read(format!("/proc/{pid}/mountinfo"))
            .unwrap_or_default()
            .split(|byte| *byte == b'\n')
            .count();
        let rank = (is_program, lines);
        let entry = best.entry(namespace).or_insert((rank, pid));
        if rank > entry.0 {
            *entry = (rank, pid);
        }
    }
    Ok(best
        .into_iter()
        .map(|(namespace, (_, pid))| (namespace, pid))
        .collect())
}

fn mount(namespace: u64, seen_by: i32, line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut text = || fields.next().map(String::from_utf8_lossy);
    let id = text()?.parse().ok()?;
    let parent = text()?.parse().ok()?;
    let device = text()?.into_owned();
    let mut bytes = || {
        fields
            .next()
            .map(|field| unescape_octal(field, b" \t\n\\#"))
    };
    let root = bytes()?;
    let target = bytes()?;
    let options = String::from_utf8_lossy(fields.next()?).into_owned();
    let mut propagation = Vec::new();
    loop {
        match fields.next()? {
            b"-" => break,
            field => propagation.push(String::from_utf8_lossy(field).into_owned()),
        }
    }
    let mut bytes = || {
        fields
            .next()
            .map(|field| unescape_octal(field, b" \t\n\\#"))
    };
    Some(Mount {
        namespace,
        seen_by,
        id,
        parent,
        device,
        root,
        target,
        options,
        propagation,
        fstype: bytes()?,
        source: bytes()?,
        super_options: ByteString::from(fields.next()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_and_optional_fields_are_read() {
        let line = br"36 35 98:0 /mnt1 /mnt\0402\012x rw,noatime master:1 shared:2 - ext3 /dev/\134root rw,errors=continue";
        let mount = mount(7, 1, line).unwrap();
        assert_eq!(mount.target, "/mnt 2\nx");
        assert_eq!(mount.source, "/dev/\\root");
        assert_eq!(mount.propagation, ["master:1", "shared:2"]);
        assert_eq!((mount.id, mount.parent), (36, 35));
    }
}
