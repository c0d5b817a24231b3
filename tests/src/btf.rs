//! Type information (BTF) as bpftool reads it: a reader that shares nothing
//! with the one whose table is compared with it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// A row of the table `types`, without the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedType {
    /// `int`, `struct` and so on.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its bytes, where it has a size.
    pub size: Option<u64>,
    /// Members or enumerators, as the table writes them.
    pub members: Vec<String>,
}

/// A kernel's types, or those of a module on top of them, by their ids.
#[derive(Clone, Default)]
pub struct Types {
    types: BTreeMap<u32, Type>,
    /// The first id that is not the base's.
    first: u32,
}

#[derive(Clone, Deserialize)]
struct Type {
    id: u32,
    kind: String,
    name: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    type_id: u32,
    #[serde(default)]
    nr_elems: u64,
    #[serde(default)]
    fwd_kind: String,
    #[serde(default)]
    members: Vec<Member>,
    #[serde(default)]
    values: Vec<Enumerator>,
}

#[derive(Clone, Deserialize)]
struct Member {
    name: String,
    type_id: u32,
    bits_offset: u64,
    #[serde(default)]
    bitfield_size: u64,
}

#[derive(Clone, Deserialize)]
struct Enumerator {
    name: String,
    val: i128,
}

/// bpftool's name for no name.
const NAMELESS: &str = "(anon)";

