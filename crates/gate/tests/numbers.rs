//! The numbers that SECURITY.md states of the gate are true.

use std::path::Path;

use secmon_gate::sandbox;

/// Lines of code: no blank ones, no comments, no unit tests.
fn lines_of_code(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths
        .map(|path| {
            if path.is_dir() {
                return lines_of_code(&path);
            }
            if path.ends_with("tests.rs") {
                return 0;
            }
            let text = std::fs::read_to_string(&path).expect("text");
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            let lines = code.lines().map(str::trim);
            lines
                .filter(|line| !line.is_empty() && !line.starts_with("//"))
                .count()
        })
        .sum()
}

/// The number in the second column of a row of the gate's table.
fn stated(document: &str, row: &str) -> usize {
    let line = document
        .lines()
        .find_map(|line| line.strip_prefix(&format!("| {row} | ")));
    let line = line.unwrap_or_else(|| panic!("no row {row:?}"));
    let digits: String = line
        .chars()
        .take_while(|character| *character != '|')
        .filter(char::is_ascii_digit)
        .collect();
    digits.parse().expect("a number")
}

#[test]
fn the_documented_numbers_are_true() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = std::fs::read_to_string(root.join("../../SECURITY.md")).expect("SECURITY.md");
    let lines = lines_of_code(&root.join("src"));
    // Stated in hundreds, rounded up.
    let rounded = lines.div_ceil(100) * 100;
    assert_eq!(
        stated(&document, "lines of code of the gate, at most"),
        rounded,
        "{lines}"
    );
    let system_calls = [
        (
            "system calls of the gate, whatever their arguments",
            sandbox::GATE.len(),
        ),
        (
            "system calls of the gate, for some arguments",
            sandbox::GATE_CONDITIONAL,
        ),
        (
            "system calls of the keeper, whatever their arguments",
            sandbox::KEEPER.len(),
        ),
        (
            "system calls of the keeper, for some arguments",
            sandbox::KEEPER_CONDITIONAL,
        ),
    ];
    for (row, counted) in system_calls {
        assert_eq!(stated(&document, row), counted, "{row}");
    }
}
