//! What earlier runs left: which rows are stored, which events were known, which
//! dead letters are open.

use std::sync::Arc;

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};

use super::closed::ClosedPeriods;
use super::incremental::marks::{Marks, Pair};
use super::incremental::snapshot::{Differences, STATE, Snapshot};
use super::lateness::{Horizon, Lateness};
use super::letters::{OpenDeadLetters, VisitedLetters};
use super::price::{Priced, PricedWindow};
use super::unused::Billed;
use super::{Inputs, Request};
use crate::config::Job;
use crate::model::aggregate::{DeadLetter, DeadLetterKey, PeriodKey, PeriodRow, StoredWindow, WindowKey};
use crate::model::basis::Scope;
use crate::model::run::{InputFile, RunBasis, RunMode, RunRecord};
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowKind};
use crate::reference::Reference;
use crate::source::{Part, Split, kafka};
use crate::store::{AggregateStore, StoredDeadLetter};

/// What earlier runs left in the store.
pub struct Past {
    pub runs: Vec<RunRecord>,
    pub dead_letters: Vec<StoredDeadLetter>,
}

/// Stored rows that a plan is compared with.
pub struct Stored {
    pub windows: Vec<StoredWindow>,
    pub periods: Vec<PeriodRow>,
    /// Periods that the range touches and whose rows stay as they are.
    pub closed: ClosedPeriods,
    /// Those that were closed, whether or not they stay as they are.
    pub invoiced: ClosedPeriods,
}

/// What a run knew when it computed its range.
pub struct Coverage<'p> {
    range: Span,
    files: &'p [InputFile],
    /// Their fingerprints by name.
    fingerprints: FxHashMap<&'p str, &'p str>,
    ingested_until: Option<Timestamp>,
    /// Whether some of its files are gone: others may hold their events now.
    has_lost_files: bool,
}

impl Coverage<'_> {
    fn knowledge(&self, split: &Split) -> Known {
        let is_later = match split.part {
            Part::Whole | Part::RowGroup(_) | Part::Slice { .. } => {
                !self.has_lost_files && !self.fingerprints.contains_key(split.label().as_str())
            }
            Part::Offsets { partition, start, .. } => {
                kafka::read_until(self.files, &split.identity, partition).is_none_or(|end| end <= start)
            }
            // Databases grow in place: only ingestion times tell what is new.
            Part::Rows { .. } => false,
        };
        match (self.fingerprints.get(split.label().as_str()), self.ingested_until) {
            _ if is_later => Known::None,
            (Some(fingerprint), _) if *fingerprint == split.fingerprint => Known::All,
            (_, Some(cut_off)) => Known::Until(cut_off),
            _ => Known::None,
        }
    }
}

/// Which events of a split earlier runs counted, the last run first.
#[derive(Default)]
pub struct Knowledge(Vec<(Span, Known)>);

