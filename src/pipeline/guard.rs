//! The guard: changes larger than the job allows are refused.

use std::collections::BTreeMap;

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};

use super::Inputs;
use super::reconcile::{PeriodChanges, Reconciliation};
use crate::config::{Guard, Limit};
use crate::fault::{FaultKind, fault};
use crate::model::aggregate::{
    Cause, Correction, CorrectionKind, PeriodCorrection, PeriodKey, PeriodRow, StoredWindow, Text, Values,
};
use crate::model::decimal::{Decimal, DecimalError};
use crate::model::window::Span;

/// What is stored in the periods touched: changes are a share of it.
#[derive(Debug, Default)]
pub struct Base {
    pub windows: Vec<StoredWindow>,
    pub periods: Vec<PeriodRow>,
}

/// The stored rows that a guard compares with. A run that looked at some of them alone
/// may change a greater share of them than of all.
pub fn wide_enough(
    inputs: &Inputs<'_>,
    stored: Base,
    (changes, periods): (&Reconciliation, &PeriodChanges),
    (range, reach): (Span, Span),
    is_all: bool,
) -> Result<Base> {
    let is_refused = || check(&inputs.job.guard, &stored, changes, periods).is_err();
    let Some(store) = inputs.store.filter(|_| !is_all && is_refused()) else {
        return Ok(stored);
    };
    let mut windows = store.windows(&inputs.job.name, reach)?;
    windows.retain(|stored| stored.row.period().overlaps(range));
    Ok(Base { windows, periods: store.periods(&inputs.job.name, range)? })
}

/// Refuses changes beyond the limits. First computations do not count.
///
/// # Errors
/// A guard fault (exit code 8) that names the limit and the customers, or an overflow.
pub fn check(guard: &Guard, stored: &Base, changes: &Reconciliation, periods: &PeriodChanges) -> Result<()> {
    check_windows(guard, &stored.windows, changes)?;
    check_periods(guard, &stored.periods, changes, periods)
}

/// By how much new usage may change a bill, at most, as a multiple of its cost: overage beyond a
/// commitment costs more than the usage itself.
const MOST_OVERAGE: u64 = 3;

/// Bills change by more than what their windows cost: by a minimum, a commitment, or a fixed amount.
/// First computations do not count: usage that is new may change a bill by nothing, where a minimum
/// covers it, or by more than it costs.
fn check_periods(guard: &Guard, stored: &[PeriodRow], changes: &Reconciliation, periods: &PeriodChanges) -> Result<()> {
    let Some(limit) = guard.max_cost_change.filter(|_| !periods.corrections.is_empty()) else { return Ok(()) };
    let windows = Explained::of(changes)?;
    let subscription = |key: &PeriodKey| (key.tenant_id.clone(), key.subscription_id.clone(), key.period_start);
    let computed: FxHashSet<_> = stored.iter().map(|row| subscription(&row.key)).collect();
    let mut by_customer: BTreeMap<(&Text, &Text, &Text), Decimal> = BTreeMap::new();
    let mut rows = Vec::new();
    for PeriodCorrection { key, before, after, .. } in periods.corrections.iter().filter(|correction| !correction.is_adjustment) {
        // A bill of a period that had none.
        let Some(row) = before.as_ref().or(after.as_ref()).filter(|_| computed.contains(&subscription(key))) else { continue };
        let total = |row: &Option<PeriodRow>| row.as_ref().map_or(Ok(Decimal::ZERO), due);
        let owner = after.as_ref().unwrap_or(row);
        let is_moved = (&row.currency, &row.customer_id) != (&owner.currency, &owner.customer_id);
        let explained = windows.get(key).copied().unwrap_or_default();
        let unexplained = match is_moved {
            true => Decimal::ZERO,
            false => explained.rest(total(after)?.checked_sub(total(before)?)?)?,
        };
        if !unexplained.is_zero() {
            let net = by_customer.entry((&row.currency, &key.tenant_id, &row.customer_id)).or_default();
            *net = net.checked_add(unexplained)?;
            rows.push((&row.currency, &*row.customer_id));
        }
    }
    for (currency, moved) in without_signs(&by_customer)? {
        let amounts = stored.iter().filter(|row| row.currency == currency).map(|row| Ok(due(row)?.abs()));
        let base =
            amounts.into_iter().try_fold(Decimal::ZERO, |sum, amount: Result<_, DecimalError>| sum.checked_add(amount?))?;
        if exceeds(moved, base, limit)? {
            let customers = rows.iter().filter(|(of, _)| **of == currency).map(|(_, customer)| *customer);
            return Err(refused(
                &format!(
                    "{moved} {currency} of {base} {currency} on stored bills would move beyond what windows cost (minimums, \
                     commitments, fixed amounts), more than max_cost_change {limit}"
                ),
                customers,
            ));
        }
    }
    Ok(())
}

/// What a bill is for, before it is rounded.
fn due(row: &PeriodRow) -> Result<Decimal, DecimalError> {
    row.cost.checked_add(row.minimum_adjustment)?.checked_add(row.commitment_adjustment)
}

/// What the windows of a billing period explain of a change of its bill.
#[derive(Debug, Clone, Copy, Default)]
struct Explained {
    /// The change of their cost.
    known: Decimal,
    /// What windows cost that are computed for the first time.
    new: Decimal,
}

impl Explained {
    fn of(changes: &Reconciliation) -> Result<FxHashMap<&PeriodKey, Explained>, DecimalError> {
        let mut windows: FxHashMap<&PeriodKey, Explained> = FxHashMap::default();
        for correction in changes.corrections.iter().filter(|correction| correction.kind != CorrectionKind::Adjust) {
            let cost = |values: Option<Values>| values.map_or(Decimal::ZERO, |values| values.cost);
            let change = cost(correction.values_after()).checked_sub(cost(correction.values_before()))?;
            let of = windows.entry(&correction.key.period).or_default();
            let part = if correction.causes.hold(Cause::FirstComputation) { &mut of.new } else { &mut of.known };
            *part = part.checked_add(change)?;
        }
        Ok(windows)
    }

