//! The network, and settings of the system.

use super::rows::{edit, found, found_information, loaded, module, program};
use crate::specimens::{Edit, How, Need, Shown, Specimen};
use crate::suite::Suite;

/// The specimens.
pub(super) const ALL: &[Specimen] = &[
    // The network.
    program(
        "raw-socket",
        "T1095",
        "has a raw socket",
        found_information("network", "raw_socket"),
    ),
    program(
        "packet-socket",
        "T1040",
        "has a packet socket for all protocols",
        found("network", "packet_socket_for_all"),
    ),
    program(
        "promiscuous",
        "T1040",
        "makes an interface promiscuous",
        found("network", "promiscuous_interface"),
    ),
    module(
        "listener-out-of-table",
        "T1014",
        "takes a listening socket out of the table that programs are told of",
        loaded("socket_out_of_table", &[Need::Process("listening")]),
        found("network", "port_in_no_table"),
        Shown::NoListener(5099),
    ),
    // Settings.
    Specimen {
        name: "core-pattern",
        technique: "T1546",
        does: "has core dumps handed to a program",
        suites: &Suite::ALL,
        how: How::Setting {
            path: "/proc/sys/kernel/core_pattern",
            text: "|/tmp/specimen %p",
        },
        expected: found("usermode_helpers", "usermode_helper_changed"),
        shown: Shown::Stands,
    },
    Specimen {
        name: "modprobe-path",
        technique: "T1546",
        does: "names another program to load modules",
        suites: &Suite::ALL,
        how: How::Setting {
            path: "/proc/sys/kernel/modprobe",
            text: "/tmp/specimen",
        },
        expected: found("usermode_helpers", "usermode_helper_changed"),
        shown: Shown::Stands,
    },
    edit(
        "modprobe-path-written",
        "T1546",
        "writes the name of another program over that of the one which loads modules",
        Edit::Text {
            symbol: "modprobe_path",
            text: "/tmp/specimen",
        },
        found("usermode_helpers", "usermode_helper_changed"),
    ),
];
