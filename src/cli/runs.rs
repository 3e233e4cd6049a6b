//! `trueup runs`

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::output::{Style, emit, emit_json, number, table};
use super::range::shell_path;
use super::{Format, Session};
use crate::ends;
use crate::model::run::{Override, RunRecord};

#[derive(Debug, Serialize)]
struct Document<'r> {
    schema: &'static str,
    job: &'r str,
    runs: Vec<RunDocument<'r>>,
}

#[derive(Debug, Serialize)]
struct RunDocument<'r> {
    run_id: &'r str,
    mode: &'r str,
    status: &'r str,
    range: [Option<String>; 2],
    started_at: String,
    finished_at: String,
    started_by: &'r str,
    overrides: &'r [Override],
    version: i64,
    counts: &'r serde_json::Value,
    ledger_digest: &'r str,
}

pub fn execute(session: &Session, path: &Path) -> Result<u8> {
    let job = session.job(path)?;
    let store = ends::read_store(&job)?;
    let runs = store.as_deref().map_or(Ok(Vec::new()), |store| store.runs(&job.name))?;
    if session.format == Format::Json {
        let runs = runs.iter().map(document).collect();
        emit_json(&Document { schema: "trueup.runs/1", job: &job.name, runs })?;
        return Ok(0);
    }
    if runs.is_empty() {
        emit(&format!("job {} has not run yet: trueup run {}\n", job.name, shell_path(path)))?;
        return Ok(0);
    }
    let rows: Vec<_> = runs.iter().rev().map(row).collect();
    let header = ["run", "started", "status", "range start", "range end", "inserted", "updated", "retracted", "started by"];
    emit(&table(&header, &rows, &[5, 6, 7], Style::for_stdout()))?;
    Ok(0)
}

fn document(run: &RunRecord) -> RunDocument<'_> {
    RunDocument {
        run_id: &run.run_id,
        mode: run.mode.name(),
        status: &run.status,
        range: [run.range.map(|range| range.start.to_string()), run.range.map(|range| range.end.to_string())],
        started_at: run.started_at.to_string(),
        finished_at: run.finished_at.to_string(),
        started_by: &run.origin.started_by,
        overrides: &run.origin.overrides,
        version: run.version,
        counts: &run.counts,
        ledger_digest: &run.ledger_digest,
    }
}

fn row(run: &RunRecord) -> Vec<String> {
    let count = |name: &str| {
        let count = run.counts.get("rows").and_then(|rows| rows.get(name)).and_then(serde_json::Value::as_u64);
        number(count.unwrap_or_default())
    };
    vec![
        run.run_id.clone(),
        run.started_at.utc().format("%Y-%m-%d %H:%M:%SZ").to_string(),
        run.status.clone(),
        run.range.map_or_else(|| "-".to_owned(), |range| range.start.to_string()),
        run.range.map_or_else(|| "-".to_owned(), |range| range.end.to_string()),
        count("inserted"),
        count("updated"),
        count("retracted"),
        run.origin.started_by.clone(),
    ]
}
