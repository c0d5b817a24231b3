//! The BPF Type Format as bytes: splitting a blob into its type records and
//! strings.
//!
//! Source of the format: the kernel's `include/uapi/linux/btf.h` and
//! `Documentation/bpf/btf.rst`. A blob comes out of guest memory: lengths and
//! offsets are checked once here, references between types and to strings
//! wherever they are followed.
//!
//! What the records mean together (sizes, paths to members) is
//! [`Types`](super::Types)'s business.

use std::ops::Range;

use secmon_memory::Buffer;

use super::TypeError;

/// The first two bytes of a blob, little-endian.
pub(crate) const MAGIC: u16 = 0xeb9f;
/// Bytes of the header in every version so far; later ones append to it.
pub(crate) const HEADER_LENGTH: usize = 24;
/// More than any kernel's blob: distributions' are 4 to 12 MiB.
pub const MAXIMUM_BTF_LENGTH: usize = 64 << 20;

/// Why bytes are not a usable BTF blob.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// Fewer bytes than a header.
    #[error("BTF of {length} bytes is shorter than its header")]
    TooShort {
        /// The bytes there are.
        length: usize,
    },
    /// More bytes than is taken from a guest.
    #[error("BTF of {length} bytes is longer than the {MAXIMUM_BTF_LENGTH} bytes accepted")]
    TooLong {
        /// The bytes there are.
        length: usize,
    },
    /// Not the magic number, or a version nobody has written yet.
    #[error("BTF header starts with magic {magic:#06x} version {version}, not 0xeb9f version 1")]
    Magic {
        /// The first two bytes.
        magic: u16,
        /// The third byte.
        version: u8,
    },
    /// A section that lies outside of the blob.
    #[error(
        "BTF {section} section at {start:#x} of {length:#x} bytes exceeds the blob's {available:#x}"
    )]
    Section {
        /// `header`, `type`, `string` or `layout`.
        section: &'static str,
        /// Its offset from the blob's first byte.
        start: u64,
        /// Its length as the header says it.
        length: u64,
        /// The bytes there are.
        available: usize,
    },
    /// The strings do not start and end with a zero byte.
    #[error("BTF string section does not start and end with a zero byte")]
    Strings,
    /// A type record that is cut off or of a kind nobody has written yet.
    #[error("BTF type {id} at offset {offset:#x} of the type section: {reason}")]
    Type {
        /// The record's type id.
        id: u32,
        /// Where it starts in the type section.
        offset: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// What a type record describes (`BTF_KIND_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Type id 0, which has no record.
    Void = 0,
    Integer = 1,
    Pointer = 2,
    Array = 3,
    Structure = 4,
    Union = 5,
    Enumeration = 6,
    Forward = 7,
    Typedef = 8,
    Volatile = 9,
    Const = 10,
    Restrict = 11,
    Function = 12,
    FunctionPrototype = 13,
    Variable = 14,
    DataSection = 15,
    Float = 16,
    DeclarationTag = 17,
    TypeTag = 18,
    Enumeration64 = 19,
    /// A kind from a later kernel whose length the layout section gave.
    Unknown = 127,
}

impl Kind {
    fn new(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Integer,
            2 => Self::Pointer,
            3 => Self::Array,
            4 => Self::Structure,
            5 => Self::Union,
            6 => Self::Enumeration,
            7 => Self::Forward,
            8 => Self::Typedef,
            9 => Self::Volatile,
            10 => Self::Const,
            11 => Self::Restrict,
            12 => Self::Function,
            13 => Self::FunctionPrototype,
            14 => Self::Variable,
            15 => Self::DataSection,
            16 => Self::Float,
            17 => Self::DeclarationTag,
            18 => Self::TypeTag,
            19 => Self::Enumeration64,
            _ => return None,
        })
    }

    /// Bytes after the common 12: fixed, and for each of `vlen` elements.
    const fn extra(self) -> (usize, usize) {
        match self {
            Self::Integer | Self::Variable | Self::DeclarationTag => (4, 0),
            Self::Array => (12, 0),
            Self::Structure | Self::Union | Self::DataSection | Self::Enumeration64 => (0, 12),
            Self::Enumeration | Self::FunctionPrototype => (0, 8),
            _ => (0, 0),
        }
    }

    /// Whether a name of this kind stands for a type of its own, rather than
    /// for a function, a variable or a promise of a type.
    pub(crate) const fn is_named_type(self) -> bool {
        matches!(
            self,
            Self::Integer
                | Self::Float
                | Self::Structure
                | Self::Union
                | Self::Enumeration
                | Self::Enumeration64
                | Self::Typedef
        )
    }
}

