//! The client's side: asks one thing at a time, and keeps what comes unasked.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use secmon_channel::{ChannelError, KeyPair, PublicKey, Session, Stream};

use super::{
    Cell, Check, CheckFinding, DetectorResult, DiagnosticEntry, End, Finding, Heartbeat, Place,
    Query, REPLY_LIMIT, REQUEST_LIMIT, ROLE, Refusal, Reply, Request, StatusReport,
    TableDescription, TargetReport, WalkEnd, WalkEntry,
};

/// How long a monitor, which has a heartbeat each second, may be silent.
const SILENCE: Duration = Duration::from_secs(60);
/// Messages of rows that may be on their way at once.
const CREDIT: u32 = 8;
/// Messages of a request's answer that come without credit: diagnostics, and
/// as many more as addresses were asked about.
const WITHOUT_CREDIT: usize = 16;
/// Findings that are kept until they are asked for; more are left to the
/// monitor, which sends what is not acknowledged again.
const KEPT: usize = 4096;

/// Why a monitor did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The channel failed.
    #[error(transparent)]
    Channel(ChannelError),
    /// What answers was started anew.
    #[error(
        "the monitor ended the conversation: it has been started anew, or looks at its targets anew as one came or went; ask again"
    )]
    StartedAnew,
    /// The monitor refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The monitor said something that answers nothing.
    #[error(
        "the monitor answered {asked} with something else: use the same release of secmon on both sides"
    )]
    Unexpected {
        /// What was asked.
        asked: &'static str,
    },
    /// The monitor sends what nobody asked for.
    #[error(
        "the monitor sends more than it was asked for, which a sound one never does; the conversation is ended"
    )]
    Unasked,
}

impl From<ChannelError> for ClientError {
    fn from(error: ChannelError) -> Self {
        match error {
            // What a monitor says first, to whom an earlier one talked.
            ChannelError::FrameLength { length: u32::MAX } => Self::StartedAnew,
            error => Self::Channel(error),
        }
    }
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Rows.
    Rows(Vec<Vec<Cell>>),
    /// Bytes, and the address of the first.
    Bytes(u64, Vec<u8>),
    /// How an address is translated.
    Walk {
        /// The address.
        address: u64,
        /// The entries read.
        entries: Vec<WalkEntry>,
        /// Where it led, or why nowhere.
        end: Result<WalkEnd, String>,
    },
    /// What could not be read.
    Diagnostics(Vec<DiagnosticEntry>),
    /// What the detectors of a check did.
    Looked(Vec<DetectorResult>),
    /// Something that one of them found.
    Found(Box<CheckFinding>),
}

/// What comes unasked.
#[derive(Debug, Clone, PartialEq)]
pub enum Notice {
    /// The monitor lives.
    Heartbeat(Heartbeat),
    /// Something to know. To be acknowledged once it is kept elsewhere.
    Finding(Finding),
}

/// A conversation with a monitor.
#[derive(Debug)]
pub struct Client {
    session: Session,
    next_id: u32,
    findings: VecDeque<Finding>,
    heartbeat: Option<Heartbeat>,
}

impl Client {
    /// Begins a conversation with the monitor that holds `monitor`.
    ///
    /// # Errors
    /// Those of [`Session::initiate`].
    pub fn connect(
        stream: &Arc<dyn Stream>,
        own: &KeyPair,
        monitor: &PublicKey,
        deadline: Option<Instant>,
    ) -> Result<Self, ClientError> {
        let session = Session::initiate(stream, own, monitor, ROLE, deadline)?
            .with_limits(REPLY_LIMIT, REQUEST_LIMIT);
        Ok(Self {
            session,
            next_id: 1,
            findings: VecDeque::new(),
            heartbeat: None,
        })
    }

    /// Asks for rows and hands them on as they come, until `sink` breaks.
    ///
    /// # Errors
    /// If the query is refused or the channel fails. What is wrong with the
    /// guest is in the [`End`] and in [`Answer::Diagnostics`].
    pub fn query(
        &mut self,
        mut query: Query,
        sink: &mut dyn FnMut(Answer) -> ControlFlow<()>,
    ) -> Result<End, ClientError> {
        query.credit = CREDIT;
        self.ask(|id| Request::Query { id, query }, 0, sink)
    }

    /// Asks for bytes of memory.
    ///
    /// # Errors
    /// As [`query`](Self::query).
    pub fn read(
        &mut self,
        target: &str,
        place: Place,
        length: u64,
        sink: &mut dyn FnMut(Answer) -> ControlFlow<()>,
    ) -> Result<End, ClientError> {
        let target = target.to_owned();
        let ask = |id| Request::Read {
            id,
            target,
            place,
            length,
            credit: CREDIT,
        };
        self.ask(ask, 0, sink)
    }

