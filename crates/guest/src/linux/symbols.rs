//! The table `symbols`: the kernel's and its modules'. The kernel's need no
//! types.

use std::sync::Arc;

use secmon_memory::VirtualAddress;

use super::module::knowledge::{exports_of, symbols_of};
use super::module::modules;
use crate::table::Items;
use crate::{
    Column, Cost, Diagnostic, Guest, Kind, Selection, Shown, TableError, TableOf, Text, Value,
};

const TABLE: &str = "symbols";

/// A symbol.
pub struct Symbol {
    name: String,
    address: VirtualAddress,
    kind: char,
    module: Option<Arc<[u8]>>,
}

const fn column(
    name: &'static str,
    kind: Kind,
    meaning: &'static str,
    value: fn(&Guest, &Symbol) -> Value,
) -> Column<Symbol> {
    Column {
        name,
        kind,
        cost: Cost::Kernel,
        shown: Shown::Always,
        meaning,
        value,
    }
}

/// The table `symbols`.
pub static SYMBOLS: TableOf<Symbol> = TableOf {
    name: TABLE,
    aliases: &["kallsyms"],
    meaning: "Symbols of the kernel and its modules, as /proc/kallsyms shows them to root.",
    columns: &[
        column(
            "address",
            Kind::Address,
            "Where it is, KASLR included; of a per-CPU variable its offset in a CPU's area.",
            |_, symbol| symbol.address.into(),
        ),
        column(
            "kind",
            Kind::Text,
            "T text, D data, B zeroed data, R read-only, A absolute, W weak; lower case for \
             local ones, and for those of a module that it does not export.",
            |_, symbol| symbol.kind.to_string().into(),
        ),
        column("name", Kind::Text, "The symbol's name.", |_, symbol| {
            symbol.name.as_str().into()
        }),
        column(
            "module",
            Kind::Text,
            "The module that it belongs to; null for the kernel itself.",
            |_, symbol| symbol.module.as_deref().map(Text::new).into(),
        ),
    ],
    items,
};

fn items(
    guest: &Guest,
    _selection: &Selection,
    sink: &mut Items<'_, Symbol>,
) -> Result<(), TableError> {
    for symbol in guest.symbols().iter() {
        let item = Symbol {
            name: symbol.name.to_owned(),
            address: symbol.address,
            kind: symbol.kind,
            module: None,
        };
        if sink(item).is_break() {
            return Ok(());
        }
    }
    let complain = |subject: String, address, reason: String| {
        guest.diagnostics().record(Diagnostic {
            table: TABLE,
            subject,
            address,
            reason: format!("symbols of modules are missing: {reason}"),
        });
    };
    let modules = match modules(guest, TABLE) {
        Ok(modules) => modules,
        Err(error) => {
            complain("modules".to_owned(), None, error.to_string());
            return Ok(());
        }
    };
    for module in modules {
        let symbols = match symbols_of(guest, TABLE, &module) {
            Ok(Some(symbols)) => symbols,
            Ok(None) => continue,
            Err(error) => {
                let subject = format!("module {}", String::from_utf8_lossy(&module.name));
                complain(subject, Some(module.address), error.to_string());
                continue;
            }
        };
        let exports = match exports_of(guest, TABLE, &module) {
            Ok(exports) => Some(exports),
            Err(error) => {
                guest.diagnostics().record(Diagnostic {
                    table: TABLE,
                    subject: format!("module {}", String::from_utf8_lossy(&module.name)),
                    address: Some(module.address),
                    reason: format!("what it exports is not known: {error}"),
                });
                None
            }
        };
        let name: Arc<[u8]> = module.name.as_slice().into();
        for symbol in symbols.iter() {
            let item = Symbol {
                name: symbol.name.to_owned(),
                address: symbol.address,
                kind: match &exports {
                    Some(exports) if exports.contains(symbol.address, symbol.name) => {
                        symbol.kind.to_ascii_uppercase()
                    }
                    Some(_) => symbol.kind.to_ascii_lowercase(),
                    None => symbol.kind,
                },
                module: Some(name.clone()),
            };
            if sink(item).is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}
