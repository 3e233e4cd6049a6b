//! The passes of an incremental run over the source.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use rustc_hash::{FxHashMap, FxHashSet};

use super::choice::{Chosen, CustomerChoice, KeyChoice};
use super::kept::Kept;
use super::marks::MarkScan;
use super::separable::Separable;
use super::snapshot::{Differences, Snapshot};
use super::{Baseline, Marks, Skipping};
use crate::model::basis::Scope;
use crate::model::window::Span;
use crate::pipeline::context::Context;
use crate::pipeline::deduplicate::key_hash;
use crate::pipeline::enrich::Enricher;
use crate::pipeline::keys::{CameAgain, KeyHashes, SplitKeys, divided};
use crate::pipeline::matcher::Matcher;
use crate::pipeline::past::{Coverage as PastCoverage, Knowledge};
use crate::pipeline::read::{check_stable, merge_workers};
use crate::pipeline::{Completeness, Inputs, Request, Timeline, scan};
use crate::source::{EventBatch, EventRef, Field, Moved, Names, RowChoice, Split, Wanted};

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
    /// New events of which older splits have copies.
    pub again: Again,
}

/// Events that came again.
#[derive(Debug, Default)]
pub struct Again {
    hashes: FxHashSet<u64>,
    /// Hashes of their keys, tenants and ids; nothing where copies may have other ones.
    names: BTreeSet<(u64, String, String)>,
}

impl Again {
    /// The names of all keys with these hashes, if they are known.
    fn names(&self, hashes: &FxHashSet<u64>) -> Option<Names> {
        let known: FxHashSet<u64> = self.names.iter().map(|(hash, ..)| *hash).collect();
        let names = self.names.iter().filter(|(hash, ..)| hashes.contains(hash));
        let names = || names.map(|(_, tenant, id)| (tenant.clone(), id.clone())).collect();
        hashes.is_subset(&known).then(names)
    }
}

/// Finds the names of events that came again; each thread has one.
struct NameScan<'c> {
    key: &'c [Field],
    hashes: &'c FxHashSet<u64>,
    names: BTreeSet<(u64, String, String)>,
}

impl<'c> NameScan<'c> {
    fn new(key: &'c [Field], hashes: &'c FxHashSet<u64>) -> Self {
        NameScan { key, hashes, names: BTreeSet::new() }
    }

    fn visit(&mut self, event: &EventRef<'_>) {
        // Copies of another key can be of another tenant.
        if self.hashes.is_empty() || !self.key.contains(&Field::TenantId) {
            return;
        }
        if let (Some(hash), Some(tenant), Some(id)) = (key_hash(self.key, event), event.tenant_id, event.id)
            && self.hashes.contains(&hash)
        {
            self.names.insert((hash, tenant.to_owned(), id.to_owned()));
        }
    }
}

