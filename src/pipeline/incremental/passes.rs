//! The passes of an incremental run over the source.

use std::collections::BTreeSet;

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};

use super::choice::{Chosen, CustomerChoice, KeyChoice};
use super::kept::Kept;
use super::marks::MarkScan;
use super::separable::Separable;
use super::snapshot::{Differences, Snapshot};
use super::{Baseline, Marks, Skipping};
use crate::model::window::Span;
use crate::pipeline::context::Context;
use crate::pipeline::enrich::{Enricher, Scope};
use crate::pipeline::keys::{KeyHashes, SplitKeys};
use crate::pipeline::matcher::Matcher;
use crate::pipeline::past::{Coverage as PastCoverage, Knowledge};
use crate::pipeline::read::{check_stable, merge_workers};
use crate::pipeline::{Completeness, Inputs, Request, Timeline, scan};
use crate::source::{EventBatch, RowChoice, Split, Wanted};

/// Beyond so many in a hundred events everything is read: choosing takes a second pass over
/// what is chosen from, and after a run of everything its matches are kept for the next ones.
const MOST_OF_ALL: u128 = 25;

/// What must be computed again.
pub struct Marked {
    pub marks: Marks,
    /// The rows of known splits that changed reference rows touch.
    pub changed: CustomerChoice,
    pub differences: Differences,
    pub skipping: Skipping,
}

/// Reads what an incremental run needs.
pub struct Passes<'p> {
    pub inputs: &'p Inputs<'p>,
    pub baseline: &'p Baseline<'p>,
    pub splits: &'p [Split],
    pub keys: &'p [SplitKeys],
}

impl<'p> Passes<'p> {
    fn old(&self) -> impl Iterator<Item = (&'p Split, &'p SplitKeys)> {
        self.baseline.part(self.splits, self.keys, false)
    }

    fn new_splits(&self) -> (Vec<Split>, Vec<u64>) {
        let new = self.baseline.part(self.splits, self.keys, true);
        new.map(|(split, keys)| (split.clone(), keys.rows)).unzip()
    }

    /// What must be computed again: by new events, by the old copies of their keys, and
    /// by reference rows that are not what they were.
    ///
    /// # Errors
    /// Where the source cannot be read.
    pub(in crate::pipeline) fn marks(
        &self,
        now: &Snapshot,
        (range, reach): (Span, Span),
        timeline: &mut Timeline<'_>,
    ) -> Result<Marked> {
        let Inputs { job, reference, source, threads, progress, .. } = *self.inputs;
        let before = &self.baseline.snapshot;
        let differences = before.differences(now);
        let mut marks = Marks::new(reference, self.baseline.run.range);
        marks.add_differences(&differences, reference, reach);
        let levels_until = crate::model::timestamp::Timestamp::from_nanos(before.levels_until);
        marks.add_levels(reference, levels_until, range.end);

        let enricher = Enricher::new(reference, Scope::default());
        let separable = Separable::new(reference, job.timezone);
        let (new, new_rows) = self.new_splits();
        let skipping = self.skipping(&differences);
        let changed = marks.choice(reference);
        timeline.step("mark", Some(skipping.new_events), || {
            let new_scan = || MarkScan::new(&enricher, &separable);
            let visit = |scan: &mut MarkScan<'_, '_>, _: usize, batch: &EventBatch| {
                let mut slots = Vec::new();
                batch.rows().for_each(|event| scan.visit(&event, &mut slots));
                Ok(())
            };
            let (scans, rows) = scan::scan(source, &new, Wanted::Whole, threads, &|rows| progress.rows(rows), new_scan, visit)?;
            check_stable(&new, &new_rows, &rows)?;
            scans.into_iter().for_each(|scan| marks.add_events(scan));

            let (again, holders) = self.sent_again();
            let choice = KeyChoice::new(&job.deduplicate.key, again, None);
            let (chosen, splits) = Chosen::new(source, &choice, holders.into_iter());
            let visit = |scan: &mut MarkScan<'_, '_>, _: usize, batch: &EventBatch| {
                let mut slots = Vec::new();
                batch.rows().filter(|event| choice.wants(event)).for_each(|event| scan.visit(&event, &mut slots));
                Ok(())
            };
            let (scans, _) = scan::scan(&chosen, &splits, Wanted::Whole, threads, &|_| {}, new_scan, visit)?;
            scans.into_iter().for_each(|scan| marks.add_events(scan));
            Ok(((), rows.iter().sum()))
        })?;
        Ok(Marked { marks, changed, differences, skipping })
    }

    /// The hashes of new keys that old splits have too, and those splits.
    fn sent_again(&self) -> (FxHashSet<u64>, Vec<(&'p Split, &'p SplitKeys)>) {
        let new = self.baseline.part(self.splits, self.keys, true).flat_map(|(_, keys)| keys.hashes.iter());
        let new = KeyHashes::of(new.collect());
        let mut again = FxHashSet::default();
        let mut holders = Vec::new();
        for (split, keys) in self.old() {
            let mut is_holder = false;
            let mut found = |hash: u64| {
                again.insert(hash);
                is_holder = true;
            };
            keys.hashes.shared(&new, &mut found);
            if is_holder {
                holders.push((split, keys));
            }
        }
        (again, holders)
    }

