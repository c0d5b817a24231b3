//! Type layouts as the three type sections of an ISF document
//! (`isf_export.rs` writes the rest of it).
//!
//! ISF has no typedefs and no qualifiers: references go to what is behind them.
//! It knows types by name alone. Of types that share a name the first is
//! written; types without a name get one from their id, as `dwarf2json` makes
//! names up for them.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};

use super::btf::{Kind, RawMember};
use super::resolve::{Inner, Place};
use super::{TypeId, Types};

/// Pointers and array dimensions in one reference. What is deeper is written
/// as `void`; real references stay below 6.
const MAXIMUM_DEPTH: usize = 8;

/// Writes the items of a JSON object, a comma between two.
pub(crate) struct Items<'a, W> {
    out: &'a mut W,
    first: bool,
}

impl<'a, W: Write> Items<'a, W> {
    /// An object that starts here; the braces are the caller's.
    pub(crate) fn new(out: &'a mut W) -> Self {
        Self { out, first: true }
    }

    /// Writes a key, and gives where its value goes.
    pub(crate) fn key(&mut self, name: &str) -> io::Result<&mut W> {
        if !self.first {
            self.out.write_all(b",")?;
        }
        self.first = false;
        serde_json::to_writer(&mut *self.out, name)?;
        self.out.write_all(b":")?;
        Ok(self.out)
    }
}

/// The types of one kernel, ready to be written.
pub(crate) struct Export<'a> {
    types: &'a Types,
    /// The first type of each name, structures and unions together.
    composites: HashMap<String, u32>,
    enumerations: HashMap<String, u32>,
    /// The first integer type of each size and sign, for enumerations.
    integers: HashMap<(u32, bool), String>,
    /// Typed variables: those of the per-CPU sections.
    variables: HashMap<String, u32>,
}

impl<'a> Export<'a> {
    /// Looks all types over once.
    pub(crate) fn new(types: &'a Types) -> Self {
        let mut export = Self {
            types,
            composites: HashMap::new(),
            enumerations: HashMap::new(),
            integers: HashMap::new(),
            variables: HashMap::new(),
        };
        for (id, kind) in export.records() {
            let inner = export.inner();
            match kind {
                Kind::Structure | Kind::Union => {
                    let name = export.name(id);
                    export.composites.entry(name).or_insert(id);
                }
                Kind::Enumeration | Kind::Enumeration64 => {
                    let name = export.name(id);
                    export.enumerations.entry(name).or_insert(id);
                }
                Kind::Integer => {
                    if let Ok(record) = inner.record(id) {
                        let signed = record.integer().is_some_and(|integer| integer.signed);
                        let name = export.name(id);
                        let key = (record.size_or_type, signed);
                        export.integers.entry(key).or_insert(name);
                    }
                }
                Kind::Variable => {
                    let name = export.name(id);
                    export.variables.entry(name).or_insert(id);
                }
                _ => {}
            }
        }
        // A structure that only a typedef names is found by that name, too.
        for (id, kind) in export.records() {
            if kind != Kind::Typedef {
                continue;
            }
            let Ok(target) = export.inner().resolve(id) else {
                continue;
            };
            let Ok(record) = export.inner().record(target) else {
                continue;
            };
            let names = match record.kind {
                Kind::Structure | Kind::Union => &mut export.composites,
                Kind::Enumeration | Kind::Enumeration64 => &mut export.enumerations,
                _ => continue,
            };
            if record.name_offset == 0 {
                let name = name_of(types, id);
                names.entry(name).or_insert(target);
            }
        }
        export
    }

