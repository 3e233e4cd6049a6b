//! Publishing without transactions, and what to do after a crash.
//!
//! ```text
//! corrections -> write_ahead -> run "publishing" -> windows, periods, dead letters, states -> run "succeeded"
//! ```
//!
//! The ledger is written first. Once the run is marked as publishing, ledger and
//! write-ahead rows are whole: whoever comes next finishes the work from them. A
//! run without the mark has changed no aggregate: its rows are taken away. Every
//! insert carries a token, so that repeating one does nothing. All of it is for the
//! holder of the job's lease, who looks before each insert whether it is to be renewed.

use anyhow::{Context, Result};
use bytes::Bytes;

use super::lease::Lease;
use super::rows;
use crate::clickhouse_client::{Database, literal};
use crate::fault::{FaultKind, fault};
use crate::model::run::RunRecord;
use crate::store::{Publication, StoredDeadLetter};

/// Rows of one insert.
const CHUNK: usize = 50_000;

/// The tables that a publication fills from its write-ahead rows, in this order.
const TARGETS: [&str; 4] = ["usage_windows", "usage_periods", "dead_letters", "job_state"];

/// Returns the run as it was recorded.
///
/// # Errors
/// Where the store cannot be written or somebody else has taken the lease over: a fault of a partial
/// publication (exit code 5) where the run is marked as publishing.
pub(super) fn publish(lease: &mut Lease<'_>, publication: &Publication, known: &[StoredDeadLetter]) -> Result<RunRecord> {
    let ledger = publication.ledger();
    let run = &publication.run.in_ledger(ledger.chain);
    let corrections = (1usize..).zip(publication.corrections.iter().zip(&ledger.rows));
    let corrections = corrections.map(|(at, (correction, digest))| rows::correction(run, at, correction, *digest));
    insert(lease, "corrections", &run.run_id, corrections)?;
    let periods = (1usize..).zip(&publication.period_corrections);
    let periods = periods.map(|(at, correction)| rows::period_correction(run, at, correction));
    insert(lease, "period_corrections", &run.run_id, periods)?;

    let letters = rows::dead_letters(publication, known);
    for target in TARGETS {
        let ahead = (0u64..).zip(lines(publication, &letters, target)).map(|(sequence, row)| {
            serde_json::json!({"job": run.job, "run_id": run.run_id, "target": target, "sequence": sequence, "row": row})
                .to_string()
        });
        insert(lease, "write_ahead", &format!("{}:{target}", run.run_id), ahead)?;
    }
    // Who took the lease over took the ledger's rows for those of a killed run.
    lease.confirm().with_context(|| format!("run {} is not published: run again", run.run_id))?;
    let partial = |error: anyhow::Error| {
        let message = format!("run {} is partly published: {error:#}; `trueup resume JOB` finishes it", run.run_id);
        fault(FaultKind::Partial, message)
    };
    if let Err(error) = insert(lease, "runs", &format!("{}:1", run.run_id), [rows::run(run, 1)]) {
        // The answer is lost, perhaps not the row.
        let (job, run_id) = (literal(&run.job), literal(&run.run_id));
        let marked = first_column(lease.database, &format!("SELECT run_id FROM runs WHERE job = {job} AND run_id = {run_id}"));
        return Err(if marked.is_ok_and(|rows| rows.is_empty()) { error } else { partial(error) });
    }

    // From here on the run will be published, by this process or by the next one.
    let mut finish = || {
        for target in TARGETS {
            insert(lease, target, &run.run_id, lines(publication, &letters, target))?;
        }
        insert(lease, "runs", &format!("{}:2", run.run_id), [rows::run(run, 2)])?;
        forget(lease, Some(&run.run_id))
    };
    finish().map_err(partial)?;
    Ok(run.clone())
}

/// Whether a killed run, or one that publishes now, left anything to finish or to take back.
///
/// # Errors
/// Where the store cannot be read.
pub(super) fn is_pending(database: &Database, job: &str) -> Result<bool> {
    let job = literal(job);
    let orphans = |ledger| {
        format!("SELECT 1 FROM {ledger} WHERE job = {job} AND run_id NOT IN (SELECT run_id FROM runs WHERE job = {job})")
    };
    let sql = format!(
        "SELECT 1 FROM (SELECT max(stage) AS last FROM runs WHERE job = {job} GROUP BY run_id) WHERE last = 1 LIMIT 1 \
         UNION ALL {} LIMIT 1 UNION ALL {} LIMIT 1 UNION ALL SELECT 1 FROM write_ahead WHERE job = {job} LIMIT 1",
        orphans("corrections"),
        orphans("period_corrections")
    );
    Ok(!first_column(database, &sql)?.is_empty())
}

/// The first run that is marked as publishing.
///
/// # Errors
/// Where the store cannot be read.
pub(super) fn unfinished(database: &Database, job: &str) -> Result<Option<String>> {
    let job = literal(job);
    let sql = format!("SELECT run_id FROM runs WHERE job = {job} GROUP BY run_id HAVING max(stage) = 1 ORDER BY run_id LIMIT 1");
    Ok(first_column(database, &sql)?.into_iter().next())
}

