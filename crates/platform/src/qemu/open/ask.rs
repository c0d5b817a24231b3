//! Where RAM lies, by asking QEMU through QMP.

use std::path::Path;

use secmon_memory::PhysicalAddress;

use super::{LocatedBlock, Opening, QemuError, QmpUse};
use crate::layout::{MtreeError, block_layout, parse_mtree};
use crate::qemu::locate;
use crate::qemu::memory::HostRegion;
use crate::qemu::qmp::QmpClient;

impl Opening<'_> {
    /// The pieces of RAM as QEMU reports them, or `None` where it can't be
    /// asked.
    pub(super) fn ask_qmp(&mut self) -> Result<Option<Vec<HostRegion>>, QemuError> {
        let monitors = match &self.options.qmp {
            QmpUse::Never => return Ok(None),
            QmpUse::Socket(path) => return self.ask_qmp_at(path).map(Some),
            QmpUse::IfAvailable => &self.process.monitors,
        };
        let mut failures = Vec::new();
        for monitor in monitors {
            if monitor.busy {
                let path = monitor.path.display();
                failures.push(format!(
                    "QMP at {path} is in use by another client; RAM was located without it"
                ));
                continue;
            }
            match self.ask_qmp_at(&monitor.path) {
                Ok(pieces) => return Ok(Some(pieces)),
                Err(error) => failures.push(format!("{error}; RAM was located without it")),
            }
        }
        self.notes.extend(failures);
        Ok(None)
    }

    fn ask_qmp_at(&mut self, path: &Path) -> Result<Vec<HostRegion>, QemuError> {
        let mut client = QmpClient::connect(path, self.options.timeout)?;
        let notes = self.notes.len();
        let pieces = self.pieces_from_qmp(&mut client);
        match &pieces {
            Ok(_) => self.ask_registers(&mut client),
            // What it said is not what is used.
            Err(_) => self.notes.truncate(notes),
        }
        pieces
    }

    /// A hint, no more: a QEMU that does not tell is no worse a target.
    fn ask_registers(&mut self, client: &mut QmpClient) {
        self.registers = client.registers().unwrap_or_default();
        for registers in &self.registers {
            let root = PhysicalAddress::new(registers.cr3);
            // CR0.PG
            if registers.cr0 & (1 << 31) != 0 && !self.page_table_roots.contains(&root) {
                self.page_table_roots.push(root);
            }
        }
    }

    fn pieces_from_qmp(&mut self, client: &mut QmpClient) -> Result<Vec<HostRegion>, QemuError> {
        let ranges = parse_mtree(&client.monitor_command("info mtree -f")?)?;
        let (base_size, plugged_size) = client.memory_size()?;
        if let Some(layout) = &self.options.layout {
            let first = self.host_address(client, 0, base_size)?;
            let block = LocatedBlock {
                host_address: first,
                length: base_size,
            };
            return self.pieces(layout, &[block]);
        }
        let main = ranges
            .iter()
            .find(|range| range.region.start.is_null())
            .map(|range| range.name.clone())
            .ok_or(MtreeError::NoRam)?;
        let mut names = vec![main];
        names.extend(self.process.command_line.numa_backends.iter().cloned());
        names.extend(client.memory_device_backends()?);
        names.sort();
        names.dedup();
        let mut pieces = Vec::new();
        for name in &names {
            let layout = match block_layout(&ranges, name) {
                Ok(layout) => layout,
                // A backend that the machine does not show the guest now.
                Err(MtreeError::NoRam) => continue,
                Err(error) => return Err(error.into()),
            };
            for (region, _) in layout.entries() {
                let start = region.start.as_u64();
                pieces.push(HostRegion {
                    region: *region,
                    host_address: self.host_address(client, start, region.length)?,
                });
            }
        }
        let found: u64 = pieces
            .iter()
            .fold(0, |sum: u64, piece| sum.saturating_add(piece.region.length));
        let expected = base_size.saturating_add(plugged_size);
        if found != expected {
            self.notes.push(format!(
                "QEMU has {expected:#x} bytes of RAM, its memory map shows {found:#x}: the rest is a hole here"
            ));
        }
        Ok(pieces)
    }

    /// Where QEMU says the RAM at a physical address lies, checked against the
    /// process's mappings.
    fn host_address(
        &self,
        client: &mut QmpClient,
        physical: u64,
        length: u64,
    ) -> Result<u64, QemuError> {
        let not_found = |reason: String| QemuError::RamNotFound {
            pid: self.pid(),
            block: format!("at physical address {physical:#x}"),
            size: length,
            reason,
        };
        let (_, host_address) = client
            .host_address(physical)?
            .ok_or_else(|| not_found("QEMU's gpa2hva knows no RAM there".to_owned()))?;
        if !locate::is_writable(&self.mappings, host_address, length) {
            return Err(not_found(format!(
                "QEMU's gpa2hva says {host_address:#x}, where the process has no such memory"
            )));
        }
        Ok(host_address)
    }
}
