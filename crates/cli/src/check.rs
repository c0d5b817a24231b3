//! `secmon check`: what the detectors find, once.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use secmon_detect::lies::{FOLDERS, Lies, Question};
use secmon_detect::{Confirmation, Detector, Report};
use secmon_guest::{ColumnInfo, Kind, TrustLevel, Value};
use secmon_memory::Volatility;
use secmon_monitor::protocol::{self, Cell, CheckEvidence, CheckFinding, DetectorResult};
use secmon_watch::policy::{Day, Exception};
use secmon_watch::{EvidenceRecord, FindingRecord, Policy};
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use crate::arguments::Format;
use crate::baseline;
use crate::columns::near;
use crate::listing::{self, column};
use crate::output::{Rows, json};
use crate::reader::SocketReader;
use crate::reference;
use crate::report::{Advise, Reporter};
use crate::session::Session;

/// The detector that needs the kernel's own file.
pub const REFERRING: &str = "kernel_image";
/// The exit status of a check that found something.
const FOUND: u8 = 1;

/// What the help says at its end.
pub const EXAMPLES: &str = "\
Examples:
  secmon -t qemu:web1 check                        all detectors, once
  secmon -t file:memory.raw check --format json    with all evidence and each detector's time
  secmon -t monitor:m1 check --detector processes  through the monitoring VM
  secmon -t qemu:web1 check --kernel vmlinuz       with the kernel's own file, exactly
  secmon -t qemu:web1 check --baseline             without one: with the first check of this boot
  secmon -t qemu:web1 check --reader web1.sock     and ask the reader in the guest
  secmon check --list                              what each detector compares, and what evades it

A running guest is looked at several times before anything is reported. What was seen too seldom
is counted and told with -v.

Exit status:
  0  every detector looked, and nothing but information was found
  1  something was found: an attack or a suspicion
  2  an error, or a detector could not look and the others found nothing";

/// Arguments of `secmon check`.
#[derive(Args, Clone, Debug)]
pub struct CheckArguments {
    /// Only these detectors
    #[arg(short, long = "detector", value_name = "NAME", value_delimiter = ',')]
    pub detectors: Vec<String>,

    /// The detectors there are: what they compare, and what evades them
    #[arg(short, long, conflicts_with = "detectors")]
    pub list: bool,

    /// The kernel's own file (vmlinuz, vmlinux, or the linux-image package) or a folder with it, to
    /// compare the guest's kernel with; without it one is looked for in /boot and below /usr/lib by
    /// release and build id
    #[arg(short, long, value_name = "FILE", env = "SECMON_KERNEL")]
    pub kernel: Option<PathBuf>,

    /// Where the kernel's own file is not at hand: compare the kernel with its state at the first
    /// check of this boot, which is kept in FOLDER, else below $XDG_STATE_HOME or ~/.local/state
    #[arg(long, value_name = "FOLDER", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub baseline: Option<PathBuf>,

    /// Leave out what this policy excepts or does not report, and its disabled detectors
    #[arg(long, value_name = "FILE", conflicts_with = "list")]
    pub policy: Option<PathBuf>,

    /// Say on stderr how long each detector looked (JSON always has it)
    #[arg(long)]
    pub timings: bool,

    /// Also ask the reader in the guest what programs there are told (detector lies): the socket of
    /// its virtio-serial port org.secmon.reader
    #[arg(long, value_name = "SOCKET", conflicts_with = "list")]
    pub reader: Option<PathBuf>,

    /// The folders that the reader lists, instead of some usual ones
    #[arg(long, value_name = "PATH", requires = "reader", value_delimiter = ',')]
    pub reader_folders: Vec<String>,
}

impl CheckArguments {
    /// The policy by which findings are left out. To be read before this
    /// process gives up its right to.
    ///
    /// # Errors
    /// If the file can't be read or is wrong.
    pub fn policy(&self) -> Result<Option<Policy>> {
        let policy = self.policy.as_deref().map(crate::policy::read);
        Ok(policy.transpose()?.map(|(policy, _)| policy))
    }

