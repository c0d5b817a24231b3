//! Syslog: RFC 5424 messages over UDP (RFC 5426), TCP with octet counting
//! (RFC 6587), or the local socket `/dev/log`.
//!
//! None of these confirms what it took. UDP may lose anything; over TCP what
//! was on its way when a connection ended is lost, and a broken connection is
//! noticed at the next message at the latest. Where every event has to arrive,
//! use [`otlp`](crate::otlp) or the store. Nothing is encrypted: send to the own
//! host, or through a relay there.

mod message;
mod transport;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::{Bounds, Exporter};
use message::Formatter;
use transport::SyslogTransport;

/// Where messages go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A datagram each, `HOST:PORT`.
    Udp(String),
    /// A connection, `HOST:PORT`.
    Tcp(String),
    /// A UNIX socket of this host, of datagrams or a stream: `/dev/log`.
    Unix(PathBuf),
}

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no syslog address: write udp://HOST:PORT, tcp://HOST:PORT or unix:/dev/log")]
pub struct AddressError(pub String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return path
                .is_absolute()
                .then_some(Self::Unix(path))
                .ok_or_else(wrong);
        }
        let (scheme, place) = text.split_once("://").ok_or_else(wrong)?;
        let (host, port) = place.rsplit_once(':').ok_or_else(wrong)?;
        let port: u16 = port.parse().map_err(|_| wrong())?;
        if host.is_empty() || port == 0 {
            return Err(wrong());
        }
        match scheme {
            "udp" => Ok(Self::Udp(place.to_owned())),
            "tcp" => Ok(Self::Tcp(place.to_owned())),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Udp(place) => write!(f, "udp://{place}"),
            Self::Tcp(place) => write!(f, "tcp://{place}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Address {
    /// The longest message: what every receiver of datagrams should take
    /// (RFC 5424, 6.1), and what common ones take of a stream.
    fn longest(&self) -> usize {
        match self {
            Self::Udp(_) => 2048,
            Self::Tcp(_) | Self::Unix(_) => 8192,
        }
    }
}

/// Who a message is from, to a syslog server (RFC 5424, 6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facility(u8);

impl Facility {
    /// `authpriv`: security messages.
    pub const SECURITY: Self = Self(10);

    /// A facility by its number, 0 to 23.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if number < 24 {
            Some(Self(number))
        } else {
            None
        }
    }
}

/// Starts a sink that sends to a syslog server. The server need not be there
/// yet.
///
/// # Errors
/// If no thread can be started.
pub fn start(address: Address, facility: Facility, bounds: Bounds) -> std::io::Result<Exporter> {
    let formatter = Formatter::new(facility.0, address.longest());
    let name = format!("syslog {address}");
    let transport = SyslogTransport::new(address);
    Exporter::start(name, bounds, Box::new(formatter), transport)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for right in ["udp://[::1]:514", "tcp://log.example:6514", "unix:/dev/log"] {
            assert_eq!(right.parse::<Address>().expect(right).to_string(), right);
        }
        for wrong in [
            "",
            "udp://x",
            "udp://:514",
            "tls://x:1",
            "unix:log",
            "tcp://x:0",
        ] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
        assert_eq!(Facility::new(24), None);
    }
}
