//! The table `process_tree`.

use std::collections::HashMap;

use crate::linux::listing::Listing;
use crate::linux::process::{self, Process};
use crate::linux::processes::state;
use crate::table::Items;
use crate::{Column, Cost, Diagnostic, Guest, Kind, Selection, Shown, TableError, TableOf, Value};

const TABLE: &str = "process_tree";

/// More levels than this are not drawn; the row stands at the last one.
const DEEPEST_DRAWN: usize = 200;

/// A process and its place in the tree.
pub struct Node {
    process: Process,
    depth: usize,
    /// The lines before the name.
    drawing: String,
}

impl Node {
    fn name(&self, guest: &Guest) -> Vec<u8> {
        self.process.listing.names.of(guest, &self.process.task)
    }
}

const fn column(
    name: &'static str,
    kind: Kind,
    shown: Shown,
    meaning: &'static str,
    value: fn(&Guest, &Node) -> Value,
) -> Column<Node> {
    Column {
        name,
        kind,
        cost: Cost::Kernel,
        shown,
        meaning,
        value,
    }
}

/// The table `process_tree`.
pub static PROCESS_TREE: TableOf<Node> = TableOf {
    name: TABLE,
    aliases: &["pstree"],
    meaning: "All processes, each below its parent, siblings by their ids.",
    columns: &[
        column(
            "pid",
            Kind::Unsigned,
            Shown::Always,
            "Process id.",
            |_, node| node.process.task.tgid.into(),
        ),
        column(
            "tree",
            Kind::Text,
            Shown::Always,
            "Name behind the lines that lead to it.",
            |guest, node| {
                let mut text = node.drawing.clone().into_bytes();
                text.extend(node.name(guest));
                Value::text(text)
            },
        ),
        column(
            "state",
            Kind::Text,
            Shown::Always,
            "State letter, as in the table processes.",
            |_, node| Value::word(state(&node.process).letter),
        ),
        column(
            "uid",
            Kind::Unsigned,
            Shown::Always,
            "Real user id.",
            |guest, node| Value::from_read(node.process.cred(guest), |cred| cred.uid.into()),
        ),
        Column {
            name: "cmdline",
            kind: Kind::List,
            cost: Cost::UserPages,
            shown: Shown::Always,
            meaning: "Command line; empty for a kernel thread or zombie.",
            value: |guest, node| node.process.arguments(guest),
        },
        column(
            "depth",
            Kind::Unsigned,
            Shown::OnRequest,
            "How many parents are above it.",
            |_, node| (node.depth as u64).into(),
        ),
        column(
            "ppid",
            Kind::Unsigned,
            Shown::OnRequest,
            "Id of the parent process; 0 for what the kernel started.",
            |guest, node| Value::from_read(node.process.parent(guest), Value::from),
        ),
        column(
            "comm",
            Kind::Text,
            Shown::OnRequest,
            "Name alone.",
            |guest, node| Value::text(node.name(guest)),
        ),
        column(
            "address",
            Kind::Address,
            Shown::OnRequest,
            "Where its task_struct lies.",
            |_, node| node.process.task.address.into(),
        ),
    ],
    items: nodes,
};

fn nodes(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, Node>,
) -> Result<(), TableError> {
    let listing = Listing::new(guest, TABLE)?;
    let all = Selection::default();
    let mut processes: Vec<Option<Process>> = process::processes(guest, &listing, &all)?
        .map(Some)
        .collect();
    let links: Vec<Link> = processes
        .iter()
        .flatten()
        .map(|process| Link {
            pid: process.task.tgid,
            parent: process.parent(guest).ok(),
        })
        .collect();
    let (places, circular) = arrange(&links);
    for pid in circular {
        guest.diagnostics().record(Diagnostic {
            table: TABLE,
            subject: format!("task_struct.real_parent of pid {pid}"),
            address: None,
            reason: "its parents form a circle; shown without a parent".into(),
        });
    }
    for place in places {
        let Some(process) = processes.get_mut(place.index).and_then(Option::take) else {
            continue;
        };
        if !selection.wants_pid(process.task.tgid.into()) {
            continue;
        }
        let node = Node {
            process,
            depth: place.depth,
            drawing: place.drawing,
        };
        if sink(node).is_break() {
            break;
        }
    }
    Ok(())
}

