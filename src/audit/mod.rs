//! Proving that the store says what the events and the ledger say.

pub mod explain;
pub mod report;

use anyhow::Result;
use rustc_hash::FxHashMap;

use crate::model::aggregate::{Cause, CorrectionKind, PeriodKey, PeriodRow, Values, WindowKey};
use crate::model::run::{LedgerChain, LedgerLine, LedgerText, RunRecord, row_digest};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::store::{AggregateStore, PeriodEntry};

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
    let order: FxHashMap<&str, usize> = runs.iter().enumerate().map(|(at, run)| (run.run_id.as_str(), at)).collect();
    let mut findings = Vec::new();
    let mut rows: FxHashMap<WindowKey, (Values, String)> = FxHashMap::default();
    let mut last_run = 0;
    let mut line = LedgerText::default();
    store.ledger(job, &mut |entry| {
        let mut find = |problem: String| {
            findings.push(Finding { table: "corrections", row: entry.correction_id.clone(), problem });
        };
        let Some(chain) = chains.get_mut(&entry.run_id) else {
            find(format!("belongs to run {}, which is not in runs", entry.run_id));
            return Ok(());
        };
        let at = order.get(entry.run_id.as_str()).copied().unwrap_or_default();
        if at < last_run {
            find("is out of order".to_owned());
        }
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
        });
        if line.row_digest() != entry.row_digest {
            find("was altered after it was written".to_owned());
        }
        chain.add(&line);
        if entry.kind == CorrectionKind::Adjust.name() {
            return Ok(());
        }
        let known = match entry.after {
            Some(after) => rows.insert(entry.key.clone(), (after, entry.run_id.clone())),
            None => rows.remove(&entry.key),
        };
        let known = known.map(|(values, _)| values);
        // A run that repaired an altered store says so, and starts from what it found.
        let is_repair = entry.causes.contains(Cause::StoreAltered.name());
        if known != entry.before && !is_repair {
            find("starts from other values than the correction before it left".to_owned());
        }
        Ok(())
    })?;
    let mut periods: FxHashMap<PeriodKey, PeriodRow> = FxHashMap::default();
    store.period_ledger(job, &mut |entry| {
        let mut find = |problem: String| {
            findings.push(Finding { table: "period_corrections", row: entry.correction_id.clone(), problem });
        };
        match chains.get_mut(&entry.run_id) {
            Some(chain) => chain.texts(&[&entry.before, &entry.after]),
            None => find(format!("belongs to run {}, which is not in runs", entry.run_id)),
        }
        if row_digest(&[&entry.before, &entry.after]) != entry.row_digest {
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
    let versions = runs.iter().map(|run| (run.run_id.as_str(), run.version)).collect();
    compare_with_table(store, job, rows, &versions, &mut findings)?;
    compare_periods(store, job, periods, &mut findings)?;
    check_dead_letters(store, job, runs.last(), &mut findings)?;
    let lost = store.lost_corrections(job)?.into_iter();
    findings.extend(lost.map(|(table, row)| Finding { table, row, problem: "does not lead to its corrections".to_owned() }));
    Ok(findings)
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
fn replay_period(rows: &mut FxHashMap<PeriodKey, PeriodRow>, entry: &PeriodEntry) -> Result<(), String> {
    let row = |json: &str| -> Result<Option<PeriodRow>, String> {
        if json.is_empty() {
            return Ok(None);
        }
        serde_json::from_str(json).map(Some).map_err(|error| format!("holds no row: {error}"))
    };
    let (before, after) = (row(&entry.before)?, row(&entry.after)?);
    let Some(key) = after.as_ref().or(before.as_ref()).map(|row| row.key.clone()) else {
        return Err("holds no row".to_owned());
    };
    match after {
        Some(after) => rows.insert(key, after),
        None => rows.remove(&key),
    };
    Ok(())
}

fn compare_periods(
    store: &dyn AggregateStore,
    job: &str,
    mut replayed: FxHashMap<PeriodKey, PeriodRow>,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let everything = Span { start: Timestamp::MIN, end: Timestamp::MAX };
    for stored in store.periods(job, everything)? {
        let problem = match replayed.remove(&stored.key) {
            Some(row) if row == stored => continue,
            Some(row) => format!(
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
    mut replayed: FxHashMap<WindowKey, (Values, String)>,
    versions: &FxHashMap<&str, i64>,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let everything = Span { start: Timestamp::MIN, end: Timestamp::MAX };
    let everything = store.extent(job)?.unwrap_or(everything);
    for stored in store.windows(job, everything)? {
        let problem = match replayed.remove(&stored.row.key) {
            Some((values, run)) if values == Values::from(&*stored.row) => {
                if *run == *stored.run_id && versions.get(run.as_str()) == Some(&stored.version) {
                    continue;
                }
                format!("names run {} and version {}, the ledger says run {run}", stored.run_id, stored.version)
            }
            Some((values, _)) => format!(
                "holds quantity {} and cost {}, the ledger says {} and {}",
                stored.row.quantity, stored.row.cost, values.quantity, values.cost
            ),
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
