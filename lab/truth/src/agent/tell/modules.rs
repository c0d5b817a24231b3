//! Modules from `/proc/modules` and `/sys/module`.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use secmon_truth::{ByteString, Module};

use super::info::build_id;
use super::text_of;

/// Every loaded module.
pub fn modules() -> io::Result<Vec<Module>> {
    Ok(fs::read_to_string("/proc/modules")?
        .lines()
        .filter_map(module)
        .collect())
}

fn module(line: &str) -> Option<Module> {
    let mut words = line.split_whitespace();
    let name = words.next()?.to_owned();
    let size = words.next()?.parse().ok()?;
    let refcount = words.next()?.parse().ok();
    let used_by = words
        .next()?
        .split(',')
        .filter(|user| !user.is_empty() && *user != "-")
        .map(str::to_owned)
        .collect();
    let state = words.next()?.to_owned();
    let address = u64::from_str_radix(words.next()?.trim_start_matches("0x"), 16).ok()?;
    let taint = words
        .next()
        .unwrap_or("")
        .trim_matches(['(', ')'])
        .to_owned();
    let folder = format!("/sys/module/{name}");
    Some(Module {
        parameters: parameters(&folder),
        version: text_of(format!("{folder}/version")),
        source_version: text_of(format!("{folder}/srcversion")),
        build_id: fs::read(format!("{folder}/notes/.note.gnu.build-id"))
            .ok()
            .and_then(|notes| build_id(&notes)),
        sections: sections(&folder),
        name,
        size,
        refcount,
        used_by,
        state,
        address,
        taint,
    })
}

fn parameters(folder: &str) -> BTreeMap<String, ByteString> {
    entries(&format!("{folder}/parameters"), |value| {
        Some(ByteString::from(value.strip_suffix(b"\n").unwrap_or(value)))
    })
}

fn sections(folder: &str) -> BTreeMap<String, u64> {
    entries(&format!("{folder}/sections"), |value| {
        let text = std::str::from_utf8(value).ok()?.trim();
        u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
    })
}

fn entries<T>(folder: &str, read: impl Fn(&[u8]) -> Option<T>) -> BTreeMap<String, T> {
    let Ok(entries) = fs::read_dir(folder) else {
        return BTreeMap::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let value = fs::read(entry.path()).ok()?;
            Some((entry.file_name().into_string().ok()?, read(&value)?))
        })
        .collect()
}
