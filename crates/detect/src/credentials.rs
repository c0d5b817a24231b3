//! The detector `credentials`: rights that no system call gives.

use std::collections::HashMap;

use secmon_guest::{Guest, Value};

use crate::named_processes::NamedProcesses;
use crate::rows::{Fields, Parts, Rows};
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Technique};

const NAME: &str = "credentials";

/// Exploitation for privilege escalation.
const ESCALATION: Technique = Technique::new("T1068");
/// Escape to host.
const ESCAPE: Technique = Technique::new("T1611");

const CREDENTIALS: &[&str] = &[
    "uid",
    "euid",
    "suid",
    "gid",
    "egid",
    "cap_effective",
    "cap_permitted",
    "cap_bounding",
    "account_uid",
    "user_namespace",
    "usage",
    "tasks",
    "pids",
    "address",
];

const PROCESSES: &[&str] = &[
    "pid",
    "ppid",
    "comm",
    "exe",
    "root",
    "kernel_thread",
    "cap_ambient",
    "container",
    "container_runtime",
    "cgroup",
    "mount_namespace",
    "pid_namespace",
    "network_namespace",
    "uts_namespace",
    "ipc_namespace",
    "user_namespace",
    "cgroup_namespace",
];

/// Compares what credentials say of themselves with what refers to them.
pub(crate) struct Credentials;

impl Detector for Credentials {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Credentials that no system call makes: shared between processes, written over in place, \
         or with capabilities that nothing gave; and processes of containers that are among the \
         host's processes or files."
    }

    fn compares(&self) -> &'static str {
        "The cred structures of all threads: by how many processes one is used (the kernel never \
         lets two share one), how many references it counts, whether its real user id is that of \
         the account it charges (cred.user), whether effective capabilities are among the \
         permitted ones, and whether a process of an ordinary user has all of them; for containers, \
         which of the namespaces of a process are those of process 1."
    }

    fn evaded_by(&self) -> &'static str {
        "Whoever also exchanges the account and the counts, or makes a whole cred as the kernel \
         would. Single capabilities that are set both as permitted and effective look like those \
         of a file."
    }

    fn techniques(&self) -> &'static [Technique] {
        &[ESCALATION, ESCAPE]
    }

    fn cost(&self) -> &'static str {
        "One read of each thread and each cred, and one row of processes."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let processes = NamedProcesses::new(guest, NAME)?;
        let mut people: HashMap<u32, Person> = HashMap::new();
        let mut parts = Parts::default();
        parts.note(Rows::of("processes", PROCESSES)?.read(guest, |row| {
            if let Some(pid) = row.id("pid") {
                people.insert(pid, Person::new(&row));
            }
        }));
        let host = people.get(&1).map(|init| init.namespaces);
        let host_users = host.and_then(|host| host.user);
        parts.note(Rows::of("credentials", CREDENTIALS)?.read(guest, |row| {
            for claim in claims(&row, &people, host_users) {
                let subject = row
                    .list("pids")
                    .iter()
                    .filter_map(|pid| match pid {
                        Value::Unsigned(pid) => u32::try_from(*pid).ok(),
                        _ => None,
                    })
                    // Of several, the one that was not there first.
                    .next_back()
                    .and_then(|pid| processes.subject(pid));
                let Some(subject) = subject else {
                    continue;
                };
                findings(
                    Finding::new(
                        NAME,
                        claim.name,
                        claim.class,
                        Severity::High,
                        subject,
                        claim.text,
                    )
                    .technique(ESCALATION)
                    .evidence(row.evidence("credentials", "the cred")),
                );
            }
        }));
        let Some(host) = host else {
            return parts.finish();
        };
        let mut pids: Vec<_> = people.keys().copied().collect();
        pids.sort_unstable();
        for pid in pids {
            let Some(person) = people.get(&pid) else {
                continue;
            };
            let Some((name, severity, text)) = person.escape(&host) else {
                continue;
            };
            let Some(subject) = processes.subject(pid) else {
                continue;
            };
            findings(
                Finding::new(NAME, name, Class::Suspicion, severity, subject, text)
                    .technique(ESCAPE)
                    .evidence(person.evidence.clone()),
            );
        }
        parts.finish()
    }
}

/// What is wrong with a cred.
struct Claim {
    name: &'static str,
    class: Class,
    text: String,
}

fn hexadecimal(row: &Fields<'_>, column: &str) -> Option<u64> {
    let text = std::str::from_utf8(row.text(column)?).ok()?;
    u64::from_str_radix(text, 16).ok()
}

