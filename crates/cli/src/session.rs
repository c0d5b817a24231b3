//! From a target's name to its memory and its guest, with this process
//! confined on the way.

use std::cell::Cell;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use secmon_guest::Guest;
use secmon_guest::linux::task;
use secmon_guest::linux::user::UserMemory;
use secmon_memory::{
    AddressSpace, CachedMemory, Freshness, MemoryRegion, PhysicalMemory, Volatility,
};
use secmon_platform::layout::{Machine, RamLayout};
use secmon_platform::qemu::{Access, Pause, PauseError};
use secmon_platform::target::{OpenOptions, OpenedTarget, Target};
use secmon_profile::{Cache, CacheOutcome, FindOptions, Kernel, Search};

use crate::arguments::Common;
use crate::command::RESUME_WATCH;
use crate::inspect::Place;
use crate::location::Location;
use crate::report::{Advise, Reporter};
use secmon_sandbox::{Needs, Stage};

/// What to do where no target was named.
const NO_TARGET: &str = "name one with -t or SECMON_TARGET, for example -t file:memory.raw \
                         or -t qemu:NAME; `secmon targets` lists what can be watched here";

/// An open target, paused if that was asked for.
pub struct Source {
    target: OpenedTarget,
    memory: Arc<dyn PhysicalMemory>,
    pause: Option<Pause>,
}

impl Source {
    /// The target's memory.
    pub fn memory(&self) -> &Arc<dyn PhysicalMemory> {
        &self.memory
    }

    /// The kernel's VMCOREINFO text, where the target itself has it.
    pub fn vmcoreinfo(&self) -> Option<&[u8]> {
        self.target.hints.vmcoreinfo.as_deref()
    }

    /// Whether the target's QEMU still runs; `None` where there is none to ask.
    #[cfg(feature = "watch")]
    pub fn is_alive(&self) -> Option<bool> {
        self.target.is_alive()
    }

    /// Lets a paused guest run again. Dropping does so, too, but says nothing
    /// of a guest that ran meanwhile.
    pub fn finish(mut self) -> Result<()> {
        match self.pause.take().map(Pause::end) {
            None | Some(Ok(())) => Ok(()),
            Some(Err(error)) => {
                let advice = match &error {
                    PauseError::LimitReached(_) => {
                        "allow more with --pause-limit SECONDS; what was read before the limit is good"
                    }
                    PauseError::ResumedByOthers => {
                        "somebody let the guest run: what was read may mix several moments"
                    }
                    _ => {
                        "see that the guest runs: `virsh resume NAME`, `cont` in QEMU's monitor, \
                         or `kill -CONT PID`"
                    }
                };
                Err(error).advise(advice)
            }
        }
    }
}

/// The options and the reporter, which every step needs.
pub struct Session<'a> {
    common: &'a Common,
    reporter: Reporter,
    /// Folders that the command writes files to.
    outputs: Vec<PathBuf>,
    /// Files and folders that it reads.
    inputs: Vec<PathBuf>,
    confined: Cell<bool>,
}

impl<'a> Session<'a> {
    /// A session with these options.
    pub fn new(common: &'a Common, reporter: Reporter) -> Self {
        Self {
            common,
            reporter,
            outputs: Vec::new(),
            inputs: Vec::new(),
            confined: Cell::new(false),
        }
    }

    /// Says that the command writes files to this folder.
    pub fn writes_to(&mut self, folder: PathBuf) {
        self.outputs.push(folder);
    }

    /// Says that the command reads these files, and what is in these folders.
    pub fn reads(&mut self, paths: Vec<PathBuf>) {
        self.inputs.extend(paths);
    }

