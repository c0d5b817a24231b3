//! Profiles kept from one run to the next, in a folder of the user's.
//!
//! What is kept is what takes long to find: where the symbol table and the types
//! lie in the image of one build, and the hash table of its names. Everything
//! else, names, addresses and types, is read from the guest every time; types
//! are used only if the guest's own symbols put them where the profile does.
//!
//! A guest chooses its build id, and may choose another kernel's. So the file
//! of a build says for which bytes it was made: a BLAKE3 digest over the whole
//! of the names, their markers and tokens. Before a file is used, the digest of
//! the same bytes of the guest at hand is compared; a guest can therefore spoil
//! nothing but its own profile. Names with that digest were walked and found
//! well formed when the file was made, so they are not walked again. Of two
//! guests with one build id and different symbol names, each has its file, and
//! that there are two is reported.
//!
//! Files are written under a temporary name and renamed, so that readers and
//! other writers see a whole file or none. They start with a checksum of the
//! rest, and every number in them is checked again where it is used: a
//! damaged file is reported, and replaced. Whoever can write to the folder can
//! make symbols not be found, and no more.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use secmon_memory::Buffer;

use crate::locate::{Encoding, Location};
use crate::part::{Part, Words};
use crate::symbols::index_length;
use crate::{BuildId, Cache};

/// The start of a file; the last byte is the version of the format.
const MAGIC: [u8; 8] = *b"SecMonP\x02";
const DIGEST: usize = 32;
/// More than any profile: a distribution's 7.2 takes 2 MiB.
const MAXIMUM_FILE: u64 = 32 << 20;
/// Files beyond this number are removed, the ones not used for longest first.
const MAXIMUM_FILES: usize = 64;
/// Files of the folder that are looked at.
const MAXIMUM_LISTED: usize = 4096;
/// After this long a temporary file's writer is gone.
const TEMPORARY_AGE: Duration = Duration::from_secs(3600);
/// How exactly it is known when a file was last used.
const USE_NOTED: Duration = Duration::from_secs(24 * 3600);
const SUFFIX: &str = ".profile";
const TEMPORARY: &str = ".temporary";

/// What became of the cache while a kernel was looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CacheOutcome {
    /// It was not to be used, or the kernel has no build id.
    #[default]
    NotUsed,
    /// The profile was there.
    Hit(PathBuf),
    /// The profile was not there, and now is.
    Stored(PathBuf),
    /// The profile was not kept, because something in the guest contradicts
    /// it: each run is to see that.
    Withheld,
    /// A file was there that can't be used; it has been replaced if possible.
    Rejected {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no folder to keep it in, or it can't be written.
    Unavailable(String),
}

impl fmt::Display for CacheOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotUsed => f.write_str("the profile cache was not used"),
            Self::Hit(path) => write!(f, "the profile is from {}", path.display()),
            Self::Stored(path) => write!(f, "the profile was kept in {}", path.display()),
            Self::Withheld => {
                f.write_str("the profile was not kept, as something in the guest contradicts it")
            }
            Self::Rejected { path, reason } => {
                let path = path.display();
                write!(
                    f,
                    "{path} can't be used as a profile ({reason}); it was made anew"
                )
            }
            Self::Unavailable(reason) => write!(f, "profiles can't be kept: {reason}"),
        }
    }
}

/// Why a file of the cache can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    #[error(transparent)]
    Host(#[from] io::Error),
    #[error("the file does not start as a profile of this version does")]
    Magic,
    #[error("the file has {length} bytes, more than the {MAXIMUM_FILE} accepted")]
    TooLong { length: u64 },
    #[error("the checksum does not fit the content")]
    Checksum,
    #[error("the content ends early or has too much")]
    Length,
    #[error("the content contradicts itself: {0}")]
    Content(&'static str),
}

/// What is kept of one build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub build_id: BuildId,
    /// The offset in the image of the build id's bytes.
    pub build_id_at: u64,
    pub location: Location,
    /// Where the types lie, to have a look at them while the names are
    /// checked; empty where they are not known.
    pub types: Range<u64>,
    /// Over the guest's names, markers and tokens.
    pub digest: [u8; DIGEST],
    /// The hash table of the names.
    pub slots: Words,
}

/// A file of the folder, by its name alone.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub path: PathBuf,
    pub build_id: BuildId,
    pub build_id_at: u64,
}

