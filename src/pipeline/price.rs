//! Pricing by the telescoping rule: a window costs what it adds to the price of
//! its billing period to date, so that the windows of a period always sum to the
//! price of the period's quantity.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use rustc_hash::FxHashMap;

use super::accumulator::Accumulator;
use super::aggregate::{Interner, NO_PRICE, News, StateKey, WindowState};
use crate::model::aggregate::{Basis, PeriodKey, PeriodRow, Text, WindowKey, WindowRow};
use crate::model::decimal::{Decimal, DecimalError, DecimalSum};
use crate::model::meter::{ChargeOn, Meter};
use crate::model::price::Price;
use crate::model::window::Span;
use crate::reference::{Reference, Subscription};

/// Priced rows, sorted by key.
#[derive(Debug, Default)]
pub struct Priced {
    pub windows: Vec<PricedWindow>,
    pub periods: Vec<PeriodRow>,
}

/// An aggregate, and what was new about its events.
#[derive(Debug)]
pub struct PricedWindow {
    pub row: WindowRow,
    pub news: News,
}

/// Prices all windows of all billing periods.
///
/// # Errors
/// Where a quantity or a cost overflows; names the window.
pub fn price(
    windows: FxHashMap<StateKey, WindowState>,
    dimensions: &Interner,
    reference: &Reference,
    names: &Names,
) -> Result<Priced> {
    let mut states: Vec<_> = windows.into_iter().collect();
    states.sort_unstable_by_key(|(key, _)| (period_of(key), key.window_start));
    let mut priced = Priced::default();
    let mut rest = states.as_slice();
    while let Some((first, _)) = rest.first() {
        let length = rest.partition_point(|(key, _)| period_of(key) <= period_of(first));
        let (period, others) = rest.split_at(length);
        rest = others;
        let Some(parts) = Parts::of(first, reference) else { continue };
        price_period(period, parts, names.period_key(first, dimensions), names, &mut priced)?;
    }
    priced.windows.sort_unstable_by(|a, b| a.row.key.cmp(&b.row.key));
    priced.periods.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    Ok(priced)
}

fn period_of(key: &StateKey) -> (u32, u32, u32, u32, crate::model::timestamp::Timestamp) {
    (key.subscription, key.meter, key.price, key.dimensions, key.period_start)
}

/// The reference rows of one accumulation.
#[derive(Clone, Copy)]
struct Parts<'r> {
    meter: &'r Meter,
    price: Option<&'r Price>,
}

impl<'r> Parts<'r> {
    fn of(key: &StateKey, reference: &'r Reference) -> Option<Self> {
        Some(Parts { meter: reference.meters.get(key.meter as usize)?, price: reference.prices.get(key.price as usize) })
    }
}

/// The price of the accumulation so far, in the way that the meter charges.
struct Accumulation<'r> {
    parts: Parts<'r>,
    to_date: Accumulator,
    window_sum: DecimalSum,
    cost: Decimal,
}

impl Accumulation<'_> {
    /// Adds a window; returns its quantity and its cost.
    fn add(&mut self, window: &Accumulator) -> Result<(Decimal, Decimal), DecimalError> {
        let quantity = window.quantity()?;
        self.to_date.merge(window);
        self.window_sum.add(quantity);
        let before = self.cost;
        self.cost = match (self.parts.price, self.parts.meter.charge_on) {
            (None, _) => Decimal::ZERO,
            (Some(price), ChargeOn::Window) => before.checked_add(price.cost(quantity)?)?,
            (Some(price), ChargeOn::Period | ChargeOn::WindowSum) => price.cost(self.quantity()?)?,
        };
        Ok((quantity, self.cost.checked_sub(before)?))
    }

    /// The quantity of the period to date.
    fn quantity(&self) -> Result<Decimal, DecimalError> {
        match self.parts.meter.charge_on {
            ChargeOn::Period => self.to_date.quantity(),
            ChargeOn::WindowSum | ChargeOn::Window => self.window_sum.total(),
        }
    }
}

