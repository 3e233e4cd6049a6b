//! Following one number back to its events: the computation of a run, for one
//! subscription and meter, with every event on its way.
//!
//! A first scan finds which events are candidates and which of their keys repeat; a
//! second one reads all copies of those. Every event then goes the way that it goes in a
//! run: through the same deduplication, [`Matcher`], [`levels`] and [`price`]. Memory
//! holds the copies of repeated keys and the events that are listed, not all events.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};
use serde_json::value::RawValue;

use super::context::Context;
use super::deduplicate::{Copies, Copy, RepeatedKeys, key_hash};
use super::enrich::Enricher;
use super::held::{self, Held};
use super::keys::KeyHashes;
use super::letters::OpenDeadLetters;
use super::matcher::{Matcher, Outcome};
use super::matches::Partitioning;
use super::names::Names;
use super::price::{Parts, Priced, Ranks};
use super::price_steps::{self, PriceSteps};
use super::read::{check_stable, scan_keys};
use super::state::{Interner, NO_PRICE, StateKey, WindowState, index};
use super::trace_events::{CountedEvent, Listing, SetAside, Why};
use super::unused::Billed;
use super::windows::Windows;
use super::{Inputs, levels, price, scan, unused};
use crate::config::Deduplicate;
use crate::model::aggregate::{PeriodKey, PeriodRow, WindowRow};
use crate::model::basis::Scope;
use crate::model::decimal::Decimal;
use crate::model::decimal_sum::DecimalSum;
use crate::model::meter::{Aggregation, Meter};
use crate::model::price::Price;
use crate::model::property::Property;
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowKind};
use crate::reference::{Reference, Subscription};
use crate::source::{EventBatch, EventRef, Selection, Wanted};

/// Which numbers somebody asks about.
#[derive(Debug, Clone, Copy)]
pub struct Question {
    /// Indexes into the reference tables.
    pub subscription: usize,
    pub meter: usize,
    /// An instant in the window or in the billing period.
    pub at: Timestamp,
    pub of_period: bool,
    /// How many events a list keeps, the first ones by time.
    pub limit: usize,
}

/// What was found.
#[derive(Debug)]
pub struct Trace {
    pub windows: Vec<TracedWindow>,
    pub periods: Vec<TracedPeriod>,
    /// Events of the time asked about that do not count.
    pub set_aside: Listing<SetAside>,
    /// The time that the set-aside events are from.
    pub span: Span,
}

/// A window, computed anew.
#[derive(Debug)]
pub struct TracedWindow {
    pub row: WindowRow,
    pub steps: PriceSteps,
    pub events: Listing<CountedEvent>,
    pub carried_in: Option<CarriedIn>,
}

/// A billing period, computed anew.
#[derive(Debug)]
pub struct TracedPeriod {
    pub row: PeriodRow,
    pub steps: PriceSteps,
    pub events: Listing<CountedEvent>,
}

/// A level that earlier events left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct CarriedIn {
    pub level: Decimal,
    /// What it adds to the quantity of the window.
    pub quantity: Decimal,
}

/// Counted events of one row: price, dimensions, period, and window (or, for a session,
/// which is known later, and for a period, the period again).
type ListingKey = (u32, Box<str>, Timestamp, Timestamp);

/// What stays the same while events are read.
struct Search<'s> {
    question: Question,
    subscription: &'s Subscription,
    meter: &'s Meter,
    reference: &'s Reference,
    rules: &'s Deduplicate,
    external_ids: FxHashSet<&'s str>,
    /// Whole windows of all billing periods that the answer may lie in.
    range: Span,
    periods: Vec<Span>,
    /// The windows asked about; empty where only the events tell.
    windows: Vec<Span>,
}

