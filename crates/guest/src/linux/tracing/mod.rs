//! What is attached to the running kernel by its own means of tracing: ftrace,
//! kprobes and tracepoints. All of it has legitimate uses.

mod ftrace;
mod kprobe;
mod tracepoint;

pub use ftrace::{FtraceOps, FtraceSite, FtraceSites, ftrace_ops, ftrace_ops_in_use, ftrace_sites};
pub use kprobe::{Kprobe, kprobes};
pub use tracepoint::{Probe, probes};
