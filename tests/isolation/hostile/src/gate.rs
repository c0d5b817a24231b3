//! The port that leads to the target's gate: what the grant does not give, and
//! what is no conversation at all.

use std::fs;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use secmon_channel::{ChannelError, Descriptor, KeyPair, Role, Session, Stream, handshake};
use secmon_gate::client::{ClientError, GateClient};
use secmon_gate::protocol::{
    AddressKind, Answer, Breakpoint, BreakpointKind, Bytes, LinkState, Message, Query, ROLE,
    Refusal, Register, Request, Right, Status,
};
use secmon_hostile::Report;
use secmon_monitor::protocol::{CONFIGURATION_NAME, Configuration};
use serde_json::Value;

use crate::port;

/// For what must happen on any machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long is waited for an answer that should not come.
const LISTEN: Duration = Duration::from_millis(700);

/// What the VM was given to speak to its gate.
struct Door {
    own: KeyPair,
    key: secmon_channel::PublicKey,
    port: String,
}

/// The configuration, which the host gave this VM.
pub fn configuration() -> Result<Configuration> {
    let path = format!("/sys/firmware/qemu_fw_cfg/by_name/{CONFIGURATION_NAME}/raw");
    let bytes = fs::read(&path).context(path)?;
    Ok(Configuration::parse(&bytes)?)
}

impl Door {
    fn find() -> Result<Self> {
        let configuration = configuration()?;
        let gate = configuration
            .targets
            .iter()
            .find_map(|target| target.gate.clone());
        let gate = gate.context("the target has no gate")?;
        Ok(Self {
            own: KeyPair::from_secret(configuration.secret_key)?,
            key: gate.key,
            port: gate.port,
        })
    }

    fn stream(&self) -> Result<Arc<Tap>> {
        let port = Descriptor::new(port::open(&self.port)?)?;
        Ok(Arc::new(Tap {
            port,
            sent: Mutex::default(),
        }))
    }

