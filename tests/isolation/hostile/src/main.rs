//! PID 1 of a monitoring VM whose program was replaced: it has all that a
//! monitor's kernel gives to root and tries to get further.
//!
//! Process 1 takes commands and starts itself anew for each attempt, so that
//! one that ends in a signal is reported as well.

#![deny(unsafe_code)]

mod bar;
mod channel;
mod devices;
mod dma;
mod doors;
mod gate;
mod init;
mod memory;
mod network;
mod others;
mod pci;
mod port;
mod ports;
mod sys;
mod virtio;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use secmon_hostile::Report;
use serde_json::Value;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let outcome = match (arguments.next().as_deref(), arguments.next()) {
        (Some("attempt"), Some(name)) => {
            let argument = arguments.next().unwrap_or_default();
            let argument = serde_json::from_str(&argument).unwrap_or(Value::Null);
            let report = attempt(&name, &argument);
            let report = report.map_err(|error| format!("{error:#}"));
            serde_json::to_string(&report)
                .map(|line| println!("{line}"))
                .context("writing the report")
        }
        _ if std::process::id() == 1 => init::run(),
        _ => Err(anyhow::anyhow!(
            "this belongs into a VM of the tests, as its process 1"
        )),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hostile: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn attempt(name: &str, argument: &Value) -> Result<Report> {
    match name {
        "bar_widths" => bar::widths(),
        "bar_strings" => bar::strings(),
        "bar_atomics" => bar::atomics(),
        "bar_kernel" => bar::by_kernel(),
        "bar_configuration" => bar::configuration(),
        "bar_moved" => bar::moved(),
        "bar_enlarged" => bar::enlarged(),
        "dma_virtio" => dma::virtio(),
        "dma_msi" => dma::msi(),
        "dma_fw_cfg" => dma::fw_cfg(),
        "other_memory" => others::memory(argument),
        "hot_plug" => others::hot_plug(),
        "fw_cfg_items" => doors::items(argument),
        "fw_cfg_writes" => doors::item_writes(),
        "host_devices" => devices::expected(argument),
        "host_ports" => doors::ports(),
        "network_interfaces" => network::interfaces(),
        "network_sockets" => network::sockets(),
        other => match other.split_once('_') {
            Some(("gate", _)) => gate::attempt(other, argument),
            Some(("channel" | "console", _)) => channel::attempt(other),
            _ => bail!("there is no attempt {other}"),
        },
    }
}
