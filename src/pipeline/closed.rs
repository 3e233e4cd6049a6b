//! Closed periods: what was invoiced is never written over. A difference becomes an
//! adjustment in the ledger, once.

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};

use super::reconcile::Reconciliation;
use crate::model::aggregate::{
    Cause, Causes, Correction, CorrectionKind, PeriodKey, PeriodRow, Text, Values, WindowKey, WindowRow,
};
use crate::model::timestamp::Timestamp;
use crate::store::AggregateStore;

/// Tenant, subscription and start of the billing periods that are closed.
#[derive(Debug, Clone, Default)]
pub struct ClosedPeriods(FxHashSet<(Text, Text, Timestamp)>);

impl ClosedPeriods {
    /// A subscription's period is closed as a whole, whatever meters it has.
    pub fn of(rows: &[PeriodRow]) -> ClosedPeriods {
        let closed = rows.iter().filter(|row| row.closed_at.is_some()).map(|row| &row.key);
        ClosedPeriods(closed.map(|key| (key.tenant_id.clone(), key.subscription_id.clone(), key.period_start)).collect())
    }

    pub fn hold(&self, key: &PeriodKey) -> bool {
        !self.0.is_empty() && self.0.contains(&(key.tenant_id.clone(), key.subscription_id.clone(), key.period_start))
    }
}

/// What is stored of a closed period, and what should be.
#[derive(Debug)]
pub struct ClosedDifference {
    pub before: Option<WindowRow>,
    pub after: Option<WindowRow>,
    pub causes: Causes,
}

impl ClosedDifference {
    fn row(&self) -> Option<&WindowRow> {
        self.after.as_ref().or(self.before.as_ref())
    }
}

impl Reconciliation {
    /// Whether differences in closed periods are left that the ledger may know.
    pub fn has_closed_differences(&self) -> bool {
        !self.closed.is_empty()
    }

    /// Records the differences that the ledger does not know yet. `recorded` has the
    /// values of the last adjustment of each key that has one.
    pub fn adjust_closed(&mut self, recorded: &FxHashMap<WindowKey, Option<Values>>) {
        for difference in std::mem::take(&mut self.closed) {
            let Some(row) = difference.row() else { continue };
            let stored = difference.before.as_ref().map(Values::from);
            let after = difference.after.as_ref().map(Values::from);
            let before = recorded.get(&row.key).copied().unwrap_or(stored);
            if before == after {
                continue;
            }
            let causes = if difference.causes.is_empty() {
                let cause = if after.is_some() { Cause::LateEvent } else { Cause::EventVoided };
                Causes::from([(cause, after.or(before).map_or(1, |values| values.event_count))])
            } else {
                difference.causes.clone()
            };
            self.rows.adjusted += 1;
            let correction = Correction {
                key: row.key.clone(),
                customer_id: row.customer_id.clone(),
                currency: row.currency.clone(),
                kind: CorrectionKind::Adjust,
                causes,
                before,
                after,
                replaced: None,
            };
            self.corrections.push(correction);
        }
        // Stable: a session that was rebuilt is retracted before it is inserted.
        self.corrections.sort_by(|a, b| a.key.cmp(&b.key));
    }
}

/// The last adjustment of each window, unless an ordinary correction came later.
///
/// # Errors
/// Where the ledger cannot be read.
pub fn adjustments(store: &dyn AggregateStore, job: &str) -> Result<FxHashMap<WindowKey, Option<Values>>> {
    let mut last = FxHashMap::default();
    store.ledger(job, &mut |entry| {
        if entry.kind == CorrectionKind::Adjust.name() {
            last.insert(entry.key, entry.after);
        } else {
            last.remove(&entry.key);
        }
        Ok(())
    })?;
    Ok(last)
}
