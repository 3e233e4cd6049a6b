//! Billing periods without usage in which something is due all the same: flat amounts,
//! minimums, commitments.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use rustc_hash::FxHashSet;

use super::names::Names;
use super::state::{Interner, StateKey, index};
use crate::model::aggregate::{PeriodKey, PeriodRow, Text};
use crate::model::basis::Scope;
use crate::model::decimal::Decimal;
use crate::model::meter::ChargeOn;
use crate::model::price::{Price, Usage};
use crate::model::property::write_json_text;
use crate::model::run::RunRecord;
use crate::model::spans::Spans;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::reference::{Reference, Subscription};

/// What there are bills of without usage: the periods that these spans touch, each for a part of
/// the job.
#[derive(Debug, Default)]
pub struct Billed(Vec<(Scope, Spans)>);

impl Billed {
    pub fn of(span: Span) -> Self {
        let mut billed = Billed::default();
        billed.add(&Scope::default(), span);
        billed
    }

    /// Also the ranges that somebody asked `runs` for, up to `until`: what they billed is not for
    /// ever as it was then.
    #[must_use]
    pub fn with_asked_for(mut self, runs: &[RunRecord], until: Option<Timestamp>) -> Self {
        let taken_back = RunRecord::taken_back(runs);
        for run in runs.iter().filter(|run| run.mode.computes() && !taken_back.contains(run.run_id.as_str())) {
            if let Some(range) = run.asked_for() {
                self.add(&run.basis.scope, Span { end: until.map_or(range.end, |until| range.end.min(until)), ..range });
            }
        }
        self
    }

    pub fn add(&mut self, scope: &Scope, span: Span) {
        let known = self.0.iter().position(|(known, _)| known == scope).unwrap_or_else(|| {
            self.0.push((scope.clone(), Spans::default()));
            self.0.len() - 1
        });
        self.0.iter_mut().skip(known).take(1).for_each(|(_, spans)| spans.add(span));
    }

    /// From the first to the last of it.
    pub fn whole(&self) -> Option<Span> {
        self.0.iter().filter_map(|(_, spans)| spans.whole()).reduce(Span::union)
    }

    /// The periods of a subscription, by their start.
    fn periods(&self, subscription: &Subscription, meter_id: &str) -> BTreeMap<Timestamp, Span> {
        let holds = |scope: &Scope| scope.holds(&subscription.tenant_id, &subscription.customer_id, meter_id);
        let spans = self.0.iter().filter(|(scope, _)| holds(scope)).flat_map(|(_, spans)| spans.iter());
        spans.flat_map(|span| periods_in(subscription, span)).map(|period| (period.start, period)).collect()
    }
}

/// Adds a row for every active subscription and price that is due without usage in a
/// period. `wants` gets the indexes of the subscription and of the price's meter too.
///
/// # Errors
/// Where a cost overflows.
pub fn add_periods(
    periods: &mut Vec<PeriodRow>,
    reference: &Reference,
    names: &Names,
    billed: &Billed,
    wants: impl Fn((usize, &Subscription), (usize, &Price), Span) -> bool,
) -> Result<()> {
    let of = |key: &PeriodKey| (key.tenant_id.clone(), key.subscription_id.clone(), key.price_id.clone(), key.period_start);
    let used: FxHashSet<_> = periods.iter().map(|row| of(&row.key)).collect();
    for (price_index, price) in reference.prices.iter().enumerate() {
        let Some(meter) = reference.meters.iter().position(|meter| meter.id == price.meter_id) else { continue };
        // A price of single windows is due in no period without one.
        if reference.meters.get(meter).is_none_or(|meter| meter.charge_on == ChargeOn::Window) || !may_be_due(price)? {
            continue;
        }
        for (subscription_index, subscription) in reference.subscriptions.iter().enumerate() {
            let fits = price.plan_id == subscription.plan_id && price.currency.code == subscription.currency;
            if !fits {
                continue;
            }
            let is_wanted = |period: &Span| {
                is_due(*period, subscription, price) && wants((subscription_index, subscription), (meter, price), *period)
            };
            for period in billed.periods(subscription, &price.meter_id).into_values().filter(is_wanted) {
                let state = StateKey {
                    subscription: index(subscription_index),
                    meter: index(meter),
                    price: index(price_index),
                    dimensions: 0,
                    period_start: period.start,
                    window_start: period.start,
                };
                let key = PeriodKey { dimensions: matched_dimensions(price), ..names.period_key(&state, &Interner::default()) };
                if !used.contains(&of(&key)) {
                    let row = row(key, period, subscription, price, &names.of(&state).customer);
                    periods.extend(row.with_context(|| format!("price `{}` of no usage", price.id))?);
                }
            }
        }
    }
    periods.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    Ok(())
}

/// Whether no usage can cost anything in a whole period.
fn may_be_due(price: &Price) -> Result<bool> {
    let whole = crate::model::price::Share::WHOLE;
    let cost = price.cost(Usage::NONE, whole).with_context(|| format!("price `{}` of no usage", price.id))?;
    Ok(!cost.is_zero() || price.options.minimum_amount.is_some() || price.options.commitment.is_some())
}

/// The row of a period without usage; `None` where nothing is due.
fn row(key: PeriodKey, period: Span, subscription: &Subscription, price: &Price, customer: &Text) -> Result<Option<PeriodRow>> {
    let share = price.share(period, subscription.active);
    let cost = price.cost(Usage::NONE, share)?;
    let adjustments = price.adjustments(cost, share)?;
    let due = cost.checked_add(adjustments.total()?)?;
    if cost.is_zero() && due.is_zero() {
        return Ok(None);
    }
    Ok(Some(PeriodRow {
        key,
        customer_id: customer.clone(),
        period_end: period.end,
        quantity: Decimal::ZERO,
        cost,
        minimum_adjustment: adjustments.minimum,
        commitment_adjustment: adjustments.commitment,
        amount: due.round(price.currency.minor_digits)?,
        currency: Arc::from(subscription.currency.as_str()),
        closed_at: None,
    }))
}

/// Whether a price and an active subscription meet in a period.
fn is_due(period: Span, subscription: &Subscription, price: &Price) -> bool {
    let start = period.start.max(subscription.active.start).max(price.valid.start);
    start < period.end.min(subscription.active.end).min(price.valid.end)
}

/// The billing periods of a subscription that a range touches, also where the range lies
/// before its start or after its end.
fn periods_in(subscription: &Subscription, range: Span) -> Vec<Span> {
    let Subscription { cycle, active, .. } = subscription;
    // Before the subscription there is nothing to find, however long the range.
    let first = cycle.period(range.start.max(cycle.period(active.start).start));
    let touching = std::iter::successors(Some(first), |period| Some(cycle.period(period.end)));
    touching.take_while(|period| period.start < range.end && period.start < active.end).collect()
}

fn matched_dimensions(price: &Price) -> Text {
    let mut json = String::from("{");
    for (name, value) in &price.matches {
        if json.len() > 1 {
            json.push(',');
        }
        write_json_text(name, &mut json);
        json.push(':');
        json.push_str(value);
    }
    json.push('}');
    Arc::from(json)
}
