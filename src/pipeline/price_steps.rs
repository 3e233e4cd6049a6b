//! The price of a window or of a billing period, step by step, by the same
//! [`Accumulation`] that prices it.

use std::collections::BTreeMap;

use anyhow::Result;

use super::price::{Accumulation, Parts};
use super::state::{StateKey, WindowState};
use crate::model::aggregate::PeriodRow;
use crate::model::decimal::Decimal;
use crate::model::meter::ChargeOn;
use crate::model::percentage::{EventCharge, Fees};
use crate::model::price::{Price, Usage};
use crate::model::price_lines::{Line, Step};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;

/// How a cost came about. `after` less `before` is the cost; adjustments come on top.
#[derive(Debug, Default, Clone, serde::Serialize)]
pub struct PriceSteps {
    /// The period up to where the window begins; `None` where nothing came before it, or
    /// the window or period is priced on its own.
    pub before: Option<PriceStep>,
    pub after: Option<PriceStep>,
    /// Minimum, commitment and rounding, of a period; of a window that is priced alone,
    /// they are part of its cost.
    pub adjustments: Vec<Line>,
    #[serde(skip)]
    pub charges: EventCharges,
}

/// The price of one quantity.
#[derive(Debug, Clone, serde::Serialize)]
pub struct PriceStep {
    pub quantity: Decimal,
    pub events: u64,
    pub lines: Vec<Line>,
    pub cost: Decimal,
}

/// What events are charged one by one: by event time, ingestion time and id.
pub type EventCharges = BTreeMap<(Timestamp, Timestamp, Box<str>), EventCharge>;

impl PriceStep {
    fn of(accumulation: &Accumulation<'_>, price: &Price, usage: Usage<'_>) -> Result<PriceStep> {
        let share = accumulation.share;
        Ok(PriceStep {
            quantity: usage.quantity,
            events: usage.events,
            lines: price.lines(usage, share)?,
            cost: price.cost(usage, share)?,
        })
    }
}

/// What the events of windows, in the order of time, are charged.
fn charges(price: &Price, windows: &[(StateKey, WindowState)]) -> Result<EventCharges> {
    let mut charges = EventCharges::new();
    let Some(percentage) = price.transactions() else { return Ok(charges) };
    let mut fees = Fees::default();
    for transactions in windows.iter().filter_map(|(_, state)| state.transactions.as_deref()) {
        fees.add(transactions, percentage, &mut |transaction, charge| {
            charges.insert((transaction.timestamp, transaction.ingested_at, transaction.id.clone()), charge);
        })?;
    }
    Ok(charges)
}

/// How the window that begins at `start` came to its cost. `states` are those of its
/// accumulation, by time.
///
/// # Errors
/// Where an amount overflows.
pub(super) fn of_window(
    states: &[(StateKey, WindowState)],
    parts: Parts<'_>,
    period: Span,
    start: Timestamp,
) -> Result<PriceSteps> {
    let mut accumulation = Accumulation::new(parts, period);
    let mut steps = PriceSteps::default();
    let Some(price) = parts.price else { return Ok(steps) };
    for (at, (key, state)) in states.iter().enumerate() {
        if key.window_start < start {
            accumulation.add(state)?;
            continue;
        }
        if key.window_start > start {
            break;
        }
        if parts.meter.charge_on == ChargeOn::Window {
            let (quantity, _) = accumulation.add(state)?;
            let step = PriceStep::of(&accumulation, price, accumulation.usage_of(state, quantity))?;
            steps.adjustments = price.adjustment_lines(step.cost, accumulation.share)?;
            steps.charges = charges(price, states.get(at..=at).unwrap_or_default())?;
            steps.after = Some(step);
            break;
        }
        if at > 0 {
            steps.before = Some(PriceStep::of(&accumulation, price, accumulation.usage()?)?);
        }
        accumulation.add(state)?;
        steps.after = Some(PriceStep::of(&accumulation, price, accumulation.usage()?)?);
        steps.charges = charges(price, states.get(..=at).unwrap_or_default())?;
    }
    Ok(steps)
}

/// How a billing period came to its amount.
///
/// # Errors
/// Where an amount overflows.
pub(super) fn of_period(states: &[(StateKey, WindowState)], parts: Parts<'_>, row: &PeriodRow) -> Result<PriceSteps> {
    let period = Span { start: row.key.period_start, end: row.period_end };
    let mut accumulation = Accumulation::new(parts, period);
    let mut steps = PriceSteps::default();
    let Some(price) = parts.price else { return Ok(steps) };
    for (_, state) in states {
        accumulation.add(state)?;
    }
    if parts.meter.charge_on == ChargeOn::Window {
        let says = format!("{} windows, each priced on its own", states.len());
        let lines = vec![Line::fixed(Step::Windows, says, row.cost)];
        let events = states.iter().map(|(_, state)| state.event_count).sum();
        // Allowances begin anew with each window.
        for window in states {
            steps.charges.extend(charges(price, std::slice::from_ref(window))?);
        }
        steps.after = Some(PriceStep { quantity: row.quantity, events, lines, cost: row.cost });
    } else {
        let usage = if states.is_empty() { Usage::NONE } else { accumulation.usage()? };
        let step = PriceStep::of(&accumulation, price, usage)?;
        steps.adjustments = price.adjustment_lines(step.cost, accumulation.share)?;
        steps.charges = charges(price, states)?;
        steps.after = Some(step);
    }
    let due = row.cost.checked_add(row.commitment_adjustment)?.checked_add(row.minimum_adjustment)?;
    steps.adjustments.extend(price.rounding_line(due)?);
    Ok(steps)
}
