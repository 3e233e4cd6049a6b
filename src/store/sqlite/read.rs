//! Reading rows back, exactly as they were written.

use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, Row};

use crate::model::aggregate::{
    Basis, DeadLetter, DeadLetterKey, PeriodKey, PeriodRow, Reason, StoredWindow, Text, Values, WindowKey, WindowRow,
};
use crate::model::run::RunRecord;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::store::{Cell, LedgerEntry, RowSink, StoredDeadLetter, Table};

/// A cell that holds another type as text.
fn parsed<T: FromStr>(row: &Row<'_>, column: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let text = row.get_ref(column)?.as_str().with_context(|| format!("column {column}"))?;
    text.parse().with_context(|| format!("column {column} holds `{text}`"))
}

fn optional<T: FromStr>(row: &Row<'_>, column: &str) -> Result<Option<T>>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    match row.get_ref(column)? {
        ValueRef::Null => Ok(None),
        _ => parsed(row, column).map(Some),
    }
}

fn text(row: &Row<'_>, column: &str) -> Result<Text> {
    Ok(Arc::from(row.get_ref(column)?.as_str().with_context(|| format!("column {column}"))?))
}

fn count(row: &Row<'_>, column: &str) -> Result<u64> {
    Ok(u64::try_from(row.get::<_, i64>(column)?)?)
}

fn period_key(row: &Row<'_>) -> Result<PeriodKey> {
    Ok(PeriodKey {
        tenant_id: text(row, "tenant_id")?,
        subscription_id: text(row, "subscription_id")?,
        meter_id: text(row, "meter_id")?,
        price_id: text(row, "price_id")?,
        dimensions: text(row, "dimensions")?,
        period_start: parsed(row, "period_start")?,
    })
}

fn window_key(row: &Row<'_>) -> Result<WindowKey> {
    Ok(WindowKey { period: period_key(row)?, window_start: parsed(row, "window_start")? })
}

pub(super) fn runs(connection: &Connection, job: &str) -> Result<Vec<RunRecord>> {
    let mut statement = connection.prepare("SELECT * FROM runs WHERE job = ?1 ORDER BY version, run_id")?;
    let mut rows = statement.query([job])?;
    let mut runs = Vec::new();
    while let Some(row) = rows.next()? {
        let start: Option<Timestamp> = optional(row, "range_start")?;
        let end: Option<Timestamp> = optional(row, "range_end")?;
        let json = |column: &str| row.get::<_, String>(column);
        runs.push(RunRecord {
            run_id: row.get("run_id")?,
            job: row.get("job")?,
            mode: row.get("mode")?,
            status: row.get("status")?,
            range: start.zip(end).map(|(start, end)| Span { start, end }),
            started_at: parsed(row, "started_at")?,
            finished_at: parsed(row, "finished_at")?,
            version: row.get("version")?,
            counts: serde_json::from_str(&json("counts")?).context("column counts")?,
            input: serde_json::from_str(&json("input")?).context("column input")?,
            basis: serde_json::from_str(&json("basis")?).context("column basis")?,
            ledger_digest: row.get("ledger_digest")?,
        });
    }
    Ok(runs)
}

pub(super) fn extent(connection: &Connection, job: &str) -> Result<Option<Span>> {
    let mut statement =
        connection.prepare("SELECT min(window_start) AS start, max(window_end) AS end FROM usage_windows WHERE job = ?1")?;
    let mut rows = statement.query([job])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    let (start, end): (Option<Timestamp>, Option<Timestamp>) = (optional(row, "start")?, optional(row, "end")?);
    Ok(start.zip(end).map(|(start, end)| Span { start, end }))
}

/// Window bounds are whole seconds, so their texts sort as they do.
pub(super) fn windows(connection: &Connection, job: &str, span: Span) -> Result<Vec<StoredWindow>> {
    let mut statement =
        connection.prepare("SELECT * FROM usage_windows WHERE job = ?1 AND window_start < ?2 AND window_end > ?3")?;
    let mut rows = statement.query([job, &span.end.to_string(), &span.start.to_string()])?;
    let mut windows = Vec::new();
    while let Some(row) = rows.next()? {
        windows.push(StoredWindow {
            row: WindowRow {
                key: window_key(row)?,
                customer_id: text(row, "customer_id")?,
                window_end: parsed(row, "window_end")?,
                period_end: parsed(row, "period_end")?,
                quantity: parsed(row, "quantity")?,
                event_count: count(row, "event_count")?,
                cost: parsed(row, "cost")?,
                currency: text(row, "currency")?,
                events_digest: row.get("events_digest")?,
                basis: Basis {
                    meter: text(row, "meter_digest")?,
                    price: text(row, "price_digest")?,
                    subscription: text(row, "subscription_digest")?,
                    customer: text(row, "customer_digest")?,
                },
            },
            version: row.get("version")?,
            run_id: text(row, "run_id")?,
        });
    }
    windows.sort_unstable_by(|a, b| a.row.key.cmp(&b.row.key));
    Ok(windows)
}

