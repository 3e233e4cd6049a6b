//! A price, taken apart: the lines by which a quantity becomes its cost. The amounts of
//! the lines sum to [`Price::cost`] exactly; both use the same arithmetic.

use super::decimal::{Decimal, DecimalError, Rounding};
use super::percentage::{Fees, Percentage};
use super::price::{Price, PriceModel, Share, TierPart, Transform, Usage, graduated, volume};

/// One line of a price.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Line {
    pub step: Step,
    /// The step for people, with its settings.
    pub says: String,
    /// What is charged here; of a line without an amount, what it leaves.
    pub quantity: Option<Decimal>,
    /// What one unit costs; of a hundred where `per_hundred`.
    pub unit_amount: Option<Decimal>,
    pub per_hundred: bool,
    /// What the line adds to the cost; `None` where it changes the quantity alone.
    pub amount: Option<Decimal>,
}

/// What a line does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    FreeUnits,
    Transform,
    Units,
    Packages,
    Tier,
    TierFlatAmount,
    FreeAmount,
    Percentage,
    FixedPerEvent,
    EventFees,
    FlatAmount,
    /// Windows that are priced each on its own.
    Windows,
    MaximumAmount,
    Commitment,
    MinimumAmount,
    Rounding,
}

impl Line {
    /// A line that only changes the quantity.
    fn leaves(step: Step, says: String, quantity: Decimal) -> Line {
        Line { step, says, quantity: Some(quantity), unit_amount: None, per_hundred: false, amount: None }
    }

    fn product(step: Step, says: String, quantity: Decimal, unit_amount: Decimal, amount: Decimal) -> Line {
        let (quantity, unit_amount) = (Some(quantity), Some(unit_amount));
        Line { step, says, quantity, unit_amount, per_hundred: false, amount: Some(amount) }
    }

    fn percentage(step: Step, says: String, quantity: Decimal, rate: Decimal, amount: Decimal) -> Line {
        Line { per_hundred: true, ..Line::product(step, says, quantity, rate, amount) }
    }

    pub fn fixed(step: Step, says: impl Into<String>, amount: Decimal) -> Line {
        Line { step, says: says.into(), quantity: None, unit_amount: None, per_hundred: false, amount: Some(amount) }
    }
}

/// The sum of the lines' amounts.
///
/// # Errors
/// [`DecimalError::Overflow`].
pub fn total(lines: &[Line]) -> Result<Decimal, DecimalError> {
    lines.iter().filter_map(|line| line.amount).try_fold(Decimal::ZERO, Decimal::checked_add)
}

impl Price {
    /// The lines of [`Price::cost`].
    ///
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn lines(&self, usage: Usage<'_>, share: Share) -> Result<Vec<Line>, DecimalError> {
        let mut lines = Vec::new();
        match (&self.model, usage.fees) {
            (PriceModel::Percentage(percentage), Some(fees)) if percentage.needs_transactions() => {
                fee_lines(percentage, fees, &mut lines)?;
            }
            _ => {
                let quantity = self.quantity_lines(usage.quantity, &mut lines)?;
                self.model_lines(quantity, usage.events, share, &mut lines)?;
            }
        }
        if let Some(most) = self.options.maximum_amount {
            let most = share.apply(most)?;
            let beyond = most.checked_sub(total(&lines)?)?;
            if beyond.is_negative() {
                lines.push(Line::fixed(Step::MaximumAmount, format!("held to the maximum of {most}"), beyond));
            }
        }
        Ok(lines)
    }

    /// Free units and the transform; returns the quantity that the model sees.
    fn quantity_lines(&self, quantity: Decimal, lines: &mut Vec<Line>) -> Result<Decimal, DecimalError> {
        let beyond = self.beyond_free_units(quantity)?;
        if !self.options.free_units.is_zero() {
            lines.push(Line::leaves(Step::FreeUnits, format!("{} units are free", self.options.free_units), beyond));
        }
        let charged = self.charged_quantity(quantity)?;
        if let Some(transform) = &self.options.transform {
            lines.push(Line::leaves(Step::Transform, describe_transform(transform), charged));
        }
        Ok(charged)
    }

