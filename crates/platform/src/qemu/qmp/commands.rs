//! The commands that are asked of QEMU, and what their answers mean.
//!
//! Source, of the human monitor's commands: QEMU `monitor/hmp-cmds-target.c`
//! (`gpa2hva`), `target/i386/cpu-dump.c` (`info registers`).

use secmon_memory::{CpuRegisters, VirtualAddress};
use serde_json::{Value, json};

use super::{QmpClient, QmpError};

/// What QEMU's `query-status` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunState {
    /// Whether vCPUs run.
    pub running: bool,
    /// The state's name: `running`, `paused`, `prelaunch`, …
    pub status: String,
}

/// A block of RAM as `info ramblock` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name, `pc.ram` for most machines' main RAM.
    pub name: String,
    /// The bytes in use.
    pub used: u64,
}

impl QmpClient {
    /// Whether the guest runs.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn status(&mut self) -> Result<RunState, QmpError> {
        let state = self.execute("query-status", &json!({}))?;
        let running = state.get("running").and_then(Value::as_bool);
        let status = state.get("status").and_then(Value::as_str);
        match (running, status) {
            (Some(running), Some(status)) => Ok(RunState {
                running,
                status: status.to_owned(),
            }),
            _ => Err(self.protocol("query-status says neither `running` nor `status`")),
        }
    }

    /// Stops all vCPUs.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn stop(&mut self) -> Result<(), QmpError> {
        self.execute("stop", &json!({})).map(drop)
    }

    /// Lets all vCPUs run.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn resume(&mut self) -> Result<(), QmpError> {
        self.execute("cont", &json!({})).map(drop)
    }

    /// Runs a command of the human monitor and gives its text.
    ///
    /// # Errors
    /// As [`execute`](Self::execute). What the command itself has to complain
    /// about is in the text.
    pub fn monitor_command(&mut self, command: &str) -> Result<String, QmpError> {
        let arguments = json!({"command-line": command});
        match self.execute("human-monitor-command", &arguments)? {
            Value::String(text) => Ok(text),
            _ => Err(self.protocol("human-monitor-command returned no text")),
        }
    }

    /// The RAM blocks, QEMU's devices' too.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn ram_blocks(&mut self) -> Result<Vec<RamBlock>, QmpError> {
        let text = self.monitor_command("info ramblock")?;
        Ok(parse_ram_blocks(&text))
    }

    /// Where in QEMU's own address space the RAM at a guest physical address
    /// lies, and the name of the memory region; `None` where there is no RAM.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn host_address(&mut self, physical: u64) -> Result<Option<(String, u64)>, QmpError> {
        let text = self.monitor_command(&format!("gpa2hva {physical:#x}"))?;
        Ok(parse_host_address(&text))
    }

    /// The bytes of main RAM and of memory devices (hotplugged DIMMs), from
    /// `query-memory-size-summary`.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn memory_size(&mut self) -> Result<(u64, u64), QmpError> {
        let summary = self.execute("query-memory-size-summary", &json!({}))?;
        let field = |name| summary.get(name).and_then(Value::as_u64);
        match field("base-memory") {
            Some(base) => Ok((base, field("plugged-memory").unwrap_or(0))),
            None => Err(self.protocol("query-memory-size-summary says no `base-memory`")),
        }
    }

    /// The ids of the memory backends of memory devices that are plugged in.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn memory_device_backends(&mut self) -> Result<Vec<String>, QmpError> {
        let devices = self.execute("query-memory-devices", &json!({}))?;
        let devices = devices.as_array().map(Vec::as_slice).unwrap_or_default();
        let backends = devices.iter().filter_map(|device| {
            let path = device.pointer("/data/memdev")?.as_str()?;
            Some(path.rsplit('/').next()?.to_owned())
        });
        Ok(backends.collect())
    }

    /// The registers of each vCPU, in their order.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn registers(&mut self) -> Result<Vec<CpuRegisters>, QmpError> {
        let text = self.monitor_command("info registers -a")?;
        Ok(parse_registers(&text))
    }
}

