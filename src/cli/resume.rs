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
use crate::config::Job;
use crate::ends::{self, Interrupted, RunOptions};

#[derive(Debug, Args)]
pub struct ResumeArguments {
    /// The job file.
    job: PathBuf,

    /// Publish even if the change is larger than the job's guard allows.
    #[arg(long)]
    yes: bool,
}

#[derive(Debug, Serialize)]
struct NotRun<'r> {
    schema: &'static str,
    run_id: Option<&'r str>,
    job: &'r str,
    status: &'static str,
}

pub fn execute(session: &Session, arguments: &ResumeArguments) -> Result<u8> {
    let watch = Stopwatch::start();
    let job = session.job(&arguments.job)?;
    let holder = match ends::interrupted(&job)? {
        Some(Interrupted::Wants(holder)) => holder,
        Some(Interrupted::Finished(run)) => {
            return no_run(session, &job, "finished", Some(&run), &format!("run {run} is published as a whole now"));
        }
        None => return no_run(session, &job, "nothing_to_resume", None, "there is nothing to resume"),
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

fn no_run(session: &Session, job: &Job, status: &'static str, run_id: Option<&str>, says: &str) -> Result<u8> {
    match session.format {
        Format::Json => emit_json(&NotRun { schema: "trueup.resume/1", run_id, job: &job.name, status })?,
        Format::Text => emit(&format!("{} {says}\n", Style::for_stdout().bold(&format!("trueup resume {}:", job.name))))?,
    }
    Ok(0)
}
