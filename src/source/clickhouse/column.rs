//! Columns as the server describes them, and what is asked of them in SQL.

use anyhow::{Context, Result, bail};

use crate::clickhouse_client::{identifier, literal};
use crate::model::columns::Field;
use crate::model::timestamp::SECOND;
use crate::model::window::Span;

/// Seconds since 1970. From there on an instant is none of an event, and further on it is too
/// late for nanoseconds.
const YEAR_2200: i64 = 7_258_118_400;
/// Texts that are the same instant here and on the server, which reads others too, as numbers.
const INSTANT: &str = "^(19[0-9]|20[0-9]|21[0-8])[0-9]-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])\
    ([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]{1,18})?)?(Z| UTC|[+-]([01][0-9]|2[0-3])(:?[0-5][0-9])?)?)?$";

/// A column as the server describes it.
pub struct Column {
    pub name: String,
    pub type_name: String,
}

impl Column {
    /// The type within `LowCardinality` and `Nullable`, and whether there can be nulls.
    fn inner_type(&self) -> (&str, bool) {
        let whole = self.type_name.as_str();
        let inner = whole.strip_prefix("LowCardinality(").unwrap_or(whole);
        let plain = inner.strip_prefix("Nullable(");
        (plain.unwrap_or(inner).trim_end_matches(')'), plain.is_some())
    }

    fn starts_with(&self, types: &[&str]) -> bool {
        types.iter().any(|start| self.inner_type().0.starts_with(start))
    }

    pub fn is_text(&self) -> bool {
        self.starts_with(&["String", "FixedString", "Enum"])
    }

    pub fn is_date_time(&self) -> bool {
        self.starts_with(&["DateTime"])
    }

    /// Whether its type reaches beyond what nanoseconds can hold.
    fn is_wide(&self) -> bool {
        self.starts_with(&["DateTime64", "Date32"])
    }

    /// The column as an instant, for conditions; text that is none becomes NULL.
    pub fn instant(&self) -> String {
        let name = identifier(&self.name);
        if !self.is_text() {
            return name;
        }
        format!(
            "if(match(toString({name}), {0}), parseDateTime64BestEffortOrNull(toString({name}), 9, 'UTC'), NULL)",
            literal(INSTANT)
        )
    }

    /// The condition that a row has no instant of an event here; `None` where all have.
    pub fn lacks_instant(&self) -> Option<String> {
        let is_null = (self.is_text() || self.inner_type().1).then(|| format!("{} IS NULL", self.instant()));
        let is_late = self.is_wide().then(|| format!("{} >= {}", identifier(&self.name), seconds(YEAR_2200)));
        is_null.into_iter().chain(is_late).reduce(|one, other| format!("{one} OR {other}"))
    }

    /// The condition that a row's instant lies in the whole seconds of a span. They are compared
    /// as seconds, for instants too late for nanoseconds are an error of the server.
    pub fn is_in(&self, span: Span) -> String {
        let (start, end) = (span.start.nanos(), span.end.nanos().saturating_add(SECOND - 1));
        let [start, end] = [start, end].map(|nanos| seconds(nanos.div_euclid(SECOND).clamp(-YEAR_2200, YEAR_2200)));
        format!("{0} >= {start} AND {0} < {end}", self.instant())
    }

    /// The instant in nanoseconds since 1970, which is also that of rows without one.
    pub fn nanos(&self) -> String {
        let time = match self.lacks_instant() {
            Some(lacks) => format!("if({lacks}, {}, {})", seconds(0), self.instant()),
            None => self.instant(),
        };
        format!("ifNull(toUnixTimestamp64Nano(toDateTime64({time}, 9, 'UTC')), 0)")
    }

    /// The column as what rows are joined by. NULL equals nothing in SQL: it is empty here.
    pub fn key(&self) -> String {
        let name = identifier(&self.name);
        if self.inner_type().1 { format!("ifNull(toString({name}), '')") } else { name }
    }

    /// The condition that the column says `text`, or nothing.
    pub fn is_or_null(&self, text: &str) -> String {
        let is = format!("toString({}) = {}", identifier(&self.name), literal(text));
        if self.inner_type().1 { format!("ifNull({is}, 1)") } else { is }
    }

