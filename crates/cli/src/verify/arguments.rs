//! The command line of `secmon verify`.

use std::path::PathBuf;

use clap::{ArgAction, Args, Subcommand};
use secmon_channel::PublicKey;
use secmon_confidential::Hexadecimal;
use secmon_confidential::snp::Tcb;

/// The end of the command's help.
pub const EXAMPLES: &str = "\
Examples:
  secmon monitor build --confidential snp --vcpus 1 --vcpu-type EPYC-Milan --ovmf OVMF.amdsev.fd
  secmon verify snp --report report.bin --certificates vcek.der --measurement 6d28… \\
    --nonce 5f0c… --channel-key 0123… --least-tcb snp=8,microcode=115
  secmon verify tdx --quote quote.bin --collateral collateral.json --mrtd 91eb… --unbound

Exit status:
  0  trusted: everything is as expected
  1  not trusted: what differs is said
  2  the evidence can't be judged: what is wrong with it is said";

/// The kinds of evidence.
#[derive(Clone, Debug, Subcommand)]
pub enum VerifyCommand {
    /// An attestation report of AMD SEV-SNP
    ///
    /// Its signature, the key's certificates up to a root of AMD's (Milan, Genoa
    /// and Turin are built in), the chip and the firmware that they name, the
    /// guest's policy (debugging and migration agents are never allowed), what
    /// the guest put in, and its launch measurement.
    Snp(Box<SnpArguments>),

    /// A quote of Intel TDX
    ///
    /// The chain to Intel's root, with collateral that was fetched before, the
    /// state of the platform's firmware, the trust domain's attributes, its
    /// registers, and what it put in.
    Tdx(Box<TdxArguments>),
}

/// What question and channel the evidence must be for.
#[derive(Args, Clone, Debug)]
pub struct Binding {
    /// The question: 32 random bytes in hexadecimal that were sent to the monitor
    #[arg(long, value_name = "HEX", requires = "channel_key")]
    pub nonce: Option<Hexadecimal<32>>,

    /// The key of the monitor's channel, as `secmon monitor status` shows it
    #[arg(long, value_name = "KEY", requires = "nonce")]
    pub channel_key: Option<PublicKey>,

    /// The 64 bytes themselves that must stand in the evidence
    #[arg(long, value_name = "HEX", conflicts_with_all = ["nonce", "unbound"])]
    pub report_data: Option<Hexadecimal<64>>,

    /// Don't look for whom the evidence was made: it may be old, and another's
    #[arg(long, conflicts_with = "nonce")]
    pub unbound: bool,
}

/// Arguments of `secmon verify snp`.
#[derive(Args, Clone, Debug)]
pub struct SnpArguments {
    /// The report: 1,184 bytes
    #[arg(long, value_name = "FILE")]
    pub report: PathBuf,

    /// The certificate of its key (VCEK or VLEK), and others on the way to a root; DER or PEM
    #[arg(long, value_name = "FILE", required = true, num_args = 1.., action = ArgAction::Append)]
    pub certificates: Vec<PathBuf>,

    /// A launch measurement that is allowed; may be given several times
    #[arg(long, value_name = "HEX", required = true, action = ArgAction::Append)]
    pub measurement: Vec<Hexadecimal<48>>,

    /// The least versions of the platform's firmware: snp=8,microcode=115,…
    #[arg(long, value_name = "VERSIONS")]
    pub least_tcb: Option<Tcb>,

    /// Allow no two threads a core, neither by the guest's policy nor on the host
    #[arg(long)]
    pub no_smt: bool,

    #[command(flatten)]
    pub binding: Binding,

    /// Judge certificates at this time, in seconds since 1970, instead of now
    #[arg(long, value_name = "SECONDS")]
    pub at: Option<u64>,
}

/// Arguments of `secmon verify tdx`.
#[derive(Args, Clone, Debug)]
pub struct TdxArguments {
    /// The quote
    #[arg(long, value_name = "FILE")]
    pub quote: PathBuf,

    /// Intel's collateral for it, as the JSON of `dcap-qvl`
    #[arg(long, value_name = "FILE")]
    pub collateral: PathBuf,

    /// A measurement of the initial memory that is allowed; may be given several times
    #[arg(long, value_name = "HEX", required = true, action = ArgAction::Append)]
    pub mrtd: Vec<Hexadecimal<48>>,

    /// Run-time register 0: the firmware's and the machine's configuration
    #[arg(long, value_name = "HEX")]
    pub rtmr0: Option<Hexadecimal<48>>,

    /// Run-time register 1: the kernel
    #[arg(long, value_name = "HEX")]
    pub rtmr1: Option<Hexadecimal<48>>,

    /// Run-time register 2: command line and initial file system
    #[arg(long, value_name = "HEX")]
    pub rtmr2: Option<Hexadecimal<48>>,

    /// Run-time register 3: what the guest itself measured
    #[arg(long, value_name = "HEX")]
    pub rtmr3: Option<Hexadecimal<48>>,

    /// A state of the platform's firmware that is accepted beside UpToDate, by Intel's word
    #[arg(long, value_name = "STATE", action = ArgAction::Append)]
    pub accept: Vec<String>,

    #[command(flatten)]
    pub binding: Binding,

    /// Judge collateral at this time, in seconds since 1970, instead of now
    #[arg(long, value_name = "SECONDS")]
    pub at: Option<u64>,
}
