//! What detectors of the kernel's code have in common: names for addresses and
//! the judgement of a pointer to code.

use secmon_guest::linux::code::{CodeMap, CodeOwner};
use secmon_guest::linux::module::knowledge::symbols_of;
use secmon_guest::{Guest, Text};
use secmon_memory::VirtualAddress;

use crate::{DetectError, Evidence};

/// A symbol that lies further below an address than this does not name it.
const FAR: u64 = 1 << 20;

/// The map of code, whole: what it lacks would be found to be nobody's.
pub(crate) fn map(guest: &Guest, detector: &'static str) -> Result<CodeMap, DetectError> {
    let map = CodeMap::read(guest, detector)?;
    match map.incomplete.first() {
        Some(incomplete) => Err(DetectError::Incomplete {
            view: incomplete.what,
            reason: incomplete.reason.clone(),
        }),
        None => Ok(map),
    }
}

/// The symbol at or below `address`, of the kernel or of the module that owns
/// it, with the distance.
pub(crate) fn symbol(guest: &Guest, map: &CodeMap, address: VirtualAddress) -> Option<String> {
    let named = |(name, distance): (&str, u64), module: &str| match distance {
        0 => format!("{name}{module}"),
        _ => format!("{name}+{distance:#x}{module}"),
    };
    if let Some(CodeOwner::Module {
        address: module,
        name,
    }) = map.owner_of(address)
    {
        let suffix = format!(" [{}]", Text::new(name).to_display());
        let module = map.modules.iter().find(|other| other.address == *module)?;
        let symbols = symbols_of(guest, "symbols", module).ok().flatten()?;
        let (found, distance) = symbols.nearest(address)?;
        return (distance < FAR).then(|| named((found.name, distance), &suffix));
    }
    let sections = [&map.image.text, &map.image.rodata, &map.image.data];
    let inside = sections
        .into_iter()
        .chain([&map.image.bss, &map.image.init])
        .any(|range| range.contains(&address));
    if !inside {
        return None;
    }
    let (found, distance) = guest.symbols().nearest(address)?;
    (distance < FAR).then(|| named((found.name, distance), ""))
}

/// Where a pointer to code leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target<'m> {
    /// To code of the kernel, of a listed module, or that the kernel made.
    Owned(&'m CodeOwner),
    /// To executable memory that nobody owns.
    Unowned,
    /// To memory that is owned and holds no code of its owner.
    NoCode(&'m CodeOwner),
    /// To a page that somebody owns a part of, beside that part.
    Beside,
    /// To what can't be executed at all.
    NotExecutable,
}

/// Judges an address that is to be called.
pub(crate) fn target(map: &CodeMap, address: VirtualAddress) -> Target<'_> {
    if !map.is_executable(address) {
        return Target::NotExecutable;
    }
    match map.owner_of(address) {
        Some(owner) if owner.holds_code() => Target::Owned(owner),
        Some(owner) => Target::NoCode(owner),
        None if map.unowned_at(address).is_some() => Target::Unowned,
        None => Target::Beside,
    }
}

impl Target<'_> {
    /// Whether nothing of the kernel's records accounts for what is called:
    /// running it would run foreign code.
    pub(crate) fn is_foreign(self) -> bool {
        matches!(self, Self::Unowned | Self::NoCode(_))
    }

    /// In a few words.
    pub(crate) fn describe(self) -> String {
        match self {
            Self::Owned(owner) => owner.to_string(),
            Self::NoCode(owner) => format!("{owner}, where no code belongs"),
            Self::Unowned => "executable memory that nobody owns".to_owned(),
            Self::Beside => "a page of code, beside the code".to_owned(),
            Self::NotExecutable => "memory that can't be executed".to_owned(),
        }
    }
}

/// What the kernel's records say of a target.
pub(crate) fn target_evidence(guest: &Guest, map: &CodeMap, address: VirtualAddress) -> Evidence {
    let mut bytes = [0; 16];
    let code = match guest.space().read(address, &mut bytes) {
        Ok(()) => hex(&bytes),
        Err(error) => error.to_string(),
    };
    Evidence::new("code_owners", target(map, address).describe())
        .with("target", address)
        .with("symbol", symbol(guest, map, address))
        .with("code", code)
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    digits.join(" ")
}