    fn model_lines(&self, quantity: Decimal, events: u64, share: Share, lines: &mut Vec<Line>) -> Result<(), DecimalError> {
        let flat_due = self.options.charge_zero_usage || !quantity.is_zero();
        match &self.model {
            PriceModel::PerUnit { unit_amount } => {
                let amount = quantity.checked_mul(*unit_amount)?;
                lines.push(Line::product(Step::Units, "units".to_owned(), quantity, *unit_amount, amount));
            }
            PriceModel::Package { size, amount, round_up } => {
                let (rounding, counted) = if *round_up { (Rounding::Up, "started") } else { (Rounding::Down, "whole") };
                let packages = quantity.divide_to_integer(*size, rounding)?;
                let says = format!("{counted} packages of {size}");
                lines.push(Line::product(Step::Packages, says, packages, *amount, packages.checked_mul(*amount)?));
            }
            PriceModel::Dynamic { multiplier } => {
                let amount = quantity.checked_mul(*multiplier)?;
                lines.push(Line::product(Step::Units, "the amount itself".to_owned(), quantity, *multiplier, amount));
            }
            PriceModel::Percentage(percentage) => quantity_percentage_lines(percentage, quantity, events, lines)?,
            _ if !flat_due => {}
            PriceModel::Flat { amount } => {
                lines.push(Line::fixed(Step::FlatAmount, prorated("flat amount", *amount, share), share.apply(*amount)?));
            }
            PriceModel::Graduated(tiers) => {
                for part in graduated(tiers, quantity, Decimal::ONE, share) {
                    tier_lines(&part?, share, false, lines);
                }
            }
            PriceModel::GraduatedPercentage(tiers) => {
                for part in graduated(tiers, quantity, Decimal::from_u64(100), share) {
                    tier_lines(&part?, share, true, lines);
                }
            }
            PriceModel::Volume(tiers) => {
                for part in volume(tiers, quantity, share) {
                    tier_lines(&part?, share, false, lines);
                }
            }
        }
        Ok(())
    }

    /// The lines of [`Price::adjustments`], of a period that costs `cost`.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn adjustment_lines(&self, cost: Decimal, share: Share) -> Result<Vec<Line>, DecimalError> {
        let due = self.adjustments_uncapped(cost, share)?;
        let mut lines = Vec::new();
        if let Some(commitment) = self.options.commitment.filter(|_| !due.commitment.is_zero()) {
            let amount = prorated("commitment of", commitment.amount, share);
            let says = if cost < share.apply(commitment.amount)? {
                format!("missing to the {amount}")
            } else {
                format!("beyond the {amount}, charged {} times", commitment.overage_factor)
            };
            lines.push(Line::fixed(Step::Commitment, says, due.commitment));
        }
        if let Some(least) = self.options.minimum_amount.filter(|_| !due.minimum.is_zero()) {
            let says = format!("missing to the {}", prorated("minimum of", least, share));
            lines.push(Line::fixed(Step::MinimumAmount, says, due.minimum));
        }
        let beyond = self.beyond_maximum(cost.checked_add(due.total()?)?, share)?;
        if let Some(most) = self.options.maximum_amount.filter(|_| !beyond.is_zero()) {
            let says = format!("held to the {}", prorated("maximum of", most, share));
            lines.push(Line::fixed(Step::MaximumAmount, says, Decimal::ZERO.checked_sub(beyond)?));
        }
        Ok(lines)
    }

    /// The last line of a period: from the exact sum to the amount in minor units; `None`
    /// where there is nothing to round.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn rounding_line(&self, due: Decimal) -> Result<Option<Line>, DecimalError> {
        let difference = due.round(self.currency.minor_digits)?.checked_sub(due)?;
        let says = format!("rounded to {} places of {}", self.currency.minor_digits, self.currency.code);
        Ok((!difference.is_zero()).then(|| Line::fixed(Step::Rounding, says, difference)))
    }
}

