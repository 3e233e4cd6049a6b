//! `trueup dead-letters`

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::output::{Style, counted, emit, emit_json};
use super::{Format, Session};
use crate::config::Job;
use crate::ends;
use crate::fault::configuration;
use crate::model::aggregate::Reason;
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
    if let Some(reason) = arguments.reason.as_deref().filter(|reason| Reason::parse(reason).is_none()) {
        return Err(configuration(format!("--reason {reason}: there is no such reason")));
    }
    let store = ends::read_store(&job)?;
    let mut letters = store.as_deref().map_or(Ok(Vec::new()), |store| store.dead_letters(&job.name))?;
    letters.retain(|stored| {
        let key = &stored.letter.key;
        (arguments.all || stored.resolved_run_id.is_none())
            && arguments.reason.as_ref().is_none_or(|reason| reason == key.reason.name())
            && arguments.tenant.as_ref().is_none_or(|tenant| *tenant == key.tenant_id)
    });
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

fn document(stored: &StoredDeadLetter) -> Letter<'_> {
    let key = &stored.letter.key;
    Letter {
        tenant_id: &key.tenant_id,
        event_id: &key.event_id,
        meter_id: Some(key.meter_id.as_str()).filter(|meter| !meter.is_empty()),
        reason: key.reason.name(),
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
    let mut by_reason: BTreeMap<&str, Vec<&StoredDeadLetter>> = BTreeMap::new();
    for stored in letters {
        by_reason.entry(stored.letter.key.reason.name()).or_default().push(stored);
    }
    let mut out = String::new();
    for (reason, letters) in by_reason {
        writeln!(out, "{} {}", style.bold(reason), style.dim(&counted(letters.len() as u64, "event")))?;
        for stored in letters {
            let key = &stored.letter.key;
            let meter = if key.meter_id.is_empty() { String::new() } else { format!(" meter {}", key.meter_id) };
            let time = stored.letter.event_time.map_or(String::new(), |t| format!(" at {t}"));
            let state = match &stored.resolved_run_id {
                Some(run) => style.green(&format!(" resolved by {run}")),
                None => String::new(),
            };
            writeln!(out, "  {}/{}{meter}{time}{state}", key.tenant_id, key.event_id)?;
            writeln!(out, "    {}", stored.letter.detail)?;
        }
    }
    writeln!(out, "\n{}", style.dim("They are retried by every run that covers them."))?;
    Ok(out)
}
