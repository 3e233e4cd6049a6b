//! `trueup apply`

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::output::{Style, counted, emit, emit_json};
use super::{Format, Session};
use crate::config::Job;
use crate::ends;
use crate::model::run::RunRecord;
use crate::pipeline::saved::SavedPlan;

#[derive(Debug, Args)]
pub struct ApplyArguments {
    /// A plan saved by `trueup plan JOB --out FILE`.
    plan: PathBuf,

    /// Publish even if the change is larger than the job's guard allows.
    #[arg(long)]
    yes: bool,
}

#[derive(Debug, Serialize)]
struct Document<'a> {
    schema: &'static str,
    run_id: &'a str,
    job: &'a str,
    status: &'a str,
    counts: &'a Value,
}

pub fn execute(session: &Session, arguments: &ApplyArguments) -> Result<u8> {
    let saved = SavedPlan::read(&arguments.plan)?;
    let job = Job::load_in(&saved.job_path, saved.environment.as_deref())?;
    let run = ends::apply(&job, &arguments.plan, saved, arguments.yes)?;
    match session.format {
        Format::Json => emit_json(&Document {
            schema: "trueup.apply/1",
            run_id: &run.run_id,
            job: &run.job,
            status: &run.status,
            counts: &run.counts,
        })?,
        Format::Text => emit(&text(&job, &run)?)?,
    }
    Ok(0)
}

fn text(job: &Job, run: &RunRecord) -> Result<String> {
    let style = Style::for_stdout();
    let rows = |name: &str| run.counts.get("rows").and_then(|rows| rows.get(name)).and_then(Value::as_u64).unwrap_or_default();
    let changed = rows("inserted") + rows("updated") + rows("retracted") + rows("adjusted");
    let mut out = String::new();
    writeln!(
        out,
        "{} published {} as planned",
        style.bold(&format!("trueup apply {}:", job.name)),
        counted(changed, "correction")
    )?;
    writeln!(
        out,
        "  {} {} inserted, {} updated, {} retracted, {} unchanged",
        style.dim("windows     "),
        rows("inserted"),
        rows("updated"),
        rows("retracted"),
        rows("unchanged")
    )?;
    writeln!(out, "  {} {}", style.dim("run         "), run.run_id)?;
    Ok(out)
}