    /// Asks how addresses are translated.
    ///
    /// # Errors
    /// As [`query`](Self::query).
    pub fn translate(
        &mut self,
        target: &str,
        places: Vec<Place>,
        sink: &mut dyn FnMut(Answer) -> ControlFlow<()>,
    ) -> Result<End, ClientError> {
        let target = target.to_owned();
        let walks = places.len();
        let ask = |id| Request::Translate { id, target, places };
        self.ask(ask, walks, sink)
    }

    /// Asks what detectors find.
    ///
    /// # Errors
    /// As [`query`](Self::query).
    pub fn check(
        &mut self,
        mut check: Check,
        sink: &mut dyn FnMut(Answer) -> ControlFlow<()>,
    ) -> Result<End, ClientError> {
        check.credit = CREDIT;
        self.ask(|id| Request::Check { id, check }, 0, sink)
    }

    /// The targets.
    ///
    /// # Errors
    /// If the channel fails.
    pub fn targets(&mut self) -> Result<Vec<TargetReport>, ClientError> {
        match self.ask_once("what the targets are", |id| Request::Targets { id })? {
            Reply::Targets { targets, .. } => Ok(targets),
            _ => Err(unexpected("what the targets are")),
        }
    }

    /// The monitor's tables.
    ///
    /// # Errors
    /// If the channel fails.
    pub fn tables(&mut self) -> Result<Vec<TableDescription>, ClientError> {
        match self.ask_once("which tables there are", |id| Request::Tables { id })? {
            Reply::Tables { tables, .. } => Ok(tables),
            _ => Err(unexpected("which tables there are")),
        }
    }

    /// How the monitor is.
    ///
    /// # Errors
    /// If the channel fails.
    pub fn status(&mut self) -> Result<StatusReport, ClientError> {
        match self.ask_once("how it is", |id| Request::Status { id })? {
            Reply::Status { status, .. } => Ok(status),
            _ => Err(unexpected("how it is")),
        }
    }

    /// The next heartbeat or finding.
    ///
    /// # Errors
    /// At the deadline, after which it can be tried again, or if the channel
    /// fails.
    pub fn notice(&mut self, deadline: Option<Instant>) -> Result<Notice, ClientError> {
        loop {
            if let Some(finding) = self.findings.pop_front() {
                return Ok(Notice::Finding(finding));
            }
            if let Some(heartbeat) = self.heartbeat.take() {
                return Ok(Notice::Heartbeat(heartbeat));
            }
            let reply = self.session.receive(deadline)?;
            self.keep(reply);
        }
    }

    /// Tells the monitor that findings up to this number are kept elsewhere.
    ///
    /// # Errors
    /// If the channel fails.
    pub fn acknowledge(&mut self, through: u64) -> Result<(), ClientError> {
        self.send(&Request::Acknowledge { through })
    }

    fn send(&mut self, request: &Request) -> Result<(), ClientError> {
        Ok(self.session.send(request, silence())?)
    }

    fn take_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        id
    }

    fn ask(
        &mut self,
        request: impl FnOnce(u32) -> Request,
        walks: usize,
        sink: &mut dyn FnMut(Answer) -> ControlFlow<()>,
    ) -> Result<End, ClientError> {
        let own = self.take_id();
        self.send(&request(own))?;
        let mut wanted = true;
        // What may still come: a hostile monitor must not keep its client busy
        // for ever.
        let mut credit = CREDIT;
        let mut others = walks.saturating_add(WITHOUT_CREDIT);
        loop {
            let reply = self.session.receive(silence())?;
            let (answer, takes_credit) = match reply {
                Reply::Rows { id, rows } if id == own => (Answer::Rows(rows), true),
                Reply::Bytes { id, address, bytes } if id == own => {
                    (Answer::Bytes(address, bytes), true)
                }
                Reply::Walk {
                    id,
                    address,
                    entries,
                    end,
                } if id == own => {
                    let walk = Answer::Walk {
                        address,
                        entries,
                        end,
                    };
                    (walk, false)
                }
                Reply::Diagnostics { id, entries } if id == own => {
                    (Answer::Diagnostics(entries), false)
                }
                Reply::Looked { id, detectors } if id == own => (Answer::Looked(detectors), false),
                Reply::Found { id, finding } if id == own => (Answer::Found(finding), true),
                Reply::End { id, end } if id == own => return Ok(end),
                Reply::Refused { id, refusal } if id == own => return Err(refusal.into()),
                other => {
                    self.keep(other);
                    continue;
                }
            };
            if takes_credit {
                credit = credit.checked_sub(1).ok_or(ClientError::Unasked)?;
            } else {
                others = others.checked_sub(1).ok_or(ClientError::Unasked)?;
            }
            if !wanted {
                continue;
            }
            if sink(answer).is_break() {
                wanted = false;
                self.send(&Request::Cancel { id: own })?;
            } else if takes_credit {
                let messages = 1;
                self.send(&Request::Credit { id: own, messages })?;
                credit = credit.saturating_add(messages);
            }
        }
    }

    fn ask_once(
        &mut self,
        asked: &'static str,
        request: impl FnOnce(u32) -> Request,
    ) -> Result<Reply, ClientError> {
        let own = self.take_id();
        self.send(&request(own))?;
        loop {
            let reply = self.session.receive(silence())?;
            match &reply {
                Reply::Targets { id, .. } | Reply::Tables { id, .. } | Reply::Status { id, .. }
                    if *id == own =>
                {
                    return Ok(reply);
                }
                Reply::Refused { id, refusal } if *id == own => return Err(refusal.clone().into()),
                Reply::End { id, .. } if *id == own => return Err(unexpected(asked)),
                _ => self.keep(reply),
            }
        }
    }

    /// Keeps what came unasked. What belongs to an earlier request is over.
    fn keep(&mut self, reply: Reply) {
        match reply {
            Reply::Heartbeat(heartbeat) => self.heartbeat = Some(heartbeat),
            Reply::Finding(finding) if self.findings.len() < KEPT => {
                self.findings.push_back(finding);
            }
            _ => {}
        }
    }
}

