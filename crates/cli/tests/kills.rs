//! A Linux guest goes on running within a second, whichever process of its
//! monitor or gate is killed, in every state that it can be left in.
//!
//! Its counter of ticks is read out of its RAM file from outside all the
//! while. `SECMON_KILL_ROUNDS` sets how often each process is killed in each
//! state, and has the stalls shown; without it a few pairs are tried. A machine
//! that is too busy to run a guest evenly stalls it, too: without that variable a
//! round that fails is tried once more.

mod host;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host::{Host, PATIENCE, kill, succeeded};
use secmon_channel::KeyPair;
use secmon_gate::client::{ClientError, GateClient};
use secmon_gate::protocol::{Breakpoint, BreakpointKind, Event, Request};
use secmon_lab::{Backing, Guest, Suite, appliance_image};
use serde_json::Value;

/// The longest that the guest may stand still.
const LONGEST: Duration = Duration::from_secs(1);
/// How long the guest is watched after a process was killed.
const WATCHED: Duration = Duration::from_millis(1200);
/// Ticks a second of Debian's kernels.
const HZ: u64 = 250;

/// The states that the target can be left in. In `Held` the monitoring VM
/// itself pauses its target again and again; in those after it another
/// monitor, with all rights, does what they say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Free,
    Held,
    Paused,
    Breakpoint,
    Armed,
    Stepping,
    Command,
}

const STATES: [State; 7] = [
    State::Free,
    State::Held,
    State::Paused,
    State::Breakpoint,
    State::Armed,
    State::Stepping,
    State::Command,
];

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    /// The monitoring VM's QEMU.
    Monitor,
    Gate,
    Keeper,
    /// The gate's supervisor.
    Supervisor,
    /// The monitor's supervisor on the host.
    Launcher,
}

const VICTIMS: [Victim; 5] = [
    Victim::Monitor,
    Victim::Gate,
    Victim::Keeper,
    Victim::Supervisor,
    Victim::Launcher,
];

/// The guest's counter of ticks, where it lies in the file of its RAM.
struct Counter {
    ram: fs::File,
    offset: u64,
}

impl Counter {
    fn of(guest: &Guest) -> Self {
        let target = format!("qemu:{}", guest.name());
        let said = Command::new(env!("CARGO_BIN_EXE_secmon"))
            .args(["-t", &target, "translate", "jiffies_64", "-f", "json"])
            .output()
            .expect("secmon");
        let entries: Value = serde_json::from_str(&succeeded(&said)).expect("JSON");
        let entries = entries.as_array().expect("entries");
        let last = entries.last().and_then(|entry| entry["physical"].as_str());
        let digits = last.and_then(|address| address.strip_prefix("0x"));
        let offset = u64::from_str_radix(digits.expect("an address"), 16).expect("a number");
        let ram = guest.ram_file().expect("a file");
        Self {
            ram: fs::File::open(ram).expect("the RAM file"),
            // All RAM of 512 MiB lies below the PCI hole.
            offset,
        }
    }

    fn ticks(&self) -> u64 {
        let mut bytes = [0; 8];
        self.ram
            .read_exact_at(&mut bytes, self.offset)
            .expect("RAM");
        u64::from_le_bytes(bytes)
    }

    fn runs_within(&self, patience: Duration) -> bool {
        let before = self.ticks();
        let deadline = Instant::now() + patience;
        while self.ticks() == before {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

/// What was seen of the counter.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// The longest that it stood still.
    stall: Duration,
    /// The most that it went on at once, in ticks.
    jump: u64,
}

impl Seen {
    fn is_good(&self) -> bool {
        self.stall <= LONGEST && self.jump <= HZ
    }
}

/// Watches the counter from here on.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Seen>,
}

impl Watch {
    fn begin(counter: &Arc<Counter>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(counter));
        let thread = std::thread::spawn(move || {
            let mut seen = Seen::default();
            let (mut last, mut changed) = (counter.ticks(), Instant::now());
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(2));
                let now = counter.ticks();
                seen.stall = seen.stall.max(changed.elapsed());
                if now != last {
                    seen.jump = seen.jump.max(now.wrapping_sub(last));
                    (last, changed) = (now, Instant::now());
                }
            }
            seen
        });
        Self { stop, thread }
    }

    fn end(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic")
    }
}

