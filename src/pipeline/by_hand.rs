//! Changes that nobody computes: closing billing periods, taking a run back.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::draft::Draft;
use crate::audit::describe;
use crate::clock::now;
use crate::fault::{FaultKind, configuration, fault};
use crate::model::aggregate::{
    Cause, Causes, Correction, CorrectionKind, PeriodCorrection, PeriodKey, PeriodRow, Recorded, StoredWindow, Values, WindowKey,
    WindowRow,
};
use crate::model::counts::RowCounts;
use crate::model::run::{RunMode, RunRecord};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::store::AggregateStore;

/// Which billing periods somebody means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeriodChoice {
    /// Those that begin in the span.
    BeginIn(Span),
    /// Those that hold the instant.
    Hold(Timestamp),
}

impl PeriodChoice {
    fn span(self) -> Span {
        match self {
            PeriodChoice::BeginIn(span) => span,
            PeriodChoice::Hold(t) => Span { start: t, end: Timestamp::from_nanos(t.nanos().saturating_add(1)) },
        }
    }

    fn means(self, row: &PeriodRow) -> bool {
        let period = Span { start: row.key.period_start, end: row.period_end };
        match self {
            PeriodChoice::BeginIn(span) => span.contains(period.start),
            PeriodChoice::Hold(t) => period.contains(t),
        }
    }
}

/// Closes the chosen periods, or opens them again. `None` where they are so already.
///
/// # Errors
/// Where there is no such period.
pub fn close(
    store: &dyn AggregateStore,
    job: &str,
    runs: &[RunRecord],
    choice: PeriodChoice,
    reopen: bool,
    wants: impl Fn(&PeriodRow) -> bool,
) -> Result<Option<(Draft, Vec<PeriodRow>)>> {
    let rows = store.periods(job, choice.span())?;
    let chosen: Vec<_> = rows.into_iter().filter(|row| choice.means(row) && wants(row)).collect();
    if chosen.is_empty() {
        return Err(configuration(
            "no stored billing period is meant: check --period, --tenant, --customer and --subscription, or run the job first",
        ));
    }
    let closed_at = (!reopen).then(now);
    let changed: Vec<_> = chosen.into_iter().filter(|row| row.closed_at.is_some() == reopen).collect();
    if changed.is_empty() {
        return Ok(None);
    }
    let count = changed.len();
    let counts = serde_json::json!({ if reopen { "reopened" } else { "closed" }: count });
    let mut draft = Draft::by_hand(RunMode::Close, runs.last(), counts);
    for row in changed {
        let after = PeriodRow { closed_at, ..row.clone() };
        draft.period_corrections.push(PeriodCorrection { key: row.key.clone(), before: Some(row), after: Some(after.clone()) });
        draft.period_upserts.push(after);
    }
    let rows = draft.period_upserts.clone();
    Ok(Some((draft, rows)))
}

/// What a revert does beside the draft.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reverted {
    pub rows: RowCounts,
    pub periods: u64,
}

/// What one run did to one row, from before its first to after its last correction.
struct Change {
    before: Option<(Values, String)>,
    after: Option<Values>,
    /// A run that changed the row later.
    later: Option<String>,
}

