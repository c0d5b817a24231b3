//! What `secmon` writes about itself: the tables, completions, man pages.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap_complete::Shell;
use secmon_guest::{Cost, Kind, Shown, Value};

use crate::arguments::Format;
use crate::listing::{self, column};
use crate::output::{describe_tables, kind_name};
use crate::report::Advise;
use crate::{columns, command};

/// `secmon tables [TABLE]`.
pub fn tables(name: Option<&str>, format: Format) -> Result<()> {
    let all = secmon_guest::tables();
    let Some(name) = name else {
        if format == Format::Markdown {
            let mut out = listing::stdout()?;
            describe_tables(&mut out, all)?;
            out.flush()?;
            return Ok(());
        }
        let columns = [
            column("name", Kind::Text, "The table"),
            column("aliases", Kind::List, "Its other names"),
            column("meaning", Kind::Text, "What its rows are"),
        ];
        let rows = all.iter().map(|table| {
            vec![
                Value::from(table.name()),
                Value::from(table.aliases().to_vec()),
                Value::from(table.meaning()),
            ]
        });
        listing::show(&columns, format, rows)?;
        return Ok(());
    };
    let Some(table) = secmon_guest::table(name) else {
        let names = all
            .iter()
            .flat_map(|table| std::iter::once(table.name()).chain(table.aliases().iter().copied()));
        let near = columns::near(name, names);
        let error = Err(anyhow::anyhow!("there is no table `{name}`"));
        return match near.is_empty() {
            true => error.advise("`secmon tables` lists all tables"),
            false => error.advise(format!("did you mean {}?", near.join(" or "))),
        };
    };
    if format == Format::Markdown {
        let mut out = listing::stdout()?;
        describe_tables(&mut out, &[table])?;
        out.flush()?;
        return Ok(());
    }
    let columns = [
        column("column", Kind::Text, "Its name"),
        column("type", Kind::Text, "The type of its values"),
        column("shown", Kind::Text, "When a terminal shows it"),
        column("cost", Kind::Text, "What has to be read for it"),
        column("meaning", Kind::Text, "What it means"),
    ];
    let rows = table.columns().into_iter().map(|column| {
        vec![
            Value::from(column.name),
            Value::from(kind_name(column.kind)),
            Value::from(match column.shown {
                Shown::Always => "always",
                Shown::OnRequest => "on request",
            }),
            Value::from(match column.cost {
                Cost::Kernel => "kernel memory",
                Cost::UserPages => "user pages",
            }),
            Value::from(column.meaning),
        ]
    });
    listing::show(&columns, format, rows)?;
    Ok(())
}

/// `secmon completions SHELL`.
pub fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command::command(), "secmon", &mut script);
    let mut out = io::stdout().lock();
    out.write_all(&script)?;
    out.flush()?;
    Ok(())
}

/// `secmon man [--output DIR]`.
pub fn man(folder: Option<&Path>) -> Result<()> {
    let Some(folder) = folder else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command::command()).render(&mut page)?;
        let mut out = io::stdout().lock();
        out.write_all(&page)?;
        out.flush()?;
        return Ok(());
    };
    if folder.exists() && !folder.is_dir() {
        bail!("{} is not a folder", folder.display());
    }
    let writing = || format!("writing man pages to {}", folder.display());
    fs::create_dir_all(folder).with_context(writing)?;
    clap_mangen::generate_to(command::command(), folder).with_context(writing)
}
