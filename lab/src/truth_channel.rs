//! The host's end of the guest's truth: typed questions, typed answers.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use secmon_truth::{
    Bpf, ByteString, Info, Interface, KernelMessage, Mapping, Module, Mount, Namespace, OpenFile,
    Process, Reply, Request, Section, Socket, Symbol, Thread, Work,
};
use serde::de::DeserializeOwned;

/// How long one answer may take. Emulated, on a loaded machine, the largest
/// ones take several seconds.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A guest's truth port. Several threads may ask; they take turns.
#[derive(Debug)]
pub struct TruthChannel {
    stream: Mutex<BufReader<UnixStream>>,
}

impl TruthChannel {
    /// Waits for the guest's greeting, which comes once its workload stands.
    pub(crate) fn open(stream: UnixStream, wait: Duration) -> Result<Self> {
        stream.set_read_timeout(Some(wait))?;
        let mut stream = BufReader::new(stream);
        let greeting: String = read_reply(&mut stream)?;
        if greeting != secmon_truth::READY_MARK {
            bail!("the guest greets with {greeting:?}");
        }
        stream.get_ref().set_read_timeout(Some(TIMEOUT))?;
        Ok(Self {
            stream: Mutex::new(stream),
        })
    }

    /// Connects to the truth port of a guest that somebody else started, and
    /// waits for its greeting.
    ///
    /// # Errors
    /// If there is no such socket, or no greeting in time.
    pub fn connect(socket: &Path, wait: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        Self::open(stream, wait)
    }

