//! Processes with credentials of all kinds, and with terminals.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;

use super::report::{self, Reports};
use crate::agent::sys;

/// CAP_NET_BIND_SERVICE, CAP_NET_RAW, CAP_SYS_ADMIN as bits.
const NET_BIND_SERVICE: u64 = 1 << 10;
const NET_RAW: u64 = 1 << 13;
const SYS_ADMIN: u64 = 1 << 21;

/// One process for each kind.
pub fn processes(reports: &mut Reports) -> io::Result<()> {
    reports.simple("id-user", |_| {
        sys::set_ids([1000; 3], [1000; 3], &[1000, 27, 44])
    })?;
    reports.simple("id-nobody", |_| sys::set_ids([65534; 3], [65534; 3], &[]))?;
    reports.simple("id-high", |_| {
        sys::set_ids([4_294_967_000; 3], [4_294_967_001; 3], &[4_294_967_002])
    })?;
    reports.simple("id-mixed", |_| {
        sys::set_ids([1001, 1002, 1003], [2001, 2002, 2003], &[9])
    })?;
    reports.simple("id-fsuid", |_| {
        sys::set_file_system_user(3000);
        Ok(())
    })?;
    reports.simple("id-groups", |_| {
        let groups: Vec<u32> = (5000..5200).collect();
        sys::set_ids([1005; 3], [1005; 3], &groups)
    })?;
    reports.simple("caps-few", |_| {
        sys::set_capabilities(NET_RAW, NET_RAW | SYS_ADMIN, NET_RAW)
    })?;
    reports.simple("caps-none", |_| sys::set_capabilities(0, 0, 0))?;
    reports.simple("caps-ambient", |_| {
        let both = NET_BIND_SERVICE | NET_RAW;
        sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0)?;
        sys::set_ids([1006; 3], [1006; 3], &[])?;
        sys::set_capabilities(both, both, both)?;
        sys::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, 10).map(drop)
    })?;
    reports.simple("caps-bounded", |_| {
        sys::prctl(libc::PR_CAPBSET_DROP, 21, 0).map(drop)
    })?;
    reports.simple("no-new-privs", |_| {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).map(drop)
    })?;
    reports.simple("seccomp", |_| sys::filter_system_calls())?;
    reports.simple("not-dumpable", |_| {
        sys::set_ids([1007; 3], [1007; 3], &[])?;
        sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).map(drop)
    })?;
    reports.simple("session", |_| {
        sys::set_session()?;
        // A group of its own inside the session.
        let member = report::child(|| sys::set_name(b"member"))?;
        sys::set_process_group(member, member)
    })?;
    reports.simple("tty-serial", |_| {
        sys::set_session()?;
        let terminal = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open("/dev/ttyS0")?;
        sys::take_terminal(&terminal)?;
        std::mem::forget(terminal);
        Ok(())
    })?;
    reports.simple("tty-pseudo", |_| {
        let main = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open("/dev/ptmx")?;
        let number = sys::unlock_terminal(&main)?;
        std::mem::forget(main);
        report::child_that_stands(|| {
            sys::set_name(b"tty-shell");
            on_terminal(number)
        })
        .map(drop)
    })?;
    Ok(())
}

fn on_terminal(number: u32) -> io::Result<()> {
    sys::set_session()?;
    let terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(format!("/dev/pts/{number}"))?;
    sys::take_terminal(&terminal)?;
    let foreground = sys::fork(|| sys::set_name(b"tty-foreground"))?;
    sys::set_process_group(foreground, foreground)?;
    // From the background this raises SIGTTOU, but the leader is still in
    // the foreground.
    sys::set_foreground(&terminal, foreground)?;
    std::mem::forget(terminal);
    Ok(())
}
