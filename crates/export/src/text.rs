//! Text for others' logs: bounded, and without what could act on a terminal
//! or end a line.

/// What stands where text was cut.
const CUT: &str = "…";

/// The text with control characters and direction overrides escaped, as
/// `\n` or `\u{202e}`, and cut to so many bytes.
pub(crate) fn clean(text: &str, most: usize) -> String {
    let mut clean = String::new();
    for character in text.chars() {
        if is_harmful(character) {
            clean.extend(character.escape_default());
        } else {
            clean.push(character);
        }
        if clean.len() > most {
            break;
        }
    }
    cut(clean, most)
}

/// The text, no longer than so many bytes.
pub(crate) fn cut(mut text: String, most: usize) -> String {
    if text.len() <= most {
        return text;
    }
    let mut end = most.saturating_sub(CUT.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    if most >= CUT.len() {
        text.push_str(CUT);
    }
    text
}

fn is_harmful(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{061c}'
        )
        || ('\u{202a}'..='\u{202e}').contains(&character)
        || ('\u{2066}'..='\u{2069}').contains(&character)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_is_cut_between_characters_and_says_so() {
        assert_eq!(clean("a\nb\u{202e}", 100), "a\\nb\\u{202e}");
        assert_eq!(clean("äöüß", 7), "äö…");
        assert_eq!(clean("äöüß", 8), "äöüß");
        assert_eq!(clean("äöüß", 2), "");
    }

    proptest! {
        #[test]
        fn any_text_becomes_short_and_harmless(text: String, most in 0_usize..64) {
            let clean = clean(&text, most);
            prop_assert!(clean.len() <= most);
            prop_assert!(!clean.chars().any(is_harmful));
        }
    }
}
