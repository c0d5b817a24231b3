//! What is there, as the guest's memory has it: what an honest answer of the
//! guest would name.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use secmon_guest::linux::folder::Folders;
use secmon_guest::linux::net::namespace::namespaces;
use secmon_guest::linux::task::leaders;
use secmon_guest::{Guest, Text};
use secmon_memory::VirtualAddress;

use super::answer::Endpoint;
use super::{NAME, Question};
use crate::rows::{Parts, Rows};
use crate::{DetectError, Evidence, Subject};

const MODULES: &[&str] = &["name", "state", "base", "size", "address"];

const SOCKETS: &[&str] = &[
    "protocol",
    "state",
    "local_address",
    "local_port",
    "pid",
    "comm",
    "inode",
    "in_table",
    "namespace",
    "address",
];

/// A thing that is there, as a finding would name it.
#[derive(Clone, Debug)]
pub(super) struct Thing {
    /// What it is.
    pub(super) subject: Subject,
    /// What memory has of it.
    pub(super) evidence: Evidence,
}

/// Things by what tells one from another, and from one that took its place.
type Things<K> = BTreeMap<(K, u64), Thing>;

/// All that is compared, at one moment.
#[derive(Debug, Default)]
pub(super) struct There {
    /// By process id.
    pub(super) processes: Things<u32>,
    /// By name.
    pub(super) modules: Things<Vec<u8>>,
    /// By where they listen.
    pub(super) sockets: Things<Endpoint>,
    /// By folder and name.
    pub(super) files: Things<(String, Vec<u8>)>,
}

impl There {
    /// Reads it. What could not be read is noted in `parts`.
    pub(super) fn read(guest: &Guest, question: &Question, parts: &mut Parts) -> Self {
        let mut there = Self::default();
        parts.note(there.read_processes(guest));
        parts.note(there.read_modules(guest));
        parts.note(there.read_sockets(guest));
        parts.note(there.read_folders(guest, question));
        there
    }

    /// What was there at this moment and at a later one.
    pub(super) fn and(mut self, later: &Self) -> Self {
        self.processes
            .retain(|key, _| later.processes.contains_key(key));
        self.modules
            .retain(|key, _| later.modules.contains_key(key));
        self.sockets
            .retain(|key, _| later.sockets.contains_key(key));
        self.files.retain(|key, _| later.files.contains_key(key));
        self
    }

    fn read_processes(&mut self, guest: &Guest) -> Result<(), DetectError> {
        for task in leaders(guest, NAME)? {
            let started = task.number(&task.model().layout.start_boottime);
            let subject = Subject::Process {
                task: task.address,
                pid: task.tgid,
                started,
                name: Text::new(task.comm()),
            };
            let evidence = Evidence::new("task_list", "a process that lives")
                .with("pid", task.tgid)
                .with("comm", Text::new(task.comm()))
                .with("address", task.address);
            let key = (task.tgid, started ^ task.address.as_u64());
            self.processes.insert(key, Thing { subject, evidence });
        }
        Ok(())
    }

    fn read_modules(&mut self, guest: &Guest) -> Result<(), DetectError> {
        Rows::of("modules", MODULES)?.read(guest, |row| {
            let (Some(name), Some(address)) = (row.text("name"), row.number("address")) else {
                return;
            };
            // The kernel shows one to nobody while it sets it up.
            if row.text("state") == Some(b"Unformed") {
                return;
            }
            let subject = Subject::Module {
                address: VirtualAddress::new(address),
                name: Text::new(name),
            };
            let evidence = row.evidence("modules", "a module in the list");
            let thing = Thing { subject, evidence };
            self.modules.insert((name.to_vec(), address), thing);
        })
    }

    /// Those of the initial network namespace, where the reader is.
    fn read_sockets(&mut self, guest: &Guest) -> Result<(), DetectError> {
        let initial = guest
            .address("init_net")
            .ok_or(DetectError::Missing { what: "init_net" })?;
        let namespaces = namespaces(guest, NAME)?.into_iter();
        let initial = namespaces
            .filter(|namespace| namespace.address == initial)
            .map(|namespace| namespace.inode)
            .next();
        Rows::of("sockets", SOCKETS)?.read(guest, |row| {
            if row.number("namespace") != initial {
                return;
            }
            let tcp = match (row.text("protocol"), row.text("state")) {
                (Some(b"tcp" | b"tcp6"), Some(b"LISTEN")) => true,
                (Some(b"udp" | b"udp6"), Some(b"CLOSE")) if row.is_true("in_table") => false,
                _ => return,
            };
            let address = row.text("local_address").and_then(|text| {
                let text = str::from_utf8(text).ok()?;
                text.parse::<IpAddr>().ok()
            });
            let port = row
                .number("local_port")
                .and_then(|port| port.try_into().ok());
            let (Some(address), Some(port), Some(sock)) = (address, port, row.number("address"))
            else {
                return;
            };
            if port == 0 {
                return;
            }
            let endpoint = Endpoint { tcp, address, port };
            let subject = Subject::Socket {
                address: VirtualAddress::new(sock),
                name: endpoint.to_string(),
            };
            let evidence = row.evidence("sockets", "a socket that waits");
            self.sockets
                .insert((endpoint, sock), Thing { subject, evidence });
        })
    }

    fn read_folders(&mut self, guest: &Guest, question: &Question) -> Result<(), DetectError> {
        if question.folders.is_empty() {
            return Ok(());
        }
        let folders = Folders::new(guest)?;
        for folder in &question.folders {
            for name in folders.names(guest, folder.as_bytes()).unwrap_or_default() {
                let path = [
                    folder.trim_end_matches('/').as_bytes(),
                    name.name.as_bytes(),
                ];
                let subject = Subject::File {
                    inode: name.inode,
                    path: Text::new(path.join(&b'/')),
                };
                let evidence = Evidence::new("dentries", "a name in the kernel's cache of names")
                    .with("name", name.name.clone())
                    .with("dentry", name.dentry)
                    .with("inode", name.inode);
                let key = (folder.clone(), name.name.as_bytes().to_vec());
                self.files
                    .insert((key, name.dentry.as_u64()), Thing { subject, evidence });
            }
        }
        Ok(())
    }

    /// The ids of all processes.
    pub(super) fn pids(&self) -> BTreeSet<u32> {
        self.processes.keys().map(|(pid, _)| *pid).collect()
    }
}
