//! One accumulator for every aggregation: order-free, mergeable, exact.

use rustc_hash::FxHashSet;
use xxhash_rust::xxh3::xxh3_128;

use super::enrich::Value;
use crate::model::decimal::{Decimal, DecimalError, DecimalSum};
use crate::model::meter::Aggregation;
use crate::model::timestamp::Timestamp;

/// The state of one aggregation over a set of events.
#[derive(Debug, Clone)]
pub enum Accumulator {
    /// Also for a set of values of which only the number counts.
    Count(u64),
    Sum(DecimalSum),
    Avg(DecimalSum, u64),
    Min(Option<Decimal>),
    Max(Option<Decimal>),
    Latest(Option<Box<Latest>>),
    /// 128-bit hashes of the distinct values: exact but for a chance of one in
    /// 10^20 that two of a billion values share one.
    CountUnique(FxHashSet<u128>),
}

/// The last value so far, by event time, then ingestion time, then id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Latest {
    timestamp: Timestamp,
    ingested_at: Timestamp,
    id: Box<str>,
    value: Decimal,
}

/// What of an event an accumulator may need beside the value.
#[derive(Debug, Clone, Copy)]
pub struct Moment<'a> {
    pub timestamp: Timestamp,
    pub ingested_at: Timestamp,
    pub id: &'a str,
}

impl Accumulator {
    pub fn new(aggregation: Aggregation) -> Self {
        match aggregation {
            Aggregation::Count => Accumulator::Count(0),
            Aggregation::Sum => Accumulator::Sum(DecimalSum::default()),
            Aggregation::Avg => Accumulator::Avg(DecimalSum::default(), 0),
            Aggregation::Min => Accumulator::Min(None),
            Aggregation::Max => Accumulator::Max(None),
            Aggregation::Latest => Accumulator::Latest(None),
            Aggregation::CountUnique => Accumulator::CountUnique(FxHashSet::default()),
        }
    }

    /// Adds the value of one event.
    pub fn add(&mut self, value: &Value<'_>, moment: Moment<'_>) {
        match (self, value) {
            (Accumulator::Count(count), _) => *count += 1,
            (Accumulator::Sum(sum), Value::Number(number)) => sum.add(*number),
            (Accumulator::Avg(sum, count), Value::Number(number)) => {
                sum.add(*number);
                *count += 1;
            }
            (Accumulator::Min(least), Value::Number(number)) => *least = Some(least.map_or(*number, |least| least.min(*number))),
            (Accumulator::Max(greatest), Value::Number(number)) => {
                *greatest = Some(greatest.map_or(*number, |greatest| greatest.max(*number)));
            }
            (Accumulator::Latest(latest), Value::Number(number)) => {
                let Moment { timestamp, ingested_at, id } = moment;
                let newer = latest.as_ref().is_none_or(|last| {
                    (last.timestamp, last.ingested_at, &*last.id, last.value) < (timestamp, ingested_at, id, *number)
                });
                if newer {
                    *latest = Some(Box::new(Latest { timestamp, ingested_at, id: id.into(), value: *number }));
                }
            }
            (Accumulator::CountUnique(values), Value::Distinct(text)) => {
                values.insert(xxh3_128(text.as_bytes()));
            }
            // The value always fits: both are chosen by the meter's aggregation.
            (_, Value::Event | Value::Number(_) | Value::Distinct(_)) => {}
        }
    }

    /// Adds everything that `other` has seen.
    pub fn merge(&mut self, other: &Accumulator) {
        match (self, other) {
            (Accumulator::Count(a), Accumulator::Count(b)) => *a += b,
            (Accumulator::Sum(a), Accumulator::Sum(b)) => a.merge(*b),
            (Accumulator::Avg(a, n), Accumulator::Avg(b, m)) => {
                a.merge(*b);
                *n += m;
            }
            (Accumulator::Min(a), Accumulator::Min(b)) => *a = [*a, *b].into_iter().flatten().min(),
            (Accumulator::Max(a), Accumulator::Max(b)) => *a = (*a).max(*b),
            (Accumulator::Latest(a), Accumulator::Latest(b)) if *a < *b => a.clone_from(b),
            (Accumulator::CountUnique(a), Accumulator::CountUnique(b)) => a.extend(b),
            _ => {}
        }
    }

    /// The quantity.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`] where it needs more than 38 digits.
    pub fn quantity(&self) -> Result<Decimal, DecimalError> {
        match self {
            Accumulator::Count(count) => Ok(Decimal::from_u64(*count)),
            Accumulator::Sum(sum) => sum.total(),
            Accumulator::Avg(sum, count) => sum.mean(*count),
            Accumulator::Min(value) | Accumulator::Max(value) => Ok(value.unwrap_or_default()),
            Accumulator::Latest(latest) => Ok(latest.as_ref().map_or(Decimal::ZERO, |latest| latest.value)),
            Accumulator::CountUnique(values) => Ok(Decimal::from_u64(values.len() as u64)),
        }
    }
}
