//! A monitoring VM that was taken over, started by the launcher, with all that
//! a kernel gives to root: what it tries, and that none of it gets anywhere.
//!
//! Each group of attempts is made while the target stands still, and its RAM
//! file has the same SHA-256 afterwards. Then the target runs on and answers.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use secmon_channel::{Descriptor, KeyPair, Stream};
use secmon_hostile::Report;
use secmon_isolation::HostileVm;
use secmon_isolation::attempts::{self, Setting};
use secmon_lab::{Backing, Guest, Suite};
use secmon_monitor::protocol::Client;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// How long what has to end may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// The address space of a client that talks to a hostile monitor.
const CLIENT_MEMORY: u64 = 1 << 30;
/// The most that a monitor's console leaves on the host.
const MAX_LOG: u64 = (2 << 20) + (64 << 10);
/// The most memory of the process that takes it.
const MAX_SUPERVISOR: u64 = 64 << 20;

/// The PCI devices that the launcher's command line makes, for one target, by
/// vendor and device number.
fn devices() -> Value {
    json!({
        // The q35 chipset: host bridge, LPC, AHCI, SMBus.
        "8086:29c0": 1, "8086:2918": 1, "8086:2922": 1, "8086:2930": 1,
        // The ports; the target's memory; the root port above it.
        "1af4:1003": 1, "1af4:1110": 1, "1b36:000c": 1,
    })
}

/// A word that is in this guest's memory alone.
fn word(name: &str) -> String {
    format!("isolation.word={name}-{:08x}", std::process::id())
}

/// A guest, with a gdbstub that listens in this folder.
fn boot(name: &str, folder: &Path) -> Result<Guest> {
    let stub = folder.join(name).display().to_string();
    Guest::builder(Suite::Bookworm)
        .name(format!("isolation-{name}"))
        .memory_mib(256)
        .backing(Backing::File)
        .kernel_argument(word(name))
        .qemu_argument("-chardev")
        .qemu_argument(format!("socket,id=gdb,path={stub},server=on,wait=off"))
        .qemu_argument("-gdb")
        .qemu_argument("chardev:gdb")
        .boot()
}

