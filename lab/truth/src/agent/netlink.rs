//! Netlink requests and replies, as far as this agent needs them: a dump of
//! messages, nested attributes, and a request that is only acknowledged.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use crate::agent::sys;

/// A socket of one netlink family.
pub struct Netlink(OwnedFd);

/// One message of a reply.
pub struct Message {
    /// What it is.
    pub kind: u16,
    /// What follows the header.
    pub payload: Vec<u8>,
}

impl Netlink {
    /// Opens one in the current network namespace.
    pub fn open(family: libc::c_int) -> io::Result<Self> {
        // SAFETY: no memory is involved.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                family,
            )
        };
        sys::own(fd).map(Self)
    }

    /// Sends a request with `NLM_F_DUMP` and collects all messages.
    pub fn dump(&self, kind: u16, payload: &[u8]) -> io::Result<Vec<Message>> {
        self.send(
            kind,
            (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16,
            payload,
        )?;
        let mut messages = Vec::new();
        loop {
            for message in self.receive()? {
                match i32::from(message.kind) {
                    libc::NLMSG_DONE => return Ok(messages),
                    libc::NLMSG_ERROR => return Err(error_of(&message.payload)),
                    _ => messages.push(message),
                }
            }
        }
    }

    /// Sends a request and waits until it is acknowledged.
    pub fn request(&self, kind: u16, flags: u16, payload: &[u8]) -> io::Result<()> {
        let flags = flags | (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        self.send(kind, flags, payload)?;
        loop {
            for message in self.receive()? {
                if i32::from(message.kind) == libc::NLMSG_ERROR {
                    return match message.payload.get(..4) {
                        Some([0, 0, 0, 0]) => Ok(()),
                        _ => Err(error_of(&message.payload)),
                    };
                }
            }
        }
    }

    fn send(&self, kind: u16, flags: u16, payload: &[u8]) -> io::Result<()> {
        let mut request = Vec::with_capacity(16 + payload.len());
        request.extend((16 + payload.len() as u32).to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend(flags.to_ne_bytes());
        request.extend(1u32.to_ne_bytes());
        request.extend(0u32.to_ne_bytes());
        request.extend(payload);
        // SAFETY: a buffer of the length given.
        let sent = unsafe {
            libc::send(
                self.0.as_raw_fd(),
                request.as_ptr().cast(),
                request.len(),
                0,
            )
        };
        sys::check_long(sent as libc::c_long).map(drop)
    }

    fn receive(&self) -> io::Result<Vec<Message>> {
        let mut buffer = vec![0u8; 64 * 1024];
        // SAFETY: a buffer of the length given.
        let count = unsafe {
            libc::recv(
                self.0.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
            )
        };
        buffer.truncate(sys::check_long(count as libc::c_long)? as usize);
        let mut messages = Vec::new();
        let mut rest = buffer.as_slice();
        while let Some(length) =
            number::<4>(rest, 0).map(|bytes| u32::from_ne_bytes(bytes) as usize)
        {
            let (Some(message), Some(kind)) = (rest.get(..length), number::<2>(rest, 4)) else {
                break;
            };
            messages.push(Message {
                kind: u16::from_ne_bytes(kind),
                payload: message.get(16..).unwrap_or(&[]).to_vec(),
            });
            rest = rest
                .get(length.next_multiple_of(4).max(16)..)
                .unwrap_or(&[]);
        }
        Ok(messages)
    }
}

/// The bytes of a number at an offset.
pub fn number<const SIZE: usize>(bytes: &[u8], at: usize) -> Option<[u8; SIZE]> {
    bytes.get(at..at + SIZE)?.try_into().ok()
}

/// The attributes in a payload: kind (without the flags) and value.
pub fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut attributes = Vec::new();
    while let (Some(length), Some(kind)) = (number::<2>(bytes, 0), number::<2>(bytes, 2)) {
        let length = usize::from(u16::from_ne_bytes(length));
        let Some(value) = bytes.get(4..length) else {
            break;
        };
        attributes.push((u16::from_ne_bytes(kind) & 0x3fff, value));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    attributes
}

/// Appends an attribute.
pub fn put_attribute(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    to.extend((4 + value.len() as u16).to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

fn error_of(payload: &[u8]) -> io::Error {
    number::<4>(payload, 0).map_or_else(
        || io::Error::other("short netlink error"),
        |bytes| io::Error::from_raw_os_error(-i32::from_ne_bytes(bytes)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_come_back() {
        let mut bytes = Vec::new();
        put_attribute(&mut bytes, 3, b"eth0\0");
        put_attribute(&mut bytes, 4, &7u32.to_ne_bytes());
        assert_eq!(
            attributes(&bytes),
            [(3, &b"eth0\0"[..]), (4, &7u32.to_ne_bytes()[..])]
        );
        assert!(attributes(&bytes[..6]).is_empty());
    }

    #[test]
    fn the_loopback_interface_is_dumped() {
        let messages = Netlink::open(libc::NETLINK_ROUTE)
            .and_then(|netlink| netlink.dump(libc::RTM_GETLINK, &[0; 16]))
            .unwrap();
        assert!(messages.iter().any(|message| {
            attributes(message.payload.get(16..).unwrap_or(&[]))
                .iter()
                .any(|(kind, value)| *kind == libc::IFLA_IFNAME && *value == b"lo\0")
        }));
    }
}
