//! A client of QEMU's gdbstub that sends nothing but what is listed in
//! [`Command`].
//!
//! What is particular about QEMU's stub: it stops all vCPUs when a client
//! connects; while vCPUs run, any byte stops them; a client that vanishes
//! leaves them as they are, with its breakpoints in place. `D` takes the
//! breakpoints away and lets the vCPUs run. `QStartNoAckMode` is not offered.
//!
//! Source: GDB manual, appendix E; QEMU `gdbstub/gdbstub.c`.

mod packet;
mod reply;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::hex;
use crate::protocol::{Breakpoint, BreakpointKind, Register, Registers};

pub use packet::{Decoder, Item, encode};
pub use reply::{StopReply, registers, threads};

/// How often a packet is repeated that arrived damaged.
const REPEATS: usize = 3;

/// Bytes that free a target from a stub, whatever state its last client left
/// it in: stop running vCPUs (0x03), end a packet that was cut short (`#00`,
/// refused for its checksum), acknowledge, detach.
pub const RESCUE: &[u8] = b"\x03+#00+$D#44";

/// All that is ever sent to a stub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Ask for the description of registers; single ones can't be written
    /// before.
    Describe,
    /// The next vCPUs (`first` begins the list).
    Threads {
        /// Begin the list.
        first: bool,
    },
    /// Choose the vCPU of the following commands.
    Select {
        /// From 0.
        vcpu: u32,
    },
    /// All registers.
    ReadRegisters,
    /// Change one register.
    WriteRegister {
        /// Which one.
        register: Register,
        /// Its new value.
        value: u64,
    },
    /// Whether the addresses that follow are physical.
    Physical(bool),
    /// Memory.
    ReadMemory {
        /// The first address.
        address: u64,
        /// How many bytes.
        length: u32,
    },
    /// Change memory.
    WriteMemory {
        /// The first address.
        address: u64,
        /// The new bytes.
        bytes: Vec<u8>,
    },
    /// Set a breakpoint.
    Set(Breakpoint),
    /// Take a breakpoint away.
    Remove(Breakpoint),
    /// Let all vCPUs run.
    Continue,
    /// One instruction on one vCPU.
    Step {
        /// From 0.
        vcpu: u32,
    },
    /// Take all breakpoints away and let all vCPUs run.
    Detach,
}

impl Command {
    /// The packet's payload.
    pub fn payload(&self) -> Vec<u8> {
        let text = match self {
            Self::Describe => "qXfer:features:read:target.xml:0,ffb".to_owned(),
            Self::Threads { first: true } => "qfThreadInfo".to_owned(),
            Self::Threads { first: false } => "qsThreadInfo".to_owned(),
            Self::Select { vcpu } => format!("Hg{:x}", u64::from(*vcpu) + 1),
            Self::ReadRegisters => "g".to_owned(),
            Self::WriteRegister { register, value } => {
                let bytes = value.to_le_bytes();
                let length = if *register == Register::Eflags { 4 } else { 8 };
                let bytes = bytes.get(..length).unwrap_or_default();
                format!("P{:x}={}", number(*register), hex::encode(bytes))
            }
            Self::Physical(physical) => format!("Qqemu.PhyMemMode:{}", u8::from(*physical)),
            Self::ReadMemory { address, length } => format!("m{address:x},{length:x}"),
            Self::WriteMemory { address, bytes } => {
                format!("M{address:x},{:x}:{}", bytes.len(), hex::encode(bytes))
            }
            Self::Set(breakpoint) => format!("Z{}", operands(breakpoint)),
            Self::Remove(breakpoint) => format!("z{}", operands(breakpoint)),
            Self::Continue => "c".to_owned(),
            Self::Step { vcpu } => format!("vCont;s:{:x}", u64::from(*vcpu) + 1),
            Self::Detach => "D".to_owned(),
        };
        text.into_bytes()
    }
}

