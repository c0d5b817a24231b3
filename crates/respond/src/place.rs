//! Where the guest's own kernel can be made to call one of its functions.
//!
//! That place is the entry of `schedule()`, which every task passes when it
//! waits. It takes no arguments and returns nothing, so all registers that a
//! call may change are free there; it is called with interrupts on and without
//! a spin lock held, so that a function that takes some may run before it. A
//! return address to `schedule` itself is put on the stack and the processor
//! sent to the other function: that one returns to `schedule`, which then runs
//! as it would have. Nothing has to be put back, whatever ends meanwhile.

use secmon_gate::protocol::{Bytes, Register, Registers, Request};
use secmon_guest::linux::per_cpu::PerCpu;
use secmon_guest::linux::task::{Membership, Task, TaskModel};
use secmon_guest::{Guest, layout};
use secmon_memory::{PhysicalAddress, VirtualAddress};

const TABLE: &str = "processes";

/// The interrupt flag of `eflags`.
const INTERRUPTS_ON: u32 = 1 << 9;
/// The bits of `cs` that say in which ring a processor is.
const RING: u32 = 3;
/// The bit of the preemption count that says that nobody wants to preempt
/// (`PREEMPT_NEED_RESCHED`, inverted).
const NEED_RESCHEDULE: u64 = 1 << 31;
/// How much of a stack has to be free below: some calls, and an interrupt.
const LEAST_STACK: u64 = 4 << 10;
/// The largest stack of a task (`THREAD_SIZE` with KASAN).
const LARGEST_STACK: u64 = 64 << 10;

layout! {
    /// `arch/x86/include/asm/current.h`, 6.2 to 6.14.
    struct HotLayout: "pcpu_hot" {
        current: "current_task",
        preempt: "preempt_count",
    }
}

/// A function of the kernel, called with up to three arguments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) function: VirtualAddress,
    pub(crate) arguments: [u64; 3],
}

/// The functions that are used, by the guest's symbols.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Functions {
    pub(crate) schedule: VirtualAddress,
    pub(crate) send_signal: VirtualAddress,
}

impl Functions {
    pub(crate) fn of(guest: &Guest) -> Result<Self, String> {
        Ok(Self {
            schedule: function(guest, "schedule")?,
            // `int send_sig(int sig, struct task_struct *p, int priv)`
            send_signal: function(guest, "send_sig")?,
        })
    }
}

/// The one function of this name, in the kernel's own image.
fn function(guest: &Guest, name: &str) -> Result<VirtualAddress, String> {
    let mut found = guest.symbols().addresses(name);
    let (Some(address), None) = (found.next(), found.next()) else {
        return Err(format!(
            "its kernel has not exactly one symbol called {name}"
        ));
    };
    let image = &guest.kernel().image;
    let inside = address.as_u64().wrapping_sub(image.virtual_base.as_u64()) < image.size;
    let executable = guest
        .space()
        .translate(address)
        .is_ok_and(|translation| translation.rights.executable && !translation.rights.user);
    if inside && executable {
        Ok(address)
    } else {
        Err(format!("{name} at {address} is no code of its kernel"))
    }
}

/// The change that makes the processor at the entry of `schedule` call a
/// function first.
///
/// # Errors
/// Why the processor is not where that can be done.
pub(crate) fn change(
    guest: &Guest,
    vcpu: u32,
    registers: &Registers,
    functions: &Functions,
    call: &Call,
) -> Result<Change, String> {
    let entry = functions.schedule.as_u64();
    if registers.rip != entry {
        return Err(format!("it stands at {:#x}", registers.rip));
    }
    if registers.cs & RING != 0 || registers.eflags & INTERRUPTS_ON == 0 {
        return Err("it waits outside of the kernel, or with interrupts off".to_owned());
    }
    let cpu = own_data(guest, registers)?;
    let count = guest.space().read_u32(cpu.preempt);
    let count = count.map_err(|error| format!("its preemption count: {error}"))?;
    if u64::from(count) & !NEED_RESCHEDULE != 0 {
        return Err(format!("its preemption count is {count:#x}, not 0"));
    }
    let slot = stack_slot(guest, registers.rsp, cpu.current)?;
    let [first, second, third] = call.arguments;
    Ok(Change {
        vcpu,
        at: entry,
        slot,
        // In this order each step alone is harmless: free memory below the
        // stack, registers that are free here, then a second call of
        // `schedule`, and at last the other function.
        registers: [
            (Register::Rdi, first),
            (Register::Rsi, second),
            (Register::Rdx, third),
            (Register::Rsp, registers.rsp.wrapping_sub(8)),
            (Register::Rip, call.function.as_u64()),
        ],
    })
}

