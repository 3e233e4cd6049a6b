//! One accumulator for every aggregation: order-free, mergeable, exact.

use datasketches::hll::{HllType, HllUnion};
use rustc_hash::FxHashMap;
use xxhash_rust::xxh3::xxh3_128;

use super::enrich::Value;
use crate::model::decimal::{Decimal, DecimalError};
use crate::model::decimal_sum::DecimalSum;
use crate::model::meter::{Aggregation, ChargeOn, Meter};
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
    CountUnique(Distinct),
    /// For each value (by hash, as above) the last operation on it.
    AddedUnique(Added),
    CountUniqueApprox(Box<Sketch>),
    WeightedSum(Box<Level>),
    /// Of a window whose events are not at hand, and that is charged by its quantity alone.
    Known(Decimal),
    /// Distinct values of windows of which nothing else is at hand.
    Listed(Distinct),
}

/// A level over time.
#[derive(Debug, Clone, Default)]
pub struct Level {
    /// By how much it changes until when.
    changes: Vec<LevelChange>,
    /// The changes weighted with nanoseconds.
    weighted: DecimalSum,
}

/// What the events of one price do to a level that lasts until an instant.
#[derive(Debug, Clone, Copy)]
pub struct LevelChange {
    pub until: Timestamp,
    pub level: DecimalSum,
}

/// 128-bit hashes of distinct values: exact but for a chance of one in 10^20 that two of a
/// billion values share one. A list that is sorted each time it has doubled: most windows
/// have few values, for which a hash table is large and slow.
#[derive(Debug, Clone, Default)]
pub struct Distinct {
    values: Vec<u128>,
    /// So many at the beginning are sorted, each there once.
    settled: usize,
}

impl Distinct {
    /// Sorted values, each there once.
    fn of_sorted(values: Vec<u128>) -> Self {
        Distinct { settled: values.len(), values }
    }

    fn add(&mut self, value: u128) {
        if self.values.len() == self.values.capacity() {
            self.settle();
            // Where few were new, the room that became free would be full again soon.
            self.values.reserve_exact((self.values.len() * 2).max(4) - self.values.len());
        }
        self.values.push(value);
    }

    fn merge(&mut self, other: &Distinct) {
        self.values.extend_from_slice(&other.values);
        // Each value is sorted a few times, however many small lists are merged.
        if self.values.len() > 2 * self.settled {
            self.settle();
        }
    }

    /// Sorts, and leaves each value once. Two sorted parts are merged in linear time.
    fn settle(&mut self) {
        if self.settled < self.values.len() {
            if let Some(new) = self.values.get_mut(self.settled..) {
                new.sort_unstable();
            }
            self.values.sort();
            self.values.dedup();
            self.settled = self.values.len();
        }
    }

    fn count(&self) -> usize {
        let Some((settled, new)) = self.values.split_at_checked(self.settled) else { return 0 };
        let mut new = new.to_vec();
        new.sort_unstable();
        new.dedup();
        settled.len() + new.iter().filter(|value| settled.binary_search(value).is_err()).count()
    }
}

/// The last operation on each value, and how many of them add it.
#[derive(Debug, Clone, Default)]
pub struct Added {
    last: FxHashMap<u128, Operation>,
    count: u64,
}

impl Added {
    fn note(&mut self, value: u128, operation: Operation) {
        let is_add = operation.is_add;
        let was_added = match self.last.entry(value) {
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(operation);
                false
            }
            std::collections::hash_map::Entry::Occupied(mut entry) if *entry.get() < operation => entry.insert(operation).is_add,
            std::collections::hash_map::Entry::Occupied(_) => return,
        };
        self.count = self.count - u64::from(was_added) + u64::from(is_add);
    }
}

/// An operation on a value of a unique count, in the order of its moment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Operation {
    timestamp: Timestamp,
    ingested_at: Timestamp,
    id: Box<str>,
    is_add: bool,
}

/// A HyperLogLog sketch whose estimate depends on the set of values alone.
#[derive(Debug, Clone)]
pub struct Sketch(Option<HllUnion>);

/// 2^14 registers: a standard error of 1.04 / 2^7 = 0.81%.
const SKETCH_LG_K: u8 = 14;

impl Sketch {
    fn new() -> Self {
        // The size is within the library's bounds (4 to 21), so there always is one.
        Sketch(HllUnion::new(SKETCH_LG_K).ok())
    }

