//! A gate over a real QEMU: each right allowed and denied, hostile monitors,
//! QEMU's end, and every process killed in every state that a target can be
//! left in.
//!
//! This test has a `main` of its own: run again with arguments it is one of
//! the gate's processes, or a monitor. `SECMON_GATE_ROUNDS` sets how often each
//! process is killed in each state, and has the distribution of stalls shown.

mod bench;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bench::{Gate, Monitor, PATIENCE, Target, Watch, kill};
use secmon_gate::protocol::{
    AddressKind, Answer, Breakpoint, BreakpointKind, Bytes, Event, LinkState, Refusal, Register,
    ReleaseReason, Request, Right, TargetState,
};

const TESTS: &[(&str, fn())] = &[
    ("rights_that_are_granted_work", rights_that_are_granted_work),
    (
        "rights_that_are_not_granted_are_denied_and_logged",
        rights_that_are_not_granted_are_denied_and_logged,
    ),
    ("leases_end_and_are_extended", leases_end_and_are_extended),
    (
        "what_others_stopped_stays_stopped",
        what_others_stopped_stays_stopped,
    ),
    ("monitors_share_a_target", monitors_share_a_target),
    (
        "hostile_monitors_end_only_their_session",
        hostile_monitors_end_only_their_session,
    ),
    (
        "a_qemu_that_ends_takes_nothing_along",
        a_qemu_that_ends_takes_nothing_along,
    ),
    ("a_log_that_is_full_refuses", a_log_that_is_full_refuses),
    ("the_processes_are_confined", the_processes_are_confined),
    (
        "a_target_runs_on_whoever_is_killed",
        a_target_runs_on_whoever_is_killed,
    ),
];

fn main() -> ExitCode {
    if let Some(code) = bench::play_part() {
        return code;
    }
    let arguments = std::env::args().skip(1);
    let only: Vec<String> = arguments
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let mut ran = 0;
    for (name, test) in TESTS {
        if !only.is_empty() && !only.iter().any(|only| name.contains(only.as_str())) {
            continue;
        }
        let started = Instant::now();
        test();
        println!("test {name} ... ok ({:.1?})", started.elapsed());
        ran += 1;
    }
    println!("{ran} tests passed");
    ExitCode::SUCCESS
}

const ALL: &str = r#""pause", "trace", "respond", "control""#;
const PAUSE: Request = Request::Pause {
    lease_milliseconds: 800,
};

fn ready(gate: &Gate, name: &str) -> Monitor {
    let mut monitor = gate.monitor(name);
    monitor.wait_for(|state| *state != TargetState::Gone);
    monitor
}

