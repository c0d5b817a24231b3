//! What a QEMU command line says about the guest's memory, its name and its
//! monitors.
//!
//! Only the options that matter here are understood; the others are skipped.
//! Sources: QEMU `qemu-options.hx`, `util/qemu-option.c` (commas are doubled to
//! escape them), `util/cutils.c` (`qemu_strtosz`), `system/vl.c`.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::layout::Machine;

/// What was understood of a QEMU's arguments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// The guest's name, from `-name`.
    pub name: Option<String>,
    /// The guest's UUID, from `-uuid`.
    pub uuid: Option<String>,
    /// The machine type as it was given, from `-machine` or `-M`.
    pub machine_name: Option<String>,
    /// The size of RAM in bytes, from `-m` or `-machine memory.size`.
    pub ram_size: Option<u64>,
    /// The machine's option `max-ram-below-4g`.
    pub max_ram_below_4g: Option<u64>,
    /// The machine's option `memory-backend`: the id of the backend that is
    /// the main RAM.
    pub memory_backend: Option<String>,
    /// The machine's option `confidential-guest-support`: the guest's memory
    /// is encrypted or kept away from the host.
    pub confidential: bool,
    /// The memory backends, in the order given.
    pub backends: Vec<MemoryBackend>,
    /// The backends of the NUMA nodes, by node number.
    pub numa_backends: Vec<String>,
    /// The backends of memory devices (`pc-dimm`, `nvdimm`, `virtio-mem-pci`)
    /// that were there from the start.
    pub device_backends: Vec<String>,
    /// Where QMP listens.
    pub monitors: Vec<MonitorSocket>,
    /// The socket on which its gdbstub listens, if it is a UNIX one.
    pub gdb: Option<MonitorSocket>,
    /// Whether options are also read from a file (`-readconfig`), so that what
    /// is missing here may have been said there.
    pub reads_config: bool,
}

/// An object `memory-backend-*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryBackend {
    /// Its id.
    pub id: String,
    /// What it is: `memory-backend-ram`, `-file`, `-memfd`, `-epc`, …
    pub kind: String,
    /// Its size in bytes.
    pub size: Option<u64>,
    /// Its file or the folder of its file, of a `memory-backend-file`.
    pub path: Option<PathBuf>,
    /// Whether others that map it see the guest's writes.
    pub share: bool,
}

/// A socket on which QMP is spoken.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MonitorSocket {
    /// A UNIX socket by its path, maybe relative to QEMU's working folder.
    Path(PathBuf),
    /// A listening UNIX socket that QEMU inherited, as libvirt does it.
    Descriptor(u32),
}

/// Options of QEMU that take no argument, of all versions since 2.0.
const WITHOUT_ARGUMENT: &[&str] = &[
    "S",
    "alt-grab",
    "async-teardown",
    "ctrl-grab",
    "daemonize",
    "enable-fips",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "localtime",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-frame",
    "no-hpet",
    "no-kvm",
    "no-kvm-irqchip",
    "no-kvm-pit",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nodefconfig",
    "nographic",
    "old-param",
    "only-migratable",
    "portrait",
    "preconfig",
    "s",
    "semihosting",
    "show-cursor",
    "singlestep",
    "snapshot",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "xen-domid-restrict",
];

