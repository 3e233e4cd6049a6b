//! Aggregation: the matches of a part of the subscriptions become windows.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, anyhow};
use rustc_hash::FxHashMap;

use super::accumulator::Moment;
use super::context::Context;
use super::event_forms::contribution;
use super::incremental::Marks;
use super::incremental::kept::KeptMatches;
use super::incremental::stored_windows::Known;
use super::matches::{Match, Matches, Place, Reader};
use super::state::{Sessions, StateKey, WindowState};
use super::windows::Windows;
use crate::model::price::Price;
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowKind};
use crate::workers;

/// The matches of one thread, and the numbers of its dimensions among those of all.
#[derive(Debug)]
pub struct Shard {
    pub matches: Matches,
    pub dimensions: Vec<u32>,
}

/// All matches, to be aggregated part by part.
pub struct AllMatches<'c, 'r> {
    context: &'c Context<'r>,
    pub shards: Vec<Shard>,
    /// Those that earlier runs have kept.
    pub kept: Option<KeptMatches<'c>>,
    /// By part: states of windows whose events are not among the matches.
    states: Vec<Mutex<Vec<(StateKey, WindowState)>>>,
    /// How many windows the part before had: the next one will have about as many.
    expected: AtomicUsize,
}

/// What matches say that have no moment: nothing depends on it.
const NO_MOMENT: Moment<'static> = Moment { timestamp: Timestamp::MIN, ingested_at: Timestamp::MIN, id: "", remaining: 0 };

impl Shard {
    #[inline]
    fn place(&self, of: &Match<'_>, marks: Option<&Marks>) -> Result<Place> {
        let period = self.matches.spans.span(of.period).with_context(|| damaged(of))?;
        let dimensions = self.dimensions.get(of.dimensions as usize).copied().with_context(|| damaged(of))?;
        let (pair, window) = ((of.subscription as usize, of.meter as usize), self.matches.spans.span(of.window));
        let start = window.map_or(period.start, |window| window.start.max(period.start));
        let is_carried = marks.is_some_and(|marks| marks.leave(pair, period, start));
        Ok(Place { window, period, is_carried, dimensions })
    }
}

fn damaged(of: &Match<'_>) -> String {
    format!("a match of meter {} that was set aside is damaged", of.meter)
}

impl<'c, 'r> AllMatches<'c, 'r> {
    pub fn new(context: &'c Context<'r>, shards: Vec<Shard>) -> Self {
        let states = (0..context.parts.count()).map(|_| Mutex::default()).collect();
        AllMatches { context, shards, kept: None, states, expected: AtomicUsize::new(0) }
    }

    /// Adds what is known without events.
    pub fn add(&mut self, key: StateKey, known: Known<'c>) {
        let part = self.context.parts.part(key.subscription);
        match known {
            Known::Window(state) => {
                if let Some(states) = self.states.get_mut(part) {
                    states.get_mut().unwrap_or_else(PoisonError::into_inner).push((key, state));
                }
            }
            Known::Values(period, list) => {
                self.kept.iter_mut().for_each(|kept| kept.add_list(part, (key, period), list));
            }
        }
    }

    /// The windows of all parts.
    ///
    /// # Errors
    /// As [`AllMatches::part`].
    pub fn all(&self) -> Result<Windows> {
        let mut all = Windows::default();
        for at in 0..self.context.parts.count() {
            self.part(at)?.into_states().for_each(|(key, state)| all.add(key, state, None));
        }
        Ok(all)
    }

    /// What `of` makes of the windows of each part, in their order.
    ///
    /// # Errors
    /// As [`AllMatches::part`], or where `of` fails: the first of the parts that do.
    pub fn each<T: Send>(&self, threads: usize, of: impl Fn(Windows) -> Result<T> + Sync) -> Result<Vec<T>> {
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let work = || {
            let mut made = Vec::new();
            while !failed.load(Ordering::Relaxed) {
                let at = next.fetch_add(1, Ordering::Relaxed);
                if at >= self.context.parts.count() {
                    break;
                }
                let result = crate::interrupt::check().and_then(|()| of(self.part(at)?));
                failed.fetch_or(result.is_err(), Ordering::Relaxed);
                made.push((at, result));
            }
            made
        };
        let mut made = Vec::new();
        for result in workers::spread(threads.min(self.context.parts.count()), work) {
            made.extend(result.map_err(|_| anyhow!("a thread that aggregates panicked: this is a bug in trueup"))?);
        }
        made.sort_unstable_by_key(|(at, _)| *at);
        made.into_iter().map(|(_, result)| result).collect()
    }

