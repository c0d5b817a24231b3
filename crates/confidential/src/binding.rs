//! What ties a report to one question and one channel.

use sha2::{Digest as _, Sha512};

/// Parts the words of one use from those of another.
const CONTEXT: &[u8] = b"secmon report data 1\0";

/// The 64 bytes that a guest must have put into its report as it was asked
/// with `nonce` over the channel whose key is `channel_key`: SHA-512 over a
/// fixed text, the nonce and the key. A report made for another question, or
/// relayed for another channel, holds other bytes.
#[must_use]
pub fn report_data(nonce: &[u8; 32], channel_key: &[u8; 32]) -> [u8; 64] {
    let mut hash = Sha512::new();
    hash.update(CONTEXT);
    hash.update(nonce);
    hash.update(channel_key);
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn question_and_channel_both_count() {
        let both = report_data(&[1; 32], &[2; 32]);
        assert_ne!(both, report_data(&[1; 32], &[3; 32]));
        assert_ne!(both, report_data(&[3; 32], &[2; 32]));
        assert_ne!(both, report_data(&[2; 32], &[1; 32]));
    }
}