impl CommandLine {
    /// Understands the arguments of a QEMU, its own name first.
    pub fn parse(arguments: &[Vec<u8>]) -> Self {
        let mut line = Self::default();
        let mut sockets: HashMap<String, MonitorSocket> = HashMap::new();
        let mut monitor_chardevs = Vec::new();
        let mut gdb_chardev = None;
        let mut numa: Vec<(Option<u64>, String)> = Vec::new();
        let mut rest = arguments.iter().skip(1);
        while let Some(argument) = rest.next() {
            let Some(option) = argument.strip_prefix(b"-") else {
                continue; // a disk image
            };
            let option = option.strip_prefix(b"-").unwrap_or(option);
            let option = String::from_utf8_lossy(option).into_owned();
            if WITHOUT_ARGUMENT.contains(&option.as_str()) {
                continue;
            }
            let Some(value) = rest.next() else {
                break;
            };
            match option.as_str() {
                "name" => {
                    let options = Options::parse(value, "guest");
                    line.name = options.text("guest").or(line.name);
                }
                "uuid" => line.uuid = Some(String::from_utf8_lossy(value).into_owned()),
                "machine" | "M" => line.machine(&Options::parse(value, "type")),
                "m" => {
                    let options = Options::parse(value, "size");
                    let size = options.text("size");
                    line.ram_size = size
                        .and_then(|size| parse_size(&size, 1 << 20))
                        .or(line.ram_size);
                }
                "object" => line.object(&Options::parse(value, "qom-type")),
                "numa" => {
                    let options = Options::parse(value, "type");
                    if let Some(backend) = options.text("memdev") {
                        let node = options.text("nodeid").and_then(|id| id.parse().ok());
                        numa.push((node, backend));
                    }
                }
                "device" => {
                    let options = Options::parse(value, "driver");
                    let driver = options.text("driver").unwrap_or_default();
                    let memory = matches!(driver.as_str(), "pc-dimm" | "nvdimm")
                        || is_virtio_memory(&driver);
                    if let (true, Some(backend)) = (memory, options.text("memdev")) {
                        line.device_backends.push(backend);
                    }
                }
                "qmp" | "qmp-pretty" => {
                    let options = Options::parse(value, "address");
                    let address = options.get("address").unwrap_or_default();
                    if let Some(path) = address.strip_prefix(b"unix:") {
                        line.monitors.push(MonitorSocket::Path(path_of(path)));
                    } else if let Some(id) = address.strip_prefix(b"chardev:") {
                        monitor_chardevs.push(String::from_utf8_lossy(id).into_owned());
                    }
                }
                "mon" => {
                    let options = Options::parse(value, "chardev");
                    if options.text("mode").as_deref() == Some("control") {
                        monitor_chardevs.extend(options.text("chardev"));
                    }
                }
                "chardev" => {
                    let options = Options::parse(value, "backend");
                    let socket = match (options.get("path"), options.text("fd")) {
                        (Some(path), _) => Some(MonitorSocket::Path(path_of(path))),
                        (None, Some(fd)) => fd.parse().ok().map(MonitorSocket::Descriptor),
                        (None, None) => None,
                    };
                    let is_socket = options.text("backend").as_deref() == Some("socket");
                    if let (true, Some(id), Some(socket)) = (is_socket, options.text("id"), socket)
                    {
                        sockets.insert(id, socket);
                    }
                }
                "gdb" => {
                    let options = Options::parse(value, "address");
                    let address = options.get("address").unwrap_or_default();
                    if let Some(path) = address.strip_prefix(b"unix:") {
                        line.gdb = Some(MonitorSocket::Path(path_of(path)));
                    } else if let Some(id) = address.strip_prefix(b"chardev:") {
                        gdb_chardev = Some(String::from_utf8_lossy(id).into_owned());
                    }
                }
                "readconfig" => line.reads_config = true,
                _ => {}
            }
        }
        // Nodes with no number take the next free one, which is their order.
        if numa.iter().all(|(node, _)| node.is_some()) {
            numa.sort_by_key(|(node, _)| *node);
        }
        line.numa_backends = numa.into_iter().map(|(_, backend)| backend).collect();
        let of_gdb = gdb_chardev.and_then(|id| sockets.get(&id).cloned());
        line.gdb = of_gdb.or(line.gdb);
        let chardev_sockets = monitor_chardevs.iter().filter_map(|id| sockets.remove(id));
        line.monitors.extend(chardev_sockets);
        line
    }

    /// The machine type, where its RAM layout is known. QEMU's default is
    /// `pc`.
    pub fn machine_type(&self) -> Option<Machine> {
        match &self.machine_name {
            Some(name) => Machine::from_name(name),
            None if self.reads_config => None,
            None => Some(Machine::I440fx),
        }
    }

    /// The size of the main RAM: `-m`, else the sum of the backends that are
    /// main RAM, else QEMU's default of 128 MiB.
    pub fn main_ram_size(&self) -> Option<u64> {
        if self.ram_size.is_some() {
            return self.ram_size;
        }
        if let Some(backend) = &self.memory_backend {
            return self.backend(backend)?.size;
        }
        (!self.reads_config).then_some(128 << 20)
    }

    /// The backend with this id.
    pub fn backend(&self, id: &str) -> Option<&MemoryBackend> {
        self.backends.iter().find(|backend| backend.id == id)
    }