fn rights_that_are_granted_work() {
    let target = Target::start();
    let gate = Gate::start(&target, &[("all", ALL, "")]);
    let mut monitor = ready(&gate, "all");
    let status = monitor.status();
    assert_eq!(status.target, "firmware");
    assert_eq!(status.rights.len(), Right::ALL.len());
    assert_eq!(status.state, TargetState::Running);
    assert_eq!(status.memory_bytes, Some(64 << 20));
    assert!(status.gdb && status.qemu.is_some());
    let Ok(Answer::Layout(runs)) = monitor.ask(Request::Layout) else {
        panic!("no layout");
    };
    assert_eq!(
        runs.last().map(|run| run.start + run.length),
        Some(64 << 20)
    );

    // pause
    assert!(matches!(monitor.ask(PAUSE), Ok(Answer::Paused { .. })));
    assert_eq!(monitor.status().state, TargetState::Held("paused".into()));

    // trace
    let step = monitor.ask(Request::Step { vcpu: 0 });
    let Ok(Answer::Registers(stepped)) = step else {
        panic!("{step:?}");
    };
    let again = monitor.ask(Request::Registers { vcpu: 0 });
    assert_eq!(again, Ok(Answer::Registers(stepped.clone())));
    monitor.done(Request::Resume);
    assert!(matches!(
        monitor.ask(Request::Registers { vcpu: 1 }),
        Ok(Answer::Registers(_))
    ));
    assert!(matches!(
        monitor.ask(Request::Registers { vcpu: 2 }),
        Err(Refusal::Failed(_))
    ));
    let handler = target.timer_handler();
    monitor.done(Request::SetBreakpoint(handler));
    for _ in 0..5 {
        let stopped = monitor.event(|event| matches!(event, Event::Stopped { .. }));
        let Event::Stopped { registers, .. } = stopped else {
            panic!();
        };
        let linear = u64::from(registers.cs) * 16 + registers.rip;
        assert_eq!(linear, handler.address);
        monitor.done(Request::Resume);
    }
    monitor.done(Request::RemoveBreakpoint(handler));
    assert!(target.runs_within(PATIENCE));

    // respond
    monitor.done(Request::Stop);
    assert_eq!(
        monitor.status().state,
        TargetState::Stopped("paused".into())
    );
    monitor.done(Request::Start);
    assert!(target.runs_within(PATIENCE));
    let link = |state| Request::Link {
        device: "net0".to_owned(),
        state,
    };
    let devices = monitor.ask(Request::NetworkDevices);
    let Ok(Answer::NetworkDevices(devices)) = devices else {
        panic!("{devices:?}");
    };
    let [device] = devices.as_slice() else {
        panic!("{devices:?}");
    };
    for state in [LinkState::Down, LinkState::Up] {
        let device = device.clone();
        monitor.done(Request::Link { device, state });
    }
    monitor.done(link(LinkState::Down));
    monitor.done(link(LinkState::Up));
    let none = Request::Link {
        device: "net9".to_owned(),
        state: LinkState::Down,
    };
    assert!(matches!(monitor.ask(none), Err(Refusal::Failed(_))));
    let dump = Request::Dump {
        name: "memory.elf".to_owned(),
    };
    let Ok(Answer::Dumped { bytes, .. }) = monitor.ask(dump.clone()) else {
        panic!("no dump");
    };
    assert!(bytes > 64 << 20);
    assert!(
        matches!(monitor.ask(dump), Err(Refusal::Invalid(_))),
        "twice"
    );
    assert!(target.runs_within(PATIENCE));

    // control
    let write = |bytes: &[u8]| Request::WriteMemory {
        vcpu: 0,
        kind: AddressKind::Physical,
        address: 0x500,
        bytes: Bytes(bytes.to_vec()),
    };
    monitor.done(write(b"secmon"));
    let read = Request::ReadMemory {
        vcpu: 0,
        kind: AddressKind::Physical,
        address: 0x500,
        length: 6,
    };
    assert_eq!(
        monitor.ask(read),
        Ok(Answer::Memory(Bytes(b"secmon".to_vec())))
    );
    monitor.ask(PAUSE).expect("granted");
    monitor.done(Request::WriteRegister {
        vcpu: 1,
        register: Register::Rsi,
        value: 0x1234_5678,
    });
    let Ok(Answer::Registers(registers)) = monitor.ask(Request::Registers { vcpu: 1 }) else {
        panic!("no registers");
    };
    assert_eq!(registers.rsi, 0x1234_5678);
    // As one, where the vCPU stands and nowhere else.
    let alter = |at: u64| Request::Alter {
        vcpu: 1,
        at,
        memory: vec![(0x510, Bytes(b"one".to_vec()))],
        registers: vec![(Register::Rsi, 1), (Register::Rdi, 2)],
    };
    let elsewhere = monitor.ask(alter(registers.rip ^ 1));
    assert!(
        matches!(elsewhere, Err(Refusal::Failed(_))),
        "{elsewhere:?}"
    );
    monitor.ask(PAUSE).expect("granted");
    monitor.done(alter(registers.rip));
    let altered = monitor.ask(Request::Registers { vcpu: 1 });
    let Ok(Answer::Registers(altered)) = altered else {
        panic!("{altered:?}");
    };
    assert_eq!((altered.rsi, altered.rdi), (1, 2));
    let mut written = [0; 3];
    use std::os::unix::fs::FileExt as _;
    target
        .ram()
        .read_exact_at(&mut written, 0x510)
        .expect("RAM");
    assert_eq!(&written, b"one");
    monitor.done(Request::Resume);
    assert_eq!(monitor.ask(alter(registers.rip)), Err(Refusal::NotHeld));
    assert!(target.runs_within(PATIENCE));

    monitor.done(Request::Reset);
    monitor.event(|event| *event == Event::TargetReset);
    monitor.done(Request::Quit);
    monitor.event(|event| *event == Event::TargetGone);
    let report = secmon_gate::log::verify(&gate.path("log/log"), None).expect("a log");
    assert_eq!(report.faults, []);
    assert!(gate.log().contains("\"write_memory\""));
}

