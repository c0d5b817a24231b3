//! Processes and threads from `/proc/<pid>` and `/proc/<pid>/task/<tid>`.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use secmon_truth::{ByteString, Capabilities, Cgroup, Process, Thread};

use super::{link, namespace_inode, numbers, pids, split_mark};

/// `PF_KTHREAD` of `include/linux/sched.h`, the same in all kernels here.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Every process. One that exits while it is read is left out.
pub fn processes() -> io::Result<Vec<Process>> {
    Ok(pids()?.into_iter().filter_map(process).collect())
}

/// Every thread of every process.
pub fn threads() -> io::Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for pid in pids()? {
        let process_namespaces = namespaces(&format!("/proc/{pid}"));
        for tid in numbers(&format!("/proc/{pid}/task")).unwrap_or_default() {
            threads.extend(thread(pid, tid, &process_namespaces));
        }
    }
    Ok(threads)
}

fn process(pid: i32) -> Option<Process> {
    let folder = format!("/proc/{pid}");
    let stat = Stat::read(&folder)?;
    let status = Status::read(&folder)?;
    let kernel_thread = stat.number(9) & KERNEL_THREAD != 0;
    let exe_link = link(&format!("{folder}/exe"));
    let (exe, exe_deleted) = match (exe_link, fs::metadata(format!("{folder}/exe"))) {
        (Some(link), Ok(metadata)) => {
            let (path, deleted) = split_mark(pid, &link, &metadata);
            (Some(path), deleted)
        }
        (link, _) => (link, false),
    };
    let cmdline = fs::read(format!("{folder}/cmdline")).unwrap_or_default();
    Some(Process {
        pid,
        ppid: status.number("PPid") as i32,
        namespace_pids: status.numbers("NSpid"),
        comm: comm(&folder)?,
        state: stat.state,
        uid: status.four("Uid"),
        gid: status.four("Gid"),
        groups: status.numbers("Groups"),
        capabilities: status.capabilities(),
        flags: stat.number(9),
        kernel_thread,
        start_time: stat.number(22),
        exe,
        exe_deleted,
        cmdline_unterminated: cmdline.last().is_some_and(|last| *last != 0),
        cmdline: split_at_nul(&cmdline),
        environ: split_at_nul(&fs::read(format!("{folder}/environ")).unwrap_or_default()),
        cwd: link(&format!("{folder}/cwd")),
        root: link(&format!("{folder}/root")),
        cgroups: cgroups(&folder),
        namespaces: namespaces(&folder),
        process_group: stat.signed(5) as i32,
        session: stat.signed(6) as i32,
        tty_number: stat.signed(7) as i32,
        tty_process_group: stat.signed(8) as i32,
        threads: status.number("Threads") as u32,
        priority: stat.signed(18) as i32,
        nice: stat.signed(19) as i32,
        policy: stat.number(41) as u32,
        virtual_bytes: stat.number(23),
        resident_bytes: stat.number(24) * 4096,
        memory_kib: status.memory(),
        user_time: stat.number(14),
        system_time: stat.number(15),
        seccomp: status.number("Seccomp") as u32,
        no_new_privileges: status.number("NoNewPrivs") != 0,
        tracer: status.number("TracerPid") as i32,
        oom_score_adjustment: fs::read_to_string(format!("{folder}/oom_score_adj"))
            .ok()?
            .trim()
            .parse()
            .ok()?,
    })
}

fn thread(pid: i32, tid: i32, process_namespaces: &BTreeMap<String, u64>) -> Option<Thread> {
    let folder = format!("/proc/{pid}/task/{tid}");
    let stat = Stat::read(&folder)?;
    let status = Status::read(&folder)?;
    let mut own_namespaces = namespaces(&folder);
    own_namespaces.retain(|kind, inode| process_namespaces.get(kind) != Some(inode));
    Some(Thread {
        pid,
        tid,
        namespace_tids: status.numbers("NSpid"),
        comm: comm(&folder)?,
        state: stat.state,
        kernel_thread: stat.number(9) & KERNEL_THREAD != 0,
        start_time: stat.number(22),
        uid: status.four("Uid"),
        gid: status.four("Gid"),
        groups: status.numbers("Groups"),
        capabilities: status.capabilities(),
        user_time: stat.number(14),
        system_time: stat.number(15),
        own_namespaces,
    })
}

/// The raw name. `status` and `stat` escape it, `comm` doesn't.
fn comm(folder: &str) -> Option<ByteString> {
    let mut bytes = fs::read(format!("{folder}/comm")).ok()?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    Some(ByteString(bytes))
}

