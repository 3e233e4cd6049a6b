//! What runs changed, summed up: by cause, customer, meter and currency.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use rustc_hash::FxHashSet;

use crate::model::aggregate::{CorrectionKind, PeriodRow, WindowKey};
use crate::model::decimal::Decimal;
use crate::model::decimal_sum::DecimalSum;
use crate::model::run::RunRecord;
use crate::store::{AggregateStore, Corrections, LedgerEntry, StoredDeadLetter};

/// What some runs changed.
#[derive(Debug)]
pub struct Report {
    /// Oldest first.
    pub runs: Vec<RunRecord>,
    pub kinds: Kinds,
    /// By currency: what the rows cost before the first and after the last change.
    pub totals: BTreeMap<String, Totals>,
    /// By causes and currency; a row with several causes is in one group of its own.
    pub by_cause: Groups,
    /// By tenant and customer.
    pub by_customer: Groups,
    pub by_meter: Groups,
    /// The largest changes of cost, up to a limit.
    pub changes: Vec<Changed>,
    /// Differences in closed periods: recorded, the rows stay as they are.
    pub adjustments: Vec<Changed>,
    pub adjusted: BTreeMap<String, DecimalSum>,
    /// Billing periods that changed, and their amounts by currency.
    pub periods: u64,
    pub amounts: BTreeMap<String, Totals>,
    /// Those of closed periods that should be others.
    pub adjusted_periods: u64,
    pub adjusted_amounts: BTreeMap<String, Totals>,
    pub opened: Vec<StoredDeadLetter>,
    pub resolved: Vec<StoredDeadLetter>,
}

/// Groups by name and currency.
pub type Groups = BTreeMap<(String, String), Group>;

/// Corrections that have something in common.
#[derive(Debug, Clone, Copy, Default)]
pub struct Group {
    pub kinds: Kinds,
    /// By how much their cost changed.
    pub change: DecimalSum,
}

/// Corrections by what they do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Kinds {
    pub inserted: u64,
    pub updated: u64,
    pub retracted: u64,
    pub adjusted: u64,
}

/// A sum before and after.
#[derive(Debug, Clone, Copy, Default)]
pub struct Totals {
    pub before: DecimalSum,
    pub after: DecimalSum,
}

/// A correction, and by how much it changes the cost.
#[derive(Debug, Clone)]
pub struct Changed {
    pub entry: LedgerEntry,
    pub causes: BTreeMap<String, u64>,
    pub change: Decimal,
}

impl Kinds {
    fn count(&mut self, kind: &str) {
        *match kind {
            _ if kind == CorrectionKind::Insert.name() => &mut self.inserted,
            _ if kind == CorrectionKind::Retract.name() => &mut self.retracted,
            _ if kind == CorrectionKind::Adjust.name() => &mut self.adjusted,
            _ => &mut self.updated,
        } += 1;
    }

    pub fn total(&self) -> u64 {
        self.inserted + self.updated + self.retracted + self.adjusted
    }
}

impl Totals {
    /// # Errors
    /// Where a sum overflows.
    pub fn change(&self) -> Result<Decimal> {
        Ok(self.after.total()?.checked_sub(self.before.total()?)?)
    }
}

/// Whether a run changed anything, as it says itself.
pub fn changed_something(run: &RunRecord) -> bool {
    let rows = run.counts.get("rows").and_then(serde_json::Value::as_object);
    let count = |value: &serde_json::Value| value.as_u64().unwrap_or_default();
    // Work by hand is recorded only where it changed something.
    rows.is_none_or(|rows| rows.iter().any(|(name, value)| name != "unchanged" && count(value) > 0))
        || run.counts.get("periods").is_some_and(|periods| count(periods) > 0)
}

/// Sums up what `runs` changed; of the changes, the `limit` largest are kept.
///
/// # Errors
/// Where the store cannot be read, or a sum overflows.
pub fn report(store: &dyn AggregateStore, job: &str, runs: Vec<RunRecord>, limit: usize) -> Result<Report> {
    let mut collector = Collector { limit, ..Collector::default() };
    for run in &runs {
        store.corrections(job, Corrections::OfRun(&run.run_id), &mut |entry| collector.add(entry))?;
    }
    let of_runs: FxHashSet<&str> = runs.iter().map(|run| run.run_id.as_str()).collect();
    let mut seen = FxHashSet::default();
    store.period_ledger(job, &mut |entry| {
        if !of_runs.contains(entry.run_id.as_str()) {
            return Ok(());
        }
        let [before, after] = entry.rows()?;
        let amount = |row: &Option<PeriodRow>| row.as_ref().map(|row| (row.currency.to_string(), row.amount));
        let is_adjustment = entry.is_adjustment();
        let is_again = !seen.insert((is_adjustment, entry.key));
        if is_adjustment {
            collector.adjusted_periods += u64::from(!is_again);
            return put(&mut collector.adjusted_amounts, amount(&before), amount(&after), is_again);
        }
        collector.periods += u64::from(!is_again);
        put(&mut collector.amounts, amount(&before), amount(&after), is_again)
    })?;
    let (mut opened, mut resolved) = (Vec::new(), Vec::new());
    for letter in store.dead_letters(job)? {
        let is_resolved = letter.resolved_run_id.as_deref().is_some_and(|run| of_runs.contains(run));
        if of_runs.contains(letter.first_run_id.as_str()) {
            opened.push(letter.clone());
        }
        if is_resolved {
            resolved.push(letter);
        }
    }
    Ok(Report {
        runs,
        kinds: collector.kinds,
        totals: collector.totals,
        by_cause: collector.by_cause,
        by_customer: collector.by_customer,
        by_meter: collector.by_meter,
        changes: collector.largest.into_values().collect(),
        adjustments: collector.adjustments,
        adjusted: collector.adjusted,
        periods: collector.periods,
        amounts: collector.amounts,
        adjusted_periods: collector.adjusted_periods,
        adjusted_amounts: collector.adjusted_amounts,
        opened,
        resolved,
    })
}

