//! The prices table.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Deserializer};

use super::definitions::{self, Located};
use super::is_open_end;
use super::meters::{Scalar, boolean};
use crate::config::ReferenceTable;
use crate::model::decimal::{Decimal, Rounding, SCALE};
use crate::model::digest::Digest;
use crate::model::meter::{Aggregation, FilterValue, Meter};
use crate::model::percentage::Percentage;
use crate::model::price::{Commitment, Currency, Price, PriceModel, PriceOptions, Tier, Transform};
use crate::model::property::write_json_text;
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowKind};

/// A price as people write it. Unknown keys are errors.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPrice {
    price_id: String,
    plan_id: String,
    meter_id: String,
    currency: String,
    model: String,
    unit_amount: Option<Decimal>,
    tiers: Option<Vec<RawTier>>,
    package_size: Option<Decimal>,
    amount: Option<Decimal>,
    round: Option<String>,
    rate_percent: Option<Decimal>,
    #[serde(rename = "match", default)]
    matches: BTreeMap<String, MatchValue>,
    free_units: Option<Decimal>,
    valid_from: Option<Timestamp>,
    #[serde(default, deserialize_with = "end")]
    valid_to: Option<Timestamp>,
    multiplier: Option<Decimal>,
    fixed_amount_per_event: Option<Decimal>,
    free_events: Option<Decimal>,
    free_amount: Option<Decimal>,
    minimum_amount_per_event: Option<Decimal>,
    maximum_amount_per_event: Option<Decimal>,
    minimum_amount: Option<Decimal>,
    maximum_amount: Option<Decimal>,
    commitment: Option<RawCommitment>,
    transform: Option<RawTransform>,
    #[serde(default, deserialize_with = "flag")]
    charge_zero_usage: Option<bool>,
    #[serde(default, deserialize_with = "flag")]
    prorate: Option<bool>,
}

/// A value of a dimension, which is a number or a text, as its events send it.
#[derive(Debug)]
struct MatchValue(FilterValue);

impl<'de> Deserialize<'de> for MatchValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let advice = "let events send the dimension as text, and quote it here";
        deserializer.deserialize_any(Scalar { advice }).map(MatchValue)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCommitment {
    amount: Decimal,
    overage_factor: Option<Decimal>,
    #[serde(default, deserialize_with = "flag")]
    true_up: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTransform {
    operation: String,
    factor: Decimal,
    rounding: Option<String>,
    precision: Option<Decimal>,
}

fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    boolean(deserializer).map(Some)
}

/// An end that may be the sign for none.
fn end<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    let text: Option<String> = Option::deserialize(deserializer)?;
    let text = text.filter(|text| !is_open_end(text));
    text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTier {
    up_to: Option<Decimal>,
    unit_amount: Option<Decimal>,
    rate_percent: Option<Decimal>,
    flat_amount: Option<Decimal>,
}

const NESTED: [&str; 4] = ["tiers", "match", "commitment", "transform"];

/// Reads and validates all prices.
pub(super) fn read(table: &ReferenceTable, meters: &[Meter]) -> Result<Vec<Price>> {
    let rows: Vec<Located<RawPrice>> = definitions::read(table, "prices", &NESTED)?;
    let mut prices: Vec<Price> = Vec::new();
    for row in &rows {
        if row.value.price_id.is_empty() {
            return Err(row.error("price_id is empty: that stands for usage without a price"));
        }
        let price = validate(row, meters)?;
        for (known, earlier) in prices.iter().zip(&rows) {
            if known.id == price.id {
                return Err(row.error(format!("price_id `{}` is already used by {}", price.id, earlier.place())));
            }
            let same = (&known.plan_id, &known.meter_id, &known.currency, &known.matches)
                == (&price.plan_id, &price.meter_id, &price.currency, &price.matches);
            if same && known.valid.overlaps(price.valid) {
                return Err(row.error(format!(
                    "price `{}` is valid at the same time as `{}` ({}) for the same plan, meter, currency and match: set valid_to on the earlier one",
                    price.id,
                    known.id,
                    earlier.place()
                )));
            }
        }
        prices.push(price);
    }
    Ok(prices)
}

