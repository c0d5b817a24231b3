//! Answers the host's requests, one line each.

use std::fs::File;
use std::io::{self, BufWriter, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;

use secmon_truth::{ByteString, READY_MARK, Reply, Request, Section};
use serde::Serialize;

use super::make::{Made, Specimens};
use super::{sys, tell, work};

/// The longest request read; the host sends nothing near it.
const LONGEST_REQUEST: usize = 64 * 1024;

/// Reads requests and answers them until the host asks to exit.
pub fn requests(mut port: File, mut made: Made, failures: &[String]) -> io::Result<()> {
    reply(&mut port, Ok(READY_MARK))?;
    let mut pending = Vec::new();
    let mut touched = Vec::new();
    let mut specimens = Specimens::default();
    loop {
        while sys::reap_one() {}
        if !sys::poll_readable(&[port.as_raw_fd()], 200)
            .is_ok_and(|ready| ready.first() == Some(&true))
        {
            continue;
        }
        let mut chunk = [0; 4096];
        let count = match port.read(&mut chunk) {
            Ok(0) => {
                // The host has closed its end for now.
                std::thread::sleep(std::time::Duration::from_millis(20));
                continue;
            }
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        pending.extend_from_slice(&chunk[..count]);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            match serde_json::from_slice::<Request>(&line) {
                Ok(Request::Exit) => return Ok(()),
                Ok(request) => match specimens.answer(&request) {
                    Some(Ok(value)) => reply(&mut port, Ok(value))?,
                    Some(Err(error)) => reply::<()>(&mut port, Err(error))?,
                    None => answer(&mut port, &request, &mut made, failures, &mut touched)?,
                },
                Err(error) => reply::<()>(&mut port, Err(io::Error::other(error)))?,
            }
        }
        if pending.len() > LONGEST_REQUEST {
            pending.clear();
            reply::<()>(&mut port, Err(io::Error::other("request too long")))?;
        }
    }
}

fn answer(
    port: &mut File,
    request: &Request,
    made: &mut Made,
    failures: &[String],
    touched: &mut Vec<u8>,
) -> io::Result<()> {
    match request {
        Request::Truth { section } => section_of(port, *section, made, failures),
        Request::ResumeBusy => reply(port, made.resume_busy()),
        Request::PauseBusy => reply(port, made.pause_busy()),
        Request::RefreshSockets => reply(port, made.refresh_sockets()),
        Request::TouchMemory { mebibytes, fill } => {
            touched.clear();
            touched.resize((*mebibytes as usize) << 20, *fill);
            reply(port, Ok(touched.as_ptr() as usize as u64))
        }
        Request::ReadMemory {
            pid,
            address,
            length,
        } => reply(port, read_memory(*pid, *address, *length)),
        Request::ReadFile { path } => reply(port, read_file(path)),
        Request::Work { work, milliseconds } => reply(port, Ok(work::repeat(*work, *milliseconds))),
        Request::ReadThrough {
            path,
            mebibytes,
            rounds,
        } => reply(
            port,
            work::read_through(path.as_deref(), *mebibytes, *rounds),
        ),
        // Answered elsewhere.
        Request::Exit
        | Request::LoadModule { .. }
        | Request::UnloadModule { .. }
        | Request::StartRole { .. }
        | Request::StopRole { .. }
        | Request::WriteFile { .. }
        | Request::Exists { .. }
        | Request::HasSymbol { .. }
        | Request::UserHasProcess { .. } => Ok(()),
    }
}

fn section_of(
    port: &mut File,
    section: Section,
    made: &Made,
    failures: &[String],
) -> io::Result<()> {
    match section {
        Section::Info => reply(port, tell::info::info(failures, made.roles())),
        Section::Processes => reply(port, tell::processes::processes()),
        Section::Threads => reply(port, tell::processes::threads()),
        Section::Modules => reply(port, tell::modules::modules()),
        Section::Maps => reply(port, tell::maps::maps()),
        Section::Files => reply(port, tell::files::files()),
        Section::Sockets => reply(port, tell::sockets::sockets()),
        Section::Mounts => reply(port, tell::mounts::mounts()),
        Section::Namespaces => reply(port, tell::namespaces::namespaces()),
        Section::Kmsg => reply(port, tell::kmsg::messages()),
        Section::Interfaces => reply(port, tell::interfaces::interfaces()),
        Section::Bpf => reply(port, tell::bpf::objects()),
        Section::Kallsyms => reply(port, tell::info::symbols()),
    }
}

fn read_memory(pid: i32, address: u64, length: u32) -> io::Result<ByteString> {
    let mut bytes = vec![0; length.min(1 << 20) as usize];
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    memory.read_exact_at(&mut bytes, address)?;
    Ok(ByteString(bytes))
}

fn read_file(path: &str) -> io::Result<ByteString> {
    let mut bytes = Vec::new();
    File::open(path)?.take(16 << 20).read_to_end(&mut bytes)?;
    Ok(ByteString(bytes))
}

fn reply<T: Serialize>(port: &mut File, result: io::Result<T>) -> io::Result<()> {
    let reply = match result {
        Ok(value) => Reply::Ok(value),
        Err(error) => Reply::Error(error.to_string()),
    };
    let mut writer = BufWriter::with_capacity(64 * 1024, port);
    serde_json::to_writer(&mut writer, &reply)?;
    writer.write_all(b"\n")?;
    writer.flush()
}