impl<'s> Search<'s> {
    fn new(question: Question, reference: &'s Reference, inputs: &Inputs<'s>) -> Option<Self> {
        let subscription = reference.subscriptions.get(question.subscription)?;
        let meter = reference.meters.get(question.meter)?;
        let (at, timezone) = (question.at, inputs.job.timezone);
        let slot = meter.window.slot(at, timezone);
        let windows = match meter.window {
            _ if question.of_period => vec![subscription.cycle.period(at)],
            WindowKind::Tumbling(_) => vec![slot],
            WindowKind::Hopping(hopping) => hopping.windows(slot, timezone),
            WindowKind::Session { .. } => Vec::new(),
        };
        let first = match meter.window {
            // A session of an earlier period can last until after its end.
            WindowKind::Session { gap_nanos } if !question.of_period => {
                Timestamp::from_nanos(at.nanos().saturating_sub(gap_nanos))
            }
            _ => at,
        };
        // A window that straddles a boundary has a row in each period.
        let whole = windows.iter().fold(Span { start: first, end: after(at) }, |span, window| span.union(*window));
        let mut periods = vec![subscription.cycle.period(whole.start)];
        while let Some(next) = periods.last().map(|last| last.end).filter(|end| *end < whole.end) {
            periods.push(subscription.cycle.period(next));
        }
        let range = periods.iter().fold(whole, |range, period| range.union(*period));
        let external_ids = reference.customers_of(question.subscription).into_iter().map(|(id, _)| id).collect();
        Some(Search {
            question,
            subscription,
            meter,
            reference,
            rules: &inputs.job.deduplicate,
            external_ids,
            range: meter.window.widen(range, timezone),
            periods,
            windows,
        })
    }

    fn is_level(&self) -> bool {
        self.meter.aggregation == Aggregation::WeightedSum
    }

    /// Whether an event can have to do with the answer: it is the subscription's, or
    /// would be if it were in order, and its time is one that counts.
    fn is_candidate(&self, event: &EventRef<'_>) -> bool {
        let (Some(tenant), Some(name), Some(external), Some(t)) =
            (event.tenant_id, event.event_name, event.external_customer_id, event.timestamp)
        else {
            return false;
        };
        let in_time = t < self.range.end && (self.is_level() || t >= self.range.start);
        in_time
            && name == self.meter.event_name
            && tenant == self.subscription.tenant_id
            && self.external_ids.contains(external)
            && self.may_be_ours(event)
    }

    /// Whether no other subscription takes the event.
    fn may_be_ours(&self, event: &EventRef<'_>) -> bool {
        let (Some(tenant), Some(external), Some(t)) = (event.tenant_id, event.external_customer_id, event.timestamp) else {
            return false;
        };
        self.reference.subscription(tenant, external, t).map_or(true, |found| found == self.question.subscription)
    }

    /// Whether the answer is about events of this time.
    fn is_about(&self, t: Timestamp) -> bool {
        match self.windows.as_slice() {
            [] => self.periods.iter().any(|period| period.contains(t)),
            windows => windows.iter().any(|window| window.contains(t)),
        }
    }

    /// Where a list ends; a session is not known before all its events are.
    fn limit(&self) -> usize {
        if self.windows.is_empty() { usize::MAX } else { self.question.limit }
    }
}

fn after(t: Timestamp) -> Timestamp {
    Timestamp::from_nanos(t.nanos().saturating_add(1))
}

