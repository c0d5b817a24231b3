//! Type layouts of one kernel build: where members lie, how large things are,
//! what enumerators are worth.
//!
//! All of it is answered from one BTF blob (see `btf.rs`), by name and on
//! demand: nothing but an index of the type names is built. A module's blob
//! refers to its kernel's; an ISF file is turned into such a blob, so
//! that whoever asks need not know where the types came from.
//!
//! The blob may be forged: every walk here is bounded, none recurses.

mod btf;
pub(crate) mod encode;
mod path;

use std::borrow::Cow;
use std::sync::Arc;

pub use btf::{BtfError, MAXIMUM_BTF_LENGTH};
pub(crate) use btf::{HEADER_LENGTH, Header, Kind};

use btf::{Blob, Record};
use path::{Component, components};

/// Steps through typedefs, qualifiers and array dimensions before a chain is
/// taken for a cycle. Real ones stay below 12.
const MAXIMUM_CHAIN: usize = 64;
/// Members looked at for one name. The largest structure of a kernel has some
/// 300, its anonymous members included.
const MAXIMUM_MEMBERS: usize = 1 << 16;
/// Types of one name that are asked. Kernels have up to five.
const MAXIMUM_NAMESAKES: usize = 64;

/// Why a question about a type has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    /// This kernel has no type of that name.
    #[error("this kernel has no type {name:?}")]
    UnknownType {
        /// The name asked for.
        name: String,
    },
    /// The structure has no such member.
    #[error("{structure} has no member {component:?} (asked for {path:?})")]
    NoMember {
        /// The structure or union asked about.
        structure: String,
        /// The whole path asked for.
        path: String,
        /// The component of it that was not found.
        component: String,
    },
    /// A path goes on after something that has no members or elements.
    #[error("in {structure}, {component:?} of {path:?} is asked of a {found}")]
    NotAContainer {
        /// The structure or union asked about.
        structure: String,
        /// The whole path asked for.
        path: String,
        /// The component that can't be looked up.
        component: String,
        /// The type it was asked of.
        found: String,
    },
    /// An array index at or above the number of elements.
    #[error("in {structure}, index {index} of {path:?} exceeds the array's {count} elements")]
    IndexOutOfRange {
        /// The structure or union asked about.
        structure: String,
        /// The whole path asked for.
        path: String,
        /// The index asked for.
        index: u64,
        /// The elements there are.
        count: u64,
    },
    /// A path that is not names with dots and indices in brackets.
    #[error("{path:?} is not a path of member names and [indices]")]
    MalformedPath {
        /// The path as it was given.
        path: String,
    },
    /// The enumeration has no such enumerator.
    #[error("enumeration {enumeration} has no enumerator {name:?}")]
    NoEnumerator {
        /// The enumeration asked about.
        enumeration: String,
        /// The enumerator asked for.
        name: String,
    },
    /// A type without a size: a function, a forward declaration, `void`.
    #[error("{name:?} has no size")]
    NoSize {
        /// The type asked about.
        name: String,
    },
    /// The types contradict their own format.
    #[error("damaged type information: {reason}")]
    Damaged {
        /// What does not fit.
        reason: &'static str,
    },
}

/// A member, found by path from a structure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Bytes from the start of the structure. For a bit field: to the start
    /// of the storage unit of [`size`](Self::size) bytes that holds it.
    pub offset: u64,
    /// Bytes of the member, of all elements for an array. For a bit field:
    /// bytes of its storage unit. 0 for an array without a length.
    pub size: u64,
    /// The lowest bit of a bit field in its storage unit, else 0.
    pub bit_offset: u8,
    /// The bits of a bit field; 0 for a member that is none.
    pub bit_size: u8,
    /// Whether it (or an array's element) is a signed integer or enumeration.
    pub signed: bool,
    /// The elements of an array (of its outermost dimension).
    pub count: Option<u64>,
    /// The type as C would write it, array dimensions last.
    pub type_name: String,
    /// Whether it (or an array's element) is a pointer.
    pub pointer: bool,
}

