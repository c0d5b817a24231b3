//! The names of the files in a monitor's folder; what they are is said in
//! [`run_directory`](super::run_directory).

pub const LOCK: &str = "lock";
pub const SETTINGS: &str = "settings.json";
pub const CONFIGURATION: &str = "configuration.json";
pub const CLIENT_KEY: &str = "client.key";
pub const MONITOR_KEY: &str = "monitor.key";
pub const PROCESSES: &str = "processes.json";
pub const STATE: &str = "state.json";
pub const SHAPES: &str = "shapes.json";
pub const MACHINE: &str = "machine.json";
pub const PLAN: &str = "plan.json";
pub const UP_LOCK: &str = "up.lock";
pub const CONSOLE_LOG: &str = "console.log";
pub const SUPERVISOR_LOG: &str = "supervisor.log";
pub const GATE_KEY: &str = "key";
pub const GATE_GRANTS: &str = "grants.toml";
pub const GATE_LOG: &str = "gate.log";
