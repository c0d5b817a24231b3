//! RAM layouts as users write them and as QEMU prints them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_platform::layout::RamLayout;

fuzz_target!(|data: &str| {
    if let Ok(layout) = data.parse::<RamLayout>() {
        assert_eq!(layout.to_string().parse::<RamLayout>(), Ok(layout));
    }
    let _ = RamLayout::from_mtree(data);
});
