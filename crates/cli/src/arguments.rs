//! The command line as types: what there is to say, not what happens then.
//!
//! Commands that show a guest table are not listed here; they are made from
//! the tables themselves, see [`command`](crate::command).

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use clap_complete::Shell;
use secmon_platform::image::ImageFormat;

use crate::check::CheckArguments;
use crate::gate::GateArguments;
use crate::location::Location;
use crate::monitor::arguments::MonitorCommand;
use crate::respond::RespondArguments;
#[cfg(feature = "verify")]
use crate::verify::arguments::VerifyCommand;
#[cfg(feature = "watch")]
use crate::watch::arguments::{FindingsArguments, WatchArguments};

/// How rows are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns for people
    #[default]
    Table,
    /// One JSON array of objects
    Json,
    /// One JSON object a line
    Ndjson,
    /// Comma-separated values, with a header line
    Csv,
    /// A Markdown document; only `tables` can be written so
    #[value(hide = true)]
    Markdown,
}

/// The formats of images that can be stated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InputFormat {
    /// RAM and nothing else
    Raw,
    /// ELF core
    Elf,
    /// LiME
    Lime,
    /// AVML
    Avml,
    /// kdump-compressed
    Kdump,
}

impl From<InputFormat> for ImageFormat {
    fn from(format: InputFormat) -> Self {
        match format {
            InputFormat::Raw => Self::Raw,
            InputFormat::Elf => Self::ElfCore,
            InputFormat::Lime => Self::Lime,
            InputFormat::Avml => Self::Avml,
            InputFormat::Kdump => Self::Kdump,
        }
    }
}

/// Options that every command takes.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// What to look at: file:PATH, qemu:NAME, qemu:PID, ivshmem:PCI-ADDRESS, monitor:NAME
    ///
    /// `file:` takes a raw image, a QEMU or libvirt dump (ELF or kdump), a
    /// LiME, AVML or makedumpfile image, or the RAM file of a running QEMU;
    /// which of them it is shows in its content. `monitor:` asks a monitoring VM
    /// (monitor:NAME/TARGET if it has several targets). `secmon targets` lists
    /// what can be watched on this machine.
    #[arg(
        short,
        long,
        env = "SECMON_TARGET",
        global = true,
        hide_env = true,
        help_heading = "Target"
    )]
    pub target: Option<String>,

    /// Where the target's RAM lies: q35, i440fx, or START-END@OFFSET,…
    ///
    /// Only needed where that can't be known: for a raw image of a machine with
    /// more RAM than fits below its PCI hole, cut out of its context. A machine
    /// type states the layout that QEMU gives it. A list states each run of RAM:
    /// its first guest physical address, the address after its last, and where
    /// it starts in the file (by default right after the run before it).
    #[arg(long, value_name = "LAYOUT", global = true, help_heading = "Target")]
    pub layout: Option<String>,

    /// How much RAM the target has, for --layout with a machine type (K, M, G may follow)
    #[arg(
        long,
        value_name = "BYTES",
        value_parser = crate::location::parse_length,
        requires = "layout",
        global = true,
        help_heading = "Target"
    )]
    pub ram_size: Option<u64>,

    /// Take the file for an image of this format, whatever its first bytes say
    #[arg(
        long,
        value_name = "FORMAT",
        value_enum,
        global = true,
        help_heading = "Target"
    )]
    pub image_format: Option<InputFormat>,

    /// Symbols and types from this ISF file (JSON, also .xz) for a kernel that lacks its own
    #[arg(long, value_name = "FILE", global = true, help_heading = "Target")]
    pub isf: Option<PathBuf>,

    /// Stop the guest while it is read (QEMU; through a monitor, by its right `pause`); it always runs again afterwards
    #[arg(long, global = true, help_heading = "Target")]
    pub pause: bool,

    /// Let a paused guest run again after this time in any case
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=86_400),
        global = true,
        help_heading = "Target"
    )]
    pub pause_limit: u64,

    /// Look through all of memory for what contradicts the kernel that was found
    ///
    /// Memory can be made to mislead: a second banner, forged symbols, types or
    /// crash notes. What is used is always checked against the page tables;
    /// with this all rivals are looked for and told, in about a second for each
    /// GiB.
    #[arg(long, global = true, help_heading = "Target")]
    pub thorough: bool,

    /// Of a live target, memory read up to this long ago may be used again
    ///
    /// Faster where the memory is not shared but read out of the QEMU process.
    /// What changes meanwhile is noticed less. Without this every read is a
    /// new one; a paused guest's memory is read once.
    #[arg(
        long,
        value_name = "MILLISECONDS",
        global = true,
        help_heading = "Target"
    )]
    pub max_age: Option<u64>,

    /// How rows are written
    #[arg(
        short,
        long,
        value_enum,
        default_value_t,
        global = true,
        help_heading = "Output"
    )]
    pub format: Format,

    /// Say more on stderr: how the kernel was found, how long it took, every diagnostic
    #[arg(short, long, global = true, help_heading = "Output")]
    pub verbose: bool,

    /// Neither use nor write the cache of kernel profiles, whatever --cache-dir says
    #[arg(long, global = true, help_heading = "Cache and sandbox")]
    pub no_cache: bool,

    /// Keep kernel profiles in this folder
    #[arg(
        long,
        value_name = "DIR",
        env = "SECMON_CACHE_DIR",
        hide_env = true,
        global = true,
        help_heading = "Cache and sandbox"
    )]
    pub cache_dir: Option<PathBuf>,

    /// Don't confine this process before it parses guest memory (for debugging)
    #[arg(long, global = true, help_heading = "Cache and sandbox")]
    pub no_sandbox: bool,
}

