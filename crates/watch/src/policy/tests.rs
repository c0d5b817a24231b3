use proptest::prelude::*;
use secmon_detect::{Evidence, Subject};
use secmon_memory::VirtualAddress;

use super::*;

const DAY: &str = "expires = 2027-06-30\n";

fn parse(text: &str) -> Result<Policy, PolicyError> {
    Policy::parse(text, "p.toml")
}

fn error(text: &str) -> String {
    parse(text).expect_err(text).to_string()
}

fn finding(name: &'static str, class: Class, process: &str, exe: &str) -> FindingRecord {
    let subject = Subject::Process {
        task: VirtualAddress::new(0xffff_8880_0000_1000),
        pid: 812,
        started: 5,
        name: process.into(),
    };
    let finding = Finding::new(
        "process_integrity",
        name,
        class,
        Severity::High,
        subject,
        "code that can be written",
    )
    .evidence(Evidence::new("maps", "an area").with("path", "/x"))
    .evidence(
        Evidence::new("processes", "a row")
            .with("exe", exe)
            .with("pid", 812_u32),
    );
    FindingRecord::from(&finding)
}

#[test]
fn the_smallest_policy_has_all_defaults() {
    let policy = parse("version = 1\n").expect("a policy");
    assert_eq!(policy, Policy::default());
    assert_eq!(policy.enabled().len(), secmon_detect::detectors().len());
    assert_eq!(policy.detector("tracing"), DetectorPolicy::default());
}

#[test]
fn what_is_said_of_a_detector_holds_for_it_alone() {
    let policy = parse(
        "version = 1\nbudget = \"10%\"\nreport = \"suspicion\"\n\
         [detector.tracing]\nenabled = false\n\
         [detector.network]\nlongest_interval = \"500ms\"\nreport = \"attack\"\nneeded = 8\n",
    )
    .expect("a policy");
    assert!(!policy.detector("tracing").enabled);
    assert_eq!(policy.enabled().len(), secmon_detect::detectors().len() - 1);
    let network = policy.detector("network");
    assert_eq!(network.shortest_interval, Duration::from_millis(500));
    assert_eq!(
        (network.confirmation.needed, network.confirmation.looks),
        (8, 8)
    );
    assert_eq!(network.report, Class::Attack);
    assert_eq!(policy.detector("modules").report, Class::Suspicion);
}

#[test]
fn errors_have_their_place_and_say_what_to_write() {
    for (text, place, words) in [
        ("version = 2\n", "p.toml:1:11: ", "version = 1"),
        ("", "p.toml:1:1: ", "version"),
        ("version = 1\nbudget = 5\n", "p.toml:2:10: ", "string"),
        (
            "version = 1\nbudget = \"5\"\n",
            "p.toml:2:10: ",
            "\"0.1%\" to",
        ),
        ("version = 1\nbudgt = \"5%\"\n", "p.toml:2:1: ", "`budget`"),
        (
            "version = 1\n[detector.trcing]\nenabled = false\n",
            "p.toml:2:11: ",
            "tracing",
        ),
        (
            "version = 1\n[detector.tracing]\nlongest_interval = \"often\"\n",
            "p.toml:3:20: ",
            "\"10s\"",
        ),
        (
            "version = 1\n[[response]]\nactions = [\"alert\", \"explode\"]\n",
            "p.toml:3:21: ",
            "disconnect_network",
        ),
        (
            "version = 1\n[[response]]\nactions = []\n",
            "p.toml:2:1: ",
            "kill_process",
        ),
        ("version = 1\n[[exception]\n", "p.toml:2:", ""),
        (
            "version = 1\n[[exception]]\nname = \"x\"\nreason = \"y\"\n",
            "p.toml:2:1: ",
            "expires",
        ),
        (
            "version = 1\n[[exception]]\nname = \"x\"\nreason = \"y\"\nexpires = \"soon\"\n",
            "p.toml:5:11: ",
            "2027-06-30",
        ),
    ] {
        let said = error(text);
        assert!(said.starts_with(place) && said.contains(words), "{said}");
    }
    let all = format!("version = 1\n[[exception]]\nreason = \"y\"\n{DAY}");
    assert!(error(&all).contains("hide everything"));
    let silent = format!("version = 1\n[[exception]]\nname = \"x\"\nreason = \" \"\n{DAY}");
    assert!(error(&silent).contains("a reason"));
    let large = format!("version = 1\n#{}", "x".repeat(MAX_BYTES));
    assert!(error(&large).contains("at most"));
}

