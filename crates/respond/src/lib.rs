//! Acts on a target through its gate: lets it stand still until an operator
//! lets it go on, cuts its network, has its memory dumped, ends a process.
//!
//! Everything is asked of a gate by a monitor's own key; the grant decides, the
//! gate's log has each use, and what is refused is an error with its reason.
//! Nothing here writes to a target by another way, and nothing here decides
//! when to act.

#![forbid(unsafe_code)]

mod actions;
mod error;
mod kill;
mod line;
mod place;
mod responder;
mod victim;

pub use actions::{Dumped, connect_network, disconnect_network, dump, pause, resume};
pub use error::RespondError;
pub use kill::{Killed, Patience, kill};
pub use line::{Connect, Line, Session, Work};
pub use responder::{
    CurrentGuest, GateResponder, connect_work, disconnect_work, dump_name, dump_work, kill_work,
    pause_work, resume_work,
};
pub use victim::{Victim, VictimError};