/// One type record, its strings not yet looked up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record<'a> {
    pub name_offset: u32,
    pub kind: Kind,
    /// The meaning depends on the kind: see `BTF_INFO_KFLAG`.
    pub kind_flag: bool,
    /// The size of the type in bytes, or the id of another type.
    pub size_or_type: u32,
    /// What follows the common 12 bytes.
    pub extra: &'a [u8],
}

/// A member of a structure or union.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawMember {
    pub name_offset: u32,
    pub type_id: u32,
    /// From the start of the structure.
    pub bit_offset: u32,
    /// 0: no bit field, or one that only its integer type tells of.
    pub bit_size: u8,
}

impl<'a> Record<'a> {
    /// The members, if this is a structure or union.
    pub(crate) fn members(&self) -> impl Iterator<Item = RawMember> + use<'a> {
        let kind_flag = self.kind_flag;
        let bytes = match self.kind {
            Kind::Structure | Kind::Union => self.extra,
            _ => &[],
        };
        bytes.as_chunks::<12>().0.iter().map(move |bytes| {
            let [name_offset, type_id, offset] = words(bytes);
            let (bit_offset, bit_size) = match kind_flag {
                true => (offset & 0x00ff_ffff, (offset >> 24) as u8),
                false => (offset, 0),
            };
            RawMember {
                name_offset,
                type_id,
                bit_offset,
                bit_size,
            }
        })
    }

    /// Name offsets and values, if this is an enumeration. `signs_known` is
    /// [`Blob::signs_known`].
    pub(crate) fn enumerators(
        &self,
        signs_known: bool,
    ) -> impl Iterator<Item = (u32, i64)> + use<'a> {
        let signed = self.kind_flag || !signs_known;
        let (small, large) = match self.kind {
            Kind::Enumeration => (self.extra, &[][..]),
            Kind::Enumeration64 => (&[][..], self.extra),
            _ => (&[][..], &[][..]),
        };
        let small = small.as_chunks::<8>().0.iter().map(move |bytes| {
            let [name_offset, value] = words(bytes);
            let value = match signed {
                true => i64::from(value.cast_signed()),
                false => i64::from(value),
            };
            (name_offset, value)
        });
        let large = large.as_chunks::<12>().0.iter().map(|bytes| {
            let [name_offset, low, high] = words(bytes);
            let value = u64::from(low) | u64::from(high) << 32;
            (name_offset, value.cast_signed())
        });
        small.chain(large)
    }

    /// Element type and count, if this is an array.
    pub(crate) fn array(&self) -> Option<(u32, u32)> {
        if self.kind != Kind::Array {
            return None;
        }
        let [element, _index, count] = words(self.extra.first_chunk::<12>()?);
        Some((element, count))
    }

    /// `BTF_INT_ENCODING`, `_OFFSET` and `_BITS`, if this is an integer.
    pub(crate) fn integer(&self) -> Option<Integer> {
        if self.kind != Kind::Integer {
            return None;
        }
        let [value] = words(self.extra.first_chunk::<4>()?);
        Some(Integer {
            signed: value & 1 << 24 != 0,
            bit_offset: (value >> 16) as u8,
            bits: value as u8,
        })
    }
}

/// What an integer record says beyond its size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Integer {
    pub signed: bool,
    pub bit_offset: u8,
    pub bits: u8,
}

