//! The control groups of a task and the container that their names tell of
//! (`css_set`, `include/linux/cgroup-defs.h`; `kernfs_node`,
//! `include/linux/kernfs.h`).

use std::sync::{Arc, Mutex, PoisonError};

use secmon_memory::VirtualAddress;

use crate::linux::hash::AddressMap;
use crate::linux::list::{LIMIT, is_object_address, nodes};
use crate::{Guest, TableError, Text, layout};

/// More levels than this has no cgroup: each takes a directory in a path.
const DEEPEST: usize = 2048;
/// The longest name of a directory.
const LONGEST_NAME: usize = 255;

layout! {
    /// `include/linux/cgroup-defs.h`
    struct CssSetLayout: "css_set" {
        unified: "dfl_cgrp",
        links: "cgrp_links",
    }
}

layout! {
    /// `kernel/cgroup/cgroup-internal.h`
    struct LinkLayout: "cgrp_cset_link" {
        cgroup: "cgrp",
        node: "cgrp_link",
    }
}

layout! {
    /// `include/linux/cgroup-defs.h`
    struct CgroupLayout: "cgroup" {
        node: "kn",
        flags: "self.flags",
    }
}

layout! {
    /// `include/linux/kernfs.h`
    struct KernfsLayout: "kernfs_node" {
        /// `__parent` since 6.15.
        parent: "__parent" | "parent",
        name: "name",
    }
}

/// `CSS_ONLINE` of `cgroup_subsys_state.flags`.
const CSS_ONLINE: u64 = 0x2;

/// The cgroups of all tasks with the same `css_set`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The path in the unified hierarchy (version 2), `/` for its root.
    pub unified: Result<Text, String>,
    /// Whether that cgroup was removed (a zombie can still be in it).
    pub removed: bool,
    /// The paths in the hierarchies of version 1 that are not their root.
    pub others: Vec<Text>,
    /// The container, if a path names one.
    pub container: Option<Container>,
}

impl Membership {
    /// The path to show: that of the unified hierarchy, or of another one if
    /// the unified is not used.
    pub fn path(&self) -> Result<&Text, &String> {
        match &self.unified {
            Ok(path) if path.as_bytes() == b"/" => Ok(self.others.first().unwrap_or(path)),
            Err(error) => self.others.first().ok_or(error),
            Ok(path) => Ok(path),
        }
    }
}

/// A container, as the name of its cgroup tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Its id, or its name where runtimes use names.
    pub id: Text,
    /// What runs it: `docker`, `podman`, `cri-o`, `containerd`, `lxc`,
    /// `systemd-nspawn`, `kubernetes`; none if the name does not say.
    pub runtime: Option<&'static str>,
}

/// Finds the cgroups of tasks, remembering those of one listing.
pub struct Cgroups {
    table: &'static str,
    set: Arc<CssSetLayout>,
    link: Option<Arc<LinkLayout>>,
    cgroup: Arc<CgroupLayout>,
    kernfs: Arc<KernfsLayout>,
    known: Mutex<AddressMap<Arc<Membership>>>,
}

impl Cgroups {
    /// A finder for `table`.
    ///
    /// # Errors
    /// [`TableError`] if the types lack cgroups.
    pub fn new(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        Ok(Self {
            table,
            set: guest.layout(table)?,
            link: guest.layout(table).ok(),
            cgroup: guest.layout(table)?,
            kernfs: guest.layout(table)?,
            known: Mutex::default(),
        })
    }

    /// The cgroups of the tasks that have the `css_set` at `set`.
    pub fn of(&self, guest: &Guest, set: VirtualAddress) -> Arc<Membership> {
        let lock = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(&set) {
            return known.clone();
        }
        let membership = Arc::new(self.read(guest, set));
        lock().insert(set, membership.clone());
        membership
    }

    fn read(&self, guest: &Guest, set: VirtualAddress) -> Membership {
        let unified = self
            .pointer(guest, "css_set.dfl_cgrp", set, self.set.unified.offset)
            .and_then(|cgroup| Ok((cgroup, self.path(guest, cgroup)?)));
        let removed = unified.as_ref().is_ok_and(|(cgroup, path)| {
            path.as_bytes() != b"/"
                && guest
                    .number(*cgroup, &self.cgroup.flags)
                    .is_ok_and(|flags| flags & CSS_ONLINE == 0)
        });
        let default = unified.as_ref().ok().map(|(cgroup, _)| *cgroup);
        let others = self.others(guest, set, default);
        let unified = unified.map(|(_, path)| path);
        let container = unified
            .iter()
            .chain(&others)
            .find_map(|path| container(path.as_bytes()));
        Membership {
            unified,
            removed,
            others,
            container,
        }
    }

