//! Makes guest text harmless for the terminal, spreadsheet or log that shows it.
//!
//! A guest chooses its process names, paths and arguments. Written out as they
//! are, escape sequences in them would move the cursor, rewrite lines that
//! were printed before, set the window's title or answer on the terminal's
//! behalf, and bidirectional overrides would show one name for another. So
//! everything that has no shape of its own is written as an escape.

use std::borrow::Cow;
use std::fmt::Write;

use secmon_guest::Text;

/// Whether a character could change how what stands around it is shown, or
/// shows nothing itself: controls (C0, DEL, C1), line and paragraph
/// separators, bidirectional controls, joiners and other invisible formats,
/// variation selectors, tags, private use.
pub fn is_dangerous(c: char) -> bool {
    // Printable ASCII is what nearly all text is made of.
    if matches!(c, ' '..='~') {
        return false;
    }
    c.is_control()
        || matches!(
            c as u32,
            0x00ad
                | 0x034f
                | 0x061c
                | 0x115f..=0x1160
                | 0x17b4..=0x17b5
                | 0x180b..=0x180f
                | 0x200b..=0x200f
                | 0x2028..=0x202e
                | 0x2060..=0x206f
                | 0x3164
                | 0xe000..=0xf8ff
                | 0xfe00..=0xfe0f
                | 0xfeff
                | 0xffa0
                | 0xfff0..=0xfffb
                | 0x1bca0..=0x1bca3
                | 0x1d173..=0x1d17a
                | 0xe0000..=0xe0fff
                | 0xf0000..=0x10_ffff
        )
}

/// Whether the text can be shown as it is.
fn is_harmless(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    (!text.chars().any(is_dangerous)).then_some(text)
}

fn push_char(out: &mut String, c: char) {
    match c {
        '\\' => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        c if !is_dangerous(c) => out.push(c),
        c if (c as u32) < 0x80 => {
            let _ = write!(out, "\\x{:02x}", c as u32);
        }
        c => {
            let _ = write!(out, "\\u{{{:x}}}", c as u32);
        }
    }
}

/// Appends guest text: as it is if it is harmless, else with `\n`, `\x1b`,
/// `\u{202e}` and `\xff` (a byte that is not UTF-8) for what is not, and then
/// also `\\` for each backslash.
pub fn push_bytes(out: &mut String, bytes: &[u8]) {
    if let Some(text) = is_harmless(bytes) {
        out.push_str(text);
        return;
    }
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            push_char(out, c);
        }
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
}

/// As [`push_bytes`], of a guest's text.
pub fn push_text(out: &mut String, text: &Text) {
    push_bytes(out, text.as_bytes());
}

/// A message that may quote guest text, made harmless. Line breaks go as well:
/// one message is one line.
pub fn message(text: &str) -> Cow<'_, str> {
    if is_harmless(text.as_bytes()).is_some() {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    push_bytes(&mut out, text.as_bytes());
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn escaped(bytes: &[u8]) -> String {
        let mut out = String::new();
        push_bytes(&mut out, bytes);
        out
    }

    #[test]
    fn harmless_text_is_untouched() {
        for text in ["", "systemd", "C:\\a", "naïve ☃ 漢字 emoji 🦀", "a  b"] {
            assert_eq!(escaped(text.as_bytes()), text);
        }
    }

    #[test]
    fn what_could_act_is_written_out() {
        assert_eq!(escaped(b"\x1b]0;x\x07"), "\\x1b]0;x\\x07");
        assert_eq!(escaped("a\u{202e}b".as_bytes()), "a\\u{202e}b");
        assert_eq!(escaped("\u{9b}31m".as_bytes()), "\\u{9b}31m");
        assert_eq!(escaped(b"a\nb\\n"), "a\\nb\\\\n");
        assert_eq!(escaped(b"\xff\\"), "\\xff\\\\");
        for c in
            "\u{0}\u{7f}\u{85}\u{200b}\u{200d}\u{2028}\u{2066}\u{2069}\u{feff}\u{e0041}\u{fe0f}"
                .chars()
        {
            assert!(is_dangerous(c), "{:x}", c as u32);
        }
    }

    /// Turns an escaped text back; the inverse that proves nothing is lost.
    fn unescape(text: &str) -> Vec<u8> {
        let mut out = Vec::new();
        let mut rest = text.chars();
        while let Some(c) = rest.next() {
            if c != '\\' {
                out.extend(c.to_string().bytes());
                continue;
            }
            match rest.next().expect("an escape has a second character") {
                '\\' => out.push(b'\\'),
                'n' => out.push(b'\n'),
                'r' => out.push(b'\r'),
                't' => out.push(b'\t'),
                'x' => {
                    let digits: String = rest.by_ref().take(2).collect();
                    out.push(u8::from_str_radix(&digits, 16).expect("two digits"));
                }
                'u' => {
                    let digits: String = rest.by_ref().skip(1).take_while(|c| *c != '}').collect();
                    let code = u32::from_str_radix(&digits, 16).expect("digits");
                    let c = char::from_u32(code).expect("a character");
                    out.extend(c.to_string().bytes());
                }
                other => panic!("unknown escape {other}"),
            }
        }
        out
    }

    proptest! {
        #[test]
        fn never_dangerous_and_never_lossy(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let text = escaped(&bytes);
            prop_assert!(!text.chars().any(is_dangerous));
            if text.as_bytes() != bytes {
                prop_assert_eq!(unescape(&text), bytes);
            }
        }

        #[test]
        fn unicode_too(text in "\\PC*|[\u{0}-\u{2070}]{0,20}") {
            let safe = escaped(text.as_bytes());
            prop_assert!(!safe.chars().any(is_dangerous));
            if safe != text {
                prop_assert_eq!(unescape(&safe), text.as_bytes());
            }
        }
    }
}
