//! The printk ring of Linux 5.10 and later
//! (`kernel/printk/printk_ringbuffer.[ch]`): three arrays, of descriptors, of
//! records' metadata and of text, that writers fill without locks.
//!
//! A descriptor holds its record's id and state in one word and the logical
//! positions at which the record's text begins and ends. Ids and positions
//! count up for ever; both are taken modulo the array's size. A record is
//! sound if its descriptor still holds its id after everything was copied, and
//! if the text block begins with that id: the same two checks the kernel's own
//! readers make.
//!
//! [`records`] reads through a closure, so that a mapped guest, a byte slice
//! and a fuzzer's input are decoded by the same code. Where the members lie is
//! a [`RingLayout`], found by [`layout`](super::layout).

use secmon_memory::{ReadError, VirtualAddress};

/// The most records that are walked: `log_buf_len` may be up to 2 GiB, one
/// descriptor for each 32 bytes of it (`PRB_AVGBITS` is 5).
const MOST_DESCRIPTOR_BITS: u32 = 26;
/// `LOG_BUF_LEN_MAX` is 2 GiB.
const MOST_TEXT_BITS: u32 = 31;
/// The largest `printk_info` there may be; it has 112 bytes in Linux 7.2.
const MOST_INFO_BYTES: u64 = 512;
/// The largest `prb_desc`; it has 24 bytes.
const MOST_DESCRIPTOR_BYTES: u64 = 128;

/// The most descriptors in a row that are of no record: between tail and head
/// all are, but for those that the guest overwrites during the read. The ring of
/// the largest log has a thousand times as many, and a guest can say that its
/// own is such a one.
const MOST_BARREN: u64 = 1 << 16;

/// The two upper bits of `prb_desc.state_var` are the state.
const STATE_SHIFT: u32 = 62;
/// The rest is the id.
const ID_MASK: u64 = !(3 << STATE_SHIFT);

/// `FAILED_LPOS`: the text found no room.
const FAILED_POSITION: u64 = 1;
/// `prb_data_block.id` precedes the text.
const BLOCK_HEADER: u64 = 8;

/// A string inside `printk_info`: a `char` array, cut at its first zero byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedText {
    /// Offset in `printk_info`.
    pub offset: u64,
    /// Bytes of the array.
    pub length: u64,
}

/// Where the members of the ring's structures lie, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// In `printk_ringbuffer`: `desc_ring.count_bits`.
    pub count_bits: u64,
    /// In `printk_ringbuffer`: `desc_ring.descs`.
    pub descriptors: u64,
    /// In `printk_ringbuffer`: `desc_ring.infos`.
    pub infos: u64,
    /// In `printk_ringbuffer`: `desc_ring.head_id`.
    pub head_id: u64,
    /// In `printk_ringbuffer`: `desc_ring.tail_id`.
    pub tail_id: u64,
    /// In `printk_ringbuffer`: `text_data_ring.size_bits`.
    pub size_bits: u64,
    /// In `printk_ringbuffer`: `text_data_ring.data`.
    pub data: u64,
    /// Size of `prb_desc`.
    pub descriptor_size: u64,
    /// In `prb_desc`: `state_var`.
    pub state: u64,
    /// In `prb_desc`: `text_blk_lpos.begin`.
    pub begin: u64,
    /// In `prb_desc`: `text_blk_lpos.next`.
    pub next: u64,
    /// Size of `printk_info`.
    pub info_size: u64,
    /// In `printk_info`: `seq`.
    pub sequence: u64,
    /// In `printk_info`: `ts_nsec`.
    pub time: u64,
    /// In `printk_info`: `text_len`.
    pub text_length: u64,
    /// In `printk_info`: `facility`.
    pub facility: u64,
    /// In `printk_info`: the byte of `flags` (low 5 bits) and `level`.
    pub flags_and_level: u64,
    /// In `printk_info`: `caller_id`.
    pub caller: u64,
    /// In `printk_info`: `comm`, from Linux 7.0 on.
    pub command: Option<FixedText>,
    /// In `printk_info`: `dev_info.subsystem`.
    pub subsystem: Option<FixedText>,
    /// In `printk_info`: `dev_info.device`.
    pub device: Option<FixedText>,
}