fn claims(row: &Fields<'_>, people: &HashMap<u32, Person>, host_users: Option<u64>) -> Vec<Claim> {
    let mut claims = Vec::new();
    let pids = row.list("pids");
    if pids.len() > 1 {
        claims.push(Claim {
            name: "shared_credentials",
            class: Class::Attack,
            text: format!(
                "{} processes use one cred; the kernel gives each its own",
                pids.len()
            ),
        });
    }
    if let (Some(usage), Some(tasks)) = (row.number("usage"), row.number("tasks"))
        && usage < tasks
    {
        claims.push(Claim {
            name: "uncounted_credentials",
            class: Class::Attack,
            text: format!("{tasks} threads use a cred that counts {usage} references"),
        });
    }
    if let (Some(uid), Some(account)) = (row.number("uid"), row.number("account_uid"))
        && uid != account
    {
        claims.push(Claim {
            name: "forged_user",
            class: Class::Attack,
            text: format!("its real user id is {uid}, the account that it charges is {account}'s"),
        });
    }
    let effective = hexadecimal(row, "cap_effective");
    let permitted = hexadecimal(row, "cap_permitted");
    if let (Some(effective), Some(permitted)) = (effective, permitted) {
        if effective & !permitted != 0 {
            claims.push(Claim {
                name: "impossible_capabilities",
                class: Class::Attack,
                text: format!(
                    "capabilities {:#x} are effective and not permitted",
                    effective & !permitted
                ),
            });
        } else if has_all(row, effective, people, host_users) {
            claims.push(Claim {
                name: "capabilities_of_nobody",
                class: Class::Suspicion,
                text: "it has all capabilities and belongs to no user 0".to_owned(),
            });
        }
    }
    claims
}

/// Whether it has every capability that can be gained, but belongs to an
/// ordinary user of the initial namespace, and did not get them as ambient ones.
fn has_all(
    row: &Fields<'_>,
    effective: u64,
    people: &HashMap<u32, Person>,
    host_users: Option<u64>,
) -> bool {
    let ordinary = ["uid", "euid", "suid"]
        .iter()
        .all(|column| row.number(column).is_some_and(|id| id != 0));
    let bounding = hexadecimal(row, "cap_bounding").unwrap_or_default();
    let ambient = row.list("pids").iter().any(|pid| match pid {
        Value::Unsigned(pid) => u32::try_from(*pid)
            .ok()
            .and_then(|pid| people.get(&pid))
            .is_some_and(|person| person.ambient != 0),
        _ => false,
    });
    ordinary
        && !ambient
        // Fewer are what services are given on purpose.
        && effective.count_ones() > 30
        && effective & bounding == bounding
        && host_users.is_some()
        && row.number("user_namespace") == host_users
}

/// The namespaces that a process is in, by their inode numbers.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Namespaces {
    mount: Option<u64>,
    pid: Option<u64>,
    network: Option<u64>,
    uts: Option<u64>,
    ipc: Option<u64>,
    cgroup: Option<u64>,
    user: Option<u64>,
}

/// What is needed of a process.
struct Person {
    kernel_thread: bool,
    ambient: u64,
    contained: bool,
    namespaces: Namespaces,
    evidence: Evidence,
}

impl Person {
    fn new(row: &Fields<'_>) -> Self {
        let namespace = |column| row.number(column);
        Self {
            kernel_thread: row.is_true("kernel_thread"),
            ambient: hexadecimal(row, "cap_ambient").unwrap_or_default(),
            contained: row.text("container").is_some(),
            namespaces: Namespaces {
                mount: namespace("mount_namespace"),
                pid: namespace("pid_namespace"),
                network: namespace("network_namespace"),
                uts: namespace("uts_namespace"),
                ipc: namespace("ipc_namespace"),
                cgroup: namespace("cgroup_namespace"),
                user: namespace("user_namespace"),
            },
            evidence: row.evidence("processes", "the process"),
        }
    }

