//! Sessions over socket pairs: what must work, and what a peer without the
//! right key, or with a damaged line, can do.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use secmon_channel::{ChannelError, Descriptor, KeyPair, Peer, Role, Session, Stream};

const ROLE: Role = Role {
    name: "test",
    version: 1,
};

fn stream(socket: UnixStream) -> Arc<dyn Stream> {
    Arc::new(Descriptor::new(socket).expect("a stream"))
}

fn pair() -> (Arc<dyn Stream>, Arc<dyn Stream>) {
    let (left, right) = UnixStream::pair().expect("a pair");
    (stream(left), stream(right))
}

fn keys() -> KeyPair {
    KeyPair::generate().expect("keys")
}

fn peer(name: &str, keys: &KeyPair) -> Peer {
    Peer {
        name: name.to_owned(),
        key: keys.public(),
    }
}

/// Generous: only what must end in an error waits so long.
fn deadline() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(60))
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_millis(50))
}

type Accepted = JoinHandle<Result<(Session, Peer), ChannelError>>;

fn accept(stream: &Arc<dyn Stream>, own: &KeyPair, peers: &[Peer]) -> Accepted {
    let (stream, own, peers) = (Arc::clone(stream), own.clone(), peers.to_vec());
    thread::spawn(move || Session::accept(&stream, &own, &peers, ROLE, deadline()))
}

/// An established session, its initiator's side first.
fn established() -> (Session, Session) {
    let (left, right) = pair();
    let (client, server) = (keys(), keys());
    let accepted = accept(&right, &server, &[peer("client", &client)]);
    let session = Session::initiate(&left, &client, &server.public(), ROLE, deadline());
    let (other, who) = accepted.join().expect("no panic").expect("accepted");
    assert_eq!(who.name, "client");
    (session.expect("a session"), other)
}

#[test]
fn messages_of_any_length_go_both_ways_at_once() {
    let (left, right) = established();
    let lengths = [0_usize, 1, 65_517, 65_518, 65_519, 131_037, 1 << 20];
    let both = [left, right].map(|session| {
        thread::spawn(move || {
            let (mut reader, mut writer) = session.split();
            let sender = thread::spawn(move || {
                for length in lengths {
                    let bytes: Vec<u8> = (0..length).map(|index| index as u8).collect();
                    writer.send_bytes(&bytes, deadline()).expect("sent");
                }
                writer
            });
            for length in lengths {
                let bytes = reader.receive_bytes(deadline()).expect("received");
                assert_eq!(bytes.len(), length);
                assert!(
                    bytes
                        .iter()
                        .enumerate()
                        .all(|(index, byte)| index as u8 == *byte)
                );
            }
            drop(sender.join().expect("no panic"));
        })
    });
    for side in both {
        side.join().expect("no panic");
    }
}

#[test]
fn bounds_hold_on_both_sides() {
    let (left, right) = established();
    let mut left = left.with_limits(1000, 100_000);
    let mut right = right.with_limits(70_000, 2000);
    assert!(matches!(
        left.send(&vec![0_u8; 100_001][..], deadline()),
        Err(ChannelError::TooLong { limit: 100_000 })
    ));
    left.send("still there", deadline()).expect("sent");
    assert_eq!(
        right.receive::<String>(deadline()).expect("text"),
        "still there"
    );
    left.send(&vec![0_u8; 80_000][..], deadline())
        .expect("sent");
    assert!(matches!(
        right.receive::<Vec<u8>>(deadline()),
        Err(ChannelError::TooLong { limit: 70_000 })
    ));
    assert!(matches!(
        right.receive::<u8>(deadline()),
        Err(ChannelError::Over)
    ));
}

#[test]
fn a_deadline_loses_nothing() {
    let (mut left, mut right) = established();
    let error = right.receive::<String>(soon()).expect_err("nothing sent");
    assert!(error.is_deadline(), "{error}");
    left.send("late", deadline()).expect("sent");
    assert_eq!(right.receive::<String>(deadline()).expect("text"), "late");
    drop(left);
    let error = right.receive::<String>(deadline()).expect_err("ended");
    assert!(
        matches!(
            error,
            ChannelError::Ended {
                place: "between two messages"
            }
        ),
        "{error}"
    );
}

#[test]
fn a_message_of_another_type_ends_the_session() {
    let (mut left, mut right) = established();
    left.send(&(9_u8, 2_u8), deadline()).expect("sent");
    assert!(matches!(
        right.receive::<String>(deadline()),
        Err(ChannelError::Decode { length: 2, .. })
    ));
    assert!(matches!(
        right.receive::<String>(deadline()),
        Err(ChannelError::Over)
    ));
}

