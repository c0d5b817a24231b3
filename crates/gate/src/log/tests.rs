use super::*;
use crate::protocol::{Request, Right};
use proptest::prelude::*;

fn used(number: u32) -> Entry {
    Entry::Use {
        monitor: "watcher".to_owned(),
        right: Right::Pause,
        request: Request::Pause {
            lease_milliseconds: number,
        },
        outcome: Outcome::Allowed,
        reason: None,
    }
}

fn open(path: &Path) -> Log {
    Log::open(path, Bounds::default(), "web1").expect("a log")
}

/// A log of ten records (two are the gate's own), and its text.
fn ten() -> (tempfile::TempDir, PathBuf, Vec<u8>, LogHead) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    let mut log = open(&path);
    for number in 0..8 {
        log.append(&used(number)).expect("room");
    }
    let head = log.head().clone();
    let text = fs::read(&path).expect("the log");
    (folder, path, text, head)
}

fn lines(text: &[u8]) -> Vec<Vec<u8>> {
    text.split_inclusive(|byte| *byte == b'\n')
        .map(<[u8]>::to_vec)
        .collect()
}

#[test]
fn a_sound_log_is_found_sound_and_goes_on_after_a_start() {
    let (_folder, path, text, head) = ten();
    let report = verify(&path, Some(&head)).expect("readable");
    assert_eq!(report.faults, []);
    assert_eq!((report.records, report.first), (10, Some(1)));
    assert_eq!(report.head.as_ref(), Some(&head));
    let mut log = open(&path);
    log.append(&used(99)).expect("room");
    let later = log.head().clone();
    let report = verify(&path, Some(&head)).expect("readable");
    assert_eq!((report.faults.as_slice(), report.records), (&[][..], 12));
    assert_eq!(report.head, Some(later));
    // Anybody can check a record with other tools.
    let line = &lines(&text)[3];
    let at = line.windows(9).position(|part| part == b",\"hash\":\"");
    let (body, rest) = line.split_at(at.expect("a hash"));
    assert_eq!(sha256(body).as_bytes(), &rest[9..73]);
}

#[test]
fn every_kind_of_tampering_is_named() {
    let (_folder, _, text, head) = ten();
    let all = lines(&text);
    let place = |line| verify::Place {
        file: PathBuf::new(),
        line,
    };
    let faults = |lines: &[Vec<u8>]| verify_text(&lines.concat(), None).faults;

    let mut changed = all.clone();
    let text = String::from_utf8(changed[4].clone()).expect("text");
    changed[4] = text.replace("allowed", "denied_").into_bytes();
    let expected = Fault::Changed {
        place: place(5),
        sequence: 5,
    };
    assert_eq!(faults(&changed), [expected]);

    // Changed, and its own hash made to fit.
    let end = changed[4]
        .windows(9)
        .position(|part| part == b",\"hash\":\"");
    changed[4].truncate(end.expect("a hash"));
    let hash = sha256(&changed[4]);
    changed[4].extend_from_slice(format!(",\"hash\":\"{hash}\"}}\n").as_bytes());
    let expected = Fault::Replaced {
        place: place(6),
        sequence: 5,
    };
    assert_eq!(faults(&changed), [expected]);

    let mut dropped = all.clone();
    dropped.drain(2..5);
    let expected = Fault::Missing {
        place: place(3),
        first: 3,
        last: 5,
    };
    assert_eq!(faults(&dropped), [expected]);

    let mut beheaded = all.clone();
    beheaded.drain(..2);
    assert!(matches!(faults(&beheaded)[..], [Fault::Missing { .. }]));

    let mut moved = all.clone();
    moved.swap(3, 6);
    assert!(
        faults(&moved).contains(&Fault::Moved {
            place: place(5),
            sequence: 5,
            expected: 8
        }),
        "{:?}",
        faults(&moved)
    );

    let mut added = all.clone();
    added.insert(5, b"nonsense\n".to_vec());
    assert_eq!(faults(&added), [Fault::Garbage { place: place(6) }]);

    // The end cut off shows against a head kept elsewhere, and only so.
    let cut = all[..7].concat();
    assert_eq!(verify_text(&cut, None).faults, []);
    let expected = Fault::Truncated {
        last: 7,
        expected: 10,
    };
    assert_eq!(verify_text(&cut, Some(&head)).faults, [expected]);
    let other = LogHead {
        sequence: 10,
        hash: GENESIS.to_owned(),
    };
    let expected = Fault::OtherHead { sequence: 10 };
    assert_eq!(verify_text(&all.concat(), Some(&other)).faults, [expected]);
}