    /// The paths in the hierarchies of version 1, without those at a root.
    fn others(
        &self,
        guest: &Guest,
        set: VirtualAddress,
        default: Option<VirtualAddress>,
    ) -> Vec<Text> {
        let Some(link) = &self.link else {
            return Vec::new();
        };
        let head = set.wrapping_add(self.set.links.offset);
        let links =
            nodes(guest.space(), guest.diagnostics(), head, LIMIT).filter_map(|node| match node {
                Ok(node) => Some(node),
                Err(error) => {
                    guest.diagnostics().record(crate::Diagnostic {
                        table: self.table,
                        subject: "css_set.cgrp_links".into(),
                        address: error.address(),
                        reason: error.to_string(),
                    });
                    None
                }
            });
        let mut paths = Vec::new();
        for node in links {
            let base = node.wrapping_sub(link.node.offset);
            let cgroup = guest.pointer(base, &link.cgroup).ok();
            if cgroup == default {
                continue;
            }
            let Some(cgroup) = cgroup.filter(|cgroup| is_object_address(guest.space(), *cgroup))
            else {
                continue;
            };
            match self.path(guest, cgroup) {
                Ok(path) if path.as_bytes() != b"/" && !paths.contains(&path) => paths.push(path),
                _ => {}
            }
        }
        paths
    }

    fn pointer(
        &self,
        guest: &Guest,
        member: &str,
        base: VirtualAddress,
        offset: u64,
    ) -> Result<VirtualAddress, String> {
        let found = guest
            .space()
            .read_pointer(base.wrapping_add(offset))
            .map_err(|error| format!("{member}: {error}"))?;
        if is_object_address(guest.space(), found) {
            Ok(found)
        } else {
            Err(format!(
                "{member} at {base} is {found}, which is no address of an object"
            ))
        }
    }

    /// The path of a cgroup in its hierarchy.
    fn path(&self, guest: &Guest, cgroup: VirtualAddress) -> Result<Text, String> {
        let mut node = self.pointer(guest, "cgroup.kn", cgroup, self.cgroup.node.offset)?;
        let mut names: Vec<Vec<u8>> = Vec::new();
        loop {
            let parent = guest
                .pointer(node, &self.kernfs.parent)
                .map_err(|error| format!("kernfs_node.parent: {error}"))?;
            if parent.is_null() {
                break;
            }
            if !is_object_address(guest.space(), parent) || names.len() == DEEPEST {
                return Err(format!("the path of the cgroup at {cgroup} has no root"));
            }
            let name = guest
                .pointer(node, &self.kernfs.name)
                .and_then(|name| guest.space().read_c_string(name, LONGEST_NAME))
                .map_err(|error| format!("kernfs_node.name: {error}"))?;
            names.push(name);
            node = parent;
        }
        if names.is_empty() {
            return Ok(Text::from("/"));
        }
        let mut path = Vec::new();
        for name in names.iter().rev() {
            path.push(b'/');
            path.extend_from_slice(name);
        }
        Ok(Text::new(path))
    }
}

/// Prefixes of a cgroup's name that are followed by the 64 hexadecimal digits
/// of a container.
const PREFIXES: [(&[u8], &str); 5] = [
    (b"docker-", "docker"),
    (b"libpod-", "podman"),
    (b"crio-", "cri-o"),
    (b"cri-containerd-", "containerd"),
    (b"nerdctl-", "containerd"),
];

/// Prefixes of a cgroup's name that are followed by the name of a container.
const NAMED: [(&[u8], &str); 2] = [
    (b"lxc.payload.", "lxc"),
    (b"systemd-nspawn@", "systemd-nspawn"),
];

/// The container that a cgroup path tells of: the innermost one, as
/// containers nest.
pub fn container(path: &[u8]) -> Option<Container> {
    let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
    (0..parts.len())
        .rev()
        .find_map(|index| part_container(&parts, index))
}

