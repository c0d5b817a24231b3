//! The rows of the guest's truth, each as `/proc` and the other interfaces
//! of the guest's kernel tell it, before any interpretation by the host.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ByteString;

/// A process (thread group) as `/proc/<pid>` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Thread group id in the initial pid namespace.
    pub pid: i32,
    /// The parent's thread group id; 0 for none.
    pub ppid: i32,
    /// Ids from the initial pid namespace (first) to the process's own (last).
    pub namespace_pids: Vec<i32>,
    /// `/proc/<pid>/comm`. For a kernel worker the kernel appends its work
    /// here and a kernel thread's name is not cut: see [`Process::task_comm`].
    pub comm: ByteString,
    /// The letter in `/proc/<pid>/stat`: R, S, D, T, t, Z, X, I …
    pub state: char,
    /// Real, effective, saved, file-system user id.
    pub uid: [u32; 4],
    /// Real, effective, saved, file-system group id.
    pub gid: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding, ambient capabilities.
    pub capabilities: Capabilities,
    /// `PF_…` flags of the main thread.
    pub flags: u64,
    /// Whether `PF_KTHREAD` is among them.
    pub kernel_thread: bool,
    /// Clock ticks after boot at which it started ([`Info::clock_ticks`] a
    /// second), in the initial time namespace.
    pub start_time: u64,
    /// The executable's path, without the mark of a deleted one; none for a
    /// kernel thread, a zombie, and a process whose link can't be read.
    pub exe: Option<ByteString>,
    /// Whether the name it was executed by is deleted; the text of the link
    /// alone doesn't tell (a name may end in ` (deleted)`).
    pub exe_deleted: bool,
    /// The arguments, `/proc/<pid>/cmdline` split at NUL bytes.
    pub cmdline: Vec<ByteString>,
    /// `/proc/<pid>/cmdline` as it is, where splitting loses something: its
    /// last byte isn't NUL.
    pub cmdline_unterminated: bool,
    /// `/proc/<pid>/environ` split at NUL bytes.
    pub environ: Vec<ByteString>,
    /// Current directory, as seen from the initial root.
    pub cwd: Option<ByteString>,
    /// Root directory, as seen from the initial root.
    pub root: Option<ByteString>,
    /// `/proc/<pid>/cgroup`.
    pub cgroups: Vec<Cgroup>,
    /// Namespace kind (`mnt`, `pid_for_children`, …) to inode number.
    pub namespaces: BTreeMap<String, u64>,
    /// Process group id.
    pub process_group: i32,
    /// Session id.
    pub session: i32,
    /// Controlling terminal's device number as in `stat`; 0 for none.
    pub tty_number: i32,
    /// Foreground process group of the terminal; -1 for none.
    pub tty_process_group: i32,
    /// How many threads.
    pub threads: u32,
    /// Priority as in `stat`.
    pub priority: i32,
    /// Nice value.
    pub nice: i32,
    /// Scheduling policy number.
    pub policy: u32,
    /// Virtual memory in bytes; 0 without an address space.
    pub virtual_bytes: u64,
    /// Resident memory in bytes as `stat` has it (approximate on a running
    /// process in the kernel's own words).
    pub resident_bytes: u64,
    /// The `Vm…`, `Rss…` lines of `status` in KiB.
    pub memory_kib: BTreeMap<String, u64>,
    /// User time of the whole process in clock ticks.
    pub user_time: u64,
    /// System time of the whole process in clock ticks.
    pub system_time: u64,
    /// Seccomp mode.
    pub seccomp: u32,
    /// Whether `no_new_privs` is set.
    pub no_new_privileges: bool,
    /// Id of the tracing thread; 0 for none.
    pub tracer: i32,
    /// `oom_score_adj`.
    pub oom_score_adjustment: i32,
}

impl Process {
    /// The name as the task structure holds it, recovered from
    /// [`Process::comm`]: 15 bytes at most, a worker's work cut off.
    #[must_use]
    pub fn task_comm(&self) -> ByteString {
        task_comm(&self.comm, self.kernel_thread)
    }
}

fn task_comm(comm: &ByteString, kernel_thread: bool) -> ByteString {
    let bytes = comm.as_bytes();
    let mut end = bytes.len();
    if kernel_thread && bytes.starts_with(b"kworker/") && !bytes.starts_with(b"kworker/R-") {
        end = bytes
            .iter()
            .position(|byte| matches!(byte, b'-' | b'+'))
            .unwrap_or(end);
    }
    ByteString::from(&bytes[..end.min(15)])
}

/// Five capability sets as bit masks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// `CapInh`.
    pub inheritable: u64,
    /// `CapPrm`.
    pub permitted: u64,
    /// `CapEff`.
    pub effective: u64,
    /// `CapBnd`.
    pub bounding: u64,
    /// `CapAmb`.
    pub ambient: u64,
}

