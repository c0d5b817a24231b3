//! `docs/detection.md`: what each detector says of itself, and what was
//! measured with the specimens.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use secmon_detect::{Technique, described, detectors};
use secmon_lab::Suite;
use secmon_lab::specimens::{self, BLINKING, How, Specimen, Verdict};

use crate::detection::everywhere::Everywhere;
use crate::detection::plan::SEVERAL;
use crate::detection::{Measured, Tried};

/// The document.
#[must_use]
pub fn text(measured: &[Measured]) -> String {
    let mut text = String::from(
        "# Detection\n\n\
         Generated from the detectors, from the specimens and from what `cargo xtask detection` \
         measured last; do not edit. A finding is an *attack* (no sound guest looks like this), \
         a *suspicion* (seldom innocent) or *information* (legitimate use that one may want to \
         know of); the first two are alarms. On a running guest a finding is reported only after \
         several looks agree on it.\n\n## Detectors\n",
    );
    for detector in described() {
        let techniques: Vec<_> = detector.techniques().iter().copied().map(link).collect();
        let _ = write!(
            text,
            "\n### {}\n\n{}\n\n- Compares: {}\n- Evaded by: {}\n- Cost: {}\n- Techniques: {}\n",
            detector.name(),
            detector.meaning(),
            detector.compares(),
            detector.evaded_by(),
            detector.cost(),
            techniques.join(", "),
        );
    }
    costs(&mut text, measured);
    clean(&mut text, measured);
    specimens(&mut text, measured);
    blinking(&mut text, measured);
    everywhere(&mut text, measured);
    text
}

fn link(technique: Technique) -> String {
    link_of(technique.id())
}

/// Sub-techniques have a folder of their own: `T1547/006`.
fn link_of(id: &str) -> String {
    let path = id.replace('.', "/");
    format!("[{id}](https://attack.mitre.org/techniques/{path}/)")
}

fn heading(text: &mut String, first: &str) {
    let _ = write!(text, "| {first} |");
    for suite in Suite::ALL {
        let _ = write!(text, " {suite} |");
    }
    text.push_str("\n|---|");
    text.push_str(&"---|".repeat(Suite::ALL.len()));
    text.push('\n');
}

fn of(measured: &[Measured], suite: Suite) -> Option<&Measured> {
    measured.iter().find(|one| one.kernel == suite.series())
}

fn costs(text: &mut String, measured: &[Measured]) {
    text.push_str(
        "\n## A look at a small guest\n\nMilliseconds of one look of each detector at a running \
         guest of about 70 tasks, by kernel; \"–\" where it can't work.\n\n",
    );
    heading(text, "detector");
    for detector in detectors() {
        let _ = write!(text, "| {} |", detector.name());
        for suite in Suite::ALL {
            let time = of(measured, suite).and_then(|measured| {
                let mut times = measured.detectors.iter();
                let start = format!("{}:", detector.name());
                let works = !measured
                    .not_checked
                    .iter()
                    .any(|text| text.starts_with(&start));
                times
                    .find(|(name, _)| works && name == detector.name())
                    .map(|(_, time)| *time)
            });
            let _ = match time {
                Some(time) => write!(text, " {time:.2} |"),
                None => write!(text, " – |"),
            };
        }
        text.push('\n');
    }
    for measured in measured {
        for reason in &measured.not_checked {
            let _ = write!(text, "\nNot checked at {}: {reason}.\n", measured.kernel);
        }
    }
}

