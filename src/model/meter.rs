//! Meters: which events count, and how.

use std::cmp::Ordering;

use serde_json::value::RawValue;

use super::decimal::Decimal;
use super::expression::Expression;
use super::property::{Property, is_composite};
use super::window::WindowKind;

/// How the events of a window become one quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aggregation {
    Count,
    Sum,
    Avg,
    Min,
    Max,
    /// The value of the last event by event time, then ingestion time, then id.
    Latest,
    /// Distinct values, exact.
    CountUnique,
    /// Distinct values by a HyperLogLog sketch.
    CountUniqueApprox,
    /// A level that events change, weighted with the time that it lasts, over the
    /// length of the billing period.
    WeightedSum,
    /// The sum times the meter's multiplier.
    SumWithMultiplier,
}

impl Aggregation {
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, aggregation)| *aggregation == self).map_or("", |(name, _)| name)
    }

    /// Every aggregation by the name that a meter gives it.
    pub const NAMES: [(&'static str, Aggregation); 10] = [
        ("count", Aggregation::Count),
        ("sum", Aggregation::Sum),
        ("avg", Aggregation::Avg),
        ("min", Aggregation::Min),
        ("max", Aggregation::Max),
        ("latest", Aggregation::Latest),
        ("count_unique", Aggregation::CountUnique),
        ("count_unique_approx", Aggregation::CountUniqueApprox),
        ("weighted_sum", Aggregation::WeightedSum),
        ("sum_with_multiplier", Aggregation::SumWithMultiplier),
    ];

    /// Whether it counts distinct values of any kind, not only numbers.
    pub fn is_of_values(self) -> bool {
        matches!(self, Aggregation::CountUnique | Aggregation::CountUniqueApprox)
    }
}

/// What the quantity of a billing period is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChargeOn {
    /// The aggregation over all events of the period.
    Period,
    /// The sum of the quantities of its windows.
    WindowSum,
    /// Each window is priced on its own.
    Window,
}

impl ChargeOn {
    pub const NAMES: [(&'static str, ChargeOn); 3] =
        [("period", ChargeOn::Period), ("window_sum", ChargeOn::WindowSum), ("window", ChargeOn::Window)];

    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, charge_on)| *charge_on == self).map_or("", |(name, _)| name)
    }
}

/// A meter, validated.
#[derive(Debug, Clone)]
pub struct Meter {
    pub id: String,
    pub event_name: String,
    pub aggregation: Aggregation,
    pub input: Input,
    /// Where `count_unique` is told whether a value is added or removed.
    pub operation_property: Option<String>,
    /// Of `sum_with_multiplier`; 1 for all others.
    pub multiplier: Decimal,
    pub filters: Vec<Filter>,
    /// Property paths, sorted.
    pub dimensions: Vec<String>,
    pub window: WindowKind,
    pub charge_on: ChargeOn,
    /// Usage only: no price is looked up.
    pub unpriced: bool,
    /// Changes when anything that can change a quantity changes.
    pub digest: String,
}

impl Meter {
    /// Whether it measures a level, which is carried from one window into the next.
    pub fn keeps_a_level(&self) -> bool {
        self.aggregation == Aggregation::WeightedSum
    }
}

/// What of an event is aggregated.
#[derive(Debug, Clone)]
pub enum Input {
    /// The event itself.
    Event,
    /// The property with this path.
    Property(String),
    Expression(Box<Expression>),
}

/// A condition on one property. All filters of a meter must pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Filter {
    pub property: String,
    pub test: FilterTest,
}

#[derive(Debug, Clone, PartialEq)]
pub enum FilterTest {
    /// `eq`, `in`: one of the values.
    In(Vec<FilterValue>),
    /// `ne`, `not_in`: none of the values; an absent property passes.
    NotIn(Vec<FilterValue>),
    /// `exists` (true), `not_exists` (false); null counts as absent.
    Exists(bool),
    /// `gt`, `gte`, `lt`, `lte`; a property that is no number does not pass.
    Compare(Comparison, Decimal),
    /// `contains`: part of the text, or an element of the array.
    Contains(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
}

impl Comparison {
    fn name(self) -> &'static str {
        match self {
            Comparison::Greater => "gt",
            Comparison::GreaterOrEqual => "gte",
            Comparison::Less => "lt",
            Comparison::LessOrEqual => "lte",
        }
    }

    fn holds(self, ordering: Ordering) -> bool {
        match self {
            Comparison::Greater => ordering.is_gt(),
            Comparison::GreaterOrEqual => ordering.is_ge(),
            Comparison::Less => ordering.is_lt(),
            Comparison::LessOrEqual => ordering.is_le(),
        }
    }
}

/// A value to compare with: numbers compare as numbers, text as text.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(untagged)]
pub enum FilterValue {
    Number(Decimal),
    Text(String),
    Bool(bool),
}

impl FilterValue {
    fn equals(&self, property: &Property<'_>) -> bool {
        match self {
            FilterValue::Number(number) => property.decimal() == Ok(*number),
            FilterValue::Text(text) => match property {
                Property::Composite(raw) => is_composite(raw, text),
                property => property.is_present() && property.text() == text.as_str(),
            },
            FilterValue::Bool(value) => match property {
                Property::Composite(_) => false,
                property => property.text() == if *value { "true" } else { "false" },
            },
        }
    }
}

impl std::fmt::Display for Filter {
    /// `status lt 500`, `model in large, small`: as the meters file writes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |values: &[FilterValue]| values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let (test, values) = match &self.test {
            FilterTest::In(values) => (if values.len() == 1 { "eq" } else { "in" }, list(values)),
            FilterTest::NotIn(values) => (if values.len() == 1 { "ne" } else { "not_in" }, list(values)),
            FilterTest::Exists(true) => return write!(f, "{} exists", self.property),
            FilterTest::Exists(false) => return write!(f, "{} not_exists", self.property),
            FilterTest::Compare(comparison, bound) => (comparison.name(), bound.to_string()),
            FilterTest::Contains(part) => ("contains", part.clone()),
        };
        write!(f, "{} {test} {values}", self.property)
    }
}

