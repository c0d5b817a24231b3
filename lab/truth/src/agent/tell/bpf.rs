//! eBPF programs and maps, by `bpf(2)`.

use std::io;
use std::os::fd::AsRawFd as _;

use secmon_truth::{Bpf, BpfMap, BpfProgram};

use crate::agent::netlink::number;
use crate::agent::sys;

const PROGRAM_GET_NEXT_ID: libc::c_int = 11;
const MAP_GET_NEXT_ID: libc::c_int = 12;
const PROGRAM_GET_FD_BY_ID: libc::c_int = 13;
const MAP_GET_FD_BY_ID: libc::c_int = 14;
const OBJECT_GET_INFO_BY_FD: libc::c_int = 15;

/// The most map ids asked for of one program.
const MOST_MAPS: usize = 64;

/// Every program and map there is.
pub fn objects() -> io::Result<Bpf> {
    let mut objects = Bpf::default();
    for id in ids(PROGRAM_GET_NEXT_ID)? {
        if let Some(info) = info(PROGRAM_GET_FD_BY_ID, id)? {
            objects.programs.extend(program(&info));
        }
    }
    for id in ids(MAP_GET_NEXT_ID)? {
        if let Some(info) = info(MAP_GET_FD_BY_ID, id)? {
            objects.maps.extend(map(&info.bytes));
        }
    }
    Ok(objects)
}

struct ObjectInfo {
    bytes: [u8; 256],
    map_ids: [u32; MOST_MAPS],
}

/// struct bpf_prog_info of `include/uapi/linux/bpf.h`.
fn program(info: &ObjectInfo) -> Option<BpfProgram> {
    let bytes = &info.bytes;
    let word = |at| number(bytes, at).map(u32::from_ne_bytes);
    let map_count = word(52)? as usize;
    Some(BpfProgram {
        program_type: word(0)?,
        id: word(4)?,
        tag: bytes[8..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
        jited_bytes: word(16)?,
        translated_bytes: word(20)?,
        load_time: number(bytes, 40).map(u64::from_ne_bytes)?,
        created_by_uid: word(48)?,
        map_ids: info.map_ids.iter().take(map_count).copied().collect(),
        name: name(&bytes[64..80]),
    })
}

/// struct bpf_map_info.
fn map(bytes: &[u8]) -> Option<BpfMap> {
    let word = |at| number(bytes, at).map(u32::from_ne_bytes);
    Some(BpfMap {
        map_type: word(0)?,
        id: word(4)?,
        key_size: word(8)?,
        value_size: word(12)?,
        max_entries: word(16)?,
        flags: word(20)?,
        name: name(bytes.get(24..40)?),
    })
}

fn name(bytes: &[u8]) -> secmon_truth::ByteString {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    bytes[..end].into()
}

fn ids(command: libc::c_int) -> io::Result<Vec<u32>> {
    let mut ids = Vec::new();
    loop {
        // start_id, next_id, open_flags.
        let mut attribute = [ids.last().copied().unwrap_or(0), 0, 0, 0];
        match call(command, &mut attribute) {
            Ok(_) => ids.push(attribute[1]),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(ids),
            Err(error) => return Err(error),
        }
    }
}

fn info(open: libc::c_int, id: u32) -> io::Result<Option<ObjectInfo>> {
    let fd = match call(open, &mut [id, 0, 0, 0]) {
        Ok(fd) => sys::own(fd)?,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut info = ObjectInfo {
        bytes: [0; 256],
        map_ids: [0; MOST_MAPS],
    };
    if open == PROGRAM_GET_FD_BY_ID {
        // nr_map_ids and map_ids: where the kernel puts the map's ids.
        let address = info.map_ids.as_mut_ptr() as u64;
        info.bytes[52..56].copy_from_slice(&(MOST_MAPS as u32).to_ne_bytes());
        info.bytes[56..64].copy_from_slice(&address.to_ne_bytes());
    }
    let address = info.bytes.as_mut_ptr() as u64;
    let mut attribute = [
        fd.as_raw_fd() as u32,
        info.bytes.len() as u32,
        address as u32,
        (address >> 32) as u32,
    ];
    call(OBJECT_GET_INFO_BY_FD, &mut attribute)?;
    Ok(Some(info))
}

fn call(command: libc::c_int, attribute: &mut [u32; 4]) -> io::Result<libc::c_int> {
    // SAFETY: the attribute is 16 bytes, as said; the pointers in it, if any,
    // are to live buffers of the lengths that stand beside them.
    sys::check_long(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attribute.as_mut_ptr(),
            size_of_val(attribute),
        )
    })
    .map(|value| value as libc::c_int)
}
