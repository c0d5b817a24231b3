//! The comparison as a document.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;
use secmon_benches::process::processor;

use crate::jobs::Job;
use crate::reads::{self, Case};
use crate::runs::{BUDGET, Outcome, ROUNDS};

/// Examples of each kind of error.
const EXAMPLES: usize = 3;
/// An example is cut here.
const EXAMPLE_LENGTH: usize = 120;

/// What was measured besides the jobs.
pub struct Facts {
    /// Name and version of each tool.
    pub versions: Vec<(String, String)>,
    /// The guest's kernel.
    pub release: String,
    /// How long `secmon isf` took, and the bytes it wrote.
    pub isf: (Duration, u64),
    /// How long `secmon dump --as elf` took.
    pub core: Duration,
    /// The bytes of the debug image for drgn, or why there is none.
    pub debug_image: Result<u64, String>,
}

fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match seconds < 1.0 {
        true => format!("{:.1} ms", seconds * 1000.0),
        false => format!("{seconds:.2} s"),
    }
}

fn times(ratio: f64) -> String {
    match ratio < 10.0 {
        true => format!("{ratio:.1}"),
        false => format!("{ratio:.0}"),
    }
}

fn mebibytes(bytes: u64) -> u64 {
    bytes >> 20
}

/// Text of a guest inside a line of Markdown.
fn inline(text: &str) -> String {
    let mut plain: String = text.chars().flat_map(char::escape_default).collect();
    if plain.len() > EXAMPLE_LENGTH {
        plain.truncate(EXAMPLE_LENGTH);
        plain.push('…');
    }
    format!(
        "`{}`",
        plain
            .replace("\\'", "'")
            .replace("\\\"", "\"")
            .replace('`', "'")
    )
}

/// The whole document.
///
/// # Errors
/// Never; `write!` into a string.
pub fn document(
    facts: &Facts,
    results: &[(Job, Vec<Outcome>)],
    reads: &[reads::Outcome],
    pat: &[Case],
) -> Result<String> {
    let mut text = String::from(
        "# The same jobs by other tools\n\n\
         Written by `cargo xtask peers`; do not edit. Every tool works on the same image in the same run: \
         512 MiB of a Linux guest with more than 1,000 processes of all kinds, raw; for drgn the same bytes as \
         an ELF core. What is right is what the guest itself said just before and after the moment of the image.\n\n",
    );
    write!(
        text,
        "Each run of a listing is a process of its own, start to end; the tools take turns, {ROUNDS} rounds, \
         the median counts; one that took more than {} s is not run again. SecMon runs three times a round. The image is in the page cache. \
         Machine: {}, busy with other work: compare within a table, not across machines. Guest kernel: {}.\n\n",
        BUDGET.as_secs(),
        processor(),
        facts.release
    )?;
    for (name, version) in &facts.versions {
        writeln!(text, "- {name} {version}")?;
    }
    text.push_str("\n## What each needs first\n\n");
    writeln!(
        text,
        "- SecMon: the image.\n\
         - volatility3: an ISF file of this build of the kernel. `secmon isf` made it from the image, \
         {} MiB in {}, and volatility3 took it; otherwise it takes the debug package and `dwarf2json`.\n\
         - drgn: a core with VMCOREINFO, which a raw image is not: `secmon dump --as elf` made it in {}. {}\n\
         - memflow: the address of the page tables and of the direct map, which SecMon told it.\n",
        mebibytes(facts.isf.1),
        seconds(facts.isf.0),
        seconds(facts.core),
        match &facts.debug_image {
            Ok(bytes) => format!(
                "And the kernel image with DWARF, {} MiB, out of Debian's debug package.",
                mebibytes(*bytes)
            ),
            Err(reason) => format!(
                "It also needs the kernel image with DWARF, and that could not be had: {reason}. So drgn lists nothing here."
            ),
        }
    )?;
    text.push_str("## Listings\n");
    for (job, outcomes) in results {
        write!(
            text,
            "\n### {}\n\n{} certain rows; compared: {}.\n\n\
             | tool | median | runs | times SecMon's | own memory | rows | missing | invented | wrong | says it can't tell |\n\
             |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
            job.title,
            job.expected.certain(),
            job.compared
        )?;
        // Warm against warm: the last of our own lines.
        let own = outcomes.iter().rfind(|outcome| outcome.tool == "SecMon");
        let own = own.map_or(1.0, |own| own.median.as_secs_f64());
        for outcome in outcomes {
            let line = format!(
                "| {} {} | {} | {} | {} | {} MiB |",
                outcome.tool,
                outcome.how,
                seconds(outcome.median),
                outcome.runs,
                times(outcome.median.as_secs_f64() / own),
                outcome.memory >> 10
            );
            match &outcome.verdict {
                Ok(verdict) => writeln!(
                    text,
                    "{line} {} | {} | {} | {} | {} |",
                    verdict.rows,
                    verdict.missing.len(),
                    verdict.invented.len(),
                    verdict.wrong.len(),
                    verdict.unread
                )?,
                Err(reason) => writeln!(text, "{line} failed: {} |||||", inline(reason))?,
            }
        }
        for (tool, reason) in &job.absent {
            writeln!(
                text,
                "| {tool} | not possible: {} |||||||||",
                inline(reason)
            )?;
        }
        errors(&mut text, outcomes)?;
    }
    reading(&mut text, reads)?;
    text.push_str(
        "\n## A 2 MiB page with the PAT bit set\n\n\
         Bit 12 of such an entry is no address bit. drgn can't be asked: it walks page tables only of a \
         kernel that it has found.\n\n| tool | answers |\n|---|---|\n",
    );
    for case in pat {
        let mark = if case.right { "" } else { "**wrong**: " };
        writeln!(text, "| {} | {mark}{} |", case.tool, case.said)?;
    }
    Ok(text)
}