    /// The blocks that make up main RAM in their order, with their sizes.
    /// Without a backend it is `pc.ram`, which QEMU makes itself, or
    /// `microvm.ram`.
    ///
    /// `None` if the command line doesn't say how large they are.
    pub fn main_blocks(&self) -> Option<Vec<(String, u64)>> {
        if !self.numa_backends.is_empty() {
            let blocks = self.numa_backends.iter();
            return blocks
                .map(|id| Some((id.clone(), self.backend(id)?.size?)))
                .collect();
        }
        let name = self.memory_backend.clone();
        let size = self.main_ram_size()?;
        let own = match self.machine_type() {
            Some(Machine::Microvm) => "microvm.ram",
            Some(Machine::Q35 | Machine::I440fx) | None => "pc.ram",
        };
        Some(vec![(name.unwrap_or_else(|| own.to_owned()), size)])
    }

    fn machine(&mut self, options: &Options) {
        if let Some(name) = options.text("type") {
            self.machine_name = Some(name);
        }
        let size = |key| options.text(key).and_then(|size| parse_size(&size, 1));
        if let Some(limit) = size("max-ram-below-4g") {
            self.max_ram_below_4g = Some(limit);
        }
        if let Some(size) = size("memory.size") {
            self.ram_size = Some(size);
        }
        if let Some(backend) = options.text("memory-backend") {
            self.memory_backend = Some(backend);
        }
        if options.text("confidential-guest-support").is_some()
            || options.text("memory-encryption").is_some()
        {
            self.confidential = true;
        }
    }

    fn object(&mut self, options: &Options) {
        let Some(kind) = options.text("qom-type") else {
            return;
        };
        if !kind.starts_with("memory-backend-") {
            return;
        }
        // A memfd is shared unless it is said not to be.
        let share = match options.text("share").as_deref() {
            Some(value) => matches!(value, "on" | "yes" | "true" | "y"),
            None => kind == "memory-backend-memfd",
        };
        self.backends.push(MemoryBackend {
            id: options.text("id").unwrap_or_default(),
            size: options.text("size").and_then(|size| parse_size(&size, 1)),
            path: options.get("mem-path").map(path_of),
            share,
            kind,
        });
    }
}

fn is_virtio_memory(driver: &str) -> bool {
    driver.starts_with("virtio-mem") || driver.starts_with("virtio-pmem")
}

fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes.to_vec()))
}

/// The value of one option: `key=value` pairs separated by commas, or JSON.
struct Options(HashMap<String, Vec<u8>>);

impl Options {
    /// `first` is the key of a first element that has none.
    fn parse(value: &[u8], first: &str) -> Self {
        if value.starts_with(b"{") {
            return Self::parse_json(value).unwrap_or(Self(HashMap::new()));
        }
        let mut options = HashMap::new();
        let mut element = Vec::new();
        let mut bytes = value.iter().copied().peekable();
        let mut is_first = true;
        loop {
            let byte = bytes.next();
            match byte {
                Some(b',') if bytes.peek() == Some(&b',') => {
                    bytes.next();
                    element.push(b',');
                }
                Some(b',') | None => {
                    let element = std::mem::take(&mut element);
                    let equals = element.iter().position(|byte| *byte == b'=');
                    let (key, value) = match equals {
                        Some(at) => {
                            let key = String::from_utf8_lossy(element.get(..at).unwrap_or(&[]));
                            let value = element.get(at + 1..).unwrap_or(&[]).to_vec();
                            (key.into_owned(), value)
                        }
                        None if is_first => (first.to_owned(), element),
                        // "server" means "server=on", "nowait" "wait=off".
                        None => {
                            let key = String::from_utf8_lossy(&element).into_owned();
                            match key.strip_prefix("no") {
                                Some(key) => (key.to_owned(), b"off".to_vec()),
                                None => (key, b"on".to_vec()),
                            }
                        }
                    };
                    options.insert(key, value);
                    is_first = false;
                    if byte.is_none() {
                        return Self(options);
                    }
                }
                Some(byte) => element.push(byte),
            }
        }
    }