/// The names of all commands that the guest's QEMU has.
fn commands(guest: &Guest) -> Result<Vec<String>> {
    let listed = guest.control().execute("query-commands", &json!({}))?;
    let listed = listed.as_array().context("a list of commands")?;
    let names = listed.iter().filter_map(|command| command["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}

/// A word with its bits flipped, as the hostile program takes it.
fn flipped(word: &str) -> String {
    word.bytes().map(|byte| format!("{:02x}", !byte)).collect()
}

fn holds(guest: &Guest, word: &str) -> Result<bool> {
    let bytes = fs::read(guest.ram_file().context("a RAM file")?)?;
    let word = word.as_bytes();
    Ok(bytes.windows(word.len()).any(|window| window == word))
}

fn digest(guest: &Guest) -> Result<Vec<u8>> {
    let mut file = File::open(guest.ram_file().context("a RAM file")?)?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut chunk)?;
        if count == 0 {
            return Ok(hash.finalize().to_vec());
        }
        hash.update(&chunk[..count]);
    }
}

/// The guest answers, and its clock goes on.
fn assert_runs(guest: &Guest) -> Result<()> {
    let uptime = || -> Result<f64> {
        let text = guest.truth().read_file("/proc/uptime")?;
        let text = String::from_utf8_lossy(text.as_bytes()).into_owned();
        Ok(text.split(' ').next().context("an uptime")?.parse()?)
    };
    let first = uptime()?;
    let deadline = Instant::now() + PATIENCE;
    while uptime()? <= first {
        ensure!(Instant::now() < deadline, "its clock stands still");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

struct Suspect<'a> {
    vm: HostileVm,
    target: &'a Guest,
    /// What was tried and denied.
    denied: BTreeSet<String>,
}

impl Suspect<'_> {
    /// Makes attempts while the target stands still; nothing may change.
    fn on_a_still_target(&mut self, attempts: &[(&str, Value)]) -> Result<()> {
        self.target.control().stop()?;
        let before = digest(self.target)?;
        let made = attempts
            .iter()
            .try_for_each(|(name, argument)| self.attempt(name, argument));
        let after = digest(self.target)?;
        let status = self.target.control().status()?;
        self.target.control().resume()?;
        made?;
        ensure!(before == after, "the target's memory has changed");
        ensure!(status == "paused", "the target was let run: {status}");
        assert_runs(self.target)
    }

    /// Is a bad monitor to clients of the host, and to its own console.
    fn on_the_host(&mut self) -> Result<()> {
        self.with_client("channel_garbage", Self::without_an_answer)?;
        self.with_client("channel_answers", Self::without_an_answer)?;
        self.with_client("channel_malformed", |suspect| {
            suspect.fails(&["ps"], "not of the expected type")
        })?;
        self.with_client("channel_oversized", |suspect| {
            suspect.fails(&["ps"], "a message of more than")
        })?;
        self.with_client("channel_endless", |suspect| {
            suspect.fails(&["read", "0x1000", "--length", "16"], "asked for")
        })?;
        self.with_client("channel_escapes", |suspect| {
            suspect.fails(&["ps", "--limit", "3"], "owned")?;
            suspect.fails(&["ps"], "owned")
        })?;
        self.attempt("console_flood", &Value::Null)?;
        let size = |name| fs::metadata(self.vm.file(name)).map_or(0, |file| file.len());
        let log = size("console.log") + size("console.log.old");
        println!("{log} bytes of console");
        ensure!(log < MAX_LOG, "{log} bytes of console");
        let supervisor = self.vm.json("processes.json")["supervisor"]["pid"].as_u64();
        let supervisor = supervisor.context("a supervisor")?;
        let status = fs::read_to_string(format!("/proc/{supervisor}/status"))?;
        let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let most: u64 = most
            .and_then(|text| text.trim().strip_suffix(" kB"))
            .context("its memory")?
            .parse()?;
        ensure!(
            most << 10 < MAX_SUPERVISOR,
            "the supervisor took {most} KiB"
        );
        Ok(())
    }

    /// Lets a client of the host talk to an attempt that goes on meanwhile.
    fn with_client(&mut self, name: &str, client: impl Fn(&mut Self) -> Result<()>) -> Result<()> {
        let number = self.vm.begin(name, &Value::Null)?;
        let outcome = client(self);
        let report = self.vm.finish(name, number)?;
        outcome.with_context(|| name.to_owned())?;
        self.note(name, &report)
    }

    /// No conversation comes about, and this is said at the deadline.
    fn without_an_answer(&mut self) -> Result<()> {
        let own = KeyPair::read(&self.vm.file("client.key"))?;
        let monitor = KeyPair::read(&self.vm.file("monitor.key"))?.public();
        let stream: Arc<dyn Stream> = Arc::new(Descriptor::new(self.vm.channel()?)?);
        let deadline = Instant::now() + Duration::from_secs(5);
        let client = Client::connect(&stream, &own, &monitor, Some(deadline));
        ensure!(client.is_err(), "there is a conversation");
        ensure!(deadline.elapsed() < PATIENCE, "long past the deadline");
        Ok(())
    }

    /// `secmon` ends with status 2 and says why, in text that does nothing to
    /// a terminal, and with a bound on its memory.
    fn fails(&mut self, words: &[&str], reason: &str) -> Result<()> {
        let mut all = vec!["-t", "monitor:hostile"];
        all.extend(words);
        let secmon = self.vm.command(&all);
        let mut command = Command::new("prlimit");
        command
            .arg(format!("--as={CLIENT_MEMORY}"))
            .arg(secmon.get_program());
        command.args(secmon.get_args());
        for (name, value) in secmon.get_envs() {
            command.env(name, value.context("a value")?);
        }
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("prlimit: apt-get install util-linux")?;
        while child.try_wait()?.is_none() {
            if started.elapsed() > PATIENCE {
                child.kill()?;
                bail!("secmon {words:?} does not end");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let output = child.wait_with_output()?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        println!("{words:?}: {:?}, {told}", output.status);
        ensure!(
            output.status.code() == Some(2),
            "{:?}: {told}",
            output.status
        );
        ensure!(told.contains(reason), "{told}");
        let harmless = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            text.chars()
                .all(|c| c == '\n' || !(c.is_control() || c == '\u{202e}'))
        };
        ensure!(
            harmless(&output.stdout) && harmless(&output.stderr),
            "{:?} {told:?}",
            String::from_utf8_lossy(&output.stdout)
        );
        Ok(())
    }

    fn attempt(&mut self, name: &str, argument: &Value) -> Result<()> {
        let started = Instant::now();
        let report = self.vm.attempt(name, argument)?;
        println!("{name}: {:.1} s", started.elapsed().as_secs_f32());
        self.note(name, &report)
    }

    fn note(&mut self, name: &str, report: &Report) -> Result<()> {
        println!("{name}: {report:?}");
        ensure!(
            report.successes.is_empty(),
            "{name}: {:#?}",
            report.successes
        );
        ensure!(report.tries > 0, "{name}: nothing was tried");
        self.denied.insert(name.to_owned());
        Ok(())
    }
}

#[test]
fn a_hostile_monitor_gets_nowhere() -> Result<()> {
    let stubs = tempfile::tempdir()?;
    fs::set_permissions(stubs.path(), fs::Permissions::from_mode(0o755))?;
    let (target, other) = std::thread::scope(|scope| {
        let other = scope.spawn(|| boot("other", stubs.path()));
        let target = boot("target", stubs.path());
        (target, other.join().expect("no panic"))
    });
    let (target, other) = (target?, other?);
    ensure!(holds(&other, &word("other"))?, "the word is not in memory");
    let mut suspect = Suspect {
        vm: HostileVm::start(&target)?,
        target: &target,
        denied: BTreeSet::new(),
    };
    let nothing = || Value::Null;
    suspect.on_a_still_target(&[
        ("bar_widths", nothing()),
        ("bar_strings", nothing()),
        ("bar_atomics", nothing()),
        ("bar_kernel", nothing()),
        ("bar_configuration", nothing()),
        ("bar_moved", nothing()),
        ("bar_enlarged", nothing()),
    ])?;
    suspect.on_a_still_target(&[
        ("dma_virtio", nothing()),
        ("dma_msi", nothing()),
        ("dma_fw_cfg", nothing()),
    ])?;
    let words = json!({
        "target": flipped(&word("target")),
        "other": flipped(&word("other")),
    });
    suspect.on_a_still_target(&[
        ("other_memory", words),
        ("hot_plug", nothing()),
        (
            "fw_cfg_items",
            json!({"names": ["opt/secmon/configuration"]}),
        ),
        ("fw_cfg_writes", nothing()),
        ("host_devices", json!({"devices": devices()})),
        ("host_ports", nothing()),
        ("network_interfaces", nothing()),
        ("network_sockets", nothing()),
    ])?;
    let gate = suspect.vm.gate()?;
    let at_the_gate = [
        "gate_requests",
        "gate_commands",
        "gate_keys",
        "gate_replay",
        "gate_frames",
        "gate_flood",
        "gate_half_open",
    ];
    let commands = json!({"commands": commands(&target)?});
    suspect.on_a_still_target(&at_the_gate.map(|name| (name, commands.clone())))?;
    let after = suspect.vm.gate()?;
    ensure!(after == gate, "gate {gate:?} became {after:?}");
    suspect.on_the_host()?;
    assert_runs(&target)?;
    assert_runs(&other)?;
    let listed: BTreeSet<String> = attempts::of(Setting::Monitor)
        .map(|attempt| attempt.name.to_owned())
        .collect();
    ensure!(
        suspect.denied == listed,
        "tried {:?}, listed {listed:?}",
        suspect.denied
    );
    Ok(())
}
