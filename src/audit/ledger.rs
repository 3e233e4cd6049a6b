//! The ledger: whether its chain is whole, and whether replaying it gives the stored tables.
//!
//! One thread reads, another one checks. Of each row of `usage_windows` that the ledger gives,
//! only digests are held, for there may be very many; where the table differs, the ledger is
//! read once more to say in what.

use std::collections::BTreeMap;
use std::sync::mpsc::sync_channel;
use std::thread;

use anyhow::{Result, anyhow};
use rustc_hash::{FxHashMap, FxHashSet};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::{Finding, describe, describe_period};
use crate::model::aggregate::{Cause, PeriodKey, PeriodRow, StoredWindow, Values, WindowKey};
use crate::model::digest::frame;
use crate::model::run::{LedgerChain, LedgerLine, LedgerText, RunRecord, period_texts, row_digest, state_digest, window_digest};
use crate::model::timestamp::{Timestamp, TimestampText};
use crate::model::window::Span;
use crate::store::{AggregateStore, LedgerEntry, PeriodEntry, Stamp};

/// Checks that the ledger's chain is whole, and that replaying it gives the stored
/// table (promise 5).
///
/// # Errors
/// Where the store cannot be read.
pub fn check_ledger(store: &dyn AggregateStore, job: &str) -> Result<Vec<Finding>> {
    let runs = store.runs(job)?;
    let mut replay = Replay::new(&runs);
    read_ahead(|each| store.ledger(job, each), |entry| replay.add(&entry))?;
    let Replay { mut chains, order, rows, mut findings, .. } = replay;
    let mut periods: FxHashMap<PeriodKey, (PeriodRow, String)> = FxHashMap::default();
    let mut numbers = Numbers::default();
    store.period_ledger(job, &mut |entry| {
        let mut find = |problem: String| {
            findings.push(Finding { table: "period_corrections", row: entry.correction_id.clone(), problem });
        };
        match chains.get_mut(&entry.run_id) {
            Some(chain) => chain.texts(&period_texts(&entry.kind, &entry.before, &entry.after)),
            None => find(format!("belongs to run {}, which is not in runs", entry.run_id)),
        }
        numbers.check(&entry.correction_id, &entry.run_id).into_iter().for_each(&mut find);
        if let Some((_, run)) = order.get(entry.run_id.as_str()).filter(|(_, run)| entry.recorded_at != run.finished_at) {
            find(misdated(entry.recorded_at, run));
        }
        if row_digest(&period_texts(&entry.kind, &entry.before, &entry.after)) != entry.row_digest {
            find("was altered after it was written".to_owned());
        }
        if let Err(error) = replay_period(&mut periods, &entry) {
            find(error);
        }
        Ok(())
    })?;
    for run in &runs {
        let digest = chains.remove(&run.run_id).map(LedgerChain::finish);
        if digest.as_deref() != Some(run.ledger_digest.as_str()) {
            findings.push(Finding {
                table: "runs",
                row: run.run_id.clone(),
                problem: "its ledger digest does not match the run and its corrections: a row was altered, added or removed"
                    .to_owned(),
            });
        }
    }
    let order: FxHashMap<&str, &RunRecord> = order.into_iter().map(|(id, (_, run))| (id, run)).collect();
    compare_windows(store, job, rows, &runs, &mut findings)?;
    compare_periods(store, job, periods, &order, &mut findings)?;
    check_states(store, job, &runs, &mut findings)?;
    check_dead_letters(store, job, runs.last(), &mut findings)?;
    let lost = store.lost_corrections(job)?.into_iter();
    findings.extend(lost.map(|(table, row)| Finding { table, row, problem: "does not lead to its corrections".to_owned() }));
    Ok(findings)
}

/// Reads on this thread while another one takes what was read, in the same order.
fn read_ahead<T: Send>(
    read: impl FnOnce(&mut dyn FnMut(T) -> Result<()>) -> Result<()>,
    mut take: impl FnMut(T) + Send,
) -> Result<()> {
    const BATCH: usize = 1024;
    let (sender, receiver) = sync_channel::<Vec<T>>(2);
    thread::scope(|scope| {
        let taker = scope.spawn(move || receiver.into_iter().flatten().for_each(&mut take));
        let mut batch = Vec::with_capacity(BATCH);
        let result = read(&mut |item| {
            batch.push(item);
            // Nobody takes it where the other thread panicked: joining tells.
            if batch.len() == BATCH && sender.send(std::mem::replace(&mut batch, Vec::with_capacity(BATCH))).is_err() {
                return Err(panicked());
            }
            Ok(())
        });
        let is_taken = sender.send(batch).is_ok();
        drop(sender);
        match taker.join() {
            Ok(()) if is_taken => result,
            _ => Err(panicked()),
        }
    })
}