fn unexpected(asked: &'static str) -> ClientError {
    ClientError::Unexpected { asked }
}

fn silence() -> Option<Instant> {
    Instant::now().checked_add(SILENCE)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use secmon_channel::{Descriptor, Peer};

    use super::*;

    /// A client, and what its monitor's messages to the first request are made
    /// of, sent until the client has enough.
    fn against(message: Reply) -> Result<End, ClientError> {
        let (left, right) = UnixStream::pair().expect("a pair");
        let [client, monitor] = [(); 2].map(|()| KeyPair::generate().expect("a key"));
        let peers = [Peer {
            name: "client".into(),
            key: client.public(),
        }];
        let key = monitor.public();
        let monitor = std::thread::spawn(move || {
            let stream: Arc<dyn Stream> = Arc::new(Descriptor::new(right).expect("a stream"));
            let accepted = Session::accept(&stream, &monitor, &peers, ROLE, silence());
            let (mut session, _) = accepted.expect("a session");
            let _: Request = session.receive(silence()).expect("a request");
            while session.send(&message, silence()).is_ok() {}
        });
        let stream: Arc<dyn Stream> = Arc::new(Descriptor::new(left).expect("a stream"));
        let mut client = Client::connect(&stream, &client, &key, silence()).expect("a session");
        let mut taken = 0;
        let end = client.read("target", Place::Physical(0), 4, &mut |_| {
            taken += 1;
            ControlFlow::Break(())
        });
        drop((client, stream));
        monitor.join().expect("no panic");
        assert!(taken <= 1);
        end
    }

    #[test]
    fn a_monitor_that_was_started_anew_says_so() {
        use std::io::Write as _;
        let (left, mut right) = UnixStream::pair().expect("a pair");
        let [client, monitor] = [(); 2].map(|()| KeyPair::generate().expect("a key"));
        let peers = [Peer {
            name: "client".into(),
            key: client.public(),
        }];
        let key = monitor.public();
        let monitor = std::thread::spawn(move || {
            let again = right.try_clone().expect("a socket");
            let stream: Arc<dyn Stream> = Arc::new(Descriptor::new(again).expect("a stream"));
            let accepted = Session::accept(&stream, &monitor, &peers, ROLE, silence());
            let (mut session, _) = accepted.expect("a session");
            let _: Request = session.receive(silence()).expect("a request");
            right.write_all(&[0xff; 8]).expect("written");
            right
        });
        let stream: Arc<dyn Stream> = Arc::new(Descriptor::new(left).expect("a stream"));
        let mut client = Client::connect(&stream, &client, &key, silence()).expect("a session");
        let error = client.status().expect_err("nobody answers");
        assert!(matches!(error, ClientError::StartedAnew), "{error}");
        drop(monitor.join().expect("no panic"));
    }

    #[test]
    fn a_monitor_that_sends_without_end_is_left() {
        let (id, bytes) = (1, vec![0; 4]);
        let address = 0;
        let endless = [
            Reply::Bytes { id, address, bytes },
            Reply::Rows {
                id,
                rows: Vec::new(),
            },
            Reply::Diagnostics {
                id,
                entries: Vec::new(),
            },
        ];
        for message in endless {
            let end = against(message);
            assert!(matches!(end, Err(ClientError::Unasked)), "{end:?}");
        }
    }
}
