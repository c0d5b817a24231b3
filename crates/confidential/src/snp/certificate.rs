//! The certificates behind a report's key, up to a root of AMD's.

use ring::signature::{
    ECDSA_P384_SHA384_FIXED, RSA_PSS_2048_8192_SHA384, UnparsedPublicKey, VerificationAlgorithm,
};
use serde::Serialize;
use x509_cert::Certificate;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::oid::db::rfc5912::{ID_RSASSA_PSS, SECP_384_R_1};
use x509_cert::der::{Decode as _, DecodePem as _, Encode as _};

use super::{Difference, Tcb};

/// The largest file of certificates.
const MAX_BYTES: usize = 256 << 10;
/// The most certificates.
const MAX_CERTIFICATES: usize = 16;

/// AMD's roots and what they certify, one pair a generation.
const BUILT_IN: [[&str; 2]; 3] = [
    [
        include_str!("roots/milan/ark.pem"),
        include_str!("roots/milan/ask.pem"),
    ],
    [
        include_str!("roots/genoa/ark.pem"),
        include_str!("roots/genoa/ask.pem"),
    ],
    [
        include_str!("roots/turin/ark.pem"),
        include_str!("roots/turin/ask.pem"),
    ],
];

/// AMD's extensions (57230, table 8).
const BOOTLOADER: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.1");
const TEE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.2");
const SNP: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.3");
const MICROCODE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.8");
const FMC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.9");
const CHIP: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.4");
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// The kinds of keys that sign reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Key {
    /// A chip's.
    Vcek,
    /// A cloud's, loaded by it.
    Vlek,
}

impl std::fmt::Display for Key {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Vcek => "a chip's key (VCEK)",
            Self::Vlek => "a cloud's key (VLEK)",
        })
    }
}

/// Why files hold no certificates that could be checked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Too much.
    #[error("{bytes} bytes of certificates, at most {MAX_BYTES} are read")]
    TooLarge {
        /// How many.
        bytes: usize,
    },
    /// Too many.
    #[error("more than {MAX_CERTIFICATES} certificates")]
    TooMany,
    /// Not a certificate.
    #[error("certificate {number}: {reason}; X.509 in DER or PEM is needed")]
    Malformed {
        /// Which of the file, from 1 on.
        number: usize,
        /// The parser's reason.
        reason: String,
    },
    /// The report's key is not certified by any.
    #[error(
        "there is no certificate of a key that signs reports (SEV-VCEK or SEV-VLEK) among them"
    )]
    NoLeaf,
    /// Two of them could be meant.
    #[error("there is more than one certificate of a key that signs reports")]
    TwoLeaves,
}

/// The certificate of a report's key, and those that lead to a root.
#[derive(Debug, Clone)]
pub struct Certificates {
    leaf: Parsed,
    key: Key,
    /// Given by the caller: nothing is trusted for being among them.
    given: Vec<Parsed>,
}

#[derive(Debug, Clone)]
struct Parsed {
    certificate: Certificate,
    subject: String,
    issuer: String,
}

