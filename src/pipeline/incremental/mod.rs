//! Incremental runs: a full run that skips what cannot have changed since the last one.
//!
//! ```text
//! new events -> marks -> events of what is marked -> all copies of their keys -> aggregate
//!                   \-> matches that earlier runs kept of it ------------------> aggregate
//!                   \-> stored windows beside it ------------------------------> price
//! ```
//!
//! The *baseline* is the last run without a range, of the whole job. New events mark the
//! windows that they touch, and so do the old copies of their keys; changed reference rows
//! mark the billing periods that depend on them. What is marked is computed again from raw
//! events. The other windows of a billing period are taken from the store where their rows
//! tell what they add to it ([`stored_windows`]); otherwise the whole period is marked.
//! Either way it is priced anew, for one window can move the tiers of all later ones.
//! Whatever cannot be proved makes a run full, from the start or in the midst of it
//! ([`Retreat`]). That nobody altered the store cannot be proved here: a full run and
//! `verify` see it.

mod ahead;
mod choice;
pub mod edges;
pub mod keep;
pub mod kept;
pub mod marks;
mod passes;
mod segment;
pub mod separable;
pub mod snapshot;
pub mod stored_windows;
pub mod values;

use std::sync::Arc;

use anyhow::{Result, bail};
use rustc_hash::{FxHashMap, FxHashSet};
use serde::Serialize;

use super::adjustments::Adjustments;
use super::closed::ClosedPeriods;
use super::keys::SplitKeys;
use super::lateness::Horizon;
use super::names::Names;
use super::past::Past;
use super::price::PricedWindow;
use super::range::Completeness;
use super::unused::{self, Billed};
use super::{Inputs, Request};
use crate::config::{Incremental, Source};
use crate::model::aggregate::{PeriodRow, StoredWindow, WindowRow};
use crate::model::basis::ReferenceDigests;
use crate::model::run::{RunBasis, RunMode, RunRecord};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::source::{Field, Moved, Part, Selection, Split, kafka};
use kept::Kept;
pub use marks::Marks;
pub use passes::{Again, Marked, Passes};
use snapshot::{STATE, Snapshot};
use stored_windows::StoodIn;

/// How much of a job a run looked at, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Coverage {
    pub mode: Mode,
    /// Why nothing could be skipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The run that this one builds on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipping: Option<Skipping>,
    /// Whether windows that had not settled were left out.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub leaves_windows: bool,
    /// Whether somebody asked for the range, or the job does.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub asked_for: bool,
    /// What bills without usage were made for, where that is not the range of all windows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub billed: Option<Span>,
}

/// What an incremental run found new, marked and read.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Skipping {
    pub new_files: u64,
    pub new_events: u64,
    /// Changed rows of the reference tables, in words.
    pub changed: Vec<String>,
    pub marked_customers: u64,
    pub marked_periods: u64,
    /// Windows of those periods whose usage is as it was stored.
    pub stored_windows: u64,
    /// Billing periods of a meter whose first windows were not looked at: what came after them
    /// changes neither their usage nor their cost.
    pub carried_periods: u64,
    /// Matches of events with meters that were not read again, but taken as an earlier run
    /// kept them.
    pub kept_matches: u64,
    /// Files that were opened for their events, and the rows in what was looked at.
    pub files: u64,
    pub rows: u64,
    pub all_files: u64,
    pub all_rows: u64,
}

impl Skipping {
    /// Counts what was not read, but known.
    pub fn add_known(&mut self, stood_in: &StoodIn, kept_matches: u64) {
        (self.stored_windows, self.carried_periods) = (stood_in.windows, stood_in.carried);
        self.kept_matches = kept_matches;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Everything was computed.
    Full,
    /// What had not changed since the baseline was skipped.
    Incremental,
    /// A range, or a part of the job.
    Part,
}

impl Coverage {
    fn full(why: impl Into<Option<String>>) -> Coverage {
        Coverage {
            mode: Mode::Full,
            why: why.into(),
            baseline: None,
            skipping: None,
            leaves_windows: false,
            asked_for: false,
            billed: None,
        }
    }

