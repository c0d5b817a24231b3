//! The kernel's taint flags (`kernel/panic.c`, `taint_flags`;
//! `Documentation/admin-guide/tainted-kernels.rst`).

/// A taint: its letter and what it says. A bit's number is its place here.
const TAINTS: [(char, &str); 20] = [
    ('P', "a proprietary module was loaded"),
    ('F', "a module was loaded by force"),
    ('S', "the kernel runs on a system out of specification"),
    ('R', "a module was unloaded by force"),
    ('M', "a machine check was reported"),
    ('B', "a bad page was referenced"),
    ('U', "user space asked for it"),
    ('D', "the kernel died"),
    ('A', "an ACPI table was overridden"),
    ('W', "a warning was issued"),
    ('C', "a staging driver was loaded"),
    ('I', "a bug in the platform firmware is worked around"),
    ('O', "a module from outside of the tree was loaded"),
    ('E', "an unsigned module was loaded"),
    ('L', "a soft lock-up occurred"),
    ('K', "the kernel was live-patched"),
    ('X', "the distribution says so"),
    ('T', "the layout of structures was randomized"),
    ('N', "a test ran in the kernel"),
    (
        'J',
        "user space made a mutating debug operation in a driver",
    ),
];

/// What each bit that is set says.
pub fn taint_meanings(bits: u64) -> Vec<String> {
    (0..64_usize)
        .filter(|bit| bits >> bit & 1 == 1)
        .map(|bit| match TAINTS.get(bit) {
            Some((letter, meaning)) => format!("{letter}: {meaning}"),
            None => format!("bit {bit}"),
        })
        .collect()
}

/// The letters of the bits that are set; none if none is.
pub fn taint_letters(bits: u64) -> Option<String> {
    let letters: String = (0..64_usize)
        .filter(|bit| bits >> bit & 1 == 1)
        .map(|bit| TAINTS.get(bit).map_or('?', |(letter, _)| *letter))
        .collect();
    (!letters.is_empty()).then_some(letters)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_stand_at_their_bits() {
        assert_eq!(taint_letters(0), None);
        assert_eq!(taint_letters(1 << 12 | 1 << 13).as_deref(), Some("OE"));
        assert_eq!(taint_letters(1 << 18).as_deref(), Some("N"));
        assert_eq!(taint_letters(1 << 63).as_deref(), Some("?"));
        assert_eq!(taint_meanings(1 << 7), ["D: the kernel died"]);
    }
}
