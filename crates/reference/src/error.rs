//! Why a file is no reference.

/// Why a file can't serve as a reference for a running kernel.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// It is neither a kernel image nor an ELF file.
    #[error(
        "it is no x86-64 kernel: neither a boot image (vmlinuz), nor an ELF file (vmlinux), nor a \
         Debian package"
    )]
    NotKernel,
    /// The package is damaged.
    #[error("reading the package: {reason}")]
    Package {
        /// What is wrong.
        reason: String,
    },
    /// The package holds other things.
    #[error(
        "the package holds no kernel (vmlinuz): give that of the image, linux-image-… with the \
         version, and not one that only depends on it"
    )]
    NoKernelInPackage,
    /// The boot image's header contradicts its length.
    #[error("the boot image is cut off: its payload would end at {end}, the file at {length}")]
    CutOff {
        /// Where the payload should end.
        end: u64,
        /// The file's length.
        length: usize,
    },
    /// The payload is compressed by a method that is not known.
    #[error(
        "the boot image's payload starts with {start:02x?}, which is no compression known here"
    )]
    Compression {
        /// The payload's first bytes.
        start: Vec<u8>,
    },
    /// Decompressing ended early.
    #[error("unpacking the boot image ({method}): {reason}")]
    Unpack {
        /// The method.
        method: &'static str,
        /// What the decoder said.
        reason: String,
    },
    /// What is unpacked is longer than any kernel.
    #[error("the kernel would be longer than {limit} bytes")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// The ELF file is damaged.
    #[error("reading the ELF file: {reason}")]
    Elf {
        /// What is wrong.
        reason: String,
    },
    /// It lacks a section that every kernel has.
    #[error("the ELF file has no section {section}")]
    NoSection {
        /// Its name.
        section: &'static str,
    },
    /// The running kernel was moved, and the file does not say what that changes.
    #[error(
        "the kernel runs {slide:#x} away from the addresses in this file, which holds no \
         relocations: give the boot image (vmlinuz) instead"
    )]
    NoRelocations {
        /// How far KASLR moved it.
        slide: u64,
    },
}
