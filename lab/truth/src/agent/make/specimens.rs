//! Specimens, on command: modules of `/lib/specimens` loaded and unloaded, and
//! processes that look like what a detector has to notice.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::mem::forget;
use std::net::TcpListener;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use secmon_truth::Request;

use super::{WORKER, bpf, injected, loads, programs, report, threads};
use crate::agent::memory::{self, PAGE};
use crate::agent::sys;

/// The user whose processes specimens change.
const USER: u32 = 4343;

/// The port of the role `listening`.
const LISTENING: u16 = 5099;

/// How long a program may take to start, emulated on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What runs on command.
#[derive(Default)]
pub struct Specimens {
    /// Role to the process that leads its group.
    roles: BTreeMap<String, i32>,
    /// Addresses of symbols that were asked for.
    symbols: BTreeMap<String, u64>,
}

impl Specimens {
    /// The answer to a request about specimens.
    pub fn answer(&mut self, request: &Request) -> Option<io::Result<serde_json::Value>> {
        Some(match request {
            Request::LoadModule {
                name,
                parameters,
                symbols,
            } => self
                .load(name, parameters, symbols)
                .map(serde_json::Value::from),
            Request::UnloadModule { name } => unload(name).map(serde_json::Value::from),
            Request::StartRole { role } => self.start(role).map(serde_json::Value::from),
            Request::StopRole { role } => self.stop(role).map(serde_json::Value::from),
            Request::WriteFile { path, text } => write(path, text).map(serde_json::Value::from),
            Request::Exists { path } => Ok(fs::symlink_metadata(path).is_ok().into()),
            Request::HasSymbol { name } => self
                .find(std::slice::from_ref(name))
                .map(|()| self.symbols.contains_key(name).into()),
            Request::UserHasProcess { uid } => {
                sys::user_has_process(*uid).map(serde_json::Value::from)
            }
            _ => return None,
        })
    }

    fn load(&mut self, name: &str, parameters: &str, symbols: &[String]) -> io::Result<()> {
        let module = File::open(format!("/lib/specimens/{name}.ko"))?;
        let mut words = vec![parameters.to_owned()];
        self.find(symbols)?;
        for symbol in symbols {
            let address = self.symbols.get(symbol);
            let address =
                address.ok_or_else(|| io::Error::other(format!("no symbol {symbol} here")))?;
            words.push(format!("{symbol}={address:#x}"));
        }
        sys::load_module(module.as_raw_fd(), words.join(" ").trim())
    }

    /// Looks up what isn't known yet.
    fn find(&mut self, symbols: &[String]) -> io::Result<()> {
        if symbols
            .iter()
            .all(|symbol| self.symbols.contains_key(symbol))
        {
            return Ok(());
        }
        for line in fs::read_to_string("/proc/kallsyms")?.lines() {
            let mut words = line.split_whitespace();
            if let (Some(address), Some(_), Some(name)) = (words.next(), words.next(), words.next())
                && symbols.iter().any(|symbol| symbol == name)
                && let Ok(address) = u64::from_str_radix(address, 16)
            {
                self.symbols.entry(name.to_owned()).or_insert(address);
            }
        }
        Ok(())
    }

    fn start(&mut self, role: &str) -> io::Result<Vec<i32>> {
        if self.roles.contains_key(role) {
            return Err(io::Error::other(format!("{role} runs already")));
        }
        let pid = start(role)?;
        self.roles.insert(role.to_owned(), pid);
        let mut threads: Vec<i32> = fs::read_dir(format!("/proc/{pid}/task"))?
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        threads.sort_unstable_by_key(|tid| (*tid != pid, *tid));
        Ok(threads)
    }

