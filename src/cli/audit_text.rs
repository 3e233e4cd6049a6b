//! What `trueup audit` says to people.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;

use super::output::{Style, counted, number, table};
use crate::audit::describe;
use crate::audit::report::{Changed, Groups, Report, Totals};
use crate::config::Job;
use crate::model::aggregate::Values;
use crate::model::decimal::Decimal;
use crate::model::run::{Override, RunRecord};
use crate::store::StoredDeadLetter;

/// Lines of a list that are shown without `--all`.
pub const SHOWN: usize = 10;

/// The report; lists are folded after `limit` lines.
///
/// # Errors
/// Where a sum overflows.
pub fn text(job: &Job, report: &Report, limit: usize, style: Style) -> Result<String> {
    let writer = Writer { report, limit, style };
    let mut out = String::new();
    let changed = report.kinds.total();
    let title = style.bold(&format!("trueup audit {}:", job.name));
    let runs = counted(report.runs.len() as u64, "run");
    let says = match changed {
        0 if report.periods == 0 => format!("{runs}, nothing changed"),
        0 => format!("{runs}, {}, no window", counted(report.periods, "billing period")),
        changed => format!("{runs}, {}", counted(changed, "correction")),
    };
    writeln!(out, "{title} {says}")?;
    writer.runs(&mut out)?;
    writer.totals(&mut out)?;
    writer.groups(&mut out, "by cause", &report.by_cause)?;
    writer.groups(&mut out, "by customer", &report.by_customer)?;
    writer.groups(&mut out, "by meter", &report.by_meter)?;
    let hidden = changed.saturating_sub(report.kinds.adjusted).saturating_sub(report.changes.len() as u64);
    writer.changes(&mut out, "largest changes", &report.changes, hidden)?;
    let shown = report.adjustments.get(..limit.min(report.adjustments.len())).unwrap_or_default();
    let hidden = report.adjustments.len() - shown.len();
    writer.changes(&mut out, "closed periods: recorded, the rows stay as invoiced", shown, hidden as u64)?;
    writer.letters(&mut out, "dead letters opened", &report.opened)?;
    writer.letters(&mut out, "dead letters resolved", &report.resolved)?;
    Ok(out)
}

struct Writer<'w> {
    report: &'w Report,
    limit: usize,
    style: Style,
}

/// `+1.5`, `-2`, `unchanged`.
fn signed(change: Decimal) -> String {
    match change {
        change if change.is_zero() => "unchanged".to_owned(),
        change if change.is_negative() => change.to_string(),
        change => format!("+{change}"),
    }
}

