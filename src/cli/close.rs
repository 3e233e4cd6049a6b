//! `trueup close`

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use rustc_hash::FxHashMap;
use serde::Serialize;

use super::output::{Style, counted, emit, emit_json};
use super::range::period_choice;
use super::{Format, Session};
use crate::config::Job;
use crate::ends;
use crate::model::aggregate::PeriodRow;
use crate::model::decimal_sum::DecimalSum;
use crate::model::run::{Origin, RunRecord};
use crate::pipeline::by_hand::{self, PeriodChoice};
use crate::reference::Reference;
use crate::store::AggregateStore;

#[derive(Debug, Args)]
pub struct CloseArguments {
    /// The job file.
    job: PathBuf,

    /// The billing periods that begin in a month (2026-01), or that hold a day (2026-01-15), each in its subscription's
    /// zone; or that hold an instant.
    #[arg(long, value_name = "PERIOD")]
    period: String,

    /// Only this tenant.
    #[arg(long, value_name = "TENANT_ID")]
    tenant: Option<String>,

    /// Only this customer.
    #[arg(long, value_name = "CUSTOMER_ID")]
    customer: Option<String>,

    /// Only this subscription.
    #[arg(long, value_name = "SUBSCRIPTION_ID")]
    subscription: Option<String>,

    /// Open them again.
    #[arg(long)]
    reopen: bool,
}

#[derive(Debug, Serialize)]
struct Document<'c> {
    schema: &'static str,
    job: &'c str,
    status: &'static str,
    run_id: Option<&'c str>,
    periods: Vec<Period<'c>>,
}

#[derive(Debug, Serialize)]
struct Period<'c> {
    tenant_id: &'c str,
    customer_id: &'c str,
    subscription_id: &'c str,
    meter_id: &'c str,
    price_id: &'c str,
    dimensions: &'c str,
    period_start: String,
    period_end: String,
    amount: String,
    currency: &'c str,
}

pub fn execute(session: &Session, arguments: &CloseArguments) -> Result<u8> {
    let job = session.job(&arguments.job)?;
    let choice = period_choice(&arguments.period, job.timezone)?;
    let is = |wanted: &Option<String>, value: &str| wanted.as_ref().is_none_or(|wanted| wanted == value);
    let wants = |row: &PeriodRow| {
        is(&arguments.tenant, &row.key.tenant_id)
            && is(&arguments.customer, &row.customer_id)
            && is(&arguments.subscription, &row.key.subscription_id)
    };
    // An instant is the same everywhere.
    let reference = if matches!(choice, PeriodChoice::Hold(_)) { None } else { Some(Reference::load(&job)?) };
    let subscriptions = reference.iter().flat_map(|reference| &reference.subscriptions);
    let zones: FxHashMap<_, _> =
        subscriptions.map(|row| ((row.tenant_id.as_str(), row.id.as_str()), row.cycle.timezone)).collect();
    let zone = |row: &PeriodRow| zones.get(&(&*row.key.tenant_id, &*row.key.subscription_id)).copied().unwrap_or(job.timezone);
    let origin = Origin { started_by: ends::started_by("close"), overrides: Vec::new() };
    let close =
        |store: &dyn AggregateStore, runs: &[_]| by_hand::close(store, &job.name, runs, choice, arguments.reopen, zone, wants);
    let done = ends::by_hand(&job, &origin, close)?;
    let (run, rows) = done.as_ref().map_or((None, [].as_slice()), |(run, rows)| (Some(run), rows.as_slice()));
    match session.format {
        Format::Json => emit_json(&Document {
            schema: "trueup.close/1",
            job: &job.name,
            status: if arguments.reopen { "open" } else { "closed" },
            run_id: run.map(|run| run.run_id.as_str()),
            periods: rows.iter().map(document).collect(),
        })?,
        Format::Text => emit(&text(&job, run, rows, arguments.reopen)?)?,
    }
    Ok(0)
}

fn document(row: &PeriodRow) -> Period<'_> {
    Period {
        tenant_id: &row.key.tenant_id,
        customer_id: &row.customer_id,
        subscription_id: &row.key.subscription_id,
        meter_id: &row.key.meter_id,
        price_id: &row.key.price_id,
        dimensions: &row.key.dimensions,
        period_start: row.key.period_start.to_string(),
        period_end: row.period_end.to_string(),
        amount: row.amount.to_string(),
        currency: &row.currency,
    }
}

fn text(job: &Job, run: Option<&RunRecord>, rows: &[PeriodRow], reopen: bool) -> Result<String> {
    let style = Style::for_stdout();
    let title = style.bold(&format!("trueup close {}:", job.name));
    let Some(run) = run else {
        return Ok(format!("{title} these periods are {} already\n", if reopen { "open" } else { "closed" }));
    };
    let subscriptions: BTreeSet<_> = rows.iter().map(|row| (&row.key.tenant_id, &row.key.subscription_id)).collect();
    let mut amounts: BTreeMap<&str, DecimalSum> = BTreeMap::new();
    rows.iter().for_each(|row| amounts.entry(&row.currency).or_default().add(row.amount));
    let mut out = String::new();
    writeln!(
        out,
        "{title} {} {} of {}",
        if reopen { "opened" } else { "closed" },
        counted(rows.len() as u64, "billing period"),
        counted(subscriptions.len() as u64, "subscription")
    )?;
    for (currency, amount) in amounts {
        writeln!(out, "  {} {} {currency}", style.dim("amount      "), amount.total()?)?;
    }
    writeln!(out, "  {} {}", style.dim("run         "), run.run_id)?;
    if !reopen {
        writeln!(
            out,
            "\n  {}",
            style.dim("What differs there from now on becomes an adjustment, unless a run says --allow-closed.")
        )?;
    }
    Ok(out)
}
