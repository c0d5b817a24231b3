//! Guest RAM read out of a running QEMU's own memory.
//!
//! Two ways of Linux, asked for in this order:
//!
//! * an open `/proc/PID/mem`: permission is checked once, when it is opened,
//!   so it still serves after the reader has locked itself into a sandbox; it
//!   belongs to that one program image, so a process that gets the same number
//!   later can't be read by mistake; and a single read through it costs half of
//!   the other's;
//! * `process_vm_readv`, where the file can't be opened: a reader with
//!   `CAP_SYS_PTRACE` that is neither root nor QEMU's user. Here a process
//!   descriptor is asked after each read whether the process still was the one
//!   that was opened.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use secmon_memory::{
    LayoutError, MemoryRegion, PAGE_SIZE, PhysicalAddress, PhysicalMemory, PhysicalReadError,
    Volatility,
};

use super::process::{self, ProcessHandle, ProcessId, folder};

/// Where a region of guest RAM lies in QEMU's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRegion {
    /// The guest physical addresses.
    pub region: MemoryRegion,
    /// The virtual address of its first byte in QEMU.
    pub host_address: u64,
}

/// How QEMU's memory is reached.
#[derive(Debug)]
enum Channel {
    File(File),
    Call { pid: Pid },
}

/// The guest RAM inside of a running QEMU process.
///
/// Nothing is cached and nothing is mapped: every read is a system call, of
/// 0.7 to 1.2 µs for up to a page. See `CachedMemory` of the memory crate
/// where that is too slow.
#[derive(Debug)]
pub struct ProcessMemory {
    process: ProcessHandle,
    channel: Channel,
    pieces: Vec<HostRegion>,
    regions: Vec<MemoryRegion>,
    /// `/proc/PID/pagemap`, if all pieces are private anonymous memory: of
    /// that, what has no page is zero.
    page_map: Option<File>,
}

/// One read of a batch, see [`ProcessMemory::read_many`].
#[derive(Debug)]
pub struct ReadRequest<'a> {
    /// Where to read.
    pub address: PhysicalAddress,
    /// What to fill.
    pub buffer: &'a mut [u8],
}

/// Entries of the page map that are read at once.
const ENTRIES: usize = 64 << 10;

/// Populated parts with no more than this between them count as one.
const JOINED: u64 = 64 << 10;

/// The most pieces that one `process_vm_readv` takes (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;

impl ProcessMemory {
    /// Opens the memory of `process`, of which `pieces` are guest RAM.
    ///
    /// # Errors
    /// The host's, `PermissionDenied` where this process may not look into the
    /// other; `InvalidInput` with a [`LayoutError`] for pieces that overlap.
    pub fn open(process: ProcessId, mut pieces: Vec<HostRegion>) -> io::Result<Self> {
        let invalid = |error: LayoutError| io::Error::new(io::ErrorKind::InvalidInput, error);
        pieces.sort_by_key(|piece| piece.region.start);
        for piece in &pieces {
            let start = piece.region.start;
            if piece.region.length == 0 {
                return Err(invalid(LayoutError::Empty(start)));
            }
            let end = start.checked_add(piece.region.length);
            let host_end = piece.host_address.checked_add(piece.region.length);
            if end.is_none_or(|end| end.as_u64() > 1 << 52) || host_end.is_none() {
                return Err(invalid(LayoutError::TooHigh(start)));
            }
        }
        for pair in pieces.windows(2) {
            if let [first, second] = pair
                && first.region.end() > second.region.start
            {
                let (first, second) = (first.region.start, second.region.start);
                return Err(invalid(LayoutError::Overlap(first, second)));
            }
        }
        let channel = open_channel(process, pieces.first())?;
        // What was opened is the process that was meant, not a later one with
        // its number.
        let process = ProcessHandle::open(process)?;
        Ok(Self {
            page_map: page_map(process.id.pid, &pieces),
            process,
            channel,
            regions: pieces.iter().map(|piece| piece.region).collect(),
            pieces,
        })
    }

    /// The process read from.
    pub fn process(&self) -> ProcessId {
        self.process.id
    }

