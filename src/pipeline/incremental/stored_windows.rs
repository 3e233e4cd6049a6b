//! Windows that nothing marks, in billing periods of which another window is marked: they
//! are taken as they are stored, so that only marked windows need their events. Those that stay
//! as they are for sure are not even read: they are taken together, by the row of the billing
//! period. Such are those before the first marked one, for what comes later moves neither their
//! usage nor their cost; where every unit costs the same, all that are not marked.

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};

use super::kept::Kept;
use super::marks::Pair;
use super::separable::is_listed;
use super::values::{ListKey, ValueList};
use super::{Coverage, Marks};
use crate::model::aggregate::{PeriodKey, PeriodRow, StoredWindow, Text, WindowRow};
use crate::model::decimal::{Decimal, DecimalError};
use crate::model::decimal_sum::DecimalSum;
use crate::model::meter::{Aggregation, ChargeOn, Meter};
use crate::model::price::{PriceModel, Usage};
use crate::model::spans::Spans;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::pipeline::accumulator::{Accumulator, Measure};
use crate::pipeline::closed::ClosedPeriods;
use crate::pipeline::lateness::Lateness;
use crate::pipeline::past::{Past, Stored};
use crate::pipeline::state::{Interner, NO_DIMENSIONS, NO_PRICE, StateKey, WindowCache, WindowState, index};
use crate::pipeline::{Inputs, Request, price};
use crate::reference::{Reference, Subscription};

/// Reads what is stored of marked billing periods: their rows, and those of windows that may
/// change, or that cost something else then. Marks those as a whole of which some windows cannot
/// be taken from there.
///
/// # Errors
/// Where the store cannot be read.
pub fn read(
    inputs: &Inputs<'_>,
    past: &Past,
    request: (&Request, &Lateness),
    spans: (Span, Span),
    marks: &mut Marks,
    kept: Option<&Kept>,
) -> Result<Stored> {
    let mut stored = past.read_periods(inputs, request, spans, Some(marks))?;
    // What is closed differs from its events: that is recorded, but not in the rows.
    for (pair, period) in closed_periods(marks, &stored.closed, inputs.reference) {
        marks.mark(pair, period);
    }
    // A later run of a part of the job priced events whose windows it did not write.
    let is_whole = past.runs.iter().rfind(|run| run.mode.computes()).is_some_and(Coverage::is_baseline);
    let mut check = Check::new(inputs, kept.filter(|_| is_whole));
    check.untie(marks, &stored);
    let can_carry = |part: &MarkedPeriod<'_>| is_whole && (check.can_carry(part) || check.list(part).is_some());
    let is_unfit = |part: &MarkedPeriod<'_>| part.is_carried && !can_carry(part);
    let parts = divided(marks, &stored, inputs.reference).filter(is_unfit);
    let to_open: Vec<_> = parts.map(|part| (part.pair, part.period)).collect();
    to_open.into_iter().for_each(|(pair, period)| marks.let_change(pair, period));
    stored.windows = past.read_marked(inputs, spans, marks, None)?;
    loop {
        let parts = divided(marks, &stored, inputs.reference).filter(|part| !check.can_stand_in(part, marks));
        let wrong: Vec<_> = parts.map(|part| (part.pair, part.period, part.is_carried)).collect();
        let mut opened = FxHashSet::default();
        for (pair, period, is_carried) in wrong {
            if is_carried {
                marks.let_change(pair, period);
                opened.insert(pair);
            } else {
                marks.mark(pair, period);
            }
        }
        if opened.is_empty() {
            return Ok(stored);
        }
        let is_opened = |row: &WindowRow| marks.pair(&row.key.period).is_some_and(|pair| opened.contains(&pair));
        stored.windows.retain(|stored| !is_opened(&stored.row));
        let again = past.read_marked(inputs, spans, marks, Some(&opened))?;
        stored.windows.extend(again.into_iter().filter(|stored| is_opened(&stored.row)));
        stored.windows.sort_unstable_by(|a, b| a.row.key.cmp(&b.row.key));
    }
}

