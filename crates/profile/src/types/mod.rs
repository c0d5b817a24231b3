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
pub(crate) mod export;
mod names;
mod path;
mod resolve;

use std::borrow::Cow;
use std::sync::Arc;

use secmon_memory::Buffer;

pub use btf::{BtfError, MAXIMUM_BTF_LENGTH};
pub(crate) use btf::{HEADER_LENGTH, Header, Kind};

use btf::Blob;
use names::{NameIndex, hash_terminated};
use resolve::{Inner, Place};

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

impl Types {
    /// Reads a kernel's BTF blob.
    ///
    /// # Errors
    /// [`BtfError`] if any record or section does not fit the blob.
    pub fn parse(bytes: impl Into<Buffer>) -> Result<Self, BtfError> {
        Self::build(bytes.into(), None)
    }

    /// Whether both are a kernel's own types, made of the same bytes.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let (own, other) = (&self.0, &other.0);
        own.base.is_none() && other.base.is_none() && own.blob.is_same(&other.blob)
    }

    /// Reads a module's BTF blob, whose ids and strings go on where those of
    /// `self` end.
    ///
    /// # Errors
    /// [`BtfError`] if any record or section does not fit the blob.
    pub fn parse_module(&self, bytes: impl Into<Buffer>) -> Result<Self, BtfError> {
        Self::build(bytes.into(), Some(self.clone()))
    }

    fn build(bytes: Buffer, base: Option<Self>) -> Result<Self, BtfError> {
        let (first_id, first_string) = base.as_ref().map_or((1, 0), |base| {
            let inner = &base.0;
            (
                inner.first_id.saturating_add(inner.blob.len() as u32),
                inner
                    .first_string
                    .saturating_add(inner.blob.string_length()),
            )
        });
        let mut names = NameIndex::new(bytes.len() / 160);
        let blob = Blob::parse(bytes, first_id, |strings, name, record| {
            // A name that can't be read can't be asked for either.
            let hash = match &base {
                Some(base) if name < first_string => {
                    let name = base.0.string(name).ok();
                    name.map(names::hash)
                }
                _ => strings
                    .get(name.saturating_sub(first_string) as usize..)
                    .and_then(hash_terminated),
            };
            if let Some(hash) = hash {
                names.insert(hash, record);
            }
        })?;
        Ok(Self(Arc::new(Inner {
            blob,
            base,
            first_id,
            first_string,
            names,
        })))
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

    /// The direct members of the structure or union of that name.
    ///
    /// # Errors
    /// [`TypeError`] if there is none, or a member leads to something that is no
    /// type.
    pub fn members(&self, structure: &str) -> Result<Vec<NamedMember>, TypeError> {
        let id = self.named(structure).next();
        self.members_of(TypeId(id.ok_or_else(|| unknown_type(structure))?))
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

fn unknown_type(name: &str) -> TypeError {
    TypeError::UnknownType {
        name: name.to_owned(),
    }
}

#[cfg(test)]
mod tests;