    fn add(&mut self, text: &str) {
        if let Some(union) = &mut self.0 {
            union.update_value(text);
        }
    }

    fn merge(&mut self, other: &Sketch) {
        if let (Some(ours), Some(theirs)) = (&mut self.0, &other.0) {
            ours.update(&theirs.to_sketch(HllType::Hll8));
        }
    }

    /// The composite estimator knows registers only, not the order in which they filled.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // an estimate is no money and never below zero
    fn estimate(&self) -> u64 {
        self.0.as_ref().map_or(0, |union| union.composite_estimate().round() as u64)
    }
}

/// What turns an accumulated state into a quantity.
#[derive(Debug, Clone, Copy)]
pub struct Measure {
    /// Of `sum_with_multiplier`, otherwise 1.
    pub multiplier: Decimal,
    /// The length of the billing period.
    pub period_nanos: i64,
}

/// The last value so far, by event time, then ingestion time, then id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Latest {
    timestamp: Timestamp,
    ingested_at: Timestamp,
    id: Box<str>,
    value: Decimal,
}

/// What an aggregation needs of an event's value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Measured<'a> {
    /// The event itself counts.
    Event,
    Number(Decimal),
    /// The hash of a distinct value.
    Distinct(u128),
    /// A distinct value of a sketch, which has a hash of its own.
    Text(&'a str),
    /// The hash of a distinct value that is added or removed.
    Operation {
        value: u128,
        is_add: bool,
    },
}

impl<'a> Measured<'a> {
    #[inline]
    pub fn of(value: &'a Value<'_>, aggregation: Aggregation) -> Self {
        match value {
            Value::Event => Measured::Event,
            Value::Number(number) => Measured::Number(*number),
            Value::Distinct(text) if aggregation == Aggregation::CountUniqueApprox => Measured::Text(text),
            Value::Distinct(text) => Measured::Distinct(xxh3_128(text.as_bytes())),
            Value::Operation { text, is_add } => Measured::Operation { value: xxh3_128(text.as_bytes()), is_add: *is_add },
        }
    }
}

/// What of an event an accumulator may need beside the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment<'a> {
    pub timestamp: Timestamp,
    pub ingested_at: Timestamp,
    pub id: &'a str,
    /// Nanoseconds for which a level lasts that begins here.
    pub remaining: i64,
}

impl Accumulator {
    pub fn new(meter: &Meter) -> Self {
        match meter.aggregation {
            Aggregation::Count => Accumulator::Count(0),
            Aggregation::Sum | Aggregation::SumWithMultiplier => Accumulator::Sum(DecimalSum::default()),
            Aggregation::Avg => Accumulator::Avg(DecimalSum::default(), 0),
            Aggregation::Min => Accumulator::Min(None),
            Aggregation::Max => Accumulator::Max(None),
            Aggregation::Latest => Accumulator::Latest(None),
            Aggregation::CountUnique if meter.operation_property.is_some() => Accumulator::AddedUnique(Added::default()),
            Aggregation::CountUnique => Accumulator::CountUnique(Distinct::default()),
            Aggregation::CountUniqueApprox => Accumulator::CountUniqueApprox(Box::new(Sketch::new())),
            Aggregation::WeightedSum => Accumulator::WeightedSum(Box::default()),
        }
    }

    /// The state of a window that is known by its quantity, and by how many events it has:
    /// merged with those of other windows, it gives what its events would. `None` where
    /// more must be known. No event of the window came before `start`.
    pub fn of_quantity(meter: &Meter, quantity: Decimal, events: u64, start: Timestamp) -> Option<Self> {
        if meter.charge_on != ChargeOn::Period {
            return Some(Accumulator::Known(quantity));
        }
        match meter.aggregation {
            Aggregation::Count => Some(Accumulator::Count(events)),
            Aggregation::Sum | Aggregation::SumWithMultiplier if meter.multiplier == Decimal::ONE => {
                let mut sum = DecimalSum::default();
                sum.add(quantity);
                Some(Accumulator::Sum(sum))
            }
            Aggregation::Min => Some(Accumulator::Min(Some(quantity))),
            Aggregation::Max => Some(Accumulator::Max(Some(quantity))),
            // Later than all events of earlier windows, earlier than those of later ones.
            Aggregation::Latest => {
                let latest = Latest { timestamp: start, ingested_at: Timestamp::MIN, id: Box::default(), value: quantity };
                Some(Accumulator::Latest(Some(Box::new(latest))))
            }
            Aggregation::Sum
            | Aggregation::SumWithMultiplier
            | Aggregation::Avg
            | Aggregation::CountUnique
            | Aggregation::CountUniqueApprox
            | Aggregation::WeightedSum => None,
        }
    }