/// Finds rows that are not what the definitions would make of any events.
struct Check<'c> {
    accumulations: Accumulations<'c>,
    timezone: chrono_tz::Tz,
    windows: WindowCache,
    /// What earlier runs kept, where the rows are those that they left.
    kept: Option<&'c Kept>,
}

/// What ties the windows of a subscription and a meter in a billing period together.
struct Ties {
    period: Span,
    /// Whether the distinct values of windows are needed that are not marked.
    needs_values: bool,
    /// Nothing.
    are_alone: bool,
    /// Those that may change come after all others.
    are_last: bool,
}

impl Ties {
    fn of(part: &MarkedPeriod<'_>, check: &Check<'_>, marks: &Marks) -> Self {
        let meter = check.accumulations.reference.meters.get(part.pair.1);
        let needs_values = meter.is_some_and(is_listed) && !marks.need_all_events(part.pair, part.period);
        Ties { period: part.period, needs_values, are_alone: true, are_last: true }
    }
}

impl<'c> Check<'c> {
    fn new(inputs: &Inputs<'c>, kept: Option<&'c Kept>) -> Self {
        let accumulations = Accumulations::new(inputs.reference);
        Check { accumulations, timezone: inputs.job.timezone, windows: WindowCache::default(), kept }
    }

    /// Whether the row of a billing period can stand in for windows that stay as they are.
    fn can_carry(&self, part: &MarkedPeriod<'_>) -> bool {
        let Some(Accumulation { key, meter, .. }) = self.accumulations.of(part.pair, part.key) else { return false };
        let price = self.accumulations.reference.prices.get(key.price as usize);
        // The price must depend on the quantity alone, for what is left of it is all that is known
        // of those windows; and must say something, for it is how a wrong quantity is found.
        price.is_some_and(|price| !matches!(price.model, PriceModel::Percentage(_) | PriceModel::Flat { .. }))
            && part.row.is_some_and(|row| !row.cost.is_zero())
            && Accumulator::of_sum(meter, Decimal::ZERO).is_some()
    }

    /// Lets windows stay as they are that others do not move, and finds out which of those need
    /// all events of their billing period after all.
    fn untie(&self, marks: &mut Marks, stored: &Stored) {
        let mut periods: FxHashMap<(Pair, Timestamp), Ties> = FxHashMap::default();
        for part in divided(marks, stored, self.accumulations.reference) {
            let ties = periods.entry((part.pair, part.period.start)).or_insert_with(|| Ties::of(&part, self, marks));
            let list = self.list(&part);
            let is_priced = !part.key.price_id.is_empty();
            ties.are_alone &= self.is_untied(&part) || (list.is_some() && !is_priced);
            ties.are_last &= list.is_some_and(|list| marks.change_after(part.pair, part.period, list.until));
        }
        for ((pair, _), Ties { period, needs_values, are_alone, are_last }) in periods {
            if are_alone {
                marks.let_stand_alone(pair, period);
            } else if needs_values && !are_last {
                marks.need_events(pair, period);
            }
        }
    }

    /// Whether what a window costs depends on no other window, and the row of the billing period
    /// can stand in for all that are not marked.
    fn is_untied(&self, part: &MarkedPeriod<'_>) -> bool {
        let Some(Accumulation { key, .. }) = self.accumulations.of(part.pair, part.key) else { return false };
        let price = self.accumulations.reference.prices.get(key.price as usize);
        // A cost that was rounded depends on what came before.
        let is_exact = || self.kept.is_some_and(|kept| kept.is_exact(part.pair.1));
        price.is_some_and(|price| price.constant_amount().is_some()) && is_exact() && self.can_carry(part)
    }

