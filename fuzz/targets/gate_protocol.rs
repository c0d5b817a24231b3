//! Messages between a monitor and a gate.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_gate::protocol::{Message, Query};

fuzz_target!(|data: &[u8]| {
    if let Ok(query) = secmon_channel::decode::<Query>(data) {
        let _ = query.request.right();
        let bytes =
            secmon_channel::encode(&query, secmon_channel::DEFAULT_LIMIT).expect("it was decoded");
        assert_eq!(
            secmon_channel::decode::<Query>(&bytes).expect("encoded here"),
            query
        );
        // As the log writes it.
        let text = serde_json::to_string(&query).expect("JSON");
        assert_eq!(
            serde_json::from_str::<Query>(&text).expect("written here"),
            query
        );
    }
    let _ = secmon_channel::decode::<Message>(data);
});
