//! One file a table: the rows it should have, made from the guest's own truth.

mod bpf;
mod credentials;
mod env;
mod files;
mod info;
mod interfaces;
mod kmsg;
mod maps;
mod modules;
mod mounts;
mod namespaces;
mod process_tree;
mod processes;
mod sockets;
mod threads;

use anyhow::Result;
use secmon_guest::{Guest, Selection};
use secmon_lab::truth::{
    Bpf, Info, Interface, KernelMessage, Mapping, Module, Mount, Namespace, OpenFile, Process,
    Socket, Thread,
};

use crate::rows::{Comparison, ExpectedRow, TableRow, read_table};

/// Everything that a guest says of itself, at about one moment.
#[derive(Clone, Debug)]
pub struct Truth {
    /// The system as a whole.
    pub info: Info,
    /// Processes.
    pub processes: Vec<Process>,
    /// Threads of all processes.
    pub threads: Vec<Thread>,
    /// Loaded modules.
    pub modules: Vec<Module>,
    /// Mappings of all processes.
    pub maps: Vec<Mapping>,
    /// Open files of all processes.
    pub files: Vec<OpenFile>,
    /// Sockets of all network namespaces.
    pub sockets: Vec<Socket>,
    /// Mounts of all mount namespaces.
    pub mounts: Vec<Mount>,
    /// Namespaces.
    pub namespaces: Vec<Namespace>,
    /// The kernel's log.
    pub kmsg: Vec<KernelMessage>,
    /// Network interfaces of all network namespaces.
    pub interfaces: Vec<Interface>,
    /// eBPF programs and maps.
    pub bpf: Bpf,
}

impl Truth {
    /// Asks a guest for all of it.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn ask(guest: &secmon_lab::Guest) -> Result<Self> {
        let truth = guest.truth();
        Ok(Self {
            modules: truth.modules()?,
            bpf: truth.bpf()?,
            interfaces: truth.interfaces()?,
            mounts: truth.mounts()?,
            namespaces: truth.namespaces()?,
            maps: truth.maps()?,
            files: truth.files()?,
            sockets: truth.sockets()?,
            threads: truth.threads()?,
            processes: truth.processes()?,
            kmsg: truth.kmsg()?,
            info: truth.info()?,
        })
    }
}

/// A table and what its rows should be.
pub struct Check {
    /// How rows are told apart.
    pub comparison: Comparison,
    /// Which rows of the table are read.
    pub selection: fn() -> Selection,
    /// The rows it should have.
    pub expected: fn(&Truth) -> Vec<ExpectedRow>,
    /// Rows of the table that the truth can't know of and that are left out
    /// of the comparison, each kind with its reason in the code.
    pub beyond_truth: fn(&TableRow) -> bool,
}

/// Every table that is compared.
pub static CHECKS: &[Check] = &[
    info::INFO,
    processes::PROCESSES,
    process_tree::PROCESS_TREE,
    threads::THREADS,
    credentials::CREDENTIALS,
    namespaces::NAMESPACES,
    files::FILES,
    maps::MAPS,
    mounts::MOUNTS,
    env::ENV,
    modules::MODULES,
    sockets::SOCKETS,
    interfaces::INTERFACES,
    kmsg::KMSG,
    bpf::BPF,
];

/// A table's rows, read between two truths.
pub struct Reading {
    check: &'static Check,
    rows: Vec<TableRow>,
}

/// Reads every compared table.
///
/// # Errors
/// If one can't be read at all.
pub fn read_all(guest: &Guest) -> Result<Vec<Reading>> {
    read_all_by(&mut |table, selection| read_table(guest, table, selection))
}

/// As [`read_all`], with rows that come from elsewhere.
///
/// # Errors
/// Those of `read_table`.
pub fn read_all_by(
    read_table: &mut dyn FnMut(&str, Selection) -> Result<Vec<TableRow>>,
) -> Result<Vec<Reading>> {
    let read = |check: &'static Check| {
        let mut rows = read_table(check.comparison.table, (check.selection)())?;
        rows.retain(|row| !(check.beyond_truth)(row));
        Ok(Reading { check, rows })
    };
    CHECKS.iter().map(read).collect()
}

/// All differences of all tables, in words.
///
/// # Errors
/// If a comparison is not sound: a mistake of the test.
pub fn differences(before: &Truth, readings: &[Reading], after: &Truth) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for Reading { check, rows } in readings {
        let (before, after) = ((check.expected)(before), (check.expected)(after));
        all.extend(check.comparison.differences(&before, rows, &after)?);
    }
    Ok(all)
}
