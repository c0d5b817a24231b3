//! The table `info`: what the kernel is and how it is set up.
//!
//! One row a fact. A fact that this kernel does not have is null; one that
//! can't be told (without types, say) is unreadable and says why.

mod identity;
mod memory;
mod security;

use std::ops::ControlFlow;

use secmon_memory::{ReadError, VirtualAddress};

use crate::table::Items;
use crate::{Column, Cost, Guest, Kind, Selection, Shown, TableError, TableOf, Value};

const TABLE: &str = "info";

/// The longest text that is read: `COMMAND_LINE_SIZE` is 2048.
const LONGEST_TEXT: usize = 8192;

/// A fact about a kernel.
pub struct Fact {
    /// Its name in `snake_case`, stable.
    name: &'static str,
    /// What it means.
    meaning: &'static str,
    /// Finds it out.
    value: fn(&Guest) -> Result<Option<String>, FactError>,
}

/// Why a fact can't be told.
#[derive(Debug, thiserror::Error)]
enum FactError {
    /// Its memory can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The kernel's types lack something.
    #[error(transparent)]
    Table(#[from] TableError),
    /// Something else, in words.
    #[error("{0}")]
    Other(String),
}

/// A row of the table.
pub enum Row {
    /// A fact, found out when it is asked for.
    Fact(&'static Fact),
    /// A contradiction that was met when the kernel was looked for.
    Conflict(String),
}

/// The table `info`.
pub static INFO: TableOf<Row> = TableOf {
    name: TABLE,
    aliases: &["system"],
    meaning: "What the kernel is and how it is set up, one fact a row.",
    columns: &[
        Column {
            name: "name",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "The fact's name.",
            value: |_, row| match row {
                Row::Fact(fact) => fact.name.into(),
                Row::Conflict(_) => "conflict".into(),
            },
        },
        Column {
            name: "value",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "Its value; null if this kernel has no such thing.",
            value: |guest, row| match row {
                Row::Fact(fact) => match (fact.value)(guest) {
                    Ok(value) => value.into(),
                    Err(error) => Value::unreadable(error),
                },
                Row::Conflict(text) => text.as_str().into(),
            },
        },
        Column {
            name: "meaning",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "What the fact means.",
            value: |_, row| match row {
                Row::Fact(fact) => fact.meaning.into(),
                Row::Conflict(_) => "Two places in memory that should say the same and don't: \
                                     memory may have been made to mislead."
                    .into(),
            },
        },
    ],
    items,
};

fn items(
    guest: &Guest,
    _selection: &Selection,
    sink: &mut Items<'_, Row>,
) -> Result<(), TableError> {
    let groups = [identity::FACTS, memory::FACTS, security::FACTS];
    for fact in groups.into_iter().flatten() {
        if let ControlFlow::Break(()) = sink(Row::Fact(fact)) {
            return Ok(());
        }
    }
    for conflict in &guest.kernel().conflicts {
        if sink(Row::Conflict(conflict.to_string())).is_break() {
            break;
        }
    }
    Ok(())
}

/// The address of a symbol; a fact about one that is not there is null.
fn symbol(guest: &Guest, name: &'static str) -> Option<VirtualAddress> {
    guest.address(name)
}

/// A 4-byte variable of the kernel.
fn variable(guest: &Guest, name: &'static str) -> Result<Option<i32>, FactError> {
    symbol(guest, name)
        .map(|address| guest.space().read_u32(address).map(|value| value as i32))
        .transpose()
        .map_err(Into::into)
}

/// A 4-byte variable of the kernel, in decimal.
fn decimal(guest: &Guest, name: &'static str) -> Result<Option<String>, FactError> {
    Ok(variable(guest, name)?.map(|value| value.to_string()))
}

/// Text at an address, as far as it is text.
fn text_at(guest: &Guest, address: VirtualAddress) -> Result<String, FactError> {
    let bytes = guest.space().read_c_string(address, LONGEST_TEXT)?;
    Ok(crate::Text::new(bytes).to_display().into_owned())
}

/// The name of an enumerator in lower case, without what all names of its
/// enumeration start with; its number if it has no name.
fn enumerator(guest: &Guest, enumerations: &[&str], value: i64) -> Result<String, FactError> {
    let types = guest.types(TABLE)?;
    let values = enumerations
        .iter()
        .find_map(|enumeration| types.enumerators(enumeration).ok())
        .unwrap_or_default();
    Ok(enumerator_name(&values, value).unwrap_or_else(|| value.to_string()))
}

fn enumerator_name(values: &[(String, i64)], value: i64) -> Option<String> {
    let (name, _) = values.iter().find(|(_, known)| *known == value)?;
    let mut shared = name.as_str();
    for (other, _) in values {
        let length = shared
            .bytes()
            .zip(other.bytes())
            .take_while(|(one, two)| one == two)
            .count();
        shared = shared.get(..length).unwrap_or_default();
    }
    let prefix = shared.rfind('_').map_or(0, |last| last + 1);
    Some(name.get(prefix..).unwrap_or(name).to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::enumerator_name;

    #[test]
    fn names_lose_what_they_share() {
        let values = [
            ("SPECTRE_V2_NONE".to_owned(), 0),
            ("SPECTRE_V2_RETPOLINE".to_owned(), 1),
            ("SPECTRE_V2_LFENCE".to_owned(), 2),
        ];
        assert_eq!(enumerator_name(&values, 1).as_deref(), Some("retpoline"));
        assert_eq!(enumerator_name(&values, 3), None);
        assert_eq!(enumerator_name(&values[..1], 0).as_deref(), Some("none"));
    }
}
