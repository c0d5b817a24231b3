//! Boots guests and checks that they are what a test will take them for.

use anyhow::Context as _;
use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use secmon_lab::qmp::DumpFormat;
use secmon_lab::truth::{FileKind, Process};
use secmon_lab::{Acceleration, Backing, Guest, Machine, Paging, QmpAccess, Suite, Workload};

/// What a kernel can't do, by its series and the start of the message: each
/// is a fact about Debian's build of it.
const KNOWN_FAILURES: &[(&str, &str)] = &[
    // CONFIG_ANON_VMA_NAME is off.
    ("5.10", "maps-kinds: named anonymous memory"),
    ("6.1", "maps-kinds: named anonymous memory"),
    ("6.12", "maps-kinds: named anonymous memory"),
    ("7.2", "maps-kinds: named anonymous memory"),
    // UDP-Lite was removed.
    ("7.2", "sockets-udp: UDP-Lite"),
];

fn rich(suite: Suite) -> anyhow::Result<()> {
    let mut builder = Guest::builder(suite).workload(Workload::rich());
    if suite.has_five_level_paging() {
        builder = builder.paging(Paging::FiveLevel);
    }
    let guest = builder.vcpus(2).boot()?;
    let truth = guest.truth();
    let info = truth.info()?;
    let unexpected: Vec<_> = info
        .workload_failures
        .iter()
        .filter(|failure| {
            !KNOWN_FAILURES
                .iter()
                .any(|(series, known)| *series == suite.series() && failure.starts_with(known))
        })
        .collect();
    assert!(unexpected.is_empty(), "{unexpected:#?}");
    assert_eq!(info.uname[2], guest.kernel().release());
    assert!(guest.kernel().release().starts_with(suite.series()));
    let levels = if suite.has_five_level_paging() { 5 } else { 4 };
    assert_eq!(info.paging_levels, levels);
    assert_eq!(info.processors, 2);

    let processes = truth.processes()?;
    assert!(processes.len() >= 350, "{} processes", processes.len());
    let role = |name: &str| -> &Process {
        let pid = info.roles[name];
        let found = processes.iter().find(|process| process.pid == pid);
        found.unwrap_or_else(|| panic!("no process {pid} for {name}"))
    };
    assert!(role("exe-deleted").exe_deleted && role("exe-deleted-twin").exe_deleted);
    assert_eq!(
        role("exe-deleted").exe.as_ref().unwrap(),
        &"/tmp/deleted program"
    );
    assert!(!role("exe-marked").exe_deleted);
    let length: usize = role("argv-long")
        .cmdline
        .iter()
        .map(|one| one.0.len() + 1)
        .sum();
    assert!(length > 100 << 10, "{length} bytes of arguments");
    assert_eq!(role("argv-rewritten").cmdline[0], "lab: serving request 42");
    assert_eq!(role("container-overlay").namespace_pids.len(), 2);
    assert_eq!(role("container-user").uid, [100_000; 4]);
    assert_ne!(role("tty-serial").tty_number, 0);
    let states: BTreeSet<char> = processes.iter().map(|process| process.state).collect();
    for state in ['S', 'D', 'T', 't', 'Z', 'I'] {
        assert!(states.contains(&state), "no process in state {state}");
    }

    let threads = truth.threads()?;
    assert!(threads.len() > processes.len() + 30);
    let files = truth.files()?;
    // The mark of a deleted file, and names that only look like it.
    for (name, deleted) in [
        ("deleted", true),
        ("anew", true),
        ("link one", true),
        ("kept (deleted)", false),
        ("new name", false),
    ] {
        let path = format!("/tmp/files/{name}");
        let file = files.iter().find(|file| file.path == path.as_str());
        let file = file.unwrap_or_else(|| panic!("no open {path}"));
        assert_eq!(file.deleted, deleted, "{path}");
    }
    let kinds: BTreeSet<_> = files
        .iter()
        .map(|file| format!("{:?}", file.kind))
        .collect();
    for kind in [
        FileKind::Regular,
        FileKind::Directory,
        FileKind::SymbolicLink,
        FileKind::CharacterDevice,
        FileKind::BlockDevice,
        FileKind::Fifo,
        FileKind::Pipe,
        FileKind::Socket,
        FileKind::Memfd,
        FileKind::AnonymousInode,
        FileKind::Namespace,
    ] {
        assert!(kinds.contains(&format!("{kind:?}")), "no open {kind:?}");
    }

    truth.refresh_sockets()?;
    let sockets = truth.sockets()?;
    let found: BTreeSet<_> = sockets
        .iter()
        .map(|socket| {
            format!(
                "{} {}",
                socket.protocol,
                socket.state_name.as_deref().unwrap_or("-")
            )
        })
        .collect();
    for wanted in [
        "tcp LISTEN",
        "tcp ESTABLISHED",
        "tcp CLOSE_WAIT",
        "tcp FIN_WAIT2",
        "tcp TIME_WAIT",
        "tcp SYN_SENT",
        "tcp6 LISTEN",
        "tcp6 ESTABLISHED",
        "udp CLOSE",
        "udp ESTABLISHED",
        "udp6 CLOSE",
        "raw CLOSE",
        "raw6 CLOSE",
        "icmp CLOSE",
        "unix -",
        "packet -",
        "netlink -",
        "vsock LISTEN",
        "vsock ESTABLISHED",
    ] {
        assert!(found.contains(wanted), "no {wanted} among {found:?}");
    }
    assert!(sockets.iter().any(|socket| {
        socket
            .path
            .as_ref()
            .is_some_and(|path| path.0 == b"\0\0with\0nul")
    }));

    assert!(truth.maps()?.len() > 3000);
    assert!(
        truth
            .modules()?
            .iter()
            .any(|module| !module.parameters.is_empty())
    );
    assert!(
        truth
            .mounts()?
            .iter()
            .any(|mount| mount.target == "/mnt/new\nline")
    );
    assert!(
        truth
            .kmsg()?
            .iter()
            .any(|message| message.text.to_string().starts_with("Linux version"))
    );
    let bpf = truth.bpf()?;
    assert_eq!((bpf.programs.len(), bpf.maps.len()), (3, 4));
    let kinds: BTreeSet<_> = truth
        .namespaces()?
        .into_iter()
        .map(|one| one.kind)
        .collect();
    assert_eq!(kinds.len(), 8);
    let interfaces = truth.interfaces()?;
    assert!(
        interfaces
            .iter()
            .any(|one| one.name == "odd.näme-1" && one.addresses.len() >= 2)
    );
    let base = truth
        .kallsyms()?
        .iter()
        .find(|one| one.name == "_text")
        .map(|one| one.address);
    assert_eq!(base, info.text_base);

    let start = truth.read_file("/run/maps-pattern")?.to_string();
    let start = u64::from_str_radix(start.trim().trim_start_matches("0x"), 16)?;
    let page = truth.read_memory(info.roles["maps-pattern"], start + 4096, 4096)?;
    assert_eq!(page.0, [2; 4096]);
    Ok(())
}

