//! What goes wrong with image files, and what is worth telling about one that
//! opened.

use std::fmt;
use std::path::PathBuf;

use secmon_memory::{LayoutError, MapError, MemoryRegion};

use super::ImageFormat;

/// Why an image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The host refused to open it.
    #[error("opening {}: {source}", path.display())]
    Open {
        /// The path as it was given.
        path: PathBuf,
        /// The host's reason.
        source: std::io::Error,
    },
    /// A directory, a FIFO, a socket, a character device.
    #[error("{} is neither a file nor a block device", path.display())]
    NotAFile {
        /// The path as it was given.
        path: PathBuf,
    },
    /// No bytes at all.
    #[error("{} is empty: the dump was never written", path.display())]
    Empty {
        /// The path as it was given.
        path: PathBuf,
    },
    /// Reading failed below us.
    #[error("reading the {what} at file offset {offset:#x}: {source}")]
    Read {
        /// The part of the format.
        what: &'static str,
        /// Where it starts in the file.
        offset: u64,
        /// The host's reason.
        source: std::io::Error,
    },
    /// The file ends before something that can't be done without.
    #[error(
        "the file is cut: the {what} at file offset {offset:#x} needs bytes up to {needed:#x}, \
         there are {available:#x}; copy or write the dump again"
    )]
    Truncated {
        /// The part of the format.
        what: &'static str,
        /// Where it starts in the file.
        offset: u64,
        /// The offset one past its last byte.
        needed: u64,
        /// The bytes of the file.
        available: u64,
    },
    /// A field that contradicts the format, so that nothing can be read.
    #[error(
        "the {format} image is damaged: {what} at file offset {offset:#x}; copy or write the dump \
         again, or open it with format `raw` if it is the RAM itself"
    )]
    Damaged {
        /// The format its first bytes say.
        format: ImageFormat,
        /// Where the field is in the file.
        offset: u64,
        /// The field and its value.
        what: String,
    },
    /// Something known that is not read here.
    #[error("{what} is not supported: {advice}")]
    Unsupported {
        /// What was recognised.
        what: String,
        /// What to do instead.
        advice: &'static str,
    },
    /// More parts than a genuine image has; the index would not be bounded.
    #[error("the image has more than {limit} {what}, which no genuine image has")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many are accepted.
        limit: u64,
    },
    /// It is told by its first bytes as something else than what was asked.
    #[error("the image is not {asked}: its first bytes are not that format's")]
    OtherFormat {
        /// The format the caller asked for.
        asked: ImageFormat,
    },
    /// The layout that the caller stated does not fit.
    #[error("the stated memory layout does not fit the image: {0}")]
    Layout(#[from] LayoutError),
    /// The host could not map the file.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// Something about an image that its user should know; the image still opens.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageNote {
    /// The file ends early: this memory is not in it.
    Missing {
        /// The guest physical memory that can't be read.
        region: MemoryRegion,
        /// Why.
        reason: &'static str,
    },
    /// A header in the middle of the file makes no sense: what follows it in
    /// the file is unknown.
    Damaged {
        /// Where in the file.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// Two parts of the file claim this memory with different bytes; the part
    /// that starts lower in memory is used.
    Overlap {
        /// The guest physical memory claimed twice.
        region: MemoryRegion,
    },
    /// Parts of the file that describe no guest physical memory.
    Skipped {
        /// How many.
        count: u64,
        /// What they are.
        what: &'static str,
    },
    /// The RAM layout was not in the image and had to be inferred.
    LayoutInferred {
        /// The layout that is used.
        layout: String,
        /// What speaks for it.
        evidence: &'static str,
    },
    /// Pages that the writer of the dump left out.
    ExcludedPages {
        /// How many pages of 4 KiB.
        count: u64,
        /// What kinds of pages, as the dump says.
        reason: &'static str,
    },
    /// The dump itself says that it is only a part.
    Partial {
        /// In which way.
        what: String,
    },
}

impl fmt::Display for ImageNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { region, reason } => write!(
                f,
                "memory {}-{} can't be read: {reason}",
                region.start,
                region.end()
            ),
            Self::Damaged { offset, what } => {
                write!(f, "damaged at file offset {offset:#x}: {what}")
            }
            Self::Overlap { region } => write!(
                f,
                "memory {}-{} is in the file twice; the part that starts lower is used",
                region.start,
                region.end()
            ),
            Self::Skipped { count, what } => write!(f, "{count} {what} skipped"),
            Self::LayoutInferred { layout, evidence } => {
                write!(f, "memory layout taken as {layout}: {evidence}")
            }
            Self::ExcludedPages { count, reason } => {
                write!(f, "{count} pages are not in the image: {reason}")
            }
            Self::Partial { what } => write!(f, "the dump is a part: {what}"),
        }
    }
}
