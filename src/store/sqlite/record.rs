//! Rows in SQLite's record format (<https://www.sqlite.org/fileformat2.html#record_format>).

use super::bind::Value;

/// The values of a row as SQLite stores them.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// The type of each column and its bytes.
    columns: Vec<(Vec<u8>, Vec<u8>)>,
    bytes: Vec<u8>,
}

impl Record {
    /// Of NULLs.
    pub fn new(columns: usize) -> Self {
        Record { columns: vec![(vec![0], Vec::new()); columns], bytes: Vec::new() }
    }

    pub fn set(&mut self, column: usize, value: Value<'_>) {
        let Some((kind, bytes)) = self.columns.get_mut(column) else { return };
        kind.clear();
        bytes.clear();
        match value {
            Value::Null => kind.push(0),
            Value::Integer(0) => kind.push(8),
            Value::Integer(1) => kind.push(9),
            Value::Integer(number) => {
                let all = number.to_be_bytes();
                let fits = |bits: u32| (-(1 << (bits - 1))..1 << (bits - 1)).contains(&number);
                let widths = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6)];
                let (code, width) = widths.into_iter().find(|(_, width)| fits(8 * *width)).unwrap_or((6, 8));
                kind.push(code);
                bytes.extend(all.into_iter().skip(8 - usize::try_from(width).unwrap_or(8)));
            }
            Value::Text(text) => {
                push_varint(kind, 13 + 2 * text.len() as u64);
                bytes.extend_from_slice(text);
            }
        }
    }

    pub fn bytes(&mut self) -> &[u8] {
        self.bytes.clear();
        let kinds: usize = self.columns.iter().map(|(kind, _)| kind.len()).sum();
        // The header counts its own length too.
        let header = (1..).map(|own| kinds + own).find(|header| varint_length(*header as u64) == header - kinds);
        push_varint(&mut self.bytes, header.unwrap_or_default() as u64);
        self.columns.iter().for_each(|(kind, _)| self.bytes.extend_from_slice(kind));
        self.columns.iter().for_each(|(_, bytes)| self.bytes.extend_from_slice(bytes));
        &self.bytes
    }
}

fn varint_length(number: u64) -> usize {
    let bits = usize::try_from(64 - number.leading_zeros()).unwrap_or(64).max(1);
    if bits > 56 { 9 } else { bits.div_ceil(7) }
}

/// Big-endian, seven bits a byte; a ninth byte has eight.
pub(super) fn push_varint(bytes: &mut Vec<u8>, number: u64) {
    let length = varint_length(number);
    if length == 9 {
        bytes.extend((1..9).rev().map(|place| 0x80 | low_bits(number >> (7 * place + 1))));
        bytes.extend(number.to_be_bytes().last());
        return;
    }
    for place in (0..length).rev() {
        let more = if place == 0 { 0 } else { 0x80 };
        bytes.push(more | low_bits(number >> (7 * place)));
    }
}

fn low_bits(number: u64) -> u8 {
    u8::try_from(number & 0x7f).unwrap_or_default()
}
