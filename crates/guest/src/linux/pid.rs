//! Process ids and the namespaces in which they count (`struct pid`,
//! `include/linux/pid.h`).

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::{TypeError, Types};

use crate::{Guest, Layout, layout};

/// `MAX_PID_NS_LEVEL` (`include/linux/pid_namespace.h`).
const DEEPEST: u32 = 32;

layout! {
    /// `include/linux/pid.h`
    struct PidLayout: "pid" {
        level: "level",
        numbers: "numbers",
    }
}

layout! {
    /// `include/linux/pid.h`
    struct UpidLayout: "upid" {
        number: "nr",
        namespace: "ns",
    }
}

/// How ids of a guest are read.
#[derive(Debug)]
pub struct PidModel {
    pid: PidLayout,
    upid: UpidLayout,
}

impl Layout for PidModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        Ok(Self {
            pid: PidLayout::resolve(types)?,
            upid: UpidLayout::resolve(types)?,
        })
    }
}

/// Why there are no numbers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PidError {
    /// The memory can't be read.
    #[error("struct pid: {0}")]
    Read(#[from] ReadError),
    /// It is deeper than pid namespaces can be nested.
    #[error("the pid at {pid} is at level {level}")]
    Level {
        /// The `struct pid`.
        pid: VirtualAddress,
        /// Its level.
        level: u32,
    },
}

/// The numbers of a process, and the namespace it was made in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PidNumbers {
    /// Its number in the initial namespace.
    pub initial: u32,
    /// Its numbers in further namespaces, inwards.
    pub inner: Vec<u32>,
    /// The innermost `pid_namespace`.
    pub namespace: VirtualAddress,
}

impl PidModel {
    /// The number that the `struct pid` at `pid` has in the initial pid
    /// namespace.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn initial(&self, guest: &Guest, pid: VirtualAddress) -> Result<u32, ReadError> {
        let upid = pid.wrapping_add(self.pid.numbers.offset);
        guest
            .space()
            .read_u32(upid.wrapping_add(self.upid.number.offset))
    }

    /// All numbers of the `struct pid` at `pid`.
    ///
    /// # Errors
    /// [`PidError`] if they can't be read.
    pub fn numbers(&self, guest: &Guest, pid: VirtualAddress) -> Result<PidNumbers, PidError> {
        let level = guest.number(pid, &self.pid.level)? as u32;
        if level > DEEPEST {
            return Err(PidError::Level { pid, level });
        }
        let upid = |level: u32| {
            let offset = u64::from(level).wrapping_mul(self.upid.size);
            pid.wrapping_add(self.pid.numbers.offset.wrapping_add(offset))
        };
        let number = |level| guest.number(upid(level), &self.upid.number);
        let inner = (1..=level).map(|level| Ok(number(level)? as u32));
        Ok(PidNumbers {
            initial: number(0)? as u32,
            inner: inner.collect::<Result<_, ReadError>>()?,
            namespace: guest.pointer(upid(level), &self.upid.namespace)?,
        })
    }
}
