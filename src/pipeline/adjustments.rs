//! Adjustments: a difference in a closed period goes into the ledger, once, and changes
//! no stored row.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;

use super::reconcile::Reconciliation;
use crate::model::aggregate::{Cause, Causes, Correction, CorrectionKind, Recorded, Text, Values, WindowKey};
use crate::store::AggregateStore;

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
        let (before, after) = (before.map(Recorded::from), after.map(Recorded::from));
        self.corrections.push(Correction { key, customer_id, currency, kind, causes, before, after, replaced: None });
    }
}

/// The last adjustment of each window that `wants` is about, unless an ordinary
/// correction came later.
///
/// # Errors
/// Where the ledger cannot be read.
pub fn recorded(
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