/// Computes the numbers anew, and tells where they come from.
///
/// # Errors
/// Where the source is not delivered as a whole, or a number overflows.
pub fn trace(inputs: &Inputs<'_>, question: Question) -> Result<Option<Trace>> {
    let Inputs { job, reference, source, threads, progress, .. } = *inputs;
    let Some(search) = Search::new(question, reference, inputs) else { return Ok(None) };
    let tenant = Some(search.subscription.tenant_id.clone());
    let span = (!search.is_level()).then_some(search.range);
    let splits = source.splits(&Selection { span, tenant: tenant.clone() })?;
    let announced = splits.iter().map(|split| split.announced_rows).sum();

    progress.step("find events", announced);
    let count: scan::Progress<'_> = &|rows| progress.rows(rows);
    let visit = |candidates: &mut Candidates, _: usize, batch: &EventBatch| {
        candidates.visit(&search, batch);
        Ok(())
    };
    let (found, rows) = scan::scan(source, &splits, Wanted::Whole, threads, count, Candidates::default, visit)?;
    let wanted: FxHashSet<u64> = found.into_iter().flat_map(|one| one.hashes).collect();
    let keys = scan_keys(inputs, &splits)?;
    let repeated = RepeatedKeys::new(KeyHashes::repeated(keys.iter().map(|keys| &keys.hashes), threads)).among(&wanted);

    progress.step("trace", Some(rows.iter().sum()));
    let context = Context {
        enricher: Enricher::new(reference, Scope { tenant, customer: None, meter: Some(search.meter.id.clone()) }),
        rules: &job.deduplicate,
        timezone: job.timezone,
        range: search.range,
        reach: search.range,
        parts: Partitioning::default(),
        repeated,
        times_before: None,
        open_dead_letters: OpenDeadLetters::default(),
        marks: None,
        has_kept: false,
        keep_in: None,
    };
    let visit = |tracer: &mut Tracer<'_, '_>, _: usize, batch: &EventBatch| tracer.visit(batch);
    let new_tracer = || Tracer::new(&search, &context);
    let (tracers, again) = scan::scan(source, &splits, Wanted::Whole, threads, count, new_tracer, visit)?;
    check_stable(&splits, &rows, &again)?;
    let mut tracers = tracers.into_iter();
    let mut traced = tracers.next().unwrap_or_else(|| Tracer::new(&search, &context));
    tracers.for_each(|other| traced.merge(other));
    traced.settle_repeated()?;
    traced.finish(job.timezone).map(Some)
}

/// What the first scan finds.
#[derive(Default)]
struct Candidates {
    hashes: FxHashSet<u64>,
}

impl Candidates {
    fn visit(&mut self, search: &Search<'_>, batch: &EventBatch) {
        for event in batch.rows() {
            if search.is_candidate(&event) {
                self.hashes.extend(key_hash(&search.rules.key, &event));
            }
        }
    }
}

/// What the second scan finds.
struct Tracer<'c, 'r> {
    search: &'c Search<'r>,
    context: &'c Context<'r>,
    /// Computes the numbers.
    total: Matcher<'c, 'r>,
    /// Sees each event alone.
    single: Matcher<'c, 'r>,
    counted: BTreeMap<ListingKey, Listing<CountedEvent>>,
    set_aside: Listing<SetAside>,
    held: Held,
}

impl<'c, 'r> Tracer<'c, 'r> {
    fn new(search: &'c Search<'r>, context: &'c Context<'r>) -> Self {
        Tracer {
            search,
            context,
            total: Matcher::new(context),
            single: Matcher::new(context),
            counted: BTreeMap::new(),
            set_aside: Listing::new(search.limit()),
            held: Held::default(),
        }
    }

    fn visit(&mut self, batch: &EventBatch) -> Result<()> {
        for event in batch.rows() {
            let hash = key_hash(&self.context.rules.key, &event);
            if let Some(hash) = hash.filter(|hash| self.context.repeated.contains(*hash)) {
                self.held.hold(hash, &event, true)?;
            } else if self.search.is_candidate(&event) {
                self.total.take_single(&event)?;
                self.single.take_single(&event)?;
                self.note(&event)?;
            }
        }
        Ok(())
    }

    fn merge(&mut self, other: Tracer<'c, 'r>) {
        self.total.merge(other.total);
        for (key, listing) in other.counted {
            self.counted.entry(key).or_insert_with(|| Listing::new(self.search.limit())).merge(listing);
        }
        self.set_aside.merge(other.set_aside);
        self.held.merge(other.held);
    }

