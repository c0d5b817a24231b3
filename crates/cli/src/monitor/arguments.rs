//! The command line of `secmon monitor`.

use std::path::PathBuf;

use clap::{ArgAction, Args, Subcommand, ValueEnum};
use secmon_monitor::launch::MonitorName;
use secmon_monitor::launch::command_line::Accelerator;

/// What is done with a monitor.
#[derive(Clone, Debug, Subcommand)]
pub enum MonitorCommand {
    /// Build the image of the monitoring VM: a Linux kernel and secmon, nothing else
    ///
    /// Without --kernel or --kernel-package the kernel is the cloud flavour of
    /// Debian's stable release, from the archive that apt uses here. The same
    /// kernel and program give the same image; its digest is printed, and its
    /// bill of materials lies beside it.
    Build(BuildArguments),

    /// Start a monitoring VM beside one or more targets
    ///
    /// The targets' RAM must be shared memory; where it isn't, the lines to add
    /// to QEMU's command line or to the libvirt domain are shown. The monitoring
    /// VM sees that RAM read-only and nothing else of the host: it has no
    /// network and no disk, and its QEMU runs as a user of its own. Whatever else
    /// it may do goes through a gate, a small process for each target that has a
    /// QMP socket, and is granted in a file. A monitor that runs already is left as
    /// it is.
    #[command(after_help = "Examples:
  secmon monitor up --target qemu:web1
  secmon monitor up --target qemu:web1 --target qemu:db1 --name shop
  secmon -t monitor:shop/web1 ps

A grant file:
  version = 1
  target = \"web1\"

  [[monitor]]
  name = \"web1\"                    # the monitor, as --name says
  rights = [\"pause\"]               # see `secmon gate --help`")]
    Up(UpArguments),

    /// What a monitor sees, and how it is
    Status {
        /// The monitor; all of them unless named
        name: Option<MonitorName>,
    },

    /// A console: any table, read, translate; findings as they come
    Attach {
        /// The monitor; may be left out if there is one only
        name: Option<MonitorName>,
    },

    /// End a monitor and all that was started for it
    Down {
        /// The monitor; may be left out if there is one only
        name: Option<MonitorName>,
    },

    /// libvirt definitions: of a target, changed to share its RAM, or of a monitoring VM
    ///
    /// With --convert: reads a domain definition and writes it with the guest's
    /// RAM shared, all else byte for byte as it was. Without: writes a domain
    /// definition for the VM of a monitor that is up, for those who run it under
    /// libvirt.
    #[command(after_help = "Examples:
  virsh dumpxml --inactive web1 | secmon monitor libvirt-xml --convert - > web1.xml
  virsh define web1.xml
  secmon monitor libvirt-xml web1 > monitor.xml")]
    LibvirtXml(LibvirtArguments),
}

/// Arguments of `secmon monitor libvirt-xml`.
#[derive(Args, Clone, Debug)]
pub struct LibvirtArguments {
    /// The monitor; may be left out if there is one only
    #[arg(conflicts_with = "convert")]
    pub name: Option<MonitorName>,

    /// A target's domain definition; `-` is stdin
    #[arg(long, value_name = "FILE")]
    pub convert: Option<PathBuf>,
}

/// Arguments of `secmon monitor build`.
#[derive(Args, Clone, Debug)]
pub struct BuildArguments {
    /// The folder to write the image to
    #[arg(short, long, value_name = "DIR", default_value = "secmon-appliance")]
    pub output: PathBuf,

    /// Use this kernel image
    #[arg(long, value_name = "FILE", requires = "modules")]
    pub kernel: Option<PathBuf>,

    /// The folder of its modules, /lib/modules/RELEASE
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub modules: Option<PathBuf>,

    /// Use the kernel in this Debian package
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    pub kernel_package: Option<PathBuf>,

    /// The static program to put in; without it this program, if it is static
    #[arg(long, value_name = "FILE")]
    pub binary: Option<PathBuf>,

    #[cfg(feature = "verify")]
    #[command(flatten)]
    pub confidential: ConfidentialLaunch,
}

/// What a confidential VM is launched from beside the image.
#[cfg(feature = "verify")]
#[derive(Args, Clone, Debug)]
pub struct ConfidentialLaunch {
    /// Compute the launch measurement of a confidential VM with this image
    ///
    /// The value that `secmon verify snp --measurement` takes, for a VM started
    /// with the same firmware, number and model of processors.
    #[arg(long, value_name = "KIND", value_enum, requires = "ovmf")]
    pub confidential: Option<ConfidentialKind>,

