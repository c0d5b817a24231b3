//! The values of a table's cells, and their one JSON form.
//!
//! A listing makes and drops some ten thousand of them a millisecond, so a
//! [`Value`] has three words, and a text that fits stands in these.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use serde::ser::{Serialize, SerializeSeq, Serializer};

/// The most bytes of a text that needs no memory beyond the three words.
const INLINE: usize = 22;

/// A string of the guest: bytes, as a kernel knows no encoding.
#[derive(Clone)]
pub struct Text(Bytes);

#[derive(Clone)]
enum Bytes {
    Inline(u8, [u8; INLINE]),
    Fixed(&'static str),
    Shared(Arc<[u8]>),
}

impl Text {
    /// The text of these bytes.
    #[inline]
    pub fn new(bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        let mut inline = [0; INLINE];
        match inline.get_mut(..bytes.len()) {
            Some(start) => {
                start.copy_from_slice(bytes);
                Self(Bytes::Inline(bytes.len() as u8, inline))
            }
            None => Self(Bytes::Shared(bytes.into())),
        }
    }

    /// A text that is always the same, without a copy of it.
    pub const fn fixed(text: &'static str) -> Self {
        Self(Bytes::Fixed(text))
    }

    /// The bytes as the guest holds them.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Bytes::Inline(length, bytes) => bytes.get(..usize::from(*length)).unwrap_or(bytes),
            Bytes::Fixed(text) => text.as_bytes(),
            Bytes::Shared(bytes) => bytes,
        }
    }

    /// The text for people and JSON, without loss: valid UTF-8 stands as it
    /// is; if anything in the text is not UTF-8, each such byte is written
    /// `\xNN` and each backslash of the text is doubled.
    pub fn to_display(&self) -> Cow<'_, str> {
        let bytes = self.as_bytes();
        if let Ok(text) = std::str::from_utf8(bytes) {
            return text.into();
        }
        let mut out = String::with_capacity(bytes.len() + 16);
        for chunk in bytes.utf8_chunks() {
            out.push_str(&chunk.valid().replace('\\', "\\\\"));
            for byte in chunk.invalid() {
                out.push_str(&format!("\\x{byte:02x}"));
            }
        }
        out.into()
    }
}

impl Default for Text {
    fn default() -> Self {
        Self::fixed("")
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for Text {}

impl PartialOrd for Text {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Text {
    fn cmp(&self, other: &Self) -> Ordering {
        self.as_bytes().cmp(other.as_bytes())
    }
}

impl Hash for Text {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_bytes().hash(state);
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_display(), f)
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

/// A moment, by nanoseconds since 1970-01-01T00:00:00Z: any of 128 bits, as
/// guest memory can hold times that no calendar has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Time {
    // An i128 would have to lie at a multiple of 16 bytes.
    high: i64,
    low: u64,
}

impl Time {
    /// The moment that many nanoseconds after 1970-01-01T00:00:00Z.
    pub const fn from_nanoseconds(nanoseconds: i128) -> Self {
        Self {
            high: (nanoseconds >> 64) as i64,
            low: nanoseconds as u64,
        }
    }

    /// Nanoseconds since 1970-01-01T00:00:00Z.
    pub const fn nanoseconds(self) -> i128 {
        (self.high as i128) << 64 | self.low as i128
    }
}

impl PartialOrd for Time {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Time {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanoseconds().cmp(&other.nanoseconds())
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format_time(*self))
    }
}

/// What stands in one cell of a table.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// The guest has no such thing: the executable of a kernel thread.
    Null,
    /// Yes or no.
    Boolean(bool),
    /// A number from 0 on.
    Unsigned(u64),
    /// A number that can be negative.
    Signed(i64),
    /// An address; `"0x…"` in JSON.
    Address(u64),
    /// Text of the guest.
    Text(Text),
    /// A moment; RFC 3339 in JSON.
    Time(Time),
    /// Several values.
    List(Box<[Value]>),
    /// The guest has it but it could not be read; says why. `null` in JSON,
    /// where the row's `unreadable` object holds the reason.
    Unreadable(Arc<str>),
}

impl Value {
    /// A text value.
    #[inline]
    pub fn text(bytes: impl AsRef<[u8]>) -> Self {
        Self::Text(Text::new(bytes))
    }

    /// A word out of a fixed set, without a copy of it.
    pub const fn word(text: &'static str) -> Self {
        Self::Text(Text::fixed(text))
    }

    /// A moment, by nanoseconds since 1970-01-01T00:00:00Z.
    pub const fn time(nanoseconds: i128) -> Self {
        Self::Time(Time::from_nanoseconds(nanoseconds))
    }

    /// A value that could not be read, with the reason.
    pub fn unreadable(reason: impl fmt::Display) -> Self {
        Self::Unreadable(reason.to_string().into())
    }

    /// The value of a read, or the reason why there is none.
    pub fn from_read<T, E: fmt::Display>(
        read: Result<T, E>,
        value: impl FnOnce(T) -> Self,
    ) -> Self {
        match read {
            Ok(read) => value(read),
            Err(error) => Self::unreadable(error),
        }
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Boolean(value)
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Unsigned(value)
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Unsigned(value.into())
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Signed(value)
    }
}