    /// Decides about the keys of several copies, as a run does.
    fn settle_repeated(&mut self) -> Result<()> {
        let mut held = std::mem::take(&mut self.held);
        let mut part = Vec::new();
        for at in 0..held::PARTS {
            part.clear();
            held.take_part(at, &mut part)?;
            let problems = held::problems(&part)?;
            for copies in held::by_key(&part, &problems, self.context.rules)? {
                if !copies.iter().any(|copy| self.search.is_candidate(&copy.event)) {
                    continue;
                }
                let Some(kept) = Copies::of(&copies, self.context.rules.keep, |_| ()) else { continue };
                self.total.resolve(&kept)?;
                self.single.resolve(&kept)?;
                self.note_copies(&copies, &kept)?;
            }
        }
        Ok(())
    }

    /// Notes what became of the copies of one key; the one that is kept went through
    /// `single` just before.
    fn note_copies(&mut self, copies: &[Copy<'_>], kept: &Copies<'_>) -> Result<()> {
        let is_void = kept.is_void(self.context.rules.keep);
        let mut kept_is_left = !is_void;
        let mut outcome_is_noted = false;
        for copy in copies {
            let event = copy.event;
            if kept_is_left && copy.is_repetition_of(&kept.kept) {
                kept_is_left = false;
                if self.search.is_candidate(&event) {
                    self.note(&event)?;
                    outcome_is_noted = true;
                }
                continue;
            }
            if event.deleted || !self.search.is_candidate(&event) {
                continue;
            }
            let why = if is_void { Why::voided(copies) } else { Why::superseded(&event, &kept.kept.event) };
            self.set_aside(&event, why);
        }
        if !outcome_is_noted {
            self.single.take_outcome()?;
        }
        Ok(())
    }

    fn set_aside(&mut self, event: &EventRef<'_>, why: Why) {
        if let Some(t) = event.timestamp.filter(|t| self.search.is_about(*t)) {
            self.set_aside.add(SetAside::new(event, t, why));
        }
    }

    /// Notes what became of a candidate that went through `single` just before.
    fn note(&mut self, event: &EventRef<'_>) -> Result<()> {
        let Outcome { counted, rejected, skipped } = self.single.take_outcome()?;
        let Some(t) = event.timestamp.filter(|t| self.search.is_about(*t)) else { return Ok(()) };
        if let Some(key) = counted.into_iter().find(|key| key.subscription == index(self.search.question.subscription)) {
            self.note_counted(event, t, key);
            return Ok(());
        }
        let why = match rejected.into_iter().next() {
            Some(letter) => Why::DeadLetter { reason: letter.key.reason.name(), detail: letter.detail },
            None if event.deleted => return Ok(()),
            None if skipped > 0 => Why::skipped(self.search.meter),
            None => Why::filtered(self.search.meter, self.failed_filter(event)),
        };
        self.set_aside.add(SetAside::new(event, t, why));
        Ok(())
    }

    /// Calls `of` with the properties of an event, as the meter reads them.
    fn with_slots<T>(
        &self,
        event: &EventRef<'_>,
        of: impl Fn(&super::enrich::MeterPlan<'r>, &[Property<'_>]) -> Option<T>,
    ) -> Option<T> {
        let plan = self.context.enricher.plan(event.event_name?)?;
        let mut slots = Vec::new();
        plan.properties.read(event.properties, &mut slots).ok()?;
        of(plan.meters.first()?, &slots)
    }

    fn failed_filter(&self, event: &EventRef<'_>) -> Option<usize> {
        self.with_slots(event, |meter, slots| meter.failed_filter(slots))
    }

    fn note_counted(&mut self, event: &EventRef<'_>, t: Timestamp, key: StateKey) {
        let value = self.with_slots(event, |meter, slots| meter.value(slots).ok().flatten()?.describe());
        let dimensions: Box<str> = (&*self.single.dimensions.text(key.dimensions)).into();
        let windows = self.search.windows.iter().filter(|window| window.contains(t)).map(|window| window.start);
        let starts: Vec<_> = if self.search.windows.is_empty() { vec![key.period_start] } else { windows.collect() };
        for start in starts {
            let listing = self.counted.entry((key.price, dimensions.clone(), key.period_start, start));
            let listing = listing.or_insert_with(|| Listing::new(self.search.limit()));
            listing.add(CountedEvent::new(event, t, value.clone()));
        }
    }

