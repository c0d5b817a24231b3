//! Builds the specimens' modules against a kernel's own headers, in the lab's
//! cache; nothing is installed.

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use secmon_monitor::appliance::archive::Archive;

use crate::cache;
use crate::kernel::Kernel;
use crate::suite::Suite;

/// Goes up when what is kept of packages, or how modules are built, changes.
const LAYOUT: u32 = 1;

/// Programs of the headers that may need a newer C library than this
/// machine's, below `linux-kbuild-…`.
const PROGRAMS: [&str; 2] = [
    "scripts/mod/modpost.real-lsb-64",
    "tools/objtool/objtool.real-x86",
];

/// The packages with the libraries that those need.
const LIBRARIES: [&str; 4] = ["libc6", "libelf1t64", "zlib1g", "libzstd1"];

/// The folder with all specimens' modules, built for that kernel of the suite.
///
/// # Errors
/// If the archive no longer has the headers of just this kernel, or a module
/// does not compile.
pub fn modules(suite: Suite, kernel: &Kernel) -> Result<PathBuf> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("specimens/modules");
    let mut names = Vec::new();
    let mut digest = DefaultHasher::new();
    LAYOUT.hash(&mut digest);
    let mut files = fs::read_dir(&sources)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("cannot list {}", sources.display()))?;
    files.sort_by_key(fs::DirEntry::file_name);
    for file in files {
        let path = file.path();
        file.file_name().hash(&mut digest);
        fs::read(&path)?.hash(&mut digest);
        if path.extension().is_some_and(|extension| extension == "c")
            && let Some(stem) = path.file_stem().and_then(|stem| stem.to_str())
        {
            names.push(stem.to_owned());
        }
    }
    let release = kernel.release();
    let name = format!("specimens-{release}-{:016x}", digest.finish());
    cache::entry(&name, |draft| {
        let headers = headers(suite, release)?;
        let work = draft.join("work");
        fs::create_dir(&work)?;
        for entry in fs::read_dir(&sources)? {
            let entry = entry?;
            fs::copy(entry.path(), work.join(entry.file_name()))?;
        }
        let objects = names.iter().map(|name| format!("obj-m += {name}.o\n"));
        fs::write(work.join("Kbuild"), objects.collect::<String>())?;
        make(&headers, release, &work)?;
        for name in &names {
            let object = format!("{name}.ko");
            fs::rename(work.join(&object), draft.join(&object))
                .with_context(|| format!("no {object} was built"))?;
        }
        fs::remove_dir_all(work)?;
        Ok(())
    })
    .with_context(|| format!("cannot build the specimens for {release}"))
}

fn make(headers: &Path, release: &str, work: &Path) -> Result<()> {
    let mut command = Command::new("make");
    command
        .arg("-j2")
        .arg("-C")
        .arg(headers.join(format!("root/usr/src/linux-headers-{release}")))
        .arg(format!("M={}", work.display()))
        // The kernel's own compiler may not be there; a newer one's option
        // that the configuration promises is not in an older one.
        .args(["CC=gcc", "CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT="])
        .args(["KCFLAGS=-g0", "modules"])
        .env("LC_ALL", "C");
    // What cargo says to its own.
    for variable in ["MAKEFLAGS", "MFLAGS", "CARGO_MAKEFLAGS", "MAKELEVEL"] {
        command.env_remove(variable);
    }
    let output = command
        .output()
        .context("cannot run make: `apt-get install make gcc` brings what it takes")?;
    ensure!(
        output.status.success(),
        "make ended with {}:\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// The unpacked headers of that release.
fn headers(suite: Suite, release: &str) -> Result<PathBuf> {
    let package = format!("linux-headers-{release}");
    cache::entry(&format!("headers-{release}-{LAYOUT}"), |draft| {
        let scratch = draft.join("scratch");
        let archive = Archive::open(suite.name(), &scratch)?;
        let root = draft.join("root");
        archive.unpack(&package, &root)?;
        for part in archive.dependencies(&package)? {
            if part.starts_with("linux-headers-") || part.starts_with("linux-kbuild-") {
                archive.unpack(&part, &root)?;
            }
        }
        let folder = root.join("usr/src").join(&package);
        // It names its other half where that would be installed.
        let makefile = folder.join("Makefile");
        let text = fs::read_to_string(&makefile)
            .with_context(|| format!("cannot read {}", makefile.display()))?;
        fs::write(&makefile, text.replace("/usr/src/", "../"))?;
        // Its types, for those of the modules, which takes one more program.
        let types = folder.join("vmlinux");
        if types.exists() {
            fs::remove_file(types)?;
        }
        for entry in fs::read_dir(root.join("usr/lib"))? {
            let entry = entry?;
            if entry
                .file_name()
                .to_string_lossy()
                .starts_with("linux-kbuild-")
            {
                make_run(&archive, &entry.path(), draft)?;
            }
        }
        fs::remove_dir_all(scratch)?;
        Ok(())
    })
    .with_context(|| format!("cannot fetch {package}"))
}

/// Lets the programs of a newer suite run with that suite's own libraries,
/// where this machine's are too old.
fn make_run(archive: &Archive, programs: &Path, draft: &Path) -> Result<()> {
    let libraries = "libraries/usr/lib/x86_64-linux-gnu";
    for program in PROGRAMS.map(|program| programs.join(program)) {
        let Ok(output) = Command::new(&program).output() else {
            continue;
        };
        if !String::from_utf8_lossy(&output.stderr).contains("GLIBC_") {
            continue;
        }
        if !draft.join(libraries).is_dir() {
            for package in LIBRARIES {
                archive.unpack(package, &draft.join("libraries"))?;
            }
        }
        let itself = program.with_extension("itself");
        fs::rename(&program, &itself)?;
        // From scripts/mod or tools/objtool up to the entry of the cache.
        let script = format!(
            "#!/bin/sh\n\
             here=$(dirname \"$(readlink -f \"$0\")\")\n\
             libraries=$here/../../../../../../{libraries}\n\
             exec \"$libraries/ld-linux-x86-64.so.2\" --library-path \"$libraries\" \
             \"$here/{}\" \"$@\"\n",
            itself
                .file_name()
                .context("the program's name")?
                .to_string_lossy()
        );
        fs::write(&program, script)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}