fn panicked() -> anyhow::Error {
    anyhow!("a thread that checks the ledger panicked: this is a bug in trueup")
}

/// The corrections so far.
struct Replay<'r> {
    chains: FxHashMap<String, LedgerChain>,
    order: FxHashMap<&'r str, (usize, &'r RunRecord)>,
    findings: Vec<Finding>,
    rows: FxHashMap<RowId, Written>,
    /// The place of the last run that a correction was of.
    last_run: usize,
    numbers: Numbers,
    line: LedgerText,
    period_start: TimestampText,
    window_start: TimestampText,
    buffer: Vec<u8>,
}

/// The key of a row of `usage_windows`, by its digest: two keys have the same with a
/// probability of 2^-128.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct RowId(u128);

impl RowId {
    fn of(key: &WindowKey, buffer: &mut Vec<u8>) -> RowId {
        buffer.clear();
        let period = &*key.period;
        for text in [&period.tenant_id, &period.subscription_id, &period.meter_id, &period.price_id, &period.dimensions] {
            frame(buffer, Some(text.as_bytes()));
        }
        buffer.extend(period.period_start.nanos().to_le_bytes());
        buffer.extend(key.window_start.nanos().to_le_bytes());
        RowId(xxh3_128(buffer))
    }
}

/// What the ledger says of a row of `usage_windows`.
struct Written {
    /// The digest of its values.
    values: u64,
    /// [`window_digest`].
    digest: Option<i64>,
    /// The place of the run that wrote it.
    run: u32,
}

impl Written {
    fn values(values: &Values) -> u64 {
        let mut bytes = [0; 40];
        let parts = [values.quantity.to_le_bytes(), values.cost.to_le_bytes()];
        let all = parts.iter().flatten().copied().chain(values.event_count.to_le_bytes());
        bytes.iter_mut().zip(all).for_each(|(place, byte)| *place = byte);
        xxh3_64(&bytes)
    }
}

impl<'r> Replay<'r> {
    fn new(runs: &'r [RunRecord]) -> Self {
        let previous = std::iter::once("").chain(runs.iter().map(|run| run.ledger_digest.as_str()));
        let chains = runs.iter().zip(previous).map(|(run, previous)| (run.run_id.clone(), LedgerChain::new(previous, run)));
        Replay {
            chains: chains.collect(),
            order: runs.iter().enumerate().map(|(at, run)| (run.run_id.as_str(), (at, run))).collect(),
            findings: Vec::new(),
            rows: FxHashMap::default(),
            last_run: 0,
            numbers: Numbers::default(),
            line: LedgerText::default(),
            period_start: TimestampText::default(),
            window_start: TimestampText::default(),
            buffer: Vec::new(),
        }
    }

    fn add(&mut self, entry: &LedgerEntry) {
        let findings = &mut self.findings;
        let mut find = |problem: String| {
            findings.push(Finding { table: "corrections", row: entry.correction_id.clone(), problem });
        };
        let of_run = self.order.get(&*entry.run_id).copied();
        let Some((chain, (at, run))) = self.chains.get_mut(&*entry.run_id).zip(of_run) else {
            return find(format!("belongs to run {}, which is not in runs", entry.run_id));
        };
        if at < self.last_run {
            find("is out of order".to_owned());
        }
        if entry.recorded_at != run.finished_at {
            find(misdated(entry.recorded_at, run));
        }
        self.numbers.check(&entry.correction_id, &entry.run_id).into_iter().for_each(&mut find);
        self.last_run = self.last_run.max(at);
        let period = &entry.key.period;
        self.line.set(&LedgerLine {
            texts: [
                &period.tenant_id,
                &period.subscription_id,
                &period.meter_id,
                &period.price_id,
                &period.dimensions,
                self.period_start.of(period.period_start),
                self.window_start.of(entry.key.window_start),
                &entry.customer_id,
                &entry.currency,
                &entry.kind,
                &entry.causes,
                &entry.replaced,
            ],
            before: entry.before,
            after: entry.after,
            after_digest: entry.after_digest,
        });
        if self.line.row_digest() != entry.row_digest {
            find("was altered after it was written".to_owned());
        }
        chain.add(&self.line);
        if entry.is_adjustment() {
            return;
        }
        let id = RowId::of(&entry.key, &mut self.buffer);
        let known = match &entry.after {
            Some(values) => {
                let run = u32::try_from(at).unwrap_or(u32::MAX);
                self.rows.insert(id, Written { values: Written::values(values), digest: entry.after_digest, run })
            }
            None => self.rows.remove(&id),
        };
        // A run that repaired an altered store says so, and starts from what it found.
        let is_repair = entry.causes.contains(Cause::StoreAltered.name());
        if known.map(|written| written.values) != entry.before.as_ref().map(Written::values) && !is_repair {
            find("starts from other values than the correction before it left".to_owned());
        }
    }
}