    /// What of the change of a bill is not explained.
    fn rest(self, change: Decimal) -> Result<Decimal, DecimalError> {
        let rest = change.checked_sub(self.known)?;
        let (least, most) = (self.new.min(Decimal::ZERO), self.new.max(Decimal::ZERO));
        let factor = Decimal::from_u64(MOST_OVERAGE);
        let (least, most) = (least.checked_mul(factor)?, most.checked_mul(factor)?);
        if rest < least {
            rest.checked_sub(least)
        } else if rest > most {
            rest.checked_sub(most)
        } else {
            Ok(Decimal::ZERO)
        }
    }
}

fn check_windows(guard: &Guard, stored: &[StoredWindow], changes: &Reconciliation) -> Result<()> {
    let counts = |c: &&Correction| c.kind != CorrectionKind::Adjust && !c.causes.hold(Cause::FirstComputation);
    let corrections: Vec<_> = changes.corrections.iter().filter(counts).collect();
    if corrections.is_empty() {
        return Ok(());
    }
    let customers = || corrections.iter().map(|correction| &*correction.customer_id);
    if let Some(limit) = guard.max_changed_rows {
        let changed = Decimal::from_u64(corrections.len() as u64);
        let base = Decimal::from_u64(stored.len() as u64);
        if exceeds(changed, base, limit)? {
            return Err(refused(
                &format!(
                    "{} of {} stored rows would change, more than max_changed_rows {limit}",
                    corrections.len(),
                    stored.len()
                ),
                customers(),
            ));
        }
    }
    if let Some(limit) = guard.max_vanished_rows {
        let base = Decimal::from_u64(stored.len() as u64);
        if exceeds(Decimal::from_u64(changes.vanished.len() as u64), base, limit)? {
            return Err(refused(
                &format!(
                    "{} of {} stored rows would be retracted or lose events, because their events are gone from the source \
                     though nobody voided them, more than max_vanished_rows {limit}",
                    changes.vanished.len(),
                    stored.len()
                ),
                changes.vanished.iter().map(|customer| &**customer),
            ));
        }
    }
    if let Some(limit) = guard.max_cost_change {
        for (currency, moved) in moved_by_currency(&corrections)? {
            let costs = stored.iter().filter(|stored| stored.row.currency == currency).map(|stored| stored.row.cost.abs());
            let base = costs.into_iter().try_fold(Decimal::ZERO, Decimal::checked_add)?;
            if exceeds(moved, base, limit)? {
                return Err(refused(
                    &format!("{moved} {currency} of {base} {currency} stored would move, more than max_cost_change {limit}"),
                    customers(),
                ));
            }
        }
    }
    Ok(())
}

fn exceeds(changed: Decimal, base: Decimal, limit: Limit) -> Result<bool, DecimalError> {
    match limit {
        Limit::Absolute(most) => Ok(changed > most),
        Limit::Percent(percent) => Ok(changed > base.mul_div(percent, Decimal::from_u64(100))?),
    }
}

/// Money that moves: the net change of each customer, without its sign.
fn moved_by_currency(corrections: &[&Correction]) -> Result<BTreeMap<Text, Decimal>, DecimalError> {
    let mut by_customer: BTreeMap<(&Text, &Text, &Text), Decimal> = BTreeMap::new();
    for correction in corrections {
        let cost = |values: Option<Values>| values.map_or(Decimal::ZERO, |values| values.cost);
        let tenant = &correction.key.period.tenant_id;
        let (customer, currency) = correction.owner_before();
        let net = by_customer.entry((currency, tenant, customer)).or_default();
        *net = net.checked_sub(cost(correction.values_before()))?;
        let net = by_customer.entry((&correction.currency, tenant, &correction.customer_id)).or_default();
        *net = net.checked_add(cost(correction.values_after()))?;
    }
    without_signs(&by_customer)
}

/// The sum of what each customer's bill changes by, by currency.
fn without_signs(by_customer: &BTreeMap<(&Text, &Text, &Text), Decimal>) -> Result<BTreeMap<Text, Decimal>, DecimalError> {
    let mut moved: BTreeMap<Text, Decimal> = BTreeMap::new();
    for ((currency, ..), net) in by_customer {
        let total = moved.entry((*currency).clone()).or_default();
        *total = total.checked_add(net.abs())?;
    }
    Ok(moved)
}

fn refused<'c>(what: &str, of: impl Iterator<Item = &'c str>) -> anyhow::Error {
    let mut customers: BTreeMap<&str, u64> = BTreeMap::new();
    for customer in of {
        *customers.entry(customer).or_default() += 1;
    }
    let mut customers: Vec<_> = customers.into_iter().collect();
    customers.sort_by_key(|(name, rows)| (std::cmp::Reverse(*rows), *name));
    let shown: Vec<_> = customers
        .iter()
        .take(5)
        .map(|(name, rows)| format!("{name} ({rows} {})", if *rows == 1 { "row" } else { "rows" }))
        .collect();
    let more = if customers.len() > 5 { format!(" and {} more", customers.len() - 5) } else { String::new() };
    fault(
        FaultKind::Guard,
        format!(
            "guard: {what}. Nothing was published. Customers: {}{more}. See what would change with `trueup plan`, \
             then publish it with `trueup run --yes`, or raise the limit in the job file",
            shown.join(", ")
        ),
    )
}
