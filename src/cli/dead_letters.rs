//! `trueup dead-letters`

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::output::{Style, counted, emit, emit_json, printable};
use super::range::time;
use super::{Format, Session};
use crate::config::Job;
use crate::ends;
use crate::fault::configuration;
use crate::model::aggregate::Reason;
use crate::model::timestamp::Timestamp;
use crate::store::StoredDeadLetter;

#[derive(Debug, Args)]
pub struct DeadLetterArguments {
    /// The job file.
    job: PathBuf,

    /// Only this reason, for example customer_not_found.
    #[arg(long)]
    reason: Option<String>,

    /// Only this tenant.
    #[arg(long, value_name = "TENANT_ID")]
    tenant: Option<String>,

    /// Only this customer, by the external id that the event names.
    #[arg(long, value_name = "EXTERNAL_ID")]
    customer: Option<String>,

    /// Only rejected by this meter; an event that fails as a whole has no meter.
    #[arg(long, value_name = "METER_ID")]
    meter: Option<String>,

    /// Only events from this time on: a date (midnight in the job's zone) or RFC 3339.
    #[arg(long, value_name = "TIME")]
    start: Option<String>,

    /// Only events before this time.
    #[arg(long, value_name = "TIME")]
    end: Option<String>,

    /// Only first or last met by this run, or resolved by it.
    #[arg(long, value_name = "RUN_ID")]
    run: Option<String>,

    /// Resolved ones too.
    #[arg(long)]
    all: bool,
}

#[derive(Debug, Serialize)]
struct Document<'d> {
    schema: &'static str,
    job: &'d str,
    dead_letters: Vec<Letter<'d>>,
}

#[derive(Debug, Serialize)]
struct Letter<'d> {
    tenant_id: &'d str,
    event_id: &'d str,
    meter_id: Option<&'d str>,
    reason: &'d str,
    remedy: &'static str,
    detail: &'d str,
    event: &'d str,
    event_time: Option<String>,
    occurrences: u64,
    first_run_id: &'d str,
    last_run_id: &'d str,
    resolved_run_id: Option<&'d str>,
}

pub fn execute(session: &Session, arguments: &DeadLetterArguments) -> Result<u8> {
    let job = session.job(&arguments.job)?;
    let filter = arguments.filter(&job)?;
    let store = ends::read_store(&job)?;
    let mut letters = store.as_deref().map_or(Ok(Vec::new()), |store| store.dead_letters(&job.name))?;
    letters.retain(|stored| filter.wants(stored));
    match session.format {
        Format::Json => emit_json(&Document {
            schema: "trueup.dead_letters/1",
            job: &job.name,
            dead_letters: letters.iter().map(document).collect(),
        })?,
        Format::Text => emit(&text(&job, &letters)?)?,
    }
    Ok(0)
}

impl DeadLetterArguments {
    fn filter(&self, job: &Job) -> Result<Filter<'_>> {
        let reason = self.reason.as_deref().map(|name| {
            Reason::parse(name).ok_or_else(|| {
                let names = Reason::ALL.map(Reason::name).join(", ");
                configuration(format!("--reason {name}: there is no such reason: use one of {names}"))
            })
        });
        let start = self.start.as_ref().map(|text| time("--start", text, job.timezone)).transpose()?;
        let end = self.end.as_ref().map(|text| time("--end", text, job.timezone)).transpose()?;
        if start.zip(end).is_some_and(|(start, end)| start >= end) {
            return Err(configuration("the time is empty: --start must be before --end"));
        }
        Ok(Filter { arguments: self, reason: reason.transpose()?, start, end })
    }
}

/// Which dead letters somebody wants to see.
struct Filter<'f> {
    arguments: &'f DeadLetterArguments,
    reason: Option<Reason>,
    start: Option<Timestamp>,
    end: Option<Timestamp>,
}

impl Filter<'_> {
    fn wants(&self, stored: &StoredDeadLetter) -> bool {
        let DeadLetterArguments { tenant, customer, meter, run, all, .. } = self.arguments;
        let key = &stored.letter.key;
        let is = |wanted: &Option<String>, value: &str| wanted.as_ref().is_none_or(|wanted| wanted == value);
        // A run is asked for what it resolved, too.
        let state = *all || run.is_some() || stored.resolved_run_id.is_none();
        let of_run = |run: &String| {
            [Some(&stored.first_run_id), Some(&stored.last_run_id), stored.resolved_run_id.as_ref()].contains(&Some(run))
        };
        // Asked for a time, an event without one is left out.
        let time = stored.letter.event_time;
        let in_time = self.start.is_none_or(|start| time.is_some_and(|t| t >= start))
            && self.end.is_none_or(|end| time.is_some_and(|t| t < end));
        state
            && in_time
            && self.reason.is_none_or(|reason| reason == key.reason)
            && is(tenant, &key.tenant_id)
            && is(meter, &key.meter_id)
            && run.as_ref().is_none_or(of_run)
            && customer.as_ref().is_none_or(|wanted| external_id(&stored.letter.event).as_ref() == Some(wanted))
    }
}

/// The external customer id of an event as a dead letter keeps it.
fn external_id(event: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Event {
        external_customer_id: Option<String>,
    }
    serde_json::from_str::<Event>(event).ok()?.external_customer_id
}

fn document(stored: &StoredDeadLetter) -> Letter<'_> {
    let key = &stored.letter.key;
    Letter {
        tenant_id: &key.tenant_id,
        event_id: &key.event_id,
        meter_id: Some(key.meter_id.as_str()).filter(|meter| !meter.is_empty()),
        reason: key.reason.name(),
        remedy: key.reason.remedy(),
        detail: &stored.letter.detail,
        event: &stored.letter.event,
        event_time: stored.letter.event_time.map(|t| t.to_string()),
        occurrences: stored.occurrences,
        first_run_id: &stored.first_run_id,
        last_run_id: &stored.last_run_id,
        resolved_run_id: stored.resolved_run_id.as_deref(),
    }
}

fn text(job: &Job, letters: &[StoredDeadLetter]) -> Result<String> {
    let style = Style::for_stdout();
    if letters.is_empty() {
        return Ok(format!("job {} has no such dead letters\n", job.name));
    }
    let mut by_reason: BTreeMap<&str, (Reason, Vec<&StoredDeadLetter>)> = BTreeMap::new();
    for stored in letters {
        let reason = stored.letter.key.reason;
        by_reason.entry(reason.name()).or_insert_with(|| (reason, Vec::new())).1.push(stored);
    }
    let mut out = String::new();
    for (name, (reason, letters)) in by_reason {
        writeln!(out, "{} {}", style.bold(name), style.dim(&counted(letters.len() as u64, "event")))?;
        writeln!(out, "  {}", style.dim(&format!("remedy: {}", reason.remedy())))?;
        for stored in letters {
            let key = &stored.letter.key;
            let meter = if key.meter_id.is_empty() { String::new() } else { format!(" meter {}", key.meter_id) };
            let time = stored.letter.event_time.map_or(String::new(), |t| format!(" at {t}"));
            let state = match &stored.resolved_run_id {
                Some(run) => style.green(&format!(" resolved by {run}")),
                None => String::new(),
            };
            writeln!(out, "  {}/{}{}{time}{state}", printable(&key.tenant_id), printable(&key.event_id), printable(&meter))?;
            writeln!(out, "    {}", printable(&stored.letter.detail))?;
        }
    }
    writeln!(out, "\n{}", style.dim("They are retried by every run that covers them."))?;
    Ok(out)
}
