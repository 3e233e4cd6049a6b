//! Pricing by the telescoping rule: a window costs what it adds to the price of
//! its billing period to date, so that the windows of a period always sum to the
//! price of the period's quantity.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use rustc_hash::FxHashSet;

use super::accumulator::{Accumulator, Measure};
use super::hopping;
use super::incremental::separable::is_listed;
use super::incremental::values::{ListKeeper, NewLists};
use super::names::Names;
use super::state::{Interner, KeptNews, StateKey, WindowState};
use super::windows::Windows;
use crate::model::aggregate::{Basis, PeriodKey, PeriodRow, Text, WindowKey, WindowRow};
use crate::model::decimal::{Decimal, DecimalError};
use crate::model::decimal_sum::DecimalSum;
use crate::model::meter::{ChargeOn, Meter};
use crate::model::percentage::Fees;
use crate::model::price::{Adjustments, Price, Share, Usage};
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowKind};
use crate::reference::{Reference, Subscription};

/// Priced rows, sorted by key.
#[derive(Debug, Default)]
pub struct Priced {
    pub windows: Vec<PricedWindow>,
    pub periods: Vec<PeriodRow>,
    pub carried: Vec<Carried>,
    /// Meters of which a window costs an amount with more than 18 places: what later windows
    /// cost depends on how it was rounded.
    pub rounded: BTreeSet<u32>,
}

/// What the windows of a billing period cost that stay as they are, and are not among those
/// that were priced.
#[derive(Debug)]
pub struct Carried {
    pub period: Arc<PeriodKey>,
    pub currency: Text,
    pub cost: Decimal,
}

/// An aggregate, and what was new about its events.
#[derive(Debug)]
pub struct PricedWindow {
    /// Shared with what is written.
    pub row: Arc<WindowRow>,
    pub news: KeptNews,
}

impl Priced {
    /// Lets those bills go that nobody stored and of which no window is in `range`: a level is
    /// carried into periods that a range only touches.
    pub fn keep_bills_in(&mut self, range: Span, stored: &[PeriodRow]) {
        let stored: FxHashSet<_> = stored.iter().map(|row| &row.key).collect();
        let of = |window: &PricedWindow| Arc::clone(&window.row.key.period);
        let all: FxHashSet<_> = self.windows.iter().map(of).collect();
        let inside: FxHashSet<_> = self.windows.iter().filter(|window| range.covers(window.row.window())).map(of).collect();
        self.periods.retain(|row| stored.contains(&row.key) || inside.contains(&row.key) || !all.contains(&row.key));
    }

    /// Those of parts that follow each other in the order of keys.
    pub fn of_parts(parts: Vec<Priced>) -> Priced {
        let mut all = Priced::default();
        all.windows.reserve_exact(parts.iter().map(|part| part.windows.len()).sum());
        for part in parts {
            all.windows.extend(part.windows);
            all.periods.extend(part.periods);
            all.carried.extend(part.carried);
            all.rounded.extend(part.rounded);
        }
        debug_assert!(all.windows.is_sorted_by(|a, b| a.row.key < b.row.key));
        all
    }
}

/// Prices all windows of the billing periods that `range` touches; lists of their distinct values
/// go to `keeper`.
///
/// # Errors
/// Where a quantity or a cost overflows; names the window.
pub fn price(
    windows: Windows,
    (dimensions, ranks): (&Interner, &Ranks),
    reference: &Reference,
    names: &Names,
    range: Span,
    timezone: chrono_tz::Tz,
    keeper: Option<&ListKeeper>,
) -> Result<Priced> {
    // Levels were read from earlier periods too.
    let touches =
        |(key, state): &(StateKey, WindowState)| Span { start: key.period_start, end: state.period_end }.overlaps(range);
    let mut states = windows.into_sorted(|key| ranks.of(key)).filter(touches).peekable();
    let mut priced = Priced::default();
    let mut lists = keeper.map(|_| NewLists::default());
    let mut period = Vec::new();
    while let Some(first) = states.next() {
        period.clear();
        period.push(first);
        let Some((first, _)) = period.first().map(|(key, state)| (*key, state.period_end)) else { continue };
        while let Some(next) = states.next_if(|(key, _)| StateKey { window_start: first.window_start, ..*key } == first) {
            period.push(next);
        }
        let Some(parts) = Parts::of(&first, reference) else { continue };
        PeriodPricing { states: &period, parts, timezone }.price(names, dimensions, &mut priced, lists.as_mut())?;
    }
    keeper.zip(lists).into_iter().for_each(|(keeper, lists)| keeper.add(lists));
    debug_assert!(priced.windows.is_sorted_by(|a, b| a.row.key < b.row.key));
    Ok(priced)
}

