//! The program that goes into an appliance: it must need nothing else.

use std::fs;
use std::path::Path;

use super::ApplianceError;

/// The program header that names a dynamic linker (ELF specification,
/// `PT_INTERP`).
const PT_INTERP: u32 = 3;
/// x86-64's number in `e_machine`.
const EM_X86_64: u16 = 62;

/// Reads a program and checks that it is a static one for x86-64.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, ApplianceError> {
    let bytes = fs::read(path).map_err(ApplianceError::file(path, "reading it"))?;
    check(&bytes).map_err(|what| ApplianceError::Binary {
        path: path.to_owned(),
        what,
    })?;
    Ok(bytes)
}

fn check(bytes: &[u8]) -> Result<(), &'static str> {
    let number = |at: usize, length: usize| -> Option<u64> {
        let bytes = bytes.get(at..at.checked_add(length)?)?;
        let mut number = [0; 8];
        number.get_mut(..length)?.copy_from_slice(bytes);
        Some(u64::from_le_bytes(number))
    };
    if bytes.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err("it is no 64-bit ELF file");
    }
    if number(18, 2) != Some(u64::from(EM_X86_64)) {
        return Err("it is not for x86-64");
    }
    let cut = "its program headers are cut off";
    let table = number(32, 8).and_then(|at| usize::try_from(at).ok());
    let size = number(54, 2).and_then(|size| usize::try_from(size).ok());
    let (table, size) = table.zip(size).ok_or(cut)?;
    for index in 0..number(56, 2).ok_or(cut)? {
        let kind = usize::try_from(index)
            .ok()
            .and_then(|index| table.checked_add(size.checked_mul(index)?))
            .and_then(|at| number(at, 4))
            .ok_or(cut)?;
        if kind == u64::from(PT_INTERP) {
            return Err("it is linked dynamically");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_static_programs_pass() {
        let this = fs::read(std::env::current_exe().expect("a path")).expect("a program");
        assert_eq!(check(&this), Err("it is linked dynamically"));
        assert!(check(b"#!/bin/sh\n").is_err());
        assert!(check(&this[..80]).is_err());
        let mut header = vec![0; 64 + 56];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[18] = 62;
        (header[32], header[54], header[56]) = (64, 56, 1);
        header[64] = 1;
        assert_eq!(check(&header), Ok(()));
        header[18] = 183;
        assert_eq!(check(&header), Err("it is not for x86-64"));
    }
}
