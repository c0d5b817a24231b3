//! Keeps an answer until it may be sent: that of a query for which the target
//! stands still.

use std::cell::RefCell;

use super::answer::{Sink, Unsent};
use super::credit::Permit;
use crate::protocol::{Cell, End, Reply, Scalar};

/// The most bytes of memory that are kept; the monitor has 128 MiB in all.
const MOST: usize = 24 << 20;

/// An answer that waits.
#[derive(Default)]
pub(super) struct Kept(RefCell<Waiting>);

#[derive(Default)]
struct Waiting {
    replies: Vec<Reply>,
    bytes: usize,
    /// Whether some had no room.
    full: bool,
}

impl Sink for Kept {
    fn permit(&self) -> Permit {
        if self.0.borrow().full {
            Permit::Stop
        } else {
            Permit::Send
        }
    }

    fn send(&self, reply: &Reply) -> Result<(), Unsent> {
        let mut waiting = self.0.borrow_mut();
        let bytes = weight(reply).saturating_add(waiting.bytes);
        if bytes > MOST {
            waiting.full = true;
            return Err(Unsent::Over);
        }
        waiting.bytes = bytes;
        waiting.replies.push(reply.clone());
        Ok(())
    }
}

impl Kept {
    /// Sends all that was kept, as `sink` takes it. `read` is how the reading
    /// ended; gives how the sending did.
    pub(super) fn send_all(self, read: End, sink: &dyn Sink) -> End {
        let Waiting { replies, full, .. } = self.0.into_inner();
        let mut end = End { sent: 0, ..read };
        if full {
            let error = "more rows than are kept while the target stands still: \
                         ask for fewer rows or columns";
            end.error.get_or_insert_with(|| error.to_owned());
        }
        for reply in replies {
            let rows = match &reply {
                Reply::Rows { rows, .. } => Some(rows.len() as u64),
                _ => None,
            };
            if rows.is_some() && sink.permit() == Permit::Stop {
                break;
            }
            match sink.send(&reply) {
                Ok(()) => end.sent = end.sent.saturating_add(rows.unwrap_or(0)),
                Err(Unsent::Over) => break,
                Err(Unsent::TooLarge) => {
                    let error = format!(
                        "the listing ended after {} rows: what follows is larger than a message \
                         may be; ask for fewer columns",
                        end.sent
                    );
                    end.error.get_or_insert(error);
                    break;
                }
            }
        }
        end
    }
}

/// About how much memory a message takes.
fn weight(reply: &Reply) -> usize {
    let text = |scalar: &Scalar| match scalar {
        Scalar::Text(bytes) => bytes.len(),
        Scalar::Unreadable(reason) => reason.len(),
        _ => 0,
    };
    let of = |cell: &Cell| {
        let inner = match cell {
            Cell::One(scalar) => text(scalar),
            Cell::List(scalars) => scalars
                .iter()
                .map(|scalar| text(scalar).saturating_add(size_of::<Scalar>()))
                .fold(0, usize::saturating_add),
        };
        inner.saturating_add(size_of::<Cell>())
    };
    match reply {
        Reply::Rows { rows, .. } => rows.iter().flatten().map(of).fold(0, usize::saturating_add),
        _ => 4096,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a number of messages.
    struct Few(RefCell<usize>);

    impl Sink for Few {
        fn permit(&self) -> Permit {
            if *self.0.borrow() == 0 {
                Permit::Stop
            } else {
                Permit::Send
            }
        }

        fn send(&self, _: &Reply) -> Result<(), Unsent> {
            *self.0.borrow_mut() -= 1;
            Ok(())
        }
    }

    fn rows(count: usize, length: usize) -> Reply {
        let row = vec![Cell::One(Scalar::Text(vec![b'x'; length]))];
        Reply::Rows {
            id: 1,
            rows: vec![row; count],
        }
    }

    #[test]
    fn what_is_kept_is_sent_as_far_as_it_is_taken() {
        for (taken, sent) in [(9, 5), (2, 4), (0, 0)] {
            let kept = Kept::default();
            for count in [2, 2, 1] {
                assert_eq!(kept.send(&rows(count, 3)), Ok(()));
            }
            let end = kept.send_all(End::default(), &Few(RefCell::new(taken)));
            assert_eq!((end.sent, end.error), (sent, None));
        }
    }

    #[test]
    fn what_is_too_much_is_told() {
        let kept = Kept::default();
        let mut held = 0;
        while kept.permit() == Permit::Send {
            match kept.send(&rows(1, 1 << 20)) {
                Ok(()) => held += 1,
                Err(unsent) => assert_eq!(unsent, Unsent::Over),
            }
        }
        assert!((16..=24).contains(&held), "{held}");
        let end = kept.send_all(End::default(), &Few(RefCell::new(100)));
        assert_eq!(end.sent, held);
        let error = end.error.expect("not all");
        assert!(error.contains("stands still"), "{error}");
    }
}