    /// The name of the way memory is read: `/proc/PID/mem` or
    /// `process_vm_readv`.
    pub fn method(&self) -> &'static str {
        match self.channel {
            Channel::File(_) => "/proc/PID/mem",
            Channel::Call { .. } => "process_vm_readv",
        }
    }

    /// Fills all requests, in as few system calls as the host allows where
    /// memory is read by `process_vm_readv`. The result for each request is at
    /// its place.
    pub fn read_many(
        &self,
        requests: &mut [ReadRequest<'_>],
    ) -> Vec<Result<(), PhysicalReadError>> {
        let Channel::Call { pid } = &self.channel else {
            return self.read_each(requests);
        };
        let mut results = Vec::with_capacity(requests.len());
        for group in requests.chunks_mut(MAX_VECTORS) {
            let wanted: usize = group.iter().map(|request| request.buffer.len()).sum();
            let remote: Option<Vec<RemoteIoVec>> = group
                .iter()
                .map(|request| {
                    let length = request.buffer.len();
                    let (piece, inside) = self.piece(request.address.as_u64())?;
                    let fits = length as u64 <= piece.region.length - inside;
                    fits.then(|| RemoteIoVec {
                        base: (piece.host_address + inside) as usize,
                        len: length,
                    })
                })
                .collect();
            let complete = remote.is_some_and(|remote| {
                let mut local: Vec<IoSliceMut<'_>> = group
                    .iter_mut()
                    .map(|request| IoSliceMut::new(request.buffer))
                    .collect();
                process_vm_readv(*pid, &mut local, &remote) == Ok(wanted) && self.process.is_alive()
            });
            if complete {
                results.extend(group.iter().map(|_| Ok(())));
            } else {
                results.extend(self.read_each(group));
            }
        }
        results
    }

    fn read_each(&self, requests: &mut [ReadRequest<'_>]) -> Vec<Result<(), PhysicalReadError>> {
        let read = |request: &mut ReadRequest<'_>| self.read(request.address, request.buffer);
        requests.iter_mut().map(read).collect()
    }

    /// The piece that holds `address`, and how far inside of it.
    #[inline]
    fn piece(&self, address: u64) -> Option<(&HostRegion, u64)> {
        let start = |piece: &HostRegion| piece.region.start.as_u64();
        let index = self.pieces.partition_point(|piece| start(piece) <= address);
        let piece = self.pieces.get(index.checked_sub(1)?)?;
        let inside = address - start(piece);
        (inside < piece.region.length).then_some((piece, inside))
    }

    /// Appends the parts of a piece that have pages.
    fn populated_of(
        page_map: &File,
        piece: &HostRegion,
        found: &mut Vec<MemoryRegion>,
    ) -> io::Result<()> {
        let start = piece.region.start;
        let pages = piece.region.length.div_ceil(PAGE_SIZE);
        let first = piece.host_address / PAGE_SIZE;
        let mut entries = vec![0; ENTRIES * 8];
        let mut page = 0;
        while page < pages {
            let wanted = (pages - page).min(ENTRIES as u64) as usize * 8;
            let buffer = entries.get_mut(..wanted).unwrap_or_default();
            page_map.read_exact_at(buffer, (first + page) * 8)?;
            for entry in buffer.chunks_exact(8) {
                // Bit 63 is "present", bit 62 "swapped out"; little-endian.
                if entry.last().is_some_and(|byte| byte & 0xc0 != 0) {
                    let from = start.wrapping_add(page * PAGE_SIZE);
                    let end =
                        start.wrapping_add((page * PAGE_SIZE + PAGE_SIZE).min(piece.region.length));
                    match found.last_mut() {
                        Some(last)
                            if last.start >= start
                                && from.as_u64() - last.end().as_u64() <= JOINED =>
                        {
                            last.length = end.as_u64() - last.start.as_u64();
                        }
                        _ => found.push(MemoryRegion::new(from, end.as_u64() - from.as_u64())),
                    }
                }
                page += 1;
            }
        }
        Ok(())
    }

    fn failed(&self, address: u64, error: &io::Error) -> PhysicalReadError {
        let pid = self.process.id.pid;
        let reason = if self.process.is_alive() {
            format!("QEMU process {pid}: {error}")
        } else {
            format!("QEMU process {pid} has ended")
        };
        PhysicalReadError::Host {
            address: PhysicalAddress::new(address),
            reason,
        }
    }
}

impl PhysicalMemory for ProcessMemory {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn volatility(&self) -> Volatility {
        Volatility::Live
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let mut position = address.as_u64();
        let mut rest = buffer;
        while !rest.is_empty() {
            let Some((piece, inside)) = self.piece(position) else {
                return Err(PhysicalReadError::Hole {
                    address: PhysicalAddress::new(position),
                });
            };
            let left = usize::try_from(piece.region.length - inside).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_mut(rest.len().min(left));
            let count = now.len() as u64;
            self.channel
                .read(piece.host_address + inside, now)
                .map_err(|(read, error)| self.failed(position + read as u64, &error))?;
            // A later process may have got the number.
            if matches!(self.channel, Channel::Call { .. }) && !self.process.is_alive() {
                return Err(self.failed(position, &io::ErrorKind::UnexpectedEof.into()));
            }
            position = position.wrapping_add(count);
            rest = later;
        }
        Ok(())
    }

    /// By the host's page tables, where RAM is QEMU's private memory.
    fn populated(&self) -> Vec<MemoryRegion> {
        let Some(page_map) = &self.page_map else {
            return self.regions.clone();
        };
        let mut found = Vec::new();
        for piece in &self.pieces {
            if Self::populated_of(page_map, piece, &mut found).is_err() {
                return self.regions.clone();
            }
        }
        found
    }
}

impl Channel {
    /// Fills `buffer` from QEMU's virtual address on; an error comes with the
    /// number of bytes that were read before it.
    fn read(&self, host_address: u64, buffer: &mut [u8]) -> Result<(), (usize, io::Error)> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let address = host_address + done as u64;
            let count = match self {
                Self::File(file) => file.read_at(rest, address),
                Self::Call { pid } => {
                    let remote = [RemoteIoVec {
                        base: address as usize,
                        len: rest.len(),
                    }];
                    process_vm_readv(*pid, &mut [IoSliceMut::new(rest)], &remote)
                        .map_err(io::Error::from)
                }
            };
            match count {
                // The process is gone, its memory with it.
                Ok(0) => return Err((done, io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err((done, error)),
            }
        }
        Ok(())
    }
}

/// The page map of the process, if every piece is private anonymous memory.
fn page_map(pid: u32, pieces: &[HostRegion]) -> Option<File> {
    let mappings = process::mappings(pid).ok()?;
    let private = pieces.iter().all(|piece| {
        let end = piece.host_address.saturating_add(piece.region.length);
        let mut of_piece = mappings
            .iter()
            .filter(|mapping| mapping.start < end && piece.host_address < mapping.end);
        piece.host_address.is_multiple_of(PAGE_SIZE)
            && piece.region.start.is_aligned(PAGE_SIZE)
            && of_piece.all(|mapping| !mapping.shared && mapping.inode == 0)
    });
    let path = folder(pid).join("pagemap");
    private.then(|| File::open(path).ok()).flatten()
}

/// The first way that this process is allowed.
fn open_channel(process: ProcessId, piece: Option<&HostRegion>) -> io::Result<Channel> {
    let refused = match File::open(folder(process.pid).join("mem")) {
        Ok(file) => return Ok(Channel::File(file)),
        Err(error) => error,
    };
    let (Some(piece), Ok(pid)) = (piece, i32::try_from(process.pid)) else {
        return Err(refused);
    };
    let channel = Channel::Call {
        pid: Pid::from_raw(pid),
    };
    match channel.read(piece.host_address, &mut [0]) {
        Ok(()) => Ok(channel),
        Err((_, error)) if error.raw_os_error() == Some(Errno::ENOSYS as i32) => Err(refused),
        Err((_, error)) => Err(error),
    }
}

/// Reads any memory of a process, for looking through QEMU's own data.
pub(super) struct ForeignMemory(Channel);

impl ForeignMemory {
    /// `probe` is an address that can be read.
    pub fn open(process: ProcessId, probe: u64) -> io::Result<Self> {
        let region = MemoryRegion::new(PhysicalAddress::new(0), 1);
        let probe = HostRegion {
            region,
            host_address: probe,
        };
        open_channel(process, Some(&probe)).map(Self)
    }

    /// Fills `buffer` as far as memory can be read; gives the bytes read.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> usize {
        match self.0.read(address, buffer) {
            Ok(()) => buffer.len(),
            Err((read, _)) => read,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two regions that lie in this process, in the other order.
    fn memory(bytes: &[u8], call: bool) -> ProcessMemory {
        let process = ProcessId::of(std::process::id()).expect("this process");
        let base = bytes.as_ptr() as u64;
        let piece = |start, length, offset| HostRegion {
            region: MemoryRegion::new(PhysicalAddress::new(start), length),
            host_address: base + offset,
        };
        let pieces = vec![piece(0x1_0000, 0x1000, 0), piece(0, 0x1000, 0x1000)];
        let mut memory = ProcessMemory::open(process, pieces).expect("own memory");
        if call {
            memory.channel = Channel::Call { pid: Pid::this() };
        }
        memory
    }

    #[test]
    fn regions_are_read_and_holes_are_not() {
        let bytes: Vec<u8> = (0..0x2000_u32).map(|i| (i * 7 / 3) as u8).collect();
        for call in [false, true] {
            let memory = memory(&bytes, call);
            assert_eq!(memory.size(), 0x2000);
            let mut buffer = [0; 16];
            memory
                .read(PhysicalAddress::new(0xff0), &mut buffer)
                .expect("RAM");
            assert_eq!(buffer, bytes[0x1ff0..0x2000]);
            memory
                .read(PhysicalAddress::new(0x1_0008), &mut buffer)
                .expect("RAM");
            assert_eq!(buffer, bytes[8..24]);
            assert_eq!(
                memory.read(PhysicalAddress::new(0xff8), &mut buffer),
                Err(PhysicalReadError::Hole {
                    address: PhysicalAddress::new(0x1000)
                })
            );
            assert_eq!(memory.read(PhysicalAddress::new(0x5000), &mut []), Ok(()));
        }
    }

    #[test]
    fn a_batch_gives_each_request_its_result() {
        let bytes: Vec<u8> = (0..0x2000_u32).map(|i| (i * 5 / 3) as u8).collect();
        for call in [false, true] {
            let memory = memory(&bytes, call);
            let mut buffers = vec![[0; 8]; 3000];
            let mut requests: Vec<ReadRequest<'_>> = buffers
                .iter_mut()
                .enumerate()
                .map(|(index, buffer)| ReadRequest {
                    address: PhysicalAddress::new(if index == 2500 {
                        0x3000
                    } else {
                        index as u64
                    }),
                    buffer,
                })
                .collect();
            let results = memory.read_many(&mut requests);
            assert_eq!(results.len(), 3000);
            for (index, (result, buffer)) in results.iter().zip(&buffers).enumerate() {
                assert_eq!(result.is_ok(), index != 2500, "{index}");
                if index != 2500 {
                    assert_eq!(buffer[..], bytes[0x1000 + index..][..8]);
                }
            }
        }
    }

    #[test]
    fn overlapping_pieces_are_refused() {
        let process = ProcessId::of(std::process::id()).expect("this process");
        let piece = HostRegion {
            region: MemoryRegion::new(PhysicalAddress::new(0), 0x1000),
            host_address: 0x1000,
        };
        let error = ProcessMemory::open(process, vec![piece, piece]).expect_err("overlap");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let high = HostRegion {
            host_address: u64::MAX,
            ..piece
        };
        assert!(ProcessMemory::open(process, vec![high]).is_err());
    }

    #[test]
    fn a_process_that_has_ended_is_named() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep");
        let process = ProcessId::of(child.id()).expect("a process");
        let mapping = process::mappings(child.id())
            .expect("maps")
            .into_iter()
            .find(|mapping| mapping.readable)
            .expect("a mapping");
        let piece = HostRegion {
            region: MemoryRegion::new(PhysicalAddress::new(0), mapping.length()),
            host_address: mapping.start,
        };
        let memory = ProcessMemory::open(process, vec![piece]).expect("its memory");
        child.kill().expect("killed");
        child.wait().expect("reaped");
        let error = memory.read(PhysicalAddress::new(0), &mut [0; 8]);
        assert_eq!(
            error,
            Err(PhysicalReadError::Host {
                address: PhysicalAddress::new(0),
                reason: format!("QEMU process {} has ended", process.pid)
            })
        );
        assert!(ProcessMemory::open(process, vec![piece]).is_err());
    }
}
