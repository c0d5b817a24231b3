//! What a reader in the guest says: the request it gets, and its answer taken
//! apart. The answer is the guest's own word and may be anything.
//!
//! A request is a line: `secmon-reader 1 NONCE FOLDER …`. The answer begins
//! with `secmon-reader 1 NONCE` and ends with `.`; between them each tool has a
//! section: `+TOOL`, its lines with a `|` before each, `-`. `!TOOL` stands for
//! one that the guest does not have.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

/// The first words of a request and of an answer.
const GREETING: &str = "secmon-reader 1";
/// More bytes of an answer are not taken.
pub const LONGEST: usize = 8 << 20;
/// What the reader gives of one tool at most; as much as that was cut off.
const LONGEST_TOOL: usize = 1 << 20;
/// More sections are none of ours.
const MOST_SECTIONS: usize = 256;

/// Folders that are asked for if no others are.
pub const FOLDERS: &[&str] = &[
    "/",
    "/boot",
    "/dev/shm",
    "/etc",
    "/etc/cron.d",
    "/root",
    "/tmp",
    "/usr/bin",
    "/usr/lib",
    "/usr/local/bin",
    "/usr/sbin",
    "/var/tmp",
];

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// A word that the answer must repeat.
    pub nonce: u64,
    /// Absolute paths of folders to list.
    pub folders: Vec<String>,
}

/// Why an answer is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// It does not begin as an answer to this question does.
    #[error("the answer begins with {0:?}, not as one to this question")]
    Greeting(String),
    /// It ends before its end.
    #[error("the answer ends early")]
    Short,
    /// It is longer than any answer.
    #[error("the answer is longer than {LONGEST} bytes")]
    Long,
    /// A line that belongs to nothing.
    #[error("line {number} of the answer belongs to nothing")]
    Line {
        /// Which, counted from 1.
        number: usize,
    },
}

/// A listening TCP socket or an unconnected UDP one, as a tool names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// Whether it is TCP.
    pub tcp: bool,
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

/// What a tool said: the things, or why it says nothing that could be used.
pub type Told<T> = Result<BTreeSet<T>, Silence>;

/// Why a tool proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// The guest does not have it.
    Absent,
    /// Its output was cut off.
    Cut,
}

/// An answer, taken apart: by tool, what it told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Process ids.
    pub processes: BTreeMap<&'static str, Told<u32>>,
    /// Names of modules.
    pub modules: BTreeMap<&'static str, Told<Vec<u8>>>,
    /// Listening sockets.
    pub sockets: BTreeMap<&'static str, Told<Endpoint>>,
    /// By folder, its names.
    pub folders: BTreeMap<String, Told<Vec<u8>>>,
}