/// The places of names among their like: with them, states sort as the rows of theirs do.
pub struct Ranks {
    subscriptions: Vec<u32>,
    meters: Vec<u32>,
    prices: Vec<u32>,
    dimensions: Vec<u32>,
}

impl Ranks {
    pub fn new(reference: &Reference, dimensions: &Interner) -> Self {
        Ranks {
            subscriptions: ranks(reference.subscriptions.iter().map(|row| (&row.tenant_id, &row.id))),
            meters: ranks(reference.meters.iter().map(|meter| &meter.id)),
            prices: ranks(reference.prices.iter().map(|price| &price.id)),
            dimensions: ranks(dimensions.texts().iter()),
        }
    }

    fn of(&self, key: &StateKey) -> ([u32; 4], Timestamp, Timestamp) {
        let rank = |ranks: &[u32], at: u32| ranks.get(at as usize).map_or(0, |rank| rank + 1);
        let names = [
            rank(&self.subscriptions, key.subscription),
            rank(&self.meters, key.meter),
            // No price comes before all of them, as its empty name does.
            rank(&self.prices, key.price),
            rank(&self.dimensions, key.dimensions),
        ];
        (names, key.period_start, key.window_start)
    }
}

/// The place of each name among all of them, from zero.
pub fn ranks<T: Ord>(names: impl Iterator<Item = T>) -> Vec<u32> {
    let mut order: Vec<_> = names.enumerate().map(|(at, name)| (name, at)).collect();
    order.sort_unstable();
    let mut ranks = vec![0; order.len()];
    for (rank, (_, at)) in (0..).zip(order) {
        if let Some(of) = ranks.get_mut(at) {
            *of = rank;
        }
    }
    ranks
}

/// The reference rows of one accumulation.
#[derive(Clone, Copy)]
pub(super) struct Parts<'r> {
    pub subscription: &'r Subscription,
    pub meter: &'r Meter,
    pub price: Option<&'r Price>,
}

impl<'r> Parts<'r> {
    pub fn of(key: &StateKey, reference: &'r Reference) -> Option<Self> {
        Some(Parts {
            subscription: reference.subscriptions.get(key.subscription as usize)?,
            meter: reference.meters.get(key.meter as usize)?,
            price: reference.prices.get(key.price as usize),
        })
    }
}

/// The price of the accumulation so far, in the way that the meter charges.
pub(super) struct Accumulation<'r> {
    parts: Parts<'r>,
    pub measure: Measure,
    pub share: Share,
    to_date: Accumulator,
    fees: Option<Fees>,
    events: u64,
    window_sum: DecimalSum,
    pub cost: Decimal,
}

impl<'r> Accumulation<'r> {
    pub fn new(parts: Parts<'r>, period: Span) -> Self {
        let measure =
            Measure { multiplier: parts.meter.multiplier, period_nanos: period.end.nanos().saturating_sub(period.start.nanos()) };
        Accumulation {
            parts,
            measure,
            share: parts.price.map_or(Share::WHOLE, |price| price.share(period, parts.subscription.active)),
            to_date: Accumulator::new(parts.meter),
            fees: parts.price.and_then(Price::transactions).map(|_| Fees::default()),
            events: 0,
            window_sum: DecimalSum::default(),
            cost: Decimal::ZERO,
        }
    }

