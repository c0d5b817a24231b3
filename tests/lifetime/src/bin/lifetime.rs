//! Makes all attacks, says how long each took to be noticed, and writes the
//! table of `SECURITY.md`. With a number, so many rounds of a clean monitor
//! come first.

use std::path::Path;

use anyhow::{Context as _, Result};
use secmon_lifetime::{Suite, attacks};

/// The first line of the table.
const HEAD: &str = "| attacker | what is attacked | outcome |";

fn main() -> Result<()> {
    let rounds = std::env::args().nth(1).map(|text| text.parse());
    let rounds: u32 = rounds
        .transpose()
        .context("a number of rounds")?
        .unwrap_or(20);
    let mut suite = Suite::start()?;
    suite.clean(rounds)?;
    println!("{rounds} rounds of a clean monitor: nothing found");
    for measured in suite.run()? {
        match measured.time {
            Some(time) => println!("{}: {:.1} s", measured.name, time.as_secs_f64()),
            None => println!("{}: not covered", measured.name),
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../SECURITY.md");
    let text = std::fs::read_to_string(&path)?;
    let start = text.find(HEAD).context("SECURITY.md has no such table")?;
    let rest = text.get(start..).unwrap_or_default();
    let end = rest.find("\n\n").map_or(text.len(), |end| start + end + 1);
    let (before, after) = (text.get(..start), text.get(end..));
    let table = attacks::table();
    let text = format!(
        "{}{table}{}",
        before.unwrap_or_default(),
        after.unwrap_or_default()
    );
    Ok(std::fs::write(path, text)?)
}