    fn inner(&self) -> &'a Inner {
        &self.types.0
    }

    fn records(&self) -> impl Iterator<Item = (u32, Kind)> + use<'a> {
        let inner = self.inner();
        (0..inner.blob.len()).filter_map(|index| {
            let kind = inner.blob.record(index)?.kind;
            Some((inner.first_id.checked_add(index as u32)?, kind))
        })
    }

    fn name(&self, id: u32) -> String {
        name_of(self.types, id)
    }

    /// The id of a variable's type, where the types tell it.
    pub(crate) fn variable(&self, name: &str) -> Option<TypeId> {
        self.variables.get(name).copied().map(TypeId)
    }

    /// The id of the structure or union of that name.
    pub(crate) fn composite(&self, name: &str) -> Option<TypeId> {
        self.composites.get(name).copied().map(TypeId)
    }

    /// The first structure without a name that has all of these members.
    pub(crate) fn nameless_with(&self, members: &[&str]) -> Option<TypeId> {
        let inner = self.inner();
        let has = |id: u32, name: &str| {
            inner.record(id).is_ok_and(|record| {
                record
                    .members()
                    .any(|member| inner.string(member.name_offset) == Ok(name.as_bytes()))
            })
        };
        self.records()
            .filter(|(id, kind)| {
                *kind == Kind::Structure
                    && inner
                        .record(*id)
                        .is_ok_and(|record| record.name_offset == 0)
            })
            .find(|(id, _)| members.iter().all(|name| has(*id, name)))
            .map(|(id, _)| TypeId(id))
    }

    /// Writes the sections `base_types`, `enums` and `user_types`.
    pub(crate) fn write_sections(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(b"\"base_types\":{")?;
        self.write_base_types(out)?;
        out.write_all(b"},\"enums\":{")?;
        self.write_enumerations(out)?;
        out.write_all(b"},\"user_types\":{")?;
        self.write_composites(out)?;
        out.write_all(b"}")
    }

    fn write_base_types(&self, out: &mut impl Write) -> io::Result<()> {
        let mut items = Items::new(out);
        let mut written = HashSet::new();
        let mut write = |name: String, size: u32, signed: bool, kind: &str| {
            if !written.insert(name.clone()) {
                return Ok(());
            }
            write!(
                items.key(&name)?,
                "{{\"size\":{size},\"signed\":{signed},\"kind\":\"{kind}\",\"endian\":\"little\"}}"
            )
        };
        write("void".to_owned(), 0, false, "void")?;
        write("pointer".to_owned(), 8, false, "int")?;
        for (id, kind) in self.records() {
            let Ok(record) = self.inner().record(id) else {
                continue;
            };
            let name = self.name(id);
            match kind {
                Kind::Integer => {
                    let signed = record.integer().is_some_and(|integer| integer.signed);
                    let kind = match name.as_str() {
                        "_Bool" => "bool",
                        "char" | "signed char" | "unsigned char" => "char",
                        _ => "int",
                    };
                    write(name, record.size_or_type, signed, kind)?;
                }
                Kind::Float => write(name, record.size_or_type, true, "float")?,
                _ => {}
            }
        }
        Ok(())
    }

    fn write_enumerations(&self, out: &mut impl Write) -> io::Result<()> {
        let mut items = Items::new(out);
        for (name, id) in sorted(&self.enumerations) {
            let Ok(record) = self.inner().record(id) else {
                continue;
            };
            let Ok(values) = self.types.enumerators_of(TypeId(id)) else {
                continue;
            };
            let size = record.size_or_type;
            let signed = values.iter().any(|(_, value)| *value < 0);
            let base = [signed, !signed]
                .iter()
                .find_map(|signed| self.integers.get(&(size, *signed)))
                .map_or("pointer", String::as_str);
            let out = items.key(name)?;
            write!(out, "{{\"size\":{size},\"base\":")?;
            serde_json::to_writer(&mut *out, base)?;
            out.write_all(b",\"constants\":{")?;
            let mut constants = Items::new(&mut *out);
            let mut written = HashSet::new();
            for (name, value) in &values {
                if written.insert(name) {
                    write!(constants.key(name)?, "{value}")?;
                }
            }
            out.write_all(b"}}")?;
        }
        Ok(())
    }

    fn write_composites(&self, out: &mut impl Write) -> io::Result<()> {
        let mut items = Items::new(out);
        for (name, id) in sorted(&self.composites) {
            let Ok(record) = self.inner().record(id) else {
                continue;
            };
            let kind = match record.kind {
                Kind::Union => "union",
                _ => "struct",
            };
            let out = items.key(name)?;
            let size = record.size_or_type;
            write!(out, "{{\"kind\":\"{kind}\",\"size\":{size},\"fields\":{{")?;
            let mut fields = Items::new(&mut *out);
            let mut written = HashSet::new();
            for (number, member) in record.members().enumerate() {
                self.write_member(&mut fields, &mut written, number, member)?;
            }
            out.write_all(b"}}")?;
        }
        Ok(())
    }

    fn write_member(
        &self,
        fields: &mut Items<'_, impl Write>,
        written: &mut HashSet<String>,
        number: usize,
        member: RawMember,
    ) -> io::Result<()> {
        let inner = self.inner();
        let name = inner.string(member.name_offset).unwrap_or_default();
        let anonymous = name.is_empty();
        let name = match anonymous {
            true => format!("unnamed_field_{number}"),
            false => String::from_utf8_lossy(name).into_owned(),
        };
        if !written.insert(name.clone()) {
            return Ok(());
        }
        let described = inner.describe(Place {
            type_id: member.type_id,
            bit_offset: member.bit_offset.into(),
            bit_size: member.bit_size,
        });
        let out = fields.key(&name)?;
        out.write_all(b"{\"type\":")?;
        let offset = match described {
            Ok(place) if place.bit_size != 0 => {
                let (position, length) = (place.bit_offset, place.bit_size);
                write!(
                    out,
                    "{{\"kind\":\"bitfield\",\"bit_position\":{position},\"bit_length\":{length},\"type\":"
                )?;
                self.write_reference(TypeId(member.type_id), out)?;
                out.write_all(b"}")?;
                place.offset
            }
            Ok(place) => {
                self.write_reference(TypeId(member.type_id), out)?;
                place.offset
            }
            // Of a type without a size; its place is known all the same.
            Err(_) => {
                self.write_reference(TypeId(member.type_id), out)?;
                u64::from(member.bit_offset / 8)
            }
        };
        write!(out, ",\"offset\":{offset}")?;
        if anonymous {
            out.write_all(b",\"anonymous\":true")?;
        }
        out.write_all(b"}")
    }

    /// Writes how a member or symbol refers to a type.
    pub(crate) fn write_reference(&self, id: TypeId, out: &mut impl Write) -> io::Result<()> {
        let inner = self.inner();
        let mut id = id.0;
        let mut open = 0;
        let (kind, name) = loop {
            let record = inner.resolve(id).and_then(|found| {
                id = found;
                inner.record(found)
            });
            let Ok(record) = record else {
                break ("base", "void".to_owned());
            };
            if open == MAXIMUM_DEPTH {
                break ("base", "void".to_owned());
            }
            match record.kind {
                Kind::Pointer => {
                    out.write_all(b"{\"kind\":\"pointer\",\"subtype\":")?;
                    id = record.size_or_type;
                    open += 1;
                }
                Kind::Array => {
                    let (element, count) = record.array().unwrap_or_default();
                    write!(out, "{{\"kind\":\"array\",\"count\":{count},\"subtype\":")?;
                    id = element;
                    open += 1;
                }
                Kind::Structure => break ("struct", self.name(id)),
                Kind::Union => break ("union", self.name(id)),
                Kind::Forward if record.kind_flag => break ("union", self.name(id)),
                Kind::Forward => break ("struct", self.name(id)),
                Kind::Enumeration | Kind::Enumeration64 => break ("enum", self.name(id)),
                Kind::Integer | Kind::Float => break ("base", self.name(id)),
                Kind::Function | Kind::FunctionPrototype => break ("function", String::new()),
                _ => break ("base", "void".to_owned()),
            }
        };
        match kind {
            "function" => out.write_all(b"{\"kind\":\"function\"}")?,
            _ => {
                write!(out, "{{\"kind\":\"{kind}\",\"name\":")?;
                serde_json::to_writer(&mut *out, &name)?;
                out.write_all(b"}")?;
            }
        }
        for _ in 0..open {
            out.write_all(b"}")?;
        }
        Ok(())
    }
}

/// The name that a type has in the document.
fn name_of(types: &Types, id: u32) -> String {
    let inner = &types.0;
    let name = inner
        .record(id)
        .and_then(|record| inner.string(record.name_offset));
    match name {
        Ok(name) if !name.is_empty() => String::from_utf8_lossy(name).into_owned(),
        _ => format!("unnamed_{id:x}"),
    }
}

/// The names in the order of the types, so that one kernel's file is always
/// the same.
fn sorted(names: &HashMap<String, u32>) -> Vec<(&str, u32)> {
    let mut list: Vec<_> = names
        .iter()
        .map(|(name, id)| (name.as_str(), *id))
        .collect();
    list.sort_unstable_by_key(|(name, id)| (*id, *name));
    list
}
