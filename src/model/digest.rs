//! Digests: xxh3 for what must be compared, never for what must be secret.

use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// A digest over a sequence of texts, each with its length, so that no two
/// sequences run together.
pub struct Digest(Xxh3);

impl Digest {
    /// `domain` keeps digests of different things apart.
    pub fn new(domain: &str) -> Self {
        Digest(Xxh3::new()).text(domain)
    }

    #[must_use]
    pub fn text(mut self, text: &str) -> Self {
        self.0.update(&(text.len() as u64).to_le_bytes());
        self.0.update(text.as_bytes());
        self
    }

    /// 32 hexadecimal digits.
    pub fn hex(&self) -> String {
        hex(self.0.digest128())
    }
}

/// Adds a field with its length to a buffer that will be hashed; absent differs from empty.
pub fn frame(buffer: &mut Vec<u8>, field: Option<&[u8]>) {
    match field {
        None => buffer.push(0),
        Some(bytes) => {
            buffer.push(1);
            buffer.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            buffer.extend_from_slice(bytes);
        }
    }
}

/// An order-independent digest of a multiset: the sum of its elements' hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetDigest(u128);

impl SetDigest {
    /// Adds an element by its hash.
    pub fn add(&mut self, hash: u128) {
        self.0 = self.0.wrapping_add(hash);
    }

    pub fn merge(&mut self, other: SetDigest) {
        self.0 = self.0.wrapping_add(other.0);
    }

    /// As it is stored; a text that is none was altered, and is the digest of nothing else.
    pub fn stored(text: &str) -> SetDigest {
        text.parse().unwrap_or_else(|_| SetDigest(xxh3_128(text.as_bytes())))
    }

    pub fn to_le_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// 32 hexadecimal digits.
    pub fn hex(self) -> String {
        hex(self.0)
    }

    /// Hands 32 hexadecimal digits to `each`.
    pub fn with_hex<T>(self, each: impl FnOnce(&str) -> T) -> T {
        each(std::str::from_utf8(&hex_digits(self.0)).unwrap_or_default())
    }
}

/// A text that is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not 32 hexadecimal digits")]
pub struct DigestError;

impl FromStr for SetDigest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(DigestError),
        };
        if text.len() != 32 {
            return Err(DigestError);
        }
        text.bytes().try_fold(0, |number, byte| Ok(number << 4 | u128::from(digit(byte)?))).map(SetDigest)
    }
}

impl Serialize for SetDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.with_hex(|hex| serializer.serialize_str(hex))
    }
}

impl<'de> Deserialize<'de> for SetDigest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// 32 hexadecimal digits, many times faster than formatting.
fn hex(number: u128) -> String {
    hex_digits(number).into_iter().map(char::from).collect()
}

fn hex_digits(number: u128) -> [u8; 32] {
    let digit = |value: u8| if value < 10 { b'0' + value } else { b'a' + value - 10 };
    let mut digits = [0; 32];
    for (pair, byte) in digits.chunks_exact_mut(2).zip(number.to_be_bytes()) {
        pair.copy_from_slice(&[digit(byte >> 4), digit(byte & 15)]);
    }
    digits
}
