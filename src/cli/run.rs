//! `trueup run`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::lock::Lock;
use super::output::{Style, emit, emit_json};
use super::progress::Progress;
use super::range::RangeArguments;
use super::{Format, Session, lock_path, plan, source_of, write_store};
use crate::clock::Stopwatch;
use crate::pipeline::{Inputs, plan as compute};
use crate::reference::Reference;

#[derive(Debug, Args)]
pub struct RunArguments {
    /// The job file.
    job: PathBuf,

    #[command(flatten)]
    range: RangeArguments,

    /// Publish even if the change is larger than the job's guard allows.
    #[arg(long)]
    yes: bool,
}

pub fn execute(session: &Session, arguments: &RunArguments) -> Result<u8> {
    let watch = Stopwatch::start();
    let job = session.job(&arguments.job)?;
    let request = arguments.range.request(job.timezone)?;
    let reference = Reference::load(&job)?;
    let _lock = Lock::take(&lock_path(&job), &job.name)?;
    let mut store = write_store(&job)?;
    let progress = Progress::new(session.quiet);
    let inputs = Inputs {
        job: &job,
        reference: &reference,
        source: &*source_of(&job)?,
        store: Some(&*store),
        threads: session.threads,
        progress: &progress,
    };
    let plan = compute(&inputs, &request)?;
    if !arguments.yes {
        plan.check_guard(&job)?;
    }
    let run_id = uuid::Uuid::now_v7().to_string();
    let published = plan.publish(&job, &mut *store, &run_id)?;
    drop(progress);
    match session.format {
        Format::Json => emit_json(&plan::Document::new("trueup.run/1", Some(&published.run), &published.plan)?)?,
        Format::Text => {
            let report = plan::Report { plan: &published.plan, job: &job, seconds: watch.seconds(), style: Style::for_stdout() };
            emit(&report.of_run(&published.run)?)?;
        }
    }
    Ok(0)
}
