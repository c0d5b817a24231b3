//! The client's side: asks one thing at a time, and keeps what comes unasked.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use secmon_channel::{ChannelError, KeyPair, PublicKey, Session, Stream};

use super::{
    Cell, DiagnosticEntry, End, Finding, Heartbeat, Place, Query, REPLY_LIMIT, REQUEST_LIMIT, ROLE,
    Refusal, Reply, Request, StatusReport, TableDescription, TargetReport, WalkEnd, WalkEntry,
};

/// How long a monitor, which has a heartbeat each second, may be silent.
const SILENCE: Duration = Duration::from_secs(60);
/// Messages of rows that may be on their way at once.
const CREDIT: u32 = 8;
/// Findings that are kept until they are asked for; more are left to the
/// monitor, which sends what is not acknowledged again.
const KEPT: usize = 4096;

/// Why a monitor did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
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
        self.ask(|id| Request::Query { id, query }, sink)
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
        self.ask(ask, sink)
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
        self.ask(|id| Request::Translate { id, target, places }, sink)
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
        sink: &mut dyn FnMut(Answer) -> ControlFlow<()>,
    ) -> Result<End, ClientError> {
        let own = self.take_id();
        self.send(&request(own))?;
        let mut wanted = true;
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
                Reply::End { id, end } if id == own => return Ok(end),
                Reply::Refused { id, refusal } if id == own => return Err(refusal.into()),
                other => {
                    self.keep(other);
                    continue;
                }
            };
            if !wanted {
                continue;
            }
            if sink(answer).is_break() {
                wanted = false;
                self.send(&Request::Cancel { id: own })?;
            } else if takes_credit {
                let messages = 1;
                self.send(&Request::Credit { id: own, messages })?;
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
