//! System calls without a safe interface in the standard library.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;

/// Mounts a file system that has no device.
pub fn mount(kind: &str, place: &str) -> io::Result<()> {
    let kind = CString::new(kind)?;
    let place = CString::new(place)?;
    // SAFETY: both end in zero and outlive the call; no data is given.
    let result = unsafe {
        libc::mount(
            kind.as_ptr(),
            place.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    checked(result.into())
}

/// Loads the module in an open file.
pub fn load_module(file: i32, parameters: &CStr) -> io::Result<()> {
    // SAFETY: the parameters outlive the call.
    checked(unsafe { libc::syscall(libc::SYS_finit_module, file, parameters.as_ptr(), 0) })
}

/// Makes a socket; says why not.
pub fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<std::os::fd::OwnedFd> {
    // SAFETY: no memory is involved.
    let number = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    checked(number.into())?;
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(number) })
}

/// Connects a vsock socket, for two seconds at most.
pub fn connect_vsock(socket: &impl std::os::fd::AsRawFd, cid: u32, port: u32) -> io::Result<()> {
    // SAFETY: all zeros are a valid address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as u16;
    address.svm_cid = cid;
    address.svm_port = port;
    let length = u32::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    // SAFETY: the address is of this length and outlives the call.
    checked(
        unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) }.into(),
    )
}

fn checked(result: i64) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