fn rights_that_are_not_granted_are_denied_and_logged() {
    let target = Target::start();
    let monitors = [
        ("observer", "", ""),
        ("pauser", "\"pause\"", ""),
        ("tracer", "\"trace\"", ""),
        ("responder", "\"respond\"", ""),
        ("controller", "\"control\"", ""),
    ];
    let gate = Gate::start(&target, &monitors);
    let breakpoint = target.timer_handler();
    let dump = || Request::Dump {
        name: "x".to_owned(),
    };
    let link = || Request::Link {
        device: "net0".to_owned(),
        state: LinkState::Down,
    };
    let every = [
        (Right::Pause, PAUSE),
        (Right::Trace, Request::Registers { vcpu: 0 }),
        (
            Right::Trace,
            Request::ReadMemory {
                vcpu: 0,
                kind: AddressKind::Virtual,
                address: 0,
                length: 1,
            },
        ),
        (Right::Trace, Request::SetBreakpoint(breakpoint)),
        (Right::Trace, Request::RemoveBreakpoint(breakpoint)),
        (Right::Trace, Request::Step { vcpu: 0 }),
        (Right::Respond, Request::Stop),
        (Right::Respond, Request::Start),
        (Right::Respond, Request::NetworkDevices),
        (Right::Respond, link()),
        (Right::Respond, dump()),
        (Right::Respond, Request::Reset),
        (Right::Respond, Request::Quit),
        (
            Right::Control,
            Request::WriteRegister {
                vcpu: 0,
                register: Register::Rip,
                value: 0,
            },
        ),
        (
            Right::Control,
            Request::WriteMemory {
                vcpu: 0,
                kind: AddressKind::Physical,
                address: 0x1000,
                bytes: Bytes(vec![0; 64]),
            },
        ),
        (
            Right::Control,
            Request::Alter {
                vcpu: 0,
                at: 0,
                memory: Vec::new(),
                registers: vec![(Register::Rip, 0)],
            },
        ),
    ];
    let mut denied = 0;
    for (name, rights, _) in monitors {
        let mut monitor = ready(&gate, name);
        for (right, request) in &every {
            if rights.contains(right.name()) {
                continue;
            }
            let answer = monitor.ask(request.clone());
            assert_eq!(answer, Err(Refusal::Denied(*right)), "{name}: {request:?}");
            denied += 1;
        }
        let extend = Request::Extend {
            lease_milliseconds: 500,
        };
        for own in [Request::Resume, extend] {
            assert_eq!(monitor.ask(own), Err(Refusal::NotHeld));
        }
    }
    assert!(target.runs_within(PATIENCE));
    let log = gate.log();
    assert_eq!(log.matches("\"outcome\":\"denied\"").count(), denied);
    assert!(!gate.path("dumps/x").exists());
}

