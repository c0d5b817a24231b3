//! Running QEMUs, started in the ways users and management tools start them,
//! found and read from outside, and compared with what QEMU's own monitor says
//! the memory holds.

mod machine;

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use machine::Machine;
use secmon_memory::{PhysicalAddress, PhysicalReadError, Volatility};
use secmon_platform::layout::{self, RamLayout};
use secmon_platform::qemu::{
    Access, LayoutSource, QemuError, QemuOptions, QemuTarget, QmpClient, QmpUse, Reach, Selector,
    SkipReason, discover, open,
};
use secmon_platform::target::{OpenOptions, Target, targets};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIMEOUT: Duration = Duration::from_secs(20);

fn open_pid(machine: &Machine) -> QemuTarget {
    open(&Selector::Pid(machine.pid()), &QemuOptions::default()).expect("a target")
}

fn read(target: &QemuTarget, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    target
        .memory
        .read(PhysicalAddress::new(address), &mut bytes)
        .unwrap_or_else(|error| panic!("{address:#x}: {error} ({target:?})"));
    bytes
}

/// Compares runs of pages all over RAM with the monitor's view, and the whole
/// layout with `info mtree -f`. The guest is stopped.
fn compare(machine: &mut Machine, target: &QemuTarget) {
    let expected = RamLayout::from_mtree(&machine.command("info mtree -f")).expect("a layout");
    let regions: Vec<_> = expected.regions().collect();
    assert_eq!(target.memory.regions(), regions, "{target:?}");
    assert_eq!(target.memory.volatility(), Volatility::Live);
    // The window of video memory shows other bytes than RAM's.
    let mut runs = vec![(0, 0xa_0000), (0xc_0000, 15 * MIB + 0x4_0000)];
    for region in &regions {
        let (start, end) = (region.start.as_u64(), region.end().as_u64());
        runs.push((end - MIB, MIB));
        runs.push((start.max(16 * MIB), MIB));
    }
    let mut differing = Vec::new();
    let mut used = 0;
    for (start, length) in runs {
        let truth = machine.physical(start, length);
        let bytes = read(target, start, length as usize);
        for (index, (truth, bytes)) in truth.chunks(4096).zip(bytes.chunks(4096)).enumerate() {
            if truth != bytes {
                differing.push(start + index as u64 * 4096);
            }
            used += u32::from(truth.iter().any(|byte| *byte != 0));
        }
    }
    assert_eq!(differing, [0_u64; 0], "pages that differ");
    assert!(used > 20, "only {used} pages hold anything");
    // Holes are holes.
    let last = regions.last().expect("a region").end();
    assert_eq!(
        target.memory.read(last, &mut [0]),
        Err(PhysicalReadError::Hole { address: last })
    );
}

/// Arguments that put a known value into the guest's memory.
fn value_at(address: u64, value: u64) -> [String; 2] {
    let argument = format!("loader,addr={address:#x},data={value:#x},data-len=8");
    ["-device".to_owned(), argument]
}

#[test]
fn layouts_are_those_of_qemu() {
    let sizes = [
        512, 1024, 2048, 2815, 2816, 3071, 3072, 3583, 3584, 4096, 6144,
    ];
    for name in ["q35", "pc", "microvm"] {
        let machine_type = layout::Machine::from_name(name).expect("a machine");
        for size in sizes {
            let size_argument = format!("{size}M");
            let mut machine = Machine::start(&["-S", "-machine", name, "-m", &size_argument]);
            let reported = RamLayout::from_mtree(&machine.command("info mtree -f"));
            let computed = RamLayout::for_machine(machine_type, size * MIB).expect("a layout");
            assert_eq!(reported, Ok(computed), "{name} {size}");
        }
        if name == "microvm" {
            continue; // it has no max-ram-below-4g
        }
        for (size, limit) in [
            (2048, 1024),
            (3072, 2048),
            (3072, 4096),
            (3584, 3712),
            (1024, 1024),
            (4096, 3200),
        ] {
            let size_argument = format!("{size}M");
            let name_argument = format!("{name},max-ram-below-4g={limit}M");
            let mut machine =
                Machine::start(&["-S", "-machine", &name_argument, "-m", &size_argument]);
            let reported = RamLayout::from_mtree(&machine.command("info mtree -f"));
            let limit_bytes = Some(limit * MIB);
            let computed = RamLayout::for_machine_with(machine_type, size * MIB, limit_bytes);
            let computed = computed.expect("a layout");
            assert_eq!(reported, Ok(computed), "{name} {size} limit {limit}");
        }
    }
}

