//! Rows of the contract's tables from cells of text: every store reads them back
//! the same way.

use std::borrow::Cow;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::{PeriodEntry, Stamp, StoredDeadLetter};
use crate::model::aggregate::{DeadLetter, DeadLetterKey, PERIOD_CHANGE, PeriodKey, Reason, Text, WindowKey};
use crate::model::run::{Origin, RunMode, RunRecord};
use crate::model::window::Span;

/// A row whose cells are found by the name of their column, or by its place.
pub trait Cells {
    /// The place of a column; `None` where there is none of that name.
    fn place(&self, column: &str) -> Option<usize>;

    /// The text of a cell; `None` for NULL.
    fn cell_at(&self, place: usize) -> Result<Option<Cow<'_, str>>>;

    /// As [`Cells::cell_at`], by the column's name.
    fn cell(&self, column: &str) -> Result<Option<Cow<'_, str>>> {
        let place = self.place(column).with_context(|| format!("column {column} is missing"))?;
        self.cell_at(place).with_context(|| format!("column {column}"))
    }

    /// The number of a cell that the store keeps as one; otherwise its text tells.
    fn integer_at(&self, _place: usize) -> Result<Option<i64>> {
        Ok(None)
    }
}

/// A stored row that says nothing, because somebody altered it.
#[derive(Debug, Clone)]
pub struct Unreadable {
    pub table: &'static str,
    /// What is known of its key.
    pub row: String,
}

impl Unreadable {
    pub const REMEDY: &str = "repair it from a backup; of usage_windows or usage_periods, delete it, and `trueup run --full` \
                              writes it anew";
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} cannot be read, so somebody altered it: {}", self.table, self.row, Unreadable::REMEDY)
    }
}

fn required<'r>(row: &'r dyn Cells, column: &str) -> Result<Cow<'r, str>> {
    row.cell(column)?.with_context(|| format!("column {column} is NULL"))
}

fn optional<T: FromStr>(row: &dyn Cells, column: &str) -> Result<Option<T>>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let Some(text) = row.cell(column)? else { return Ok(None) };
    text.parse().map(Some).with_context(|| format!("column {column} holds `{text}`"))
}

fn parsed<T: FromStr>(row: &dyn Cells, column: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    optional(row, column)?.with_context(|| format!("column {column} is NULL"))
}

fn string(row: &dyn Cells, column: &str) -> Result<String> {
    required(row, column).map(Cow::into_owned)
}

fn text(row: &dyn Cells, column: &str) -> Result<Text> {
    required(row, column).map(|text| Arc::from(&*text))
}

fn json<T: serde::de::DeserializeOwned>(row: &dyn Cells, column: &str) -> Result<T> {
    serde_json::from_str(&required(row, column)?).with_context(|| format!("column {column}"))
}

fn period_key(row: &dyn Cells) -> Result<PeriodKey> {
    Ok(PeriodKey {
        tenant_id: text(row, "tenant_id")?,
        subscription_id: text(row, "subscription_id")?,
        meter_id: text(row, "meter_id")?,
        price_id: text(row, "price_id")?,
        dimensions: text(row, "dimensions")?,
        period_start: parsed(row, "period_start")?,
    })
}

/// A row of `runs`.
pub fn run(row: &dyn Cells) -> Result<RunRecord> {
    let row_of = || row.cell("run_id").ok().flatten().unwrap_or(Cow::Borrowed("?")).into_owned();
    run_of(row).with_context(|| Unreadable { table: "runs", row: row_of() })
}

fn run_of(row: &dyn Cells) -> Result<RunRecord> {
    let (start, end) = (optional(row, "range_start")?, optional(row, "range_end")?);
    Ok(RunRecord {
        run_id: string(row, "run_id")?,
        job: string(row, "job")?,
        mode: {
            let mode = required(row, "mode")?;
            RunMode::parse(&mode).with_context(|| format!("unknown mode `{mode}`"))?
        },
        status: string(row, "status")?,
        range: start.zip(end).map(|(start, end)| Span { start, end }),
        started_at: parsed(row, "started_at")?,
        finished_at: parsed(row, "finished_at")?,
        origin: Origin { started_by: string(row, "started_by")?, overrides: json(row, "overrides")? },
        version: parsed(row, "version")?,
        counts: json(row, "counts")?,
        input: json(row, "input")?,
        basis: json(row, "basis")?,
        ledger_digest: string(row, "ledger_digest")?,
    })
}

/// A row of `dead_letters`.
pub fn dead_letter(row: &dyn Cells) -> Result<StoredDeadLetter> {
    let row_of = || row.cell("event_id").ok().flatten().unwrap_or(Cow::Borrowed("?")).into_owned();
    dead_letter_of(row).with_context(|| Unreadable { table: "dead_letters", row: row_of() })
}

fn dead_letter_of(row: &dyn Cells) -> Result<StoredDeadLetter> {
    let reason = required(row, "reason")?;
    Ok(StoredDeadLetter {
        letter: DeadLetter {
            key: DeadLetterKey {
                tenant_id: string(row, "tenant_id")?,
                event_id: string(row, "event_id")?,
                meter_id: string(row, "meter_id")?,
                reason: Reason::parse(&reason).with_context(|| format!("unknown reason `{reason}`"))?,
            },
            detail: string(row, "detail")?,
            event: string(row, "event")?,
            event_time: optional(row, "event_time")?,
        },
        occurrences: parsed(row, "occurrences")?,
        first_run_id: string(row, "first_run_id")?,
        last_run_id: string(row, "last_run_id")?,
        resolved_run_id: row.cell("resolved_run_id")?.map(Cow::into_owned),
        row_digest: parsed(row, "row_digest")?,
    })
}

/// Which run wrote a row of `usage_periods`, as the row says.
pub fn period_stamp(row: &dyn Cells) -> Result<(PeriodKey, Stamp)> {
    let stamp =
        Stamp { run_id: string(row, "run_id")?, version: parsed(row, "version")?, updated_at: parsed(row, "updated_at")? };
    Ok((period_key(row)?, stamp))
}

/// The key of a row of `usage_windows`.
pub fn window_key(row: &dyn Cells) -> Result<WindowKey> {
    Ok(WindowKey { period: Arc::new(period_key(row)?), window_start: parsed(row, "window_start")? })
}

/// A row of `period_corrections`.
pub fn period_entry(row: &dyn Cells) -> Result<PeriodEntry> {
    Ok(PeriodEntry {
        correction_id: string(row, "correction_id")?,
        run_id: string(row, "run_id")?,
        key: period_key(row)?,
        recorded_at: parsed(row, "recorded_at")?,
        // Nor this one.
        kind: row.cell("kind").ok().flatten().map_or_else(|| PERIOD_CHANGE.to_owned(), Cow::into_owned),
        before: string(row, "row_before")?,
        after: string(row, "row_after")?,
        row_digest: parsed(row, "row_digest")?,
    })
}