fn price_period(
    states: &[(StateKey, WindowState)],
    parts: Parts<'_>,
    key: PeriodKey,
    names: &Names,
    priced: &mut Priced,
) -> Result<()> {
    let Some((first, last_state)) = states.first() else { return Ok(()) };
    let mut accumulation = Accumulation {
        parts,
        to_date: Accumulator::new(parts.meter.aggregation),
        window_sum: DecimalSum::default(),
        cost: Decimal::ZERO,
    };
    let names = names.of(first);
    for (state_key, state) in states {
        let (quantity, cost) = accumulation.add(&state.accumulator).with_context(|| {
            format!(
                "pricing the window {} of subscription `{}`, meter `{}`, price `{}`, dimensions {}",
                state_key.window_start, key.subscription_id, key.meter_id, key.price_id, key.dimensions
            )
        })?;
        priced.windows.push(PricedWindow {
            row: WindowRow {
                key: WindowKey { period: key.clone(), window_start: state_key.window_start },
                customer_id: names.customer.clone(),
                window_end: state.window_end,
                period_end: state.period_end,
                quantity,
                event_count: state.event_count,
                cost,
                currency: names.currency.clone(),
                events_digest: state.events_digest.hex(),
                basis: names.basis.clone(),
            },
            news: state.news,
        });
    }
    let describe =
        || format!("pricing the period {} of subscription `{}`, meter `{}`", key.period_start, key.subscription_id, key.meter_id);
    let quantity = accumulation.quantity().with_context(describe)?;
    let minor_digits = parts.price.map_or(0, |price| price.currency.minor_digits);
    priced.periods.push(PeriodRow {
        customer_id: names.customer.clone(),
        period_end: last_state.period_end,
        quantity,
        cost: accumulation.cost,
        minimum_adjustment: Decimal::ZERO,
        commitment_adjustment: Decimal::ZERO,
        amount: accumulation.cost.round(minor_digits).with_context(describe)?,
        currency: names.currency,
        key,
    });
    Ok(())
}

/// Adds a row for every active subscription and price that is due without usage.
///
/// # Errors
/// Where a cost overflows.
pub fn add_periods_without_usage(
    periods: &mut Vec<PeriodRow>,
    reference: &Reference,
    names: &Names,
    range: Span,
    wants: impl Fn(&Subscription, &Price) -> bool,
) -> Result<()> {
    let used: rustc_hash::FxHashSet<_> = periods
        .iter()
        .map(|row| (row.key.tenant_id.clone(), row.key.subscription_id.clone(), row.key.price_id.clone(), row.key.period_start))
        .collect();
    for (index, subscription) in reference.subscriptions.iter().enumerate() {
        for (price_index, price) in reference.prices.iter().enumerate() {
            let fits = price.plan_id == subscription.plan_id && price.currency.code == subscription.currency;
            if !fits || !wants(subscription, price) {
                continue;
            }
            let cost = price.cost(Decimal::ZERO).with_context(|| format!("price `{}` of no usage", price.id))?;
            if cost.is_zero() {
                continue;
            }
            for period in periods_in(subscription, range) {
                let is_due = due(period, subscription, price);
                let Some(meter) = reference.meters.iter().position(|meter| meter.id == price.meter_id) else { continue };
                let state = StateKey {
                    subscription: u32::try_from(index)?,
                    meter: u32::try_from(meter)?,
                    price: u32::try_from(price_index)?,
                    dimensions: 0,
                    period_start: period.start,
                    window_start: period.start,
                };
                let key = PeriodKey { dimensions: matched_dimensions(price), ..names.period_key(&state, &Interner::default()) };
                let is_used =
                    used.contains(&(key.tenant_id.clone(), key.subscription_id.clone(), key.price_id.clone(), key.period_start));
                if !is_due || is_used {
                    continue;
                }
                let names = names.of(&state);
                periods.push(PeriodRow {
                    key,
                    customer_id: names.customer.clone(),
                    period_end: period.end,
                    quantity: Decimal::ZERO,
                    cost,
                    minimum_adjustment: Decimal::ZERO,
                    commitment_adjustment: Decimal::ZERO,
                    amount: cost.round(price.currency.minor_digits)?,
                    currency: names.currency.clone(),
                });
            }
        }
    }
    periods.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    Ok(())
}