    /// Sends a request and reads its answer.
    pub fn ask<T: DeserializeOwned>(&self, request: &Request) -> Result<T> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream
            .get_mut()
            .write_all(&line)
            .context("cannot send to the guest")?;
        read_reply(&mut stream).with_context(|| format!("the guest's answer to {request:?}"))
    }

    /// One section as JSON, for storing.
    pub fn section(&self, section: Section) -> Result<serde_json::Value> {
        self.ask(&Request::Truth { section })
    }

    /// The system as a whole.
    pub fn info(&self) -> Result<Info> {
        self.truth(Section::Info)
    }

    /// All processes.
    pub fn processes(&self) -> Result<Vec<Process>> {
        self.truth(Section::Processes)
    }

    /// All threads.
    pub fn threads(&self) -> Result<Vec<Thread>> {
        self.truth(Section::Threads)
    }

    /// All modules.
    pub fn modules(&self) -> Result<Vec<Module>> {
        self.truth(Section::Modules)
    }

    /// All mappings of all processes.
    pub fn maps(&self) -> Result<Vec<Mapping>> {
        self.truth(Section::Maps)
    }

    /// All descriptors of all processes.
    pub fn files(&self) -> Result<Vec<OpenFile>> {
        self.truth(Section::Files)
    }

    /// All sockets of all network namespaces.
    pub fn sockets(&self) -> Result<Vec<Socket>> {
        self.truth(Section::Sockets)
    }

    /// All mounts of all mount namespaces.
    pub fn mounts(&self) -> Result<Vec<Mount>> {
        self.truth(Section::Mounts)
    }

    /// All namespaces.
    pub fn namespaces(&self) -> Result<Vec<Namespace>> {
        self.truth(Section::Namespaces)
    }

    /// The kernel's log.
    pub fn kmsg(&self) -> Result<Vec<KernelMessage>> {
        self.truth(Section::Kmsg)
    }

    /// All interfaces of all network namespaces.
    pub fn interfaces(&self) -> Result<Vec<Interface>> {
        self.truth(Section::Interfaces)
    }

    /// eBPF programs and maps.
    pub fn bpf(&self) -> Result<Bpf> {
        self.truth(Section::Bpf)
    }

    /// All kernel and module symbols; some ten MB.
    pub fn kallsyms(&self) -> Result<Vec<Symbol>> {
        self.truth(Section::Kallsyms)
    }

    /// Starts the busy mode.
    pub fn resume_busy(&self) -> Result<()> {
        self.ask(&Request::ResumeBusy)
    }

    /// Ends the busy mode, waits until its processes are gone, and tells how
    /// many rounds there were since the boot.
    pub fn pause_busy(&self) -> Result<u64> {
        self.ask(&Request::PauseBusy)
    }

    /// Makes short-lived sockets (`TIME_WAIT` and so on) anew.
    pub fn refresh_sockets(&self) -> Result<()> {
        self.ask(&Request::RefreshSockets)
    }

    /// Fills fresh anonymous memory of process 1; the answer is its address.
    pub fn touch_memory(&self, mebibytes: u32, fill: u8) -> Result<u64> {
        self.ask(&Request::TouchMemory { mebibytes, fill })
    }

    /// Reads a process's memory as the guest itself sees it.
    pub fn read_memory(&self, pid: i32, address: u64, length: u32) -> Result<ByteString> {
        self.ask(&Request::ReadMemory {
            pid,
            address,
            length,
        })
    }

    /// Reads a file of the guest.
    pub fn read_file(&self, path: &str) -> Result<ByteString> {
        self.ask(&Request::ReadFile {
            path: path.to_owned(),
        })
    }

    /// Lets the guest work for a while; how often it did it.
    pub fn work(&self, work: Work, milliseconds: u32) -> Result<u64> {
        self.ask(&Request::Work { work, milliseconds })
    }

    /// Lets the guest read a mapped file, or memory of its own, from one end
    /// to the other; the nanoseconds of the fastest round.
    pub fn read_through(&self, path: Option<&str>, mebibytes: u32, rounds: u32) -> Result<u64> {
        self.ask(&Request::ReadThrough {
            path: path.map(str::to_owned),
            mebibytes,
            rounds,
        })
    }

    /// Loads a specimen's module, with the addresses of symbols as parameters.
    pub fn load_module(&self, name: &str, parameters: &str, symbols: &[&str]) -> Result<()> {
        self.ask(&Request::LoadModule {
            name: name.to_owned(),
            parameters: parameters.to_owned(),
            symbols: symbols.iter().map(|symbol| (*symbol).to_owned()).collect(),
        })
    }

    /// Unloads a module.
    pub fn unload_module(&self, name: &str) -> Result<()> {
        self.ask(&Request::UnloadModule {
            name: name.to_owned(),
        })
    }

    /// Starts processes that look like something; the ids of the first one's
    /// threads, its own at first.
    pub fn start_role(&self, role: &str) -> Result<Vec<i32>> {
        self.ask(&Request::StartRole {
            role: role.to_owned(),
        })
    }

    /// Ends them.
    pub fn stop_role(&self, role: &str) -> Result<()> {
        self.ask(&Request::StopRole {
            role: role.to_owned(),
        })
    }

    /// Writes to a file of the guest.
    pub fn write_file(&self, path: &str, text: &str) -> Result<()> {
        self.ask(&Request::WriteFile {
            path: path.to_owned(),
            text: text.to_owned(),
        })
    }

    /// Whether there is such a file or folder.
    pub fn exists(&self, path: &str) -> Result<bool> {
        self.ask(&Request::Exists {
            path: path.to_owned(),
        })
    }

    /// Whether the kernel has a symbol.
    pub fn has_symbol(&self, name: &str) -> Result<bool> {
        self.ask(&Request::HasSymbol {
            name: name.to_owned(),
        })
    }

    /// Whether the kernel finds a process of that user in its list of tasks.
    pub fn user_has_process(&self, uid: u32) -> Result<bool> {
        self.ask(&Request::UserHasProcess { uid })
    }

    /// Asks the guest to switch itself off, which ends QEMU; there is no
    /// answer to wait for.
    pub fn power_off(&self) -> Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let mut line = serde_json::to_vec(&Request::Exit)?;
        line.push(b'\n');
        stream
            .get_mut()
            .write_all(&line)
            .context("cannot send to the guest")
    }

    fn truth<T: DeserializeOwned>(&self, section: Section) -> Result<T> {
        self.ask(&Request::Truth { section })
    }
}

fn read_reply<T: DeserializeOwned>(stream: &mut BufReader<UnixStream>) -> Result<T> {
    let mut line = Vec::new();
    let count = stream.read_until(b'\n', &mut line)?;
    if count == 0 {
        bail!("the guest is gone");
    }
    match serde_json::from_slice(&line).context("the guest's answer can't be read")? {
        Reply::Ok(value) => Ok(value),
        Reply::Error(error) => bail!("the guest says: {error}"),
    }
}
