//! Documents that are generated from the code, and the check that they are
//! what the code says now.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::{cargo, output, root, target_folder};

/// A document, the package and the program in it that print it, and the words
/// for that.
const GENERATED: &[(&str, &str, &str, &[&str])] = &[
    (
        "docs/tables.md",
        "secmon",
        "secmon",
        &["tables", "--format", "markdown"],
    ),
    (
        "docs/policy.schema.json",
        "secmon",
        "secmon",
        &["watch", "--schema"],
    ),
    ("docs/detection.md", "secmon-tests", "detection", &["print"]),
];

/// Writes them, or only compares.
///
/// # Errors
/// With `check`: names each document that is not up to date.
pub fn run(check: bool) -> Result<()> {
    for (file, package, program, words) in GENERATED {
        let text = output(
            cargo()
                .args(["run", "--quiet", "--package", package, "--bin", program])
                .arg("--")
                .args(words.iter()),
        )?;
        if check {
            compare(file, &text)?;
        } else {
            let path = root().join(file);
            fs::write(&path, text).with_context(|| path.display().to_string())?;
            println!("wrote {file}");
        }
    }
    Ok(())
}

/// Compares them by the programs that the tests were built with: alone they
/// would be built anew, as their dependencies then have fewer features.
///
/// # Errors
/// As [`run`] with `check`, or if the tests were not built.
pub fn check_built() -> Result<()> {
    let folder = target_folder()?.join("debug");
    for (file, _, program, words) in GENERATED {
        let text = output(Command::new(folder.join(program)).args(words.iter()))?;
        compare(file, &text)?;
    }
    Ok(())
}

fn compare(file: &str, text: &str) -> Result<()> {
    if fs::read_to_string(root().join(file)).unwrap_or_default() != text {
        bail!("{file} is not what the code says: run `cargo xtask docs` and commit it");
    }
    Ok(())
}
