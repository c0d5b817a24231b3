//! Where the members of the printk structures lie: said by the kernel's types,
//! else by the offsets that it wrote into VMCOREINFO for tools like this, else
//! by what fits the data.

use secmon_memory::VirtualAddress;
use secmon_profile::{TypeError, Types};

use super::log_buffer::LogLayout;
use super::ring::{FixedText, Read, Ring, RingLayout};

/// Where a layout came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The kernel's types.
    Types,
    /// VMCOREINFO.
    CoreInformation,
    /// A layout that some kernel has, proved by the ring's own data.
    Proof,
}

/// The members of `printk_info` that stand behind those VMCOREINFO names:
/// `facility` and the byte of `flags` and `level` follow `text_len` at once in
/// every kernel that has this structure.
const FACILITY_AFTER_TEXT_LENGTH: u64 = 2;
const FLAGS_AFTER_TEXT_LENGTH: u64 = 3;

/// The ring's layout by the kernel's types.
///
/// # Errors
/// [`TypeError`] for the first type or member that is missing.
pub fn ring_from_types(types: &Types) -> Result<RingLayout, TypeError> {
    let offset =
        |structure: &str, path: &str| types.member(structure, path).map(|member| member.offset);
    let text = |path: &str| {
        let member = types.member("printk_info", path).ok()?;
        Some(FixedText {
            offset: member.offset,
            length: member.size,
        })
    };
    let ring = |path| offset("printk_ringbuffer", path);
    let info = |path| offset("printk_info", path);
    Ok(RingLayout {
        count_bits: ring("desc_ring.count_bits")?,
        descriptors: ring("desc_ring.descs")?,
        infos: ring("desc_ring.infos")?,
        head_id: ring("desc_ring.head_id")?,
        tail_id: ring("desc_ring.tail_id")?,
        size_bits: ring("text_data_ring.size_bits")?,
        data: ring("text_data_ring.data")?,
        descriptor_size: types.size_of("prb_desc")?,
        state: offset("prb_desc", "state_var")?,
        begin: offset("prb_desc", "text_blk_lpos.begin")?,
        next: offset("prb_desc", "text_blk_lpos.next")?,
        info_size: types.size_of("printk_info")?,
        sequence: info("seq")?,
        time: info("ts_nsec")?,
        text_length: info("text_len")?,
        facility: info("facility")?,
        // A bit field's offset is that of the unit it lies in.
        flags_and_level: info("level")?,
        caller: info("caller_id")?,
        command: text("comm"),
        subsystem: text("dev_info.subsystem"),
        device: text("dev_info.device"),
    })
}

/// The number behind `NAME(key)=` in VMCOREINFO's text.
pub fn core_number(text: &[u8], name: &str, key: &str) -> Option<u64> {
    let wanted = format!("{name}({key})=");
    text.split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(wanted.as_bytes()))
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .and_then(|digits| digits.trim().parse().ok())
}

/// The ring's layout by VMCOREINFO, if it has all of it.
pub fn ring_from_core_information(text: &[u8]) -> Option<RingLayout> {
    let offset = |key: &str| core_number(text, "OFFSET", key);
    let size = |key: &str| core_number(text, "SIZE", key);
    let descriptors = offset("printk_ringbuffer.desc_ring")?;
    let texts = offset("printk_ringbuffer.text_data_ring")?;
    let positions = offset("prb_desc.text_blk_lpos")?;
    let text_length = offset("printk_info.text_len")?;
    let device = offset("printk_info.dev_info");
    let fixed = |member: &str, length: &str| {
        let inside = offset(&format!("dev_printk_info.{member}"))?;
        Some(FixedText {
            offset: device?.checked_add(inside)?,
            length: core_number(text, "LENGTH", length)?,
        })
    };
    Some(RingLayout {
        count_bits: descriptors.checked_add(offset("prb_desc_ring.count_bits")?)?,
        descriptors: descriptors.checked_add(offset("prb_desc_ring.descs")?)?,
        infos: descriptors.checked_add(offset("prb_desc_ring.infos")?)?,
        head_id: descriptors.checked_add(offset("prb_desc_ring.head_id")?)?,
        tail_id: descriptors.checked_add(offset("prb_desc_ring.tail_id")?)?,
        size_bits: texts.checked_add(offset("prb_data_ring.size_bits")?)?,
        data: texts.checked_add(offset("prb_data_ring.data")?)?,
        descriptor_size: size("prb_desc")?,
        state: offset("prb_desc.state_var")?,
        begin: positions.checked_add(offset("prb_data_blk_lpos.begin")?)?,
        next: positions.checked_add(offset("prb_data_blk_lpos.next")?)?,
        info_size: size("printk_info")?,
        sequence: offset("printk_info.seq")?,
        time: offset("printk_info.ts_nsec")?,
        text_length,
        facility: text_length.checked_add(FACILITY_AFTER_TEXT_LENGTH)?,
        flags_and_level: text_length.checked_add(FLAGS_AFTER_TEXT_LENGTH)?,
        caller: offset("printk_info.caller_id")?,
        command: None,
        subsystem: fixed("subsystem", "printk_info_subsystem"),
        device: fixed("device", "printk_info_device"),
    })
}

