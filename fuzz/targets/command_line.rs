//! Command lines of processes that look like QEMU, and target names.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_platform::qemu::CommandLine;
use secmon_platform::target::Target;

fuzz_target!(|data: &[u8]| {
    let arguments: Vec<Vec<u8>> = data.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
    let line = CommandLine::parse(&arguments);
    let _ = (
        line.machine_type(),
        line.main_ram_size(),
        line.main_blocks(),
    );
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(target) = text.parse::<Target>()
    {
        assert_eq!(
            target.to_string().parse::<Target>().as_ref().ok(),
            Some(&target)
        );
    }
});
