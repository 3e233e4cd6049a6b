//! Properties of events: what values they take.

use super::random::{Random, Weighted};
use crate::model::decimal::Decimal;

/// How the values of a property are drawn.
#[derive(Debug, Clone)]
pub enum Values {
    /// Whole numbers, or decimals with `places` digits after the point: from `min` units
    /// up, `count` of them.
    Number { min: i64, count: u64, skew: u32, places: u32 },
    /// One of these JSON texts.
    Choice { texts: Vec<String>, weights: Weighted },
    /// `prefix` and a number.
    Pool { prefix: String, weights: Weighted },
    /// Always the same JSON text.
    Constant(String),
}

/// A property with the JSON text that leads to its value.
#[derive(Debug, Clone)]
pub struct Property {
    pub name: String,
    /// `{"name":` or `,"name":`.
    pub lead: String,
    pub values: Values,
}

impl Values {
    /// Whether every value is a number or null.
    pub fn are_numbers(&self) -> bool {
        let is_number = |text: &String| text == "null" || text.parse::<Decimal>().is_ok();
        match self {
            Values::Number { .. } => true,
            Values::Choice { texts, .. } => texts.iter().all(is_number),
            Values::Pool { .. } => false,
            Values::Constant(text) => is_number(text),
        }
    }

    /// Appends a value as JSON.
    pub fn write(&self, random: &mut Random, out: &mut String) {
        match self {
            Values::Number { min, count, skew, places } => {
                let offset = random.skewed_below(*count, *skew);
                let value = i128::from(*min) + i128::from(offset);
                if value < 0 {
                    out.push('-');
                }
                let value = u64::try_from(value.unsigned_abs()).unwrap_or(u64::MAX);
                match 10u64.checked_pow(*places) {
                    Some(unit) if *places > 0 => {
                        write_digits(value / unit, 1, out);
                        out.push('.');
                        write_digits(value % unit, *places, out);
                    }
                    _ => write_digits(value, 1, out),
                }
            }
            Values::Choice { texts, weights } => {
                out.push_str(texts.get(weights.draw(random)).map_or("null", String::as_str));
            }
            Values::Pool { prefix, weights } => {
                out.push('"');
                out.push_str(prefix);
                write_digits(weights.draw(random) as u64 + 1, 1, out);
                out.push('"');
            }
            Values::Constant(text) => out.push_str(text),
        }
    }
}

/// Appends at least `width` decimal digits: faster than `write!`.
pub fn write_digits(mut value: u64, width: u32, out: &mut String) {
    let mut digits = [b'0'; 20];
    let mut count = 0;
    for digit in digits.iter_mut().rev() {
        *digit += u8::try_from(value % 10).unwrap_or_default();
        value /= 10;
        count += 1;
        if value == 0 && count >= width {
            break;
        }
    }
    let first = digits.len().saturating_sub(usize::try_from(count).unwrap_or_default());
    out.push_str(ascii(digits.get(first..).unwrap_or_default()));
}

/// Appends 16 hexadecimal digits.
pub fn write_hexadecimal(value: u64, out: &mut String) {
    let mut digits = [0; 16];
    for (pair, byte) in digits.as_chunks_mut::<2>().0.iter_mut().zip(value.to_be_bytes()) {
        *pair = [byte >> 4, byte & 15].map(|digit| if digit < 10 { b'0' + digit } else { b'a' - 10 + digit });
    }
    out.push_str(ascii(&digits));
}

fn ascii(digits: &[u8]) -> &str {
    std::str::from_utf8(digits).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_with_their_places() {
        let shown = |min: i64, places: u32| {
            let mut out = String::new();
            Values::Number { min, count: 1, skew: 0, places }.write(&mut Random::new(1, 1), &mut out);
            out
        };
        assert_eq!([shown(0, 0), shown(42, 0), shown(-42, 0)], ["0", "42", "-42"]);
        assert_eq!([shown(5, 2), shown(-1234, 3), shown(0, 1)], ["0.05", "-1.234", "0.0"]);
        let mut out = String::new();
        write_hexadecimal(0x0123_4567_89ab_cdef, &mut out);
        assert_eq!(out, "0123456789abcdef");
    }
}
