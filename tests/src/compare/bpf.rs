//! What the table `bpf` should hold.

use secmon_guest::{Selection, Value};
use secmon_lab::truth::{BpfMap, BpfProgram, Info};

use super::Check;
use crate::rows::{Comparison, Expected, ExpectedRow};

/// How far the agent's two readings of its clocks can lie apart, nanoseconds.
const CLOCK_READ: i128 = 20_000_000;

/// The check of `bpf`.
pub const BPF: Check = Check {
    comparison: Comparison {
        table: "bpf",
        key: &["object", "id"],
    },
    selection: Selection::default,
    expected: |truth| {
        let programs = truth.bpf.programs.iter();
        let programs = programs.map(|program| expected_program(program, &truth.info));
        programs
            .chain(truth.bpf.maps.iter().map(expected_map))
            .collect()
    },
    // The truth does not ask for links.
    beyond_truth: |row| row.get("object") == Some(&Value::from("link")),
};

/// Names of `BPF_PROG_TYPE_…` numbers that guests use.
fn program_type(number: u32) -> Expected {
    Expected::Exactly(
        match number {
            1 => "socket_filter",
            2 => "kprobe",
            3 => "sched_cls",
            5 => "tracepoint",
            6 => "xdp",
            8 => "cgroup_skb",
            9 => "cgroup_sock",
            15 => "cgroup_device",
            17 => "raw_tracepoint",
            18 => "cgroup_sock_addr",
            26 => "tracing",
            _ => return Expected::Anything,
        }
        .into(),
    )
}

/// Names of `BPF_MAP_TYPE_…` numbers that guests use.
fn map_type(number: u32) -> Expected {
    Expected::Exactly(
        match number {
            1 => "hash",
            2 => "array",
            5 => "percpu_hash",
            6 => "percpu_array",
            9 => "lru_hash",
            11 => "lpm_trie",
            27 => "ringbuf",
            _ => return Expected::Anything,
        }
        .into(),
    )
}

fn name(bytes: &[u8]) -> Expected {
    Expected::Exactly(match bytes {
        [] => Value::Null,
        bytes => Value::text(bytes),
    })
}

fn expected_program(program: &BpfProgram, info: &Info) -> ExpectedRow {
    let boot = i128::from(info.wall_time) - i128::from(info.uptime);
    let loaded = boot + i128::from(program.load_time);
    ExpectedRow::from([
        ("object", Expected::Exactly("program".into())),
        ("id", Expected::Exactly(program.id.into())),
        ("type", program_type(program.program_type)),
        ("name", name(program.name.as_bytes())),
        ("tag", Expected::Exactly(program.tag.as_str().into())),
        (
            "load_time",
            Expected::Between(loaded - CLOCK_READ, loaded + CLOCK_READ),
        ),
        ("uid", Expected::Exactly(program.created_by_uid.into())),
        ("jited_bytes", Expected::Exactly(program.jited_bytes.into())),
        (
            "instructions",
            Expected::Exactly((program.translated_bytes / 8).into()),
        ),
        ("key_bytes", Expected::Exactly(Value::Null)),
    ])
}

fn expected_map(map: &BpfMap) -> ExpectedRow {
    ExpectedRow::from([
        ("object", Expected::Exactly("map".into())),
        ("id", Expected::Exactly(map.id.into())),
        ("type", map_type(map.map_type)),
        ("name", name(map.name.as_bytes())),
        ("tag", Expected::Exactly(Value::Null)),
        ("key_bytes", Expected::Exactly(map.key_size.into())),
        ("value_bytes", Expected::Exactly(map.value_size.into())),
        ("max_entries", Expected::Exactly(map.max_entries.into())),
        ("map_flags", Expected::Exactly(map.flags.into())),
    ])
}
