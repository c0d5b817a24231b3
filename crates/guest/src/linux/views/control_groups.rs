//! The members of all control groups: each task is in the list of its
//! `css_set`, the combination of groups that it is in (`kernel/cgroup/cgroup.c`).

use std::collections::BTreeSet;

use secmon_memory::VirtualAddress;

use super::task_record::TaskRecordModel;
use super::{View, settled};
use crate::linux::list::chain::{ChainEnd, chain_nodes};
use crate::linux::list::{LIMIT, is_object_address, nodes};
use crate::{Guest, TableError, layout};

/// `1 << CSS_SET_HASH_BITS` (`kernel/cgroup/cgroup.c`): chains of
/// `css_set_table`.
const CHAINS: u64 = 1 << 7;
/// More combinations of groups are not looked at.
const MOST_SETS: usize = 1 << 16;

layout! {
    /// `include/linux/cgroup-defs.h`
    struct CssSetLayout: "css_set" {
        hash: "hlist",
        tasks: "tasks",
        migrating: "mg_tasks",
    } optional {
        /// Since 5.2.
        dying: "dying_tasks",
    }
}

/// The tasks in the lists of all `css_set`s: of those in the kernel's hash
/// table and of `others`, to which tasks were seen to lead. The idle tasks are
/// in none.
///
/// # Errors
/// [`TableError`] if the kernel has no control groups.
pub fn members(
    guest: &Guest,
    table: &'static str,
    model: &TaskRecordModel,
    others: impl IntoIterator<Item = VirtualAddress>,
) -> Result<View, TableError> {
    let layout = guest.layout::<CssSetLayout>(table)?;
    let hash_table = guest.symbol(table, "css_set_table")?;
    let Some(node) = &model.layout.cg_list else {
        return Err(TableError::Symbol {
            table,
            symbol: "task_struct.cg_list",
        });
    };
    let (space, diagnostics) = (guest.space(), guest.diagnostics());
    let others: BTreeSet<VirtualAddress> = others
        .into_iter()
        .filter(|set| is_object_address(space, *set))
        .collect();
    Ok(settled(guest, || {
        let mut view = View::default();
        let mut sets = others.clone();
        for chain in 0..CHAINS {
            let first = hash_table.wrapping_add(chain * 8);
            for node in chain_nodes(space, diagnostics, first, ChainEnd::Null, MOST_SETS) {
                match node {
                    Ok(node) => {
                        sets.insert(node.wrapping_sub(layout.hash.offset));
                    }
                    Err(error) => view.fail(error),
                }
            }
        }
        if sets.len() > MOST_SETS {
            view.fail(format_args!("there are more than {MOST_SETS} css_sets"));
        }
        for set in sets.into_iter().take(MOST_SETS) {
            let lists = [
                Some(&layout.tasks),
                Some(&layout.migrating),
                layout.dying.as_ref(),
            ];
            for list in lists.into_iter().flatten() {
                let head = set.wrapping_add(list.offset);
                for member in nodes(space, diagnostics, head, LIMIT) {
                    match member {
                        Ok(member) => {
                            view.tasks.insert(member.wrapping_sub(node.offset));
                        }
                        // A set that was freed meanwhile is no loss: its tasks
                        // are in others.
                        Err(error) => view.fail(error),
                    }
                }
            }
        }
        view
    }))
}