/// The kinds of types there are names for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TypeKind {
    /// `int`, `long unsigned int`, `_Bool`.
    Integer,
    /// `float`, `double`.
    Float,
    /// A `struct`.
    Structure,
    /// A `union`.
    Union,
    /// An `enum`.
    Enumeration,
    /// A `typedef`.
    Typedef,
}

/// One named type, for listings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedType<'a> {
    /// Its name, without `struct` and the like.
    pub name: Cow<'a, str>,
    /// What it is.
    pub kind: TypeKind,
    /// Its bytes, where it has a size.
    pub size: Option<u64>,
    /// Its id, for [`Types::members_of`] and [`Types::enumerators_of`].
    pub id: TypeId,
}

/// A type inside one [`Types`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TypeId(u32);

/// A direct member of a structure or union, for listings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedMember {
    /// Its name; `None` for an anonymous structure or union.
    pub name: Option<String>,
    /// Where and what it is.
    pub member: Member,
}

/// The type layouts of a kernel, or of one of its modules on top of them.
///
/// Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Types(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    blob: Blob,
    base: Option<Types>,
    /// The id of the blob's first record.
    first_id: u32,
    /// The string offset where the blob's own strings start.
    first_string: u32,
    /// Hash of the name and index of the record, of all named types, sorted.
    names: Vec<(u32, u32)>,
}

/// What a path leads to, before it is described.
#[derive(Clone, Copy)]
struct Place {
    type_id: u32,
    bit_offset: u64,
    bit_size: u8,
}

