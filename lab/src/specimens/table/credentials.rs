//! Credentials and containers.

use super::rows::{ORDINARY, edit, found, loaded, module, program};
use crate::specimens::{Edit, Shown, Specimen};

/// The specimens.
pub(super) const ALL: &[Specimen] = &[
    module(
        "credentials-shared",
        "T1068",
        "lets a process use the credentials of process 1",
        loaded("credentials_shared", ORDINARY),
        found("credentials", "shared_credentials"),
        Shown::UserZero,
    ),
    module(
        "credentials-in-place",
        "T1068",
        "makes a process one of user 0, in its credentials as they are",
        loaded("credentials_in_place", ORDINARY),
        found("credentials", "forged_user"),
        Shown::UserZero,
    ),
    module(
        "capabilities-gained",
        "T1068",
        "gives a process all capabilities, in its credentials as they are",
        loaded("capabilities_gained", ORDINARY),
        found("credentials", "capabilities_of_nobody"),
        Shown::AllCapabilities,
    ),
    edit(
        "credentials-shared",
        "T1068",
        "lets a process use the credentials of process 1",
        Edit::ShareCredentials,
        found("credentials", "shared_credentials"),
    ),
    edit(
        "credentials-in-place",
        "T1068",
        "makes a process one of user 0, in its credentials as they are",
        Edit::UserZero,
        found("credentials", "forged_user"),
    ),
    edit(
        "capabilities-gained",
        "T1068",
        "gives a process all capabilities, in its credentials as they are",
        Edit::AllCapabilities,
        found("credentials", "capabilities_of_nobody"),
    ),
    program(
        "container-with-host-pids",
        "T1611",
        "runs in a container's root and namespaces, but among the host's processes",
        found("credentials", "container_with_host_processes"),
    ),
    program(
        "container-with-host-root",
        "T1611",
        "belongs to a container, but sees the host's files",
        found("credentials", "container_with_host_files"),
    ),
];
