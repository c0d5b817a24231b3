//! AMD SEV-SNP: attestation reports and launch measurements.
//!
//! A report is 1,184 bytes that the processor's security processor fills and
//! signs for a guest (SEV-SNP firmware ABI, 56860, table 23). Its key is the
//! chip's (VCEK) or a cloud's (VLEK); AMD certifies either through an
//! intermediate key for a root that is built in here.

mod certificate;
mod difference;
mod expectation;
mod firmware;
pub mod launch;
mod report;
mod save_area;

pub use certificate::{CertificateError, Certificates, Key};
pub use difference::{Difference, PolicyRule, TcbPart};
pub use expectation::{Expectation, Smt, Tcb};
pub use report::{Report, ReportError, Verdict, verify};
