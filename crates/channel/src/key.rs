//! Keys of parties: X25519, written as 64 hexadecimal digits.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use snow::params::DHChoice;
use snow::resolvers::{CryptoResolver as _, DefaultResolver};
use zeroize::{Zeroize as _, Zeroizing};

/// Bytes of a key.
const LENGTH: usize = 32;

/// Why a key can't be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Not a key's text.
    #[error("a key is 64 hexadecimal digits; this has {length} characters")]
    Length {
        /// How many characters there are.
        length: usize,
    },
    /// Not a hexadecimal digit.
    #[error("a key is 64 hexadecimal digits; character {position} is none")]
    Digit {
        /// Counted from 1.
        position: usize,
    },
    /// The system gave no random numbers.
    #[error("no key can be made: the system gave no random numbers")]
    Random,
    /// The key's file can't be read or written.
    #[error("key file {path}: {what}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// Others than its owner may read the key's file.
    #[error("key file {path} has mode {mode:o}, others may read it: chmod 600 it, or make new keys", path = path.display())]
    Readable {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The key's file holds something else.
    #[error("key file {path}: {source}", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with its text.
        source: Box<KeyError>,
    },
}

/// What others know a party by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; LENGTH]);

impl PublicKey {
    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }

    pub(crate) fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// What only the party itself knows. Its memory is cleared when it is
/// dropped, and no format but [`SecretKey::to_hex`] and serde shows it.
#[derive(Clone)]
pub struct SecretKey(Zeroizing<[u8; LENGTH]>);

impl SecretKey {
    /// Its text.
    #[must_use]
    pub fn to_hex(&self) -> Zeroizing<String> {
        Zeroizing::new(to_hex(self.0.as_slice()))
    }
}

/// A secret key and the public key that belongs to it.
#[derive(Clone)]
pub struct KeyPair {
    secret: SecretKey,
    public: PublicKey,
}

/// Another party: the name that it is called here, and its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The name, for logs and rights.
    pub name: String,
    /// The key.
    pub key: PublicKey,
}

impl KeyPair {
    /// A new pair.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub fn generate() -> Result<Self, KeyError> {
        let pattern = crate::handshake::parameters().map_err(|_| KeyError::Random)?;
        let mut made = snow::Builder::new(pattern)
            .generate_keypair()
            .map_err(|_| KeyError::Random)?;
        let secret: Result<[u8; LENGTH], _> = made.private.as_slice().try_into();
        made.private.zeroize();
        let secret = secret.map_err(|_| KeyError::Random)?;
        Self::from_secret(SecretKey(Zeroizing::new(secret)))
    }

    /// The pair of a secret key.
    ///
    /// # Errors
    /// If the curve isn't built in, which can't be with this crate's features.
    pub fn from_secret(secret: SecretKey) -> Result<Self, KeyError> {
        let mut curve = DefaultResolver
            .resolve_dh(&DHChoice::Curve25519)
            .ok_or(KeyError::Random)?;
        curve.set(secret.0.as_slice());
        let public = PublicKey::from_slice(curve.pubkey()).ok_or(KeyError::Random)?;
        Ok(Self { secret, public })
    }

    /// The public key.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        self.public
    }

    /// The secret key.
    #[must_use]
    pub fn secret(&self) -> &SecretKey {
        &self.secret
    }

    pub(crate) fn secret_bytes(&self) -> &[u8] {
        self.secret.0.as_slice()
    }

    /// Writes the secret key to a new file that only its owner may read.
    ///
    /// # Errors
    /// If the file is there already, or can't be written.
    pub fn write_new(&self, path: &Path) -> Result<(), KeyError> {
        let fail = |what| {
            move |source| KeyError::File {
                path: path.to_owned(),
                what,
                source,
            }
        };
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(fail("making it"))?;
        let mut text = self.secret.to_hex();
        text.push('\n');
        file.write_all(text.as_bytes())
            .map_err(fail("writing it"))?;
        file.sync_all().map_err(fail("writing it"))
    }

    /// Reads a pair from the file of its secret key.
    ///
    /// # Errors
    /// If the file can't be read, others than its owner may read it, or it
    /// holds no key.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let fail = |source| KeyError::File {
            path: path.to_owned(),
            what: "reading it",
            source,
        };
        let file = File::open(path).map_err(fail)?;
        let mode = file.metadata().map_err(fail)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Readable {
                path: path.to_owned(),
                mode,
            });
        }
        let mut text = Zeroizing::new(String::new());
        file.take(256).read_to_string(&mut text).map_err(fail)?;
        let secret: SecretKey = text.trim().parse().map_err(|source| KeyError::Content {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        Self::from_secret(secret)
    }
}