/// Who brings the target into a state and keeps it there.
enum Driver {
    Nobody,
    /// A client that has the monitoring VM pause its target.
    Client(Child),
    /// Another monitor.
    Tracer {
        stop: Arc<AtomicBool>,
        thread: JoinHandle<()>,
    },
}

impl Driver {
    fn end(self) {
        match self {
            Self::Nobody => {}
            Self::Client(mut client) => {
                let _ = client.kill();
                let _ = client.wait();
            }
            Self::Tracer { stop, thread } => {
                stop.store(true, Ordering::Relaxed);
                thread.join().expect("no panic");
            }
        }
    }
}

/// Everything that is running.
struct Bench {
    guest: Guest,
    counter: Arc<Counter>,
    host: Host,
    tracer: KeyPair,
    handler: Breakpoint,
}

impl Bench {
    fn new() -> Self {
        let image = appliance_image(Suite::Bookworm).expect("an image");
        let host = Host::with_image(&image.folder);
        let gdb = host.folder.path().join("gdb").display().to_string();
        let chardev = format!("socket,id=gdb,path={gdb},server=on,wait=off");
        let guest = Guest::builder(Suite::Bookworm)
            .name(format!("killed-{}", std::process::id()))
            .backing(Backing::File)
            // A guest that idles would count no ticks meanwhile.
            .kernel_argument("nohz=off")
            .qemu_argument("-chardev")
            .qemu_argument(chardev)
            .qemu_argument("-gdb")
            .qemu_argument("chardev:gdb")
            .boot()
            .expect("a guest");
        let symbols = guest.truth().kallsyms().expect("its symbols");
        let handler = symbols
            .iter()
            .find(|symbol| symbol.name == *"update_process_times")
            .expect("called at each tick");
        let handler = Breakpoint {
            address: handler.address,
            kind: BreakpointKind::Execute,
            length: 1,
        };
        let tracer = KeyPair::generate().expect("a key");
        let limits = "[monitor.limits]\nlongest_stop_milliseconds = 3600000\nstops_per_second = 10000\nrequests_per_second = 100000\n";
        let grants = format!(
            "version = 1\ntarget = \"{}\"\n\n[[monitor]]\nname = \"m\"\nrights = [\"pause\"]\n\n\
             [[monitor]]\nname = \"tracer\"\nkey = \"{}\"\nrights = [\"pause\", \"trace\"]\n{limits}",
            guest.name(),
            tracer.public()
        );
        fs::write(host.folder.path().join("grants.toml"), grants).expect("written");
        let bench = Self {
            counter: Arc::new(Counter::of(&guest)),
            guest,
            host,
            tracer,
            handler,
        };
        bench.up();
        bench
    }

    fn up(&self) {
        let grants = self.host.folder.path().join("grants.toml");
        let grants = grants.display().to_string();
        let target = format!("qemu:{}", self.guest.name());
        succeeded(&self.host.up(&target, &["--grants", &grants]));
    }

    /// All processes are there, however the round before ended.
    fn heal(&self, killed: Option<Victim>) {
        match killed {
            // The next VM would wait longer each time.
            Some(Victim::Monitor) => {
                succeeded(&self.host.secmon(&["monitor", "down", "m"]));
                self.up();
            }
            Some(Victim::Launcher) => self.up(),
            _ => {}
        }
        self.host.wait("all processes", |host| {
            let running = ["supervisor", "machine"]
                .iter()
                .all(|process| host.pid(process).is_some_and(host::is_alive));
            running && host.is_fresh() && host.gate().is_some() && host.target() == "watched"
        });
    }

    fn pid(&self, victim: Victim) -> u64 {
        let gate = self.host.gate();
        let pid = match victim {
            Victim::Monitor => self.host.pid("machine"),
            Victim::Launcher => self.host.pid("supervisor"),
            Victim::Supervisor => gate.map(|[supervisor, _, _]| supervisor),
            Victim::Gate => gate.map(|[_, gate, _]| gate),
            Victim::Keeper => gate.map(|[_, _, keeper]| keeper),
        };
        pid.unwrap_or_else(|| panic!("no {victim:?}: {}", self.host.json("state.json")))
    }

