//! Exact fixed-point decimals: 18 decimal places, 38 digits.
//!
//! Quantities and money never pass through a float. Text is parsed digit by
//! digit, products are formed in 256 bits, and everything that has to be cut
//! to 18 places is rounded half away from zero.

use std::fmt;
use std::str::FromStr;

use arrow::datatypes::i256;

/// Digits after the point.
pub const SCALE: u32 = 18;
const ONE: i128 = 1_000_000_000_000_000_000;
/// 10^38 - 1: the greatest magnitude, in units of 10^-18.
const MAX_UNITS: i128 = 99_999_999_999_999_999_999_999_999_999_999_999_999;

/// A decimal with 18 places; magnitudes are below 10^20.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Decimal(pub(super) i128);

/// Why a text or a result is not a [`Decimal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecimalError {
    /// Not a decimal number.
    #[error("not a decimal number")]
    Syntax,
    /// More than 38 digits, 18 of them after the point.
    #[error("decimal overflow: more than 38 digits at 18 decimal places")]
    Overflow,
}

type Result<T> = std::result::Result<T, DecimalError>;

/// How a result is cut to fewer places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub enum Rounding {
    /// Towards positive infinity.
    Up,
    /// Towards negative infinity.
    Down,
    /// To the nearest, half away from zero.
    HalfUp,
}

impl Decimal {
    pub const ZERO: Decimal = Decimal(0);
    pub const ONE: Decimal = Decimal(ONE);

    /// The value `units * 10^-18`.
    pub(super) fn from_units(units: i128) -> Result<Self> {
        if units.unsigned_abs() > MAX_UNITS.unsigned_abs() {
            return Err(DecimalError::Overflow);
        }
        Ok(Decimal(units))
    }

    /// A whole number. Every `u64` fits.
    pub fn from_u64(value: u64) -> Self {
        Decimal(i128::from(value) * ONE)
    }

    /// A whole number that is not negative, if this is one.
    pub fn to_u64(self) -> Option<u64> {
        (self.0 % ONE == 0).then(|| u64::try_from(self.0 / ONE).ok())?
    }

    pub fn is_zero(self) -> bool {
        self.0 == 0
    }

    pub fn is_negative(self) -> bool {
        self.0 < 0
    }

    pub fn abs(self) -> Self {
        Decimal(self.0.abs())
    }

    /// # Errors
    /// [`DecimalError::Overflow`] beyond 38 digits, as for all arithmetic here.
    pub fn checked_add(self, other: Self) -> Result<Self> {
        Self::from_units(self.0.checked_add(other.0).ok_or(DecimalError::Overflow)?)
    }

    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn checked_sub(self, other: Self) -> Result<Self> {
        Self::from_units(self.0.checked_sub(other.0).ok_or(DecimalError::Overflow)?)
    }