#[test]
fn an_exception_hides_what_fits_until_it_expires() {
    let text = format!(
        "version = 1\n[[exception]]\ndetector = \"process_integrity\"\nname = \"writable_code\"\n\
         subject = {{ name = \"java\", pid = 812 }}\nevidence = {{ exe = \"/usr/lib/jvm/*\" }}\n\
         reason = \"compiles as it runs\"\n{DAY}"
    );
    let policy = parse(&text).expect("a policy");
    let (last, after) = (Day::of_unix_days(20_999), Day::of_unix_days(21_000));
    let java = "/usr/lib/jvm/17/bin/java";
    let innocent = finding("writable_code", Class::Suspicion, "java", java);
    assert_eq!(policy.excepted(&innocent, last), Some(0));
    assert_eq!(policy.excepted(&innocent, after), None, "expired");
    assert!(policy.exceptions[0].has_expired(after));
    for other in [
        finding("anonymous_code", Class::Suspicion, "java", java),
        finding("writable_code", Class::Suspicion, "javac", java),
        finding("writable_code", Class::Suspicion, "java", "/tmp/java"),
    ] {
        assert_eq!(policy.excepted(&other, last), None, "{other:?}");
    }
}

#[test]
fn responses_are_for_alarms_from_their_severity_on() {
    let policy = parse(
        "version = 1\n[[response]]\nactions = [\"alert\"]\n\
         [[response]]\nseverity = \"critical\"\nactions = [\"pause\"]\n\
         [[response]]\nclass = \"attack\"\nseverity = \"high\"\nactions = [\"alert\", \"kill_process\"]\n",
    )
    .expect("a policy");
    let wanted = |class| policy.responses_to(&finding("x", class, "java", "/bin/java"));
    assert_eq!(wanted(Class::Information), []);
    assert_eq!(wanted(Class::Suspicion), [(0, Action::Alert)]);
    assert_eq!(
        wanted(Class::Attack),
        [(0, Action::Alert), (2, Action::KillProcess)]
    );
}

proptest! {
    #[test]
    fn any_text_is_a_policy_or_an_error_with_a_place(text in "\\PC{0,200}") {
        if let Err(error) = parse(&text) {
            prop_assert!(error.line >= 1 && error.column >= 1);
        }
    }

    #[test]
    fn any_words_of_a_policy_are_read_or_refused(
        lines in prop::collection::vec(
            prop::sample::select(vec![
                "version = 1", "budget = \"5%\"", "[detector.tracing]", "[[exception]]",
                "[[response]]", "actions = [\"log\"]", "expires = 2027-01-01", "reason = \"r\"",
                "needed = 7", "looks = 2", "subject = { a = 1 }", "enabled = 3", "name = \"*\"",
                "report = \"attack\"",
            ]),
            0..12,
        ),
    ) {
        let text = lines.join("\n");
        if let Err(error) = parse(&text) {
            prop_assert!(error.line <= text.lines().count().max(1) + 1, "{}", error);
        }
    }
}

#[test]
fn the_example_is_a_policy() {
    let policy = parse(include_str!("../../../../docs/policy.toml")).expect("the example");
    assert_eq!((policy.exceptions.len(), policy.responses.len()), (1, 2));
    assert_eq!(policy.report, Class::Suspicion);
}