#[test]
fn strangers_are_refused_and_told() {
    let (left, right) = pair();
    let (client, server, stranger) = (keys(), keys(), keys());
    let peers = [peer("client", &client)];

    let accepted = accept(&right, &server, &peers);
    let refused = Session::initiate(&left, &stranger, &server.public(), ROLE, deadline());
    assert!(matches!(refused, Err(ChannelError::Refused)), "{refused:?}");
    let error = accepted.join().expect("no panic").expect_err("a stranger");
    assert!(matches!(error, ChannelError::UnknownPeer { key } if key == stranger.public()));

    // A responder that is not the one expected.
    let accepted = accept(&right, &server, &peers);
    let refused = Session::initiate(&left, &client, &stranger.public(), ROLE, deadline());
    assert!(matches!(refused, Err(ChannelError::Refused)), "{refused:?}");
    let error = accepted.join().expect("no panic").expect_err("another key");
    assert!(matches!(error, ChannelError::Handshake { .. }), "{error}");

    // Another role, and another version of the same.
    for (role, is_version) in [
        (
            Role {
                name: "other",
                version: 1,
            },
            false,
        ),
        (
            Role {
                name: "test",
                version: 2,
            },
            true,
        ),
    ] {
        let accepted = accept(&right, &server, &peers);
        let refused = Session::initiate(&left, &client, &server.public(), role, deadline());
        let error = accepted
            .join()
            .expect("no panic")
            .expect_err("another role");
        match refused {
            Err(ChannelError::Version { .. }) => assert!(is_version),
            Err(ChannelError::Refused) => assert!(!is_version),
            other => panic!("{other:?}"),
        }
        assert_eq!(
            matches!(error, ChannelError::Version { .. }),
            is_version,
            "{error}"
        );
    }

    // The same stream serves whoever is allowed.
    let accepted = accept(&right, &server, &peers);
    Session::initiate(&left, &client, &server.public(), ROLE, deadline()).expect("a session");
    accepted.join().expect("no panic").expect("accepted");
}

/// Passes bytes on in one direction, damaged or recorded by `change`.
fn relay(
    from: UnixStream,
    mut to: UnixStream,
    mut change: impl FnMut(&mut Vec<u8>) + Send + 'static,
) -> JoinHandle<()> {
    use std::io::Read as _;
    thread::spawn(move || {
        let mut from = from;
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let mut bytes = buffer[..length].to_vec();
            change(&mut bytes);
            if to.write_all(&bytes).is_err() {
                return;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    })
}

#[test]
fn a_recorded_conversation_is_worth_nothing() {
    use std::sync::Mutex;
    let (client, server) = (keys(), keys());
    let peers = [peer("client", &client)];
    let (left, middle_left) = UnixStream::pair().expect("a pair");
    let (middle_right, right) = UnixStream::pair().expect("a pair");
    let recorded = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&recorded);
    let there = relay(
        middle_left.try_clone().expect("a socket"),
        middle_right.try_clone().expect("a socket"),
        move |bytes| record.lock().expect("a lock").extend_from_slice(bytes),
    );
    let back = relay(middle_right, middle_left, |_| ());
    let right = stream(right);
    let accepted = accept(&right, &server, &peers);
    let left = stream(left);
    let mut session =
        Session::initiate(&left, &client, &server.public(), ROLE, deadline()).expect("a session");
    let (mut other, _) = accepted.join().expect("no panic").expect("accepted");
    session.send("pause", deadline()).expect("sent");
    assert_eq!(other.receive::<String>(deadline()).expect("text"), "pause");
    drop((session, left, other, right));
    there.join().expect("no panic");
    back.join().expect("no panic");

    let (mut left, right) = UnixStream::pair().expect("a pair");
    let accepted = accept(&stream(right), &server, &peers);
    left.write_all(&recorded.lock().expect("a lock"))
        .expect("sent");
    let error = accepted.join().expect("no panic").expect_err("a recording");
    assert!(
        matches!(error, ChannelError::Frame { number: 0 }),
        "{error}"
    );
}

#[test]
fn a_changed_byte_ends_the_session() {
    let (client, server) = (keys(), keys());
    let peers = [peer("client", &client)];
    let (left, middle_left) = UnixStream::pair().expect("a pair");
    let (middle_right, right) = UnixStream::pair().expect("a pair");
    let mut seen = 0;
    relay(
        middle_left.try_clone().expect("a socket"),
        middle_right.try_clone().expect("a socket"),
        move |bytes| {
            for byte in bytes.iter_mut() {
                seen += 1;
                // Behind the hello (134), and the first frame (21).
                *byte ^= u8::from(seen == 134 + 21 + 10);
            }
        },
    );
    relay(middle_right, middle_left, |_| ());
    let accepted = accept(&stream(right), &server, &peers);
    let left = stream(left);
    let mut session =
        Session::initiate(&left, &client, &server.public(), ROLE, deadline()).expect("a session");
    let (mut other, _) = accepted.join().expect("no panic").expect("accepted");
    session.send("hello", deadline()).expect("sent");
    assert!(matches!(
        other.receive::<String>(deadline()),
        Err(ChannelError::Frame { number: 1 })
    ));
}

