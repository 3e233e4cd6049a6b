//! `trueup audit`

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::audit_text;
use super::output::{Style, emit, emit_json};
use super::range::{shell_path, time};
use super::{Format, Session};
use crate::audit::report::{Changed, Group, Groups, Kinds, Report, Totals, changed_something, report};
use crate::config::Job;
use crate::ends;
use crate::fault::configuration;
use crate::model::aggregate::Values;
use crate::model::decimal::Decimal;
use crate::model::run::{Override, RunRecord};
use crate::model::timestamp::Timestamp;
use crate::store::StoredDeadLetter;

/// Without any of these, the last run that changed something.
#[derive(Debug, Args)]
pub struct AuditArguments {
    /// The job file.
    job: PathBuf,

    /// This run.
    #[arg(long, value_name = "RUN_ID", conflicts_with_all = ["start", "end", "last"])]
    run: Option<String>,

    /// The runs that finished from this time on: a date (midnight in the job's zone) or RFC 3339.
    #[arg(long, value_name = "TIME", conflicts_with = "last")]
    start: Option<String>,

    /// The runs that finished before this time.
    #[arg(long, value_name = "TIME", conflicts_with = "last")]
    end: Option<String>,

    /// The last N runs.
    #[arg(long, value_name = "N")]
    last: Option<usize>,

    /// Show every line of every list.
    #[arg(long)]
    all: bool,
}

pub fn execute(session: &Session, arguments: &AuditArguments) -> Result<u8> {
    let job = session.job(&arguments.job)?;
    let store = ends::read_store(&job)?;
    let runs = store.as_deref().map_or(Ok(Vec::new()), |store| store.runs(&job.name))?;
    let Some(store) = store.filter(|_| !runs.is_empty()) else {
        if let Some(run) = &arguments.run {
            return Err(no_such_run(&job, run));
        }
        return nothing(session, &job, &format!("job {} has not run yet: trueup run {}", job.name, shell_path(&job.path)));
    };
    let runs = arguments.choose(&job, runs)?;
    if runs.is_empty() {
        return nothing(session, &job, &format!("no run of job {} finished in that time: trueup runs lists them", job.name));
    }
    let limit = if session.format == Format::Json || arguments.all { usize::MAX } else { audit_text::SHOWN };
    let report = report(&*store, &job.name, runs, limit)?;
    match session.format {
        Format::Json => emit_json(&document(&job, &report)?)?,
        Format::Text => emit(&audit_text::text(&job, &report, limit, Style::for_stdout())?)?,
    }
    Ok(0)
}

fn no_such_run(job: &Job, run: &str) -> anyhow::Error {
    configuration(format!("--run {run}: job {} has no such run: `trueup runs {}` lists them", job.name, shell_path(&job.path)))
}

/// The document where there is no run to sum up.
#[derive(Serialize)]
struct Nothing<'n> {
    schema: &'static str,
    job: &'n str,
    runs: [(); 0],
}

fn nothing(session: &Session, job: &Job, says: &str) -> Result<u8> {
    match session.format {
        Format::Json => emit_json(&Nothing { schema: SCHEMA, job: &job.name, runs: [] })?,
        Format::Text => emit(&format!("{says}\n"))?,
    }
    Ok(0)
}

impl AuditArguments {
    fn choose(&self, job: &Job, mut runs: Vec<RunRecord>) -> Result<Vec<RunRecord>> {
        if let Some(wanted) = &self.run {
            runs.retain(|run| run.run_id == *wanted);
            return if runs.is_empty() { Err(no_such_run(job, wanted)) } else { Ok(runs) };
        }
        if let Some(last) = self.last {
            runs.drain(..runs.len().saturating_sub(last));
            return Ok(runs);
        }
        if self.start.is_some() || self.end.is_some() {
            let start = self.start.as_ref().map_or(Ok(Timestamp::MIN), |text| time("--start", text, job.timezone))?;
            let end = self.end.as_ref().map_or(Ok(Timestamp::MAX), |text| time("--end", text, job.timezone))?;
            if start >= end {
                return Err(configuration(format!("the time from {start} to {end} is empty: --start must be before --end")));
            }
            runs.retain(|run| start <= run.finished_at && run.finished_at < end);
            return Ok(runs);
        }
        let chosen = runs.iter().rposition(changed_something).unwrap_or(runs.len().saturating_sub(1));
        Ok(runs.into_iter().skip(chosen).take(1).collect())
    }
}

const SCHEMA: &str = "trueup.audit/1";

#[derive(Debug, Serialize)]
struct Document<'r> {
    schema: &'static str,
    job: &'r str,
    runs: Vec<RunDocument<'r>>,
    rows: Kinds,
    totals: Vec<TotalDocument<'r>>,
    by_cause: Vec<GroupDocument<'r>>,
    by_customer: Vec<GroupDocument<'r>>,
    by_meter: Vec<GroupDocument<'r>>,
    /// The largest first.
    changes: Vec<ChangeDocument<'r>>,
    adjustments: Vec<ChangeDocument<'r>>,
    periods: PeriodsDocument<'r>,
    dead_letters: LettersDocument<'r>,
}

#[derive(Debug, Serialize)]
struct RunDocument<'r> {
    run_id: &'r str,
    mode: &'static str,
    status: &'r str,
    started_at: Timestamp,
    finished_at: Timestamp,
    started_by: &'r str,
    overrides: &'r [Override],
    range: [Option<Timestamp>; 2],
}