    /// The scalars of a JSON object; of nested ones (a chardev's backend) the
    /// names count, as QEMU's flat form has them.
    fn parse_json(value: &[u8]) -> Option<Self> {
        let json: serde_json::Value = serde_json::from_slice(value).ok()?;
        let mut options = HashMap::new();
        let mut open = vec![json.as_object()?];
        while let Some(object) = open.pop() {
            for (key, value) in object {
                let text = match value {
                    serde_json::Value::String(text) => text.clone(),
                    serde_json::Value::Bool(true) => "on".to_owned(),
                    serde_json::Value::Bool(false) => "off".to_owned(),
                    serde_json::Value::Number(number) => number.to_string(),
                    serde_json::Value::Object(inner) => {
                        open.push(inner);
                        continue;
                    }
                    serde_json::Value::Null | serde_json::Value::Array(_) => continue,
                };
                options.insert(key.clone(), text.into_bytes());
            }
        }
        // {"id":…,"backend":{"type":"socket","data":{…}}}
        if let Some(kind) = json.pointer("/backend/type").and_then(|kind| kind.as_str()) {
            options.insert("backend".to_owned(), kind.as_bytes().to_vec());
        }
        Some(Self(options))
    }

    fn get(&self, key: &str) -> Option<&[u8]> {
        self.0.get(key).map(Vec::as_slice)
    }

    fn text(&self, key: &str) -> Option<String> {
        self.get(key)
            .map(|value| String::from_utf8_lossy(value).into_owned())
    }
}