fn validate(row: &Located<RawPrice>, meters: &[Meter]) -> Result<Price> {
    let raw = &row.value;
    let Some(meter) = meters.iter().find(|meter| meter.id == raw.meter_id) else {
        return Err(
            row.error(format!("price `{}` names meter `{}`, which is not in the meters table", raw.price_id, raw.meter_id))
        );
    };
    let currency = Currency::from_code(&raw.currency)
        .ok_or_else(|| row.error(format!("currency `{}` is unknown: use an ISO 4217 code such as USD", raw.currency)))?;
    if meter.unpriced && matches!(meter.window, WindowKind::Hopping(_)) {
        return Err(row.error(format!(
            "price `{}` is of meter `{}`, whose hopping windows overlap: it is for usage only",
            raw.price_id, meter.id
        )));
    }
    let mut matches = Vec::new();
    for (dimension, MatchValue(value)) in &raw.matches {
        if !meter.dimensions.contains(dimension) {
            return Err(row.error(format!("match names `{dimension}`, which is no dimension of meter `{}`", meter.id)));
        }
        matches.push((dimension.clone(), canonical(value)));
    }
    let valid = Span { start: raw.valid_from.unwrap_or(Timestamp::MIN), end: raw.valid_to.unwrap_or(Timestamp::MAX) };
    if valid.end <= valid.start {
        return Err(row.error(format!("valid_to {} is not after valid_from {}", valid.end, valid.start)));
    }
    let model = model(row)?;
    let options = options(row)?;
    check_percentage(row, &model, &options, meter)?;
    let digest = Digest::new("price").text(&currency.code).text(&format!("{model:?} {options:?}")).hex();
    Ok(Price {
        id: raw.price_id.clone(),
        plan_id: raw.plan_id.clone(),
        meter_id: raw.meter_id.clone(),
        currency,
        model,
        options,
        matches,
        valid,
        digest,
    })
}

/// What any model can be given.
fn options(row: &Located<RawPrice>) -> Result<PriceOptions> {
    let raw = &row.value;
    let not_negative = |key: &str, value: Option<Decimal>| match value {
        Some(value) if value.is_negative() => Err(row.error(format!("{key} is negative"))),
        value => Ok(value),
    };
    let (minimum_amount, maximum_amount) =
        (not_negative("minimum_amount", raw.minimum_amount)?, not_negative("maximum_amount", raw.maximum_amount)?);
    if let (Some(least), Some(most)) = (minimum_amount, maximum_amount)
        && least > most
    {
        return Err(row.error(format!("minimum_amount {least} is above maximum_amount {most}")));
    }
    let commitment = raw.commitment.as_ref().map(|raw| {
        let overage_factor = not_negative("commitment.overage_factor", raw.overage_factor)?;
        Ok::<_, anyhow::Error>(Commitment {
            amount: not_negative("commitment.amount", Some(raw.amount))?.unwrap_or_default(),
            overage_factor: overage_factor.unwrap_or(Decimal::ONE),
            true_up: raw.true_up.unwrap_or(false),
        })
    });
    Ok(PriceOptions {
        free_units: not_negative("free_units", raw.free_units)?.unwrap_or_default(),
        transform: raw.transform.as_ref().map(|transform| validate_transform(row, transform)).transpose()?,
        minimum_amount,
        maximum_amount,
        commitment: commitment.transpose()?,
        charge_zero_usage: raw.charge_zero_usage.unwrap_or(true),
        prorate: raw.prorate.unwrap_or(false),
    })
}

