//! Which columns the user asked for.

use secmon_guest::{ColumnInfo, Shown};

use crate::arguments::Format;

/// A column name that the table does not have.
#[derive(Debug, thiserror::Error)]
#[error("there is no column `{name}`{}; there are: {}", suggestion(.near), .known.join(", "))]
pub struct UnknownColumn {
    name: String,
    near: Vec<&'static str>,
    known: Vec<&'static str>,
}

fn suggestion(near: &[&'static str]) -> String {
    if near.is_empty() {
        return String::new();
    }
    format!(" (did you mean {}?)", near.join(" or "))
}

/// Those of `known` that a typist could have meant by `name`, the likeliest
/// first, at most three.
pub fn near<'k>(name: &str, known: impl IntoIterator<Item = &'k str>) -> Vec<&'k str> {
    let mut scored: Vec<(f64, &str)> = known
        .into_iter()
        .map(|candidate| {
            let contained = !name.is_empty()
                && (candidate.split('_').any(|word| word == name)
                    || name.split('_').any(|word| word == candidate));
            let likeness = strsim::jaro_winkler(name, candidate);
            (likeness.max(if contained { 0.9 } else { 0.0 }), candidate)
        })
        .filter(|(likeness, _)| *likeness > 0.78)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.into_iter().take(3).map(|(_, name)| name).collect()
}

/// The index of the column of this name, in any case.
pub fn find(columns: &[ColumnInfo], name: &str) -> Result<usize, UnknownColumn> {
    let wanted = name.trim().to_ascii_lowercase();
    let found = columns.iter().position(|column| column.name == wanted);
    found.ok_or_else(|| UnknownColumn {
        near: near(&wanted, columns.iter().map(|column| column.name)),
        known: columns.iter().map(|column| column.name).collect(),
        name: name.to_owned(),
    })
}

/// The columns to show: those asked for, or the usual ones of the format.
/// `+name` adds a column to the usual ones, `all` adds all; none comes twice.
pub fn choose(
    columns: &[ColumnInfo],
    asked: &[String],
    format: Format,
) -> Result<Vec<usize>, UnknownColumn> {
    let all = || 0..columns.len();
    let usual = || -> Vec<usize> {
        match format {
            Format::Table | Format::Markdown => all()
                .filter(|index| columns[*index].shown == Shown::Always)
                .collect(),
            Format::Json | Format::Ndjson | Format::Csv => all().collect(),
        }
    };
    let only_additions = asked.iter().all(|name| name.starts_with('+'));
    let mut chosen = if only_additions { usual() } else { Vec::new() };
    for name in asked {
        let name = name.strip_prefix('+').unwrap_or(name);
        let more = match name {
            "all" => all().collect(),
            name => vec![find(columns, name)?],
        };
        for index in more {
            if !chosen.contains(&index) {
                chosen.push(index);
            }
        }
    }
    if chosen.is_empty() {
        // A table whose columns are all on request still shows something.
        chosen = all().collect();
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use secmon_guest::{Cost, Kind};

    fn columns() -> Vec<ColumnInfo> {
        let column = |(name, shown)| ColumnInfo {
            name,
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown,
            meaning: "",
        };
        [
            ("pid", Shown::Always),
            ("comm", Shown::Always),
            ("cmdline", Shown::OnRequest),
            ("remote_address", Shown::OnRequest),
        ]
        .map(column)
        .to_vec()
    }

    fn chosen(asked: &[&str], format: Format) -> Result<Vec<usize>, UnknownColumn> {
        let asked: Vec<String> = asked.iter().map(ToString::to_string).collect();
        choose(&columns(), &asked, format)
    }

    #[test]
    fn formats_have_their_usual_columns() {
        assert_eq!(chosen(&[], Format::Table).expect("known"), [0, 1]);
        assert_eq!(chosen(&[], Format::Csv).expect("known"), [0, 1, 2, 3]);
    }

    #[test]
    fn asked_columns_come_in_order_and_once() {
        assert_eq!(
            chosen(&["comm", "PID", "comm"], Format::Json).expect("known"),
            [1, 0]
        );
        assert_eq!(
            chosen(&["+cmdline"], Format::Table).expect("known"),
            [0, 1, 2]
        );
        assert_eq!(
            chosen(&["comm", "all"], Format::Table).expect("known"),
            [1, 0, 2, 3]
        );
    }

    #[test]
    fn an_unknown_column_is_an_error_with_what_was_meant() {
        let message = |name| {
            chosen(&[name], Format::Table)
                .expect_err("unknown")
                .to_string()
        };
        assert!(message("cmdlin").contains("did you mean cmdline?"));
        assert!(message("address").contains("did you mean remote_address?"));
        assert!(message("zzz").contains("there are: pid, comm, cmdline"));
        assert!(!message("zzz").contains("did you mean"));
    }
}