    /// The product, rounded half away from zero at 18 places.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn checked_mul(self, other: Self) -> Result<Self> {
        self.mul_div(other, Decimal::ONE)
    }

    /// Whether the product needs no rounding at 18 places.
    pub fn multiplies_exactly(self, other: Self) -> bool {
        // What whole numbers add is a multiple of one.
        (self.0 % ONE) * (other.0 % ONE) % ONE == 0
    }

    /// The quotient, rounded half away from zero at 18 places.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`], also for a division by zero.
    pub fn checked_div(self, other: Self) -> Result<Self> {
        self.mul_div(Decimal::ONE, other)
    }

    /// `self * factor / divisor` with a single rounding at the end.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`], also for a division by zero.
    pub fn mul_div(self, factor: Self, divisor: Self) -> Result<Self> {
        if divisor.0 == 0 {
            return Err(DecimalError::Overflow);
        }
        if let Some(product) = self.0.checked_mul(factor.0) {
            return Self::from_units(divide_half_away(product, divisor.0));
        }
        // |a|, |b| < 10^38, so the product fits 256 bits with room for the rounding.
        let product = i256::from_i128(self.0).wrapping_mul(i256::from_i128(factor.0));
        let quotient = divide(product, i256::from_i128(divisor.0), Rounding::HalfUp);
        Self::from_units(quotient.to_i128().ok_or(DecimalError::Overflow)?)
    }

    /// `self * factor / divisor`, exact up to the cut to `places` (0 to 18) places.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`], also for a division by zero.
    pub fn mul_div_round(self, factor: Self, divisor: Self, places: u32, rounding: Rounding) -> Result<Self> {
        if divisor.0 == 0 {
            return Err(DecimalError::Overflow);
        }
        let step = 10i128.pow(SCALE.saturating_sub(places));
        let product = i256::from_i128(self.0).wrapping_mul(i256::from_i128(factor.0));
        let steps = divide(product, i256::from_i128(divisor.0).wrapping_mul(i256::from_i128(step)), rounding);
        let steps = steps.to_i128().ok_or(DecimalError::Overflow)?;
        Self::from_units(steps.checked_mul(step).ok_or(DecimalError::Overflow)?)
    }

    /// The share `part / whole`, rounded half away from zero.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`], also for a whole of zero.
    pub fn share(self, part: i64, whole: i64) -> Result<Self> {
        // As units of 10^-18 both: their scale cancels out.
        self.mul_div(Decimal(part.into()), Decimal(whole.into()))
    }

    /// How many whole `size`s are in the value, a started one counted or not.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`], also for a `size` of zero.
    pub fn divide_to_integer(self, size: Self, rounding: Rounding) -> Result<Self> {
        self.mul_div_round(Decimal::ONE, size, 0, rounding)
    }

    /// Rounded to `places` (0 to 18) digits after the point.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`] where rounding needs a 39th digit.
    pub fn round_with(self, places: u32, rounding: Rounding) -> Result<Self> {
        self.mul_div_round(Decimal::ONE, Decimal::ONE, places, rounding)
    }

    /// Rounded half away from zero to `places` (0 to 18) digits after the point.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`] where rounding up needs a 39th digit.
    pub fn round(self, places: u32) -> Result<Self> {
        let step = 10i128.pow(SCALE.saturating_sub(places));
        Self::from_units(divide_half_away(self.0, step) * step)
    }

    /// Little-endian bytes, for digests and for [`Decimal::from_le_bytes`].
    pub fn to_le_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// All bits, for digests.
    pub fn to_bits(self) -> u128 {
        self.0.cast_unsigned()
    }

    /// A number from its little-endian bytes.
    pub fn from_le_bytes(bytes: [u8; 16]) -> Self {
        Decimal(i128::from_le_bytes(bytes))
    }
}

/// The quotient as a whole number; the divisor is not zero.
pub(super) fn divide(dividend: i256, divisor: i256, rounding: Rounding) -> i256 {
    let (quotient, rest) = (dividend.wrapping_div(divisor), dividend.wrapping_rem(divisor));
    if rest == i256::ZERO {
        return quotient;
    }
    let is_negative = (dividend < i256::ZERO) != (divisor < i256::ZERO);
    let is_away = match rounding {
        Rounding::Up => !is_negative,
        Rounding::Down => is_negative,
        // Compared without doubling, which could overflow.
        Rounding::HalfUp => rest.wrapping_abs() >= divisor.wrapping_abs().wrapping_sub(rest.wrapping_abs()),
    };
    match (is_away, is_negative) {
        (false, _) => quotient,
        (true, false) => quotient.wrapping_add(i256::ONE),
        (true, true) => quotient.wrapping_sub(i256::ONE),
    }
}

fn divide_half_away(dividend: i128, divisor: i128) -> i128 {
    let (quotient, rest) = (dividend / divisor, dividend % divisor);
    if rest.unsigned_abs() * 2 >= divisor.unsigned_abs() {
        quotient + if (dividend < 0) == (divisor < 0) { 1 } else { -1 }
    } else {
        quotient
    }
}

impl FromStr for Decimal {
    type Err = DecimalError;

    /// Parses a JSON number, or one with a leading `+`, a leading or a trailing
    /// point. Digits beyond the 18th place are rounded half away from zero.
    fn from_str(text: &str) -> Result<Self> {
        let bytes = text.as_bytes();
        let (negative, digits) = match bytes {
            [b'-', rest @ ..] => (true, rest),
            [b'+', rest @ ..] => (false, rest),
            _ => (false, bytes),
        };
        if let Some(units) = parse_short(digits) {
            return Ok(Decimal(if negative { -units } else { units }));
        }
        let units = parse_units(digits)?;
        Self::from_units(if negative { -units } else { units })
    }
}

