//! The way of messages to a syslog server.

use std::io::{self, ErrorKind, Write as _};
use std::net::{TcpStream, ToSocketAddrs, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::Duration;

use rustix::net::RecvFlags;

use super::Address;
use crate::queue::{Failure, Sent, Transport};

/// How long a connection may take, and a message on it.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often a datagram is offered to a receiver whose buffer is full.
const OFFERS: u32 = 100;

/// Sends to one server.
pub(crate) struct SyslogTransport {
    address: Address,
    connection: Option<Connection>,
}

enum Connection {
    Udp(UdpSocket),
    Tcp(TcpStream),
    Datagrams(UnixDatagram),
    Stream(UnixStream),
}

impl SyslogTransport {
    pub(crate) fn new(address: Address) -> Self {
        Self {
            address,
            connection: None,
        }
    }

    fn try_send(&mut self, message: &[u8]) -> io::Result<()> {
        let connection = match &mut self.connection {
            Some(connection) if !connection.has_ended() => connection,
            other => other.insert(connect(&self.address)?),
        };
        connection.send(message)
    }
}

impl Transport for SyslogTransport {
    fn batch(&self) -> usize {
        1
    }

    fn send(&mut self, messages: &[Vec<u8>]) -> Result<Sent, Failure> {
        let Some(message) = messages.first() else {
            return Ok(Sent::all(0));
        };
        match self.try_send(message) {
            Ok(()) => Ok(Sent::all(1)),
            Err(error) => {
                // After a part of a message nothing can follow it.
                self.connection = None;
                Err(Failure {
                    reason: error.to_string(),
                    wait: None,
                })
            }
        }
    }
}

fn connect(address: &Address) -> io::Result<Connection> {
    match address {
        Address::Udp(place) => {
            let target = resolve(place)?;
            let any = if target.is_ipv4() {
                "0.0.0.0:0"
            } else {
                "[::]:0"
            };
            let socket = UdpSocket::bind(any)?;
            socket.connect(target)?;
            Ok(Connection::Udp(socket))
        }
        Address::Tcp(place) => {
            let stream = TcpStream::connect_timeout(&resolve(place)?, PATIENCE)?;
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.set_nodelay(true)?;
            Ok(Connection::Tcp(stream))
        }
        Address::Unix(path) => {
            let socket = UnixDatagram::unbound()?;
            match socket.connect(path) {
                Ok(()) => {
                    socket.set_write_timeout(Some(PATIENCE))?;
                    Ok(Connection::Datagrams(socket))
                }
                // It is a stream's.
                Err(error)
                    if error.raw_os_error()
                        == Some(rustix::io::Errno::PROTOTYPE.raw_os_error()) =>
                {
                    let stream = UnixStream::connect(path)?;
                    stream.set_write_timeout(Some(PATIENCE))?;
                    Ok(Connection::Stream(stream))
                }
                Err(error) => Err(error),
            }
        }
    }
}

fn resolve(place: &str) -> io::Result<std::net::SocketAddr> {
    let none = || io::Error::new(ErrorKind::NotFound, format!("{place} has no address"));
    place.to_socket_addrs()?.next().ok_or_else(none)
}

impl Connection {
    /// Whether the server has closed it: a first message after that would seem
    /// to be taken.
    fn has_ended(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let mut byte = [0];
        let peeked = match self {
            Self::Tcp(stream) => rustix::net::recv(stream, &mut byte, flags),
            Self::Stream(stream) => rustix::net::recv(stream, &mut byte, flags),
            Self::Udp(_) | Self::Datagrams(_) => return false,
        };
        match peeked {
            // A server says nothing; one that does is none.
            Ok((count, _)) => count == 0,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => false,
            Err(_) => true,
        }
    }

    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        match self {
            // What an earlier datagram met (nobody listens) is told by the
            // next one's error, which then was not sent.
            Self::Udp(socket) => whole(socket.send(message)?, message),
            Self::Tcp(stream) => {
                let mut framed = format!("{} ", message.len()).into_bytes();
                framed.extend_from_slice(message);
                stream.write_all(&framed)
            }
            Self::Datagrams(socket) => {
                for _ in 0..OFFERS {
                    match socket.send(message) {
                        Ok(count) => return whole(count, message),
                        Err(error)
                            if error.raw_os_error()
                                == Some(rustix::io::Errno::NOBUFS.raw_os_error()) =>
                        {
                            std::thread::sleep(Duration::from_millis(10));
                        }
                        Err(error) => return Err(error),
                    }
                }
                Err(ErrorKind::WouldBlock.into())
            }
            // Messages have no control characters: a line each.
            Self::Stream(stream) => {
                let mut line = message.to_vec();
                line.push(b'\n');
                stream.write_all(&line)
            }
        }
    }
}

fn whole(count: usize, message: &[u8]) -> io::Result<()> {
    if count == message.len() {
        Ok(())
    } else {
        Err(io::Error::other("only a part of the message was sent"))
    }
}
