//! Opening a file as a memory image and reading from what comes out.
#![no_main]

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use secmon_memory::PhysicalAddress;
use secmon_platform::image::{self, ImageOptions};

fuzz_target!(|data: &[u8]| {
    let Ok(file) = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC) else {
        return;
    };
    let file = std::fs::File::from(file);
    if std::os::unix::fs::FileExt::write_all_at(&file, data, 0).is_err() {
        return;
    }
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let Ok(image) = image::open(&path, &ImageOptions::default()) else {
        return;
    };
    let mut page = [0; 4096];
    for region in image.memory.regions().iter().take(16) {
        let _ = image.memory.read(region.start, &mut page);
        let _ = image.memory.read(region.end().wrapping_sub(100), &mut page);
    }
    let _ = image.memory.read(PhysicalAddress::new(u64::MAX), &mut page);
});
