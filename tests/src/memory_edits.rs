//! Edits of a stopped guest's memory: what `secmon_lab::specimens::Edit`
//! names, for kernels that no modules are built for.
//!
//! What was there is written back when an edit goes away, so that the guest
//! can go on and never sees it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use iced_x86::{Decoder, DecoderOptions};
use secmon_guest::linux::per_cpu::PerCpu;
use secmon_guest::{Selection, Value};
use secmon_lab::specimens::Edit;
use secmon_memory::VirtualAddress;
use secmon_profile::Types;

use crate::open::Opened;
use crate::rows::{TableRow, read_table};

/// `EXIT_DEAD` (`include/linux/sched.h`).
const EXIT_DEAD: u32 = 0x10;
/// The number of getpgid among the system calls of x86-64.
const GETPGID: u64 = 121;
/// The same of 32-bit programs.
const GETPGID_32: u64 = 132;
/// Longer than the code that dispatches system calls.
const LONGEST_DISPATCHER: usize = 0x8000;
/// The vector of the overflow exception, and the size of a gate.
const OVERFLOW: u64 = 4;
const GATE: u64 = 16;
/// The module that is hidden, and whose code pointers are led to.
const MODULE: &str = "unix_diag";
/// An entry of the table of segments that the kernel leaves empty, and 64-bit
/// code of privilege 3.
const UNUSED_SEGMENT: u64 = 7;
const USER_CODE: u64 = 0x00af_fb00_0000_ffff;
/// `CAP_LAST_CAP` and below, of all kernels here.
const ALL_CAPABILITIES: u64 = (1 << 41) - 1;

/// An edit, until it is dropped.
pub struct Edited<'a> {
    opened: &'a Opened,
    file: File,
    /// Offsets in the file and what was there, undone from the last.
    before: Vec<(u64, Vec<u8>)>,
}

impl<'a> Edited<'a> {
    /// Edits the RAM file of a guest that stands still and has its memory in
    /// one piece; `pid` is the process that edits of processes are for.
    ///
    /// # Errors
    /// If the kernel lacks what is to be edited.
    pub fn make(opened: &'a Opened, ram: &Path, edit: Edit, pid: i32) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(ram)?;
        let mut edited = Self {
            opened,
            file,
            before: Vec::new(),
        };
        edited.apply(edit, pid)?;
        Ok(edited)
    }