    fn stop(&mut self, role: &str) -> io::Result<()> {
        let pid = self.roles.remove(role);
        let pid = pid.ok_or_else(|| io::Error::other(format!("{role} does not run")))?;
        sys::kill(-pid, libc::SIGKILL)?;
        // Whoever is in the group becomes ours once its parent is gone. One
        // that is in the middle of a system call ends it first.
        let start = Instant::now();
        loop {
            while sys::reap_one() {}
            if sys::kill(-pid, 0).is_err() {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                return Err(io::Error::other(format!("{role} does not end")));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

pub(super) fn unload(name: &str) -> io::Result<()> {
    let start = Instant::now();
    // Whatever just left the module may still hold it.
    loop {
        match sys::unload_module(name) {
            Err(error)
                if error.raw_os_error() == Some(libc::EWOULDBLOCK)
                    && start.elapsed() < PATIENCE =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            outcome => return outcome,
        }
    }
}

fn write(path: &str, text: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

/// Starts a role, and gives the process that leads its group once it stands.
fn start(role: &str) -> io::Result<i32> {
    match role {
        "preloaded" => executed(Path::new(WORKER), role, &[b"LD_PRELOAD=/tmp/specimen.so"]),
        "deleted-executable" => {
            let place = Path::new("/tmp/specimen program");
            fs::copy(WORKER, place)?;
            let pid = executed(place, role, &[])?;
            fs::remove_file(place)?;
            Ok(pid)
        }
        "memory-executable" => {
            let pid = group(|| Err(programs::execute_from_memory(&format!("specimen:{role}"))?))?;
            until_named(pid, role)
        }
        "kernel-thread-name" => {
            let name = "kworker/0:3";
            let pid = group(|| {
                let arguments = [format!("[{name}]").into_bytes()];
                let role = format!("specimen:{name}");
                Err(programs::execute(&role, WORKER.as_ref(), &arguments, &[]))
            })?;
            until_named(pid, name)
        }
        _ => group(|| stand(role)),
    }
}

/// A process in a group of its own; back when it has run `body`, or executed
/// a program.
fn group(body: impl FnOnce() -> io::Result<()>) -> io::Result<i32> {
    report::child_that_stands(|| {
        sys::set_process_group(0, 0)?;
        body()
    })
}

fn executed(program: &Path, role: &str, environment: &[&[u8]]) -> io::Result<i32> {
    let pid = group(|| {
        let environment: Vec<_> = environment.iter().map(|entry| entry.to_vec()).collect();
        let arguments = [role.as_bytes().to_vec()];
        let name = format!("specimen:{role}");
        let program = program.as_os_str();
        Err(programs::execute(&name, program, &arguments, &environment))
    })?;
    until_named(pid, role)
}

/// Waits until a program has given itself its name, of which 15 bytes count.
fn until_named(pid: i32, name: &str) -> io::Result<i32> {
    let name = name.get(..15).unwrap_or(name);
    let start = Instant::now();
    while fs::read_to_string(format!("/proc/{pid}/comm"))?.trim_end() != name {
        if start.elapsed() > PATIENCE {
            return Err(io::Error::other(format!("{name} does not start")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(pid)
}

/// Makes this process, which rests afterwards, what its role says.
fn stand(role: &str) -> io::Result<()> {
    let every_protocol = i32::from(3u16.to_be());
    sys::set_name(role.as_bytes());
    match role {
        "ordinary" => sys::set_ids([USER; 3], [USER; 3], &[USER]),
        "threaded" => threads::start(|| sys::rest()).map(drop),
        "writable-code" => {
            let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            anonymous(all).map(drop)
        }
        "anonymous-code" => {
            let start = anonymous(libc::PROT_READ | libc::PROT_WRITE)?;
            memory::fill(start, PAGE, 0xc3);
            memory::protect(start, PAGE, libc::PROT_READ | libc::PROT_EXEC)
        }
        "changed-code" => memory::change_code(),
        "injected-code" => injected::code_of_no_file(),
        "injected-thread" => injected::thread_of_no_library(),
        "shared-memory" => injected::process_with_our_memory(),
        "hollowed-image" => injected::without_own_code(),
        "changed-vdso" => injected::change_vdso(),
        "container-with-host-root" => injected::container_with_the_hosts_root(),
        "listening" => {
            forget(TcpListener::bind(("127.0.0.1", LISTENING))?);
            Ok(())
        }
        "traced" => {
            let traced = report::child_that_stands(|| {
                sys::set_name(b"traced-one");
                Ok(())
            })?;
            sys::trace_and_stop(traced)
        }
        "raw-socket" => {
            forget(sys::socket(libc::AF_INET, libc::SOCK_RAW, 253)?);
            Ok(())
        }
        "packet-socket" => {
            forget(sys::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW,
                every_protocol,
            )?);
            Ok(())
        }
        "promiscuous" => {
            let socket = sys::socket(libc::AF_PACKET, libc::SOCK_RAW, every_protocol)?;
            // struct packet_mreq: the interface, PACKET_MR_PROMISC, no address.
            let mut membership = [0; 16];
            membership[..4].copy_from_slice(&sys::interface_index("lo")?.to_ne_bytes());
            membership[4..6].copy_from_slice(&1u16.to_ne_bytes());
            let level = libc::SOL_PACKET;
            sys::set_socket_option(&socket, level, libc::PACKET_ADD_MEMBERSHIP, &membership)?;
            forget(socket);
            Ok(())
        }
        "container-with-host-pids" => {
            let others = libc::CLONE_NEWNS
                | libc::CLONE_NEWNET
                | libc::CLONE_NEWUTS
                | libc::CLONE_NEWIPC
                | libc::CLONE_NEWCGROUP;
            sys::unshare(others)?;
            let root = "/tmp/specimen-root";
            fs::create_dir_all(root)?;
            sys::mount("", "/", "", libc::MS_REC | libc::MS_PRIVATE, "")?;
            sys::mount("container", root, "tmpfs", 0, "mode=0755")?;
            sys::chroot(root)?;
            std::env::set_current_dir("/")
        }
        "filter-program" => bpf::filtered_socket(5006),
        "kprobe-program" => bpf::probed_function("__x64_sys_getpgid"),
        _ => loads::start(role).unwrap_or_else(|| Err(io::Error::other(format!("no role {role}")))),
    }
}

fn anonymous(protection: libc::c_int) -> io::Result<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    memory::map(PAGE, protection, flags, None::<&File>, 0)
}
