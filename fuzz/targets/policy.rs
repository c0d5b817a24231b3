//! Policies as somebody may have misspelt them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_watch::Policy;

fuzz_target!(|text: &str| {
    if let Err(error) = Policy::parse(text, "policy") {
        assert!(error.line >= 1 && error.column >= 1 && !error.message.is_empty());
    }
});
