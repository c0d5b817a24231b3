//! The guest's truth, a file a section.

pub mod bpf;
pub mod files;
pub mod info;
pub mod interfaces;
pub mod kmsg;
pub mod maps;
pub mod modules;
pub mod mounts;
pub mod namespaces;

pub mod processes;
pub mod sockets;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use secmon_truth::ByteString;

/// The numbers among a folder's entries (`/proc`, `task`, `fd`), sorted. The
/// folder is closed again before they are looked at, so that a process that
/// reads its own descriptors doesn't find this one.
fn numbers(folder: &str) -> io::Result<Vec<i32>> {
    let mut numbers: Vec<i32> = fs::read_dir(folder)?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// All process ids.
fn pids() -> io::Result<Vec<i32>> {
    numbers("/proc")
}

/// A symbolic link's text.
fn link(path: &str) -> Option<ByteString> {
    fs::read_link(path)
        .ok()
        .map(|target| ByteString::from(target.as_os_str().as_bytes()))
}

/// The inode number in a namespace link (`net:[4026531840]`).
fn namespace_inode(path: &str) -> Option<u64> {
    let target = fs::read_link(path).ok()?;
    let text = target.to_str()?;
    text.split_once('[')?.1.strip_suffix(']')?.parse().ok()
}

/// Undoes the `\ooo` escapes of `mountinfo` and `maps`: those named in
/// `escaped` only, because a backslash may also stand for itself.
fn unescape_octal(text: &[u8], escaped: &[u8]) -> ByteString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let value = text
            .get(at + 1..at + 4)
            .filter(|_| text[at] == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
            .filter(|value| escaped.contains(value));
        match value {
            Some(value) => {
                bytes.push(value);
                at += 4;
            }
            None => {
                bytes.push(text[at]);
                at += 1;
            }
        }
    }
    ByteString(bytes)
}

/// Splits the mark ` (deleted)` off a link's text, if it is a mark: a name may
/// end like it. It is one unless the whole text names the same inode, seen
/// from the process's root or from ours.
fn split_mark(pid: i32, link: &ByteString, metadata: &fs::Metadata) -> (ByteString, bool) {
    let Some(bare) = link.0.strip_suffix(b" (deleted)") else {
        return (link.clone(), false);
    };
    let text = OsStr::from_bytes(&link.0);
    let named_so = [format!("/proc/{pid}/root"), String::new()]
        .into_iter()
        .any(|root| {
            let mut path = OsString::from(root);
            path.push(text);
            fs::symlink_metadata(path)
                .is_ok_and(|other| (other.dev(), other.ino()) == (metadata.dev(), metadata.ino()))
        });
    if named_so {
        (link.clone(), false)
    } else {
        (ByteString::from(bare), true)
    }
}

/// A small text file without the newline at its end.
fn text_of(path: impl AsRef<Path>) -> Option<String> {
    fs::read(path).ok().map(|bytes| {
        String::from_utf8_lossy(&bytes)
            .trim_end_matches('\n')
            .to_owned()
    })
}

/// A file's bytes as a path-like string.
fn os_bytes(text: &OsStr) -> ByteString {
    ByteString::from(text.as_bytes())
}