/// One record of the kernel's log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The kernel's number of the record, from 0 at boot.
    pub sequence: u64,
    /// Nanoseconds of the scheduler's clock since boot.
    pub nanoseconds: u64,
    /// The syslog facility.
    pub facility: u8,
    /// The syslog severity, 0 (emergency) to 7 (debug).
    pub level: u8,
    /// `printk_info.flags`: 2 ends a line, 8 continues one.
    pub flags: u8,
    /// Who logged: the thread's id, or with bit 31 set the number of the CPU.
    pub caller: Option<u32>,
    /// The name of the thread that logged, from Linux 7.0 on.
    pub command: Vec<u8>,
    /// The text, without the line's end.
    pub text: Vec<u8>,
    /// The subsystem of the device it is about, empty if none.
    pub subsystem: Vec<u8>,
    /// The device it is about, empty if none.
    pub device: Vec<u8>,
    /// Whether the record is final; one that is not may still be continued,
    /// and the kernel does not show it yet.
    pub complete: bool,
    /// Bytes of text that the kernel cut off for want of room.
    pub truncated: u64,
}

/// What the walk over the ring hands out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A record.
    Record(Record),
    /// Records that can't be given, and why.
    Lost(Loss),
}

/// Why records are missing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Loss {
    /// The guest wrote over them during the read.
    #[error("{count} records from descriptor id {first} on were overwritten during the read")]
    Overwritten {
        /// The first id.
        first: u64,
        /// How many in a row.
        count: u64,
    },
    /// The guest was still writing it.
    #[error("the record of descriptor id {id} was being written")]
    Reserved {
        /// Its id.
        id: u64,
    },
    /// The kernel found no room for its text.
    #[error("record {sequence} has no text: the kernel found no room for it")]
    NoRoom {
        /// Its sequence number.
        sequence: u64,
    },
    /// Its positions do not describe a block of the text ring.
    #[error("record {sequence}: the text block {begin:#x}..{next:#x} is no block of the ring")]
    BadBlock {
        /// Its sequence number.
        sequence: u64,
        /// `begin` as found.
        begin: u64,
        /// `next` as found.
        next: u64,
    },
    /// The text block belongs to another record.
    #[error("record {sequence}: its text block at {begin:#x} holds id {found}, not {id}")]
    OtherBlock {
        /// Its sequence number.
        sequence: u64,
        /// `begin` as found.
        begin: u64,
        /// The record's id.
        id: u64,
        /// The id in the block.
        found: u64,
    },
    /// So many descriptors in a row are of no record that the rest was not
    /// looked at.
    #[error(
        "none of {count} descriptors in a row, from id {first} on, is of a record: the ring is \
         damaged, and {left} more were not looked at"
    )]
    Barren {
        /// The first id.
        first: u64,
        /// How many were looked at.
        count: u64,
        /// How many were not.
        left: u64,
    },
    /// Memory of the ring can't be read.
    #[error("the record of descriptor id {id}: {source}")]
    Unreadable {
        /// Its id.
        id: u64,
        /// Why not.
        source: ReadError,
    },
}

/// Why there is no ring to walk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The ring's own structure can't be read.
    #[error("the printk ring at {address} can't be read: {source}")]
    Read {
        /// Where it lies.
        address: VirtualAddress,
        /// Why not.
        source: ReadError,
    },
    /// A size that no kernel's ring has.
    #[error("the printk ring at {address} says {what} {found}, which no kernel has")]
    Size {
        /// Where the ring lies.
        address: VirtualAddress,
        /// Which size.
        what: &'static str,
        /// What it says.
        found: u64,
    },
}

