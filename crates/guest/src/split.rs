//! Rows of one table made by several threads, handed out in their order.
//!
//! Where a table can name the objects of its rows without reading them, and
//! they can't change meanwhile (an image), blocks of objects are taken by
//! whichever thread is free. The thread that asked for the table hands out the
//! rows and makes blocks itself while it would have to wait. Memory is bounded:
//! no thread makes rows far ahead of those that were handed out.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use secmon_memory::VirtualAddress;

use crate::table::{RowMaker, RowSink};
use crate::{Guest, Row, Selection, TableError};

/// Objects a block.
const BLOCK: usize = 16;
/// Blocks that are made ahead of those that were handed out.
const WINDOW: usize = 4;
/// Threads at most: the rows are handed out by one.
const THREADS: usize = 4;

/// Reads the item of an object, or says in a diagnostic why it is left out.
pub type Reader<'g, R> = Box<dyn FnMut(VirtualAddress) -> Option<R> + 'g>;

/// Tells whether the item of that key and object is the first one of its key.
pub type First<'g> = Box<dyn FnMut(u64, VirtualAddress) -> bool + 'g>;

/// How a table's items can be read by several threads.
pub struct Split<R: 'static> {
    /// Whether the items of this guest may be read by several threads: not
    /// where they have to be read one after the other.
    pub possible: fn(&Guest, &Selection) -> bool,
    /// The objects of the items, in their order.
    pub objects: fn(&Guest) -> Result<Vec<VirtualAddress>, TableError>,
    /// Makes a reader; each thread has one of its own.
    pub reader: for<'g> fn(&'g Guest) -> Result<Reader<'g, R>, TableError>,
    /// What no two items share.
    pub key: fn(&R) -> u64,
    /// Makes a check whether an item with that key, read from that object, is
    /// the first one of its key; the others are left out, with a diagnostic.
    pub first: for<'g> fn(&'g Guest) -> First<'g>,
}

/// A row that was made and not yet handed out.
struct Made {
    row: Row,
    key: u64,
    object: VirtualAddress,
}

/// What the threads share.
#[derive(Default)]
struct Work {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// None while they are being looked up.
    objects: Option<Arc<[VirtualAddress]>>,
    /// The first block that nobody took.
    next: usize,
    /// The first block that was not handed out.
    wanted: usize,
    made: BTreeMap<usize, Block>,
    /// Blocks that were handed out, for the memory of those that the same
    /// thread makes: in its cache.
    spare: [Vec<Block>; THREADS],
    /// No more rows are wanted.
    over: bool,
    /// A thread ended without the block that it took.
    lost: bool,
}

/// Rows; those from `used` on are left from before.
#[derive(Default)]
struct Block {
    rows: Vec<Made>,
    used: usize,
    thread: usize,
}

/// The number of processors that this process may use.
fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

impl<R: 'static> Split<R> {
    /// Makes the rows of all objects; false, and nothing is done, if one
    /// thread has to make them.
    ///
    /// # Errors
    /// [`TableError`] if the table can't be made.
    pub(crate) fn read(
        &self,
        guest: &Guest,
        selection: &Selection,
        maker: &RowMaker<'_, R>,
        sink: &mut RowSink<'_>,
    ) -> Result<bool, TableError> {
        let threads = processors().min(THREADS);
        if threads < 2 || !(self.possible)(guest, selection) {
            return Ok(false);
        }
        let make = || {
            let mut reader = (self.reader)(guest)?;
            Ok(move |objects: &[VirtualAddress], block: &mut Block| {
                for object in objects {
                    if let Some(item) = reader(*object) {
                        let key = (self.key)(&item);
                        block.push(*object, key, |row| maker.make(guest, &item, row));
                    }
                }
            })
        };
        let work = Work::default();
        std::thread::scope(|scope| {
            let (work, _over) = (&work, Over(&work));
            for thread in 1..threads {
                let help = move || {
                    // The thread that hands out the rows gets the same error.
                    if let Ok(make) = make() {
                        work.help(thread, make);
                    }
                };
                // Without the thread it is slower, and nothing else.
                let _ = std::thread::Builder::new()
                    .name("rows".to_owned())
                    .spawn_scoped(scope, help);
            }
            let objects: Arc<[VirtualAddress]> = (self.objects)(guest)?.into();
            work.begin(objects.clone());
            let mut first = (self.first)(guest);
            work.hand_out(&objects, make()?, |made| {
                if first(made.key, made.object) {
                    sink(&mut made.row)
                } else {
                    ControlFlow::Continue(())
                }
            });
            Ok(true)
        })
    }
}

impl Block {
    /// Adds a row, made in the memory of one from before.
    fn push(&mut self, object: VirtualAddress, key: u64, make: impl FnOnce(&mut Row)) {
        if self.rows.len() == self.used {
            self.rows.push(Made {
                row: Row::default(),
                key,
                object,
            });
        }
        if let Some(made) = self.rows.get_mut(self.used) {
            (made.key, made.object) = (key, object);
            make(&mut made.row);
            self.used += 1;
        }
    }
}

/// Tells the other threads that no more rows are wanted.
struct Over<'w>(&'w Work);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.lock().over = true;
        self.0.changed.notify_all();
    }
}

/// Tells that a block is lost if the thread that makes it panics.
struct Taken<'w>(&'w Work);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().lost = true;
            self.0.changed.notify_all();
        }
    }
}

impl State {
    /// The number of blocks.
    fn blocks(&self) -> usize {
        let objects = self.objects.as_ref().map_or(0, |objects| objects.len());
        objects.div_ceil(BLOCK)
    }

