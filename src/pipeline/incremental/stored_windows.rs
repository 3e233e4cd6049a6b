//! Windows that nothing marks, in billing periods of which another window is marked: they
//! are taken as they are stored, so that only marked windows need their events.

use anyhow::Result;
use rustc_hash::FxHashMap;

use super::Marks;
use super::marks::Pair;
use super::spans::Spans;
use crate::model::aggregate::{PeriodKey, PeriodRow, StoredWindow, Text, WindowRow};
use crate::model::decimal::DecimalSum;
use crate::model::meter::{ChargeOn, Meter};
use crate::model::window::Span;
use crate::pipeline::accumulator::{Accumulator, Measure};
use crate::pipeline::closed::ClosedPeriods;
use crate::pipeline::lateness::Lateness;
use crate::pipeline::past::{Past, Stored};
use crate::pipeline::state::{Interner, NO_DIMENSIONS, NO_PRICE, StateKey, WindowCache, WindowState, index};
use crate::pipeline::{Inputs, Request};
use crate::reference::{Reference, Subscription};

/// Reads what is stored of marked billing periods. Marks those as a whole of which some
/// windows cannot be taken from there.
///
/// # Errors
/// Where the store cannot be read.
pub fn read(
    inputs: &Inputs<'_>,
    past: &Past,
    request: (&Request, &Lateness),
    spans: (Span, Span),
    marks: &mut Marks,
) -> Result<Stored> {
    let stored = past.read(inputs, request, spans, Some(marks))?;
    // What is closed differs from its events: that is recorded, but not in the rows.
    let mut whole = closed_periods(marks, &stored.closed, inputs.reference);
    let accumulations = Accumulations::new(inputs.reference);
    let mut check =
        Check { accumulations, periods: &stored.periods, timezone: inputs.job.timezone, windows: WindowCache::default() };
    for (pair, period, rows) in divided(marks, &stored.windows, inputs.reference) {
        let left = rows.iter().map(|stored| &*stored.row).filter(|row| !marks.hold_window(pair, row));
        if !check.can_stand_in(pair, rows, left) {
            whole.push((pair, period));
        }
    }
    for ((subscription, meter), period) in whole {
        marks.mark(subscription, meter, period);
    }
    Ok(stored)
}

/// Finds rows that are not what the definitions would make of any events.
struct Check<'c> {
    accumulations: Accumulations<'c>,
    periods: &'c [PeriodRow],
    timezone: chrono_tz::Tz,
    windows: WindowCache,
}

impl Check<'_> {
    /// Whether those of a billing period's `rows` that are `left` can stand in for their
    /// events.
    fn can_stand_in<'s>(&mut self, pair: Pair, rows: &[StoredWindow], left: impl Iterator<Item = &'s WindowRow>) -> bool {
        let mut left = left.peekable();
        let Some(key) = left.peek().map(|row| &row.key.period) else { return true };
        let Some(Accumulation { meter, period, .. }) = self.accumulations.of(pair, key) else { return false };
        let Ok(at) = self.periods.binary_search_by(|row| row.key.cmp(key)) else { return false };
        let mut is_right = |row: &WindowRow| {
            row.period() == period && row.window() == self.windows.window(meter.window, row.key.window_start, self.timezone)
        };
        left.all(&mut is_right) && self.periods.get(at).is_some_and(|period| add_up(meter, rows, period))
    }
}

/// Whether the windows of a billing period are those that it was priced with.
fn add_up(meter: &Meter, rows: &[StoredWindow], period: &PeriodRow) -> bool {
    let measure = Measure { multiplier: meter.multiplier, period_nanos: 0 };
    let (mut costs, mut quantities, mut to_date) = (DecimalSum::default(), DecimalSum::default(), Accumulator::new(meter));
    for StoredWindow { row, .. } in rows {
        let Some(state) = WindowState::of_row(meter, row) else { return false };
        to_date.merge(&state.accumulator);
        quantities.add(row.quantity);
        costs.add(row.cost);
    }
    let quantity = match meter.charge_on {
        ChargeOn::Period => to_date.quantity(measure),
        ChargeOn::WindowSum | ChargeOn::Window => quantities.total(),
    };
    quantity == Ok(period.quantity) && costs.total() == Ok(period.cost)
}