/// What one processor's kernel code knows of itself.
struct OwnData {
    current: VirtualAddress,
    preempt: VirtualAddress,
}

fn own_data(guest: &Guest, registers: &Registers) -> Result<OwnData, String> {
    let cpus = PerCpu::read(guest, TABLE).map_err(|error| error.to_string())?;
    let base = VirtualAddress::new(registers.gs_base);
    let start = VirtualAddress::new(0);
    if !cpus
        .possible()
        .any(|cpu| cpus.address(start, cpu) == Some(base))
    {
        return Err(format!("its GS base {base} is no processor's own memory"));
    }
    let at = |symbol: VirtualAddress| base.wrapping_add(symbol.as_u64());
    let hot = guest.address("pcpu_hot");
    let (current, preempt) = match (hot, guest.layout::<HotLayout>(TABLE)) {
        (Some(hot), Ok(layout)) => (
            at(hot).wrapping_add(layout.current.offset),
            at(hot).wrapping_add(layout.preempt.offset),
        ),
        _ => {
            let symbol = |name| guest.symbol(TABLE, name).map_err(|error| error.to_string());
            (at(symbol("current_task")?), at(symbol("__preempt_count")?))
        }
    };
    let current = guest.space().read_pointer(current);
    Ok(OwnData {
        current: current.map_err(|error| format!("its current task: {error}"))?,
        preempt,
    })
}

/// The eight bytes below the stack pointer, if that is in the stack of the
/// processor's task, with room below.
fn stack_slot(
    guest: &Guest,
    stack_pointer: u64,
    current: VirtualAddress,
) -> Result<PhysicalAddress, String> {
    let model = guest.layout::<TaskModel>(TABLE);
    let model = model.map_err(|error| error.to_string())?;
    let task = Task::read(guest, &model, current, Membership::Anywhere)
        .map_err(|error| format!("its current task: {error}"))?;
    let stack = task.pointer(&model.layout.stack).as_u64();
    let depth = stack_pointer.wrapping_sub(stack);
    if !(LEAST_STACK..LARGEST_STACK).contains(&depth) || !stack_pointer.is_multiple_of(8) {
        return Err(format!(
            "its stack pointer {stack_pointer:#x} is not in its task's stack at {stack:#x}, or too deep in it"
        ));
    }
    let space = guest.space();
    let code = |address: VirtualAddress| {
        space
            .translate(address)
            .is_ok_and(|translation| translation.rights.executable && !translation.rights.user)
    };
    let top = VirtualAddress::new(stack_pointer);
    let caller = space.read_pointer(top);
    if !caller.is_ok_and(code) {
        return Err("its stack does not lead back to code of the kernel".to_owned());
    }
    let slot = space.translate(VirtualAddress::new(stack_pointer.wrapping_sub(8)));
    match slot {
        Ok(slot) if slot.rights.writable && !slot.rights.user => Ok(slot.physical),
        Ok(_) => Err("its stack can't be written".to_owned()),
        Err(error) => Err(format!("its stack: {error}")),
    }
}

/// A change of one processor, not made yet.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    vcpu: u32,
    /// Where it stands, and where it goes on after the call.
    at: u64,
    slot: PhysicalAddress,
    registers: [(Register, u64); 5],
}

impl Change {
    /// The request that makes it.
    pub(crate) fn request(&self) -> Request {
        Request::Alter {
            vcpu: self.vcpu,
            at: self.at,
            memory: vec![(self.slot.as_u64(), Bytes(self.at.to_le_bytes().to_vec()))],
            registers: self.registers.to_vec(),
        }
    }

    /// Whether it was made in full.
    ///
    /// # Errors
    /// What is otherwise.
    pub(crate) fn verify(&self, guest: &Guest, now: &Registers) -> Result<(), String> {
        let mut word = [0; 8];
        let read = guest.space().memory().read(self.slot, &mut word);
        if read.is_err() || u64::from_le_bytes(word) != self.at {
            return Err(format!("the stack holds {word:02x?}"));
        }
        let found = [now.rdi, now.rsi, now.rdx, now.rsp, now.rip];
        for ((register, wanted), found) in self.registers.iter().zip(found) {
            if *wanted != found {
                return Err(format!("{register:?} is {found:#x}, not {wanted:#x}"));
            }
        }
        Ok(())
    }
}
