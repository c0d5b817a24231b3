//! What is said on stderr: errors with what to do next, warnings, notes.
//!
//! Messages quote what a guest wrote, so all of them are escaped.

use std::fmt::{self, Display};
use std::io::{self, Write};

use crate::output::escape;

/// An error that knows what the user can do about it.
#[derive(Debug)]
struct Advised {
    advice: String,
    source: anyhow::Error,
}

impl Display for Advised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl std::error::Error for Advised {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // The message is the source's own, its causes follow.
        self.source.source()
    }
}

/// Adds to an error what to do next.
pub trait Advise<T> {
    /// Adds a sentence that the user reads below the error.
    fn advise(self, advice: impl Display) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> Advise<T> for Result<T, E> {
    fn advise(self, advice: impl Display) -> anyhow::Result<T> {
        self.map_err(|error| advised(error, advice))
    }
}

/// An error with a sentence that the user reads below it.
pub fn advised(error: impl Into<anyhow::Error>, advice: impl Display) -> anyhow::Error {
    anyhow::Error::new(Advised {
        advice: advice.to_string(),
        source: error.into(),
    })
}

/// Where messages go.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reporter {
    /// Whether notes are said, too.
    pub verbose: bool,
}

impl Reporter {
    fn line(self, kind: &str, text: &str) {
        // Nobody can be told when stderr is closed.
        let _ = writeln!(io::stderr(), "secmon: {kind}{}", escape::message(text));
    }

    /// Something the user should know about what is shown.
    pub fn warn(self, message: impl Display) {
        self.line("warning: ", &message.to_string());
    }

    /// Something that was asked for.
    pub fn say(self, message: impl Display) {
        self.line("", &message.to_string());
    }

    /// Something for who asks.
    pub fn note(self, message: impl Display) {
        if self.verbose {
            self.line("", &message.to_string());
        }
    }

    /// Why nothing more comes, with all its causes, and what to do.
    pub fn error(self, error: &anyhow::Error) {
        self.line("error: ", &chain(error));
        let advice = error
            .chain()
            .find_map(|cause| cause.downcast_ref::<Advised>())
            .map(|advised| &advised.advice);
        if let Some(advice) = advice {
            let _ = writeln!(io::stderr(), "  {}", escape::message(advice));
        }
    }
}

/// The error and its causes in one line; what an error already says of its
/// cause is not said again.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}

/// Whether an error is only that nobody reads our output any more, as in
/// `secmon … | head`.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn causes_are_said_once() {
        let error = anyhow!("no such file")
            .context("opening x: no such file")
            .context("table y");
        assert_eq!(chain(&error), "table y: opening x: no such file");
    }

    #[test]
    fn advice_survives_context() {
        let error = Err::<(), _>(io::Error::other("low"))
            .advise("do this")
            .context("high")
            .expect_err("an error");
        assert_eq!(chain(&error), "high: low");
        assert!(error.chain().any(<dyn std::error::Error>::is::<Advised>));
    }

    #[test]
    fn a_broken_pipe_is_known_through_context() {
        let pipe = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_broken_pipe(
            &anyhow::Error::from(pipe).context("writing rows")
        ));
        assert!(!is_broken_pipe(&anyhow!("broken pipe")));
    }
}
