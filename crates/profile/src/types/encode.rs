//! Writes BTF blobs: an ISF file is turned into one, and tests make their own.

use std::collections::HashMap;

use super::btf::{HEADER_LENGTH, Kind, MAGIC};

/// A member to be written.
#[derive(Clone, Debug)]
pub(crate) struct NewMember {
    pub name: String,
    pub type_id: u32,
    pub bit_offset: u32,
    /// 0 for a member that is no bit field.
    pub bit_size: u8,
}

/// A blob under construction. Ids are given out in order, from 1 on.
#[derive(Debug)]
pub(crate) struct Encoder {
    types: Vec<u8>,
    strings: Vec<u8>,
    offsets: HashMap<String, u32>,
    records: u32,
    first_id: u32,
    first_string: u32,
}

impl Encoder {
    /// An empty kernel blob.
    pub(crate) fn new() -> Self {
        Self {
            types: Vec::new(),
            strings: vec![0],
            offsets: HashMap::new(),
            records: 0,
            first_id: 1,
            first_string: 0,
        }
    }

    fn string(&mut self, string: &str) -> u32 {
        let string = string.split('\0').next().unwrap_or_default();
        if string.is_empty() {
            return 0;
        }
        if let Some(offset) = self.offsets.get(string) {
            return *offset;
        }
        let offset = self.first_string + self.strings.len() as u32;
        self.strings.extend_from_slice(string.as_bytes());
        self.strings.push(0);
        self.offsets.insert(string.to_owned(), offset);
        offset
    }

    fn words(&mut self, words: &[u32]) {
        for word in words {
            self.types.extend_from_slice(&word.to_le_bytes());
        }
    }

    /// Writes a record's common part and gives its id.
    fn record(&mut self, name: &str, kind: Kind, flag: bool, elements: usize, last: u32) -> u32 {
        let name = self.string(name);
        let info = (kind as u32) << 24 | u32::from(flag) << 31 | elements as u32 & 0xffff;
        self.words(&[name, info, last]);
        self.records += 1;
        self.first_id + self.records - 1
    }

    /// An integer of `size` bytes.
    pub(crate) fn integer(&mut self, name: &str, size: u32, signed: bool) -> u32 {
        let id = self.record(name, Kind::Integer, false, 0, size);
        self.words(&[u32::from(signed) << 24 | (size * 8).min(128)]);
        id
    }

    /// A floating-point type of `size` bytes.
    pub(crate) fn float(&mut self, name: &str, size: u32) -> u32 {
        self.record(name, Kind::Float, false, 0, size)
    }

    /// A type that is another one's id with a meaning: a pointer, a typedef
    /// (which has a name), a qualifier.
    pub(crate) fn reference(&mut self, kind: Kind, name: &str, type_id: u32) -> u32 {
        self.record(name, kind, false, 0, type_id)
    }

    /// An array.
    pub(crate) fn array(&mut self, element: u32, count: u32) -> u32 {
        let id = self.record("", Kind::Array, false, 0, 0);
        self.words(&[element, element, count]);
        id
    }

    /// A structure or union.
    pub(crate) fn structure(
        &mut self,
        kind: Kind,
        name: &str,
        size: u32,
        members: &[NewMember],
    ) -> u32 {
        let members = &members[..members.len().min(0xffff)];
        let flag = members.iter().any(|member| member.bit_size != 0);
        let names: Vec<u32> = members
            .iter()
            .map(|member| self.string(&member.name))
            .collect();
        let id = self.record(name, kind, flag, members.len(), size);
        for (member, name) in members.iter().zip(names) {
            let offset = match flag {
                true => member.bit_offset & 0x00ff_ffff | u32::from(member.bit_size) << 24,
                false => member.bit_offset,
            };
            self.words(&[name, member.type_id, offset]);
        }
        id
    }

    /// An enumeration; it is written as a 64-bit one if a value needs it.
    pub(crate) fn enumeration(&mut self, name: &str, size: u32, values: &[(String, i64)]) -> u32 {
        let values = &values[..values.len().min(0xffff)];
        let signed = values.iter().any(|(_, value)| *value < 0);
        let fits = |value: &i64| match signed {
            true => i32::try_from(*value).is_ok(),
            false => u32::try_from(*value).is_ok(),
        };
        let small = values.iter().all(|(_, value)| fits(value));
        let names: Vec<u32> = values.iter().map(|(name, _)| self.string(name)).collect();
        let kind = match small {
            true => Kind::Enumeration,
            false => Kind::Enumeration64,
        };
        let id = self.record(name, kind, signed, values.len(), size);
        for ((_, value), name) in values.iter().zip(names) {
            match small {
                true => self.words(&[name, *value as u32]),
                false => self.words(&[name, *value as u32, (*value >> 32) as u32]),
            }
        }
        id
    }

    /// The whole blob.
    pub(crate) fn finish(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LENGTH + self.types.len() + self.strings.len());
        bytes.extend_from_slice(&MAGIC.to_le_bytes());
        bytes.extend_from_slice(&[1, 0]);
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        for word in [HEADER_LENGTH as u32, 0, types, types, strings] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&self.types);
        bytes.extend_from_slice(&self.strings);
        bytes
    }
}

#[cfg(test)]
impl Encoder {
    /// An empty blob of a module, to go on where `base` ends.
    pub(crate) fn on_top_of(base: &Self) -> Self {
        Self {
            strings: Vec::new(),
            first_id: base.first_id + base.records,
            first_string: base.first_string + base.strings.len() as u32,
            ..Self::new()
        }
    }

    /// An integer that is a bit field by its own encoding, as before 4.20.
    pub(crate) fn bit_integer(&mut self, name: &str, size: u32, offset: u8, bits: u8) -> u32 {
        let id = self.record(name, Kind::Integer, false, 0, size);
        self.words(&[u32::from(offset) << 16 | u32::from(bits)]);
        id
    }
}
