//! Prices: how a quantity becomes money.
//!
//! A new price model is a variant of [`PriceModel`], its arithmetic in
//! [`Price::cost`], and its keys in `reference/prices.rs`.

use super::decimal::{Decimal, DecimalError, Rounding};
use super::window::Span;

/// A price of one meter on one plan, validated.
#[derive(Debug, Clone)]
pub struct Price {
    pub id: String,
    pub plan_id: String,
    pub meter_id: String,
    pub currency: Currency,
    pub model: PriceModel,
    /// Taken off a positive quantity before the model sees it.
    pub free_units: Decimal,
    /// Dimension and canonical JSON value; empty matches everything.
    pub matches: Vec<(String, String)>,
    pub valid: Span,
    /// Changes when anything that can change a cost changes.
    pub digest: String,
}

/// An ISO 4217 currency.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Currency {
    pub code: String,
    /// Decimal places of the minor unit: 2 for USD, 0 for JPY, 3 for KWD.
    pub minor_digits: u32,
}

impl Currency {
    /// The currency with this three-letter code.
    pub fn from_code(code: &str) -> Option<Currency> {
        let known = iso_currency::Currency::from_code(code)?;
        Some(Currency { code: code.to_owned(), minor_digits: u32::from(known.exponent().unwrap_or(2)) })
    }
}

#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub enum PriceModel {
    /// Quantity times unit amount.
    PerUnit { unit_amount: Decimal },
    /// Whole packages, a started one counted (up) or not (down).
    Package { size: Decimal, amount: Decimal, round_up: bool },
    /// Each tier charges the part of the quantity that lies in it.
    Graduated(Vec<Tier>),
    /// The tier that the quantity reaches charges all of it.
    Volume(Vec<Tier>),
    /// A share of the quantity, which is an amount of money.
    Percentage { rate_percent: Decimal },
}

/// A tier `(previous up_to, up_to]`; the last one has no bound.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Tier {
    pub up_to: Option<Decimal>,
    pub unit_amount: Decimal,
    /// Due as a whole once the quantity reaches the tier.
    pub flat_amount: Decimal,
}

impl Price {
    /// The price of `quantity`, accumulated from the start of a billing period.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`] where an amount needs more than 38 digits.
    pub fn cost(&self, quantity: Decimal) -> Result<Decimal, DecimalError> {
        let charged = if quantity.is_negative() || self.free_units.is_zero() {
            quantity
        } else {
            quantity.checked_sub(self.free_units)?.max(Decimal::ZERO)
        };
        match &self.model {
            PriceModel::PerUnit { unit_amount } => charged.checked_mul(*unit_amount),
            PriceModel::Package { size, amount, round_up } => {
                let rounding = if *round_up { Rounding::Up } else { Rounding::Down };
                charged.divide_to_integer(*size, rounding)?.checked_mul(*amount)
            }
            PriceModel::Graduated(tiers) => graduated(tiers, charged),
            PriceModel::Volume(tiers) => volume(tiers, charged),
            PriceModel::Percentage { rate_percent } => charged.mul_div(*rate_percent, Decimal::from_u64(100)),
        }
    }
}

/// Bounds are continuous: 1000.5 units in tiers of 1000 puts the half unit in the
/// second tier. A quantity at or below zero stays in the first.
fn graduated(tiers: &[Tier], quantity: Decimal) -> Result<Decimal, DecimalError> {
    let mut cost = Decimal::ZERO;
    let mut lower = None;
    for tier in tiers {
        if lower.is_some_and(|lower| quantity <= lower) {
            break;
        }
        let upper = tier.up_to.map_or(quantity, |up_to| up_to.min(quantity));
        let inside = upper.checked_sub(lower.unwrap_or(Decimal::ZERO))?;
        cost = cost.checked_add(inside.checked_mul(tier.unit_amount)?)?.checked_add(tier.flat_amount)?;
        lower = tier.up_to;
    }
    Ok(cost)
}

fn volume(tiers: &[Tier], quantity: Decimal) -> Result<Decimal, DecimalError> {
    let reached = tiers.iter().find(|tier| tier.up_to.is_none_or(|up_to| quantity <= up_to));
    match reached {
        Some(tier) => quantity.checked_mul(tier.unit_amount)?.checked_add(tier.flat_amount),
        None => Ok(Decimal::ZERO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::timestamp::Timestamp;

    fn d(text: &str) -> Decimal {
        text.parse().unwrap()
    }

    fn tier(up_to: Option<&str>, unit: &str, flat: &str) -> Tier {
        Tier { up_to: up_to.map(d), unit_amount: d(unit), flat_amount: d(flat) }
    }

    fn cost(model: PriceModel, free: &str, quantity: &str) -> String {
        let price = Price {
            id: "p".into(),
            plan_id: "plan".into(),
            meter_id: "m".into(),
            currency: Currency::from_code("USD").unwrap(),
            model,
            free_units: d(free),
            matches: vec![],
            valid: Span { start: Timestamp::MIN, end: Timestamp::MAX },
            digest: String::new(),
        };
        price.cost(d(quantity)).unwrap().to_string()
    }

    #[test]
    fn graduated_charges_each_part_in_its_tier() {
        let tiers = || {
            PriceModel::Graduated(vec![
                tier(Some("1000"), "0.01", "0"),
                tier(Some("2000"), "0.005", "1"),
                tier(None, "0.001", "0"),
            ])
        };
        assert_eq!(cost(tiers(), "0", "1000"), "10");
        assert_eq!(cost(tiers(), "0", "1000.5"), "11.0025");
        assert_eq!(cost(tiers(), "0", "3000"), "17");
        assert_eq!(cost(tiers(), "0", "-100"), "-1");
        assert_eq!(cost(tiers(), "100", "1100"), "10");
        let flat_first = || PriceModel::Graduated(vec![tier(Some("5"), "0", "20"), tier(None, "2", "0")]);
        assert_eq!(cost(flat_first(), "0", "0"), "20");
        assert_eq!(cost(flat_first(), "0", "6"), "22");
    }

    #[test]
    fn volume_charges_all_at_the_tier_reached() {
        let tiers = || PriceModel::Volume(vec![tier(Some("100"), "1", "0"), tier(None, "0.5", "3")]);
        assert_eq!(cost(tiers(), "0", "100"), "100");
        assert_eq!(cost(tiers(), "0", "100.1"), "53.05");
        assert_eq!(cost(tiers(), "0", "-1"), "-1");
    }

    #[test]
    fn packages_percentages_and_free_units() {
        let package = |round_up| PriceModel::Package { size: d("1000"), amount: d("3"), round_up };
        assert_eq!((cost(package(true), "0", "1001"), cost(package(false), "0", "1999")), ("6".into(), "3".into()));
        assert_eq!(cost(package(true), "0", "0"), "0");
        assert_eq!(cost(PriceModel::Percentage { rate_percent: d("2.9") }, "0", "10.01"), "0.29029");
        let per_unit = || PriceModel::PerUnit { unit_amount: d("0.5") };
        assert_eq!(cost(per_unit(), "10", "4"), "0");
        assert_eq!(cost(per_unit(), "10", "14"), "2");
        assert_eq!(cost(per_unit(), "10", "-4"), "-2");
    }
}
