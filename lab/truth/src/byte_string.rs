//! Byte strings that keep every byte through JSON.
//!
//! Process names, paths and arguments in Linux are bytes, not text. A
//! [`ByteString`] that is valid UTF-8 is written as a plain JSON string; any
//! other as `{"hex": "…"}` with two lower-case digits a byte. Reading accepts
//! both, so nothing is lost and the common case stays readable.

use std::fmt;

use serde::de::{self, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes as the kernel holds them, usually but not always UTF-8.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteString(pub Vec<u8>);

impl ByteString {
    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The text, when the bytes are valid UTF-8.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }
}

impl From<&[u8]> for ByteString {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

impl From<Vec<u8>> for ByteString {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl From<&str> for ByteString {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl fmt::Display for ByteString {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for ByteString {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "b\"{}\"", self.0.escape_ascii())
    }
}

impl PartialEq<str> for ByteString {
    fn eq(&self, other: &str) -> bool {
        self.0 == other.as_bytes()
    }
}

impl PartialEq<&str> for ByteString {
    fn eq(&self, other: &&str) -> bool {
        self.0 == other.as_bytes()
    }
}

impl Serialize for ByteString {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Some(text) = self.as_str() {
            return serializer.serialize_str(text);
        }
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry("hex", &to_hex(&self.0))?;
        map.end()
    }
}

impl<'de> Deserialize<'de> for ByteString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ByteStringVisitor)
    }
}

struct ByteStringVisitor;

impl<'de> Visitor<'de> for ByteStringVisitor {
    type Value = ByteString;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a string, or an object with the member \"hex\"")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteString, E> {
        Ok(ByteString::from(text))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ByteString, A::Error> {
        let mut bytes = None;
        while let Some(key) = map.next_key::<String>()? {
            if key != "hex" {
                return Err(de::Error::unknown_field(&key, &["hex"]));
            }
            let digits: String = map.next_value()?;
            bytes = Some(from_hex(&digits).ok_or_else(|| {
                de::Error::invalid_value(de::Unexpected::Str(&digits), &"pairs of hex digits")
            })?);
        }
        bytes
            .map(ByteString)
            .ok_or_else(|| de::Error::missing_field("hex"))
    }
}

fn to_hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

fn from_hex(digits: &str) -> Option<Vec<u8>> {
    if !digits.len().is_multiple_of(2) || !digits.is_ascii() {
        return None;
    }
    (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_a_plain_string() {
        let json = serde_json::to_string(&ByteString::from("日 \n")).unwrap();
        assert_eq!(json, "\"日 \\n\"");
    }

    #[test]
    fn every_byte_survives() {
        for bytes in [
            (0..=255u8).collect::<Vec<_>>(),
            vec![],
            vec![0xff],
            b"ok".to_vec(),
        ] {
            let value = ByteString(bytes);
            let json = serde_json::to_string(&value).unwrap();
            assert!(json.is_ascii() || value.as_str().is_some());
            assert_eq!(serde_json::from_str::<ByteString>(&json).unwrap(), value);
        }
    }

    #[test]
    fn bad_hex_is_refused() {
        for json in [
            "{\"hex\":\"f\"}",
            "{\"hex\":\"zz\"}",
            "{\"hex\":\"é\"}",
            "{}",
            "{\"x\":\"\"}",
            "3",
        ] {
            assert!(serde_json::from_str::<ByteString>(json).is_err(), "{json}");
        }
    }
}
