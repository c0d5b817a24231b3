//! What Linux says of a process in its `/proc/PID`, as far as it is needed to
//! find a guest's RAM in it. Formats: proc(5), `fs/proc/task_mmu.c`,
//! `net/unix/af_unix.c`.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The most bytes read of one file of `/proc`; a QEMU with thousands of
/// mappings has a few hundred KiB of `maps`.
const MAX_FILE: u64 = 64 << 20;

/// A process: its id, and when it started, as ids are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// The number.
    pub pid: u32,
    /// When the process started, in clock ticks since the host's boot.
    pub start_time: u64,
}

impl ProcessId {
    /// The process that has this number now.
    ///
    /// # Errors
    /// The host's, `NotFound` if there is none.
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self {
            pid,
            start_time: Stat::read(pid)?.start_time,
        })
    }

    /// The user that the process with this number runs as now; `None` if that
    /// can't be told.
    pub fn user(self) -> Option<u32> {
        owner(self.pid)
    }

    /// Whether this very process still runs.
    pub fn is_alive(self) -> bool {
        self.state()
            .is_some_and(|state| !matches!(state, b'Z' | b'X' | b'x'))
    }

    /// The letter of the process's state, `T` for stopped; `None` if it's gone.
    pub fn state(self) -> Option<u8> {
        let stat = Stat::read(self.pid).ok()?;
        (stat.start_time == self.start_time).then_some(stat.state)
    }
}

/// A process that can be asked whether it still runs, also from inside of a
/// sandbox that has no `/proc`.
#[derive(Debug)]
pub(super) struct ProcessHandle {
    pub id: ProcessId,
    /// Readable once the process has ended.
    descriptor: OwnedFd,
}

impl ProcessHandle {
    /// # Errors
    /// The host's; `NotFound` if the process is not the one meant, or has
    /// ended.
    pub fn open(id: ProcessId) -> io::Result<Self> {
        let pid = i32::try_from(id.pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or(io::ErrorKind::NotFound)?;
        let descriptor = pidfd_open(pid, PidfdFlags::empty())?;
        // The number belonged to the one meant until after it was opened.
        if !id.is_alive() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Self { id, descriptor })
    }

    pub fn descriptor(&self) -> &OwnedFd {
        &self.descriptor
    }

    pub fn is_alive(&self) -> bool {
        let mut polled = [PollFd::new(&self.descriptor, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut polled, Some(&now)), Ok(0))
    }
}

struct Stat {
    state: u8,
    start_time: u64,
}

impl Stat {
    fn read(pid: u32) -> io::Result<Self> {
        let text = read(&folder(pid).join("stat"))?;
        Self::parse(&text).ok_or_else(|| io::Error::other("/proc/PID/stat has another form"))
    }

    /// Fields 3 and 22. The command's name, in parentheses, may hold anything.
    fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|byte| *byte == b')')?;
        let fields = std::str::from_utf8(text.get(end + 1..)?).ok()?;
        let mut fields = fields.split_ascii_whitespace();
        Some(Self {
            state: *fields.next()?.as_bytes().first()?,
            start_time: fields.nth(18)?.parse().ok()?,
        })
    }
}

/// `/proc/PID`.
pub(super) fn folder(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(MAX_FILE)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The ids of all processes that can be seen, in ascending order.
pub(super) fn all() -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        pids.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    pids.sort_unstable();
    Ok(pids)
}

/// The arguments, the program's name first; empty for a kernel thread.
pub(super) fn arguments(pid: u32) -> io::Result<Vec<Vec<u8>>> {
    let text = read(&folder(pid).join("cmdline"))?;
    let text = text.strip_suffix(b"\0").unwrap_or(&text);
    if text.is_empty() {
        return Ok(Vec::new());
    }
    Ok(text.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect())
}

/// The file the process runs; without the mark of a deleted one.
pub(super) fn executable(pid: u32) -> io::Result<PathBuf> {
    let path = std::fs::read_link(folder(pid).join("exe"))?;
    let bytes = path.as_os_str().as_bytes();
    let bytes = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
    Ok(PathBuf::from(OsString::from_vec(bytes.to_vec())))
}