    /// The state of several windows that are known by the sum of their quantities; `None` where
    /// more must be known.
    pub fn of_sum(meter: &Meter, quantity: Decimal) -> Option<Self> {
        match (meter.charge_on, meter.aggregation) {
            (ChargeOn::WindowSum, _) => Some(Accumulator::Known(quantity)),
            (ChargeOn::Period, Aggregation::Count) => quantity.to_u64().map(Accumulator::Count),
            (ChargeOn::Period, Aggregation::Sum | Aggregation::SumWithMultiplier) => {
                Accumulator::of_quantity(meter, quantity, 0, Timestamp::MIN)
            }
            _ => None,
        }
    }

    /// The state of windows that are known by their distinct values, which are sorted.
    pub fn of_values(values: Vec<u128>) -> Self {
        Accumulator::Listed(Distinct::of_sorted(values))
    }

    /// The distinct values of a unique count, sorted; `None` for all other aggregations.
    pub fn settled_values(&mut self) -> Option<&[u128]> {
        match self {
            Accumulator::CountUnique(distinct) => {
                distinct.settle();
                Some(&distinct.values)
            }
            _ => None,
        }
    }

    /// The values that were listed.
    pub fn listed_values(&self) -> Option<&[u128]> {
        match self {
            Accumulator::Listed(distinct) => Some(&distinct.values),
            _ => None,
        }
    }

    /// Adds the value of one event.
    pub fn add(&mut self, value: &Measured<'_>, moment: Moment<'_>) {
        match (self, value) {
            (Accumulator::Count(count), _) => *count += 1,
            (Accumulator::Sum(sum), Measured::Number(number)) => sum.add(*number),
            (Accumulator::Avg(sum, count), Measured::Number(number)) => {
                sum.add(*number);
                *count += 1;
            }
            (Accumulator::Min(least), Measured::Number(number)) => {
                *least = Some(least.map_or(*number, |least| least.min(*number)));
            }
            (Accumulator::Max(greatest), Measured::Number(number)) => {
                *greatest = Some(greatest.map_or(*number, |greatest| greatest.max(*number)));
            }
            (Accumulator::Latest(latest), Measured::Number(number)) => {
                let Moment { timestamp, ingested_at, id, .. } = moment;
                let newer = latest.as_ref().is_none_or(|last| {
                    (last.timestamp, last.ingested_at, &*last.id, last.value) < (timestamp, ingested_at, id, *number)
                });
                if newer {
                    *latest = Some(Box::new(Latest { timestamp, ingested_at, id: id.into(), value: *number }));
                }
            }
            (Accumulator::CountUnique(values), Measured::Distinct(value)) => values.add(*value),
            (Accumulator::AddedUnique(values), Measured::Operation { value, is_add }) => {
                let Moment { timestamp, ingested_at, id, .. } = moment;
                let operation = Operation { timestamp, ingested_at, id: id.into(), is_add: *is_add };
                values.note(*value, operation);
            }
            (Accumulator::CountUniqueApprox(sketch), Measured::Text(text)) => sketch.add(text),
            (Accumulator::WeightedSum(of), Measured::Number(number)) => {
                let mut level = DecimalSum::default();
                level.add(*number);
                let until = Timestamp::from_nanos(moment.timestamp.nanos().saturating_add(moment.remaining));
                change_level(&mut of.changes, LevelChange { until, level });
                of.weighted.add_weighted(level, moment.remaining);
            }
            // The value always fits: both are chosen by the meter's aggregation.
            (_, _) => {}
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
            (Accumulator::CountUnique(a), Accumulator::CountUnique(b) | Accumulator::Listed(b)) => a.merge(b),
            (Accumulator::AddedUnique(a), Accumulator::AddedUnique(b)) => {
                b.last.iter().for_each(|(value, operation)| a.note(*value, operation.clone()));
            }
            (Accumulator::CountUniqueApprox(a), Accumulator::CountUniqueApprox(b)) => a.merge(b),
            (Accumulator::WeightedSum(ours), Accumulator::WeightedSum(theirs)) => {
                theirs.changes.iter().for_each(|change| change_level(&mut ours.changes, *change));
                ours.weighted.merge(theirs.weighted);
            }
            _ => {}
        }
    }