fn leases_end_and_are_extended() {
    let target = Target::start();
    let limits =
        "stops_per_second = 20\nlongest_stop_milliseconds = 1500\nrequests_per_second = 200";
    let gate = Gate::start(&target, &[("all", ALL, limits)]);
    let mut monitor = ready(&gate, "all");
    let pause = |lease_milliseconds| Request::Pause { lease_milliseconds };
    let paused = monitor.ask(pause(100));
    assert_eq!(
        paused,
        Ok(Answer::Paused {
            lease_milliseconds: 100
        })
    );
    let ended = Event::Released(ReleaseReason::LeaseEnded);
    monitor.event(|event| *event == ended);
    assert!(target.runs_within(PATIENCE));

    // The grant's limit cuts the lease, extensions add up to the longest stop.
    let paused = monitor.ask(pause(60_000));
    assert_eq!(
        paused,
        Ok(Answer::Paused {
            lease_milliseconds: 500
        })
    );
    let mut reason = None;
    while reason.is_none() {
        let event = monitor.0.event(Duration::from_millis(100)).expect("open");
        match event {
            Some(Event::Released(why)) => reason = Some(why),
            _ => drop(monitor.ask(Request::Extend {
                lease_milliseconds: 500,
            })),
        }
    }
    // On a slow machine the extension may come too late.
    assert!(matches!(
        reason,
        Some(ReleaseReason::LongestStop | ReleaseReason::LeaseEnded)
    ));
    let _ = monitor.ask(Request::Resume);
    assert!(target.runs_within(PATIENCE));

    // A breakpoint ends with the monitor's silence.
    let far = Breakpoint {
        address: 0xdead_0000,
        kind: BreakpointKind::Execute,
        length: 1,
    };
    monitor.done(Request::SetBreakpoint(far));
    let deadline = Instant::now() + PATIENCE;
    let silence = Event::Released(ReleaseReason::Silence);
    while monitor.0.event(Duration::from_millis(100)).expect("open") != Some(silence.clone()) {
        assert!(Instant::now() < deadline, "no release");
    }
    let gone = monitor.ask(Request::RemoveBreakpoint(far));
    assert!(matches!(gone, Err(Refusal::Invalid(_))), "{gone:?}");

    // Stops and requests are limited.
    let asked = (0..60).map(|_| monitor.ask(Request::Registers { vcpu: 0 }));
    let limited = asked.filter(|answer| matches!(answer, Err(Refusal::Limited { .. })));
    assert!(limited.count() > 0);
    let started = Instant::now();
    let asked = (0..2000).map(|_| monitor.ask(Request::Heartbeat));
    let limited = asked.filter(|answer| matches!(answer, Err(Refusal::Limited { .. })));
    let limited = limited.count();
    let allowed = 200.0 * (1.0 + started.elapsed().as_secs_f64()) + 2.0;
    assert!((2000 - limited) as f64 <= allowed, "{limited}");
    assert!(target.runs_within(PATIENCE));
}

fn what_others_stopped_stays_stopped() {
    let target = Target::start();
    let mut operator = target.operator();
    operator.stop().expect("stopped");
    // The gate connects, acts and ends without letting it run.
    let mut gate = Gate::start(&target, &[("all", ALL, "")]);
    let mut monitor = ready(&gate, "all");
    let stopped = TargetState::Stopped("paused".into());
    assert_eq!(monitor.status().state, stopped);
    assert!(monitor.ask(Request::Registers { vcpu: 0 }).is_ok());
    monitor.ask(PAUSE).expect("granted");
    monitor.done(Request::Resume);
    assert_eq!(monitor.status().state, stopped);
    monitor.ask(PAUSE).expect("granted");
    gate.kill("play-gate");
    let mut monitor = ready(&gate, "all");
    assert_eq!(monitor.status().state, stopped);
    monitor.ask(PAUSE).expect("granted");
    gate.kill("play-supervisor");
    let deadline = Instant::now() + PATIENCE;
    while std::os::unix::net::UnixStream::connect(gate.path("socket")).is_ok() {
        assert!(Instant::now() < deadline, "the gate still runs");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!operator.status().expect("a state").running);
    operator.resume().expect("running");
    assert!(target.runs_within(PATIENCE));

    // What somebody else lets run is not held any more.
    let gate = Gate::start(&target, &[("all", ALL, "")]);
    let mut monitor = ready(&gate, "all");
    monitor.ask(PAUSE).expect("granted");
    operator.resume().expect("running");
    monitor.event(|event| matches!(event, Event::Released(_)));
    assert!(target.runs_within(PATIENCE));
}

fn monitors_share_a_target() {
    let target = Target::start();
    let gate = Gate::start(&target, &[("a", ALL, ""), ("b", ALL, "")]);
    let (mut a, mut b) = (ready(&gate, "a"), ready(&gate, "b"));
    a.ask(PAUSE).expect("granted");
    b.ask(PAUSE).expect("granted");
    a.done(Request::Resume);
    assert_eq!(b.status().state, TargetState::Held("paused".into()));
    assert_eq!(a.ask(Request::Resume), Err(Refusal::NotHeld));
    b.done(Request::Resume);
    assert!(target.runs_within(PATIENCE));
    let far = Breakpoint {
        address: 0xdead_0000,
        kind: BreakpointKind::Write,
        length: 8,
    };
    a.done(Request::SetBreakpoint(far));
    let busy = b.ask(Request::SetBreakpoint(far));
    assert!(matches!(busy, Err(Refusal::Busy(_))), "{busy:?}");
    // The end of a's session frees it for b.
    drop(a);
    let deadline = Instant::now() + PATIENCE;
    while b.ask(Request::SetBreakpoint(far)).is_err() {
        assert!(Instant::now() < deadline, "still busy");
        std::thread::sleep(Duration::from_millis(20));
    }
    // A second session of the same monitor takes the place of the first.
    let mut again = ready(&gate, "b");
    assert!(b.0.ask(Request::Heartbeat, PATIENCE).is_err());
    again.done(Request::Heartbeat);
}

