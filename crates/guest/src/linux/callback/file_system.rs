//! Operations of mounted file systems (`include/linux/fs.h`) and of the entries
//! of `/proc` (`fs/proc/internal.h`).

use secmon_memory::{ReadError, VirtualAddress};

use super::{LeadsTo, Walk};
use crate::linux::list::{entries, is_object_address};
use crate::linux::rb_tree;
use crate::{Guest, TableError, Text, layout};

/// More file systems than this are mounted nowhere.
const MOST_SUPER_BLOCKS: usize = 1 << 16;
/// More entries than this has no `/proc` (those of processes are not
/// entries).
const MOST_ENTRIES: usize = 1 << 17;
/// Bytes of a name that are read.
const LONGEST_NAME: u64 = 255;

layout! {
    /// `include/linux/fs.h`
    struct SuperBlockLayout: "super_block" {
        list: "s_list",
        operations: "s_op",
        root: "s_root",
        kind: "s_type",
    }
}

layout! {
    /// `include/linux/fs.h`
    struct FileSystemTypeLayout: "file_system_type" {
        name: "name",
    }
}

layout! {
    /// `include/linux/dcache.h`
    struct EntryLayout: "dentry" {
        inode: "d_inode",
    }
}

layout! {
    /// `include/linux/fs.h`
    struct InodeLayout: "inode" {
        operations: "i_op",
        file_operations: "i_fop",
    }
}

layout! {
    /// `fs/proc/internal.h`
    struct ProcEntryLayout: "proc_dir_entry" {
        inode_operations: "proc_iops",
        children: "subdir",
        node: "subdir_node",
        name: "name",
        name_length: "namelen",
    } optional {
        /// Since Linux 5.6; of a directory its file operations.
        operations: "proc_ops",
        /// Until Linux 5.5.
        file_operations: "proc_fops",
        /// A table, or one function.
        sequence: "seq_ops",
    }
}

/// Bytes of each kind of table.
struct Tables {
    super_operations: u64,
    inode_operations: u64,
    file_operations: u64,
    proc_operations: u64,
}

impl Tables {
    fn of(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        let types = guest.types(table)?;
        // A kernel whose types lack one has no such table to look into.
        let size = |name| types.size_of(name).unwrap_or(0);
        Ok(Self {
            super_operations: size("super_operations"),
            inode_operations: size("inode_operations"),
            file_operations: size("file_operations"),
            proc_operations: size("proc_ops"),
        })
    }
}

/// Operations of mounted file systems and of their roots.
pub(super) fn super_blocks(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let layout = guest.layout::<SuperBlockLayout>(table)?;
    let kind = guest.layout::<FileSystemTypeLayout>(table)?;
    let entry = guest.layout::<EntryLayout>(table)?;
    let inode_layout = guest.layout::<InodeLayout>(table)?;
    let tables = Tables::of(guest, table)?;
    let head = guest.symbol(table, "super_blocks")?;
    let space = guest.space();
    for block in
        entries(guest, table, "super_blocks", head, layout.list.offset).take(MOST_SUPER_BLOCKS)
    {
        let mut read = || -> Result<(), ReadError> {
            let name = guest.pointer(block, &layout.kind)?;
            let name = guest.pointer(name, &kind.name)?;
            let name = Text::new(space.read_c_string(name, LONGEST_NAME as usize)?);
            let location = block.wrapping_add(layout.operations.offset);
            let bytes = LeadsTo::Table(tables.super_operations);
            walk.add("super_operations", &name, location, bytes)?;
            let root = guest.pointer(block, &layout.root)?;
            if !is_object_address(space, root) {
                return Ok(());
            }
            let inode = guest.pointer(root, &entry.inode)?;
            if !is_object_address(space, inode) {
                return Ok(());
            }
            let location = inode.wrapping_add(inode_layout.operations.offset);
            let bytes = LeadsTo::Table(tables.inode_operations);
            walk.add("inode_operations", &name, location, bytes)?;
            let location = inode.wrapping_add(inode_layout.file_operations.offset);
            let bytes = LeadsTo::Table(tables.file_operations);
            walk.add("file_operations", &name, location, bytes)
        };
        if let Err(error) = read() {
            walk.complain("super_block", block, &error);
        }
    }
    Ok(())
}

/// Operations of the entries of `/proc`, that of the root included.
pub(super) fn proc_entries(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let Some(root) = guest.address("proc_root") else {
        return Ok(());
    };
    let layout = guest.layout::<ProcEntryLayout>(table)?;
    let tables = Tables::of(guest, table)?;
    // Each with the path of its directory.
    let mut left: Vec<(VirtualAddress, String)> = vec![(root, String::new())];
    let mut count = 0;
    while let Some((entry, directory)) = left.pop() {
        count += 1;
        if count > MOST_ENTRIES {
            break;
        }
        let path = match name_of(guest, &layout, entry) {
            Ok(name) if entry != root => format!("{directory}/{}", name.to_display()),
            Ok(_) => "/proc".to_owned(),
            Err(error) => {
                walk.complain("proc_dir_entry", entry, &error);
                continue;
            }
        };
        let name = Text::from(path.as_str());
        let members = [
            (
                "inode_operations",
                Some(&layout.inode_operations),
                LeadsTo::Table(tables.inode_operations),
            ),
            (
                "proc_ops",
                layout.operations.as_ref(),
                LeadsTo::Table(tables.proc_operations),
            ),
            (
                "file_operations",
                layout.file_operations.as_ref(),
                LeadsTo::Table(tables.file_operations),
            ),
            ("seq_ops", layout.sequence.as_ref(), LeadsTo::Function),
        ];
        for (kind, member, leads_to) in members {
            let Some(member) = member else {
                continue;
            };
            let location = entry.wrapping_add(member.offset);
            if let Err(error) = walk.add(kind, &name, location, leads_to) {
                walk.complain("proc_dir_entry", entry, &error);
            }
        }
        let children = entry.wrapping_add(layout.children.offset);
        let tree = rb_tree::nodes(guest.space(), guest.diagnostics(), children, MOST_ENTRIES);
        let nodes = tree.report(guest, table, "proc_dir_entry.subdir");
        if left.len() + nodes.len() <= MOST_ENTRIES {
            left.extend(
                nodes
                    .into_iter()
                    .map(|node| (node.wrapping_sub(layout.node.offset), path.clone())),
            );
        }
    }
    Ok(())
}

fn name_of(
    guest: &Guest,
    layout: &ProcEntryLayout,
    entry: VirtualAddress,
) -> Result<Text, ReadError> {
    let length = guest.number(entry, &layout.name_length)?.min(LONGEST_NAME);
    let name = guest.pointer(entry, &layout.name)?;
    let mut bytes = vec![0; length as usize];
    guest.space().read(name, &mut bytes)?;
    Ok(Text::new(bytes))
}
