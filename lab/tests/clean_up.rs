//! However a guest's owner ends, nothing of the guest is left.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use secmon_lab::{Guest, Suite};

/// Set in the process that `a_killed_owner_leaves_nothing` starts.
const VICTIM: &str = "SECMON_LAB_TEST_VICTIM";

fn gone(pid: u32, folder: &Path) {
    let start = Instant::now();
    let process = PathBuf::from(format!("/proc/{pid}"));
    while process.exists() || folder.exists() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "left: process {pid}: {}, {}: {}",
            process.exists(),
            folder.display(),
            folder.exists()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn dropping_it_or_panicking_ends_a_guest() -> anyhow::Result<()> {
    let guest = Guest::builder(Suite::Bookworm).boot()?;
    let (pid, folder) = (guest.pid(), guest.folder().to_owned());
    assert!(Path::new(&format!("/proc/{pid}")).exists() && folder.is_dir());
    let panicked = catch_unwind(AssertUnwindSafe(move || {
        let _guest = guest;
        panic!("a test fails while its guest runs");
    }));
    assert!(panicked.is_err());
    gone(pid, &folder);
    Ok(())
}

#[test]
fn the_end_of_the_thread_that_booted_it_does_not_end_a_guest() -> anyhow::Result<()> {
    let guest = std::thread::spawn(|| Guest::builder(Suite::Bookworm).boot())
        .join()
        .expect("no panic")?;
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(guest.truth().info()?.agent_pid, 1);
    Ok(())
}

/// Not a test of its own: boots a guest in a process that will be killed.
#[test]
fn victim() -> anyhow::Result<()> {
    if std::env::var_os(VICTIM).is_none() {
        return Ok(());
    }
    let guest = Guest::builder(Suite::Bookworm).boot()?;
    println!("\nvictim {} {}", guest.pid(), guest.folder().display());
    loop {
        std::thread::park();
    }
}

#[test]
fn a_killed_owner_leaves_nothing() -> anyhow::Result<()> {
    let mut owner = Command::new(std::env::current_exe()?)
        .args(["--exact", "victim", "--nocapture"])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .spawn()?;
    let output = BufReader::new(owner.stdout.take().expect("piped"));
    let mut found = None;
    for line in output.lines() {
        let line = line?;
        if let Some((pid, folder)) = line
            .strip_prefix("victim ")
            .and_then(|rest| rest.split_once(' '))
        {
            found = Some((pid.parse()?, PathBuf::from(folder)));
            break;
        }
    }
    let (pid, folder): (u32, PathBuf) = found.expect("the owner boots its guest");
    assert!(folder.is_dir());
    assert!(fs::read_dir(&folder)?.count() > 2);
    // SIGKILL: no handler, no destructor.
    owner.kill()?;
    owner.wait()?;
    gone(pid, &folder);
    Ok(())
}