    /// The detectors that are meant.
    ///
    /// # Errors
    /// If there is none of a name.
    pub fn chosen(&self) -> Result<Vec<&'static dyn Detector>> {
        let known = secmon_detect::detectors();
        if self.detectors.is_empty()
            && let Some(policy) = self.policy()?
        {
            return Ok(policy.enabled());
        }
        if self.detectors.is_empty() {
            return Ok(known.to_vec());
        }
        let mut chosen: Vec<&'static dyn Detector> = Vec::new();
        for name in &self.detectors {
            if name == "lies" {
                if self.reader.is_none() {
                    return Err(anyhow::anyhow!("the detector `lies` needs somebody to ask"))
                        .advise("name the socket of the guest's reader with --reader");
                }
                continue;
            }
            let Some(detector) = secmon_detect::detector(name) else {
                let error = anyhow::anyhow!("there is no detector `{name}`");
                let like = near(name, known.iter().map(|detector| detector.name()));
                return match like.as_slice() {
                    [] => Err(error).advise("`secmon check --list` lists all"),
                    like => Err(error).advise(format!("did you mean {}?", like.join(" or "))),
                };
            };
            if chosen.iter().all(|chosen| chosen.name() != detector.name()) {
                chosen.push(detector);
            }
        }
        Ok(chosen)
    }

    /// The detector that asks the reader in the guest, if one is named.
    ///
    /// # Errors
    /// If it can't be reached, or a folder can't be asked for.
    fn lies(&self) -> Result<Option<&'static dyn Detector>> {
        let Some(socket) = &self.reader else {
            return Ok(None);
        };
        let folders = if self.reader_folders.is_empty() {
            FOLDERS.iter().map(|folder| (*folder).to_owned()).collect()
        } else {
            self.reader_folders.clone()
        };
        if let Some(folder) = folders.iter().find(|folder| !Question::can_ask(folder)) {
            return Err(anyhow::anyhow!("the reader can't be asked for `{folder}`"))
                .advise("name folders by absolute paths without blanks");
        }
        let reader = SocketReader::connect(socket)
            .advise("QEMU makes it: -chardev socket,path=…,server=on,wait=off,id=reader")?;
        // One for the life of this process.
        let lies: &'static dyn Detector = Box::leak(Box::new(Lies::new(Box::new(reader), folders)));
        Ok(Some(lies))
    }
}

/// `secmon check`, of a target that is opened here.
pub fn check(
    session: &Session<'_>,
    arguments: &CheckArguments,
    format: Format,
    reporter: Reporter,
) -> Result<ExitCode> {
    if arguments.list {
        list(format)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut detectors = arguments.chosen()?;
    detectors.extend(arguments.lies()?);
    let policy = arguments.policy()?;
    crate::fault::install();
    let source = session.open()?;
    let guest = session.guest(&source)?;
    if arguments.reader.is_some() && guest.space().memory().volatility() == Volatility::Static {
        return Err(anyhow::anyhow!("nobody reads in an image"))
            .advise("--reader is for a running guest");
    }
    let compares = detectors
        .iter()
        .any(|detector| detector.name() == REFERRING);
    let guest = match compares {
        true => reference::attach(guest, arguments.kernel.as_deref(), reporter)?,
        false => guest,
    };
    let guest = match &arguments.baseline {
        Some(folder) if compares && guest.reference().is_none() => {
            baseline::attach(guest, &baseline::folder(folder)?, reporter)?
        }
        _ => guest,
    };
    session.alone();
    let report = secmon_detect::check(&guest, &detectors, Confirmation::default());
    // The guest runs again before anything is said.
    let resumed = source.finish();
    let mut checked = Checked::from(&report);
    checked.apply(policy.as_ref(), reporter);
    let shown = checked.show(arguments, format, TrustLevel::L0, reporter);
    resumed?;
    shown
}

fn list(format: Format) -> Result<()> {
    let columns = [
        column("name", Kind::Text, "The detector."),
        column("meaning", Kind::Text, "What it finds."),
        column("compares", Kind::Text, "Which views it compares."),
        column("evaded_by", Kind::Text, "How one stays unseen."),
        column("techniques", Kind::List, "Techniques of ATT&CK."),
        column("cost", Kind::Text, "What it reads."),
    ];
    let row = |detector: &'static dyn Detector| {
        let techniques = detector.techniques().iter();
        let techniques = techniques.map(|technique| Value::word(technique.id()));
        vec![
            Value::word(detector.name()),
            Value::word(detector.meaning()),
            Value::word(detector.compares()),
            Value::word(detector.evaded_by()),
            Value::List(techniques.collect()),
            Value::word(detector.cost()),
        ]
    };
    let detectors = secmon_detect::described();
    Ok(listing::show(&columns, format, detectors.map(row))?)
}