fn hostile_monitors_end_only_their_session() {
    let target = Target::start();
    let gate = Gate::start(&target, &[("good", ALL, ""), ("stranger", "", "")]);
    let mut good = ready(&gate, "good");
    let before = gate.pid("play-gate");
    let mut stranger = gate.connect().expect("a connection");
    stranger.write_all(&[0x55; 70_000]).expect("sent");
    let mut huge = gate.connect().expect("a connection");
    huge.write_all(&[0xff; 100]).expect("sent");
    // Half open, more than there is room for.
    let _half_open: Vec<_> = (0..40)
        .filter_map(|_| {
            std::thread::sleep(Duration::from_millis(5));
            gate.connect().ok()
        })
        .collect();
    good.done(Request::Heartbeat);
    // An unknown key.
    let foreign = Gate::start(&target, &[("good", ALL, "")]);
    foreign.monitor_of_other(&gate, "good");
    good.done(Request::Heartbeat);
    // A flood within a session, answers not read.
    let mut silent = gate.raw_session("stranger");
    let flood = secmon_gate::protocol::Query {
        id: 1,
        request: Request::Status,
    };
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        let deadline = Some(Instant::now() + Duration::from_secs(5));
        if silent.send(&flood, deadline).is_err() {
            break;
        }
    }
    good.0.ask(Request::Heartbeat, PATIENCE).expect("served");
    // Messages that are no requests, and one that is too long.
    for message in [vec![0xff; 64], vec![0; 100_000]] {
        let mut session = gate.raw_session("stranger");
        let _ = session.send(&message, Some(Instant::now() + PATIENCE));
        let deadline = Some(Instant::now() + PATIENCE);
        let answer = session.receive::<secmon_gate::protocol::Message>(deadline);
        assert!(answer.is_err(), "{answer:?}");
    }
    good.done(Request::Heartbeat);
    assert_eq!(
        gate.pid("play-gate"),
        before,
        "the gate was not started again"
    );
    assert!(target.runs_within(PATIENCE));
    drop((stranger.read(&mut [0]), huge));
}

fn a_qemu_that_ends_takes_nothing_along() {
    let mut target = Target::start();
    let gate = Gate::start(&target, &[("all", ALL, "")]);
    let mut monitor = ready(&gate, "all");
    let before = gate.pid("play-gate");
    monitor.ask(PAUSE).expect("granted");
    target.kill();
    monitor.event(|event| *event == Event::TargetGone);
    assert_eq!(monitor.status().state, TargetState::Gone);
    assert_eq!(monitor.ask(PAUSE), Err(Refusal::TargetGone));
    target.restart();
    monitor.event(|event| *event == Event::TargetHere);
    assert!(monitor.ask(PAUSE).is_ok());
    monitor.done(Request::Resume);
    assert!(target.runs_within(PATIENCE));
    assert_eq!(gate.pid("play-gate"), before);
}

fn a_log_that_is_full_refuses() {
    let target = Target::start();
    let mut gate = Gate::start(&target, &[("all", ALL, "")]);
    gate.supervisor.kill().expect("killed");
    let _ = gate.supervisor.wait();
    // The log's size is bounded by the host for this gate: a full disk.
    gate.supervisor = gate.run_with_file_limit(&gate.configuration(&target), 4096);
    let mut monitor = ready(&gate, "all");
    let mut refused = None;
    for _ in 0..100 {
        match monitor.ask(Request::Registers { vcpu: 0 }) {
            Ok(_) => {}
            Err(refusal) => {
                refused = Some(refusal);
                break;
            }
        }
    }
    assert!(matches!(refused, Some(Refusal::NoLog(_))), "{refused:?}");
    let refused = monitor.ask(PAUSE);
    assert!(matches!(refused, Err(Refusal::NoLog(_))), "{refused:?}");
    assert_eq!(monitor.status().state, TargetState::Running);
    let report = secmon_gate::log::verify(&gate.path("log/log"), None).expect("a log");
    assert_eq!(
        (report.faults.as_slice(), report.torn_tail),
        (&[][..], None)
    );
}

