//! How a place in a guest's memory is written on the command line.

use std::fmt;
use std::str::FromStr;

/// A place in a guest's memory, before anything is looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A kernel symbol and a distance from it.
    Symbol {
        /// The symbol's name.
        name: String,
        /// Bytes from the symbol on, may be negative.
        offset: i64,
    },
    /// A virtual address of the kernel.
    Kernel(u64),
    /// A virtual address of a process.
    Process {
        /// The process (thread group) id in the initial namespace.
        pid: u64,
        /// The address.
        address: u64,
    },
    /// A guest physical address.
    Physical(u64),
}

/// Why a text names no place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocationError {
    /// A number that is none, or needs more than 64 bits.
    #[error("`{0}` is not a number (decimal, or hexadecimal with 0x)")]
    Number(String),
    /// Neither a symbol nor an address.
    #[error(
        "`{0}` names no place: write SYMBOL, SYMBOL+0x10, 0xADDRESS, PID:0xADDRESS or phys:0xADDRESS"
    )]
    Form(String),
    /// A length of zero or one that needs more than 64 bits.
    #[error("`{0}` is not a length from 1 byte to 16 EiB")]
    Length(String),
}

/// A number as people write them: decimal, or hexadecimal with `0x`;
/// underscores and the backtick of kernel debuggers may stand between digits.
pub fn parse_number(text: &str) -> Result<u64, LocationError> {
    let error = || LocationError::Number(text.to_owned());
    let digits: String = text.chars().filter(|c| !matches!(c, '_' | '`')).collect();
    let (digits, radix) = match digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        Some(hexadecimal) => (hexadecimal, 16),
        None => (digits.as_str(), 10),
    };
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return Err(error());
    }
    u64::from_str_radix(digits, radix).map_err(|_| error())
}

/// A number of bytes, at least 1; `K`, `M` or `G` may follow.
pub fn parse_length(text: &str) -> Result<u64, LocationError> {
    let (digits, unit) = match text.char_indices().last() {
        Some((end, 'k' | 'K')) => (&text[..end], 1 << 10),
        Some((end, 'm' | 'M')) => (&text[..end], 1 << 20),
        Some((end, 'g' | 'G')) => (&text[..end], 1 << 30),
        _ => (text, 1),
    };
    parse_number(digits)?
        .checked_mul(unit)
        .filter(|length| *length > 0)
        .ok_or_else(|| LocationError::Length(text.to_owned()))
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        if let Some(address) = text.strip_prefix("phys:") {
            return parse_number(address).map(Self::Physical);
        }
        if let Some((pid, address)) = text.split_once(':') {
            return Ok(Self::Process {
                pid: parse_number(pid)?,
                address: parse_number(address)?,
            });
        }
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            if !text.starts_with("0x") && !text.starts_with("0X") {
                return Err(LocationError::Form(text.to_owned()));
            }
            return parse_number(text).map(Self::Kernel);
        }
        let (name, offset) = match text.find(['+', '-']) {
            None => (text, 0),
            Some(at) => {
                let distance = parse_number(&text[at + 1..])?;
                let distance = i64::try_from(distance)
                    .map_err(|_| LocationError::Number(text[at + 1..].to_owned()))?;
                let negative = text[at..].starts_with('-');
                (&text[..at], if negative { -distance } else { distance })
            }
        };
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(LocationError::Form(text.to_owned()));
        }
        Ok(Self::Symbol {
            name: name.to_owned(),
            offset,
        })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Symbol { name, offset: 0 } => f.write_str(name),
            Self::Symbol { name, offset } if *offset < 0 => {
                write!(f, "{name}-{:#x}", offset.unsigned_abs())
            }
            Self::Symbol { name, offset } => write!(f, "{name}+{offset:#x}"),
            Self::Kernel(address) => write!(f, "{address:#x}"),
            Self::Process { pid, address } => write!(f, "{pid}:{address:#x}"),
            Self::Physical(address) => write!(f, "phys:{address:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn symbol(name: &str, offset: i64) -> Location {
        Location::Symbol {
            name: name.into(),
            offset,
        }
    }

    #[test]
    fn reads_every_form() {
        let cases = [
            ("init_task", symbol("init_task", 0)),
            ("init_task+0x10", symbol("init_task", 16)),
            ("init_task-8", symbol("init_task", -8)),
            (
                "tcp_v4_rcv.constprop.0+16",
                symbol("tcp_v4_rcv.constprop.0", 16),
            ),
            (
                "0xffffffff81000000",
                Location::Kernel(0xffff_ffff_8100_0000),
            ),
            (
                "0xffffffff`81000000",
                Location::Kernel(0xffff_ffff_8100_0000),
            ),
            (
                "1234:0x7ffd_0000",
                Location::Process {
                    pid: 1234,
                    address: 0x7ffd_0000,
                },
            ),
            ("phys:0x1000", Location::Physical(0x1000)),
            ("phys:4096", Location::Physical(0x1000)),
        ];
        for (text, location) in cases {
            assert_eq!(text.parse(), Ok(location), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_ambiguous_or_wrong() {
        for text in [
            "",
            "1234",
            "0x",
            "0xg",
            "+5",
            "a+",
            "a+-1",
            "phys:",
            "phys:+1",
            "1:",
            ":1",
            "-1:0",
            "a b",
            "0x1ffffffffffffffff",
            "a+0x8000000000000000",
            "a:b",
        ] {
            assert!(text.parse::<Location>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn lengths_have_units() {
        assert_eq!(parse_length("0x20"), Ok(32));
        assert_eq!(parse_length("4K"), Ok(4096));
        assert_eq!(parse_length("2m"), Ok(2 << 20));
        for text in ["0", "", "K", "-1", "0xffffffffffffffffG", "4KiB"] {
            assert!(parse_length(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_place_that_writes_the_same_or_an_error(text in "\\PC{0,40}|[a-z0-9x:+_-]{0,20}") {
            if let Ok(location) = text.parse::<Location>() {
                prop_assert_eq!(location.to_string().parse(), Ok(location));
            }
        }
    }
}
