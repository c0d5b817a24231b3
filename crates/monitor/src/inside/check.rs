//! Lets detectors look at a target, and tells what they found.

use secmon_detect::{Confirmation, Detector, Report};
use secmon_guest::Guest;

use super::answer::{Sink, Unsent};
use super::credit::Permit;
use crate::protocol::{self, Check, CheckEvidence, CheckFinding, End, Refusal, Reply};

/// The detectors that are asked for.
pub(super) fn chosen(check: &Check) -> Result<Vec<&'static dyn Detector>, Refusal> {
    let known = secmon_detect::detectors();
    let Some(names) = &check.detectors else {
        return Ok(known.to_vec());
    };
    if names.len() > known.len() {
        return Err(Refusal::TooMuch {
            what: format!("{} detectors", names.len()),
        });
    }
    let named = names.iter().map(|name| {
        secmon_detect::detector(name).ok_or_else(|| Refusal::UnknownDetector { name: name.clone() })
    });
    named.collect()
}

/// Lets the detectors look.
pub(super) fn look(guest: &Guest, detectors: &[&'static dyn Detector]) -> Report {
    secmon_detect::check(guest, detectors, Confirmation::default())
}

/// Sends what was found.
pub(super) fn send(id: u32, report: &Report, sink: &dyn Sink) -> End {
    let mut end = End::default();
    let detectors = protocol::results(report);
    if sink.send(&Reply::Looked { id, detectors }).is_err() {
        return end;
    }
    for finding in &report.findings {
        if sink.permit() == Permit::Stop {
            break;
        }
        let mut finding = CheckFinding::from(finding);
        let mut sent = sink.send(&Reply::Found {
            id,
            finding: Box::new(finding.clone()),
        });
        if sent == Err(Unsent::TooLarge) {
            finding.evidence = vec![CheckEvidence {
                view: "monitor".to_owned(),
                what: "the evidence is larger than a message may be".to_owned(),
                row: Vec::new(),
            }];
            sent = sink.send(&Reply::Found {
                id,
                finding: Box::new(finding),
            });
        }
        match sent {
            Ok(()) => end.sent = end.sent.saturating_add(1),
            Err(Unsent::TooLarge) => {
                end.error = Some("a finding is larger than a message may be".to_owned());
            }
            Err(Unsent::Over) => break,
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use secmon_detect::{Class, Evidence, Finding, Severity, Subject};
    use secmon_memory::VirtualAddress;

    use super::*;
    use crate::protocol::Pause;

    fn check(names: &[&str]) -> Check {
        Check {
            target: "web1".to_owned(),
            detectors: Some(names.iter().map(ToString::to_string).collect()),
            credit: 1,
            pause: Pause::None,
        }
    }

    #[test]
    fn detectors_are_chosen_by_name() {
        let names = |check: &Check| -> Result<Vec<&str>, String> {
            let chosen = chosen(check).map_err(|refusal| refusal.to_string())?;
            Ok(chosen.iter().map(|detector| detector.name()).collect())
        };
        assert_eq!(names(&check(&["processes"])), Ok(vec!["processes"]));
        let all = Check {
            detectors: None,
            ..check(&[])
        };
        assert_eq!(
            names(&all).map(|names| names.len()),
            Ok(secmon_detect::detectors().len())
        );
        assert!(names(&check(&["nothing"])).is_err_and(|said| said.contains("nothing")));
        assert!(names(&check(&["processes"; 1000])).is_err_and(|said| said.contains("1000")));
    }

    /// Takes messages with little evidence.
    #[derive(Default)]
    struct Small(RefCell<Vec<Reply>>);

    impl Sink for Small {
        fn permit(&self) -> Permit {
            Permit::Send
        }

        fn send(&self, reply: &Reply) -> Result<(), Unsent> {
            if let Reply::Found { finding, .. } = reply
                && finding.evidence.len() > 5
            {
                return Err(Unsent::TooLarge);
            }
            self.0.borrow_mut().push(reply.clone());
            Ok(())
        }
    }

    #[test]
    fn evidence_that_is_too_large_costs_no_finding() {
        let finding = |address, evidence| {
            let subject = Subject::KernelCode {
                address: VirtualAddress::new(address),
                symbol: None,
            };
            let finding = Finding::new(
                "kernel_text",
                "changed_code",
                Class::Attack,
                Severity::Critical,
                subject,
                "changed",
            );
            (0..evidence).fold(finding, |finding, _| {
                finding.evidence(Evidence::new("memory", "other bytes").with("byte", 1_u32))
            })
        };
        let report = Report {
            findings: vec![finding(1, 2), finding(2, 9)],
            detectors: Vec::new(),
        };
        let sink = Small::default();
        let end = send(7, &report, &sink);
        assert_eq!((end.sent, end.error), (2, None));
        let replies = sink.0.into_inner();
        let evidence: Vec<_> = replies
            .iter()
            .map(|reply| match reply {
                Reply::Found { finding, .. } => finding.evidence.len(),
                _ => 0,
            })
            .collect();
        assert_eq!(evidence, [0, 2, 1]);
    }
}
