//! Boots a guest and keeps it until its own standard input closes, so that
//! any tool can be tried on a live one; or writes an image of it and ends.

use std::io::Read as _;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use secmon_lab::{Backing, Guest, Machine, Paging, QmpAccess, Suite, Workload, write_image};

/// Boots a lab guest and keeps it until standard input closes.
#[derive(Parser)]
struct Arguments {
    /// Kernel: 5.10, 6.1, 6.12, 7.2, or the suite's name.
    #[arg(long, default_value = "6.12")]
    suite: Suite,
    /// Memory in MiB.
    #[arg(long, default_value_t = 512)]
    memory: u32,
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// Five-level paging.
    #[arg(long)]
    la57: bool,
    /// The i440FX machine instead of q35.
    #[arg(long)]
    i440fx: bool,
    /// What keeps the guest's memory.
    #[arg(long, value_enum, default_value_t = RamBacking::File)]
    backing: RamBacking,
    /// No QMP socket.
    #[arg(long)]
    no_qmp: bool,
    /// The rich workload.
    #[arg(long)]
    rich: bool,
    /// Plain processes, instead of the workload's own number.
    #[arg(long)]
    processes: Option<u32>,
    /// Keep forking and exiting.
    #[arg(long)]
    busy: bool,
    /// More arguments for the kernel.
    #[arg(long)]
    append: Vec<String>,
    /// Write an image into this folder and end.
    #[arg(long)]
    image: Option<PathBuf>,
    /// QEMU's name for the guest.
    #[arg(long)]
    name: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum RamBacking {
    Plain,
    File,
    Memfd,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut workload = if arguments.rich {
        Workload::rich()
    } else {
        Workload::small()
    };
    if let Some(processes) = arguments.processes {
        workload.processes = processes;
    }
    let mut builder = Guest::builder(arguments.suite)
        .memory_mib(arguments.memory)
        .vcpus(arguments.vcpus)
        .workload(workload)
        .backing(match arguments.backing {
            RamBacking::Plain => Backing::Plain,
            RamBacking::File => Backing::File,
            RamBacking::Memfd => Backing::Memfd,
        });
    if arguments.la57 {
        builder = builder.paging(Paging::FiveLevel);
    }
    if arguments.i440fx {
        builder = builder.machine(Machine::I440fx);
    }
    if arguments.no_qmp {
        builder = builder.qmp(QmpAccess::None);
    }
    if let Some(name) = arguments.name {
        builder = builder.name(name);
    }
    for argument in arguments.append {
        builder = builder.kernel_argument(argument);
    }
    let start = Instant::now();
    let guest = builder.boot()?;
    println!("ready_seconds={:.2}", start.elapsed().as_secs_f32());
    println!("acceleration={}", guest.acceleration().name());
    println!("kernel={}", guest.kernel().release());
    println!("name={}", guest.name());
    println!("pid={}", guest.pid());
    if let Some(socket) = guest.qmp_socket() {
        println!("qmp={}", socket.display());
    }
    if let Some(file) = guest.ram_file() {
        println!("ram={}", file.display());
    }
    println!("serial={}", guest.serial_log().display());
    for failure in guest.truth().info()?.workload_failures {
        println!("workload_failure={failure}");
    }
    if arguments.busy {
        guest.truth().resume_busy()?;
    }
    if let Some(folder) = arguments.image {
        let start = Instant::now();
        write_image(&guest, &folder)?;
        println!("image_seconds={:.2}", start.elapsed().as_secs_f32());
        return Ok(());
    }
    println!("close standard input to end it");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