impl Writer<'_> {
    fn field(&self, out: &mut String, name: &str, says: &str) -> Result<()> {
        writeln!(out, "  {} {says}", self.style.dim(&format!("{name:<12}")))?;
        Ok(())
    }

    fn folded(&self, out: &mut String, hidden: u64) -> Result<()> {
        if hidden > 0 {
            writeln!(out, "    {}", self.style.dim(&format!("… and {} more: --all shows them", number(hidden))))?;
        }
        Ok(())
    }

    fn runs(&self, out: &mut String) -> Result<()> {
        let line = |run: &RunRecord| {
            let overrides = run.origin.overrides.iter().map(|which| match which {
                Override::Guard => "--yes",
                Override::ClosedPeriods => "--allow-closed",
                Override::LaterRuns => "--force",
            });
            let overrides: Vec<_> = overrides.collect();
            let told = if overrides.is_empty() { String::new() } else { format!(", told {}", overrides.join(" ")) };
            let finished = run.finished_at.utc().format("%Y-%m-%d %H:%M:%SZ");
            format!("{} {finished} {} by {}{told}", run.run_id, run.mode.name(), run.origin.started_by)
        };
        let hidden = self.report.runs.len().saturating_sub(self.limit);
        for (at, run) in self.report.runs.iter().skip(hidden).enumerate() {
            self.field(out, if at == 0 { "run" } else { "" }, &line(run))?;
        }
        if hidden > 0 {
            self.field(
                out,
                "",
                &self.style.dim(&format!("and {} before them: --all shows them", counted(hidden as u64, "run"))),
            )?;
        }
        Ok(())
    }

    fn sums(&self, out: &mut String, name: &str, totals: &BTreeMap<String, Totals>) -> Result<()> {
        for (at, (currency, totals)) in totals.iter().enumerate() {
            let (before, after, change) = (totals.before.total()?, totals.after.total()?, totals.change()?);
            let says = format!("{currency} {before} -> {after}  {}", signed(change));
            self.field(out, if at == 0 { name } else { "" }, &says)?;
        }
        Ok(())
    }

    fn totals(&self, out: &mut String) -> Result<()> {
        let kinds = self.report.kinds;
        let says = format!(
            "{} inserted, {} updated, {} retracted",
            number(kinds.inserted),
            number(kinds.updated),
            number(kinds.retracted)
        );
        self.field(out, "windows", &says)?;
        self.sums(out, "cost", &self.report.totals)?;
        self.field(out, "periods", &format!("{} changed", number(self.report.periods)))?;
        self.sums(out, "amount", &self.report.amounts)?;
        for (currency, change) in &self.report.adjusted {
            let says = format!("{} in closed periods, {currency} {}", number(kinds.adjusted), signed(change.total()?));
            self.field(out, "adjusted", &says)?;
        }
        if self.report.adjusted_periods > 0 {
            let bills = counted(self.report.adjusted_periods, "bill");
            self.field(
                out,
                if self.report.adjusted.is_empty() { "adjusted" } else { "" },
                &format!("{bills} of closed periods"),
            )?;
            self.sums(out, "", &self.report.adjusted_amounts)?;
        }
        let (opened, resolved) = (self.report.opened.len() as u64, self.report.resolved.len() as u64);
        self.field(out, "dead letters", &format!("{} opened, {} resolved", number(opened), number(resolved)))
    }

    /// The groups with the largest changes first.
    fn groups(&self, out: &mut String, title: &str, groups: &Groups) -> Result<()> {
        if groups.is_empty() {
            return Ok(());
        }
        let mut sorted = Vec::new();
        for ((name, currency), group) in groups {
            sorted.push((group.change.total()?, group.kinds.total(), name, currency));
        }
        sorted.sort_by(|a, b| (b.0.abs(), b.1, a.2, a.3).cmp(&(a.0.abs(), a.1, b.2, b.3)));
        let row = |(change, corrections, name, currency): &(Decimal, u64, &String, &String)| {
            vec![format!("    {name}"), number(*corrections), format!("{} {currency}", signed(*change))]
        };
        let rows: Vec<_> = sorted.iter().take(self.limit).map(row).collect();
        out.push('\n');
        out.push_str(&table(&[&format!("  {title}"), "corrections", "cost change"], &rows, &[1, 2], self.style));
        self.folded(out, sorted.len().saturating_sub(rows.len()) as u64)
    }

    fn changes(&self, out: &mut String, title: &str, changes: &[Changed], hidden: u64) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let quantity = |values: Option<Values>| values.map_or_else(|| "-".to_owned(), |values| values.quantity.to_string());
        let row = |changed: &Changed| {
            let Changed { entry, causes, change } = changed;
            vec![
                format!("    {}", entry.kind),
                entry.customer_id.to_string(),
                describe(&entry.key),
                quantity(entry.before),
                quantity(entry.after),
                format!("{} {}", signed(*change), entry.currency),
                causes.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
            ]
        };
        let rows: Vec<_> = changes.iter().map(row).collect();
        writeln!(out, "\n  {}", self.style.bold(title))?;
        let header = ["", "customer", "window", "quantity", "becomes", "cost change", "cause"];
        out.push_str(&table(&header, &rows, &[3, 4, 5], self.style));
        self.folded(out, hidden)
    }

    fn letters(&self, out: &mut String, title: &str, letters: &[StoredDeadLetter]) -> Result<()> {
        if letters.is_empty() {
            return Ok(());
        }
        let row = |stored: &StoredDeadLetter| {
            let key = &stored.letter.key;
            let event = format!("    {} / {}", key.tenant_id, key.event_id);
            let meter = if key.meter_id.is_empty() { "-" } else { &key.meter_id };
            let time = stored.letter.event_time.map_or_else(|| "-".to_owned(), |t| t.to_string());
            vec![event, time, meter.to_owned(), key.reason.name().to_owned()]
        };
        let rows: Vec<_> = letters.iter().take(self.limit).map(row).collect();
        writeln!(out, "\n  {}", self.style.bold(title))?;
        out.push_str(&table(&["    event", "time", "meter", "reason"], &rows, &[], self.style));
        self.folded(out, letters.len().saturating_sub(rows.len()) as u64)
    }
}
