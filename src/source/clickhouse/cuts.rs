//! How rows are cut into parts that come again: by when they were ingested, and then into
//! slices of event time. What a run records of its parts is enough to make them again.

use crate::clickhouse_client::literal;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;

/// Rows by when they were ingested: instants in UTC, as the server writes them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cut {
    /// What an earlier cut has; `None` for the first one, which has rows without an
    /// ingestion time too.
    pub after: Option<String>,
    pub until: String,
}

/// Slices of equal length, in nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slices {
    pub first: i64,
    pub width: i64,
}

const INSTANT: (&str, &str) = ("toDateTime64(", ", 9, 'UTC')");

impl Cut {
    /// The condition on the column of ingestion times.
    pub fn condition(&self, column: &str) -> String {
        let instant = |text: &str| format!("{}{}{}", INSTANT.0, literal(text), INSTANT.1);
        let until = instant(&self.until);
        match &self.after {
            None => format!("ifNull({column} <= {until}, 1)"),
            Some(after) => format!("{column} > {} AND {column} <= {until}", instant(after)),
        }
    }

    /// The cut that has this condition.
    fn parse(condition: &str, column: &str) -> Option<Cut> {
        let start = format!("{}'", INSTANT.0);
        let end = format!("'{}", INSTANT.1);
        let mut instants = condition.split(start.as_str()).skip(1).filter_map(|rest| Some(rest.split_once(end.as_str())?.0));
        let (first, second) = (instants.next()?.to_owned(), instants.next().map(str::to_owned));
        let cut = match second {
            None => Cut { after: None, until: first },
            Some(until) => Cut { after: Some(first), until },
        };
        (cut.condition(column) == condition).then_some(cut)
    }
}

impl Slices {
    /// At most `count` of them, from the first to the last instant.
    pub fn new(first: i64, last: i64, count: i64) -> Slices {
        Slices { first, width: last.saturating_sub(first) / count.max(1) + 1 }
    }

    /// The number of a row's slice, where `nanos` is its time.
    pub fn expression(self, nanos: &str) -> String {
        format!("intDiv({nanos} - ({}), {})", self.first, self.width)
    }

    fn parse(expression: &str, nanos: &str) -> Option<Slices> {
        let (first, width) = expression.rsplit_once(" - (")?.1.strip_suffix(')')?.split_once("), ")?;
        let slices = Slices { first: first.parse().ok()?, width: width.parse().ok()? };
        (slices.expression(nanos) == expression).then_some(slices)
    }

    /// The times of a slice; `None` where they cannot be written, or where other rows may be:
    /// those without a time count as of 1970, and before the first instant, division rounds up.
    pub fn span(self, at: i64) -> Option<Span> {
        if at <= 0 {
            return None;
        }
        let start = self.first.checked_add(at.checked_mul(self.width)?)?;
        let end = start.checked_add(self.width)?;
        let span = Span { start: Timestamp::from_nanos(start), end: Timestamp::from_nanos(end) };
        (!span.contains(Timestamp::from_nanos(0))).then_some(span)
    }
}

/// Condition, slices and number of a part, as a run records them.
pub fn write(condition: &str, slices: Slices, nanos: &str, at: &str) -> String {
    format!("{condition} AND {} = {at}", slices.expression(nanos))
}

/// The reverse of [`write`], without the number.
pub fn parse(part: &str, column: &str, nanos: &str) -> Option<(Cut, Slices)> {
    let (part, _) = part.rsplit_once(" = ")?;
    let (condition, _) = part.rsplit_once(" AND intDiv(")?;
    let expression = part.strip_prefix(condition)?.strip_prefix(" AND ")?;
    Some((Cut::parse(condition, column)?, Slices::parse(expression, nanos)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_again_from_what_is_recorded() {
        let (column, nanos) = ("parseDateTime64BestEffortOrNull(toString(`x = 1`), 9, 'UTC')", "toUnixTimestamp64Nano(`t - (5`)");
        let slices = Slices::new(-7, 93, 10);
        for after in [None, Some("2026-01-01 00:00:00.000000000".to_owned())] {
            let cut = Cut { after, until: "2026-01-05 00:00:00.000000001".to_owned() };
            let part = write(&cut.condition(column), slices, nanos, "-3");
            assert_eq!(parse(&part, column, nanos), Some((cut, slices)));
            assert_eq!(parse(&part, "other", nanos), None);
            assert_eq!(parse(&part.replace("2026", "x'"), column, nanos), None);
        }
        assert_eq!(slices.span(0), None);
        assert_eq!(slices.span(1).map(|span| (span.start.nanos(), span.end.nanos())), Some((4, 15)));
        assert_eq!(slices.span(i64::MAX), None);
        let later = Slices::new(1000, 1999, 10);
        assert_eq!([-1, 0, 1].map(|at| later.span(at).is_some()), [false, false, true]);
    }
}
