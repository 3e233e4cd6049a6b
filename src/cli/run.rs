//! `trueup run`

use std::mem::ManuallyDrop;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::output::{Style, emit, emit_json};
use super::progress::Progress;
use super::range::{CompletenessArguments, RangeArguments};
use super::{Format, Session, plan};
use crate::clock::Stopwatch;
use crate::config::Job;
use crate::ends::{self, RunOptions};
use crate::pipeline::{Published, Request};

#[derive(Debug, Args)]
pub struct RunArguments {
    /// The job file.
    job: PathBuf,

    #[command(flatten)]
    range: RangeArguments,

    /// Read the same Kafka offsets as this run, over its range.
    #[arg(long, value_name = "RUN_ID", conflicts_with_all = ["start", "end", "day", "month", "last"])]
    snapshot: Option<String>,

    #[command(flatten)]
    completeness: CompletenessArguments,

    /// Publish even if the change is larger than the job's guard allows.
    #[arg(long)]
    yes: bool,

    /// Write over closed periods too.
    #[arg(long)]
    allow_closed: bool,

    /// Show every step with its rows and seconds.
    #[arg(long)]
    timings: bool,
}

pub fn execute(session: &Session, arguments: &RunArguments) -> Result<u8> {
    let watch = Stopwatch::start();
    let job = session.job(&arguments.job)?;
    let request = Request {
        allow_closed: arguments.allow_closed,
        completeness: arguments.completeness.choice(),
        ..arguments.range.request(job.timezone)?
    };
    let progress = Progress::new(session.quiet);
    let options = RunOptions {
        threads: session.threads,
        yes: arguments.yes,
        started_by: &ends::started_by("run"),
        snapshot: arguments.snapshot.as_deref(),
        progress: &progress,
    };
    // The process ends with its report: to free a million rows one by one would only delay that.
    let published = ManuallyDrop::new(ends::run(&job, &request, &options)?);
    drop(progress);
    let how = (plan::Title::Run, arguments.timings);
    report(session, &job, &arguments.range, &published, watch.seconds(), how)?;
    Ok(0)
}

/// Prints what a run did.
pub fn report(
    session: &Session,
    job: &Job,
    range: &RangeArguments,
    published: &Published,
    seconds: f64,
    (title, timings): (plan::Title, bool),
) -> Result<()> {
    match session.format {
        Format::Json => emit_json(&plan::Document::new("trueup.run/1", job, Some(&published.run), &published.plan)?),
        Format::Text => {
            let style = Style::for_stdout();
            let options = &(session.as_options() + &range.as_options());
            let plan = &published.plan;
            let report = plan::Report { plan, job, options, completeness: "", seconds, style, title, timings };
            emit(&report.of_run(&published.run)?)
        }
    }
}