/// A line of `/proc/<pid>/cgroup`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Hierarchy number; 0 is cgroup v2.
    pub hierarchy: u32,
    /// Controllers of a v1 hierarchy.
    pub controllers: String,
    /// Path as seen from the initial cgroup namespace.
    pub path: ByteString,
}

/// A thread as `/proc/<pid>/task/<tid>` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// Thread group id.
    pub pid: i32,
    /// Thread id, both in the initial pid namespace.
    pub tid: i32,
    /// Ids from the initial pid namespace to the thread's own.
    pub namespace_tids: Vec<i32>,
    /// The thread's name; see [`Process::comm`].
    pub comm: ByteString,
    /// State letter.
    pub state: char,
    /// `PF_KTHREAD` is set.
    pub kernel_thread: bool,
    /// Clock ticks after boot at which it started.
    pub start_time: u64,
    /// Real, effective, saved, file-system user id of the thread.
    pub uid: [u32; 4],
    /// Real, effective, saved, file-system group id of the thread.
    pub gid: [u32; 4],
    /// Supplementary groups of the thread.
    pub groups: Vec<u32>,
    /// The thread's capabilities.
    pub capabilities: Capabilities,
    /// User time in clock ticks.
    pub user_time: u64,
    /// System time in clock ticks.
    pub system_time: u64,
    /// Namespace kind to inode number, where it differs from the process's.
    pub own_namespaces: BTreeMap<String, u64>,
}

impl Thread {
    /// The name as the task structure holds it.
    #[must_use]
    pub fn task_comm(&self) -> ByteString {
        task_comm(&self.comm, self.kernel_thread)
    }
}

/// A line of `/proc/modules` with the module's files in `/sys/module`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Name.
    pub name: String,
    /// Size in bytes as the kernel counts it.
    pub size: u64,
    /// References; none where the kernel prints `-`.
    pub refcount: Option<i64>,
    /// Modules that use this one.
    pub used_by: Vec<String>,
    /// `Live`, `Loading` or `Unloading`.
    pub state: String,
    /// Address of its text.
    pub address: u64,
    /// Taint letters in parentheses, without them.
    pub taint: String,
    /// Parameters that have a file in `/sys/module/<name>/parameters` which
    /// root may read, value without the final newline.
    pub parameters: BTreeMap<String, ByteString>,
    /// `/sys/module/<name>/version`, where there.
    pub version: Option<String>,
    /// `/sys/module/<name>/srcversion`, where there.
    pub source_version: Option<String>,
    /// Build id from `/sys/module/<name>/notes/.note.gnu.build-id` in hex.
    pub build_id: Option<String>,
    /// Section name to address from `/sys/module/<name>/sections`.
    pub sections: BTreeMap<String, u64>,
}

/// A line of `/proc/<pid>/maps`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// Process.
    pub pid: i32,
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `rwxp` letters.
    pub permissions: String,
    /// Offset in the file in bytes.
    pub offset: u64,
    /// Device as `major:minor`, two hex numbers.
    pub device: String,
    /// Inode number; 0 for none.
    pub inode: u64,
    /// What stands at the end of the line, its `\012` turned into newlines,
    /// ` (deleted)` kept.
    pub name: ByteString,
}

/// A descriptor of a process as `/proc/<pid>/fd` and `fdinfo` tell it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFile {
    /// Process.
    pub pid: i32,
    /// Descriptor number.
    pub fd: u32,
    /// The link's text, as it is.
    pub link: ByteString,
    /// Path without the mark of a deleted file; the link's text for what
    /// has no path (`socket:[…]`, `anon_inode:[…]`).
    pub path: ByteString,
    /// The name it was opened by is deleted, though the inode may have
    /// others; a memfd's never existed and counts as deleted.
    pub deleted: bool,
    /// What it is, from `stat` and the link.
    pub kind: FileKind,
    /// `flags` of `fdinfo` (octal there), with `O_CLOEXEC`.
    pub flags: u32,
    /// Position.
    pub position: i64,
    /// Mount id of `fdinfo`.
    pub mount_id: i64,
    /// Inode number.
    pub inode: u64,
    /// Device of the inode as `major:minor`, decimal.
    pub device: String,
    /// Full mode.
    pub mode: u32,
    /// Number of links.
    pub links: u64,
    /// Size in bytes.
    pub size: u64,
    /// For a device node: its own number as `major:minor`, decimal.
    pub node: Option<String>,
    /// The further lines of `fdinfo` (epoll targets, timers, …).
    pub details: Vec<String>,
}

/// Kinds of open files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link (opened with `O_PATH`).
    SymbolicLink,
    /// A character device.
    CharacterDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// An unnamed pipe.
    Pipe,
    /// A socket.
    Socket,
    /// A memfd.
    Memfd,
    /// `anon_inode:…`.
    AnonymousInode,
    /// A namespace's file.
    Namespace,
    /// A pidfd with an inode of its own (Linux 6.9 on).
    Pidfd,
}