    /// The quantity.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`] where it needs more than 38 digits.
    pub fn quantity(&self, measure: Measure) -> Result<Decimal, DecimalError> {
        match self {
            Accumulator::Count(count) => Ok(Decimal::from_u64(*count)),
            Accumulator::Sum(sum) if measure.multiplier == Decimal::ONE => sum.total(),
            Accumulator::Sum(sum) => sum.times(measure.multiplier),
            Accumulator::Avg(sum, count) => sum.mean(*count),
            Accumulator::Min(value) | Accumulator::Max(value) => Ok(value.unwrap_or_default()),
            Accumulator::Latest(latest) => Ok(latest.as_ref().map_or(Decimal::ZERO, |latest| latest.value)),
            Accumulator::CountUnique(values) | Accumulator::Listed(values) => Ok(Decimal::from_u64(values.count() as u64)),
            Accumulator::AddedUnique(values) => Ok(Decimal::from_u64(values.count)),
            Accumulator::CountUniqueApprox(sketch) => Ok(Decimal::from_u64(sketch.estimate())),
            Accumulator::Known(quantity) => Ok(*quantity),
            Accumulator::WeightedSum(level) => level.weighted.mean(measure.period_nanos.unsigned_abs()),
        }
    }

    /// What happens to a level; nothing for all other aggregations.
    pub fn level_changes(&self) -> &[LevelChange] {
        match self {
            Accumulator::WeightedSum(level) => &level.changes,
            _ => &[],
        }
    }

    /// Adds a level that lasts for `nanos` from the start on.
    pub fn carry_in(&mut self, level: DecimalSum, nanos: i64) {
        if let Accumulator::WeightedSum(of) = self {
            of.weighted.add_weighted(level, nanos);
        }
    }
}

/// Nearly always there is one: prices change seldom.
fn change_level(changes: &mut Vec<LevelChange>, change: LevelChange) {
    match changes.iter_mut().find(|known| known.until == change.until) {
        Some(known) => known.level.merge(change.level),
        None => changes.push(change),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sketch(values: impl IntoIterator<Item = u32>) -> Sketch {
        let mut sketch = Sketch::new();
        values.into_iter().for_each(|value| sketch.add(&value.to_string()));
        sketch
    }

    #[test]
    fn sketches_are_exact_when_small_and_close_when_large() {
        for count in [0u32, 1, 2, 10, 100, 1000] {
            assert_eq!(sketch(0..count).estimate(), u64::from(count));
        }
        for count in [10_000u32, 100_000, 300_000] {
            let error = sketch(0..count).estimate().abs_diff(count.into());
            assert!(error * 1000 < u64::from(count) * 25, "{count}: off by {error}");
        }
    }

    proptest! {
        /// Promise 2, and exact.
        #[test]
        fn distinct_values_are_counted_whatever_the_order(parts in proptest::collection::vec(proptest::collection::vec(0u128..40, 0..60), 1..5)) {
            let set: std::collections::BTreeSet<_> = parts.iter().flatten().collect();
            let mut merged = Distinct::default();
            for part in &parts {
                let mut one = Distinct::default();
                part.iter().for_each(|value| one.add(*value));
                prop_assert_eq!(one.count(), part.iter().collect::<std::collections::BTreeSet<_>>().len());
                merged.merge(&one);
            }
            prop_assert_eq!(merged.count(), set.len());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Promise 2: neither order nor the way of merging matters.
        #[test]
        fn sketches_depend_on_their_set_alone(count in 1u32..6000, step in 1u32..5000, parts in 1usize..6) {
            let shuffled: Vec<_> = (0..count).map(|n| (n * 7919 + step) % count).chain(0..count).collect();
            let mut merged = Sketch::new();
            for part in shuffled.chunks(shuffled.len() / parts + 1) {
                merged.merge(&sketch(part.iter().copied()));
            }
            prop_assert_eq!(merged.estimate(), sketch(0..count).estimate());
        }
    }
}
