//! The meters table.

use anyhow::Result;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::definitions::{self, Located};
use crate::config::ReferenceTable;
use crate::model::decimal::Decimal;
use crate::model::digest::Digest;
use crate::model::expression::Expression;
use crate::model::meter::{Aggregation, ChargeOn, Comparison, Filter, FilterTest, FilterValue, Input, Meter};
use crate::model::window::{Hopping, Length, WindowKind, WindowSize};

/// A meter as people write it. Unknown keys are errors.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMeter {
    meter_id: String,
    event_name: String,
    aggregation: String,
    property: Option<String>,
    #[serde(default)]
    filters: Vec<RawFilter>,
    #[serde(default)]
    dimensions: Vec<String>,
    window: Option<Value>,
    charge_on: Option<String>,
    #[serde(default, deserialize_with = "boolean")]
    unpriced: bool,
    expression: Option<String>,
    multiplier: Option<Decimal>,
    operation_property: Option<String>,
}

/// A window that is no tumbling one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
enum RawWindow {
    Hopping { size: String, advance: String },
    Session { gap: String },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFilter {
    property: String,
    op: String,
    #[serde(default, deserialize_with = "some_value")]
    value: Option<FilterValue>,
    #[serde(default)]
    values: Vec<FilterValue>,
}

const NESTED: [&str; 2] = ["filters", "dimensions"];

/// Reads and validates all meters. `window` is for those that name none.
pub(super) fn read(table: &ReferenceTable, window: WindowSize) -> Result<Vec<Meter>> {
    let rows: Vec<Located<RawMeter>> = definitions::read(table, "meters", &NESTED)?;
    let mut meters: Vec<Meter> = Vec::new();
    for row in &rows {
        let meter = validate(row, window)?;
        if let Some(first) = rows.iter().zip(&meters).find(|(_, known)| known.id == meter.id).map(|(row, _)| row) {
            return Err(row.error(format!("meter_id `{}` is already used by {}", meter.id, first.place())));
        }
        meters.push(meter);
    }
    if meters.is_empty() {
        return Err(crate::fault::configuration(format!("{table}: has no meter")));
    }
    Ok(meters)
}

fn validate(row: &Located<RawMeter>, default_window: WindowSize) -> Result<Meter> {
    let raw = &row.value;
    let aggregation = named(&Aggregation::NAMES, &raw.aggregation)
        .ok_or_else(|| row.error(unknown("aggregation", &raw.aggregation, &Aggregation::NAMES)))?;
    let input = input(row, aggregation)?;
    let operation_property = given(&raw.operation_property);
    if operation_property.is_some() && aggregation != Aggregation::CountUnique {
        return Err(row.error(format!("operation_property belongs to count_unique, not to {}", raw.aggregation)));
    }
    let multiplier = match (aggregation, raw.multiplier) {
        (Aggregation::SumWithMultiplier, Some(multiplier)) => multiplier,
        (Aggregation::SumWithMultiplier, None) => return Err(row.error("aggregation sum_with_multiplier needs `multiplier`")),
        (_, None) => Decimal::ONE,
        (_, Some(_)) => return Err(row.error(format!("multiplier belongs to sum_with_multiplier, not to {}", raw.aggregation))),
    };
    let window = window(row, default_window)?;
    if aggregation == Aggregation::WeightedSum && !matches!(window, WindowKind::Tumbling(_)) {
        return Err(row.error("weighted_sum needs a tumbling window, such as day: a level lasts, whatever events come"));
    }
    if matches!(window, WindowKind::Hopping(_)) && !raw.unpriced {
        return Err(row.error("hopping windows overlap and are for usage only: declare the meter `unpriced: true`"));
    }
    let charge_on = match raw.charge_on.as_deref() {
        None => ChargeOn::Period,
        Some(name) => named(&ChargeOn::NAMES, name).ok_or_else(|| row.error(unknown("charge_on", name, &ChargeOn::NAMES)))?,
    };
    if matches!(window, WindowKind::Hopping(_)) && charge_on != ChargeOn::Period {
        return Err(row.error("hopping windows overlap: their sum is no usage, so charge_on must be period"));
    }
    let filters = raw.filters.iter().map(|filter| validate_filter(row, filter)).collect::<Result<Vec<_>>>()?;
    for (key, text) in [("meter_id", &raw.meter_id), ("event_name", &raw.event_name)] {
        if text.is_empty() {
            return Err(row.error(format!("{key} is empty")));
        }
    }
    let mut dimensions = raw.dimensions.clone();
    dimensions.sort();
    if dimensions.iter().any(String::is_empty) {
        return Err(row.error("a dimension is empty: name a property"));
    }
    if let Some(twice) = dimensions.iter().zip(dimensions.iter().skip(1)).find(|(a, b)| a == b) {
        return Err(row.error(format!("dimension `{}` is named twice", twice.0)));
    }
    let digest = Digest::new("meter")
        .text(&raw.event_name)
        .text(&input_text(&input))
        .text(&format!("{aggregation:?} {multiplier} {operation_property:?} {filters:?} {dimensions:?} {window:?} {charge_on:?}"))
        .hex();
    Ok(Meter {
        id: raw.meter_id.clone(),
        event_name: raw.event_name.clone(),
        aggregation,
        input,
        operation_property,
        multiplier,
        filters,
        dimensions,
        window,
        charge_on,
        unpriced: raw.unpriced,
        digest,
    })
}

fn given(text: &Option<String>) -> Option<String> {
    text.clone().filter(|text| !text.is_empty())
}

fn input(row: &Located<RawMeter>, aggregation: Aggregation) -> Result<Input> {
    let raw = &row.value;
    match (aggregation, given(&raw.property), given(&raw.expression)) {
        (Aggregation::Count, None, None) => Ok(Input::Event),
        (Aggregation::Count, ..) => {
            Err(row.error("aggregation count counts events: remove `property` and `expression`, or filter with op exists"))
        }
        (_, Some(_), Some(_)) => Err(row.error("`property` and `expression` exclude each other: keep one")),
        (_, None, None) => Err(row.error(format!("aggregation {} needs `property`", raw.aggregation))),
        (_, Some(property), None) => Ok(Input::Property(property)),
        (aggregation, None, Some(_)) if aggregation.is_of_values() => {
            Err(row.error(format!("aggregation {} counts values of a `property`, not of an expression", raw.aggregation)))
        }
        (_, None, Some(text)) => {
            let parsed = Expression::parse(&text);
            parsed
                .map(Box::new)
                .map(Input::Expression)
                .map_err(|error| row.error(format!("expression `{text}` cannot be read: {error}")))
        }
    }
}

/// What of an input can change a quantity.
fn input_text(input: &Input) -> String {
    match input {
        Input::Event => String::new(),
        Input::Property(property) => format!("property {property}"),
        Input::Expression(expression) => format!("expression {}", expression.text()),
    }
}

fn window(row: &Located<RawMeter>, default: WindowSize) -> Result<WindowKind> {
    let names = WindowSize::NAMES.get(..9).unwrap_or_default();
    let length = |key: &str, text: &str| {
        Length::parse(text).ok_or_else(|| row.error(format!("{key} `{text}` is no length such as 15m, 1h or 1d, up to 3660d")))
    };
    let written = match &row.value.window {
        None | Some(Value::Null) => return Ok(WindowKind::Tumbling(default)),
        Some(Value::String(name)) => {
            let size = WindowSize::parse(name).ok_or_else(|| row.error(unknown("window", name, names)))?;
            return Ok(WindowKind::Tumbling(size));
        }
        Some(other) => serde_json::from_value::<RawWindow>(other.clone()).map_err(|error| {
            row.error(format!(
                "window {other}: {error}: use a name such as hour, {{hopping: {{size: 1h, advance: 15m}}}} or {{session: {{gap: 30m}}}}"
            ))
        })?,
    };
    match written {
        RawWindow::Hopping { size, advance } => {
            let hopping = Hopping::new(length("size", &size)?, length("advance", &advance)?);
            hopping
                .map(WindowKind::Hopping)
                .map_err(|error| row.error(format!("hopping window of {size} every {advance}: {error}")))
        }
        RawWindow::Session { gap } => Ok(WindowKind::Session { gap_nanos: length("gap", &gap)?.nominal_nanos() }),
    }
}

fn validate_filter(row: &Located<RawMeter>, raw: &RawFilter) -> Result<Filter> {
    let values: Vec<FilterValue> = raw.value.iter().chain(&raw.values).cloned().collect();
    let single = || match values.as_slice() {
        [value] => Ok(value.clone()),
        _ => Err(row.error(format!("filter {} on `{}` needs one value", raw.op, raw.property))),
    };
    let compare = |comparison: Comparison| {
        let bound: Option<Decimal> = match single()? {
            FilterValue::Number(number) => Some(number),
            FilterValue::Text(text) => text.parse().ok(),
            FilterValue::Bool(_) => None,
        };
        let bound = bound.ok_or_else(|| row.error(format!("filter {} on `{}` needs a number", raw.op, raw.property)))?;
        Ok::<_, anyhow::Error>(FilterTest::Compare(comparison, bound))
    };
    let some = || {
        if values.is_empty() {
            return Err(row.error(format!("filter {} on `{}` needs values", raw.op, raw.property)));
        }
        Ok(values.clone())
    };
    let test = match raw.op.as_str() {
        "eq" => FilterTest::In(vec![single()?]),
        "ne" => FilterTest::NotIn(vec![single()?]),
        "in" => FilterTest::In(some()?),
        "not_in" => FilterTest::NotIn(some()?),
        "exists" | "not_exists" if !values.is_empty() => {
            return Err(row.error(format!("filter {} on `{}` takes no value", raw.op, raw.property)));
        }
        "exists" => FilterTest::Exists(true),
        "not_exists" => FilterTest::Exists(false),
        "gt" => compare(Comparison::Greater)?,
        "gte" => compare(Comparison::GreaterOrEqual)?,
        "lt" => compare(Comparison::Less)?,
        "lte" => compare(Comparison::LessOrEqual)?,
        "contains" => match single()? {
            FilterValue::Text(text) => FilterTest::Contains(text),
            FilterValue::Number(number) => FilterTest::Contains(number.to_string()),
            FilterValue::Bool(value) => FilterTest::Contains(value.to_string()),
        },
        other => {
            return Err(row.error(format!(
                "filter op `{other}` is unknown: use eq, ne, in, not_in, exists, not_exists, gt, gte, lt, lte or contains"
            )));
        }
    };
    Ok(Filter { property: raw.property.clone(), test })
}

pub(super) fn named<T: Copy>(names: &[(&str, T)], name: &str) -> Option<T> {
    names.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
}

pub(super) fn unknown<T>(key: &str, name: &str, names: &[(&str, T)]) -> String {
    let names: Vec<_> = names.iter().map(|(known, _)| *known).collect();
    format!("{key} `{name}` is unknown: use one of {}", names.join(", "))
}

/// `true`, or the text of it, as tables have it.
pub(super) fn boolean<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    match FilterValue::deserialize(deserializer)? {
        FilterValue::Bool(value) => Ok(value),
        FilterValue::Text(text) if text.eq_ignore_ascii_case("true") || text == "1" => Ok(true),
        FilterValue::Text(text) if text.eq_ignore_ascii_case("false") || text == "0" || text.is_empty() => Ok(false),
        FilterValue::Text(text) => Err(serde::de::Error::custom(format!("`{text}` is neither true nor false"))),
        _ => Err(serde::de::Error::custom("this must be true or false")),
    }
}

