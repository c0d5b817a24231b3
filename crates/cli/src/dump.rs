//! `secmon dump`: the target's memory in a file.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use secmon_guest::{Kind, Value};
use secmon_platform::image::write::{self, Start, WriteFormat, WriteOptions};

use crate::arguments::{DumpArguments, DumpFormat, Format};
use crate::listing::{self, column};
use crate::report::{Advise, Reporter};
use crate::session::Session;

/// How many unreadable ranges are said one by one.
const SAID: usize = 3;

impl From<DumpFormat> for WriteFormat {
    fn from(format: DumpFormat) -> Self {
        match format {
            DumpFormat::Raw => Self::Raw,
            DumpFormat::Lime => Self::Lime,
            DumpFormat::Elf => Self::ElfCore,
        }
    }
}

/// Writes the target's memory.
pub fn dump(
    mut session: Session<'_>,
    arguments: &DumpArguments,
    format: Format,
    reporter: Reporter,
) -> Result<()> {
    let path = &arguments.output;
    let folder = folder_of(path);
    if !folder.is_dir() {
        bail!(
            "{} can't be written: {} is no folder",
            path.display(),
            folder.display()
        );
    }
    session.writes_to(folder.clone());
    let source = session.open()?;
    // Tools for crash dumps find the kernel by these notes.
    let notes = match (arguments.kind, source.vmcoreinfo()) {
        (DumpFormat::Elf, Some(notes)) => Some(notes.to_vec()),
        (DumpFormat::Elf, None) => match session.guest(&source) {
            Ok(guest) => {
                let notes = guest.kernel().vmcoreinfo.as_ref();
                notes.map(|notes| notes.text.clone().into_bytes())
            }
            Err(error) => {
                reporter.note(format_args!("the dump has no VMCOREINFO: {error}"));
                None
            }
        },
        _ => None,
    };
    if !arguments.no_space_check && !arguments.resume {
        check_space(&folder, source.memory().size())?;
    }
    let started = Instant::now();
    let bar = ProgressBar::new(0);
    bar.set_style(
        ProgressStyle::with_template(
            "{bar:30} {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left",
        )
        .context("the progress bar's template")?,
    );
    let written = write::write(
        &**source.memory(),
        path,
        &mut WriteOptions {
            format: arguments.kind.into(),
            start: if arguments.resume {
                Start::Resume
            } else {
                Start::New
            },
            vmcoreinfo: notes.as_deref(),
            progress: &mut |progress| {
                bar.set_length(progress.total);
                bar.set_position(progress.done);
                ControlFlow::Continue(())
            },
        },
    );
    bar.finish_and_clear();
    let written = written.advise("an unfinished dump goes on with --resume")?;
    let elapsed = started.elapsed();
    reporter.note(format_args!("written in {elapsed:.1?}"));
    source.finish()?;

    let columns = [
        column("path", Kind::Text, "The file"),
        column(
            "length",
            Kind::Unsigned,
            "Its length in bytes, holes included",
        ),
        column(
            "stored",
            Kind::Unsigned,
            "The bytes that are no holes of the file",
        ),
        column("sha256", Kind::Text, "Its SHA-256, as sha256sum gives it"),
        column(
            "resumed_at",
            Kind::Unsigned,
            "Where an interrupted dump went on",
        ),
        column(
            "unreadable",
            Kind::Unsigned,
            "Bytes that could not be read; zero in the file",
        ),
    ];
    let listed: u64 = written
        .unreadable
        .iter()
        .map(|(region, _)| region.length)
        .sum();
    let unreadable = listed.saturating_add(written.unreadable_unlisted);
    let row = vec![
        Value::from(path.display().to_string()),
        Value::from(written.length),
        Value::from(written.stored),
        Value::from(written.sha256_hexadecimal()),
        Value::from(written.resumed_at),
        Value::from(unreadable),
    ];
    listing::show(&columns, format, [row])?;
    for (region, error) in written.unreadable.iter().take(SAID) {
        let (start, end) = (region.start, region.end());
        reporter.warn(format_args!("{start}-{end} is zero in the dump: {error}"));
    }
    if unreadable > 0 {
        bail!(
            "{unreadable} bytes of memory could not be read, in {} ranges; they are zero in {}",
            written.unreadable.len(),
            path.display()
        );
    }
    Ok(())
}

/// The folder that a file lies in.
fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Whether all of memory would fit, were none of it zero.
fn check_space(folder: &Path, needed: u64) -> Result<()> {
    let disk = rustix::fs::statvfs(folder)
        .with_context(|| format!("asking for the free space of {}", folder.display()))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free < needed {
        return Err(anyhow!(
            "{} has {} MiB free, the dump may need {} MiB",
            folder.display(),
            free >> 20,
            needed >> 20
        ))
        .advise("make room, or try with --no-space-check: pages of zeros take none");
    }
    Ok(())
}
