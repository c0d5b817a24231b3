//! Fetches packages from any suite of the archive that this machine's apt
//! already uses, without touching the machine's own apt configuration or
//! package lists, and without installing anything.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

/// A private view of one suite.
pub struct Archive {
    folder: PathBuf,
}

impl Archive {
    /// Fetches the suite's package list into `folder`.
    pub fn open(suite: &str, folder: &Path) -> Result<Self> {
        for part in ["lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(folder.join(part))?;
        }
        let source = format!("deb {} {suite} main\n", archive_address()?);
        fs::write(folder.join("sources.list"), source)?;
        let archive = Self {
            folder: folder.to_owned(),
        };
        run(archive
            .apt("apt-get")
            .args(["-o", "Acquire::Languages=none", "-o", "Acquire::Retries=3"])
            .args(["--quiet", "update"]))?;
        Ok(archive)
    }

    /// The packages that `package` directly depends on.
    pub fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let text = run(self
            .apt("apt-cache")
            .args(["depends", "--important", package]))?;
        Ok(text
            .lines()
            .filter_map(|line| line.split_once("Depends:"))
            .map(|(_, name)| name.trim().to_owned())
            .collect())
    }

    /// Fetches a package and unpacks it into `to`.
    pub fn unpack(&self, package: &str, to: &Path) -> Result<()> {
        let file = self.download(package)?;
        run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(to))?;
        fs::remove_file(file)?;
        Ok(())
    }

    /// Fetches a package, and gives its file.
    pub fn download(&self, package: &str) -> Result<PathBuf> {
        let packages = self.folder.join("packages");
        run(self
            .apt("apt-get")
            // As root, apt would drop to a user who can't write here.
            .args(["-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"])
            .args(["--quiet", "download", package])
            .current_dir(&packages))?;
        let mut found = None;
        for entry in fs::read_dir(&packages)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                found = Some(path);
            }
        }
        found.with_context(|| format!("apt-get left no package of {package}"))
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (option, value) in [
            ("Dir::Etc::sourcelist", self.folder.join("sources.list")),
            ("Dir::Etc::sourceparts", PathBuf::from("/dev/null")),
            ("Dir::State::lists", self.folder.join("lists")),
            ("Dir::Cache", self.folder.join("cache")),
        ] {
            command
                .arg("-o")
                .arg(format!("{option}={}", value.display()));
        }
        command.env("LC_ALL", "C");
        command
    }
}

/// The address of the archive that this machine's apt uses.
fn archive_address() -> Result<String> {
    let text = run(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(ORIGIN) $(LABEL)",
    ]))
    .context("a lab's kernels come through apt-get, so it takes a Debian system")?;
    // Of Debian's parts, the security archive doesn't have other suites.
    text.lines()
        .find_map(|line| line.strip_suffix(" Debian Debian"))
        .map(str::to_owned)
        .context("apt knows no Debian archive here: run `apt-get update` once, as root")
}

fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}: is it installed?"))?;
    if !output.status.success() {
        bail!(
            "{command:?} ended with {}:\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    let text = String::from_utf8(output.stdout);
    ensure!(text.is_ok(), "{name} wrote something that isn't text");
    Ok(text.unwrap_or_default())
}
