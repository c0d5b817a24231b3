//! What a reader in the guest says, taken apart.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_detect::lies::Question;

fuzz_target!(|data: &[u8]| {
    let question = Question {
        nonce: 7,
        folders: vec!["/tmp".to_owned(), "/".to_owned()],
    };
    let mut answer = question.line().into_bytes();
    // The first three words of the request begin the answer.
    answer.truncate("secmon-reader 1 0000000000000007".len());
    answer.push(b'\n');
    answer.extend_from_slice(data);
    let _ = question.read(&answer);
});