    /// Brings the target into a state.
    fn drive(&self, state: State) -> Driver {
        match state {
            State::Free => Driver::Nobody,
            State::Held => self.hold(),
            state => {
                let deadline = Instant::now() + PATIENCE;
                let client = loop {
                    // A gate that was just started may end the first.
                    match self.host.gate_client(&self.tracer) {
                        Ok(client) => break client,
                        Err(error) => assert!(Instant::now() < deadline, "{error}"),
                    }
                };
                let stop = Arc::new(AtomicBool::new(false));
                let (ready, is_ready) = channel();
                let tracer = Tracer {
                    client,
                    stop: Arc::clone(&stop),
                    ready: Some(ready),
                    handler: self.handler,
                };
                let thread = std::thread::spawn(move || tracer.play(state));
                wait_for(&is_ready, state);
                Driver::Tracer { stop, thread }
            }
        }
    }

    fn hold(&self) -> Driver {
        let query = ["-t", "monitor:m", "--pause", "ps", "--columns", "pid,comm"];
        let deadline = Instant::now() + PATIENCE;
        loop {
            let output = self.host.secmon(&query);
            if output.status.success() {
                break;
            }
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(Instant::now() < deadline, "{error}");
        }
        let script = format!(
            "while :; do \"$0\" {} >/dev/null 2>&1; done",
            query.join(" ")
        );
        let client = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "sh", "-c", &script])
            .arg(env!("CARGO_BIN_EXE_secmon"))
            .env("XDG_RUNTIME_DIR", self.host.folder.path())
            .stdin(Stdio::null())
            .spawn();
        Driver::Client(client.expect("setpriv (package util-linux)"))
    }

    fn round(&self, state: State, victim: Victim, delay: Duration) -> Seen {
        let driver = self.drive(state);
        std::thread::sleep(delay);
        let pid = self.pid(victim);
        let watch = Watch::begin(&self.counter);
        kill(pid);
        // A monitor that is alive keeps what it holds.
        driver.end();
        let end = Instant::now() + WATCHED;
        let runs = self.counter.runs_within(PATIENCE);
        assert!(runs, "{victim:?} killed in {state:?}: it stands still");
        std::thread::sleep(end.saturating_duration_since(Instant::now()));
        let seen = watch.end();
        self.heal(Some(victim));
        seen
    }

    /// A round that may be tried once more.
    fn fair_round(&self, state: State, victim: Victim, delay: Duration) -> Seen {
        let first = self.round(state, victim, delay);
        if first.is_good() {
            return first;
        }
        println!("{victim:?} killed in {state:?}: {first:?}; once more");
        self.round(state, victim, delay)
    }
}

fn wait_for(ready: &Receiver<()>, state: State) {
    let got = ready.recv_timeout(PATIENCE);
    assert!(got.is_ok(), "{state:?} is not reached");
}

/// A monitor with all rights that are needed, in a thread of its own: the end
/// of its connection is all that a gate sees of a monitor that is killed.
struct Tracer {
    client: GateClient,
    stop: Arc<AtomicBool>,
    ready: Option<Sender<()>>,
    handler: Breakpoint,
}

impl Tracer {
    /// Keeps the target in a state until it is to stop, or the gate ends.
    fn play(mut self, state: State) {
        let lease_milliseconds = 500;
        let pause = Request::Pause { lease_milliseconds };
        let extend = Request::Extend { lease_milliseconds };
        // The gate looks for QEMU first.
        let deadline = Instant::now() + PATIENCE;
        let start = match state {
            State::Breakpoint => Request::SetBreakpoint(self.handler),
            State::Armed => Request::SetBreakpoint(Breakpoint {
                address: 0xdead_0000,
                ..self.handler
            }),
            _ => pause.clone(),
        };
        while let Err(error) = self.client.ask(start.clone(), PATIENCE) {
            let refused = matches!(error, ClientError::Refused(_));
            assert!(refused && Instant::now() < deadline, "{error}");
            std::thread::sleep(Duration::from_millis(20));
        }
        if state == State::Breakpoint {
            loop {
                let event = self.client.event(PATIENCE).expect("a session");
                match event {
                    Some(Event::Stopped { .. }) => break,
                    _ => assert!(Instant::now() < deadline, "no stop"),
                }
            }
        }
        match state {
            State::Paused | State::Breakpoint => self.keep(&start, &[extend], 20),
            State::Armed => self.keep(&start, &[Request::Heartbeat], 20),
            State::Stepping => self.keep(&start, &[Request::Step { vcpu: 0 }], 0),
            State::Command => self.keep(&start, &[Request::Resume, pause], 0),
            State::Free | State::Held => {}
        }
    }

