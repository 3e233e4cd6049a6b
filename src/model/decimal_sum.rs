//! Sums of decimals.

use arrow::datatypes::i256;

use super::decimal::{Decimal, DecimalError, Rounding, divide};

/// A running sum in 256 bits: it overflows at the end or not at all, so the order
/// of its terms does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecimalSum(i256);

impl Default for DecimalSum {
    fn default() -> Self {
        DecimalSum(i256::ZERO)
    }
}

impl DecimalSum {
    pub fn add(&mut self, value: Decimal) {
        self.0 = self.0.wrapping_add(i256::from_i128(value.0));
    }

    pub fn merge(&mut self, other: DecimalSum) {
        self.0 = self.0.wrapping_add(other.0);
    }

    /// Adds `value` for as long as `nanos`.
    pub fn add_weighted(&mut self, value: DecimalSum, nanos: i64) {
        self.0 = self.0.wrapping_add(value.0.wrapping_mul(i256::from_i128(nanos.into())));
    }

    pub fn is_zero(self) -> bool {
        self.0 == i256::ZERO
    }

    /// Little-endian bytes for digests.
    pub fn to_le_bytes(self) -> [u8; 32] {
        self.0.to_le_bytes()
    }

    /// # Errors
    /// [`DecimalError::Overflow`] where the total needs more than 38 digits.
    pub fn total(self) -> Result<Decimal, DecimalError> {
        Decimal::from_units(self.0.to_i128().ok_or(DecimalError::Overflow)?)
    }

    /// The total times `factor`, rounded half away from zero at 18 places.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`] where the product needs more than 38 digits.
    pub fn times(self, factor: Decimal) -> Result<Decimal, DecimalError> {
        let product = self.0.checked_mul(i256::from_i128(factor.0)).ok_or(DecimalError::Overflow)?;
        let units = divide(product, i256::from_i128(Decimal::ONE.0), Rounding::HalfUp);
        Decimal::from_units(units.to_i128().ok_or(DecimalError::Overflow)?)
    }

    /// The total divided by `count`, rounded half away from zero at 18 places.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`], also for a count of zero.
    pub fn mean(self, count: u64) -> Result<Decimal, DecimalError> {
        if count == 0 {
            return Err(DecimalError::Overflow);
        }
        let quotient = divide(self.0, i256::from_i128(count.into()), Rounding::HalfUp);
        Decimal::from_units(quotient.to_i128().ok_or(DecimalError::Overflow)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_large_sums_are_exact() {
        let number = |text: &str| text.parse::<Decimal>().unwrap();
        let mut sum = DecimalSum::default();
        (0..3).for_each(|_| sum.add(number("99999999999999999999")));
        assert_eq!(sum.total(), Err(DecimalError::Overflow));
        assert_eq!(sum.times(number("0.000001")), Ok(number("299999999999999.999997")));
        assert_eq!(sum.times(number("-1")), Err(DecimalError::Overflow));
        let mut small = DecimalSum::default();
        small.add(number("0.000000000000000003"));
        assert_eq!(
            (small.times(number("0.5")), small.times(number("-0.5"))),
            (Ok(number("0.000000000000000002")), Ok(number("-0.000000000000000002")))
        );
    }
}