/// Reads what an incremental run needs.
pub struct Passes<'p> {
    pub inputs: &'p Inputs<'p>,
    pub baseline: &'p Baseline<'p>,
    pub splits: &'p [Split],
    pub keys: &'p [SplitKeys],
    pub came_again: &'p CameAgain,
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
        kept: Option<&Kept>,
        timeline: &mut Timeline<'_>,
    ) -> Result<Marked> {
        let Inputs { job, reference, source, threads, progress, .. } = *self.inputs;
        let before = &self.baseline.snapshot;
        let differences = before.differences(now);
        let mut marks = Marks::new(reference, self.baseline.run.known());
        marks.add_differences(&differences, reference, reach);
        let levels_until = crate::model::timestamp::Timestamp::from_nanos(before.levels_until);
        marks.add_levels(reference, levels_until, range.end);

        let enricher = Enricher::new(reference, Scope::default());
        let separable = Separable::new(reference, job.timezone, kept.is_some());
        let (new, new_rows) = self.new_splits();
        let skipping = self.skipping(&differences);
        let changed = marks.choice(reference);
        let again = timeline.step("mark", Some(skipping.new_events), || {
            let key = &job.deduplicate.key;
            let CameAgain { hashes, holders } = self.came_again;
            let holders = self.splits.iter().zip(self.keys).zip(holders).filter(|(_, holds)| **holds).map(|(split, _)| split);
            let new_scans = || (MarkScan::new(&enricher, &separable, false), NameScan::new(key, hashes));
            let visit = |(scan, names): &mut (MarkScan<'_, '_>, NameScan<'_>), _: usize, batch: &EventBatch| {
                let mut slots = Vec::new();
                scan.begin_batch();
                for event in batch.rows() {
                    scan.visit(&event, &mut slots);
                    names.visit(&event);
                }
                Ok(())
            };
            let fields = MarkScan::wanted(&enricher, key);
            let wanted = Wanted::Keys(&fields);
            let (scans, rows) = scan::scan(source, &new, wanted, threads, &|rows| progress.rows(rows), new_scans, visit)?;
            check_stable(&new, &new_rows, &rows)?;
            let mut names = BTreeSet::new();
            for (scan, found) in scans {
                marks.add_events(scan);
                names.extend(found.names);
            }

            let again = Again { hashes: hashes.clone(), names };
            let choice = KeyChoice::new(key, again.hashes.clone(), None);
            let choice = match again.names(&again.hashes) {
                Some(names) => choice.of(names),
                None => choice,
            };
            let (chosen, splits) = Chosen::new(source, &choice, holders);
            let visit = |scan: &mut MarkScan<'_, '_>, _: usize, batch: &EventBatch| {
                let mut slots = Vec::new();
                scan.begin_batch();
                batch.rows().filter(|event| choice.wants(event)).for_each(|event| scan.visit(&event, &mut slots));
                Ok(())
            };
            let new_scan = || MarkScan::new(&enricher, &separable, true);
            let (scans, _) = scan::scan(&chosen, &splits, Wanted::Whole, threads, &|_| {}, new_scan, visit)?;
            scans.into_iter().for_each(|scan| marks.add_events(scan));
            Ok((again, rows.iter().sum()))
        })?;
        Ok(Marked { marks, changed, differences, skipping, again })
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
    /// every copy of their keys, undecided. Of some events that came `again` the names are known.
    ///
    /// # Errors
    /// Where the source cannot be read.
    pub fn enrich<'c, 'r>(
        &self,
        context: &'c Context<'r>,
        past: &[PastCoverage<'_>],
        (choice, again): (&CustomerChoice, &Again),
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

        let mut looked_at = LookedAt::default();
        self.baseline.part(self.splits, self.keys, true).for_each(|part| looked_at.add(part));
        let mut read_chosen = |choice: &dyn RowChoice, splits: Vec<(&'p Split, &'p SplitKeys)>| {
            splits.iter().for_each(|part| looked_at.add(*part));
            (skipping.files, skipping.rows) = (looked_at.files.len() as u64, looked_at.rows);
            let (chosen, splits) = Chosen::new(source, choice, splits.into_iter());
            let visit = |matcher: &mut Matcher<'c, 'r>, index: usize, batch: &EventBatch| {
                let known = knowledge(&splits, index);
                matcher.visit_chosen(batch, choice, |time, ingested_at| known.holds(time, ingested_at))
            };
            scan::scan(&chosen, &splits, Wanted::Whole, threads, &count_rows, new_worker, visit).map(|(workers, _)| workers)
        };
        workers.extend(read_chosen(choice, self.old().filter(|(_, keys)| choice.may_want(keys)).collect())?);
        let mut seen = merge_workers(context, workers);

        // Copies that lie elsewhere may be the ones to keep. Where all have names, others may
        // still share the hash of a key.
        let missing = self.missing_copies(&seen.copies);
        let names = again.names(&missing);
        for by_name in names.as_ref().map(Some).into_iter().chain([None]) {
            let missing = self.missing_copies(&seen.copies);
            if missing.is_empty() {
                break;
            }
            let holders = self.holders(&missing);
            let choice = KeyChoice::new(&context.rules.key, missing, Some(choice));
            let choice = match by_name {
                Some(names) => choice.of(names.clone()),
                None => choice.without(names.as_ref()),
            };
            let workers = read_chosen(&choice, holders)?;
            seen.merge(merge_workers(context, workers));
        }
        let missing = self.missing_copies(&seen.copies).len();
        if missing > 0 {
            bail!(Moved(format!("{missing} events that came again, or share a key with others, are not where they were")));
        }
        Ok(seen)
    }

    /// Old splits that have one of these hashes.
    fn holders(&self, hashes: &FxHashSet<u64>) -> Vec<(&'p Split, &'p SplitKeys)> {
        let list = KeyHashes::of(hashes.iter().copied().collect());
        let holds = |keys: &SplitKeys| {
            let mut any = false;
            keys.hashes.count_all(&list, |_| any = true);
            any
        };
        self.old().filter(|(_, keys)| holds(keys)).collect()
    }

    /// The hashes of which more copies exist than were read.
    fn missing_copies(&self, seen: &FxHashMap<u64, u64>) -> FxHashSet<u64> {
        let list = KeyHashes::of(seen.keys().copied().collect());
        let found = divided(self.keys.len(), self.inputs.threads, |splits| {
            let mut found = Vec::new();
            self.keys.get(splits).into_iter().flatten().for_each(|keys| keys.hashes.count_all(&list, |hash| found.push(hash)));
            found
        });
        let mut counts: FxHashMap<u64, u64> = FxHashMap::default();
        found.into_iter().flatten().for_each(|hash| *counts.entry(hash).or_default() += 1);
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

/// Splits that were opened for their events, however often.
#[derive(Default)]
struct LookedAt<'p> {
    files: BTreeSet<&'p str>,
    splits: BTreeSet<String>,
    rows: u64,
}

impl<'p> LookedAt<'p> {
    fn add(&mut self, (split, keys): (&'p Split, &'p SplitKeys)) {
        self.files.insert(&split.name);
        if self.splits.insert(split.label()) {
            self.rows += keys.rows;
        }
    }
}
