//! The registers with which a thread last came out of user mode: the kernel
//! puts them at the upper end of the thread's kernel stack (`struct pt_regs`,
//! `arch/x86/include/asm/ptrace.h`) at each entry, and leaves them there until
//! the next one.

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::{TypeError, Types};

use crate::linux::span::Span;
use crate::linux::task::Task;
use crate::{Guest, Layout, TableError, layout};

/// `TOP_OF_KERNEL_STACK_PADDING` (`arch/x86/include/asm/thread_info.h`): none,
/// and two words where the kernel is built for FRED.
const PADDINGS: [u64; 2] = [0, 16];
/// `__USER_CS`, `__USER32_CS` and `__USER_DS` (`arch/x86/include/asm/segment.h`).
const USER_CODE: [u64; 2] = [0x33, 0x23];
const USER_DATA: u64 = 0x2b;
/// `THREAD_SIZE` (`arch/x86/include/asm/page_64_types.h`), without and with
/// KASAN. No type that is always there says which.
const STACK_SIZES: [u64; 2] = [16 << 10, 32 << 10];

layout! {
    /// `arch/x86/include/asm/ptrace.h`
    struct RegistersLayout: "pt_regs" {
        instruction: "ip",
        stack: "sp",
        code_segment: "cs",
        stack_segment: "ss",
        system_call: "orig_ax",
    }
}

/// Where the registers lie.
#[derive(Debug)]
struct RegistersModel {
    registers: RegistersLayout,
    span: Span,
}

impl Layout for RegistersModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let registers = RegistersLayout::resolve(types)?;
        let span = Span::of([
            &registers.instruction,
            &registers.stack,
            &registers.code_segment,
            &registers.stack_segment,
            &registers.system_call,
        ]);
        Ok(Self { registers, span })
    }
}

/// The registers with which a thread last came out of user mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserRegisters {
    /// The instruction that comes next.
    pub instruction: VirtualAddress,
    /// The stack pointer.
    pub stack: VirtualAddress,
    /// The number of the system call; none if it came otherwise, by an
    /// interrupt or a fault.
    pub system_call: Option<u32>,
}

/// Why there are no registers.
#[derive(Debug, thiserror::Error)]
pub enum RegistersError {
    /// The kernel's types lack something.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The stack can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// The registers with which the thread last came out of user mode; none for
/// what has no user mode: threads of the kernel, workers that it adds to a
/// process, and what has ended.
///
/// # Errors
/// [`RegistersError`] if they can't be read.
pub fn of_thread(
    guest: &Guest,
    table: &'static str,
    task: &Task,
) -> Result<Option<UserRegisters>, RegistersError> {
    let stack = task.pointer(&task.model().layout.stack);
    if task.is_kernel_thread() || task.mm.is_null() || stack.is_null() {
        return Ok(None);
    }
    let model = guest.layout::<RegistersModel>(table)?;
    let mut first_error = None;
    let places = STACK_SIZES
        .into_iter()
        .flat_map(|size| PADDINGS.map(|padding| size - padding));
    for end in places {
        let Some(offset) = end.checked_sub(model.registers.size) else {
            continue;
        };
        let copy = match model.span.read(guest.space(), stack.wrapping_add(offset)) {
            Ok(copy) => copy,
            // Behind a shorter stack there is nothing.
            Err(error) => {
                first_error.get_or_insert((end, error));
                continue;
            }
        };
        let number = |member| copy.number(member);
        let found = registers(
            number(&model.registers.code_segment),
            number(&model.registers.stack_segment),
            number(&model.registers.instruction),
            number(&model.registers.stack),
            number(&model.registers.system_call),
        );
        if found.is_some() {
            return Ok(found);
        }
    }
    match first_error {
        Some((end, error)) if end <= STACK_SIZES[0] => Err(error.into()),
        _ => Ok(None),
    }
}

/// What these words say, if they are registers of user mode.
fn registers(
    code_segment: u64,
    stack_segment: u64,
    instruction: u64,
    stack: u64,
    system_call: u64,
) -> Option<UserRegisters> {
    // What FRED adds to the selectors lies above them.
    let user = USER_CODE.contains(&(code_segment & 0xffff)) && stack_segment & 0xffff == USER_DATA;
    if !user || instruction >> 63 != 0 {
        return None;
    }
    Some(UserRegisters {
        instruction: VirtualAddress::new(instruction),
        stack: VirtualAddress::new(stack),
        // Interrupts and faults leave a negative number.
        system_call: (system_call as i64 >= 0)
            .then_some(system_call)
            .and_then(|number| number.try_into().ok()),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn user_mode_is_told_by_its_segments() {
        let call = registers(0x33, 0x2b, 0x40_1000, 0x7ffc_0000, 34);
        let call = call.expect("user mode");
        assert_eq!(call.instruction, VirtualAddress::new(0x40_1000));
        assert_eq!(call.system_call, Some(34));
        let interrupt = registers(0x33, 0x2b, 0x40_1000, 0x7ffc_0000, u64::MAX);
        assert_eq!(interrupt.expect("user mode").system_call, None);
        // As FRED leaves them.
        assert!(registers(0x1_0033, 0x3_0000_002b, 0x40_1000, 0x7ffc_0000, 0).is_some());
        assert!(registers(0x10, 0x18, 0x40_1000, 0x7ffc_0000, 0).is_none());
        // A worker that the kernel added to a process.
        assert!(registers(0, 0, 0, 0, 0).is_none());
    }

    proptest! {
        /// Whatever lies on the stack, what comes of it is user mode's.
        #[test]
        fn any_words_are_judged(words in any::<[u64; 5]>(), user in any::<bool>()) {
            let [code, stack_segment, instruction, stack, call] = words;
            let (code, stack_segment) = match user {
                true => (0x33, 0x2b),
                false => (code, stack_segment),
            };
            if let Some(found) = registers(code, stack_segment, instruction, stack, call) {
                prop_assert!(found.instruction.as_u64() >> 63 == 0);
                prop_assert_eq!(found.stack.as_u64(), stack);
            }
        }
    }
}