/// Units of 10^-18 of an unsigned number with optional point and exponent.
fn parse_units(text: &[u8]) -> Result<i128> {
    let (mantissa, exponent) = match text.iter().position(|b| matches!(b, b'e' | b'E')) {
        Some(at) => {
            let (mantissa, rest) = text.split_at(at);
            (mantissa, parse_exponent(rest.get(1..).unwrap_or_default())?)
        }
        None => (text, 0),
    };
    let (whole, fraction) = match mantissa.iter().position(|b| *b == b'.') {
        Some(at) => {
            let (whole, rest) = mantissa.split_at(at);
            (whole, rest.get(1..).unwrap_or_default())
        }
        None => (mantissa, &[][..]),
    };
    let digits = || whole.iter().chain(fraction);
    if digits().next().is_none() || !digits().all(u8::is_ascii_digit) {
        return Err(DecimalError::Syntax);
    }
    let leading_zeros = digits().take_while(|d| **d == b'0').count();
    if leading_zeros == whole.len() + fraction.len() {
        return Ok(0);
    }
    // Where the point is, counted from the first digit that is not zero.
    let point = to_i64(whole.len()) + exponent - to_i64(leading_zeros);
    let wanted = point + i64::from(SCALE);
    if wanted > 38 {
        return Err(DecimalError::Overflow);
    }
    if wanted < 0 {
        return Ok(0);
    }
    let mut digits = digits().skip(leading_zeros).map(|d| i128::from(d - b'0'));
    let mut units = 0i128;
    for _ in 0..wanted {
        units = units * 10 + digits.next().unwrap_or(0);
    }
    Ok(if digits.next().unwrap_or(0) >= 5 { units + 1 } else { units })
}

/// The common case: up to 18 digits, with a point or without. Nothing can overflow
/// or has to be rounded; `None` leaves everything else to [`parse_units`].
fn parse_short(text: &[u8]) -> Option<i128> {
    if text.len() > 19 {
        return None;
    }
    let (mut value, mut digits, mut point) = (0u64, 0u32, None);
    for byte in text {
        match byte {
            b'0'..=b'9' => (value, digits) = (value * 10 + u64::from(byte - b'0'), digits + 1),
            b'.' if point.is_none() => point = Some(digits),
            _ => return None,
        }
    }
    if digits == 0 || digits > SCALE {
        return None;
    }
    let places = digits - point.unwrap_or(digits);
    Some(i128::from(value) * 10i128.pow(SCALE - places))
}

fn parse_exponent(text: &[u8]) -> Result<i64> {
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        _ => (false, text),
    };
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(DecimalError::Syntax);
    }
    // Saturates far beyond any exponent that matters.
    let value = digits.iter().fold(0i64, |value, d| (value * 10 + i64::from(d - b'0')).min(1 << 40));
    Ok(if negative { -value } else { value })
}

fn to_i64(length: usize) -> i64 {
    i64::try_from(length).unwrap_or(i64::MAX / 4)
}

impl fmt::Display for Decimal {
    /// Plain notation with the scale trimmed: `3`, `0.5`, `-0.25`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(DecimalText::default().of(*self))
    }
}

/// A place to write decimals to, one after the other: every row of the store has two.
#[derive(Debug)]
pub struct DecimalText([u8; 40]);

impl Default for DecimalText {
    fn default() -> Self {
        DecimalText([0; 40])
    }
}

impl DecimalText {
    /// The value in plain notation with the scale trimmed: `3`, `0.5`, `-0.25`.
    pub fn of(&mut self, value: Decimal) -> &str {
        let magnitude = value.0.unsigned_abs();
        let one = ONE.unsigned_abs();
        // Three groups of 18 digits: divisions in 64 bits are many times faster.
        let group = |number: u128| u64::try_from(number % one).unwrap_or_default();
        let (whole, mut fraction) = (magnitude / one, group(magnitude));
        let mut at = self.0.len();
        if fraction != 0 {
            let mut places = SCALE;
            while fraction.is_multiple_of(10) {
                (fraction, places) = (fraction / 10, places - 1);
            }
            at = self.put_digits(at, fraction, places);
            at = self.put(at, b'.');
        }
        let above = group(whole / one);
        at = if above == 0 {
            self.put_digits(at, group(whole), 1)
        } else {
            let at = self.put_digits(at, group(whole), SCALE);
            self.put_digits(at, above, 1)
        };
        if value.0 < 0 {
            at = self.put(at, b'-');
        }
        self.0.get(at..).and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default()
    }