/// The folder with the profiles.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    /// The folder that `cache` means; `None` if it is off.
    pub(crate) fn new(cache: &Cache) -> Result<Option<Self>, String> {
        let path = match cache {
            Cache::Off => return Ok(None),
            Cache::Folder(path) => path.clone(),
            Cache::User => {
                let set = |name| std::env::var_os(name).map(PathBuf::from);
                let cache = set("XDG_CACHE_HOME")
                    .filter(|path| path.is_absolute())
                    .or_else(|| Some(set("HOME")?.join(".cache")))
                    .ok_or("neither XDG_CACHE_HOME nor HOME is set")?;
                cache.join("secmon").join("profiles")
            }
        };
        Ok(Some(Self(path)))
    }

    /// The profiles in the folder, by their names. A folder that is not there
    /// has none.
    pub(crate) fn list(&self) -> Vec<Listed> {
        let Ok(entries) = fs::read_dir(&self.0) else {
            return Vec::new();
        };
        entries
            .take(MAXIMUM_LISTED)
            .filter_map(|entry| parse_name(&entry.ok()?.path()))
            .collect()
    }

    /// Reads a profile.
    pub(crate) fn load(&self, listed: &Listed) -> Result<Stored, CacheError> {
        let mut file = File::open(&listed.path)?;
        let length = file.metadata()?.len();
        if length > MAXIMUM_FILE {
            return Err(CacheError::TooLong { length });
        }
        // Who writes a file writes a new one, so its length stands.
        let mut bytes = Buffer::zeroed(length as usize);
        file.read_exact(&mut bytes)?;
        let stored = Stored::decode(&Arc::new(bytes))?;
        if stored.build_id != listed.build_id || stored.build_id_at != listed.build_id_at {
            return Err(CacheError::Content("it is not of the build its name says"));
        }
        let age = file.metadata()?.modified()?.elapsed().unwrap_or_default();
        if age > USE_NOTED {
            // Which ones are in use decides what is removed, and nothing else.
            let _ = file.set_modified(SystemTime::now());
        }
        Ok(stored)
    }

    /// Writes a profile, and removes the oldest if there are too many.
    pub(crate) fn store(&self, stored: &Stored) -> Result<PathBuf, CacheError> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        create_private_folder(&self.0)?;
        let path = self.0.join(file_name(stored));
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |time| time.as_nanos());
        let process = std::process::id();
        let temporary = self.0.join(format!("{process}-{number}-{now}{TEMPORARY}"));
        let outcome =
            write_new(&temporary, &stored.encode()).and_then(|()| fs::rename(&temporary, &path));
        if let Err(error) = outcome {
            // Whether it was made at all or not: nothing more can be done.
            let _ = fs::remove_file(&temporary);
            return Err(error.into());
        }
        self.prune(&path);
        Ok(path)
    }

    /// Removes what is too old or too much; what can't be removed stays.
    fn prune(&self, keep: &Path) {
        let Ok(entries) = fs::read_dir(&self.0) else {
            return;
        };
        let mut profiles = Vec::new();
        for entry in entries.take(MAXIMUM_LISTED).flatten() {
            let path = entry.path();
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let Ok(modified) = modified else {
                continue;
            };
            let name = path.file_name().and_then(|name| name.to_str());
            if name.is_some_and(|name| name.ends_with(TEMPORARY)) {
                let age = SystemTime::now().duration_since(modified);
                if age.is_ok_and(|age| age > TEMPORARY_AGE) {
                    let _ = fs::remove_file(&path);
                }
            } else if parse_name(&path).is_some() && path != keep {
                profiles.push((modified, path));
            }
        }
        profiles.sort();
        let surplus = (profiles.len() + 1).saturating_sub(MAXIMUM_FILES);
        for (_, path) in &profiles[..surplus] {
            let _ = fs::remove_file(path);
        }
    }
}

fn create_private_folder(path: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)?.write_all(bytes)
}

/// `BUILD-ID`-`OFFSET OF IT`-`START OF THE DIGEST`.profile, all in hex.
fn file_name(stored: &Stored) -> String {
    let digest: String = stored.digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!(
        "{}-{:x}-{digest}{SUFFIX}",
        stored.build_id, stored.build_id_at
    )
}

