//! `trueup check`

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::output::{Style, counted, emit, emit_json};
use super::{Format, Session};
use crate::ends;
use crate::reference::Reference;
use crate::source::Selection;

#[derive(Debug, Serialize)]
struct Document<'c> {
    schema: &'static str,
    job: &'c str,
    status: &'static str,
    meters: usize,
    prices: usize,
    subscriptions: usize,
    files: usize,
    store: String,
    store_exists: bool,
    warnings: &'c [String],
}

pub fn execute(session: &Session, path: &Path) -> Result<u8> {
    let job = session.job(path)?;
    let reference = Reference::load(&job)?;
    let splits = ends::source(&job)?.splits(&Selection::default())?;
    let files: std::collections::BTreeSet<_> = splits.iter().map(|split| &split.name).collect();
    let store_exists = ends::read_store(&job)?.is_some();
    if session.format == Format::Json {
        emit_json(&Document {
            schema: "trueup.check/1",
            job: &job.name,
            status: "ok",
            meters: reference.meters.len(),
            prices: reference.prices.len(),
            subscriptions: reference.subscriptions.len(),
            files: files.len(),
            store: ends::store_name(&job),
            store_exists,
            warnings: &reference.warnings,
        })?;
        return Ok(0);
    }
    let style = Style::for_stdout();
    let mut out = String::new();
    writeln!(out, "{} {}", style.bold(&format!("trueup check {}:", job.name)), style.green("ok"))?;
    let reference_sizes = [
        counted(reference.meters.len() as u64, "meter"),
        counted(reference.prices.len() as u64, "price"),
        counted(reference.subscriptions.len() as u64, "subscription"),
    ];
    writeln!(out, "  reference    {}", reference_sizes.join(", "))?;
    writeln!(out, "  source       {}", counted(files.len() as u64, "file"))?;
    let state = if store_exists { "exists" } else { "will be created by the first run" };
    writeln!(out, "  store        {} ({state})", ends::store_name(&job))?;
    if let Some(schedule) = &job.schedule {
        writeln!(out, "  schedule     {} ({})", schedule.cron.as_str(), schedule.timezone)?;
    }
    for warning in &reference.warnings {
        writeln!(out, "  warning      {}", style.yellow(warning))?;
    }
    emit(&out)?;
    Ok(0)
}