#[test]
fn a_new_hello_ends_an_open_session_and_is_not_lost() {
    let (left, right) = pair();
    let (client, server) = (keys(), keys());
    let peers = [peer("client", &client)];
    let accepted = accept(&right, &server, &peers);
    let first = Session::initiate(&left, &client, &server.public(), ROLE, deadline());
    drop(first.expect("a session"));
    let (mut other, _) = accepted.join().expect("no panic").expect("accepted");
    // The client went without a trace, as on a virtio-serial port; the next
    // one speaks on the same stream.
    let again = {
        let (left, client, server) = (Arc::clone(&left), client.clone(), server.public());
        thread::spawn(move || Session::initiate(&left, &client, &server, ROLE, deadline()))
    };
    let error = other
        .receive::<u8>(deadline())
        .expect_err("a hello is no frame");
    assert!(
        matches!(error, ChannelError::FrameLength { length: u32::MAX }),
        "{error}"
    );
    let accepted = accept(&right, &server, &peers);
    again.join().expect("no panic").expect("a session");
    let (session, _) = accepted.join().expect("no panic").expect("accepted");
    assert_eq!(session.discarded(), 0);
}

#[test]
fn a_hello_behind_half_a_frame_is_said_again() {
    let (left, right) = pair();
    let (client, server) = (keys(), keys());
    let peers = [peer("client", &client)];
    // An earlier client's session, which it left in the middle of a frame.
    let accepted = accept(&right, &server, &peers);
    drop(Session::initiate(
        &left,
        &client,
        &server.public(),
        ROLE,
        deadline(),
    ));
    let (mut other, _) = accepted.join().expect("no panic").expect("accepted");
    left.write(&[100, 0, 0, 0, 1, 2, 3], deadline())
        .expect("half a frame");
    let again = {
        let (left, client, server) = (Arc::clone(&left), client.clone(), server.public());
        thread::spawn(move || Session::initiate(&left, &client, &server, ROLE, deadline()))
    };
    // The first hello is eaten as the rest of that frame.
    let error = other.receive::<u8>(deadline()).expect_err("no frame");
    assert!(matches!(error, ChannelError::Frame { .. }), "{error}");
    let accepted = accept(&right, &server, &peers);
    again.join().expect("no panic").expect("a session");
    let (session, _) = accepted.join().expect("no panic").expect("accepted");
    assert!(session.discarded() > 0);
}

#[test]
fn half_open_connections_end() {
    let (left, right) = pair();
    let (client, server) = (keys(), keys());
    let error = Session::accept(&right, &server, &[], ROLE, soon()).expect_err("nobody");
    assert!(error.is_deadline(), "{error}");
    let error = Session::initiate(&left, &client, &server.public(), ROLE, soon());
    assert!(error.expect_err("nobody answers").is_deadline());
    drop(left);
    // The hello is there, its answer can't be delivered.
    let error = Session::accept(&right, &server, &[peer("c", &client)], ROLE, deadline());
    assert!(
        matches!(error, Err(ChannelError::Stream { .. })),
        "{error:?}"
    );
    let error = Session::accept(&right, &server, &[], ROLE, deadline()).expect_err("ended");
    assert!(matches!(error, ChannelError::Ended { .. }), "{error}");
}

#[test]
fn endless_noise_is_not_read_endlessly() {
    let (mut left, right) = UnixStream::pair().expect("a pair");
    let accepted = accept(&stream(right), &keys(), &[]);
    let noise = vec![0x8f; 1 << 16];
    while left.write_all(&noise).is_ok() {}
    let error = accepted.join().expect("no panic").expect_err("noise");
    assert!(
        matches!(error, ChannelError::NoHello { discarded } if discarded > 1 << 20),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn garbage_before_a_hello_is_thrown_away(garbage in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let (left, right) = pair();
        let (client, server) = (keys(), keys());
        let accepted = accept(&right, &server, &[peer("client", &client)]);
        left.write(&garbage, deadline()).expect("sent");
        right.write(&garbage, deadline()).expect("sent");
        let session = Session::initiate(&left, &client, &server.public(), ROLE, deadline());
        let (other, _) = accepted.join().expect("no panic").expect("accepted");
        prop_assert_eq!(other.discarded(), garbage.len() as u64);
        prop_assert_eq!(session.expect("a session").discarded(), garbage.len() as u64);
    }

    #[test]
    fn whatever_comes_instead_of_a_frame_is_an_error(
        bytes in prop_oneof![
            proptest::collection::vec(any::<u8>(), 1..300),
            // A length that frames have, and anything.
            (17_u32..400, proptest::collection::vec(any::<u8>(), 0..500)).prop_map(|(length, rest)| {
                [&length.to_le_bytes()[..], &rest].concat()
            }),
        ],
    ) {
        let (client, server) = (keys(), keys());
        let (left, right) = pair();
        let accepted = accept(&right, &server, &[peer("client", &client)]);
        drop(Session::initiate(&left, &client, &server.public(), ROLE, deadline()));
        let (mut other, _) = accepted.join().expect("no panic").expect("accepted");
        left.write(&bytes, deadline()).expect("sent");
        drop(left);
        let error = other.receive::<String>(deadline()).expect_err("no message");
        prop_assert!(!error.is_deadline());
        let again = matches!(
            other.receive::<String>(deadline()),
            Err(ChannelError::Over | ChannelError::Ended { .. })
        );
        prop_assert!(again);
    }
}