/// A hardware breakpoint in every case: a software one of KVM's would write
/// into the guest's memory.
fn operands(breakpoint: &Breakpoint) -> String {
    let kind = match breakpoint.kind {
        BreakpointKind::Execute => 1,
        BreakpointKind::Write => 2,
        BreakpointKind::Access => 4,
    };
    format!("{kind},{:x},{:x}", breakpoint.address, breakpoint.length)
}

/// A register's number in the description.
fn number(register: Register) -> u8 {
    match register {
        Register::Rax => 0,
        Register::Rbx => 1,
        Register::Rcx => 2,
        Register::Rdx => 3,
        Register::Rsi => 4,
        Register::Rdi => 5,
        Register::Rbp => 6,
        Register::Rsp => 7,
        Register::R8 => 8,
        Register::R9 => 9,
        Register::R10 => 10,
        Register::R11 => 11,
        Register::R12 => 12,
        Register::R13 => 13,
        Register::R14 => 14,
        Register::R15 => 15,
        Register::Rip => 16,
        Register::Eflags => 17,
    }
}

/// Why the stub did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum GdbError {
    /// The socket can't be connected to.
    #[error("connecting to the gdbstub at {path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The connection ended.
    #[error("the gdbstub closed the connection: {0}")]
    Closed(String),
    /// No answer in time.
    #[error("no answer of the gdbstub to {command:?} within {timeout:?}")]
    Timeout {
        /// What was asked.
        command: String,
        /// How long it was waited for.
        timeout: Duration,
    },
    /// What came is not the answer.
    #[error("the gdbstub answered {answer:?} to {command:?}")]
    Refused {
        /// What was asked.
        command: String,
        /// Its answer: `Enn`, nothing for what it does not know, or nonsense.
        answer: String,
    },
}

/// A connection to a stub.
#[derive(Debug)]
pub struct GdbClient {
    socket: OwnedFd,
    timeout: Duration,
    decoder: Decoder,
    /// What came and was not taken yet.
    items: std::collections::VecDeque<Item>,
    /// Stop replies that came in place of other answers, or unasked.
    stops: Vec<StopReply>,
}

impl GdbClient {
    /// Connects, which stops the target.
    ///
    /// # Errors
    /// [`GdbError::Connect`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, GdbError> {
        let failed = |source: rustix::io::Errno| GdbError::Connect {
            path: path.to_owned(),
            source: source.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(failed)?;
        rustix::net::connect(&socket, &address).map_err(failed)?;
        Ok(Self::over(socket, timeout))
    }

    /// A client over a connected, non-blocking socket.
    pub fn over(socket: OwnedFd, timeout: Duration) -> Self {
        Self {
            socket,
            timeout,
            decoder: Decoder::default(),
            items: std::collections::VecDeque::new(),
            stops: Vec::new(),
        }
    }

    /// Asks for the description of registers: from then on single ones can be
    /// written.
    ///
    /// # Errors
    /// [`GdbError`], as of all methods here.
    pub fn describe(&mut self) -> Result<(), GdbError> {
        let answer = self.ask(&Command::Describe)?;
        match answer.first() {
            Some(b'l' | b'm') => Ok(()),
            _ => Err(refused(&Command::Describe, &answer)),
        }
    }

    /// The vCPUs' numbers.
    ///
    /// # Errors
    /// See [`describe`](Self::describe).
    pub fn vcpus(&mut self) -> Result<Vec<u32>, GdbError> {
        const MOST: usize = 4096;
        let mut vcpus = Vec::new();
        let mut command = Command::Threads { first: true };
        while vcpus.len() < MOST {
            let answer = self.ask(&command)?;
            if answer == b"l" {
                return Ok(vcpus);
            }
            let more = threads(&answer).ok_or_else(|| refused(&command, &answer))?;
            vcpus.extend(more);
            command = Command::Threads { first: false };
        }
        Ok(vcpus)
    }

    /// A vCPU's registers.
    ///
    /// # Errors
    /// See [`describe`](Self::describe).
    pub fn registers(&mut self, vcpu: u32) -> Result<Registers, GdbError> {
        self.simple(&Command::Select { vcpu })?;
        let answer = self.ask(&Command::ReadRegisters)?;
        registers(&answer).ok_or_else(|| refused(&Command::ReadRegisters, &answer))
    }

