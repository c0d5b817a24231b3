//! What a stream can bring to either side of a handshake, and what an encoded
//! message can be.
#![no_main]

use std::io;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use secmon_channel::{KeyPair, Peer, Role, Session, Stream, decode, encode, handshake};

const ROLE: Role = Role {
    name: "fuzz",
    version: 1,
};

static KEYS: LazyLock<(KeyPair, [Peer; 1])> = LazyLock::new(|| {
    let keys = KeyPair::generate().expect("random numbers");
    let peers = [Peer {
        name: "peer".to_owned(),
        key: keys.public(),
    }];
    (keys, peers)
});

/// Gives the input and then ends; takes whatever is written.
struct Input(Mutex<Vec<u8>>);

impl Stream for Input {
    fn read(&self, buffer: &mut [u8], _: Option<Instant>) -> io::Result<usize> {
        let mut rest = self.0.lock().expect("no panic before");
        let length = buffer.len().min(rest.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        rest.drain(..length);
        Ok(length)
    }

    fn write(&self, bytes: &[u8], _: Option<Instant>) -> io::Result<usize> {
        Ok(bytes.len())
    }
}

/// The shapes that messages are made of.
#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
enum Message {
    Unit,
    Number(u64, i128),
    Text(String),
    Rows {
        id: u32,
        cells: Vec<Vec<Option<String>>>,
    },
}

fuzz_target!(|data: &[u8]| {
    let (keys, peers) = &*KEYS;
    let Some((mode, rest)) = data.split_first() else {
        return;
    };
    let bytes = match mode % 3 {
        0 => rest.to_vec(),
        1 => [&handshake::HELLO[..], rest].concat(),
        _ => [&handshake::ANSWER[..], rest].concat(),
    };
    let stream: Arc<dyn Stream> = Arc::new(Input(Mutex::new(bytes)));
    if mode % 3 == 2 {
        assert!(Session::initiate(&stream, keys, &keys.public(), ROLE, None).is_err());
    } else {
        assert!(Session::accept(&stream, keys, peers, ROLE, None).is_err());
    }
    if let Ok(message) = decode::<Message>(rest) {
        let bytes = encode(&message, usize::MAX).expect("it was decoded");
        assert_eq!(decode::<Message>(&bytes).expect("it was encoded"), message);
    }
});