impl Question {
    /// The line that is sent, with its end.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = format!("{GREETING} {:016x}", self.nonce);
        for folder in &self.folders {
            line.push(' ');
            line.push_str(folder);
        }
        line.push('\n');
        line
    }

    /// Whether a path can be asked for: absolute, and a word of the line.
    #[must_use]
    pub fn can_ask(folder: &str) -> bool {
        folder.starts_with('/')
            && folder.len() < 1024
            && folder.bytes().all(|byte| byte.is_ascii_graphic())
    }

    /// Where the answer starts among bytes that came so far; what is before it
    /// belongs to an earlier question.
    #[must_use]
    pub fn start(&self, bytes: &[u8]) -> Option<usize> {
        let greeting = self.greeting().into_bytes();
        bytes
            .windows(greeting.len())
            .position(|window| window == greeting)
    }

    /// Whether bytes that came so far end as an answer to this question does.
    #[must_use]
    pub fn is_answered(&self, bytes: &[u8]) -> bool {
        bytes.ends_with(b"\n.\n") && bytes.starts_with(self.greeting().as_bytes())
    }

    fn greeting(&self) -> String {
        format!("{GREETING} {:016x}\n", self.nonce)
    }

    /// Takes an answer apart.
    ///
    /// # Errors
    /// [`AnswerError`] if it is none to this question.
    pub fn read(&self, bytes: &[u8]) -> Result<Answer, AnswerError> {
        if bytes.len() > LONGEST {
            return Err(AnswerError::Long);
        }
        let greeting = self.greeting();
        let mut lines = bytes.split(|byte| *byte == b'\n').enumerate();
        let first = lines.next().map_or(&[][..], |(_, line)| line);
        if first != greeting.trim_end().as_bytes() {
            let start = first.get(..80).unwrap_or(first);
            return Err(AnswerError::Greeting(
                String::from_utf8_lossy(start).into_owned(),
            ));
        }
        let mut answer = Answer::default();
        let mut sections = 0;
        let mut section: Option<Section<'_>> = None;
        for (number, line) in lines {
            let wrong = AnswerError::Line { number: number + 1 };
            match (line.first(), &mut section) {
                (Some(b'|'), Some(section)) => section.take(line.get(1..).unwrap_or_default()),
                (Some(b'-'), Some(_)) => {
                    if let Some(section) = section.take() {
                        section.finish(self, &mut answer);
                    }
                }
                (Some(b'+'), None) if sections < MOST_SECTIONS => {
                    sections += 1;
                    section = Some(Section::new(line.get(1..).unwrap_or_default()));
                }
                (Some(b'!'), None) if sections < MOST_SECTIONS => {
                    sections += 1;
                    Section::absent(line.get(1..).unwrap_or_default()).finish(self, &mut answer);
                }
                (Some(b'.'), None) => return Ok(answer),
                // Behind a tool's last line, if that has no end.
                (None, _) => {}
                _ => return Err(wrong),
            }
        }
        Err(AnswerError::Short)
    }
}

/// What a tool printed.
struct Section<'a> {
    tool: &'a [u8],
    lines: Vec<&'a [u8]>,
    bytes: usize,
    absent: bool,
}

impl<'a> Section<'a> {
    fn new(tool: &'a [u8]) -> Self {
        Self {
            tool,
            lines: Vec::new(),
            bytes: 0,
            absent: false,
        }
    }

    fn absent(tool: &'a [u8]) -> Self {
        Self {
            absent: true,
            ..Self::new(tool)
        }
    }

    fn take(&mut self, line: &'a [u8]) {
        self.bytes += line.len() + 1;
        self.lines.push(line);
    }

    fn told<T: Ord>(&self, read: impl Fn(&[u8]) -> Option<T>) -> Told<T> {
        if self.absent {
            return Err(Silence::Absent);
        }
        if self.bytes >= LONGEST_TOOL {
            return Err(Silence::Cut);
        }
        Ok(self.lines.iter().filter_map(|line| read(line)).collect())
    }

    fn finish(self, question: &Question, answer: &mut Answer) {
        // The first word of it counts; a tool that is told twice is told once.
        let known = |names: &[&'static str]| {
            let mut names = names.iter();
            names.find(|name| name.as_bytes() == self.tool).copied()
        };
        if let Some(tool) = known(&["ps", "/proc"]) {
            let told = self.told(|line| number(words(line).next()?));
            answer.processes.entry(tool).or_insert(told);
        } else if let Some(tool) = known(&["lsmod", "/proc/modules"]) {
            // The first line of lsmod is its heading.
            let skip: &[u8] = if tool == "lsmod" { b"Module" } else { b"" };
            let told = self.told(|line| {
                let name = words(line).next()?;
                (name != skip).then(|| name.to_vec())
            });
            answer.modules.entry(tool).or_insert(told);
        } else if let Some(tool) = known(&["ss"]) {
            answer
                .sockets
                .entry(tool)
                .or_insert(self.told(socket_of_ss));
        } else if let Some(tool) = known(&["/proc/net/tcp", "/proc/net/tcp6"]) {
            let told = self.told(|line| socket_of_proc(line, true));
            answer.sockets.entry(tool).or_insert(told);
        } else if let Some(tool) = known(&["/proc/net/udp", "/proc/net/udp6"]) {
            let told = self.told(|line| socket_of_proc(line, false));
            answer.sockets.entry(tool).or_insert(told);
        } else if let Some(folder) = self.tool.strip_prefix(b"ls ")
            && let Ok(folder) = str::from_utf8(folder)
            && question.folders.iter().any(|asked| asked == folder)
        {
            let told = self.told(|line| Some(unescaped(line)).filter(|name| !name.is_empty()));
            answer.folders.entry(folder.to_owned()).or_insert(told);
        }
    }
}

fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
}

fn number<T: std::str::FromStr>(word: &[u8]) -> Option<T> {
    str::from_utf8(word).ok()?.parse().ok()
}

/// A line of `ss -Hltun`: `tcp LISTEN 0 128 127.0.0.1%lo:22 0.0.0.0:*`.
fn socket_of_ss(line: &[u8]) -> Option<Endpoint> {
    let mut words = words(line);
    let tcp = match words.next()? {
        b"tcp" => true,
        b"udp" => false,
        _ => return None,
    };
    let local = str::from_utf8(words.nth(3)?).ok()?;
    let (address, port) = local.rsplit_once(':')?;
    let address = address.trim_start_matches('[');
    let address = address.split([']', '%']).next()?;
    let address = match address {
        "*" => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        address => address.parse().ok()?,
    };
    Some(Endpoint {
        tcp,
        address,
        port: port.parse().ok()?,
    })
}

/// A line of `/proc/net/tcp` and the like: number, address and port in
/// hexadecimal as they lie in memory, the other end, the state.
fn socket_of_proc(line: &[u8], tcp: bool) -> Option<Endpoint> {
    let mut words = words(line).skip(1);
    let local = str::from_utf8(words.next()?).ok()?;
    let state = words.nth(1)?;
    // TCP_LISTEN, and TCP_CLOSE of what is not connected.
    if state != if tcp { b"0A" } else { b"07" } {
        return None;
    }
    let (address, port) = local.split_once(':')?;
    let mut bytes = Vec::with_capacity(16);
    for word in address.as_bytes().chunks(8) {
        let word = u32::from_str_radix(str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend(word.to_le_bytes());
    }
    let address = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    Some(Endpoint {
        tcp,
        address,
        port: u16::from_str_radix(port, 16).ok()?,
    })
}

/// A name that `ls -b` escaped as in C, with octal numbers.
fn unescaped(line: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(line.len());
    let mut rest = line;
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        if *byte != b'\\' {
            name.push(*byte);
            continue;
        }
        let octal = rest.get(..3).filter(|digits| {
            let digit = |byte: &u8| matches!(byte, b'0'..=b'7');
            digits.iter().all(digit)
        });
        if let Some(digits) = octal {
            let value = digits.iter().fold(0_u32, |value, digit| {
                value * 8 + u32::from(digit.wrapping_sub(b'0'))
            });
            name.push((value & 0xff) as u8);
            rest = rest.get(3..).unwrap_or_default();
            continue;
        }
        if let Some((letter, tail)) = rest.split_first() {
            rest = tail;
            name.push(match letter {
                b'a' => 7,
                b'b' => 8,
                b'f' => 12,
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'v' => 11,
                other => *other,
            });
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn question() -> Question {
        Question {
            nonce: 7,
            folders: vec!["/tmp".to_owned()],
        }
    }

    const ANSWER: &[u8] = b"secmon-reader 1 0000000000000007\n\
        +ps\n|    1 init\n|   42 a b\n\n-\n\
        +/proc\n|1\n|42\n-\n\
        !lsmod\n\
        +/proc/modules\n|dummy 16384 0 - Live 0x0000000000000000\n-\n\
        +ss\n|tcp LISTEN 0 128 127.0.0.1%lo:22 0.0.0.0:*\n|udp UNCONN 0 0 *:53 *:*\n\
        |tcp LISTEN 0 4096 [fe80::1]%eth0:80 [::]:*\n-\n\
        +/proc/net/tcp\n|  sl  local_address rem_address   st\n\
        |   0: 0100007F:0016 00000000:0000 0A 00000000:00000000\n\
        |   1: 0100007F:0016 0200007F:9999 01 00000000:00000000\n-\n\
        +/proc/net/udp6\n|  0: 00000000000000000000000001000000:0035 0:0 07 x\n-\n\
        +ls /tmp\n|plain\n|with\\040space\\n\\\\\n-\n\
        +ls /etc\n|passwd\n-\n.\n";

    #[test]
    fn an_answer_is_taken_apart() {
        assert!(question().is_answered(ANSWER));
        let answer = question().read(ANSWER).expect("an answer");
        assert_eq!(answer.processes["ps"], Ok(BTreeSet::from([1, 42])));
        assert_eq!(answer.processes["/proc"], Ok(BTreeSet::from([1, 42])));
        assert_eq!(answer.modules["lsmod"], Err(Silence::Absent));
        let dummy = BTreeSet::from([b"dummy".to_vec()]);
        assert_eq!(answer.modules["/proc/modules"], Ok(dummy));
        let endpoint = |tcp, address: &str, port| Endpoint {
            tcp,
            address: address.parse().expect("an address"),
            port,
        };
        let of_ss = BTreeSet::from([
            endpoint(true, "127.0.0.1", 22),
            endpoint(false, "::", 53),
            endpoint(true, "fe80::1", 80),
        ]);
        assert_eq!(answer.sockets["ss"], Ok(of_ss));
        let listening = BTreeSet::from([endpoint(true, "127.0.0.1", 22)]);
        assert_eq!(answer.sockets["/proc/net/tcp"], Ok(listening));
        let local = BTreeSet::from([endpoint(false, "::1", 53)]);
        assert_eq!(answer.sockets["/proc/net/udp6"], Ok(local));
        // A folder that was not asked for says nothing.
        let names = BTreeSet::from([b"plain".to_vec(), b"with space\n\\".to_vec()]);
        assert_eq!(answer.folders.get("/tmp"), Some(&Ok(names)));
        assert_eq!(answer.folders.len(), 1);
    }

    #[test]
    fn another_answer_is_none() {
        let mut other = question();
        other.nonce = 8;
        assert!(matches!(other.read(ANSWER), Err(AnswerError::Greeting(_))));
        let short = &ANSWER[..ANSWER.len() - 2];
        assert_eq!(question().read(short), Err(AnswerError::Short));
        let wrong = b"secmon-reader 1 0000000000000007\nps\n.\n";
        let line = AnswerError::Line { number: 2 };
        assert_eq!(question().read(wrong), Err(line));
    }

    #[test]
    fn what_was_cut_off_proves_nothing() {
        let mut bytes = b"secmon-reader 1 0000000000000007\n+ps\n".to_vec();
        for _ in 0..LONGEST_TOOL / 4 {
            bytes.extend(b"|123\n");
        }
        bytes.extend(b"-\n.\n");
        let answer = question().read(&bytes).expect("an answer");
        assert_eq!(answer.processes["ps"], Err(Silence::Cut));
    }

    #[test]
    fn only_words_of_the_line_are_asked() {
        assert!(FOLDERS.iter().all(|folder| Question::can_ask(folder)));
        for wrong in ["tmp", "/a b", "/a\n", "/ä", ""] {
            assert!(!Question::can_ask(wrong), "{wrong:?}");
        }
        assert_eq!(question().line(), "secmon-reader 1 0000000000000007 /tmp\n");
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_apart(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let mut answer = b"secmon-reader 1 0000000000000007\n".to_vec();
            answer.extend(bytes);
            let _ = question().read(&answer);
        }

        #[test]
        fn any_lines_are_taken_apart(
            lines in prop::collection::vec("[-+!|.](ps|ss|ls /tmp|/proc/net/tcp6?|[ 0-9A-F:a-z\\\\%*\\[\\]]{0,40})", 0..40)
        ) {
            let answer = format!("secmon-reader 1 0000000000000007\n{}\n.\n", lines.join("\n"));
            let _ = question().read(answer.as_bytes());
        }

        #[test]
        fn names_survive_their_escapes(name in prop::collection::vec(1_u8..=255, 1..40)) {
            let escaped: Vec<u8> = name
                .iter()
                .flat_map(|byte| format!("\\{byte:03o}").into_bytes())
                .collect();
            prop_assert_eq!(unescaped(&escaped), name);
        }
    }
}
