//! The main job. [`plan`] owns the order of the steps:
//!
//! ```text
//! read -> deduplicate -> enrich -> aggregate -> price -> reconcile -> publish -> audit
//! ```
//!
//! Everything between reading and publishing is a function of its arguments.

mod accumulator;
mod aggregate;
pub mod by_hand;
mod causes;
mod closed;
mod deduplicate;
pub mod draft;
pub mod enrich;
mod guard;
mod hopping;
pub mod invariants;
mod levels;
mod names;
mod past;
mod price;
pub mod price_steps;
mod range;
mod reconcile;
pub mod saved;
mod scan;
mod sessions;
mod state;
pub mod trace;
pub mod trace_events;
mod unused;

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};

use crate::clock::{Stopwatch, now};
use crate::config::Job;
use crate::model::aggregate::{DeadLetter, DeadLetterKey, PeriodKey, StoredWindow, WindowKey};
use crate::model::counts::{EventCounts, UsageCounts};
use crate::model::run::{InputFile, Origin, RunBasis, RunInput, RunMode, RunRecord};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::reference::{Reference, Subscription};
use crate::source::{EventSource, Selection, Split, Wanted};
use crate::store::AggregateStore;
use aggregate::{Aggregator, Context};
use causes::{CurrentDigests, Evidence};
use closed::ClosedPeriods;
use deduplicate::{KeyScan, RepeatedKeys};
use draft::Draft;
use enrich::{Enricher, Scope};
use names::Names;
use past::{Knowledge, Past, ledger_rows};
pub use range::Request;
pub use reconcile::Totals;
use reconcile::{PeriodChanges, Reconciliation};
use scan::Progress;
use sessions::SessionChanges;
use state::News;

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
    /// Rows of `dead_letters` once this is published.
    dead_letter_rows: u64,
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
    let asked = match request.range {
        None => None,
        Some(_) => {
            let range = range::resolve(request, job, reference, None, None)?;
            range.map(|range| sessions::widen(inputs, request, &past, range, &mut timeline)).transpose()?
        }
    };
    let levels = reference.has_levels(request.scope.meter.as_deref());
    let splits = source.splits(&selection(request, asked, reference))?;

    // read (keys) -> deduplicate
    let keys = read_keys(inputs, &splits, &mut timeline)?;
    let whole = match asked {
        Some(range) => Some(range),
        None => range::resolve(request, job, reference, keys.extent, past.extent)?,
    };
    // Rows without a time may be all there is: they are still accounted for.
    let mut range = whole.unwrap_or(EMPTY);
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
    let count_rows: Progress<'_> = &|rows| progress.rows(rows);
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
    let mut windows = std::mem::take(&mut seen.windows);
    let mut priced = timeline.step("price", None, || {
        if levels {
            let last = levels::carry_in(&mut windows, &seen.dimensions, reference, range, job.timezone);
            // Nobody asked for an end: what a level costs later in its period belongs to it.
            if let Some(last) = last.filter(|last| request.range.is_none() && *last > range.end) {
                range.end = last;
            }
        }
        let rows = windows.len() as u64;
        let mut priced = price::price(windows, &seen.dimensions, reference, &names, range, job.timezone)?;
        let wants = |subscription: &Subscription, price: &crate::model::price::Price| {
            request.scope.holds(&subscription.tenant_id, &subscription.customer_id, &price.meter_id)
        };
        unused::add_periods(&mut priced.periods, reference, &names, range, wants)?;
        Ok((priced, rows))
    })?;
    invariants::telescoping_cost(&priced)?;

    // reconcile
    let basis = basis(job, reference, &request.scope);
    let stored = past.stored(store, job, &request.scope, range, reach, &priced)?;
    let closed = if request.allow_closed { ClosedPeriods::default() } else { stored.closed };
    let mut changes = timeline.step("reconcile", None, || {
        let session_meters: FxHashSet<_> =
            reference.meters.iter().filter(|meter| sessions::is_session(meter)).map(|meter| meter.id.as_str()).collect();
        let is_session = |key: &PeriodKey| session_meters.contains(&*key.meter_id);
        let evidence = Evidence {
            runs: &past.runs,
            basis: &basis,
            withdrawn: &withdrawn,
            sessions: SessionChanges::find(&stored.windows, &priced.windows, &withdrawn, is_session),
            current: current_digests(reference),
        };
        let changes = reconcile::reconcile(stored.windows.clone(), &priced.windows, range, &closed, &evidence);
        Ok((changes, stored.windows.len() as u64))
    })?;
    if let Some(store) = store.filter(|_| changes.asks_the_ledger()) {
        let rows = ledger_rows(store, &job.name)?;
        changes.ask_the_ledger(|key| rows.contains(key));
    }
    if let Some(store) = store.filter(|_| !closed.is_empty()) {
        let wants = |key: &WindowKey, customer: &str| {
            let (period, start) = (&key.period, key.window_start);
            closed.hold(period) && range.contains(start) && request.scope.holds(&period.tenant_id, customer, &period.meter_id)
        };
        changes.adjust_closed(closed::adjustments(store, &job.name, wants)?);
    }
    changes.check_totals()?;
    invariants::ledger_replay(&stored.windows, &changes, &priced, range, &closed)?;
    invariants::nothing_outside_the_range(&stored.windows, &changes, range)?;
    let periods = reconcile::reconcile_periods(stored.periods, std::mem::take(&mut priced.periods), &closed);
    let known_letters: FxHashSet<_> = past.dead_letters.iter().map(|stored| &stored.letter.key).collect();
    let new_letters: FxHashSet<_> =
        seen.dead_letters.iter().map(|letter| &letter.key).filter(|key| !known_letters.contains(key)).collect();
    let dead_letter_rows = (known_letters.len() + new_letters.len()) as u64;
    let resolved = past.resolved(job, reference, &request.scope, range, &seen.dead_letters);

    let files = splits.iter().zip(&keys.rows);
    let files = files.map(|(split, rows)| InputFile { name: split.label(), fingerprint: split.fingerprint.clone(), rows: *rows });
    Ok(Plan {
        range: whole.map(|_| range),
        widened_from: request.range.filter(|asked| whole.is_some_and(|whole| *asked != whole)),
        reach: whole.map(|_| reach),
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
        dead_letter_rows,
    })
}

