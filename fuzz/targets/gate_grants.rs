//! Grant files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_gate::grants::Grants;
use secmon_gate::protocol::{Limits, Right};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(grants) = Grants::parse(text) else {
        return;
    };
    for grant in &grants.monitors {
        assert!(grant.allows(Right::Observe));
        assert!(grant.limits.lease_milliseconds <= Limits::MAX_LEASE_MILLISECONDS);
        assert_eq!(
            grants.of(&grant.key).map(|found| &found.name),
            Some(&grant.name)
        );
        // A right that is not written down is not given.
        for right in Right::ALL {
            assert!(
                right == Right::Observe
                    || !grant.allows(right)
                    || text.contains(right.name())
                    || text.contains('\\')
            );
        }
    }
});
