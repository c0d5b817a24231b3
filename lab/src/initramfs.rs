//! The guest's initial file system: the agent, busybox, the modules, and two
//! files that say what to do with them.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use cpio::newc;
use secmon_truth::Workload;

use crate::archive::Archive;
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

/// Parameters by module.
const PARAMETERS: &[(&str, &str)] = &[
    ("dummy", "numdummies=2"),
    ("loop", "max_loop=3"),
    ("nbd", "nbds_max=2 max_part=4"),
];

/// Writes the initramfs for a guest.
///
/// It isn't compressed: unpacking under emulation costs more than reading a
/// few more MiB from a file that is in the page cache.
pub fn write(to: &Path, kernel: &Kernel, workload: &Workload) -> Result<()> {
    let mut archive = Archived {
        bytes: Vec::with_capacity(8 << 20),
        inode: 1,
    };
    for folder in ["bin", "etc", "lib", "lib/modules", "dev", "proc", "sys"] {
        archive.add(folder, 0o040_755, &[], None)?;
    }
    // The console is opened before anything is mounted.
    archive.add("dev/console", 0o020_600, &[], Some((5, 1)))?;
    archive.add("init", 0o100_755, &fs::read(agent::program()?)?, None)?;
    archive.add("bin/busybox", 0o100_755, &fs::read(busybox()?)?, None)?;
    archive.add(
        "etc/workload.json",
        0o100_644,
        &serde_json::to_vec(workload)?,
        None,
    )?;
    let mut lines = String::new();
    for (set, names, wanted) in [
        ("base", BASE_MODULES, true),
        ("rich", RICH_MODULES, workload.rich),
        ("extra", EXTRA_MODULES, workload.extra_modules),
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
            archive.add(
                &format!("lib/modules/{file}"),
                0o100_644,
                &module.object,
                None,
            )?;
        }
    }
    archive.add("etc/modules", 0o100_644, lines.as_bytes(), None)?;
    let bytes = newc::trailer(archive.bytes)?;
    fs::write(to, bytes).with_context(|| format!("cannot write {}", to.display()))
}

struct Archived {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archived {
    fn add(
        &mut self,
        name: &str,
        mode: u32,
        content: &[u8],
        device: Option<(u32, u32)>,
    ) -> Result<()> {
        let (major, minor) = device.unwrap_or((0, 0));
        let builder = newc::Builder::new(name)
            .ino(self.inode)
            .nlink(1)
            .mode(mode)
            .rdev_major(major)
            .rdev_minor(minor);
        self.inode += 1;
        let mut writer = builder.write(&mut self.bytes, u32::try_from(content.len())?);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }
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
