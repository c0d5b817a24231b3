//! Messages with a descriptor, between the gate's own processes.
//!
//! The sockets keep messages apart (`SOCK_SEQPACKET`): one byte that says what
//! it is about, and at most one descriptor.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// A connected pair of sockets, closed when a process runs another program.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sends a message, without waiting.
pub fn send(socket: impl AsFd, kind: u8, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let descriptors = descriptor.as_slice();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(&[kind])], &mut ancillary, flags)?;
    Ok(())
}

/// The next message; `None` if the other side has ended.
pub fn receive(socket: impl AsFd, flags: RecvFlags) -> io::Result<Option<(u8, Option<OwnedFd>)>> {
    let mut kind = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut kind)],
        &mut ancillary,
        flags | RecvFlags::CMSG_CLOEXEC,
    );
    let received = match received {
        Ok(received) => received,
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    Ok((received.bytes > 0).then_some((kind[0], descriptor)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_and_so_does_the_end() {
        let (left, right) = pair().expect("sockets");
        let (given, kept) = pair().expect("sockets");
        send(&left, b'a', None).expect("sent");
        send(&left, b'b', Some(given.as_fd())).expect("sent");
        drop((left, given));
        let first = receive(&right, RecvFlags::empty()).expect("received");
        assert!(matches!(first, Some((b'a', None))));
        let second = receive(&right, RecvFlags::empty()).expect("received");
        let Some((b'b', Some(given))) = second else {
            panic!("{second:?}");
        };
        send(&given, b'c', None).expect("sent");
        let third = receive(&kept, RecvFlags::empty()).expect("received");
        assert!(matches!(third, Some((b'c', None))));
        let end = receive(&right, RecvFlags::empty()).expect("received");
        assert!(end.is_none());
    }
}