/// Which rows and columns of a table are wanted.
#[derive(Args, Clone, Debug, Default)]
pub struct RowOptions {
    /// Only these processes
    #[arg(
        short,
        long,
        value_name = "PID",
        value_delimiter = ',',
        help_heading = "Rows"
    )]
    pub pid: Vec<u64>,

    /// Only these columns, in this order; +COLUMN adds one to the usual, `all` is all
    ///
    /// A terminal shows the usual columns, the other formats all. The columns
    /// are listed at the end of this command's --help.
    #[arg(
        short,
        long,
        value_name = "COLUMN",
        value_delimiter = ',',
        help_heading = "Rows"
    )]
    pub columns: Vec<String>,

    /// Only rows that fit: column=value, !=, <, <=, >, >=, ~ (regular expression), !~
    ///
    /// Given several times, rows must fit all. Numbers compare as numbers
    /// (0x… is hexadecimal), times by their start, a list fits if one of its
    /// items does, and `column=` finds what is empty.
    #[arg(
        short = 'w',
        long = "filter",
        value_name = "CONDITION",
        help_heading = "Rows"
    )]
    pub filters: Vec<String>,

    /// Sort by this column; COLUMN:desc starts with the highest
    #[arg(short, long, value_name = "COLUMN[:desc]", help_heading = "Rows")]
    pub sort: Option<String>,

    /// Stop after this many rows
    #[arg(short = 'n', long, value_name = "N", help_heading = "Rows")]
    pub limit: Option<u64>,

    /// Rows of every namespace, where the initial one alone is shown otherwise
    #[arg(short, long, help_heading = "Rows")]
    pub all_namespaces: bool,

    /// No header line (table and CSV)
    #[arg(long, help_heading = "Output")]
    pub no_header: bool,

    /// Exit with status 2 if anything at all could not be read
    #[arg(long, help_heading = "Output")]
    pub strict: bool,
}

/// The commands that are not a guest table.
#[derive(Clone, Debug, Subcommand)]
pub enum BuiltIn {
    /// What can be watched on this machine, and how
    Targets,

    /// All tables, or the columns of one
    Tables {
        /// The table to describe, by name or alias
        table: Option<String>,
    },

    /// Look for what hides in the guest and what was changed in its kernel
    ///
    /// Each detector compares views of the guest that must agree, and reports
    /// what is in one and missing from another, with the evidence for it.
    #[command(after_long_help = crate::check::EXAMPLES)]
    Check(CheckArguments),

    /// Look all the time, and tell what appears, changes and is gone
    ///
    /// Detectors look as often as a budget of processor time allows, at times
    /// that a guest can't foresee. Findings can be kept in a database, exported,
    /// and acted upon.
    #[cfg(feature = "watch")]
    #[command(after_long_help = crate::watch::arguments::EXAMPLES)]
    Watch(Box<WatchArguments>),

    /// Guard a monitoring VM: that its memory is what its image makes of it, and that it answers
    ///
    /// Each second what can run in it is compared with its image, byte by byte,
    /// and it must answer a challenge.
    #[cfg(feature = "watch")]
    #[command(after_long_help = crate::guard::EXAMPLES)]
    Guard(crate::guard::GuardArguments),

