//! What a monitor is told when it starts: one JSON document, through QEMU's
//! fw_cfg.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::str::FromStr;

use secmon_channel::{Peer, PublicKey, SecretKey};
use secmon_platform::ivshmem::PciAddress;
use secmon_platform::layout::RamLayout;
use secmon_watch::Policy;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The version of the document.
const VERSION: u32 = 1;
/// The largest document.
const MAX_BYTES: usize = 512 << 10;
/// The most targets and clients.
const MAX_ENTRIES: usize = 64;
/// The most ports for clients.
const MAX_CHANNELS: u64 = 8;
/// The longest name.
const MAX_NAME: usize = 64;

/// What a monitor is told when it starts.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Configuration {
    /// The version of this document, 1.
    pub version: u32,
    /// The monitor's name.
    pub name: String,
    /// The monitor's own key.
    pub secret_key: SecretKey,
    /// Who may ask.
    pub clients: Vec<Peer>,
    /// What is watched.
    pub targets: Vec<TargetConfiguration>,
    /// How many ports there are by which clients come.
    #[serde(default = "one_channel")]
    pub channels: u32,
    /// The policy by which detectors watch all targets, as TOML; without one
    /// they look only when they are asked to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// How much of what is kept and served.
    #[serde(default)]
    pub limits: Limits,
}

/// A target.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetConfiguration {
    /// What it is called.
    pub name: String,
    /// Where the `ivshmem-plain` device with its RAM is: its PCI address in
    /// the monitor. Without it, targets take the devices in their order.
    #[serde(default, with = "text", skip_serializing_if = "Option::is_none")]
    pub pci: Option<PciAddress>,
    /// The bytes of its RAM; without it, the RAM fills the device's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram_size: Option<u64>,
    /// Where its RAM lies, as `START-END@OFFSET,…`; without it, the layouts
    /// that machines of this size have are tried.
    #[serde(default, with = "text", skip_serializing_if = "Option::is_none")]
    pub layout: Option<RamLayout>,
    /// The way to its gate, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate: Option<GateConfiguration>,
}

/// The way to a target's gate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateConfiguration {
    /// The virtio-serial port's name, `org.secmon.gate.N`.
    pub port: String,
    /// The gate's key.
    pub key: PublicKey,
}

/// Bounds; what is not given has its default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Findings that are kept until a client takes them.
    pub findings: usize,
    /// Requests that run at once.
    pub requests: usize,
    /// Milliseconds between two looks at a target.
    pub poll_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            findings: 4096,
            requests: 4,
            poll_ms: 1000,
        }
    }
}

/// Why a document is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// Too large.
    #[error("the configuration has {length} bytes, at most {MAX_BYTES} are read")]
    TooLarge {
        /// Its bytes.
        length: usize,
    },
    /// Not the JSON of one.
    #[error("the configuration: {0}")]
    Json(#[from] serde_json::Error),
    /// Of another version.
    #[error("the configuration is of version {0}, this monitor understands {VERSION}")]
    Version(u32),
    /// A name that could not be shown or found again.
    #[error(
        "the configuration: {what} {name:?} is not 1 to {MAX_NAME} letters, digits, `.`, `_` or `-`"
    )]
    Name {
        /// Whose name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Two of one name, or at one address.
    #[error("the configuration: {what} {value} is there twice")]
    Twice {
        /// Of what.
        what: &'static str,
        /// The value.
        value: String,
    },
    /// Too many, or none where one is needed.
    #[error("the configuration: {count} {what}, 1 to {MAX_ENTRIES} are possible")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
    },
    /// What detectors are to do.
    #[error("the configuration: {0}")]
    Policy(#[from] secmon_watch::PolicyError),
    /// A number out of range.
    #[error("the configuration: {what} is {value}, {least} to {most} is possible")]
    Range {
        /// Which.
        what: &'static str,
        /// The number.
        value: u64,
        /// The least possible.
        least: u64,
        /// The most possible.
        most: u64,
    },
}