/// The little-endian words of `bytes`, as many as `WORDS` asks for.
fn words<const WORDS: usize>(bytes: &[u8]) -> [u32; WORDS] {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

/// Records from one noted start to the next: few questions are asked of a blob,
/// and each walks over these.
const STRIDE: usize = 8;
/// More than the longest name of a type or member.
const MAXIMUM_STRING: usize = 4096;

/// A blob whose records have been found and lie inside of it.
#[derive(Debug)]
pub(crate) struct Blob {
    bytes: Buffer,
    types: Range<usize>,
    strings: Range<usize>,
    /// Where each [`STRIDE`]th record starts in the type section.
    starts: Vec<u32>,
    /// How many records there are.
    count: usize,
    /// The layout section's rows: fixed and per-element extra bytes by kind.
    layout: Vec<(u8, u8)>,
    signs_known: bool,
}

/// The lengths a header promises, checked for nothing but themselves.
pub(crate) struct Header {
    pub types: Range<usize>,
    pub strings: Range<usize>,
    pub layout: Range<usize>,
}

impl Header {
    /// Reads the header at the start of `bytes`; sections may lie beyond
    /// `available` bytes only at the price of an error.
    pub(crate) fn parse(bytes: &[u8], available: usize) -> Result<Self, BtfError> {
        let Some(first) = bytes.first_chunk::<HEADER_LENGTH>() else {
            let length = bytes.len();
            return Err(BtfError::TooShort { length });
        };
        let [start, length, types, type_length, strings, string_length] = words(first);
        let (magic, version) = (start as u16, (start >> 16) as u8);
        if magic != MAGIC || version != 1 {
            return Err(BtfError::Magic { magic, version });
        }
        if (length as usize) < HEADER_LENGTH || length as usize > bytes.len().min(4096) {
            return Err(BtfError::Section {
                section: "header",
                start: 0,
                length: length.into(),
                available: bytes.len(),
            });
        }
        let section = |section, offset: u32, size: u32| {
            let start = u64::from(length) + u64::from(offset);
            let end = start + u64::from(size);
            if end > available as u64 {
                return Err(BtfError::Section {
                    section,
                    start,
                    length: size.into(),
                    available,
                });
            }
            Ok(start as usize..end as usize)
        };
        // A later header says, for each kind, how long its records are.
        let [layout, layout_length] = match bytes.get(HEADER_LENGTH..length as usize) {
            Some(more) if more.len() >= 8 => words(more),
            _ => [0, 0],
        };
        Ok(Self {
            types: section("type", types, type_length)?,
            strings: section("string", strings, string_length)?,
            layout: section("layout", layout, layout_length)?,
        })
    }

    /// The bytes of the whole blob.
    pub(crate) fn end(&self) -> usize {
        self.types.end.max(self.strings.end).max(self.layout.end)
    }
}

impl Blob {
    /// Whether both were made of the same bytes.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.signs_known == other.signs_known && *self.bytes == *other.bytes
    }

    /// Takes `bytes` apart. `first_id` is the id of the first record (1, or
    /// for a module's blob the one after its base's last), for messages.
    ///
    /// `each_name` is called with the strings, and the name offset and index
    /// of every record that stands for a type of its own and has a name.
    pub(crate) fn parse(
        bytes: Buffer,
        first_id: u32,
        mut each_name: impl FnMut(&[u8], u32, u32),
    ) -> Result<Self, BtfError> {
        let length = bytes.len();
        if length > MAXIMUM_BTF_LENGTH {
            return Err(BtfError::TooLong { length });
        }
        let header = Header::parse(&bytes, length)?;
        let strings = &bytes[header.strings.clone()];
        // A module's strings follow the kernel's: they need not start with the
        // empty one, and there may be none.
        let is_module = first_id != 1;
        let starts = is_module || strings.first() == Some(&0);
        let ends = strings.last() == Some(&0) || (is_module && strings.is_empty());
        if !starts || !ends {
            return Err(BtfError::Strings);
        }
        let layout: Vec<(u8, u8)> = bytes[header.layout.clone()]
            .as_chunks::<4>()
            .0
            .iter()
            .map(|row| (row[0], row[1]))
            .collect();
        let types = &bytes[header.types.clone()];
        let mut starts = Vec::with_capacity(types.len() / (16 * STRIDE));
        let mut count = 0;
        let mut signs_known = false;
        let mut offset = 0;
        while offset < types.len() {
            let error = |reason| BtfError::Type {
                id: first_id.saturating_add(count as u32),
                offset,
                reason,
            };
            let length = record_length(&types[offset..], &layout).map_err(error)?;
            if length > types.len() - offset {
                return Err(error("the record runs over the end of the section"));
            }
            let [name_offset, info, _] = words(&types[offset..]);
            if let Some(kind) = Kind::new(kind_number(info)) {
                signs_known |= kind == Kind::Enumeration && info >> 31 != 0;
                if kind.is_named_type() && name_offset != 0 {
                    each_name(strings, name_offset, count as u32);
                }
            }
            if count % STRIDE == 0 {
                starts.push(offset as u32);
            }
            count += 1;
            offset += length;
        }
        Ok(Self {
            bytes,
            types: header.types,
            strings: header.strings,
            starts,
            count,
            layout,
            signs_known,
        })
    }

    /// Whether the kind flag of an enumeration says that its values are
    /// signed. It does so from 6.0 on; before, the flag is never set and
    /// values are signed. Some enumeration of every kernel has a negative
    /// value, so one flag set anywhere tells the two apart.
    pub(crate) fn signs_known(&self) -> bool {
        self.signs_known
    }

    /// How many records there are.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// The bytes of strings.
    pub(crate) fn string_length(&self) -> u32 {
        self.strings.len() as u32
    }

    /// The whole blob as it was given.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The `index`th record.
    pub(crate) fn record(&self, index: usize) -> Option<Record<'_>> {
        if index >= self.count {
            return None;
        }
        let types = self.bytes.get(self.types.clone())?;
        let mut bytes = types.get(*self.starts.get(index / STRIDE)? as usize..)?;
        for _ in 0..index % STRIDE {
            bytes = bytes.get(record_length(bytes, &self.layout).ok()?..)?;
        }
        let [name_offset, info, size_or_type] = words(bytes.first_chunk::<12>()?);
        let length = record_length(bytes, &self.layout).ok()?;
        Some(Record {
            name_offset,
            kind: Kind::new(kind_number(info)).unwrap_or(Kind::Unknown),
            kind_flag: info >> 31 != 0,
            size_or_type,
            extra: bytes.get(12..length)?,
        })
    }

    /// The string at `offset` of the string section, without its zero byte.
    pub(crate) fn string(&self, offset: u32) -> Result<&[u8], TypeError> {
        let damaged = TypeError::Damaged {
            reason: "a name lies outside of the string section or has no end",
        };
        let bytes = self
            .bytes
            .get(self.strings.clone())
            .and_then(|strings| strings.get(offset as usize..));
        let Some(bytes) = bytes else {
            return Err(damaged);
        };
        let bytes = bytes.get(..MAXIMUM_STRING).unwrap_or(bytes);
        let end = memchr::memchr(0, bytes).ok_or(damaged)?;
        Ok(&bytes[..end])
    }
}

/// Bits 24 to 30 of a record's info word. Kernels before 7.1 use bits 24 to 28
/// and require the others to be zero.
const fn kind_number(info: u32) -> u8 {
    (info >> 24) as u8 & 0x7f
}

/// The bytes of the record at the start of `bytes`.
fn record_length(bytes: &[u8], layout: &[(u8, u8)]) -> Result<usize, &'static str> {
    let Some(common) = bytes.first_chunk::<12>() else {
        return Err("the record is cut off");
    };
    let [_, info, _] = words(common);
    let number = kind_number(info);
    // Kernels before 7.1 use bits 0 to 15 and require the rest to be zero.
    let elements = (info & 0x00ff_ffff) as usize;
    let (fixed, each) = match Kind::new(number) {
        Some(kind) => kind.extra(),
        None => match layout.get(usize::from(number)) {
            Some((fixed, each)) if number != 0 => (usize::from(*fixed), usize::from(*each)),
            _ => return Err("the record is of an unknown kind"),
        },
    };
    // At most 12 + 255 + 2^24 * 255: no overflow in 64 bits.
    Ok(12 + fixed + each * elements)
}