impl From<i32> for Value {
    fn from(value: i32) -> Self {
        Self::Signed(value.into())
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.into())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(value.into())
    }
}

impl From<Text> for Value {
    fn from(value: Text) -> Self {
        Self::Text(value)
    }
}

impl From<secmon_memory::VirtualAddress> for Value {
    fn from(value: secmon_memory::VirtualAddress) -> Self {
        Self::Address(value.as_u64())
    }
}

impl From<secmon_memory::PhysicalAddress> for Value {
    fn from(value: secmon_memory::PhysicalAddress) -> Self {
        Self::Address(value.as_u64())
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

impl<T: Into<Value>> From<Vec<T>> for Value {
    fn from(values: Vec<T>) -> Self {
        Self::List(values.into_iter().map(Into::into).collect())
    }
}

/// The moment as RFC 3339 in UTC with microseconds, or the number itself where
/// no calendar reaches (guest memory can hold anything).
pub(crate) fn format_time(time: Time) -> String {
    let nanoseconds = time.nanoseconds();
    jiff::Timestamp::from_nanosecond(nanoseconds)
        .map_or_else(|_| nanoseconds.to_string(), |time| format!("{time:.6}"))
}

impl fmt::Display for Value {
    /// The cell as one line of plain text, for terminals and CSV: nothing for
    /// null, `?` for what could not be read, list items separated by spaces.
    /// Control characters are not escaped here.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => Ok(()),
            Self::Boolean(value) => write!(f, "{value}"),
            Self::Unsigned(value) => write!(f, "{value}"),
            Self::Signed(value) => write!(f, "{value}"),
            Self::Address(value) => write!(f, "{value:#x}"),
            Self::Text(value) => f.write_str(&value.to_display()),
            Self::Time(value) => f.write_str(&format_time(*value)),
            Self::List(values) => {
                for (index, value) in values.iter().enumerate() {
                    if index > 0 {
                        f.write_str(" ")?;
                    }
                    write!(f, "{value}")?;
                }
                Ok(())
            }
            Self::Unreadable(_) => f.write_str("?"),
        }
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null | Self::Unreadable(_) => serializer.serialize_none(),
            Self::Boolean(value) => serializer.serialize_bool(*value),
            Self::Unsigned(value) => serializer.serialize_u64(*value),
            Self::Signed(value) => serializer.serialize_i64(*value),
            Self::Address(value) => serializer.collect_str(&format_args!("{value:#x}")),
            Self::Text(value) => serializer.serialize_str(&value.to_display()),
            Self::Time(value) => serializer.serialize_str(&format_time(*value)),
            Self::List(values) => {
                let mut list = serializer.serialize_seq(Some(values.len()))?;
                for value in values {
                    list.serialize_element(value)?;
                }
                list.end()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_has_three_words() {
        assert_eq!(size_of::<Value>(), 24);
        assert_eq!(size_of::<Option<Value>>(), 24);
    }

    #[test]
    fn times_of_any_size() {
        for nanoseconds in [
            0,
            1,
            -1,
            i128::MIN,
            i128::MAX,
            1 << 64,
            -(1 << 64),
            u64::MAX.into(),
        ] {
            assert_eq!(
                Time::from_nanoseconds(nanoseconds).nanoseconds(),
                nanoseconds
            );
        }
        assert!(Time::from_nanoseconds(-1) < Time::from_nanoseconds(1 << 70));
    }

    proptest::proptest! {
        /// Texts are equal and ordered by their bytes, however these are kept.
        #[test]
        fn texts_are_their_bytes(
            a in proptest::collection::vec(0_u8..4, 0..40),
            b in proptest::collection::vec(0_u8..4, 0..40),
        ) {
            let (left, right) = (Text::new(&a), Text::new(&b));
            proptest::prop_assert_eq!(left.as_bytes(), &a[..]);
            proptest::prop_assert_eq!(left == right, a == b);
            proptest::prop_assert_eq!(left.cmp(&right), a.cmp(&b));
        }
    }

    #[test]
    fn a_fixed_text_equals_a_copy() {
        for text in ["", "running", "a text that is longer than three words"] {
            assert_eq!(Text::fixed(text), Text::new(text));
        }
    }

    #[test]
    fn text_survives_without_loss() {
        assert_eq!(Text::from("a\\b é").to_display(), "a\\b é");
        assert_eq!(Text::new(*b"a\\b\xff").to_display(), "a\\\\b\\xff");
    }

    #[test]
    fn json_forms() {
        let row = Value::from(vec![
            Value::Null,
            Value::Address(0xffff_8000_0000_0000),
            Value::time(1_500_000_000),
            Value::Unreadable("swapped out".into()),
            Value::text(*b"\x1b[31m"),
        ]);
        assert_eq!(
            serde_json::to_string(&row).expect("serializes"),
            r#"[null,"0xffff800000000000","1970-01-01T00:00:01.500000Z",null,"\u001b[31m"]"#
        );
    }
}