/// A process and its parent, by their ids.
#[derive(Clone, Copy, Debug)]
struct Link {
    pid: u32,
    /// None if it could not be read.
    parent: Option<u32>,
}

/// Where a process stands.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// Its index in the links.
    index: usize,
    depth: usize,
    drawing: String,
}

/// Orders processes as a tree, each one once. Also gives the ids of those that
/// were made roots because their parents form a circle.
fn arrange(links: &[Link]) -> (Vec<Place>, Vec<u32>) {
    let known: HashMap<u32, usize> = links
        .iter()
        .enumerate()
        .map(|(index, link)| (link.pid, index))
        .collect();
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); links.len()];
    let mut roots = Vec::new();
    for (index, link) in links.iter().enumerate() {
        let parent = link.parent.filter(|parent| *parent != link.pid);
        let parent = parent.and_then(|parent| known.get(&parent));
        match parent.and_then(|parent| children.get_mut(*parent)) {
            Some(siblings) => siblings.push(index),
            None => roots.push(index),
        }
    }
    let by_pid = |indices: &mut Vec<usize>| {
        indices.sort_by_key(|index| links.get(*index).map(|link| link.pid));
    };
    by_pid(&mut roots);
    children.iter_mut().for_each(by_pid);

    let mut places = Vec::with_capacity(links.len());
    let mut placed = vec![false; links.len()];
    let mut circular = Vec::new();
    let mut everyone: Vec<usize> = (0..links.len()).collect();
    by_pid(&mut everyone);
    for (start, is_root) in roots
        .iter()
        .map(|index| (*index, true))
        .chain(everyone.iter().map(|index| (*index, false)))
    {
        if placed.get(start).copied().unwrap_or(true) {
            continue;
        }
        if !is_root {
            circular.extend(links.get(start).map(|link| link.pid));
        }
        // What is still to be placed, with its depth and the lines that go on
        // below it.
        let mut open = vec![(start, 0, String::new(), String::new())];
        while let Some((index, depth, drawing, below)) = open.pop() {
            match placed.get_mut(index) {
                Some(placed) if !*placed => *placed = true,
                _ => continue,
            }
            let siblings = children.get(index).map_or(&[][..], Vec::as_slice);
            for (position, child) in siblings.iter().enumerate().rev() {
                let last = position + 1 == siblings.len();
                let (branch, line) = if depth >= DEEPEST_DRAWN {
                    ("", "")
                } else if last {
                    ("└─", "  ")
                } else {
                    ("├─", "│ ")
                };
                open.push((
                    *child,
                    depth + 1,
                    format!("{below}{branch}"),
                    format!("{below}{line}"),
                ));
            }
            places.push(Place {
                index,
                depth,
                drawing,
            });
        }
    }
    (places, circular)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn links(pairs: &[(u32, u32)]) -> Vec<Link> {
        let link = |(pid, parent): &(u32, u32)| Link {
            pid: *pid,
            parent: Some(*parent),
        };
        pairs.iter().map(link).collect()
    }

    #[test]
    fn draws_a_tree() {
        let links = links(&[(2, 0), (1, 0), (9, 1), (5, 1), (7, 5), (8, 5), (3, 2)]);
        let (places, circular) = arrange(&links);
        let drawn: Vec<String> = places
            .iter()
            .map(|place| format!("{}{}", place.drawing, links[place.index].pid))
            .collect();
        assert_eq!(drawn, ["1", "├─5", "│ ├─7", "│ └─8", "└─9", "2", "└─3"]);
        assert!(circular.is_empty());
        assert_eq!(places[2].depth, 2);
    }

    #[test]
    fn breaks_circles() {
        let (places, circular) = arrange(&links(&[(4, 5), (5, 4), (6, 6), (7, 99)]));
        assert_eq!(places.len(), 4);
        assert_eq!(circular, [4]);
    }

    proptest! {
        #[test]
        fn places_everyone_once(parents in prop::collection::vec(0_u32..40, 0..40)) {
            let pairs: Vec<_> = (0..).zip(parents).collect();
            let (places, _) = arrange(&links(&pairs));
            let indices: HashSet<_> = places.iter().map(|place| place.index).collect();
            prop_assert_eq!(places.len(), pairs.len());
            prop_assert_eq!(indices.len(), pairs.len());
        }
    }
}
