//! Being a bad monitor: what the host's client and its console get to hear.
//!
//! These attempts go on until [`STOP`] comes over the port, as a client of the
//! host talks to them meanwhile.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use secmon_channel::{Descriptor, KeyPair, Session, Stream, handshake};
use secmon_guest::TrustLevel;
use secmon_hostile::{Report, STOP};
use secmon_monitor::protocol::{
    CHANNEL_PORT, Cell, Configuration, End, GateReport, REPLY_LIMIT, ROLE, Refusal, Reply, Request,
    TargetReport, TargetState,
};

use crate::ports::Ports;
use crate::{gate, port};

/// What would act on a terminal: its title, a clear screen, the line's
/// beginning, a change of direction.
const ESCAPES: &str = "\x1b]0;owned\x07\x1b[2J\r\u{202e}owned";

pub fn attempt(name: &str) -> Result<Report> {
    if name == "console_flood" {
        return console_flood();
    }
    let stream = Arc::new(Watched {
        port: Descriptor::new(port::open(CHANNEL_PORT)?)?,
        matched: std::sync::Mutex::new(0),
        stopped: AtomicBool::new(false),
    });
    let configuration = gate::configuration()?;
    let mut report = Report::new();
    while !stream.stopped.load(Ordering::Relaxed) {
        let tries = match name {
            "channel_garbage" => garbage(&stream),
            "channel_answers" => answers(&stream),
            other => converse(other, &stream, &configuration)?,
        };
        report.tries += tries;
    }
    Ok(report)
}

/// The port, whose incoming bytes are searched for the word that ends it all.
struct Watched {
    port: Descriptor,
    matched: std::sync::Mutex<usize>,
    stopped: AtomicBool,
}

impl Stream for Watched {
    fn read(&self, buffer: &mut [u8], deadline: Option<Instant>) -> std::io::Result<usize> {
        let count = self.port.read(buffer, deadline)?;
        let mut matched = self
            .matched
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        for byte in &buffer[..count] {
            // The word begins with its only line feed but the last.
            *matched = if STOP[*matched] == *byte {
                *matched + 1
            } else {
                usize::from(STOP[0] == *byte)
            };
            if *matched == STOP.len() {
                self.stopped.store(true, Ordering::Relaxed);
                *matched = 0;
            }
        }
        if count == 0 {
            // Nobody is connected.
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(count)
    }

    fn write(&self, bytes: &[u8], deadline: Option<Instant>) -> std::io::Result<usize> {
        if self.stopped.load(Ordering::Relaxed) {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        self.port.write(bytes, deadline)
    }
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_millis(200))
}

/// Reads what there is.
fn listen(stream: &Watched, patience: Duration) -> usize {
    let mut chunk = [0; 4096];
    let deadline = Some(Instant::now() + patience);
    stream.read(&mut chunk, deadline).unwrap_or(0)
}

/// Bytes without end.
fn garbage(stream: &Watched) -> u64 {
    let bytes: Vec<u8> = (0..65536_u32).map(|at| (at * 31 % 251) as u8).collect();
    let _ = stream.write(&bytes, soon());
    listen(stream, Duration::from_millis(1));
    1
}

/// Answers to hellos with nothing true in them, and hellos in return.
fn answers(stream: &Watched) -> u64 {
    if listen(stream, Duration::from_millis(200)) == 0 {
        return 0;
    }
    for outcome in [1, 0, 7] {
        let mut bytes = handshake::ANSWER.to_vec();
        bytes.extend([0x5a; 16]);
        bytes.extend([1, 0, 1, 0, outcome]);
        bytes.extend([0xa5; 48]);
        bytes.extend(handshake::HELLO);
        let _ = stream.write(&bytes, soon());
    }
    3
}

/// A conversation with the monitor's own key, which the hostile program has.
fn converse(name: &str, stream: &Arc<Watched>, configuration: &Configuration) -> Result<u64> {
    let keys = KeyPair::from_secret(configuration.secret_key.clone())?;
    let as_stream = Arc::clone(stream) as Arc<dyn Stream>;
    let deadline = Some(Instant::now() + Duration::from_secs(2));
    let accepted = Session::accept(&as_stream, &keys, &configuration.clients, ROLE, deadline);
    let Ok((session, _)) = accepted else {
        return Ok(0);
    };
    // What may be sent is our own choice.
    let mut session = session.with_limits(REPLY_LIMIT, usize::MAX);
    let target = configuration.targets.first().context("a target")?;
    let mut tries = 0;
    while !stream.stopped.load(Ordering::Relaxed) {
        let request: Request = match session.receive(soon()) {
            Ok(request) => request,
            Err(error) if error.is_deadline() => continue,
            Err(_) => break,
        };
        tries += 1;
        let ended = match request {
            // Whoever asks for rows asks for the targets first.
            Request::Targets { id } if name != "channel_malformed" => {
                let targets = vec![TargetReport {
                    name: target.name.clone(),
                    pci: None,
                    ram_size: u64::MAX,
                    state: TargetState::Running {
                        banner: ESCAPES.to_owned(),
                        build_id: Some(ESCAPES.to_owned()),
                        instance: 1,
                    },
                    trust_level: TrustLevel::L1,
                    boots: u64::MAX,
                    gate: GateReport::None,
                }];
                session.send(&Reply::Targets { id, targets }, later())
            }
            request => match name {
                "channel_malformed" => session.send(&[0xff_u8; 4000][..], later()),
                "channel_oversized" => session.send(&vec![0x5a_u8; 4 << 20], later()),
                "channel_endless" => endless(&mut session, stream, &request),
                "channel_escapes" => escapes(&mut session, &request),
                other => bail!("there is no attempt {other}"),
            },
        };
        if ended.is_err() {
            break;
        }
    }
    Ok(tries)
}

/// Far away: a port whose other side has gone fails at once.
fn later() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(100))
}