#[test]
fn a_rich_guest_of_5_10() -> anyhow::Result<()> {
    rich(Suite::Bullseye)
}

#[test]
fn a_rich_guest_of_6_1() -> anyhow::Result<()> {
    rich(Suite::Bookworm)
}

#[test]
fn a_rich_guest_of_6_12() -> anyhow::Result<()> {
    rich(Suite::Trixie)
}

#[test]
fn a_rich_guest_of_7_2() -> anyhow::Result<()> {
    rich(Suite::Sid)
}

#[test]
fn a_busy_guest_never_rests_and_can_be_stopped() -> anyhow::Result<()> {
    let guest = Guest::builder(Suite::Bookworm).boot()?;
    let truth = guest.truth();
    let brief = || -> anyhow::Result<usize> {
        let processes = truth.processes()?;
        let names = processes.iter().map(|process| &process.comm.0);
        Ok(names.filter(|name| name.starts_with(b"brief-")).count())
    };
    // How many processes the kernel says it has made. The busy ones live for
    // milliseconds, so that a look at the list may find none.
    let forks = || -> anyhow::Result<u64> {
        let stat = truth.read_file("/proc/stat")?.to_string();
        let line = stat
            .lines()
            .find_map(|line| line.strip_prefix("processes "));
        Ok(line
            .context("/proc/stat has no line `processes`")?
            .trim()
            .parse()?)
    };
    assert_eq!(brief()?, 0);
    let before = forks()?;
    truth.resume_busy()?;
    for _ in 0..20 {
        brief()?;
    }
    let rounds = truth.pause_busy()?;
    let made = forks()? - before;
    assert!(
        rounds > 0 && made >= rounds,
        "{made} processes in {rounds} rounds"
    );
    assert_eq!(brief()?, 0);
    assert_eq!(truth.pause_busy()?, rounds);
    Ok(())
}

