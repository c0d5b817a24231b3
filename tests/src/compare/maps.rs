//! What `maps` should have: `/proc/PID/maps`.

use secmon_guest::{Selection, Value};
use secmon_lab::truth::Mapping;

use super::{Check, Truth};
use crate::rows::{Comparison, Expected, ExpectedRow};

/// The comparison.
pub const MAPS: Check = Check {
    comparison: Comparison {
        table: "maps",
        key: &["pid", "start"],
    },
    selection: Selection::default,
    expected,
    beyond_truth: |_| false,
};

fn expected(truth: &Truth) -> Vec<ExpectedRow> {
    truth.maps.iter().map(row).collect()
}

fn row(mapping: &Mapping) -> ExpectedRow {
    let name = mapping.name.as_bytes();
    let null = || Expected::Exactly(Value::Null);
    let (path, deleted) = if name.is_empty() {
        (null(), null())
    } else if name.starts_with(b"[") {
        (Expected::text(name), null())
    } else {
        path_and_deleted(name)
    };
    let has_file = mapping.inode != 0 || mapping.device != "00:00";
    let file = |value: Value| {
        if has_file {
            Expected::Exactly(value)
        } else {
            null()
        }
    };
    ExpectedRow::from([
        ("pid", Expected::exactly(mapping.pid)),
        ("start", Expected::exactly(mapping.start)),
        ("end", Expected::exactly(mapping.end)),
        (
            "permissions",
            Expected::exactly(mapping.permissions.clone()),
        ),
        ("path", path),
        ("deleted", deleted),
        ("offset", Expected::exactly(mapping.offset)),
        ("device", file(decimal(&mapping.device).into())),
        ("inode", file(mapping.inode.into())),
    ])
}

/// What `path` and `deleted` should be. The kernel escapes newlines but not
/// the backslash before `012`, and a name may end like a deleted file's: what
/// may be meant is all accepted.
fn path_and_deleted(name: &[u8]) -> (Expected, Expected) {
    let mut names = vec![Vec::new()];
    for byte in name {
        let forms: &[&[u8]] = match byte {
            b'\n' => &[b"\n", b"\\012"],
            _ => &[std::slice::from_ref(byte)],
        };
        let longer = |name: &Vec<u8>| forms.iter().map(|form| [name, *form].concat()).collect();
        names = names.iter().flat_map::<Vec<_>, _>(longer).collect();
    }
    let bare = |name: &Vec<u8>| name.strip_suffix(b" (deleted)").map(Value::text);
    let paths: Vec<_> = names.iter().map(|name| Value::text(&**name)).collect();
    match names.iter().filter_map(bare).collect::<Vec<_>>() {
        marked if marked.is_empty() => (Expected::OneOf(paths), Expected::exactly(false)),
        marked => (
            Expected::OneOf([paths, marked].concat()),
            Expected::OneOf(vec![true.into(), false.into()]),
        ),
    }
}

/// `maps` has device numbers in hexadecimal, everything else in decimal.
fn decimal(device: &str) -> String {
    let numbers = device
        .split(':')
        .map(|number| u32::from_str_radix(number, 16).map_or("?".into(), |n| n.to_string()));
    numbers.collect::<Vec<_>>().join(":")
}