/// What came out of a check, whoever made it.
#[derive(Debug, Default)]
pub struct Checked {
    /// What was found.
    pub findings: Vec<CheckFinding>,
    /// What each detector did.
    pub detectors: Vec<DetectorResult>,
}

impl From<&Report> for Checked {
    fn from(report: &Report) -> Self {
        Self {
            findings: report.findings.iter().map(Into::into).collect(),
            detectors: protocol::results(report),
        }
    }
}

impl Checked {
    /// Leaves out what a policy excepts or does not report, and says so.
    pub fn apply(&mut self, policy: Option<&Policy>, reporter: Reporter) {
        let Some(policy) = policy else {
            return;
        };
        let today = Day::today();
        let mut below = 0_usize;
        let mut excepted = vec![0_usize; policy.exceptions.len()];
        self.findings.retain(|finding| {
            let record = record(finding);
            if finding.class < policy.detector(&finding.detector).report {
                below += 1;
                return false;
            }
            let hidden = policy.excepted(&record, today);
            if let Some(count) = hidden.and_then(|number| excepted.get_mut(number)) {
                *count += 1;
            }
            hidden.is_none()
        });
        for (number, (exception, count)) in policy.exceptions.iter().zip(excepted).enumerate() {
            let number = number + 1;
            let Exception {
                reason, expires, ..
            } = exception;
            if exception.has_expired(today) {
                reporter.warn(format_args!(
                    "exception {number} ({reason}) expired on {expires} and hides nothing"
                ));
            } else if count > 0 {
                reporter.say(format_args!(
                    "exception {number} ({reason}) hides {count}, until {expires}"
                ));
            }
        }
        if below > 0 {
            reporter.say(format_args!(
                "the policy does not report {below} of their class"
            ));
        }
    }

    /// Writes what was found, says what could not be looked at, and gives the
    /// exit status.
    ///
    /// # Errors
    /// Those of the output, or if a detector could not look and nothing was
    /// found.
    pub fn show(
        &self,
        arguments: &CheckArguments,
        format: Format,
        trust: TrustLevel,
        reporter: Reporter,
    ) -> Result<ExitCode> {
        match format {
            Format::Json => self.write_document(trust)?,
            Format::Ndjson => self.write_lines(trust)?,
            Format::Table | Format::Csv | Format::Markdown => self.write_rows(format, trust)?,
        }
        self.say(arguments, format, reporter);
        if self.findings.iter().any(|finding| finding.class.is_alarm()) {
            return Ok(ExitCode::from(FOUND));
        }
        let unlooked = self.detectors.iter();
        let unlooked = unlooked.filter(|detector| detector.not_checked.is_some());
        match unlooked.count() {
            0 => Ok(ExitCode::SUCCESS),
            count => bail!(
                "{count} of {} detectors could not look, see the warnings: that nothing was found \
                 proves less",
                self.detectors.len()
            ),
        }
    }

