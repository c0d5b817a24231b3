//! The whole command line as clap knows it: the built-in commands plus one
//! for each guest table, and the help that a person learns it from.

use clap::{Args, Command, FromArgMatches, Subcommand};
use secmon_guest::{Cost, Shown, Table};

use crate::arguments::{BuiltIn, Common, RowOptions};
use crate::output::kind_name;

/// What was asked for.
pub enum Action {
    /// The rows of a table.
    Show(&'static dyn Table, Box<RowOptions>),
    /// A command of its own.
    BuiltIn(Box<BuiltIn>),
}

/// Tables by subject, as the help lists them. A table that is not named here
/// is listed at the end.
const SUBJECTS: [(&str, &[&str]); 5] = [
    (
        "Processes",
        &[
            "processes",
            "process_tree",
            "threads",
            "files",
            "maps",
            "changed_code",
            "env",
            "credentials",
        ],
    ),
    ("Network", &["sockets", "interfaces"]),
    ("File systems and namespaces", &["mounts", "namespaces"]),
    (
        "Kernel",
        &["info", "modules", "kmsg", "bpf", "symbols", "types"],
    ),
    ("What could not be read", &["diagnostics"]),
];

/// The hidden command by which the program watches over a paused guest. It is
/// taken before anything else is done, see `main`.
pub const RESUME_WATCH: &str = "__resume-watch";

const EXAMPLES: &str = "\
Examples:
  secmon targets                                what can be watched on this machine
  secmon -t qemu:web1 ps                        processes of a running QEMU or libvirt guest
  secmon -t file:memory.lime sockets --format json | jq '.[].remote_address'
  secmon -t qemu:web1 files --pid 812,813       open files of two processes
  secmon -t qemu:web1 ps -c pid,comm,exe_deleted -w exe_deleted=true
  secmon -t qemu:web1 ps --sort start_time:desc --limit 10
  secmon -t qemu:web1 --pause maps -p 1         stop the guest meanwhile, then let it run
  secmon -t qemu:web1 check                     what hides there
  secmon -t file:memory.raw read linux_banner   memory at a symbol
  secmon -t qemu:web1 dump web1.elf --as elf    save its memory
  secmon tables processes                       what the columns mean

A terminal shows a table's usual columns, JSON and CSV all of them; what could not be read is
`?` in a table, and null with its reason under `unreadable` in JSON. Text of the guest is shown
with control characters escaped, so that it can't act on your terminal.

Exit status:
  0  done; warnings, if any, are on stderr
  1  `check` found something
  2  an error: the message says what failed, on what, and what to do next

Environment:
  SECMON_TARGET     the target, where -t is not given
  SECMON_CACHE_DIR  where kernel profiles are kept (else secmon/profiles in $XDG_CACHE_HOME or ~/.cache)
  NO_COLOR          no colours, if it is set to anything";

/// The name by which the help lists a table: its own, but for the two that
/// every user knows by a shorter one.
fn listed_name(table: &dyn Table) -> &'static str {
    let known = ["ps", "pstree"];
    let alias = table.aliases().iter().find(|alias| known.contains(alias));
    alias.copied().unwrap_or(table.name())
}