impl Types {
    /// Reads a kernel's BTF blob.
    ///
    /// # Errors
    /// [`BtfError`] if any record or section does not fit the blob.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, BtfError> {
        Self::build(bytes, None)
    }

    /// Reads a module's BTF blob, whose ids and strings go on where those of
    /// `self` end.
    ///
    /// # Errors
    /// [`BtfError`] if any record or section does not fit the blob.
    pub fn parse_module(&self, bytes: Vec<u8>) -> Result<Self, BtfError> {
        Self::build(bytes, Some(self.clone()))
    }

    fn build(bytes: Vec<u8>, base: Option<Self>) -> Result<Self, BtfError> {
        let (first_id, first_string) = base.as_ref().map_or((1, 0), |base| {
            let inner = &base.0;
            (
                inner.first_id.saturating_add(inner.blob.len() as u32),
                inner
                    .first_string
                    .saturating_add(inner.blob.string_length()),
            )
        });
        let mut named = Vec::with_capacity(bytes.len() / 128);
        let blob = Blob::parse(bytes, first_id, |name, index| named.push((name, index)))?;
        let mut inner = Inner {
            blob,
            base,
            first_id,
            first_string,
            names: Vec::new(),
        };
        let mut names: Vec<(u32, u32)> = named
            .into_iter()
            // A name that can't be read can't be asked for either.
            .filter_map(|(name, index)| Some((hash(inner.string(name).ok()?), index)))
            .collect();
        names.sort_unstable();
        names.shrink_to_fit();
        inner.names = names;
        Ok(Self(Arc::new(inner)))
    }

    /// The BTF blob these types were read from, without its base.
    pub fn bytes(&self) -> &[u8] {
        self.0.blob.bytes()
    }

    /// How many types there are, unnamed ones and those of the base included.
    pub fn len(&self) -> usize {
        self.0.first_id as usize - 1 + self.0.blob.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of a type: of a structure, union, enumeration, typedef or
    /// integer by its name. `struct`, `union` or `enum` may stand before the
    /// name where there are several.
    ///
    /// # Errors
    /// [`TypeError`] if there is no such type or it has no size.
    pub fn size_of(&self, name: &str) -> Result<u64, TypeError> {
        let mut error = unknown_type(name);
        for id in self.named(name) {
            match self.0.size(id) {
                Ok(size) => return Ok(size),
                Err(other) => error = other,
            }
        }
        Err(error)
    }

    /// The member of a structure or union that `path` leads to: names with
    /// dots between them, array indices in brackets (`"se.avg.load_avg"`,
    /// `"fds_bits[3]"`). Members of anonymous structures and unions count as
    /// members of what holds them. A path does not go through pointers.
    ///
    /// # Errors
    /// [`TypeError`] names the component of the path that was not found.
    pub fn member(&self, structure: &str, path: &str) -> Result<Member, TypeError> {
        let mut error = None;
        for id in self.named(structure) {
            // Several structures of one name are rare, and then in unrelated
            // files: the first that has the member is meant.
            match self.0.follow(id, structure, path) {
                Ok(place) => return self.0.describe(place),
                Err(other) => error = error.or(Some(other)),
            }
        }
        Err(error.unwrap_or_else(|| unknown_type(structure)))
    }

    /// Whether the structure has a member at `path`.
    pub fn has(&self, structure: &str, path: &str) -> bool {
        self.member(structure, path).is_ok()
    }

    /// Whether there is a type of that name.
    pub fn has_type(&self, name: &str) -> bool {
        self.named(name).next().is_some()
    }

    /// The value of one enumerator of a named enumeration.
    ///
    /// # Errors
    /// [`TypeError`] if there is no such enumeration or enumerator.
    pub fn enumerator(&self, enumeration: &str, name: &str) -> Result<i64, TypeError> {
        let all = self.enumerators(enumeration)?;
        all.into_iter()
            .find(|(other, _)| other == name)
            .map(|(_, value)| value)
            .ok_or_else(|| TypeError::NoEnumerator {
                enumeration: enumeration.to_owned(),
                name: name.to_owned(),
            })
    }

    /// All enumerators of a named enumeration, in the order of the source.
    ///
    /// # Errors
    /// [`TypeError`] if there is no such enumeration.
    pub fn enumerators(&self, enumeration: &str) -> Result<Vec<(String, i64)>, TypeError> {
        let mut error = unknown_type(enumeration);
        for id in self.named(enumeration) {
            match self.enumerators_of(TypeId(id)) {
                Ok(all) => return Ok(all),
                Err(other) => error = other,
            }
        }
        Err(error)
    }

    /// The value of the first enumerator of that name in any enumeration,
    /// named or not. This looks at all types: ask once.
    pub fn any_enumerator(&self, name: &str) -> Option<i64> {
        let inner = &self.0;
        for index in 0..inner.blob.len() {
            let Some(record) = inner.blob.record(index) else {
                continue;
            };
            for (name_offset, value) in record.enumerators(inner.signs_known()) {
                if inner.string(name_offset) == Ok(name.as_bytes()) {
                    return Some(value);
                }
            }
        }
        inner.base.as_ref()?.any_enumerator(name)
    }

    /// All named types, the base's first.
    pub fn iter(&self) -> impl Iterator<Item = NamedType<'_>> {
        let chain = [self.0.base.as_ref(), Some(self)];
        chain.into_iter().flatten().flat_map(|types| {
            let inner = &types.0;
            (0..inner.blob.len()).filter_map(|index| {
                let record = inner.blob.record(index)?;
                let kind = match record.kind {
                    Kind::Integer => TypeKind::Integer,
                    Kind::Float => TypeKind::Float,
                    Kind::Structure => TypeKind::Structure,
                    Kind::Union => TypeKind::Union,
                    Kind::Enumeration | Kind::Enumeration64 => TypeKind::Enumeration,
                    Kind::Typedef => TypeKind::Typedef,
                    _ => return None,
                };
                let name = inner.string(record.name_offset).ok()?;
                let id = inner.first_id.checked_add(index as u32)?;
                (!name.is_empty()).then(|| NamedType {
                    name: String::from_utf8_lossy(name),
                    kind,
                    size: inner.size(id).ok(),
                    id: TypeId(id),
                })
            })
        })
    }

    /// The direct members of a structure or union, empty for other types.
    ///
    /// # Errors
    /// [`TypeError`] if a member leads to something that is no type.
    pub fn members_of(&self, id: TypeId) -> Result<Vec<NamedMember>, TypeError> {
        let inner = &self.0;
        let record = inner.record(inner.resolve(id.0)?)?;
        record
            .members()
            .map(|member| {
                let name = inner.string(member.name_offset)?;
                let name = (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned());
                let member = inner.describe(Place {
                    type_id: member.type_id,
                    bit_offset: member.bit_offset.into(),
                    bit_size: member.bit_size,
                })?;
                Ok(NamedMember { name, member })
            })
            .collect()
    }

    /// The enumerators of an enumeration (or a typedef of one).
    ///
    /// # Errors
    /// [`TypeError`] if the type is no enumeration.
    pub fn enumerators_of(&self, id: TypeId) -> Result<Vec<(String, i64)>, TypeError> {
        let inner = &self.0;
        let id = inner.resolve(id.0)?;
        let record = inner.record(id)?;
        if !matches!(record.kind, Kind::Enumeration | Kind::Enumeration64) {
            let name = format!("enum {}", inner.name_of(id));
            return Err(TypeError::UnknownType { name });
        }
        record
            .enumerators(inner.signs_known())
            .map(|(name_offset, value)| {
                let name = String::from_utf8_lossy(inner.string(name_offset)?);
                Ok((name.into_owned(), value))
            })
            .collect()
    }

    /// The ids of all types of that name: own ones before the base's,
    /// structures and unions before typedefs before the rest.
    fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = u32> + 'a {
        let (name, wanted) = match name.split_once(' ') {
            Some(("struct", rest)) => (rest, Some(Kind::Structure)),
            Some(("union", rest)) => (rest, Some(Kind::Union)),
            Some(("enum", rest)) => (rest, Some(Kind::Enumeration)),
            _ => (name, None),
        };
        let own = self.0.named(name, wanted);
        let base = self.0.base.as_ref().map(|base| base.0.named(name, wanted));
        own.into_iter()
            .chain(base.into_iter().flatten())
            .take(MAXIMUM_NAMESAKES)
    }
}

