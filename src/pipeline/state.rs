//! What is known about windows while events are read: mergeable, whatever the order.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::accumulator::{Accumulator, Measured, Moment};
use crate::model::aggregate::{Cause, Causes, Text, WindowRow};
use crate::model::decimal::{Decimal, DecimalError};
use crate::model::digest::SetDigest;
use crate::model::meter::Meter;
use crate::model::percentage::{Percentage, Transaction, Transactions};
use crate::model::price::Price;
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowKind};

/// The key of a window's state: indexes into the reference tables instead of names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateKey {
    pub subscription: u32,
    pub meter: u32,
    /// [`NO_PRICE`] for usage without a price.
    pub price: u32,
    pub dimensions: u32,
    pub period_start: Timestamp,
    pub window_start: Timestamp,
}

impl StateKey {
    /// The key of all windows together that stay as they are, before those that may change.
    #[must_use]
    pub fn carried(self) -> StateKey {
        StateKey { window_start: Timestamp::from_nanos(self.period_start.nanos().saturating_sub(1)), ..self }
    }
}

/// The price index of usage without a price.
pub const NO_PRICE: u32 = u32::MAX;

/// Every reference table is small enough for 32-bit indexes.
pub fn index(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(NO_PRICE)
}

/// What is known about one window.
#[derive(Debug, Clone)]
pub struct WindowState {
    pub window_end: Timestamp,
    pub period_end: Timestamp,
    pub event_count: u64,
    pub events_digest: SetDigest,
    pub accumulator: Accumulator,
    /// Of prices that must know events one by one.
    pub transactions: Option<Box<Transactions>>,
    pub news: KeptNews,
    /// Whether it stands for all windows from the start of the billing period that stay as they
    /// are: later ones add to it.
    pub is_carried: bool,
}

impl WindowState {
    pub fn new(meter: &Meter, price: Option<&Price>, window: Span, period: Span) -> Self {
        WindowState {
            window_end: window.end,
            period_end: period.end,
            event_count: 0,
            events_digest: SetDigest::default(),
            accumulator: Accumulator::new(meter),
            transactions: price.and_then(Price::transactions).map(|_| Box::default()),
            news: KeptNews::default(),
            is_carried: false,
        }
    }

    /// A window as it is stored; `None` where its row does not tell what it adds to its
    /// billing period.
    pub fn of_row(meter: &Meter, row: &WindowRow) -> Option<Self> {
        let start = row.counts_from();
        Some(WindowState {
            window_end: row.window_end,
            period_end: row.period_end,
            event_count: row.event_count,
            events_digest: row.events_digest,
            accumulator: Accumulator::of_quantity(meter, row.quantity, row.event_count, start)?,
            transactions: None,
            news: KeptNews::default(),
            is_carried: false,
        })
    }

    /// Windows that stay as they are, by the sum of their quantities; `None` where it does not
    /// tell what they add to their billing period.
    pub fn carried(meter: &Meter, quantity: Decimal, period: Span) -> Option<Self> {
        let accumulator = Accumulator::of_sum(meter, quantity)?;
        Some(WindowState { accumulator, is_carried: true, ..WindowState::new(meter, None, period, period) })
    }

    /// Windows that stay as they are, by their distinct values, which are sorted.
    pub fn of_values(meter: &Meter, values: Vec<u128>, period: Span) -> Self {
        let accumulator = Accumulator::of_values(values);
        WindowState { accumulator, is_carried: true, ..WindowState::new(meter, None, period, period) }
    }

    /// Counts one event; `contribution` is what it adds to the digest.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`] where the event's fee overflows: it is not counted.
    pub fn count(
        &mut self,
        value: &Measured<'_>,
        moment: Moment<'_>,
        price: Option<&Percentage>,
        contribution: u128,
        news: News,
    ) -> Result<(), DecimalError> {
        if let (Some(transactions), Some(price), Measured::Number(value)) = (&mut self.transactions, price, value) {
            let Moment { timestamp, ingested_at, id, .. } = moment;
            transactions.add(Transaction { timestamp, ingested_at, id: id.into(), value: *value }, price)?;
        }
        self.accumulator.add(value, moment);
        self.event_count += 1;
        self.events_digest.add(contribution);
        self.news.add(news);
        Ok(())
    }

    /// Adds what another state has counted.
    pub fn merge(&mut self, other: &WindowState, price: Option<&Percentage>) {
        self.window_end = self.window_end.max(other.window_end);
        self.event_count += other.event_count;
        self.events_digest.merge(other.events_digest);
        self.accumulator.merge(&other.accumulator);
        self.news.add(other.news.all());
        if let (Some(ours), Some(theirs), Some(price)) = (&mut self.transactions, &other.transactions, price) {
            // Every event was checked before: no fee overflows now.
            let _ = ours.merge(theirs, price);
        }
    }
}

/// Events of a window that the run before did not count the same way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct News {
    pub late: u64,
    pub amended: u64,
    pub voided: u64,
    /// Counted no more, because another copy of the same content is kept elsewhere.
    pub duplicates: u64,
    pub resolved: u64,
}