    fn apply(&mut self, edit: Edit, pid: i32) -> Result<()> {
        match edit {
            Edit::UnlinkTask => {
                let task = self.task(pid)?;
                self.unlink(task, "task_struct", "tasks")
            }
            Edit::DisguiseTask => {
                let task = self.task(pid)?;
                self.unlink(task, "task_struct", "tasks")?;
                let offset = self.types()?.member("task_struct", "exit_state")?.offset;
                self.write(task.wrapping_add(offset), &EXIT_DEAD.to_le_bytes())
            }
            Edit::UnlinkModule => {
                let module = address(&self.module()?, "address")?;
                self.unlink(module, "module", "list")
            }
            Edit::UnlinkModuleObject => {
                let module = address(&self.module()?, "address")?;
                self.unlink(module, "module", "mkobj.kobj.entry")
            }
            Edit::SystemCallEntry => {
                let table = self.symbol("sys_call_table")?;
                self.lead_to_module(table.wrapping_add(8 * GETPGID))
            }
            Edit::SystemCall32 => self.system_call_32(),
            Edit::InterruptGate => {
                let gate = self.symbol("idt_table")?.wrapping_add(OVERFLOW * GATE);
                let target = address(&self.module()?, "base")?.as_u64().to_le_bytes();
                // Offset 0–15, then selector and attributes, offset 16–63.
                self.write(gate, &target[..2])?;
                self.write(gate.wrapping_add(6), &target[2..])
            }
            Edit::Pointer {
                symbol,
                structure,
                member,
            } => {
                let place = self.symbol(symbol)?;
                let offset = self.types()?.member(structure, member)?.offset;
                self.lead_to_module(place.wrapping_add(offset))
            }
            Edit::SecurityHook => {
                let place = self.security_hook()?;
                self.lead_to_module(place)
            }
            Edit::DeviceOperations => {
                let rows = read_table(&self.opened.guest(), "interfaces", Selection::default())?;
                let name = Value::from("lo");
                let row = rows.iter().find(|row| row.get("name") == Some(&name));
                let device = address(row.context("no loopback device")?, "address")?;
                let offset = self.types()?.member("net_device", "netdev_ops")?.offset;
                self.lead_to_module(device.wrapping_add(offset))
            }
            Edit::SegmentDescriptor => {
                let table = self.symbol("gdt_page")?;
                let cpus = PerCpu::read(&self.opened.guest(), "edits")?;
                let table = cpus.address(table, 0).context("no CPU 0")?;
                self.write(
                    table.wrapping_add(8 * UNUSED_SEGMENT),
                    &USER_CODE.to_le_bytes(),
                )
            }
            Edit::Jump(symbol) => {
                let place = self.symbol(symbol)?;
                let target = address(&self.module()?, "base")?.as_u64();
                let distance = target.wrapping_sub(place.as_u64().wrapping_add(5));
                let mut jump = vec![0xe9];
                jump.extend_from_slice(&distance.to_le_bytes()[..4]);
                self.write(place, &jump)
            }
            Edit::CodeBit(symbol) => {
                let place = self.symbol(symbol)?.wrapping_add(12);
                let byte = self.opened.kernel.space.read_u8(place)?;
                self.write(place, &[byte ^ 4])
            }
            Edit::Condition(symbol) => {
                let place = self.condition(symbol)?;
                let byte = self.opened.kernel.space.read_u8(place)?;
                self.write(place, &[byte ^ 1])
            }
            Edit::ReturnZero(symbol) => {
                // Behind the place for tracing: xor %eax,%eax; ret
                let place = self.symbol(symbol)?.wrapping_add(12);
                self.write(place, &[0x31, 0xc0, 0xc3])
            }
            Edit::Constant(symbol) => {
                let place = self.symbol(symbol)?;
                let word = self.read(place)?;
                self.write(place, &(word ^ 0xff00).to_le_bytes())
            }
            Edit::ShareCredentials => {
                let (from, to) = (self.task(1)?, self.task(pid)?);
                for pointer in ["cred", "real_cred"] {
                    let offset = self.types()?.member("task_struct", pointer)?.offset;
                    let taken = self.read(from.wrapping_add(offset))?;
                    self.write(to.wrapping_add(offset), &taken.to_le_bytes())?;
                }
                Ok(())
            }
            Edit::UserZero => {
                for member in ["uid", "euid", "suid", "fsuid"] {
                    self.write_credential(pid, member, &0u32.to_le_bytes())?;
                }
                Ok(())
            }
            Edit::AllCapabilities => {
                for member in ["cap_effective", "cap_permitted"] {
                    self.write_credential(pid, member, &ALL_CAPABILITIES.to_le_bytes())?;
                }
                Ok(())
            }
            Edit::Text { symbol, text } => {
                let place = self.symbol(symbol)?;
                self.write(place, &[text.as_bytes(), b"\0"].concat())
            }
        }
    }

    /// Leads getpgid of 32-bit programs to a module: by the table, or in the
    /// code that took its place.
    fn system_call_32(&mut self) -> Result<()> {
        if let Ok(table) = self.symbol("ia32_sys_call_table") {
            return self.lead_to_module(table.wrapping_add(8 * GETPGID_32));
        }
        let start = self.symbol("ia32_sys_call")?;
        let getpgid = self.symbol("__ia32_sys_getpgid")?.as_u64();
        let mut code = vec![0; LONGEST_DISPATCHER];
        self.opened.kernel.space.read(start, &mut code)?;
        let mut decoder = Decoder::with_ip(64, &code, start.as_u64(), DecoderOptions::NONE);
        let branch = decoder
            .iter()
            .find(|instruction| instruction.near_branch_target() == getpgid);
        let end = branch.context("no branch to getpgid")?.next_ip();
        let target = address(&self.module()?, "base")?.as_u64();
        let distance = target.wrapping_sub(end).to_le_bytes();
        self.write(VirtualAddress::new(end - 4), &distance[..4])
    }

    /// The byte of a function's first conditional jump that says on what.
    fn condition(&self, symbol: &'static str) -> Result<VirtualAddress> {
        let start = self.symbol(symbol)?;
        let mut code = [0; 256];
        self.opened.kernel.space.read(start, &mut code)?;
        let decoder = Decoder::with_ip(64, &code, start.as_u64(), DecoderOptions::NONE);
        for instruction in decoder {
            let offset = instruction.ip() - start.as_u64();
            match code.get(offset as usize..) {
                Some([0x70..=0x7f, ..]) => return Ok(start.wrapping_add(offset)),
                Some([0x0f, 0x80..=0x8f, ..]) => return Ok(start.wrapping_add(offset + 1)),
                _ => {}
            }
        }
        anyhow::bail!("{symbol} asks no condition at its start")
    }

