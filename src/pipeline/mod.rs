//! The main job. [`plan`] owns the order of the steps:
//!
//! ```text
//! read -> deduplicate -> enrich -> aggregate -> price -> reconcile -> publish -> audit
//! ```
//!
//! Everything between reading and publishing is a function of its arguments.

mod accumulator;
mod aggregate;
mod deduplicate;
pub mod enrich;
mod guard;
pub mod invariants;
mod price;
mod range;
mod reconcile;
mod scan;

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};

use crate::clock::{Stopwatch, now};
use crate::config::Job;
use crate::model::aggregate::{DeadLetter, DeadLetterKey, StoredWindow, WindowKey};
use crate::model::counts::{EventCounts, UsageCounts};
use crate::model::run::{InputFile, RunBasis, RunInput, RunRecord, ledger_digest};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::reference::Reference;
use crate::source::{EventSource, Part, Selection, Split, Wanted};
use crate::store::{AggregateStore, Publication, StoredDeadLetter, next_run_id, next_version};
use aggregate::{Aggregator, Context, News, OpenDeadLetters};
use deduplicate::{KeyScan, RepeatedKeys};
use enrich::{Enricher, Scope};
use price::{Names, Priced};
pub use range::Request;
pub use reconcile::Totals;
use reconcile::{CurrentDigests, Evidence, PeriodChanges, Reconciliation};
use scan::Progress;

/// What a run would do: everything is computed, nothing is written.
#[derive(Debug)]
pub struct Plan {
    /// The range, widened to whole windows; `None` without any event or row.
    pub range: Option<Span>,
    /// The range as it was asked for, where widening changed it.
    pub widened_from: Option<Span>,
    /// The span of the billing periods that the range touches.
    pub reach: Option<Span>,
    pub events: EventCounts,
    pub usage: UsageCounts,
    pub changes: Reconciliation,
    pub periods: PeriodChanges,
    pub dead_letters: Vec<DeadLetter>,
    pub resolved: Vec<DeadLetterKey>,
    pub input: RunInput,
    pub basis: RunBasis,
    pub steps: Vec<Step>,
    pub warnings: Vec<String>,
    started_at: Timestamp,
    stored: Vec<StoredWindow>,
    previous: Vec<RunRecord>,
}

/// How long a step took, and how many rows it handled.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Step {
    pub name: &'static str,
    pub seconds: f64,
    pub rows: u64,
}

/// Everything that a computation reads from.
pub struct Inputs<'i> {
    pub job: &'i Job,
    pub reference: &'i Reference,
    pub source: &'i dyn EventSource,
    /// `None` where there is no store yet.
    pub store: Option<&'i dyn AggregateStore>,
    pub threads: usize,
    pub progress: &'i dyn Observer,
}

/// Who watches a computation.
pub trait Observer: Sync {
    /// A step begins; `rows` where the number of rows ahead is known.
    fn step(&self, name: &'static str, rows: Option<u64>);
    /// Rows were read.
    fn rows(&self, rows: u64);
}

/// Measures steps and tells the observer of each.
struct Timeline<'i> {
    steps: Vec<Step>,
    observer: &'i dyn Observer,
}

impl Timeline<'_> {
    fn step<T>(&mut self, name: &'static str, ahead: Option<u64>, work: impl FnOnce() -> Result<(T, u64)>) -> Result<T> {
        self.observer.step(name, ahead);
        let _span = tracing::info_span!("step", name).entered();
        let watch = Stopwatch::start();
        let (result, rows) = work()?;
        let seconds = watch.seconds();
        tracing::info!(rows, seconds, "done");
        self.steps.push(Step { name, seconds, rows });
        Ok(result)
    }
}

/// A range of no time at all.
const EMPTY: Span = Span { start: Timestamp::from_nanos(0), end: Timestamp::from_nanos(0) };

