//! A message's bytes: postcard's encoding, bounded.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ChannelError;

/// The bound of a message's encoded bytes unless another is set.
pub const DEFAULT_LIMIT: usize = 8 << 20;

/// A message's bytes.
///
/// # Errors
/// If it can't be encoded, or takes more than `limit` bytes.
pub fn encode<T: Serialize + ?Sized>(message: &T, limit: usize) -> Result<Vec<u8>, ChannelError> {
    let bytes = postcard::to_allocvec(message).map_err(|error| ChannelError::Encode {
        reason: error.to_string(),
    })?;
    if bytes.len() > limit {
        return Err(ChannelError::TooLong { limit });
    }
    Ok(bytes)
}

/// The message that all of `bytes` is.
///
/// # Errors
/// If it is not one, or bytes are left.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ChannelError> {
    let fail = |reason: String| ChannelError::Decode {
        length: bytes.len(),
        reason,
    };
    let (message, rest) =
        postcard::take_from_bytes(bytes).map_err(|error| fail(error.to_string()))?;
    if !rest.is_empty() {
        return Err(fail(format!("{} bytes are left over", rest.len())));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_whole_and_bounded() {
        let bytes = encode(&(7_u64, "text"), 64).expect("bytes");
        assert_eq!(
            decode::<(u64, String)>(&bytes).expect("a message"),
            (7, "text".into())
        );
        assert!(decode::<u64>(&bytes).is_err(), "bytes are left over");
        assert!(decode::<(u64, String)>(&bytes[..3]).is_err(), "cut short");
        assert!(matches!(
            encode(&[0_u8; 65][..], 64),
            Err(ChannelError::TooLong { limit: 64 })
        ));
    }

    #[test]
    fn a_claimed_length_allocates_nothing() {
        // A vector of 2^63 elements, and no element.
        let bytes = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        assert!(decode::<Vec<u64>>(&bytes).is_err());
        assert!(decode::<String>(&bytes).is_err());
    }
}
