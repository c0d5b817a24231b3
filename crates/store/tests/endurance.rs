//! What a store promises: what was said to be kept is there, whatever ended
//! the program, and a full disk costs nothing that was kept.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use secmon_detect::{Class, Finding, Severity, Subject};
use secmon_guest::TrustLevel;
use secmon_memory::VirtualAddress;
use secmon_store::{Keeper, Kept, Query, StateFilter, Store};
use secmon_watch::{Event, FindingRecord, Incident, Tally, TargetChange};

/// Set in the process that writes and is killed.
const WRITER: &str = "SECMON_TEST_STORE_WRITER";
const TARGET: &str = "qemu:web1";

fn record(number: u64, class: Class) -> FindingRecord {
    let subject = Subject::Module {
        address: VirtualAddress::new(0xffff_8880_0000_0000 + number),
        name: "m".into(),
    };
    let finding = Finding::new(
        "modules",
        "hidden_module",
        class,
        Severity::High,
        subject,
        format!("module {number} is hidden"),
    );
    (&finding).into()
}

fn event(sequence: u64, incident: Incident) -> Event {
    Event {
        sequence,
        time_ms: 1_000 + sequence,
        target: TARGET.to_owned(),
        trust_level: TrustLevel::L0,
        incident,
    }
}

fn appeared(number: u64) -> Event {
    let finding = Box::new(record(number, Class::Attack));
    event(number, Incident::Appeared { finding })
}

#[test]
fn a_finding_has_one_row_and_a_life() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store.db");
    let mut store = Store::open(&path).expect("a store");
    let gone = Incident::Gone {
        finding: Box::new(record(1, Class::Attack)),
        lasted_ms: 5,
        reason: "not seen any more".into(),
    };
    let started = Incident::Started {
        version: "1".into(),
        detectors: vec![],
        budget_percent: 5.0,
    };
    let events = [appeared(1), event(2, gone), appeared(3), event(4, started)];
    store.put("run", &events).expect("written");
    // The same ones again, as a monitor sends what was not acknowledged.
    store.put("run", &events).expect("written");
    drop(store);

    let store = Store::open_to_read(&path).expect("a store");
    assert_eq!(store.events(0).expect("events").len(), 4);
    assert_eq!(store.events(1_003).expect("events").len(), 2);
    let of = |state| {
        let query = Query {
            state: Some(state),
            ..Query::default()
        };
        store.findings(&query).expect("findings")
    };
    assert!(of(StateFilter::Open).is_empty());
    let gone = of(StateFilter::Gone);
    assert_eq!((gone.len(), gone[0].appearances), (1, 1));
    assert_eq!(
        (gone[0].first_seen_ms, gone[0].last_told_ms),
        (1_001, 1_002)
    );
    assert_eq!(gone[0].record, record(1, Class::Attack));
    // The watch was started anew, and has not found it again yet.
    assert_eq!(of(StateFilter::Unknown).len(), 1);

    let mut store = Store::open(&path).expect("a store");
    let mut again = appeared(3);
    again.sequence = 5;
    let rebooted = Incident::Target {
        change: TargetChange::Rebooted,
        detail: "another boot".into(),
    };
    store.put("run", [&again]).expect("written");
    let open = store.findings(&Query::default()).expect("findings");
    assert!(open.iter().any(|f| f.state == "open" && f.appearances == 2));
    store.put("run", [&event(6, rebooted)]).expect("written");
    let all = store.findings(&Query::default()).expect("findings");
    assert!(all.iter().all(|finding| finding.state == "gone"), "{all:?}");
}

#[test]
fn another_programs_database_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("other.db");
    let other = rusqlite_other(&path);
    assert!(other.contains("something else"), "{other}");
    std::fs::write(&path, vec![7; 4096]).expect("written");
    assert!(Store::open(&path).is_err());
    assert!(Store::open_to_read(&folder.path().join("none.db")).is_err());
}

/// What opening a database with a table of somebody else's says.
fn rusqlite_other(path: &Path) -> String {
    let connection = rusqlite::Connection::open(path).expect("a database");
    connection
        .execute_batch("CREATE TABLE theirs (a)")
        .expect("a table");
    drop(connection);
    Store::open(path).expect_err("not ours").to_string()
}