    /// Whether a later run can build on a run: it left nothing of its files for later.
    fn is_baseline(run: &RunRecord) -> bool {
        let left = run.counts.get("coverage").and_then(|coverage| coverage.get("leaves_windows"));
        run.is_of_everything() && left.is_none()
    }
}

/// What an incremental run builds on.
#[derive(Debug)]
pub struct Baseline<'p> {
    pub run: &'p RunRecord,
    pub snapshot: Snapshot,
    /// For each split, whether the baseline did not read it.
    pub is_new: Vec<bool>,
}

/// Why a run that skips ends before it is done, and everything is to be computed.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct Retreat {
    pub why: String,
    /// Whether it could go on, only not as fast.
    pub is_choice: bool,
}

impl Retreat {
    /// What a failure to read what the baseline read calls for.
    pub fn of(error: anyhow::Error) -> anyhow::Error {
        if Moved::is_in(&error) { Retreat { why: format!("{error:#}"), is_choice: false }.into() } else { error }
    }
}

/// What a run can build on, otherwise why it computes everything; and what there is to read.
///
/// # Errors
/// Where the store or the source cannot be read.
pub fn baseline<'p>(
    inputs: &Inputs<'_>,
    request: &Request,
    past: &'p Past,
    basis: &RunBasis,
    selection: &Selection,
) -> Result<(Result<Baseline<'p>, Coverage>, Vec<Split>)> {
    let found = match (request.completeness, inputs.job.incremental) {
        _ if !request.is_of_everything() => Err(Coverage { mode: Mode::Part, ..Coverage::full(None) }),
        (Completeness::Incremental, _) | (Completeness::Auto, Incremental::Always) => {
            find(inputs, request, past, basis)?.map_err(Coverage::full)
        }
        // Who did not ask for it need not hear why there is nothing to skip.
        (Completeness::Auto, Incremental::Auto) if is_large(past) => {
            find(inputs, request, past, basis)?.map_err(|_| Coverage::full(None))
        }
        _ => Err(Coverage::full(None)),
    };
    Ok(match found {
        Ok((baseline, splits)) => (Ok(baseline), splits),
        Err(coverage) => (Err(coverage), inputs.source.splits(selection)?),
    })
}

/// A run that skips does not look at rows that somebody altered: where it saves little, it
/// is better not to.
const LARGE_ROWS: u64 = 1_000_000;

fn is_large(past: &Past) -> bool {
    let last = past.runs.iter().rfind(|run| run.mode.computes());
    last.is_some_and(|run| run.input.files.iter().map(|file| file.rows).sum::<u64>() >= LARGE_ROWS)
}

fn find<'p>(
    inputs: &Inputs<'_>,
    request: &Request,
    past: &'p Past,
    basis: &RunBasis,
) -> Result<Result<(Baseline<'p>, Vec<Split>), String>> {
    let Inputs { job, store, source, .. } = *inputs;
    let Some(at) = past.runs.iter().rposition(Coverage::is_baseline) else {
        return Ok(Err("there is no run to build on yet".to_owned()));
    };
    let (Some(run), Some(store)) = (past.runs.get(at), store) else { return Ok(Err("there is no store yet".to_owned())) };
    if job.lateness.settle.is_some() {
        return Ok(Err("lateness.settle leaves windows of known files for later runs".to_owned()));
    }
    if request.allow_closed {
        return Ok(Err("closed periods are written over".to_owned()));
    }
    if inputs.reference.has_levels(None) {
        // A level that is carried on can lengthen the range for everybody.
        return Ok(Err("a meter keeps a level over time".to_owned()));
    }
    let later = past.runs.iter().skip(at);
    if let Some(reason) = later.filter_map(|later| obstacle(later, run, basis)).next() {
        return Ok(Err(reason));
    }
    // Two events may share a dead letter only where they can share an id.
    let is_plain = |key: &[Field]| key.len() == 2 && key.contains(&Field::TenantId) && key.contains(&Field::Id);
    if !is_plain(&job.deduplicate.key) && past.dead_letters.iter().any(|letter| letter.resolved_run_id.is_none()) {
        return Ok(Err("there are dead letters, and deduplicate.key is not tenant_id and id".to_owned()));
    }
    if run.input.events_until.is_some() && run.input.events_from.is_none() {
        return Ok(Err(format!("when the first event of run {} was is not known", run.run_id)));
    }
    let snapshot = match store.state(&job.name, STATE)? {
        Some((run_id, content)) if run_id == run.run_id => Snapshot::decode(&content).ok(),
        _ => None,
    };
    let Some(snapshot) = snapshot else {
        return Ok(Err(format!("what the reference tables were in run {} is not known", run.run_id)));
    };
    let splits = match source.splits_since(&run.input.files) {
        Err(error) if Moved::is_in(&error) => return Ok(Err(format!("{error:#}"))),
        splits => splits?,
    };
    if let Some(reason) = moved_input(&job.source, past, at, &splits) {
        return Ok(Err(reason));
    }
    // By their times, it may have read less of a topic. Where the source has no longer
    // everything, that is how runs go on.
    let is_topic = matches!(job.source, Source::Kafka { .. });
    if let Some(part) = past.runs.iter().skip(at + 1).find(|run| is_topic && run.mode.computes())
        && request.completeness == Completeness::Auto
    {
        bail!(Retreat {
            why: format!("run {} computed a part, from messages that it chose by their time", part.run_id),
            is_choice: true
        });
    }
    let known: FxHashSet<_> = run.input.files.iter().map(|file| file.name.as_str()).collect();
    let is_new = splits.iter().map(|split| !known.contains(split.label().as_str())).collect();
    Ok(Ok((Baseline { run, snapshot, is_new }, splits)))
}

