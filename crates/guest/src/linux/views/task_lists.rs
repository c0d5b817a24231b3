//! The lists that tasks themselves are linked into: all processes, the threads
//! of one, the children of one.

use secmon_memory::VirtualAddress;

use super::task_record::TaskRecordModel;
use super::{View, settled};
use crate::linux::list::{LIMIT, nodes};
use crate::{Guest, TableError};

/// The members of the list at `head`, whose nodes lie at `offset` in them.
fn members(guest: &Guest, head: VirtualAddress, offset: u64, view: &mut View) {
    for node in nodes(guest.space(), guest.diagnostics(), head, LIMIT) {
        match node {
            Ok(node) => {
                view.tasks.insert(node.wrapping_sub(offset));
            }
            Err(error) => view.fail(error),
        }
    }
}

/// The list of all processes: what `/proc` and `ps` can show at most. The idle
/// task, which heads it, is not among them.
///
/// # Errors
/// [`TableError`] if it can't be found.
pub fn processes(
    guest: &Guest,
    table: &'static str,
    model: &TaskRecordModel,
) -> Result<View, TableError> {
    let offset = model.layout.tasks.offset;
    let head = guest.symbol(table, "init_task")?.wrapping_add(offset);
    Ok(settled(guest, || {
        let mut view = View::default();
        members(guest, head, offset, &mut view);
        view
    }))
}

/// The threads of the process whose `signal_struct` lies at `signal`.
pub fn threads(guest: &Guest, model: &TaskRecordModel, signal: VirtualAddress) -> View {
    let head = model.thread_head(signal);
    settled(guest, || {
        let mut view = View::default();
        members(guest, head, model.layout.thread_node.offset, &mut view);
        view
    })
}

/// The children of the task at `parent`.
pub fn children(guest: &Guest, model: &TaskRecordModel, parent: VirtualAddress) -> View {
    let head = parent.wrapping_add(model.layout.children.offset);
    settled(guest, || {
        let mut view = View::default();
        members(guest, head, model.layout.sibling.offset, &mut view);
        view
    })
}