    /// Memory as a vCPU sees it, or physical.
    ///
    /// # Errors
    /// See [`describe`](Self::describe).
    pub fn read_memory(
        &mut self,
        vcpu: u32,
        physical: bool,
        address: u64,
        length: u32,
    ) -> Result<Vec<u8>, GdbError> {
        self.simple(&Command::Select { vcpu })?;
        let command = Command::ReadMemory { address, length };
        let answer = self.with_addresses(physical, |client| client.ask(&command))?;
        hex::decode(&answer)
            .filter(|bytes| bytes.len() == length as usize)
            .ok_or_else(|| refused(&command, &answer))
    }

    /// Changes memory.
    ///
    /// # Errors
    /// See [`describe`](Self::describe).
    pub fn write_memory(
        &mut self,
        vcpu: u32,
        physical: bool,
        address: u64,
        bytes: Vec<u8>,
    ) -> Result<(), GdbError> {
        self.simple(&Command::Select { vcpu })?;
        let command = Command::WriteMemory { address, bytes };
        self.with_addresses(physical, |client| client.simple(&command))
    }

    /// Physical addressing stays switched on until it is switched off, for
    /// breakpoints' memory too.
    fn with_addresses<T>(
        &mut self,
        physical: bool,
        body: impl FnOnce(&mut Self) -> Result<T, GdbError>,
    ) -> Result<T, GdbError> {
        if !physical {
            return body(self);
        }
        self.simple(&Command::Physical(true))?;
        let result = body(self);
        self.simple(&Command::Physical(false))?;
        result
    }

    /// Changes a register.
    ///
    /// # Errors
    /// See [`describe`](Self::describe).
    pub fn write_register(
        &mut self,
        vcpu: u32,
        register: Register,
        value: u64,
    ) -> Result<(), GdbError> {
        self.simple(&Command::Select { vcpu })?;
        self.simple(&Command::WriteRegister { register, value })
    }

    /// Sets a breakpoint.
    ///
    /// # Errors
    /// See [`describe`](Self::describe).
    pub fn set(&mut self, breakpoint: Breakpoint) -> Result<(), GdbError> {
        self.simple(&Command::Set(breakpoint))
    }

    /// Takes a breakpoint away.
    ///
    /// # Errors
    /// See [`describe`](Self::describe).
    pub fn remove(&mut self, breakpoint: Breakpoint) -> Result<(), GdbError> {
        self.simple(&Command::Remove(breakpoint))
    }

    /// Lets all vCPUs run. The stop reply that ends it comes to
    /// [`take_stops`](Self::take_stops).
    ///
    /// # Errors
    /// See [`describe`](Self::describe).
    pub fn run(&mut self) -> Result<(), GdbError> {
        self.stops.clear();
        self.send(&Command::Continue)
    }

    /// Executes one instruction on one vCPU. `None` if that takes longer than
    /// `patience`: the vCPU is halted, or QEMU is slow. It then has to be
    /// stopped by other means, and [`wait_for_stop`](Self::wait_for_stop) takes
    /// in what the stub says of that.
    ///
    /// # Errors
    /// See [`describe`](Self::describe).
    pub fn step(&mut self, vcpu: u32, patience: Duration) -> Result<Option<StopReply>, GdbError> {
        self.stops.clear();
        self.send(&Command::Step { vcpu })?;
        self.wait_for_stop(patience)
    }