fn clean(text: &mut String, measured: &[Measured]) {
    text.push_str(
        "\n## Clean guests\n\nAlarms in so many checks of a guest that has nothing to hide, all \
         detectors each time. A check is not complete if something changed so fast that a \
         detector could not read it to its end, which it says. What was seen in one look and not \
         confirmed by others is no finding; how often that was is told below.\n",
    );
    clean_of(text, measured, 1, "Guests with one processor");
    clean_of(text, measured, SEVERAL, "Guests with four processors");
    let all = || measured.iter().flat_map(|one| &one.clean);
    let mut counts: [BTreeMap<&str, u64>; 2] = Default::default();
    for clean in all() {
        for (sum, own) in counts.iter_mut().zip([&clean.reasons, &clean.unconfirmed]) {
            for (name, times) in own {
                *sum.entry(name).or_default() += times;
            }
        }
    }
    let checks: u64 = all().map(|clean| u64::from(clean.checks)).sum();
    let alarms: u64 = all().map(|clean| clean.alarms).sum();
    let _ = writeln!(text, "\nTogether {alarms} alarms in {checks} checks.");
    let heads = [
        "Why checks were not complete, and how often:",
        "What was seen in single looks and not reported, and in how many checks:",
    ];
    for (head, counts) in heads.into_iter().zip(&counts) {
        if counts.is_empty() {
            continue;
        }
        let _ = writeln!(text, "\n{head}\n");
        for (name, times) in counts {
            let _ = writeln!(text, "- {name}: {times}");
        }
    }
}

fn clean_of(text: &mut String, measured: &[Measured], vcpus: u32, title: &str) {
    let of_these = |measured: &Measured, load: &str| {
        let mut clean = measured.clean.iter();
        let found = clean.find(|clean| clean.vcpus == vcpus && clean.load == load);
        found.cloned()
    };
    let mut loads: Vec<&str> = Vec::new();
    for clean in measured.iter().flat_map(|measured| &measured.clean) {
        if clean.vcpus == vcpus && !loads.contains(&clean.load.as_str()) {
            loads.push(&clean.load);
        }
    }
    if loads.is_empty() {
        return;
    }
    let _ = write!(text, "\n### {title}\n\n");
    heading(text, "load");
    for load in loads {
        let _ = write!(text, "| {load} |");
        for suite in Suite::ALL {
            let clean = of(measured, suite).and_then(|measured| of_these(measured, load));
            let _ = match clean {
                Some(clean) if clean.incomplete > 0 => write!(
                    text,
                    " {} in {} ({} not complete) |",
                    clean.alarms, clean.checks, clean.incomplete
                ),
                Some(clean) => write!(text, " {} in {} |", clean.alarms, clean.checks),
                None => write!(text, " – |"),
            };
        }
        text.push('\n');
    }
}

fn specimens(text: &mut String, measured: &[Measured]) {
    text.push_str(
        "\n## Specimens\n\nWhat each specimen is found as, and the milliseconds of one look of that \
         detector. A specimen marked *information* is legitimate, and is found as such or left \
         alone. \"Not yet\": no detector is there yet that is meant to find it. \"–\": it is not \
         made for that kernel.\n\n",
    );
    heading(text, "specimen (technique): what it does, and how");
    let mut done: Vec<&str> = Vec::new();
    for specimen in specimens::all() {
        if done.contains(&specimen.name) {
            continue;
        }
        done.push(specimen.name);
        let information = match specimen.expected.verdict {
            Verdict::Alarm => "",
            Verdict::Information => ", *information*",
        };
        let _ = write!(
            text,
            "| {} ({}){information}: {}; {} |",
            specimen.name,
            link_of(specimen.technique),
            specimen.does,
            ways(specimen.name)
        );
        for suite in Suite::ALL {
            let there = Specimen::of(suite).find(|one| one.name == specimen.name);
            let tried = of(measured, suite).and_then(|measured| {
                let mut tried = measured.specimens.iter();
                tried.find(|tried| tried.name == specimen.name)
            });
            let _ = write!(text, " {} |", there.map_or("–".into(), |_| cell(tried)));
        }
        text.push('\n');
    }
}