#[test]
fn a_guest_started_with_no_special_option_is_read() {
    for name in ["q35", "pc"] {
        for size in [512, 3072, 6144] {
            // The end of RAM where that lies above 4 GiB; the firmware has its
            // tables at the end of what lies below.
            let last = match (name, size) {
                ("q35", 3072..) => 4 * GIB + size * MIB - 2 * GIB - 8,
                ("pc", 6144) => 4 * GIB + size * MIB - 3 * GIB - 8,
                _ => size * MIB - 16 * MIB,
            };
            let mut arguments = vec!["-m".to_owned(), size.to_string()];
            arguments.extend(["-machine".to_owned(), name.to_owned()]);
            arguments.extend(value_at(last, 0x1122_3344_5566_7788));
            arguments.extend(value_at(0x123_4560, 0xcafe_f00d_dead_beef));
            let mut machine = Machine::start(&arguments);
            machine.run_firmware();
            let target = open_pid(&machine);
            assert!(matches!(target.layout_source, LayoutSource::Machine(_)));
            assert!(matches!(target.access, Access::ProcessMemory { .. }));
            assert_eq!(target.notes, [""; 0], "nothing is in doubt");
            assert_eq!(target.memory.size(), size * MIB);
            let value = |address| {
                let bytes = read(&target, address, 8);
                u64::from_le_bytes(bytes.try_into().expect("8 bytes"))
            };
            assert_eq!(value(0x123_4560), 0xcafe_f00d_dead_beef);
            assert_eq!(value(last), 0x1122_3344_5566_7788);
            compare(&mut machine, &target);
        }
    }
}

#[test]
fn no_argument_at_all() {
    let mut machine = Machine::start::<&str>(&[]);
    machine.run_firmware();
    let target = open_pid(&machine);
    assert_eq!(target.memory.size(), 128 * MIB);
    compare(&mut machine, &target);
}

#[test]
fn qmp_tells_the_layout() {
    for (name, size) in [
        ("q35", "3G"),
        ("pc", "6G"),
        ("q35,max-ram-below-4g=1G", "2G"),
    ] {
        let arguments = ["-machine", name, "-m", size, "-qmp", "unix:q,server,nowait"];
        let mut machine = Machine::start(&arguments);
        machine.run_firmware();
        let target = open_pid(&machine);
        assert_eq!(target.layout_source, LayoutSource::Qmp);
        assert_eq!(target.notes, [""; 0]);
        compare(&mut machine, &target);
        // The connection was given back.
        let path = machine.path("q");
        let mut client = QmpClient::connect(&path, TIMEOUT).expect("QMP is free");
        assert!(!client.status().expect("a state").running);
        // Somebody else has it now.
        let target = open_pid(&machine);
        assert!(matches!(target.layout_source, LayoutSource::Machine(_)));
        assert!(target.notes[0].contains("in use"), "{target:?}");
        compare(&mut machine, &target);
        let options = QemuOptions {
            qmp: QmpUse::Socket(path.clone()),
            timeout: Duration::from_millis(300),
            ..QemuOptions::default()
        };
        let refused = open(&Selector::Pid(machine.pid()), &options);
        assert!(matches!(refused, Err(QemuError::Qmp(_))), "{refused:?}");
    }
}