impl std::fmt::Display for FilterValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FilterValue::Number(number) => number.fmt(f),
            FilterValue::Text(text) => f.write_str(text),
            FilterValue::Bool(value) => value.fmt(f),
        }
    }
}

impl FilterTest {
    pub fn passes(&self, property: &Property<'_>) -> bool {
        match self {
            FilterTest::In(values) => values.iter().any(|value| value.equals(property)),
            FilterTest::NotIn(values) => !values.iter().any(|value| value.equals(property)),
            FilterTest::Exists(wanted) => property.is_present() == *wanted,
            FilterTest::Compare(comparison, bound) => property.compare(*bound).is_some_and(|ordering| comparison.holds(ordering)),
            FilterTest::Contains(part) => match property {
                Property::Composite(raw) => serde_json::from_str::<Vec<&RawValue>>(raw)
                    .is_ok_and(|items| items.iter().any(|item| is_element(item.get(), part))),
                property => property.is_present() && property.text().contains(part.as_str()),
            },
        }
    }
}

/// Whether an array's element is what a filter writes as `text`.
fn is_element(raw: &str, text: &str) -> bool {
    match Property::from_raw(raw) {
        Property::Composite(raw) => is_composite(raw, text),
        Property::Null => text == "null",
        element => element.text() == text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_compare_numbers_as_numbers_and_text_as_text() {
        let number = FilterTest::In(vec![FilterValue::Number("200".parse().unwrap())]);
        let text = FilterTest::In(vec![FilterValue::Text("200".into())]);
        assert!(number.passes(&Property::Number("200.0")) && number.passes(&Property::Text("200".into())));
        assert!(text.passes(&Property::Number("200")) && !text.passes(&Property::Text("200.0".into())));
        let not = FilterTest::NotIn(vec![FilterValue::Text("a".into())]);
        assert!(not.passes(&Property::Absent) && not.passes(&Property::Null) && !not.passes(&Property::Text("a".into())));
        let greater = FilterTest::Compare(Comparison::Greater, "1.5".parse().unwrap());
        assert!(greater.passes(&Property::Number("1.50000001")) && !greater.passes(&Property::Text("x".into())));
        let contains = FilterTest::Contains("eu".into());
        assert!(contains.passes(&Property::Text("neutral".into())) && contains.passes(&Property::Composite(r#"["us","eu"]"#)));
        assert!(!contains.passes(&Property::Composite(r#"["eur"]"#)) && !contains.passes(&Property::Absent));
        assert!(FilterTest::Exists(false).passes(&Property::Null));
    }

    #[test]
    fn numbers_of_too_many_digits_are_beyond_every_bound() {
        use Comparison::{Greater, GreaterOrEqual, Less, LessOrEqual};
        let passing = |property: &Property<'_>, bound: &str| {
            [Greater, GreaterOrEqual, Less, LessOrEqual]
                .map(|comparison| FilterTest::Compare(comparison, bound.parse().unwrap()).passes(property))
        };
        for bound in ["0", "99999999999999999999", "-99999999999999999999"] {
            for large in [Property::Number("1e25"), Property::Text(" 100000000000000000000".into())] {
                assert_eq!(passing(&large, bound), [true, true, false, false], "{large:?} {bound}");
            }
            for small in [Property::Number("-1e25"), Property::Text(" -100000000000000000000".into())] {
                assert_eq!(passing(&small, bound), [false, false, true, true], "{small:?} {bound}");
            }
            assert_eq!(passing(&Property::Text("1e".into()), bound), [false; 4]);
        }
    }

    #[test]
    fn arrays_contain_values_and_keep_every_digit() {
        let contains = |raw, part: &str| FilterTest::Contains(part.into()).passes(&Property::Composite(raw));
        let long = "[12345678901234567890123, 0.1234567890123456789]";
        assert!(contains(long, "12345678901234567890123") && !contains(long, "12345678901234567890124"));
        assert!(contains(long, "0.123456789012345679") && !contains(long, "0.12345678901234568"));
        assert!(contains("[1.0, 2]", "1") && contains("[ 10e-1 ]", "1") && !contains("[1.5]", "1"));
        assert!(contains(r#"["a\u0062", true, null]"#, "ab") && contains("[true]", "true") && contains("[null]", "null"));
        assert!(contains(r#"[{"b": 1.0, "a": [2]}]"#, r#"{"a":[2],"b":1}"#) && !contains(r#"{"a":1}"#, "1"));
    }

    #[test]
    fn composites_are_equal_however_they_are_written() {
        let is_in = |raw, text: &str| FilterTest::In(vec![FilterValue::Text(text.into())]).passes(&Property::Composite(raw));
        for raw in [r#"{"a":1,"b":[2]}"#, r#"{ "b": [2.0], "a": 1e0 }"#] {
            assert!(is_in(raw, r#"{"a":1,"b":[2]}"#) && is_in(raw, r#" {"b": [2], "a": 1}"#));
            assert!(!is_in(raw, r#"{"a":1}"#) && !is_in(raw, "[2]") && !is_in(raw, "") && !is_in(raw, r#"{"a":1,"b":[2]"#));
            assert_eq!(Property::Composite(raw).text(), r#"{"a":1,"b":[2]}"#);
        }
        assert!(!FilterTest::In(vec![FilterValue::Bool(true)]).passes(&Property::Composite("[true]")));
    }
}