/// Computes what a run would change.
///
/// # Errors
/// Where the request is empty, the source is not delivered as a whole, a number
/// overflows, or a promise would be broken.
pub fn plan(inputs: &Inputs<'_>, request: &Request) -> Result<Plan> {
    let started_at = now();
    let Inputs { job, reference, source, store, threads, progress } = *inputs;
    let mut timeline = Timeline { steps: Vec::new(), observer: progress };
    let past = Past::load(store, job)?;
    // A range that was asked for is known before anything is read.
    let asked = request.range.map(|_| range::resolve(request, job, reference, None, None)).transpose()?;
    let span = asked.as_ref().and_then(|asked| asked.range).map(|range| range::reach(range, reference, &request.scope));
    let splits = source.splits(&Selection { span, tenant: request.scope.tenant.clone() })?;
    let count_rows: Progress<'_> = &|rows| progress.rows(rows);

    // read (keys) -> deduplicate
    let announced = splits.iter().map(|split| split.announced_rows).sum();
    let keys = timeline.step("read keys", announced, || {
        let visit = |scan: &mut KeyScan, _: usize, batch: &crate::source::EventBatch| {
            batch.rows().for_each(|event| scan.visit(&job.deduplicate.key, &event));
            Ok(())
        };
        let (scans, rows) =
            scan::scan(source, &splits, Wanted::Keys(&job.deduplicate.key), threads, count_rows, KeyScan::default, visit)?;
        let (repeated, extent) = KeyScan::finish(scans);
        let total = rows.iter().sum();
        Ok((Keys { repeated, extent, rows }, total))
    })?;
    let resolved_range = range::resolve(request, job, reference, keys.extent, past.extent)?;
    // Rows without a time may be all there is: they are still accounted for.
    let range = resolved_range.range.unwrap_or(EMPTY);
    let reach = range::reach(range, reference, &request.scope);

    // read -> enrich -> aggregate
    let context = Context {
        enricher: Enricher::new(reference, request.scope.clone()),
        rules: &job.deduplicate,
        timezone: job.timezone,
        range,
        reach,
        repeated: keys.repeated,
        open_dead_letters: past.open_dead_letters(reference),
    };
    let total = keys.rows.iter().sum();
    let coverage = past.coverage(reach);
    let mut seen = timeline.step("aggregate", Some(total), || {
        let visit = |aggregator: &mut Aggregator<'_, '_>, index: usize, batch: &crate::source::EventBatch| {
            let knowledge = splits.get(index).map_or_else(Knowledge::default, |split| Knowledge::of(split, &coverage));
            aggregator.visit(batch, |time, ingested_at| knowledge.holds(time, ingested_at));
            Ok(())
        };
        let new_worker = || Aggregator::new(&context);
        let (workers, rows) = scan::scan(source, &splits, Wanted::Whole, threads, count_rows, new_worker, visit)?;
        check_stable(&splits, &keys.rows, &rows)?;
        Ok((merge(&context, workers), total))
    })?;
    invariants::conservation(&seen.events, &seen.usage)?;

    // price
    let names = Names::new(reference);
    let withdrawn: FxHashMap<WindowKey, News> =
        seen.withdrawn.iter().map(|(key, news)| (names.window_key(key, &seen.dimensions), *news)).collect();
    let windows = std::mem::take(&mut seen.windows);
    let mut priced = timeline.step("price", None, || {
        let rows = windows.len() as u64;
        let mut priced = price::price(windows, &seen.dimensions, reference, &names)?;
        let wants = |subscription: &crate::reference::Subscription, price: &crate::model::price::Price| {
            request.scope.holds(&subscription.tenant_id, &subscription.customer_id, &price.meter_id)
        };
        price::add_periods_without_usage(&mut priced.periods, reference, &names, range, wants)?;
        Ok((priced, rows))
    })?;
    invariants::telescoping_cost(&priced)?;

    // reconcile
    let basis = basis(job, reference, &request.scope);
    let stored = past.stored(store, job, &request.scope, range, reach, &priced)?;
    let mut changes = timeline.step("reconcile", None, || {
        let evidence = Evidence { runs: &past.runs, basis: &basis, withdrawn: &withdrawn, current: current_digests(reference) };
        let changes = reconcile::reconcile(stored.windows.clone(), &priced.windows, range, &evidence);
        Ok((changes, stored.windows.len() as u64))
    })?;
    if let Some(store) = store.filter(|_| changes.asks_the_ledger()) {
        let rows = ledger_rows(store, &job.name)?;
        changes.ask_the_ledger(|key| rows.contains(key));
    }
    changes.check_totals()?;
    invariants::ledger_replay(&stored.windows, &changes, &priced, range)?;
    invariants::nothing_outside_the_range(&stored.windows, &changes, range)?;
    let periods = reconcile::reconcile_periods(stored.periods, std::mem::take(&mut priced.periods));
    let resolved = past.resolved(job, reference, &request.scope, range, &seen.dead_letters);

    let files = splits.iter().zip(&keys.rows);
    let files = files.map(|(split, rows)| InputFile { name: split.label(), fingerprint: split.fingerprint.clone(), rows: *rows });
    Ok(Plan {
        range: resolved_range.range,
        widened_from: resolved_range.widened_from,
        reach: resolved_range.range.map(|_| reach),
        events: seen.events,
        usage: seen.usage,
        changes,
        periods,
        dead_letters: std::mem::take(&mut seen.dead_letters),
        resolved,
        input: RunInput {
            files: files.collect(),
            // What was new once is never new again, even if a source shrinks.
            ingested_until: seen.ingested_until.max(past.ingested_until()),
            events_until: keys.extent.map(|(_, last)| last),
        },
        basis,
        steps: timeline.steps,
        warnings: reference.warnings.clone(),
        started_at,
        stored: stored.windows,
        previous: past.runs,
    })
}

