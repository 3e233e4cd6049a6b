//! Prices: how a quantity becomes money.
//!
//! A new price model is a variant of [`PriceModel`], its arithmetic in
//! [`Price::cost`], and its keys in `reference/prices.rs`.

use super::decimal::{Decimal, DecimalError, Rounding};
use super::digest::Digest;
use super::percentage::{Fees, Percentage};
use super::window::Span;

/// A price of one meter on one plan, validated.
#[derive(Debug, Clone)]
pub struct Price {
    pub id: String,
    pub plan_id: String,
    pub meter_id: String,
    pub currency: Currency,
    pub model: PriceModel,
    pub options: PriceOptions,
    /// Dimension and canonical JSON value; empty matches everything.
    pub matches: Vec<(String, String)>,
    pub valid: Span,
    /// Changes when anything that can change a cost changes, but for when it holds: of that,
    /// [`Price::digest_of_part`] tells.
    pub digest: String,
}

/// What any model can be given beside its own keys.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct PriceOptions {
    /// Taken off a positive quantity before anything else.
    pub free_units: Decimal,
    pub transform: Option<Transform>,
    /// Due at least for a period.
    pub minimum_amount: Option<Decimal>,
    /// Due at most.
    pub maximum_amount: Option<Decimal>,
    pub commitment: Option<Commitment>,
    /// Whether a first-tier flat amount is due at quantity 0.
    pub charge_zero_usage: bool,
    /// Whether amounts fixed for a period shrink with the part of it that is active.
    pub prorate: bool,
}

impl Default for PriceOptions {
    fn default() -> Self {
        PriceOptions {
            free_units: Decimal::ZERO,
            transform: None,
            minimum_amount: None,
            maximum_amount: None,
            commitment: None,
            charge_zero_usage: true,
            prorate: false,
        }
    }
}

/// A change of unit before pricing.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Transform {
    pub divide: bool,
    pub factor: Decimal,
    /// `None` keeps all 18 places.
    pub rounding: Option<Rounding>,
    /// Places that rounding keeps.
    pub precision: u32,
}

impl Transform {
    fn apply(&self, quantity: Decimal) -> Result<Decimal, DecimalError> {
        let (factor, divisor) = if self.divide { (Decimal::ONE, self.factor) } else { (self.factor, Decimal::ONE) };
        match self.rounding {
            None => quantity.mul_div(factor, divisor),
            Some(rounding) => quantity.mul_div_round(factor, divisor, self.precision, rounding),
        }
    }
}

/// An amount that a customer promises to spend in a period.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Commitment {
    pub amount: Decimal,
    /// What is spent beyond the amount is charged so many times.
    pub overage_factor: Decimal,
    /// Whether what is missing to the amount is due.
    pub true_up: bool,
}

/// What is priced.
#[derive(Debug, Clone, Copy)]
pub struct Usage<'u> {
    pub quantity: Decimal,
    /// Events that were counted.
    pub events: u64,
    /// One by one, where [`Price::transactions`] asks for it.
    pub fees: Option<&'u Fees>,
}

impl Usage<'_> {
    pub const NONE: Usage<'static> = Usage { quantity: Decimal::ZERO, events: 0, fees: None };
}

/// The part of a billing period in which subscription and price are active, in
/// nanoseconds, as far as amounts depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    pub part: i64,
    pub whole: i64,
}

impl Share {
    pub const WHOLE: Share = Share { part: 1, whole: 1 };

    /// The share of `period` that lies in `active`.
    pub fn of(period: Span, active: Span) -> Share {
        let part = period.end.min(active.end).nanos().saturating_sub(period.start.max(active.start).nanos());
        Share { part: part.max(0), whole: period.end.nanos().saturating_sub(period.start.nanos()) }
    }

    pub(super) fn apply(self, amount: Decimal) -> Result<Decimal, DecimalError> {
        if self.part == self.whole { Ok(amount) } else { amount.share(self.part, self.whole) }
    }
}

/// What is due beside the cost of usage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Adjustments {
    pub commitment: Decimal,
    pub minimum: Decimal,
}