/// Reads guest memory.
pub type Read<'r> = dyn Fn(VirtualAddress, &mut [u8]) -> Result<(), ReadError> + 'r;

/// The ring's own structure, copied and checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ring<'l> {
    layout: &'l RingLayout,
    count: u64,
    descriptors: VirtualAddress,
    infos: VirtualAddress,
    pub(super) head_id: u64,
    pub(super) tail_id: u64,
    text_bits: u32,
    data: VirtualAddress,
}

/// A descriptor as it was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descriptor {
    state: u64,
    begin: u64,
    next: u64,
}

/// `enum desc_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Reserved,
    Committed,
    Finalized,
    Reusable,
}

impl Descriptor {
    fn id(self) -> u64 {
        self.state & ID_MASK
    }

    fn state(self) -> State {
        match self.state >> STATE_SHIFT {
            0 => State::Reserved,
            1 => State::Committed,
            2 => State::Finalized,
            _ => State::Reusable,
        }
    }
}

/// The integer of `N` bytes at `offset`, 0 where `bytes` ends.
fn field<const N: usize>(bytes: &[u8], offset: u64) -> u64 {
    let mut value = [0; 8];
    if let Some(source) = usize::try_from(offset)
        .ok()
        .and_then(|offset| bytes.get(offset..)?.get(..N))
        && let Some(target) = value.get_mut(..N)
    {
        target.copy_from_slice(source);
    }
    u64::from_le_bytes(value)
}

fn fixed_text(bytes: &[u8], place: Option<FixedText>) -> Vec<u8> {
    let text = place.and_then(|place| {
        let start = usize::try_from(place.offset).ok()?;
        let length = usize::try_from(place.length).ok()?;
        let text = bytes.get(start..)?;
        text.get(..length.min(text.len()))
    });
    text.unwrap_or_default()
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default()
        .to_vec()
}

impl<'l> Ring<'l> {
    /// Copies the ring's own structure from `address` and checks its sizes.
    pub(super) fn read(
        layout: &'l RingLayout,
        address: VirtualAddress,
        read: &Read<'_>,
    ) -> Result<Self, RingError> {
        let number = |offset: u64, size: usize| {
            let mut bytes = [0; 8];
            let wanted = bytes.get_mut(..size).unwrap_or_default();
            read(address.wrapping_add(offset), wanted)
                .map(|()| u64::from_le_bytes(bytes))
                .map_err(|source| RingError::Read { address, source })
        };
        let bits = |offset, what, most| {
            let found = number(offset, 4)?;
            match u32::try_from(found) {
                Ok(bits) if (1..=most).contains(&bits) => Ok(bits),
                _ => Err(RingError::Size {
                    address,
                    what,
                    found,
                }),
            }
        };
        let within = |what, found, most| {
            if (1..=most).contains(&found) {
                Ok(found)
            } else {
                Err(RingError::Size {
                    address,
                    what,
                    found,
                })
            }
        };
        within("sizeof(printk_info)", layout.info_size, MOST_INFO_BYTES)?;
        within(
            "sizeof(prb_desc)",
            layout.descriptor_size,
            MOST_DESCRIPTOR_BYTES,
        )?;
        Ok(Self {
            layout,
            count: 1 << bits(layout.count_bits, "count_bits", MOST_DESCRIPTOR_BITS)?,
            descriptors: VirtualAddress::new(number(layout.descriptors, 8)?),
            infos: VirtualAddress::new(number(layout.infos, 8)?),
            head_id: number(layout.head_id, 8)? & ID_MASK,
            tail_id: number(layout.tail_id, 8)? & ID_MASK,
            text_bits: bits(layout.size_bits, "size_bits", MOST_TEXT_BITS)?,
            data: VirtualAddress::new(number(layout.data, 8)?),
        })
    }

