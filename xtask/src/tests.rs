//! Runs the workspace's tests, several test programs at a time.
//!
//! Most of them wait for guests that boot, so that one after the other leaves
//! processors idle. `cargo test` runs them so; here cargo only builds them and
//! says which there are.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::run::{cargo, run, target_folder};

/// Programs that run at once: each has a guest or two, and threads of its own.
const AT_ONCE: usize = 2;

/// Programs that hold something to a time, or start several machines at once,
/// and so run when no other does.
const ALONE: [&str; 5] = ["bit_flips", "gate", "kills", "monitor", "unprivileged"];

/// How long one program may take: several times what the longest does on two
/// processors.
const PATIENCE: Duration = Duration::from_secs(15 * 60);

/// What cargo says of something that it built.
#[derive(Deserialize)]
struct Message {
    reason: String,
    #[serde(default)]
    executable: Option<PathBuf>,
    #[serde(default)]
    manifest_path: PathBuf,
    #[serde(default)]
    profile: Profile,
    #[serde(default)]
    target: Target,
}

#[derive(Default, Deserialize)]
struct Profile {
    test: bool,
}

#[derive(Default, Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// A program of tests.
struct Program {
    path: PathBuf,
    /// Where it runs: in its package's folder, as cargo does it.
    folder: PathBuf,
    /// The test's name; that of a crate for its own tests.
    name: String,
    /// Whether it is a program of its own and not a crate with tests inside.
    integration: bool,
}

/// Builds and runs all tests, and those in the documentation.
///
/// # Errors
/// If one does not build, or any of them fails. All of them run first.
pub fn run_all() -> Result<()> {
    let programs = build()?;
    let count = programs.len();
    let (alone, together): (Vec<Program>, Vec<Program>) =
        programs.into_iter().partition(Program::runs_alone);
    let folder = target_folder()?.join("tests");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let mut failed = run_some(together, AT_ONCE, &folder);
    failed.extend(run_some(alone, 1, &folder));
    let documentation = run(cargo().args(["test", "--workspace", "--doc", "--no-fail-fast"]));
    if !failed.is_empty() {
        let number = failed.len();
        bail!(
            "{number} of {count} test programs failed: {}",
            failed.join(", ")
        );
    }
    documentation
}

/// Runs programs, so many at once, and says which failed. What they say is
/// kept in `folder`.
fn run_some(programs: Vec<Program>, at_once: usize, folder: &Path) -> Vec<String> {
    let queue = Mutex::new(VecDeque::from(programs));
    let failed = Mutex::new(Vec::new());
    let next = || {
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.pop_front()
    };
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(program) = next() {
                    if let Err(error) = program.run(folder) {
                        println!("{error:#}");
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        failed.push(program.path.display().to_string());
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Builds the programs; those of tests that boot guests come first, as they
/// take longest.
fn build() -> Result<Vec<Program>> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--no-run"]);
    run(&mut command)?;
    let listed = crate::run::output(command.arg("--message-format=json"))?;
    let mut programs = Vec::new();
    for line in listed.lines() {
        let message: Message =
            serde_json::from_str(line).with_context(|| format!("what cargo says: {line}"))?;
        if message.reason != "compiler-artifact" {
            continue;
        }
        let folder = message.manifest_path.parent().map(PathBuf::from);
        if let (Some(path), Some(folder), true) = (message.executable, folder, message.profile.test)
        {
            let integration = message.target.kind.iter().any(|kind| kind == "test");
            let name = message.target.name;
            programs.push(Program {
                path,
                folder,
                name,
                integration,
            });
        }
    }
    programs.sort_by_key(|program| !program.folder.ends_with("tests"));
    Ok(programs)
}

impl Program {
    fn runs_alone(&self) -> bool {
        self.integration && ALONE.contains(&self.name.as_str())
    }

    /// Runs it and then prints what it said, so that programs do not speak at
    /// the same time.
    ///
    /// It speaks into a file and not into a pipe: whatever it leaves running
    /// would keep a pipe open, and reading that would never end.
    fn run(&self, folder: &Path) -> Result<()> {
        let start = Instant::now();
        let name = match self.folder.file_name() {
            Some(package) => format!("{}/{}", package.to_string_lossy(), self.name),
            None => self.name.clone(),
        };
        let mut said = folder.join(self.path.file_name().unwrap_or_default());
        said.set_extension("txt");
        let output = File::create(&said).with_context(|| said.display().to_string())?;
        let mut child = Command::new(&self.path)
            .current_dir(&self.folder)
            .env("CARGO_MANIFEST_DIR", &self.folder)
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("starting {}", self.path.display()))?;
        let ended = wait(&mut child, PATIENCE)?;
        let seconds = start.elapsed().as_secs_f32();
        let said = fs::read(&said).with_context(|| said.display().to_string())?;
        let said = String::from_utf8_lossy(&said);
        match ended {
            Some(status) if status.success() => {
                println!("-- {name}: {seconds:.1} s\n{}", last_line(&said));
                Ok(())
            }
            Some(status) => {
                println!("-- {name}: {seconds:.1} s\n{said}");
                bail!("{}: {status}", self.path.display())
            }
            None => {
                println!("-- {name}: {seconds:.1} s\n{said}");
                bail!("{}: not done after {seconds:.0} s", self.path.display())
            }
        }
    }
}

/// Waits for a program to end, no longer than `patience`: then it says what
/// runs on the machine, ends the program and returns nothing.
fn wait(child: &mut Child, patience: Duration) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() > patience {
            // What it waits for is among these.
            let _ =
                run(Command::new("ps").args(["-eLo", "pid,ppid,lwp,etimes,stat,wchan:24,args"]));
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// How many tests passed, which a program says at its end.
fn last_line(said: &str) -> &str {
    let mut lines = said.lines().rev();
    lines
        .find(|line| line.starts_with("test result"))
        .unwrap_or_default()
}
