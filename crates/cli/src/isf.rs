//! `secmon isf`: the kernel's symbols and types as a file that other tools
//! read.

use std::fs::File;
use std::io::Write;

use anyhow::{Context, Result};

use crate::arguments::IsfArguments;
use crate::listing;
use crate::report::{Advise, Reporter};
use crate::session::Session;

/// Writes the ISF document of the target's kernel.
pub fn isf(session: &Session<'_>, arguments: &IsfArguments, reporter: Reporter) -> Result<()> {
    let out: Box<dyn Write> = match &arguments.output {
        Some(path) => {
            // Opened before this process is confined; never over a file that
            // is there.
            let file = File::create_new(path)
                .with_context(|| format!("creating {}", path.display()))
                .advise("an existing file is left as it is: remove it or choose another name")?;
            Box::new(file)
        }
        None => Box::new(listing::stdout()?),
    };
    let source = session.open()?;
    let guest = session.guest_alone(&source)?;
    secmon_profile::write_isf(guest.kernel(), out)
        .advise("a kernel without types of its own can be given an ISF file with --isf")?;
    if let Some(path) = &arguments.output {
        reporter.note(format_args!("written to {}", path.display()));
    }
    source.finish()
}