/// The layout of the old log by the kernel's types.
///
/// # Errors
/// [`TypeError`] for the first type or member that is missing.
pub fn log_from_types(types: &Types) -> Result<LogLayout, TypeError> {
    let offset = |path: &str| types.member("printk_log", path).map(|member| member.offset);
    Ok(LogLayout {
        size: types.size_of("printk_log")?,
        time: offset("ts_nsec")?,
        length: offset("len")?,
        text_length: offset("text_len")?,
        dictionary_length: offset("dict_len")?,
        facility: offset("facility")?,
        flags_and_level: offset("level")?,
        caller: offset("caller_id").ok(),
    })
}

/// The layout of the old log by VMCOREINFO.
pub fn log_from_core_information(text: &[u8]) -> Option<LogLayout> {
    let offset = |key: &str| core_number(text, "OFFSET", key);
    let size = core_number(text, "SIZE", "printk_log")?;
    let dictionary_length = offset("printk_log.dict_len")?;
    Some(LogLayout {
        size,
        time: offset("printk_log.ts_nsec")?,
        length: offset("printk_log.len")?,
        text_length: offset("printk_log.text_len")?,
        dictionary_length,
        facility: dictionary_length.checked_add(2)?,
        flags_and_level: dictionary_length.checked_add(3)?,
        caller: (size == LogLayout::standard(true).size).then_some(16),
    })
}

/// The layouts of all kernels so far: the descriptor ring with and without
/// `last_finalized_id` (or `_seq`) behind it, `printk_info` with and without
/// the name of the thread.
pub fn known_layouts() -> impl Iterator<Item = RingLayout> {
    let older = RingLayout {
        count_bits: 0,
        descriptors: 8,
        infos: 16,
        head_id: 24,
        tail_id: 32,
        size_bits: 40,
        data: 48,
        descriptor_size: 24,
        state: 0,
        begin: 8,
        next: 16,
        info_size: 88,
        sequence: 0,
        time: 8,
        text_length: 16,
        facility: 18,
        flags_and_level: 19,
        caller: 20,
        command: None,
        subsystem: Some(FixedText {
            offset: 24,
            length: 16,
        }),
        device: Some(FixedText {
            offset: 40,
            length: 48,
        }),
    };
    let named = RingLayout {
        info_size: 112,
        command: Some(FixedText {
            offset: 28,
            length: 16,
        }),
        subsystem: Some(FixedText {
            offset: 44,
            length: 16,
        }),
        device: Some(FixedText {
            offset: 60,
            length: 48,
        }),
        ..older
    };
    [older, named].into_iter().flat_map(|layout| {
        let finalized = RingLayout {
            size_bits: layout.size_bits + 8,
            data: layout.data + 8,
            ..layout
        };
        [finalized, layout]
    })
}

/// How many of the newest records a proof looks at.
const PROOF_RECORDS: u64 = 32;
/// How many of them must be whole and agree.
const PROOF_ENOUGH: u64 = 4;

/// The known layout that fits the ring at `address`: the newest records have
/// text blocks that bear their ids, and sequence numbers without a gap.
/// None if none fits, or more than one does equally well.
pub fn ring_by_proof(address: VirtualAddress, read: &Read<'_>) -> Option<RingLayout> {
    let mut best: Option<(u64, RingLayout)> = None;
    let mut tie = false;
    for layout in known_layouts() {
        let score = proof_score(&layout, address, read);
        match best {
            Some((known, _)) if score < known => {}
            Some((known, _)) if score == known => tie = true,
            _ => {
                tie = false;
                best = Some((score, layout));
            }
        }
    }
    best.filter(|(score, _)| *score >= PROOF_ENOUGH && !tie)
        .map(|(_, layout)| layout)
}

fn proof_score(layout: &RingLayout, address: VirtualAddress, read: &Read<'_>) -> u64 {
    let Ok(ring) = Ring::read(layout, address, read) else {
        return 0;
    };
    let newest = ring.head_id;
    let mut score = 0;
    for distance in 0..ring.length().min(PROOF_RECORDS) {
        let id = newest.wrapping_sub(distance);
        let (Some(record), Some(next)) = (
            ring.proof(id, read),
            ring.sequence(id.wrapping_add(1), read),
        ) else {
            continue;
        };
        if distance == 0 || record.sequence.wrapping_add(1) == next {
            score += 1;
        }
    }
    score
}