impl Configuration {
    /// Reads and checks a document.
    ///
    /// # Errors
    /// [`ConfigurationError`] says what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigurationError> {
        if bytes.len() > MAX_BYTES {
            return Err(ConfigurationError::TooLarge {
                length: bytes.len(),
            });
        }
        // fw_cfg files may be padded.
        let end = bytes
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last.saturating_add(1));
        let configuration: Self = serde_json::from_slice(bytes.get(..end).unwrap_or_default())?;
        configuration.check()?;
        Ok(configuration)
    }

    /// The policy.
    ///
    /// # Errors
    /// [`ConfigurationError::Policy`] if it is wrong.
    pub fn parsed_policy(&self) -> Result<Option<Policy>, ConfigurationError> {
        let policy = self.policy.as_deref();
        Ok(policy
            .map(|text| Policy::parse(text, "policy"))
            .transpose()?)
    }

    /// Checks what the types can't.
    ///
    /// # Errors
    /// [`ConfigurationError`] says what is wrong.
    pub fn check(&self) -> Result<(), ConfigurationError> {
        if self.version != VERSION {
            return Err(ConfigurationError::Version(self.version));
        }
        check_name("the monitor's name", &self.name)?;
        for (what, count) in [
            ("targets", self.targets.len()),
            ("clients", self.clients.len()),
        ] {
            if count == 0 || count > MAX_ENTRIES {
                return Err(ConfigurationError::Count { what, count });
            }
        }
        for peer in &self.clients {
            check_name("the client", &peer.name)?;
        }
        let mut names = BTreeSet::new();
        let mut addresses = BTreeSet::new();
        for target in &self.targets {
            check_name("the target", &target.name)?;
            if !names.insert(&target.name) {
                return Err(ConfigurationError::Twice {
                    what: "target",
                    value: target.name.clone(),
                });
            }
            if let Some(pci) = target.pci
                && !addresses.insert(pci)
            {
                return Err(ConfigurationError::Twice {
                    what: "PCI address",
                    value: pci.to_string(),
                });
            }
        }
        self.parsed_policy()?;
        let Limits {
            findings,
            requests,
            poll_ms,
        } = self.limits;
        for (what, value, least, most) in [
            ("channels", u64::from(self.channels), 1, MAX_CHANNELS),
            ("limits.findings", findings as u64, 16, 65_536),
            ("limits.requests", requests as u64, 1, 16),
            ("limits.poll_ms", poll_ms, 50, 60_000),
        ] {
            if !(least..=most).contains(&value) {
                return Err(ConfigurationError::Range {
                    what,
                    value,
                    least,
                    most,
                });
            }
        }
        Ok(())
    }
}

/// What a document without the number means.
fn one_channel() -> u32 {
    1
}

fn check_name(what: &'static str, name: &str) -> Result<(), ConfigurationError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(fits) {
        return Err(ConfigurationError::Name {
            what,
            name: name.chars().take(MAX_NAME).collect(),
        });
    }
    Ok(())
}

/// Optional values by their text form.
mod text {
    use super::{Deserialize, Deserializer, Display, FromStr, Serializer};

    pub fn serialize<T: Display, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.collect_str(value),
            None => serializer.serialize_none(),
        }
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        Option::<String>::deserialize(deserializer)?
            .map(|text| text.parse().map_err(serde::de::Error::custom))
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use secmon_channel::KeyPair;

    use super::*;

    fn example() -> Configuration {
        let keys = KeyPair::generate().expect("keys");
        Configuration {
            version: 1,
            name: "web1".into(),
            secret_key: keys.secret().clone(),
            clients: vec![Peer {
                name: "host".into(),
                key: keys.public(),
            }],
            targets: vec![TargetConfiguration {
                name: "web1".into(),
                pci: Some("0000:00:10.0".parse().expect("an address")),
                ram_size: Some(512 << 20),
                layout: Some("0-0x20000000".parse().expect("a layout")),
                gate: Some(GateConfiguration {
                    port: "org.secmon.gate.0".into(),
                    key: keys.public(),
                }),
            }],
            channels: 4,
            policy: None,
            limits: Limits::default(),
        }
    }

    #[test]
    fn a_document_is_read_as_it_was_written() {
        let mut bytes = serde_json::to_vec(&example()).expect("JSON");
        let text = String::from_utf8_lossy(&bytes).into_owned();
        assert!(text.contains(r#""pci":"0000:00:10.0""#), "{text}");
        bytes.extend_from_slice(&[0; 5]);
        let read = Configuration::parse(&bytes).expect("a configuration");
        assert_eq!(serde_json::to_string(&read).expect("JSON"), text);
        let least = text
            .replace(r#","pci":"0000:00:10.0","ram_size":536870912"#, "")
            .replace(
                r#","channels":4,"limits":{"findings":4096,"requests":4,"poll_ms":1000}"#,
                "",
            );
        let read = Configuration::parse(least.as_bytes()).expect("a configuration");
        assert_eq!(read.channels, 1);
        assert!(read.targets[0].pci.is_none() && read.limits == Limits::default());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |change: fn(&mut Configuration)| {
            let mut configuration = example();
            change(&mut configuration);
            configuration.check().expect_err("wrong").to_string()
        };
        assert!(wrong(|c| c.version = 2).contains("version 2"));
        assert!(wrong(|c| c.name = "a/b".into()).contains("a/b"));
        assert!(wrong(|c| c.targets.clear()).contains("0 targets"));
        assert!(wrong(|c| c.clients.clear()).contains("0 clients"));
        assert!(wrong(|c| c.targets.push(c.targets[0].clone())).contains("twice"));
        assert!(wrong(|c| c.limits.poll_ms = 1).contains("poll_ms"));
        let unknown = r#"{"version":1,"colour":"red"}"#;
        let error = Configuration::parse(unknown.as_bytes()).expect_err("unknown");
        assert!(error.to_string().contains("colour"), "{error}");
        let large = vec![b' '; MAX_BYTES + 1];
        assert!(Configuration::parse(&large).is_err());
    }
}
