//! Processes with odd names, all children of one.

use std::io;

use super::report::{self, Reports};
use crate::agent::sys;

/// Names as `prctl(PR_SET_NAME)` takes them: any bytes but NUL.
const NAMES: &[&[u8]] = &[
    b"",
    b" ",
    b"two words",
    b"  leading",
    b"trailing  ",
    b"new\nline",
    b"\n",
    b"tab\there",
    b"(parens)",
    b"a) R 1 1 (b",
    b")",
    "naïve-日本".as_bytes(),
    "emoji-🦀🦀".as_bytes(),
    b"\xff\xfe\x80bad",
    b"cut-\xe6\x97",
    b"\x1b[31mred",
    b"\x01\x7f\x08",
    b"back\\slash",
    b"quote'\"`$",
    b"fifteen-bytes-x",
    b"sixteen-bytes-xy",
    b"[kthreadd]",
    b"kworker/0:0",
    b"-starts",
    b"../../etc",
    b"%s%n%x",
];

/// A process for each name.
pub fn processes(reports: &mut Reports) -> io::Result<()> {
    reports.simple("names", |failures| {
        for name in NAMES {
            let made = report::child_that_stands(|| {
                sys::set_name(name);
                Ok(())
            });
            if let Err(error) = made {
                failures.push(error.to_string());
            }
        }
        Ok(())
    })?;
    Ok(())
}
