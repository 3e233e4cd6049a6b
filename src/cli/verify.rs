//! `trueup verify`

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::output::{Style, counted, emit, emit_json};
use super::progress::Progress;
use super::range::{RangeArguments, shell_path};
use super::{Format, Session};
use crate::audit::{Finding, check_ledger, describe, describe_period};
use crate::config::Job;
use crate::ends;
use crate::fault::{FaultKind, fault};
use crate::model::aggregate::{Correction, PeriodCorrection, WindowKey};
use crate::model::counts::RowCounts;
use crate::model::decimal::Decimal;
use crate::pipeline::{Completeness, Plan, Request};
use crate::store::AggregateStore;
use crate::store::rows::Unreadable;

#[derive(Debug, Args)]
pub struct VerifyArguments {
    /// The job file.
    job: PathBuf,

    #[command(flatten)]
    range: RangeArguments,
}

#[derive(Debug, Serialize)]
struct Document<'v> {
    schema: &'static str,
    job: &'v str,
    status: &'static str,
    rows: RowCounts,
    periods_differing: u64,
    periods: &'v [Bill],
    ledger: &'v [Finding],
}

/// A row of `usage_periods` that a run would change.
#[derive(Debug, Serialize)]
struct Bill {
    row: String,
    /// The amount; none where there is no row.
    stored: Option<Decimal>,
    due: Option<Decimal>,
    currency: String,
}

pub fn execute(session: &Session, arguments: &VerifyArguments) -> Result<u8> {
    let job = session.job(&arguments.job)?;
    // Nothing that a run would look at is skipped.
    let request = Request { completeness: Completeness::Recomputed, ..arguments.range.request(job.timezone)? };
    let mut tries = 0..3;
    let (drift, findings) = loop {
        let compared = compare(session, &job, &request);
        let (drift, findings, is_of_one_state) = compared.or_else(unreadable)?;
        // Somebody who published meanwhile makes it look wrong.
        if is_of_one_state || drift.is_none(&findings) || tries.next().is_none() {
            break (drift, findings);
        }
    };
    let sound = drift.is_none(&findings);
    match session.format {
        Format::Json => emit_json(&Document {
            schema: "trueup.verify/1",
            job: &job.name,
            status: if sound { "sound" } else { "drift" },
            rows: drift.rows,
            periods_differing: drift.bills.len() as u64,
            periods: &drift.bills,
            ledger: &findings,
        })?,
        Format::Text => emit(&text(&job, &drift, &findings)?)?,
    }
    Ok(if sound { 0 } else { 3 })
}

/// What is found where a row was altered so that nothing can be compared.
///
/// # Errors
/// Any other error.
fn unreadable(error: anyhow::Error) -> Result<(Drift, Vec<Finding>, bool)> {
    let Some(Unreadable { table, row }) = error.downcast_ref() else { return Err(error) };
    let problem = format!("cannot be read ({}), so nothing was compared: {}", error.root_cause(), Unreadable::REMEDY);
    let drift = Drift { rows: RowCounts::default(), corrections: Vec::new(), bills: Vec::new() };
    let finding = Finding { table, row: row.clone(), problem };
    Ok((drift, vec![finding], true))
}

/// What differs, and whether no run was published meanwhile.
fn compare(session: &Session, job: &Job, request: &Request) -> Result<(Drift, Vec<Finding>, bool)> {
    let last = |store: Option<&dyn AggregateStore>| -> Result<Option<String>> {
        Ok(store.map_or(Ok(Vec::new()), |store| store.runs(&job.name))?.pop().map(|run| run.run_id))
    };
    let before = last(ends::read_store(job)?.as_deref())?;
    let progress = Progress::new(session.quiet);
    let (plan, store) = ends::preview(job, request, session.threads, &progress, false)?;
    drop(progress);
    // What was compared is large: the ledger needs the room.
    let (foreign, drift) = Drift::of(plan);
    let mut findings = store.as_deref().map_or(Ok(Vec::new()), |store| check_ledger(store, &job.name))?;
    findings.extend(foreign.iter().map(|key| Finding {
        table: "usage_windows",
        row: describe(key),
        problem: "names definitions that it was not computed with".to_owned(),
    }));
    if let (Some(store), false) = (store, drift.is_none(&findings))
        && let Some(run) = store.unfinished(&job.name)?
    {
        let remedy = format!("wait for it, or `trueup resume {}` finishes it", shell_path(&job.path));
        let says = format!("run {run} is being published, or was interrupted, so that nothing can be proved: {remedy}");
        return Err(fault(FaultKind::Partial, says));
    }
    let after = last(ends::read_store(job)?.as_deref())?;
    Ok((drift, findings, before == after))
}

