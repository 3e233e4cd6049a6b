//! `trueup revert`

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::output::{Style, counted, emit, emit_json};
use super::{Format, Session};
use crate::clock::now;
use crate::ends;
use crate::model::aggregate::PeriodRow;
use crate::model::counts::RowCounts;
use crate::model::run::{Origin, Override, RunRecord};
use crate::pipeline::closed::ClosedPeriods;
use crate::pipeline::revert::{self, Allowed};
use crate::pipeline::{Horizon, Lateness, Request};
use crate::reference::Reference;

#[derive(Debug, Args)]
pub struct RevertArguments {
    /// The job file.
    job: PathBuf,

    /// The run to take back.
    #[arg(long, value_name = "RUN_ID")]
    run: String,

    /// Also rows that later runs changed: they become what they were before the run.
    #[arg(long)]
    force: bool,

    /// Also in closed periods, and beyond the job's horizon.
    #[arg(long)]
    allow_closed: bool,
}

#[derive(Debug, Serialize)]
struct Document<'r> {
    schema: &'static str,
    run_id: &'r str,
    job: &'r str,
    status: &'static str,
    reverted_run_id: &'r str,
    rows: RowCounts,
    periods: u64,
}

pub fn execute(session: &Session, arguments: &RevertArguments) -> Result<u8> {
    let job = session.job(&arguments.job)?;
    let allowed = Allowed { later: arguments.force, closed: arguments.allow_closed };
    let overrides = Override::list(&[(arguments.force, Override::LaterRuns), (arguments.allow_closed, Override::ClosedPeriods)]);
    let origin = Origin { started_by: ends::started_by("revert"), overrides };
    let horizon = Lateness::of(&job, &Request::default(), now()).horizon;
    let closed = |periods: &[PeriodRow], runs: &[RunRecord]| {
        let closed = ClosedPeriods::of(periods);
        let Some(until) = horizon else { return Ok(closed) };
        Ok(closed.with_horizon(Horizon::new(until, runs), &Reference::load(&job)?, periods))
    };
    let done = ends::by_hand(&job, &origin, |store, runs| {
        revert::revert(store, &job.name, runs, &arguments.run, allowed, closed).map(Some)
    })?;
    let Some((run, reverted)) = done else { return Ok(0) };
    if session.format == Format::Json {
        emit_json(&Document {
            schema: "trueup.revert/1",
            run_id: &run.run_id,
            job: &job.name,
            status: "succeeded",
            reverted_run_id: &arguments.run,
            rows: reverted.rows,
            periods: reverted.periods,
        })?;
        return Ok(0);
    }
    let style = Style::for_stdout();
    let rows = reverted.rows;
    let mut out = String::new();
    writeln!(out, "{} took back run {}", style.bold(&format!("trueup revert {}:", job.name)), arguments.run)?;
    writeln!(
        out,
        "  {} {} inserted, {} updated, {} retracted",
        style.dim("windows     "),
        rows.inserted,
        rows.updated,
        rows.retracted
    )?;
    writeln!(out, "  {} {}", style.dim("periods     "), counted(reverted.periods, "row"))?;
    writeln!(out, "  {} {}", style.dim("run         "), run.run_id)?;
    writeln!(
        out,
        "\n  {}",
        style.dim("A run that covers these windows computes them anew: repair what was wrong before the next one.")
    )?;
    emit(&out)?;
    Ok(0)
}
