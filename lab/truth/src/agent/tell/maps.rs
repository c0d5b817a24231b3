//! Mappings from `/proc/<pid>/maps`.

use std::fs;
use std::io;

use secmon_truth::Mapping;

use super::{pids, unescape_octal};

/// Every mapping of every process.
pub fn maps() -> io::Result<Vec<Mapping>> {
    let mut mappings = Vec::new();
    for pid in pids()? {
        let text = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        mappings.extend(
            text.split(|byte| *byte == b'\n')
                .filter_map(|line| mapping(pid, line)),
        );
    }
    Ok(mappings)
}

fn mapping(pid: i32, line: &[u8]) -> Option<Mapping> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let (start, end) = text()?.split_once('-')?;
    let permissions = text()?.to_owned();
    let offset = u64::from_str_radix(text()?, 16).ok()?;
    let device = text()?.to_owned();
    let inode = text()?.parse().ok()?;
    let name = fields.next().unwrap_or(b"");
    let blanks = name.iter().take_while(|byte| **byte == b' ').count();
    Some(Mapping {
        pid,
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        permissions,
        offset,
        device,
        inode,
        name: unescape_octal(&name[blanks..], b"\n"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_blanks_and_newlines() {
        let line = b"7f00-8f00 rw-s 00001000 00:1a 42                  /tmp/a b\\012c (deleted)";
        let mapping = mapping(1, line).unwrap();
        assert_eq!(
            (mapping.start, mapping.end, mapping.offset),
            (0x7f00, 0x8f00, 0x1000)
        );
        assert_eq!(mapping.inode, 42);
        assert_eq!(mapping.name, "/tmp/a b\nc (deleted)");
    }

    #[test]
    fn an_anonymous_mapping_has_an_empty_name() {
        let mapping = mapping(1, b"7f00-8f00 ---p 00000000 00:00 0 ").unwrap();
        assert_eq!(mapping.name, "");
    }
}