/// What a run would change.
struct Drift {
    rows: RowCounts,
    corrections: Vec<Correction>,
    bills: Vec<Bill>,
}

impl Drift {
    /// Whether there is nothing, neither here nor in the ledger.
    fn is_none(&self, findings: &[Finding]) -> bool {
        self.rows.changed() == 0 && self.bills.is_empty() && findings.is_empty()
    }

    /// With rows that name definitions which they were not computed with.
    fn of(plan: Plan) -> (Vec<WindowKey>, Drift) {
        let Plan { changes, periods, foreign_definitions, .. } = plan;
        let bill = |PeriodCorrection { key, before, after, .. }: PeriodCorrection| Bill {
            row: describe_period(&key),
            stored: before.as_ref().map(|row| row.amount),
            due: after.as_ref().map(|row| row.amount),
            currency: after.or(before).map_or_else(String::new, |row| row.currency.to_string()),
        };
        let bills = periods.corrections.into_iter().map(bill).collect();
        (foreign_definitions, Drift { rows: changes.rows, corrections: changes.corrections, bills })
    }
}

fn text(job: &Job, drift: &Drift, findings: &[Finding]) -> Result<String> {
    const SHOWN: usize = 20;
    let style = Style::for_stdout();
    let Drift { rows, corrections, bills } = drift;
    let mut out = String::new();
    if drift.is_none(findings) {
        let sound =
            format!("{} recomputed and equal, the ledger is whole and gives the stored table", counted(rows.unchanged, "window"));
        writeln!(out, "{} {}", style.bold(&format!("trueup verify {}:", job.name)), style.green(&sound))?;
        return Ok(out);
    }
    let differing = format!(
        "{} {} from the events ({} missing, {} wrong, {} too many), {} wrong, {} in the ledger",
        counted(rows.changed(), "window"),
        if rows.changed() == 1 { "differs" } else { "differ" },
        rows.inserted,
        rows.updated,
        rows.retracted,
        counted(bills.len() as u64, "period"),
        counted(findings.len() as u64, "finding")
    );
    writeln!(out, "{} {}", style.bold(&format!("trueup verify {}:", job.name)), style.red(&differing))?;
    for correction in corrections.iter().take(SHOWN) {
        let shown = |values: Option<crate::model::aggregate::Values>| {
            values.map_or_else(|| "nothing".to_owned(), |v| format!("quantity {} cost {}", v.quantity, v.cost))
        };
        let causes: Vec<_> = correction.causes.names().map(|cause| cause.name()).collect();
        let (stored, should) = (shown(correction.values_before()), shown(correction.values_after()));
        writeln!(out, "  {}: stored {stored}, should be {should} ({})", describe(&correction.key), causes.join(", "))?;
    }
    for Bill { row, stored, due, currency } in bills.iter().take(SHOWN) {
        let shown =
            |amount: &Option<Decimal>| amount.map_or_else(|| "nothing".to_owned(), |amount| format!("{amount} {currency}"));
        writeln!(out, "  bill of {row}: stored {}, should be {}", shown(stored), shown(due))?;
    }
    for finding in findings.iter().take(SHOWN) {
        writeln!(out, "  {} {}: {}", finding.table, finding.row, finding.problem)?;
    }
    let hidden: usize = [corrections.len(), bills.len(), findings.len()].iter().map(|all| all.saturating_sub(SHOWN)).sum();
    if hidden > 0 {
        writeln!(out, "  … and {hidden} more")?;
    }
    writeln!(out, "\n  trueup plan {}  {}", shell_path(&job.path), style.dim("# what a run would change"))?;
    Ok(out)
}
