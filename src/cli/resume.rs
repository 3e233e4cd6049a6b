//! `trueup resume`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::output::{Style, emit, emit_json};
use super::progress::Progress;
use super::range::RangeArguments;
use super::{Format, Session, plan, run};
use crate::clock::Stopwatch;
use crate::ends::{self, RunOptions};

#[derive(Debug, Args)]
pub struct ResumeArguments {
    /// The job file.
    job: PathBuf,

    /// Publish even if the change is larger than the job's guard allows.
    #[arg(long)]
    yes: bool,
}

#[derive(Debug, Serialize)]
struct Nothing<'r> {
    schema: &'static str,
    run_id: Option<&'r str>,
    job: &'r str,
    status: &'static str,
}

pub fn execute(session: &Session, arguments: &ResumeArguments) -> Result<u8> {
    let watch = Stopwatch::start();
    let job = session.job(&arguments.job)?;
    let Some(holder) = ends::interrupted(&job)? else {
        match session.format {
            Format::Json => {
                emit_json(&Nothing { schema: "trueup.resume/1", run_id: None, job: &job.name, status: "nothing_to_resume" })?;
            }
            Format::Text => emit(&format!(
                "{} there is nothing to resume\n",
                Style::for_stdout().bold(&format!("trueup resume {}:", job.name))
            ))?,
        }
        return Ok(0);
    };
    tracing::warn!("resuming the run of {holder}, which did not come to its end");
    let request = holder.request.clone().unwrap_or_default();
    let progress = Progress::new(session.quiet);
    let yes = arguments.yes || holder.yes;
    let started_by = ends::started_by("resume");
    let snapshot = holder.snapshot.as_deref();
    let options = RunOptions { threads: session.threads, yes, started_by: &started_by, snapshot, progress: &progress };
    let published = ends::run(&job, &request, &options)?;
    drop(progress);
    run::report(session, &job, &RangeArguments::default(), &published, watch.seconds(), (plan::Title::Resume, false))?;
    Ok(0)
}