    fn write_rows(&self, format: Format, trust: TrustLevel) -> Result<()> {
        let columns: Vec<ColumnInfo> = vec![
            column("severity", Kind::Text, "How much harm it can do."),
            column("class", Kind::Text, "Attack, suspicion or information."),
            column("finding", Kind::Text, "What was found."),
            column("subject", Kind::Text, "What it is about."),
            column("technique", Kind::Text, "The technique of ATT&CK."),
            column("detector", Kind::Text, "Who found it."),
            column("summary", Kind::Text, "In a sentence."),
        ];
        let style = listing::style_of(trust);
        let mut rows = Rows::new(listing::stdout()?, columns, format, style)?;
        for finding in &self.findings {
            rows.row(&[
                Value::word(finding.severity.name()),
                Value::word(finding.class.name()),
                finding.name.as_str().into(),
                finding.subject.as_str().into(),
                finding.technique.clone().into(),
                finding.detector.as_str().into(),
                finding.summary.as_str().into(),
            ])?;
        }
        rows.finish()?;
        Ok(())
    }

    /// One object: findings and detectors.
    fn write_document(&self, trust: TrustLevel) -> Result<()> {
        #[derive(Serialize)]
        struct Document<'a> {
            findings: Vec<FindingObject<'a>>,
            detectors: Vec<DetectorObject<'a>>,
            trust_level: &'static str,
        }
        let mut out = listing::stdout()?;
        let document = Document {
            findings: self.finding_objects(trust).collect(),
            detectors: self.detectors.iter().map(DetectorObject::of).collect(),
            trust_level: trust.name(),
        };
        json::write(&mut out, &document)?;
        out.write_all(b"\n")?;
        out.flush()?;
        Ok(())
    }

    /// One object a line: those of findings, then those of detectors.
    fn write_lines(&self, trust: TrustLevel) -> Result<()> {
        #[derive(Serialize)]
        #[serde(tag = "type", rename_all = "snake_case")]
        enum Line<'a> {
            Finding(FindingObject<'a>),
            Detector(DetectorObject<'a>),
        }
        let mut out = listing::stdout()?;
        let findings = self.finding_objects(trust).map(Line::Finding);
        let detectors = self.detectors.iter().map(DetectorObject::of);
        for line in findings.chain(detectors.map(Line::Detector)) {
            json::write(&mut out, &line)?;
            out.write_all(b"\n")?;
        }
        out.flush()?;
        Ok(())
    }

    fn finding_objects(&self, trust: TrustLevel) -> impl Iterator<Item = FindingObject<'_>> {
        self.findings
            .iter()
            .map(move |finding| FindingObject::of(finding, trust))
    }

    /// Says on stderr what the findings do not.
    fn say(&self, arguments: &CheckArguments, format: Format, reporter: Reporter) {
        for detector in &self.detectors {
            let name = &detector.detector;
            if let Some(reason) = &detector.not_checked {
                reporter.warn(format_args!("{name}: not checked: {reason}"));
            }
            if let Some(limits) = &detector.limits {
                reporter.say(format_args!("{name}: not all could be looked at: {limits}"));
            }
            if detector.dropped > 0 {
                reporter.warn(format_args!(
                    "{name}: {} more findings than are kept",
                    detector.dropped
                ));
            }
            if detector.unconfirmed > 0 {
                reporter.warn(format_args!(
                    "{name}: {} more seen, but not confirmed by further looks{}",
                    detector.unconfirmed,
                    if reporter.verbose {
                        ""
                    } else {
                        ": -v says which"
                    }
                ));
                for summary in &detector.unconfirmed_summaries {
                    reporter.note(format_args!("{name}: not confirmed: {summary}"));
                }
            }
            let time = Duration::from_micros(detector.microseconds);
            let looks = match detector.looks {
                1 => "one look".to_owned(),
                looks => format!("{looks} looks"),
            };
            let timing = format_args!("{name}: {time:.1?} in {looks}").to_string();
            if arguments.timings {
                reporter.say(timing);
            } else {
                reporter.note(timing);
            }
        }
        if format == Format::Table && self.findings.is_empty() {
            let count = self.detectors.len();
            let plural = if count == 1 { "" } else { "s" };
            reporter.say(format_args!("{count} detector{plural}, nothing found"));
        }
    }
}