impl Certificates {
    /// Reads files, each one certificate in DER or some in PEM. The roots, and
    /// what certifies chips' keys, are built in and need not be among them.
    ///
    /// # Errors
    /// If one is none, or not exactly one is of a key that signs reports.
    pub fn read<'a>(files: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, CertificateError> {
        let mut given = Vec::new();
        for bytes in files {
            if bytes.len() > MAX_BYTES {
                return Err(CertificateError::TooLarge { bytes: bytes.len() });
            }
            read_file(bytes, &mut given)?;
            if given.len() > MAX_CERTIFICATES {
                return Err(CertificateError::TooMany);
            }
        }
        let mut leaf = None;
        let mut others = Vec::new();
        for parsed in given {
            let key = match parsed.subject.as_str() {
                "SEV-VCEK" => Key::Vcek,
                "SEV-VLEK" => Key::Vlek,
                _ => {
                    others.push(parsed);
                    continue;
                }
            };
            if leaf.replace((parsed, key)).is_some() {
                return Err(CertificateError::TwoLeaves);
            }
        }
        let (leaf, key) = leaf.ok_or(CertificateError::NoLeaf)?;
        Ok(Self {
            leaf,
            key,
            given: others,
        })
    }

    /// The kind of the key.
    #[must_use]
    pub fn key(&self) -> Key {
        self.key
    }

    /// The firmware that the key stands for, as far as the certificate says it.
    pub(super) fn tcb(&self) -> Option<Tcb> {
        let version = |oid| self.extension(oid).and_then(small_number);
        Some(Tcb {
            fmc: version(FMC),
            bootloader: version(BOOTLOADER)?,
            tee: version(TEE)?,
            snp: version(SNP)?,
            microcode: version(MICROCODE)?,
        })
    }

    /// The chip that the key is of: 64 bytes, or 8 from Turin on.
    pub(super) fn chip(&self) -> Option<&[u8]> {
        self.extension(CHIP)
    }

    fn extension(&self, oid: ObjectIdentifier) -> Option<&[u8]> {
        let extensions = self.leaf.certificate.tbs_certificate.extensions.as_ref()?;
        let found = extensions.iter().find(|one| one.extn_id == oid)?;
        Some(found.extn_value.as_bytes())
    }

    /// What is wrong on the way to a root at that time.
    pub(super) fn differences(&self, now: u64) -> Vec<Difference> {
        let built_in = built_in();
        let mut differences = self.leaf.time(now).into_iter().collect::<Vec<_>>();
        let unknown = |parsed: &Parsed| Difference::UnknownIssuer {
            subject: parsed.subject.clone(),
            issuer: parsed.issuer.clone(),
        };
        let candidates = || built_in.iter().flatten().chain(&self.given);
        let named: Vec<_> = candidates()
            .filter(|one| one.subject == self.leaf.issuer)
            .collect();
        let Some(first) = named.first() else {
            differences.push(unknown(&self.leaf));
            return differences;
        };
        let signer = named.iter().find(|one| self.leaf.is_signed_by(one));
        let Some(intermediate) = signer else {
            differences.push(Difference::CertificateSignature {
                subject: self.leaf.subject.clone(),
                issuer: first.subject.clone(),
            });
            return differences;
        };
        differences.extend(intermediate.time(now));
        let root = built_in
            .iter()
            .map(|[root, _]| root)
            .find(|root| root.subject == intermediate.issuer);
        match root {
            None => differences.push(unknown(intermediate)),
            Some(root) if !intermediate.is_signed_by(root) => {
                differences.push(Difference::CertificateSignature {
                    subject: intermediate.subject.clone(),
                    issuer: root.subject.clone(),
                });
            }
            Some(root) => differences.extend(root.time(now)),
        }
        differences
    }

    /// Whether the report's key signed the message: ECDSA on P-384 with
    /// SHA-384, the signature as two numbers of 48 bytes.
    pub(super) fn signed(&self, message: &[u8], signature: &[u8; 96]) -> bool {
        let key = &self
            .leaf
            .certificate
            .tbs_certificate
            .subject_public_key_info;
        let on_curve = key
            .algorithm
            .parameters
            .as_ref()
            .and_then(|parameters| parameters.decode_as::<ObjectIdentifier>().ok());
        let Some(point) = key.subject_public_key.as_bytes() else {
            return false;
        };
        on_curve == Some(SECP_384_R_1)
            && verified(&ECDSA_P384_SHA384_FIXED, point, message, signature)
    }
}

fn verified(
    algorithm: &'static dyn VerificationAlgorithm,
    key: &[u8],
    message: &[u8],
    signature: &[u8],
) -> bool {
    UnparsedPublicKey::new(algorithm, key)
        .verify(message, signature)
        .is_ok()
}

impl Parsed {
    /// A certificate that is written in the one way that DER allows: the bytes
    /// that were signed are those that are made of it again.
    fn new(certificate: Certificate, bytes: &[u8]) -> Result<Self, String> {
        let again = certificate.to_der().map_err(|error| error.to_string())?;
        if again != bytes {
            return Err("it is not written as DER demands".to_owned());
        }
        let body = &certificate.tbs_certificate;
        let (subject, issuer) = (name(&body.subject), name(&body.issuer));
        Ok(Self {
            certificate,
            subject: subject.ok_or("its subject has no common name")?,
            issuer: issuer.ok_or("its issuer has no common name")?,
        })
    }

    /// AMD signs with RSASSA-PSS, SHA-384 and a salt of 48 bytes.
    fn is_signed_by(&self, issuer: &Self) -> bool {
        let key = &issuer.certificate.tbs_certificate.subject_public_key_info;
        let (Ok(body), Some(key), Some(signature)) = (
            self.certificate.tbs_certificate.to_der(),
            key.subject_public_key.as_bytes(),
            self.certificate.signature.as_bytes(),
        ) else {
            return false;
        };
        self.certificate.signature_algorithm.oid == ID_RSASSA_PSS
            && self.certificate.signature_algorithm == self.certificate.tbs_certificate.signature
            && verified(&RSA_PSS_2048_8192_SHA384, key, &body, signature)
    }

    fn time(&self, now: u64) -> Option<Difference> {
        let validity = &self.certificate.tbs_certificate.validity;
        let from = validity.not_before.to_unix_duration().as_secs();
        let until = validity.not_after.to_unix_duration().as_secs();
        (!(from..=until).contains(&now)).then(|| Difference::CertificateTime {
            subject: self.subject.clone(),
            from,
            until,
            now,
        })
    }
}

