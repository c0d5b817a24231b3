//! From a target's name to its memory and its guest, with this process
//! confined on the way.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use secmon_guest::Guest;
use secmon_guest::linux::task;
use secmon_guest::linux::user::UserMemory;
use secmon_memory::{PhysicalAddress, PhysicalMemory};
use secmon_platform::image::{self, ImageOptions};
use secmon_platform::layout::{Machine, RamLayout};
use secmon_platform::qemu::{self, Access, QemuOptions, Selector};
use secmon_profile::{Cache, FindOptions};

use crate::arguments::Common;
use crate::inspect::Place;
use crate::location::Location;
use crate::report::{Advise, Reporter};
use crate::sandbox::{self, Needs, Stage};

/// What to do where no target was named.
const NO_TARGET: &str = "name one with -t or SECMON_TARGET, for example -t file:memory.raw \
                         or -t qemu:NAME; `secmon targets` lists what can be watched here";

/// An open target.
pub struct Source {
    /// Its memory.
    pub memory: Arc<dyn PhysicalMemory>,
    /// Page-table roots that are in use by its vCPUs.
    pub roots: Vec<PhysicalAddress>,
}

/// What a command needs of the file system besides the target.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    /// Folders that it writes files to.
    pub folders: Vec<PathBuf>,
}

/// The options and the reporter, which every step needs.
pub struct Session<'a> {
    common: &'a Common,
    reporter: Reporter,
}

impl<'a> Session<'a> {
    /// A session with these options.
    pub fn new(common: &'a Common, reporter: Reporter) -> Self {
        Self { common, reporter }
    }

    /// Opens the target's memory and confines this process to it, the cache
    /// and the outputs.
    pub fn open(&self, outputs: &Outputs) -> Result<Source> {
        let started = Instant::now();
        let Some(target) = &self.common.target else {
            return Err(anyhow!("no target was named")).advise(NO_TARGET);
        };
        let source = match target.split_once(':') {
            Some(("file", path)) => self.open_file(Path::new(path), outputs)?,
            Some(("qemu", name)) => self.open_qemu(name, outputs)?,
            _ => return Err(anyhow!("`{target}` names no target")).advise(NO_TARGET),
        };
        let elapsed = started.elapsed();
        self.reporter.note(format_args!(
            "opened {target} in {elapsed:.1?}: {} MiB in {} regions",
            source.memory.size() >> 20,
            source.memory.regions().len()
        ));
        Ok(source)
    }

    fn open_file(&self, path: &Path, outputs: &Outputs) -> Result<Source> {
        self.confine(
            Stage::Opening,
            &Needs {
                readable: vec![path.to_owned()],
                ..self.needs(outputs)
            },
        );
        let size = fs::metadata(path).map_or(0, |metadata| metadata.len());
        let layout = self.layout(Some(size))?;
        let options = ImageOptions {
            layout: layout.as_ref(),
            ..ImageOptions::default()
        };
        let image = image::open(path, &options).with_context(|| match &self.common.layout {
            Some(layout) => format!("target file:{} with --layout {layout}", path.display()),
            None => format!("target file:{}", path.display()),
        })?;
        for note in &image.notes {
            self.reporter.warn(note);
        }
        self.reporter.note(format_args!("format: {}", image.format));
        Ok(Source {
            roots: image.hints.page_table_roots(),
            memory: image.memory,
        })
    }

    fn open_qemu(&self, name: &str, outputs: &Outputs) -> Result<Source> {
        let options = QemuOptions {
            layout: self.layout(None)?,
            ..QemuOptions::default()
        };
        let Ok(selector) = name.parse::<Selector>();
        let target =
            qemu::open(&selector, &options).with_context(|| format!("target qemu:{name}"))?;
        for note in &target.notes {
            self.reporter.warn(note);
        }
        self.reporter.note(format_args!(
            "process {}, memory by {}, layout {}",
            target.process.id.pid, target.access, target.layout_source
        ));
        self.confine(
            Stage::Opening,
            &Needs {
                traces_process: matches!(
                    target.access,
                    Access::ProcessMemory {
                        method: "process_vm_readv"
                    }
                ),
                ..self.needs(outputs)
            },
        );
        Ok(Source {
            memory: target.memory,
            roots: Vec::new(),
        })
    }

    /// The layout that the user stated, for RAM of this size.
    fn layout(&self, ram_size: Option<u64>) -> Result<Option<RamLayout>> {
        let Some(text) = &self.common.layout else {
            return Ok(None);
        };
        let stated = || format!("--layout {text}");
        let layout = match (Machine::from_name(text), ram_size) {
            (Some(machine), Some(size)) => {
                RamLayout::for_machine(machine, size).with_context(stated)?
            }
            (Some(_), None) => bail!(
                "--layout {text}: a machine type is for a raw image, whose size is that of its \
                 RAM; state the layout as START-END@OFFSET,… here"
            ),
            (None, _) => text.parse().with_context(stated)?,
        };
        Ok(Some(layout))
    }