#[test]
fn a_hung_qemu_does_not_hang_the_reader() {
    let mut machine = Machine::start(&["-m", "256", "-qmp", "unix:q,server,nowait"]);
    machine.run_firmware();
    let pid = rustix::process::Pid::from_raw(machine.pid() as i32).expect("a process");
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stopped");
    let options = QemuOptions {
        timeout: Duration::from_millis(500),
        ..QemuOptions::default()
    };
    let started = Instant::now();
    let target = open(&Selector::Pid(machine.pid()), &options).expect("a target");
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(matches!(target.layout_source, LayoutSource::Machine(_)));
    assert!(target.notes[0].contains("QMP"), "{target:?}");
    assert_eq!(target.memory.size(), 256 * MIB);
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).expect("continued");
    compare(&mut machine, &target);
}

#[test]
fn shared_ram_is_mapped_and_live() {
    let backends = [
        "memory-backend-file,id=m,size=3G,mem-path=ram,share=on",
        "memory-backend-memfd,id=m,size=3G",
        r#"{"qom-type":"memory-backend-file","id":"m","size":3221225472,"mem-path":"ram","share":true}"#,
    ];
    for backend in backends {
        let machine_argument = "q35,memory-backend=m";
        let arguments = ["-m", "3G", "-object", backend, "-machine", machine_argument];
        let mut machine = Machine::start(&arguments);
        machine.run_firmware();
        let target = open_pid(&machine);
        assert!(matches!(target.access, Access::MappedFile(_)), "{target:?}");
        assert!(target.memory.mapped().is_some());
        assert_eq!(target.notes, [""; 0]);
        compare(&mut machine, &target);
        // A clock of the firmware ticks while the guest runs.
        let ticks = || read(&target, 0x46c, 4);
        let before = ticks();
        machine.command("cont");
        let deadline = Instant::now() + TIMEOUT;
        while ticks() == before {
            assert!(Instant::now() < deadline, "memory does not change");
            std::thread::sleep(Duration::from_millis(20));
        }
        machine.command("stop");
        let last = read(&target, 0, 0x1000);
        machine.kill();
        assert!(!target.is_alive());
        assert_eq!(read(&target, 0, 0x1000), last, "the last state stays");
    }
}

#[test]
fn ram_that_is_not_shared_is_read_out_of_the_process() {
    let cases: [&[&str]; 4] = [
        &[
            "-object",
            "memory-backend-file,id=m,size=1G,mem-path=ram,share=off",
        ],
        &["-object", "memory-backend-memfd,id=m,size=1G,share=off"],
        &["-object", "memory-backend-ram,id=m,size=1G"],
        &["-object", "memory-backend-ram,id=m,size=1G,share=on"],
    ];
    for case in cases {
        let mut arguments = vec!["-m", "1G", "-machine", "pc,memory-backend=m"];
        arguments.extend(case);
        let mut machine = Machine::start(&arguments);
        machine.run_firmware();
        let target = open_pid(&machine);
        let expected = matches!(target.access, Access::ProcessMemory { .. });
        // Shared anonymous memory is a file of the kernel's own, without a
        // name to open.
        assert!(expected || case[1].ends_with("share=on"), "{target:?}");
        compare(&mut machine, &target);
    }
}

#[test]
fn a_mapped_file_may_be_refused() {
    let options = QemuOptions {
        map_files: false,
        ..QemuOptions::default()
    };
    let backend = "memory-backend-memfd,id=m,size=512M";
    let mut machine = Machine::start(&[
        "-m",
        "512",
        "-object",
        backend,
        "-machine",
        "memory-backend=m",
    ]);
    machine.run_firmware();
    let target = open(&Selector::Pid(machine.pid()), &options).expect("a target");
    assert!(target.memory.mapped().is_none());
    compare(&mut machine, &target);
}

