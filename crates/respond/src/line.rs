//! A session with a gate that is kept, and begun again when it ends.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use secmon_gate::client::{ClientError, GateClient};
use secmon_gate::protocol::Request;

use crate::RespondError;

/// Between two signs of life: a gate ends sessions that are silent for ten
/// seconds.
const HEARTBEAT: Duration = Duration::from_secs(3);

/// How long the gate may take to answer one.
const ANSWER: Duration = Duration::from_secs(5);

/// Something to be done with a gate; says what was done.
pub type Work = Box<dyn FnOnce(&mut GateClient) -> Result<String, RespondError> + Send>;

/// A way to a gate.
pub trait Line: Send {
    /// Does the work with a session, once.
    ///
    /// # Errors
    /// The work's, or [`RespondError::NoGate`] if there is no session.
    fn run(&mut self, work: Work) -> Result<String, RespondError>;
}

/// How a session is begun.
pub type Connect = Box<dyn Fn() -> Result<GateClient, String> + Send + Sync>;

/// A session that this process has itself, kept alive by a thread. A process
/// that gives up its right to make sockets begins it before.
pub struct Session {
    shared: Arc<Shared>,
}

struct Shared {
    connect: Connect,
    client: Mutex<Option<GateClient>>,
}

impl Shared {
    fn client(&self) -> MutexGuard<'_, Option<GateClient>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session {
    /// Begins a session.
    ///
    /// # Errors
    /// [`RespondError::NoGate`].
    pub fn begin(connect: Connect) -> Result<Self, RespondError> {
        let client = connect().map_err(RespondError::NoGate)?;
        let shared = Arc::new(Shared {
            connect,
            client: Mutex::new(Some(client)),
        });
        let kept = Arc::downgrade(&shared);
        thread::Builder::new()
            .name("gate-session".to_owned())
            .spawn(move || keep(&kept))
            .map_err(|error| RespondError::NoGate(format!("starting a thread: {error}")))?;
        Ok(Self { shared })
    }
}

impl Line for Session {
    fn run(&mut self, work: Work) -> Result<String, RespondError> {
        let mut client = self.shared.client();
        // A session may have ended without anybody's noticing yet.
        let alive = client.as_mut().is_some_and(is_alive);
        if !alive {
            *client = None;
        }
        let client = match &mut *client {
            Some(client) => client,
            empty => empty.insert((self.shared.connect)().map_err(RespondError::NoGate)?),
        };
        work(client)
    }
}

fn is_alive(client: &mut GateClient) -> bool {
    match client.ask(Request::Heartbeat, ANSWER) {
        Ok(_) | Err(ClientError::Refused(_)) => true,
        Err(ClientError::Channel(_)) => false,
    }
}

fn keep(kept: &Weak<Shared>) {
    loop {
        thread::sleep(HEARTBEAT);
        let Some(shared) = kept.upgrade() else { return };
        let mut client = shared.client();
        if !client.as_mut().is_some_and(is_alive) {
            *client = None;
        }
    }
}
