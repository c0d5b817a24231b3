//! What a client or a monitor can be sent once a session stands, and a
//! monitor's configuration.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_channel::{decode, encode};
use secmon_monitor::protocol::{Configuration, Reply, Request};

fuzz_target!(|data: &[u8]| {
    if let Ok(request) = decode::<Request>(data) {
        let bytes = encode(&request, usize::MAX).expect("it was decoded");
        assert_eq!(decode::<Request>(&bytes).expect("it was encoded"), request);
    }
    if let Ok(reply) = decode::<Reply>(data) {
        let bytes = encode(&reply, usize::MAX).expect("it was decoded");
        assert_eq!(decode::<Reply>(&bytes).expect("it was encoded"), reply);
    }
    if let Ok(configuration) = Configuration::parse(data) {
        configuration.check().expect("it was checked");
    }
});