impl Inner {
    fn named(&self, name: &str, wanted: Option<Kind>) -> Vec<u32> {
        let key = hash(name.as_bytes());
        let start = self.names.partition_point(|(hash, _)| *hash < key);
        let mut found: Vec<(u8, u32)> = self.names[start..]
            .iter()
            .take_while(|(hash, _)| *hash == key)
            .filter_map(|(_, index)| {
                let record = self.blob.record(*index as usize)?;
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
                Some((rank, self.first_id.checked_add(*index)?))
            })
            .collect();
        found.sort_unstable();
        found.into_iter().map(|(_, id)| id).collect()
    }

    fn signs_known(&self) -> bool {
        self.blob.signs_known() || self.base.as_ref().is_some_and(|base| base.0.signs_known())
    }

    fn string(&self, offset: u32) -> Result<&[u8], TypeError> {
        match &self.base {
            Some(base) if offset < self.first_string => base.0.string(offset),
            _ => self.blob.string(offset.saturating_sub(self.first_string)),
        }
    }

    fn record(&self, id: u32) -> Result<Record<'_>, TypeError> {
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
    fn resolve(&self, mut id: u32) -> Result<u32, TypeError> {
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

    fn size(&self, id: u32) -> Result<u64, TypeError> {
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
    fn follow(&self, id: u32, structure: &str, path: &str) -> Result<Place, TypeError> {
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

    fn describe(&self, place: Place) -> Result<Member, TypeError> {
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
    fn name_of(&self, id: u32) -> String {
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

fn unknown_type(name: &str) -> TypeError {
    TypeError::UnknownType {
        name: name.to_owned(),
    }
}

/// FNV-1a, 32 bits: names are short, and equal hashes are told apart by name.
fn hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests;
