//! The bill of materials of an appliance, as CycloneDX 1.5 has it.
//!
//! Crates are those of the lock file this program was built with that its
//! `secmon` package reaches, without what only tests need. A lock file also
//! lists crates for other systems, and says no features: some of those listed
//! may not be in the program.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::Part;
use super::archive::PackageName;

/// The lock file that this program was built with.
const LOCK: &str = include_str!("../../../../Cargo.lock");

/// The manifests of the workspace's packages that ship: the lock file does not
/// say which of their dependencies are for tests.
const MANIFESTS: &[(&str, &str)] = &[
    ("secmon", include_str!("../../../cli/Cargo.toml")),
    ("secmon-monitor", include_str!("../../Cargo.toml")),
    (
        "secmon-channel",
        include_str!("../../../channel/Cargo.toml"),
    ),
    ("secmon-detect", include_str!("../../../detect/Cargo.toml")),
    ("secmon-guest", include_str!("../../../guest/Cargo.toml")),
    ("secmon-watch", include_str!("../../../watch/Cargo.toml")),
    (
        "secmon-profile",
        include_str!("../../../profile/Cargo.toml"),
    ),
    (
        "secmon-reference",
        include_str!("../../../reference/Cargo.toml"),
    ),
    (
        "secmon-platform",
        include_str!("../../../platform/Cargo.toml"),
    ),
    ("secmon-memory", include_str!("../../../memory/Cargo.toml")),
    ("secmon-gate", include_str!("../../../gate/Cargo.toml")),
    (
        "secmon-respond",
        include_str!("../../../respond/Cargo.toml"),
    ),
    (
        "secmon-sandbox",
        include_str!("../../../sandbox/Cargo.toml"),
    ),
];

/// A package of the lock file.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Locked {
    name: String,
    version: String,
    checksum: Option<String>,
    dependencies: Vec<String>,
}

/// What an appliance is made of.
pub(super) struct Materials<'a> {
    pub release: &'a str,
    pub packages: &'a [PackageName],
    pub kernel: &'a Part,
    pub initramfs: &'a Part,
    pub program: &'a str,
    pub modules: &'a [(String, String)],
}

/// The document.
pub(super) fn bill(materials: &Materials<'_>) -> Value {
    let version = env!("CARGO_PKG_VERSION");
    let hash = |content: &str| json!([{"alg": "SHA-256", "content": content}]);
    let mut components = vec![json!({
        "type": "operating-system",
        "bom-ref": "kernel",
        "name": "linux",
        "version": materials.release,
        "hashes": hash(&materials.kernel.sha256),
    })];
    for package in materials.packages {
        let PackageName { name, version } = package;
        components.push(json!({
            "type": "library",
            "name": name,
            "version": version,
            "purl": format!("pkg:deb/debian/{name}@{}", encoded(version)),
        }));
    }
    for (name, sha256) in materials.modules {
        components.push(json!({
            "type": "device-driver",
            "name": name,
            "version": materials.release,
            "hashes": hash(sha256),
        }));
    }
    components.push(json!({
        "type": "application",
        "bom-ref": "secmon",
        "name": "secmon",
        "version": version,
        "hashes": hash(materials.program),
    }));
    for Locked {
        name,
        version,
        checksum,
        ..
    } in shipped(&parse_lock(LOCK), MANIFESTS)
    {
        let mut component = json!({
            "type": "library",
            "name": name,
            "version": version,
            "purl": format!("pkg:cargo/{name}@{version}"),
        });
        if let (Some(checksum), Some(object)) = (checksum, component.as_object_mut()) {
            object.insert("hashes".to_owned(), hash(&checksum));
        }
        components.push(component);
    }
    json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "firmware",
                "bom-ref": "appliance",
                "name": "secmon-appliance",
                "version": version,
                "hashes": hash(&materials.initramfs.sha256),
            },
        },
        "components": components,
    })
}

/// A version in a package URL.
fn encoded(version: &str) -> String {
    version
        .replace('%', "%25")
        .replace('+', "%2B")
        .replace(':', "%3A")
        .replace('~', "%7E")
}

/// The packages of a lock file, which cargo writes in one fixed form.
fn parse_lock(text: &str) -> Vec<Locked> {
    let mut packages: Vec<Locked> = Vec::new();
    let mut in_dependencies = false;
    for line in text.lines() {
        if line == "[[package]]" {
            packages.push(Locked::default());
            continue;
        }
        let Some(package) = packages.last_mut() else {
            continue;
        };
        if in_dependencies {
            match line.trim().trim_end_matches(',').trim_matches('"') {
                "]" => in_dependencies = false,
                name => package.dependencies.push(name.to_owned()),
            }
            continue;
        }
        match line.split_once(" = ") {
            Some(("name", value)) => package.name = unquoted(value),
            Some(("version", value)) => package.version = unquoted(value),
            Some(("checksum", value)) => package.checksum = Some(unquoted(value)),
            Some(("dependencies", "[")) => in_dependencies = true,
            _ => {}
        }
    }
    packages
}

