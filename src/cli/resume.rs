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
struct NotRun<'r> {
    schema: &'static str,
    run_id: Option<&'r str>,
    job: &'r str,
    status: &'static str,
}

pub fn execute(session: &Session, arguments: &ResumeArguments) -> Result<u8> {
    let watch = Stopwatch::start();
    let job = session.job(&arguments.job)?;
    let last = || -> Result<Option<String>> {
        let store = ends::read_store(&job)?;
        Ok(store.map_or(Ok(Vec::new()), |store| store.runs(&job.name))?.pop().map(|run| run.run_id))
    };
    let before = last()?;
    let Some(holder) = ends::interrupted(&job)? else {
        // Whoever opens a store finishes what was partly published.
        let finished = last()?.filter(|after| before.as_ref() != Some(after));
        let (status, says) = match &finished {
            Some(run) => ("finished", format!("run {run} is published as a whole now")),
            None => ("nothing_to_resume", "there is nothing to resume".to_owned()),
        };
        match session.format {
            Format::Json => {
                let run_id = finished.as_deref();
                emit_json(&NotRun { schema: "trueup.resume/1", run_id, job: &job.name, status })?;
            }
            Format::Text => {
                emit(&format!("{} {says}\n", Style::for_stdout().bold(&format!("trueup resume {}:", job.name))))?;
            }
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
