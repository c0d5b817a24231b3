//! The table `env`: the environment of processes.

use crate::linux::memory_area::AreaModel;
use crate::linux::references::Sharers;
use crate::linux::task::leaders;
use crate::linux::user;
use crate::table::Items;
use crate::{
    Column, Cost, Diagnostic, Guest, Kind, Selection, Shown, TableError, TableOf, Text, Value,
};

const TABLE: &str = "env";

/// A variable of a process.
pub struct Variable {
    pid: u64,
    name: Text,
    /// None for a string without `=`.
    value: Option<Text>,
}

/// The table.
pub static ENV: TableOf<Variable> = TableOf {
    name: TABLE,
    aliases: &["environment"],
    meaning: "The environment variables of processes, as /proc/PID/environ shows them: what \
              execve was given, with what the process itself wrote over it. Where pages are \
              missing, the variables before them are shown and a diagnostic says so.",
    columns: &[
        Column {
            name: "pid",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "Process id in the initial pid namespace.",
            value: |_, row| row.pid.into(),
        },
        Column {
            name: "name",
            kind: Kind::Text,
            cost: Cost::UserPages,
            shown: Shown::Always,
            meaning: "Name: what stands before the first =.",
            value: |_, row| row.name.clone().into(),
        },
        Column {
            name: "value",
            kind: Kind::Text,
            cost: Cost::UserPages,
            shown: Shown::Always,
            meaning: "Value: what stands behind the first =; null for a string without one.",
            value: |_, row| Value::from(row.value.clone()),
        },
    ],
    items,
};

fn items(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, Variable>,
) -> Result<(), TableError> {
    let memory = AreaModel::new(guest, TABLE)?;
    let mut sharers = Sharers::new(guest, TABLE, "mm_struct.mm_users");
    for task in leaders(guest, TABLE)? {
        if !selection.wants_pid(task.tgid.into()) || task.mm.is_null() || task.is_kernel_thread() {
            continue;
        }
        let found = user::read_environment(guest, task.mm);
        if guest.pointer(task.address, &task.model().layout.mm) != Ok(task.mm) {
            // It left its memory during the read: what was read may be
            // another's.
            guest.diagnostics().count_torn_read();
            continue;
        }
        if let Ok(mm) = memory.mm(guest, task.mm) {
            sharers.note(&task, task.mm, mm.users);
        }
        if let Some(error) = found.error {
            guest.diagnostics().record(Diagnostic {
                table: TABLE,
                subject: format!("pid {} mm_struct.env_start", task.tgid),
                address: Some(task.mm),
                reason: format!("variables are missing: {error}"),
            });
        }
        for text in found.strings {
            // Zeros at the end, left by a shorter title or environment.
            if text.as_bytes().is_empty() {
                continue;
            }
            if sink(variable(task.tgid.into(), &text)).is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn variable(pid: u64, text: &Text) -> Variable {
    let bytes = text.as_bytes();
    let mut parts = bytes.splitn(2, |byte| *byte == b'=');
    Variable {
        pid,
        name: Text::new(parts.next().unwrap_or_default()),
        value: parts.next().map(Text::new),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_at_the_first_equals_sign() {
        let found = variable(1, &"PS1=a=b".into());
        assert_eq!(found.name, "PS1".into());
        assert_eq!(found.value, Some("a=b".into()));
        assert_eq!(variable(1, &"odd".into()).value, None);
        assert_eq!(variable(1, &"=x".into()).name, "".into());
    }
}