/// A socket as the `/proc/net` files or `sock_diag` list it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// `tcp`, `tcp6`, `udp`, `udp6`, `udplite`, `udplite6`, `icmp`, `icmp6`,
    /// `raw`, `raw6`, `unix`, `packet`, `netlink`, `vsock`.
    pub protocol: String,
    /// Inode of the network namespace.
    pub namespace: u64,
    /// Inode of the socket; 0 when it belongs to no file (`TIME_WAIT`, …).
    pub inode: u64,
    /// State as a number: a `TCP_…` state for internet sockets and vsock, an
    /// `SS_…` state for UNIX ones; none where the file has no such column.
    pub state: Option<u32>,
    /// The state's name as `ss` would say it, for internet sockets and vsock.
    pub state_name: Option<String>,
    /// Local address: an IP address as text, a vsock CID, a netlink family.
    pub local_address: Option<String>,
    /// Local port (for raw sockets the protocol number, for netlink the port id).
    pub local_port: Option<u32>,
    /// Remote address.
    pub remote_address: Option<String>,
    /// Remote port.
    pub remote_port: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Path of a UNIX socket; an abstract one starts with a NUL byte, in
    /// place of the `@` that `/proc/net/unix` prints for it.
    pub path: Option<ByteString>,
    /// `SOCK_…` type where listed (UNIX, packet, vsock).
    pub socket_type: Option<u32>,
    /// Inode of a UNIX socket's peer (from `sock_diag`), where connected.
    pub peer_inode: Option<u64>,
    /// Bytes in the send queue, where listed.
    pub send_queue: Option<u64>,
    /// Bytes in the receive queue (for a listener: waiting connections).
    pub receive_queue: Option<u64>,
    /// Protocol of a packet socket (`ETH_P_…`) or of a netlink socket.
    pub sub_protocol: Option<u32>,
    /// Interface index of a packet socket.
    pub interface: Option<u32>,
    /// Multicast groups of a netlink socket.
    pub groups: Option<u32>,
}

/// A line of `mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Inode of the mount namespace.
    pub namespace: u64,
    /// The process whose `mountinfo` it was, with that process's root.
    pub seen_by: i32,
    /// Mount id.
    pub id: i32,
    /// Parent mount's id.
    pub parent: i32,
    /// Device as `major:minor`, decimal.
    pub device: String,
    /// Root of the mount inside its file system.
    pub root: ByteString,
    /// Where it is mounted, as seen from the reader's root.
    pub target: ByteString,
    /// Options of the mount, as written.
    pub options: String,
    /// Optional fields (`shared:1`, `master:2`, …).
    pub propagation: Vec<String>,
    /// File-system type.
    pub fstype: ByteString,
    /// Source.
    pub source: ByteString,
    /// Options of the super block, as written (escapes kept).
    pub super_options: ByteString,
}

/// A namespace and who is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// `mnt`, `net`, `pid`, `user`, `uts`, `ipc`, `cgroup`, `time`.
    pub kind: String,
    /// Inode number.
    pub inode: u64,
    /// Processes in it (for `pid` and `time`: whose own it is).
    pub pids: Vec<i32>,
    /// Bind mounts in the initial mount namespace that keep it.
    pub mounts: Vec<ByteString>,
    /// Open descriptors that keep it, as `pid/fd`.
    pub descriptors: Vec<String>,
    /// Host name, for a `uts` namespace.
    pub host_name: Option<ByteString>,
    /// For a `user` namespace: `uid_map` lines as first process of it has them.
    pub uid_map: Option<String>,
}

/// A record of `/dev/kmsg`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelMessage {
    /// Sequence number.
    pub sequence: u64,
    /// Microseconds since boot.
    pub microseconds: u64,
    /// Facility.
    pub facility: u32,
    /// Level, 0 to 7.
    pub level: u32,
    /// The flags field as written (`-`, `c`, …).
    pub flags: String,
    /// The text, with the `\xNN` escapes of `/dev/kmsg` undone.
    pub text: ByteString,
    /// The dictionary's lines (`SUBSYSTEM=…`).
    pub dictionary: Vec<String>,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Inode of the network namespace.
    pub namespace: u64,
    /// Index.
    pub index: u32,
    /// Name.
    pub name: ByteString,
    /// `IFF_…` flags.
    pub flags: u32,
    /// Maximum transmission unit.
    pub mtu: u32,
    /// `ARPHRD_…` type.
    pub link_type: u32,
    /// Hardware address, `aa:bb:…`, empty for none.
    pub hardware_address: String,
    /// Operational state number (`IF_OPER_…`).
    pub operational_state: u32,
    /// Kind (`veth`, `dummy`, …) where the driver has one.
    pub kind: Option<String>,
    /// Addresses.
    pub addresses: Vec<InterfaceAddress>,
    /// Index of the peer or lower interface, where told.
    pub link: Option<u32>,
    /// Index of the bridge, bond or the like that it is a port of.
    pub master: Option<u32>,
    /// Alias (`ifalias`), where set.
    pub alias: Option<ByteString>,
    /// Received bytes, packets, sent bytes, packets (`IFLA_STATS64`).
    pub counters: [u64; 4],
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct InterfaceAddress {
    /// The IP address as text.
    pub address: String,
    /// Prefix length.
    pub prefix_length: u8,
    /// Peer's address on a point-to-point link, where different.
    pub peer: Option<String>,
    /// Scope number (`RT_SCOPE_…`).
    pub scope: u8,
    /// Label of an IPv4 address.
    pub label: Option<ByteString>,
}

