//! Names of files that have no path.

use secmon_memory::VirtualAddress;

use super::view::{View, c_string, kernel_pointer, pointer};
use super::{Path, PathError, PathPointer, Paths, Reach};
use crate::Text;
use crate::linux::span::Copied;

impl Paths {
    /// The name of a file whose file system makes names up (`d_dname`), or
    /// `None` for a file with a path.
    pub(super) fn pseudo(
        &self,
        view: View<'_>,
        start: PathPointer,
        dentry: &Copied,
    ) -> Result<Option<Path>, PathError> {
        let operations = dentry.pointer(&self.dentry.operations);
        if operations.is_null() {
            return Ok(None);
        }
        let dname = pointer(view, "dentry.d_op", operations, &self.operations.dname)?;
        if dname.is_null() {
            return Ok(None);
        }
        let is_root = dentry.pointer(&self.dentry.parent) == start.dentry;
        if is_root && self.mount(view, start.mount)?.root == start.dentry {
            return Ok(None);
        }
        let kind = self.file_system_name(view, dentry.pointer(&self.dentry.superblock))?;
        let inode = dentry.pointer(&self.dentry.inode);
        let mut deleted = false;
        let text = match kind.as_bytes() {
            b"pipefs" => numbered(b"pipe", self.inode_number(view, inode)?),
            b"sockfs" => numbered(b"socket", self.inode_number(view, inode)?),
            b"nsfs" => self.namespace_name(view, inode)?.as_bytes().to_vec(),
            b"anon_inodefs" => {
                let mut text = b"anon_inode:".to_vec();
                text.extend(self.name(view, start.dentry, dentry)?);
                text
            }
            b"pidfs" => b"anon_inode:[pidfd]".to_vec(),
            b"dmabuf" => {
                let mut text = b"/".to_vec();
                text.extend(self.name(view, start.dentry, dentry)?);
                text.push(b':');
                text
            }
            // simple_dname(): the kernel's own tmpfs and hugetlbfs mounts and
            // whatever came through alloc_file_pseudo().
            _ => {
                deleted = true;
                let mut text = b"/".to_vec();
                text.extend(self.name(view, start.dentry, dentry)?);
                text
            }
        };
        let text = Text::new(text);
        let reach = Reach::Pseudo;
        Ok(Some(Path {
            text,
            deleted,
            reach,
        }))
    }

    /// The name of a namespace's file: `net:[4026531840]`.
    pub(super) fn namespace_name(
        &self,
        view: View<'_>,
        inode: VirtualAddress,
    ) -> Result<Text, PathError> {
        let namespace = pointer(view, "dentry.d_inode", inode, &self.inode.private)?;
        let member = &self.namespace.operations;
        let operations = pointer(view, "inode.i_private", namespace, member)?;
        let member = &self.namespace_operations.name;
        let name = pointer(view, "ns_common.ops", operations, member)?;
        let name = c_string(view, "proc_ns_operations.name", name)?;
        let number = self.inode_number(view, inode)?;
        Ok(Text::new(numbered(name.as_bytes(), number)))
    }

    /// The name of the type of the file system at `superblock`.
    ///
    /// # Errors
    /// [`PathError`] if it can't be read.
    pub(super) fn file_system_name(
        &self,
        view: View<'_>,
        superblock: VirtualAddress,
    ) -> Result<Text, PathError> {
        if let Some(name) = self.memory().names.get(&superblock) {
            return Ok(name.clone());
        }
        let kind = pointer(view, "super_block", superblock, &self.superblock.kind)?;
        let name = pointer(view, "super_block.s_type", kind, &self.file_system.name)?;
        let name = c_string(view, "file_system_type.name", name)?;
        self.memory().names.insert(superblock, name.clone());
        Ok(name)
    }

    fn inode_number(&self, view: View<'_>, inode: VirtualAddress) -> Result<u64, PathError> {
        let address = kernel_pointer("dentry.d_inode", inode)?;
        let what = "inode.i_ino";
        view.number(address, &self.inode.number)
            .map_err(|source| PathError::Read {
                what,
                address,
                source,
            })
    }
}

/// `name:[number]`.
fn numbered(name: &[u8], number: u64) -> Vec<u8> {
    let mut text = name.to_vec();
    text.extend_from_slice(format!(":[{number}]").as_bytes());
    text
}
