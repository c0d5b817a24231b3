//! `cargo xtask`: what is done with this repository besides building it.
//!
//! It depends on no other crate of the workspace, so that it is there in
//! seconds on a machine that has nothing yet.
#![forbid(unsafe_code)]

mod appliance;
mod check;
mod demo;
mod docs;
mod fuzz;
mod peers;
mod prerequisites;
mod run;
mod tests;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Development tasks of SecMon")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Boot a real guest and show it from outside, next to what it says itself
    Demo,
    /// Everything that must pass: formatting, lints, docs, tests, fuzz targets, benchmark limits
    Test,
    /// Run every fuzz target for a while, starting from the stored corpus
    Fuzz {
        /// Seconds for each target
        #[arg(long, default_value_t = 20)]
        seconds: u32,
        /// Only targets whose name contains this
        target: Option<String>,
    },
    /// Measure, write docs/performance.md, and fail if a stated limit is missed
    Bench,
    /// Measure what a monitoring VM costs its target and its host, and write docs/costs.md
    Costs,
    /// Try the detectors on every specimen and on clean guests, and write docs/detection.md
    Detection {
        /// Checks of each clean guest under each load
        #[arg(long, default_value_t = 1000)]
        checks: u32,
        /// End after about so many minutes, with fewer checks, about as many of each
        #[arg(long)]
        minutes: Option<u64>,
        /// More for the program `detection`: --resume, --only clean, --kernel 6.1 and so on
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Attack a monitoring VM, and write the table of SECURITY.md
    Lifetime {
        /// Rounds of a clean monitor before the attacks
        #[arg(long, default_value_t = 1000)]
        rounds: u32,
    },
    /// Compare with volatility3, drgn and memflow on one image, and write docs/peers.md
    Peers,
    /// Build the static program of the monitoring VM and, with it, the VM's image
    Appliance {
        /// The folder to write the image to
        #[arg(long, default_value = "target/appliance/image")]
        output: std::path::PathBuf,
        /// More for `secmon monitor build`, such as --kernel FILE --modules DIR
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Write the documents that are generated from the code
    Docs {
        /// Only say whether they are up to date
        #[arg(long)]
        check: bool,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::Demo => demo::run_demo(),
        Task::Test => check::run_all(),
        Task::Fuzz { seconds, target } => fuzz::run_targets(seconds, target.as_deref()),
        Task::Bench => check::bench(),
        Task::Costs => check::costs(),
        Task::Detection {
            checks,
            minutes,
            arguments,
        } => check::detection(checks, minutes, &arguments),
        Task::Lifetime { rounds } => check::lifetime(rounds),
        Task::Peers => peers::compare(),
        Task::Appliance { output, arguments } => appliance::build(&output, &arguments),
        Task::Docs { check } => docs::run(check),
    }
}
