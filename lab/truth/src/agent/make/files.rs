//! Processes with open files of every kind.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::mem::forget;
use std::os::unix::fs::{OpenOptionsExt as _, symlink};

use super::report::{Reports, attempt};
use super::threads;
use crate::agent::sys;

/// The processes.
pub fn processes(reports: &mut Reports) -> io::Result<()> {
    fs::create_dir_all("/tmp/files")?;
    reports.simple("files-named", |failures| {
        named(failures);
        Ok(())
    })?;
    reports.simple("files-nameless", |failures| {
        nameless(failures);
        Ok(())
    })?;
    reports.simple("files-many", |_| {
        // More than one word of the bit map, and a table that has grown.
        sys::set_open_file_limit(2048)?;
        for _ in 0..300 {
            forget(File::open("/dev/null")?);
        }
        sys::duplicate_to(&io::stdin(), 1500)
    })?;
    reports.simple("files-shared", |_| {
        // Two descriptors of one open file, and a table shared by threads.
        let file = File::open("/etc/modules")?;
        forget(file.try_clone()?);
        forget(file);
        threads::start(|| sys::rest())
    })?;
    reports.simple("files-none", |_| {
        for fd in 0..3 {
            sys::close(fd);
        }
        Ok(())
    })?;
    Ok(())
}

fn keep(file: io::Result<File>) -> io::Result<()> {
    file.map(forget)
}

fn named(failures: &mut Vec<String>) {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    attempt(failures, "regular", || {
        let mut file = options.open("/tmp/files/regular")?;
        file.write_all(&[b'r'; 10_000])?;
        file.seek(SeekFrom::Start(1234))?;
        forget(file);
        Ok(())
    });
    attempt(failures, "append", || {
        keep(
            OpenOptions::new()
                .append(true)
                .create(true)
                .open("/tmp/files/append"),
        )
    });
    attempt(failures, "flags", || {
        keep(
            options
                .clone()
                .custom_flags(libc::O_SYNC | libc::O_NONBLOCK | libc::O_NOATIME)
                .open("/tmp/files/flags"),
        )
    });
    attempt(failures, "write only", || {
        keep(
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .open("/tmp/files/write only"),
        )
    });
    attempt(failures, "deleted", || {
        keep(options.open("/tmp/files/deleted"))?;
        fs::remove_file("/tmp/files/deleted")
    });
    attempt(failures, "deleted, then made anew", || {
        keep(options.open("/tmp/files/anew"))?;
        fs::remove_file("/tmp/files/anew")?;
        fs::write("/tmp/files/anew", "another")
    });
    attempt(failures, "named as if deleted", || {
        keep(options.open("/tmp/files/kept (deleted)"))
    });
    attempt(failures, "renamed", || {
        keep(options.open("/tmp/files/old name"))?;
        fs::rename("/tmp/files/old name", "/tmp/files/new name")
    });
    attempt(failures, "one of two links deleted", || {
        keep(options.open("/tmp/files/link one"))?;
        fs::hard_link("/tmp/files/link one", "/tmp/files/link two")?;
        fs::remove_file("/tmp/files/link one")
    });
    for name in [
        "new\nline",
        "日本語",
        "back\\slash",
        " blanks ",
        &"long-".repeat(51),
    ] {
        attempt(failures, name, || {
            keep(options.open(format!("/tmp/files/{name}")))
        });
    }
    attempt(failures, "bytes", || {
        use std::os::unix::ffi::OsStrExt as _;
        let path = std::ffi::OsStr::from_bytes(b"/tmp/files/\xff\xfe\x80");
        keep(options.open(path))
    });
    attempt(failures, "deep", || {
        let folder = format!("/tmp/files/{}", vec!["e".repeat(240); 14].join("/"));
        fs::create_dir_all(&folder)?;
        keep(options.open(format!("{folder}/file")))
    });
    attempt(failures, "folder", || keep(File::open("/tmp/files")));
    attempt(failures, "deleted folder", || {
        fs::create_dir_all("/tmp/files/folder gone")?;
        keep(File::open("/tmp/files/folder gone"))?;
        fs::remove_dir("/tmp/files/folder gone")
    });
    attempt(failures, "path only", || {
        symlink("nowhere", "/tmp/files/symlink")?;
        let mut options = OpenOptions::new();
        options.read(true);
        keep(
            options
                .clone()
                .custom_flags(libc::O_PATH)
                .open("/etc/modules"),
        )?;
        keep(
            options
                .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
                .open("/tmp/files/symlink"),
        )
    });
    attempt(failures, "never named", || {
        keep(
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_TMPFILE)
                .open("/tmp/files"),
        )
    });
    attempt(failures, "fifo", || {
        sys::make_fifo("/tmp/files/fifo")?;
        keep(
            OpenOptions::new()
                .read(true)
                .write(true)
                .open("/tmp/files/fifo"),
        )
    });
    for device in [
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        "/dev/urandom",
        "/dev/kmsg",
        "/dev/loop0",
    ] {
        attempt(failures, device, || keep(File::open(device)));
    }
    for file in [
        "/proc/self/status",
        "/proc/self/ns/net",
        "/proc/1/mountinfo",
        "/proc/sys/kernel/hostname",
        "/sys/kernel/notes",
        "/sys/fs/cgroup/cgroup.procs",
        "/dev/pts/ptmx",
    ] {
        attempt(failures, file, || keep(File::open(file)));
    }
    attempt(failures, "locked", || {
        let file = options.open("/tmp/files/locked")?;
        sys::lock_file(&file)?;
        forget(file);
        Ok(())
    });
}

fn nameless(failures: &mut Vec<String>) {
    attempt(failures, "memfd", || {
        let file = File::from(sys::memfd(
            b"lab data",
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        )?);
        file.set_len(5000)?;
        forget(file);
        Ok(())
    });
    attempt(failures, "memfd of an odd name", || {
        sys::memfd(b"\xff (deleted)\n", 0).map(forget)
    });
    attempt(failures, "pipe", || {
        let (reader, mut writer) = io::pipe()?;
        writer.write_all(b"unread")?;
        forget((reader, writer));
        Ok(())
    });
    attempt(failures, "eventfd", || sys::eventfd(3).map(forget));
    attempt(failures, "epoll", || {
        let watched = sys::eventfd(0)?;
        forget(sys::epoll(&watched)?);
        forget(watched);
        Ok(())
    });
    attempt(failures, "timerfd", || sys::timerfd().map(forget));
    attempt(failures, "signalfd", || sys::signalfd().map(forget));
    attempt(failures, "inotify", || sys::inotify("/tmp").map(forget));
    attempt(failures, "fanotify", || sys::fanotify().map(forget));
    attempt(failures, "pidfd", || sys::pidfd(1).map(forget));
    attempt(failures, "userfaultfd", || sys::userfaultfd().map(forget));
    attempt(failures, "io_uring", || sys::io_uring().map(forget));
    attempt(failures, "perf event", || sys::perf_event().map(forget));
    attempt(failures, "socket pair", || {
        sys::socket_pair(libc::SOCK_STREAM).map(forget)
    });
}
