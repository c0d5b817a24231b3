//! Volatility's intermediate symbol format: types and symbols of a kernel as
//! JSON, maybe compressed with xz, as `dwarf2json` writes it.
//!
//! It stands in where a kernel has no usable BTF. The file's types become a
//! BTF blob, so that everything above reads one format; its symbols are used
//! only if the guest's own table can't be found, as the guest's says where
//! things are, the file only where they were linked.
//!
//! Source of the format: volatility3's `schemas/schema-6.2.0.json`.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use secmon_memory::VirtualAddress;
use serde::Deserialize;

use crate::tables::START_KERNEL_MAP;
use crate::types::encode::{Encoder, NewMember};
use crate::types::{Kind, Types};
use crate::{BtfError, Symbols};

/// More than any file: a distribution's is 30 to 60 MiB of JSON.
const MAXIMUM_JSON: u64 = 1 << 30;
/// How an xz file starts.
const XZ_MAGIC: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];
/// Memory the decompressor may take, in KiB: xz's highest level needs 65 MiB.
const XZ_MEMORY: u32 = 128 << 10;
/// Symbols that every kernel has, to tell one build from another.
const LANDMARKS: [&str; 5] = [
    "linux_banner",
    "init_task",
    "init_uts_ns",
    "init_net",
    "init_top_pgt",
];

/// Why an ISF file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum IsfError {
    /// It can't be read.
    #[error("reading {path:?}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's words, or the decompressor's.
        source: io::Error,
    },
    /// It is not JSON of this format.
    #[error("{path:?} is not an ISF file: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Its types make no sense.
    #[error("the types of {path:?}: {source}")]
    Types {
        /// The file.
        path: PathBuf,
        /// What is wrong with them.
        source: BtfError,
    },
    /// It is of another kernel.
    #[error(
        "{path:?} is of the kernel {expected:?}, the guest runs {found:?}: give the file made for that one"
    )]
    OtherBanner {
        /// The file.
        path: PathBuf,
        /// The banner in the file.
        expected: String,
        /// The guest's banner.
        found: String,
    },
    /// It is of another build.
    #[error(
        "{path:?} is of another build than the guest's kernel: its {symbol} lies {expected:#x} \
         bytes from _text, the guest's {found:#x}"
    )]
    OtherBuild {
        /// The file.
        path: PathBuf,
        /// A symbol that both have.
        symbol: &'static str,
        /// Its distance from `_text` in the file.
        expected: u64,
        /// Its distance from `_text` in the guest.
        found: u64,
    },
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    base_types: BTreeMap<String, BaseType>,
    #[serde(default)]
    user_types: BTreeMap<String, UserType>,
    #[serde(default)]
    enums: BTreeMap<String, Enumeration>,
    #[serde(default)]
    symbols: BTreeMap<String, Symbol>,
}

#[derive(Deserialize)]
struct BaseType {
    #[serde(default)]
    size: u32,
    #[serde(default)]
    signed: bool,
    #[serde(default)]
    kind: String,
}

#[derive(Deserialize)]
struct UserType {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    size: u32,
    #[serde(default)]
    fields: BTreeMap<String, Field>,
}

#[derive(Deserialize)]
struct Field {
    #[serde(rename = "type")]
    kind: Descriptor,
    #[serde(default)]
    offset: u32,
    #[serde(default)]
    anonymous: bool,
}

#[derive(Deserialize)]
struct Enumeration {
    #[serde(default)]
    size: u32,
    #[serde(default)]
    constants: BTreeMap<String, serde_json::Number>,
}

#[derive(Deserialize)]
struct Symbol {
    #[serde(default)]
    address: u64,
    constant_data: Option<String>,
}