/// A size as QEMU takes it: a decimal number, maybe with a fraction, or a
/// hexadecimal one, and a suffix B, K, M, G, T, P or E. Without a suffix it
/// counts `unit` bytes.
fn parse_size(text: &str, unit: u64) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).ok()?.checked_mul(unit);
    }
    let (number, unit) = match text.char_indices().next_back()? {
        (_, digit) if digit.is_ascii_digit() => (text, unit),
        (at, suffix) => {
            let shift = match suffix.to_ascii_uppercase() {
                'B' => 0,
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                'P' => 50,
                'E' => 60,
                _ => return None,
            };
            (text.get(..at)?, 1_u64 << shift)
        }
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().ok()?;
    let mut size = u128::from(whole) * u128::from(unit);
    if !fraction.is_empty() {
        let digits = fraction.get(..fraction.len().min(18))?;
        let numerator: u64 = digits.parse().ok()?;
        let denominator = 10_u128.pow(u32::try_from(digits.len()).ok()?);
        size += u128::from(numerator) * u128::from(unit) / denominator;
    }
    u64::try_from(size).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(arguments: &[&str]) -> CommandLine {
        let arguments: Vec<Vec<u8>> = std::iter::once(&"qemu-system-x86_64")
            .chain(arguments)
            .map(|argument| argument.as_bytes().to_vec())
            .collect();
        CommandLine::parse(&arguments)
    }

    #[test]
    fn no_option_at_all() {
        let line = parse(&[]);
        assert_eq!(line.machine_type(), Some(Machine::I440fx));
        assert_eq!(
            line.main_blocks(),
            Some(vec![("pc.ram".to_owned(), 128 << 20)])
        );
    }

    #[test]
    fn sizes_of_ram() {
        let size = |value| parse(&["-m", value]).ram_size;
        assert_eq!(size("512"), Some(512 << 20));
        assert_eq!(size("512M"), Some(512 << 20));
        assert_eq!(size("1.5G"), Some(1536 << 20));
        assert_eq!(size("2g,slots=2,maxmem=4G"), Some(2 << 30));
        assert_eq!(size("size=1048576k"), Some(1 << 30));
        assert_eq!(size("size=0x200"), Some(512 << 20));
        assert_eq!(size("x"), None);
        assert_eq!(size("99999999999999999999E"), None);
        assert_eq!(parse(&["-M", "q35,memory.size=1G"]).ram_size, Some(1 << 30));
    }

    #[test]
    fn a_value_that_looks_like_an_option_is_no_option() {
        let line = parse(&["-append", "-m", "-S", "-m", "256", "-name", "x"]);
        assert_eq!(line.ram_size, Some(256 << 20));
        assert_eq!(line.name.as_deref(), Some("x"));
    }

    #[test]
    fn names_may_hold_commas() {
        let line = parse(&["-name", "a,,b,debug-threads=on"]);
        assert_eq!(line.name.as_deref(), Some("a,b"));
    }

    #[test]
    fn sockets_of_the_gdbstub() {
        let gdb = |arguments: &[&str]| parse(arguments).gdb;
        let path = |path: &str| Some(MonitorSocket::Path(path.into()));
        assert_eq!(
            gdb(&["-gdb", "unix:/run/g,server=on,wait=off"]),
            path("/run/g")
        );
        let chardev = "socket,id=x,path=/run/g,server=on,wait=off";
        assert_eq!(
            gdb(&["-chardev", chardev, "-gdb", "chardev:x"]),
            path("/run/g")
        );
        assert_eq!(gdb(&["-gdb", "tcp::1234"]), None);
    }

    /// The form of libvirt 9 (Debian 12) for a guest with one NUMA node.
    #[test]
    fn a_libvirt_command_line() {
        let line = parse(&[
            "-name",
            "guest=web1,debug-threads=on",
            "-S",
            "-object",
            r#"{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/x"}"#,
            "-machine",
            "pc-q35-7.2,usb=off,vmport=off,dump-guest-core=off,memory-backend=pc.ram",
            "-accel",
            "kvm",
            "-m",
            "2048",
            "-object",
            r#"{"qom-type":"memory-backend-ram","id":"pc.ram","size":2147483648}"#,
            "-overcommit",
            "mem-lock=off",
            "-uuid",
            "3d9a2c7e-1111-2222-3333-444455556666",
            "-no-user-config",
            "-nodefaults",
            "-chardev",
            "socket,id=charmonitor,fd=36,server=on,wait=off",
            "-mon",
            "chardev=charmonitor,id=monitor,mode=control",
        ]);
        assert_eq!(line.name.as_deref(), Some("web1"));
        assert_eq!(line.machine_type(), Some(Machine::Q35));
        assert_eq!(
            line.main_blocks(),
            Some(vec![("pc.ram".to_owned(), 2 << 30)])
        );
        assert_eq!(line.monitors, [MonitorSocket::Descriptor(36)]);
        assert_eq!(
            line.uuid.as_deref(),
            Some("3d9a2c7e-1111-2222-3333-444455556666")
        );
    }

    #[test]
    fn numa_nodes_are_main_ram_in_their_order() {
        let line = parse(&[
            "-m",
            "1G",
            "-object",
            "memory-backend-ram,id=a,size=512M",
            "-object",
            "memory-backend-memfd,id=b,size=512M",
            "-numa",
            "node,nodeid=1,memdev=a",
            "-numa",
            "node,nodeid=0,memdev=b",
        ]);
        assert_eq!(
            line.main_blocks(),
            Some(vec![
                ("b".to_owned(), 512 << 20),
                ("a".to_owned(), 512 << 20)
            ])
        );
        assert!(line.backend("b").expect("a backend").share);
    }

    #[test]
    fn monitors() {
        let path = |path: &str| MonitorSocket::Path(path.into());
        let monitors = |arguments: &[&str]| parse(arguments).monitors;
        assert_eq!(
            monitors(&["-qmp", "unix:/run/a,,b,server,nowait"]),
            [path("/run/a,b")]
        );
        assert_eq!(monitors(&["-qmp", "tcp:localhost:4444"]), []);
        assert_eq!(
            monitors(&[
                "-mon",
                "chardev=c,mode=control",
                "-chardev",
                "socket,id=c,path=s,server=on"
            ]),
            [path("s")]
        );
        assert_eq!(
            monitors(&["-mon", "c", "-chardev", "socket,id=c,path=s"]),
            [],
            "a monitor for people"
        );
        let json = r#"{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/s"}},"server":true}}}"#;
        assert_eq!(
            monitors(&["-chardev", json, "-qmp", "chardev:c"]),
            [path("/s")]
        );
    }

    #[test]
    fn a_config_file_leaves_things_unknown() {
        let line = parse(&["-readconfig", "x"]);
        assert_eq!(line.machine_type(), None);
        assert_eq!(line.main_blocks(), None);
    }

    proptest! {
        #[test]
        fn any_arguments_are_understood_or_skipped(
            arguments in prop::collection::vec(
                prop_oneof![
                    Just(b"-m".to_vec()), Just(b"-object".to_vec()), Just(b"-chardev".to_vec()),
                    Just(b"-numa".to_vec()), Just(b"-machine".to_vec()), Just(b"-mon".to_vec()),
                    prop::collection::vec(any::<u8>(), 0..40),
                    "[a-z=,{}\":.0-9KMG]{0,40}".prop_map(String::into_bytes),
                ],
                0..12,
            ),
        ) {
            let line = CommandLine::parse(&arguments);
            let _ = (line.main_blocks(), line.machine_type());
        }
    }
}