impl Knowledge {
    pub fn of(split: &Split, coverage: &[Coverage<'_>]) -> Self {
        Knowledge(coverage.iter().map(|run| (run.range, run.knowledge(split))).collect())
    }

    /// Whether the last run that covered `time` read an event ingested at `ingested_at`.
    pub fn holds(&self, time: Option<Timestamp>, ingested_at: Timestamp) -> bool {
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
    pub fn holds(&self, ingested_at: Timestamp) -> bool {
        match self {
            Known::All => true,
            Known::None => false,
            Known::Until(cut_off) => ingested_at <= *cut_off,
        }
    }
}

impl Past {
    pub fn load(store: Option<&dyn AggregateStore>, job: &Job) -> Result<Past> {
        let Some(store) = store else {
            return Ok(Past { runs: Vec::new(), dead_letters: Vec::new() });
        };
        Ok(Past { runs: store.runs(&job.name)?, dead_letters: store.dead_letters(&job.name)? })
    }

    /// What there are bills of without usage: the range that was asked for; without one, what events
    /// lie in, and all ranges that earlier runs were asked for. Not what rows lie in: nobody may have
    /// meant them.
    pub fn billed(&self, request: &Request, range: Option<Span>, lateness: &Lateness) -> Billed {
        let billed = range.and_then(|range| lateness.settled(range)).map(Billed::of).unwrap_or_default();
        match request.range {
            Some(_) => billed,
            None => billed.with_asked_for(&self.runs, lateness.settled_until),
        }
    }

    /// Whether a difference may have been recorded that changed no row.
    pub fn have_closed_or_adjusted(&self) -> bool {
        let is_some = |count: Option<&serde_json::Value>| count.and_then(serde_json::Value::as_u64).is_some_and(|rows| rows > 0);
        let adjusted = |run: &RunRecord| {
            is_some(run.counts.get("rows").and_then(|rows| rows.get("adjusted"))) || is_some(run.counts.get("adjusted_bills"))
        };
        self.runs.iter().any(|run| run.mode == RunMode::Close || adjusted(run))
    }

    /// What changed in the reference tables since the last run of everything, and its id; `None`
    /// where nothing did, or what they were is not known.
    pub fn differences(
        &self,
        store: Option<&dyn AggregateStore>,
        job: &str,
        now: &Snapshot,
        basis: &RunBasis,
    ) -> Option<(String, Differences)> {
        let last = self.runs.iter().rfind(|run| run.is_of_everything() && run.basis.reference != basis.reference)?;
        let (run_id, content) = store?.state(job, STATE).ok().flatten()?;
        let then = Snapshot::decode(&content).ok().filter(|_| run_id == last.run_id)?;
        Some((run_id, then.differences(now)))
    }

    /// Whether all rows that runs wrote lie in `range`.
    pub fn is_within(&self, range: Option<Span>) -> bool {
        self.runs.iter().filter_map(|run| run.range).all(|of_run| range.is_some_and(|range| range.covers(of_run)))
    }

    pub fn ingested_until(&self) -> Option<Timestamp> {
        self.runs.last().and_then(|run| run.input.ingested_until)
    }

    /// The runs that computed part of `reach`, the last one first. A run reads every
    /// file, but knows only what it computed: not what lies outside of its range, nor
    /// (in a run of a part of the job) what belongs to others.
    pub fn coverage(&self, reach: Span, splits: &[Split], scope: &Scope) -> Vec<Coverage<'_>> {
        let labels: FxHashSet<String> = splits.iter().map(Split::label).collect();
        let mut coverage: Vec<Coverage<'_>> = Vec::new();
        // What a run found that was taken back is news again.
        let taken_back = RunRecord::taken_back(&self.runs);
        let is_wide_enough = |run: &RunRecord| run.basis.scope.is_whole() || run.basis.scope == *scope;
        let stands = |run: &&RunRecord| is_wide_enough(run) && !taken_back.contains(run.run_id.as_str());
        for run in self.runs.iter().rev().filter(stands) {
            let Some(range) = run.range.filter(|range| range.overlaps(reach)) else { continue };
            if coverage.iter().any(|later| later.range.covers(range)) {
                continue;
            }
            let files = &run.input.files;
            let has_lost_files = files.iter().any(|file| !labels.contains(&file.name));
            let fingerprints = files.iter().map(|file| (file.name.as_str(), file.fingerprint.as_str())).collect();
            coverage.push(Coverage { range, files, fingerprints, ingested_until: run.input.ingested_until, has_lost_files });
        }
        coverage
    }

    /// Rows that are as they should be, but name definitions that they were not computed
    /// with: nothing that a definition can come from changed since their run.
    pub fn foreign_definitions(&self, stored: &[StoredWindow], computed: &[PricedWindow], now: &RunBasis) -> Vec<WindowKey> {
        let is_same = |run: &&RunRecord| {
            run.mode.computes()
                && run.basis.reference == now.reference
                && run.basis.job_digest == now.job_digest
                && run.basis.trueup_version == now.trueup_version
        };
        let same: FxHashSet<&str> = self.runs.iter().filter(is_same).map(|run| run.run_id.as_str()).collect();
        let mut computed = computed.iter().peekable();
        let is_foreign = |stored: &&StoredWindow| {
            while computed.next_if(|window| window.row.key < stored.row.key).is_some() {}
            let now = computed.peek().filter(|window| window.row.key == stored.row.key);
            now.is_some_and(|now| now.row.basis != stored.row.basis) && same.contains(&*stored.run_id)
        };
        stored.iter().filter(is_foreign).map(|stored| stored.row.key.clone()).collect()
    }

    pub fn open_dead_letters(&self, reference: &Reference) -> OpenDeadLetters {
        let mut open = OpenDeadLetters::default();
        for stored in self.dead_letters.iter().filter(|stored| stored.resolved_run_id.is_none()) {
            let key = &stored.letter.key;
            let meter = reference.meters.iter().position(|meter| meter.id == key.meter_id);
            open.add(&key.tenant_id, &key.event_id, meter);
        }
        open
    }

    /// Open dead letters that the run covers and did not find again: those of the range, and
    /// those `without_time` if it read such rows. Where it did not look at all events, those
    /// that it `visited`.
    pub fn resolved(
        &self,
        job: &Job,
        reference: &Reference,
        scope: &Scope,
        (range, without_time): (Span, bool),
        found: &[DeadLetter],
        visited: Option<&VisitedLetters>,
    ) -> Vec<DeadLetterKey> {
        let again: FxHashSet<_> = found.iter().map(|letter| &letter.key).collect();
        let is_covered = |letter: &DeadLetter| {
            // What was wrong with an event as a whole is right for a meter only if it has no other.
            let is_of = |meter: &String| match letter.key.meter_id.as_str() {
                "" => reference.is_alone(meter),
                of => *meter == of,
            };
            let in_scope = scope.tenant.as_ref().is_none_or(|tenant| *tenant == letter.key.tenant_id)
                && scope.meter.as_ref().is_none_or(is_of);
            let tumbling =
                || reference.meters.iter().map(|meter| meter.window).filter(|window| matches!(window, WindowKind::Tumbling(_)));
            let is_covered = |t| range.contains(t) && tumbling().all(|window| range.covers(window.slot(t, job.timezone)));
            // A time that no range holds is as good as none.
            let event_time = letter.event_time.and_then(|t| Timestamp::in_range(t.nanos()));
            in_scope && event_time.map_or(without_time, is_covered)
        };
        let is_visited = |key: &DeadLetterKey| {
            let meter = reference.meters.iter().position(|meter| meter.id == key.meter_id);
            visited.is_none_or(|visited| visited.hold(&key.tenant_id, &key.event_id, meter))
        };
        let open = self.dead_letters.iter().filter(|stored| stored.resolved_run_id.is_none()).map(|stored| &stored.letter);
        let open = open.filter(|letter| is_visited(&letter.key));
        open.filter(|letter| is_covered(letter) && !again.contains(&letter.key)).map(|letter| letter.key.clone()).collect()
    }

    /// Stored rows whose window touches `span`.
    pub fn windows(&self, store: Option<&dyn AggregateStore>, job: &Job, span: Span) -> Result<Vec<StoredWindow>> {
        store.map_or(Ok(Vec::new()), |store| store.windows(&job.name, span))
    }

    /// Rows of the billing periods that the range touches.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub fn read(&self, inputs: &Inputs<'_>, request: (&Request, &Lateness), (range, reach): (Span, Span)) -> Result<Stored> {
        let stored = self.read_periods(inputs, request, (range, reach), None)?;
        Ok(Stored { windows: self.windows(inputs.store, inputs.job, reach)?, ..stored })
    }