/// The list of commands by subject.
fn command_list(built_in: &Command, tables: &[&'static dyn Table]) -> String {
    let mut text = String::new();
    let mut line = |name: &str, about: &str| {
        text.push_str(&format!("  {name:<13} {about}\n"));
    };
    let mut listed: Vec<&str> = Vec::new();
    let mut section = String::new();
    for (subject, names) in SUBJECTS {
        let of_subject = names
            .iter()
            .filter_map(|name| tables.iter().find(|table| table.name() == *name));
        let mut header = Some(subject);
        for table in of_subject {
            if let Some(subject) = header.take() {
                section.push_str(&format!("\n{subject}:\n"));
            }
            listed.push(table.name());
            section.push_str(&table_line(*table));
        }
    }
    let rest: Vec<_> = tables
        .iter()
        .filter(|table| !listed.contains(&table.name()))
        .collect();
    if !rest.is_empty() {
        section.push_str("\nOther tables:\n");
        rest.iter()
            .for_each(|table| section.push_str(&table_line(**table)));
    }
    for command in built_in
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
    {
        let about = command.get_about().map(ToString::to_string);
        line(command.get_name(), &about.unwrap_or_default());
    }
    format!("{}\n\nCommands:\n{text}", section.trim_end())
}

/// A table's line in the list, with its other names.
fn table_line(table: &dyn Table) -> String {
    let name = listed_name(table);
    let others: Vec<&str> = std::iter::once(table.name())
        .chain(table.aliases().iter().copied())
        .filter(|other| *other != name)
        .collect();
    let brief = brief(table.meaning());
    if others.is_empty() {
        return format!("  {name:<13} {brief}\n");
    }
    format!("  {name:<13} {brief} ({})\n", others.join(", "))
}

/// The start of a table's meaning, where it can be cut.
fn brief(text: &str) -> &str {
    const LONG: usize = 60;
    let before = |text, end| str::split_once(text, end).map_or(text, |(before, _)| before);
    let sentence = before(before(text, ". "), ": ").trim_end_matches('.');
    if sentence.len() > LONG {
        before(sentence, ", ")
    } else {
        sentence
    }
}

/// The columns of a table for the end of its help.
fn column_list(table: &dyn Table) -> String {
    let columns = table.columns();
    let mut text = String::from("Columns (* shown unless others are asked for):");
    for column in columns {
        let mark = match column.shown {
            Shown::Always => '*',
            Shown::OnRequest => ' ',
        };
        let cost = match column.cost {
            Cost::Kernel => "",
            Cost::UserPages => " Read from the process's own pages, which may be swapped out.",
        };
        let kind = kind_name(column.kind);
        text.push_str(&format!("\n  {mark} {} ({kind})", column.name));
        push_wrapped(&mut text, column.meaning);
        push_wrapped(&mut text, cost.trim_start());
    }
    text
}

/// Appends words on lines of their own, indented, that fit any terminal.
fn push_wrapped(text: &mut String, words: &str) {
    const INDENT: &str = "\n        ";
    const WIDTH: usize = 70;
    let mut left = 0;
    for word in words.split_whitespace() {
        let length = word.chars().count();
        if length >= left {
            text.push_str(INDENT);
            left = WIDTH;
        } else {
            text.push(' ');
            left -= 1;
        }
        text.push_str(word);
        left = left.saturating_sub(length);
    }
}

/// Completes a table's command when it is used or its help is asked for.
fn complete_table_command(command: Command) -> Command {
    let table = secmon_guest::table(command.get_name());
    let command = RowOptions::augment_args(command);
    match table {
        Some(table) => command
            .long_about(table.meaning())
            .after_long_help(column_list(table)),
        None => command,
    }
}

/// The command line.
pub fn command() -> Command {
    let command = BuiltIn::augment_subcommands(Common::augment_args(Command::new("secmon")));
    let commands = command_list(&command, secmon_guest::tables());
    let command = command
        .version(env!("CARGO_PKG_VERSION"))
        .about("See into a virtual machine from outside: its processes, files, sockets and kernel")
        .long_about(
            "See into a virtual machine from outside: its processes, files, sockets and kernel, \
             from nothing but its memory. Nothing is installed in the guest, no profile of its \
             kernel is needed, and the guest is not changed.",
        )
        .subcommand_required(true)
        .arg_required_else_help(true)
        .propagate_version(false)
        .max_term_width(110)
        .after_help("`secmon COMMAND --help` says more, `secmon --help` has examples.")
        .after_long_help(EXAMPLES)
        .help_template(format!(
            "{{about-with-newline}}\n{{usage-heading}} secmon -t TARGET COMMAND [OPTIONS]\n\
             {commands}\nOptions:\n{{options}}{{after-help}}"
        ));
    secmon_guest::tables()
        .iter()
        .fold(command, |command, table| {
            command.subcommand(
                Command::new(table.name())
                    .visible_aliases(table.aliases())
                    .about(brief(table.meaning()))
                    .defer(complete_table_command),
            )
        })
}

/// Reads the command line; usage errors and help end the process here.
pub fn parse(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> (Common, Action) {
    let mut command = command();
    let parsed = matched(&mut command, arguments);
    parsed.unwrap_or_else(|error| error.format(&mut command).exit())
}

/// Reads a command line that was typed into a console.
///
/// # Errors
/// The text of a usage error, or of the help that was asked for.
pub fn try_parse(
    arguments: impl IntoIterator<Item = std::ffi::OsString>,
) -> Result<(Common, Action), String> {
    let mut command = command();
    let parsed = matched(&mut command, arguments);
    parsed.map_err(|error| error.format(&mut command).to_string())
}

fn matched(
    command: &mut Command,
    arguments: impl IntoIterator<Item = std::ffi::OsString>,
) -> Result<(Common, Action), clap::Error> {
    let matches = command.try_get_matches_from_mut(arguments)?;
    let common = Common::from_arg_matches(&matches)?;
    let action = match matches.subcommand() {
        Some((name, of_table)) if secmon_guest::table(name).is_some() => {
            let rows = RowOptions::from_arg_matches(of_table)?;
            secmon_guest::table(name).map(|table| Action::Show(table, Box::new(rows)))
        }
        _ => None,
    };
    let action = match action {
        Some(action) => action,
        None => Action::BuiltIn(Box::new(BuiltIn::from_arg_matches(&matches)?)),
    };
    Ok((common, action))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn every_table_is_a_command_with_its_columns_in_the_help() {
        for table in secmon_guest::tables() {
            let mut command = command();
            command.build();
            let of_table = command
                .find_subcommand_mut(table.name())
                .expect("each table has its command");
            let help = of_table.render_long_help().to_string();
            for column in table.columns() {
                assert!(
                    help.contains(column.name),
                    "{}: {}",
                    table.name(),
                    column.name
                );
            }
        }
    }

    #[test]
    fn the_list_names_every_command() {
        let list = command().render_long_help().to_string();
        for command in command()
            .get_subcommands()
            .filter(|command| !command.is_hide_set())
        {
            let named = std::iter::once(command.get_name())
                .chain(command.get_all_aliases())
                .any(|name| list.contains(&format!("\n  {name} ")));
            assert!(named, "{} is not listed in\n{list}", command.get_name());
        }
    }
}