fn some_value<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<FilterValue>, D::Error> {
    FilterValue::deserialize(deserializer).map(Some)
}

impl<'de> Deserialize<'de> for FilterValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Scalar { advice: "quote it, with all its digits and no exponent" })
    }
}

/// Reads a text, a number, or true or false.
pub(super) struct Scalar {
    /// What to do about a number whose digits may be lost.
    pub advice: &'static str,
}

impl serde::de::Visitor<'_> for Scalar {
    type Value = FilterValue;
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a text, a number, or true or false")
    }
    fn visit_str<E>(self, text: &str) -> Result<FilterValue, E> {
        Ok(FilterValue::Text(text.to_owned()))
    }
    fn visit_bool<E>(self, value: bool) -> Result<FilterValue, E> {
        Ok(FilterValue::Bool(value))
    }
    fn visit_u64<E>(self, value: u64) -> Result<FilterValue, E> {
        Ok(FilterValue::Number(Decimal::from_u64(value)))
    }
    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<FilterValue, E> {
        value.to_string().parse().map(FilterValue::Number).map_err(E::custom)
    }
    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<FilterValue, E> {
        let lost = || E::custom(format!("a number near {value:?} is read by its first 15 digits alone: {}", self.advice));
        exact(value).map(FilterValue::Number).ok_or_else(lost)
    }
}