    /// As [`Past::read`], but no windows, and of billing periods that `marks` hold and perhaps
    /// others.
    ///
    /// # Errors
    /// As [`Past::read`].
    pub fn read_periods(
        &self,
        inputs: &Inputs<'_>,
        (request, lateness): (&Request, &Lateness),
        (range, reach): (Span, Span),
        marks: Option<&Marks>,
    ) -> Result<Stored> {
        let Inputs { job, reference, store, .. } = *inputs;
        let windows = Vec::new();
        let Some(store) = store else {
            let (closed, invoiced) = (ClosedPeriods::default(), ClosedPeriods::default());
            return Ok(Stored { windows, periods: Vec::new(), closed, invoiced });
        };
        let subscriptions = marks.filter(|marks| marks.know(range)).and_then(|marks| marks.marked_subscriptions(reference));
        let reach = marks.map_or(reach, |marks| marks.span(reference, (range, reach)));
        let range = match (request.range, marks) {
            // Bills without usage may lie anywhere.
            (None, None) => Span { start: Timestamp::MIN, end: lateness.settled_until.unwrap_or(Timestamp::MAX) },
            _ => Span { start: range.start.max(reach.start), end: range.end.min(reach.end) },
        };
        let periods = store.periods_of(&job.name, range, subscriptions.as_deref())?;
        let invoiced = ClosedPeriods::of(&periods);
        let closed = match lateness.horizon {
            _ if request.allow_closed => ClosedPeriods::default(),
            Some(until) => invoiced.clone().with_horizon(Horizon::new(until, &self.runs), reference, &periods),
            None => invoiced.clone(),
        };
        Ok(Stored { windows, periods, closed, invoiced })
    }