fn the_processes_are_confined() {
    let target = Target::start();
    let gate = Gate::start(&target, &[("all", ALL, "")]);
    let _monitor = ready(&gate, "all");
    for part in ["play-gate", "play-keeper"] {
        let pid = gate.pid(part).expect("it runs");
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("readable");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.map(str::trim).expect("a field").to_owned()
        };
        assert_eq!(field("NoNewPrivs:"), "1", "{part}");
        assert_eq!(field("Seccomp:"), "2", "{part}");
    }
}

/// The processes that are killed.
const VICTIMS: [&str; 4] = ["play-gate", "play-keeper", "monitor", "play-supervisor"];

/// The states in which they are.
const STATES: [&str; 6] = [
    "free",
    "paused",
    "breakpoint",
    "armed",
    "stepping",
    "command",
];

fn a_target_runs_on_whoever_is_killed() {
    let rounds = std::env::var("SECMON_GATE_ROUNDS").ok();
    let measured: Option<u32> = rounds.map(|rounds| rounds.parse().expect("a number"));
    let mut stalls: BTreeMap<(&str, &str), Vec<Duration>> = BTreeMap::new();
    for state in STATES {
        let target = Target::start();
        for victim in VICTIMS {
            let mut gate = Gate::start(
                &target,
                &[("all", ALL, "longest_stop_milliseconds = 3600000")],
            );
            for _ in 0..measured.unwrap_or(1) {
                let stall = one_round(&target, &mut gate, state, victim);
                stalls.entry((state, victim)).or_default().push(stall);
            }
        }
    }
    if measured.is_some() {
        show(&mut stalls);
    }
}

fn one_round(target: &Target, gate: &mut Gate, state: &str, victim: &str) -> Duration {
    if victim == "play-supervisor" && !matches!(gate.supervisor.try_wait(), Ok(None)) {
        gate.supervisor = gate.run(&gate.configuration(target));
    }
    let mut monitor = gate.monitor_process("all", state, target.timer_handler());
    let watch = Watch::begin(target);
    let ended_before = matches!(monitor.try_wait(), Ok(Some(_)));
    match victim {
        "monitor" => kill(monitor.id()),
        part => gate.kill(part),
    }
    assert!(!ended_before, "the monitor lost {state} by itself");
    // A monitor that is alive keeps what it holds; when the keeper dies, it
    // loses that first.
    if victim == "play-keeper" {
        assert!(target.runs_within(PATIENCE), "{victim} killed in {state}");
    }
    let _ = monitor.kill();
    let _ = monitor.wait();
    assert!(target.runs_within(PATIENCE), "{victim} killed in {state}");
    let stall = watch.longest_stall();
    // The next round needs all of them again.
    if victim == "play-gate" || victim == "play-keeper" {
        drop(ready(gate, "all"));
    }
    if victim == "play-supervisor" {
        let deadline = Instant::now() + PATIENCE;
        while gate.connect().is_ok() {
            assert!(
                Instant::now() < deadline,
                "the gate outlives its supervisor"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    stall
}

fn show(stalls: &mut BTreeMap<(&str, &str), Vec<Duration>>) {
    println!("longest stall of the target's clock after a kill -9, in milliseconds");
    println!("| state | killed | rounds | median | 95 % | longest |");
    println!("|---|---|---|---|---|---|");
    for ((state, victim), stalls) in &mut *stalls {
        stalls.sort();
        let at = |share: usize| stalls[(stalls.len() - 1) * share / 100].as_millis();
        println!(
            "| {state} | {} | {} | {} | {} | {} |",
            victim.trim_start_matches("play-"),
            stalls.len(),
            at(50),
            at(95),
            at(100)
        );
    }
    let all = stalls.values().flatten();
    let longest = all.max().copied().unwrap_or_default();
    println!("longest of all: {} ms", longest.as_millis());
}