/// Whether every thread of the process is stopped by a signal; false if that
/// can't be seen.
pub(super) fn all_threads_stopped(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(folder(pid).join("task")) else {
        return false;
    };
    let mut any = false;
    for thread in threads {
        let stat = thread.and_then(|thread| read(&thread.path().join("stat")));
        let state = stat.ok().and_then(|stat| Stat::parse(&stat));
        match state {
            Some(Stat { state: b'T', .. }) => any = true,
            // A thread that is ending runs no more.
            Some(Stat {
                state: b'Z' | b'X', ..
            }) => {}
            _ => return false,
        }
    }
    any
}

/// The user the process runs as.
pub(super) fn owner(pid: u32) -> Option<u32> {
    let status = read(&folder(pid).join("status")).ok()?;
    let line = status
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"Uid:"))?;
    let line = std::str::from_utf8(line).ok()?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// The value of `kernel.yama.ptrace_scope`, where there is one.
pub(super) fn ptrace_scope() -> Option<u32> {
    let text = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok()?;
    text.trim().parse().ok()
}

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub start: u64,
    pub end: u64,
    pub readable: bool,
    pub writable: bool,
    pub executable: bool,
    pub shared: bool,
    /// Where the mapping starts in its file.
    pub offset: u64,
    pub device: (u32, u32),
    /// 0 for anonymous memory.
    pub inode: u64,
    /// The file, or a name such as `[heap]`; empty for most anonymous memory.
    pub path: Vec<u8>,
}

impl Mapping {
    pub fn length(&self) -> u64 {
        self.end - self.start
    }

    /// Neither readable nor writable: a guard page, an area held in reserve.
    pub fn is_guard(&self) -> bool {
        !self.readable && !self.writable && !self.executable
    }
}

/// The process's mappings in ascending order.
pub(super) fn mappings(pid: u32) -> io::Result<Vec<Mapping>> {
    let text = read(&folder(pid).join("maps"))?;
    parse_maps(&text).ok_or_else(|| io::Error::other("/proc/PID/maps has another form"))
}

fn parse_maps(text: &[u8]) -> Option<Vec<Mapping>> {
    let lines = text.split(|byte| *byte == b'\n');
    let mappings: Option<Vec<Mapping>> = lines
        .filter(|line| !line.is_empty())
        .map(parse_mapping)
        .collect();
    let mappings = mappings?;
    let sorted = mappings
        .windows(2)
        .all(|pair| matches!(pair, [first, second] if first.end <= second.start));
    sorted.then_some(mappings)
}

/// `START-END PERMISSIONS OFFSET MAJOR:MINOR INODE   PATH`
fn parse_mapping(line: &[u8]) -> Option<Mapping> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let mut field = || std::str::from_utf8(fields.next()?).ok();
    let (start, end) = field()?.split_once('-')?;
    let permissions = field()?.as_bytes();
    let offset = field()?;
    let (major, minor) = field()?.split_once(':')?;
    let inode = field()?.parse().ok()?;
    let path = fields.next().unwrap_or_default().trim_ascii_start();
    let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    (start < end).then_some(Mapping {
        start,
        end,
        readable: permissions.first() == Some(&b'r'),
        writable: permissions.get(1) == Some(&b'w'),
        executable: permissions.get(2) == Some(&b'x'),
        shared: permissions.get(3) == Some(&b's'),
        offset: hexadecimal(offset)?,
        device: (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        ),
        inode,
        path: path.to_vec(),
    })
}

/// The open file descriptors with what they lead to, ascending.
pub(super) fn descriptors(pid: u32) -> io::Result<Vec<(u32, PathBuf)>> {
    let folder = folder(pid).join("fd");
    let mut descriptors = Vec::new();
    for entry in std::fs::read_dir(&folder)? {
        let entry = entry?;
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        // A descriptor may be closed meanwhile.
        if let (Some(number), Ok(target)) = (number, std::fs::read_link(entry.path())) {
            descriptors.push((number, target));
        }
    }
    descriptors.sort();
    Ok(descriptors)
}

/// A UNIX socket of the process's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct UnixSocket {
    pub inode: u64,
    pub listening: bool,
    pub connected: bool,
    pub path: PathBuf,
}

