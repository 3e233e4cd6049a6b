//! Taking a run back: what it changed becomes what it was before, as new corrections.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::closed::ClosedPeriods;
use super::draft::Draft;
use crate::audit::{describe, describe_period};
use crate::clock::now;
use crate::fault::{FaultKind, configuration, fault};
use crate::model::aggregate::{
    Cause, Causes, Correction, CorrectionKind, PeriodCorrection, PeriodKey, PeriodRow, Recorded, StoredWindow, WindowKey,
    WindowRow,
};
use crate::model::counts::RowCounts;
use crate::model::decimal::{Decimal, DecimalError, DecimalSum};
use crate::model::price::Currency;
use crate::model::run::{RunMode, RunRecord};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::store::AggregateStore;

/// What a revert does beside the draft.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reverted {
    pub rows: RowCounts,
    pub periods: u64,
}

/// What somebody said that a revert may do.
#[derive(Debug, Clone, Copy, Default)]
pub struct Allowed {
    /// Change rows that later runs changed.
    pub later: bool,
    /// Change what was invoiced.
    pub closed: bool,
}

/// What one run did to one row of `usage_windows`, from before its first to after its last
/// correction.
struct WindowChange {
    /// JSON of the row.
    before: Option<String>,
    /// A run that changed the row later.
    later: Option<String>,
}

/// The same of a row of `usage_periods`. Closing a period is no change of what it says.
struct PeriodChange {
    before: Option<PeriodRow>,
    after: Option<PeriodRow>,
    later: Option<String>,
}

type Windows = BTreeMap<WindowKey, Arc<WindowRow>>;

/// Takes back what a run changed.
///
/// The row of a billing period that later runs changed through other windows loses only what the
/// run did to it, where its windows tell what is left.
///
/// # Errors
/// Where there is no such run, its changes cannot be taken back, or it changed rows that are not
/// `allowed` to be (a guard fault, exit code 8).
pub fn revert(
    store: &dyn AggregateStore,
    job: &str,
    runs: &[RunRecord],
    run_id: &str,
    allowed: Allowed,
) -> Result<(Draft, Reverted)> {
    let run = runs.iter().find(|run| run.run_id == run_id);
    let run = run.ok_or_else(|| configuration(format!("--run {run_id}: job {job} has no such run: `trueup runs` lists them")))?;
    let windows = window_changes(store, job, run_id)?;
    let periods = period_changes(store, job, run_id)?;
    if windows.is_empty() && periods.is_empty() {
        return Err(configuration(format!("--run {run_id}: that run changed nothing")));
    }
    let everything = Span { start: Timestamp::MIN, end: Timestamp::MAX };
    let stored_periods = store.periods(job, everything)?;
    let closed = ClosedPeriods::of(&stored_periods);
    let mut touched = windows.keys().map(|key| &*key.period).chain(periods.keys());
    if let Some(key) = touched.find(|key| closed.hold(key) && !allowed.closed) {
        return Err(fault(
            FaultKind::Guard,
            format!("{} is closed: say --allow-closed to change what was invoiced", describe_period(key)),
        ));
    }
    let extent = store.extent(job)?;
    let stored: Vec<StoredWindow> = extent.map_or(Ok(Vec::new()), |extent| store.windows(job, extent))?;
    let mut stored: Windows = stored.into_iter().map(|stored| (stored.row.key.clone(), stored.row)).collect();

    let counts = serde_json::json!({"reverted": run_id});
    let mut draft = Draft::by_hand(RunMode::Revert, runs.last(), counts);
    let mut reverted = Reverted::default();
    let rows = windows.len() + periods.len();
    let mut later: Vec<(String, String)> = Vec::new();
    let sums_now: BTreeMap<PeriodKey, _> = periods.keys().map(|key| (key.clone(), Sums::of(&stored, key))).collect();
    for (key, change) in windows {
        later.extend(change.later.clone().map(|by| (describe(&key), by)));
        restore_window(&mut draft, &mut reverted.rows, &mut stored, &key, &change).with_context(|| describe(&key))?;
    }
    let mut stored_periods: BTreeMap<PeriodKey, PeriodRow> =
        stored_periods.into_iter().map(|row| (row.key.clone(), row)).collect();
    for (key, change) in periods {
        let current = stored_periods.remove(&key);
        let sums = [sums_now.get(&key).copied().unwrap_or_default(), Sums::of(&stored, &key)];
        let restored = if run.mode == RunMode::Close {
            change.opened_or_closed(current.as_ref())
        } else {
            change.restored(current.as_ref(), sums).with_context(|| describe_period(&key))?
        };
        let restored = restored.unwrap_or_else(|by| {
            later.push((describe_period(&key), by));
            change.before_as_closed_as(current.as_ref())
        });
        reverted.periods += u64::from(restore_period(&mut draft, current, key, restored));
    }
    if let Some((row, by)) = later.first().filter(|_| !allowed.later) {
        return Err(fault(
            FaultKind::Guard,
            format!(
                "run {run_id} cannot be taken back alone: {} of its {rows} rows were changed by later runs (first {row}, by run \
                 {by}). Take those back first, or say --force",
                later.len()
            ),
        ));
    }
    if draft.corrections.is_empty() && draft.period_corrections.is_empty() {
        return Err(configuration(format!("--run {run_id}: what that run changed is as it was before it already")));
    }
    if let Some(counts) = draft.counts.as_object_mut() {
        counts.insert("rows".to_owned(), serde_json::to_value(reverted.rows)?);
        counts.insert("periods".to_owned(), reverted.periods.into());
    }
    draft.started_at = now();
    tracing::info!(run = run.run_id, rows = reverted.rows.changed(), "taking back");
    Ok((draft, reverted))
}

