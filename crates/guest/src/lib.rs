//! What the guest kernel knows, as tables.
//!
//! A [`Table`] is a named list of typed rows about one [`Guest`]. Everything
//! that shows, stores or judges guest data consumes tables; [`tables`] lists
//! them all. Where the bytes come from is not known here.
#![forbid(unsafe_code)]

mod diagnostic_table;
mod diagnostics;
mod guest;
mod layout;
pub mod linux;
mod split;
#[cfg(test)]
pub(crate) mod synthetic;
mod table;
mod trust;
mod value;

pub use diagnostics::{Diagnostic, Diagnostics};
pub use guest::{Guest, extract};
pub use layout::{Layout, member_of};
pub use table::{
    Column, ColumnInfo, Cost, Kind, Request, Row, RowSink, Selection, Shown, Table, TableError,
    TableOf,
};
pub use trust::TrustLevel;
pub use value::{Text, Time, Value};

/// All tables, in the order in which they are documented.
pub fn tables() -> &'static [&'static dyn Table] {
    static TABLES: &[&dyn Table] = &[
        &linux::processes::PROCESSES,
        &linux::threads::THREADS,
        &linux::process_tree::PROCESS_TREE,
        &linux::namespaces::NAMESPACES,
        &linux::credentials::CREDENTIALS,
        &diagnostic_table::DIAGNOSTICS,
        &linux::files::FILES,
        &linux::maps::MAPS,
        &linux::changed_code::CHANGED_CODE,
        &linux::mounts::MOUNTS,
        &linux::env::ENV,
        &linux::info::INFO,
        &linux::kmsg::KMSG,
        &linux::module::MODULES,
        &linux::net::INTERFACES,
        &linux::net::SOCKETS,
        &linux::bpf::BPF,
        &linux::symbols::SYMBOLS,
        &linux::types::TYPES,
    ];
    TABLES
}

/// The table with this name or alias.
pub fn table(name: &str) -> Option<&'static dyn Table> {
    tables()
        .iter()
        .copied()
        .find(|table| table.name() == name || table.aliases().contains(&name))
}