    /// Opens the target, pauses it if asked, and confines this process to it,
    /// the cache and the outputs.
    pub fn open(&self) -> Result<Source> {
        let started = Instant::now();
        let Some(text) = &self.common.target else {
            return Err(anyhow!("no target was named")).advise(NO_TARGET);
        };
        let target: Target = text.parse().advise(NO_TARGET)?;
        let options = OpenOptions {
            layout: self.layout(&target)?,
            validate: Some(&|memory| self.judge(memory)),
            format: self.common.image_format.map(Into::into),
            ..OpenOptions::default()
        };
        // Its error names the target itself.
        let opened = target.open(&options);
        let opened = match &self.common.layout {
            Some(layout) => opened.with_context(|| format!("with --layout {layout}"))?,
            None => opened?,
        };
        for note in &opened.notes {
            self.reporter.warn(note);
        }
        let elapsed = started.elapsed();
        let memory = &opened.memory;
        self.reporter.note(format_args!(
            "opened in {elapsed:.1?}: {}; {} MiB of memory in {} region(s)",
            opened.description,
            memory.size() >> 20,
            memory.regions().len()
        ));
        let pause = self.pause(&opened)?;
        self.confine_for_opening(&opened);
        Ok(Source {
            memory: self.cached(&opened.memory, pause.is_some()),
            target: opened,
            pause,
        })
    }

    /// Memory with a cache in front, where one is allowed and worth it.
    fn cached(&self, memory: &Arc<dyn PhysicalMemory>, paused: bool) -> Arc<dyn PhysicalMemory> {
        let freshness = match self.common.max_age {
            _ if paused => Freshness::SinceClear,
            Some(age) => Freshness::MaxAge(Duration::from_millis(age)),
            None => return memory.clone(),
        };
        if memory.mapped().is_some() || memory.volatility() == Volatility::Static {
            return memory.clone();
        }
        let capacity = CachedMemory::DEFAULT_CAPACITY;
        Arc::new(CachedMemory::with_freshness(
            memory.clone(),
            capacity,
            freshness,
        ))
    }

    fn pause(&self, target: &OpenedTarget) -> Result<Option<Pause>> {
        if !self.common.pause {
            return Ok(None);
        }
        let Some(method) = &target.pause else {
            return Err(anyhow!("--pause: {} can't be paused", target.description))
                .advise("only a running QEMU can; an image stands still anyway");
        };
        let started = Instant::now();
        let mut watcher =
            Command::new(std::env::current_exe().context("finding this program's own file")?);
        watcher.arg(RESUME_WATCH);
        let limit = Duration::from_secs(self.common.pause_limit);
        let pause = Pause::begin(method, limit, watcher).context("pausing the guest")?;
        if let Some(state) = pause.already_stopped() {
            self.reporter.note(format_args!(
                "the guest stood still already ({state}) and will be left so"
            ));
        }
        let elapsed = started.elapsed();
        self.reporter
            .note(format_args!("paused the guest in {elapsed:.1?}"));
        Ok(Some(pause))
    }

    /// The layout that the user stated.
    fn layout(&self, target: &Target) -> Result<Option<RamLayout>> {
        let Some(text) = &self.common.layout else {
            return Ok(None);
        };
        let stated = || format!("--layout {text}");
        let layout = match (Machine::from_name(text), target) {
            (Some(machine), Target::File(path)) => {
                let size = match self.common.ram_size {
                    Some(size) => size,
                    None => fs::metadata(path).map_or(0, |metadata| metadata.len()),
                };
                RamLayout::for_machine(machine, size).with_context(stated)?
            }
            (Some(machine), _) => {
                let Some(size) = self.common.ram_size else {
                    bail!("--layout {text} needs --ram-size for this target");
                };
                RamLayout::for_machine(machine, size).with_context(stated)?
            }
            (None, _) => text.parse().with_context(stated)?,
        };
        Ok(Some(layout))
    }

    /// How well memory fits a possible layout: the number of processes that
    /// can be walked in it. This parses guest memory, so it comes after the
    /// confinement.
    fn judge(&self, memory: &Arc<dyn PhysicalMemory>) -> u64 {
        self.confine_once(&self.needs(false));
        let options = FindOptions {
            cache: Cache::Off,
            ..FindOptions::default()
        };
        let Ok(kernel) = secmon_profile::find(memory, &options) else {
            return 0;
        };
        let guest = Guest::new(kernel);
        let processes = task::leaders(&guest, "processes").map_or(0, Iterator::count);
        1 + processes as u64
    }

