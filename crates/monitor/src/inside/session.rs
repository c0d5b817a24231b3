//! Serves the clients of a channel, one after another; each channel has a
//! thread of its own that does.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use secmon_channel::{ChannelError, MAX_FRAME, Peer, Session, Stream, Writer};

use super::answer::{self, Sink, Unsent};
use super::credit::{Permit, Requests};
use super::kept::Kept;
use super::worker::Shared;
use super::{check, log, place};
use crate::protocol::{
    Check, End, FindingKind, Pause, Query, READ_LIMIT, REPLY_LIMIT, REQUEST_LIMIT, ROLE, Refusal,
    Reply, Request, Severity, StatusReport,
};

/// How long a client may take to read what is sent.
const SEND: Duration = Duration::from_secs(30);
/// How often the reader looks whether the session is over.
const LOOK: Duration = Duration::from_millis(500);
/// How long a client of an earlier worker may take to hear that it is over.
const GOODBYE: Duration = Duration::from_secs(1);
/// Between two heartbeats.
const BEAT: Duration = Duration::from_secs(1);
/// How long to wait for a host that is not connected, which a port has no
/// other way to tell: on the channel that is tried first, and on the others.
const NOBODY: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(250)];
/// Findings that are sent at once.
const FINDINGS: usize = 64;
/// Refusals of strangers are told at most so often.
const REFUSALS: Duration = Duration::from_secs(10);

/// Accepts clients on the channel of this number, one after another, for ever.
pub(super) fn serve(shared: &Arc<Shared>, stream: &Arc<dyn Stream>, number: usize) -> ! {
    let mut told: Option<Instant> = None;
    let mut untold: u64 = 0;
    let nobody = NOBODY[usize::from(number > 0)];
    let beat = || {
        if let Some(pulse) = shared.serving.get(number) {
            pulse.beat();
        }
    };
    end_earlier(stream);
    loop {
        beat();
        let deadline = Instant::now().checked_add(LOOK);
        let (keys, peers) = (&shared.keys, &shared.clients);
        match Session::accept(stream, keys, peers, ROLE, deadline) {
            Ok((session, peer)) => converse(shared, session, &peer, &beat),
            Err(error) if error.is_deadline() => {}
            // A client said hello again, as the monitor took long to answer.
            Err(ChannelError::FrameLength { length: u32::MAX }) => {}
            Err(ChannelError::Ended { .. } | ChannelError::Stream { .. }) => thread::sleep(nobody),
            Err(error) => {
                untold = untold.saturating_add(1);
                if told.is_none_or(|last| last.elapsed() >= REFUSALS) {
                    let text =
                        format!("{untold} refused since this was last told; the last: {error}");
                    shared.tell(None, Severity::Warning, FindingKind::ClientRefused, &text);
                    told = Some(Instant::now());
                    untold = 0;
                }
                thread::sleep(nobody);
            }
        }
    }
}

/// Ends the session that a worker before this one may have left open, whose
/// client would wait for a reply that nobody sends any more.
fn end_earlier(stream: &Arc<dyn Stream>) {
    /// No frame has the length that these bytes are; the first of them may be
    /// taken for the rest of a frame that the other worker began.
    static NO_FRAMES: [u8; MAX_FRAME + 8] = [0xff; MAX_FRAME + 8];
    let deadline = Instant::now().checked_add(GOODBYE);
    let mut rest = &NO_FRAMES[..];
    while !rest.is_empty() {
        match stream.write(rest, deadline) {
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            // Nobody is connected, or nobody reads.
            Err(_) => return,
        }
    }
}

/// What the threads of a session share.
struct Conversation {
    shared: Arc<Shared>,
    writer: Mutex<Writer>,
    requests: Requests,
    client: String,
}

impl Conversation {
    /// Sends a message; a client that does not take it ends the session.
    fn send(&self, reply: &Reply) -> Result<(), Unsent> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if self.requests.is_over() {
            return Err(Unsent::Over);
        }
        match writer.send(reply, Instant::now().checked_add(SEND)) {
            Ok(()) => Ok(()),
            // That is the request's matter.
            Err(ChannelError::TooLong { .. } | ChannelError::Encode { .. }) => {
                Err(Unsent::TooLarge)
            }
            Err(error) => {
                log(format_args!("client {}: {error}", self.client));
                self.requests.stop();
                Err(Unsent::Over)
            }
        }
    }

    fn refuse(&self, id: u32, refusal: Refusal) {
        let _ = self.send(&Reply::Refused { id, refusal });
    }
}

