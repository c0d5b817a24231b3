//! Dumps of the target's memory: begun in a file of the gate's own, asked for
//! until they are written.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use super::answer::busy;
use super::{Outcome, SessionId, Steward};
use crate::protocol::{Answer, Refusal, ReleaseReason};
use crate::target::Target;

/// How often a dump's end is asked for.
pub(super) const DUMP_POLL: Duration = Duration::from_millis(200);

/// A dump that is being written.
pub(super) struct Dump {
    name: String,
    file: File,
    pub(super) answer: SyncSender<Outcome>,
    asked: Instant,
}

impl Steward {
    pub(super) fn begin_dump(&mut self, id: SessionId, name: String, answer: SyncSender<Outcome>) {
        match self.try_begin_dump(id, &name) {
            Ok(file) => {
                self.dump = Some(Dump {
                    name,
                    file,
                    answer,
                    asked: Instant::now(),
                });
            }
            Err(refusal) => {
                let _ = answer.try_send(Err(refusal));
            }
        }
    }

    fn try_begin_dump(&mut self, id: SessionId, name: &str) -> Result<File, Refusal> {
        let folder = self.dumps.clone().ok_or_else(|| {
            Refusal::Invalid("the gate has no folder for dumps (--dumps)".to_owned())
        })?;
        if self.dump.is_some() {
            return Err(busy("a dump is being written"));
        }
        let mut others = self.sessions.iter();
        if others.any(|(other, session)| *other != id && session.hold.is_some()) {
            return Err(busy("another monitor holds the target stopped"));
        }
        self.release(id, &ReleaseReason::SessionEnded);
        if !self.target.is_here() {
            return Err(Refusal::TargetGone);
        }
        let file = create_dump(&folder, name)?;
        self.with_target(|target| target.begin_dump(file.as_fd()))?;
        Ok(file)
    }

    pub(super) fn tend_dump(&mut self) {
        let Some(dump) = &mut self.dump else { return };
        if dump.asked.elapsed() < DUMP_POLL {
            return;
        }
        dump.asked = Instant::now();
        let outcome = match self.with_target(Target::dump_end) {
            Ok(None) => return,
            Ok(Some(Ok(()))) => Ok(()),
            Ok(Some(Err(reason))) => Err(Refusal::Failed(reason)),
            Err(refusal) => Err(refusal),
        };
        if let Some(dump) = self.dump.take() {
            let bytes = dump.file.metadata().map_or(0, |metadata| metadata.len());
            let name = dump.name;
            let answer = outcome.map(|()| Answer::Dumped { name, bytes });
            let _ = dump.answer.try_send(answer);
        }
    }
}

/// A new file that only the gate's user may read.
fn create_dump(folder: &Path, name: &str) -> Result<File, Refusal> {
    let fits = (1..=64).contains(&name.len())
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if !fits {
        let reason =
            "a dump's name is 1 to 64 of the characters a-z A-Z 0-9 - _ . and begins with no dot";
        return Err(Refusal::Invalid(reason.to_owned()));
    }
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(folder.join(name))
        .map_err(|error| Refusal::Invalid(format!("making the file {name:?}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_else() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            ".x",
            "a\0",
            "ä",
            &"x".repeat(65),
        ] {
            assert!(create_dump(folder.path(), name).is_err(), "{name:?}");
        }
        create_dump(folder.path(), "web1-2026.elf").expect("a file");
        assert!(
            create_dump(folder.path(), "web1-2026.elf").is_err(),
            "twice"
        );
    }
}
