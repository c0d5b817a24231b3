//! The table `types`: the layouts that the kernel's and its modules' type
//! information (BTF) describes.

use std::sync::Arc;

use secmon_profile::{TypeId, TypeKind, Types};

use super::module::knowledge::{KnowledgeError, types_of};
use super::module::modules;
use crate::table::Items;
use crate::{
    Column, Cost, Diagnostic, Guest, Kind, Selection, Shown, TableError, TableOf, Text, Value,
};

const TABLE: &str = "types";

/// A named type.
pub struct NamedType {
    name: String,
    kind: TypeKind,
    size: Option<u64>,
    id: TypeId,
    types: Types,
    module: Option<Arc<[u8]>>,
}

const fn column(
    name: &'static str,
    kind: Kind,
    shown: Shown,
    meaning: &'static str,
    value: fn(&Guest, &NamedType) -> Value,
) -> Column<NamedType> {
    Column {
        name,
        kind,
        cost: Cost::Kernel,
        shown,
        meaning,
        value,
    }
}

/// The table `types`.
pub static TYPES: TableOf<NamedType> = TableOf {
    name: TABLE,
    aliases: &["structs"],
    meaning: "Named types of the kernel and its modules.",
    columns: &[
        column(
            "kind",
            Kind::Text,
            Shown::Always,
            "int, float, struct, union, enum or typedef.",
            |_, named| kind_name(named.kind).into(),
        ),
        column(
            "name",
            Kind::Text,
            Shown::Always,
            "The type's name. Several types of a kernel can have one name.",
            |_, named| named.name.as_str().into(),
        ),
        column(
            "size",
            Kind::Unsigned,
            Shown::Always,
            "Its bytes; null for a typedef of something without a size.",
            |_, named| named.size.into(),
        ),
        column(
            "members",
            Kind::List,
            Shown::OnRequest,
            "Of a struct or union its members as `offset name: type`, with the bits of bit \
             fields; of an enum its values as `name = value`.",
            |_, named| members(named),
        ),
        column(
            "module",
            Kind::Text,
            Shown::Always,
            "The module that describes it; null for the kernel itself.",
            |_, named| named.module.as_deref().map(Text::new).into(),
        ),
    ],
    items,
};

fn kind_name(kind: TypeKind) -> &'static str {
    match kind {
        TypeKind::Integer => "int",
        TypeKind::Float => "float",
        TypeKind::Structure => "struct",
        TypeKind::Union => "union",
        TypeKind::Enumeration => "enum",
        TypeKind::Typedef => "typedef",
    }
}

fn members(named: &NamedType) -> Value {
    match named.kind {
        TypeKind::Structure | TypeKind::Union => {
            Value::from_read(named.types.members_of(named.id), |members| {
                members
                    .into_iter()
                    .map(|named| {
                        let member = &named.member;
                        let name = named.name.as_deref().unwrap_or("(anonymous)");
                        let bits = match member.bit_size {
                            0 => String::new(),
                            size => format!(" bits {}+{size}", member.bit_offset),
                        };
                        format!("{:#x} {name}: {}{bits}", member.offset, member.type_name)
                    })
                    .collect::<Vec<_>>()
                    .into()
            })
        }
        TypeKind::Enumeration => Value::from_read(named.types.enumerators_of(named.id), |values| {
            values
                .into_iter()
                .map(|(name, value)| format!("{name} = {value}"))
                .collect::<Vec<_>>()
                .into()
        }),
        TypeKind::Integer | TypeKind::Float | TypeKind::Typedef => Value::List(Box::default()),
    }
}

fn items(
    guest: &Guest,
    _selection: &Selection,
    sink: &mut Items<'_, NamedType>,
) -> Result<(), TableError> {
    let kernel = guest.types(TABLE)?;
    let mut count = 0;
    let mut give = |types: &Types, skip: usize, module: Option<Arc<[u8]>>, count: &mut usize| {
        for named in types.iter().skip(skip) {
            *count += 1;
            let item = NamedType {
                name: named.name.into_owned(),
                kind: named.kind,
                size: named.size,
                id: named.id,
                types: types.clone(),
                module: module.clone(),
            };
            if sink(item).is_break() {
                return false;
            }
        }
        true
    };
    if !give(kernel, 0, None, &mut count) {
        return Ok(());
    }
    let modules = match modules(guest, TABLE) {
        Ok(modules) => modules,
        // A kernel without modules has no types of theirs.
        Err(TableError::Type { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    for module in modules {
        match types_of(guest, TABLE, &module) {
            Ok(Some(types)) => {
                let name: Arc<[u8]> = module.name.as_slice().into();
                // A module's types come behind the kernel's.
                if !give(&types, count, Some(name), &mut 0) {
                    return Ok(());
                }
            }
            Ok(None) => {}
            Err(error @ KnowledgeError::OtherTypes) => {
                guest.diagnostics().record(Diagnostic {
                    table: TABLE,
                    subject: "modules".to_owned(),
                    address: None,
                    reason: format!("their types are missing: {error}"),
                });
                return Ok(());
            }
            Err(error) => guest.diagnostics().record(Diagnostic {
                table: TABLE,
                subject: format!("module {}", String::from_utf8_lossy(&module.name)),
                address: Some(module.address),
                reason: format!("its types are missing: {error}"),
            }),
        }
    }
    Ok(())
}