/// Why nothing can be concluded from the baseline (itself `later`), or from a run after it.
fn obstacle(later: &RunRecord, baseline: &RunRecord, basis: &RunBasis) -> Option<String> {
    let id = &later.run_id;
    match later.mode {
        RunMode::Run | RunMode::Apply => {}
        RunMode::Close if later.counts.get("reopened").is_none() => return None,
        RunMode::Close => return Some(format!("run {id} opened billing periods again")),
        RunMode::Revert => return Some(format!("run {id} took another one back")),
    }
    if later.basis.trueup_version != basis.trueup_version {
        return Some(format!("run {id} was made by trueup {}", later.basis.trueup_version));
    }
    if later.basis.job_digest != basis.job_digest {
        return Some(format!("job settings changed since run {id}"));
    }
    // Rows of a part of the job may have been computed with tables that were neither
    // those of the baseline nor those of now.
    type Table = fn(&ReferenceDigests) -> &String;
    let tables: [(&str, Table); 4] = [
        ("customers", |tables| &tables.customers),
        ("subscriptions", |tables| &tables.subscriptions),
        ("meters", |tables| &tables.meters),
        ("prices", |tables| &tables.prices),
    ];
    let is_other = |of: &Table| {
        let (then, first, now) = (of(&later.basis.reference), of(&baseline.basis.reference), of(&basis.reference));
        then != first && then != now
    };
    let (name, _) = tables.iter().find(|(_, of)| is_other(of))?;
    Some(format!("the {name} table changed since run {id}, which computed a part"))
}

/// The first file that the baseline or a later run read, and that is not as it was.
fn moved_input(source: &Source, past: &Past, baseline: usize, splits: &[Split]) -> Option<String> {
    let labels: Vec<_> = splits.iter().map(Split::label).collect();
    let now: FxHashMap<&str, &Split> = labels.iter().map(String::as_str).zip(splits).collect();
    let mut computing: Vec<_> = past.runs.iter().skip(baseline).filter(|run| run.mode.computes()).collect();
    // What later runs read of a part may have been less than the baseline did (an earlier
    // snapshot of a topic), or rows that changed since.
    if !matches!(source, Source::Files { .. }) {
        let later = computing.split_off(computing.len().min(1));
        let is_as_far = |run: &&RunRecord| computing.iter().all(|baseline| reads_as_far(run, baseline, splits));
        if let Some(run) = later.iter().find(|run| !is_as_far(run)) {
            return Some(format!("run {} computed a part, perhaps from other events", run.run_id));
        }
    }
    computing.into_iter().flat_map(|run| run.input.files.iter().map(move |file| (run, file))).find_map(|(run, file)| {
        let what = match now.get(file.name.as_str()) {
            None => "is gone",
            Some(split) if split.fingerprint != file.fingerprint => "changed",
            Some(_) => return None,
        };
        Some(match source {
            Source::Files { .. } => format!("file {} {what} since run {}", file.name, run.run_id),
            // The name of a part is a condition that nobody wants to read.
            Source::Kafka { .. } | Source::ClickHouse { .. } => {
                format!("rows changed since run {} read them, or others came that were ingested before", run.run_id)
            }
        })
    })
}

