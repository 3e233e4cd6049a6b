//! `trueup plan`, and the report that `trueup run` shares with it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::output::{Style, counted, emit, number, table};
use super::progress::Progress;
use super::range::{CompletenessArguments, RangeArguments, shell_path};
use super::{Format, Session, changes};
use crate::clock::{Stopwatch, now};
use crate::config::{Job, Source};
use crate::ends;
use crate::model::aggregate::{Correction, Text};
use crate::model::counts::{EventCounts, RowCounts, UsageCounts};
use crate::model::decimal::Decimal;
use crate::model::run::{RunMode, RunRecord};
use crate::model::window::Span;
use crate::pipeline::incremental::Coverage;
use crate::pipeline::saved::{SavedPlan, store_digest};
use crate::pipeline::{Lateness, Plan, Request, Step, Totals};
use crate::store::AggregateStore;

#[derive(Debug, Args)]
pub struct PlanArguments {
    /// The job file.
    job: PathBuf,

    #[command(flatten)]
    range: RangeArguments,

    /// Exit with 3 if something would change.
    #[arg(long)]
    detailed_exitcode: bool,

    #[command(flatten)]
    completeness: CompletenessArguments,

    /// Save the exact changes, for `trueup apply`.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Write over closed periods too.
    #[arg(long)]
    allow_closed: bool,

    /// Show every step with its rows and seconds.
    #[arg(long)]
    timings: bool,
}

/// What a report is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Title {
    Plan,
    Run,
    Resume,
}

impl Title {
    fn name(self) -> &'static str {
        match self {
            Title::Plan => "plan",
            Title::Run => "run",
            Title::Resume => "resume",
        }
    }
}

pub fn execute(session: &Session, arguments: &PlanArguments) -> Result<u8> {
    let watch = Stopwatch::start();
    let job = session.job(&arguments.job)?;
    let request = Request {
        allow_closed: arguments.allow_closed,
        completeness: arguments.completeness.choice(),
        ..arguments.range.request(job.timezone)?
    };
    arguments.out.as_deref().map_or(Ok(()), |out| ends::check_output(&job, out))?;
    let progress = Progress::new(session.quiet);
    let (mut plan, store) = ends::preview(&job, &request, session.threads, &progress, arguments.out.is_some())?;
    drop(progress);
    let text = match session.format {
        Format::Json => serde_json::to_string_pretty(&Document::new("trueup.plan/1", &job, None, &plan)?)? + "\n",
        Format::Text => {
            let report = Report {
                plan: &plan,
                job: &job,
                options: &(session.as_options() + &arguments.range.as_options()),
                completeness: &(arguments.completeness.as_options()
                    + if arguments.allow_closed { " --allow-closed" } else { "" }),
                seconds: watch.seconds(),
                style: Style::for_stdout(),
                title: Title::Plan,
                timings: arguments.timings,
            };
            report.of_plan(arguments.out.as_deref())?
        }
    };
    let changes = plan.changes.rows.changed() + plan.periods.changed();
    if let Some(path) = &arguments.out {
        save(session, &job, &mut plan, store.as_deref())?.write(path)?;
    }
    emit(&text)?;
    Ok(if arguments.detailed_exitcode && changes > 0 { 3 } else { 0 })
}

fn save(session: &Session, job: &Job, plan: &mut Plan, store: Option<&dyn AggregateStore>) -> Result<SavedPlan> {
    Ok(SavedPlan {
        schema: SavedPlan::schema(),
        trueup_version: env!("CARGO_PKG_VERSION").to_owned(),
        created_at: now(),
        job_path: job.path.canonicalize().unwrap_or_else(|_| job.path.clone()),
        environment: session.environment.clone(),
        request: plan.request.clone(),
        ledger_digest: plan.ledger_digest().to_owned(),
        store_digest: store_digest(store, &job.name)?,
        guard: plan.check_guard(job).err().map(|refusal| refusal.to_string()),
        draft: plan.take_draft(RunMode::Apply),
        kept: plan.take_kept(),
    })
}

/// The JSON of a run or a plan.
#[derive(Debug, Serialize)]
pub struct Document<'p> {
    schema: &'static str,
    run_id: Option<&'p str>,
    job: &'p str,
    status: &'p str,
    range: RangeDocument,
    /// The billing periods that are priced as a whole.
    reach: RangeDocument,
    events: EventCounts,
    usage: UsageCounts,
    rows: RowCounts,
    periods: PeriodCounts,
    totals: Vec<TotalDocument<'p>>,
    /// Rows by cause; a row may have several.
    causes: BTreeMap<&'static str, u64>,
    dead_letters: BTreeMap<&'static str, u64>,
    dead_letters_resolved: u64,
    stale_outside: u64,
    warnings: &'p [String],
    /// What was skipped, and why.
    coverage: &'p Coverage,
    lateness: Lateness,
    steps: &'p [Step],
}

