//! Adjustments: a difference in a closed period goes into the ledger, once, and changes
//! no stored row.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use super::closed::ClosedPeriods;
use super::price::PricedWindow;
use super::reconcile::{PeriodChanges, Reconciliation};
use crate::model::aggregate::{
    Cause, Causes, Correction, CorrectionKind, PeriodCorrection, PeriodKey, PeriodRow, Recorded, Text, Values, WindowKey,
    WindowRow,
};
use crate::model::decimal::Decimal;
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

/// What the ledger says of a window of a closed period.
#[derive(Debug, Clone)]
struct Adjustment {
    /// `None` for no window.
    said: Option<Said>,
    causes: Causes,
    /// What was stored then, and since.
    stored: Option<Values>,
}

/// The adjustments that nothing has replaced yet, each the last one of its row.
#[derive(Debug, Default)]
pub struct Adjustments {
    windows: BTreeMap<WindowKey, Adjustment>,
    bills: BTreeMap<PeriodKey, Option<PeriodRow>>,
}

/// What of a job a run can judge.
pub struct Judged<'j> {
    /// Windows of these keys are computed, if there are any.
    pub windows: &'j dyn Fn(&WindowKey) -> bool,
    /// Why what a run said of a window holds no more.
    pub since: &'j dyn Fn(&WindowKey) -> Causes,
    /// Bills in here are, by their rows.
    pub bills: &'j dyn Fn(&PeriodRow) -> bool,
    /// The one customer whose usage is.
    pub customer: Option<&'j str>,
}

impl Judged<'_> {
    fn is_of_others(&self, customer: Option<&Text>) -> bool {
        customer.is_some_and(|of| self.customer.is_some_and(|wanted| *wanted != **of))
    }
}

impl Reconciliation {
    /// Why rows changed that were closed when their reason came up: that is on record.
    pub fn explain_by(&mut self, recorded: &Adjustments) {
        if recorded.windows.is_empty() {
            return;
        }
        let unproved = std::mem::take(&mut self.unproved);
        for (at, correction) in self.corrections.iter_mut().enumerate() {
            let is_open = unproved.binary_search(&at).is_ok();
            let is_told = is_open || correction.causes.names().eq([Cause::StoreAltered]);
            let says_so = |adjustment: &&Adjustment| {
                let said = adjustment.said.as_ref().map(|said| said.values);
                adjustment.stored == correction.values_before() && said == correction.values_after()
            };
            match recorded
                .windows
                .get(&correction.key)
                .filter(|adjustment| is_told && !adjustment.causes.is_empty())
                .filter(says_so)
            {
                Some(adjustment) => correction.causes = adjustment.causes.clone(),
                None if is_open => self.unproved.push(at),
                None => {}
            }
        }
    }

    /// Records the differences in closed periods that the ledger does not know yet, and that
    /// those of periods hold no more that are open again. Of these, `computed` has the rows.
    pub fn adjust(&mut self, recorded: &mut Adjustments, closed: &ClosedPeriods, computed: &[PricedWindow], judged: &Judged<'_>) {
        let mut recorded = std::mem::take(&mut recorded.windows);
        let customer = |said: &Option<Said>| said.as_ref().map(|said| said.customer_id.clone());
        let is_of_others = |said: &Option<Said>| judged.is_of_others(customer(said).as_ref());
        std::mem::take(&mut self.closed_and_stale).iter().for_each(|key| drop(recorded.remove(key)));
        // A row that is written replaces what was said of it.
        self.corrections.iter().for_each(|correction| drop(recorded.remove(&correction.key)));
        for difference in std::mem::take(&mut self.closed) {
            let Some(row) = difference.row() else { continue };
            let stored = difference.before.as_ref().map(Said::from);
            let after = difference.after.as_ref().map(Said::from);
            let recorded = recorded.remove(&row.key);
            let mut causes = difference.causes.clone();
            if recorded.is_some() && (causes.is_empty() || causes.names().eq([Cause::StoreAltered])) {
                // It differs from what was said, not from what is stored.
                causes = (judged.since)(&row.key);
            }
            let before = recorded.map_or(stored, |adjustment| adjustment.said);
            // What is another's by now, a run of one customer cannot judge.
            if after.is_some() || !is_of_others(&before) {
                self.record(&row.key, &causes, before.as_ref(), after.as_ref());
            }
        }
        // Neither stored nor computed any more, or stored as it is computed: taken back.
        for (key, Adjustment { said, .. }) in recorded {
            let at = computed.binary_search_by(|window| window.row.key.cmp(&key)).ok();
            let now = at.and_then(|at| computed.get(at)).filter(|_| !closed.hold(&key.period));
            if (judged.windows)(&key) && !is_of_others(&said) {
                let causes = (judged.since)(&key);
                self.record(&key, &causes, said.as_ref(), now.map(|window| Said::from(&*window.row)).as_ref());
            }
        }
        // Stable: a session that was rebuilt is retracted before it is inserted.
        self.corrections.sort_by(|a, b| a.key.cmp(&b.key));
    }