fn part_container(parts: &[&[u8]], index: usize) -> Option<Container> {
    let name = *parts.get(index)?;
    let parent = index
        .checked_sub(1)
        .and_then(|index| parts.get(index))
        .copied()
        .unwrap_or_default();
    let bare = name
        .strip_suffix(b".scope")
        .or_else(|| name.strip_suffix(b".service"))
        .unwrap_or(name);
    let found = |id: &[u8], runtime| {
        let id = Text::new(id);
        Some(Container { id, runtime })
    };
    for (prefix, runtime) in PREFIXES {
        if let Some(id) = bare.strip_prefix(prefix)
            && is_digest(id)
        {
            return found(id, Some(runtime));
        }
    }
    // What watches over a container is in none.
    for watcher in [&b"lxc.monitor"[..], b"libpod-conmon-", b"crio-conmon-"] {
        if bare.starts_with(watcher) {
            return None;
        }
    }
    for (prefix, runtime) in NAMED {
        if let Some(id) = bare.strip_prefix(prefix)
            && !id.is_empty()
        {
            return found(&unescape(id), Some(runtime));
        }
    }
    if parent == b"lxc" || parent == b"lxc.payload" {
        return (!name.is_empty()).then(|| Container {
            id: Text::new(name),
            runtime: Some("lxc"),
        });
    }
    if parent == b"machine.slice"
        && let Some(machine) = bare.strip_prefix(b"machine-")
    {
        let machine = unescape(machine);
        // Virtual machines of libvirt are registered in the same place.
        let virtual_machine = machine.starts_with(b"qemu-") || machine.starts_with(b"lxc-");
        return (!machine.is_empty() && !virtual_machine).then(|| Container {
            id: Text::new(machine),
            runtime: Some("systemd-nspawn"),
        });
    }
    if !is_digest(name) {
        return None;
    }
    let runtime = if parent == b"docker" {
        Some("docker")
    } else if parent.starts_with(b"libpod") {
        Some("podman")
    } else if parts.iter().any(|part| part.starts_with(b"kubepods")) {
        Some("kubernetes")
    } else {
        None
    };
    found(name, runtime)
}

/// Whether this is a SHA-256 digest in lower-case hexadecimal digits, as which
/// most runtimes write ids.
fn is_digest(name: &[u8]) -> bool {
    name.len() == 64
        && name
            .iter()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte))
}

/// The name that systemd escaped: `\x2d` stands for a minus.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'\\'
            && let Some(digits) = tail.get(1..3)
            && tail.first() == Some(&b'x')
            && let Ok(digits) = std::str::from_utf8(digits)
            && let Ok(value) = u8::from_str_radix(digits, 16)
        {
            out.push(value);
            rest = tail.get(3..).unwrap_or_default();
            continue;
        }
        out.push(byte);
        rest = tail;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: &str = "4f1b2c3d4e5f60718293a4b5c6d7e8f90123456789abcdef0123456789abcdef";

    fn check(path: &str, id: &str, runtime: Option<&'static str>) {
        let path = path.replace("ID", ID);
        let expected = Container {
            id: id.replace("ID", ID).into(),
            runtime,
        };
        assert_eq!(container(path.as_bytes()), Some(expected), "{path}");
    }

    #[test]
    fn finds_containers() {
        check("/docker/ID", "ID", Some("docker"));
        check("/system.slice/docker-ID.scope", "ID", Some("docker"));
        check(
            "/machine.slice/libpod-ID.scope/container",
            "ID",
            Some("podman"),
        );
        check("/libpod_parent/libpod-ID", "ID", Some("podman"));
        check(
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1_2.slice/crio-ID.scope",
            "ID",
            Some("cri-o"),
        );
        check(
            "/kubepods.slice/kubepods-pod1.slice/cri-containerd-ID.scope",
            "ID",
            Some("containerd"),
        );
        check("/kubepods/burstable/pod1-2-3/ID", "ID", Some("kubernetes"));
        check("/lxc/web", "web", Some("lxc"));
        check("/lxc.payload.web/system.slice", "web", Some("lxc"));
        check(
            r"/machine.slice/machine-my\x2dbox.scope/payload",
            "my-box",
            Some("systemd-nspawn"),
        );
        check(
            "/machine.slice/systemd-nspawn@box.service/payload",
            "box",
            Some("systemd-nspawn"),
        );
        check("/ecs/task/ID", "ID", None);
    }

    #[test]
    fn finds_none_where_there_is_none() {
        for path in [
            "/",
            "",
            "/init.scope",
            "/user.slice/user-0.slice/session-1.scope",
            "/system.slice/docker.service",
            "/system.slice/docker-short.scope",
            r"/machine.slice/machine-qemu\x2d1\x2dvm.scope",
            "/lxc.monitor.web",
            &format!("/machine.slice/libpod-conmon-{ID}.scope"),
            "/lxc/",
        ] {
            assert_eq!(container(path.as_bytes()), None, "{path}");
        }
    }

    proptest! {
        #[test]
        fn any_path(path: Vec<u8>) {
            let _ = container(&path);
            prop_assert!(unescape(&path).len() <= path.len());
        }
    }
}