/// A type as a member or pointer refers to it.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Descriptor {
    Base {
        name: String,
    },
    #[serde(alias = "class")]
    Struct {
        name: String,
    },
    Union {
        name: String,
    },
    Enum {
        name: String,
    },
    Pointer {
        subtype: Option<Box<Descriptor>>,
    },
    Array {
        count: u32,
        subtype: Box<Descriptor>,
    },
    Bitfield {
        bit_position: u32,
        bit_length: u8,
        #[serde(rename = "type")]
        kind: Box<Descriptor>,
    },
    #[serde(other)]
    Function,
}

/// An ISF file that has been read.
#[derive(Debug)]
pub struct Isf {
    path: PathBuf,
    banner: Option<String>,
    types: Types,
    symbols: Vec<(String, u64, char)>,
    text: Option<u64>,
}

impl Isf {
    /// Reads the file, compressed or not.
    ///
    /// # Errors
    /// [`IsfError`] if it can't be read or is no such file.
    pub fn read(path: &Path) -> Result<Self, IsfError> {
        let read_error = |source| IsfError::Read {
            path: path.to_owned(),
            source,
        };
        let mut file = BufReader::new(File::open(path).map_err(read_error)?);
        let mut start = [0; XZ_MAGIC.len()];
        let got = read_up_to(&mut file, &mut start).map_err(read_error)?;
        let whole = start[..got].chain(file);
        let limited: Box<dyn Read> = match start == XZ_MAGIC {
            true => Box::new(lzma_rust2::XzReader::new_mem_limit(whole, true, XZ_MEMORY)),
            false => Box::new(whole),
        };
        let mut json = Vec::new();
        limited
            .take(MAXIMUM_JSON)
            .read_to_end(&mut json)
            .map_err(read_error)?;
        Self::parse(path, &json)
    }

    /// Reads the JSON text; `path` is for messages.
    ///
    /// # Errors
    /// [`IsfError`] if it is no such text.
    pub fn parse(path: &Path, json: &[u8]) -> Result<Self, IsfError> {
        let path = path.to_owned();
        let document: Document = match serde_json::from_slice(json) {
            Ok(document) => document,
            Err(source) => return Err(IsfError::Json { path, source }),
        };
        let banner = document
            .symbols
            .get("linux_banner")
            .and_then(|symbol| decode_base64(symbol.constant_data.as_deref()?))
            .map(|bytes| {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                text.trim_end_matches(['\0', '\n']).to_owned()
            });
        let types = match Types::parse(encode(&document)) {
            Ok(types) => types,
            Err(source) => return Err(IsfError::Types { path, source }),
        };
        let text = document.symbols.get("_text").map(|symbol| symbol.address);
        let mut symbols: Vec<(String, u64, char)> = document
            .symbols
            .into_iter()
            .map(|(name, symbol)| (name, symbol.address, '?'))
            .collect();
        symbols.sort_by_key(|(_, address, _)| *address);
        Ok(Self {
            path,
            banner,
            types,
            symbols,
            text,
        })
    }

    /// The types.
    pub fn types(&self) -> &Types {
        &self.types
    }

    /// The banner of the kernel it was made for, where it says so.
    pub fn banner(&self) -> Option<&str> {
        self.banner.as_deref()
    }