    /// Begins a session, however often QEMU has to connect anew before.
    fn begin<T>(
        &self,
        begin: impl Fn(&Arc<dyn Stream>) -> Result<T, ChannelError>,
    ) -> Result<(T, Arc<Tap>)> {
        let deadline = Instant::now() + PATIENCE;
        let tap = self.stream()?;
        let stream = Arc::clone(&tap) as Arc<dyn Stream>;
        loop {
            match begin(&stream) {
                Ok(begun) => return Ok((begun, tap)),
                Err(error) => ensure!(Instant::now() < deadline, "the gate: {error}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn session(&self) -> Result<(Session, Arc<Tap>)> {
        self.begin(|stream| {
            let deadline = Some(Instant::now() + Duration::from_secs(5));
            Session::initiate(stream, &self.own, &self.key, ROLE, deadline)
        })
    }

    fn client(&self) -> Result<GateClient> {
        let begun = self.begin(|stream| {
            let patience = Duration::from_secs(5);
            GateClient::connect(stream, &self.own, &self.key, patience).map_err(|error| match error
            {
                ClientError::Channel(error) => error,
                ClientError::Refused(refusal) => ChannelError::Stream {
                    what: "beginning",
                    source: io::Error::other(refusal),
                },
            })
        });
        Ok(begun?.0)
    }

    /// The gate lives: it answers what is granted.
    fn status(&self) -> Result<Status> {
        match self.client()?.ask(Request::Status, PATIENCE) {
            Ok(Answer::Status(status)) => Ok(status),
            other => bail!("the gate's status: {other:?}"),
        }
    }
}

/// A port that remembers what was sent.
struct Tap {
    port: Descriptor,
    sent: Mutex<Vec<u8>>,
}

impl Tap {
    /// Sends bytes as they are; gives how many were taken.
    fn send(&self, bytes: &[u8], patience: Duration) -> usize {
        let deadline = Some(Instant::now() + patience);
        let mut sent = 0;
        while sent < bytes.len() {
            match self.port.write(&bytes[sent..], deadline) {
                Ok(count) if count > 0 => sent += count,
                _ => break,
            }
        }
        sent
    }

    /// What comes until nothing has come for a moment.
    fn hear(&self, patience: Duration) -> Vec<u8> {
        let mut heard = Vec::new();
        let mut chunk = [0; 4096];
        let end = Instant::now() + PATIENCE;
        while heard.len() < 1 << 20 && Instant::now() < end {
            match self.port.read(&mut chunk, Some(Instant::now() + patience)) {
                Ok(count) if count > 0 => heard.extend_from_slice(&chunk[..count]),
                _ => break,
            }
        }
        heard
    }
}

impl Stream for Tap {
    fn read(&self, buffer: &mut [u8], deadline: Option<Instant>) -> io::Result<usize> {
        self.port.read(buffer, deadline)
    }

    fn write(&self, bytes: &[u8], deadline: Option<Instant>) -> io::Result<usize> {
        let count = self.port.write(bytes, deadline)?;
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.extend_from_slice(&bytes[..count]);
        Ok(count)
    }
}

pub fn attempt(name: &str, argument: &Value) -> Result<Report> {
    let door = Door::find()?;
    let before = door.status()?;
    ensure!(
        before.rights == [Right::Observe],
        "the grant is {:?}",
        before.rights
    );
    let mut report = Report::new();
    match name {
        "gate_requests" => requests(&door, &mut report)?,
        "gate_commands" => commands(&door, argument, &mut report)?,
        "gate_keys" => keys(&door, &mut report)?,
        "gate_replay" => replay(&door, &mut report)?,
        "gate_frames" => frames(&door, &mut report)?,
        "gate_flood" => flood(&door, &mut report)?,
        "gate_half_open" => half_open(&door, &mut report)?,
        other => bail!("there is no attempt {other}"),
    }
    // Alive, and the grant is what it was.
    let after = door.status()?;
    report.tried(
        after.rights == before.rights && after.state == before.state,
        || format!("{after:?} after {before:?}"),
    );
    Ok(report)
}

/// Every request that needs more than `observe`, as whoever was granted it
/// would make it.
fn requests(door: &Door, report: &mut Report) -> Result<()> {
    let breakpoint = Breakpoint {
        address: 0xffff_ffff_8100_0000,
        kind: BreakpointKind::Execute,
        length: 1,
    };
    let (vcpu, address) = (0, 0x1000);
    let name = || "dump".to_owned();
    let kind = AddressKind::Physical;
    let all = [
        Request::Pause {
            lease_milliseconds: 800,
        },
        Request::Registers { vcpu },
        Request::ReadMemory {
            vcpu,
            kind,
            address,
            length: 16,
        },
        Request::SetBreakpoint(breakpoint),
        Request::RemoveBreakpoint(breakpoint),
        Request::Step { vcpu },
        Request::Stop,
        Request::Start,
        Request::NetworkDevices,
        Request::Link {
            device: "net0".to_owned(),
            state: LinkState::Down,
        },
        Request::Dump { name: name() },
        Request::Dump {
            name: "../../etc/cron.d/x".to_owned(),
        },
        Request::Reset,
        Request::Quit,
        Request::WriteRegister {
            vcpu,
            register: Register::Rip,
            value: 0,
        },
        Request::WriteMemory {
            vcpu,
            kind,
            address,
            bytes: Bytes(vec![0xcc; 16]),
        },
        Request::Alter {
            vcpu,
            at: 0,
            memory: vec![(address, Bytes(vec![0xcc; 16]))],
            registers: vec![(Register::Rip, 0)],
        },
    ];
    let mut client = door.client()?;
    for request in all {
        let shown = format!("{request:?}");
        let right = request.right();
        ensure!(right != Right::Observe, "{shown} is granted to everybody");
        match client.ask(request, PATIENCE) {
            Err(ClientError::Refused(Refusal::Denied(denied))) => {
                report.tried(denied == right, || format!("{shown}: {denied} is denied"));
            }
            Err(ClientError::Refused(refusal)) => {
                report.tried(false, || format!("{shown}: {refusal}"));
            }
            Err(ClientError::Channel(error)) => bail!("{shown}: {error}"),
            Ok(answer) => report.tried(false, || format!("{shown}: {answer:?}")),
        }
    }
    // What holds nothing can neither go on nor extend it.
    for request in [
        Request::Resume,
        Request::Extend {
            lease_milliseconds: 800,
        },
    ] {
        let shown = format!("{request:?}");
        let answer = client.ask(request, PATIENCE);
        report.tried(matches!(answer, Err(ClientError::Refused(_))), || shown);
    }
    Ok(())
}

/// gdb's frame around a packet.
fn packet(text: &str) -> Vec<u8> {
    let sum = text.bytes().fold(0_u8, u8::wrapping_add);
    format!("+${text}#{sum:02x}").into_bytes()
}

/// All of QEMU's commands and gdb packets, as QEMU itself would take them:
/// before a handshake, and as messages within a session.
fn commands(door: &Door, argument: &Value, report: &mut Report) -> Result<()> {
    let qmp: Vec<String> = serde_json::from_value(argument["commands"].clone())?;
    ensure!(qmp.len() > 100, "only {} commands", qmp.len());
    const GDB: &[&str] = &[
        "?",
        "g",
        "G00",
        "m0,10",
        "M0,4:cccccccc",
        "X0,0:",
        "p10",
        "P10=0",
        "c",
        "s",
        "C05",
        "k",
        "D",
        "vCont;c",
        "vKill;1",
        "vAttach;1",
        "Z0,ffffffff81000000,1",
        "z0,0,1",
        "Hg1",
        "qSupported",
        "qRcmd,71756974",
        "Qqemu.PhyMemMode:1",
        "bc",
        "bs",
        "R00",
    ];
    let mut bytes: Vec<Vec<u8>> = vec![vec![3], b"+".to_vec(), packet("g")];
    bytes.extend(GDB.iter().map(|text| packet(text)));
    for command in qmp {
        let arguments = r#"{"command-line":"quit","filename":"/tmp/x","protocol":"file:/tmp/x"}"#;
        let text = format!("{{\"execute\":\"{command}\",\"arguments\":{arguments}}}\r\n");
        bytes.push(text.into_bytes());
    }
    let stream = door.stream()?;
    stream.hear(LISTEN);
    for bytes in &bytes {
        stream.send(bytes, LISTEN);
        report.tries += 1;
    }
    let heard = stream.hear(LISTEN * 3);
    report.tried(heard.is_empty(), || {
        format!("an answer: {:?}", String::from_utf8_lossy(&heard))
    });
    drop(stream);

    // Messages that are no query end the session; nothing is done for them.
    let all = bytes.concat();
    for message in [&all[..], &bytes[2], br#"{"execute":"stop"}"#] {
        let (mut session, _) = door.session()?;
        let deadline = || Some(Instant::now() + PATIENCE);
        session.send(message, deadline())?;
        loop {
            match session.receive::<Message>(deadline()) {
                Ok(Message::Event(_)) => {}
                Ok(Message::Answer { result, .. }) => {
                    report.tried(result.is_err(), || format!("{result:?}"));
                }
                Err(_) => break,
            }
        }
        report.tries += 1;
    }
    Ok(())
}

/// Keys and roles that are not this monitor's.
fn keys(door: &Door, report: &mut Report) -> Result<()> {
    let stranger = KeyPair::generate()?;
    let older = Role {
        version: ROLE.version.wrapping_sub(1),
        ..ROLE
    };
    let other = Role {
        name: "monitor",
        ..ROLE
    };
    let gate = door.key;
    let unknown = KeyPair::generate()?.public();
    for (what, own, gate, role) in [
        ("a stranger's key", &stranger, &gate, ROLE),
        ("another gate's key", &door.own, &unknown, ROLE),
        ("another version", &door.own, &gate, older),
        ("another role", &door.own, &gate, other),
    ] {
        let begun = Instant::now();
        let stream: Arc<dyn Stream> = door.stream()?;
        loop {
            let deadline = Some(Instant::now() + Duration::from_secs(5));
            match Session::initiate(&stream, own, gate, role, deadline) {
                // Refused by the gate, and not by the time that QEMU takes to
                // connect again.
                Err(ChannelError::Refused | ChannelError::Version { .. }) => {
                    report.tried(true, String::new);
                    break;
                }
                Ok(_) => {
                    report.tried(false, || what.to_owned());
                    break;
                }
                Err(error) => ensure!(begun.elapsed() < PATIENCE, "{what}: {error}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// A whole session, recorded and sent again.
fn replay(door: &Door, report: &mut Report) -> Result<()> {
    let (mut session, tap) = door.session()?;
    let query = Query {
        id: 1,
        request: Request::Status,
    };
    session.send(&query, Some(Instant::now() + PATIENCE))?;
    let answer: Message = session.receive(Some(Instant::now() + PATIENCE))?;
    ensure!(matches!(answer, Message::Answer { .. }), "{answer:?}");
    let recorded = tap
        .sent
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    drop((session, tap));
    // The answer to a hello: marker, token, versions, outcome, second message.
    const ANSWER: usize = 16 + 16 + 4 + 1 + 48;
    let mut answered = 0;
    for _ in 0..3 {
        let stream = door.stream()?;
        stream.hear(LISTEN);
        stream.send(&recorded, PATIENCE);
        let heard = stream.hear(LISTEN * 3);
        let mut rest = &heard[..];
        while let Some(after) = rest
            .strip_prefix(&handshake::ANSWER)
            .and_then(|_| rest.get(ANSWER..))
        {
            answered += 1;
            rest = after;
        }
        report.tried(rest.is_empty(), || format!("{} bytes more", rest.len()));
    }
    report.note(format!("{answered} hellos were answered, no request was"));
    Ok(())
}

/// Frames that no session has.
fn frames(door: &Door, report: &mut Report) -> Result<()> {
    let mut long = vec![0xff, 0xff, 0, 0];
    long.extend(vec![0x5a; 0xffff]);
    let cases: [&[u8]; 6] = [
        &[0, 0, 0, 0],
        &[0xf0, 0xff, 0xff, 0xff],
        &[0, 0, 1, 0, 1, 2, 3],
        &[40, 0, 0, 0, 1, 2, 3, 4],
        &long,
        &[&[100, 0, 0, 0][..], &[0x33; 100]].concat(),
    ];
    for frame in cases {
        let (session, stream) = door.session()?;
        stream.send(frame, LISTEN);
        let heard = stream.hear(LISTEN);
        drop(session);
        // Nothing can be an answer to that but the end.
        report.tried(heard.len() < 200, || format!("{} bytes heard", heard.len()));
    }
    Ok(())
}

/// As much as the port takes: garbage, hellos, requests, and answers that
/// nobody reads.
fn flood(door: &Door, report: &mut Report) -> Result<()> {
    let second = Duration::from_secs(1);
    let garbage = vec![0x55; 1 << 20];
    let mut hellos = Vec::new();
    while hellos.len() < 1 << 18 {
        hellos.extend([0xff; 4]);
        hellos.extend(handshake::HELLO);
        hellos.extend([0x5a; 116]);
    }
    for bytes in [&garbage, &hellos] {
        let stream = door.stream()?;
        let end = Instant::now() + 3 * second;
        let mut sent = 0;
        while Instant::now() < end {
            sent += stream.send(bytes, second);
        }
        report.tries += 1;
        report.note(format!("{sent} bytes were taken"));
    }
    let (mut session, _) = door.session()?;
    let mut sent = 0_u64;
    let end = Instant::now() + 4 * second;
    while Instant::now() < end {
        let query = Query {
            id: sent,
            request: Request::Status,
        };
        // A gate that has enough closes.
        if session.send(&query, Some(Instant::now() + second)).is_err() {
            break;
        }
        sent += 1;
    }
    report.tries += sent;
    report.note(format!("{sent} requests were taken"));
    Ok(())
}

/// Conversations that stop in the middle.
fn half_open(door: &Door, report: &mut Report) -> Result<()> {
    let mut hello = vec![0xff; 4];
    hello.extend(handshake::HELLO);
    hello.extend([1, 0, 1, 0]);
    hello.extend([0x42; 112]);
    for length in [3, 4, 12, 20, 24, 40, hello.len() - 1] {
        let stream = door.stream()?;
        stream.send(&hello[..length], LISTEN);
        report.tries += 1;
    }
    // A session, and then silence, for longer than a handshake may take.
    let (session, _) = door.session()?;
    std::thread::sleep(Duration::from_secs(4));
    drop(session);
    report.tries += 1;
    Ok(())
}