/// The process that is killed: prints the number of each event that is kept.
#[test]
fn writer() {
    let Some(path) = std::env::var_os(WRITER) else {
        return;
    };
    let store = Store::open(Path::new(&path)).expect("a store");
    let first = store.events(0).expect("events").len() as u64 + 1;
    let mut keeper = Keeper::new(store, "run");
    for number in first.. {
        if matches!(keeper.take(appeared(number)), Kept::Stored) {
            println!("kept {number}");
            std::io::stdout().flush().expect("stdout");
        }
    }
}

#[test]
fn what_was_kept_survives_kill_9() {
    const KILLS: usize = 8;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store.db");
    let mut kept = 0;
    for kill in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "writer", "--nocapture"])
            .env(WRITER, &path)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a writer");
        let lines = BufReader::new(child.stdout.take().expect("its lines"));
        // After another number of events each time, wherever it is then.
        let mut wanted = 3 + kill * 5;
        for line in lines.lines() {
            let line = line.expect("a line");
            if let Some((_, number)) = line.split_once("kept ") {
                kept = kept.max(number.trim().parse::<u64>().expect("a number"));
                wanted = wanted.saturating_sub(1);
            }
            if wanted == 0 {
                let _ = child.kill();
            }
        }
        child.wait().expect("its end");
        let store = Store::open(&path).expect("a store that was not damaged");
        let events = store.events(0).expect("events");
        let numbers: Vec<u64> = events.iter().map(|stored| stored.event.sequence).collect();
        // One more may be there, whose line was not written any more.
        let all: Vec<u64> = (1..=numbers.len() as u64).collect();
        assert_eq!(numbers, all);
        assert!(numbers.len() as u64 >= kept, "{} of {kept}", numbers.len());
    }
    assert!(kept > 100, "{kept}");
}

#[test]
fn a_full_disk_costs_nothing_that_was_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path();
    let size = c"size=1m,mode=0700";
    mount("secmon-test", at, "tmpfs", MountFlags::empty(), size)
        .expect("a small file system: run the tests as root");
    let outcome = std::panic::catch_unwind(|| fill(at));
    unmount(at, UnmountFlags::DETACH).expect("unmounted");
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

fn fill(at: &Path) {
    let path = at.join("store.db");
    let filler = at.join("filler");
    let mut keeper = Keeper::new(Store::open(&path).expect("a store"), "run");
    let mut number = 0;
    let mut next = || {
        number += 1;
        appeared(number)
    };
    for _ in 0..20 {
        assert!(matches!(keeper.take(next()), Kept::Stored));
    }
    // What is left of the disk is somebody else's.
    let mut file = std::fs::File::create(&filler).expect("a file");
    while file.write_all(&[0; 4096]).is_ok() {}
    let mut told = 0;
    for _ in 0..500 {
        match keeper.take(next()) {
            Kept::Waits { reason: Some(_) } => told += 1,
            Kept::Waits { reason: None } | Kept::Stored => {}
            Kept::StoredAgain { .. } => panic!("there is no room"),
        }
    }
    assert_eq!(told, 1, "it is said once");
    assert!(keeper.waiting() > 100, "{} wait", keeper.waiting());
    let store = Store::open_to_read(&path).expect("a store that was not damaged");
    let kept = store.events(0).expect("events").len();
    assert!(kept >= 20 && kept + keeper.waiting() == 520, "{kept}");
    drop((store, file));

    std::fs::remove_file(&filler).expect("removed");
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match keeper.retry() {
            Kept::StoredAgain { lost } => {
                assert_eq!(lost, 0);
                break;
            }
            _ if Instant::now() > deadline => panic!("{} still wait", keeper.waiting()),
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    let stored = Event {
        sequence: 521,
        ..event(
            521,
            Incident::Stopped {
                reason: "done".into(),
                tally: Tally::default(),
            },
        )
    };
    assert!(matches!(keeper.take(stored), Kept::Stored));
    let store = Store::open_to_read(&path).expect("a store");
    assert_eq!(store.events(0).expect("events").len(), 521);
}