fn id_of(request: &Request) -> u32 {
    match request {
        Request::Query { id, .. }
        | Request::Read { id, .. }
        | Request::Translate { id, .. }
        | Request::Check { id, .. }
        | Request::Targets { id }
        | Request::Tables { id }
        | Request::Status { id }
        | Request::Credit { id, .. }
        | Request::Cancel { id } => *id,
        Request::Acknowledge { .. } => 0,
    }
}

/// Bytes without end for whoever asked for a few, whatever credit is given.
fn endless(
    session: &mut Session,
    stream: &Watched,
    request: &Request,
) -> Result<(), secmon_channel::ChannelError> {
    let id = id_of(request);
    let mut address = 0;
    while !stream.stopped.load(Ordering::Relaxed) {
        let bytes = vec![0x41; 60_000];
        let next = address + bytes.len() as u64;
        session.send(&Reply::Bytes { id, address, bytes }, later())?;
        address = next;
        // Not for what is said, but for the word that ends this.
        listen(stream, Duration::from_millis(1));
    }
    Ok(())
}

/// Answers that would act on a terminal.
fn escapes(session: &mut Session, request: &Request) -> Result<(), secmon_channel::ChannelError> {
    let id = id_of(request);
    let text = ESCAPES;
    match request {
        Request::Query { query, .. } if query.limit == Some(3) => {
            let row = vec![Cell::One(secmon_monitor::protocol::Scalar::Text(
                text.as_bytes().to_vec(),
            ))];
            let columns = query.columns.as_ref().map_or(1, Vec::len);
            let rows = vec![row.into_iter().cycle().take(columns).collect(); 3];
            session.send(&Reply::Rows { id, rows }, later())?;
            let end = End {
                sent: 3,
                error: Some(text.to_owned()),
                ..End::default()
            };
            session.send(&Reply::End { id, end }, later())
        }
        _ => session.send(
            &Reply::Refused {
                id,
                refusal: Refusal::TargetNotReady {
                    name: text.to_owned(),
                    reason: text.to_owned(),
                },
            },
            later(),
        ),
    }
}

/// Text and control characters to the console: through the kernel, then by the
/// port itself, at the line's highest speed and far beyond it.
fn console_flood() -> Result<Report> {
    const LINES: u64 = 18_000;
    const SERIAL: u16 = 0x3f8;
    let mut report = Report::new();
    let line = [
        b"\x1b]0;owned\x07\x1b[31m ".as_slice(),
        &[b'x'; 80],
        b"\r\n",
    ]
    .concat();
    let mut console = File::options().write(true).open("/dev/console")?;
    console.write_all(&line)?;
    let ports = Ports::open()?;
    // Divisor 1, 8 bits, the queue of 16 bytes on.
    for (register, value) in [(3, 0x83), (0, 1), (1, 0), (3, 3), (2, 1)] {
        ports.write_u8(SERIAL + register, value);
    }
    let paced = Instant::now() + Duration::from_secs(5);
    for _ in 0..LINES {
        for bytes in line.chunks(16) {
            while ports.read_u8(SERIAL + 5) & 0x20 == 0 && Instant::now() < paced {}
            for byte in bytes {
                ports.write_u8(SERIAL, *byte);
            }
        }
        report.tries += 1;
    }
    Ok(report)
}