    /// Whether it belongs to a container and yet shares with the host what
    /// would keep it there.
    fn escape(&self, host: &Namespaces) -> Option<(&'static str, Severity, String)> {
        let own = &self.namespaces;
        // A process that ends has left its namespaces.
        if self.kernel_thread || own.mount.is_none() || own.pid.is_none() || host.pid.is_none() {
            return None;
        }
        let of_its_own = own.mount != host.mount
            && own.network != host.network
            && own.uts != host.uts
            && own.ipc != host.ipc
            && own.cgroup != host.cgroup;
        if self.contained && own.mount == host.mount {
            let text = "it belongs to a container, but sees the host's files".to_owned();
            return Some(("container_with_host_files", Severity::High, text));
        }
        if (self.contained || of_its_own) && own.pid == host.pid {
            let text =
                "it is set apart like a container, but among the host's processes".to_owned();
            return Some(("container_with_host_processes", Severity::Medium, text));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = "000001ffffffffff";

    /// The names of what is claimed of a cred.
    fn named(changes: &[(&str, Value)]) -> Vec<&'static str> {
        let sound = |column: &str| match column {
            "cap_effective" | "cap_permitted" => "0000000000000000".into(),
            "cap_bounding" => FULL.into(),
            "user_namespace" => Value::Unsigned(7),
            "usage" => Value::Unsigned(2),
            "tasks" => Value::Unsigned(1),
            "pids" => Value::from(vec![812_u64]),
            _ => Value::Unsigned(1000),
        };
        let value = |column: &&str| {
            let changed = changes.iter().find(|(name, _)| name == column);
            changed.map_or_else(|| sound(column), |(_, value)| value.clone())
        };
        let values: Vec<Value> = CREDENTIALS.iter().map(value).collect();
        let row = Fields::new(CREDENTIALS, &values);
        let people = HashMap::from([(812, person(false, HOST))]);
        let claims = claims(&row, &people, HOST.user);
        claims.iter().map(|claim| claim.name).collect()
    }

    #[test]
    fn sound_credentials_are_left_alone() {
        assert!(named(&[]).is_empty());
        let root = |column| (column, Value::Unsigned(0));
        let of_root = [
            root("uid"),
            root("euid"),
            root("suid"),
            root("account_uid"),
            ("cap_effective", FULL.into()),
            ("cap_permitted", FULL.into()),
        ];
        assert!(named(&of_root).is_empty());
        // A program that is started as user 0 (set-user-ID).
        assert!(named(&[root("euid"), root("suid")]).is_empty());
        let in_a_namespace = [
            ("cap_effective", FULL.into()),
            ("cap_permitted", FULL.into()),
            ("user_namespace", Value::Unsigned(8)),
        ];
        assert!(named(&in_a_namespace).is_empty());
    }

    #[test]
    fn what_no_system_call_makes_is_found() {
        let shared = Value::from(vec![1_u64, 812]);
        assert_eq!(named(&[("pids", shared)]), ["shared_credentials"]);
        let tasks = Value::Unsigned(3);
        assert_eq!(named(&[("tasks", tasks)]), ["uncounted_credentials"]);
        let zero = Value::Unsigned(0);
        assert_eq!(named(&[("uid", zero)]), ["forged_user"]);
        let effective = ("cap_effective", Value::from(FULL));
        assert_eq!(
            named(std::slice::from_ref(&effective)),
            ["impossible_capabilities"]
        );
        let permitted = ("cap_permitted", Value::from(FULL));
        assert_eq!(named(&[effective, permitted]), ["capabilities_of_nobody"]);
    }

    const HOST: Namespaces = Namespaces {
        mount: Some(1),
        pid: Some(2),
        network: Some(3),
        uts: Some(4),
        ipc: Some(5),
        cgroup: Some(6),
        user: Some(7),
    };

    fn person(contained: bool, namespaces: Namespaces) -> Person {
        Person {
            kernel_thread: false,
            ambient: 0,
            contained,
            namespaces,
            evidence: Evidence::new("processes", ""),
        }
    }

    #[test]
    fn the_host_and_a_proper_container_are_left_alone() {
        assert!(person(false, HOST).escape(&HOST).is_none());
        let container = Namespaces {
            mount: Some(11),
            pid: Some(12),
            ..HOST
        };
        assert!(person(true, container).escape(&HOST).is_none());
    }

    #[test]
    fn a_service_with_files_of_its_own_is_no_container() {
        let service = Namespaces {
            mount: Some(11),
            network: Some(13),
            ..HOST
        };
        assert!(person(false, service).escape(&HOST).is_none());
    }

    #[test]
    fn containers_that_share_with_the_host_are_found() {
        let shares_processes = Namespaces {
            pid: HOST.pid,
            mount: Some(11),
            network: Some(13),
            uts: Some(14),
            ipc: Some(15),
            cgroup: Some(16),
            user: HOST.user,
        };
        for contained in [false, true] {
            let found = person(contained, shares_processes).escape(&HOST);
            assert_eq!(
                found.map(|found| found.0),
                Some("container_with_host_processes")
            );
        }
        let found = person(true, HOST).escape(&HOST);
        assert_eq!(
            found.map(|found| found.0),
            Some("container_with_host_files")
        );
    }

    #[test]
    fn a_process_that_ends_is_in_none() {
        let ending = Namespaces::default();
        assert!(person(true, ending).escape(&HOST).is_none());
    }
}
