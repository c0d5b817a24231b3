//! Namespaces: from the links of processes, from descriptors, from mounts.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use secmon_truth::Namespace;

use super::processes::namespaces as links;
use super::{link, mounts, numbers, os_bytes, pids};
use crate::agent::sys;

/// Every namespace that a process, a thread, a descriptor or a mount holds.
pub fn namespaces() -> io::Result<Vec<Namespace>> {
    let mut found: BTreeMap<(String, u64), Namespace> = BTreeMap::new();
    for pid in pids()? {
        let folder = format!("/proc/{pid}");
        for (kind, inode) in links(&folder) {
            entry(&mut found, kind_of(&kind), inode, |namespace| {
                // The `…_for_children` links name what a later child gets.
                if !kind.ends_with("_for_children") {
                    namespace.pids.push(pid);
                }
            });
        }
        for tid in numbers(&format!("{folder}/task")).unwrap_or_default() {
            if tid != pid {
                for (kind, inode) in links(&format!("{folder}/task/{tid}")) {
                    entry(&mut found, kind_of(&kind), inode, |_| {});
                }
            }
        }
        for fd in numbers(&format!("{folder}/fd")).unwrap_or_default() {
            let target = link(&format!("{folder}/fd/{fd}"));
            if let Some((kind, inode)) = target.as_ref().and_then(|text| parse(text.as_str()?)) {
                entry(&mut found, kind, inode, |namespace| {
                    namespace.descriptors.push(format!("{pid}/{fd}"));
                });
            }
        }
    }
    for mount in mounts::mounts()? {
        if mount.fstype == "nsfs"
            && let Some((kind, inode)) = mount.root.as_str().and_then(parse)
        {
            entry(&mut found, kind, inode, |namespace| {
                namespace.mounts.push(mount.target.clone());
            });
        }
    }
    let own_uts = fs::File::open("/proc/self/ns/uts")?;
    for namespace in found.values_mut() {
        let Some(pid) = namespace.pids.first() else {
            continue;
        };
        match namespace.kind.as_str() {
            "uts" => {
                let file = fs::File::open(format!("/proc/{pid}/ns/uts"))?;
                if sys::set_namespace(&file, libc::CLONE_NEWUTS).is_ok() {
                    namespace.host_name = fs::read("/proc/sys/kernel/hostname").ok().map(|name| {
                        os_bytes(std::os::unix::ffi::OsStrExt::from_bytes(
                            name.strip_suffix(b"\n").unwrap_or(&name),
                        ))
                    });
                    sys::set_namespace(&own_uts, libc::CLONE_NEWUTS)?;
                }
            }
            "user" => namespace.uid_map = super::text_of(format!("/proc/{pid}/uid_map")),
            _ => {}
        }
    }
    Ok(found.into_values().collect())
}

fn kind_of(link: &str) -> String {
    link.strip_suffix("_for_children")
        .unwrap_or(link)
        .to_owned()
}

fn parse(text: &str) -> Option<(String, u64)> {
    let (kind, rest) = text.split_once(":[")?;
    let known = ["mnt", "net", "pid", "user", "uts", "ipc", "cgroup", "time"];
    let inode = rest.strip_suffix(']')?.parse().ok()?;
    known.contains(&kind).then(|| (kind.to_owned(), inode))
}

fn entry(
    found: &mut BTreeMap<(String, u64), Namespace>,
    kind: String,
    inode: u64,
    change: impl FnOnce(&mut Namespace),
) {
    change(
        found
            .entry((kind.clone(), inode))
            .or_insert_with(|| Namespace {
                kind,
                inode,
                pids: Vec::new(),
                mounts: Vec::new(),
                descriptors: Vec::new(),
                host_name: None,
                uid_map: None,
            }),
    );
}

/// A path that leads to each network namespace: a process's link, a thread's,
/// a descriptor, or a bind mount.
pub fn network_namespaces() -> io::Result<BTreeMap<u64, String>> {
    let mut paths = BTreeMap::new();
    for namespace in namespaces()? {
        if namespace.kind != "net" {
            continue;
        }
        let path = if let Some(pid) = namespace.pids.first() {
            format!("/proc/{pid}/ns/net")
        } else if let Some((pid, fd)) = namespace
            .descriptors
            .first()
            .and_then(|text| text.split_once('/'))
        {
            format!("/proc/{pid}/fd/{fd}")
        } else if let Some(target) = namespace.mounts.first() {
            target.to_string()
        } else {
            continue;
        };
        paths.insert(namespace.inode, path);
    }
    Ok(paths)
}
