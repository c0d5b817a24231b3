//! Processes that execute a program: command lines, environments, deleted
//! and nameless executables.

use std::env;
use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;

use super::report::{Reporter, Reports};
use super::{WORKER, containers};
use crate::agent::memory::{self, PAGE};
use crate::agent::sys;

/// The variable that tells an executed role what it is.
const ROLE: &str = "LAB_ROLE";

/// The argument that does, for a role without environment.
const ROLE_ARGUMENT: &[u8] = b"--lab-role=";

/// The role that process 1 gave this process, if it did.
pub fn role(arguments: &[OsString]) -> Option<OsString> {
    env::var_os(ROLE).or_else(|| {
        arguments
            .iter()
            .find_map(|argument| argument.as_bytes().strip_prefix(ROLE_ARGUMENT))
            .map(|role| OsStr::from_bytes(role).to_owned())
    })
}

/// Plays a role for ever.
pub fn play(role: &OsStr) -> ! {
    let role = role.to_string_lossy().into_owned();
    if let Some(name) = role.strip_prefix("container:") {
        containers::inside(name);
    }
    if let Some(name) = role.strip_prefix("specimen:") {
        // Its new name is the sign that it stands.
        sys::set_name(name.as_bytes());
        sys::rest();
    }
    let mut failures = Vec::new();
    let outcome = match role.as_str() {
        "exe-deleted" => fs::remove_file("/tmp/deleted program"),
        "exe-deleted-twin" => fs::remove_file("/tmp/twin").and_then(|()| {
            // Another file of the same name, which it is not.
            fs::write("/tmp/twin", "not the program")
        }),
        "exe-marked" => Ok(()),
        "argv-rewritten" => rewrite_arguments(b"lab: serving request 42"),
        "argv-overflowing" => rewrite_arguments("x".repeat(600).as_bytes()),
        "argv-swapped" => swap_arguments_out(),
        _ => Ok(()),
    };
    if let Err(error) = outcome {
        failures.push(error.to_string());
    }
    Reporter::new(&role).done(&failures);
    sys::rest()
}

/// One process for each kind of program start.
pub fn processes(reports: &mut Reports) -> io::Result<()> {
    let worker = |name: &'static str, arguments: Vec<Vec<u8>>, environment: Vec<Vec<u8>>| {
        (name, OsString::from(WORKER), arguments, environment)
    };
    let mut programs = vec![
        worker(
            "argv-plain",
            words(&["lab-worker", "--config", "/etc/x y", ""]),
            vec![],
        ),
        // On kernels from 5.18 on, execve makes one empty argument of none.
        worker("argv-empty", vec![], vec![]),
        worker("argv-only-empty", words(&["", "", ""]), vec![]),
        worker(
            "argv-bytes",
            vec![b"\xff\xfe".to_vec(), b"new\nline".to_vec(), "日本".into()],
            vec![],
        ),
        worker(
            "argv-page",
            words(&["lab-worker", &"p".repeat(4096 * 2)]),
            vec![],
        ),
        worker(
            "argv-long",
            (0..1200)
                .map(|number| format!("argument-{number:04}-{}", "y".repeat(90)).into_bytes())
                .collect(),
            vec![],
        ),
        // One string of execve is 128 KiB at most, its NUL included.
        worker(
            "argv-longest",
            vec![b"lab-worker".to_vec(), vec![b'z'; (128 << 10) - 1]],
            vec![],
        ),
        worker(
            "argv-swapped",
            (0..40)
                .map(|number| format!("swapped-{number:02}-{}", "s".repeat(1000)).into_bytes())
                .collect(),
            vec![],
        ),
        worker(
            "argv-rewritten",
            words(&[
                "lab-worker",
                "will",
                "be",
                "overwritten",
                "by",
                "a",
                "title",
            ]),
            vec![],
        ),
        worker(
            "argv-overflowing",
            words(&["lab-worker", "short"]),
            vec![vec![b'e'; 900]],
        ),
        worker(
            "env-odd",
            words(&["env-odd"]),
            vec![
                b"PATH=/bin:/usr/bin".to_vec(),
                b"NO_EQUALS".to_vec(),
                b"=starts".to_vec(),
                b"EMPTY=".to_vec(),
                b"".to_vec(),
                b"NEW=line\nfeed".to_vec(),
                b"BYTES=\xff\xfe\x80".to_vec(),
                "UMLAUT=äöü日本".into(),
                b"SAME=1".to_vec(),
                b"SAME=2".to_vec(),
            ],
        ),
        worker(
            "env-long",
            words(&["env-long"]),
            (0..400)
                .map(|number| format!("VARIABLE_{number}={}", "v".repeat(200)).into_bytes())
                .collect(),
        ),
    ];
    fs::create_dir_all("/tmp/päth with space/new\nline")?;
    for (name, place) in [
        ("exe-deleted", "/tmp/deleted program"),
        ("exe-deleted-twin", "/tmp/twin"),
        ("exe-marked", "/tmp/not really (deleted)"),
        ("exe-odd-path", "/tmp/päth with space/new\nline/\u{1F980}"),
    ] {
        fs::copy(WORKER, place)?;
        programs.push((name, OsString::from(place), words(&[name]), vec![]));
    }
    let deep = format!("/tmp/{}", vec!["d".repeat(200); 12].join("/"));
    fs::create_dir_all(&deep)?;
    let deep = format!("{deep}/program");
    fs::copy(WORKER, &deep)?;
    programs.push(("exe-deep", OsString::from(deep), words(&["deep"]), vec![]));
    for (name, program, arguments, environment) in programs {
        reports.piece(name, |reporter| {
            let error = execute(name, &program, &arguments, &environment);
            reporter.done(&[error.to_string()]);
        })?;
    }
    reports.piece("env-none", |reporter| {
        let arguments = vec![b"env-none".to_vec(), [ROLE_ARGUMENT, b"env-none"].concat()];
        let error = start(OsStr::new(WORKER), &arguments, &[]);
        reporter.done(&[error.to_string()]);
    })?;
    reports.piece("exe-memfd", |reporter| {
        let error = from_memory().err();
        reporter.done(&[error.map_or(String::new(), |error| error.to_string())]);
    })?;
    reports.piece("exe-busybox", |reporter| {
        // Not ours, so it can't report; it stands once it is executed, which
        // the exit code of nobody tells: report first.
        reporter.done(&[]);
        start(
            OsStr::new("/bin/busybox"),
            &words(&["sh", "-c", "while :; do sleep 86400; done"]),
            &[b"PATH=/bin".to_vec()],
        );
    })?;
    reports.simple("chroot", |_| {
        fs::create_dir_all("/tmp/root/inner")?;
        sys::chroot("/tmp/root")?;
        env::set_current_dir("/inner")
    })?;
    reports.simple("cwd-deleted", |_| {
        fs::create_dir_all("/tmp/cwd gone")?;
        env::set_current_dir("/tmp/cwd gone")?;
        fs::remove_dir("/tmp/cwd gone")
    })?;
    Ok(())
}

