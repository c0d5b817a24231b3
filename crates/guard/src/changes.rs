//! Where bytes differ.

use std::ops::Range;

/// Equal bytes between two changes that are told as one.
const CLOSE: usize = 16;
/// More changes than this of one piece are not told apart.
const MOST: usize = 64;

/// The runs of bytes that differ; what comes after the last that is told apart
/// belongs to it.
pub fn changes(expected: &[u8], found: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    if expected == found {
        return runs;
    }
    let pairs = expected.iter().zip(found).enumerate();
    for (at, _) in pairs.filter(|(_, (expected, found))| expected != found) {
        let full = runs.len() >= MOST;
        match runs.last_mut() {
            Some(run) if full || at <= run.end + CLOSE => run.end = at + 1,
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_changes_are_one() {
        let expected = [0; 100];
        let mut found = expected;
        assert!(changes(&expected, &found).is_empty());
        (found[3], found[5], found[60]) = (1, 1, 1);
        assert_eq!(changes(&expected, &found), [3..6, 60..61]);
    }

    #[test]
    fn runs_are_bounded() {
        let expected = vec![0; 1 << 16];
        let mut found = expected.clone();
        found.iter_mut().step_by(32).for_each(|byte| *byte = 1);
        let runs = changes(&expected, &found);
        assert_eq!(runs.len(), MOST);
        assert_eq!(runs.last().map(|run| run.end), Some((1 << 16) - 31));
    }
}