/// Takes back what a run changed. Rows that later runs changed are refused, unless
/// `force`; so are closed periods, unless `allow_closed`.
///
/// # Errors
/// Where there is no such run, or its changes cannot be taken back.
pub fn revert(
    store: &dyn AggregateStore,
    job: &str,
    runs: &[RunRecord],
    run_id: &str,
    (force, allow_closed): (bool, bool),
) -> Result<(Draft, Reverted)> {
    let run = runs.iter().find(|run| run.run_id == run_id);
    let run = run.ok_or_else(|| configuration(format!("--run {run_id}: job {job} has no such run: `trueup runs` lists them")))?;
    let windows = window_changes(store, job, run_id)?;
    let periods = period_changes(store, job, run_id)?;
    if windows.is_empty() && periods.is_empty() {
        return Err(configuration(format!("--run {run_id}: that run changed nothing")));
    }
    let later = windows.iter().filter_map(|(key, change)| Some((describe(key), change.later.as_ref()?)));
    let later: Vec<_> = later.collect();
    if let Some((row, by)) = later.first().filter(|_| !force) {
        return Err(fault(
            FaultKind::Guard,
            format!(
                "run {run_id} cannot be taken back alone: {} of its {} rows were changed by later runs (first {row}, by run {by}). \
                 Take those back first, or say --force",
                later.len(),
                windows.len()
            ),
        ));
    }
    let counts = serde_json::json!({"reverted": run_id});
    let mut draft = Draft::by_hand(RunMode::Revert, runs.last(), counts);
    let mut reverted = Reverted::default();
    let extent = store.extent(job)?;
    let stored = extent.map_or(Ok(Vec::new()), |extent| store.windows(job, extent))?;
    let mut stored: BTreeMap<WindowKey, StoredWindow> = stored.into_iter().map(|row| (row.row.key.clone(), row)).collect();
    for (key, change) in windows {
        let current = stored.remove(&key).map(|stored| stored.row);
        restore_window(&mut draft, &mut reverted.rows, current, &change).with_context(|| describe(&key))?;
    }
    let everything = Span { start: Timestamp::MIN, end: Timestamp::MAX };
    let stored = store.periods(job, everything)?;
    if let Some(closed) =
        stored.iter().filter(|_| !allow_closed).find(|row| row.closed_at.is_some() && periods.contains_key(&row.key))
    {
        return Err(fault(
            FaultKind::Guard,
            format!("{} is closed: say --allow-closed to change what was invoiced", crate::audit::describe_period(&closed.key)),
        ));
    }
    let mut stored: BTreeMap<PeriodKey, PeriodRow> = stored.into_iter().map(|row| (row.key.clone(), row)).collect();
    for (key, before) in periods {
        reverted.periods += 1;
        restore_period(&mut draft, stored.remove(&key), key, before);
    }
    if let Some(counts) = draft.counts.as_object_mut() {
        counts.insert("rows".to_owned(), serde_json::to_value(reverted.rows)?);
    }
    draft.started_at = now();
    tracing::info!(run = run.run_id, rows = reverted.rows.changed(), "taking back");
    Ok((draft, reverted))
}

fn window_changes(store: &dyn AggregateStore, job: &str, run_id: &str) -> Result<BTreeMap<WindowKey, Change>> {
    let mut changes: BTreeMap<WindowKey, Change> = BTreeMap::new();
    store.ledger(job, &mut |entry| {
        if entry.kind == CorrectionKind::Adjust.name() {
            return Ok(());
        }
        match changes.get_mut(&entry.key) {
            Some(change) if entry.run_id == run_id => change.after = entry.after,
            Some(change) => change.later = Some(entry.run_id),
            None if entry.run_id == run_id => {
                let before = entry.before.map(|values| (values, entry.replaced));
                changes.insert(entry.key, Change { before, after: entry.after, later: None });
            }
            None => {}
        }
        Ok(())
    })?;
    Ok(changes)
}

/// The rows of `usage_periods` as they were before a run, for those that it changed.
fn period_changes(store: &dyn AggregateStore, job: &str, run_id: &str) -> Result<BTreeMap<PeriodKey, Option<PeriodRow>>> {
    let mut changes = BTreeMap::new();
    store.period_ledger(job, &mut |entry| {
        if entry.run_id == run_id {
            let row = |json: &str| -> Result<Option<PeriodRow>> {
                if json.is_empty() { Ok(None) } else { Ok(Some(serde_json::from_str(json)?)) }
            };
            let (before, after) = (row(&entry.before)?, row(&entry.after)?);
            if let Some(key) = before.as_ref().or(after.as_ref()).map(|row| row.key.clone()) {
                changes.entry(key).or_insert(before);
            }
        }
        Ok(())
    })?;
    Ok(changes)
}

fn restore_window(draft: &mut Draft, rows: &mut RowCounts, current: Option<Arc<WindowRow>>, change: &Change) -> Result<()> {
    let restored = match &change.before {
        None => None,
        Some((_, replaced)) => Some(
            serde_json::from_str::<WindowRow>(replaced)
                .map(Arc::new)
                .context("the ledger does not hold the row as it was before")?,
        ),
    };
    let Some(row) = restored.as_ref().or(current.as_ref()) else { return Ok(()) };
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

fn restore_period(draft: &mut Draft, current: Option<PeriodRow>, key: PeriodKey, before: Option<PeriodRow>) {
    match &before {
        Some(row) => draft.period_upserts.push(row.clone()),
        None if current.is_some() => draft.period_deletions.push(key.clone()),
        None => return,
    }
    draft.period_corrections.push(PeriodCorrection { key, before: current, after: before });
}