/// eBPF objects.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bpf {
    /// Programs.
    pub programs: Vec<BpfProgram>,
    /// Maps.
    pub maps: Vec<BpfMap>,
}

/// A program as `BPF_OBJ_GET_INFO_BY_FD` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BpfProgram {
    /// Id.
    pub id: u32,
    /// `BPF_PROG_TYPE_…`.
    pub program_type: u32,
    /// Name.
    pub name: ByteString,
    /// Tag in hex.
    pub tag: String,
    /// Length after translation in bytes.
    pub translated_bytes: u32,
    /// Length of native code in bytes; 0 when interpreted.
    pub jited_bytes: u32,
    /// Nanoseconds since boot at load time.
    pub load_time: u64,
    /// The loader's user id.
    pub created_by_uid: u32,
    /// Ids of its maps.
    pub map_ids: Vec<u32>,
}

/// A map as `BPF_OBJ_GET_INFO_BY_FD` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BpfMap {
    /// Id.
    pub id: u32,
    /// `BPF_MAP_TYPE_…`.
    pub map_type: u32,
    /// Name.
    pub name: ByteString,
    /// Key size in bytes.
    pub key_size: u32,
    /// Value size in bytes.
    pub value_size: u32,
    /// Entries at most.
    pub max_entries: u32,
    /// Flags.
    pub flags: u32,
}

/// A line of `/proc/kallsyms`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Symbol {
    /// Address.
    pub address: u64,
    /// `nm`-like letter.
    pub kind: char,
    /// Name.
    pub name: String,
    /// Module, or `bpf`, `__builtin__ftrace` and so on; none for the kernel.
    pub module: Option<String>,
}

/// The system as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// `uname`: sysname, nodename, release, version, machine.
    pub uname: [ByteString; 5],
    /// `/proc/version`.
    pub version: ByteString,
    /// `/proc/cmdline`.
    pub cmdline: ByteString,
    /// Boot time in Unix seconds (`btime` of `/proc/stat`).
    pub boot_time: u64,
    /// The wall clock when told, in Unix nanoseconds.
    pub wall_time: u64,
    /// Nanoseconds of the boot clock when told.
    pub uptime: u64,
    /// Clock ticks a second in `start_time`, `user_time`, `system_time`.
    pub clock_ticks: u64,
    /// `/proc/sys/kernel/tainted`.
    pub taint: u64,
    /// The kernel's build id in hex, from `/sys/kernel/notes`.
    pub build_id: Option<String>,
    /// VMCOREINFO's physical address and size, from `/sys/kernel/vmcoreinfo`.
    pub vmcoreinfo: Option<String>,
    /// Address of `_text`.
    pub text_base: Option<u64>,
    /// `/proc/meminfo` in KiB.
    pub memory_kib: BTreeMap<String, u64>,
    /// Online processors.
    pub processors: u32,
    /// Vendor and model of the first processor, as `/proc/cpuinfo` has them.
    pub processor: Option<String>,
    /// Flags of the first processor.
    pub processor_flags: Vec<String>,
    /// Paging levels, 4 or 5 (`la57` among the processor's flags).
    pub paging_levels: u8,
    /// Name to text of `/sys/devices/system/cpu/vulnerabilities`.
    pub vulnerabilities: BTreeMap<String, String>,
    /// Sysctls of note, name to text.
    pub sysctls: BTreeMap<String, String>,
    /// `/sys/kernel/security/lockdown` and `lsm`, where there.
    pub lockdown: Option<String>,
    /// Active security modules.
    pub security_modules: Option<String>,
    /// `/proc/iomem` lines.
    pub iomem: Vec<String>,
    /// The agent's pid, whose own rows change while it tells them.
    pub agent_pid: i32,
    /// What of the workload this kernel couldn't do, and why.
    pub workload_failures: Vec<String>,
    /// What is where in the workload: role to pid.
    pub roles: BTreeMap<String, i32>,
}