/// Whether a price and an active subscription meet in a period.
fn due(period: Span, subscription: &Subscription, price: &Price) -> bool {
    let start = period.start.max(subscription.active.start).max(price.valid.start);
    start < period.end.min(subscription.active.end).min(price.valid.end)
}

/// The billing periods of a subscription that a range touches while it is active.
fn periods_in(subscription: &Subscription, range: Span) -> Vec<Span> {
    let end = range.end.min(subscription.active.end);
    let mut at = range.start.max(subscription.active.start);
    let mut periods = Vec::new();
    while at < end {
        let period = subscription.cycle.period(at);
        at = period.end;
        periods.push(period);
    }
    periods
}

fn matched_dimensions(price: &Price) -> Text {
    let mut json = String::from("{");
    for (name, value) in &price.matches {
        if json.len() > 1 {
            json.push(',');
        }
        crate::model::properties::write_json_text(name, &mut json);
        json.push(':');
        json.push_str(value);
    }
    json.push('}');
    Arc::from(json)
}

/// Names of reference rows, shared by all rows that repeat them.
pub struct Names {
    subscriptions: Vec<SubscriptionNames>,
    meters: Vec<(Text, Text)>,
    prices: Vec<(Text, Text)>,
    none: Text,
}

struct SubscriptionNames {
    tenant: Text,
    id: Text,
    customer: Text,
    currency: Text,
    digest: Text,
    customer_digest: Text,
}

/// The names of one row beside its key.
struct RowNames {
    customer: Text,
    currency: Text,
    basis: Basis,
}

impl Names {
    pub fn new(reference: &Reference) -> Self {
        let mut shared: FxHashMap<String, Text> = FxHashMap::default();
        let mut share = |text: &str| shared.entry(text.to_owned()).or_insert_with(|| Arc::from(text)).clone();
        Names {
            subscriptions: reference
                .subscriptions
                .iter()
                .map(|s| SubscriptionNames {
                    tenant: share(&s.tenant_id),
                    id: share(&s.id),
                    customer: share(&s.customer_id),
                    currency: share(&s.currency),
                    digest: share(&s.digest),
                    customer_digest: share(&s.customer_digest),
                })
                .collect(),
            meters: reference.meters.iter().map(|m| (share(&m.id), share(&m.digest))).collect(),
            prices: reference.prices.iter().map(|p| (share(&p.id), share(&p.digest))).collect(),
            none: Arc::from(""),
        }
    }

    fn period_key(&self, key: &StateKey, dimensions: &Interner) -> PeriodKey {
        let subscription = self.subscriptions.get(key.subscription as usize);
        PeriodKey {
            tenant_id: subscription.map_or_else(|| self.none.clone(), |s| s.tenant.clone()),
            subscription_id: subscription.map_or_else(|| self.none.clone(), |s| s.id.clone()),
            meter_id: self.meters.get(key.meter as usize).map_or_else(|| self.none.clone(), |(id, _)| id.clone()),
            price_id: self.price(key.price).0,
            dimensions: dimensions.text(key.dimensions),
            period_start: key.period_start,
        }
    }

    /// The key of a window whose events were withdrawn.
    pub fn window_key(&self, key: &StateKey, dimensions: &Interner) -> WindowKey {
        WindowKey { period: self.period_key(key, dimensions), window_start: key.window_start }
    }

    fn price(&self, price: u32) -> (Text, Text) {
        let found = if price == NO_PRICE { None } else { self.prices.get(price as usize) };
        found.cloned().unwrap_or_else(|| (self.none.clone(), self.none.clone()))
    }

    fn of(&self, key: &StateKey) -> RowNames {
        let none = || self.none.clone();
        let subscription = self.subscriptions.get(key.subscription as usize);
        RowNames {
            customer: subscription.map_or_else(none, |s| s.customer.clone()),
            currency: subscription.map_or_else(none, |s| s.currency.clone()),
            basis: Basis {
                meter: self.meters.get(key.meter as usize).map_or_else(none, |(_, digest)| digest.clone()),
                price: self.price(key.price).1,
                subscription: subscription.map_or_else(none, |s| s.digest.clone()),
                customer: subscription.map_or_else(none, |s| s.customer_digest.clone()),
            },
        }
    }
}