fn parse_name(path: &Path) -> Option<Listed> {
    let name = path.file_name()?.to_str()?.strip_suffix(SUFFIX)?;
    let mut parts = name.split('-');
    let build_id = BuildId::from_hex(parts.next()?)?;
    let build_id_at = u64::from_str_radix(parts.next()?, 16).ok()?;
    Some(Listed {
        path: path.to_owned(),
        build_id,
        build_id_at,
    })
}

impl Stored {
    fn encode(&self) -> Vec<u8> {
        let Location {
            count,
            names,
            markers,
            token_table,
            token_index,
            offsets,
            encoding,
        } = &self.location;
        let (kind, base) = match encoding {
            Encoding::Absolute => (0, 0),
            Encoding::BaseRelative(base) => (1, *base),
            Encoding::AbsolutePerCpu(base) => (2, *base),
            Encoding::PlaceRelative => (3, 0),
        };
        let mut body = Vec::with_capacity(256 + self.slots.bytes().len());
        body.extend_from_slice(&self.digest);
        for number in [
            self.build_id.as_bytes().len() as u64,
            self.build_id_at,
            u64::from(*count),
            names.start,
            names.end,
            *markers,
            token_table.start,
            token_table.end,
            *token_index,
            *offsets,
            kind,
            base,
            self.types.start,
            self.types.end,
        ] {
            body.extend_from_slice(&number.to_le_bytes());
        }
        body.extend_from_slice(self.build_id.as_bytes());
        body.extend_from_slice(self.slots.bytes());
        let mut bytes = Vec::with_capacity(MAGIC.len() + DIGEST + body.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(blake3::hash(&body).as_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads a file's content.
    pub(crate) fn decode(file: &Arc<Buffer>) -> Result<Self, CacheError> {
        let bytes: &[u8] = file;
        let (magic, rest) = bytes.split_first_chunk().ok_or(CacheError::Magic)?;
        if *magic != MAGIC {
            return Err(CacheError::Magic);
        }
        let (checksum, body) = rest
            .split_first_chunk::<DIGEST>()
            .ok_or(CacheError::Length)?;
        if blake3::hash(body).as_bytes() != checksum {
            return Err(CacheError::Checksum);
        }
        let (digest, mut rest) = body
            .split_first_chunk::<DIGEST>()
            .ok_or(CacheError::Length)?;
        let mut number = || {
            let (first, after) = rest.split_first_chunk().ok_or(CacheError::Length)?;
            rest = after;
            Ok::<u64, CacheError>(u64::from_le_bytes(*first))
        };
        let id_length = number()?;
        let build_id_at = number()?;
        let count = u32::try_from(number()?).map_err(|_| CacheError::Content("the count"))?;
        let names = number()?..number()?;
        let markers = number()?;
        let token_table = number()?..number()?;
        let token_index = number()?;
        let offsets = number()?;
        let (kind, base) = (number()?, number()?);
        let types = number()?..number()?;
        let encoding = match kind {
            0 => Encoding::Absolute,
            1 => Encoding::BaseRelative(base),
            2 => Encoding::AbsolutePerCpu(base),
            3 => Encoding::PlaceRelative,
            _ => return Err(CacheError::Content("the encoding")),
        };
        let (build_id, slots) = usize::try_from(id_length)
            .ok()
            .and_then(|length| rest.split_at_checked(length))
            .ok_or(CacheError::Length)?;
        let build_id = BuildId::new(build_id).ok_or(CacheError::Content("the build id"))?;
        if index_length(count as usize).checked_mul(4) != Some(slots.len()) {
            return Err(CacheError::Length);
        }
        let slots = Words::from(Part::new(file, bytes.len() - slots.len()..bytes.len()));
        if !fits(&slots, count) {
            return Err(CacheError::Content("the index of names"));
        }
        Ok(Self {
            build_id,
            build_id_at,
            location: Location {
                count,
                names,
                markers,
                token_table,
                token_index,
                offsets,
                encoding,
            },
            types,
            digest: *digest,
            slots,
        })
    }
}

/// Whether `slots` hold as many symbols as there are, and no others. That each
/// is there once would take longer to see than all else of the file; if one is
/// missing it is not found, as after any other change by whoever could also
/// mend the checksum.
fn fits(slots: &Words, count: u32) -> bool {
    let (mut symbols, mut highest) = (0_u32, 0);
    for slot in slots.iter() {
        symbols += u32::from(slot != 0);
        highest = highest.max(slot);
    }
    symbols == count && highest <= count
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(seed: u8) -> Stored {
        let count = 20;
        let mut slots = vec![0_u32; index_length(count)];
        for (number, slot) in slots.iter_mut().take(count).enumerate() {
            *slot = number as u32 + 1;
        }
        Stored {
            build_id: BuildId::new(&[seed; 20]).expect("20 bytes"),
            build_id_at: 0x1234,
            location: Location {
                count: count as u32,
                names: 10..20,
                markers: 24,
                token_table: 32..64,
                token_index: 64,
                offsets: 600,
                encoding: Encoding::AbsolutePerCpu(700),
            },
            types: 2000..3000,
            digest: [seed; DIGEST],
            slots: slots.into(),
        }
    }

    fn decode(bytes: &[u8]) -> Result<Stored, CacheError> {
        Stored::decode(&Arc::new(bytes.to_vec().into()))
    }

    fn folder() -> (tempfile::TempDir, Folder) {
        let directory = tempfile::tempdir().expect("a temporary folder");
        let cache = Cache::Folder(directory.path().join("a/b"));
        let folder = Folder::new(&cache).expect("a folder").expect("not off");
        (directory, folder)
    }

    #[test]
    fn keeps_profiles() {
        let (_directory, folder) = folder();
        assert!(folder.list().is_empty());
        let path = folder.store(&sample(1)).expect("stored");
        folder.store(&sample(2)).expect("stored");
        let listed = folder.list();
        assert_eq!(listed.len(), 2);
        let first = listed.iter().find(|listed| listed.path == path);
        let first = first.expect("the first is there");
        assert_eq!(folder.load(first).expect("loaded"), sample(1));
    }

    #[test]
    fn refuses_every_cut_and_change() {
        let bytes = sample(1).encode();
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err(), "{length}");
        }
        for position in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[position] ^= 0x10;
            assert!(decode(&changed).is_err(), "{position}");
        }
    }