/// The way of one request's answer.
struct Answering<'a> {
    conversation: &'a Conversation,
    id: u32,
}

impl Sink for Answering<'_> {
    fn permit(&self) -> Permit {
        self.conversation.requests.take(self.id)
    }

    fn send(&self, reply: &Reply) -> Result<(), Unsent> {
        self.conversation.send(reply)
    }
}

/// Serves a client until it goes.
fn converse(shared: &Arc<Shared>, session: Session, peer: &Peer, beat: &dyn Fn()) {
    log(format_args!("client {} came", peer.name));
    let (mut reader, writer) = session.with_limits(REQUEST_LIMIT, REPLY_LIMIT).split();
    let conversation = Arc::new(Conversation {
        shared: Arc::clone(shared),
        writer: Mutex::new(writer),
        requests: Requests::default(),
        client: peer.name.clone(),
    });
    let mut threads = vec![start("notices", &conversation, |conversation| {
        notices(&conversation);
    })];
    while !conversation.requests.is_over() {
        beat();
        threads.retain(|thread| !thread.as_ref().is_some_and(JoinHandle::is_finished));
        match reader.receive::<Request>(Instant::now().checked_add(LOOK)) {
            Ok(request) => threads.extend(handle(&conversation, request)),
            Err(error) if error.is_deadline() => {}
            Err(error) => {
                log(format_args!("client {} went: {error}", peer.name));
                break;
            }
        }
    }
    conversation.requests.stop();
    for thread in threads.into_iter().flatten() {
        beat();
        let _ = thread.join();
    }
}

fn start(
    name: &str,
    conversation: &Arc<Conversation>,
    work: impl FnOnce(Arc<Conversation>) + Send + 'static,
) -> Option<JoinHandle<()>> {
    let conversation = Arc::clone(conversation);
    let thread = thread::Builder::new().name(name.to_owned());
    match thread.spawn(move || work(conversation)) {
        Ok(thread) => Some(thread),
        Err(error) => {
            log(format_args!("no thread for {name}: {error}"));
            None
        }
    }
}

/// Sends heartbeats and findings until the session is over.
fn notices(conversation: &Conversation) {
    let shared = &conversation.shared;
    let listener = shared.join();
    let mut sent = 0;
    while !conversation.requests.is_over() {
        let heartbeat = shared.heartbeat(conversation.requests.running());
        if conversation.send(&Reply::Heartbeat(heartbeat)).is_err() {
            return;
        }
        let next = Instant::now().checked_add(BEAT);
        loop {
            for finding in shared.findings_after(sent, FINDINGS) {
                sent = finding.sequence;
                if conversation.send(&Reply::Finding(finding)).is_err() {
                    return;
                }
                listener.sent(sent);
            }
            if !shared.wait_for_findings(sent, next) || conversation.requests.is_over() {
                break;
            }
        }
    }
}

