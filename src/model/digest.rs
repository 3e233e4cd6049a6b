//! Digests: xxh3 for what must be compared, never for what must be secret.

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
    pub fn add(&mut self, element: &[u8]) {
        self.0 = self.0.wrapping_add(xxh3_128(element));
    }

    pub fn merge(&mut self, other: SetDigest) {
        self.0 = self.0.wrapping_add(other.0);
    }

    pub fn hex(self) -> String {
        hex(self.0)
    }
}

/// 32 hexadecimal digits, many times faster than formatting.
fn hex(number: u128) -> String {
    let digit = |value: u8| char::from(if value < 10 { b'0' + value } else { b'a' + value - 10 });
    number.to_be_bytes().into_iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}
