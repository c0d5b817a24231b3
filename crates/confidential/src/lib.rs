//! Whether a confidential VM is the one that was built, by what its processor
//! signed: AMD SEV-SNP attestation reports ([`snp`]) and Intel TDX quotes
//! ([`tdx`]); and the launch measurement that such a report must hold
//! ([`snp::launch`]).
//!
//! All of it works on bytes, without a network, a device or a clock: who calls
//! hands over certificates, collateral and the time. What differs from what was
//! expected is told as a list of values with their words; evidence that can't
//! be judged at all is an error.
//!
//! The crate `sev` is not used: what it is needed for comes only with OpenSSL or
//! with a crate for RSA that has a known weakness (RUSTSEC-2023-0071). Its test
//! data are. Nothing here runs inside of a monitoring VM.
#![forbid(unsafe_code)]

mod binding;
mod hexadecimal;
pub mod snp;
pub mod tdx;

pub use binding::report_data;
pub use hexadecimal::{Hexadecimal, HexadecimalError};