/// What libvirt 9 starts, with a listening socket that QEMU inherits.
#[test]
fn a_libvirt_guest_is_found_by_its_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("monitor.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).expect("inherited");
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&listener);
    let name = format!("web1-{}", std::process::id());
    let chardev = format!("socket,id=charmonitor,fd={descriptor},server=on,wait=off");
    let mut machine = Machine::start(&[
        "-name",
        &format!("guest={name},debug-threads=on"),
        "-S",
        "-machine",
        "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram",
        "-accel",
        "tcg",
        "-m",
        "size=524288k",
        "-object",
        r#"{"qom-type":"memory-backend-ram","id":"pc.ram","size":536870912}"#,
        "-uuid",
        "3d9a2c7e-1111-2222-3333-444455556666",
        "-no-user-config",
        "-nodefaults",
        "-chardev",
        &chardev,
        "-mon",
        "chardev=charmonitor,id=monitor,mode=control",
    ]);
    drop(listener);
    machine.command("cont");
    machine.run_firmware();
    let found = discover().expect("processes");
    let found = found
        .processes
        .iter()
        .find(|process| process.id.pid == machine.pid())
        .expect("the guest is listed");
    assert_eq!(found.command_line.name.as_deref(), Some(name.as_str()));
    assert_eq!(found.reach, Reach::ProcessMemory);
    assert_eq!(found.monitors.len(), 1, "{found:?}");
    assert_eq!(found.monitors[0].path, path);
    assert!(!found.monitors[0].busy);
    let selector: Selector = name.parse().expect("a selector");
    let target = open(&selector, &QemuOptions::default()).expect("a target");
    assert_eq!(target.layout_source, LayoutSource::Qmp, "{target:?}");
    compare(&mut machine, &target);
    // libvirtd holds the connection all the time.
    let _libvirtd = QmpClient::connect(&path, TIMEOUT).expect("QMP");
    let target = open(&selector, &QemuOptions::default()).expect("a target");
    assert!(matches!(target.layout_source, LayoutSource::Machine(_)));
    assert!(target.notes[0].contains("in use"), "{target:?}");
    compare(&mut machine, &target);

    let _namesake = Machine::start(&["-S", "-m", "128", "-name", &name]);
    let ambiguous = open(&selector, &QemuOptions::default());
    assert!(
        matches!(ambiguous, Err(QemuError::Ambiguous { count: 2, .. })),
        "{ambiguous:?}"
    );
}

#[test]
fn numa_nodes_and_memory_devices() {
    let common = [
        "-m",
        "1G,slots=2,maxmem=4G",
        "-object",
        "memory-backend-ram,id=a,size=256M",
        "-object",
        "memory-backend-memfd,id=b,size=768M,share=on",
        "-numa",
        "node,memdev=a",
        "-numa",
        "node,memdev=b",
        "-object",
        "memory-backend-ram,id=d1,size=512M",
        "-device",
        "pc-dimm,id=dimm1,memdev=d1",
    ];
    let mut arguments: Vec<String> = common.map(str::to_owned).to_vec();
    arguments.extend(value_at(256 * MIB + 24, 0x1111_2222_3333_4444));
    arguments.extend(value_at(4 * GIB + 512 * MIB - 8, 0x5555_6666_7777_8888));
    let value = |target: &QemuTarget, address| {
        let bytes = read(target, address, 8);
        u64::from_le_bytes(bytes.try_into().expect("8 bytes"))
    };
    let mut without_qmp = Machine::start(&arguments);
    without_qmp.run_firmware();
    let target = open_pid(&without_qmp);
    assert_eq!(target.memory.size(), GIB, "the DIMM is a hole");
    assert!(
        target.notes.iter().any(|note| note.contains("\"d1\"")),
        "{target:?}"
    );
    assert_eq!(value(&target, 256 * MIB + 24), 0x1111_2222_3333_4444);

    arguments.extend(["-qmp".to_owned(), "unix:q,server,nowait".to_owned()]);
    let mut with_qmp = Machine::start(&arguments);
    with_qmp.run_firmware();
    let target = open_pid(&with_qmp);
    assert_eq!(target.notes, [""; 0]);
    assert_eq!(target.memory.size(), GIB + 512 * MIB);
    assert_eq!(value(&target, 256 * MIB + 24), 0x1111_2222_3333_4444);
    let in_dimm = value(&target, 4 * GIB + 512 * MIB - 8);
    assert_eq!(in_dimm, 0x5555_6666_7777_8888);
}

