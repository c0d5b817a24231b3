//! The guest's initial file system: the agent, busybox, the modules, and two
//! files that say what to do with them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use secmon_monitor::appliance::archive::Archive;
use secmon_monitor::appliance::{Entry, Initramfs};
use secmon_truth::Workload;

use crate::kernel::Kernel;
use crate::suite::Suite;
use crate::{agent, cache};

/// Modules every guest needs: the port to the host, and exact names of UNIX
/// sockets for the truth.
const BASE_MODULES: &[&str] = &["virtio_pci", "virtio_console", "unix_diag"];

/// Modules the rich workload needs.
const RICH_MODULES: &[&str] = &[
    "dummy",
    "veth",
    "overlay",
    "vsock",
    "vsock_loopback",
    "vsock_diag",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "netlink_diag",
    "af_packet_diag",
    "virtio_net",
    "loop",
    "tun",
];

/// Modules that are there to be listed: with parameters, with dependencies,
/// with users.
const EXTRA_MODULES: &[&str] = &[
    "lzo_rle",
    "bridge",
    "8021q",
    "nf_tables",
    "nft_ct",
    "squashfs",
    "fuse",
    "zram",
    "nbd",
    "dm_mod",
    "ip_vti",
    "xfrm_user",
];

/// Modules that specimens need.
const SPECIMEN_MODULES: &[&str] = &["af_packet"];

/// Modules that the tools of a distribution ask for, exact sockets for `ss`;
/// and one to load and unload.
const TOOL_MODULES: &[&str] = &["inet_diag", "tcp_diag", "udp_diag", "dummy"];

/// Parameters by module.
const PARAMETERS: &[(&str, &str)] = &[
    ("dummy", "numdummies=2"),
    ("loop", "max_loop=3"),
    ("nbd", "nbds_max=2 max_part=4"),
];

/// What a guest's initramfs is made of.
#[derive(Debug, Clone, Copy)]
pub struct Contents<'a> {
    /// Its kernel, for the modules.
    pub kernel: &'a Kernel,
    /// What it does once it is up.
    pub workload: &'a Workload,
    /// A folder of modules that are loaded on command.
    pub specimens: Option<&'a Path>,
    /// Whether it has the programs of a distribution.
    pub tools: bool,
}

/// Writes the initramfs for a guest.
///
/// It isn't compressed: unpacking under emulation costs more than reading a
/// few more MiB from a file that is in the page cache.
pub fn write(to: &Path, contents: &Contents<'_>) -> Result<()> {
    let Contents {
        kernel,
        workload,
        specimens,
        tools,
    } = *contents;
    let mut archive = Initramfs::new();
    for folder in ["bin", "etc", "lib", "lib/modules", "dev", "proc", "sys"] {
        archive.add(folder, Entry::Folder)?;
    }
    // The console is opened before anything is mounted.
    archive.add("dev/console", Entry::CharacterDevice(5, 1))?;
    archive.add("init", Entry::Program(&fs::read(agent::program()?)?))?;
    archive.add("bin/busybox", Entry::Program(&fs::read(busybox()?)?))?;
    archive.add(
        "etc/workload.json",
        Entry::File(&serde_json::to_vec(workload)?),
    )?;
    let mut lines = String::new();
    for (set, names, wanted) in [
        ("base", BASE_MODULES, true),
        ("rich", RICH_MODULES, workload.rich),
        ("extra", EXTRA_MODULES, workload.extra_modules),
        ("base", SPECIMEN_MODULES, specimens.is_some()),
        ("base", TOOL_MODULES, tools),
    ] {
        if !wanted {
            continue;
        }
        for module in kernel.modules(names)? {
            let file = format!("{}.ko", module.name);
            let line = format!("{set} {file}");
            if lines
                .lines()
                .any(|other| other.split(' ').nth(1) == Some(&file))
            {
                continue;
            }
            let parameters = PARAMETERS
                .iter()
                .find(|(name, _)| *name == module.name)
                .map_or("", |(_, parameters)| parameters);
            lines.push_str(&format!("{line} {parameters}\n"));
            archive.add(&format!("lib/modules/{file}"), Entry::File(&module.object))?;
        }
    }
    if let Some(folder) = specimens {
        archive.add("lib/specimens", Entry::Folder)?;
        for entry in fs::read_dir(folder)? {
            let name = entry?.file_name();
            let Some(name) = name.to_str().filter(|name| name.ends_with(".ko")) else {
                continue;
            };
            let object = fs::read(folder.join(name))?;
            archive.add(&format!("lib/specimens/{name}"), Entry::File(&object))?;
        }
    }
    if tools {
        crate::tools::pack(&mut archive)?;
    }
    archive.add("etc/modules", Entry::File(lines.as_bytes()))?;
    let bytes = archive.finish()?;
    fs::write(to, bytes).with_context(|| format!("cannot write {}", to.display()))
}

/// The static busybox, from the archive like the kernels, so that a lab
/// needs nothing installed but QEMU.
fn busybox() -> Result<PathBuf> {
    let folder = cache::entry("busybox-1", |draft| {
        let scratch = draft.join("scratch");
        let root = scratch.join("root");
        Archive::open(Suite::Bookworm.name(), &scratch.join("apt"))?
            .unpack("busybox-static", &root)?;
        let program = ["bin/busybox", "usr/bin/busybox"]
            .map(|path| root.join(path))
            .into_iter()
            .find(|path| path.is_file())
            .context("busybox-static holds no busybox")?;
        fs::rename(program, draft.join("busybox"))?;
        fs::remove_dir_all(scratch)?;
        Ok(())
    })
    .context("cannot fetch busybox-static")?;
    Ok(folder.join("busybox"))
}
