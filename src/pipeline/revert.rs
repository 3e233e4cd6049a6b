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
    Cause, Causes, Correction, CorrectionKind, PeriodCorrection, PeriodKey, PeriodRow, Recorded, StoredWindow, Text, WindowKey,
    WindowRow,
};
use crate::model::counts::RowCounts;
use crate::model::decimal::{Decimal, DecimalError};
use crate::model::decimal_sum::DecimalSum;
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
    /// A run that changed later what the row says.
    later: Option<String>,
    /// A run that closed or opened the period later.
    later_closing: Option<String>,
}

type Windows = BTreeMap<WindowKey, Arc<WindowRow>>;
type Periods = BTreeMap<PeriodKey, PeriodChange>;

/// Takes back what a run changed.
///
/// The row of a billing period that later runs changed through other windows loses only what the
/// run did to it, where its windows tell what is left.
///
/// `closed` gives the periods that stay as they are.
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
    closed: impl FnOnce(&[PeriodRow], &[RunRecord]) -> Result<ClosedPeriods>,
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
    let closed = closed(&stored_periods, runs)?;
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
    let mut stored_periods: BTreeMap<PeriodKey, PeriodRow> =
        stored_periods.into_iter().map(|row| (row.key.clone(), row)).collect();
    let (closings, mut periods): (Periods, Periods) = periods.into_iter().partition(|(_, change)| change.is_closing());
    if allowed.later {
        // What the run did not change of a bill, later runs may have.
        let of_windows = windows.keys().map(|key| &key.period).filter(|key| stored_periods.contains_key(&***key));
        let unchanged: Vec<_> =
            of_windows.filter(|key| !periods.contains_key(&***key)).map(|key| PeriodKey::clone(key)).collect();
        periods.extend(unchanged.into_iter().map(|key| (key, PeriodChange::NONE)));
    }
    let sums_now: BTreeMap<PeriodKey, _> = periods.keys().map(|key| (key.clone(), Sums::of(&stored, key))).collect();
    for (key, change) in windows {
        later.extend(change.later.clone().map(|by| (describe(&key), by)));
        restore_window(&mut draft, &mut reverted.rows, &mut stored, &key, &change).with_context(|| describe(&key))?;
    }
    for (key, change) in periods {
        let current = stored_periods.get(&key).cloned();
        let sums = [sums_now.get(&key).copied().unwrap_or_default(), Sums::of(&stored, &key)];
        let (restored, conflict) =
            change.restored(current.as_ref(), sums).with_context(|| format!("the bill of {}", describe_period(&key)))?;
        later.extend(conflict.map(|by| (describe_period(&key), by)));
        // Whether it is closed, only closing says.
        let closed_at = closed.closed_at(&key);
        let restored = restored.map(|row| PeriodRow { closed_at, ..row });
        reverted.periods += u64::from(restore_period(&mut draft, current, key, restored));
    }
    // A period is closed and opened as a whole, whatever rows it has by now.
    let mut opened_or_closed = BTreeMap::new();
    for (key, change) in closings {
        later.extend(change.later_closing.clone().map(|by| (describe_period(&key), by)));
        let closed_at = change.before.as_ref().and_then(|row| row.closed_at);
        opened_or_closed.insert((key.tenant_id, key.subscription_id, key.period_start), closed_at);
    }
    for PeriodCorrection { key, .. } in &draft.period_corrections {
        stored_periods.remove(key);
    }
    for (key, row) in stored_periods {
        let of = (key.tenant_id.clone(), key.subscription_id.clone(), key.period_start);
        let Some(closed_at) = opened_or_closed.get(&of) else { continue };
        let restored = PeriodRow { closed_at: *closed_at, ..row.clone() };
        reverted.periods += u64::from(restore_period(&mut draft, Some(row), key, Some(restored)));
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
        if entry.is_adjustment() {
            return Ok(());
        }
        match changes.get_mut(&entry.key) {
            Some(change) if *entry.run_id != *run_id => change.later = Some(entry.run_id.to_string()),
            None if *entry.run_id == *run_id => {
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
fn period_changes(store: &dyn AggregateStore, job: &str, run_id: &str) -> Result<Periods> {
    let mut changes = Periods::new();
    // Periods as wholes: they are closed and opened so.
    let mut closings: BTreeMap<(Text, Text, Timestamp), String> = BTreeMap::new();
    store.period_ledger(job, &mut |entry| {
        if entry.is_adjustment() || (entry.run_id != run_id && changes.is_empty()) {
            return Ok(());
        }
        let [before, after] = entry.rows()?;
        let Some(key) = before.as_ref().or(after.as_ref()).map(|row| row.key.clone()) else { return Ok(()) };
        let same = before.as_ref().zip(after.as_ref()).is_some_and(|(before, after)| before.says_the_same(after));
        if entry.run_id == run_id {
            match changes.get_mut(&key) {
                Some(change) => change.after = after,
                None => drop(changes.insert(key, PeriodChange { before, after, ..PeriodChange::NONE })),
            }
        } else if same {
            closings.insert((key.tenant_id, key.subscription_id, key.period_start), entry.run_id);
        } else if let Some(change) = changes.get_mut(&key) {
            change.later = Some(entry.run_id);
        }
        Ok(())
    })?;
    for (key, change) in &mut changes {
        change.later_closing = closings.get(&(key.tenant_id.clone(), key.subscription_id.clone(), key.period_start)).cloned();
    }
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
    const NONE: PeriodChange = PeriodChange { before: None, after: None, later: None, later_closing: None };

    /// Whether the run closed or opened the period, and nothing else.
    fn is_closing(&self) -> bool {
        self.before.as_ref().zip(self.after.as_ref()).is_some_and(|(before, after)| before.says_the_same(after))
    }

    /// The row without what the run did to it; and the run that changed it later, where that is
    /// not known. Then it adds up to its windows, if anything tells that it does. `sums` are
    /// those of its windows, now and once they are restored.
    fn restored(&self, current: Option<&PeriodRow>, sums: [Sums; 2]) -> Result<(Option<PeriodRow>, Option<String>)> {
        let added_up = current.map(|row| with_sums(row, sums)).transpose()?.flatten();
        let Some(later) = &self.later else {
            let is_changed = self.before.is_some() || self.after.is_some();
            return Ok((if is_changed { self.before.clone() } else { added_up.or_else(|| current.cloned()) }, None));
        };
        if let (Some(row), Some(current)) = (&added_up, current)
            && self.leaves(row, current)?
        {
            return Ok((added_up, None));
        }
        Ok((added_up.or_else(|| self.before.clone()), Some(later.clone())))
    }

    /// Whether a row is what is left of the current one without what the run added to it. Only
    /// where every unit costs the same does a bill not depend on what else is on it.
    fn leaves(&self, row: &PeriodRow, current: &PeriodRow) -> Result<bool, DecimalError> {
        let of = |row: &Option<PeriodRow>| row.as_ref().map_or((Decimal::ZERO, Decimal::ZERO), |row| (row.quantity, row.cost));
        let (before, after) = (of(&self.before), of(&self.after));
        let quantity = current.quantity.checked_sub(after.0)?.checked_add(before.0)?;
        let cost = current.cost.checked_sub(after.1)?.checked_add(before.1)?;
        let mut is_left = (row.quantity, row.cost) == (quantity, cost);
        for known in [self.before.as_ref(), self.after.as_ref(), Some(current)].into_iter().flatten() {
            let is_proportional = known.cost.checked_mul(quantity)? == cost.checked_mul(known.quantity)?;
            let is_same = (&known.customer_id, &known.currency) == (&row.customer_id, &row.currency);
            is_left &= is_proportional && is_same && has_no_adjustment(known);
        }
        Ok(is_left)
    }
}

fn has_no_adjustment(row: &PeriodRow) -> bool {
    row.minimum_adjustment.is_zero() && row.commitment_adjustment.is_zero()
}

/// A bill once its windows are restored, where it is what they add up to.
fn with_sums(row: &PeriodRow, [now, then]: [Sums; 2]) -> Result<Option<PeriodRow>, DecimalError> {
    // That one window is what its bill says tells nothing of several: the last of them may count alone.
    let tells = then.windows == 1 || now.windows > 1;
    if !has_no_adjustment(row) || then.windows == 0 || !tells || !now.are(row.quantity, row.cost)? {
        return Ok(None);
    }
    let (quantity, cost) = (then.quantity.total()?, then.cost.total()?);
    let minor_digits = Currency::from_code(&row.currency).map_or(0, |currency| currency.minor_digits);
    Ok(Some(PeriodRow { quantity, cost, amount: cost.round(minor_digits)?, ..row.clone() }))
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
    if restored == current {
        stored.extend(current.map(|row| (key.clone(), row)));
        return Ok(());
    }
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