    /// Repeats `requests`; what was lost on the way is begun again by `start`.
    fn keep(&mut self, start: &Request, requests: &[Request], milliseconds: u64) {
        if let Some(ready) = self.ready.take() {
            let _ = ready.send(());
        }
        while !self.stop.load(Ordering::Relaxed) {
            for request in requests {
                let answer = self.client.ask(request.clone(), PATIENCE);
                let again = match answer {
                    Ok(_) => continue,
                    Err(ClientError::Refused(_)) => self.client.ask(start.clone(), PATIENCE),
                    Err(ClientError::Channel(_)) => return,
                };
                if matches!(again, Err(ClientError::Channel(_))) {
                    return;
                }
            }
            std::thread::sleep(Duration::from_millis(milliseconds));
        }
    }
}

#[test]
fn a_linux_guest_runs_on_whoever_is_killed() {
    let rounds = std::env::var("SECMON_KILL_ROUNDS").ok();
    let measured: Option<u32> = rounds.map(|rounds| rounds.parse().expect("a number"));
    let bench = Bench::new();
    bench.heal(None);
    let mut stalls: BTreeMap<(State, Victim), Vec<Seen>> = BTreeMap::new();
    for (place, state) in STATES.into_iter().enumerate() {
        for (number, victim) in VICTIMS.into_iter().enumerate() {
            let tried = (place + number) % VICTIMS.len() < 2;
            if measured.is_none() && !tried {
                continue;
            }
            for round in 0..measured.unwrap_or(1) {
                // At other moments of what is going on each time.
                let delay = u64::from(round) * 53 + 17 * place as u64 + 7 * number as u64;
                let delay = Duration::from_millis(delay % 200);
                let seen = match measured {
                    Some(_) => bench.round(state, victim, delay),
                    None => bench.fair_round(state, victim, delay),
                };
                stalls.entry((state, victim)).or_default().push(seen);
            }
        }
    }
    host::assert_runs(&bench.guest);
    if measured.is_some() {
        show(&stalls);
    }
    for (of, seen) in &stalls {
        assert!(seen.iter().all(Seen::is_good), "{of:?}: {seen:?}");
    }
}

fn show(stalls: &BTreeMap<(State, Victim), Vec<Seen>>) {
    println!("longest stall of the guest's counter of ticks after a kill -9, in milliseconds");
    let name = |text: String| text.to_lowercase();
    let names = VICTIMS.map(|victim| name(format!("{victim:?}")));
    println!("| state | {} |", names.join(" | "));
    println!("|---{}|", "|---".repeat(VICTIMS.len()));
    for state in STATES {
        let longest = VICTIMS.map(|victim| {
            let seen = stalls.get(&(state, victim)).into_iter().flatten();
            let stall = seen.map(|seen| seen.stall).max().unwrap_or_default();
            stall.as_millis().to_string()
        });
        println!(
            "| {} | {} |",
            name(format!("{state:?}")),
            longest.join(" | ")
        );
    }
    let mut all: Vec<Seen> = stalls.values().flatten().copied().collect();
    all.sort_by_key(|seen| seen.stall);
    let at = |share: usize| all[(all.len() - 1) * share / 100].stall.as_millis();
    let jump = all.iter().map(|seen| seen.jump).max().unwrap_or_default();
    println!(
        "{} rounds: median {} ms, 95 % {} ms, longest {} ms; longest jump {jump} of {HZ} ticks a second",
        all.len(),
        at(50),
        at(95),
        at(100),
    );
}