/// Corrections are numbered within their run, from 1.
#[derive(Default)]
struct Numbers {
    run_id: String,
    number: u64,
}

impl Numbers {
    /// What is wrong with the id of the correction after the one before.
    fn check(&mut self, correction_id: &str, run_id: &str) -> Option<String> {
        if self.run_id != run_id {
            *self = Numbers { run_id: run_id.to_owned(), number: 0 };
        }
        self.number += 1;
        let number = correction_id.strip_prefix(run_id).and_then(|rest| rest.strip_prefix('-')?.parse().ok());
        let expected = self.number;
        self.number = number.unwrap_or(expected);
        (number != Some(expected)).then(|| format!("is not number {expected} of run {run_id}"))
    }
}

/// What is wrong with a row that should have the time of its run.
fn misdated(says: Timestamp, run: &RunRecord) -> String {
    format!("was altered after it was written: it says {says}, its run {}", run.finished_at)
}

/// Whether states of the job are those that the last runs left.
fn check_states(store: &dyn AggregateStore, job: &str, runs: &[RunRecord], findings: &mut Vec<Finding>) -> Result<()> {
    let mut last: BTreeMap<&str, (&RunRecord, &serde_json::Value)> = BTreeMap::new();
    for run in runs {
        let states = run.counts.get("states").and_then(serde_json::Value::as_object).into_iter().flatten();
        last.extend(states.map(|(name, digest)| (name.as_str(), (run, digest))));
    }
    for (name, (run, digest)) in last {
        let problem = match store.state(job, name)? {
            None => "is missing".to_owned(),
            Some((by, _)) if by != run.run_id => format!("names run {by}, the last that left one is {}", run.run_id),
            Some((_, content)) if digest.as_str() != Some(&state_digest(&content)) => {
                "was altered after it was written".to_owned()
            }
            Some(_) => continue,
        };
        findings.push(Finding { table: "job_state", row: name.to_owned(), problem });
    }
    Ok(())
}

fn check_dead_letters(
    store: &dyn AggregateStore,
    job: &str,
    last: Option<&RunRecord>,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let letters = store.dead_letters(job)?;
    for stored in letters.iter().filter(|stored| stored.digest() != stored.row_digest) {
        let key = &stored.letter.key;
        let row = format!("{} / {} / {} / {}", key.tenant_id, key.event_id, key.meter_id, key.reason.name());
        findings.push(Finding { table: "dead_letters", row, problem: "was altered after it was written".to_owned() });
    }
    let left = last.and_then(|run| run.counts.get("dead_letter_rows")).and_then(serde_json::Value::as_u64);
    if let Some(left) = left.filter(|left| *left != letters.len() as u64) {
        let problem = format!("has {} rows, the last run left {left}", letters.len());
        findings.push(Finding { table: "dead_letters", row: "the table".to_owned(), problem });
    }
    Ok(())
}

/// Applies a change of `usage_periods` to the rows so far.
fn replay_period(rows: &mut FxHashMap<PeriodKey, (PeriodRow, String)>, entry: &PeriodEntry) -> Result<(), String> {
    let [before, after] = entry.rows().map_err(|error| format!("{error:#}"))?;
    let Some(key) = after.as_ref().or(before.as_ref()).map(|row| row.key.clone()) else {
        return Err("holds no row".to_owned());
    };
    let is_of_row = key == entry.key;
    match after {
        _ if entry.is_adjustment() => None,
        Some(after) => rows.insert(key, (after, entry.run_id.clone())),
        None => rows.remove(&key),
    };
    if is_of_row { Ok(()) } else { Err("was altered after it was written: its key is not that of its rows".to_owned()) }
}