/// The common name.
fn name(name: &x509_cert::name::Name) -> Option<String> {
    let values = name.0.iter().flat_map(|part| part.0.iter());
    let mut names = values.filter(|value| value.oid == COMMON_NAME);
    let text = names.next().map(|value| value.value.value())?;
    // Shown to people: nothing that could act on a terminal.
    let text = std::str::from_utf8(text).ok()?;
    (names.next().is_none() && !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic()))
        .then(|| text.to_owned())
}

/// A DER integer from 0 to 255.
fn small_number(bytes: &[u8]) -> Option<u8> {
    u8::from_der(bytes).ok()
}

fn read_file(bytes: &[u8], into: &mut Vec<Parsed>) -> Result<(), CertificateError> {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    const END: &str = "-----END CERTIFICATE-----";
    let first = into.len().saturating_add(1);
    let malformed = |number: usize, reason: String| CertificateError::Malformed { number, reason };
    let text = std::str::from_utf8(bytes).ok();
    let Some(text) = text.filter(|text| text.contains(BEGIN)) else {
        let certificate =
            Certificate::from_der(bytes).map_err(|error| malformed(first, error.to_string()))?;
        into.push(Parsed::new(certificate, bytes).map_err(|reason| malformed(first, reason))?);
        return Ok(());
    };
    let mut rest = text;
    while let Some((_, after)) = rest.split_once(BEGIN) {
        let number = into.len().saturating_add(1);
        if number > MAX_CERTIFICATES {
            return Err(CertificateError::TooMany);
        }
        let (body, after) = after
            .split_once(END)
            .ok_or_else(|| malformed(number, "it has no end".to_owned()))?;
        into.push(
            from_pem(&format!("{BEGIN}\n{}\n{END}\n", body.trim()))
                .map_err(|reason| malformed(number, reason))?,
        );
        rest = after;
    }
    Ok(())
}

fn from_pem(text: &str) -> Result<Parsed, String> {
    let certificate = Certificate::from_pem(text).map_err(|error| error.to_string())?;
    let bytes = certificate.to_der().map_err(|error| error.to_string())?;
    Parsed::new(certificate, &bytes)
}

/// The built-in pairs of root and intermediate.
fn built_in() -> Vec<[Parsed; 2]> {
    let read = |text: &str| from_pem(text).ok();
    let pairs = BUILT_IN.iter();
    pairs
        .filter_map(|[root, intermediate]| Some([read(root)?, read(intermediate)?]))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VCEK: &[u8] = include_bytes!("../../tests/data/snp/vcek_milan.der");
    const TURIN: &[u8] = include_bytes!("../../tests/data/snp/vcek_turin.der");
    /// 2024-06-01.
    const THEN: u64 = 1_717_200_000;

    #[test]
    fn all_roots_are_there_and_sign_what_they_certify() {
        let pairs = built_in();
        assert_eq!(pairs.len(), BUILT_IN.len());
        for [root, intermediate] in &pairs {
            assert!(root.subject.starts_with("ARK-") && root.is_signed_by(root));
            assert!(intermediate.is_signed_by(root), "{}", intermediate.subject);
            assert!(!root.is_signed_by(intermediate));
        }
    }

    #[test]
    fn genuine_keys_lead_to_a_root() {
        for bytes in [VCEK, TURIN] {
            let certificates = Certificates::read([bytes]).expect("certificates");
            let (from, until) = {
                let validity = &certificates.leaf.certificate.tbs_certificate.validity;
                (
                    validity.not_before.to_unix_duration().as_secs(),
                    validity.not_after.to_unix_duration().as_secs(),
                )
            };
            assert_eq!(certificates.differences(from), []);
            for (now, count) in [(from - 1, 1), (until, 0), (until + 1, 1)] {
                let differences = certificates.differences(now);
                assert_eq!(differences.len(), count, "{differences:?}");
            }
            assert!(certificates.tcb().is_some() && certificates.chip().is_some());
        }
    }

    #[test]
    fn a_root_that_was_given_is_not_trusted() {
        // Milan's intermediate under the name of another would be refused, and
        // one that is given twice changes nothing.
        let given = [VCEK, BUILT_IN[0][1].as_bytes(), BUILT_IN[0][0].as_bytes()];
        let certificates = Certificates::read(given).expect("certificates");
        assert_eq!(certificates.differences(THEN), []);
        let turin = [BUILT_IN[2][1].as_bytes()];
        assert_eq!(
            Certificates::read(turin).map(|_| ()),
            Err(CertificateError::NoLeaf)
        );
        let two = Certificates::read([VCEK, TURIN]).map(|_| ());
        assert_eq!(two, Err(CertificateError::TwoLeaves));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn no_changed_certificate_is_accepted(at in 0..VCEK.len(), bit in 0_u8..8) {
            let mut bytes = VCEK.to_vec();
            bytes[at] ^= 1 << bit;
            if let Ok(certificates) = Certificates::read([bytes.as_slice()]) {
                prop_assert_ne!(certificates.differences(THEN), []);
            }
        }
    }
}