    /// How many ids there are from the oldest to the newest.
    pub(super) fn length(&self) -> u64 {
        let span = self.head_id.wrapping_sub(self.tail_id) & ID_MASK;
        span.saturating_add(1).min(self.count)
    }

    fn slot(&self, array: VirtualAddress, id: u64, size: u64) -> VirtualAddress {
        array.wrapping_add((id & (self.count - 1)).wrapping_mul(size))
    }

    fn descriptor(&self, id: u64, read: &Read<'_>) -> Result<Descriptor, ReadError> {
        let mut bytes = [0; MOST_DESCRIPTOR_BYTES as usize];
        let size = self.layout.descriptor_size;
        let wanted = bytes.get_mut(..size as usize).unwrap_or_default();
        read(self.slot(self.descriptors, id, size), wanted)?;
        Ok(Descriptor {
            state: field::<8>(&bytes, self.layout.state),
            begin: field::<8>(&bytes, self.layout.begin),
            next: field::<8>(&bytes, self.layout.next),
        })
    }

    pub(super) fn info(&self, id: u64, read: &Read<'_>) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; self.layout.info_size as usize];
        read(self.slot(self.infos, id, self.layout.info_size), &mut bytes)?;
        Ok(bytes)
    }

    fn index(&self, position: u64) -> u64 {
        position & ((1 << self.text_bits) - 1)
    }

    fn wraps(&self, position: u64) -> u64 {
        position >> self.text_bits
    }

    /// Index in the text ring and size of the block, its header included.
    fn block(&self, begin: u64, next: u64) -> Option<(u64, u64)> {
        // The last byte decides in which turn a block lies: one that ends with
        // the ring (from Linux 6.18 on) still lies in the turn it began in.
        let last = next.wrapping_sub(1);
        let size = 1_u64 << self.text_bits;
        let (index, length) = if self.wraps(begin) == self.wraps(last) {
            // Positions wrap at 2^64 as well, soon after boot.
            (self.index(begin), next.wrapping_sub(begin))
        } else if self.wraps(begin.wrapping_add(size)) == self.wraps(last) {
            // It did not fit before the ring's end: it lies at its start.
            (0, self.index(last) + 1)
        } else {
            return None;
        };
        (length > BLOCK_HEADER && length <= size && index % 8 == 0).then_some((index, length))
    }

    /// The text of the record, and how many bytes of it were cut off.
    fn text(
        &self,
        descriptor: Descriptor,
        sequence: u64,
        text_length: u64,
        read: &Read<'_>,
    ) -> Result<(Vec<u8>, u64), Loss> {
        let Descriptor { begin, next, .. } = descriptor;
        let id = descriptor.id();
        if begin & 1 == 1 && next & 1 == 1 {
            // Positions are multiples of 8: odd ones stand for no block.
            return match (begin, next) {
                (FAILED_POSITION, FAILED_POSITION) => Err(Loss::NoRoom { sequence }),
                _ => Ok((Vec::new(), 0)),
            };
        }
        let (index, length) = self.block(begin, next).ok_or(Loss::BadBlock {
            sequence,
            begin,
            next,
        })?;
        let room = length - BLOCK_HEADER;
        let kept = text_length.min(room);
        let mut bytes = vec![0; (BLOCK_HEADER + kept) as usize];
        read(self.data.wrapping_add(index), &mut bytes)
            .map_err(|source| Loss::Unreadable { id, source })?;
        let found = field::<8>(&bytes, 0);
        if found != id {
            return Err(Loss::OtherBlock {
                sequence,
                begin,
                id,
                found,
            });
        }
        bytes.drain(..BLOCK_HEADER as usize);
        Ok((bytes, text_length - kept))
    }