impl Plan {
    /// Refuses changes beyond the job's guard.
    ///
    /// # Errors
    /// A guard fault (exit code 8).
    pub fn check_guard(&self, job: &Job) -> Result<()> {
        guard::check(&job.guard, &self.stored, &self.changes)
    }

    /// Publishes the plan as a run.
    ///
    /// # Errors
    /// Where the store cannot be written; it is then as it was before.
    pub fn publish(mut self, job: &Job, store: &mut dyn AggregateStore) -> Result<Published> {
        let watch = Stopwatch::start();
        let finished_at = now();
        let run_id = next_run_id(&self.previous, finished_at);
        let previous = self.previous.last().map_or("", |run| run.ledger_digest.as_str());
        let run = RunRecord {
            ledger_digest: ledger_digest(previous, &run_id, &self.changes.corrections),
            run_id,
            job: job.name.clone(),
            mode: "run".to_owned(),
            status: "succeeded".to_owned(),
            range: self.range,
            started_at: self.started_at,
            finished_at,
            version: next_version(&self.previous, finished_at),
            counts: serde_json::json!({"events": self.events, "usage": self.usage, "rows": self.changes.rows}),
            input: self.input.clone(),
            basis: self.basis.clone(),
        };
        let publication = Publication {
            previous_run_id: self.previous.last().map(|run| run.run_id.clone()),
            run,
            upserts: std::mem::take(&mut self.changes.upserts),
            retractions: std::mem::take(&mut self.changes.retractions),
            corrections: std::mem::take(&mut self.changes.corrections),
            period_upserts: std::mem::take(&mut self.periods.upserts),
            period_deletions: std::mem::take(&mut self.periods.deletions),
            dead_letters: std::mem::take(&mut self.dead_letters),
            resolved: std::mem::take(&mut self.resolved),
        };
        store.publish(&publication)?;
        self.changes.corrections = publication.corrections;
        self.periods.upserts = publication.period_upserts;
        self.periods.deletions = publication.period_deletions;
        self.dead_letters = publication.dead_letters;
        self.resolved = publication.resolved;
        self.steps.push(Step { name: "publish", seconds: watch.seconds(), rows: self.changes.rows.changed() });
        Ok(Published { plan: self, run: publication.run })
    }
}

/// A plan that was carried out.
#[derive(Debug)]
pub struct Published {
    pub plan: Plan,
    pub run: RunRecord,
}

/// The keys of the rows that the ledger leaves in the store.
fn ledger_rows(store: &dyn AggregateStore, job: &str) -> Result<FxHashSet<WindowKey>> {
    let mut rows = FxHashSet::default();
    store.ledger(job, &mut |entry| {
        if entry.after.is_some() {
            rows.insert(entry.key)
        } else {
            rows.remove(&entry.key)
        };
        Ok(())
    })?;
    Ok(rows)
}

/// What the first scan found.
struct Keys {
    repeated: RepeatedKeys,
    extent: Option<(Timestamp, Timestamp)>,
    rows: Vec<u64>,
}

