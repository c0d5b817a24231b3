//! Fetches packages from any suite of the archive that this machine's apt
//! already uses, without touching the machine's own apt configuration or
//! package lists, and without installing anything.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::ApplianceError;

const ADVICE: &str = "Packages come through apt-get and dpkg-deb, so it takes a Debian system; elsewhere give --kernel and --modules";

/// A private view of one suite.
pub struct Archive {
    folder: PathBuf,
}

impl Archive {
    /// Fetches the suite's package list into `folder`.
    ///
    /// # Errors
    /// If this is no Debian system, or the archive can't be reached.
    pub fn open(suite: &str, folder: &Path) -> Result<Self, ApplianceError> {
        for part in ["lists/partial", "cache/archives/partial", "packages"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(ApplianceError::file(&path, "making it"))?;
        }
        let source = format!("deb {} {suite} main\n", archive_address()?);
        let list = folder.join("sources.list");
        fs::write(&list, source).map_err(ApplianceError::file(&list, "writing it"))?;
        // What is installed on this machine, in a version that the suite may
        // not have, counts for nothing.
        let status = folder.join("status");
        fs::write(&status, "").map_err(ApplianceError::file(&status, "writing it"))?;
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
    ///
    /// # Errors
    /// If the archive has no such package.
    pub fn dependencies(&self, package: &str) -> Result<Vec<String>, ApplianceError> {
        let text = run(self
            .apt("apt-cache")
            .args(["depends", "--important", package]))?;
        Ok(text
            .lines()
            .filter_map(|line| line.split_once("Depends:"))
            .map(|(_, name)| name.trim().to_owned())
            .collect())
    }

    /// Fetches a package and unpacks it into `to`; says what it was.
    ///
    /// # Errors
    /// If it can't be fetched or unpacked.
    pub fn unpack(&self, package: &str, to: &Path) -> Result<PackageName, ApplianceError> {
        let file = self.download(package)?;
        let name = unpack_file(&file, to)?;
        fs::remove_file(&file).map_err(ApplianceError::file(&file, "removing it"))?;
        Ok(name)
    }

    /// Fetches a package, and gives its file.
    ///
    /// # Errors
    /// If it can't be fetched.
    pub fn download(&self, package: &str) -> Result<PathBuf, ApplianceError> {
        let packages = self.folder.join("packages");
        run(self
            .apt("apt-get")
            // As root, apt would drop to a user who can't write here.
            .args(["-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"])
            .args(["--quiet", "download", package])
            .current_dir(&packages))?;
        let listing = |source| ApplianceError::File {
            path: packages.clone(),
            what: "listing it",
            source,
        };
        let mut found = None;
        for entry in fs::read_dir(&packages).map_err(listing)? {
            let path = entry.map_err(listing)?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                found = Some(path);
            }
        }
        found.ok_or_else(|| ApplianceError::Package {
            package: package.to_owned(),
            what: "apt-get left no file of it".to_owned(),
        })
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (option, value) in [
            ("Dir::Etc::sourcelist", self.folder.join("sources.list")),
            ("Dir::Etc::sourceparts", PathBuf::from("/dev/null")),
            ("Dir::State::lists", self.folder.join("lists")),
            ("Dir::State::status", self.folder.join("status")),
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

/// A package's name and version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackageName {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// Unpacks a package's file into `to`; says what it was.
///
/// # Errors
/// If it is no package.
pub fn unpack_file(file: &Path, to: &Path) -> Result<PackageName, ApplianceError> {
    run(Command::new("dpkg-deb").arg("-x").arg(file).arg(to))?;
    let fields = run(Command::new("dpkg-deb")
        .arg("-f")
        .arg(file)
        .args(["Package", "Version"]))?;
    let field = |key: &str| {
        fields
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(": "))
            .map(str::to_owned)
            .ok_or_else(|| ApplianceError::Package {
                package: file.display().to_string(),
                what: format!("it has no field {key}"),
            })
    };
    Ok(PackageName {
        name: field("Package")?,
        version: field("Version")?,
    })
}

/// The address of the archive that this machine's apt uses.
fn archive_address() -> Result<String, ApplianceError> {
    let text = run(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(ORIGIN) $(LABEL)",
    ]))?;
    // Of Debian's parts, the security archive doesn't have other suites.
    text.lines()
        .find_map(|line| line.strip_suffix(" Debian Debian"))
        .map(str::to_owned)
        .ok_or(ApplianceError::NoArchive)
}

fn run(command: &mut Command) -> Result<String, ApplianceError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|source| ApplianceError::Start {
        program: program.clone(),
        source,
        advice: ADVICE,
    })?;
    if !output.status.success() {
        return Err(ApplianceError::Program {
            command: format!("{command:?}"),
            status: output.status,
            message: String::from_utf8_lossy(&output.stderr)
                .trim_end()
                .to_owned(),
        });
    }
    String::from_utf8(output.stdout).map_err(|_| ApplianceError::NoText { program })
}
