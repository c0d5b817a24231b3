//! `secmon`: the command line.
//!
//! It reads what was asked for, opens the target, and writes rows; how
//! anything works is known by the crates below.
#![deny(unsafe_code)]

mod arguments;
mod baseline;
mod check;
mod columns;
mod command;
mod documents;
mod dump;
mod fault;
mod filter;
mod findings;
mod gate;
#[cfg(feature = "watch")]
mod guard;
mod inspect;
mod isf;
mod listing;
mod location;
mod monitor;
mod output;
mod policy;
mod query;
mod reader;
mod reference;
mod report;
mod respond;
mod session;
mod targets;
#[cfg(feature = "verify")]
mod verify;
#[cfg(feature = "watch")]
mod watch;

use std::fs::File;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use secmon_guest::{Table, TrustLevel};

use arguments::{BuiltIn, Common, Format, ReadArguments, RowOptions, TranslateArguments};
use command::Action;
use findings::Told;
use inspect::{Place, Sink, Walk};
use monitor::remote::Answered;
use query::Query;
use report::{Advise, Reporter};
use session::Session;

/// The exit status of an error; 1 is kept for findings.
const ERROR: u8 = 2;

fn main() -> ExitCode {
    // Process 1 of a monitoring VM is this same program.
    if let Some(code) = secmon_monitor::inside::run_if_inside() {
        return code;
    }
    let mut arguments = std::env::args_os().skip(1);
    let first = arguments.next().unwrap_or_default();
    if first == command::RESUME_WATCH {
        return secmon_platform::qemu::pause::watch_main(arguments);
    }
    if let Some(code) = gate::hidden(&first, &mut arguments) {
        return code;
    }
    if let Some(code) = monitor::hidden(&first, &mut arguments) {
        return code;
    }
    let (common, action) = command::parse(std::env::args_os());
    let reporter = Reporter {
        verbose: common.verbose,
    };
    std::panic::set_hook(Box::new(move |panic| {
        reporter.warn(format_args!(
            "this is a bug in secmon, please report it: {panic}"
        ));
    }));
    // A panic unwinds to here, so that a paused guest is resumed on the way.
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| run(&common, action, reporter)));
    match result {
        Ok(Ok(code)) => code,
        Ok(Err(error)) if report::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            reporter.error(&error);
            ExitCode::from(ERROR)
        }
        Err(_) => ExitCode::from(ERROR),
    }
}