/// What hides and shows itself by turns.
fn blinking(text: &mut String, measured: &[Measured]) {
    if measured.iter().all(|one| one.blinking.is_empty()) {
        return;
    }
    text.push_str(
        "\n## What hides by turns\n\nSpecimens that hide something and show it again in a loop: in \
         how many checks they were reported, and in brackets in how many they were seen in some \
         look at all; in guests at rest and in guests whose processes, threads, files and sockets \
         come and go. A check looks at most six times within 155 ms. `watch` goes on looking.\n\n",
    );
    let guests: Vec<(&Measured, u32, bool)> = measured
        .iter()
        .flat_map(|one| {
            let mut guests: Vec<_> = one
                .blinking
                .iter()
                .map(|b| (one, b.vcpus, b.busy))
                .collect();
            guests.dedup_by_key(|guest| (guest.1, guest.2));
            guests
        })
        .collect();
    text.push_str("| specimen |");
    for (measured, vcpus, busy) in &guests {
        let rest = if *busy { "busy" } else { "at rest" };
        let _ = write!(text, " {}, {vcpus} CPU, {rest} |", measured.kernel);
    }
    let _ = writeln!(text, "\n|---|{}", "---|".repeat(guests.len()));
    for specimen in BLINKING {
        let _ = write!(text, "| {}: {} |", specimen.name, specimen.does);
        for (measured, vcpus, busy) in &guests {
            let mut all = measured.blinking.iter();
            let one = all.find(|one| {
                (one.name.as_str(), one.vcpus, one.busy) == (specimen.name, *vcpus, *busy)
            });
            let _ = match one {
                Some(one) => write!(text, " {} of {} ({}) |", one.found, one.checks, one.seen),
                None => write!(text, " – |"),
            };
        }
        text.push('\n');
    }
    let all = || measured.iter().flat_map(|one| &one.blinking);
    let wrong: usize = all().map(|one| one.wrong.len()).sum();
    let checks: u32 = all().map(|one| one.checks).sum();
    let _ = writeln!(
        text,
        "\nReported besides, in these {checks} checks: {wrong}."
    );
}

/// Where the same was found.
fn everywhere(text: &mut String, measured: &[Measured]) {
    text.push_str(
        "\n## The same from everywhere\n\nEach specimen is looked for in the running machine and in \
         the bare image of its memory. Then as many as can stand beside each other are there \
         together, and all findings with all their evidence are compared: of the machine, of an \
         ELF dump of it, and of a monitoring VM beside it; but for changes that only a comparison \
         with the kernel's file shows, which a monitoring VM has not.\n\n\
         | kernel | specimens found alike in machine and image | specimens at once | findings | \
         all the same in |\n|---|---|---|---|---|\n",
    );
    for measured in measured {
        let same = measured
            .specimens
            .iter()
            .filter(|tried| tried.same_in_image);
        let _ = write!(
            text,
            "| {} | {} of {} |",
            measured.kernel,
            same.count(),
            measured.specimens.len()
        );
        let list = |each: &dyn Fn(&Everywhere) -> String| {
            let parts: Vec<String> = measured.everywhere.iter().map(each).collect();
            parts.join("; ")
        };
        let _ = writeln!(
            text,
            " {} | {} | {} |",
            list(&|one| one.specimens.len().to_string()),
            list(&|one| one.findings.to_string()),
            list(&|one| one.same.join(", ")),
        );
    }
}

fn cell(tried: Option<&Tried>) -> String {
    let mut parts = Vec::new();
    if let Some((found, time)) = tried.and_then(|tried| tried.found.as_ref()) {
        parts.push(format!("{found} {time:.2}"));
    }
    // Found under a name that nobody promised.
    for besides in tried.into_iter().flat_map(|tried| &tried.besides) {
        parts.push(format!("({besides})"));
    }
    if parts.is_empty() {
        "not yet".to_owned()
    } else {
        parts.join(", ")
    }
}

/// How a specimen is made, on one kernel and another.
fn ways(name: &str) -> String {
    let mut ways: Vec<&str> = Vec::new();
    for specimen in specimens::all().filter(|one| one.name == name) {
        let way = match specimen.how {
            How::Module(_) => "a module",
            How::HiddenModule(_) => "a hidden module",
            How::Program(_) => "a program",
            How::Setting { .. } => "a setting",
            How::MemoryEdit(_) => "an edit of memory",
        };
        if !ways.contains(&way) {
            ways.push(way);
        }
    }
    ways.join(" or ")
}