    /// Its virtual processors
    #[arg(long, value_name = "N", default_value_t = 1, requires = "confidential")]
    pub vcpus: u32,

    /// Their model, as QEMU's -cpu names it: EPYC, EPYC-Rome, EPYC-Milan, EPYC-Genoa, EPYC-Turin
    #[arg(
        long,
        value_name = "MODEL",
        default_value = "EPYC-Milan",
        requires = "confidential"
    )]
    pub vcpu_type: String,

    /// Its firmware: an OVMF with a place for a kernel's hashes (OvmfPkg/AmdSev)
    #[arg(long, value_name = "FILE", requires = "confidential")]
    pub ovmf: Option<PathBuf>,

    /// The SEV features that the host's kernel switches on for guests
    #[arg(
        long,
        value_name = "NUMBER",
        default_value_t = 1,
        requires = "confidential"
    )]
    pub sev_features: u64,
}

/// How a monitoring VM is closed to its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConfidentialKind {
    /// AMD SEV-SNP
    Snp,
}

/// Arguments of `secmon monitor up`.
#[derive(Args, Clone, Debug)]
pub struct UpArguments {
    /// A running QEMU: qemu:NAME or qemu:PID; may be given several times
    // The same id and type as the option of all commands, whose place it takes.
    #[arg(
        short,
        long,
        value_name = "TARGET",
        required = true,
        action = ArgAction::Append
    )]
    pub target: Vec<String>,

    /// What the monitor is called; by default as its first target
    #[arg(long)]
    pub name: Option<MonitorName>,

    /// Wait for targets that don't run yet, and pick them up when they start
    #[arg(long)]
    pub wait: bool,

    /// What the monitor may do to a target beside reading its memory; may be given several times
    ///
    /// A grant file as `secmon gate --help` shows it; its `target` says which
    /// target it is for. The entry with the monitor's name needs no key: the
    /// monitor gets a new one each time. Without a file the monitor may `observe`,
    /// and nothing else.
    #[arg(long, value_name = "FILE", conflicts_with = "no_gate")]
    pub grants: Vec<PathBuf>,

    /// Watch the targets all the time, by this policy (docs/policy.md)
    ///
    /// What is found waits in the monitor until `secmon -t monitor:NAME watch`
    /// takes it. Without a policy the monitor's detectors look only when they
    /// are asked to.
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,

    /// The folder of the gates' logs, which outlive the monitor
    ///
    /// By default secmon/gates/NAME below XDG_STATE_HOME; without that below
    /// /var/log for root and ~/.local/state for others.
    #[arg(long, value_name = "DIR", conflicts_with = "no_gate")]
    pub gate_logs: Option<PathBuf>,

    /// Start no gates: leave the targets' QMP sockets to others
    #[arg(long)]
    pub no_gate: bool,

    /// The QEMU that runs the monitoring VM
    #[arg(long, value_name = "PROGRAM")]
    pub qemu: Option<PathBuf>,

    /// The folder of the image that `secmon monitor build` made
    ///
    /// Without it: secmon-appliance in the current folder, else
    /// /var/lib/secmon/appliance, else /usr/lib/secmon/appliance.
    #[arg(long, value_name = "DIR", env = "SECMON_APPLIANCE", hide_env = true)]
    pub image: Option<PathBuf>,

    /// KVM or emulation, instead of what is found to work
    #[arg(long, value_name = "KIND", value_enum)]
    pub accelerator: Option<AcceleratorKind>,

    /// A kernel that is no image's, for tests
    #[arg(long, value_name = "FILE", hide = true, requires = "initramfs")]
    pub kernel: Option<PathBuf>,

    /// An initial file system that is no image's, for tests
    #[arg(long, value_name = "FILE", hide = true, requires = "kernel")]
    pub initramfs: Option<PathBuf>,
}

/// What can run a monitoring VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AcceleratorKind {
    /// The processor's own virtualization
    Kvm,
    /// QEMU's emulation
    Tcg,
}

impl From<AcceleratorKind> for Accelerator {
    fn from(kind: AcceleratorKind) -> Self {
        match kind {
            AcceleratorKind::Kvm => Self::Kvm,
            AcceleratorKind::Tcg => Self::Tcg,
        }
    }
}