fn to_hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or('0');
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
        .collect()
}

fn from_hex(text: &str) -> Result<[u8; LENGTH], KeyError> {
    if text.len() != 2 * LENGTH {
        return Err(KeyError::Length {
            length: text.chars().count(),
        });
    }
    let mut key = [0; LENGTH];
    for (index, (byte, pair)) in key
        .iter_mut()
        .zip(text.as_bytes().chunks_exact(2))
        .enumerate()
    {
        for (offset, digit) in pair.iter().enumerate() {
            let value = char::from(*digit)
                .to_digit(16)
                .and_then(|value| u8::try_from(value).ok())
                .ok_or(KeyError::Digit {
                    position: 2 * index + offset + 1,
                })?;
            *byte = (*byte << 4) | value;
        }
    }
    Ok(key)
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        from_hex(text).map(Self)
    }
}

impl FromStr for SecretKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        from_hex(text).map(|key| Self(Zeroizing::new(key)))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&to_hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "PublicKey({self})")
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("SecretKey(…)")
    }
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "KeyPair(public {})", self.public)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for SecretKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

impl<'de> Deserialize<'de> for SecretKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Zeroizing::new(String::deserialize(deserializer)?);
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_pair_survives_its_file_and_only_its_owner_reads_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        let pair = KeyPair::generate().expect("a pair");
        pair.write_new(&path).expect("a file");
        let mode = path.metadata().expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(
            KeyPair::read(&path).expect("a pair").public(),
            pair.public()
        );
        assert!(pair.write_new(&path).is_err(), "never overwritten");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("chmod");
        let error = KeyPair::read(&path).expect_err("readable by others");
        assert!(error.to_string().contains("640"), "{error}");
    }

    #[test]
    fn a_secret_key_makes_its_public_key_and_shows_itself_to_nobody() {
        let pair = KeyPair::generate().expect("a pair");
        let again = KeyPair::from_secret(pair.secret().clone()).expect("a pair");
        assert_eq!(pair.public(), again.public());
        assert_ne!(pair.public(), KeyPair::generate().expect("a pair").public());
        let secret = pair.secret().to_hex();
        assert!(!format!("{pair:?} {:?}", pair.secret()).contains(&secret[..8]));
        // The scalar that is clamped to 2^254 on the base point of RFC 7748.
        let zero: SecretKey = "0".repeat(64).parse().expect("a key");
        let public = KeyPair::from_secret(zero).expect("a pair").public();
        assert_eq!(
            public.to_string(),
            "2fe57da347cd62431528daac5fbb290730fff684afc4cfc2ed90995f58cb3b74"
        );
    }

    #[test]
    fn wrong_texts_say_where() {
        assert!(matches!(
            "ab".parse::<PublicKey>(),
            Err(KeyError::Length { length: 2 })
        ));
        let text = format!("{}g{}", "0".repeat(5), "0".repeat(58));
        assert!(matches!(
            text.parse::<PublicKey>(),
            Err(KeyError::Digit { position: 6 })
        ));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "[0-9a-fA-F]{64}|\\PC{0,70}") {
            if let Ok(key) = text.parse::<PublicKey>() {
                prop_assert_eq!(key.to_string(), text.to_lowercase());
                let json = serde_json::to_string(&key).expect("text");
                prop_assert_eq!(serde_json::from_str::<PublicKey>(&json).expect("a key"), key);
            }
        }
    }
}
