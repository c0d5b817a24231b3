//! What a reader sees that may not look into QEMU, or may do so only by a
//! capability.
//!
//! This test has a `main` of its own: run again as another user it opens one
//! QEMU and says what came of it. Run by root it compares users; run by
//! another user it can only be refused by a process of root's.

mod machine;

use std::path::Path;
use std::process::{Command, ExitCode};

use machine::Machine;
use secmon_memory::{MemoryRegion, PhysicalAddress};
use secmon_platform::qemu::{
    HostRegion, ProcessId, ProcessMemory, QemuOptions, Reach, Selector, discover, open,
};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some("open") {
        let pid = arguments.next().and_then(|pid| pid.parse().ok());
        report(pid.expect("a process id"));
        return ExitCode::SUCCESS;
    }
    if rustix::process::geteuid().is_root() {
        other_users_are_told_what_to_do();
        println!("test other_users_are_told_what_to_do ... ok");
    } else {
        a_process_of_root_is_refused();
        println!("test a_process_of_root_is_refused ... ok");
    }
    ExitCode::SUCCESS
}

/// Opens a QEMU and prints what came of it.
fn report(pid: u32) {
    let discovery = discover().expect("processes");
    let process = discovery
        .processes
        .iter()
        .find(|process| process.id.pid == pid);
    let reach = &process.expect("it is listed").reach;
    println!("denied={}", matches!(reach, Reach::Denied { .. }));
    match open(&Selector::Pid(pid), &QemuOptions::default()) {
        Ok(target) => {
            let mut bytes = [0; 2];
            let address = PhysicalAddress::new(0x413);
            target.memory.read(address, &mut bytes).expect("memory");
            let kib = u16::from_le_bytes(bytes);
            println!(
                "access={} base={kib} notes={:?}",
                target.access, target.notes
            );
        }
        Err(error) => println!("error={error}"),
    }
}

/// Runs `report` as nobody, with these options of setpriv besides.
fn as_nobody(program: &Path, options: &[&str], pid: u32) -> String {
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .args(options)
        .arg(program)
        .args(["open", &pid.to_string()])
        .output()
        .expect("setpriv (package util-linux)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    text
}

fn other_users_are_told_what_to_do() {
    use std::os::unix::fs::PermissionsExt;
    // Where another user can reach it.
    let folder = tempfile::tempdir().expect("a folder");
    let open_to_all = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open_to_all.clone()).expect("permissions");
    let program = folder.path().join("program");
    std::fs::copy(std::env::current_exe().expect("this program"), &program).expect("a copy");

    let mut private = Machine::start(&["-m", "256"]);
    private.run_firmware();
    let refused = as_nobody(&program, &[], private.pid());
    assert!(refused.contains("denied=true"), "{refused}");
    let advice = "belongs to user 0, this is user 65534; run secmon as that user or as root, or give it the capability CAP_SYS_PTRACE";
    assert!(refused.contains(advice), "{refused}");

    // The capability alone does not open /proc/PID/mem.
    let capability = [
        "--inh-caps=-all,+sys_ptrace",
        "--ambient-caps=-all,+sys_ptrace",
    ];
    let allowed = as_nobody(&program, &capability, private.pid());
    assert!(allowed.contains("denied=false"), "{allowed}");
    assert!(
        allowed.contains("access=process_vm_readv base=63"),
        "{allowed}"
    );

    // A file that everybody may read needs no look into the process.
    let ram = folder.path().join("ram");
    let backend = format!(
        "memory-backend-file,id=m,size=256M,mem-path={},share=on",
        ram.display()
    );
    let arguments = [
        "-m",
        "256",
        "-object",
        &backend,
        "-machine",
        "memory-backend=m",
    ];
    let mut shared = Machine::start(&arguments);
    shared.run_firmware();
    std::fs::set_permissions(&ram, open_to_all).expect("permissions");
    let mapped = as_nobody(&program, &[], shared.pid());
    assert!(mapped.contains("denied=false"), "{mapped}");
    assert!(mapped.contains("mapped base=63"), "{mapped}");
    assert!(mapped.contains("could not be checked"), "{mapped}");
}

fn a_process_of_root_is_refused() {
    let region = MemoryRegion::new(PhysicalAddress::new(0), 0x1000);
    let piece = HostRegion {
        region,
        host_address: 0x1000,
    };
    let init = ProcessId::of(1).expect("a process");
    let error = ProcessMemory::open(init, vec![piece]).expect_err("refused");
    assert_eq!(
        error.kind(),
        std::io::ErrorKind::PermissionDenied,
        "{error}"
    );
}
