//! The tables and their columns as a Markdown document.

use std::io::{self, Write};

use secmon_guest::{Cost, Shown, Table};

use super::kind_name;

/// A text inside of a Markdown table cell.
fn cell(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('|', "\\|")
        .replace('\n', " ")
}

/// Writes the reference of all `tables`.
pub fn describe_tables(out: &mut impl Write, tables: &[&dyn Table]) -> io::Result<()> {
    writeln!(
        out,
        "# Tables\n\n\
         Made by `secmon tables --format markdown` from the definitions in the program itself.\n\n\
         A column marked with * is shown by a terminal unless other columns are asked for; JSON\n\
         and CSV always have all. A column marked *user pages* is read from a process's own memory\n\
         and can be swapped out. Any value can be null; one that could not be read is null in JSON\n\
         and has its reason in the row's `unreadable` object. Addresses are `\"0x…\"` strings in\n\
         JSON, times are RFC 3339 in UTC. Each row of JSON and CSV ends with `trust_level`: L0 from a\n\
         process on the host, L1 from a monitoring VM.\n\n\
         | command | also | rows |\n|---|---|---|"
    )?;
    for table in tables {
        let aliases: Vec<String> = table
            .aliases()
            .iter()
            .map(|alias| format!("`{alias}`"))
            .collect();
        writeln!(
            out,
            "| [`{name}`](#{name}) | {aliases} | {meaning} |",
            name = table.name(),
            aliases = aliases.join(", "),
            meaning = cell(table.meaning()),
        )?;
    }
    for table in tables {
        writeln!(
            out,
            "\n## {}\n\n{}\n\n| column | type | meaning |\n|---|---|---|",
            table.name(),
            table.meaning(),
        )?;
        for column in table.columns() {
            let mark = match column.shown {
                Shown::Always => " *",
                Shown::OnRequest => "",
            };
            let cost = match column.cost {
                Cost::Kernel => "",
                Cost::UserPages => ", *user pages*",
            };
            writeln!(
                out,
                "| `{}`{mark} | {}{cost} | {} |",
                column.name,
                kind_name(column.kind),
                cell(column.meaning),
            )?;
        }
    }
    Ok(())
}