/// A finding as a policy knows it.
fn record(finding: &CheckFinding) -> FindingRecord {
    let object = |value: serde_json::Result<serde_json::Value>| match value {
        Ok(serde_json::Value::Object(map)) => map,
        _ => serde_json::Map::new(),
    };
    let subject = SubjectObject {
        kind: &finding.subject_kind,
        columns: Columns(&finding.subject_columns),
    };
    let evidence = finding.evidence.iter().map(|piece| EvidenceRecord {
        view: piece.view.clone(),
        what: piece.what.clone(),
        row: object(serde_json::to_value(Columns(&piece.row))),
    });
    FindingRecord {
        id: String::new(),
        detector: finding.detector.clone(),
        name: finding.name.clone(),
        class: finding.class,
        severity: finding.severity,
        technique: finding.technique.clone(),
        subject: object(serde_json::to_value(subject)),
        about: finding.subject.clone(),
        summary: finding.summary.clone(),
        evidence: evidence.collect(),
    }
}

/// A finding in JSON.
#[derive(Serialize)]
struct FindingObject<'a> {
    detector: &'a str,
    name: &'a str,
    class: &'static str,
    severity: &'static str,
    technique: Option<&'a str>,
    subject: SubjectObject<'a>,
    summary: &'a str,
    evidence: Vec<EvidenceObject<'a>>,
    trust_level: &'static str,
}

impl<'a> FindingObject<'a> {
    fn of(finding: &'a CheckFinding, trust: TrustLevel) -> Self {
        Self {
            detector: &finding.detector,
            name: &finding.name,
            class: finding.class.name(),
            severity: finding.severity.name(),
            technique: finding.technique.as_deref(),
            subject: SubjectObject {
                kind: &finding.subject_kind,
                columns: Columns(&finding.subject_columns),
            },
            summary: &finding.summary,
            evidence: finding.evidence.iter().map(EvidenceObject::of).collect(),
            trust_level: trust.name(),
        }
    }
}

#[derive(Serialize)]
struct SubjectObject<'a> {
    kind: &'a str,
    #[serde(flatten)]
    columns: Columns<'a>,
}

#[derive(Serialize)]
struct EvidenceObject<'a> {
    view: &'a str,
    what: &'a str,
    row: Columns<'a>,
}

impl<'a> EvidenceObject<'a> {
    fn of(evidence: &'a CheckEvidence) -> Self {
        Self {
            view: &evidence.view,
            what: &evidence.what,
            row: Columns(&evidence.row),
        }
    }
}

/// Columns and values as an object, as rows of tables are.
struct Columns<'a>(&'a [(String, Cell)]);

impl Serialize for Columns<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        let mut unreadable = Vec::new();
        for (name, cell) in self.0 {
            let value = Value::from(cell.clone());
            map.serialize_entry(name, &value)?;
            if let Value::Unreadable(reason) = value {
                unreadable.push((name, reason));
            }
        }
        if !unreadable.is_empty() {
            let reasons = unreadable.iter().map(|(name, reason)| (*name, &**reason));
            map.serialize_entry(
                "unreadable",
                &reasons.collect::<std::collections::BTreeMap<_, _>>(),
            )?;
        }
        map.end()
    }
}

/// What a detector did, in JSON.
#[derive(Serialize)]
struct DetectorObject<'a> {
    detector: &'a str,
    checked: bool,
    not_checked: Option<&'a str>,
    limits: Option<&'a str>,
    findings: u64,
    unconfirmed: u64,
    unconfirmed_summaries: &'a [String],
    dropped: u64,
    looks: u32,
    milliseconds: f64,
}

impl<'a> DetectorObject<'a> {
    fn of(result: &'a DetectorResult) -> Self {
        Self {
            detector: &result.detector,
            checked: result.not_checked.is_none(),
            not_checked: result.not_checked.as_deref(),
            limits: result.limits.as_deref(),
            findings: result.findings,
            unconfirmed: result.unconfirmed,
            unconfirmed_summaries: &result.unconfirmed_summaries,
            dropped: result.dropped,
            looks: result.looks,
            milliseconds: result.microseconds as f64 / 1000.0,
        }
    }
}