fn describe_transform(transform: &Transform) -> String {
    let operation = if transform.divide { "divided by" } else { "times" };
    let rounding = transform.rounding.map_or(String::new(), |rounding| {
        let how = match rounding {
            Rounding::Up => "up",
            Rounding::Down => "down",
            Rounding::HalfUp => "half up",
        };
        let places = if transform.precision == 0 { String::new() } else { format!(" to {} places", transform.precision) };
        format!(", rounded {how}{places}")
    });
    format!("{operation} {}{rounding}", transform.factor)
}

/// `minimum of 5`, or `minimum of 5, prorated`.
fn prorated(what: &str, amount: Decimal, share: Share) -> String {
    let part = if share.part == share.whole { "" } else { ", prorated" };
    format!("{what} {amount}{part}")
}

fn tier_lines(part: &TierPart<'_>, share: Share, per_hundred: bool, lines: &mut Vec<Line>) {
    let bounds = match (part.lower, part.tier.up_to) {
        (None, None) => "all units".to_owned(),
        (None, Some(up_to)) => format!("up to {up_to}"),
        (Some(lower), Some(up_to)) => format!("{lower} to {up_to}"),
        (Some(lower), None) => format!("beyond {lower}"),
    };
    let line = Line::product(Step::Tier, bounds.clone(), part.quantity, part.tier.unit_amount, part.amount);
    lines.push(Line { per_hundred, ..line });
    if !part.tier.flat_amount.is_zero() {
        let says = format!("{bounds}, {}", prorated("flat amount", part.tier.flat_amount, share));
        lines.push(Line::fixed(Step::TierFlatAmount, says, part.flat_amount));
    }
}

/// A percentage of a sum, where the events need not be known one by one.
fn quantity_percentage_lines(
    percentage: &Percentage,
    quantity: Decimal,
    events: u64,
    lines: &mut Vec<Line>,
) -> Result<(), DecimalError> {
    let charged = percentage.beyond_free(quantity)?;
    if let Some(free) = percentage.free_amount {
        lines.push(Line::leaves(Step::FreeAmount, format!("an amount of {free} is free"), charged));
    }
    rate_line(percentage, charged, lines)?;
    fixed_line(percentage, events, lines)
}

fn rate_line(percentage: &Percentage, charged: Decimal, lines: &mut Vec<Line>) -> Result<(), DecimalError> {
    let amount = percentage.rate_of(charged)?;
    lines.push(Line::percentage(Step::Percentage, "percentage".to_owned(), charged, percentage.rate_percent, amount));
    Ok(())
}

fn fixed_line(percentage: &Percentage, events: u64, lines: &mut Vec<Line>) -> Result<(), DecimalError> {
    if percentage.fixed_amount_per_event.is_zero() {
        return Ok(());
    }
    let (each, amount) = (percentage.fixed_amount_per_event, percentage.fixed_of(events)?);
    lines.push(Line::product(Step::FixedPerEvent, "events".to_owned(), Decimal::from_u64(events), each, amount));
    Ok(())
}

