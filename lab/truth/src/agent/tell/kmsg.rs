//! The kernel's log from `/dev/kmsg`.

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;

use secmon_truth::{ByteString, KernelMessage};

/// Every record that is still in the ring, oldest first.
pub fn messages() -> io::Result<Vec<KernelMessage>> {
    let mut kmsg = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")?;
    let mut messages = Vec::new();
    let mut record = vec![0; 16 * 1024];
    loop {
        match kmsg.read(&mut record) {
            Ok(0) => break,
            Ok(count) => messages.extend(message(&record[..count])),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            // Records were overwritten meanwhile; go on with the oldest left.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(messages)
}

fn message(record: &[u8]) -> Option<KernelMessage> {
    let semicolon = record.iter().position(|byte| *byte == b';')?;
    let head = std::str::from_utf8(&record[..semicolon]).ok()?;
    let mut fields = head.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let sequence = fields.next()?.parse().ok()?;
    let microseconds = fields.next()?.parse().ok()?;
    let flags = fields.next()?.to_owned();
    let mut lines = record[semicolon + 1..].split(|byte| *byte == b'\n');
    Some(KernelMessage {
        sequence,
        microseconds,
        facility: priority >> 3,
        level: priority & 7,
        flags,
        text: unescape_hex(lines.next()?),
        dictionary: lines
            .filter_map(|line| line.strip_prefix(b" "))
            .map(|line| String::from_utf8_lossy(line).into_owned())
            .collect(),
    })
}

/// Undoes `\xNN`, which the kernel writes for every byte outside 32..=126
/// and for the backslash.
fn unescape_hex(text: &[u8]) -> ByteString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let value = text
            .get(at..at + 4)
            .and_then(|escape| escape.strip_prefix(b"\\x"))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match value {
            Some(value) => {
                bytes.push(value);
                at += 4;
            }
            None => {
                bytes.push(text[at]);
                at += 1;
            }
        }
    }
    ByteString(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_with_escapes_and_a_dictionary() {
        let record = b"12,339,5140900,-;a\\x5cb\\x0a\\xff\n SUBSYSTEM=net\n DEVICE=+x\n";
        let message = message(record).unwrap();
        assert_eq!((message.facility, message.level), (1, 4));
        assert_eq!((message.sequence, message.microseconds), (339, 5_140_900));
        assert_eq!(message.text.0, b"a\\b\n\xff");
        assert_eq!(message.dictionary, ["SUBSYSTEM=net", "DEVICE=+x"]);
    }
}
