//! `trueup check`

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;

use super::output::{Style, counted, emit, emit_json};
use super::{Format, Session};
use crate::config::{Job, ReferenceTable, Source, Store};
use crate::ends;
use crate::reference::Reference;

#[derive(Debug, Args)]
pub struct CheckArguments {
    /// The job file.
    job: PathBuf,

    /// Also try every connection: servers, tables, columns, topics.
    #[arg(long)]
    connect: bool,
}

#[derive(Debug, Serialize)]
struct Document<'c> {
    schema: &'static str,
    job: &'c str,
    status: &'static str,
    checks: &'c [Check],
    warnings: &'c [String],
}

/// One thing that a job needs.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    /// None where it was not tried.
    ok: Option<bool>,
    says: String,
}

impl Check {
    fn of(name: &'static str, result: Result<String>) -> Check {
        match result {
            Ok(says) => Check { name, ok: Some(true), says },
            Err(error) => Check { name, ok: Some(false), says: format!("{error:#}") },
        }
    }

    fn skipped(name: &'static str) -> Check {
        Check { name, ok: None, says: "not tried: add --connect".to_owned() }
    }
}

pub fn execute(session: &Session, arguments: &CheckArguments) -> Result<u8> {
    let job = session.job(&arguments.job)?;
    let mut warnings = Vec::new();
    let mut checks = Vec::new();
    if arguments.connect || !reference_is_remote(&job) {
        let reference = Reference::load(&job);
        if !arguments.connect {
            // Without a connection to blame, a wrong table is an error of its own.
            warnings.clone_from(&reference.as_ref().map(|reference| reference.warnings.clone()).unwrap_or_default());
            checks.push(Check::of("reference", Ok(sizes(&reference?))));
        } else {
            if let Ok(reference) = &reference {
                warnings.clone_from(&reference.warnings);
            }
            checks.push(Check::of("reference", reference.map(|reference| sizes(&reference))));
        }
    } else {
        checks.push(Check::skipped("reference"));
    }
    checks.push(match &job.source {
        Source::Files { .. } if !arguments.connect => Check::of("source", Ok(ends::source(&job)?.probe()?)),
        _ if !arguments.connect => Check::skipped("source"),
        _ => Check::of("source", ends::source(&job).and_then(|source| source.probe())),
    });
    checks.push(match &job.store {
        Store::Sqlite { .. } if !arguments.connect => Check::of("store", Ok(store(&job)?)),
        Store::ClickHouse { .. } if !arguments.connect => Check::skipped("store"),
        _ => Check::of("store", store(&job)),
    });
    if let Some(schedule) = &job.schedule {
        checks.push(Check::of("schedule", Ok(format!("{} ({})", schedule.cron.as_str(), schedule.timezone))));
    }
    report(session, &job, &checks, &warnings)
}

fn reference_is_remote(job: &Job) -> bool {
    let tables = [&job.reference.customers, &job.reference.subscriptions, &job.reference.meters, &job.reference.prices];
    tables.iter().any(|table| matches!(table, ReferenceTable::Query { .. }))
}

fn sizes(reference: &Reference) -> String {
    let sizes = [
        counted(reference.meters.len() as u64, "meter"),
        counted(reference.prices.len() as u64, "price"),
        counted(reference.subscriptions.len() as u64, "subscription"),
    ];
    sizes.join(", ")
}

fn store(job: &Job) -> Result<String> {
    let state = if ends::read_store(job)?.is_some() { "exists" } else { "will be created by the first run" };
    if let Store::Sqlite { path } = &job.store {
        // A run makes the folders that are missing, and files beside the store.
        let folder = path.ancestors().skip(1).find(|folder| folder.exists()).filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let unwritable = || format!("store {}: {} cannot be written", path.display(), folder.display());
        tempfile::tempfile_in(folder).with_context(unwritable)?;
    }
    Ok(format!("{} ({state})", ends::store_name(job)))
}

fn report(session: &Session, job: &Job, checks: &[Check], warnings: &[String]) -> Result<u8> {
    let failed = checks.iter().any(|check| check.ok == Some(false));
    let status = if failed { "failed" } else { "ok" };
    if session.format == Format::Json {
        emit_json(&Document { schema: "trueup.check/1", job: &job.name, status, checks, warnings })?;
        return Ok(u8::from(failed));
    }
    let style = Style::for_stdout();
    let mut out = String::new();
    let verdict = if failed { style.red(status) } else { style.green(status) };
    writeln!(out, "{} {verdict}", style.bold(&format!("trueup check {}:", job.name)))?;
    for check in checks {
        let says = match check.ok {
            Some(false) => style.red(&format!("fails: {}", check.says)),
            Some(true) => check.says.clone(),
            None => style.dim(&check.says),
        };
        writeln!(out, "  {:<12} {says}", check.name)?;
    }
    for warning in warnings {
        writeln!(out, "  {:<12} {}", "warning", style.yellow(warning))?;
    }
    emit(&out)?;
    Ok(u8::from(failed))
}