    /// Puts a number's digits, at least so many, before `at`; returns where they begin.
    fn put_digits(&mut self, mut at: usize, mut number: u64, at_least: u32) -> usize {
        let mut written = 0;
        while written < at_least || number != 0 {
            at = self.put(at, b'0' + u8::try_from(number % 10).unwrap_or_default());
            (number, written) = (number / 10, written + 1);
        }
        at
    }

    fn put(&mut self, at: usize, byte: u8) -> usize {
        let at = at.saturating_sub(1);
        if let Some(place) = self.0.get_mut(at) {
            *place = byte;
        }
        at
    }
}

impl serde::Serialize for Decimal {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Decimal {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Text;
        impl serde::de::Visitor<'_> for Text {
            type Value = Decimal;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a quoted decimal such as \"0.25\"")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<Decimal, E> {
                text.trim().parse().map_err(|e| E::custom(format!("`{text}` is {e}")))
            }
            fn visit_u64<E: serde::de::Error>(self, value: u64) -> std::result::Result<Decimal, E> {
                Ok(Decimal::from_u64(value))
            }
            fn visit_i64<E: serde::de::Error>(self, value: i64) -> std::result::Result<Decimal, E> {
                value.to_string().parse().map_err(E::custom)
            }
            fn visit_f64<E: serde::de::Error>(self, value: f64) -> std::result::Result<Decimal, E> {
                Err(E::custom(format!("{value} would pass through a float: quote the decimal, with all its digits")))
            }
        }
        deserializer.deserialize_any(Text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::decimal_sum::DecimalSum;

    fn d(text: &str) -> Decimal {
        text.parse().unwrap()
    }

    #[test]
    fn parses_the_text_exactly() {
        for (text, shown) in [
            ("0", "0"),
            ("-0.0", "0"),
            ("12", "12"),
            ("0.1", "0.1"),
            ("1e3", "1000"),
            ("1.5E-3", "0.0015"),
            (".5", "0.5"),
            ("5.", "5"),
            ("0.0000000000000000005", "0.000000000000000001"),
            ("0.00000000000000000049999", "0"),
            ("-0.0000000000000000005", "-0.000000000000000001"),
            ("1234567890123456789.123456789012345678", "1234567890123456789.123456789012345678"),
            ("0e999999999999999999999", "0"),
            ("1e-999999999999999999999", "0"),
        ] {
            assert_eq!(d(text).to_string(), shown, "{text}");
        }
        assert_eq!("1e20".parse::<Decimal>(), Err(DecimalError::Overflow));
        assert_eq!("99999999999999999999".parse::<Decimal>().map(|d| d.to_string()), Ok("99999999999999999999".into()));
        for text in ["", "-", "abc", "1x", "1e", "--1", ".", "1.2.3", "0x10", "NaN", "１"] {
            assert_eq!(text.parse::<Decimal>(), Err(DecimalError::Syntax), "{text}");
        }
    }

    #[test]
    fn products_that_need_no_rounding_are_known() {
        let least = "0.000000000000000001";
        let exact =
            [("-99999999999999999999", least), ("0.333333333333333334", "2.5"), ("12345678901.000000001", "-0.000000001")];
        let rounded = [("-99999999999999999999.5", least), ("0.333333333333333333", "2.5"), ("-0.0000000001", "0.000000001")];
        let is_exact = |(a, b): (&str, &str)| [d(a).multiplies_exactly(d(b)), d(b).multiplies_exactly(d(a))];
        assert_eq!((exact.map(is_exact), rounded.map(is_exact)), ([[true; 2]; 3], [[false; 2]; 3]));
    }

    proptest! {
        #[test]
        fn writes_and_reads_every_value(units in -MAX_UNITS..=MAX_UNITS, shift in 0u32..38, short in "[-+]?[0-9]{0,12}[.]?[0-9]{0,12}") {
            let value = Decimal(units / 10i128.pow(shift));
            let magnitude = value.0.unsigned_abs();
            let (whole, fraction) = (magnitude / ONE.unsigned_abs(), magnitude % ONE.unsigned_abs());
            let sign = if value.0 < 0 { "-" } else { "" };
            let expected = format!("{sign}{whole}.{fraction:018}");
            prop_assert_eq!(value.to_string(), expected.trim_end_matches('0').trim_end_matches('.'));
            prop_assert_eq!(value.to_string().parse::<Decimal>(), Ok(value));
            let digits = short.trim_start_matches(['-', '+']).as_bytes();
            let slowly = parse_units(digits).map(|units| Decimal(if short.starts_with('-') { -units } else { units }));
            prop_assert_eq!(short.parse::<Decimal>(), slowly);
        }
    }

    #[test]
    fn rounds_half_away_from_zero() {
        assert_eq!(d("2.5").round(0), Ok(d("3")));
        assert_eq!(d("-2.5").round(0), Ok(d("-3")));
        assert_eq!(d("2.4999").round(0), Ok(d("2")));
        assert_eq!(d("1.005").round(2), Ok(d("1.01")));
        assert_eq!(d("1").checked_div(d("3")).unwrap().to_string(), "0.333333333333333333");
        assert_eq!(d("-2").checked_div(d("3")).unwrap().to_string(), "-0.666666666666666667");
        assert_eq!(d("0.000000001").checked_mul(d("0.0000000005")).unwrap().to_string(), "0.000000000000000001");
    }

    #[test]
    fn multiplies_in_256_bits() {
        assert_eq!(d("12345678901234567").checked_mul(d("1000.5")).unwrap().to_string(), "12351851740685184283.5");
        assert_eq!(d("-99999999999999999999").checked_mul(d("1")).unwrap().to_string(), "-99999999999999999999");
        assert_eq!(d("99999999999999999999").checked_mul(d("1.1")), Err(DecimalError::Overflow));
        assert_eq!(d("99999999999999999999").checked_add(d("1")), Err(DecimalError::Overflow));
        assert_eq!(d("5").checked_div(d("0")), Err(DecimalError::Overflow));
    }

    #[test]
    fn sums_overflow_at_the_end_or_not_at_all() {
        let most = "99999999999999999999";
        let mut sum = DecimalSum::default();
        for text in [most, most, most, "-99999999999999999999", "-99999999999999999999"] {
            sum.add(d(text));
        }
        assert_eq!(sum.total(), Ok(d(most)));
        assert_eq!(sum.mean(3).unwrap().to_string(), "33333333333333333333");
        sum.add(d("1"));
        assert_eq!(sum.total(), Err(DecimalError::Overflow));
        let mut small = DecimalSum::default();
        small.add(d("-2"));
        assert_eq!(small.mean(3).unwrap().to_string(), "-0.666666666666666667");
        assert_eq!(small.mean(0), Err(DecimalError::Overflow));
    }

    #[test]
    fn counts_whole_sizes() {
        let up = |q: &str, s: &str| d(q).divide_to_integer(d(s), Rounding::Up).unwrap().to_string();
        let down = |q: &str, s: &str| d(q).divide_to_integer(d(s), Rounding::Down).unwrap().to_string();
        assert_eq!((up("10.1", "5"), down("10.1", "5")), ("3".into(), "2".into()));
        assert_eq!((up("10", "5"), down("10", "5")), ("2".into(), "2".into()));
        assert_eq!((up("-1", "5"), down("-1", "5")), ("0".into(), "-1".into()));
    }

    #[test]
    fn rounds_the_exact_quotient() {
        let cut =
            |q: &str, f: &str, by: &str, places, rounding| d(q).mul_div_round(d(f), d(by), places, rounding).unwrap().to_string();
        // Too small for 18 places, and still a started unit.
        assert_eq!(cut("0.000000000000000001", "1", "1000", 0, Rounding::Up), "1");
        assert_eq!(cut("-0.000000000000000001", "1", "1000", 0, Rounding::Down), "-1");
        assert_eq!(cut("2.5", "1", "1", 0, Rounding::HalfUp), "3");
        assert_eq!(cut("-2.5", "1", "1", 0, Rounding::HalfUp), "-3");
        assert_eq!(cut("1", "2", "3", 2, Rounding::HalfUp), "0.67");
        assert_eq!(cut("10", "1", "3", 2, Rounding::Down), "3.33");
        assert_eq!(d("62").share(1, 2), Ok(d("31")));
        assert_eq!(d("1").share(1, 3).unwrap().to_string(), "0.333333333333333333");
        assert_eq!(d("1").share(1, 0), Err(DecimalError::Overflow));
    }
}