impl Plan {
    /// The ledger digest that the plan starts from.
    pub fn ledger_digest(&self) -> &str {
        self.previous.last().map_or("", |run| &run.ledger_digest)
    }

    /// Refuses changes beyond the job's guard.
    ///
    /// # Errors
    /// A guard fault (exit code 8).
    pub fn check_guard(&self, job: &Job) -> Result<()> {
        guard::check(&job.guard, &self.stored, &self.changes)
    }

    /// Takes out what the plan would write.
    pub fn take_draft(&mut self, mode: RunMode) -> Draft {
        Draft {
            mode,
            previous_run_id: self.previous.last().map(|run| run.run_id.clone()),
            range: self.range,
            started_at: self.started_at,
            counts: serde_json::json!({
                "events": self.events, "usage": self.usage, "rows": self.changes.rows, "dead_letter_rows": self.dead_letter_rows,
            }),
            input: self.input.clone(),
            basis: self.basis.clone(),
            upserts: std::mem::take(&mut self.changes.upserts),
            retractions: std::mem::take(&mut self.changes.retractions),
            corrections: std::mem::take(&mut self.changes.corrections),
            period_upserts: std::mem::take(&mut self.periods.upserts),
            period_deletions: std::mem::take(&mut self.periods.deletions),
            period_corrections: std::mem::take(&mut self.periods.corrections),
            dead_letters: std::mem::take(&mut self.dead_letters),
            resolved: std::mem::take(&mut self.resolved),
        }
    }

    /// Publishes the plan as a run.
    ///
    /// # Errors
    /// Where the store cannot be written; it is then as it was before.
    pub fn publish(mut self, job: &Job, store: &mut dyn AggregateStore, origin: &Origin) -> Result<Published> {
        let watch = Stopwatch::start();
        let publication = self.take_draft(RunMode::Run).into_publication(&job.name, &self.previous, origin);
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

/// What the first scan found.
struct Keys {
    repeated: RepeatedKeys,
    extent: Option<(Timestamp, Timestamp)>,
    rows: Vec<u64>,
}

/// What of the source a request needs; `range` is the one that it resolves to.
pub fn selection(request: &Request, range: Option<Span>, reference: &Reference) -> Selection {
    // A level is made of all events before.
    let levels = reference.has_levels(request.scope.meter.as_deref());
    let range = range.filter(|_| request.range.is_some() && !levels);
    let span = range.map(|range| range::reach(range, reference, &request.scope));
    Selection { span, tenant: request.scope.tenant.clone() }
}

/// read (keys) -> deduplicate
fn read_keys(inputs: &Inputs<'_>, splits: &[Split], timeline: &mut Timeline<'_>) -> Result<Keys> {
    let Inputs { job, source, threads, progress, .. } = *inputs;
    let announced = splits.iter().map(|split| split.announced_rows).sum();
    timeline.step("read keys", announced, || {
        let visit = |scan: &mut KeyScan, _: usize, batch: &crate::source::EventBatch| {
            batch.rows().for_each(|event| scan.visit(&job.deduplicate.key, &event));
            Ok(())
        };
        let wanted = Wanted::Keys(&job.deduplicate.key);
        let (scans, rows) = scan::scan(source, splits, wanted, threads, &|rows| progress.rows(rows), KeyScan::default, visit)?;
        let (repeated, extent) = KeyScan::finish(scans);
        let total = rows.iter().sum();
        Ok((Keys { repeated, extent, rows }, total))
    })
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
    seen.close_sessions();
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

/// What a computation rests on, as it is now.
pub fn basis(job: &Job, reference: &Reference, scope: &Scope) -> RunBasis {
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
