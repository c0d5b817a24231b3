//! What happens when a mapped memory image shrinks while it is read.
//!
//! The kernel then answers an access past the new end with SIGBUS. Left alone
//! that is a core dump; here it is a message and exit status 2. A guest that
//! was paused is resumed by its watcher, as after any sudden death.
//!
//! This file and nothing else of this crate has unsafe code.
#![allow(unsafe_code, reason = "signal handlers can't be set otherwise")]

const MESSAGE: &[u8] = b"secmon: error: the memory image became shorter while it was read, or its \
disk failed (SIGBUS); what was shown so far is incomplete\n  \
make sure that nobody truncates or replaces the file, then try again\n";

/// Async-signal-safe: two system calls, no allocation, no lock.
extern "C" fn on_bus_error(_signal: libc::c_int) {
    // SAFETY: write(2) and _exit(2) may be called in a signal handler; the
    // message is a static of the length given.
    unsafe {
        let _ = libc::write(
            libc::STDERR_FILENO,
            MESSAGE.as_ptr().cast::<libc::c_void>(),
            MESSAGE.len(),
        );
        libc::_exit(2);
    }
}

/// Installs the handler for this process.
pub fn install() {
    // SAFETY: the structure is fully initialised (all zero is an empty mask
    // and no flags), and the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    /// Set in the child process that is to die.
    const MARK: &str = "SECMON_TEST_SHRINKING_IMAGE";

    #[test]
    fn a_shrinking_image_ends_in_a_message_and_status_2() {
        if let Some(path) = std::env::var_os(MARK) {
            install();
            let file = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .expect("the parent made it");
            let region =
                secmon_memory::MemoryRegion::new(secmon_memory::PhysicalAddress::new(0), 8192);
            let memory = secmon_memory::MappedMemory::map_file(
                &file,
                &[(region, 0)],
                secmon_memory::Volatility::Static,
            )
            .expect("it is mapped");
            file.set_len(0).expect("it is cut");
            let _ = memory.read_u64(secmon_memory::PhysicalAddress::new(4096));
            unreachable!("the read ends the process");
        }
        let image = tempfile::NamedTempFile::new().expect("a file");
        image.as_file().set_len(8192).expect("two pages");
        let child = Command::new(std::env::current_exe().expect("this test"))
            .args([
                "--exact",
                "fault::tests::a_shrinking_image_ends_in_a_message_and_status_2",
            ])
            .arg("--nocapture")
            .env(MARK, image.path())
            .output()
            .expect("it runs again");
        assert_eq!(child.status.signal(), None);
        assert_eq!(child.status.code(), Some(2));
        let said = String::from_utf8_lossy(&child.stderr);
        assert!(said.contains("became shorter while it was read"), "{said}");
    }
}