#[test]
fn machines_of_several_shapes() -> anyhow::Result<()> {
    let plain = Guest::builder(Suite::Bookworm)
        .machine(Machine::I440fx)
        .backing(Backing::Plain)
        .memory_mib(3584)
        .qmp(QmpAccess::None)
        .boot()?;
    assert_eq!((plain.qmp_socket(), plain.ram_file()), (None, None));
    // The i440FX keeps 3 GiB below the hole; the rest goes above 4 GiB.
    let iomem = plain.truth().info()?.iomem;
    assert!(
        iomem
            .iter()
            .any(|line| line.starts_with("100000000-11fffffff : System RAM")),
        "{iomem:#?}"
    );
    let memfd = Guest::builder(Suite::Bookworm)
        .backing(Backing::Memfd)
        .vcpus(4)
        .name("lab-memfd-test")
        .kernel_argument("nokaslr")
        .boot()?;
    assert_eq!(memfd.name(), "lab-memfd-test");
    let info = memfd.truth().info()?;
    assert_eq!(info.text_base, Some(0xffff_ffff_8100_0000));
    assert_eq!(info.processors, 4);
    let socket = memfd.qmp_socket().expect("a QMP socket");
    let mut qmp = secmon_lab::qmp::Qmp::connect(&socket)?;
    assert_eq!(qmp.status()?, "running");
    let text = 0xffff_ffff_8100_0000;
    let physical = memfd.while_stopped(|control| control.guest_physical(0, text))?;
    assert_eq!(physical, Some(0x100_0000));
    Ok(())
}

#[test]
fn five_levels_are_refused_where_the_kernel_has_none() {
    let error = Guest::builder(Suite::Bullseye)
        .paging(Paging::FiveLevel)
        .boot()
        .expect_err("5.10 is built without");
    assert!(error.to_string().contains("five-level"), "{error}");
}

#[test]
fn a_guest_that_panics_says_so_soon() {
    let error = Guest::builder(Suite::Bookworm)
        .kernel_argument("rdinit=/missing")
        .boot_timeout(Duration::from_secs(90))
        .boot()
        .expect_err("no process 1, no guest");
    let text = format!("{error:#}");
    assert!(text.contains("Kernel panic"), "{text}");
    assert!(text.contains("QEMU ended"), "{text}");
}

#[test]
fn a_guest_can_be_dumped_and_switched_off() -> anyhow::Result<()> {
    let guest = Guest::builder(Suite::Bookworm).boot()?;
    for (format, magic) in [
        (DumpFormat::Elf, &b"\x7fELF"[..]),
        (DumpFormat::ElfPaging, b"\x7fELF"),
        (DumpFormat::KdumpZlib, b"makedumpfile"),
    ] {
        let file = guest.folder().join("dump");
        guest.while_stopped(|control| control.dump(&file, format))?;
        let mut start = vec![0; magic.len()];
        std::fs::File::open(&file)?.read_exact(&mut start)?;
        assert_eq!(start, magic, "{format:?}");
        std::fs::remove_file(file)?;
    }
    guest.truth().power_off()?;
    let start = Instant::now();
    while guest.truth().info().is_ok() {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "it still answers"
        );
    }
    Ok(())
}

#[test]
fn memory_is_where_the_guest_says() -> anyhow::Result<()> {
    let guest = Guest::builder(Suite::Trixie).boot()?;
    let address = guest.truth().touch_memory(4, 0xa7)?;
    let seen = guest.truth().read_memory(1, address, 8192)?;
    assert_eq!(seen.0, [0xa7; 8192]);
    let ram = std::fs::read(guest.ram_file().expect("a RAM file"))?;
    assert_eq!(ram.len(), 512 << 20);
    let filled = ram
        .chunks_exact(4096)
        .filter(|page| page.iter().all(|byte| *byte == 0xa7));
    assert!(filled.count() >= 1000);
    assert!(Path::new("/proc").join(guest.pid().to_string()).exists());
    Ok(())
}

#[test]
fn a_kernel_that_panics_is_booted_again_and_then_an_error() {
    let error = Guest::builder(Suite::Bookworm)
        .acceleration(Acceleration::Tcg)
        .kernel_argument("rdinit=/nothing")
        .boot()
        .map(|_| ())
        .expect_err("a guest without its first process");
    let text = format!("{error:#}");
    assert!(text.contains("attempt 3"), "{text}");
    assert!(text.contains("Kernel panic"), "{text}");
}
