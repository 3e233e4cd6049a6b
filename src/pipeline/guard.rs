//! The guard: changes larger than the job allows are refused.

use std::collections::BTreeMap;

use anyhow::Result;

use super::reconcile::Reconciliation;
use crate::config::{Guard, Limit};
use crate::fault::{FaultKind, fault};
use crate::model::aggregate::{Cause, Correction, CorrectionKind, StoredWindow, Text};
use crate::model::decimal::{Decimal, DecimalError};

/// Refuses changes beyond the limits. First computations do not count.
///
/// # Errors
/// A guard fault (exit code 8) that names the limit and the customers, or an overflow.
pub fn check(guard: &Guard, stored: &[StoredWindow], changes: &Reconciliation) -> Result<()> {
    let counts = |c: &&Correction| c.kind != CorrectionKind::Adjust && !c.causes.hold(Cause::FirstComputation);
    let corrections: Vec<_> = changes.corrections.iter().filter(counts).collect();
    if corrections.is_empty() {
        return Ok(());
    }
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
                &corrections,
            ));
        }
    }
    if let Some(limit) = guard.max_vanished_rows {
        let base = Decimal::from_u64(stored.len() as u64);
        if exceeds(Decimal::from_u64(changes.vanished), base, limit)? {
            return Err(refused(
                &format!(
                    "{} of {} stored rows would be retracted, because their events are gone from the source though nobody voided \
                     them, more than max_vanished_rows {limit}",
                    changes.vanished,
                    stored.len()
                ),
                &corrections,
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
                    &corrections,
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
        let cost = |values: &Option<crate::model::aggregate::Values>| values.map_or(Decimal::ZERO, |values| values.cost);
        let net =
            by_customer.entry((&correction.currency, &correction.key.period.tenant_id, &correction.customer_id)).or_default();
        *net = net.checked_add(cost(&correction.values_after()))?.checked_sub(cost(&correction.values_before()))?;
    }
    let mut moved: BTreeMap<Text, Decimal> = BTreeMap::new();
    for ((currency, _, _), net) in by_customer {
        let total = moved.entry(currency.clone()).or_default();
        *total = total.checked_add(net.abs())?;
    }
    Ok(moved)
}

fn refused(what: &str, corrections: &[&Correction]) -> anyhow::Error {
    let mut customers: BTreeMap<&str, u64> = BTreeMap::new();
    for correction in corrections {
        *customers.entry(&correction.customer_id).or_default() += 1;
    }
    let mut customers: Vec<_> = customers.into_iter().collect();
    customers.sort_by_key(|(name, rows)| (std::cmp::Reverse(*rows), *name));
    let shown: Vec<_> = customers.iter().take(5).map(|(name, rows)| format!("{name} ({rows} rows)")).collect();
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