    /// The stop reply to what was let run, if it comes in time.
    ///
    /// # Errors
    /// See [`describe`](Self::describe).
    pub fn wait_for_stop(&mut self, patience: Duration) -> Result<Option<StopReply>, GdbError> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(stop) = self.stops.pop() {
                return Ok(Some(stop));
            }
            if !self.wait(deadline)? {
                return Ok(None);
            }
            self.receive()?;
        }
    }

    /// Takes all breakpoints away and lets all vCPUs run.
    ///
    /// # Errors
    /// See [`describe`](Self::describe).
    pub fn detach(&mut self) -> Result<(), GdbError> {
        self.simple(&Command::Detach)
    }

    /// Takes in what has come, without waiting, and gives the stop replies.
    ///
    /// # Errors
    /// [`GdbError::Closed`] if QEMU is gone.
    pub fn take_stops(&mut self) -> Result<Vec<StopReply>, GdbError> {
        self.receive()?;
        Ok(std::mem::take(&mut self.stops))
    }

    /// A command whose answer is `OK`.
    fn simple(&mut self, command: &Command) -> Result<(), GdbError> {
        let answer = self.ask(command)?;
        if answer == b"OK" {
            Ok(())
        } else {
            Err(refused(command, &answer))
        }
    }

    /// Sends a command and waits for its answer.
    fn ask(&mut self, command: &Command) -> Result<Vec<u8>, GdbError> {
        let deadline = Instant::now() + self.timeout;
        for _ in 0..REPEATS {
            self.items.clear();
            self.send(command)?;
            loop {
                match self.items.pop_front() {
                    Some(Item::Packet(answer)) => return Ok(answer),
                    Some(Item::Acknowledged) => {}
                    Some(Item::Repeat) => break,
                    // The `-` that `receive` sent brings it again.
                    Some(Item::Damaged) => {}
                    None if self.wait(deadline)? => self.receive()?,
                    None => return Err(self.timed_out(command)),
                }
            }
        }
        Err(refused(command, b"-"))
    }

    fn send(&mut self, command: &Command) -> Result<(), GdbError> {
        self.send_bytes(&encode(&command.payload()))
    }

    /// Packets are far smaller than a socket's buffer: one that does not fit
    /// means that QEMU hangs.
    fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), GdbError> {
        match rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL) {
            Ok(count) if count == bytes.len() => Ok(()),
            Ok(_) => Err(GdbError::Closed("it takes no more bytes".to_owned())),
            Err(error) => Err(GdbError::Closed(error.to_string())),
        }
    }

    /// Waits until something can be read; `false` at the deadline.
    fn wait(&self, deadline: Instant) -> Result<bool, GdbError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok();
            let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut polled, timeout.as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(GdbError::Closed(error.to_string())),
            }
        }
    }

    /// Takes in what has come. Packets are acknowledged here; stop replies are
    /// put aside, whatever else was waited for.
    fn receive(&mut self) -> Result<(), GdbError> {
        const MOST_ITEMS: usize = 64;
        let mut chunk = [0; 4096];
        loop {
            let count = match rustix::net::recv(&self.socket, &mut chunk, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(GdbError::Closed("end of file".to_owned())),
                Ok((count, _)) => count,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(GdbError::Closed(error.to_string())),
            };
            for byte in chunk.get(..count).unwrap_or_default() {
                match self.decoder.push(*byte) {
                    None => {}
                    // Acknowledging is left out after stop replies: a byte
                    // that comes when vCPUs run again would stop them. The
                    // stub takes the next packet for an acknowledgement.
                    Some(Item::Packet(payload)) => match StopReply::parse(&payload) {
                        Some(stop) => {
                            if self.stops.len() < MOST_ITEMS {
                                self.stops.push(stop);
                            }
                        }
                        None => self.items.push_back(Item::Packet(payload)),
                    },
                    Some(Item::Damaged) => self.send_bytes(b"-")?,
                    Some(item) => self.items.push_back(item),
                }
            }
            if self.items.len() > MOST_ITEMS {
                return Err(GdbError::Closed("it sends without end".to_owned()));
            }
        }
    }

    fn timed_out(&self, command: &Command) -> GdbError {
        GdbError::Timeout {
            command: text(&command.payload()),
            timeout: self.timeout,
        }
    }
}

impl AsFd for GdbClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn refused(command: &Command, answer: &[u8]) -> GdbError {
    GdbError::Refused {
        command: text(&command.payload()),
        answer: text(answer),
    }
}

/// The start of a packet, for messages.
fn text(payload: &[u8]) -> String {
    let start = payload.get(..64).unwrap_or(payload);
    String::from_utf8_lossy(start).into_owned()
}

#[cfg(test)]
mod tests;
