//! What has to be known of the running kernel.

/// A running kernel, as far as it decides what its text looks like.
///
/// All of it is the guest's own word. Code that somebody changed can only be
/// explained by such a word if that, too, is changed: a key, a table of hooks,
/// a word of features; each of them is a thing that other detectors look at.
pub trait Running {
    /// Fills `bytes` from an address; false if it can't.
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool;

    /// The run-time address of a symbol.
    fn symbol(&self, name: &'static str) -> Option<u64>;

    /// The name of the symbol at exactly this address.
    fn name_at(&self, address: u64) -> Option<&str>;

    /// Whether the first CPU has a feature or a fault, by its number in
    /// `x86_capability`.
    fn has_feature(&self, number: u16) -> bool;

    /// The size of a record of alternative instructions, in bytes.
    fn alternative_size(&self) -> usize;

    /// Reads eight bytes.
    fn read_u64(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)
            .then_some(u64::from_le_bytes(bytes))
    }
}

/// A running kernel and its records of what it puts into its text.
#[derive(Clone, Copy)]
pub struct Kernel<'k> {
    /// What it says of itself.
    pub running: &'k dyn Running,
    /// Its records.
    pub patches: &'k dyn Patches,
}

/// A running kernel with a copy of its text: many places of it are looked at
/// one by one.
pub(crate) struct Captured<'r> {
    running: &'r dyn Running,
    start: u64,
    text: Vec<u8>,
}

impl<'r> Captured<'r> {
    /// Copies `length` bytes; where that fails, each place is read anew.
    pub(crate) fn new(running: &'r dyn Running, start: u64, length: usize) -> Self {
        let mut text = vec![0; length];
        if !running.read(start, &mut text) {
            text.clear();
        }
        Self {
            running,
            start,
            text,
        }
    }
}

impl Running for Captured<'_> {
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let copied = address
            .checked_sub(self.start)
            .and_then(|offset| usize::try_from(offset).ok())
            .and_then(|offset| self.text.get(offset..)?.get(..bytes.len()));
        match copied {
            Some(copied) => {
                bytes.copy_from_slice(copied);
                true
            }
            None => self.running.read(address, bytes),
        }
    }

    fn symbol(&self, name: &'static str) -> Option<u64> {
        self.running.symbol(name)
    }

    fn name_at(&self, address: u64) -> Option<&str> {
        self.running.name_at(address)
    }

    fn has_feature(&self, number: u16) -> bool {
        self.running.has_feature(number)
    }

    fn alternative_size(&self) -> usize {
        self.running.alternative_size()
    }
}

/// Whether a call or jump that the kernel puts into its text as it runs leads
/// where one may.
pub trait Patches {
    /// Whether a traced function may call `target` first.
    fn is_tracer(&self, target: u64) -> bool;

    /// Whether ftrace's own code may call `target`.
    fn is_trace_function(&self, target: u64) -> bool;

    /// Whether `target` is one of the jumps through a register that stand
    /// elsewhere for the processor's sake.
    fn is_indirect_thunk(&self, target: u64) -> bool;

    /// Whether `target` is code of the kernel or of a listed module.
    fn is_code(&self, target: u64) -> bool;

    /// The byte that a kprobe at this address took away.
    fn probed(&self, address: u64) -> Option<u8>;

    /// Whether `target` is a slot of a kprobe.
    fn is_probe_slot(&self, target: u64) -> bool;

    /// Start and key of the static call's trampoline that lies at `address`.
    fn trampoline(&self, address: u64) -> Option<(u64, u64)>;
}
