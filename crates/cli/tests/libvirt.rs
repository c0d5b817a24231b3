//! A guest that libvirt runs, and what `virsh dump` writes of it: found by
//! its name, and told as the guest tells itself.
//!
//! A libvirtd of the test's own runs it, in the mode for one user, with all of
//! its files in a folder of the test: the machine's libvirt, where it has one,
//! is left alone.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use secmon_lab::truth::PORT_NAME;
use secmon_lab::{Guest, Suite, TruthChannel, Workload};
use serde_json::Value;

/// What libvirtd takes to start and to ask QEMU what it can, and the guest to
/// boot, emulated on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// libvirtd takes its mode from who starts it: root would get the machine's.
const NOBODY: u32 = 65534;

/// A libvirtd, and what it runs.
struct Libvirt {
    folder: tempfile::TempDir,
    daemon: Option<Child>,
    domain: String,
}

impl Libvirt {
    fn start() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("secmon-libvirt-")
            // Paths of sockets are short.
            .tempdir_in("/tmp")
            .expect("a folder");
        let is_root = rustix::process::geteuid().is_root();
        for name in ["run", "config", "cache", "data"] {
            let path = folder.path().join(name);
            fs::create_dir(&path).expect("a folder");
            fs::set_permissions(&path, Permissions::from_mode(0o700)).expect("its mode");
            if is_root {
                chown(&path, Some(NOBODY), Some(NOBODY)).expect("its owner");
            }
        }
        if is_root {
            chown(folder.path(), Some(NOBODY), Some(NOBODY)).expect("its owner");
        }
        let mut libvirt = Self {
            domain: format!("secmon-libvirt-{}", std::process::id()),
            folder,
            daemon: None,
        };
        let log = File::create(libvirt.path("libvirtd.log")).expect("a file");
        let daemon = libvirt
            .command("libvirtd")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .spawn()
            .expect("a shell");
        libvirt.daemon = Some(daemon);
        let start = Instant::now();
        loop {
            let output = libvirt.virsh(&["version"]);
            if output.status.success() {
                return libvirt;
            }
            let daemon = libvirt.daemon.as_mut().expect("it was started");
            let ended = daemon.try_wait().expect("a child");
            assert!(
                ended.is_none() && start.elapsed() < PATIENCE,
                "libvirtd ({ended:?}), of Debian's libvirt-daemon and libvirt-daemon-driver-qemu: \
                 {}\n{}",
                String::from_utf8_lossy(&output.stderr),
                fs::read_to_string(libvirt.path("libvirtd.log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A program that runs as libvirtd's user, in its environment.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM"]);
        if rustix::process::geteuid().is_root() {
            let nobody = NOBODY.to_string();
            command.args(["--reuid", &nobody, "--regid", &nobody, "--clear-groups"]);
        }
        command
            .arg(program)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", self.folder.path())
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env_remove("LIBVIRT_DEFAULT_URI")
            .current_dir(self.folder.path());
        command
    }

    fn virsh(&self, arguments: &[&str]) -> Output {
        self.command("virsh")
            .args(["--connect", "qemu:///session"])
            .args(arguments)
            .output()
            .expect("virsh, of Debian's libvirt-clients")
    }

    #[track_caller]
    fn must(&self, arguments: &[&str]) {
        let output = self.virsh(arguments);
        assert!(
            output.status.success(),
            "virsh {arguments:?}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            fs::read_to_string(self.path("libvirtd.log")).unwrap_or_default()
        );
    }

    /// Starts a guest as libvirt starts any, with no option for secmon.
    fn boot(&self) -> TruthChannel {
        let initramfs = self.path("initramfs");
        let builder = Guest::builder(Suite::Bookworm).workload(Workload::small());
        let prepared = builder.prepare(&initramfs).expect("a kernel");
        // The kernel lies in the user's own cache.
        let kernel = self.path("vmlinuz");
        fs::copy(&prepared.kernel, &kernel).expect("a copy");
        for file in [&kernel, &initramfs] {
            fs::set_permissions(file, Permissions::from_mode(0o644)).expect("its mode");
        }
        let truth = self.path("truth");
        let definition = self.path("domain.xml");
        let xml = format!(
            "<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>512</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'><feature policy='disable' name='cx16'/></cpu>
  <on_poweroff>destroy</on_poweroff>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <serial type='file'><source path='{serial}'/></serial>
    <channel type='unix'>
      <source mode='bind' path='{truth}'/>
      <target type='virtio' name='{PORT_NAME}'/>
    </channel>
    <memballoon model='none'/>
  </devices>
</domain>
",
            name = self.domain,
            kernel = kernel.display(),
            initramfs = initramfs.display(),
            command_line = prepared.command_line,
            serial = self.path("serial.log").display(),
            truth = truth.display(),
        );
        fs::write(&definition, xml).expect("a file");
        self.must(&["create", definition.to_str().expect("UTF-8")]);
        match TruthChannel::connect(&truth, PATIENCE) {
            Ok(truth) => truth,
            Err(error) => panic!(
                "{error:#}\n{}",
                fs::read_to_string(self.path("serial.log")).unwrap_or_default()
            ),
        }
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // It may not have come that far; libvirtd's end alone would leave the
        // guest running.
        let _ = self.virsh(&["destroy", &self.domain]);
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// Processes of programs, by id.
fn shown(target: &str, cache: &Path) -> BTreeMap<i64, String> {
    let rows = rows(&["-t", target, "ps", "-w", "kernel_thread=false"], cache);
    let named = |row: &Value| Some((row["pid"].as_i64()?, row["comm"].as_str()?.to_owned()));
    rows.iter().filter_map(named).collect()
}

#[track_caller]
fn rows(arguments: &[&str], cache: &Path) -> Vec<Value> {
    let output = Command::new(env!("CARGO_BIN_EXE_secmon"))
        .args(arguments)
        .args(["--format", "json"])
        .env("SECMON_CACHE_DIR", cache)
        .env_remove("SECMON_TARGET")
        .output()
        .expect("secmon runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn a_libvirt_guest_and_its_dumps_are_told_as_they_are() {
    let libvirt = Libvirt::start();
    let truth = libvirt.boot();
    let cache = tempfile::tempdir().expect("a folder");
    let processes = truth.processes().expect("the truth");
    let truth: BTreeMap<i64, String> = processes
        .into_iter()
        .filter(|process| !process.kernel_thread)
        .filter_map(|process| Some((process.pid.into(), process.comm.as_str()?.to_owned())))
        .collect();
    assert!(truth.len() > 1, "{truth:?}");

    let targets = rows(&["targets"], cache.path());
    let name = libvirt.domain.as_str();
    let this = targets.iter().find(|row| row["name"] == name);
    let this = this.unwrap_or_else(|| panic!("{name} is not in {targets:#?}"));
    assert_eq!(this["problem"], Value::Null);
    assert_eq!(this["ram"], 512_u64 << 20);
    assert_eq!(shown(&format!("qemu:{name}"), cache.path()), truth);

    for format in ["elf", "kdump-zlib"] {
        let path = libvirt.path(format);
        let file = path.to_str().expect("UTF-8");
        libvirt.must(&["dump", "--memory-only", "--format", format, name, file]);
        assert_eq!(
            shown(&format!("file:{file}"), cache.path()),
            truth,
            "{format}"
        );
    }
    let state = libvirt.virsh(&["domstate", name]);
    assert_eq!(String::from_utf8_lossy(&state.stdout).trim(), "running");
}