    /// The distinct values of a part, where they give what its row says.
    fn list(&self, part: &MarkedPeriod<'_>) -> Option<&'c ValueList> {
        let (kept, row) = (self.kept?, part.row?);
        let Accumulation { key, period, meter } = self.accumulations.of(part.pair, part.key)?;
        // Earlier runs may have kept lists when the meter was another.
        if !is_listed(meter) {
            return None;
        }
        let dimensions = part.key.dimensions.to_string();
        let list = kept.list(&ListKey { pair: part.pair, price: key.price, dimensions, period_start: period.start })?;
        let quantity = Decimal::from_u64(list.count);
        let is_right = || {
            let Some(price) = self.accumulations.reference.prices.get(key.price as usize) else { return row.cost.is_zero() };
            let active = self.accumulations.reference.subscriptions.get(part.pair.0).map(|row| row.active);
            let share = active.map(|active| price.share(period, active));
            // The price must depend on the quantity alone.
            !matches!(price.model, PriceModel::Percentage(_))
                && share.is_some_and(|share| price.cost(Usage { quantity, ..Usage::NONE }, share) == Ok(row.cost))
        };
        (quantity == row.quantity && row.period_end == period.end && is_right()).then_some(list)
    }

    /// Whether those windows of a part that are not marked can stand in for their events.
    fn can_stand_in(&mut self, part: &MarkedPeriod<'_>, marks: &Marks) -> bool {
        let mut left = part.left(marks).peekable();
        if left.peek().is_none() && !part.is_carried {
            return true;
        }
        if part.is_carried && self.list(part).is_some() {
            return left.peek().is_none();
        }
        let Some(Accumulation { meter, period, .. }) = self.accumulations.of(part.pair, part.key) else { return false };
        let mut is_right = |row: &WindowRow| {
            row.period() == period && row.window() == self.windows.window(meter.window, row.key.window_start, self.timezone)
        };
        left.all(&mut is_right)
            && match part.row {
                Some(_) if part.is_carried => self.accumulations.carried(part, marks).is_ok(),
                Some(row) => add_up(meter, part.windows, row),
                None => false,
            }
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

/// Windows that were taken from the store.
#[derive(Debug, Default)]
pub struct StoodIn {
    /// One by one.
    pub windows: u64,
    /// Billing periods of a meter of which windows were taken together.
    pub carried: u64,
}

/// What is known of windows without their events.
pub enum Known<'k> {
    Window(WindowState),
    /// The distinct values of all windows of a billing period.
    Values(Span, &'k ValueList),
}

/// Hands the windows of marked billing periods that are not marked themselves to `each`, as
/// they are stored: their usage is known, what they cost is not.
pub fn stand_in<'k>(
    marks: &Marks,
    stored: &Stored,
    (inputs, kept): (&Inputs<'k>, Option<&'k Kept>),
    dimensions: &mut Interner,
    mut each: impl FnMut(StateKey, Known<'k>),
) -> StoodIn {
    let check = Check::new(inputs, kept);
    let mut count = StoodIn::default();
    for part in divided(marks, stored, inputs.reference) {
        let Some(of) = check.accumulations.of(part.pair, part.key) else { continue };
        let dimensions = dimensions.intern(&part.key.dimensions);
        let mut carry = |key: StateKey, known| {
            count.carried += 1;
            each(StateKey { dimensions, ..key.carried() }, known);
        };
        match check.list(&part).filter(|_| part.is_carried) {
            Some(list) => carry(of.key, Known::Values(part.period, list)),
            None if part.is_carried => {
                if let Ok(Some((key, state))) = check.accumulations.carried(&part, marks) {
                    carry(key, Known::Window(state));
                }
            }
            None => {}
        }
        for row in part.left(marks) {
            let Some(state) = WindowState::of_row(of.meter, row) else { continue };
            count.windows += 1;
            each(StateKey { dimensions, window_start: row.key.window_start, ..of.key }, Known::Window(state));
        }
    }
    count
}

/// What is stored of one accumulation in a billing period that is marked in part.
struct MarkedPeriod<'s> {
    pair: Pair,
    /// By the tables: what rows say of its end may have been altered.
    period: Span,
    key: &'s PeriodKey,
    row: Option<&'s PeriodRow>,
    /// Those that may change, or that cost something else then.
    windows: &'s [StoredWindow],
    /// Whether others are known by the row of the period alone.
    is_carried: bool,
}

impl<'s> MarkedPeriod<'s> {
    /// The windows that are not marked.
    fn left(&self, marks: &Marks) -> impl Iterator<Item = &'s WindowRow> {
        let rows = self.windows.iter().map(|stored| &*stored.row);
        rows.filter(|row| !marks.hold_window(self.pair, row))
    }
}

/// What is stored of marked billing periods, one accumulation after the other.
fn divided<'s>(marks: &Marks, stored: &'s Stored, reference: &Reference) -> impl Iterator<Item = MarkedPeriod<'s>> {
    let mut windows = stored.windows.chunk_by(|a, b| a.row.key.period == b.row.key.period).peekable();
    let mut rows = stored.periods.iter().peekable();
    let of = |windows: &&'s [StoredWindow]| windows.first().map(|first| &*first.row.key.period);
    let accumulations = std::iter::from_fn(move || {
        let key = [windows.peek().and_then(of), rows.peek().map(|row| &row.key)].into_iter().flatten().min()?;
        let windows = windows.next_if(|windows| of(windows) == Some(key)).unwrap_or_default();
        Some((key, rows.next_if(|row| row.key == *key), windows))
    });
    accumulations.filter_map(|(key, row, windows)| {
        let (pair, period) = marks.period_of(key, reference)?;
        let is_carried = marks.leave_some(pair, period);
        marks.divide(pair, period).then_some(MarkedPeriod { pair, period, key, row, windows, is_carried })
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

impl Accumulations<'_> {
    /// What the windows beside those of a part are together; `None` where there are none. Nothing
    /// but their sum is known: it must cost what the row of the billing period leaves for them.
    fn carried(&self, part: &MarkedPeriod<'_>, marks: &Marks) -> Result<Option<(StateKey, WindowState)>, Unproved> {
        let row = part.row.ok_or(Unproved)?;
        let Accumulation { key, meter, period } = self.of(part.pair, part.key).ok_or(Unproved)?;
        let (mut quantities, mut costs) = (DecimalSum::default(), DecimalSum::default());
        for StoredWindow { row, .. } in part.windows {
            quantities.add(row.quantity);
            costs.add(row.cost);
        }
        let (quantity, cost) = (row.quantity.checked_sub(quantities.total()?)?, row.cost.checked_sub(costs.total()?)?);
        if quantity.is_zero() {
            // Windows whose quantities cancel to zero keep the row of their billing period, even
            // where all others go; and that row may say what is due without any window.
            let keeps_its_row = meter.aggregation == Aggregation::Count || part.left(marks).next().is_some();
            return if keeps_its_row && cost.is_zero() { Ok(None) } else { Err(Unproved) };
        }
        let state = WindowState::carried(meter, quantity, period).ok_or(Unproved)?;
        let parts = price::Parts::of(&key, self.reference).ok_or(Unproved)?;
        let (_, priced) = price::Accumulation::new(parts, period).add(&state)?;
        if priced == cost && !cost.is_zero() && row.period_end == period.end { Ok(Some((key, state))) } else { Err(Unproved) }
    }
}

/// What rows say cannot be right, or proves nothing.
struct Unproved;

impl From<DecimalError> for Unproved {
    fn from(_: DecimalError) -> Self {
        Unproved
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
            let periods = cycle.periods(span).filter(|period| closed.hold_of(&tenant, &id, period.start));
            found.extend(periods.map(|period| (pair, period)));
        }
    }
    found
}
