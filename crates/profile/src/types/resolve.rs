//! Following references between type records: from names to records, from a
//! structure along a path, from a type to its size and name.

use std::borrow::Cow;

use super::btf::{Blob, Kind, Record};
use super::names::NameIndex;
use super::path::{Component, components};
use super::{Member, TypeError, Types};

/// Steps through typedefs, qualifiers and array dimensions before a chain is
/// taken for a cycle. Real ones stay below 12.
const MAXIMUM_CHAIN: usize = 64;
/// Members looked at for one name. The largest structure of a kernel has some
/// 300, its anonymous members included.
const MAXIMUM_MEMBERS: usize = 1 << 16;
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) blob: Blob,
    pub(super) base: Option<Types>,
    /// The id of the blob's first record.
    pub(super) first_id: u32,
    /// The string offset where the blob's own strings start.
    pub(super) first_string: u32,
    /// The records of all named types.
    pub(super) names: NameIndex,
}

/// What a path leads to, before it is described.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) type_id: u32,
    pub(super) bit_offset: u64,
    pub(super) bit_size: u8,
}

impl Inner {
    pub(super) fn named(&self, name: &str, wanted: Option<Kind>) -> Vec<u32> {
        let mut found: Vec<(u8, u32)> = self
            .names
            .candidates(name.as_bytes())
            .filter_map(|index| {
                let record = self.blob.record(index as usize)?;
                let kind = match record.kind {
                    Kind::Enumeration64 => Kind::Enumeration,
                    kind => kind,
                };
                if wanted.is_some_and(|wanted| wanted != kind)
                    || self.string(record.name_offset).ok()? != name.as_bytes()
                {
                    return None;
                }
                let rank = match kind {
                    Kind::Structure | Kind::Union => 0,
                    Kind::Typedef => 1,
                    _ => 2,
                };
                Some((rank, self.first_id.checked_add(index)?))
            })
            .collect();
        found.sort_unstable();
        found.into_iter().map(|(_, id)| id).collect()
    }

    pub(super) fn signs_known(&self) -> bool {
        self.blob.signs_known() || self.base.as_ref().is_some_and(|base| base.0.signs_known())
    }

    pub(super) fn string(&self, offset: u32) -> Result<&[u8], TypeError> {
        match &self.base {
            Some(base) if offset < self.first_string => base.0.string(offset),
            _ => self.blob.string(offset.saturating_sub(self.first_string)),
        }
    }