/// The named UNIX sockets that belong to the process's open descriptors, by
/// descriptor.
pub(super) fn unix_sockets(pid: u32) -> io::Result<Vec<(u32, UnixSocket)>> {
    let text = read(&folder(pid).join("net/unix"))?;
    let by_inode: HashMap<u64, UnixSocket> = parse_unix(&text)
        .into_iter()
        .map(|socket| (socket.inode, socket))
        .collect();
    let mut sockets = Vec::new();
    for (descriptor, target) in descriptors(pid)? {
        let inode = target
            .to_str()
            .and_then(|target| target.strip_prefix("socket:["))
            .and_then(|target| target.strip_suffix(']'))
            .and_then(|inode| inode.parse().ok());
        if let Some(socket) = inode.and_then(|inode: u64| by_inode.get(&inode)) {
            sockets.push((descriptor, socket.clone()));
        }
    }
    Ok(sockets)
}

/// `NUM: REFCOUNT PROTOCOL FLAGS TYPE STATE INODE PATH`, of which flag 0x10000
/// means listening and state 3 connected. Lines of another form are skipped:
/// a path may hold a newline.
fn parse_unix(text: &[u8]) -> Vec<UnixSocket> {
    let parse = |line: &[u8]| {
        let mut rest = line;
        let mut fields = [&b""[..]; 7];
        for field in &mut fields {
            rest = rest.trim_ascii_start();
            let end = rest.iter().position(|byte| *byte == b' ')?;
            (*field, rest) = rest.split_at(end);
        }
        let path = rest.strip_prefix(b" ")?;
        let [_, _, _, flags, _, state, inode] = fields.map(std::str::from_utf8);
        Some(UnixSocket {
            inode: inode.ok()?.parse().ok()?,
            listening: u32::from_str_radix(flags.ok()?, 16).ok()? & 0x1_0000 != 0,
            connected: state.ok()? == "03",
            path: PathBuf::from(OsString::from_vec(path.to_vec())),
        })
    };
    text.split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn this_process_is_seen_as_it_is() {
        let pid = std::process::id();
        let id = ProcessId::of(pid).expect("this process");
        assert!(id.is_alive());
        let other = ProcessId {
            start_time: id.start_time + 1,
            ..id
        };
        assert!(!other.is_alive(), "another process had the number");
        assert!(all().expect("processes").contains(&pid));
        let executable = executable(pid).expect("exe");
        assert_eq!(executable, std::env::current_exe().expect("exe"));
        let arguments = arguments(pid).expect("cmdline");
        let expected: Vec<Vec<u8>> = std::env::args_os().map(OsStringExt::into_vec).collect();
        assert_eq!(arguments, expected);
        let here = &raw const id as u64;
        let mappings = mappings(pid).expect("maps");
        assert!(
            mappings
                .iter()
                .any(|m| m.start <= here && here < m.end && m.readable && m.writable)
        );
    }

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let line = b"7 (a) S (b) R 1 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4242 1 2";
        let stat = Stat::parse(line).expect("a stat");
        assert_eq!((stat.state, stat.start_time), (b'R', 4242));
    }

    #[test]
    fn mappings_of_each_kind() {
        let text = b"7f11a3dff000-7f11c3dff000 rw-s 00001000 00:01 1039                       /memfd:a b (deleted)
7f11c3e00000-7f11e3e00000 rw-p 00000000 00:00 0 
7f11e3e00000-7f11e3e01000 ---p 00000000 00:00 0 
";
        let mappings = parse_maps(text).expect("mappings");
        assert_eq!(mappings[0].path, b"/memfd:a b (deleted)");
        assert!(mappings[0].shared && mappings[0].inode == 1039 && mappings[0].offset == 0x1000);
        assert!(!mappings[1].is_guard() && mappings[1].path.is_empty());
        assert_eq!(mappings[1].length(), 512 << 20);
        assert!(mappings[2].is_guard());
        assert_eq!(parse_maps(b"2000-1000 rw-p 0 0:0 0"), None);
        assert_eq!(parse_maps(b"1-3 rw-p 0 0:0 0 \n2-4 rw-p 0 0:0 0 "), None);
    }

    #[test]
    fn sockets_that_listen_and_are_connected() {
        let text = b"Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 10048 /run/a b
0000000000000000: 00000003 00000000 00000000 0001 03 10049 /run/a b
0000000000000000: 00000003 00000000 00000000 0001 03 10050
";
        let sockets = parse_unix(text);
        assert_eq!(sockets.len(), 2);
        assert!(sockets[0].listening && !sockets[0].connected);
        assert!(!sockets[1].listening && sockets[1].connected);
        assert_eq!(sockets[1].path, Path::new("/run/a b"));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = (parse_maps(&text), parse_unix(&text), Stat::parse(&text).is_some());
        }
    }
}