    #[test]
    fn refuses_a_file_under_another_name() {
        let (_directory, folder) = folder();
        let path = folder.store(&sample(1)).expect("stored");
        let other = path.with_file_name(file_name(&sample(2)));
        fs::rename(&path, &other).expect("renamed");
        let listed = folder.list();
        assert!(matches!(
            folder.load(&listed[0]),
            Err(CacheError::Content(_))
        ));
    }

    #[test]
    fn many_writers_leave_whole_files_and_a_bounded_number() {
        let (_directory, folder) = folder();
        std::thread::scope(|scope| {
            for thread in 0..4_u8 {
                let folder = &folder;
                scope.spawn(move || {
                    for seed in 1..=40_u8 {
                        // Half of the files are everybody's, half one's own.
                        let own = if seed % 2 == 0 { 0 } else { thread * 50 };
                        folder
                            .store(&sample(seed.wrapping_add(own)))
                            .expect("stored");
                        for listed in folder.list() {
                            match folder.load(&listed) {
                                Ok(stored) => assert_eq!(stored.build_id, listed.build_id),
                                // Somebody else has removed it meanwhile.
                                Err(CacheError::Host(error)) => {
                                    assert_eq!(error.kind(), io::ErrorKind::NotFound);
                                }
                                Err(error) => panic!("{error}"),
                            }
                        }
                    }
                });
            }
        });
        let left = fs::read_dir(&folder.0).expect("the folder").count();
        assert!((1..=MAXIMUM_FILES + 4).contains(&left), "{left}");
    }

    #[test]
    fn other_files_are_left_alone() {
        let (_directory, folder) = folder();
        folder.store(&sample(1)).expect("stored");
        for name in ["README", "zz-1-2.profile", "00-xyz-1.profile", ".profile"] {
            fs::write(folder.0.join(name), "x").expect("written");
        }
        assert_eq!(folder.list().len(), 1);
    }

    proptest! {
        #[test]
        fn any_content_with_a_good_checksum_is_read_or_refused(
            changes in proptest::collection::vec((0_usize..400, any::<u8>()), 0..6),
        ) {
            let mut bytes = sample(1).encode();
            let start = MAGIC.len() + DIGEST;
            for (position, byte) in changes {
                let length = bytes.len();
                bytes[start + position % (length - start)] = byte;
            }
            let checksum = blake3::hash(&bytes[start..]);
            bytes[MAGIC.len()..start].copy_from_slice(checksum.as_bytes());
            let _ = decode(&bytes);
        }
    }
}