#[derive(Debug, Serialize)]
struct TotalDocument<'r> {
    currency: &'r str,
    before: Decimal,
    after: Decimal,
    change: Decimal,
}

#[derive(Debug, Serialize)]
struct GroupDocument<'r> {
    name: &'r str,
    currency: &'r str,
    corrections: u64,
    #[serde(flatten)]
    kinds: Kinds,
    cost_change: Decimal,
}

#[derive(Debug, Serialize)]
struct ChangeDocument<'r> {
    correction_id: &'r str,
    run_id: &'r str,
    kind: &'r str,
    causes: &'r BTreeMap<String, u64>,
    tenant_id: &'r str,
    customer_id: &'r str,
    subscription_id: &'r str,
    meter_id: &'r str,
    price_id: &'r str,
    dimensions: &'r str,
    period_start: Timestamp,
    window_start: Timestamp,
    currency: &'r str,
    before: Option<Values>,
    after: Option<Values>,
    cost_change: Decimal,
}

#[derive(Debug, Serialize)]
struct PeriodsDocument<'r> {
    changed: u64,
    amounts: Vec<TotalDocument<'r>>,
    /// Those of closed periods that should be others.
    adjusted: u64,
    adjusted_amounts: Vec<TotalDocument<'r>>,
}

#[derive(Debug, Serialize)]
struct LettersDocument<'r> {
    opened: Vec<LetterDocument<'r>>,
    resolved: Vec<LetterDocument<'r>>,
}

#[derive(Debug, Serialize)]
struct LetterDocument<'r> {
    tenant_id: &'r str,
    event_id: &'r str,
    meter_id: Option<&'r str>,
    reason: &'static str,
    detail: &'r str,
    event_time: Option<Timestamp>,
    first_run_id: &'r str,
    resolved_run_id: Option<&'r str>,
}

fn document<'r>(job: &'r Job, report: &'r Report) -> Result<Document<'r>> {
    Ok(Document {
        schema: SCHEMA,
        job: &job.name,
        runs: report.runs.iter().map(run).collect(),
        rows: report.kinds,
        totals: totals(&report.totals)?,
        by_cause: groups(&report.by_cause)?,
        by_customer: groups(&report.by_customer)?,
        by_meter: groups(&report.by_meter)?,
        changes: report.changes.iter().map(change).collect(),
        adjustments: report.adjustments.iter().map(change).collect(),
        periods: PeriodsDocument {
            changed: report.periods,
            amounts: totals(&report.amounts)?,
            adjusted: report.adjusted_periods,
            adjusted_amounts: totals(&report.adjusted_amounts)?,
        },
        dead_letters: LettersDocument {
            opened: report.opened.iter().map(letter).collect(),
            resolved: report.resolved.iter().map(letter).collect(),
        },
    })
}

fn run(run: &RunRecord) -> RunDocument<'_> {
    RunDocument {
        run_id: &run.run_id,
        mode: run.mode.name(),
        status: &run.status,
        started_at: run.started_at,
        finished_at: run.finished_at,
        started_by: &run.origin.started_by,
        overrides: &run.origin.overrides,
        range: [run.range.map(|range| range.start), run.range.map(|range| range.end)],
    }
}

fn totals(totals: &BTreeMap<String, Totals>) -> Result<Vec<TotalDocument<'_>>> {
    let mut documents = Vec::new();
    for (currency, totals) in totals {
        let (before, after, change) = (totals.before.total()?, totals.after.total()?, totals.change()?);
        documents.push(TotalDocument { currency, before, after, change });
    }
    Ok(documents)
}

fn groups(groups: &Groups) -> Result<Vec<GroupDocument<'_>>> {
    let mut documents = Vec::new();
    for ((name, currency), Group { kinds, change }) in groups {
        let cost_change = change.total()?;
        documents.push(GroupDocument { name, currency, corrections: kinds.total(), kinds: *kinds, cost_change });
    }
    Ok(documents)
}

fn change(changed: &Changed) -> ChangeDocument<'_> {
    let Changed { entry, causes, change } = changed;
    let period = &entry.key.period;
    ChangeDocument {
        correction_id: &entry.correction_id,
        run_id: &entry.run_id,
        kind: &entry.kind,
        causes,
        tenant_id: &period.tenant_id,
        customer_id: &entry.customer_id,
        subscription_id: &period.subscription_id,
        meter_id: &period.meter_id,
        price_id: &period.price_id,
        dimensions: &period.dimensions,
        period_start: period.period_start,
        window_start: entry.key.window_start,
        currency: &entry.currency,
        before: entry.before,
        after: entry.after,
        cost_change: *change,
    }
}

fn letter(stored: &StoredDeadLetter) -> LetterDocument<'_> {
    let key = &stored.letter.key;
    LetterDocument {
        tenant_id: &key.tenant_id,
        event_id: &key.event_id,
        meter_id: Some(key.meter_id.as_str()).filter(|meter| !meter.is_empty()),
        reason: key.reason.name(),
        detail: &stored.letter.detail,
        event_time: stored.letter.event_time,
        first_run_id: &stored.first_run_id,
        resolved_run_id: stored.resolved_run_id.as_deref(),
    }
}