impl News {
    /// Each kind as a cause.
    pub fn causes(&self) -> Causes {
        let counts = [
            (Cause::LateEvent, self.late),
            (Cause::EventAmended, self.amended),
            (Cause::EventVoided, self.voided),
            (Cause::DuplicateRemoved, self.duplicates),
            (Cause::DeadLetterResolved, self.resolved),
        ];
        counts.into_iter().filter(|(_, count)| *count > 0).collect()
    }

    pub fn merge(&mut self, other: News) {
        self.late += other.late;
        self.amended += other.amended;
        self.voided += other.voided;
        self.duplicates += other.duplicates;
        self.resolved += other.resolved;
    }
}

/// News in little memory: seldom is anything but late news.
#[derive(Debug, Clone, Default)]
pub struct KeptNews {
    late: u64,
    other: Option<Box<News>>,
}

impl KeptNews {
    pub fn all(&self) -> News {
        News { late: self.late, ..self.other.as_deref().copied().unwrap_or_default() }
    }

    pub fn add(&mut self, news: News) {
        self.late += news.late;
        let other = News { late: 0, ..news };
        if other != News::default() {
            self.other.get_or_insert_default().merge(other);
        }
    }
}

impl From<News> for KeptNews {
    fn from(news: News) -> Self {
        let mut kept = KeptNews::default();
        kept.add(news);
        kept
    }
}

/// The sessions of one accumulation by the time of their first event. Events closer
/// than the gap are in one session, in whatever order they come.
#[derive(Debug, Default)]
pub struct Sessions(BTreeMap<Timestamp, Session>);

#[derive(Debug)]
struct Session {
    last: Timestamp,
    state: WindowState,
}

impl Sessions {
    /// Adds a part of a session, from its first to its last event.
    pub fn add(&mut self, first: Timestamp, last: Timestamp, state: WindowState, gap: i64, price: Option<&Percentage>) {
        let (mut first, mut session) = (first, Session { last, state });
        // A later one that the part reaches, and an earlier one that reaches the part.
        let reaches = |last: Timestamp, next: Timestamp| next.nanos().saturating_sub(last.nanos()) < gap;
        loop {
            let before = self.0.range(..=session.last).next_back().map(|(start, known)| (*start, known.last));
            let joined = before.filter(|(_, last)| reaches(*last, first)).map(|(start, _)| start).or_else(|| {
                let after = self.0.range(session.last..).next().map(|(start, _)| *start);
                after.filter(|start| reaches(session.last, *start))
            });
            let Some((start, mut other)) = joined.and_then(|start| self.0.remove_entry(&start)) else { break };
            first = first.min(start);
            session.last = session.last.max(other.last);
            // The smaller one into the larger one: a session grows event by event.
            if session.state.event_count < other.state.event_count {
                std::mem::swap(&mut session.state, &mut other.state);
            }
            session.state.merge(&other.state, price);
        }
        self.0.insert(first, session);
    }

    pub fn merge(&mut self, other: Sessions, gap: i64, price: Option<&Percentage>) {
        for (first, session) in other.0 {
            self.add(first, session.last, session.state, gap, price);
        }
    }

    /// The sessions as windows.
    pub fn into_windows(self, gap: i64) -> impl Iterator<Item = (Timestamp, WindowState)> {
        self.0.into_iter().map(move |(first, session)| {
            let window_end = Timestamp::from_nanos(session.last.nanos().saturating_add(gap));
            (first, WindowState { window_end, ..session.state })
        })
    }
}

/// Texts by number.
#[derive(Debug, Default)]
pub struct Interner {
    numbers: FxHashMap<Text, u32>,
    texts: Vec<Text>,
}

/// The number of no dimensions among those of an aggregation.
pub const NO_DIMENSIONS: u32 = 0;

impl Interner {
    /// One that knows a text by the number zero.
    pub fn starting_with(text: &str) -> Self {
        let mut interner = Interner::default();
        interner.intern(text);
        interner
    }

    pub fn intern(&mut self, text: &str) -> u32 {
        if let Some(number) = self.numbers.get(text) {
            return *number;
        }
        let number = index(self.texts.len());
        let text: Text = Arc::from(text);
        self.texts.push(Arc::clone(&text));
        self.numbers.insert(text, number);
        number
    }

    pub fn text(&self, number: u32) -> Text {
        self.texts.get(number as usize).cloned().unwrap_or_else(|| Arc::from(""))
    }

    /// All texts, in the order of their numbers.
    pub fn texts(&self) -> &[Text] {
        &self.texts
    }
}

/// Windows found before: calendar arithmetic in a zone costs more than a look-up.
#[derive(Debug, Default)]
pub struct WindowCache {
    slots: FxHashMap<(WindowKind, i64), Span>,
}

impl WindowCache {
    pub fn window(&mut self, kind: WindowKind, t: Timestamp, timezone: chrono_tz::Tz) -> Span {
        let Some(length) = kind.nominal_nanos() else { return kind.slot(t, timezone) };
        let slot = (kind, t.nanos().div_euclid(length));
        match self.slots.get(&slot) {
            Some(window) if window.contains(t) => *window,
            _ => {
                let window = kind.slot(t, timezone);
                self.slots.insert(slot, window);
                window
            }
        }
    }
}