/// A percentage of events that are known one by one.
fn fee_lines(percentage: &Percentage, fees: &Fees, lines: &mut Vec<Line>) -> Result<(), DecimalError> {
    let Fees { charges: charged, events, value } = fees;
    let quantity = charged.value.total()?;
    let free: Vec<_> = [
        percentage.free_events.map(|events| format!("{events} events")),
        percentage.free_amount.map(|amount| format!("an amount of {amount}")),
    ]
    .into_iter()
    .flatten()
    .collect();
    if !free.is_empty() {
        let of = format!("{} of {events} events, {} in all", events - charged.events, value.total()?);
        lines.push(Line::leaves(Step::FreeAmount, format!("free up to {} ({of})", free.join(" and ")), quantity));
    }
    if !percentage.is_clamped() {
        rate_line(percentage, quantity, lines)?;
        return fixed_line(percentage, charged.events, lines);
    }
    let bounds = [("at least", percentage.minimum_amount_per_event), ("at most", percentage.maximum_amount_per_event)];
    let bounds: Vec<_> = bounds.iter().filter_map(|(name, bound)| Some(format!("{name} {}", (*bound)?))).collect();
    let fixed = percentage.fixed_amount_per_event;
    let fixed = if fixed.is_zero() { String::new() } else { format!(" + {fixed}") };
    let says = format!("{}%{fixed} of each event, {}", percentage.rate_percent, bounds.join(", "));
    let amount = charged.fees.total()?;
    lines.push(Line { quantity: Some(quantity), ..Line::fixed(Step::EventFees, says, amount) });
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::percentage::{Transaction, Transactions};
    use crate::model::price::{Commitment, Currency, PriceOptions, Tier};
    use crate::model::timestamp::Timestamp;
    use crate::model::window::Span;

    fn d(text: &str) -> Decimal {
        text.parse().unwrap()
    }

    /// Hundredths.
    fn cents(value: i64) -> Decimal {
        d(&value.to_string()).checked_div(d("100")).unwrap()
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

    fn shown(lines: &[Line]) -> Vec<String> {
        let line = |line: &Line| {
            let text = |value: Option<Decimal>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
            format!("{}: {} x {} = {}", line.says, text(line.quantity), text(line.unit_amount), text(line.amount))
        };
        lines.iter().map(line).collect()
    }

    #[test]
    fn every_step_has_its_line() {
        let tier = |up_to: Option<&str>, unit: &str, flat: &str| Tier {
            up_to: up_to.map(d),
            unit_amount: d(unit),
            flat_amount: d(flat),
        };
        let options = PriceOptions {
            free_units: d("1000"),
            transform: Some(Transform { divide: true, factor: d("10"), rounding: Some(Rounding::Up), precision: 0 }),
            maximum_amount: Some(d("20")),
            minimum_amount: Some(d("25")),
            commitment: Some(Commitment { amount: d("10"), overage_factor: d("2"), true_up: false }),
            ..PriceOptions::default()
        };
        let tiers = vec![tier(Some("100"), "0.1", "1"), tier(None, "0.05", "0")];
        let price = price(PriceModel::Graduated(tiers), options);
        let usage = Usage { quantity: d("5001"), ..Usage::NONE };
        assert_eq!(
            shown(&price.lines(usage, Share::WHOLE).unwrap()),
            [
                "1000 units are free: 4001 x - = -",
                "divided by 10, rounded up: 401 x - = -",
                "up to 100: 100 x 0.1 = 10",
                "up to 100, flat amount 1: - x - = 1",
                "beyond 100: 301 x 0.05 = 15.05",
                "held to the maximum of 20: - x - = -6.05",
            ]
        );
        assert_eq!(
            shown(&price.adjustment_lines(d("20"), Share::WHOLE).unwrap()),
            ["beyond the commitment of 10, charged 2 times: - x - = 10", "held to the maximum of 20: - x - = -10"]
        );
        assert_eq!(
            shown(&price.rounding_line(d("1.005")).unwrap().into_iter().collect::<Vec<_>>()),
            ["rounded to 2 places of USD: - x - = 0.005"]
        );
    }

    fn amount(most: i64) -> impl Strategy<Value = Decimal> {
        (0..most).prop_map(cents)
    }

    fn tiers() -> impl Strategy<Value = Vec<Tier>> {
        let bounds = proptest::collection::btree_set(1i64..20_000, 0..4);
        let rates = proptest::collection::vec((amount(500), amount(300)), 5);
        (bounds, rates).prop_map(|(bounds, rates)| {
            let bounds = bounds.into_iter().map(|bound| Some(cents(bound))).chain([None]);
            let tier = |(up_to, (unit_amount, flat_amount))| Tier { up_to, unit_amount, flat_amount };
            bounds.zip(rates).map(tier).collect()
        })
    }

    fn percentage() -> impl Strategy<Value = Percentage> {
        let free = (proptest::option::of(0u64..5), proptest::option::of(amount(20_000)));
        let bounds = (proptest::option::of(amount(200)), proptest::option::of(amount(900)));
        (amount(1000), amount(100), free, bounds).prop_map(|(rate_percent, fixed_amount_per_event, free, bounds)| Percentage {
            rate_percent,
            fixed_amount_per_event,
            free_events: free.0,
            free_amount: free.1,
            minimum_amount_per_event: bounds.0,
            maximum_amount_per_event: bounds.1,
        })
    }

    fn model() -> impl Strategy<Value = PriceModel> {
        prop_oneof![
            amount(1000).prop_map(|unit_amount| PriceModel::PerUnit { unit_amount }),
            (1i64..5000, amount(1000), any::<bool>()).prop_map(|(size, amount, round_up)| PriceModel::Package {
                size: cents(size),
                amount,
                round_up
            }),
            tiers().prop_map(PriceModel::Graduated),
            tiers().prop_map(PriceModel::Volume),
            tiers().prop_map(PriceModel::GraduatedPercentage),
            percentage().prop_map(PriceModel::Percentage),
            amount(300).prop_map(|multiplier| PriceModel::Dynamic { multiplier }),
            amount(9000).prop_map(|amount| PriceModel::Flat { amount }),
        ]
    }

    fn options() -> impl Strategy<Value = PriceOptions> {
        let rounding = proptest::option::of(prop_oneof![Just(Rounding::Up), Just(Rounding::Down), Just(Rounding::HalfUp)]);
        let transform = (any::<bool>(), 1i64..3000, rounding, 0u32..3)
            .prop_map(|(divide, factor, rounding, precision)| Transform { divide, factor: cents(factor), rounding, precision });
        let commitment = (amount(20_000), 100i64..300, any::<bool>()).prop_map(|(amount, factor, true_up)| Commitment {
            amount,
            overage_factor: cents(factor),
            true_up,
        });
        let amounts = (proptest::option::of(amount(20_000)), proptest::option::of(amount(40_000)));
        let flags = (any::<bool>(), any::<bool>());
        (amount(3000), proptest::option::of(transform), amounts, proptest::option::of(commitment), flags).prop_map(
            |(free_units, transform, amounts, commitment, flags)| PriceOptions {
                free_units,
                transform,
                minimum_amount: amounts.0,
                maximum_amount: amounts.1,
                commitment,
                charge_zero_usage: flags.0,
                prorate: flags.1,
            },
        )
    }

    proptest! {
        #[test]
        fn lines_sum_to_the_price(
            model in model(),
            options in options(),
            values in proptest::collection::vec(-9000i64..30_000, 0..12),
            part in 1i64..8,
        ) {
            let price = price(model, options);
            let mut transactions = Transactions::default();
            let mut quantity = Decimal::ZERO;
            for (at, value) in (0i64..).zip(&values) {
                let timestamp = Timestamp::from_nanos(at);
                quantity = quantity.checked_add(cents(*value)).unwrap();
                if let Some(percentage) = price.transactions() {
                    let one = Transaction { timestamp, ingested_at: timestamp, id: "".into(), value: cents(*value) };
                    transactions.add(one, percentage).unwrap();
                }
            }
            let share = Share { part, whole: 7 };
            let mut fees = Fees::default();
            if let Some(percentage) = price.transactions() {
                fees.add(&transactions, percentage, &mut |_, _| ()).unwrap();
            }
            let by_event = price.transactions().map(|_| &fees);
            let usage = Usage { quantity, events: values.len() as u64, fees: by_event };
            let cost = price.cost(usage, share).unwrap();
            prop_assert_eq!(total(&price.lines(usage, share).unwrap()).unwrap(), cost);
            let mut lines = price.adjustment_lines(cost, share).unwrap();
            let due = cost.checked_add(price.adjustments(cost, share).unwrap().total().unwrap()).unwrap();
            prop_assert_eq!(total(&lines).unwrap().checked_add(cost).unwrap(), due);
            lines.extend(price.rounding_line(due).unwrap());
            prop_assert_eq!(total(&lines).unwrap().checked_add(cost).unwrap(), due.round(2).unwrap());
        }
    }
}
