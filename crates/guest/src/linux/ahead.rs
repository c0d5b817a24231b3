//! Looking at pages before a listing of processes reads them.
//!
//! A file or RAM that is mapped is brought in page by page, each when somebody
//! first looks at it. The page tables and stacks of a thousand processes are a
//! thousand such faults, which take the host as long as all else of a listing
//! takes. So a second thread walks over the same processes and looks at what
//! the first one is going to read. It changes nothing that is read, and what it
//! can't read is left to whoever makes the row.

use std::sync::atomic::{AtomicBool, Ordering};

use secmon_memory::VirtualAddress;

use crate::Guest;
use crate::linux::list::{LIMIT, is_object_address};
use crate::linux::listing::Listing;
use crate::linux::user;

/// Runs `rows` while a second thread looks at the pages that the rows of all
/// processes need, those of user memory included.
pub(crate) fn touching<T>(guest: &Guest, listing: &Listing, rows: impl FnOnce() -> T) -> T {
    let made = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Without the thread it is slower, and nothing else.
        let _ = std::thread::Builder::new()
            .name("touch".to_owned())
            .spawn_scoped(scope, || touch(guest, listing, &made));
        let _stop = Stop(&made);
        rows()
    })
}

/// Tells the thread that the rows are made, or given up by a panic.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn touch(guest: &Guest, listing: &Listing, stop: &AtomicBool) {
    let space = guest.space();
    let tasks = listing.task.layout.tasks.offset;
    let Some(init) = guest.address("init_task") else {
        return;
    };
    let head = init.wrapping_add(tasks);
    let mut node = head;
    for _ in 0..LIMIT {
        let Ok(next) = space.read_pointer(node) else {
            return;
        };
        if next == head || !is_object_address(space, next) || stop.load(Ordering::Relaxed) {
            return;
        }
        node = next;
        touch_process(guest, listing, node.wrapping_sub(tasks));
    }
}

fn touch_process(guest: &Guest, listing: &Listing, task: VirtualAddress) {
    let layout = &listing.task.layout;
    let look = |member| {
        let address = guest.pointer(task, member).unwrap_or_default();
        let _ = guest.space().read_u8(address);
        address
    };
    for member in [&layout.signal, &layout.real_cred, &layout.fs] {
        look(member);
    }
    let mm = look(&layout.mm);
    if !mm.is_null() {
        user::touch_arguments(guest, mm);
    }
}