fn words(words: &[&str]) -> Vec<Vec<u8>> {
    words.iter().map(|word| word.as_bytes().to_vec()).collect()
}

/// Executes a role; back only with the reason why not.
pub fn execute(
    role: &str,
    program: &OsStr,
    arguments: &[Vec<u8>],
    environment: &[Vec<u8>],
) -> io::Error {
    let mut all = vec![format!("{ROLE}={role}").into_bytes()];
    all.extend_from_slice(environment);
    start(program, arguments, &all)
}

fn start(program: &OsStr, arguments: &[Vec<u8>], environment: &[Vec<u8>]) -> io::Error {
    let strings = |list: &[Vec<u8>]| -> io::Result<Vec<CString>> {
        list.iter()
            .map(|bytes| CString::new(bytes.clone()).map_err(io::Error::from))
            .collect()
    };
    match (
        sys::c_string(program),
        strings(arguments),
        strings(environment),
    ) {
        (Ok(program), Ok(arguments), Ok(environment)) => {
            sys::execute(&program, &arguments, &environment)
        }
        (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => error,
    }
}

/// Executes a copy of this program that has no name anywhere.
fn from_memory() -> io::Result<()> {
    Err(execute_from_memory("exe-memfd")?)
}

/// Executes a role in a copy of this program that has no name anywhere; back
/// only with the reason why not.
pub fn execute_from_memory(role: &str) -> io::Result<io::Error> {
    let memory = sys::memfd(b"hidden program", 0)?;
    let mut file = fs::File::from(memory.try_clone()?);
    io::copy(&mut fs::File::open(WORKER)?, &mut file)?;
    drop(file);
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    Ok(execute(
        role,
        OsStr::new(&path),
        &words(&["[kworker/u8:3]"]),
        &[],
    ))
}

/// Where the arguments start and end, and where the environment behind them
/// ends.
fn argument_addresses() -> io::Result<[usize; 3]> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().collect())
        .unwrap_or_default();
    // Fields 48 to 51 of proc(5); the first after the name is 3.
    let field = |number: usize| -> Option<usize> { fields.get(number - 3)?.parse().ok() };
    match (field(48), field(49), field(51)) {
        (Some(start), Some(end), Some(environment_end)) => Ok([start, end, environment_end]),
        _ => Err(io::Error::other("no argument addresses")),
    }
}

/// Gives the pages that hold the middle of the arguments to the swap space,
/// where there is one. Who reads the arguments brings them back.
fn swap_arguments_out() -> io::Result<()> {
    let [start, end, _] = argument_addresses()?;
    let first = (start + 1).next_multiple_of(PAGE) + PAGE;
    memory::advise(first, end / PAGE * PAGE - PAGE - first, libc::MADV_PAGEOUT)
}

/// Writes over the area that the kernel shows as the command line, as
/// `setproctitle` does; what is left of it becomes NUL. A longer title runs
/// on into the environment, where it ends when that does.
fn rewrite_arguments(title: &[u8]) -> io::Result<()> {
    let [start, end, environment_end] = argument_addresses()?;
    // The arguments that Rust's runtime looks at were read already; nothing
    // reads the environment later in a role.
    let mut area = title.to_vec();
    area.truncate(environment_end - start - 1);
    area.resize(area.len().max(end - start), 0);
    if title.len() > end - start {
        area.push(0);
    }
    memory::store(start, &area);
    Ok(())
}