fn run(common: &Common, action: Action, reporter: Reporter) -> Result<ExitCode> {
    #[cfg(feature = "watch")]
    if let Action::BuiltIn(command) = &action {
        match &**command {
            BuiltIn::Watch(arguments) => return watch::watch(common, arguments, reporter),
            BuiltIn::Guard(arguments) => return guard::guard(common, arguments, reporter),
            BuiltIn::Findings(arguments) => {
                watch::stored::findings(arguments, common.format)?;
                return Ok(ExitCode::SUCCESS);
            }
            _ => {}
        }
    }
    #[cfg(feature = "verify")]
    if let Action::BuiltIn(command) = &action
        && let BuiltIn::Verify(command) = &**command
    {
        return verify::verify(command, common.format);
    }
    let of_monitor = common.target.as_deref().and_then(monitor::address);
    let action = match of_monitor {
        Some(address) => match monitor::remote::run(&address?, common, action, reporter)? {
            Answered::Not(action) => action,
            Answered::Done(code) => return Ok(code),
        },
        None => action,
    };
    let mut session = Session::new(common, reporter);
    let format = common.format;
    let command = match action {
        Action::Show(table, options) => {
            show(&session, table, &options, format, reporter)?;
            return Ok(ExitCode::SUCCESS);
        }
        Action::BuiltIn(command) => *command,
    };
    let describes_tables = matches!(command, BuiltIn::Tables { .. });
    if format == Format::Markdown && !describes_tables {
        bail!("--format markdown is for `secmon tables` only");
    }
    match command {
        BuiltIn::Check(arguments) => {
            session.reads(reference::places(arguments.kernel.as_deref()));
            if let Some(folder) = &arguments.baseline {
                let folder = baseline::folder(folder)?;
                baseline::make(&folder)?;
                session.writes_to(folder);
            }
            return check::check(&session, &arguments, format, reporter);
        }
        // Done before a target was opened.
        #[cfg(feature = "watch")]
        BuiltIn::Watch(_) | BuiltIn::Findings(_) | BuiltIn::Guard(_) => Ok(()),
        #[cfg(feature = "verify")]
        BuiltIn::Verify(_) => Ok(()),
        BuiltIn::Targets => targets::targets(format, reporter),
        BuiltIn::Tables { table } => documents::tables(table.as_deref(), format),
        BuiltIn::Completions { shell } => documents::completions(shell),
        BuiltIn::Man { output } => documents::man(output.as_deref()),
        BuiltIn::Gate(arguments) => gate::gate(&arguments, common.target.as_deref(), reporter),
        BuiltIn::Respond(arguments) => respond::respond(&session, &arguments, format),
        BuiltIn::Monitor(command) => monitor::run(&command, common, reporter),
        BuiltIn::Read(arguments) => read(&session, &arguments, format),
        BuiltIn::Translate(arguments) => translate(&session, &arguments, format),
        BuiltIn::Isf(arguments) => {
            fault::install();
            isf::isf(&session, &arguments, reporter)
        }
        BuiltIn::Dump(arguments) => {
            fault::install();
            dump::dump(session, &arguments, format, reporter)
        }
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Shows a table of the target's guest.
fn show(
    session: &Session<'_>,
    table: &'static dyn Table,
    options: &RowOptions,
    format: Format,
    reporter: Reporter,
) -> Result<()> {
    let query = Query::new(table, format, options)?;
    fault::install();
    let source = session.open()?;
    let guest = session.guest_alone(&source)?;
    let started = Instant::now();
    let outcome = query.run(
        &guest,
        listing::stdout()?,
        listing::style_of(TrustLevel::L0),
    )?;
    let elapsed = started.elapsed();
    let rows = outcome.summary.rows;
    reporter.note(format_args!("{rows} rows in {elapsed:.1?}"));
    // The guest runs again before anything is said.
    let resumed = source.finish();
    findings::report(
        &Told::from(&guest),
        &query,
        outcome,
        options.strict,
        reporter,
    )?;
    resumed
}

/// `secmon read`.
fn read(session: &Session<'_>, arguments: &ReadArguments, format: Format) -> Result<()> {
    fault::install();
    let sink = sink(arguments, format)?;
    let source = session.open()?;
    let place = session.place(&source, &arguments.location)?;
    inspect::read(&place, arguments.length, sink)?;
    source.finish()
}

/// What becomes of the bytes of `secmon read`.
fn sink(arguments: &ReadArguments, format: Format) -> Result<Sink> {
    Ok(match (&arguments.output, format) {
        (Some(path), _) => {
            // Never over a file that is there: it may be the image itself.
            let file = File::create_new(path)
                .with_context(|| format!("creating {}", path.display()))
                .advise("an existing file is left as it is: remove it or choose another name")?;
            Sink::RawFile(file)
        }
        (None, _) if arguments.raw => Sink::RawStdout,
        (None, Format::Table | Format::Markdown) => Sink::Hex,
        (None, format) => Sink::Rows(format),
    })
}

/// `secmon translate`.
fn translate(session: &Session<'_>, arguments: &TranslateArguments, format: Format) -> Result<()> {
    fault::install();
    let source = session.open()?;
    let guest = session.guest_alone(&source)?;
    let mut walks = Vec::new();
    for location in &arguments.locations {
        match session::resolve(&guest, location)? {
            Place::Virtual(space, address) => walks.push(Walk::of(&space, address)),
            Place::Physical(..) | Place::Asked(_) => {
                bail!("{location} is a physical address already")
            }
        }
    }
    inspect::translate(walks, format, TrustLevel::L0)?;
    source.finish()
}
