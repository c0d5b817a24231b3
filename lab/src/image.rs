//! Stores a guest's memory and truth as files, for work without a guest.

use std::fs;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use secmon_truth::Section;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::guest::Guest;
use crate::qmp::DumpFormat;

/// A whole truth: every section by its name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Truth(pub Map<String, Value>);

impl Truth {
    /// Asks for every section but the symbols.
    pub fn ask(guest: &Guest) -> Result<Self> {
        let mut sections = Map::new();
        for section in Section::ALL {
            if section != Section::Kallsyms {
                let value = guest.truth().section(section)?;
                sections.insert(section.name().to_owned(), value);
            }
        }
        Ok(Self(sections))
    }

    fn write(&self, to: &Path) -> Result<()> {
        let mut file = BufWriter::new(fs::File::create(to)?);
        serde_json::to_writer(&mut file, self)?;
        file.flush()?;
        Ok(())
    }
}

/// Writes into `folder`: `ram.raw` (with a file-backed guest), `vmcore.elf`,
/// `truth.json` and `truth-after.json` (told before and after the moment of
/// the image; what was there all the time is in both), `kallsyms.txt`,
/// `cmdline.txt`, and what the hypervisor says: `registers.txt`,
/// `mtree.txt`. RAM and core are of one moment, at which the guest stood
/// still.
pub fn write_image(guest: &Guest, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let folder = folder.canonicalize()?;
    let mut symbols = BufWriter::new(fs::File::create(folder.join("kallsyms.txt"))?);
    for symbol in guest.truth().kallsyms()? {
        write!(
            symbols,
            "{:016x} {} {}",
            symbol.address, symbol.kind, symbol.name
        )?;
        match symbol.module {
            Some(module) => writeln!(symbols, "\t[{module}]")?,
            None => writeln!(symbols)?,
        }
    }
    symbols.flush()?;
    let before = Truth::ask(guest)?;
    guest.while_stopped(|control| {
        let mut registers = String::new();
        let vcpus = control.human("info cpus")?.lines().count().max(1);
        for vcpu in 0..u32::try_from(vcpus)? {
            registers += &format!("CPU#{vcpu}\n{}", control.registers(vcpu)?);
        }
        fs::write(folder.join("registers.txt"), registers)?;
        fs::write(folder.join("mtree.txt"), control.human("info mtree -f")?)?;
        let core = folder.join("vmcore.elf");
        // QEMU doesn't write over a file.
        if core.exists() {
            fs::remove_file(&core)?;
        }
        control.dump(&core, DumpFormat::Elf)?;
        if let Some(ram) = guest.ram_file() {
            fs::copy(ram, folder.join("ram.raw"))?;
        }
        Ok(())
    })?;
    let after = Truth::ask(guest)?;
    before.write(&folder.join("truth.json"))?;
    after.write(&folder.join("truth-after.json"))?;
    let cmdline = guest.truth().info()?.cmdline;
    fs::write(folder.join("cmdline.txt"), cmdline.as_bytes())?;
    Ok(())
}
