//! What `files` should have: `/proc/PID/fd`, `/proc/PID/fdinfo` and `stat`.

use std::collections::BTreeSet;

use secmon_guest::{Selection, Value};
use secmon_lab::truth::{FileKind, OpenFile};

use super::{Check, Truth};
use crate::rows::{Comparison, Expected, ExpectedRow};

/// The comparison.
pub const FILES: Check = Check {
    comparison: Comparison {
        table: "files",
        key: &["pid", "fd"],
    },
    selection: Selection::default,
    expected,
    beyond_truth: |_| false,
};

fn expected(truth: &Truth) -> Vec<ExpectedRow> {
    let overlays: BTreeSet<&str> = truth
        .mounts
        .iter()
        .filter(|mount| mount.fstype == "overlay")
        .map(|mount| mount.device.as_str())
        .collect();
    let row = |file: &OpenFile| row(file, overlays.contains(file.device.as_str()));
    truth.files.iter().map(row).collect()
}

fn row(file: &OpenFile, on_overlay: bool) -> ExpectedRow {
    let is_device = matches!(file.kind, FileKind::CharacterDevice | FileKind::BlockDevice);
    let node = file.node.clone().filter(|_| is_device);
    let (path, deleted) = path_and_deleted(file.link.as_bytes(), file.deleted);
    ExpectedRow::from([
        ("pid", Expected::exactly(file.pid)),
        ("fd", Expected::exactly(file.fd)),
        ("type", Expected::text(kind(file).as_bytes())),
        ("path", path),
        ("deleted", deleted),
        ("flags", Expected::Exactly(flags(file.flags))),
        ("position", Expected::exactly(file.position)),
        ("size", Expected::exactly(file.size)),
        (
            "mode",
            Expected::exactly(format!("{:04o}", file.mode & 0o7777)),
        ),
        ("inode", Expected::exactly(file.inode)),
        ("device", Expected::exactly(file.device.clone())),
        ("node", Expected::exactly(node)),
        (
            "links",
            match file.kind {
                // `stat` passes on what the layer below says, if it is one.
                FileKind::Directory if on_overlay => {
                    Expected::OneOf(vec![1_u64.into(), file.links.into()])
                }
                _ => Expected::exactly(file.links),
            },
        ),
    ])
}

/// What `path` and `deleted` should be for a link of `/proc`. The mark at its
/// end is ambiguous: a name may end like it, and a file that lost this name
/// may have others. So a file with names left may be told either way.
fn path_and_deleted(link: &[u8], without_names: bool) -> (Expected, Expected) {
    match link.strip_suffix(b" (deleted)") {
        None => (Expected::text(link), Expected::exactly(false)),
        Some(path) if without_names => (Expected::text(path), Expected::exactly(true)),
        Some(path) => (
            Expected::OneOf(vec![Value::text(path), Value::text(link)]),
            Expected::OneOf(vec![true.into(), false.into()]),
        ),
    }
}

fn kind(file: &OpenFile) -> String {
    match file.kind {
        FileKind::Regular => "regular",
        FileKind::Directory => "directory",
        FileKind::SymbolicLink => "symlink",
        FileKind::CharacterDevice => "character",
        FileKind::BlockDevice => "block",
        FileKind::Fifo => "fifo",
        FileKind::Pipe => "pipe",
        FileKind::Socket => "socket",
        FileKind::Memfd => "memfd",
        FileKind::Namespace => "namespace",
        FileKind::Pidfd => "pidfd",
        FileKind::AnonymousInode => {
            let link = file.link.to_string();
            let name = link.strip_prefix("anon_inode:").unwrap_or(&link);
            return match name.trim_start_matches('[').trim_end_matches(']') {
                "eventpoll" => "epoll".into(),
                name => name.into(),
            };
        }
    }
    .into()
}

/// The names of the flags, as open(2) has them.
fn flags(flags: u32) -> Value {
    const NAMES: [(u32, &str); 17] = [
        (0x41_0000, "O_TMPFILE"),
        (0x10_1000, "O_SYNC"),
        (0x40, "O_CREAT"),
        (0x80, "O_EXCL"),
        (0x100, "O_NOCTTY"),
        (0x200, "O_TRUNC"),
        (0x400, "O_APPEND"),
        (0x800, "O_NONBLOCK"),
        (0x1000, "O_DSYNC"),
        (0x2000, "O_ASYNC"),
        (0x4000, "O_DIRECT"),
        (0x8000, "O_LARGEFILE"),
        (0x1_0000, "O_DIRECTORY"),
        (0x2_0000, "O_NOFOLLOW"),
        (0x4_0000, "O_NOATIME"),
        (0x8_0000, "O_CLOEXEC"),
        (0x20_0000, "O_PATH"),
    ];
    let mut list = vec![Value::from(
        ["O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE"][(flags & 3) as usize],
    )];
    let mut left = flags & !3;
    for (bits, name) in NAMES {
        if left & bits == bits {
            list.push(name.into());
            left &= !bits;
        }
    }
    if left != 0 {
        list.push(format!("{left:#x}").into());
    }
    Value::from(list)
}
