//! Makes a specimen active in a guest, asks the guest how that looks from
//! inside, and takes it back.

use anyhow::{Context as _, Result, bail, ensure};
use secmon_truth::Process;

use super::{How, Module, Need, Shown, Specimen};
use crate::guest::Guest;

/// The module that others hide.
const RESIDENT: &str = "resident";
/// The module that hides one.
const HIDER: &str = "module_unlinked";

/// A specimen that is active. It stays so until [`Active::end`]; whoever drops
/// it leaves the guest as it is.
#[derive(Debug)]
pub struct Active<'a> {
    guest: &'a Guest,
    specimen: &'a Specimen,
    /// Undone from the last to the first.
    done: Vec<Done>,
    /// The process that was started, and its threads.
    threads: Vec<i32>,
    /// The module that is hidden, if one is.
    hidden: Option<&'static str>,
}

#[derive(Debug)]
enum Done {
    Role(&'static str),
    Module(&'static str),
    Wrote { path: &'static str, before: String },
}

impl<'a> Active<'a> {
    /// Makes it active. What an edit of memory needs in the guest is made
    /// here, the edit itself is not.
    ///
    /// # Errors
    /// If the guest can't; what was done until then is undone.
    pub fn start(guest: &'a Guest, specimen: &'a Specimen) -> Result<Self> {
        let mut active = Self {
            guest,
            specimen,
            done: Vec::new(),
            threads: Vec::new(),
            hidden: None,
        };
        match active.make() {
            Ok(()) => Ok(active),
            Err(error) => {
                let error = error.context(format!("the specimen {}", specimen.name));
                match active.end() {
                    Ok(()) => Err(error),
                    Err(second) => Err(error.context(format!("and, undoing it: {second:#}"))),
                }
            }
        }
    }

    fn make(&mut self) -> Result<()> {
        match self.specimen.how {
            How::Module(module) => self.load(&module),
            How::HiddenModule(module) => {
                self.load(&module)?;
                self.hidden = Some(module.file);
                self.insert(HIDER, &format!("victim={}", module.file), &[])
            }
            How::Program(role) => self.play(role),
            How::Setting { path, text } => {
                let before = self.guest.truth().read_file(path)?.to_string();
                self.guest.truth().write_file(path, text)?;
                self.done.push(Done::Wrote { path, before });
                Ok(())
            }
            How::MemoryEdit(_) => self.play("ordinary"),
        }
    }

    fn load(&mut self, module: &Module) -> Result<()> {
        let mut parameters = Vec::new();
        let mut symbols = Vec::new();
        for need in module.needs {
            match *need {
                Need::Symbol(symbol) => symbols.push(symbol),
                Need::SymbolIfThere(symbol) => {
                    let there = self.guest.truth().has_symbol(symbol)?;
                    symbols.extend(there.then_some(symbol));
                }
                Need::Process(role) => {
                    self.play(role)?;
                    let pid = self.threads.first().context("a process")?;
                    parameters.push(format!("pid={pid}"));
                }
                Need::Thread(role) => {
                    self.play(role)?;
                    let tid = self.threads.get(1).context("a second thread")?;
                    parameters.push(format!("tid={tid}"));
                }
                Need::Resident => {
                    self.insert(RESIDENT, "", &[])?;
                    self.hidden = Some(RESIDENT);
                    parameters.push(format!("victim={RESIDENT}"));
                }
                Need::Set(text) => parameters.push(text.to_owned()),
            }
        }
        self.insert(module.file, &parameters.join(" "), &symbols)
    }

    fn insert(&mut self, name: &'static str, parameters: &str, symbols: &[&str]) -> Result<()> {
        let loaded = self.guest.truth().load_module(name, parameters, symbols);
        loaded.with_context(|| format!("loading {name}"))?;
        self.done.push(Done::Module(name));
        Ok(())
    }

    fn play(&mut self, role: &'static str) -> Result<()> {
        self.threads = self.guest.truth().start_role(role)?;
        self.done.push(Done::Role(role));
        Ok(())
    }

    /// The specimen's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.specimen.name
    }

    /// The process that was started for it.
    #[must_use]
    pub fn process(&self) -> Option<i32> {
        self.threads.first().copied()
    }

    /// Fails unless the guest itself shows what the specimen does, or, once it
    /// was taken back (`active` is false), no longer shows it.
    ///
    /// # Errors
    /// What the guest shows instead.
    pub fn check_shown(&self, active: bool) -> Result<()> {
        let name = self.specimen.name;
        for (what, seen) in self.signs()? {
            ensure!(
                seen == active,
                "{name}: {what} is {seen} in the guest, not {active}"
            );
        }
        Ok(())
    }

    /// What is true exactly while the specimen is active.
    fn signs(&self) -> Result<Vec<(&'static str, bool)>> {
        let truth = self.guest.truth();
        let no_process = || -> Result<_> { Ok(("no process", self.its_process()?.is_none())) };
        let no_task = || -> Result<_> { Ok(("no task", !truth.user_has_process(USER)?)) };
        Ok(match self.specimen.shown {
            Shown::Stands => Vec::new(),
            Shown::NoProcess => vec![no_process()?],
            Shown::NoTask => vec![no_task()?],
            Shown::NeitherProcessNorTask => vec![no_process()?, no_task()?],
            Shown::NoThread => {
                let tid = self.threads.get(1).context("a second thread")?;
                let seen = truth.threads()?.iter().any(|thread| thread.tid == *tid);
                vec![("no thread", !seen)]
            }
            Shown::NoModule => {
                let hidden = self.hidden.context("a hidden module")?;
                let seen = truth.modules()?.iter().any(|module| module.name == hidden);
                vec![("no module", !seen)]
            }
            Shown::NoModuleFolder => {
                let hidden = self.hidden.context("a hidden module")?;
                vec![(
                    "no folder of the module",
                    !truth.exists(&format!("/sys/module/{hidden}"))?,
                )]
            }
            Shown::UserZero => {
                let process = self.its_process()?.context("the process")?;
                vec![("user 0", process.uid == [0; 4])]
            }
            Shown::AllCapabilities => {
                let pid = self.process().context("a process")?;
                let status = truth.read_file(&format!("/proc/{pid}/status"))?.to_string();
                let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
                let effective = u64::from_str_radix(line.context("CapEff")?.trim(), 16)?;
                vec![("all capabilities", effective.trailing_ones() >= 38)]
            }
            Shown::NoListener(port) => {
                let text = truth.read_file("/proc/net/tcp")?.to_string();
                // Address and port in hexadecimal; state 0A listens.
                let listens = |line: &str| {
                    let words: Vec<&str> = line.split_whitespace().collect();
                    matches!(words.as_slice(), [_, local, _, "0A", ..]
                        if local.ends_with(&format!(":{port:04X}")))
                };
                vec![("no listener", !text.lines().any(listens))]
            }
            Shown::KernelThread(name) => {
                let mut processes = truth.processes()?.into_iter();
                let seen = processes.any(|process| process.kernel_thread && process.comm == name);
                vec![("kernel thread", seen)]
            }
        })
    }

    fn its_process(&self) -> Result<Option<Process>> {
        let pid = self.process().context("a process")?;
        let mut processes = self.guest.truth().processes()?.into_iter();
        Ok(processes.find(|process| process.pid == pid))
    }

    /// Takes back the change, so that what it was made to is as before and
    /// still there to be looked at.
    ///
    /// # Errors
    /// If the guest can't.
    pub fn take_back(&mut self) -> Result<()> {
        match self.done.pop() {
            None => bail!("{} has nothing to take back", self.specimen.name),
            Some(done) => self.undo(done),
        }
    }

    /// Undoes all that is left.
    ///
    /// # Errors
    /// If the guest can't.
    pub fn end(mut self) -> Result<()> {
        while let Some(done) = self.done.pop() {
            self.undo(done)
                .with_context(|| format!("undoing the specimen {}", self.specimen.name))?;
        }
        Ok(())
    }

    fn undo(&mut self, done: Done) -> Result<()> {
        let truth = self.guest.truth();
        match done {
            Done::Role(role) => truth.stop_role(role),
            Done::Module(name) => truth.unload_module(name),
            Done::Wrote { path, before } => truth.write_file(path, before.trim_end()),
        }
    }
}

/// The user of the role `ordinary`.
const USER: u32 = 4343;