fn window_changes(store: &dyn AggregateStore, job: &str, run_id: &str) -> Result<BTreeMap<WindowKey, WindowChange>> {
    let mut changes: BTreeMap<WindowKey, WindowChange> = BTreeMap::new();
    store.ledger(job, &mut |entry| {
        if entry.kind == CorrectionKind::Adjust.name() {
            return Ok(());
        }
        match changes.get_mut(&entry.key) {
            Some(change) if entry.run_id != run_id => change.later = Some(entry.run_id),
            None if entry.run_id == run_id => {
                let before = entry.before.map(|_| entry.replaced);
                changes.insert(entry.key, WindowChange { before, later: None });
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(changes)
}

/// What a run did to rows of `usage_periods`.
fn period_changes(store: &dyn AggregateStore, job: &str, run_id: &str) -> Result<BTreeMap<PeriodKey, PeriodChange>> {
    let mut changes: BTreeMap<PeriodKey, PeriodChange> = BTreeMap::new();
    store.period_ledger(job, &mut |entry| {
        if entry.is_adjustment() || (entry.run_id != run_id && changes.is_empty()) {
            return Ok(());
        }
        let [before, after] = entry.rows()?;
        let Some(key) = before.as_ref().or(after.as_ref()).map(|row| row.key.clone()) else { return Ok(()) };
        match changes.get_mut(&key) {
            Some(change) if entry.run_id == run_id => change.after = after,
            Some(change) => {
                let same = before.as_ref().zip(after.as_ref()).is_some_and(|(before, after)| before.says_the_same(after));
                if !same {
                    change.later = Some(entry.run_id);
                }
            }
            None if entry.run_id == run_id => {
                changes.insert(key, PeriodChange { before, after, later: None });
            }
            None => {}
        }
        Ok(())
    })?;
    Ok(changes)
}

/// What the windows of a billing period add up to.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    windows: usize,
    quantity: DecimalSum,
    cost: DecimalSum,
}

impl Sums {
    fn of(windows: &Windows, period: &PeriodKey) -> Sums {
        let period = Arc::new(period.clone());
        let at = |window_start| WindowKey { period: Arc::clone(&period), window_start };
        let mut sums = Sums::default();
        for (_, row) in windows.range(at(Timestamp::MIN)..=at(Timestamp::MAX)) {
            sums.windows += 1;
            sums.quantity.add(row.quantity);
            sums.cost.add(row.cost);
        }
        sums
    }

    fn are(self, quantity: Decimal, cost: Decimal) -> Result<bool, DecimalError> {
        Ok(self.quantity.total()? == quantity && self.cost.total()? == cost)
    }
}

impl PeriodChange {
    /// The row without what the run did to it; the run that changed it later where that cannot
    /// be told. `sums` are those of its windows, now and once they are restored.
    fn restored(&self, current: Option<&PeriodRow>, sums: [Sums; 2]) -> Result<Result<Option<PeriodRow>, String>> {
        let Some(later) = &self.later else { return Ok(Ok(self.before_as_closed_as(current))) };
        let known = current.map(|current| self.without(current, sums)).transpose()?.flatten();
        Ok(known.map(Some).ok_or_else(|| later.clone()))
    }

    /// What a row is now, less what the run added to it, if that is what its windows say.
    fn without(&self, current: &PeriodRow, [now, then]: [Sums; 2]) -> Result<Option<PeriodRow>, DecimalError> {
        let is_plain = |row: &PeriodRow| {
            row.minimum_adjustment.is_zero()
                && row.commitment_adjustment.is_zero()
                && row.customer_id == current.customer_id
                && row.currency == current.currency
                && row.period_end == current.period_end
        };
        let rows = [self.before.as_ref(), self.after.as_ref(), Some(current)];
        if !rows.into_iter().flatten().all(is_plain) || then.windows == 0 {
            return Ok(None);
        }
        let of = |row: &Option<PeriodRow>| row.as_ref().map_or((Decimal::ZERO, Decimal::ZERO), |row| (row.quantity, row.cost));
        let (before, after) = (of(&self.before), of(&self.after));
        let quantity = current.quantity.checked_sub(after.0)?.checked_add(before.0)?;
        let cost = current.cost.checked_sub(after.1)?.checked_add(before.1)?;
        if !now.are(current.quantity, current.cost)? || !then.are(quantity, cost)? {
            return Ok(None);
        }
        let minor_digits = Currency::from_code(&current.currency).map_or(0, |currency| currency.minor_digits);
        Ok(Some(PeriodRow { quantity, cost, amount: cost.round(minor_digits)?, ..current.clone() }))
    }

    /// The row as it is, closed or open as it was before the run.
    fn opened_or_closed(&self, current: Option<&PeriodRow>) -> Result<Option<PeriodRow>, String> {
        let closed_at = self.before.as_ref().and_then(|row| row.closed_at);
        match (current, &self.later) {
            (None, Some(later)) => Err(later.clone()),
            (current, _) => Ok(current.map(|row| PeriodRow { closed_at, ..row.clone() })),
        }
    }

    /// The row as it was; whether it is closed is not for a run to say that computes.
    fn before_as_closed_as(&self, current: Option<&PeriodRow>) -> Option<PeriodRow> {
        let row = self.before.clone()?;
        Some(PeriodRow { closed_at: current.map_or(row.closed_at, |current| current.closed_at), ..row })
    }
}

fn restore_window(
    draft: &mut Draft,
    rows: &mut RowCounts,
    stored: &mut Windows,
    key: &WindowKey,
    change: &WindowChange,
) -> Result<()> {
    let current = stored.remove(key);
    let restored = match &change.before {
        None => None,
        Some(replaced) => Some(
            serde_json::from_str::<WindowRow>(replaced)
                .map(Arc::new)
                .context("the ledger does not hold the row as it was before")?,
        ),
    };
    let Some(row) = restored.as_ref().or(current.as_ref()) else { return Ok(()) };
    stored.extend(restored.as_ref().map(|row| (key.clone(), Arc::clone(row))));
    let kind = match (&current, &restored) {
        (None, Some(_)) => CorrectionKind::Insert,
        (Some(_), Some(_)) => CorrectionKind::Update,
        (_, None) => CorrectionKind::Retract,
    };
    draft.corrections.push(Correction {
        key: row.key.clone(),
        customer_id: row.customer_id.clone(),
        currency: row.currency.clone(),
        kind,
        causes: Causes::from([(Cause::ManualRevert, 1)]),
        before: current.as_ref().map(Recorded::from),
        after: restored.as_ref().map(Recorded::from),
        replaced: current.clone(),
    });
    match (kind, restored) {
        (CorrectionKind::Insert, Some(row)) => {
            rows.inserted += 1;
            draft.upserts.push(row);
        }
        (_, Some(row)) => {
            rows.updated += 1;
            draft.upserts.push(row);
        }
        (_, None) => {
            rows.retracted += 1;
            draft.retractions.extend(current.map(|row| row.key.clone()));
        }
    }
    Ok(())
}

/// Whether the row changes.
fn restore_period(draft: &mut Draft, current: Option<PeriodRow>, key: PeriodKey, restored: Option<PeriodRow>) -> bool {
    if restored == current {
        return false;
    }
    match &restored {
        Some(row) => draft.period_upserts.push(row.clone()),
        None => draft.period_deletions.push(key.clone()),
    }
    draft.period_corrections.push(PeriodCorrection { key, before: current, after: restored, is_adjustment: false });
    true
}
