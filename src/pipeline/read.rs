//! Reading the source twice: the keys of all events, then the events themselves.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, anyhow, bail};
use rustc_hash::FxHashSet;

use super::context::Context;
use super::deduplicate::RepeatedKeys;
use super::keys::{CameAgain, KeyHashes, KeyReader, SplitKeys};
use super::matcher::Matcher;
use super::past::{Coverage, Knowledge};
use super::{Inputs, Timeline, held, scan};
use crate::model::timestamp::Timestamp;
use crate::source::{EventBatch, Split, Wanted};
use crate::workers;

/// The keys of all events.
pub(super) struct Keys {
    pub repeated: RepeatedKeys,
    pub extent: Option<(Timestamp, Timestamp)>,
    /// Of an incremental run.
    pub came_again: CameAgain,
    pub splits: Vec<SplitKeys>,
}

impl Keys {
    fn new(repeated: FxHashSet<u64>, came_again: CameAgain, splits: Vec<SplitKeys>) -> Keys {
        let extents = splits.iter().filter_map(|keys| keys.extent);
        let extent = extents.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
        Keys { repeated: RepeatedKeys::new(repeated), extent, came_again, splits }
    }
}

/// Reads the keys of all events, and finds those that repeat.
pub(super) fn read_keys(inputs: &Inputs<'_>, splits: &[Split], timeline: &mut Timeline<'_>) -> Result<Keys> {
    let announced = splits.iter().map(|split| split.announced_rows).sum();
    timeline.step("read keys", announced, || {
        let keys = scan_keys(inputs, splits)?;
        let total = keys.iter().map(|keys| keys.rows).sum();
        let repeated = KeyHashes::repeated(keys.iter().map(|keys| &keys.hashes), inputs.threads);
        Ok((Keys::new(repeated, CameAgain::default(), keys), total))
    })
}

pub(super) fn scan_keys(inputs: &Inputs<'_>, splits: &[Split]) -> Result<Vec<SplitKeys>> {
    let Inputs { job, source, threads, progress, .. } = *inputs;
    let key = &job.deduplicate.key;
    let visit = |reader: &mut KeyReader, split: usize, batch: &EventBatch| {
        reader.visit(split, key, batch);
        Ok(())
    };
    let count_rows = |rows| progress.rows(rows);
    let (readers, _) = scan::scan(source, splits, Wanted::Keys(key), threads, &count_rows, KeyReader::default, visit)?;
    Ok(KeyReader::finish(readers, splits.len()))
}

/// As [`read_keys`], but reads only the splits whose keys are not known yet.
pub(super) fn known_keys(inputs: &Inputs<'_>, splits: &[Split], is_new: &[bool], timeline: &mut Timeline<'_>) -> Result<Keys> {
    let fields = &inputs.job.deduplicate.key;
    timeline.step("read keys", None, || {
        let mut known: Vec<_> = splits.iter().map(|split| inputs.keys.load(fields, split)).collect();
        let unknown: Vec<_> =
            splits.iter().zip(&known).filter(|(_, keys)| keys.is_none()).map(|(split, _)| split.clone()).collect();
        let mut read = scan_keys(inputs, &unknown)?;
        let rows = read.iter().map(|keys| keys.rows).sum();
        read.reverse();
        known.iter_mut().filter(|keys| keys.is_none()).for_each(|keys| *keys = read.pop());
        let keys: Vec<SplitKeys> = known.into_iter().map(Option::unwrap_or_default).collect();
        let old: Vec<_> = splits.iter().zip(is_new).filter(|(_, is_new)| !**is_new).map(|(split, _)| split).collect();
        let new = keys.iter().zip(is_new).filter(|(_, is_new)| **is_new).flat_map(|(keys, _)| keys.hashes.iter());
        let new = KeyHashes::of(new.collect());
        let came_again = CameAgain::find(&keys, is_new, &new, inputs.threads);
        let repeated = match inputs.keys.load_repeated(fields, &old) {
            Some(before) => {
                let of_new = KeyHashes::repeated(std::iter::once(&new), inputs.threads);
                before.iter().chain(of_new).chain(came_again.hashes.iter().copied()).collect()
            }
            None => KeyHashes::repeated(keys.iter().map(|keys| &keys.hashes), inputs.threads),
        };
        Ok((Keys::new(repeated, came_again, keys), rows))
    })
}

/// Matches all events with their meters.
pub(super) fn enrich_all<'c, 'r>(
    inputs: &Inputs<'_>,
    context: &'c Context<'r>,
    (splits, keys): (&[Split], &[SplitKeys]),
    coverage: &[Coverage<'_>],
    timeline: &mut Timeline<'_>,
) -> Result<Matcher<'c, 'r>> {
    let Inputs { source, threads, progress, .. } = *inputs;
    let expected: Vec<_> = keys.iter().map(|keys| keys.rows).collect();
    let total = expected.iter().sum();
    timeline.step("enrich", Some(total), || {
        let visit = |matcher: &mut Matcher<'_, '_>, index: usize, batch: &EventBatch| {
            let knowledge = splits.get(index).map_or_else(Knowledge::default, |split| Knowledge::of(split, coverage));
            matcher.visit(batch, |time, ingested_at| knowledge.holds(time, ingested_at))
        };
        let (new_worker, count_rows) = (|| Matcher::new(context), |rows| progress.rows(rows));
        let (workers, rows) = scan::scan(source, splits, Wanted::Whole, threads, &count_rows, new_worker, visit)?;
        check_stable(splits, &expected, &rows)?;
        Ok((resolve(context, merge_workers(context, workers), threads)?, total))
    })
}

/// Merges the threads' work.
pub(super) fn merge_workers<'c, 'r>(context: &'c Context<'r>, workers: Vec<Matcher<'c, 'r>>) -> Matcher<'c, 'r> {
    let mut workers = workers.into_iter();
    let mut seen = workers.next().unwrap_or_else(|| Matcher::new(context));
    workers.for_each(|worker| seen.merge(worker));
    seen
}

/// Decides about keys of several copies, once all of them are read.
pub(super) fn resolve<'c, 'r>(context: &'c Context<'r>, mut seen: Matcher<'c, 'r>, threads: usize) -> Result<Matcher<'c, 'r>> {
    let held = Mutex::new(std::mem::take(&mut seen.held));
    let next = AtomicUsize::new(0);
    let work = || -> Result<Matcher<'c, 'r>> {
        let mut worker = Matcher::new(context);
        let mut part = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= held::PARTS {
                return Ok(worker);
            }
            part.clear();
            held.lock().unwrap_or_else(PoisonError::into_inner).take_part(at, &mut part)?;
            worker.settle(&part)?;
        }
    };
    for worker in workers::spread(threads, work) {
        seen.merge(worker.map_err(|_| anyhow!("a thread that deduplicates panicked: this is a bug in trueup"))??);
    }
    seen.dead_letters.sort_by(|a, b| (&a.key, a.event_time, &a.detail).cmp(&(&b.key, b.event_time, &b.detail)));
    Ok(seen)
}

/// Promise 8: both scans saw the same rows.
pub(super) fn check_stable(splits: &[Split], first: &[u64], second: &[u64]) -> Result<()> {
    for ((split, first), second) in splits.iter().zip(first).zip(second) {
        if first != second {
            bail!("{} had {first} rows and then {second}: it changed while it was read, run again", split.name);
        }
    }
    Ok(())
}
