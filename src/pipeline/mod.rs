//! The main job. [`plan`] owns the order of the steps:
//!
//! ```text
//! read -> deduplicate -> enrich -> aggregate -> price -> reconcile -> publish -> audit
//! ```
//!
//! Everything between reading and publishing is a function of its arguments.

mod accumulator;
mod adjustments;
mod aggregate;
pub mod by_hand;
pub mod causes;
pub mod closed;
mod compare;
mod context;
pub mod deduplicate;
pub mod draft;
pub mod enrich;
mod event_forms;
mod guard;
mod held;
mod hopping;
pub mod incremental;
pub mod invariants;
mod key_cache;
pub mod keys;
mod lateness;
mod letters;
mod levels;
mod matcher;
mod matches;
mod names;
mod past;
mod places;
pub mod price;
pub mod price_steps;
mod pricing;
mod purpose;
mod range;
mod read;
pub mod reconcile;
pub mod revert;
pub mod saved;
mod scan;
pub mod session_changes;
mod sessions;
mod spill;
pub mod state;
mod text_memo;
mod times;
pub mod trace;
pub mod trace_events;
mod unused;
mod windows;

use anyhow::{Context as _, Result};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::clock::{Stopwatch, now};
use crate::config::Job;
use crate::model::aggregate::{DeadLetter, DeadLetterKey, WindowKey};
use crate::model::basis::Scope;
use crate::model::counts::{EventCounts, UsageCounts};
use crate::model::run::{Origin, RunBasis, RunInput, RunMode, RunRecord};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::reference::Reference;
use crate::source::{EventSource, Moved, Selection};
use crate::store::AggregateStore;
use compare::{Compared, Comparison};
use context::Context;
use draft::Draft;
use enrich::Enricher;
use incremental::keep::{self, Keep, Prepared};
use incremental::snapshot::{STATE, Snapshot};
use incremental::values::ListKeeper;
use incremental::{Coverage, Mode, Passes, Retreat, edges};
pub use key_cache::KeyCache;
pub use lateness::{Horizon, Lateness};
use matches::Partitioning;
use names::Names;
use past::Past;
use pricing::Pricing;
pub use range::{Completeness, Request};
use read::{enrich_all, known_keys, read_keys};
pub use reconcile::Totals;
use reconcile::{PeriodChanges, Reconciliation};
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
    pub coverage: Coverage,
    /// Rows that name definitions which they were not computed with.
    pub foreign_definitions: Vec<WindowKey>,
    /// The job's policy for late events, at the time of this plan.
    pub lateness: Lateness,
    /// What was asked for, with how far the job looks back.
    pub request: Request,
    /// What later runs need not read again.
    keep: Keep,
    states: Vec<(String, String)>,
    started_at: Timestamp,
    stored: guard::Base,
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
    /// Keys that earlier runs read.
    pub keys: &'i KeyCache,
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
    let with = |completeness, goes_on| compute(inputs, &Request { completeness, ..request.clone() }, goes_on);
    let result = compute(inputs, request, false);
    let retreat = match result {
        Err(error) if error.is::<Retreat>() => error.downcast::<Retreat>()?,
        result => return result,
    };
    // Who asks for everything that is new does not mean as far as the job looks back.
    let everything = match request.completeness {
        Completeness::Incremental => Completeness::Full,
        _ => Completeness::Recomputed,
    };
    let plan = match with(everything, false) {
        // The source has no longer everything, but for what is new it does.
        Err(error) if retreat.is_choice && Moved::is_in(&error) => with(Completeness::Incremental, true).map_err(|second| {
            // Neither works: of the two, the whole source is what can be mended.
            if second.is::<Retreat>() { error.context(second) } else { second }
        })?,
        plan => {
            let plan = if retreat.is_choice { plan } else { plan.with_context(|| retreat.why.clone()) }?;
            Plan { coverage: Coverage { why: Some(retreat.why), ..plan.coverage }, ..plan }
        }
    };
    Ok(Plan { request: request.clone(), ..plan })
}

