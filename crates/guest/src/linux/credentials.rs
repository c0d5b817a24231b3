//! The table `credentials`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use secmon_memory::VirtualAddress;

use crate::linux::cred::{Cred, UserLayout, capability_digits, capability_names};
use crate::linux::listing::{Listing, Part};
use crate::linux::namespace::Kind as NamespaceKind;
use crate::linux::process;
use crate::table::Items;
use crate::{Column, Cost, Guest, Kind, Selection, Shown, TableError, TableOf, Value};

const TABLE: &str = "credentials";

/// A `cred` and who uses it.
pub struct Shared {
    address: VirtualAddress,
    cred: Part<Cred>,
    users: Users,
    listing: Arc<Listing>,
}

/// The tasks that point to a `cred`.
#[derive(Default)]
struct Users {
    pids: BTreeSet<u32>,
    tasks: u64,
}

const fn column(
    name: &'static str,
    kind: Kind,
    shown: Shown,
    meaning: &'static str,
    value: fn(&Guest, &Shared) -> Value,
) -> Column<Shared> {
    Column {
        name,
        kind,
        cost: Cost::Kernel,
        shown,
        meaning,
        value,
    }
}

const fn id(
    name: &'static str,
    shown: Shown,
    meaning: &'static str,
    value: fn(&Guest, &Shared) -> Value,
) -> Column<Shared> {
    column(name, Kind::Unsigned, shown, meaning, value)
}

fn cred(shared: &Shared, value: impl FnOnce(&Cred) -> Value) -> Value {
    Value::from_read(shared.cred.as_ref(), value)
}

/// The table `credentials`.
pub static CREDENTIALS: TableOf<Shared> = TableOf {
    name: TABLE,
    aliases: &["users"],
    meaning: "Credential structures and the processes that use each. The kernel lets only the \
              threads of one process share one; processes that share one with others got it in \
              another way.",
    columns: &[
        id("uid", Shown::Always, "Real user id.", |_, shared| {
            cred(shared, |cred| cred.uid.into())
        }),
        id("gid", Shown::Always, "Real group id.", |_, shared| {
            cred(shared, |cred| cred.gid.into())
        }),
        id("euid", Shown::Always, "Effective user id.", |_, shared| {
            cred(shared, |cred| cred.euid.into())
        }),
        id("egid", Shown::Always, "Effective group id.", |_, shared| {
            cred(shared, |cred| cred.egid.into())
        }),
        id("suid", Shown::OnRequest, "Saved user id.", |_, shared| {
            cred(shared, |cred| cred.suid.into())
        }),
        id("sgid", Shown::OnRequest, "Saved group id.", |_, shared| {
            cred(shared, |cred| cred.sgid.into())
        }),
        id(
            "fsuid",
            Shown::OnRequest,
            "User id for file access.",
            |_, shared| cred(shared, |cred| cred.fsuid.into()),
        ),
        id(
            "fsgid",
            Shown::OnRequest,
            "Group id for file access.",
            |_, shared| cred(shared, |cred| cred.fsgid.into()),
        ),
        column(
            "capabilities",
            Kind::List,
            Shown::Always,
            "Effective capabilities by name, without cap_; `all` for a full set.",
            |_, shared| {
                cred(shared, |cred| {
                    let full = shared.listing.full_capabilities;
                    capability_names(cred.capabilities.effective, full)
                })
            },
        ),
        column(
            "cap_effective",
            Kind::Text,
            Shown::OnRequest,
            "Effective capabilities as 16 hexadecimal digits.",
            |_, shared| {
                cred(shared, |cred| {
                    capability_digits(cred.capabilities.effective)
                })
            },
        ),
        column(
            "cap_permitted",
            Kind::Text,
            Shown::OnRequest,
            "Permitted capabilities as 16 hexadecimal digits.",
            |_, shared| {
                cred(shared, |cred| {
                    capability_digits(cred.capabilities.permitted)
                })
            },
        ),
        column(
            "cap_bounding",
            Kind::Text,
            Shown::OnRequest,
            "Capabilities that can ever be gained, as 16 hexadecimal digits.",
            |_, shared| cred(shared, |cred| capability_digits(cred.capabilities.bounding)),
        ),
        id(
            "securebits",
            Shown::OnRequest,
            "SECBIT_… flags: how user id 0 and capabilities go together.",
            |_, shared| cred(shared, |cred| cred.securebits.into()),
        ),
        column(
            "groups",
            Kind::List,
            Shown::OnRequest,
            "Supplementary group ids.",
            |guest, shared| {
                cred(shared, |cred| {
                    let groups = shared.listing.groups.as_ref();
                    Value::from_read(groups, |groups| groups.of(guest, cred))
                })
            },
        ),
        id(
            "user_namespace",
            Shown::OnRequest,
            "User namespace in which the capabilities count, by its inode number.",
            |guest, shared| {
                cred(shared, |cred| match &shared.listing.namespaces {
                    Ok(namespaces) => Value::from_read(
                        namespaces.inode(guest, NamespaceKind::User, cred.user_namespace),
                        Value::from,
                    ),
                    Err(reason) => Value::unreadable(reason),
                })
            },
        ),
        id(
            "account_uid",
            Shown::OnRequest,
            "User id of the account that is charged for what they use (cred.user): the real user \
             id, unless one of the two was written over.",
            |guest, shared| {
                cred(shared, |cred| {
                    let layout = guest.layout::<UserLayout>(TABLE);
                    Value::from_read(layout, |layout| {
                        let found = guest.number(cred.user, &layout.uid);
                        Value::from_read(found, |uid| (uid as u32).into())
                    })
                })
            },
        ),
        id(
            "usage",
            Shown::Always,
            "References to it, by its own count.",
            |_, shared| cred(shared, |cred| cred.usage.into()),
        ),
        id(
            "tasks",
            Shown::Always,
            "Threads that use it, as their own or as that of whom they act for.",
            |_, shared| shared.users.tasks.into(),
        ),
        column(
            "pids",
            Kind::List,
            Shown::Always,
            "Processes whose threads these are.",
            |_, shared| {
                let pids = shared.users.pids.iter().copied();
                Value::List(pids.map(Value::from).collect())
            },
        ),
        column(
            "address",
            Kind::Address,
            Shown::Always,
            "Where the structure lies.",
            |_, shared| shared.address.into(),
        ),
    ],
    items: credentials,
};

fn credentials(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, Shared>,
) -> Result<(), TableError> {
    let listing = Listing::new(guest, TABLE)?;
    let mut found: BTreeMap<VirtualAddress, Users> = BTreeMap::new();
    // Sharing shows only if everybody is looked at.
    let all = Selection::default();
    process::for_each_thread(guest, &listing, &all, &mut |thread| {
        let task = &thread.task;
        let own = (task.cred != task.real_cred).then_some(task.cred);
        for address in [task.real_cred].into_iter().chain(own) {
            let users = found.entry(address).or_default();
            users.pids.insert(task.tgid);
            users.tasks += 1;
        }
        ControlFlow::Continue(())
    })?;
    for (address, users) in found {
        let wanted = users
            .pids
            .iter()
            .any(|pid| selection.wants_pid((*pid).into()));
        if !wanted {
            continue;
        }
        let shared = Shared {
            address,
            cred: listing.cred(guest, address),
            users,
            listing: listing.clone(),
        };
        if sink(shared).is_break() {
            break;
        }
    }
    Ok(())
}