/// Merges the threads' work and decides about keys of several copies.
fn merge<'c, 'r>(context: &'c Context<'r>, workers: Vec<Aggregator<'c, 'r>>) -> Aggregator<'c, 'r> {
    let mut workers = workers.into_iter();
    let mut seen = workers.next().unwrap_or_else(|| Aggregator::new(context));
    workers.for_each(|worker| seen.merge(worker));
    let held = std::mem::take(&mut seen.held);
    seen.events.duplicates += held.duplicates;
    seen.events.out_of_range += held.out_of_range;
    held.into_copies().for_each(|copies| seen.resolve(&copies));
    seen.dead_letters.sort_by(|a, b| (&a.key, a.event_time, &a.detail).cmp(&(&b.key, b.event_time, &b.detail)));
    seen
}

/// Promise 8: both scans saw the same rows.
fn check_stable(splits: &[Split], first: &[u64], second: &[u64]) -> Result<()> {
    for ((split, first), second) in splits.iter().zip(first).zip(second) {
        if first != second {
            anyhow::bail!("{} had {first} rows and then {second}: it changed while it was read, run again", split.name);
        }
    }
    Ok(())
}

fn basis(job: &Job, reference: &Reference, scope: &Scope) -> RunBasis {
    RunBasis {
        trueup_version: env!("CARGO_PKG_VERSION").to_owned(),
        job_digest: job.digest.clone(),
        reference: reference.digests.clone(),
        scope: scope.clone(),
    }
}

fn current_digests(reference: &Reference) -> CurrentDigests {
    let text = |text: &str| std::sync::Arc::from(text);
    CurrentDigests {
        meters: reference.meters.iter().map(|meter| (text(&meter.id), text(&meter.digest))).collect(),
        prices: reference.prices.iter().map(|price| (text(&price.id), text(&price.digest))).collect(),
        subscriptions: reference
            .subscriptions
            .iter()
            .map(|s| ((text(&s.tenant_id), text(&s.id)), (text(&s.digest), text(&s.customer_digest))))
            .collect(),
    }
}

/// What earlier runs left in the store.
struct Past {
    runs: Vec<RunRecord>,
    extent: Option<Span>,
    dead_letters: Vec<StoredDeadLetter>,
}

/// Stored rows that a plan is compared with.
struct Stored {
    windows: Vec<StoredWindow>,
    periods: Vec<crate::model::aggregate::PeriodRow>,
}

/// What a run knew when it computed its range.
struct Coverage<'p> {
    range: Span,
    /// Fingerprints of the files that it read.
    files: FxHashMap<&'p str, &'p str>,
    ingested_until: Option<Timestamp>,
}

impl Coverage<'_> {
    fn knowledge(&self, split: &Split) -> Known {
        if !matches!(split.part, Part::Whole | Part::RowGroup(_)) {
            // Databases and topics grow in place: only ingestion times tell what is new.
            return self.ingested_until.map_or(Known::None, Known::Until);
        }
        match (self.files.get(split.label().as_str()), self.ingested_until) {
            (Some(fingerprint), _) if *fingerprint == split.fingerprint => Known::All,
            (Some(_), Some(cut_off)) => Known::Until(cut_off),
            _ => Known::None,
        }
    }
}

/// Which events of a split earlier runs counted, the last run first.
#[derive(Default)]
struct Knowledge(Vec<(Span, Known)>);

impl Knowledge {
    fn of(split: &Split, coverage: &[Coverage<'_>]) -> Self {
        Knowledge(coverage.iter().map(|run| (run.range, run.knowledge(split))).collect())
    }

    /// Whether the last run that covered `time` read an event ingested at `ingested_at`.
    fn holds(&self, time: Option<Timestamp>, ingested_at: Timestamp) -> bool {
        let covering = self.0.iter().find(|(range, _)| time.is_none_or(|t| range.contains(t)));
        covering.is_some_and(|(_, known)| known.holds(ingested_at))
    }
}

/// Which events of a split a run read.
enum Known {
    All,
    None,
    /// Those ingested no later.
    Until(Timestamp),
}

impl Known {
    fn holds(&self, ingested_at: Timestamp) -> bool {
        match self {
            Known::All => true,
            Known::None => false,
            Known::Until(cut_off) => ingested_at <= *cut_off,
        }
    }
}

impl Past {
    fn load(store: Option<&dyn AggregateStore>, job: &Job) -> Result<Past> {
        let Some(store) = store else {
            return Ok(Past { runs: Vec::new(), extent: None, dead_letters: Vec::new() });
        };
        Ok(Past { runs: store.runs(&job.name)?, extent: store.extent(&job.name)?, dead_letters: store.dead_letters(&job.name)? })
    }