    /// The next block that may be made, with memory for it.
    fn take(&mut self, thread: usize) -> Option<(usize, Block)> {
        let number = self.next;
        if number >= self.blocks() || number >= self.wanted + WINDOW {
            return None;
        }
        self.next += 1;
        Some((number, self.memory(thread)))
    }

    fn memory(&mut self, thread: usize) -> Block {
        let spare = self.spare.get_mut(thread).and_then(Vec::pop);
        let mut block = spare.unwrap_or_default();
        (block.used, block.thread) = (0, thread);
        block
    }
}

/// The objects of a block.
fn part(objects: &[VirtualAddress], block: usize) -> &[VirtualAddress] {
    objects.chunks(BLOCK).nth(block).unwrap_or_default()
}

impl Work {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'s>(&self, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        let woken = self.changed.wait(state);
        woken.unwrap_or_else(PoisonError::into_inner)
    }

    /// Says which objects there are.
    fn begin(&self, objects: Arc<[VirtualAddress]>) {
        self.lock().objects = Some(objects);
        self.changed.notify_all();
    }

    /// Makes blocks until there are no more.
    fn help(&self, thread: usize, mut make: impl FnMut(&[VirtualAddress], &mut Block)) {
        let _taken = Taken(self);
        let mut state = self.lock();
        let objects = loop {
            match state.objects.clone() {
                Some(objects) => break objects,
                None if state.over => return,
                None => state = self.wait(state),
            }
        };
        while !state.over && state.next < state.blocks() {
            let Some((number, mut block)) = state.take(thread) else {
                state = self.wait(state);
                continue;
            };
            drop(state);
            make(part(&objects, number), &mut block);
            state = self.lock();
            state.made.insert(number, block);
            if state.wanted == number {
                self.changed.notify_all();
            }
        }
    }

    /// Hands out all rows in their order, until the sink breaks.
    fn hand_out(
        &self,
        objects: &[VirtualAddress],
        mut make: impl FnMut(&[VirtualAddress], &mut Block),
        mut sink: impl FnMut(&mut Made) -> ControlFlow<()>,
    ) {
        for wanted in 0..objects.len().div_ceil(BLOCK) {
            let mut block = self.block(wanted, |number, block| make(part(objects, number), block));
            for made in block.rows.iter_mut().take(block.used) {
                if sink(made).is_break() {
                    return;
                }
            }
            let mut state = self.lock();
            if let Some(spare) = state.spare.get_mut(block.thread) {
                spare.push(block);
            }
            let full = state.next == state.wanted + WINDOW;
            state.wanted = wanted + 1;
            if full {
                self.changed.notify_all();
            }
        }
    }

    /// The block, made here or by another thread; makes others while it would
    /// have to wait.
    fn block(&self, wanted: usize, mut make: impl FnMut(usize, &mut Block)) -> Block {
        let mut state = self.lock();
        loop {
            if let Some(block) = state.made.remove(&wanted) {
                return block;
            }
            let (number, mut block) = match state.take(0) {
                Some(taken) => taken,
                None if state.lost => (wanted, state.memory(0)),
                None => {
                    state = self.wait(state);
                    continue;
                }
            };
            drop(state);
            make(number, &mut block);
            if number == wanted {
                return block;
            }
            state = self.lock();
            state.made.insert(number, block);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn make(objects: &[VirtualAddress], block: &mut Block) {
        for object in objects {
            // Some objects have no row.
            if object.as_u64() % 5 != 3 {
                block.push(*object, object.as_u64(), |row| {
                    row.values.clear();
                    row.values.push(object.as_u64().into());
                });
            }
        }
    }

    /// The keys in the order in which they are handed out, at most `limit`.
    fn keys(
        count: u64,
        limit: usize,
        help: impl Fn(&[VirtualAddress], &mut Block) + Sync,
    ) -> Vec<u64> {
        let objects: Arc<[VirtualAddress]> = (0..count).map(VirtualAddress::new).collect();
        let work = Work::default();
        let mut keys = Vec::new();
        std::thread::scope(|scope| {
            let (work, help, _over) = (&work, &help, Over(&work));
            for thread in 1..THREADS {
                scope.spawn(move || {
                    let help = || work.help(thread, |objects, block| help(objects, block));
                    // A panic of the test's own is not one of the test.
                    let _ = catch_unwind(AssertUnwindSafe(help));
                });
            }
            work.begin(objects.clone());
            work.hand_out(&objects, make, |made| {
                assert_eq!(made.row.values, [made.key.into()]);
                assert_eq!(made.object.as_u64(), made.key);
                keys.push(made.key);
                if keys.len() == limit {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
        });
        let state = work.lock();
        let spare: usize = state.spare.iter().map(Vec::len).sum();
        assert!(
            spare + state.made.len() <= (WINDOW + 1) * THREADS,
            "bounded"
        );
        keys
    }

    proptest! {
        #[test]
        fn all_rows_come_in_their_order(count in 0_u64..2000, slow in 0_u64..200, limit in 1_usize..3000) {
            let found = keys(count, limit, |objects, block| {
                if objects.first().is_some_and(|first| first.as_u64() / 16 == slow) {
                    std::thread::sleep(Duration::from_millis(2));
                }
                make(objects, block);
            });
            let expected: Vec<u64> = (0..count).filter(|key| key % 5 != 3).take(limit).collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn what_a_thread_lost_is_made_again() {
        let found = keys(500, usize::MAX, |_, _| panic!("a thread of the test ends"));
        let expected: Vec<u64> = (0..500).filter(|key| key % 5 != 3).collect();
        assert_eq!(found, expected);
    }
}
