//! `trueup run`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::lock::Lock;
use super::output::{Style, emit, emit_json};
use super::progress::Progress;
use super::range::RangeArguments;
use super::{Format, Session, kafka_source, lock_path, plan, source_of, write_store};
use crate::clock::Stopwatch;
use crate::config::Job;
use crate::fault::configuration;
use crate::model::window::Span;
use crate::pipeline::{Inputs, plan as compute};
use crate::reference::Reference;
use crate::source::kafka::{KafkaSource, Snapshot};
use crate::store::AggregateStore;

#[derive(Debug, Args)]
pub struct RunArguments {
    /// The job file.
    job: PathBuf,

    #[command(flatten)]
    range: RangeArguments,

    /// Read the same Kafka offsets as this run, over its range.
    #[arg(long, value_name = "RUN_ID", conflicts_with_all = ["start", "end", "day", "month", "last"])]
    snapshot: Option<String>,

    /// Publish even if the change is larger than the job's guard allows.
    #[arg(long)]
    yes: bool,
}

pub fn execute(session: &Session, arguments: &RunArguments) -> Result<u8> {
    let watch = Stopwatch::start();
    let job = session.job(&arguments.job)?;
    let mut request = arguments.range.request(job.timezone)?;
    let reference = Reference::load(&job)?;
    let _lock = Lock::take(&lock_path(&job), &job.name)?;
    let mut store = write_store(&job)?;
    let source = match &arguments.snapshot {
        None => source_of(&job)?,
        Some(run_id) => {
            let (source, range) = snapshot_of(&job, &*store, run_id)?;
            request.range = Some(range);
            Box::new(source)
        }
    };
    let progress = Progress::new(session.quiet);
    let inputs = Inputs {
        job: &job,
        reference: &reference,
        source: &*source,
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

/// What an earlier run read, and the range that it computed. Any other range could
/// take windows back whose events the snapshot does not hold.
fn snapshot_of(job: &Job, store: &dyn AggregateStore, run_id: &str) -> Result<(KafkaSource, Span)> {
    let error = |reason: String| configuration(format!("--snapshot {run_id}: {reason}"));
    let runs = store.runs(&job.name)?;
    let run = runs.iter().find(|run| run.run_id == run_id);
    let run = run.ok_or_else(|| error(format!("job {} has no such run: `trueup runs` lists them", job.name)))?;
    let source = kafka_source(job, Some(Snapshot::of(run)))?;
    let range = run.range.ok_or_else(|| error("that run found nothing to compute".to_owned()))?;
    Ok((source, range))
}