    /// Refuses a guest whose banner is another one.
    pub(crate) fn check_banner(&self, found: &str) -> Result<(), IsfError> {
        match &self.banner {
            Some(expected) if expected != found => Err(IsfError::OtherBanner {
                path: self.path.clone(),
                expected: expected.clone(),
                found: found.to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// Refuses a guest whose symbols lie otherwise: another build can have
    /// the same banner.
    pub(crate) fn check_symbols(&self, symbols: &Symbols) -> Result<(), IsfError> {
        let (Some(text), Some(guest_text)) = (self.text, symbols.address("_text")) else {
            return Ok(());
        };
        for symbol in LANDMARKS {
            let own = self.symbols.iter().find(|(name, ..)| name == symbol);
            let (Some((_, own, _)), Some(guest)) = (own, symbols.address(symbol)) else {
                continue;
            };
            let expected = own.wrapping_sub(text);
            let found = guest.wrapping_sub(guest_text.as_u64()).as_u64();
            if expected != found {
                return Err(IsfError::OtherBuild {
                    path: self.path.clone(),
                    symbol,
                    expected,
                    found,
                });
            }
        }
        Ok(())
    }

    /// The symbols of a kernel whose `_text` lies at `base`: what lies in the
    /// image moves with it, per-CPU offsets don't.
    pub(crate) fn symbols(&self, base: VirtualAddress) -> Option<Symbols> {
        let slide = base.as_u64().wrapping_sub(self.text?);
        let slid: Vec<(String, u64, char)> = self
            .symbols
            .iter()
            .map(|(name, address, kind)| {
                let address = match *address {
                    START_KERNEL_MAP.. => address.wrapping_add(slide),
                    _ => *address,
                };
                (name.clone(), address, *kind)
            })
            .collect();
        Symbols::from_list(&slid).ok()
    }
}

fn read_up_to(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read(&mut buffer[got..])? {
            0 => break,
            count => got += count,
        }
    }
    Ok(got)
}

/// The bytes that `text` encodes, or `None` if it is no Base64 (RFC 4648).
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for character in text.trim_end_matches('=').bytes() {
        let value = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

/// Types that have no name of their own in the file: derived from others by
/// kind, the other's id and a count.
type Derived = (Kind, u32, u32);

/// Gives out ids: the named types first, in the order they will be written
/// in, then the derived ones as they are asked for.
struct Ids<'a> {
    named: HashMap<(Space, &'a str), u32>,
    derived: HashMap<Derived, u32>,
    queue: Vec<Derived>,
    next: u32,
}

/// The three lists of names in a file.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Space {
    Base,
    User,
    Enumeration,
}

impl Ids<'_> {
    fn derived(&mut self, key: Derived) -> u32 {
        let next = &mut self.next;
        let queue = &mut self.queue;
        *self.derived.entry(key).or_insert_with(|| {
            queue.push(key);
            *next += 1;
            *next - 1
        })
    }

    /// The id of a type; 0 (`void`) for what is not there.
    ///
    /// The recursion is bounded by the JSON parser's own limit of 128 levels.
    fn of(&mut self, descriptor: &Descriptor) -> u32 {
        let named = |space, name: &str| self.named.get(&(space, name)).copied().unwrap_or(0);
        match descriptor {
            Descriptor::Base { name } => named(Space::Base, name),
            Descriptor::Struct { name } | Descriptor::Union { name } => named(Space::User, name),
            Descriptor::Enum { name } => named(Space::Enumeration, name),
            Descriptor::Pointer { subtype } => {
                let target = subtype.as_ref().map_or(0, |subtype| self.of(subtype));
                self.derived((Kind::Pointer, target, 0))
            }
            Descriptor::Array { count, subtype } => {
                let element = self.of(subtype);
                self.derived((Kind::Array, element, *count))
            }
            Descriptor::Bitfield { kind, .. } => self.of(kind),
            Descriptor::Function => self.derived((Kind::FunctionPrototype, 0, 0)),
        }
    }
}

/// The document's types as a BTF blob.
fn encode(document: &Document) -> Vec<u8> {
    let mut ids = Ids {
        named: HashMap::new(),
        derived: HashMap::new(),
        queue: Vec::new(),
        next: 1,
    };
    let sized = |(_, base): &(&String, &BaseType)| base.kind != "void";
    let bases: Vec<_> = document.base_types.iter().filter(sized).collect();
    let names = bases
        .iter()
        .map(|(name, _)| (Space::Base, name.as_str()))
        .chain(
            document
                .enums
                .keys()
                .map(|name| (Space::Enumeration, name.as_str())),
        )
        .chain(
            document
                .user_types
                .keys()
                .map(|name| (Space::User, name.as_str())),
        );
    for name in names {
        ids.named.insert(name, ids.next);
        ids.next += 1;
    }
    // `dwarf2json` makes up names for types that have none.
    let own_name = |name: &str| match name.starts_with("unnamed_") {
        true => String::new(),
        false => name.to_owned(),
    };
    let mut encoder = Encoder::new();
    for (name, base) in bases {
        match base.kind.as_str() {
            "float" => encoder.float(name, base.size),
            _ => encoder.integer(name, base.size, base.signed),
        };
    }
    for (name, enumeration) in &document.enums {
        let values: Vec<(String, i64)> = enumeration
            .constants
            .iter()
            .filter_map(|(name, value)| {
                let value = value
                    .as_i64()
                    .or_else(|| value.as_u64().map(u64::cast_signed))?;
                Some((name.clone(), value))
            })
            .collect();
        encoder.enumeration(&own_name(name), enumeration.size, &values);
    }
    for (name, user) in &document.user_types {
        let kind = match user.kind.as_str() {
            "union" => Kind::Union,
            _ => Kind::Structure,
        };
        let members = members(user, &mut ids);
        encoder.structure(kind, &own_name(name), user.size, &members);
    }
    let mut position = 0;
    while let Some((kind, target, count)) = ids.queue.get(position).copied() {
        position += 1;
        match kind {
            Kind::Array => encoder.array(target, count),
            _ => encoder.reference(kind, "", target),
        };
    }
    encoder.finish()
}

/// The members of one type, in the order of their places.
fn members(user: &UserType, ids: &mut Ids<'_>) -> Vec<NewMember> {
    let mut members: Vec<NewMember> = user
        .fields
        .iter()
        .filter_map(|(name, field)| {
            let (bit_position, bit_size) = match &field.kind {
                Descriptor::Bitfield {
                    bit_position,
                    bit_length,
                    ..
                } => (*bit_position, *bit_length),
                _ => (0, 0),
            };
            let bit_offset = field.offset.checked_mul(8)?.checked_add(bit_position)?;
            let name = match field.anonymous {
                true => String::new(),
                false => name.clone(),
            };
            Some(NewMember {
                name,
                type_id: ids.of(&field.kind),
                bit_offset,
                bit_size,
            })
        })
        .collect();
    members.sort_by_key(|member| member.bit_offset);
    // With bit fields in it, a structure's offsets end at 2 MiB. No kernel has
    // such a structure; were there one, its bit fields would not be found.
    if members.iter().any(|member| member.bit_offset >= 1 << 24) {
        members.retain(|member| member.bit_size == 0);
    }
    members
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SAMPLE: &str = r#"{
        "metadata": {"format": "6.2.0"},
        "base_types": {
            "int": {"size": 4, "signed": true, "kind": "int", "endian": "little"},
            "char": {"size": 1, "signed": true, "kind": "char", "endian": "little"},
            "unsigned int": {"size": 4, "signed": false, "kind": "int", "endian": "little"},
            "void": {"size": 0, "signed": false, "kind": "void", "endian": "little"}
        },
        "user_types": {
            "task": {"kind": "struct", "size": 96, "fields": {
                "comm": {"type": {"kind": "array", "count": 16,
                    "subtype": {"kind": "base", "name": "char"}}, "offset": 32},
                "next": {"type": {"kind": "pointer",
                    "subtype": {"kind": "struct", "name": "task"}}, "offset": 8},
                "flag": {"type": {"kind": "bitfield", "bit_position": 3, "bit_length": 2,
                    "type": {"kind": "base", "name": "unsigned int"}}, "offset": 16},
                "call": {"type": {"kind": "pointer", "subtype": {"kind": "function"}}, "offset": 24},
                "unnamed_field_0": {"type": {"kind": "union", "name": "unnamed_1a2b"},
                    "offset": 48, "anonymous": true},
                "state": {"type": {"kind": "enum", "name": "state"}, "offset": 64}
            }},
            "unnamed_1a2b": {"kind": "union", "size": 8, "fields": {
                "pid": {"type": {"kind": "base", "name": "int"}, "offset": 0}
            }}
        },
        "enums": {"state": {"size": 4, "base": "int", "constants": {"DEAD": -1, "READY": 7}}},
        "symbols": {
            "_text": {"type": {"kind": "base", "name": "void"}, "address": 18446744071578845184},
            "linux_banner": {"type": {"kind": "base", "name": "void"},
                "address": 18446744071594967296, "constant_data": "TGludXggdmVyc2lvbiA5LjkuOQoA"},
            "per_cpu": {"type": {"kind": "base", "name": "void"}, "address": 4096}
        }
    }"#;

    fn sample() -> Isf {
        Isf::parse(Path::new("sample.json"), SAMPLE.as_bytes()).expect("a good file")
    }

    #[test]
    fn types_become_those_of_btf() {
        let isf = sample();
        let types = isf.types();
        assert_eq!(types.size_of("task"), Ok(96));
        let at = |path| types.member("task", path).expect(path);
        assert_eq!((at("comm").offset, at("comm").count), (32, Some(16)));
        assert_eq!(at("next").type_name, "struct task *");
        assert_eq!(at("pid").offset, 48);
        assert!(at("call").pointer);
        let flag = at("flag");
        assert_eq!((flag.offset, flag.bit_offset, flag.bit_size), (16, 3, 2));
        assert_eq!(types.enumerator("state", "DEAD"), Ok(-1));
        assert!(at("state").signed);
    }

    #[test]
    fn symbols_move_with_the_image() {
        let base = VirtualAddress::new(0xffff_ffff_9d00_0000);
        let symbols = sample().symbols(base).expect("it has _text");
        assert_eq!(symbols.address("_text"), Some(base));
        let banner = symbols.address("linux_banner");
        assert_eq!(
            banner,
            Some(base.wrapping_add(18446744071594967296 - 18446744071578845184))
        );
        assert_eq!(symbols.address("per_cpu"), Some(VirtualAddress::new(4096)));
    }

    #[test]
    fn another_kernels_file_is_refused() {
        let isf = sample();
        assert_eq!(isf.banner(), Some("Linux version 9.9.9"));
        assert!(isf.check_banner("Linux version 9.9.9").is_ok());
        let error = isf
            .check_banner("Linux version 9.9.8")
            .expect_err("not the same");
        let text = error.to_string();
        assert!(text.contains("9.9.9") && text.contains("9.9.8"), "{text}");
    }

    #[test]
    fn files_may_be_compressed() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let plain = folder.path().join("sample.json");
        std::fs::write(&plain, SAMPLE).expect("writing");
        let xz = std::process::Command::new("xz")
            .arg("-k")
            .arg(&plain)
            .status();
        assert!(xz.expect("the program xz: install xz-utils").success());
        for name in ["sample.json", "sample.json.xz"] {
            let isf = Isf::read(&folder.path().join(name)).expect(name);
            assert_eq!(isf.types().size_of("task"), Ok(96));
        }
        std::fs::write(folder.path().join("bad.xz"), XZ_MAGIC).expect("writing");
        let bad = Isf::read(&folder.path().join("bad.xz"));
        assert!(matches!(bad, Err(IsfError::Read { .. })));
    }

    #[test]
    fn base64() {
        assert_eq!(decode_base64("TWFu"), Some(b"Man".to_vec()));
        assert_eq!(decode_base64("TWE="), Some(b"Ma".to_vec()));
        assert_eq!(decode_base64("TQ=="), Some(b"M".to_vec()));
        assert_eq!(decode_base64("T-=="), None);
    }

    proptest! {
        #[test]
        fn changed_files_are_read_or_refused(
            changes in proptest::collection::vec((0..SAMPLE.len(), 32_u8..127), 1..6),
        ) {
            let mut text = SAMPLE.as_bytes().to_vec();
            for (position, byte) in changes {
                text[position] = byte;
            }
            if let Ok(isf) = Isf::parse(Path::new("changed"), &text) {
                let _ = isf.types().member("task", "pid");
                let _ = isf.symbols(VirtualAddress::new(0));
            }
        }
    }
}
