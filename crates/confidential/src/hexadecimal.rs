//! Bytes of a known length, written in hexadecimal.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// `N` bytes that are read and shown in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hexadecimal<const N: usize>(pub [u8; N]);

/// Why a text is not so many bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HexadecimalError {
    /// Too short or too long.
    #[error("{digits} hexadecimal digits, {expected} are needed")]
    Length {
        /// How many there are.
        digits: usize,
        /// How many there must be.
        expected: usize,
    },
    /// Something else than a digit.
    #[error("the character {character:?} at {position} is no hexadecimal digit")]
    Digit {
        /// What stands there.
        character: char,
        /// Where, in bytes.
        position: usize,
    },
}

impl<const N: usize> FromStr for Hexadecimal<N> {
    type Err = HexadecimalError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = text
            .char_indices()
            .find(|(_, character)| !character.is_ascii_hexdigit());
        if let Some((position, character)) = wrong {
            return Err(HexadecimalError::Digit {
                character,
                position,
            });
        }
        let digits = text.as_bytes();
        if digits.len() != N * 2 {
            return Err(HexadecimalError::Length {
                digits: digits.len(),
                expected: N * 2,
            });
        }
        let value = |digit: u8| char::from(digit).to_digit(16).unwrap_or_default() as u8;
        let mut bytes = [0; N];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            if let [high, low] = pair {
                *byte = value(*high) << 4 | value(*low);
            }
        }
        Ok(Self(bytes))
    }
}

impl<const N: usize> fmt::Display for Hexadecimal<N> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl<const N: usize> fmt::Debug for Hexadecimal<N> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl<const N: usize> Serialize for Hexadecimal<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_read_again_and_nothing_else() {
        let bytes = Hexadecimal([0x00, 0x9f, 0xa0]);
        assert_eq!(bytes.to_string(), "009fa0");
        assert_eq!("009FA0".parse(), Ok(bytes));
        for wrong in ["", "009fa", "009fa000", "009fg0", "+09fa0", "ä9fa0"] {
            assert!(wrong.parse::<Hexadecimal<3>>().is_err(), "{wrong}");
        }
    }
}