/// The rows of `info ramblock`: name, page size with unit, offset, used bytes,
/// total bytes. The name, right-aligned, may hold spaces.
fn parse_ram_blocks(text: &str) -> Vec<RamBlock> {
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        // Newer versions add columns after the total.
        let offset = fields.iter().position(|field| field.starts_with("0x"))?;
        let used = fields.get(offset + 1)?.strip_prefix("0x")?;
        let name = fields.get(..offset.checked_sub(2)?)?.join(" ");
        (!name.is_empty()).then_some(RamBlock {
            name,
            used: u64::from_str_radix(used, 16).ok()?,
        })
    };
    text.lines().filter_map(parse).collect()
}

/// `Host virtual address for 0x0 (pc.ram) is 0x7f11c3e00000`.
fn parse_host_address(text: &str) -> Option<(String, u64)> {
    let rest = text.trim().strip_prefix("Host virtual address for ")?;
    let (name, address) = rest.split_once(" (")?.1.rsplit_once(") is 0x")?;
    Some((name.to_owned(), u64::from_str_radix(address, 16).ok()?))
}

/// Each vCPU's part has `GDT=` and `IDT=` with base and limit, then a line of
/// control registers, then `EFER=`.
fn parse_registers(text: &str) -> Vec<CpuRegisters> {
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let register = |line: &str, name: &str| {
        line.split_ascii_whitespace()
            .find_map(|field| number(field.strip_prefix(name)?.strip_prefix('=')?))
    };
    let base = |rest: &str| {
        let base = rest.split_ascii_whitespace().next().and_then(number);
        base.map(VirtualAddress::new)
    };
    let mut vcpus: Vec<CpuRegisters> = Vec::new();
    // Those of the next vCPU, whose control registers come behind them.
    let (mut gdt_base, mut idt_base) = (None, None);
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("GDT=") {
            gdt_base = base(rest);
        } else if let Some(rest) = line.strip_prefix("IDT=") {
            idt_base = base(rest);
        } else if line.starts_with("CR0=") {
            vcpus.push(CpuRegisters {
                cr0: register(line, "CR0").unwrap_or(0),
                cr3: register(line, "CR3").unwrap_or(0),
                cr4: register(line, "CR4").unwrap_or(0),
                gdt_base: gdt_base.take(),
                idt_base: idt_base.take(),
                efer: None,
            });
        } else if line.starts_with("EFER=")
            && let Some(vcpu) = vcpus.last_mut()
        {
            vcpu.efer = register(line, "EFER");
        }
    }
    vcpus
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn texts_of_the_human_monitor() {
        let blocks = parse_ram_blocks(
            "              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000180000000 0x0000000180000000
    /rom@etc/acpi/tables    4 KiB  0x0000000181100000 0x0000000000020000 0x0000000000200000                HVA  RO
",
        );
        let block = |name: &str, used| RamBlock {
            name: name.to_owned(),
            used,
        };
        assert_eq!(
            blocks,
            [
                block("pc.ram", 6 << 30),
                block("/rom@etc/acpi/tables", 0x20000)
            ]
        );
        assert_eq!(
            parse_host_address("Host virtual address for 0x0 (pc.ram) is 0x7f11c3e00000\r\n"),
            Some(("pc.ram".to_owned(), 0x7f11_c3e0_0000))
        );
        assert_eq!(
            parse_host_address("No memory is mapped at address 0x140000000"),
            None
        );
        let registers = parse_registers(
            "\nCPU#0\nRAX=0000000000000000\nGDT=     fffffe1b706a0000 0000007f\n\
             IDT=     fffffe0000000000 00000fff\n\
             CR0=80050033 CR2=00007f CR3=0000000002a0c000 CR4=00001ef0\n\
             EFER=0000000000000d01\nCPU#1\nCR0=60000010 CR2=0 CR3=0 CR4=0\n",
        );
        assert_eq!(
            registers,
            [
                CpuRegisters {
                    cr0: 0x8005_0033,
                    cr3: 0x2a0_c000,
                    cr4: 0x1ef0,
                    gdt_base: Some(VirtualAddress::new(0xffff_fe1b_706a_0000)),
                    idt_base: Some(VirtualAddress::new(0xffff_fe00_0000_0000)),
                    efer: Some(0xd01),
                },
                CpuRegisters {
                    cr0: 0x6000_0010,
                    ..CpuRegisters::default()
                },
            ]
        );
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_skipped(text in "\\PC{0,200}") {
            let _ = (parse_ram_blocks(&text), parse_host_address(&text), parse_registers(&text));
        }
    }
}