    /// Finds the kernel in the target's memory, then gives up the right to
    /// open files.
    pub fn guest(&self, source: &Source) -> Result<Guest> {
        let started = Instant::now();
        let options = FindOptions {
            cache: match self.cache_folder() {
                Some(folder) => Cache::Folder(folder),
                None => Cache::Off,
            },
            isf: self.common.isf.clone(),
            root_hints: source.roots.clone(),
            ..FindOptions::default()
        };
        let kernel = secmon_profile::find(&source.memory, &options)?;
        let elapsed = started.elapsed();
        self.reporter.note(format_args!(
            "found the kernel in {elapsed:.1?}: {}, profile from {:?}, page tables from {:?}",
            kernel.profile.banner(),
            kernel.evidence.profile,
            kernel.evidence.tables,
        ));
        for conflict in &kernel.conflicts {
            self.reporter.warn(conflict);
        }
        self.confine(Stage::Reading, &Needs::default());
        Ok(Guest::new(kernel))
    }

    /// The place that the user means; a physical address needs no kernel.
    pub fn place(&self, source: &Source, location: &Location) -> Result<Place> {
        match location {
            Location::Physical(address) => {
                self.confine(Stage::Reading, &Needs::default());
                Ok(Place::Physical(source.memory.clone(), *address))
            }
            other => resolve(&self.guest(source)?, other),
        }
    }

    fn confine(&self, stage: Stage, needs: &Needs) {
        if self.common.no_sandbox {
            return;
        }
        let started = Instant::now();
        for weakness in sandbox::confine(stage, needs) {
            self.reporter.note(weakness);
        }
        let elapsed = started.elapsed();
        self.reporter
            .note(format_args!("confined for {stage:?} in {elapsed:.1?}"));
    }

    fn needs(&self, outputs: &Outputs) -> Needs {
        let mut needs = Needs {
            readable: self.common.isf.iter().cloned().collect(),
            writable: outputs.folders.clone(),
            ..Needs::default()
        };
        if let Some(folder) = self.cache_folder() {
            // Where it can't be made there is no cache to write either.
            let _ = fs::create_dir_all(&folder);
            needs.writable.push(folder);
        }
        needs
    }

    /// Where profiles are kept, by the XDG base directory specification.
    fn cache_folder(&self) -> Option<PathBuf> {
        if self.common.no_cache {
            return None;
        }
        let absolute = |name: &str| {
            let path = PathBuf::from(std::env::var_os(name)?);
            path.is_absolute().then_some(path)
        };
        self.common.cache_dir.clone().or_else(|| {
            absolute("XDG_CACHE_HOME")
                .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
                .map(|cache| cache.join("secmon/profiles"))
        })
    }
}

/// Looks a place up in the guest.
pub fn resolve(guest: &Guest, location: &Location) -> Result<Place> {
    let kernel = |address| Place::Virtual(Box::new(guest.space().clone()), address);
    match location {
        Location::Physical(address) => {
            Ok(Place::Physical(guest.space().memory().clone(), *address))
        }
        Location::Kernel(address) => Ok(kernel(*address)),
        Location::Symbol { name, offset } => {
            let symbols = guest.symbols();
            let mut found = symbols.addresses(name);
            let Some(address) = found.next() else {
                return Err(anyhow!("the kernel has no symbol `{name}`"))
                    .advise("`secmon symbols` lists all, for example with -w 'name~tcp_v4'");
            };
            let others = found.count();
            if others > 0 {
                return Err(anyhow!(
                    "{} symbols of the kernel are called `{name}`",
                    others + 1
                ))
                .advise(format!(
                    "give the address: `secmon symbols -w name={name}` lists them"
                ));
            }
            Ok(kernel(address.as_u64().wrapping_add_signed(*offset)))
        }
        Location::Process { pid, address } => {
            let mut tasks = task::leaders(guest, "processes")?;
            let Some(task) = tasks.find(|task| u64::from(task.tgid) == *pid) else {
                return Err(anyhow!("no process has the id {pid}"))
                    .advise("`secmon ps` lists all; the id is that of the initial namespace");
            };
            if task.mm.is_null() {
                bail!("process {pid} is a kernel thread or has ended: it has no memory of its own");
            }
            let memory = UserMemory::new(guest, task.mm)
                .with_context(|| format!("the memory of process {pid}"))?;
            Ok(Place::Virtual(Box::new(memory.space().clone()), *address))
        }
    }
}
