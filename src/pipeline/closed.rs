//! Closed periods: what was invoiced is never written over, nor is what lies beyond the
//! job's horizon.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::lateness::Horizon;
use crate::model::aggregate::{Causes, PeriodKey, PeriodRow, Text, WindowRow};
use crate::model::timestamp::Timestamp;
use crate::model::window::{BillingCycle, Span};
use crate::reference::{Reference, Subscription};

/// Billing periods whose rows stay as they are: those that are closed, and those beyond
/// the job's horizon.
#[derive(Debug, Clone, Default)]
pub struct ClosedPeriods {
    /// By tenant, subscription and start: when it was closed.
    closed: FxHashMap<(Text, Text, Timestamp), Timestamp>,
    horizon: Option<Horizon>,
    /// By tenant and id, where there is a horizon.
    cycles: FxHashMap<(Text, Text), BillingCycle>,
    /// The ends of stored periods of subscriptions that are gone, where there is a horizon.
    ends: FxHashMap<(Text, Text, Timestamp), Timestamp>,
}

impl ClosedPeriods {
    /// A subscription's period is closed as a whole, whatever meters it has.
    pub fn of(rows: &[PeriodRow]) -> ClosedPeriods {
        let closed = rows.iter().filter_map(|row| Some((&row.key, row.closed_at?)));
        let closed =
            closed.map(|(key, at)| ((key.tenant_id.clone(), key.subscription_id.clone(), key.period_start), at)).collect();
        ClosedPeriods { closed, ..ClosedPeriods::default() }
    }

    /// When a period was closed.
    pub fn closed_at(&self, key: &PeriodKey) -> Option<Timestamp> {
        if self.closed.is_empty() {
            return None;
        }
        self.closed.get(&(key.tenant_id.clone(), key.subscription_id.clone(), key.period_start)).copied()
    }

    /// Also those beyond a horizon.
    #[must_use]
    pub fn with_horizon(self, horizon: Horizon, reference: &Reference, stored: &[PeriodRow]) -> ClosedPeriods {
        let cycle = |row: &Subscription| ((Arc::from(row.tenant_id.as_str()), Arc::from(row.id.as_str())), row.cycle);
        let cycles: FxHashMap<_, _> = reference.subscriptions.iter().map(cycle).collect();
        let is_gone = |row: &&PeriodRow| !cycles.contains_key(&(row.key.tenant_id.clone(), row.key.subscription_id.clone()));
        let end = |row: &PeriodRow| {
            ((row.key.tenant_id.clone(), row.key.subscription_id.clone(), row.key.period_start), row.period_end)
        };
        let ends = stored.iter().filter(is_gone).map(end).collect();
        ClosedPeriods { horizon: Some(horizon), cycles, ends, ..self }
    }

    pub fn is_empty(&self) -> bool {
        self.closed.is_empty() && self.horizon.is_none()
    }

    pub fn hold(&self, key: &PeriodKey) -> bool {
        self.hold_of(&key.tenant_id, &key.subscription_id, key.period_start)
    }

    /// As [`ClosedPeriods::hold`], for all meters of a subscription.
    pub fn hold_of(&self, tenant: &Text, subscription: &Text, period_start: Timestamp) -> bool {
        if self.is_empty() {
            return false;
        }
        let subscription = (tenant.clone(), subscription.clone());
        let key = (subscription.0.clone(), subscription.1.clone(), period_start);
        let period = || match self.cycles.get(&subscription) {
            Some(cycle) => Some(cycle.period(period_start)),
            None => self.ends.get(&key).map(|end| Span { start: period_start, end: *end }),
        };
        let is_beyond = || self.horizon.as_ref().is_some_and(|horizon| period().is_some_and(|period| horizon.holds(period)));
        is_beyond() || self.closed.contains_key(&key)
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
    pub fn row(&self) -> Option<&WindowRow> {
        self.after.as_ref().or(self.before.as_ref())
    }
}