#[test]
fn a_stated_layout_counts() {
    let mut machine = Machine::start(&["-m", "512"]);
    machine.run_firmware();
    let options = |layout: &str| QemuOptions {
        layout: Some(layout.parse().expect("a layout")),
        ..QemuOptions::default()
    };
    let selector = Selector::Pid(machine.pid());
    let target = open(&selector, &options("0x100000000-0x100100000@0")).expect("a target");
    assert_eq!(target.layout_source, LayoutSource::Stated);
    assert_eq!(target.memory.size(), MIB);
    assert_eq!(
        read(&target, 4 * GIB + 0x400, 256),
        machine.physical(0x400, 256)
    );
    let error = open(&selector, &options("0-0x20001000@0")).expect_err("too large");
    assert!(matches!(error, QemuError::LayoutTooLarge { .. }), "{error}");
}

#[test]
fn the_end_of_qemu_is_an_error_that_says_so() {
    let mut machine = Machine::start(&["-m", "256"]);
    machine.run_firmware();
    let target = open_pid(&machine);
    assert!(target.is_alive());
    machine.kill();
    assert!(!target.is_alive());
    let error = target
        .memory
        .read(PhysicalAddress::new(0x1000), &mut [0; 64])
        .expect_err("nothing there");
    let expected = format!("QEMU process {} has ended", machine.pid());
    assert!(error.to_string().contains(&expected), "{error}");
    let again = open(&Selector::Pid(machine.pid()), &QemuOptions::default());
    assert!(
        matches!(again, Err(QemuError::NotFound { .. })),
        "{again:?}"
    );
}

#[test]
fn what_is_no_target_is_told_apart() {
    let own = open(&Selector::Pid(std::process::id()), &QemuOptions::default());
    assert!(matches!(own, Err(QemuError::NotATarget { .. })), "{own:?}");
    let nobody = open(
        &Selector::Name("nobody-has-this".into()),
        &QemuOptions::default(),
    );
    assert!(matches!(nobody, Err(QemuError::NotFound { .. })));
    let probe = Machine::start(&["-S", "-machine", "none"]);
    let discovery = discover().expect("processes");
    let skipped = discovery
        .skipped
        .iter()
        .find(|skipped| skipped.pid == probe.pid())
        .expect("it is mentioned");
    assert_eq!(skipped.reason, SkipReason::NoGuest);
    let isapc = Machine::start(&["-S", "-machine", "isapc", "-m", "256"]);
    let unknown = open(&Selector::Pid(isapc.pid()), &QemuOptions::default());
    assert!(
        matches!(&unknown, Err(QemuError::UnknownMachine { machine, .. }) if machine == "isapc"),
        "{unknown:?}"
    );
    let microvm = Machine::start(&["-machine", "microvm", "-m", "4G"]);
    let target = open_pid(&microvm);
    assert_eq!(target.notes, [""; 0]);
    assert_eq!(target.memory.regions().len(), 2);
}

#[test]
fn a_file_that_is_the_ram_of_a_qemu_is_live() {
    let backend = "memory-backend-file,id=m,size=3G,mem-path=ram,share=on";
    let mut machine = Machine::start(&[
        "-m",
        "3G",
        "-object",
        backend,
        "-machine",
        "q35,memory-backend=m",
    ]);
    machine.run_firmware();
    let path = machine.path("ram");
    let target = Target::File(path.clone());
    let opened = target.open(&OpenOptions::default()).expect("a target");
    assert_eq!(opened.is_alive(), Some(true));
    assert_eq!(opened.memory.volatility(), Volatility::Live);
    assert_eq!(opened.memory.regions().len(), 2, "the machine is known");
    assert!(
        opened.notes.iter().any(|note| note.contains("live")),
        "{opened:?}"
    );
    let live = opened.qemu.expect("a process");
    compare(&mut machine, &live);
    // Without the process it is an image like any other.
    machine.kill();
    let opened = target.open(&OpenOptions::default()).expect("an image");
    assert_eq!(opened.is_alive(), None);
    assert_eq!(opened.memory.volatility(), Volatility::Static);
    assert_eq!(opened.pause, None);
}