/// What was written, where a float tells: it is below 2^53, and the shortest text that
/// reads back as this float has up to 15 digits.
fn exact(value: f64) -> Option<Decimal> {
    let digits = format!("{value:e}").bytes().take_while(|byte| *byte != b'e').filter(u8::is_ascii_digit).count();
    let number: Decimal = value.to_string().parse().ok()?;
    (digits <= 15 && number.abs() < Decimal::from_u64(1 << 53)).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_every_digit_or_are_refused() {
        let json = |text: &str| serde_json::from_str::<FilterValue>(text).map_err(|error| error.to_string());
        let yaml = |text: &str| serde_saphyr::from_str::<FilterValue>(text).map_err(|error| error.to_string());
        for (text, number) in [
            ("0.5", "0.5"),
            ("-0.25", "-0.25"),
            ("1e3", "1000"),
            ("12345678.9012345", "12345678.9012345"),
            ("0.000000000000001", "0.000000000000001"),
            ("9007199254740993", "9007199254740993"),
            ("18446744073709551615", "18446744073709551615"),
            ("-9223372036854775808", "-9223372036854775808"),
        ] {
            let expected = FilterValue::Number(number.parse().unwrap());
            assert_eq!((json(text).as_ref(), yaml(text).as_ref()), (Ok(&expected), Ok(&expected)), "{text}");
        }
        for text in ["20000000000000000001", "-20000000000000000001", "1234567890.123456789", "9007199254740993.0", "1e25"] {
            for read in [json(text), yaml(text)] {
                assert!(read.clone().is_err_and(|error| error.contains("quote it")), "{text}: {read:?}");
            }
            let quoted = format!("\"{text}\"");
            assert_eq!((json(&quoted), yaml(&quoted)), (Ok(FilterValue::Text(text.into())), Ok(FilterValue::Text(text.into()))));
        }
    }
}
