//! The parts of a kernel's file at the addresses where the kernel runs.

use crate::{KernelFile, ReferenceError, Relocations, Section};

/// Sections that are needed to work out what the kernel does to its text, and
/// that are gone once it has started.
const RECORDS: [&str; 2] = [".altinstr_replacement", ".parainstructions"];

/// A piece of the kernel's image, at its run-time address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The section's name.
    pub name: String,
    /// Where it starts.
    pub address: u64,
    /// What should be there.
    pub bytes: Vec<u8>,
    /// Whether it stays as it is once the kernel has started.
    pub constant: bool,
}

impl Part {
    fn offset(&self, address: u64, length: usize) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.address)?).ok()?;
        (offset.checked_add(length)? <= self.bytes.len()).then_some(offset)
    }
}

/// Parts by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Image {
    parts: Vec<Part>,
}

impl Image {
    /// Takes what is constant of a file, moves it by `slide`, and changes
    /// what depends on that.
    pub(crate) fn new(file: &KernelFile, slide: u64) -> Result<Self, ReferenceError> {
        if slide != 0 && file.relocations.is_empty() {
            return Err(ReferenceError::NoRelocations { slide });
        }
        let text = file.section(".text").map_or(0, |text| text.address);
        // What lies before the data is mapped read-only.
        let data = file.section(".data").map_or(u64::MAX, |data| data.address);
        let mut parts = Vec::new();
        for section in &file.sections {
            let constant = (text..data).contains(&section.address);
            if constant || RECORDS.contains(&section.name.as_str()) {
                parts.push(Part {
                    name: section.name.clone(),
                    address: section.address.wrapping_add(slide),
                    bytes: section.bytes.clone(),
                    constant,
                });
            }
        }
        parts.sort_by_key(|part| part.address);
        let mut image = Self { parts };
        image.relocate(&file.relocations, slide);
        Ok(image)
    }

    /// Takes all of some sections, where they are.
    pub(crate) fn whole(sections: Vec<Section>) -> Self {
        let parts = sections.into_iter().map(|section| Part {
            name: section.name,
            address: section.address,
            bytes: section.bytes,
            constant: true,
        });
        let mut parts: Vec<Part> = parts.collect();
        parts.sort_by_key(|part| part.address);
        Self { parts }
    }

    fn relocate(&mut self, relocations: &Relocations, slide: u64) {
        for address in &relocations.wide {
            self.change::<8>(address.wrapping_add(slide), |value| {
                u64::from_le_bytes(value).wrapping_add(slide).to_le_bytes()
            });
        }
        let (up, down) = (slide as u32, (slide as u32).wrapping_neg());
        for (addresses, distance) in [(&relocations.narrow, up), (&relocations.inverse, down)] {
            for address in addresses {
                self.change::<4>(address.wrapping_add(slide), |value| {
                    u32::from_le_bytes(value)
                        .wrapping_add(distance)
                        .to_le_bytes()
                });
            }
        }
    }

    fn change<const N: usize>(&mut self, address: u64, change: impl Fn([u8; N]) -> [u8; N]) {
        if let Some(bytes) = self.get_mut(address, N)
            && let Some(value) = bytes.first_chunk_mut::<N>()
        {
            *value = change(*value);
        }
    }

    fn part(&self, address: u64) -> Option<usize> {
        let behind = self.parts.partition_point(|part| part.address <= address);
        behind.checked_sub(1)
    }

    /// The bytes at an address, if they lie in one part.
    pub(crate) fn get(&self, address: u64, length: usize) -> Option<&[u8]> {
        let part = self.parts.get(self.part(address)?)?;
        let offset = part.offset(address, length)?;
        part.bytes.get(offset..offset + length)
    }

    pub(crate) fn get_mut(&mut self, address: u64, length: usize) -> Option<&mut [u8]> {
        let part = self.part(address)?;
        let part = self.parts.get_mut(part)?;
        let offset = part.offset(address, length)?;
        part.bytes.get_mut(offset..offset + length)
    }

    /// Writes bytes over, where they lie in one part.
    pub(crate) fn set(&mut self, address: u64, bytes: &[u8]) {
        if let Some(place) = self.get_mut(address, bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// Where the text starts, and its length.
    pub(crate) fn text(&self) -> (u64, usize) {
        let text = self.parts.iter().find(|part| part.name == ".text");
        text.map_or((0, 0), |text| (text.address, text.bytes.len()))
    }

    /// The bytes of a part that serves only the start.
    pub(crate) fn record(&self, name: &str) -> &[u8] {
        let part = self.parts.iter().find(|part| part.name == name);
        part.map_or(&[], |part| &part.bytes)
    }

    /// What stays once the kernel has started.
    pub(crate) fn into_constant(self) -> Vec<Part> {
        let mut parts = self.parts;
        parts.retain(|part| part.constant);
        parts
    }
}