    /// The answer, once everything is read.
    fn finish(mut self, timezone: chrono_tz::Tz) -> Result<Trace> {
        let Search { question, reference, range, .. } = *self.search;
        let names = Names::new(reference);
        let all = self.total.take_matches().all()?.into_states();
        let mut windows = Windows::default();
        all.filter(|(key, _)| key.subscription == index(question.subscription))
            .for_each(|(key, state)| windows.add(key, state, None));
        let dimensions = std::mem::take(&mut self.total.dimensions);
        let before = if self.search.is_level() { windows.clone().into_states().collect() } else { FxHashMap::default() };
        if self.search.is_level() {
            levels::carry_in(&mut windows, (&dimensions, &FxHashMap::default()), reference, &mut range.clone(), false, timezone);
        }
        let mut priced = price::price(
            windows.clone(),
            (&dimensions, &Ranks::new(reference, &dimensions)),
            reference,
            &names,
            range,
            timezone,
            None,
        )?;
        let is_ours = |(_, subscription): (usize, &Subscription), (_, price): (usize, &Price), _: Span| {
            std::ptr::eq(subscription, self.search.subscription) && price.meter_id == self.search.meter.id
        };
        unused::add_periods(&mut priced.periods, reference, &names, &Billed::of(range), is_ours)?;
        let mut states: Vec<_> = windows.into_states().collect();
        states.sort_unstable_by_key(|(key, _)| key.window_start);
        Answer { search: self.search, states, before, dimensions, names: &names, counted: self.counted }
            .give(priced, self.set_aside)
    }
}

/// Everything computed, to be put together.
struct Answer<'a> {
    search: &'a Search<'a>,
    /// By time.
    states: Vec<(StateKey, WindowState)>,
    /// Of a level, before anything was carried in.
    before: FxHashMap<StateKey, WindowState>,
    dimensions: Interner,
    names: &'a Names,
    counted: BTreeMap<ListingKey, Listing<CountedEvent>>,
}

