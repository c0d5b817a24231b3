//! Filters of system calls (seccomp): a list of those that are allowed,
//! whatever their arguments or for some of them.
//!
//! All others fail with "no such system call", the one refusal that libraries
//! know how to take: they fall back to another call or report an error.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// Why a filter is not in force.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct FilterError(String);

fn failed(error: impl std::fmt::Display) -> FilterError {
    FilterError(error.to_string())
}

/// What an argument has to be. Of its 64 bits the lower half is looked at, which
/// is all of the arguments in question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// This value.
    Is(u64),
    /// With these bits set.
    Has(u64),
    /// With none of these bits set.
    Lacks(u64),
}

/// The system calls that are allowed.
#[derive(Debug, Default)]
pub struct Filter {
    rules: BTreeMap<i64, Vec<SeccompRule>>,
}

impl Filter {
    /// Allows calls whatever their arguments.
    #[must_use]
    pub fn allow(mut self, calls: &[libc::c_long]) -> Self {
        self.rules
            .extend(calls.iter().map(|call| (*call, Vec::new())));
        self
    }

    /// Allows a call if its argument of this number, counted from 0, is one of
    /// `arguments`.
    ///
    /// # Errors
    /// [`FilterError`] if there is no such argument.
    pub fn allow_if(
        mut self,
        call: libc::c_long,
        number: u8,
        arguments: &[Argument],
    ) -> Result<Self, FilterError> {
        let rule = |argument: &Argument| -> Result<SeccompRule, BackendError> {
            let (operator, value) = match *argument {
                Argument::Is(value) => (SeccompCmpOp::Eq, value),
                Argument::Has(bits) => (SeccompCmpOp::MaskedEq(bits), bits),
                Argument::Lacks(bits) => (SeccompCmpOp::MaskedEq(bits), 0),
            };
            let length = SeccompCmpArgLen::Dword;
            let condition = SeccompCondition::new(number, length, operator, value)?;
            SeccompRule::new(vec![condition])
        };
        let rules: Result<Vec<_>, _> = arguments.iter().map(rule).collect();
        self.rules.insert(call, rules.map_err(failed)?);
        Ok(self)
    }

    /// Allows to map memory that is not executable.
    ///
    /// # Errors
    /// As [`allow_if`](Self::allow_if).
    pub fn allow_mapping(self) -> Result<Self, FilterError> {
        let data = Argument::Lacks(libc::PROT_EXEC as u64);
        self.allow_if(libc::SYS_mmap, 2, &[data])
    }

    /// Allows to change the rights to memory, but not to executable.
    ///
    /// # Errors
    /// As [`allow_if`](Self::allow_if).
    pub fn allow_protecting(self) -> Result<Self, FilterError> {
        let data = Argument::Lacks(libc::PROT_EXEC as u64);
        self.allow_if(libc::SYS_mprotect, 2, &[data])
    }

    /// Allows to start threads, not processes. `clone3` has its flags in memory,
    /// where no filter sees them: it does not exist, and libc turns to `clone`.
    ///
    /// # Errors
    /// As [`allow_if`](Self::allow_if).
    pub fn allow_threads(self) -> Result<Self, FilterError> {
        let thread = Argument::Has(libc::CLONE_THREAD as u64);
        self.allow_if(libc::SYS_clone, 0, &[thread])
    }

    /// Allows the process to end itself by a signal, as `abort` does.
    ///
    /// # Errors
    /// As [`allow_if`](Self::allow_if).
    pub fn allow_own_end(self) -> Result<Self, FilterError> {
        let own = Argument::Is(std::process::id().into());
        self.allow_if(libc::SYS_tgkill, 0, &[own])
    }

    /// How many calls are allowed for some arguments only.
    #[must_use]
    pub fn conditional(&self) -> usize {
        self.rules
            .values()
            .filter(|rules| !rules.is_empty())
            .count()
    }

    /// Puts the filter in force, for all threads of the process and what they
    /// start. It can't be taken off.
    ///
    /// # Errors
    /// [`FilterError`] with the kernel's reason.
    pub fn install(self) -> Result<(), FilterError> {
        let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(failed)?;
        let refuse = SeccompAction::Errno(libc::ENOSYS as u32);
        let filter = SeccompFilter::new(self.rules, refuse, SeccompAction::Allow, arch);
        let program = BpfProgram::try_from(filter.map_err(failed)?).map_err(failed)?;
        seccompiler::apply_filter_all_threads(&program).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_whether_arguments_matter() {
        let filter = Filter::default()
            .allow(&[libc::SYS_read, libc::SYS_write])
            .allow_mapping()
            .and_then(Filter::allow_threads)
            .expect("rules");
        assert_eq!((filter.rules.len(), filter.conditional()), (4, 2));
        let number = 9;
        let none = Filter::default().allow_if(libc::SYS_mmap, number, &[Argument::Is(0)]);
        assert!(none.is_err(), "there are six arguments");
    }
}
