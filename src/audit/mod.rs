//! Proving that the store says what the events and the ledger say.

pub mod explain;
pub mod report;

use std::collections::BTreeMap;

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};

use crate::model::aggregate::{Cause, CorrectionKind, PeriodKey, PeriodRow, Values, WindowKey};
use crate::model::run::{LedgerChain, LedgerLine, LedgerText, RunRecord, period_texts, row_digest, state_digest, window_digest};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::store::{AggregateStore, PeriodEntry, Stamp};

/// Something that the ledger does not bear out.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// The table.
    pub table: &'static str,
    /// The row.
    pub row: String,
    pub problem: String,
}

/// Checks that the ledger's chain is whole, and that replaying it gives the stored
/// table (promise 5).
///
/// # Errors
/// Where the store cannot be read.
pub fn check_ledger(store: &dyn AggregateStore, job: &str) -> Result<Vec<Finding>> {
    let runs = store.runs(job)?;
    let mut chains: FxHashMap<String, LedgerChain> = FxHashMap::default();
    let mut previous = "";
    for run in &runs {
        chains.insert(run.run_id.clone(), LedgerChain::new(previous, run));
        previous = &run.ledger_digest;
    }
    let order: FxHashMap<&str, (usize, &RunRecord)> =
        runs.iter().enumerate().map(|(at, run)| (run.run_id.as_str(), (at, run))).collect();
    let mut findings = Vec::new();
    let mut rows: FxHashMap<WindowKey, Written> = FxHashMap::default();
    let mut buffer = Vec::new();
    let mut last_run = 0;
    let mut numbers = Numbers::default();
    let mut line = LedgerText::default();
    store.ledger(job, &mut |entry| {
        let mut find = |problem: String| {
            findings.push(Finding { table: "corrections", row: entry.correction_id.clone(), problem });
        };
        let of_run = order.get(entry.run_id.as_str()).copied();
        let Some((chain, (at, run))) = chains.get_mut(&entry.run_id).zip(of_run) else {
            find(format!("belongs to run {}, which is not in runs", entry.run_id));
            return Ok(());
        };
        if at < last_run {
            find("is out of order".to_owned());
        }
        if entry.recorded_at != run.finished_at {
            find(misdated(entry.recorded_at, run));
        }
        numbers.check(&entry.correction_id, &entry.run_id).into_iter().for_each(&mut find);
        last_run = last_run.max(at);
        let (period_start, window_start) = (entry.key.period.period_start.to_string(), entry.key.window_start.to_string());
        let period = &entry.key.period;
        line.set(&LedgerLine {
            texts: [
                &period.tenant_id,
                &period.subscription_id,
                &period.meter_id,
                &period.price_id,
                &period.dimensions,
                &period_start,
                &window_start,
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
        if line.row_digest() != entry.row_digest {
            find("was altered after it was written".to_owned());
        }
        chain.add(&line);
        if entry.kind == CorrectionKind::Adjust.name() {
            return Ok(());
        }
        let known = match entry.after {
            Some(values) => {
                rows.insert(entry.key.clone(), Written { values, digest: entry.after_digest, run_id: entry.run_id.clone() })
            }
            None => rows.remove(&entry.key),
        };
        let known = known.map(|written| written.values);
        // A run that repaired an altered store says so, and starts from what it found.
        let is_repair = entry.causes.contains(Cause::StoreAltered.name());
        if known != entry.before && !is_repair {
            find("starts from other values than the correction before it left".to_owned());
        }
        Ok(())
    })?;
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
    compare_with_table(store, job, rows, &order, &mut buffer, &mut findings)?;
    compare_periods(store, job, periods, &order, &mut findings)?;
    check_states(store, job, &runs, &mut findings)?;
    check_dead_letters(store, job, runs.last(), &mut findings)?;
    let lost = store.lost_corrections(job)?.into_iter();
    findings.extend(lost.map(|(table, row)| Finding { table, row, problem: "does not lead to its corrections".to_owned() }));
    Ok(findings)
}

/// What the ledger says of a row of `usage_windows`.
struct Written {
    values: Values,
    digest: Option<i64>,
    run_id: String,
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

fn compare_with_table(
    store: &dyn AggregateStore,
    job: &str,
    mut replayed: FxHashMap<WindowKey, Written>,
    runs: &FxHashMap<&str, &RunRecord>,
    buffer: &mut Vec<u8>,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let everything = Span { start: Timestamp::MIN, end: Timestamp::MAX };
    let everything = store.extent(job)?.unwrap_or(everything);
    let misdated: FxHashSet<WindowKey> = store.misdated_windows(job)?.into_iter().collect();
    for stored in store.windows(job, everything)? {
        let problem = match replayed.remove(&stored.row.key) {
            Some(Written { values, .. }) if values != Values::from(&*stored.row) => format!(
                "holds quantity {} and cost {}, the ledger says {} and {}",
                stored.row.quantity, stored.row.cost, values.quantity, values.cost
            ),
            Some(Written { digest: Some(digest), .. }) if digest != window_digest(&stored.row, buffer) => {
                "was altered after it was written: its customer, currency, ends or digests are others".to_owned()
            }
            Some(Written { run_id, .. }) => {
                let version = runs.get(run_id.as_str()).map(|run| run.version);
                if *run_id != *stored.run_id || version != Some(stored.version) {
                    format!("names run {} and version {}, the ledger says run {run_id}", stored.run_id, stored.version)
                } else if misdated.contains(&stored.row.key) {
                    format!("was altered after it was written: updated_at is not the time of run {run_id}")
                } else {
                    continue;
                }
            }
            None => "is not in the ledger".to_owned(),
        };
        findings.push(Finding { table: "usage_windows", row: describe(&stored.row.key), problem });
    }
    let mut missing: Vec<_> = replayed.into_keys().collect();
    missing.sort();
    findings.extend(missing.iter().map(|key| Finding {
        table: "usage_windows",
        row: describe(key),
        problem: "is in the ledger, but not in the table".to_owned(),
    }));
    Ok(())
}

/// A window's key for people.
pub fn describe(key: &WindowKey) -> String {
    format!("{} / {}", describe_accumulation(&key.period), key.window_start)
}

/// A billing period's key for people.
pub fn describe_period(key: &PeriodKey) -> String {
    format!("{} / period {}", describe_accumulation(key), key.period_start)
}

fn describe_accumulation(period: &PeriodKey) -> String {
    let mut text = format!("{} / {} / {}", period.tenant_id, period.subscription_id, period.meter_id);
    if &*period.dimensions != "{}" {
        text.push_str(&format!(" {}", period.dimensions));
    }
    if !period.price_id.is_empty() {
        text.push_str(&format!(" / {}", period.price_id));
    }
    text
}
