//! Paths to members as callers write them: `"se.avg.load_avg"`, `"[3].next"`.

use std::fmt;

use super::TypeError;

/// One step of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Component<'a> {
    Name(&'a str),
    Index(u64),
}

impl fmt::Display for Component<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Index(index) => write!(f, "[{index}]"),
        }
    }
}

/// The steps of `path`, at least one.
pub(super) fn components(path: &str) -> Result<Vec<Component<'_>>, TypeError> {
    let malformed = || TypeError::MalformedPath {
        path: path.to_owned(),
    };
    let mut steps = Vec::new();
    for part in path.split('.') {
        let (name, mut rest) = part.split_at(part.find('[').unwrap_or(part.len()));
        match name {
            _ if name.contains(']') => return Err(malformed()),
            "" if rest.is_empty() || !steps.is_empty() => return Err(malformed()),
            "" => {}
            _ => steps.push(Component::Name(name)),
        }
        while !rest.is_empty() {
            let inside = rest.strip_prefix('[').ok_or_else(malformed)?;
            let (digits, after) = inside.split_once(']').ok_or_else(malformed)?;
            steps.push(Component::Index(digits.parse().map_err(|_| malformed())?));
            rest = after;
        }
    }
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_names_and_indices() {
        use Component::{Index, Name};
        assert_eq!(components("comm"), Ok(vec![Name("comm")]));
        assert_eq!(
            components("a.b[3][4].c"),
            Ok(vec![Name("a"), Name("b"), Index(3), Index(4), Name("c")])
        );
        assert_eq!(components("[7].x"), Ok(vec![Index(7), Name("x")]));
    }

    #[test]
    fn refuses_what_is_no_path() {
        for path in [
            "", ".", "a.", ".a", "a..b", "a[", "a[]", "a[1", "a[-1]", "a[1]b", "a]",
        ] {
            assert!(components(path).is_err(), "{path}");
        }
    }
}
