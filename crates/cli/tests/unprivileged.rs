//! A monitor that is started by a user who is not root, beside targets of that
//! user: everything works but what takes root's rights, and leaves nothing.

mod host;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use host::{PATIENCE, field, rustix_is_root, succeeded};
use secmon_lab::{Guest, Suite, Workload, appliance_image};
use serde_json::Value;

/// A user whom nothing belongs to.
const USER: u32 = 54_321;

/// The user's folder, and what is run as that user.
struct Account {
    folder: tempfile::TempDir,
}

impl Account {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("su").tempdir_in("/tmp");
        let account = Self {
            folder: folder.expect("a folder"),
        };
        for (name, mode) in [
            (".", 0o755),
            ("run", 0o700),
            ("home", 0o700),
            ("data", 0o755),
        ] {
            let path = account.path(name);
            fs::create_dir_all(&path).expect("a folder");
            fs::set_permissions(&path, Permissions::from_mode(mode)).expect("permissions");
            if rustix_is_root() {
                chown(&path, Some(USER), Some(USER)).expect("an owner");
            }
        }
        let program = account.path("secmon");
        fs::copy(env!("CARGO_BIN_EXE_secmon"), &program).expect("a copy");
        account
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A copy that the user can read.
    fn copy(&self, file: &Path, name: &str) -> PathBuf {
        let copy = self.path("data").join(name);
        fs::copy(file, &copy).expect("a copy");
        fs::set_permissions(&copy, Permissions::from_mode(0o644)).expect("permissions");
        copy
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = if rustix_is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", &USER.to_string(), "--regid", &USER.to_string()]);
            command.args(["--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]);
            command.arg(program);
            command
        } else {
            Command::new(program)
        };
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", self.path("home"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .current_dir("/");
        command
    }

    fn secmon(&self, words: &[&str]) -> Output {
        let mut command = self.command(&self.path("secmon"));
        command.args(words).output().expect("secmon, setpriv")
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let _ = self.secmon(&["monitor", "down", "m"]);
    }
}

/// A target, which is killed in the end.
struct Target(Child);

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guest of the user's own, with its RAM in a memfd or in a file.
fn start(account: &Account, name: &str, memory: &str) -> Target {
    let initramfs = account.path(&format!("{name}.initramfs"));
    let prepared = Guest::builder(Suite::Bookworm)
        .workload(Workload::small())
        .prepare(&initramfs)
        .expect("a guest's kernel");
    let initramfs = account.copy(&initramfs, &format!("{name}.initramfs"));
    let kernel = account.copy(&prepared.kernel, "kernel");
    let mut command = account.command(Path::new("/usr/bin/qemu-system-x86_64"));
    let child = command
        .args([
            "-name",
            name,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            // A guest that panics is not to start over and over.
            "-no-reboot",
        ])
        .args(["-accel", "tcg", "-cpu", "max,cx16=off", "-m", "256M"])
        .args(["-machine", "q35,memory-backend=ram", "-object", memory])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &prepared.command_line])
        .args(["-device", "virtio-serial-pci"])
        .args(["-chardev", "null,id=truth", "-device"])
        .arg(format!(
            "virtserialport,chardev=truth,name={}",
            secmon_lab::truth::PORT_NAME
        ))
        .arg("-qmp")
        .arg(format!(
            "unix:{},server=on,wait=off",
            account.path("run").join(format!("{name}.qmp")).display()
        ))
        .spawn()
        .expect("qemu-system-x86: apt-get install qemu-system-x86");
    Target(child)
}

#[test]
fn a_user_without_root_has_a_monitor() {
    let account = Account::new();
    let image = appliance_image(Suite::Bookworm).expect("an image");
    let copy = account.path("data/image");
    fs::create_dir(&copy).expect("a folder");
    for entry in fs::read_dir(&image.folder).expect("an image").flatten() {
        let name = format!("image/{}", entry.file_name().display());
        account.copy(&entry.path(), &name);
    }
    let file = format!(
        "memory-backend-file,id=ram,size=256M,mem-path={},share=on",
        account.path("run/ram").display()
    );
    let _first = start(&account, "user-1", &file);
    let _second = start(
        &account,
        "user-2",
        "memory-backend-memfd,id=ram,size=256M,share=on",
    );
    let image = copy.display().to_string();
    let words = [
        "monitor",
        "up",
        "--target",
        "qemu:user-1",
        "--target",
        "qemu:user-2",
        "--name",
        "m",
        "--image",
        &image,
        "--accelerator",
        "tcg",
        "--wait",
    ];
    let said = succeeded(&account.secmon(&words));
    assert!(said.contains("opened read-only by your own user"), "{said}");

    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        let words = ["monitor", "status", "m", "--format", "json"];
        let said = succeeded(&account.secmon(&words));
        let status: Value = serde_json::from_str(&said).expect("JSON");
        let runs = |slot: usize| {
            let [state, run_state] = ["state", "run_state"]
                .map(|column| status[slot][column].as_str().unwrap_or_default().to_owned());
            state.starts_with("running") && run_state.contains("granted: observe")
        };
        if runs(0) && runs(1) {
            break status;
        }
        assert!(Instant::now() < deadline, "{status}");
        std::thread::sleep(Duration::from_millis(200));
    };
    for target in ["user-1", "user-2"] {
        let target = format!("monitor:m/{target}");
        // A kernel that runs may not have come to its first program yet.
        loop {
            let said = succeeded(&account.secmon(&["-t", &target, "ps"]));
            if said.contains("/init") {
                break;
            }
            assert!(Instant::now() < deadline, "{said}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    let processes = fs::read(account.path("run/secmon/m/processes.json")).expect("a file");
    let processes: Value = serde_json::from_slice(&processes).expect("JSON");
    let machine = processes["machine"]["pid"].as_u64().expect("a process");
    assert_eq!(field(machine, "Seccomp:"), "2");
    assert_eq!(field(machine, "CapEff:"), "0000000000000000");
    if rustix_is_root() {
        assert_eq!(field(machine, "Uid:"), USER.to_string());
    }
    // What was done through the gates is still known.
    let log = status[0]["gate_log"].as_str().expect("a log");
    succeeded(&account.secmon(&["monitor", "down", "m"]));
    let verified = account.secmon(&["gate", "verify-log", log]);
    assert!(succeeded(&verified).contains("as it was written"));
    assert!(!account.path("run/secmon/m").exists());
}
