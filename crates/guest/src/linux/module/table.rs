//! The table `modules`.

use std::sync::Arc;

use crate::linux::module::parameter::{ParameterTypes, parameters};
use crate::linux::module::{Module, modules};
use crate::linux::taint::taint_letters;
use crate::table::Items;
use crate::{Column, Cost, Guest, Kind, Selection, Shown, TableError, TableOf, Text, Value};

const TABLE: &str = "modules";
/// The longest version text that is read.
const LONGEST_VERSION: usize = 256;

/// A module, and what all of them share.
pub struct Listed {
    module: Module,
    types: Arc<ParameterTypes>,
}

const fn column(
    name: &'static str,
    kind: Kind,
    shown: Shown,
    meaning: &'static str,
    value: fn(&Guest, &Listed) -> Value,
) -> Column<Listed> {
    Column {
        name,
        kind,
        cost: Cost::Kernel,
        shown,
        meaning,
        value,
    }
}

/// The table `modules`.
pub static MODULES: TableOf<Listed> = TableOf {
    name: TABLE,
    aliases: &["lsmod"],
    meaning: "Loaded kernel modules, newest first, as /proc/modules shows them.",
    columns: &[
        column(
            "name",
            Kind::Text,
            Shown::Always,
            "The module's name.",
            |_, listed| Value::text(listed.module.name.as_slice()),
        ),
        column(
            "base",
            Kind::Address,
            Shown::Always,
            "Where its code lies.",
            |_, listed| listed.module.base.into(),
        ),
        column(
            "size",
            Kind::Unsigned,
            Shown::Always,
            "Bytes of memory of all its parts.",
            |_, listed| listed.module.size.into(),
        ),
        column(
            "refcount",
            Kind::Signed,
            Shown::Always,
            "References to it by other modules, processes and files; null where the kernel \
             can't unload modules.",
            |_, listed| listed.module.reference_count().into(),
        ),
        column(
            "state",
            Kind::Text,
            Shown::Always,
            "Live, Loading, Unloading, or Unformed while the kernel sets it up and hides it.",
            |_, listed| listed.module.state.name().into(),
        ),
        column(
            "used_by",
            Kind::List,
            Shown::Always,
            "The modules that use it.",
            |guest, listed| match listed.module.users(guest, TABLE) {
                Ok(names) => names.into_iter().map(Text::new).collect::<Vec<_>>().into(),
                Err(error) => Value::unreadable(error),
            },
        ),
        column(
            "taints",
            Kind::Text,
            Shown::Always,
            "Letters of the taints it brought, as in /proc/modules: P proprietary, O out of \
             tree, F forced, C staging, E unsigned, X, K live patch, N, T, R.",
            |_, listed| taint_letters(listed.module.taints()).into(),
        ),
        column(
            "signed",
            Kind::Boolean,
            Shown::OnRequest,
            "Whether its signature was checked and good when it was loaded; null where the \
             kernel checks none.",
            |_, listed| listed.module.is_signed().into(),
        ),
        column(
            "version",
            Kind::Text,
            Shown::OnRequest,
            "Its version as its authors gave it.",
            |guest, listed| text(guest, listed, |layout| layout.version.as_ref()),
        ),
        column(
            "srcversion",
            Kind::Text,
            Shown::OnRequest,
            "A checksum over its source files.",
            |guest, listed| text(guest, listed, |layout| layout.srcversion.as_ref()),
        ),
        column(
            "parameters",
            Kind::List,
            Shown::OnRequest,
            "Its parameters as name=value; the name alone where only the module's own code \
             can tell the value.",
            parameter_list,
        ),
        column(
            "arguments",
            Kind::Text,
            Shown::OnRequest,
            "The arguments it was loaded with; the kernel cuts them into pieces as it reads \
             them, so only the first one may be left.",
            |guest, listed| text(guest, listed, |layout| layout.args.as_ref()),
        ),
        column(
            "init",
            Kind::Address,
            Shown::OnRequest,
            "Its init function; the kernel frees that memory once the module is live.",
            |_, listed| listed.module.init().into(),
        ),
        column(
            "exported_symbols",
            Kind::Unsigned,
            Shown::OnRequest,
            "How many symbols it exports to other modules.",
            |_, listed| listed.module.exported_symbols().into(),
        ),
        column(
            "symbols",
            Kind::Unsigned,
            Shown::OnRequest,
            "How many entries its table of symbols has.",
            |guest, listed| Value::from_read(listed.module.symbol_count(guest, TABLE), Value::from),
        ),
        column(
            "address",
            Kind::Address,
            Shown::OnRequest,
            "Where its struct module lies.",
            |_, listed| listed.module.address.into(),
        ),
    ],
    items,
};

fn text(
    guest: &Guest,
    listed: &Listed,
    member: fn(&super::ModuleLayout) -> Option<&secmon_profile::Member>,
) -> Value {
    let module = &listed.module;
    match module.text(member(&module.model.layout)) {
        Some(address) => Value::from_read(
            guest.space().read_c_string(address, LONGEST_VERSION),
            Value::text,
        ),
        None => Value::Null,
    }
}

fn parameter_list(guest: &Guest, listed: &Listed) -> Value {
    let (address, count) = listed.module.parameters();
    match parameters(guest, TABLE, &listed.types, address, count) {
        Err(error) => Value::unreadable(error),
        Ok(Err(error)) => Value::unreadable(error),
        Ok(Ok(parameters)) => Value::List(
            parameters
                .into_iter()
                .map(|parameter| {
                    let mut text = parameter.name;
                    if let Some(value) = parameter.value {
                        text.push(b'=');
                        text.extend(value);
                    }
                    Value::text(text)
                })
                .collect(),
        ),
    }
}

fn items(
    guest: &Guest,
    _selection: &Selection,
    sink: &mut Items<'_, Listed>,
) -> Result<(), TableError> {
    let types = Arc::new(ParameterTypes::of(guest));
    for module in modules(guest, TABLE)? {
        let types = types.clone();
        if sink(Listed { module, types }).is_break() {
            break;
        }
    }
    Ok(())
}
