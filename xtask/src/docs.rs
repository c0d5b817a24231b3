//! Documents that are generated from the code, and the check that they are
//! what the code says now.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::run::{cargo, output, root};

/// A document, the words of `cargo run` that choose a program, and the
/// program's own that print it.
const GENERATED: &[(&str, &[&str], &[&str])] = &[
    (
        "docs/tables.md",
        &["--package", "secmon"],
        &["tables", "--format", "markdown"],
    ),
    (
        "docs/policy.schema.json",
        &["--package", "secmon"],
        &["watch", "--schema"],
    ),
    (
        "docs/detection.md",
        &["--package", "secmon-tests", "--bin", "detection"],
        &["print"],
    ),
];

/// Writes them, or only compares.
///
/// # Errors
/// With `check`: names each document that is not up to date.
pub fn run(check: bool) -> Result<()> {
    for (file, program, words) in GENERATED {
        let path = root().join(file);
        let text = output(
            cargo()
                .args(["run", "--quiet"])
                .args(program.iter())
                .arg("--")
                .args(words.iter()),
        )?;
        if !check {
            fs::write(&path, text).with_context(|| path.display().to_string())?;
            println!("wrote {file}");
        } else if fs::read_to_string(&path).unwrap_or_default() != text {
            bail!("{file} is not what the code says: run `cargo xtask docs` and commit it");
        }
    }
    Ok(())
}