/// Answers a request, or starts a thread that does.
fn handle(conversation: &Arc<Conversation>, request: Request) -> Option<Option<JoinHandle<()>>> {
    let shared = &conversation.shared;
    match request {
        Request::Credit { id, messages } => conversation.requests.give(id, messages),
        Request::Cancel { id } => conversation.requests.cancel(id),
        Request::Acknowledge { through } => shared.acknowledge(through),
        Request::Targets { id } => {
            let targets = shared.targets.iter().map(|target| target.report());
            let targets = targets.collect();
            let _ = conversation.send(&Reply::Targets { id, targets });
        }
        Request::Tables { id } => {
            let tables = answer::tables();
            let _ = conversation.send(&Reply::Tables { id, tables });
        }
        Request::Status { id } => {
            let status = StatusReport {
                name: shared.name.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                kernel: shared.release.clone(),
                client: conversation.client.clone(),
                heartbeat: shared.heartbeat(conversation.requests.running()),
                weaknesses: shared.weaknesses.clone(),
            };
            let _ = conversation.send(&Reply::Status { id, status });
        }
        Request::Query { id, query } => {
            return run(conversation, id, query.credit, move |conversation| {
                answer_query(conversation, id, &query)
            });
        }
        Request::Check { id, check } => {
            return run(conversation, id, check.credit, move |conversation| {
                answer_check(conversation, id, &check)
            });
        }
        Request::Read {
            id,
            target,
            place,
            length,
            credit,
        } => {
            return run(conversation, id, credit, move |conversation| {
                if length > READ_LIMIT {
                    return Err(Refusal::TooMuch {
                        what: format!("{length} bytes, at most {READ_LIMIT}"),
                    });
                }
                let guest = conversation.shared.guest(&target)?;
                let found = place::find(&guest, &place)?;
                Ok(answer::bytes(
                    id,
                    &found,
                    length,
                    &Answering { conversation, id },
                ))
            });
        }
        Request::Translate { id, target, places } => {
            return run(conversation, id, 0, move |conversation| {
                let guest = conversation.shared.guest(&target)?;
                answer::walks(id, &guest, &places, &Answering { conversation, id })
            });
        }
    }
    None
}

fn answer_query(conversation: &Conversation, id: u32, query: &Query) -> Result<End, Refusal> {
    let checked = answer::check(query)?;
    let shared = &conversation.shared;
    let sink = Answering { conversation, id };
    if query.pause == Pause::None {
        let guest = shared.guest(&query.target)?;
        return Ok(answer::rows(id, &checked, &guest, &sink));
    }
    // How fast the client reads must not decide how long the target stands.
    let hold = shared.hold(&query.target)?;
    let kept = Kept::default();
    let guest = shared.guest(&query.target)?;
    let read = answer::rows(id, &checked, &guest, &kept);
    let held = hold.release();
    let mut end = kept.send_all(read, &sink);
    if let Err(reason) = held {
        let text = format!("the target went on while it was read: {reason}");
        end.error = Some(match end.error {
            Some(error) => format!("{text}; {error}"),
            None => text,
        });
    }
    Ok(end)
}

fn answer_check(conversation: &Conversation, id: u32, asked: &Check) -> Result<End, Refusal> {
    let detectors = check::chosen(asked)?;
    let shared = &conversation.shared;
    let hold = match asked.pause {
        Pause::None => None,
        Pause::WhileRead => Some(shared.hold(&asked.target)?),
    };
    let guest = shared.guest(&asked.target)?;
    let report = check::look(&guest, &detectors);
    let held = match hold {
        Some(hold) => hold.release(),
        None => Ok(()),
    };
    let mut end = check::send(id, &report, &Answering { conversation, id });
    end.torn_reads = guest.diagnostics().torn_reads();
    if let Err(reason) = held {
        end.error = Some(format!("the target went on while it was checked: {reason}"));
    }
    Ok(end)
}

/// Runs a request on a thread of its own, if there is room for it.
fn run(
    conversation: &Arc<Conversation>,
    id: u32,
    credit: u32,
    work: impl FnOnce(&Conversation) -> Result<End, Refusal> + Send + 'static,
) -> Option<Option<JoinHandle<()>>> {
    let shared = &conversation.shared;
    let Some(room) = shared.room() else {
        let running = shared.running();
        conversation.refuse(id, Refusal::Busy { running });
        return None;
    };
    let limit = shared.limits.requests;
    if let Err(running) = conversation.requests.begin(id, credit, limit) {
        conversation.refuse(id, Refusal::Busy { running });
        return None;
    }
    let thread = start("request", conversation, move |conversation| {
        let outcome = work(&conversation);
        // The number, and the room, may be used again as soon as the client
        // hears the end.
        conversation.requests.end(id);
        drop(room);
        match outcome {
            Ok(end) => {
                let _ = conversation.send(&Reply::End { id, end });
            }
            Err(refusal) => conversation.refuse(id, refusal),
        }
    });
    if thread.is_none() {
        conversation.requests.end(id);
        let running = conversation.requests.running();
        conversation.refuse(id, Refusal::Busy { running });
    }
    Some(thread)
}