    fn ingested_until(&self) -> Option<Timestamp> {
        self.runs.last().and_then(|run| run.input.ingested_until)
    }

    /// The runs that computed part of `reach`, the last one first. A run reads every
    /// file, but knows only what it computed: not what lies outside of its range, nor
    /// (in a run of a part of the job) what belongs to others.
    fn coverage(&self, reach: Span) -> Vec<Coverage<'_>> {
        let mut coverage: Vec<Coverage<'_>> = Vec::new();
        for run in self.runs.iter().rev().filter(|run| run.basis.scope.is_whole()) {
            let Some(range) = run.range.filter(|range| range.overlaps(reach)) else { continue };
            if coverage.iter().any(|later| later.range.covers(range)) {
                continue;
            }
            let files = run.input.files.iter().map(|file| (file.name.as_str(), file.fingerprint.as_str())).collect();
            coverage.push(Coverage { range, files, ingested_until: run.input.ingested_until });
        }
        coverage
    }

    fn open_dead_letters(&self, reference: &Reference) -> OpenDeadLetters {
        let mut open = OpenDeadLetters::default();
        for stored in self.dead_letters.iter().filter(|stored| stored.resolved_run_id.is_none()) {
            let key = &stored.letter.key;
            let meter = reference.meters.iter().position(|meter| meter.id == key.meter_id);
            open.add(&key.tenant_id, &key.event_id, meter);
        }
        open
    }

    /// Open dead letters that the run covers and did not find again.
    fn resolved(&self, job: &Job, reference: &Reference, scope: &Scope, range: Span, found: &[DeadLetter]) -> Vec<DeadLetterKey> {
        let again: FxHashSet<_> = found.iter().map(|letter| &letter.key).collect();
        let is_covered = |letter: &DeadLetter| {
            // A part of a job covers only what it can tell apart.
            let in_scope = scope.customer.is_none()
                && scope.tenant.as_ref().is_none_or(|tenant| *tenant == letter.key.tenant_id)
                && scope.meter.as_ref().is_none_or(|meter| *meter == letter.key.meter_id);
            let sizes = || reference.meters.iter().map(|meter| meter.window);
            in_scope && letter.event_time.is_none_or(|t| sizes().all(|size| range.covers(size.window(t, job.timezone))))
        };
        let open = self.dead_letters.iter().filter(|stored| stored.resolved_run_id.is_none()).map(|stored| &stored.letter);
        open.filter(|letter| is_covered(letter) && !again.contains(&letter.key)).map(|letter| letter.key.clone()).collect()
    }

    /// Rows of the billing periods that the range touches.
    fn stored(
        &self,
        store: Option<&dyn AggregateStore>,
        job: &Job,
        scope: &Scope,
        range: Span,
        reach: Span,
        priced: &Priced,
    ) -> Result<Stored> {
        let Some(store) = store else { return Ok(Stored { windows: Vec::new(), periods: Vec::new() }) };
        let mut windows = store.windows(&job.name, reach)?;
        let mut periods = store.periods(&job.name, range)?;
        // A row that is computed now is compared whoever it belonged to.
        let window_keys: FxHashSet<_> = priced.windows.iter().map(|window| &window.row.key).collect();
        windows.retain(|StoredWindow { row, .. }| {
            let in_scope = scope.holds(&row.key.period.tenant_id, &row.customer_id, &row.key.period.meter_id);
            row.period().overlaps(range) && (in_scope || window_keys.contains(&row.key))
        });
        let period_keys: FxHashSet<_> = priced.periods.iter().map(|period| &period.key).collect();
        periods.retain(|row| {
            let in_scope = scope.holds(&row.key.tenant_id, &row.customer_id, &row.key.meter_id);
            in_scope || period_keys.contains(&row.key)
        });
        Ok(Stored { windows, periods })
    }
}
