//! Rows that are not about a guest: the tables, their columns, the targets.

use std::io::{self, IsTerminal, Write};

use secmon_guest::{ColumnInfo, Cost, Kind, Shown, TrustLevel, Value};

use crate::arguments::Format;
use crate::output::{Rows, Style};

/// A column of a listing.
pub const fn column(name: &'static str, kind: Kind, meaning: &'static str) -> ColumnInfo {
    ColumnInfo {
        name,
        kind,
        cost: Cost::Kernel,
        shown: Shown::Always,
        meaning,
    }
}

/// Stdout, buffered in large pieces whatever it is.
pub fn stdout() -> io::Result<io::BufWriter<impl Write>> {
    use std::os::fd::AsFd;
    // A file of its own: `Stdout` would look for line ends in all it gets.
    let file = std::fs::File::from(io::stdout().as_fd().try_clone_to_owned()?);
    Ok(io::BufWriter::with_capacity(64 << 10, file))
}

/// How stdout shows a table: cut to its width on a terminal, whole elsewhere.
pub fn style() -> Style {
    let terminal = io::stdout().is_terminal();
    let width = || {
        rustix::termios::tcgetwinsize(io::stdout())
            .ok()
            .map(|size| usize::from(size.ws_col))
            .filter(|columns| *columns > 0)
    };
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
    Style {
        width: terminal.then(width).flatten(),
        color: terminal && !no_color && !dumb,
        header: true,
        trust: None,
    }
}

/// As [`style`], for rows about a guest.
pub fn style_of(trust: TrustLevel) -> Style {
    Style {
        trust: Some(trust),
        ..style()
    }
}

/// Writes a listing to stdout.
pub fn show(
    columns: &[ColumnInfo],
    format: Format,
    rows: impl IntoIterator<Item = Vec<Value>>,
) -> io::Result<()> {
    let mut out = Rows::new(stdout()?, columns.to_vec(), format, style())?;
    for row in rows {
        out.row(&row)?;
    }
    out.finish()?;
    Ok(())
}