fn validate_transform(row: &Located<RawPrice>, raw: &RawTransform) -> Result<Transform> {
    let divide = match raw.operation.as_str() {
        "multiply" => false,
        "divide" => true,
        other => return Err(row.error(format!("transform.operation `{other}` must be multiply or divide"))),
    };
    if raw.factor.is_zero() || raw.factor.is_negative() {
        return Err(row.error("transform.factor must be greater than zero"));
    }
    let rounding = match raw.rounding.as_deref() {
        None | Some("none") => None,
        Some("up") => Some(Rounding::Up),
        Some("down") => Some(Rounding::Down),
        Some("half_up") => Some(Rounding::HalfUp),
        Some(other) => return Err(row.error(format!("transform.rounding `{other}` must be none, up, down or half_up"))),
    };
    let precision = match raw.precision {
        None => 0,
        Some(_) if rounding.is_none() => return Err(row.error("transform.precision needs a rounding: up, down or half_up")),
        Some(places) => whole(places)
            .and_then(|places| u32::try_from(places).ok())
            .filter(|places| *places <= SCALE)
            .ok_or_else(|| row.error(format!("transform.precision {places} must be a whole number from 0 to {SCALE}")))?,
    };
    Ok(Transform { divide, factor: raw.factor, rounding, precision })
}

/// A whole number that is not negative.
fn whole(value: Decimal) -> Option<u64> {
    value.to_string().parse().ok()
}

/// What a price that knows events one by one needs of its meter.
fn check_percentage(row: &Located<RawPrice>, model: &PriceModel, options: &PriceOptions, meter: &Meter) -> Result<()> {
    let PriceModel::Percentage(percentage) = model else { return Ok(()) };
    if !percentage.needs_transactions() {
        return Ok(());
    }
    if meter.aggregation != Aggregation::Sum {
        return Err(row.error(format!(
            "free events, a free amount with a fixed one, and minimum and maximum per event look at single events:              they need aggregation sum, and meter `{}` has another one",
            meter.id
        )));
    }
    if !options.free_units.is_zero() || options.transform.is_some() {
        return Err(
            row.error("free_units and transform change the quantity, but this price looks at single events: use free_amount")
        );
    }
    Ok(())
}

/// The model with exactly the keys that belong to it.
fn model(row: &Located<RawPrice>) -> Result<PriceModel> {
    const OF_PERCENTAGE: [&str; 6] = [
        "rate_percent",
        "fixed_amount_per_event",
        "free_events",
        "free_amount",
        "minimum_amount_per_event",
        "maximum_amount_per_event",
    ];
    let raw = &row.value;
    let keys: &[&str] = match raw.model.as_str() {
        "per_unit" => &["unit_amount"],
        "package" => &["package_size", "amount", "round"],
        "graduated" | "volume" | "graduated_percentage" => &["tiers"],
        "percentage" => &OF_PERCENTAGE,
        "flat" => &["amount"],
        "dynamic" => &["multiplier"],
        other => {
            return Err(row.error(format!(
                "model `{other}` is unknown: use per_unit, package, graduated, volume, percentage, graduated_percentage, dynamic or flat"
            )));
        }
    };
    let given = [
        ("unit_amount", raw.unit_amount.is_some()),
        ("tiers", raw.tiers.is_some()),
        ("package_size", raw.package_size.is_some()),
        ("amount", raw.amount.is_some()),
        ("round", raw.round.is_some()),
        ("multiplier", raw.multiplier.is_some()),
        ("rate_percent", raw.rate_percent.is_some()),
        ("fixed_amount_per_event", raw.fixed_amount_per_event.is_some()),
        ("free_events", raw.free_events.is_some()),
        ("free_amount", raw.free_amount.is_some()),
        ("minimum_amount_per_event", raw.minimum_amount_per_event.is_some()),
        ("maximum_amount_per_event", raw.maximum_amount_per_event.is_some()),
    ];
    if let Some((key, _)) = given.iter().find(|(key, is_given)| *is_given && !keys.contains(key)) {
        return Err(row.error(format!("`{key}` does not belong to model {} (it takes {})", raw.model, keys.join(", "))));
    }
    let needs = |value: Option<Decimal>, key: &str| value.ok_or_else(|| row.error(format!("model {} needs `{key}`", raw.model)));
    match raw.model.as_str() {
        "per_unit" => Ok(PriceModel::PerUnit { unit_amount: needs(raw.unit_amount, "unit_amount")? }),
        "percentage" => percentage(row, needs(raw.rate_percent, "rate_percent")?).map(PriceModel::Percentage),
        "flat" => Ok(PriceModel::Flat { amount: needs(raw.amount, "amount")? }),
        "dynamic" => Ok(PriceModel::Dynamic { multiplier: raw.multiplier.unwrap_or(Decimal::ONE) }),
        "package" => {
            let size = needs(raw.package_size, "package_size")?;
            if size.is_zero() || size.is_negative() {
                return Err(row.error("package_size must be greater than zero"));
            }
            let round_up = match raw.round.as_deref() {
                None | Some("up") => true,
                Some("down") => false,
                Some(other) => return Err(row.error(format!("round `{other}` must be up or down"))),
            };
            Ok(PriceModel::Package { size, amount: needs(raw.amount, "amount")?, round_up })
        }
        "graduated" => tiers(row).map(PriceModel::Graduated),
        "graduated_percentage" => tiers(row).map(PriceModel::GraduatedPercentage),
        _ => tiers(row).map(PriceModel::Volume),
    }
}