    fn record(&mut self, key: &WindowKey, causes: &Causes, before: Option<&Said>, after: Option<&Said>) {
        if before == after {
            return;
        }
        let causes = if causes.is_empty() {
            let values =
                |said: Option<&Said>| said.map_or((0, Decimal::ZERO), |said| (said.values.event_count, said.values.quantity));
            let ((was, quantity_before), (is, quantity_after)) = (values(before), values(after));
            Causes::from([match was.cmp(&is) {
                Ordering::Less => (Cause::LateEvent, is - was),
                Ordering::Greater => (Cause::EventVoided, was - is),
                Ordering::Equal if quantity_before == quantity_after => (Cause::TierShift, 1),
                Ordering::Equal => (Cause::EventAmended, 1),
            }])
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

impl Adjustments {
    /// Whether the bills of closed periods, as they are stored or as the ledger says that they
    /// should be, are those that are `due`.
    ///
    /// # Errors
    /// Where the ledger cannot be read.
    pub fn tell(store: &dyn AggregateStore, job: &str, stored: Vec<PeriodRow>, due: &[PeriodRow]) -> Result<bool> {
        let mut said: BTreeMap<PeriodKey, PeriodRow> = stored.into_iter().map(|row| (row.key.clone(), row)).collect();
        let is_as_due = |said: &BTreeMap<PeriodKey, PeriodRow>| {
            said.len() == due.len() && due.iter().all(|row| said.get(&row.key).is_some_and(|said| said.says_the_same(row)))
        };
        if is_as_due(&said) {
            return Ok(true);
        }
        let keys: BTreeSet<_> = said.keys().chain(due.iter().map(|row| &row.key)).cloned().collect();
        for (key, row) in Adjustments::of_bills(store, job, |key| keys.contains(key))? {
            match row {
                Some(row) => drop(said.insert(key, row)),
                None => drop(said.remove(&key)),
            }
        }
        Ok(is_as_due(&said))
    }

    /// Those of the periods that `wants` holds, whoever they are of. An ordinary correction that
    /// came later replaces one.
    ///
    /// # Errors
    /// Where the ledger cannot be read.
    pub fn load(store: &dyn AggregateStore, job: &str, wants: impl Fn(&PeriodKey) -> bool) -> Result<Adjustments> {
        let mut windows: BTreeMap<WindowKey, Adjustment> = BTreeMap::new();
        store.ledger(job, &mut |entry| {
            if !wants(&entry.key.period) {
                return Ok(());
            }
            if entry.is_adjustment() {
                let causes = Causes::parse(&entry.causes);
                let said = |values| Said { customer_id: entry.customer_id, currency: entry.currency, values };
                // Of what moves to another customer, the second one says what was stored for the first.
                let known = windows.get(&entry.key).map(|known: &Adjustment| known.stored);
                let stored = known.unwrap_or(entry.before);
                windows.insert(entry.key, Adjustment { said: entry.after.map(said), causes, stored });
            } else {
                windows.remove(&entry.key);
            }
            Ok(())
        })?;
        Ok(Adjustments { windows, bills: Adjustments::of_bills(store, job, wants)? })
    }

    /// The last adjustment of each bill that `wants` holds.
    fn of_bills(
        store: &dyn AggregateStore,
        job: &str,
        wants: impl Fn(&PeriodKey) -> bool,
    ) -> Result<BTreeMap<PeriodKey, Option<PeriodRow>>> {
        let mut bills = BTreeMap::new();
        store.period_ledger(job, &mut |entry| {
            if !wants(&entry.key) || (!entry.is_adjustment() && !bills.contains_key(&entry.key)) {
                return Ok(());
            }
            let [before, after] = entry.rows()?;
            let closes = before.as_ref().zip(after.as_ref()).is_some_and(|(before, after)| before.says_the_same(after));
            if entry.is_adjustment() {
                bills.insert(entry.key, after);
            } else if !closes {
                bills.remove(&entry.key);
            }
            Ok(())
        })?;
        Ok(bills)
    }
}

impl PeriodChanges {
    /// Records what the bills of closed periods should be, as far as the ledger does not know it
    /// yet, and that what was said of others holds no more. Of these, `computed` has the rows.
    pub fn adjust(&mut self, recorded: &mut Adjustments, closed: &ClosedPeriods, computed: &[PeriodRow], judged: &Judged<'_>) {
        let mut recorded = std::mem::take(&mut recorded.bills);
        let is_of_others = |row: &Option<PeriodRow>| judged.is_of_others(row.as_ref().map(|row| &row.customer_id));
        self.corrections.iter().for_each(|correction| drop(recorded.remove(&correction.key)));
        for (key, (stored, row)) in std::mem::take(&mut self.closed) {
            let recorded = recorded.remove(&key);
            if !row.iter().chain(&stored).all(judged.bills) {
                continue;
            }
            let closed_at = stored.as_ref().and_then(|row| row.closed_at);
            let before = recorded.unwrap_or(stored);
            if row.is_some() || !is_of_others(&before) {
                self.record(key, before, row.map(|row| PeriodRow { closed_at, ..row }));
            }
        }
        for (key, before) in recorded {
            let at = computed.binary_search_by(|row| row.key.cmp(&key)).ok();
            let now = at.and_then(|at| computed.get(at)).filter(|_| !closed.hold(&key)).cloned();
            if before.iter().chain(&now).all(judged.bills) && !is_of_others(&before) {
                self.record(key, before, now);
            }
        }
    }

    fn record(&mut self, key: PeriodKey, before: Option<PeriodRow>, after: Option<PeriodRow>) {
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
