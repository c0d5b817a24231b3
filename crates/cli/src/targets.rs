//! `secmon targets`: what can be watched on this machine.

use std::path::Path;

use anyhow::Result;
use secmon_guest::{Kind, Value};
use secmon_platform::ivshmem;
use secmon_platform::target;

use crate::arguments::Format;
use crate::listing::{self, column};
use crate::report::Reporter;

/// Lists the targets.
pub fn targets(format: Format, reporter: Reporter) -> Result<()> {
    let columns = [
        column("target", Kind::Text, "What to give to -t"),
        column("name", Kind::Text, "The guest's name"),
        column("uuid", Kind::Text, "The guest's UUID"),
        column("pid", Kind::Unsigned, "The process that runs it"),
        column("machine", Kind::Text, "The machine type"),
        column("ram", Kind::Unsigned, "Bytes of RAM"),
        column("access", Kind::Text, "How its memory is read"),
        column("pause", Kind::Text, "How it is paused"),
        column(
            "problem",
            Kind::Text,
            "What stands in the way, and what to do about it",
        ),
    ];
    let targets = target::targets(Path::new(ivshmem::PCI_DEVICES));
    if targets.is_empty() {
        reporter.warn(
            "no running QEMU and no shared-memory device here; a memory image is watched with -t file:PATH",
        );
    }
    let rows = targets.into_iter().map(|row| {
        vec![
            Value::from(row.target),
            Value::from(row.name),
            Value::from(row.uuid),
            Value::from(row.pid),
            Value::from(row.machine),
            Value::from(row.ram),
            Value::from(row.access),
            Value::from(row.pause),
            Value::from(row.problem),
        ]
    });
    listing::show(&columns, format, rows)?;
    Ok(())
}