fn percentage(row: &Located<RawPrice>, rate_percent: Decimal) -> Result<Percentage> {
    let raw = &row.value;
    let free_events = raw.free_events.map(|events| {
        whole(events).ok_or_else(|| row.error(format!("free_events {events} must be a whole number, not negative")))
    });
    if raw.free_amount.is_some_and(Decimal::is_negative) {
        return Err(row.error("free_amount is negative"));
    }
    if let (Some(least), Some(most)) = (raw.minimum_amount_per_event, raw.maximum_amount_per_event)
        && least > most
    {
        return Err(row.error(format!("minimum_amount_per_event {least} is above maximum_amount_per_event {most}")));
    }
    Ok(Percentage {
        rate_percent,
        fixed_amount_per_event: raw.fixed_amount_per_event.unwrap_or_default(),
        free_events: free_events.transpose()?,
        free_amount: raw.free_amount,
        minimum_amount_per_event: raw.minimum_amount_per_event,
        maximum_amount_per_event: raw.maximum_amount_per_event,
    })
}

fn tiers(row: &Located<RawPrice>) -> Result<Vec<Tier>> {
    let raw = row.value.tiers.as_deref().unwrap_or_default();
    let Some(last) = raw.last() else {
        return Err(row.error(format!("model {} needs `tiers`", row.value.model)));
    };
    if last.up_to.is_some() {
        return Err(row.error("the last tier must have `up_to: null`, so that every quantity has a tier"));
    }
    let of_percentage = row.value.model == "graduated_percentage";
    let (key, foreign) = if of_percentage { ("rate_percent", "unit_amount") } else { ("unit_amount", "rate_percent") };
    let rate = |tier: &RawTier| if of_percentage { tier.rate_percent } else { tier.unit_amount };
    let mut below = Decimal::ZERO;
    for (number, tier) in (1..).zip(raw) {
        if (if of_percentage { tier.unit_amount } else { tier.rate_percent }).is_some() {
            return Err(row.error(format!("tier {number} has {foreign}; tiers of {} have {key}", row.value.model)));
        }
        if rate(tier).is_none() && tier.flat_amount.is_none() {
            return Err(row.error(format!("tier {number} needs {key} or flat_amount")));
        }
        match tier.up_to {
            Some(up_to) if up_to <= below => {
                return Err(
                    row.error(format!("tiers are out of order: tier {number} ends at {up_to}, which is not above {below}"))
                );
            }
            Some(up_to) => below = up_to,
            None if number < raw.len() => {
                return Err(row.error(format!("tier {number} has `up_to: null`, but is not the last")));
            }
            None => {}
        }
    }
    let tier = |raw: &RawTier| Tier {
        up_to: raw.up_to,
        unit_amount: rate(raw).unwrap_or_default(),
        flat_amount: raw.flat_amount.unwrap_or_default(),
    };
    Ok(raw.iter().map(tier).collect())
}

/// As dimensions are written: canonical JSON.
fn canonical(value: &FilterValue) -> String {
    match value {
        FilterValue::Number(number) => number.to_string(),
        FilterValue::Bool(value) => value.to_string(),
        FilterValue::Text(text) => {
            let mut out = String::new();
            write_json_text(text, &mut out);
            out
        }
    }
}