    /// The record with this id: none if the kernel itself gave it up before.
    fn record(&self, id: u64, read: &Read<'_>) -> Result<Option<Record>, Loss> {
        let unreadable = |source| Loss::Unreadable { id, source };
        let overwritten = Loss::Overwritten {
            first: id,
            count: 1,
        };
        let before = self.descriptor(id, read).map_err(unreadable)?;
        if before.id() != id {
            return Err(overwritten);
        }
        let complete = match before.state() {
            State::Reserved => return Err(Loss::Reserved { id }),
            State::Reusable => return Ok(None),
            State::Committed => false,
            State::Finalized => true,
        };
        let info = self.info(id, read).map_err(unreadable)?;
        let layout = self.layout;
        let sequence = field::<8>(&info, layout.sequence);
        let text_length = field::<2>(&info, layout.text_length);
        let text = self.text(before, sequence, text_length, read);
        // Whatever was copied counts only if the descriptor was still the
        // same afterwards; of a block that is not ours the reason may be that.
        let after = self.descriptor(id, read).map_err(unreadable)?;
        if after.id() != id || (after != before && after.state() == State::Reusable) {
            return Err(overwritten);
        }
        let (text, truncated) = text?;
        let flags_and_level = field::<1>(&info, layout.flags_and_level) as u8;
        Ok(Some(Record {
            sequence,
            nanoseconds: field::<8>(&info, layout.time),
            facility: field::<1>(&info, layout.facility) as u8,
            level: flags_and_level >> 5,
            flags: flags_and_level & 0x1f,
            caller: Some(field::<4>(&info, layout.caller) as u32),
            command: fixed_text(&info, layout.command),
            text,
            subsystem: fixed_text(&info, layout.subsystem),
            device: fixed_text(&info, layout.device),
            complete,
            truncated,
        }))
    }

    /// The sequence number in the info of `id`, where that can be read.
    pub(super) fn sequence(&self, id: u64, read: &Read<'_>) -> Option<u64> {
        let info = self.info(id, read).ok()?;
        Some(field::<8>(&info, self.layout.sequence))
    }

    /// The record with this id if it is whole, for proofs of a layout.
    pub(super) fn proof(&self, id: u64, read: &Read<'_>) -> Option<Record> {
        self.record(id, read).ok().flatten()
    }
}

/// Walks the ring at `address` from its oldest record to its newest. The sink
/// returns whether it wants more.
///
/// # Errors
/// [`RingError`] if there is no ring to walk.
pub fn records(
    layout: &RingLayout,
    address: VirtualAddress,
    read: &Read<'_>,
    sink: &mut dyn FnMut(Found) -> bool,
) -> Result<(), RingError> {
    let ring = Ring::read(layout, address, read)?;
    // Losses of one kind in a row are told once.
    let mut overwritten: Option<(u64, u64)> = None;
    let mut barren = 0;
    for distance in 0..ring.length() {
        let id = ring.tail_id.wrapping_add(distance) & ID_MASK;
        let outcome = ring.record(id, read);
        barren = match outcome {
            Ok(None) | Err(Loss::Overwritten { .. }) => barren + 1,
            _ => 0,
        };
        if barren > MOST_BARREN {
            sink(Found::Lost(Loss::Barren {
                first: id.wrapping_sub(barren - 1) & ID_MASK,
                count: barren,
                left: ring.length() - distance - 1,
            }));
            return Ok(());
        }
        if let Err(Loss::Overwritten { .. }) = outcome {
            overwritten = match overwritten {
                Some((first, count)) => Some((first, count + 1)),
                None => Some((id, 1)),
            };
            continue;
        }
        if let Some((first, count)) = overwritten.take()
            && !sink(Found::Lost(Loss::Overwritten { first, count }))
        {
            return Ok(());
        }
        let found = match outcome {
            Ok(None) => continue,
            Ok(Some(record)) => Found::Record(record),
            Err(loss) => Found::Lost(loss),
        };
        if !sink(found) {
            return Ok(());
        }
    }
    if let Some((first, count)) = overwritten {
        sink(Found::Lost(Loss::Overwritten { first, count }));
    }
    Ok(())
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