    /// Adds a window; returns its quantity and its cost.
    pub fn add(&mut self, window: &WindowState) -> Result<(Decimal, Decimal), DecimalError> {
        let quantity = window.accumulator.quantity(self.measure)?;
        self.to_date.merge(&window.accumulator);
        self.window_sum.add(quantity);
        self.events += window.event_count;
        let Some(price) = self.parts.price else { return Ok((quantity, Decimal::ZERO)) };
        let is_alone = self.parts.meter.charge_on == ChargeOn::Window;
        if let (Some(fees), Some(transactions), Some(percentage)) = (&mut self.fees, &window.transactions, price.transactions()) {
            if is_alone {
                *fees = Fees::default();
            }
            fees.add(transactions, percentage, &mut |_, _| ())?;
        }
        let before = self.cost;
        self.cost = match self.parts.meter.charge_on {
            ChargeOn::Window => {
                let cost = price.cost(self.usage_of(window, quantity), self.share)?;
                before.checked_add(cost)?.checked_add(price.adjustments(cost, self.share)?.total()?)?
            }
            ChargeOn::Period | ChargeOn::WindowSum => price.cost(self.usage()?, self.share)?,
        };
        Ok((quantity, self.cost.checked_sub(before)?))
    }

    /// What is priced where a meter charges on the period: the period to date.
    pub fn usage(&self) -> Result<Usage<'_>, DecimalError> {
        Ok(Usage { quantity: self.quantity()?, events: self.events, fees: self.fees.as_ref() })
    }

    /// What is priced where each window is priced on its own: the window added last.
    pub fn usage_of(&self, window: &WindowState, quantity: Decimal) -> Usage<'_> {
        Usage { quantity, events: window.event_count, fees: self.fees.as_ref() }
    }

    /// The quantity of the period to date.
    pub fn quantity(&self) -> Result<Decimal, DecimalError> {
        match self.parts.meter.charge_on {
            ChargeOn::Period => self.to_date.quantity(self.measure),
            ChargeOn::WindowSum | ChargeOn::Window => self.window_sum.total(),
        }
    }

    /// What the period as a whole is due beside its cost.
    fn adjustments(&self) -> Result<Adjustments, DecimalError> {
        match self.parts.price.filter(|_| self.parts.meter.charge_on != ChargeOn::Window) {
            Some(price) => price.adjustments(self.cost, self.share),
            None => Ok(Adjustments::default()),
        }
    }
}

/// The states of one accumulation in one billing period, by time.
struct PeriodPricing<'p> {
    states: &'p [(StateKey, WindowState)],
    parts: Parts<'p>,
    timezone: chrono_tz::Tz,
}