    /// Whether one run over everything takes less time than to choose from it: so much is
    /// marked and nothing is kept, or so many runs have built on the last one of everything.
    /// Who asks for an incremental run gets it all the same.
    pub fn are_in_vain(&self, request: &Request, marks: &Marks, kept: Option<&Kept>) -> bool {
        let reference = self.inputs.reference;
        if request.completeness != Completeness::Auto {
            return false;
        }
        if let Some(kept) = kept {
            return kept.is_full();
        }
        let extents = self.old().filter_map(|(_, keys)| keys.extent.map(|(start, end)| Span { start, end }));
        let Some(extent) = extents.reduce(Span::union) else { return false };
        let names: BTreeSet<_> = reference.meters.iter().map(|meter| &meter.event_name).collect();
        marks.choice(reference).percent(extent, reference.externals().count(), names.len()) > MOST_OF_ALL
    }

    /// Matches the events of marked windows and periods that `choice` wants, new ones, and
    /// every copy of their keys, undecided.
    ///
    /// # Errors
    /// Where the source cannot be read.
    pub fn enrich<'c, 'r>(
        &self,
        context: &'c Context<'r>,
        past: &[PastCoverage<'_>],
        choice: &CustomerChoice,
        skipping: &mut Skipping,
    ) -> Result<Matcher<'c, 'r>> {
        let Inputs { source, threads, progress, .. } = *self.inputs;
        let count_rows = |rows| progress.rows(rows);
        let knowledge = |splits: &[Split], index: usize| {
            splits.get(index).map_or_else(Knowledge::default, |split| Knowledge::of(split, past))
        };
        let new_worker = || Matcher::new(context);
        let (new, new_rows) = self.new_splits();
        let visit = |matcher: &mut Matcher<'c, 'r>, index: usize, batch: &EventBatch| {
            let known = knowledge(&new, index);
            matcher.visit(batch, |time, ingested_at| known.holds(time, ingested_at))
        };
        let (mut workers, rows) = scan::scan(source, &new, Wanted::Whole, threads, &count_rows, new_worker, visit)?;
        check_stable(&new, &new_rows, &rows)?;

        let mut read_chosen = |choice: &dyn RowChoice, splits: Vec<(&'p Split, &'p SplitKeys)>| {
            skipping.count(&splits);
            let (chosen, splits) = Chosen::new(source, choice, splits.into_iter());
            let visit = |matcher: &mut Matcher<'c, 'r>, index: usize, batch: &EventBatch| {
                let known = knowledge(&splits, index);
                matcher.visit_chosen(batch, choice, |time, ingested_at| known.holds(time, ingested_at))
            };
            scan::scan(&chosen, &splits, Wanted::Whole, threads, &count_rows, new_worker, visit).map(|(workers, _)| workers)
        };
        workers.extend(read_chosen(choice, self.old().filter(|(_, keys)| choice.may_want(keys)).collect())?);
        let mut seen = merge_workers(context, workers);

        // Copies that lie elsewhere may be the ones to keep.
        let missing = self.missing_copies(&seen.copies);
        if !missing.is_empty() {
            let list = KeyHashes::of(missing.iter().copied().collect());
            let holds = |keys: &SplitKeys| {
                let mut any = false;
                keys.hashes.count_all(&list, |_| any = true);
                any
            };
            let holders = self.old().filter(|(_, keys)| holds(keys)).collect();
            let choice = KeyChoice::new(&context.rules.key, missing, Some(choice));
            let workers = read_chosen(&choice, holders)?;
            seen.merge(merge_workers(context, workers));
        }
        Ok(seen)
    }

    /// The hashes of which more copies exist than were read.
    fn missing_copies(&self, seen: &FxHashMap<u64, u64>) -> FxHashSet<u64> {
        let list = KeyHashes::of(seen.keys().copied().collect());
        let mut counts: FxHashMap<u64, u64> = FxHashMap::default();
        for keys in self.keys {
            keys.hashes.count_all(&list, |hash| *counts.entry(hash).or_default() += 1);
        }
        seen.iter().filter(|(hash, count)| counts.get(hash) != Some(*count)).map(|(hash, _)| *hash).collect()
    }

    fn skipping(&self, differences: &Differences) -> Skipping {
        let files = |splits: &mut dyn Iterator<Item = (&Split, &SplitKeys)>| -> (u64, u64) {
            let (names, rows): (BTreeSet<_>, Vec<_>) = splits.map(|(split, keys)| (split.name.clone(), keys.rows)).unzip();
            (names.len() as u64, rows.iter().sum())
        };
        let (new_files, new_events) = files(&mut self.baseline.part(self.splits, self.keys, true));
        let (all_files, all_rows) = files(&mut self.splits.iter().zip(self.keys));
        let changed = differences.in_words();
        Skipping {
            new_files,
            new_events,
            changed,
            files: new_files,
            rows: new_events,
            all_files,
            all_rows,
            ..Skipping::default()
        }
    }
}

impl Skipping {
    /// Counts splits that are looked at.
    fn count(&mut self, splits: &[(&Split, &SplitKeys)]) {
        let names: BTreeSet<_> = splits.iter().map(|(split, _)| &split.name).collect();
        self.files += names.len() as u64;
        self.rows += splits.iter().map(|(_, keys)| keys.rows).sum::<u64>();
    }
}