#[test]
fn a_torn_line_is_reported_and_the_chain_goes_on() {
    let (_folder, path, text, _) = ten();
    for cut in 1..lines(&text)[9].len() {
        let left = &text[..text.len() - cut];
        fs::write(&path, left).expect("written");
        let before = verify(&path, None).expect("readable");
        assert_eq!(before.faults, []);
        // With only the end of line missing the record itself is whole.
        assert_eq!(before.torn_tail.is_some(), cut != 1);
        let mut log = open(&path);
        log.append(&used(1)).expect("room");
        drop(log);
        let after = verify(&path, None).expect("readable");
        assert_eq!(after.faults, [], "cut {cut}");
        assert_eq!(after.torn_lines, u64::from(cut != 1));
        assert_eq!(after.torn_tail, None);
    }
    // A torn line can't be made up later in place of a record.
    let mut forged = lines(&text);
    forged[5].truncate(40);
    forged[5].push(b'\n');
    assert!(!verify_text(&forged.concat(), None).faults.is_empty());
}

#[test]
fn a_damaged_log_is_not_continued() {
    let (_folder, path, text, _) = ten();
    let mut all = lines(&text);
    all.remove(4);
    fs::write(&path, all.concat()).expect("written");
    let error = Log::open(&path, Bounds::default(), "web1").expect_err("damaged");
    assert!(matches!(error, LogError::Damaged { .. }), "{error}");
}

#[test]
fn two_gates_do_not_share_a_log() {
    let (_folder, path, ..) = ten();
    let _first = open(&path);
    let error = Log::open(&path, Bounds::default(), "web1").expect_err("in use");
    assert!(matches!(error, LogError::InUse { .. }), "{error}");
}

#[test]
fn files_are_bounded_and_the_chain_goes_through_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    let bounds = Bounds {
        file_bytes: 2000,
        kept_files: 3,
    };
    let mut log = Log::open(&path, bounds, "web1").expect("a log");
    let early = log.head().clone();
    for number in 0..12 {
        log.append(&used(number)).expect("room");
    }
    let report = verify(&path, Some(&early)).expect("readable");
    assert_eq!((report.faults.as_slice(), report.first), (&[][..], Some(1)));
    for number in 0..100 {
        log.append(&used(number)).expect("room");
    }
    let report = verify(&path, Some(log.head())).expect("readable");
    assert_eq!(report.faults, []);
    assert_eq!(report.files.len(), 4);
    assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 4);
    let tooold = verify(&path, Some(&early)).expect("readable").faults;
    assert!(matches!(tooold[..], [Fault::TooOld { .. }]), "{tooold:?}");
    // A whole file that is taken away is missed, and so is one's end.
    fs::rename(numbered(&path, 2), numbered(&path, 4)).expect("moved");
    fs::remove_file(numbered(&path, 1)).expect("removed");
    fs::rename(numbered(&path, 3), numbered(&path, 1)).expect("moved");
    let faults = verify(&path, None).expect("readable").faults;
    assert!(matches!(faults[..], [Fault::Missing { .. }]), "{faults:?}");
}

#[test]
fn a_full_disk_refuses_and_leaves_no_part() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    let mut log = open(&path);
    let before = fs::read(&path).expect("the log");
    // A file of which nothing more can be written, as /dev/full; what was
    // taken back is the length, which a device has not.
    log.file = OpenOptions::new()
        .append(true)
        .open("/dev/full")
        .expect("a device");
    let error = log.append(&used(1)).expect_err("no room");
    assert!(matches!(error, LogError::Host { .. }), "{error}");
    let error = log.append(&used(1)).expect_err("still refused");
    assert!(matches!(error, LogError::Broken { .. }), "{error}");
    assert_eq!(fs::read(&path).expect("the log"), before);
    drop(log);
    assert_eq!(verify(&path, None).expect("readable").faults, []);
}

proptest! {
    #[test]
    fn no_byte_of_a_record_can_be_changed(line in 0_usize..10, at in 0_usize..200, bit in 0_u8..8) {
        let (_folder, _, text, head) = ten();
        let mut all = lines(&text);
        let at = at % (all[line].len() - 1);
        all[line][at] ^= 1 << bit;
        let report = verify_text(&all.concat(), Some(&head));
        prop_assert!(!report.faults.is_empty() || report.torn_tail.is_some());
    }

    #[test]
    fn any_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = verify_text(&bytes, None);
    }
}
