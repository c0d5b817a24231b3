use super::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// A stub that answers each packet with the next text, byte for byte.
fn stub(answers: &'static [&'static [u8]]) -> (GdbClient, std::thread::JoinHandle<Vec<u8>>) {
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    let thread = std::thread::spawn(move || {
        let mut heard = Vec::new();
        let mut decoder = Decoder::default();
        let mut answers = answers.iter();
        let mut byte = [0];
        while theirs.read(&mut byte).is_ok_and(|count| count == 1) {
            heard.push(byte[0]);
            let wanted = match decoder.push(byte[0]) {
                Some(Item::Packet(_) | Item::Repeat) => answers.next(),
                _ => None,
            };
            if let Some(answer) = wanted {
                let _ = theirs.write_all(answer);
            }
        }
        heard
    });
    let client = GdbClient::over(ours.into(), Duration::from_millis(300));
    (client, thread)
}

#[test]
fn what_is_sent_is_what_is_listed() {
    let payload = |command: Command| String::from_utf8(command.payload()).expect("ASCII");
    let breakpoint = Breakpoint {
        address: 0xffff_ffff_8100_0000,
        kind: BreakpointKind::Write,
        length: 8,
    };
    assert_eq!(payload(Command::Set(breakpoint)), "Z2,ffffffff81000000,8");
    assert_eq!(payload(Command::Step { vcpu: 1 }), "vCont;s:2");
    let write = Command::WriteRegister {
        register: Register::Eflags,
        value: 0x202,
    };
    assert_eq!(payload(write), "P11=02020000");
    let write = Command::WriteMemory {
        address: 0x10,
        bytes: vec![1, 0xff],
    };
    assert_eq!(payload(write), "M10,2:01ff");
}

#[test]
fn damaged_answers_are_asked_for_again() {
    let (mut client, stub) = stub(&[b"+$OK#00", b"$OK#9a"]);
    client.detach().expect("the second time");
    drop(client);
    assert_eq!(stub.join().expect("heard"), b"$D#44-");
}

#[test]
fn a_packet_is_repeated_when_the_stub_says_so() {
    let (mut client, stub) = stub(&[b"-", b"+$OK#9a"]);
    client.detach().expect("the second time");
    drop(client);
    assert_eq!(stub.join().expect("heard"), b"$D#44$D#44");
}

#[test]
fn a_stop_reply_between_is_not_taken_for_the_answer() {
    let (mut client, _stub) = stub(&[b"+$T02thread:01;#04$OK#9a"]);
    client.detach().expect("OK comes second");
    let stops = client.take_stops().expect("open");
    assert_eq!(stops.len(), 1);
    assert_eq!(stops[0].signal, 2);
}

#[test]
fn silence_refusal_nonsense_and_the_end_are_told_apart() {
    let (mut client, _stub) = stub(&[b"+"]);
    let error = client.detach().expect_err("silence");
    assert!(matches!(error, GdbError::Timeout { .. }), "{error}");
    let (mut client, _stub) = stub(&[b"+$E22#a9", b"+$#00", b"+$OK#9a", b"+$0011#c2"]);
    for _ in 0..2 {
        let error = client.detach().expect_err("refused");
        assert!(matches!(error, GdbError::Refused { .. }), "{error}");
    }
    let error = client.registers(0).expect_err("too short");
    assert!(matches!(error, GdbError::Refused { .. }), "{error}");
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let mut client = GdbClient::over(ours.into(), Duration::from_millis(300));
    drop(theirs);
    let error = client.detach().expect_err("closed");
    assert!(matches!(error, GdbError::Closed(_)), "{error}");
}
