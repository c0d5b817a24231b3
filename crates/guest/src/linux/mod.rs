//! Linux: its structures, read as `Documentation` and sources of 5.4 and later
//! kernels describe them. One file a subject; which members there are is said
//! by each guest's own types.

pub mod bpf;
pub mod cgroup;
pub mod clock;
pub mod command_name;
pub mod cred;
pub mod credentials;
pub mod env;
pub mod file;
pub mod files;
pub(crate) mod hash;
pub mod info;
pub mod kmsg;
pub mod list;
pub mod listing;
pub mod maple_tree;
pub mod maps;
pub mod memory_area;
pub mod memory_size;
pub mod module;
pub mod mount;
pub mod mounts;
pub mod namespace;
pub mod namespaces;
pub mod net;
pub mod owner;
pub mod path;
pub mod per_cpu;
pub mod pid;
pub mod process;
pub mod process_tree;
pub mod processes;
pub mod rb_tree;
pub mod rhashtable;
pub mod signal;
pub mod snapshot;
pub mod span;
pub mod state;
pub mod symbols;
#[cfg(test)]
pub mod synthetic;
pub mod taint;
pub mod task;
pub mod threads;
pub mod tree;
pub mod tty;
pub mod types;
pub mod user;
pub mod xarray;
