//! The symbols and type layouts of one kernel, and what it calls itself.

use std::fmt;

use crate::{BtfError, Symbols, Types};

/// The build id that the linker put into a kernel or module
/// (`NT_GNU_BUILD_ID`), usually 20 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BuildId(Vec<u8>);

impl BuildId {
    /// The longest build id that is taken from a guest (the kernel's
    /// `BUILD_ID_SIZE_MAX` is 20; linkers can write 32 bytes and more).
    pub const MAXIMUM_LENGTH: usize = 64;

    /// A build id of these bytes: `None` if there are none or too many.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        (1..=Self::MAXIMUM_LENGTH)
            .contains(&bytes.len())
            .then(|| Self(bytes.to_vec()))
    }

    /// The build id that `hex` writes out, in lower or upper case.
    pub fn from_hex(hex: &str) -> Option<Self> {
        if !hex.len().is_multiple_of(2) || !hex.is_ascii() {
            return None;
        }
        let bytes: Option<Vec<u8>> = (0..hex.len() / 2)
            .map(|index| {
                let digits = hex.get(index * 2..index * 2 + 2)?;
                let valid = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
                valid.then_some(())?;
                u8::from_str_radix(digits, 16).ok()
            })
            .collect();
        Self::new(&bytes?)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Why there are no types for a kernel. Symbols, and what needs nothing but
/// them, work all the same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// The kernel carries no BTF.
    #[error(
        "this kernel carries no type information (BTF: it was built without \
         CONFIG_DEBUG_INFO_BTF); give an ISF file made for it"
    )]
    NoBtf,
    /// The kernel's BTF can't be used.
    #[error(
        "this kernel's type information (BTF) at {address:#x} is damaged: {source}; \
         give an ISF file made for it"
    )]
    DamagedBtf {
        /// The blob's virtual address.
        address: u64,
        /// What is wrong with it.
        source: BtfError,
    },
    /// The kernel's BTF can't be read.
    #[error(
        "this kernel's type information (BTF) at {address:#x} can't be read: {reason}; \
         give an ISF file made for it"
    )]
    UnreadableBtf {
        /// The blob's virtual address.
        address: u64,
        /// What the read ended with.
        reason: String,
    },
}

/// The symbols and type layouts of one running kernel.
#[derive(Debug)]
pub struct Profile {
    pub(crate) build_id: Option<BuildId>,
    pub(crate) banner: String,
    pub(crate) symbols: Symbols,
    pub(crate) types: Result<Types, ProfileError>,
}

impl Profile {
    /// Takes over the memory of another profile where both hold the same bytes,
    /// as two guests with the same kernel do: names, offsets and types, which are
    /// nearly all of it. What the profile says stays the same.
    pub fn share(&mut self, other: &Self) {
        self.symbols.share(&other.symbols);
        if let (Ok(own), Ok(other)) = (&self.types, &other.types)
            && own.is_same(other)
        {
            self.types = Ok(other.clone());
        }
    }

    /// The kernel's build id, where it has one.
    pub fn build_id(&self) -> Option<&BuildId> {
        self.build_id.as_ref()
    }

    /// The kernel's `linux_banner`, without its newline: "Linux version …".
    pub fn banner(&self) -> &str {
        &self.banner
    }

    /// The kernel's symbols, at their run-time addresses.
    pub fn symbols(&self) -> &Symbols {
        &self.symbols
    }

    /// The kernel's types.
    ///
    /// # Errors
    /// [`ProfileError`] says why there are none and what can be done.
    pub fn types(&self) -> Result<&Types, ProfileError> {
        self.types.as_ref().map_err(Clone::clone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn build_ids_are_written_as_hex() {
        let id = BuildId::new(&[0, 0xab, 0x10]).expect("three bytes");
        assert_eq!(id.to_string(), "00ab10");
        assert_eq!(BuildId::from_hex("00AB10"), Some(id));
        for bad in ["", "0", "zz", "+1", "é0", &"00".repeat(65)] {
            assert_eq!(BuildId::from_hex(bad), None, "{bad}");
        }
    }
}