fn unquoted(value: &str) -> String {
    value.trim_matches('"').to_owned()
}

/// What `secmon` reaches, without itself, by name and version.
fn shipped(packages: &[Locked], manifests: &[(&str, &str)]) -> Vec<Locked> {
    let mut by_name: BTreeMap<&str, Vec<&Locked>> = BTreeMap::new();
    for package in packages {
        by_name.entry(&package.name).or_default().push(package);
    }
    let mut reached = BTreeMap::new();
    let mut open = vec!["secmon".to_owned()];
    while let Some(dependency) = open.pop() {
        // `NAME`, or `NAME VERSION` where there are several.
        let (name, version) = match dependency.split_once(' ') {
            Some((name, version)) => (name, Some(version)),
            None => (dependency.as_str(), None),
        };
        for package in by_name.get(name).into_iter().flatten() {
            let key = (package.name.clone(), package.version.clone());
            if version.is_some_and(|version| version != package.version)
                || reached.contains_key(&key)
            {
                continue;
            }
            reached.insert(key, (*package).clone());
            let own = manifests.iter().find(|(own, _)| *own == package.name);
            let wanted = own.map(|(_, manifest)| shipped_dependencies(manifest));
            open.extend(
                package
                    .dependencies
                    .iter()
                    .filter(|dependency| {
                        let name = dependency.split(' ').next().unwrap_or_default();
                        wanted.as_ref().is_none_or(|wanted| wanted.contains(name))
                    })
                    .cloned(),
            );
        }
    }
    reached
        .into_values()
        .filter(|package| package.name != "secmon")
        .collect()
}

/// The names below `[dependencies]` of a manifest. What is optional is for the
/// host alone: the appliance's program is built without it.
fn shipped_dependencies(manifest: &str) -> BTreeSet<&str> {
    let mut section = "";
    let mut names = BTreeSet::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            section = line;
        } else if section == "[dependencies]"
            && !line.contains("optional = true")
            && let Some(end) = line.find(['.', ' ', '='])
            && let Some(name) = line.get(..end)
            && !name.is_empty()
            && !name.starts_with('#')
        {
            names.insert(name);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ships_is_listed_and_what_tests_need_is_not() {
        let shipped = shipped(&parse_lock(LOCK), MANIFESTS);
        let has = |name: &str| shipped.iter().any(|package| package.name == name);
        for name in [
            "secmon-memory",
            "secmon-monitor",
            "secmon-channel",
            "snow",
            "clap",
            "curve25519-dalek",
        ] {
            assert!(has(name), "{name}");
        }
        for name in ["secmon", "proptest", "secmon-lab", "rusqlite"] {
            assert!(!has(name), "{name}");
        }
        let unsummed: Vec<&str> = shipped
            .iter()
            .filter(|package| package.checksum.is_none())
            .map(|package| package.name.as_str())
            .collect();
        assert!(
            unsummed.iter().all(|name| name.starts_with("secmon-")),
            "{unsummed:?}"
        );
        let own: BTreeSet<&str> = MANIFESTS.iter().map(|(name, _)| *name).collect();
        assert!(
            unsummed.iter().all(|name| own.contains(name)),
            "{unsummed:?}: add its manifest"
        );
    }

    #[test]
    fn a_dependency_of_several_versions_is_told_by_its_version() {
        let lock = "[[package]]\nname = \"secmon\"\nversion = \"1.0.0\"\ndependencies = [\n \"a 2.0.0\",\n]\n\n\
                    [[package]]\nname = \"a\"\nversion = \"1.0.0\"\n\n[[package]]\nname = \"a\"\nversion = \"2.0.0\"\nchecksum = \"ff\"\n";
        let shipped = shipped(&parse_lock(lock), &[]);
        assert_eq!(shipped.len(), 1);
        assert_eq!(
            (shipped[0].version.as_str(), shipped[0].checksum.as_deref()),
            ("2.0.0", Some("ff"))
        );
        let manifest = "[dependencies]\na.workspace = true\nb = \"1\"\n# c = 1\n\
                        e = { version = \"1\", optional = true }\n[dev-dependencies]\nd = \"1\"\n";
        assert_eq!(shipped_dependencies(manifest), BTreeSet::from(["a", "b"]));
    }
}