impl Adjustments {
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn total(self) -> Result<Decimal, DecimalError> {
        self.commitment.checked_add(self.minimum)
    }
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
    /// A share of the quantity, which is an amount of money; or of each event.
    Percentage(Percentage),
    /// As graduated, with shares of the quantity.
    GraduatedPercentage(Vec<Tier>),
    /// The quantity is the amount itself.
    Dynamic { multiplier: Decimal },
    /// Due whatever the usage.
    Flat { amount: Decimal },
}

impl PriceModel {
    /// The name that the prices file gives it.
    pub fn name(&self) -> &'static str {
        match self {
            PriceModel::PerUnit { .. } => "per_unit",
            PriceModel::Package { .. } => "package",
            PriceModel::Graduated(_) => "graduated",
            PriceModel::Volume(_) => "volume",
            PriceModel::Percentage(_) => "percentage",
            PriceModel::GraduatedPercentage(_) => "graduated_percentage",
            PriceModel::Dynamic { .. } => "dynamic",
            PriceModel::Flat { .. } => "flat",
        }
    }
}

/// A tier `(previous up_to, up_to]`; the last one has no bound.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Tier {
    pub up_to: Option<Decimal>,
    /// Of a unit; of a graduated percentage, of a hundred.
    pub unit_amount: Decimal,
    /// Due as a whole once the quantity reaches the tier.
    pub flat_amount: Decimal,
}

impl Price {
    /// The digest of what it says in a span in which it does not hold all the time; `None` where
    /// it does.
    pub fn digest_of_part(&self, span: Span) -> Option<String> {
        let part = Span { start: self.valid.start.max(span.start), end: self.valid.end.min(span.end) };
        (part != span).then(|| Digest::new("part of a price").text(&self.digest).text(&format!("{part:?}")).hex())
    }

    /// Changes when anything of the row changes: also what it is the price of, and when.
    pub fn row_digest(&self) -> String {
        let texts = [&self.id, &self.plan_id, &self.meter_id, &self.digest];
        let digest = texts.into_iter().fold(Digest::new("price row"), |digest, text| digest.text(text));
        digest.text(&format!("{:?} {:?}", self.matches, self.valid)).hex()
    }

    /// The percentage price whose events must be known one by one, if this is one.
    pub fn transactions(&self) -> Option<&Percentage> {
        match &self.model {
            PriceModel::Percentage(percentage) if percentage.needs_transactions() => Some(percentage),
            _ => None,
        }
    }

    /// What a unit costs, where each costs the same however many there are: what usage adds to a
    /// billing period does not depend on the rest of it then.
    pub fn constant_amount(&self) -> Option<Decimal> {
        let amount = match self.model {
            PriceModel::PerUnit { unit_amount } => unit_amount,
            PriceModel::Dynamic { multiplier } => multiplier,
            _ => return None,
        };
        let PriceOptions { free_units, transform, maximum_amount, .. } = &self.options;
        (free_units.is_zero() && transform.is_none() && maximum_amount.is_none()).then_some(amount)
    }

    /// The part of a billing period that amounts of this price are due for; `active` is
    /// the time of the subscription.
    pub fn share(&self, period: Span, active: Span) -> Share {
        if !self.options.prorate {
            return Share::WHOLE;
        }
        Share::of(period, Span { start: active.start.max(self.valid.start), end: active.end.min(self.valid.end) })
    }

    /// The price of usage, accumulated from the start of a billing period, without what
    /// belongs to the period as a whole.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`] where an amount needs more than 38 digits.
    pub fn cost(&self, usage: Usage<'_>, share: Share) -> Result<Decimal, DecimalError> {
        let cost = self.uncapped(usage, share)?;
        Ok(match self.options.maximum_amount {
            Some(most) => cost.min(share.apply(most)?),
            None => cost,
        })
    }

