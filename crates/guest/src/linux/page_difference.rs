//! How two pages of memory differ.

/// How many bytes are shown from the first that differs on.
const EXCERPT: usize = 16;

/// What a page holds instead of its file's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// How many bytes differ.
    pub count: u64,
    /// The first of them, in the page.
    pub first: usize,
    /// What the file has there.
    pub original: Vec<u8>,
    /// What the process has there.
    pub found: Vec<u8>,
}

/// How `found` differs from `original`; none if it does not.
pub(crate) fn differences(original: &[u8], found: &[u8]) -> Option<Difference> {
    let differs = |(original, found): (&u8, &u8)| original != found;
    let first = original.iter().zip(found).position(differs)?;
    let excerpt = |bytes: &[u8]| bytes.iter().skip(first).take(EXCERPT).copied().collect();
    Some(Difference {
        count: original
            .iter()
            .zip(found)
            .filter(|pair| differs(*pair))
            .count() as u64,
        first,
        original: excerpt(original),
        found: excerpt(found),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_pages_have_no_difference() {
        assert_eq!(differences(&[1, 2, 3], &[1, 2, 3]), None);
    }

    #[test]
    fn differences_are_counted_and_the_first_is_shown() {
        let original: Vec<u8> = (0..64).collect();
        let mut found = original.clone();
        found[10] = 0xcc;
        found[60] = 0xcc;
        let difference = differences(&original, &found).expect("two bytes");
        assert_eq!((difference.count, difference.first), (2, 10));
        assert_eq!(difference.original[..3], [10, 11, 12]);
        assert_eq!(difference.found[..3], [0xcc, 11, 12]);
        assert_eq!(difference.original.len(), EXCERPT);
    }

    #[test]
    fn an_excerpt_ends_with_the_page() {
        let difference = differences(&[0; 8], &[0, 0, 0, 0, 0, 0, 0, 1]).expect("one byte");
        assert_eq!(difference.found, [1]);
    }
}