/// `goes_on` where there is no other way: the source has no longer everything.
fn compute(inputs: &Inputs<'_>, request: &Request, goes_on: bool) -> Result<Plan> {
    let started_at = now();
    let Inputs { job, reference, store, progress, threads, .. } = *inputs;
    let mut timeline = Timeline { steps: Vec::new(), observer: progress };
    let past = Past::load(store, job)?;
    let lateness = Lateness::of(job, request, started_at);
    // From here on, as if somebody had asked for how far the job looks back.
    let request = &Request { range: request.range.or_else(|| lateness.range(job, started_at)), ..request.clone() };
    // A range that was asked for is known before anything is read.
    let asked = match request.range {
        None => None,
        // Nothing of it has settled yet.
        Some(range) if range.start >= range.end => None,
        Some(_) => {
            let range = range::resolve(request, job, reference, None)?;
            let range = range.map(|range| sessions::widen(inputs, request, &past, range, &mut timeline)).transpose()?;
            range.and_then(|range| lateness.settled(range))
        }
    };
    let levels = reference.has_levels(request.scope.meter.as_deref());
    let basis = basis(job, reference, &request.scope);
    let nowhere = request.range.map(|Span { end, .. }| Span { start: end, end });
    let selection = selection(request, asked.or(nowhere), reference);
    let (baseline, splits) = incremental::baseline(inputs, request, &past, &basis, &selection)?;

    // read (keys) -> deduplicate
    let keys = match &baseline {
        Ok(baseline) => known_keys(inputs, &splits, &baseline.is_new, &mut timeline).map_err(Retreat::of)?,
        Err(_) => read_keys(inputs, &splits, &mut timeline)?,
    };
    if request.is_of_everything() {
        inputs.keys.keep(&job.deduplicate.key, &splits, &keys.splits, keys.repeated.iter());
    }
    // Where nobody asked for a range, events make one.
    let of_events = match request.range {
        Some(_) => asked,
        None => range::resolve(request, job, reference, keys.extent)?,
    };
    let whole = match request.range {
        Some(_) => asked,
        None => {
            // Stored windows are whole already: widening them again would reach further each time.
            // A full run finds rows that nobody wrote too; a run that skips does not look for them.
            let is_all = baseline.is_ok() && past.is_within(of_events);
            let stored = store.filter(|_| !is_all).map(|store| store.extent(&job.name)).transpose()?.flatten();
            [of_events, stored].into_iter().flatten().reduce(Span::union).and_then(|range| lateness.settled(range))
        }
    };
    // Rows without a time may be all there is: they are still accounted for.
    let mut range = whole.unwrap_or(EMPTY);
    let reach = range::reach(range, reference, &request.scope);

    // What changed since the run before, if the rest can be skipped.
    let snapshot = Snapshot::of(reference, range.end);
    let ahead = baseline.as_ref().ok().map(|baseline| {
        let passes = Passes { inputs, baseline, splits: &splits, keys: &keys.splits, came_again: &keys.came_again };
        passes.look_ahead(&snapshot, &past, (request, &lateness), (range, reach), &mut timeline)
    });
    let (mut ahead, marks) = ahead.transpose()?.unzip();

    // read -> enrich
    let rows = keys.splits.iter().map(|keys| keys.rows).sum();
    let kept = ahead.as_ref().and_then(|ahead| ahead.kept.as_ref());
    let may_keep = ahead.is_none() || kept.is_some();
    let context = Context {
        enricher: Enricher::new(reference, request.scope.clone()),
        rules: &job.deduplicate,
        timezone: job.timezone,
        range,
        reach,
        parts: Partitioning::of(reference),
        repeated: keys.repeated,
        times_before: baseline.as_ref().ok().and_then(|baseline| baseline.run.input.events()),
        open_dead_letters: past.open_dead_letters(reference),
        marks,
        has_kept: kept.is_some(),
        // What an incremental run reads is of use to others only beside what was kept before.
        keep_in: may_keep.then(|| keep::folder(inputs, request, rows)).flatten(),
    };
    let coverage = past.coverage(reach, &splits, &request.scope);
    let mut seen = match &mut ahead {
        Some(ahead) => ahead.enrich(&context, &coverage, &mut timeline)?,
        None => enrich_all(inputs, &context, (&splits, &keys.splits), &coverage, &mut timeline)?,
    };
    // Promise 8: what was read in several passes is of one state.
    inputs.source.check_unchanged(&splits)?;
    invariants::conservation(&seen.events, &seen.usage)?;
    // Whatever part of the job is computed, its bills are those of the whole.
    let billed_events = match request.range {
        Some(_) => asked,
        None => range::resolve(&Request::default(), job, reference, seen.times.all())?,
    };
    let mut billed = past.billed(request, billed_events, &lateness);
    if baseline.is_ok() {
        incremental::check_bills(inputs, &past, &billed, (range, lateness.horizon))?;
    }

    // aggregate -> price
    let names = Names::new(reference);
    let lost = hopping::in_windows(std::mem::take(&mut seen.withdrawn), reference, job.timezone);
    let withdrawn: FxHashMap<WindowKey, News> =
        lost.iter().map(|(key, news)| (names.window_key(key, &seen.dimensions), *news)).collect();
    let mut matches = seen.take_matches();
    let replaced = std::mem::take(&mut seen.read_again);
    let stood_in = ahead.as_ref().map(|ahead| ahead.add_what_is_known(&mut matches, &context, &replaced, &mut seen.dimensions));
    let keeper = context.keep_in.as_deref().map(ListKeeper::new);
    let pricing = Pricing {
        job,
        reference,
        threads,
        request,
        lateness: &lateness,
        context: &context,
        names: &names,
        dimensions: &seen.dimensions,
        lost: &lost,
        keeper: keeper.as_ref(),
    };
    let mut priced = timeline.step("aggregate and price", None, || {
        let priced = pricing.price(&mut matches, &mut range, &mut billed)?;
        let rows = priced.windows.len() as u64;
        Ok((priced, rows))
    })?;
    invariants::telescoping_cost(&priced)?;
    let kept_matches = matches.kept.as_ref().map_or(0, |kept| kept.count());
    let shards = std::mem::take(&mut matches.shards);
    drop(matches);
    if let Some(ahead) = &mut ahead {
        ahead.check_priced(&context, &priced)?;
        ahead.skipping.add_known(&stood_in.unwrap_or_default(), kept_matches);
    }
    let rounded = std::mem::take(&mut priced.rounded);
    let kept = ahead.as_ref().and_then(|ahead| ahead.kept.as_ref());
    let keep = match context.keep_in.as_ref().zip(keeper) {
        Some((folder, lists)) => Keep::of(folder, &context, (shards, &seen.dimensions), kept, &replaced, (lists, rounded)),
        None => Keep::nothing(inputs, request),
    };

    // reconcile
    let reach = range::reach(range, reference, &request.scope);
    let marks = context.marks.as_ref();
    let (stored, differences, skipping) = match ahead {
        Some(ahead) => (ahead.stored, Some(ahead.differences), Some(ahead.skipping)),
        None => {
            let stored = past.read(inputs, (request, &lateness), (range, reach))?;
            (stored, past.differences(store, &job.name, &snapshot, &basis), None)
        }
    };
    let stored = stored.comparable(&request.scope, range, (marks, reference), &priced);
    if levels && request.range.is_some() {
        priced.keep_bills_in(range, &stored.periods);
    }
    let comparison = Comparison {
        inputs,
        request,
        past: &past,
        lateness: &lateness,
        basis: &basis,
        range,
        marks,
        withdrawn: &withdrawn,
        dead_letters: &seen.dead_letters,
        differences: differences.as_ref(),
    };
    let compared = comparison.reconcile(stored, &mut priced, &mut timeline)?;
    let event_times = match &baseline {
        Ok(baseline) => edges::event_times((inputs, goes_on, baseline), &seen.times, &compared)?,
        Err(_) => seen.times.all(),
    };
    let Compared { changes, periods, foreign_definitions, windows: stored, bills } = compared;
    let known_letters: FxHashSet<_> = past.dead_letters.iter().map(|stored| &stored.letter.key).collect();
    let new_letters: FxHashSet<_> =
        seen.dead_letters.iter().map(|letter| &letter.key).filter(|key| !known_letters.contains(key)).collect();
    let dead_letter_rows = (known_letters.len() + new_letters.len()) as u64;
    // Without a range, what lies beyond all events is gone too.
    let settled = Span { start: Timestamp::MIN, end: lateness.settled_until.unwrap_or(Timestamp::MAX) };
    let judged = request.range.map_or(settled, |_| range);
    let covered = (judged, inputs.source.reads_rows_without_time(&selection));
    let visited = (marks.is_some() || context.enricher.is_of_few()).then_some(&seen.visited);
    let resolved = past.resolved(job, reference, &request.scope, covered, &seen.dead_letters, visited);

    let files = splits.iter().zip(&keys.splits);
    let last = event_times.map(|(_, last)| last);
    let future = lateness::warn_of_the_future(files.clone(), (range, last), started_at);
    let files = files.map(|(split, keys)| split.input(keys.rows));
    let coverage = incremental::coverage(&baseline, skipping, &priced.windows, &stored);
    let leaves_windows = lateness.settled_until.is_some();
    let billed = Some(billed_events.unwrap_or(EMPTY)).filter(|events| request.range.is_none() && *events != range);
    let coverage = Coverage { leaves_windows, asked_for: request.range.is_some(), billed, ..coverage };
    let is_part = coverage.mode == Mode::Part;
    let base = guard::Base { windows: stored, periods: bills };
    let base = guard::wide_enough(inputs, base, (&changes, &periods), (range, reach), baseline.is_err())?;
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
            events_from: event_times.map(|(first, _)| first),
            events_until: last,
        },
        basis,
        steps: timeline.steps,
        warnings: reference.warnings.iter().cloned().chain(future).collect(),
        coverage,
        foreign_definitions,
        lateness,
        request: request.clone(),
        keep,
        states: if is_part { Vec::new() } else { vec![(STATE.to_owned(), snapshot.encode()?)] },
        started_at,
        stored: base,
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
        guard::check(&job.guard, &self.stored, &self.changes, &self.periods)
    }

    /// Writes what later runs need not read again, for when the plan is published.
    pub fn take_kept(&mut self) -> Prepared {
        std::mem::take(&mut self.keep).prepare_plan(self.started_at)
    }

    /// Takes out what the plan would write.
    pub fn take_draft(&mut self, mode: RunMode) -> Draft {
        Draft {
            mode,
            previous_run_id: self.previous.last().map(|run| run.run_id.clone()),
            range: self.range,
            started_at: self.started_at,
            counts: serde_json::json!({
                "events": self.events, "usage": self.usage, "rows": self.changes.rows,
                "periods": self.periods.changed() + self.periods.adjusted, "adjusted_bills": self.periods.adjusted,
                "dead_letter_rows": self.dead_letter_rows, "coverage": self.coverage,
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
            states: std::mem::take(&mut self.states),
        }
    }

    /// Publishes the plan as a run.
    ///
    /// # Errors
    /// Where the store cannot be written; it is then as it was before.
    pub fn publish(mut self, job: &Job, store: &mut dyn AggregateStore, origin: &Origin) -> Result<Published> {
        let watch = Stopwatch::start();
        let publication = self.take_draft(RunMode::Run).into_publication(&job.name, &self.previous, origin);
        let run = store.publish(&publication)?;
        std::mem::take(&mut self.keep).prepare(&run.run_id).publish(&run.run_id);
        self.changes.corrections = publication.corrections;
        self.periods.upserts = publication.period_upserts;
        self.periods.deletions = publication.period_deletions;
        self.periods.corrections = publication.period_corrections;
        self.dead_letters = publication.dead_letters;
        self.resolved = publication.resolved;
        self.steps.push(Step { name: "publish", seconds: watch.seconds(), rows: self.changes.rows.changed() });
        Ok(Published { plan: self, run })
    }
}

/// A plan that was carried out.
#[derive(Debug)]
pub struct Published {
    pub plan: Plan,
    pub run: RunRecord,
}

/// What of the source a request needs; `range` is the one that it resolves to.
pub fn selection(request: &Request, range: Option<Span>, reference: &Reference) -> Selection {
    // A level is made of all events before.
    let levels = reference.has_levels(request.scope.meter.as_deref());
    let range = range.filter(|_| request.range.is_some() && !levels);
    let span = range.map(|range| range::reach(range, reference, &request.scope));
    // How far bills reach without a range, events of all tenants tell.
    Selection { span, tenant: request.scope.tenant.clone().filter(|_| request.range.is_some()) }
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
