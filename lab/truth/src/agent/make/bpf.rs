//! eBPF maps and programs: held by a process, attached, pinned.

use std::fs::{self, File};
use std::io;
use std::mem::forget;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd as _, OwnedFd};

use super::report::{Reports, attempt};
use crate::agent::sys;

const MAP_CREATE: libc::c_int = 0;
const PROGRAM_LOAD: libc::c_int = 5;
const OBJECT_PIN: libc::c_int = 6;
const PROGRAM_ATTACH: libc::c_int = 8;

const MAP_TYPE_HASH: u32 = 1;
const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_LRU_HASH: u32 = 9;
const MAP_TYPE_RING_BUFFER: u32 = 27;
const PROGRAM_TYPE_SOCKET_FILTER: u32 = 1;
const PROGRAM_TYPE_KPROBE: u32 = 2;
const PROGRAM_TYPE_CGROUP_SKB: u32 = 8;
/// `BPF_CGROUP_INET_INGRESS`.
const ATTACH_INGRESS: u32 = 0;

/// One process that holds them all.
pub fn processes(reports: &mut Reports) -> io::Result<()> {
    reports.simple("bpf", |failures| {
        let hash = attempt(failures, "hash map", || {
            map("lab_hash", MAP_TYPE_HASH, 8, 16, 64)
        });
        attempt(failures, "array map", || {
            map("lab_array", MAP_TYPE_ARRAY, 4, 32, 7).map(forget)
        });
        attempt(failures, "LRU map", || {
            map("lab_lru", MAP_TYPE_LRU_HASH, 4, 4, 100).map(forget)
        });
        attempt(failures, "ring buffer", || {
            map("lab_ring", MAP_TYPE_RING_BUFFER, 0, 0, 4096).map(forget)
        });
        attempt(failures, "socket filter", || {
            filter_socket(5005, hash.as_ref())
        });
        attempt(failures, "cgroup program", || {
            let program = program("lab_ingress", PROGRAM_TYPE_CGROUP_SKB, None)?;
            fs::create_dir_all("/sys/fs/cgroup/lab-bpf")?;
            let cgroup = File::open("/sys/fs/cgroup/lab-bpf")?;
            let attribute = [
                cgroup.as_raw_fd() as u32,
                program.as_raw_fd() as u32,
                ATTACH_INGRESS,
                0,
            ];
            call(PROGRAM_ATTACH, &words(&attribute)).map(drop)
        });
        attempt(failures, "pinned program", || {
            let program = program("lab_pinned", PROGRAM_TYPE_SOCKET_FILTER, None)?;
            pin(&program, "/sys/fs/bpf/lab_program")
        });
        if let Some(hash) = hash {
            attempt(failures, "pinned map", || pin(&hash, "/sys/fs/bpf/lab_map"));
            forget(hash);
        }
        Ok(())
    })?;
    Ok(())
}

/// A socket whose packets a program sees, which takes all.
pub fn filtered_socket(port: u16) -> io::Result<()> {
    filter_socket(port, None)
}

/// A kprobe at a function that hardly anything calls, which runs a program.
pub fn probed_function(function: &str) -> io::Result<()> {
    let program = program("lab_probe", PROGRAM_TYPE_KPROBE, None)?;
    let event = sys::kprobe_event(function)?;
    sys::run_at_event(&event, &program)?;
    forget((event, program));
    Ok(())
}

fn filter_socket(port: u16, map: Option<&OwnedFd>) -> io::Result<()> {
    let filter = program("lab_filter", PROGRAM_TYPE_SOCKET_FILTER, map)?;
    let socket = UdpSocket::bind(("127.0.0.1", port))?;
    let fd = filter.as_raw_fd().to_ne_bytes();
    sys::set_socket_option(&socket, libc::SOL_SOCKET, libc::SO_ATTACH_BPF, &fd)?;
    // The socket alone keeps it from here on.
    drop(filter);
    forget(socket);
    Ok(())
}

fn map(name: &str, kind: u32, key: u32, value: u32, entries: u32) -> io::Result<OwnedFd> {
    // union bpf_attr: type, key, value, entries, flags, inner, node, name.
    let mut attribute = words(&[kind, key, value, entries, 0, 0, 0]);
    attribute.extend(padded(name));
    attribute.resize(72, 0);
    sys::own(call(MAP_CREATE, &attribute)?)
}

/// A program that refers to a map, if given, and returns 1.
fn program(name: &str, kind: u32, map: Option<&OwnedFd>) -> io::Result<OwnedFd> {
    let mut instructions: Vec<u64> = Vec::new();
    if let Some(map) = map {
        // BPF_LD | BPF_IMM | BPF_DW to r1, source BPF_PSEUDO_MAP_FD.
        instructions.push(0x1118 | u64::from(map.as_raw_fd() as u32) << 32);
        instructions.push(0);
    }
    // mov r0, 1; exit.
    instructions.extend([0x01_0000_00b7, 0x95]);
    let license = c"GPL";
    let mut attribute = words(&[kind, instructions.len() as u32]);
    attribute.extend((instructions.as_ptr() as u64).to_ne_bytes());
    attribute.extend((license.as_ptr() as u64).to_ne_bytes());
    // log_level, log_size, log_buf, kern_version, prog_flags, name.
    attribute.extend([0; 24]);
    attribute.extend(padded(name));
    attribute.resize(72, 0);
    sys::own(call(PROGRAM_LOAD, &attribute)?)
}

fn pin(object: &OwnedFd, path: &str) -> io::Result<()> {
    let path = sys::c_string(path)?;
    let mut attribute = (path.as_ptr() as u64).to_ne_bytes().to_vec();
    attribute.extend(words(&[object.as_raw_fd() as u32, 0]));
    call(OBJECT_PIN, &attribute).map(drop)
}

fn padded(name: &str) -> [u8; 16] {
    let mut padded = [0; 16];
    for (to, from) in padded.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    padded
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn call(command: libc::c_int, attribute: &[u8]) -> io::Result<libc::c_int> {
    let mut attribute = attribute.to_vec();
    // SAFETY: an attribute of the length given; the pointers in it are to
    // buffers that the callers hold.
    sys::check_long(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attribute.as_mut_ptr(),
            attribute.len(),
        )
    })
    .map(|value| value as libc::c_int)
}
