//! Messages between two parties that know each other's keys: a client on the
//! host and the monitoring VM, or the monitoring VM and a gate.
//!
//! The stream under a [`Session`] may be anything that carries bytes both
//! ways: a UNIX socket, a virtio-serial port. Whoever can write to it is taken
//! for hostile until the handshake is through, and a peer that holds a right
//! key can still send nothing but bounded messages of the expected type. The
//! crate knows neither guests nor hypervisors, and no message but its own
//! handshake.
//!
//! # On the wire
//! All numbers are little-endian. A connection begins with a hello and its
//! answer (the module [`handshake`] has both byte by byte),
//! which hold the two messages of the Noise handshake
//! `Noise_IK_25519_ChaChaPoly_BLAKE2s`. From then on there are only frames:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | how many bytes follow, 17 to 65,535 |
//! | n | one Noise transport message |
//!
//! A frame's plaintext is one byte that says whether more of the message
//! follows, and a part of the message. A message is a value in the encoding of
//! the crate `postcard`.
//!
//! A virtio-serial port keeps bytes of an earlier connection. That is why a
//! hello begins with four bytes that no frame can begin with (a session that
//! is still open ends there) and a marker that is looked for in whatever
//! precedes it.
//!
//! ```
//! use std::os::unix::net::UnixStream;
//! use std::sync::Arc;
//! use secmon_channel::{Descriptor, KeyPair, Peer, Role, Session, Stream};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! const ROLE: Role = Role { name: "example", version: 1 };
//! let (left, right) = UnixStream::pair()?;
//! let (client, server) = (KeyPair::generate()?, KeyPair::generate()?);
//! let allowed = [Peer { name: "client".into(), key: client.public() }];
//! let expected = server.public();
//! let stream: Arc<dyn Stream> = Arc::new(Descriptor::new(right)?);
//! let thread = std::thread::spawn(move || {
//!     let (mut session, peer) = Session::accept(&stream, &server, &allowed, ROLE, None)?;
//!     let question: String = session.receive(None)?;
//!     session.send(&format!("{} said {question}", peer.name), None)
//! });
//! let stream: Arc<dyn Stream> = Arc::new(Descriptor::new(left)?);
//! let mut session = Session::initiate(&stream, &client, &expected, ROLE, None)?;
//! session.send("hello", None)?;
//! assert_eq!(session.receive::<String>(None)?, "client said hello");
//! thread.join().expect("no panic")?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod error;
mod frame;
pub mod handshake;
mod key;
mod message;
mod session;
mod stream;

pub use error::{ChannelError, Versions};
pub use frame::{MAX_FRAME, Reader, Writer};
pub use key::{KeyError, KeyPair, Peer, PublicKey, SecretKey};
pub use message::{DEFAULT_LIMIT, decode, encode};
pub use session::{Role, Session};
pub use stream::{Descriptor, Stream};