    pub(super) fn record(&self, id: u32) -> Result<Record<'_>, TypeError> {
        if id == 0 {
            return Ok(Record {
                name_offset: 0,
                kind: Kind::Void,
                kind_flag: false,
                size_or_type: 0,
                extra: &[],
            });
        }
        if let Some(base) = &self.base
            && id < self.first_id
        {
            return base.0.record(id);
        }
        id.checked_sub(self.first_id)
            .and_then(|index| self.blob.record(index as usize))
            .ok_or(TypeError::Damaged {
                reason: "a type id beyond the last type",
            })
    }

    /// Goes through typedefs, qualifiers and tags to the type behind them.
    pub(super) fn resolve(&self, mut id: u32) -> Result<u32, TypeError> {
        for _ in 0..MAXIMUM_CHAIN {
            let record = self.record(id)?;
            match record.kind {
                Kind::Typedef
                | Kind::Volatile
                | Kind::Const
                | Kind::Restrict
                | Kind::TypeTag
                | Kind::DeclarationTag
                | Kind::Variable => id = record.size_or_type,
                _ => return Ok(id),
            }
        }
        Err(TypeError::Damaged {
            reason: "a cycle of typedefs or qualifiers",
        })
    }

    pub(super) fn size(&self, id: u32) -> Result<u64, TypeError> {
        let mut elements: u64 = 1;
        let mut current = id;
        for _ in 0..MAXIMUM_CHAIN {
            current = self.resolve(current)?;
            let record = self.record(current)?;
            let size = match record.kind {
                Kind::Pointer => 8,
                Kind::Integer
                | Kind::Float
                | Kind::Structure
                | Kind::Union
                | Kind::Enumeration
                | Kind::Enumeration64
                | Kind::DataSection => u64::from(record.size_or_type),
                Kind::Array => {
                    let (element, count) = record.array().unwrap_or_default();
                    elements = checked_product(elements, count.into())?;
                    current = element;
                    continue;
                }
                _ => {
                    let name = self.name_of(id);
                    return Err(TypeError::NoSize { name });
                }
            };
            return checked_product(elements, size);
        }
        Err(TypeError::Damaged {
            reason: "an array of too many dimensions",
        })
    }

    /// Where `path` leads to, starting at the structure with this id.
    pub(super) fn follow(&self, id: u32, structure: &str, path: &str) -> Result<Place, TypeError> {
        let mut place = Place {
            type_id: id,
            bit_offset: 0,
            bit_size: 0,
        };
        for component in components(path)? {
            place.type_id = self.resolve(place.type_id)?;
            let record = self.record(place.type_id)?;
            let not_a_container = || TypeError::NotAContainer {
                structure: structure.to_owned(),
                path: path.to_owned(),
                component: component.to_string(),
                found: self.name_of(place.type_id),
            };
            match component {
                Component::Name(name) => {
                    if !matches!(record.kind, Kind::Structure | Kind::Union) {
                        return Err(not_a_container());
                    }
                    let found = self.find_member(place.type_id, name)?;
                    let found = found.ok_or_else(|| TypeError::NoMember {
                        structure: structure.to_owned(),
                        path: path.to_owned(),
                        component: name.to_owned(),
                    })?;
                    place = Place {
                        bit_offset: place.bit_offset + found.bit_offset,
                        ..found
                    };
                }
                Component::Index(index) => {
                    let (element, count) = record.array().ok_or_else(not_a_container)?;
                    let count = u64::from(count);
                    // An array without a length has as many as are there.
                    if count != 0 && index >= count {
                        return Err(TypeError::IndexOutOfRange {
                            structure: structure.to_owned(),
                            path: path.to_owned(),
                            index,
                            count,
                        });
                    }
                    let bits = checked_product(self.size(element)?, 8)?;
                    let distance = checked_product(bits, index)?;
                    let bit_offset = place.bit_offset.checked_add(distance);
                    place = Place {
                        type_id: element,
                        bit_offset: bit_offset.ok_or(OVERFLOW)?,
                        bit_size: 0,
                    };
                }
            }
        }
        Ok(place)
    }

    /// A member by name, through anonymous structures and unions.
    fn find_member(&self, id: u32, name: &str) -> Result<Option<Place>, TypeError> {
        let mut left = MAXIMUM_MEMBERS;
        let mut pending = vec![(id, 0_u64)];
        while let Some((id, bits)) = pending.pop() {
            for member in self.record(id)?.members() {
                left = left.checked_sub(1).ok_or(TypeError::Damaged {
                    reason: "more members than any structure has",
                })?;
                let bit_offset = bits + u64::from(member.bit_offset);
                let member_name = self.string(member.name_offset)?;
                if member_name == name.as_bytes() {
                    return Ok(Some(Place {
                        type_id: member.type_id,
                        bit_offset,
                        bit_size: member.bit_size,
                    }));
                }
                if member_name.is_empty() {
                    let inner = self.resolve(member.type_id)?;
                    let kind = self.record(inner)?.kind;
                    if matches!(kind, Kind::Structure | Kind::Union) {
                        pending.push((inner, bit_offset));
                    }
                }
            }
        }
        Ok(None)
    }

    pub(super) fn describe(&self, place: Place) -> Result<Member, TypeError> {
        let resolved = self.resolve(place.type_id)?;
        let record = self.record(resolved)?;
        let size = self.size(resolved)?;
        let count = record.array().map(|(_, count)| count.into());
        // What the innermost elements are.
        let mut element = record;
        for _ in 0..MAXIMUM_CHAIN {
            let Some((id, _)) = element.array() else {
                break;
            };
            element = self.record(self.resolve(id)?)?;
        }
        let signed = match element.kind {
            Kind::Integer => element.integer().is_some_and(|integer| integer.signed),
            Kind::Enumeration => element.kind_flag || !self.signs_known(),
            Kind::Enumeration64 => element.kind_flag,
            _ => false,
        };
        let mut member = Member {
            offset: place.bit_offset / 8,
            size,
            bit_offset: 0,
            bit_size: 0,
            signed,
            count,
            type_name: self.name_of(place.type_id),
            pointer: element.kind == Kind::Pointer,
        };
        let (mut bit_offset, mut bit_size) = (place.bit_offset, place.bit_size);
        // Without the kind flag only the integer type tells of a bit field.
        if let Some(integer) = record.integer()
            && bit_size == 0
            && u64::from(integer.bits) < size.saturating_mul(8)
            && integer.bits != 0
            && (integer.bit_offset != 0 || bit_offset % 8 != 0 || !is_bool(integer.bits, size))
        {
            bit_offset += u64::from(integer.bit_offset);
            bit_size = integer.bits;
        }
        if bit_size != 0 {
            let (offset, size, shift) = storage_unit(bit_offset, bit_size, size)?;
            member.offset = offset;
            member.size = size;
            member.bit_offset = shift;
            member.bit_size = bit_size;
        }
        Ok(member)
    }

    /// The type as C writes it, with array dimensions last.
    pub(super) fn name_of(&self, id: u32) -> String {
        let mut before = String::new();
        let mut after = String::new();
        let mut id = id;
        for _ in 0..MAXIMUM_CHAIN {
            let Ok(record) = self.record(id) else {
                break;
            };
            let name = self.string(record.name_offset).unwrap_or_default();
            let name = String::from_utf8_lossy(name);
            let word = match record.kind {
                Kind::Pointer => {
                    after.insert_str(0, " *");
                    id = record.size_or_type;
                    continue;
                }
                Kind::Array => {
                    let (element, count) = record.array().unwrap_or_default();
                    // Dimensions are met outermost first, and stay so.
                    let end = after.find(" *").unwrap_or(after.len());
                    after.insert_str(end, &format!("[{count}]"));
                    id = element;
                    continue;
                }
                Kind::Const | Kind::Volatile => {
                    let word = match record.kind {
                        Kind::Const => "const",
                        _ => "volatile",
                    };
                    let inner = self.record(record.size_or_type).map(|record| record.kind);
                    match inner {
                        Ok(Kind::Pointer) => after.insert_str(0, &format!(" {word}")),
                        _ => before.push_str(&format!("{word} ")),
                    }
                    id = record.size_or_type;
                    continue;
                }
                Kind::Restrict | Kind::TypeTag | Kind::DeclarationTag | Kind::Variable => {
                    id = record.size_or_type;
                    continue;
                }
                Kind::Structure => "struct ",
                Kind::Union => "union ",
                Kind::Enumeration | Kind::Enumeration64 => "enum ",
                Kind::Forward if record.kind_flag => "union ",
                Kind::Forward => "struct ",
                Kind::Void => "void",
                Kind::FunctionPrototype | Kind::Function => "function",
                _ => "",
            };
            let name = match (word.ends_with(' '), name.is_empty()) {
                (true, true) => Cow::Borrowed("(anonymous)"),
                _ if matches!(record.kind, Kind::FunctionPrototype | Kind::Function) => {
                    Cow::Borrowed("")
                }
                _ => name,
            };
            return format!("{before}{word}{name}{after}");
        }
        format!("{before}(damaged){after}")
    }
}