    /// The cost before it is held below the maximum.
    pub(super) fn uncapped(&self, usage: Usage<'_>, share: Share) -> Result<Decimal, DecimalError> {
        let quantity = self.charged_quantity(usage.quantity)?;
        let flat_due = self.options.charge_zero_usage || !quantity.is_zero();
        match &self.model {
            PriceModel::PerUnit { unit_amount } => quantity.checked_mul(*unit_amount),
            PriceModel::Package { size, amount, round_up } => {
                let rounding = if *round_up { Rounding::Up } else { Rounding::Down };
                quantity.divide_to_integer(*size, rounding)?.checked_mul(*amount)
            }
            PriceModel::Dynamic { multiplier } => quantity.checked_mul(*multiplier),
            PriceModel::Percentage(percentage) => match usage.fees.filter(|_| percentage.needs_transactions()) {
                Some(fees) => fees.cost(percentage),
                None => percentage.cost(quantity, usage.events),
            },
            _ if !flat_due => Ok(Decimal::ZERO),
            PriceModel::Flat { amount } => share.apply(*amount),
            PriceModel::Graduated(tiers) => TierPart::total(graduated(tiers, quantity, Decimal::ONE, share)),
            PriceModel::GraduatedPercentage(tiers) => TierPart::total(graduated(tiers, quantity, Decimal::from_u64(100), share)),
            PriceModel::Volume(tiers) => TierPart::total(volume(tiers, quantity, share)),
        }
    }

    /// The quantity that the model sees.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn charged_quantity(&self, quantity: Decimal) -> Result<Decimal, DecimalError> {
        let charged = self.beyond_free_units(quantity)?;
        self.options.transform.map_or(Ok(charged), |transform| transform.apply(charged))
    }

    pub(super) fn beyond_free_units(&self, quantity: Decimal) -> Result<Decimal, DecimalError> {
        let free = self.options.free_units;
        Ok(if quantity.is_negative() || free.is_zero() { quantity } else { quantity.checked_sub(free)?.max(Decimal::ZERO) })
    }

    /// What a period is due beside its cost: commitment, then minimum, then both held
    /// below the maximum.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn adjustments(&self, cost: Decimal, share: Share) -> Result<Adjustments, DecimalError> {
        let due = self.adjustments_uncapped(cost, share)?;
        let beyond = self.beyond_maximum(cost.checked_add(due.total()?)?, share)?;
        Ok(Adjustments { commitment: due.commitment.checked_sub(beyond)?, ..due })
    }

    /// How much of what is due lies beyond the maximum.
    pub(super) fn beyond_maximum(&self, due: Decimal, share: Share) -> Result<Decimal, DecimalError> {
        match self.options.maximum_amount {
            Some(most) => Ok(due.checked_sub(share.apply(most)?)?.max(Decimal::ZERO)),
            None => Ok(Decimal::ZERO),
        }
    }

    /// As [`Price::adjustments`], before both are held below the maximum.
    pub(super) fn adjustments_uncapped(&self, cost: Decimal, share: Share) -> Result<Adjustments, DecimalError> {
        let mut due = Adjustments::default();
        if let Some(commitment) = &self.options.commitment {
            let difference = cost.checked_sub(share.apply(commitment.amount)?)?;
            if difference.is_negative() && commitment.true_up {
                due.commitment = Decimal::ZERO.checked_sub(difference)?;
            } else if !difference.is_negative() {
                due.commitment = difference.checked_mul(commitment.overage_factor.checked_sub(Decimal::ONE)?)?;
            }
        }
        let committed = cost.checked_add(due.commitment)?;
        if let Some(least) = self.options.minimum_amount {
            due.minimum = share.apply(least)?.checked_sub(committed)?.max(Decimal::ZERO);
        }
        Ok(due)
    }
}

/// What one tier charges.
pub(super) struct TierPart<'t> {
    pub tier: &'t Tier,
    /// Where the tier begins; `None` for the first.
    pub lower: Option<Decimal>,
    pub quantity: Decimal,
    /// For the quantity, without what is flat.
    pub amount: Decimal,
    pub flat_amount: Decimal,
}

impl TierPart<'_> {
    fn total(parts: impl Iterator<Item = Result<Self, DecimalError>>) -> Result<Decimal, DecimalError> {
        parts.into_iter().try_fold(Decimal::ZERO, |cost, part| {
            let part = part?;
            cost.checked_add(part.amount)?.checked_add(part.flat_amount)
        })
    }
}

/// Bounds are continuous: 1000.5 units in tiers of 1000 puts the half unit in the
/// second tier. A quantity at or below zero stays in the first. `per` units cost a
/// tier's unit amount.
pub(super) fn graduated(
    tiers: &[Tier],
    quantity: Decimal,
    per: Decimal,
    share: Share,
) -> impl Iterator<Item = Result<TierPart<'_>, DecimalError>> {
    let lowers = std::iter::once(None).chain(tiers.iter().map(|tier| tier.up_to));
    let reached = tiers.iter().zip(lowers).take_while(move |(_, lower)| lower.is_none_or(|lower| quantity > lower));
    reached.map(move |(tier, lower)| {
        let upper = tier.up_to.map_or(quantity, |up_to| up_to.min(quantity));
        let quantity = upper.checked_sub(lower.unwrap_or(Decimal::ZERO))?;
        let amount = quantity.mul_div(tier.unit_amount, per)?;
        Ok(TierPart { tier, lower, quantity, amount, flat_amount: share.apply(tier.flat_amount)? })
    })
}