/// Adds a change to totals. A row that changes again starts from what it was made before.
fn put(
    totals: &mut BTreeMap<String, Totals>,
    before: Option<(String, Decimal)>,
    after: Option<(String, Decimal)>,
    is_again: bool,
) -> Result<()> {
    if let Some((currency, value)) = before {
        let totals = totals.entry(currency).or_default();
        if is_again {
            totals.after.add(Decimal::ZERO.checked_sub(value)?);
        } else {
            totals.before.add(value);
        }
    }
    if let Some((currency, value)) = after {
        totals.entry(currency).or_default().after.add(value);
    }
    Ok(())
}

/// Whose row a correction is about, and in what currency.
#[derive(serde::Deserialize)]
struct Owner {
    customer_id: String,
    currency: String,
}

impl Owner {
    /// Before the correction.
    fn before(entry: &LedgerEntry) -> Result<Owner> {
        match entry.replaced.as_str() {
            "" => Ok(Owner { customer_id: entry.customer_id.to_string(), currency: entry.currency.to_string() }),
            row => serde_json::from_str(row).with_context(|| entry.correction_id.clone()),
        }
    }
}

/// Sums up corrections as they come.
#[derive(Default)]
struct Collector {
    limit: usize,
    kinds: Kinds,
    totals: BTreeMap<String, Totals>,
    by_cause: Groups,
    by_customer: Groups,
    by_meter: Groups,
    /// The largest first.
    largest: BTreeMap<(Reverse<Decimal>, String), Changed>,
    adjustments: Vec<Changed>,
    adjusted: BTreeMap<String, DecimalSum>,
    periods: u64,
    amounts: BTreeMap<String, Totals>,
    adjusted_periods: u64,
    adjusted_amounts: BTreeMap<String, Totals>,
    seen: FxHashSet<WindowKey>,
}

impl Collector {
    fn add(&mut self, entry: LedgerEntry) -> Result<()> {
        self.kinds.count(&entry.kind);
        let [before, after] = [entry.before, entry.after].map(|values| values.map(|values| values.cost));
        let change = after.unwrap_or_default().checked_sub(before.unwrap_or_default())?;
        let causes: BTreeMap<String, u64> = serde_json::from_str(&entry.causes).with_context(|| entry.correction_id.clone())?;
        let currency = entry.currency.to_string();
        if entry.is_adjustment() {
            self.adjusted.entry(currency).or_default().add(change);
            self.adjustments.push(Changed { entry, causes, change });
            return Ok(());
        }
        let is_again = !self.seen.insert(entry.key.clone());
        let was = Owner::before(&entry)?;
        let in_currency = |currency: &str, cost: Option<Decimal>| cost.map(|cost| (currency.to_owned(), cost));
        put(&mut self.totals, in_currency(&was.currency, before), in_currency(&currency, after), is_again)?;
        let period = &entry.key.period;
        let names = causes.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let customer = |id: &str| format!("{} / {id}", period.tenant_id);
        for (groups, was_of, is_of) in [
            (&mut self.by_cause, names.clone(), names),
            (&mut self.by_customer, customer(&was.customer_id), customer(&entry.customer_id)),
            (&mut self.by_meter, period.meter_id.to_string(), period.meter_id.to_string()),
        ] {
            let (was_of, is_of) = ((was_of, was.currency.clone()), (is_of, currency.clone()));
            let has_moved = was_of != is_of;
            let group = groups.entry(was_of).or_default();
            group.kinds.count(&entry.kind);
            group.change.add(Decimal::ZERO.checked_sub(before.unwrap_or_default())?);
            let group = groups.entry(is_of).or_default();
            if has_moved {
                group.kinds.count(&entry.kind);
            }
            group.change.add(after.unwrap_or_default());
        }
        let place = (Reverse(change.abs()), entry.correction_id.clone());
        self.largest.insert(place, Changed { entry, causes, change });
        if self.largest.len() > self.limit {
            self.largest.pop_last();
        }
        Ok(())
    }
}