fn split_at_nul(bytes: &[u8]) -> Vec<ByteString> {
    if bytes.is_empty() {
        return Vec::new();
    }
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    bytes
        .split(|byte| *byte == 0)
        .map(ByteString::from)
        .collect()
}

fn cgroups(folder: &str) -> Vec<Cgroup> {
    let text = fs::read(format!("{folder}/cgroup")).unwrap_or_default();
    text.split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.splitn(3, |byte| *byte == b':');
            Some(Cgroup {
                hierarchy: std::str::from_utf8(fields.next()?).ok()?.parse().ok()?,
                controllers: String::from_utf8_lossy(fields.next()?).into_owned(),
                path: ByteString::from(fields.next()?),
            })
        })
        .collect()
}

/// Namespace links of a process or thread.
pub fn namespaces(folder: &str) -> BTreeMap<String, u64> {
    let Ok(entries) = fs::read_dir(format!("{folder}/ns")) else {
        return BTreeMap::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let kind = entry.file_name().into_string().ok()?;
            let inode = namespace_inode(&format!("{folder}/ns/{kind}"))?;
            Some((kind, inode))
        })
        .collect()
}

/// The fields of `stat`, counted from 1 as in proc(5).
struct Stat {
    state: char,
    fields: Vec<i128>,
}

impl Stat {
    fn read(folder: &str) -> Option<Self> {
        let bytes = fs::read(format!("{folder}/stat")).ok()?;
        // The name may hold any byte, so the fields start at the last ')'.
        let after_name = bytes.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(bytes.get(after_name + 1..)?).ok()?;
        let mut words = rest.split_whitespace();
        let state = words.next()?.chars().next()?;
        let fields = words.map(|word| word.parse().unwrap_or(0)).collect();
        Some(Self { state, fields })
    }

    fn field(&self, number: usize) -> i128 {
        number
            .checked_sub(4)
            .and_then(|index| self.fields.get(index))
            .copied()
            .unwrap_or(0)
    }

    fn number(&self, number: usize) -> u64 {
        self.field(number) as u64
    }

    fn signed(&self, number: usize) -> i64 {
        self.field(number) as i64
    }
}

/// The lines of `status`.
struct Status {
    lines: BTreeMap<String, String>,
}

impl Status {
    fn read(folder: &str) -> Option<Self> {
        let bytes = fs::read(format!("{folder}/status")).ok()?;
        let lines = String::from_utf8_lossy(&bytes)
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
            .collect();
        Some(Self { lines })
    }

    fn numbers<T: std::str::FromStr>(&self, key: &str) -> Vec<T> {
        self.lines
            .get(key)
            .map(|value| {
                value
                    .split_whitespace()
                    .filter_map(|word| word.parse().ok())
                    .collect()
            })
            .unwrap_or_default()
    }

    fn number(&self, key: &str) -> u64 {
        self.numbers(key).first().copied().unwrap_or(0)
    }

    fn four(&self, key: &str) -> [u32; 4] {
        let numbers = self.numbers(key);
        std::array::from_fn(|index| numbers.get(index).copied().unwrap_or(u32::MAX))
    }

    fn mask(&self, key: &str) -> u64 {
        self.lines
            .get(key)
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .unwrap_or(0)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            inheritable: self.mask("CapInh"),
            permitted: self.mask("CapPrm"),
            effective: self.mask("CapEff"),
            bounding: self.mask("CapBnd"),
            ambient: self.mask("CapAmb"),
        }
    }

    fn memory(&self) -> BTreeMap<String, u64> {
        self.lines
            .iter()
            .filter_map(|(key, value)| {
                let kib = value.strip_suffix(" kB")?.trim().parse().ok()?;
                Some((key.clone(), kib))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_split_without_loss_of_empty_ones() {
        assert!(split_at_nul(b"").is_empty());
        assert_eq!(split_at_nul(b"\0"), [ByteString::default()]);
        assert_eq!(
            split_at_nul(b"a\0\0b\0"),
            [
                ByteString::from("a"),
                ByteString::default(),
                ByteString::from("b")
            ]
        );
    }

    #[test]
    fn this_process_is_among_them() {
        let own = process(std::process::id() as i32).expect("own process");
        assert!(!own.kernel_thread);
        // The line is of the main thread, which may run or wait for this one.
        assert!(matches!(own.state, 'R' | 'S' | 'D'), "{}", own.state);
        assert!(own.exe.is_some() && !own.exe_deleted);
        assert!(own.threads >= 1 && own.virtual_bytes > 0);
    }
}