    /// The column of a field, in a type that Arrow carries well. `origin` is what people call the source.
    ///
    /// # Errors
    /// Where its type is none of the field.
    pub fn expression(&self, field: Field, origin: &str) -> Result<String> {
        let name = identifier(&self.name);
        let wrong = |expected: &str| {
            format!(
                "{origin}: column `{}` is {}, expected {expected}: cast it in source.query, or name another in source.columns, \
                 `{}: <column>`",
                self.name,
                self.type_name,
                field.name()
            )
        };
        Ok(match field {
            Field::Timestamp | Field::IngestedAt if self.is_wide() => {
                format!("toDateTime64(if({name} >= {0}, {0}, {name}), 9, 'UTC')", seconds(YEAR_2200))
            }
            Field::Timestamp | Field::IngestedAt if self.starts_with(&["Date"]) => format!("toDateTime64({name}, 9, 'UTC')"),
            Field::Timestamp | Field::IngestedAt if !self.is_text() => bail!(wrong("a date and time, or RFC 3339 text")),
            Field::Properties => {
                let text =
                    if self.is_text() { format!("CAST({name} AS Nullable(String))") } else { format!("toJSONString({name})") };
                // One byte that is no UTF-8 would end the whole stream: this is no JSON, and a dead letter.
                valid(&text, &format!("toValidUTF8(concat('no UTF-8: ', {text}))"))
            }
            Field::Deleted if !self.is_text() => {
                if !self.starts_with(&["Bool", "Int", "UInt", "Nothing"]) || self.starts_with(&["Interval"]) {
                    bail!(wrong("a boolean, a whole number, or text that says true or false"));
                }
                format!("toUInt8(ifNull({name}, 0) != 0)")
            }
            // What is empty is missing.
            _ => valid(&format!("CAST({name} AS Nullable(String))"), "''"),
        })
    }
}

/// A text, or `otherwise` where it is no UTF-8.
fn valid(text: &str, otherwise: &str) -> String {
    format!("if(ifNull(isValidUTF8({text}), 1), {text}, {otherwise})")
}

/// The columns that a source has, by field.
pub struct Layout(pub Vec<(Field, Column)>);

impl Layout {
    pub fn get(&self, field: Field) -> Option<&Column> {
        self.0.iter().find(|(known, _)| *known == field).map(|(_, column)| column)
    }

    /// # Errors
    /// Where there is no such column.
    pub fn require(&self, field: Field) -> Result<&Column> {
        self.get(field).with_context(|| format!("column for {} is missing", field.name()))
    }
}

/// An instant of whole seconds since 1970.
fn seconds(seconds: i64) -> String {
    format!("toDateTime64({seconds}, 0, 'UTC')")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::timestamp::Timestamp;

    fn column(type_name: &str) -> Column {
        Column { name: "c".to_owned(), type_name: type_name.to_owned() }
    }

    #[test]
    fn types_are_known_within_their_wrappers() {
        for text in ["String", "LowCardinality(Nullable(String))", "Nullable(FixedString(5))", "Enum8('a' = 1)"] {
            assert!(column(text).is_text(), "{text}");
        }
        let lacks = |type_name: &str| column(type_name).lacks_instant();
        assert_eq!((lacks("DateTime('UTC')"), lacks("Date")), (None, None));
        assert_eq!(lacks("Nullable(DateTime)").as_deref(), Some("`c` IS NULL"));
        let late = "`c` >= toDateTime64(7258118400, 0, 'UTC')";
        assert_eq!(lacks("DateTime64(3, 'UTC')").as_deref(), Some(late));
        assert_eq!(lacks("Nullable(Date32)").unwrap(), format!("`c` IS NULL OR {late}"));
        assert_eq!([-1, 0].map(|more| Timestamp::in_range(YEAR_2200 * SECOND + more).is_some()), [true, false]);
        assert_eq!(["UInt64", "Nullable(UInt64)"].map(|key| column(key).key()), ["`c`", "ifNull(toString(`c`), '')"]);
    }

    #[test]
    fn spans_are_whole_seconds_around() {
        let span = Span { start: Timestamp::from_nanos(-1), end: Timestamp::from_nanos(SECOND + 1) };
        assert_eq!(column("Date").is_in(span), "`c` >= toDateTime64(-1, 0, 'UTC') AND `c` < toDateTime64(2, 0, 'UTC')");
        let always = Span { start: Timestamp::MIN, end: Timestamp::MAX };
        assert!(column("Date").is_in(always).ends_with("< toDateTime64(7258118400, 0, 'UTC')"));
    }

    #[test]
    fn flags_are_booleans_whole_numbers_or_texts() {
        let flag = |type_name: &str| column(type_name).expression(Field::Deleted, "table t");
        for number in ["Bool", "Nullable(Bool)", "UInt8", "LowCardinality(Nullable(UInt8))", "Int256", "Nullable(Nothing)"] {
            assert_eq!(flag(number).unwrap(), "toUInt8(ifNull(`c`, 0) != 0)", "{number}");
        }
        for text in ["String", "LowCardinality(String)", "Nullable(FixedString(5))"] {
            let cast = "CAST(`c` AS Nullable(String))";
            assert_eq!(flag(text).unwrap(), format!("if(ifNull(isValidUTF8({cast}), 1), {cast}, '')"), "{text}");
        }
        for other in ["Float64", "DateTime", "IntervalDay", "Array(Bool)"] {
            let error = flag(other).unwrap_err().to_string();
            assert!(error.contains(&format!("table t: column `c` is {other}, expected a boolean")), "{error}");
        }
    }
}