    /// Finds the kernel in the target's memory; files can still be opened.
    pub fn guest(&self, source: &Source) -> Result<Guest> {
        let started = Instant::now();
        let options = FindOptions {
            cache: match self.cache_folder() {
                Some(folder) => Cache::Folder(folder),
                None => Cache::Off,
            },
            isf: self.common.isf.clone(),
            root_hints: source.target.hints.page_table_roots.clone(),
            search: self.search(),
            left_behind: Vec::new(),
        };
        let mut kernel = secmon_profile::find(source.memory(), &options)?;
        kernel.space = remembering(kernel.space.clone(), &kernel);
        let elapsed = started.elapsed();
        self.reporter.note(format_args!(
            "found the kernel in {elapsed:.1?}: {}; profile: {:?}, page tables: {:?}",
            kernel.profile.banner(),
            kernel.evidence.profile,
            kernel.evidence.tables,
        ));
        match &kernel.evidence.cache {
            outcome @ (CacheOutcome::Rejected { .. } | CacheOutcome::Unavailable(_)) => {
                self.reporter.warn(outcome);
            }
            outcome => self.reporter.note(format_args!("{outcome}")),
        }
        for conflict in &kernel.conflicts {
            self.reporter.warn(conflict);
        }
        Ok(Guest::new(kernel).with_registers(source.target.hints.registers.clone()))
    }

    /// How far to look for what contradicts a kernel that was found.
    pub fn search(&self) -> Search {
        if self.common.thorough {
            Search::Thorough
        } else {
            Search::Quick
        }
    }

    /// Finds the kernel, then gives up the right to open files.
    pub fn guest_alone(&self, source: &Source) -> Result<Guest> {
        let guest = self.guest(source)?;
        self.alone();
        Ok(guest)
    }

    /// Gives up the right to open files.
    pub fn alone(&self) {
        self.confine(Stage::Reading, &Needs::default());
    }

    /// The place that the user means; a physical address needs no kernel.
    pub fn place(&self, source: &Source, location: &Location) -> Result<Place> {
        match location {
            Location::Physical(address) => {
                self.confine(Stage::Reading, &Needs::default());
                Ok(Place::Physical(source.memory().clone(), *address))
            }
            other => resolve(&self.guest_alone(source)?, other),
        }
    }

    fn confine_for_opening(&self, target: &OpenedTarget) {
        let traces_process = target.qemu.as_ref().is_some_and(|qemu| {
            matches!(
                qemu.access,
                Access::ProcessMemory {
                    method: "process_vm_readv"
                }
            )
        });
        self.confine_once(&self.needs(traces_process));
    }

    fn confine_once(&self, needs: &Needs) {
        if !self.confined.replace(true) {
            self.confine(Stage::Opening, needs);
        }
    }

    /// Gives up what a stage does not need.
    pub fn confine(&self, stage: Stage, needs: &Needs) {
        if self.common.no_sandbox {
            return;
        }
        let started = Instant::now();
        for weakness in secmon_sandbox::confine(stage, needs) {
            self.reporter.note(weakness);
        }
        let elapsed = started.elapsed();
        self.reporter
            .note(format_args!("confined for {stage:?} in {elapsed:.1?}"));
    }

    fn needs(&self, traces_process: bool) -> Needs {
        let mut needs = Needs {
            readable: (self.common.isf.iter().chain(&self.inputs))
                .cloned()
                .collect(),
            writable: self.outputs.clone(),
            traces_process,
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

/// The kernel's space for one command, with a translation cache where each
/// entry of a page table costs a system call: a running guest whose memory is
/// read, not mapped.
///
/// It holds the kernel's image and the direct map alone. Linux maps both once
/// and for all: it splits and joins large pages there and takes single pages
/// out (`set_memory_…`, secret memory), but never puts another page where one
/// was. The cache ends with the command; the tables of processes and the
/// kernel's other ranges (vmalloc, modules) are walked for every read.
pub fn remembering(space: AddressSpace, kernel: &Kernel) -> AddressSpace {
    let memory = space.memory();
    if memory.mapped().is_some() || memory.volatility() == Volatility::Static {
        return space;
    }
    let end = memory.regions().iter().map(MemoryRegion::end).max();
    let end = end.unwrap_or_default().as_u64();
    let image = kernel.image.virtual_base;
    let ranges = [
        kernel.direct_map..kernel.direct_map.wrapping_add(end),
        image..image.wrapping_add(kernel.image.size),
    ];
    space.with_stale_tlb_in(&ranges)
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
            let mut found = guest.symbols().addresses(name);
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