impl Answer<'_> {
    fn give(self, priced: Priced, mut set_aside: Listing<SetAside>) -> Result<Trace> {
        let Question { at, of_period, limit, .. } = self.search.question;
        let is_ours = |key: &PeriodKey| self.search.periods.iter().any(|period| period.start == key.period_start);
        let (mut windows, mut periods) = (Vec::new(), Vec::new());
        let asked = Span { start: at, end: after(at) };
        let mut span = self.search.windows.iter().copied().reduce(Span::union).unwrap_or(asked);
        if of_period {
            for row in priced.periods.into_iter().filter(|row| is_ours(&row.key)) {
                let (parts, states) = self.accumulation(&row.key);
                let steps = price_steps::of_period(&states, parts, &row)?;
                let events = self.listing(&row.key, row.key.period_start);
                periods.push(TracedPeriod { events: events.charged(&steps, parts), row, steps });
            }
        } else {
            let found = priced.windows.into_iter().map(|window| Arc::unwrap_or_clone(window.row));
            for row in found.filter(|row| is_ours(&row.key.period) && row.window().contains(at)) {
                let (parts, states) = self.accumulation(&row.key.period);
                let start = row.key.window_start;
                let is_hopping = matches!(self.search.meter.window, WindowKind::Hopping(_));
                let steps = match is_hopping {
                    false => price_steps::of_window(&states, parts, row.period(), start)?,
                    true => PriceSteps::default(),
                };
                span = span.union(row.window());
                let is_session = self.search.windows.is_empty();
                let mut events = self.listing(&row.key.period, if is_session { row.key.period.period_start } else { start });
                if is_session {
                    events.keep(limit, |event| row.window().contains(event.timestamp));
                }
                let carried_in = self.carried_in(&row, &states)?;
                windows.push(TracedWindow { events: events.charged(&steps, parts), row, steps, carried_in });
            }
        }
        if let (WindowKind::Session { gap_nanos }, true, false) = (self.search.meter.window, windows.is_empty(), of_period) {
            let [start, end] = [-gap_nanos, gap_nanos].map(|gap| Timestamp::from_nanos(at.nanos().saturating_add(gap)));
            span = Span { start, end };
        }
        set_aside.keep(limit, |event| span.contains(event.timestamp));
        Ok(Trace { windows, periods, set_aside, span })
    }

    /// The reference rows and the states of one accumulation in one period.
    fn accumulation(&self, of: &PeriodKey) -> (Parts<'_>, Vec<(StateKey, WindowState)>) {
        let is_it = |(key, _): &&(StateKey, WindowState)| self.names.period_key(key, &self.dimensions) == *of;
        let states: Vec<_> = self.states.iter().filter(is_it).cloned().collect();
        let price = self.search.reference.prices.iter().find(|price| *price.id == *of.price_id);
        let parts = Parts { subscription: self.search.subscription, meter: self.search.meter, price };
        (parts, states)
    }

    fn listing(&self, of: &PeriodKey, start: Timestamp) -> Listing<CountedEvent> {
        let price = self.search.reference.prices.iter().position(|price| *price.id == *of.price_id);
        let key = (price.map_or(NO_PRICE, index), (&*of.dimensions).into(), of.period_start, start);
        // Several sessions share one list.
        self.counted.get(&key).cloned().unwrap_or_else(|| Listing::new(self.search.question.limit))
    }

    /// What earlier segments of a level leave to a window.
    fn carried_in(&self, row: &WindowRow, states: &[(StateKey, WindowState)]) -> Result<Option<CarriedIn>> {
        let state = states.iter().find(|(key, _)| key.window_start == row.key.window_start);
        let Some((key, state)) = state.filter(|_| self.search.is_level()) else { return Ok(None) };
        let period = row.period();
        let measure = super::accumulator::Measure {
            multiplier: self.search.meter.multiplier,
            period_nanos: period.end.nanos().saturating_sub(period.start.nanos()),
        };
        let own = self.before.get(key).map_or(Ok(Decimal::ZERO), |state| state.accumulator.quantity(measure))?;
        let quantity = state.accumulator.quantity(measure)?.checked_sub(own)?;
        if quantity.is_zero() {
            return Ok(None);
        }
        Ok(Some(CarriedIn { level: self.level_before(row, key)?, quantity }))
    }

    /// The level that earlier segments leave where one of a row begins; of several, the first
    /// that gets any.
    fn level_before(&self, row: &WindowRow, key: &StateKey) -> Result<Decimal> {
        let Search { question, subscription, reference, .. } = *self.search;
        let values: BTreeMap<String, &RawValue> = serde_json::from_str(&row.key.period.dimensions).unwrap_or_default();
        let values: Vec<_> = values.iter().map(|(name, value)| (name.as_str(), value.get().to_owned())).collect();
        let of_level = self.states.iter().filter(|(other, _)| other.dimensions == key.dimensions);
        let changes: Vec<_> = of_level.flat_map(|(_, state)| state.accumulator.level_changes()).collect();
        let (period, window) = (row.period(), row.window());
        let end = period.end.min(subscription.active.end);
        let mut at = period.start;
        while at < end {
            let price = reference.price_at(subscription, question.meter, at, &values);
            if window.contains(at) && price.is_some_and(|price| price.map_or(NO_PRICE, index) == key.price) {
                let mut level = DecimalSum::default();
                changes.iter().filter(|change| change.until <= at).for_each(|change| level.merge(change.level));
                if !level.is_zero() {
                    return Ok(level.total()?);
                }
            }
            at = reference.level_end(subscription, question.meter, at, period, &values);
        }
        Ok(Decimal::ZERO)
    }
}