impl PeriodPricing<'_> {
    fn price(&self, names: &Names, dimensions: &Interner, priced: &mut Priced, lists: Option<&mut NewLists>) -> Result<()> {
        let Some((first, first_state)) = self.states.first() else { return Ok(()) };
        let period = Span { start: first.period_start, end: first_state.period_end };
        let key = Arc::new(names.period_key(first, dimensions));
        let names = names.of(first);
        let mut accumulation = Accumulation::new(self.parts, period);
        // What a price of time costs depends on when it holds in the whole period, others on when in a window.
        let in_part = |span: Span| -> Option<Arc<Basis>> {
            let price = self.parts.price.and_then(|price| price.digest_of_part(span))?;
            Some(Arc::new(Basis { price: price.into(), ..Basis::clone(&names.basis) }))
        };
        let is_of_time = self.parts.meter.keeps_a_level() || self.parts.price.is_some_and(|price| price.options.prorate);
        let of_period = if is_of_time { in_part(period) } else { None };
        let basis = |window: Span| {
            let of_part = if is_of_time { of_period.clone() } else { in_part(window) };
            of_part.unwrap_or_else(|| Arc::clone(&names.basis))
        };
        let emit =
            |windows: &mut Vec<PricedWindow>, window_start: Timestamp, state: &WindowState, quantity: Decimal, cost: Decimal| {
                windows.push(PricedWindow {
                    row: Arc::new(WindowRow {
                        key: WindowKey { period: Arc::clone(&key), window_start },
                        customer_id: names.customer.clone(),
                        window_end: state.window_end,
                        period_end: state.period_end,
                        quantity,
                        event_count: state.event_count,
                        cost,
                        currency: names.currency.clone(),
                        events_digest: state.events_digest,
                        basis: basis(Span { start: window_start, end: state.window_end }),
                    }),
                    news: state.news.clone(),
                });
            };
        let unit_amount = self.parts.price.and_then(Price::constant_amount);
        for (state_key, state) in self.states {
            let (quantity, cost) = accumulation.add(state).with_context(|| {
                format!(
                    "pricing the window {} of subscription `{}`, meter `{}`, price `{}`, dimensions {} (void or amend the events \
                     that make it so large)",
                    state_key.window_start, key.subscription_id, key.meter_id, key.price_id, key.dimensions
                )
            })?;
            if unit_amount.is_some_and(|amount| !quantity.multiplies_exactly(amount)) {
                priced.rounded.insert(first.meter);
            }
            if state.is_carried {
                priced.carried.push(Carried { period: Arc::clone(&key), currency: names.currency.clone(), cost });
            } else if !matches!(self.parts.meter.window, WindowKind::Hopping(_)) {
                emit(&mut priced.windows, state_key.window_start, state, quantity, cost);
            }
        }
        let describe = || {
            format!("pricing the period {} of subscription `{}`, meter `{}`", key.period_start, key.subscription_id, key.meter_id)
        };
        if let WindowKind::Hopping(hopping) = self.parts.meter.window {
            for (window_start, state) in hopping::windows(self.states, hopping, self.timezone) {
                let quantity = state.accumulator.quantity(accumulation.measure).with_context(describe)?;
                emit(&mut priced.windows, window_start, &state, quantity, Decimal::ZERO);
            }
        }
        if let Some(lists) = lists.filter(|_| is_listed(self.parts.meter)) {
            self.list(accumulation.to_date.settled_values().unwrap_or_default(), lists);
        }
        let adjustments = accumulation.adjustments().with_context(describe)?;
        let minor_digits = self.parts.price.map_or(0, |price| price.currency.minor_digits);
        let amount = adjustments.total().and_then(|due| accumulation.cost.checked_add(due)?.round(minor_digits));
        priced.periods.push(PeriodRow {
            customer_id: names.customer.clone(),
            period_end: period.end,
            quantity: accumulation.quantity().with_context(describe)?,
            cost: accumulation.cost,
            minimum_adjustment: adjustments.minimum,
            commitment_adjustment: adjustments.commitment,
            amount: amount.with_context(describe)?,
            currency: names.currency,
            closed_at: None,
            key: PeriodKey::clone(&key),
        });
        Ok(())
    }

    /// Keeps the values of the period, or those that are new to it.
    fn list(&self, values: &[u128], lists: &mut NewLists) {
        let Some((key, state)) = self.states.first() else { return };
        // Windows that are carried come before the others, or have no price, and the end is of no use.
        let until = self.states.iter().filter(|(_, state)| !state.is_carried).map(|(_, state)| state.window_end);
        let until = until.max().unwrap_or(state.period_end);
        match self.states.iter().find_map(|(_, state)| state.accumulator.listed_values()) {
            None => lists.add(*key, until, true, values.iter().copied()),
            Some(known) => {
                let mut known = known.iter().copied().peekable();
                let is_new = |value: &u128| {
                    while known.next_if(|known| known < value).is_some() {}
                    known.peek() != Some(value)
                };
                lists.add(*key, until, false, values.iter().copied().filter(is_new));
            }
        }
    }
}