pub(super) fn periods(connection: &Connection, job: &str, span: Span) -> Result<Vec<PeriodRow>> {
    let mut statement =
        connection.prepare("SELECT * FROM usage_periods WHERE job = ?1 AND period_start < ?2 AND period_end > ?3")?;
    let mut rows = statement.query([job, &span.end.to_string(), &span.start.to_string()])?;
    let mut periods = Vec::new();
    while let Some(row) = rows.next()? {
        periods.push(PeriodRow {
            key: period_key(row)?,
            customer_id: text(row, "customer_id")?,
            period_end: parsed(row, "period_end")?,
            quantity: parsed(row, "quantity")?,
            cost: parsed(row, "cost")?,
            minimum_adjustment: parsed(row, "minimum_adjustment")?,
            commitment_adjustment: parsed(row, "commitment_adjustment")?,
            amount: parsed(row, "amount")?,
            currency: text(row, "currency")?,
        });
    }
    periods.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    Ok(periods)
}

pub(super) fn dead_letters(connection: &Connection, job: &str) -> Result<Vec<StoredDeadLetter>> {
    let mut statement = connection.prepare(
        "SELECT * FROM dead_letters WHERE job = ?1 ORDER BY first_run_id, tenant_id, event_time, event_id, meter_id, reason",
    )?;
    let mut rows = statement.query([job])?;
    let mut letters = Vec::new();
    while let Some(row) = rows.next()? {
        let reason: String = row.get("reason")?;
        letters.push(StoredDeadLetter {
            letter: DeadLetter {
                key: DeadLetterKey {
                    tenant_id: row.get("tenant_id")?,
                    event_id: row.get("event_id")?,
                    meter_id: row.get("meter_id")?,
                    reason: Reason::parse(&reason).with_context(|| format!("unknown reason `{reason}`"))?.name(),
                },
                detail: row.get("detail")?,
                event: row.get("event")?,
                event_time: optional(row, "event_time")?,
            },
            occurrences: count(row, "occurrences")?,
            first_run_id: row.get("first_run_id")?,
            last_run_id: row.get("last_run_id")?,
            resolved_run_id: row.get("resolved_run_id")?,
        });
    }
    Ok(letters)
}

pub(super) fn ledger(connection: &Connection, job: &str, each: &mut dyn FnMut(LedgerEntry) -> Result<()>) -> Result<()> {
    let mut statement = connection.prepare("SELECT * FROM corrections WHERE job = ?1 ORDER BY correction_id")?;
    let mut rows = statement.query([job])?;
    while let Some(row) = rows.next()? {
        let values = |suffix: &str| -> Result<Option<Values>> {
            let Some(quantity) = optional(row, &format!("quantity_{suffix}"))? else { return Ok(None) };
            let cost = parsed(row, &format!("cost_{suffix}"))?;
            Ok(Some(Values { quantity, cost, event_count: count(row, &format!("event_count_{suffix}"))? }))
        };
        each(LedgerEntry {
            correction_id: row.get("correction_id")?,
            run_id: row.get("run_id")?,
            key: window_key(row)?,
            kind: row.get("kind")?,
            causes: row.get("causes")?,
            before: values("before")?,
            after: values("after")?,
        })?;
    }
    Ok(())
}

pub(super) fn export(connection: &Connection, job: &str, table: Table, each: RowSink<'_>) -> Result<Vec<String>> {
    let order = match table {
        Table::UsageWindows => "tenant_id, subscription_id, meter_id, price_id, dimensions, period_start, window_start",
        Table::UsagePeriods => "tenant_id, subscription_id, meter_id, price_id, dimensions, period_start",
        Table::Corrections => "correction_id",
        Table::DeadLetters => "tenant_id, event_id, meter_id, reason",
        Table::Runs => "version, run_id",
    };
    let mut statement = connection.prepare(&format!("SELECT * FROM {} WHERE job = ?1 ORDER BY {order}", table.name()))?;
    let names: Vec<String> = statement.column_names().map(str::to_owned).collect();
    let mut rows = statement.query([job])?;
    let mut cells = Vec::with_capacity(names.len());
    while let Some(row) = rows.next()? {
        cells.clear();
        for column in 0..names.len() {
            cells.push(match row.get_ref(column)? {
                ValueRef::Null => Cell::Null,
                ValueRef::Integer(value) => Cell::Integer(value),
                other => Cell::Text(other.as_str()?.to_owned()),
            });
        }
        each(&cells)?;
    }
    Ok(names)
}