/// Finishes or takes back what a killed run left.
///
/// # Errors
/// Where the store cannot be written, or somebody else has taken the lease over.
pub(super) fn recover(lease: &mut Lease<'_>) -> Result<()> {
    let (database, job_literal) = (lease.database, literal(lease.job));
    let marked = format!("SELECT run_id FROM runs FINAL WHERE job = {job_literal} AND stage = 1 ORDER BY version");
    for run in first_column(database, &marked)? {
        tracing::warn!(run, "finishing the publication of a run that was interrupted");
        for target in TARGETS {
            // The same chunks, with the same tokens, as the run itself would have sent.
            for at in 0.. {
                let first = at * CHUNK;
                let sql = format!(
                    "SELECT row FROM write_ahead FINAL WHERE job = {job_literal} AND run_id = {} AND target = '{target}' \
                     AND sequence >= {first} AND sequence < {} ORDER BY sequence",
                    literal(&run),
                    first + CHUNK
                );
                let rows = first_column(database, &sql)?;
                if rows.is_empty() {
                    break;
                }
                insert_chunk(lease, target, &run, at, &mut rows.into_iter())?;
            }
        }
        database
            .execute(&format!(
                "INSERT INTO runs SELECT * REPLACE ('succeeded' AS status, 2 AS stage) FROM runs FINAL WHERE job = {job_literal} AND run_id = {}",
                literal(&run)
            ))
            .with_context(|| format!("finishing run {run}"))?;
    }
    let published = format!("SELECT run_id FROM runs FINAL WHERE job = {job_literal}");
    for ledger in ["corrections", "period_corrections"] {
        let orphans = format!("SELECT DISTINCT run_id FROM {ledger} WHERE job = {job_literal} AND run_id NOT IN ({published})");
        for run in first_column(database, &orphans)? {
            tracing::warn!(run, "taking back the ledger rows of a run that was interrupted before it published");
            lease.keep()?;
            database.execute(&format!(
                "DELETE FROM {ledger} WHERE job = {job_literal} AND run_id = {} SETTINGS lightweight_deletes_sync = 2",
                literal(&run)
            ))?;
        }
    }
    forget(lease, None)
}

/// Write-ahead rows, of a run or of all, are of use only while their run publishes.
fn forget(lease: &mut Lease<'_>, run_id: Option<&str>) -> Result<()> {
    let run = run_id.map(|run_id| format!(" AND run_id = {}", literal(run_id))).unwrap_or_default();
    let left = format!("write_ahead WHERE job = {}{run}", literal(lease.job));
    if first_column(lease.database, &format!("SELECT 1 FROM {left} LIMIT 1"))?.is_empty() {
        return Ok(());
    }
    lease.keep()?;
    lease.database.execute(&format!("DELETE FROM {left} SETTINGS lightweight_deletes_sync = 2"))
}

fn first_column(database: &Database, sql: &str) -> Result<Vec<String>> {
    Ok(database.texts(sql)?.1.into_iter().filter_map(|row| row.into_iter().next().flatten()).collect())
}

/// The rows of a publication for one of [`TARGETS`]. They are made when they are sent:
/// twice, but never all of them at once.
fn lines<'p>(publication: &'p Publication, letters: &'p [String], target: &str) -> Box<dyn Iterator<Item = String> + 'p> {
    let run = &publication.run;
    match target {
        "usage_windows" => {
            let windows = publication.upserts.iter().map(|row| rows::window(run, row));
            Box::new(windows.chain(publication.retractions.iter().map(|key| rows::retracted_window(run, key))))
        }
        "usage_periods" => {
            let periods = publication.period_upserts.iter().map(|row| rows::period(run, row));
            Box::new(periods.chain(publication.period_deletions.iter().map(|key| rows::removed_period(run, key))))
        }
        "dead_letters" => Box::new(letters.iter().cloned()),
        _ => Box::new(publication.states.iter().map(|(name, content)| rows::state(run, name, content))),
    }
}

/// Inserts lines of JSON in chunks. `token` and the chunk's place name each of them.
fn insert(lease: &mut Lease<'_>, table: &str, token: &str, lines: impl IntoIterator<Item = String>) -> Result<()> {
    let mut lines = lines.into_iter();
    let mut at = 0;
    while insert_chunk(lease, table, token, at, &mut lines)? {
        at += 1;
    }
    Ok(())
}

/// Inserts the next rows; whether there were any.
fn insert_chunk(
    lease: &mut Lease<'_>,
    table: &str,
    token: &str,
    at: usize,
    lines: &mut dyn Iterator<Item = String>,
) -> Result<bool> {
    let mut data = String::new();
    for line in lines.take(CHUNK) {
        data.push_str(&line);
        data.push('\n');
    }
    if data.is_empty() {
        return Ok(false);
    }
    let sql = format!("INSERT INTO {table} FORMAT JSONEachRow");
    lease.keep()?;
    lease
        .database
        .insert(&sql, &format!("{token}:{table}:{at}"), &Bytes::from(data))
        .with_context(|| format!("writing {table}"))?;
    Ok(true)
}
