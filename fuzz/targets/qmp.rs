//! What a QEMU answers over QMP.
//!
//! The first byte says which lines of the input are whole messages and which
//! stand for the result of a command.
#![no_main]

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use secmon_platform::qemu::QmpClient;

/// Long for a thread of this process, short for a fuzzer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// More commands than are executed.
const LINES: usize = 16;

fn socket() -> &'static (PathBuf, UnixListener) {
    static SOCKET: OnceLock<(PathBuf, UnixListener)> = OnceLock::new();
    SOCKET.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("secmon-fuzz-qmp-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("a socket");
        (path, listener)
    })
}

fn answers(data: &[u8]) -> Vec<u8> {
    let (wrapped, rest) = data.split_first().unwrap_or((&0, &[]));
    let mut text = b"{\"QMP\": {\"version\": {}}}\r\n{\"return\": {}, \"id\": 1}\r\n".to_vec();
    for (number, line) in rest.split(|byte| *byte == b'\n').take(LINES).enumerate() {
        if wrapped >> (number % 8) & 1 == 1 {
            text.extend_from_slice(b"{\"return\": ");
            text.extend_from_slice(line);
            text.extend_from_slice(format!(", \"id\": {}}}\r\n", number + 2).as_bytes());
        } else {
            text.extend_from_slice(line);
            text.push(b'\n');
        }
    }
    text
}

fn ask(client: &mut QmpClient) {
    let _ = client.status();
    let _ = client.ram_blocks();
    let _ = client.host_address(0x1000);
    let _ = client.memory_size();
    let _ = client.memory_device_backends();
    let _ = client.registers();
    let _ = client.receive_events();
    let _ = client.take_events();
}

fuzz_target!(|data: &[u8]| {
    let (path, listener) = socket();
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| -> Option<UnixStream> {
            let (mut stream, _) = listener.accept().ok()?;
            stream.write_all(&answers(data)).ok()?;
            // Nothing more is coming; the client's own words are taken.
            stream.shutdown(std::net::Shutdown::Write).ok()?;
            Some(stream)
        });
        if let Ok(mut client) = QmpClient::connect(path, TIMEOUT) {
            ask(&mut client);
        }
        drop(serving.join());
    });
});
