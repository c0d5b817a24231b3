//! Finds a kernel in physical memory and reads its symbols and types from there.
//!
//! This file names the interface that the crates above use; what stands behind
//! it replaces it whole.
#![forbid(unsafe_code)]
#![allow(missing_docs)]

use std::sync::Arc;

use secmon_memory::{AddressSpace, VirtualAddress};

pub struct Profile;
pub struct Symbols;
pub struct Types;

#[derive(Clone, Debug)]
pub struct Member {
    pub offset: u64,
    pub size: u64,
    pub bit_offset: u8,
    pub bit_size: u8,
    pub signed: bool,
    pub count: Option<u64>,
    pub type_name: String,
    pub pointer: bool,
}

#[derive(Debug, thiserror::Error)]
#[error("types are not known")]
pub struct ProfileError;

#[derive(Debug, thiserror::Error)]
#[error("no such type")]
pub struct TypeError;

pub struct Kernel {
    pub space: AddressSpace,
    pub profile: Arc<Profile>,
}

impl Profile {
    pub fn symbols(&self) -> &Symbols {
        &Symbols
    }

    pub fn types(&self) -> Result<&Types, ProfileError> {
        Ok(&Types)
    }
}

impl Symbols {
    pub fn address(&self, _name: &str) -> Option<VirtualAddress> {
        None
    }
}

impl Types {
    pub fn size_of(&self, _name: &str) -> Result<u64, TypeError> {
        Err(TypeError)
    }

    pub fn member(&self, _structure: &str, _path: &str) -> Result<Member, TypeError> {
        Err(TypeError)
    }
}
