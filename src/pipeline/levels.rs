//! Levels that are carried from one billing period, or one price, into the next.
//!
//! A `weighted_sum` meter keeps a level for each subscription and combination of
//! dimensions. The states of its windows know by how much the level changed; here the
//! level that is left at each beginning is added to the first window there.

use std::collections::{BTreeMap, btree_map};
use std::iter::Peekable;

use rustc_hash::FxHashMap;
use xxhash_rust::xxh3::xxh3_128;

use super::state::{Interner, NO_PRICE, News, StateKey, WindowState, index};
use super::windows::Windows;
use crate::model::decimal_sum::DecimalSum;
use crate::model::meter::Meter;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::reference::{Reference, Subscription};

/// The level of one subscription, meter and combination of dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct LevelKey {
    subscription: u32,
    meter: u32,
    dimensions: u32,
}

impl LevelKey {
    fn of(key: &StateKey) -> Self {
        LevelKey { subscription: key.subscription, meter: key.meter, dimensions: key.dimensions }
    }
}

/// Values of dimensions, from canonical JSON.
fn values(dimensions: &str) -> Vec<(String, String)> {
    let values: BTreeMap<String, &serde_json::value::RawValue> = serde_json::from_str(dimensions).unwrap_or_default();
    values.into_iter().map(|(name, value)| (name, value.get().to_owned())).collect()
}

/// Where the segment ends in which a window begins.
fn segment_end(key: &StateKey, dimensions: &Interner, reference: &Reference) -> Option<Timestamp> {
    let subscription = reference.subscriptions.get(key.subscription as usize)?;
    let at = key.window_start.max(key.period_start);
    let values = values(&dimensions.text(key.dimensions));
    let values: Vec<_> = values.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    Some(reference.level_end(subscription, key.meter as usize, at, subscription.cycle.period(at), &values))
}

/// What the events of one segment do to the level. A segment is the time of one price in
/// one billing period; its changes go by its end.
#[derive(Debug, Clone, Copy, Default)]
struct Change {
    level: DecimalSum,
    news: News,
}

/// Adds the carried levels to `windows`, for all billing periods that begin before the end
/// of `range`. An `open` range grows until it holds all windows that they are added to.
///
/// `lost` has the news of windows that lost events: they change the level of later ones too.
pub fn carry_in(
    windows: &mut Windows,
    (dimensions, lost): (&Interner, &FxHashMap<StateKey, News>),
    reference: &Reference,
    range: &mut Span,
    open: bool,
    timezone: chrono_tz::Tz,
) {
    let mut levels: FxHashMap<LevelKey, BTreeMap<Timestamp, Change>> = FxHashMap::default();
    let is_level = |key: &StateKey| reference.meters.get(key.meter as usize).is_some_and(Meter::keeps_a_level);
    for (key, state) in windows.iter().filter(|(key, _)| is_level(key)) {
        let changes = levels.entry(LevelKey::of(key)).or_default();
        for change in state.accumulator.level_changes() {
            changes.entry(change.until).or_default().level.merge(change.level);
        }
        if let Some(first) = state.accumulator.level_changes().iter().map(|change| change.until).min() {
            changes.entry(first).or_default().news.merge(state.news.all());
        }
    }
    for (key, news) in lost.iter().filter(|(key, _)| is_level(key)) {
        if let Some(end) = segment_end(key, dimensions, reference) {
            levels.entry(LevelKey::of(key)).or_default().entry(end).or_default().news.merge(*news);
        }
    }
    let start = |(key, changes)| Walk::new(key, changes, reference, &dimensions.text(key.dimensions), timezone);
    let mut walks: Vec<_> = levels.into_iter().filter_map(start).collect();
    loop {
        let ends = walks.iter_mut().filter_map(|walk| walk.carry(*range, windows));
        match ends.max().filter(|end| open && *end > range.end) {
            Some(end) => range.end = end,
            None => return,
        }
    }
}

/// Goes from segment to segment of one level.
struct Walk<'w> {
    key: LevelKey,
    reference: &'w Reference,
    subscription: &'w Subscription,
    meter: &'w Meter,
    /// Values of dimensions as canonical JSON.
    dimensions: Vec<(String, String)>,
    timezone: chrono_tz::Tz,
    /// The beginning of the next segment.
    at: Timestamp,
    carried: Change,
    changes: Peekable<btree_map::IntoIter<Timestamp, Change>>,
}

impl<'w> Walk<'w> {
    fn new(
        key: LevelKey,
        changes: BTreeMap<Timestamp, Change>,
        reference: &'w Reference,
        dimensions: &str,
        timezone: chrono_tz::Tz,
    ) -> Option<Self> {
        Some(Walk {
            key,
            reference,
            subscription: reference.subscriptions.get(key.subscription as usize)?,
            meter: reference.meters.get(key.meter as usize)?,
            dimensions: values(dimensions),
            timezone,
            // Before the first segment ends, there is nothing to carry.
            at: *changes.keys().next()?,
            carried: Change::default(),
            changes: changes.into_iter().peekable(),
        })
    }

    /// Goes on to the end of the last billing period that begins before the end of
    /// `range`. Returns the end of the last window that the level was added to.
    fn carry(&mut self, range: Span, windows: &mut Windows) -> Option<Timestamp> {
        let last = Timestamp::from_nanos(range.end.nanos().saturating_sub(1));
        let end = self.subscription.cycle.period(last).end.min(self.subscription.active.end);
        let mut last_end = None;
        let values: Vec<_> = self.dimensions.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        let meter = self.key.meter as usize;
        while self.at < end {
            let period = self.subscription.cycle.period(self.at);
            let until = self.reference.level_end(self.subscription, meter, self.at, period, &values);
            while let Some((_, change)) = self.changes.next_if(|(end, _)| *end <= self.at) {
                self.carried.level.merge(change.level);
                self.carried.news.merge(change.news);
            }
            // Earlier periods are of no concern.
            let price = self.reference.price_at(self.subscription, meter, self.at, &values).filter(|_| period.overlaps(range));
            if let Some(price) = price.filter(|_| !self.carried.level.is_zero()) {
                last_end = Some(self.add((period, until), price.map_or(NO_PRICE, index), windows));
            }
            self.at = until;
        }
        last_end
    }

    /// Adds a level to the window where its segment begins; returns the end of that.
    fn add(&self, (period, until): (Span, Timestamp), price: u32, windows: &mut Windows) -> Timestamp {
        let (at, carried) = (self.at, self.carried);
        let window = self.meter.window.slot(at, self.timezone);
        let LevelKey { subscription, meter, dimensions } = self.key;
        let key = StateKey { subscription, meter, price, dimensions, period_start: period.start, window_start: window.start };
        let of_price = self.reference.prices.get(price as usize);
        let mut contribution = b"carried in".to_vec();
        contribution.extend_from_slice(&carried.level.to_le_bytes());
        contribution.extend_from_slice(&at.nanos().to_le_bytes());
        let new = || WindowState::new(self.meter, of_price, window, period);
        windows.change(key, new, |state| {
            state.accumulator.carry_in(carried.level, until.nanos().saturating_sub(at.nanos()));
            state.events_digest.add(xxh3_128(&contribution));
            state.news.add(carried.news);
        });
        window.end
    }
}