    /// Rows that may change where `marks` are, and those that come after them; of all marked
    /// pairs, or of some.
    ///
    /// # Errors
    /// As [`Past::read`].
    pub fn read_marked(
        &self,
        inputs: &Inputs<'_>,
        spans: (Span, Span),
        marks: &Marks,
        of: Option<&FxHashSet<Pair>>,
    ) -> Result<Vec<StoredWindow>> {
        let Inputs { job, reference, store: Some(store), .. } = *inputs else { return Ok(Vec::new()) };
        // A run that skips does not look for rows that nobody wrote.
        let written_until = self.runs.iter().filter_map(|run| run.range).map(|range| range.end).max();
        let choices = marks.rows_to_read(reference, of, written_until.unwrap_or(Timestamp::MIN));
        let mut windows = store.windows_of(&job.name, marks.span(reference, spans), choices.as_deref())?;
        // Windows of a period follow each other.
        let (mut last, mut of): (Option<Arc<PeriodKey>>, Option<(Pair, Span)>) = (None, None);
        windows.retain(|StoredWindow { row, .. }| {
            if last.as_ref().is_none_or(|last| !Arc::ptr_eq(last, &row.key.period)) {
                (last, of) = (Some(Arc::clone(&row.key.period)), marks.period_of(&row.key.period, reference));
            }
            of.is_none_or(|(pair, period)| !marks.leave(pair, period, row.counts_from()))
        });
        Ok(windows)
    }
}

impl Stored {
    /// The rows that what is `priced` now is compared with: those of the scope, and of
    /// billing periods that the range touches and that `marks` hold.
    #[must_use]
    pub fn comparable(
        mut self,
        scope: &Scope,
        range: Span,
        (marks, reference): (Option<&Marks>, &Reference),
        priced: &Priced,
    ) -> Stored {
        let is_marked = |key: &PeriodKey| marks.is_none_or(|marks| marks.hold_key(key, reference));
        // A row that is computed now is compared whoever it belonged to.
        let is_computed = |key: &WindowKey| priced.windows.binary_search_by(|window| window.row.key.cmp(key)).is_ok();
        // Windows of a period follow each other.
        let mut last: Option<(Arc<PeriodKey>, bool)> = None;
        self.windows.retain(|StoredWindow { row, .. }| {
            let key = &row.key.period;
            let is_marked = match &last {
                Some((last, is_marked)) if Arc::ptr_eq(last, key) => *is_marked,
                _ => last.insert((Arc::clone(key), is_marked(key))).1,
            };
            let in_scope = is_marked && scope.holds(&key.tenant_id, &row.customer_id, &key.meter_id);
            row.period().overlaps(range) && (in_scope || is_computed(&row.key))
        });
        let period_keys: FxHashSet<_> = priced.periods.iter().map(|period| &period.key).collect();
        self.periods.retain(|row| {
            let in_scope = scope.holds(&row.key.tenant_id, &row.customer_id, &row.key.meter_id);
            (in_scope && is_marked(&row.key)) || period_keys.contains(&row.key)
        });
        self
    }
}

/// The keys of the rows that the ledger leaves in the store.
pub fn ledger_rows(store: &dyn AggregateStore, job: &str) -> Result<FxHashSet<WindowKey>> {
    let mut rows = FxHashSet::default();
    store.ledger(job, &mut |entry| {
        if entry.is_adjustment() {
            return Ok(());
        }
        if entry.after.is_some() {
            rows.insert(entry.key)
        } else {
            rows.remove(&entry.key)
        };
        Ok(())
    })?;
    Ok(rows)
}