#[derive(Debug, Serialize)]
struct RangeDocument {
    start: Option<String>,
    end: Option<String>,
}

impl From<Option<crate::model::window::Span>> for RangeDocument {
    fn from(span: Option<crate::model::window::Span>) -> Self {
        RangeDocument { start: span.map(|span| span.start.to_string()), end: span.map(|span| span.end.to_string()) }
    }
}

#[derive(Debug, Serialize)]
struct PeriodCounts {
    written: u64,
    removed: u64,
    unchanged: u64,
    /// Of the rows that change.
    amounts: Vec<AmountDocument>,
    /// Rows of closed periods that should be others.
    adjusted: u64,
    adjusted_amounts: Vec<AmountDocument>,
}

#[derive(Debug, Serialize)]
struct AmountDocument {
    currency: String,
    amount_before: Decimal,
    amount_after: Decimal,
}

#[derive(Debug, Serialize)]
struct TotalDocument<'p> {
    currency: &'p str,
    cost_before: Decimal,
    cost_after: Decimal,
}

impl<'p> Document<'p> {
    pub fn new(schema: &'static str, job: &'p Job, run: Option<&'p RunRecord>, plan: &'p Plan) -> Result<Self> {
        let total = |(currency, totals): (&'p Text, &Totals)| {
            Ok(TotalDocument { currency, cost_before: totals.before.total()?, cost_after: totals.after.total()? })
        };
        let amount = |(currency, totals): (Text, Totals)| {
            let (amount_before, amount_after) = (totals.before.total()?, totals.after.total()?);
            Ok(AmountDocument { currency: currency.to_string(), amount_before, amount_after })
        };
        let amounts = |of_closed| plan.periods.amounts(of_closed).into_iter().map(amount).collect::<Result<Vec<_>>>();
        Ok(Document {
            schema,
            run_id: run.map(|run| run.run_id.as_str()),
            job: &job.name,
            status: run.map_or("planned", |run| run.status.as_str()),
            range: plan.range.into(),
            reach: plan.reach.into(),
            events: plan.events,
            usage: plan.usage,
            rows: plan.changes.rows,
            periods: PeriodCounts {
                written: plan.periods.upserts.len() as u64,
                removed: plan.periods.deletions.len() as u64,
                unchanged: plan.periods.unchanged,
                amounts: amounts(false)?,
                adjusted: plan.periods.adjusted,
                adjusted_amounts: amounts(true)?,
            },
            totals: plan.changes.totals.iter().map(total).collect::<Result<_>>()?,
            causes: causes(&plan.changes.corrections),
            dead_letters: reasons(plan),
            dead_letters_resolved: plan.resolved.len() as u64,
            stale_outside: plan.changes.stale_outside,
            warnings: &plan.warnings,
            coverage: &plan.coverage,
            lateness: plan.lateness,
            steps: &plan.steps,
        })
    }
}

fn causes(corrections: &[Correction]) -> BTreeMap<&'static str, u64> {
    let mut rows = BTreeMap::new();
    for cause in corrections.iter().flat_map(|correction| correction.causes.names()) {
        *rows.entry(cause.name()).or_default() += 1;
    }
    rows
}

fn reasons(plan: &Plan) -> BTreeMap<&'static str, u64> {
    let mut letters = BTreeMap::new();
    for letter in &plan.dead_letters {
        *letters.entry(letter.key.reason.name()).or_default() += 1;
    }
    letters
}

/// The text of a run or a plan.
pub struct Report<'p> {
    pub plan: &'p Plan,
    pub job: &'p Job,
    /// The options that ask for the same again, of any command.
    pub options: &'p str,
    /// And of a run.
    pub completeness: &'p str,
    pub seconds: f64,
    pub style: Style,
    pub title: Title,
    /// Whether every step is shown with its rows.
    pub timings: bool,
}