#[test]
fn targets_are_listed_with_what_to_give() {
    let name = format!("listed-{}", std::process::id());
    let arguments = ["-S", "-m", "256", "-name", &name, "-machine", "q35"];
    let named = Machine::start(&[&arguments[..], &["-qmp", "unix:q,server,nowait"]].concat());
    let unnamed = Machine::start(&["-S", "-m", "128"]);
    let rows = targets(std::path::Path::new("/nonexistent"));
    let row = |pid| {
        let row = rows.iter().find(|row| row.pid == Some(pid));
        row.cloned().expect("a row")
    };
    let first = row(named.pid());
    assert_eq!(first.target, Some(format!("qemu:{name}")));
    assert_eq!(first.ram, Some(256 * MIB));
    assert_eq!(first.machine.as_deref(), Some("q35"));
    assert_eq!(first.access.as_deref(), Some("process memory"));
    assert_eq!(first.pause.as_deref(), Some("QMP"));
    assert_eq!(first.problem, None);
    let second = row(unnamed.pid());
    assert_eq!(second.target, Some(format!("qemu:{}", unnamed.pid())));
    assert_eq!(second.pause.as_deref(), Some("signal"));
    for row in [first, second] {
        let target: Target = row.target.expect("a target").parse().expect("a target");
        let opened = target.open(&OpenOptions::default()).expect("it opens");
        assert_eq!(opened.memory.size(), row.ram.expect("a size"));
        assert!(opened.pause.is_some());
    }
}

#[test]
fn what_the_guest_never_used_is_not_populated() {
    let cases: [&[&str]; 3] = [
        &[],
        &[
            "-object",
            "memory-backend-memfd,id=m,size=6G",
            "-machine",
            "memory-backend=m",
        ],
        &[
            "-object",
            "memory-backend-ram,id=m,size=6G,share=on",
            "-machine",
            "memory-backend=m",
        ],
    ];
    for case in cases {
        let mut arguments: Vec<String> = vec!["-m".to_owned(), "6G".to_owned()];
        arguments.extend(case.iter().map(|argument| (*argument).to_owned()));
        let marks = [0x1234_5678, 3 * GIB - 512 * MIB, 6 * GIB];
        for address in marks {
            arguments.extend(value_at(address & !7, 0x7777_7777_7777_7777));
        }
        let mut machine = Machine::start(&arguments);
        machine.run_firmware();
        let target = open_pid(&machine);
        let populated = target.memory.populated();
        let size: u64 = populated.iter().map(|region| region.length).sum();
        assert!(size < 256 * MIB, "{case:?}: {size:#x}");
        for pair in populated.windows(2) {
            assert!(pair[0].end() <= pair[1].start, "{pair:?}");
        }
        for address in marks.into_iter().chain([0x400, 0xf_fff0]) {
            let address = PhysicalAddress::new(address);
            let holds = populated.iter().any(|region| region.contains(address));
            assert!(holds, "{case:?}: {address} {populated:?}");
        }
        // What is left out is zero, in samples all over RAM.
        for address in (0..3 * GIB).step_by(37 * MIB as usize + 4096) {
            let address = PhysicalAddress::new(address);
            if !populated.iter().any(|region| region.contains(address)) {
                assert_eq!(read(&target, address.as_u64(), 4096), vec![0; 4096]);
            }
        }
    }
}
