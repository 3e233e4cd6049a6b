//! Adjustments: a difference in a closed period goes into the ledger, once, and changes
//! no stored row.

use std::collections::BTreeMap;

use anyhow::Result;

use super::reconcile::{PeriodChanges, Reconciliation};
use crate::model::aggregate::{
    Cause, Causes, Correction, CorrectionKind, PeriodCorrection, PeriodKey, PeriodRow, Recorded, Text, Values, WindowKey,
    WindowRow,
};
use crate::store::AggregateStore;

/// What a window of a closed period should be, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Said {
    customer_id: Text,
    currency: Text,
    values: Values,
}

impl From<&WindowRow> for Said {
    fn from(row: &WindowRow) -> Self {
        Said { customer_id: row.customer_id.clone(), currency: row.currency.clone(), values: Values::from(row) }
    }
}

/// What the ledger says of a window of a closed period; `None` for no window.
#[derive(Debug, Clone)]
pub struct Adjustment(Option<Said>);

impl Reconciliation {
    /// Records the differences in closed periods that the ledger does not know yet.
    /// `recorded` has the last adjustment of each window that has one; `is_computed` says
    /// whether a window that was neither found nor computed would have been, and `in_scope`
    /// whether the usage of a customer would.
    pub fn adjust_closed(
        &mut self,
        mut recorded: BTreeMap<WindowKey, Adjustment>,
        is_computed: impl Fn(&WindowKey) -> bool,
        in_scope: impl Fn(&str) -> bool,
    ) {
        let is_of_others = |said: &Option<Said>| said.as_ref().is_some_and(|said| !in_scope(&said.customer_id));
        std::mem::take(&mut self.closed_and_stale).iter().for_each(|key| drop(recorded.remove(key)));
        for difference in std::mem::take(&mut self.closed) {
            let Some(row) = difference.row() else { continue };
            let stored = difference.before.as_ref().map(Said::from);
            let after = difference.after.as_ref().map(Said::from);
            let before = recorded.remove(&row.key).map_or(stored, |adjustment| adjustment.0);
            // What is another's by now, a run of one customer cannot judge.
            if after.is_some() || !is_of_others(&before) {
                self.adjust(&row.key, &difference.causes, before.as_ref(), after.as_ref());
            }
        }
        // Neither stored nor computed any more: an adjustment that is taken back.
        for (key, Adjustment(said)) in recorded.into_iter().filter(|(key, _)| is_computed(key)) {
            if !is_of_others(&said) {
                self.adjust(&key, &Causes::new(), said.as_ref(), None);
            }
        }
        // Stable: a session that was rebuilt is retracted before it is inserted.
        self.corrections.sort_by(|a, b| a.key.cmp(&b.key));
    }

    fn adjust(&mut self, key: &WindowKey, causes: &Causes, before: Option<&Said>, after: Option<&Said>) {
        if before == after {
            return;
        }
        let causes = if causes.is_empty() {
            let cause = if after.is_some() { Cause::LateEvent } else { Cause::EventVoided };
            let counted = after.or(before).map_or(1, |said| said.values.event_count);
            Causes::from([(cause, counted)])
        } else {
            causes.clone()
        };
        let mut record = |of: &Said, before: Option<&Said>, after: Option<&Said>| {
            self.rows.adjusted += 1;
            let values = |said: Option<&Said>| said.map(|said| Recorded::from(said.values));
            self.corrections.push(Correction {
                key: key.clone(),
                customer_id: of.customer_id.clone(),
                currency: of.currency.clone(),
                kind: CorrectionKind::Adjust,
                causes: causes.clone(),
                before: values(before),
                after: values(after),
                replaced: None,
            });
        };
        match (before, after) {
            // What moves to another customer, or is of another currency, is taken from one and given to the other.
            (Some(from), Some(to)) if (&from.customer_id, &from.currency) != (&to.customer_id, &to.currency) => {
                record(from, Some(from), None);
                record(to, None, Some(to));
            }
            (before, after) => {
                after.or(before).into_iter().for_each(|of| record(of, before, after));
            }
        }
    }
}

/// The last adjustment of each window of the periods that `wants` holds, whoever it is of,
/// unless an ordinary correction came later.
///
/// # Errors
/// Where the ledger cannot be read.
pub fn recorded(
    store: &dyn AggregateStore,
    job: &str,
    wants: impl Fn(&PeriodKey) -> bool,
) -> Result<BTreeMap<WindowKey, Adjustment>> {
    let mut last = BTreeMap::new();
    store.ledger(job, &mut |entry| {
        if !wants(&entry.key.period) {
            return Ok(());
        }
        if entry.is_adjustment() {
            let said = |values| Said { customer_id: entry.customer_id, currency: entry.currency, values };
            last.insert(entry.key, Adjustment(entry.after.map(said)));
        } else {
            last.remove(&entry.key);
        }
        Ok(())
    })?;
    Ok(last)
}

impl PeriodChanges {
    /// Records what the bills of closed periods should be, as far as the ledger does not know it
    /// yet. `recorded` has the last adjustment of each row that has one; `is_known` says whether
    /// all of a period was computed, and `in_scope` whether the usage of a customer was.
    pub fn adjust_closed(
        &mut self,
        mut recorded: BTreeMap<PeriodKey, Option<PeriodRow>>,
        is_known: impl Fn(&PeriodRow) -> bool,
        in_scope: impl Fn(&str) -> bool,
    ) {
        let is_of_others = |row: &Option<PeriodRow>| row.as_ref().is_some_and(|row| !in_scope(&row.customer_id));
        for (key, (stored, computed)) in std::mem::take(&mut self.closed) {
            let recorded = recorded.remove(&key);
            if !computed.iter().chain(&stored).all(&is_known) {
                continue;
            }
            let closed_at = stored.as_ref().and_then(|row| row.closed_at);
            let before = recorded.unwrap_or(stored);
            if computed.is_some() || !is_of_others(&before) {
                self.adjust(key, before, computed.map(|row| PeriodRow { closed_at, ..row }));
            }
        }
        for (key, before) in recorded {
            if before.as_ref().is_some_and(&is_known) && !is_of_others(&before) {
                self.adjust(key, before, None);
            }
        }
    }

    fn adjust(&mut self, key: PeriodKey, before: Option<PeriodRow>, after: Option<PeriodRow>) {
        let is_same = match (&before, &after) {
            (Some(before), Some(after)) => before.says_the_same(after),
            (before, after) => before.is_none() && after.is_none(),
        };
        if !is_same {
            self.adjusted += 1;
            self.corrections.push(PeriodCorrection { key, before, after, is_adjustment: true });
        }
    }
}

/// The last adjustment of each row of `usage_periods` of the periods that `wants` holds, unless
/// the row changed later.
///
/// # Errors
/// Where the ledger cannot be read.
pub fn recorded_periods(
    store: &dyn AggregateStore,
    job: &str,
    wants: impl Fn(&PeriodKey) -> bool,
) -> Result<BTreeMap<PeriodKey, Option<PeriodRow>>> {
    let mut last = BTreeMap::new();
    store.period_ledger(job, &mut |entry| {
        if !wants(&entry.key) || (!entry.is_adjustment() && !last.contains_key(&entry.key)) {
            return Ok(());
        }
        let [before, after] = entry.rows()?;
        let closes = before.as_ref().zip(after.as_ref()).is_some_and(|(before, after)| before.says_the_same(after));
        if entry.is_adjustment() {
            last.insert(entry.key, after);
        } else if !closes {
            last.remove(&entry.key);
        }
        Ok(())
    })?;
    Ok(last)
}