const OVERFLOW: TypeError = TypeError::Damaged {
    reason: "an offset or size that overflows",
};

fn checked_product(a: u64, b: u64) -> Result<u64, TypeError> {
    // A bit offset must stay representable as well.
    match a.checked_mul(b) {
        Some(product) if product < 1 << 60 => Ok(product),
        _ => Err(OVERFLOW),
    }
}

/// `_Bool` has one bit of value in some encodings, and is no bit field.
fn is_bool(bits: u8, size: u64) -> bool {
    bits == 1 && size == 1
}

/// Byte offset, bytes and shift of the storage unit that holds the bit field:
/// the naturally aligned unit of its type, or where the field straddles two
/// (packed structures) just the bytes that hold it.
fn storage_unit(bit_offset: u64, bit_size: u8, size: u64) -> Result<(u64, u64, u8), TypeError> {
    if matches!(size, 1 | 2 | 4 | 8) {
        let unit_bits = size * 8;
        let shift = bit_offset % unit_bits;
        if shift + u64::from(bit_size) <= unit_bits {
            return Ok(((bit_offset - shift) / 8, size, shift as u8));
        }
    }
    let shift = bit_offset % 8;
    let bytes = (shift + u64::from(bit_size)).div_ceil(8);
    match bytes {
        0..=8 => Ok((bit_offset / 8, bytes, shift as u8)),
        _ => Err(TypeError::Damaged {
            reason: "a bit field of more than 64 bits",
        }),
    }
}
