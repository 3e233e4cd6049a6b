//! Closed periods: what was invoiced is never written over. A difference becomes an
//! adjustment in the ledger, once.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};

use super::lateness::Horizon;
use super::reconcile::Reconciliation;
use crate::model::aggregate::{
    Cause, Causes, Correction, CorrectionKind, PeriodKey, PeriodRow, Text, Values, WindowKey, WindowRow,
};
use crate::model::timestamp::Timestamp;
use crate::model::window::BillingCycle;
use crate::reference::{Reference, Subscription};
use crate::store::AggregateStore;

/// Billing periods whose rows stay as they are: those that are closed, and those beyond
/// the job's horizon.
#[derive(Debug, Clone, Default)]
pub struct ClosedPeriods {
    /// Tenant, subscription and start.
    closed: FxHashSet<(Text, Text, Timestamp)>,
    horizon: Option<Horizon>,
    /// By tenant and id, where there is a horizon.
    cycles: FxHashMap<(Text, Text), BillingCycle>,
}

impl ClosedPeriods {
    /// A subscription's period is closed as a whole, whatever meters it has.
    pub fn of(rows: &[PeriodRow]) -> ClosedPeriods {
        let closed = rows.iter().filter(|row| row.closed_at.is_some()).map(|row| &row.key);
        let closed = closed.map(|key| (key.tenant_id.clone(), key.subscription_id.clone(), key.period_start)).collect();
        ClosedPeriods { closed, ..ClosedPeriods::default() }
    }

    /// Also those beyond a horizon.
    #[must_use]
    pub fn with_horizon(self, horizon: Horizon, reference: &Reference) -> ClosedPeriods {
        let cycle = |row: &Subscription| ((Arc::from(row.tenant_id.as_str()), Arc::from(row.id.as_str())), row.cycle);
        ClosedPeriods { horizon: Some(horizon), cycles: reference.subscriptions.iter().map(cycle).collect(), ..self }
    }

    pub fn is_empty(&self) -> bool {
        self.closed.is_empty() && self.horizon.is_none()
    }

    pub fn hold(&self, key: &PeriodKey) -> bool {
        if self.is_empty() {
            return false;
        }
        let subscription = (key.tenant_id.clone(), key.subscription_id.clone());
        let is_beyond = || {
            let cycle = self.cycles.get(&subscription);
            self.horizon.as_ref().zip(cycle).is_some_and(|(horizon, cycle)| horizon.holds(cycle.period(key.period_start)))
        };
        is_beyond() || self.closed.contains(&(subscription.0.clone(), subscription.1.clone(), key.period_start))
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

/// What the ledger says of a window of a closed period.
#[derive(Debug, Clone)]
pub struct Adjustment {
    customer_id: Text,
    currency: Text,
    after: Option<Values>,
}

impl Reconciliation {
    /// Records the differences in closed periods that the ledger does not know yet.
    /// `recorded` has the last adjustment of each window that has one.
    pub fn adjust_closed(&mut self, mut recorded: BTreeMap<WindowKey, Adjustment>) {
        for difference in std::mem::take(&mut self.closed) {
            let Some(row) = difference.row() else { continue };
            let stored = difference.before.as_ref().map(Values::from);
            let after = difference.after.as_ref().map(Values::from);
            let before = recorded.remove(&row.key).map_or(stored, |adjustment| adjustment.after);
            let names = (row.customer_id.clone(), row.currency.clone());
            self.adjust(row.key.clone(), names, difference.causes.clone(), before, after);
        }
        // Neither stored nor computed any more: an adjustment that is taken back.
        for (key, adjustment) in recorded {
            let Adjustment { customer_id, currency, after } = adjustment;
            self.adjust(key, (customer_id, currency), Causes::new(), after, None);
        }
        // Stable: a session that was rebuilt is retracted before it is inserted.
        self.corrections.sort_by(|a, b| a.key.cmp(&b.key));
    }

    fn adjust(
        &mut self,
        key: WindowKey,
        (customer_id, currency): (Text, Text),
        causes: Causes,
        before: Option<Values>,
        after: Option<Values>,
    ) {
        if before == after {
            return;
        }
        let causes = if causes.is_empty() {
            let cause = if after.is_some() { Cause::LateEvent } else { Cause::EventVoided };
            Causes::from([(cause, after.or(before).map_or(1, |values| values.event_count))])
        } else {
            causes
        };
        self.rows.adjusted += 1;
        let kind = CorrectionKind::Adjust;
        self.corrections.push(Correction { key, customer_id, currency, kind, causes, before, after, replaced: None });
    }
}

/// The last adjustment of each window that `wants` is about, unless an ordinary
/// correction came later.
///
/// # Errors
/// Where the ledger cannot be read.
pub fn adjustments(
    store: &dyn AggregateStore,
    job: &str,
    wants: impl Fn(&WindowKey, &str) -> bool,
) -> Result<BTreeMap<WindowKey, Adjustment>> {
    let mut last = BTreeMap::new();
    store.ledger(job, &mut |entry| {
        if !wants(&entry.key, &entry.customer_id) {
            return Ok(());
        }
        if entry.kind == CorrectionKind::Adjust.name() {
            let (customer_id, currency) = (Arc::from(entry.customer_id), Arc::from(entry.currency));
            last.insert(entry.key, Adjustment { customer_id, currency, after: entry.after });
        } else {
            last.remove(&entry.key);
        }
        Ok(())
    })?;
    Ok(last)
}