/// Whether a run read a topic to where the baseline did, or further.
fn reads_as_far(run: &RunRecord, baseline: &RunRecord, splits: &[Split]) -> bool {
    splits.iter().all(|split| match split.part {
        Part::Offsets { partition, .. } => {
            let until = |run: &RunRecord| kafka::read_until(&run.input.files, &split.identity, partition);
            until(run) >= until(baseline)
        }
        Part::Whole | Part::RowGroup(_) | Part::Slice { .. } | Part::Rows { .. } => false,
    })
}

impl Baseline<'_> {
    /// What it and the runs before it kept.
    pub fn kept(&self, inputs: &Inputs<'_>) -> Option<Kept> {
        Kept::open(inputs.keys.folder.as_deref()?, &self.run.run_id, inputs.reference)
    }

    /// The splits that the baseline read, or those that are new.
    pub fn part<'s>(
        &'s self,
        splits: &'s [Split],
        keys: &'s [SplitKeys],
        new: bool,
    ) -> impl Iterator<Item = (&'s Split, &'s SplitKeys)> {
        let all = splits.iter().zip(keys).zip(&self.is_new);
        all.filter(move |(_, is_new)| **is_new == new).map(|(pair, _)| pair)
    }
}

/// Lets everything be computed where a bill outside of `range` is not as it should be: there is no
/// usage that could mark it. Of closed periods, the ledger has to tell what they should be.
///
/// # Errors
/// A [`Retreat`] then; where the store cannot be read, or a cost overflows.
pub fn check_bills(inputs: &Inputs<'_>, past: &Past, billed: &Billed, (range, horizon): (Span, Option<Timestamp>)) -> Result<()> {
    let Inputs { job, reference, store: Some(store), .. } = *inputs else { return Ok(()) };
    let stored = store.periods_outside(&job.name, range)?;
    let closed = ClosedPeriods::of(&stored);
    let closed = match horizon {
        Some(until) => closed.with_horizon(Horizon::new(until, &past.runs), reference, &stored),
        None => closed,
    };
    let mut due = Vec::new();
    unused::add_periods(&mut due, reference, &Names::new(reference), billed, |_, _, period| !period.overlaps(range))?;
    let is_open = |row: &PeriodRow| !closed.hold(&row.key);
    let (stored, invoiced): (Vec<_>, Vec<_>) = stored.into_iter().partition(is_open);
    let (due, of_closed): (Vec<_>, Vec<_>) = due.into_iter().partition(is_open);
    if stored == due && Adjustments::tell(store, &job.name, invoiced, &of_closed)? {
        return Ok(());
    }
    Err(Retreat { why: "bills changed of periods without usage".to_owned(), is_choice: false }.into())
}

/// What the record and the report say.
pub fn coverage(
    baseline: &Result<Baseline<'_>, Coverage>,
    skipping: Option<Skipping>,
    computed: &[PricedWindow],
    stored: &[StoredWindow],
) -> Coverage {
    let baseline = match baseline {
        Ok(baseline) => baseline,
        Err(coverage) => return coverage.clone(),
    };
    let rows = computed.iter().map(|window| &window.row).chain(stored.iter().map(|stored| &stored.row));
    let (mut customers, mut periods) = (FxHashSet::default(), FxHashSet::default());
    let mut last: Option<&WindowRow> = None;
    for row in rows {
        // Windows of a period follow each other.
        let of = |row: &WindowRow| (Arc::as_ptr(&row.key.period), row.customer_id.as_ptr());
        if last.replace(row).is_none_or(|last| of(last) != of(row)) {
            customers.insert((&row.key.period.tenant_id, &row.customer_id));
            periods.insert((&row.key.period.tenant_id, &row.key.period.subscription_id, row.key.period.period_start));
        }
    }
    let (marked_customers, marked_periods) = (customers.len() as u64, periods.len() as u64);
    Coverage {
        mode: Mode::Incremental,
        why: None,
        baseline: Some(baseline.run.run_id.clone()),
        skipping: skipping.map(|skipping| Skipping { marked_customers, marked_periods, ..skipping }),
        leaves_windows: false,
        asked_for: false,
        billed: None,
    }
}