impl Report<'_> {
    /// What a run did.
    ///
    /// # Errors
    /// Where a total overflows.
    pub fn of_run(&self, run: &RunRecord) -> Result<String> {
        let mut out = String::new();
        let changed = self.plan.changes.rows.changed() > 0;
        let verdict = if self.plan.range.is_none() {
            match self.plan.events.read {
                0 => "there is nothing to compute: no event and no stored row".to_owned(),
                read => format!("none of {} has a time that could be read", counted(read, "event")),
            }
        } else if changed {
            format!("published {}", counted(self.plan.changes.rows.changed(), "correction"))
        } else if self.plan.periods.changed() > 0 {
            format!("published {}, no window changed", counted(self.plan.periods.changed(), "billing period"))
        } else {
            if self.plan.coverage.skipping.is_some() {
                "nothing changed: the store agrees with what is new"
            } else {
                "nothing changed: the store agrees with the events"
            }
            .to_owned()
        };
        writeln!(out, "{} {verdict}", self.style.bold(&format!("trueup {} {}:", self.title.name(), self.job.name)))?;
        self.body(&mut out)?;
        self.line(&mut out, "run", &run.run_id)?;
        let job = shell_path(&self.job.path);
        let mut next = Vec::new();
        if !self.plan.dead_letters.is_empty() {
            next.push((format!("trueup dead-letters {job}"), "what could not count, and the remedy"));
        }
        if changed {
            next.push((format!("trueup export {job} corrections --format csv"), "every change and its cause"));
            next.push((format!("trueup run {job}{}", self.options), "run again: nothing changes"));
        } else {
            next.push((format!("trueup verify {job}{}", self.options), "prove that store, events and ledger agree"));
        }
        self.next(&mut out, &next)?;
        Ok(out)
    }

    /// What a run would do.
    ///
    /// # Errors
    /// Where a total overflows.
    pub fn of_plan(&self, saved: Option<&Path>) -> Result<String> {
        let mut out = String::new();
        let rows = self.plan.changes.rows;
        let periods = self.plan.periods.changed();
        let verdict = if rows.changed() == 0 && periods > 0 {
            format!("{} to write, no window to change", counted(periods, "billing period"))
        } else if rows.changed() == 0 {
            "nothing would change".to_owned()
        } else {
            format!(
                "{} to insert, {} to update, {} to retract",
                number(rows.inserted),
                number(rows.updated),
                number(rows.retracted)
            )
        };
        writeln!(out, "{} {verdict}", self.style.bold(&format!("trueup {} {}:", self.title.name(), self.job.name)))?;
        self.body(&mut out)?;
        changes::by_customer_and_meter(&self.plan.changes.corrections, self.style, &mut out)?;
        changes::largest(&self.plan.changes.corrections, self.style, &mut out)?;
        if rows.changed() + periods > 0 {
            if let Err(refusal) = self.plan.check_guard(self.job) {
                // Only the reason: a plan publishes nothing, and is what the remedy names.
                let refusal = refusal.to_string();
                let reason = refusal.split_once(". Nothing was published").map_or(refusal.as_str(), |(reason, _)| reason);
                writeln!(out, "\n{} {reason}", self.style.yellow("note:"))?;
            }
            let next = match saved {
                Some(path) => (format!("trueup apply {}", shell_path(path)), "publish exactly this, or refuse if anything moved"),
                None => (
                    format!("trueup run {}{}{}", shell_path(&self.job.path), self.options, self.completeness),
                    "publish this, if nothing changes meanwhile",
                ),
            };
            self.next(&mut out, &[next])?;
        }
        Ok(out)
    }

    fn line(&self, out: &mut String, name: &str, text: &str) -> std::fmt::Result {
        writeln!(out, "  {} {text}", self.style.dim(&format!("{name:<12}")))
    }

    fn next(&self, out: &mut String, commands: &[(String, &str)]) -> std::fmt::Result {
        let width = commands.iter().map(|(command, _)| command.chars().count()).max().unwrap_or_default();
        writeln!(out)?;
        for (command, why) in commands {
            writeln!(out, "  {command:<width$}  {}", self.style.dim(&format!("# {why}")))?;
        }
        Ok(())
    }

    fn body(&self, out: &mut String) -> Result<()> {
        match self.plan.range {
            Some(range) => self.range(out, range)?,
            None if self.plan.events.read == 0 => return Ok(()),
            None => {}
        }
        self.lateness(out)?;
        self.coverage(out)?;
        self.counts(out)?;
        self.rows(out)?;
        self.totals(out, "cost", &self.plan.changes.totals)?;
        let periods = &self.plan.periods;
        if periods.change_adjustments() || (self.plan.changes.rows.changed() == 0 && periods.changed() > 0) {
            self.totals(out, "amount", &periods.amounts(false))?;
        }
        let listed = |counts: BTreeMap<&str, u64>| {
            counts.iter().map(|(name, count)| format!("{name} {}", number(*count))).collect::<Vec<_>>().join(", ")
        };
        let causes = causes(&self.plan.changes.corrections);
        if !causes.is_empty() {
            self.line(out, "causes", &listed(causes))?;
        }
        if !self.plan.dead_letters.is_empty() {
            self.line(out, "dead letters", &listed(reasons(self.plan)))?;
        }
        if !self.plan.resolved.is_empty() {
            self.line(out, "resolved", &counted(self.plan.resolved.len() as u64, "dead letter"))?;
        }
        if self.plan.changes.stale_outside > 0 {
            let count = counted(self.plan.changes.stale_outside, "window");
            let text = format!("{count} in these billing periods, out of the range: stale, or not stored yet");
            self.line(out, "outside", &text)?;
        }
        for warning in &self.plan.warnings {
            self.line(out, "warning", &self.style.yellow(warning))?;
        }
        let steps: Vec<_> = self.plan.steps.iter().map(|step| format!("{} {:.2}", step.name, step.seconds)).collect();
        self.line(out, "time", &format!("{:.2} s ({})", self.seconds, steps.join(", ")))?;
        if self.timings { self.steps(out) } else { Ok(()) }
    }

    /// Where the time went, step by step.
    #[allow(clippy::float_arithmetic)] // rates for people
    fn steps(&self, out: &mut String) -> Result<()> {
        let row = |step: &Step| {
            let speed = if step.seconds > 0.0 { format!("{:.0}", precise(step.rows) / step.seconds) } else { String::new() };
            vec![format!("  {}", step.name), number(step.rows), format!("{:.3}", step.seconds), speed]
        };
        let rows: Vec<_> = self.plan.steps.iter().map(row).collect();
        out.push('\n');
        out.push_str(&table(&["  step", "rows", "seconds", "rows/s"], &rows, &[1, 2, 3], self.style));
        Ok(())
    }

    fn range(&self, out: &mut String, range: Span) -> std::fmt::Result {
        self.line(out, "range", &format!("{} to {}", range.start, range.end))?;
        if let Some(asked) = self.plan.widened_from {
            self.line(out, "", &format!("asked for {} to {}, widened to whole windows", asked.start, asked.end))?;
        }
        if let Some(reach) = self.plan.reach.filter(|reach| *reach != range) {
            self.line(out, "priced", &format!("{} to {}, the billing periods that the range touches", reach.start, reach.end))?;
        }
        Ok(())
    }

    /// What the job says of late events.
    fn lateness(&self, out: &mut String) -> std::fmt::Result {
        let Lateness { looks_back_to, settled_until, horizon } = self.plan.lateness;
        let parts = [
            looks_back_to.map(|t| format!("looks back to {t}")),
            settled_until.map(|t| format!("windows that end after {t} wait for a later run")),
            horizon.map(|t| format!("billing periods that ended by {t} change no more")),
        ];
        for (at, part) in parts.into_iter().flatten().enumerate() {
            self.line(out, if at == 0 { "lateness" } else { "" }, &part)?;
        }
        Ok(())
    }

    /// What an incremental run looked at, or why a run computed everything.
    fn coverage(&self, out: &mut String) -> std::fmt::Result {
        const SHOWN: usize = 3;
        let coverage = &self.plan.coverage;
        if let Some(why) = &coverage.why {
            self.line(out, "full", why)?;
        }
        let Some(skipping) = &coverage.skipping else { return Ok(()) };
        // What a source has several of; of a database, it is one table.
        let place = match self.job.source {
            Source::Files { .. } => Some("file"),
            Source::Kafka { .. } => Some("partition"),
            Source::ClickHouse { .. } => None,
        };
        let new = counted(skipping.new_events, "event");
        let new = place.map_or(new.clone(), |place| format!("{new} in {}", counted(skipping.new_files, place)));
        let mut why: Vec<_> = skipping.changed.iter().take(SHOWN).map(|what| format!("{what} changed")).collect();
        if skipping.changed.len() > SHOWN {
            why.push(format!("{} more changed", number((skipping.changed.len() - SHOWN) as u64)));
        }
        self.line(out, "new", &[vec![new], why].concat().join(", "))?;
        let customers = counted(skipping.marked_customers, "customer");
        let mut marked = format!("{customers}, {}", counted(skipping.marked_periods, "billing period"));
        let stored = (skipping.stored_windows > 0).then(|| format!("{} of them", counted(skipping.stored_windows, "window")));
        let carried = (skipping.carried_periods > 0).then(|| format!("{} of others", counted(skipping.carried_periods, "sum")));
        let as_stored: Vec<_> = stored.into_iter().chain(carried).collect();
        if !as_stored.is_empty() {
            marked = format!("{marked}; {} as stored", as_stored.join(" and "));
        }
        self.line(out, "marked", &marked)?;
        let mut looked_at = format!("{} of {}", number(skipping.rows), counted(skipping.all_rows, "event"));
        if let Some(place) = place {
            looked_at = format!("{looked_at}, {} of {}", number(skipping.files), counted(skipping.all_files, place));
        }
        if skipping.kept_matches > 0 {
            looked_at = format!("{looked_at}; {} matches of others as kept", number(skipping.kept_matches));
        }
        self.line(out, "looked at", &looked_at)
    }

    fn counts(&self, out: &mut String) -> std::fmt::Result {
        let e = self.plan.events;
        self.line(
            out,
            "events",
            &self.sum(
                e.read,
                "read",
                &[
                    (e.metered, "metered"),
                    (e.duplicates, if e.duplicates == 1 { "duplicate" } else { "duplicates" }),
                    (e.voided, "voided"),
                    (e.unmatched, "unmatched"),
                    (e.dead_lettered, "dead-lettered"),
                    (e.out_of_range, "out of range"),
                ],
            ),
        )?;
        let u = self.plan.usage;
        self.line(
            out,
            "matches",
            &self.sum(u.matches, "with meters", &[(u.counted, "counted"), (u.skipped, "skipped"), (u.rejected, "rejected")]),
        )?;
        Ok(())
    }

    fn totals(&self, out: &mut String, name: &str, of: &BTreeMap<Text, Totals>) -> Result<()> {
        for (at, (currency, totals)) in of.iter().enumerate() {
            let (before, after) = (totals.before.total()?, totals.after.total()?);
            let change = after.checked_sub(before)?;
            let change = match change {
                change if change.is_zero() => self.style.dim("unchanged"),
                change if change.is_negative() => self.style.red(&change.to_string()),
                change => self.style.green(&format!("+{change}")),
            };
            self.line(out, if at == 0 { name } else { "" }, &format!("{currency} {before} -> {after}  {change}"))?;
        }
        Ok(())
    }

    fn rows(&self, out: &mut String) -> Result<()> {
        let rows = self.plan.changes.rows;
        let parts = [
            (rows.inserted, "inserted", self.style.green(&number(rows.inserted))),
            (rows.updated, "updated", self.style.yellow(&number(rows.updated))),
            (rows.retracted, "retracted", self.style.red(&number(rows.retracted))),
            (rows.unchanged, "unchanged", number(rows.unchanged)),
        ];
        let parts = parts.map(|(count, name, painted)| format!("{} {name}", if count == 0 { "0".to_owned() } else { painted }));
        self.line(out, "windows", &parts.join(", "))?;
        if rows.adjusted > 0 {
            let adjusted = counted(rows.adjusted, "difference");
            let frozen =
                if self.plan.lateness.horizon.is_some() { "closed periods or beyond the horizon" } else { "closed periods" };
            self.line(out, "closed", &format!("{adjusted} in {frozen}, recorded as adjustments"))?;
        }
        let periods = &self.plan.periods;
        if periods.adjusted > 0 {
            let bills = counted(periods.adjusted, "bill");
            self.line(
                out,
                if rows.adjusted > 0 { "" } else { "closed" },
                &format!("{bills} of closed periods, recorded as adjustments"),
            )?;
            self.totals(out, "", &periods.amounts(true))?;
        }
        let (written, removed) = (periods.upserts.len() as u64, periods.deletions.len() as u64);
        self.line(
            out,
            "periods",
            &format!("{} written, {} removed, {} unchanged", number(written), number(removed), number(periods.unchanged)),
        )?;
        Ok(())
    }

    /// `12 read = 10 metered + 2 voided`: zeros are left out, the sum stays whole.
    fn sum(&self, total: u64, name: &str, parts: &[(u64, &str)]) -> String {
        let shown: Vec<_> =
            parts.iter().filter(|(count, _)| *count > 0).map(|(count, name)| format!("{} {name}", number(*count))).collect();
        let shown = if shown.is_empty() { String::new() } else { format!(" = {}", shown.join(" + ")) };
        format!("{} {name}{shown}", number(total))
    }
}

/// Rows as a float, for rates alone.
#[allow(clippy::cast_precision_loss)]
fn precise(rows: u64) -> f64 {
    rows as f64
}