    /// Takes what lies at `object` out of the list that `member` puts it into.
    fn unlink(&mut self, object: VirtualAddress, structure: &str, member: &str) -> Result<()> {
        let links = object.wrapping_add(self.types()?.member(structure, member)?.offset);
        let (next, previous) = (self.read(links)?, self.read(links.wrapping_add(8))?);
        self.write(VirtualAddress::new(previous), &next.to_le_bytes())?;
        let back = VirtualAddress::new(next).wrapping_add(8);
        self.write(back, &previous.to_le_bytes())
    }

    fn write_credential(&mut self, pid: i32, member: &str, bytes: &[u8]) -> Result<()> {
        let pointer = self.types()?.member("task_struct", "real_cred")?.offset;
        let credentials = self.read(self.task(pid)?.wrapping_add(pointer))?;
        let offset = self.types()?.member("cred", member)?.offset;
        self.write(VirtualAddress::new(credentials).wrapping_add(offset), bytes)
    }

    /// Puts the address of a module's code there.
    fn lead_to_module(&mut self, place: VirtualAddress) -> Result<()> {
        let target = address(&self.module()?, "base")?;
        self.write(place, &target.as_u64().to_le_bytes())
    }

    /// Where the function of the first hook of `capable` lies.
    fn security_hook(&self) -> Result<VirtualAddress> {
        let types = self.types()?;
        if let Ok(calls) = self.symbol("static_calls_table") {
            let call = types.member("lsm_static_calls_table", "capable")?.offset
                + types.member("lsm_static_call", "key")?.offset;
            let key = self.read(calls.wrapping_add(call))?;
            let function = types.member("static_call_key", "func")?.offset;
            return Ok(VirtualAddress::new(key).wrapping_add(function));
        }
        let heads = self.symbol("security_hook_heads")?;
        let head = types.member("security_hook_heads", "capable")?.offset;
        let hook = VirtualAddress::new(self.read(heads.wrapping_add(head))?);
        let list = types.member("security_hook_list", "list")?.offset;
        let function = types.member("security_hook_list", "hook")?.offset;
        Ok(hook.wrapping_sub(list).wrapping_add(function))
    }

    fn types(&self) -> Result<&'a Types> {
        Ok(self.opened.kernel.profile.types()?)
    }

    fn symbol(&self, name: &str) -> Result<VirtualAddress> {
        let symbols = self.opened.kernel.profile.symbols();
        let address = symbols.address(name);
        address.with_context(|| format!("the kernel has no symbol {name}"))
    }

    fn task(&self, pid: i32) -> Result<VirtualAddress> {
        let rows = read_table(&self.opened.guest(), "processes", Selection::default())?;
        let pid = Value::Unsigned(u64::try_from(pid)?);
        let row = rows.iter().find(|row| row.get("pid") == Some(&pid));
        address(row.context("no such process")?, "address")
    }

    fn module(&self) -> Result<TableRow> {
        let rows = read_table(&self.opened.guest(), "modules", Selection::default())?;
        let name = Value::from(MODULE);
        let row = rows.into_iter().find(|row| row.get("name") == Some(&name));
        row.with_context(|| format!("the module {MODULE} is not loaded"))
    }

    fn read(&self, place: VirtualAddress) -> Result<u64> {
        Ok(self.opened.kernel.space.read_u64(place)?)
    }

    fn write(&mut self, place: VirtualAddress, bytes: &[u8]) -> Result<()> {
        let page = place.as_u64() % 4096;
        ensure!(page + bytes.len() as u64 <= 4096, "{place} crosses a page");
        let offset = self.opened.kernel.space.translate(place)?.physical.as_u64();
        let mut before = vec![0; bytes.len()];
        self.file.read_exact_at(&mut before, offset)?;
        self.before.push((offset, before));
        self.file.write_all_at(bytes, offset)?;
        Ok(())
    }
}

impl Drop for Edited<'_> {
    fn drop(&mut self) {
        for (offset, bytes) in self.before.drain(..).rev() {
            let written = self.file.write_all_at(&bytes, offset);
            if let Err(error) = written {
                eprintln!("an edit at {offset:#x} stays in the guest: {error}");
            }
        }
    }
}

fn address(row: &TableRow, column: &str) -> Result<VirtualAddress> {
    match row.get(column) {
        Some(Value::Address(address)) => Ok(VirtualAddress::new(*address)),
        other => anyhow::bail!("the column {column} is {other:?}"),
    }
}