    /// What `watch --store` has stored
    #[cfg(feature = "watch")]
    #[command(after_long_help = crate::watch::arguments::FINDINGS_EXAMPLES)]
    Findings(FindingsArguments),

    /// Show memory at a symbol or address
    Read(ReadArguments),

    /// Show how an address is translated, level by level
    Translate(TranslateArguments),

    /// Write the target's memory to a file
    Dump(DumpArguments),

    /// Hand monitors exactly the rights over a target that they were granted
    ///
    /// A gate holds the control channels of one running QEMU, listens to
    /// monitors, lets each do what a grant file gives it, and logs every use.
    #[command(after_long_help = crate::gate::EXAMPLES)]
    Gate(Box<GateArguments>),

    /// Act on a target through its gate: pause, network, dump, end a process
    ///
    /// The gate does what its grant file gives to the own key, and logs it.
    #[command(after_long_help = crate::respond::EXAMPLES)]
    Respond(Box<RespondArguments>),

    /// The monitoring VM: start it beside targets, ask it, end it
    #[command(subcommand)]
    Monitor(MonitorCommand),

    /// Whether evidence of a monitoring VM is to be trusted
    ///
    /// Made for another machine than the monitor's: it asks nobody, and judges
    /// what it is given.
    #[cfg(feature = "verify")]
    #[command(subcommand, after_long_help = crate::verify::arguments::EXAMPLES)]
    Verify(VerifyCommand),

    /// Write the kernel's symbols and types as an ISF file, for volatility3
    ///
    /// Volatility3 and others need such a file for every build of a kernel, made
    /// from its debug package. This one is made from the target's memory alone.
    /// It serves every boot of the same build, wherever KASLR puts the kernel.
    #[command(after_help = "Example:
  secmon -t file:memory.raw isf symbols/linux/web1.json
  vol --symbol-dirs symbols -f memory.raw linux.pslist")]
    Isf(IsfArguments),

    /// Print a completion script for a shell
    #[command(after_help = "Examples:
  bash   secmon completions bash > ~/.local/share/bash-completion/completions/secmon
  zsh    secmon completions zsh > \"${fpath[1]}/_secmon\"
  fish   secmon completions fish > ~/.config/fish/completions/secmon.fish")]
    Completions {
        /// The shell
        shell: Shell,
    },

    /// Write the man pages
    Man {
        /// The folder to write them to; without it the main page goes to stdout
        #[arg(short, long, value_name = "DIR")]
        output: Option<PathBuf>,
    },
}

/// Arguments of `secmon read`.
#[derive(Args, Clone, Debug)]
pub struct ReadArguments {
    /// SYMBOL[+OFFSET], 0xADDRESS (kernel), PID:0xADDRESS (process) or phys:0xADDRESS
    pub location: Location,

    /// How many bytes; K, M and G may follow
    #[arg(short, long, value_name = "BYTES", default_value = "256", value_parser = crate::location::parse_length)]
    pub length: u64,

    /// The bytes themselves to stdout, no hex dump
    #[arg(short, long, conflicts_with = "output")]
    pub raw: bool,

    /// The bytes themselves to this file
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Arguments of `secmon translate`.
#[derive(Args, Clone, Debug)]
pub struct TranslateArguments {
    /// SYMBOL[+OFFSET], 0xADDRESS (kernel) or PID:0xADDRESS (process)
    #[arg(required = true)]
    pub locations: Vec<Location>,
}

/// Arguments of `secmon isf`.
#[derive(Args, Clone, Debug)]
pub struct IsfArguments {
    /// The file to write; without it the document goes to stdout
    pub output: Option<PathBuf>,
}

/// The formats that `secmon dump` writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DumpFormat {
    /// Guest physical addresses are file offsets; holes are sparse
    #[default]
    Raw,
    /// LiME: each run of RAM with its addresses
    Lime,
    /// ELF core: each run of RAM as a segment
    Elf,
}

/// Arguments of `secmon dump`.
#[derive(Args, Clone, Debug)]
pub struct DumpArguments {
    /// The file to write
    pub output: PathBuf,

    /// What to write
    #[arg(long = "as", value_name = "KIND", value_enum, default_value_t)]
    pub kind: DumpFormat,

    /// Go on with a dump that was interrupted
    #[arg(long)]
    pub resume: bool,

    /// Start even if the dump may not fit the disk
    #[arg(long)]
    pub no_space_check: bool,
}