/// What the tools got wrong, with examples.
fn errors(text: &mut String, outcomes: &[Outcome]) -> Result<()> {
    let mut said = Vec::new();
    for outcome in outcomes {
        let Ok(verdict) = &outcome.verdict else {
            continue;
        };
        for (kind, list) in [
            ("misses", &verdict.missing),
            ("invents", &verdict.invented),
            ("says wrongly", &verdict.wrong),
        ] {
            if list.is_empty() {
                continue;
            }
            let examples: Vec<_> = list.iter().take(EXAMPLES).map(|row| inline(row)).collect();
            let more = match list.len().saturating_sub(EXAMPLES) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            let line = format!("- {} {kind} {}{more}", outcome.tool, examples.join(", "));
            // Cold and warm say the same.
            if !said.contains(&line) {
                said.push(line);
            }
        }
    }
    if !said.is_empty() {
        writeln!(text, "\n{}", said.join("\n"))?;
    }
    Ok(())
}

fn reading(text: &mut String, reads: &[reads::Outcome]) -> Result<()> {
    text.push_str(
        "\n## Virtual reads\n\n\
         Of the kernel's direct map, in one process, timed inside of it. drgn and volatility3 are called from \
         Python, a call for each read, as their users do.\n",
    );
    for (pages, title) in [
        (false, "8 bytes, random over 480 MiB"),
        (true, "4096 bytes, page after page over 480 MiB"),
    ] {
        write!(
            text,
            "\n### {title}\n\n\
             | tool | each | times SecMon's best | addresses | bytes read |\n|---|---:|---:|---:|---|\n"
        )?;
        let of_kind = || reads.iter().filter(|outcome| outcome.pages == pages);
        let own = of_kind()
            .filter(|outcome| outcome.tool == "SecMon")
            .map(|outcome| outcome.nanoseconds)
            .fold(f64::INFINITY, f64::min);
        for outcome in of_kind() {
            let right = match (outcome.right, outcome.failed) {
                (true, 0) => "right".to_owned(),
                (_, 0) => "**wrong**, no error".to_owned(),
                (_, failed) => format!("{failed} reads failed"),
            };
            writeln!(
                text,
                "| {}, {} | {:.0} ns | {} | {} | {right} |",
                outcome.tool,
                outcome.how,
                outcome.nanoseconds,
                times(outcome.nanoseconds / own),
                outcome.addresses
            )?;
        }
    }
    Ok(())
}