    /// The windows of one part; its matches are gone then.
    ///
    /// # Errors
    /// Where matches that were set aside cannot be read.
    pub fn part(&self, at: usize) -> Result<Windows> {
        let reference = self.context.enricher.reference;
        let subscriptions = reference.subscriptions.len().div_ceil(self.context.parts.count());
        let mut windows = Windows::new(subscriptions, reference.meters.len(), self.expected.load(Ordering::Relaxed));
        let mut sessions: FxHashMap<StateKey, Sessions> = FxHashMap::default();
        let marks = self.context.marks.as_ref();
        let mut bytes = Vec::new();
        for shard in &self.shards {
            let mut reader = Reader::default();
            while shard.matches.next(at, &mut bytes)? {
                reader.read(&bytes, |of| self.count(of, &shard.place(of, marks)?, &mut windows, &mut sessions))?;
            }
        }
        if let Some(kept) = &self.kept {
            kept.read(at, |of, place| self.count(of, place, &mut windows, &mut sessions))?;
            kept.read_lists(at, |key, period, values| {
                if let Some(meter) = reference.meters.get(key.meter as usize) {
                    windows.add(key, WindowState::of_values(meter, values, period), None);
                }
            })?;
        }
        for (key, of) in sessions {
            let closed = of.into_windows(self.session_gap(key.meter).unwrap_or_default());
            closed.for_each(|(window_start, state)| windows.add(StateKey { window_start, ..key }, state, None));
        }
        if let Some(states) = self.states.get(at) {
            let states = std::mem::take(&mut *states.lock().unwrap_or_else(PoisonError::into_inner));
            states.into_iter().for_each(|(key, state)| windows.add(key, state, None));
        }
        self.expected.store(windows.len(), Ordering::Relaxed);
        Ok(windows)
    }

    #[inline]
    fn count(
        &self,
        of: &Match<'_>,
        &Place { window, period, is_carried, dimensions }: &Place,
        windows: &mut Windows,
        sessions: &mut FxHashMap<StateKey, Sessions>,
    ) -> Result<()> {
        let reference = self.context.enricher.reference;
        let meter = reference.meters.get(of.meter as usize).with_context(|| damaged(of))?;
        // Rows of prices are large: only those that are needed are looked at.
        let price = || reference.prices.get(of.price as usize);
        let by_event = self.context.enricher.needs_transactions(of.price as usize);
        let percentage = if by_event { price().and_then(Price::transactions) } else { None };
        let contribution = || contribution(of.identity, &of.value);
        let moment = of.moment.unwrap_or(NO_MOMENT);
        let mut key = StateKey {
            subscription: of.subscription,
            meter: of.meter,
            price: of.price,
            dimensions,
            period_start: period.start,
            window_start: period.start,
        };
        // Enrichment has checked the fee of every event.
        if let WindowKind::Session { gap_nanos } = meter.window {
            let t = moment.timestamp;
            let window = Span { start: t, end: t };
            let mut state = WindowState::new(meter, price(), window, period);
            state.count(&of.value, moment, percentage, contribution(), of.arrived.news())?;
            sessions.entry(key).or_default().add(t, t, state, gap_nanos, percentage);
        } else {
            let mut window = window.with_context(|| damaged(of))?;
            key.window_start = window.start;
            if is_carried {
                (key, window) = (key.carried(), period);
            }
            // No row says which events these are.
            let contribution = if is_carried { 0 } else { contribution() };
            let new = || WindowState { is_carried, ..WindowState::new(meter, price(), window, period) };
            windows.change(key, new, |state| state.count(&of.value, moment, percentage, contribution, of.arrived.news()))?;
        }
        Ok(())
    }

    fn session_gap(&self, meter: u32) -> Option<i64> {
        match self.context.enricher.reference.meters.get(meter as usize)?.window {
            WindowKind::Session { gap_nanos } => Some(gap_nanos),
            _ => None,
        }
    }
}