impl Types {
    /// Lets bpftool read the blob in the file `path`; a module's on top of
    /// the kernel's own types, which lie in the file `base`.
    ///
    /// # Errors
    /// If bpftool is not there or can't read it.
    pub fn read(path: &Path, base: Option<(&Path, &Self)>) -> Result<Self> {
        // It is among the administrator's programs.
        let installed = Path::new("/usr/sbin/bpftool");
        let program = match installed.exists() {
            true => installed,
            false => Path::new("bpftool"),
        };
        let mut command = Command::new(program);
        command.arg("--json");
        if let Some((base, _)) = base {
            command.arg("--base-btf").arg(base);
        }
        command.args(["btf", "dump", "file"]).arg(path);
        let output = command
            .args(["format", "raw"])
            .output()
            .context("running bpftool, of Debian's package bpftool")?;
        ensure!(
            output.status.success(),
            "{command:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        #[derive(Deserialize)]
        struct Document {
            types: Vec<Type>,
        }
        let document: Document =
            serde_json::from_slice(&output.stdout).context("bpftool's answer")?;
        let mut all = base.map_or_else(Self::default, |(_, base)| base.clone());
        all.first = document.types.first().context("no types")?.id;
        all.types
            .extend(document.types.into_iter().map(|found| (found.id, found)));
        Ok(all)
    }

    /// The named types in the order of their ids, without those of the base.
    ///
    /// # Errors
    /// If a type refers to one that is not there.
    pub fn rows(&self) -> Result<Vec<NamedType>> {
        let own = self.types.range(self.first..).map(|(_, found)| found);
        own.filter_map(|found| self.row(found).transpose())
            .collect()
    }

    fn row(&self, found: &Type) -> Result<Option<NamedType>> {
        let kind = match found.kind.as_str() {
            "INT" => "int",
            "FLOAT" => "float",
            "STRUCT" => "struct",
            "UNION" => "union",
            "ENUM" | "ENUM64" => "enum",
            "TYPEDEF" => "typedef",
            _ => return Ok(None),
        };
        if found.name == NAMELESS {
            return Ok(None);
        }
        let members = match kind {
            "struct" | "union" => found.members.iter().map(|m| self.member(m)).collect(),
            "enum" => Ok(found.values.iter().map(enumerator).collect()),
            _ => Ok(Vec::new()),
        };
        Ok(Some(NamedType {
            kind: kind.to_owned(),
            name: found.name.clone(),
            size: self.size(found.id)?,
            members: members.with_context(|| format!("{kind} {}", found.name))?,
        }))
    }

    fn get(&self, id: u32) -> Result<&Type> {
        self.types.get(&id).with_context(|| format!("no type {id}"))
    }

    /// The bytes of a type; none of a function, a declaration, of `void`.
    fn size(&self, id: u32) -> Result<Option<u64>> {
        if id == 0 {
            return Ok(None);
        }
        let found = self.get(id)?;
        Ok(match found.kind.as_str() {
            "INT" | "FLOAT" | "STRUCT" | "UNION" | "ENUM" | "ENUM64" => Some(found.size),
            "PTR" => Some(8),
            "ARRAY" => self
                .size(found.type_id)?
                .map(|element| element * found.nr_elems),
            "TYPEDEF" | "CONST" | "VOLATILE" | "RESTRICT" | "TYPE_TAG" => {
                self.size(found.type_id)?
            }
            _ => None,
        })
    }

    fn member(&self, member: &Member) -> Result<String> {
        let name = match member.name.as_str() {
            NAMELESS => "(anonymous)",
            name => name,
        };
        let (offset, bits) = match member.bitfield_size {
            0 => (member.bits_offset / 8, String::new()),
            bits => {
                // In the aligned unit of its type, or where it crosses the end
                // of one, from the byte on in which it starts.
                let size = self
                    .size(member.type_id)?
                    .context("a bit field of a size")?;
                let unit = match member.bits_offset % (size * 8) + bits <= size * 8 {
                    true => size,
                    false => 1,
                };
                let shift = member.bits_offset % (unit * 8);
                (
                    (member.bits_offset - shift) / 8,
                    format!(" bits {shift}+{bits}"),
                )
            }
        };
        let [base, pointers, dimensions] = self.spelled(member.type_id)?;
        Ok(format!(
            "{offset:#x} {name}: {base}{pointers}{dimensions}{bits}"
        ))
    }

    /// A type as the table writes it: what it is made of, then what leads
    /// there, then how many there are.
    fn spelled(&self, id: u32) -> Result<[String; 3]> {
        let plain = |base: String| Ok([base, String::new(), String::new()]);
        if id == 0 {
            return plain("void".to_owned());
        }
        let found = self.get(id)?;
        let name = match found.name.as_str() {
            NAMELESS => "(anonymous)",
            name => name,
        };
        match found.kind.as_str() {
            "INT" | "FLOAT" | "TYPEDEF" => plain(name.to_owned()),
            "STRUCT" => plain(format!("struct {name}")),
            "UNION" => plain(format!("union {name}")),
            "ENUM" | "ENUM64" => plain(format!("enum {name}")),
            "FWD" => plain(format!("{} {name}", found.fwd_kind)),
            "FUNC_PROTO" => plain("function".to_owned()),
            "PTR" => {
                let [base, pointers, dimensions] = self.spelled(found.type_id)?;
                Ok([base, format!("{pointers}{dimensions} *"), String::new()])
            }
            "ARRAY" => {
                let [base, pointers, dimensions] = self.spelled(found.type_id)?;
                let dimensions = format!("[{}]{dimensions}", found.nr_elems);
                Ok([base, pointers, dimensions])
            }
            "CONST" | "VOLATILE" => {
                let word = found.kind.to_lowercase();
                let [base, pointers, dimensions] = self.spelled(found.type_id)?;
                let of_pointer = found.type_id != 0 && self.get(found.type_id)?.kind == "PTR";
                Ok(match of_pointer {
                    true => [base, format!("{pointers} {word}"), dimensions],
                    false => [format!("{word} {base}"), pointers, dimensions],
                })
            }
            "RESTRICT" | "TYPE_TAG" => self.spelled(found.type_id),
            kind => bail!("type {id} is a {kind}"),
        }
    }
}

fn enumerator(enumerator: &Enumerator) -> String {
    format!("{} = {}", enumerator.name, enumerator.val)
}