/// The tier that the quantity reaches, if any, charges all of it.
pub(super) fn volume(
    tiers: &[Tier],
    quantity: Decimal,
    share: Share,
) -> impl Iterator<Item = Result<TierPart<'_>, DecimalError>> {
    let lowers = std::iter::once(None).chain(tiers.iter().map(|tier| tier.up_to));
    let reached = tiers.iter().zip(lowers).find(|(tier, _)| tier.up_to.is_none_or(|up_to| quantity <= up_to));
    reached.into_iter().map(move |(tier, lower)| {
        let amount = quantity.checked_mul(tier.unit_amount)?;
        Ok(TierPart { tier, lower, quantity, amount, flat_amount: share.apply(tier.flat_amount)? })
    })
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

    fn price(model: PriceModel, options: PriceOptions) -> Price {
        Price {
            id: "p".into(),
            plan_id: "plan".into(),
            meter_id: "m".into(),
            currency: Currency::from_code("USD").unwrap(),
            model,
            options,
            matches: vec![],
            valid: Span { start: Timestamp::MIN, end: Timestamp::MAX },
            digest: String::new(),
        }
    }

    fn usage(quantity: &str) -> Usage<'static> {
        Usage { quantity: d(quantity), ..Usage::NONE }
    }

    fn cost(model: PriceModel, free: &str, quantity: &str) -> String {
        let price = price(model, PriceOptions { free_units: d(free), ..PriceOptions::default() });
        price.cost(usage(quantity), Share::WHOLE).unwrap().to_string()
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
        let per_unit = || PriceModel::PerUnit { unit_amount: d("0.5") };
        assert_eq!(cost(per_unit(), "10", "4"), "0");
        assert_eq!(cost(per_unit(), "10", "14"), "2");
        assert_eq!(cost(per_unit(), "10", "-4"), "-2");
    }
    #[test]
    fn adjustments_hold_a_period_between_its_bounds() {
        let options = PriceOptions {
            minimum_amount: Some(d("5")),
            maximum_amount: Some(d("150")),
            commitment: Some(Commitment { amount: d("100"), overage_factor: d("2"), true_up: false }),
            ..PriceOptions::default()
        };
        let price = price(PriceModel::PerUnit { unit_amount: d("1") }, options);
        let due = |quantity: &str| {
            let cost = price.cost(usage(quantity), Share::WHOLE).unwrap();
            let due = price.adjustments(cost, Share::WHOLE).unwrap();
            [cost, due.commitment, due.minimum].map(|amount| amount.to_string())
        };
        assert_eq!(due("0"), ["0", "0", "5"]);
        assert_eq!(due("99"), ["99", "0", "0"]);
        assert_eq!(due("110"), ["110", "10", "0"]);
        assert_eq!(due("140"), ["140", "10", "0"]);
        assert_eq!(due("1000"), ["150", "0", "0"]);
    }

    #[test]
    fn fixed_amounts_are_prorated_on_demand() {
        let t = |text: &str| text.parse::<Timestamp>().unwrap();
        let period = Span { start: t("2026-01-01"), end: t("2026-02-01") };
        let active = Span { start: t("2026-01-16T12:00:00Z"), end: Timestamp::MAX };
        let options = |prorate| PriceOptions { prorate, minimum_amount: Some(d("100")), ..PriceOptions::default() };
        for (prorate, flat, minimum) in [(false, "62", "38"), (true, "31", "19")] {
            let price = price(PriceModel::Flat { amount: d("62") }, options(prorate));
            let share = price.share(period, active);
            let cost = price.cost(Usage::NONE, share).unwrap();
            let due = price.adjustments(cost, share).unwrap();
            assert_eq!((cost.to_string(), due.minimum.to_string()), (flat.to_owned(), minimum.to_owned()));
        }
    }
}
