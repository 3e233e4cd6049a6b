//! The prices table.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::definitions::{self, Located};
use super::is_open_end;
use crate::config::ReferenceTable;
use crate::model::decimal::Decimal;
use crate::model::digest::Digest;
use crate::model::meter::{FilterValue, Meter};
use crate::model::price::{Currency, Price, PriceModel, Tier};
use crate::model::properties::write_json_text;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;

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
    matches: BTreeMap<String, FilterValue>,
    free_units: Option<Decimal>,
    valid_from: Option<Timestamp>,
    #[serde(default, deserialize_with = "end")]
    valid_to: Option<Timestamp>,
    // Known to the format, not to this version.
    multiplier: Option<Value>,
    fixed_amount_per_event: Option<Value>,
    free_events: Option<Value>,
    free_amount: Option<Value>,
    minimum_amount_per_event: Option<Value>,
    maximum_amount_per_event: Option<Value>,
    minimum_amount: Option<Value>,
    maximum_amount: Option<Value>,
    commitment: Option<Value>,
    transform: Option<Value>,
    charge_zero_usage: Option<Value>,
    prorate: Option<Value>,
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
    flat_amount: Option<Decimal>,
}

const NESTED: [&str; 4] = ["tiers", "match", "commitment", "transform"];

/// Reads and validates all prices.
pub(super) fn read(table: &ReferenceTable, meters: &[Meter]) -> Result<Vec<Price>> {
    let rows: Vec<Located<RawPrice>> = definitions::read(table, "prices", &NESTED)?;
    let mut prices: Vec<Price> = Vec::new();
    for row in &rows {
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
    reject_unavailable(row)?;
    let Some(meter) = meters.iter().find(|meter| meter.id == raw.meter_id) else {
        return Err(
            row.error(format!("price `{}` names meter `{}`, which is not in the meters table", raw.price_id, raw.meter_id))
        );
    };
    let currency = Currency::from_code(&raw.currency)
        .ok_or_else(|| row.error(format!("currency `{}` is unknown: use an ISO 4217 code such as USD", raw.currency)))?;
    let free_units = raw.free_units.unwrap_or_default();
    if free_units.is_negative() {
        return Err(row.error("free_units is negative"));
    }
    let mut matches = Vec::new();
    for (dimension, value) in &raw.matches {
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
    let digest = Digest::new("price").text(&currency.code).text(&format!("{model:?} {free_units}")).hex();
    Ok(Price {
        id: raw.price_id.clone(),
        plan_id: raw.plan_id.clone(),
        meter_id: raw.meter_id.clone(),
        currency,
        model,
        free_units,
        matches,
        valid,
        digest,
    })
}

fn reject_unavailable(row: &Located<RawPrice>) -> Result<()> {
    let raw = &row.value;
    let given = [
        ("multiplier", &raw.multiplier),
        ("fixed_amount_per_event", &raw.fixed_amount_per_event),
        ("free_events", &raw.free_events),
        ("free_amount", &raw.free_amount),
        ("minimum_amount_per_event", &raw.minimum_amount_per_event),
        ("maximum_amount_per_event", &raw.maximum_amount_per_event),
        ("minimum_amount", &raw.minimum_amount),
        ("maximum_amount", &raw.maximum_amount),
        ("commitment", &raw.commitment),
        ("transform", &raw.transform),
        ("charge_zero_usage", &raw.charge_zero_usage),
        ("prorate", &raw.prorate),
    ];
    match given.iter().find(|(_, value)| value.is_some()) {
        Some((key, _)) => Err(row.error(format!("`{key}` of price `{}` is not available in this version", raw.price_id))),
        None => Ok(()),
    }
}

/// The model with exactly the keys that belong to it.
fn model(row: &Located<RawPrice>) -> Result<PriceModel> {
    let raw = &row.value;
    let keys: &[&str] = match raw.model.as_str() {
        "per_unit" => &["unit_amount"],
        "package" => &["package_size", "amount", "round"],
        "graduated" | "volume" => &["tiers"],
        "percentage" => &["rate_percent"],
        "flat" | "dynamic" | "graduated_percentage" => {
            return Err(row.error(format!("model {} is not available in this version", raw.model)));
        }
        other => {
            return Err(row.error(format!("model `{other}` is unknown: use per_unit, package, graduated, volume or percentage")));
        }
    };
    let given = [
        ("unit_amount", raw.unit_amount.is_some()),
        ("tiers", raw.tiers.is_some()),
        ("package_size", raw.package_size.is_some()),
        ("amount", raw.amount.is_some()),
        ("round", raw.round.is_some()),
        ("rate_percent", raw.rate_percent.is_some()),
    ];
    if let Some((key, _)) = given.iter().find(|(key, is_given)| *is_given && !keys.contains(key)) {
        return Err(row.error(format!("`{key}` does not belong to model {} (it takes {})", raw.model, keys.join(", "))));
    }
    let needs = |value: Option<Decimal>, key: &str| value.ok_or_else(|| row.error(format!("model {} needs `{key}`", raw.model)));
    match raw.model.as_str() {
        "per_unit" => Ok(PriceModel::PerUnit { unit_amount: needs(raw.unit_amount, "unit_amount")? }),
        "percentage" => Ok(PriceModel::Percentage { rate_percent: needs(raw.rate_percent, "rate_percent")? }),
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
        _ => tiers(row).map(PriceModel::Volume),
    }
}

fn tiers(row: &Located<RawPrice>) -> Result<Vec<Tier>> {
    let raw = row.value.tiers.as_deref().unwrap_or_default();
    let Some(last) = raw.last() else {
        return Err(row.error(format!("model {} needs `tiers`", row.value.model)));
    };
    if last.up_to.is_some() {
        return Err(row.error("the last tier must have `up_to: null`, so that every quantity has a tier"));
    }
    let mut below = Decimal::ZERO;
    for (number, tier) in (1..).zip(raw) {
        if tier.unit_amount.is_none() && tier.flat_amount.is_none() {
            return Err(row.error(format!("tier {number} needs unit_amount or flat_amount")));
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
        unit_amount: raw.unit_amount.unwrap_or_default(),
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