fn compare_periods(
    store: &dyn AggregateStore,
    job: &str,
    mut replayed: FxHashMap<PeriodKey, (PeriodRow, String)>,
    runs: &FxHashMap<&str, &RunRecord>,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let everything = Span { start: Timestamp::MIN, end: Timestamp::MAX };
    for (key, stamp) in store.period_stamps(job)? {
        let Some((_, run)) = replayed.get(&key) else { continue };
        let is_of = |run: &&RunRecord| (run.version, run.finished_at) == (stamp.version, stamp.updated_at);
        if *run != stamp.run_id || runs.get(run.as_str()).copied().filter(is_of).is_none() {
            let Stamp { run_id, version, updated_at } = stamp;
            let problem = format!("names run {run_id}, version {version} and time {updated_at}, the ledger says run {run}");
            findings.push(Finding { table: "usage_periods", row: describe_period(&key), problem });
        }
    }
    for stored in store.periods(job, everything)? {
        let problem = match replayed.remove(&stored.key) {
            Some((row, _)) if row == stored => continue,
            Some((row, _)) if (row.quantity, row.cost, row.amount) == (stored.quantity, stored.cost, stored.amount) => {
                "was altered after it was written: its customer, currency, end, adjustments or closing are others".to_owned()
            }
            Some((row, _)) => format!(
                "holds quantity {}, cost {} and amount {}, the ledger says {}, {} and {}",
                stored.quantity, stored.cost, stored.amount, row.quantity, row.cost, row.amount
            ),
            None => "is not in the ledger".to_owned(),
        };
        findings.push(Finding { table: "usage_periods", row: describe_period(&stored.key), problem });
    }
    let mut missing: Vec<_> = replayed.into_keys().collect();
    missing.sort();
    findings.extend(missing.iter().map(|key| Finding {
        table: "usage_periods",
        row: describe_period(key),
        problem: "is in the ledger, but not in the table".to_owned(),
    }));
    Ok(())
}

/// Finds rows of `usage_windows` that are not as the ledger left them.
fn compare_windows(
    store: &dyn AggregateStore,
    job: &str,
    mut replayed: FxHashMap<RowId, Written>,
    runs: &[RunRecord],
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let misdated: FxHashSet<WindowKey> = store.misdated_windows(job)?.into_iter().collect();
    let mut buffer = Vec::new();
    let mut found: Vec<(WindowKey, String)> = Vec::new();
    // What the ledger says of these takes another look.
    let mut others: FxHashMap<RowId, Option<Values>> = FxHashMap::default();
    let rows = |each: &mut dyn FnMut(StoredWindow) -> Result<()>| store.each_window(job, each);
    read_ahead(rows, |stored| {
        let values = Values::from(&*stored.row);
        let id = RowId::of(&stored.row.key, &mut buffer);
        let problem = match replayed.remove(&id) {
            None => "is not in the ledger".to_owned(),
            Some(written) if written.values != Written::values(&values) => {
                others.insert(id, Some(values));
                return;
            }
            Some(Written { digest: Some(digest), .. }) if digest != window_digest(&stored.row, &mut buffer) => {
                "was altered after it was written: its customer, currency, ends or digests are others".to_owned()
            }
            Some(written) => match runs.get(written.run as usize) {
                Some(run) if *run.run_id == *stored.run_id && run.version == stored.version => {
                    if !misdated.contains(&stored.row.key) {
                        return;
                    }
                    format!("was altered after it was written: updated_at is not the time of run {}", run.run_id)
                }
                run => {
                    let run = run.map_or("unknown", |run| &run.run_id);
                    format!("names run {} and version {}, the ledger says run {run}", stored.run_id, stored.version)
                }
            },
        };
        found.push((stored.row.key.clone(), problem));
    })?;
    others.extend(replayed.into_keys().map(|id| (id, None)));
    if !others.is_empty() {
        let mut last: FxHashMap<RowId, (WindowKey, Values)> = FxHashMap::default();
        let known: FxHashSet<&str> = runs.iter().map(|run| run.run_id.as_str()).collect();
        store.ledger(job, &mut |entry| {
            let id = RowId::of(&entry.key, &mut buffer);
            let is_wanted = others.contains_key(&id) && !entry.is_adjustment() && known.contains(&*entry.run_id);
            if let Some(values) = entry.after.filter(|_| is_wanted) {
                last.insert(id, (entry.key, values));
            }
            Ok(())
        })?;
        found.extend(last.into_iter().map(|(id, (key, says))| {
            let problem = match others.get(&id).copied().flatten() {
                None => "is in the ledger, but not in the table".to_owned(),
                Some(holds) if (holds.quantity, holds.cost) == (says.quantity, says.cost) => {
                    format!("holds event_count {}, the ledger says {}", holds.event_count, says.event_count)
                }
                Some(holds) => format!(
                    "holds quantity {} and cost {}, the ledger says {} and {}",
                    holds.quantity, holds.cost, says.quantity, says.cost
                ),
            };
            (key, problem)
        }));
    }
    found.sort_unstable();
    findings.extend(found.into_iter().map(|(key, problem)| Finding { table: "usage_windows", row: describe(&key), problem }));
    Ok(())
}