/// Hands the windows of marked billing periods that are not marked themselves to `each`, as
/// they are stored: their usage is known, what they cost is not. Returns how many.
pub fn stand_in(
    marks: &Marks,
    stored: &[StoredWindow],
    reference: &Reference,
    dimensions: &mut Interner,
    mut each: impl FnMut(StateKey, WindowState),
) -> u64 {
    let accumulations = Accumulations::new(reference);
    let mut count = 0;
    for (pair, _, rows) in divided(marks, stored, reference) {
        let Some(of) = rows.first().and_then(|first| accumulations.of(pair, &first.row.key.period)) else { continue };
        let dimensions = rows.first().map_or(NO_DIMENSIONS, |first| dimensions.intern(&first.row.key.period.dimensions));
        for StoredWindow { row, .. } in rows.iter().filter(|stored| !marks.hold_window(pair, &stored.row)) {
            let Some(state) = WindowState::of_row(of.meter, row) else { continue };
            count += 1;
            each(StateKey { dimensions, window_start: row.key.window_start, ..of.key }, state);
        }
    }
    count
}

/// The rows of billing periods that are marked in part, by subscription and meter; those of
/// one accumulation together. The period is the one that begins the rows' by the tables: what
/// rows say of its end may have been altered.
fn divided<'s>(
    marks: &Marks,
    stored: &'s [StoredWindow],
    reference: &Reference,
) -> impl Iterator<Item = (Pair, Span, &'s [StoredWindow])> {
    stored.chunk_by(|a, b| a.row.key.period == b.row.key.period).filter_map(|rows| {
        let key = &rows.first()?.row.key.period;
        let pair = marks.pair(key)?;
        let period = reference.subscriptions.get(pair.0)?.cycle.period(key.period_start);
        marks.divide(pair, period).then_some((pair, period, rows))
    })
}

/// What rows of the store belong to, in terms of the reference tables.
struct Accumulations<'r> {
    reference: &'r Reference,
    prices: FxHashMap<&'r str, usize>,
}

/// A combination of subscription, meter, price and billing period.
#[derive(Clone, Copy)]
struct Accumulation<'r> {
    /// Of a window that begins with the period, without dimensions.
    key: StateKey,
    meter: &'r Meter,
    period: Span,
}

impl<'r> Accumulations<'r> {
    fn new(reference: &'r Reference) -> Self {
        let prices = reference.prices.iter().enumerate().map(|(at, price)| (price.id.as_str(), at));
        Accumulations { reference, prices: prices.collect() }
    }

    /// `None` where the tables have nothing like it.
    fn of(&self, (subscription, meter): Pair, key: &PeriodKey) -> Option<Accumulation<'r>> {
        let (row, meter_row) = (self.reference.subscriptions.get(subscription)?, self.reference.meters.get(meter)?);
        let period = row.cycle.period(key.period_start);
        let price = if key.price_id.is_empty() {
            NO_PRICE
        } else {
            let at = *self.prices.get(&*key.price_id)?;
            let price = self.reference.prices.get(at)?;
            let fits = price.plan_id == row.plan_id && price.meter_id == meter_row.id && price.currency.code == row.currency;
            (fits && price.transactions().is_none()).then(|| index(at))?
        };
        let key = StateKey {
            subscription: index(subscription),
            meter: index(meter),
            price,
            dimensions: NO_DIMENSIONS,
            period_start: period.start,
            window_start: period.start,
        };
        Some(Accumulation { key, meter: meter_row, period })
    }
}

/// Marked periods whose rows stay as they are.
fn closed_periods(marks: &Marks, closed: &ClosedPeriods, reference: &Reference) -> Vec<(Pair, Span)> {
    let mut found = Vec::new();
    if closed.is_empty() {
        return found;
    }
    for (pair, spans) in marks.spans() {
        let Some(Subscription { tenant_id, id, cycle, .. }) = reference.subscriptions.get(pair.0) else { continue };
        let (tenant, id) = (Text::from(tenant_id.as_str()), Text::from(id.as_str()));
        for span in spans.iter().filter(|span| *span != Spans::ALWAYS) {
            let first = cycle.period(span.start);
            let periods = std::iter::successors(Some(first), |period| Some(cycle.period(period.end)));
            let periods = periods.take_while(|period| period.start < span.end);
            found.extend(periods.filter(|period| closed.hold_of(&tenant, &id, period.start)).map(|period| (pair, period)));
        }
    }
    found
}
