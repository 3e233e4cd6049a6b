//! Reading rows back, exactly as they were written.

use std::borrow::Cow;

use anyhow::{Context, Result};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension as _, Params, Row};

use super::digests::{Digests, WindowCells};
use crate::model::aggregate::{PeriodKey, PeriodRow, StoredWindow, WindowKey};
use crate::model::run::RunRecord;
use crate::model::timestamp::{SECOND, Timestamp};
use crate::model::window::Span;
use crate::store::reader::{LedgerReader, PeriodReader, WindowReader};
use crate::store::rows::{self, Cells, Unreadable};
use crate::store::{
    Cell, Corrections, LedgerEntry, PeriodEntry, RowSink, Stamp, StoredDeadLetter, SubscriptionKey, Table, WindowChoice,
};

impl Cells for Row<'_> {
    fn place(&self, column: &str) -> Option<usize> {
        self.as_ref().column_index(column).ok()
    }

    fn cell_at(&self, place: usize) -> Result<Option<Cow<'_, str>>> {
        text_of(self.get_ref(place)?).with_context(|| format!("column {}", place + 1))
    }

    fn integer_at(&self, place: usize) -> Result<Option<i64>> {
        Ok(match self.get_ref(place)? {
            ValueRef::Integer(number) => Some(number),
            _ => None,
        })
    }
}

fn text_of(value: ValueRef<'_>) -> Result<Option<Cow<'_, str>>> {
    Ok(match value {
        ValueRef::Null => None,
        ValueRef::Integer(value) => Some(Cow::Owned(value.to_string())),
        other => Some(Cow::Borrowed(other.as_str()?)),
    })
}

fn query<T>(
    connection: &Connection,
    sql: &str,
    parameters: impl Params,
    mut of: impl FnMut(&Row<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let mut statement = connection.prepare(sql)?;
    let mut found = statement.query(parameters)?;
    let mut result = Vec::new();
    while let Some(row) = found.next()? {
        result.push(of(row)?);
    }
    Ok(result)
}

pub(super) fn runs(connection: &Connection, job: &str) -> Result<Vec<RunRecord>> {
    query(connection, "SELECT * FROM runs WHERE job = ?1 ORDER BY version, run_id", [job], |row| rows::run(row))
}

pub(super) fn extent(connection: &Connection, job: &str) -> Result<Option<Span>> {
    let sql = "SELECT min(rtrim(window_start, 'Z')), max(rtrim(window_end, 'Z')) FROM usage_windows WHERE job = ?1";
    let (start, end): (Option<String>, Option<String>) =
        connection.query_row(sql, [job], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let instant = |text: &str| {
        let row = || Unreadable { table: "usage_windows", row: format!("whose window begins or ends at `{text}`") };
        text.parse::<Timestamp>().with_context(row)
    };
    Ok(match start.zip(end) {
        Some((start, end)) => Some(Span { start: instant(&start)?, end: instant(&end)? }),
        None => None,
    })
}

/// Rows of `usage_windows` whose window touches a span of whole seconds, and perhaps others.
/// Without the `Z`, texts sort as their instants do, with a fraction of a second or not.
fn select_windows(condition: &str, (end, start): (&str, &str)) -> String {
    let columns = WindowReader::COLUMNS.join(", ");
    format!("SELECT {columns} FROM usage_windows WHERE job = ?1 {condition} AND window_start < {end} AND window_end > {start}")
}

/// The end and the start of a span, rounded outward to whole seconds, as [`select_windows`]
/// compares with them.
fn bounds(span: Span) -> [String; 2] {
    let rest = |t: Timestamp| t.nanos().rem_euclid(SECOND);
    let whole = |t: Timestamp, more: i64| Timestamp::from_nanos(t.nanos().saturating_sub(rest(t)).saturating_add(more));
    let text = |t: Timestamp| t.to_string().trim_end_matches('Z').to_owned();
    let more = if rest(span.end) == 0 { 0 } else { SECOND };
    [text(whole(span.end, more)), text(whole(span.start, 0))]
}

pub(super) fn windows(connection: &Connection, job: &str, span: Span) -> Result<Vec<StoredWindow>> {
    let [end, start] = bounds(span);
    // Digests and rows are of one state, whoever publishes meanwhile.
    let connection = &*connection.unchecked_transaction()?;
    let (mut reader, digests) = (WindowReader::default(), Digests::load(connection)?);
    let mut windows = query(connection, &select_windows("", ("?2", "?3")), [job, &end, &start], |row| {
        reader.read(&WindowCells { row, digests: &digests })
    })?;
    windows.retain(|stored| stored.row.window().overlaps(span));
    windows.sort_unstable_by(|a, b| a.row.key.cmp(&b.row.key));
    Ok(windows)
}

pub(super) fn each_window(connection: &Connection, job: &str, each: &mut dyn FnMut(StoredWindow) -> Result<()>) -> Result<()> {
    // Digests and rows are of one state, whoever publishes meanwhile.
    let connection = &*connection.unchecked_transaction()?;
    let (mut reader, digests) = (WindowReader::default(), Digests::load(connection)?);
    let sql = format!("SELECT {} FROM usage_windows WHERE job = ?1", WindowReader::COLUMNS.join(", "));
    let mut statement = connection.prepare(&sql)?;
    let mut found = statement.query([job])?;
    while let Some(row) = found.next()? {
        each(reader.read(&WindowCells { row, digests: &digests })?)?;
    }
    Ok(())
}

/// Rows of `usage_periods` whose period touches a span.
fn select_periods(condition: &str, (end, start): (&str, &str)) -> String {
    let columns = PeriodReader::COLUMNS.join(", ");
    format!(
        "SELECT {columns} FROM usage_periods WHERE job = ?1 {condition} \
         AND rtrim(period_start, 'Z') < rtrim({end}, 'Z') AND rtrim(period_end, 'Z') > rtrim({start}, 'Z')"
    )
}

pub(super) fn periods(connection: &Connection, job: &str, span: Span) -> Result<Vec<PeriodRow>> {
    all_periods(connection, &select_periods("", ("?2", "?3")), job, span)
}

pub(super) fn periods_outside(connection: &Connection, job: &str, span: Span) -> Result<Vec<PeriodRow>> {
    let sql = format!(
        "SELECT {} FROM usage_periods WHERE job = ?1 \
         AND (rtrim(period_start, 'Z') >= rtrim(?2, 'Z') OR rtrim(period_end, 'Z') <= rtrim(?3, 'Z'))",
        PeriodReader::COLUMNS.join(", ")
    );
    all_periods(connection, &sql, job, span)
}

fn all_periods(connection: &Connection, sql: &str, job: &str, span: Span) -> Result<Vec<PeriodRow>> {
    let mut reader = PeriodReader::default();
    let parameters = [job, &span.end.to_string(), &span.start.to_string()];
    let mut periods = query(connection, sql, parameters, |row| reader.read(row))?;
    periods.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    Ok(periods)
}

/// As [`windows`], of these choices; with how many runs there were.
pub(super) fn windows_of(
    connection: &Connection,
    job: &str,
    span: Span,
    choices: &[&WindowChoice],
) -> Result<(i64, Vec<StoredWindow>)> {
    // The key begins with these columns.
    let of = |meter: &str| select_windows(&format!("AND tenant_id = ?2 AND subscription_id = ?3 {meter}"), ("?4", "?5"));
    // Digests and rows are of one state, whoever publishes meanwhile.
    let connection = &*connection.unchecked_transaction()?;
    let runs = connection.query_row("SELECT count(*) FROM runs", [], |row| row.get(0))?;
    let (mut of_any, mut of_meter) = (connection.prepare(&of(""))?, connection.prepare(&of("AND meter_id = ?6"))?);
    let (mut reader, digests) = (WindowReader::default(), Digests::load(connection)?);
    let mut windows = Vec::new();
    for choice in choices {
        let (Some(whole), (tenant, subscription)) = (choice.whole(), &choice.subscription) else { continue };
        let [end, start] = bounds(Span { start: span.start.max(whole.start), end: span.end.min(whole.end) });
        let mut found = match &choice.meter_id {
            None => of_any.query([job, tenant, subscription, &end, &start])?,
            Some(meter) => of_meter.query([job, tenant, subscription, &end, &start, meter])?,
        };
        while let Some(row) = found.next()? {
            let cells = WindowCells { row, digests: &digests };
            // Few rows may be wanted of many: the others are not made values of.
            if choice.spans.len() == 1 || choice.wants(WindowReader::window(&cells)?) {
                windows.push(reader.read(&cells)?);
            }
        }
    }
    windows.retain(|stored| stored.row.window().overlaps(span));
    windows.sort_unstable_by(|a, b| a.row.key.cmp(&b.row.key));
    Ok((runs, windows))
}

/// As [`periods`], of these subscriptions.
pub(super) fn periods_of(connection: &Connection, job: &str, span: Span, keys: &[&SubscriptionKey]) -> Result<Vec<PeriodRow>> {
    let sql = select_periods("AND tenant_id = ?2 AND subscription_id = ?3", ("?4", "?5"));
    let [end, start] = [span.end.to_string(), span.start.to_string()];
    let (mut reader, mut statement) = (PeriodReader::default(), connection.prepare(&sql)?);
    let mut periods = Vec::new();
    for (tenant, subscription) in keys {
        let mut found = statement.query([job, tenant, subscription, &end, &start])?;
        while let Some(row) = found.next()? {
            periods.push(reader.read(row)?);
        }
    }
    periods.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    Ok(periods)
}

pub(super) fn state(connection: &Connection, job: &str, name: &str) -> Result<Option<(String, String)>> {
    let sql = "SELECT run_id, content FROM job_state WHERE job = ?1 AND name = ?2";
    Ok(connection.query_row(sql, [job, name], |row| Ok((row.get(0)?, row.get(1)?))).optional()?)
}

pub(super) fn dead_letters(connection: &Connection, job: &str) -> Result<Vec<StoredDeadLetter>> {
    let sql =
        "SELECT * FROM dead_letters WHERE job = ?1 ORDER BY first_run_id, tenant_id, event_time, event_id, meter_id, reason";
    query(connection, sql, [job], |row| rows::dead_letter(row))
}

pub(super) fn ledger(connection: &Connection, job: &str, each: &mut dyn FnMut(LedgerEntry) -> Result<()>) -> Result<()> {
    entries(connection, "SELECT * FROM corrections WHERE job = ?1 ORDER BY sequence", [job], each)
}

pub(super) fn corrections(
    connection: &Connection,
    job: &str,
    of: Corrections<'_>,
    each: &mut dyn FnMut(LedgerEntry) -> Result<()>,
) -> Result<()> {
    match of {
        Corrections::OfMeter { tenant_id, subscription_id, meter_id } => {
            let sql = "SELECT corrections.* FROM correction_ranges AS ranges CROSS JOIN corrections USING \
                       (job, tenant_id, subscription_id, meter_id) WHERE sequence BETWEEN first_sequence AND last_sequence \
                       AND ranges.job = ?1 AND ranges.tenant_id = ?2 AND ranges.subscription_id = ?3 AND ranges.meter_id = ?4 \
                       ORDER BY first_sequence, sequence";
            entries(connection, sql, [job, tenant_id, subscription_id, meter_id], each)
        }
        Corrections::OfRun(run_id) => {
            let sql = "SELECT * FROM corrections WHERE job = ?1 AND run_id = ?2 \
                       AND sequence >= (SELECT first_correction FROM runs WHERE run_id = ?2) \
                       AND sequence <= (SELECT last_correction FROM runs WHERE run_id = ?2) ORDER BY sequence";
            entries(connection, sql, [job, run_id], each)
        }
    }
}

/// Corrections that neither their meter's ranges nor their run leads to, and what leads to others.
pub(super) fn lost_corrections(connection: &Connection, job: &str) -> Result<Vec<(&'static str, String)>> {
    let by_meter = "SELECT correction_id FROM corrections AS c WHERE job = ?1 AND NOT EXISTS (SELECT 1 FROM correction_ranges AS r \
                    WHERE r.job = c.job AND r.tenant_id = c.tenant_id AND r.subscription_id = c.subscription_id \
                    AND r.meter_id = c.meter_id AND c.sequence BETWEEN r.first_sequence AND r.last_sequence) ORDER BY sequence";
    let is_of = |sequence: &str| {
        format!(
            "EXISTS (SELECT 1 FROM corrections AS c WHERE c.sequence = {sequence} AND c.job = r.job AND c.tenant_id = r.tenant_id \
             AND c.subscription_id = r.subscription_id AND c.meter_id = r.meter_id)"
        )
    };
    let astray = format!(
        "SELECT tenant_id || ' / ' || subscription_id || ' / ' || meter_id FROM correction_ranges AS r WHERE job = ?1 \
         AND (NOT ({} AND {}) OR EXISTS (SELECT 1 FROM correction_ranges AS later WHERE later.job = r.job \
         AND later.tenant_id = r.tenant_id AND later.subscription_id = r.subscription_id AND later.meter_id = r.meter_id \
         AND later.first_sequence > r.first_sequence AND later.first_sequence <= r.last_sequence))",
        is_of("first_sequence"),
        is_of("last_sequence")
    );
    // A run without corrections says where they would begin.
    let by_run = "SELECT runs.run_id FROM runs LEFT JOIN (SELECT run_id, min(sequence) AS first, max(sequence) AS last \
                  FROM corrections WHERE job = ?1 GROUP BY run_id) AS of_run USING (run_id) WHERE job = ?1 \
                  AND (first_correction <> coalesce(first, first_correction) OR last_correction <> coalesce(last, first_correction - 1))";
    let mut lost = Vec::new();
    for (table, sql) in [("correction_ranges", by_meter), ("correction_ranges", &astray), ("runs", by_run)] {
        let mut statement = connection.prepare(sql)?;
        let rows = statement.query_map([job], |row| row.get::<_, String>(0))?;
        for row in rows {
            lost.push((table, row?));
        }
    }
    Ok(lost)
}

fn entries(
    connection: &Connection,
    sql: &str,
    parameters: impl Params,
    each: &mut dyn FnMut(LedgerEntry) -> Result<()>,
) -> Result<()> {
    let mut statement = connection.prepare(sql)?;
    let mut found = statement.query(parameters)?;
    let mut reader = LedgerReader::default();
    while let Some(row) = found.next()? {
        each(reader.read(row)?)?;
    }
    Ok(())
}

pub(super) fn period_ledger(connection: &Connection, job: &str, each: &mut dyn FnMut(PeriodEntry) -> Result<()>) -> Result<()> {
    let mut statement = connection.prepare("SELECT * FROM period_corrections WHERE job = ?1 ORDER BY rowid")?;
    let mut found = statement.query([job])?;
    while let Some(row) = found.next()? {
        each(rows::period_entry(row)?)?;
    }
    Ok(())
}

pub(super) fn period_stamps(connection: &Connection, job: &str) -> Result<Vec<(PeriodKey, Stamp)>> {
    query(connection, "SELECT * FROM usage_periods WHERE job = ?1", [job], |row| rows::period_stamp(row))
}

pub(super) fn misdated_windows(connection: &Connection, job: &str) -> Result<Vec<WindowKey>> {
    let sql = "SELECT * FROM usage_windows WHERE job = ?1 AND (run_id, version, updated_at) NOT IN \
               (SELECT run_id, version, finished_at FROM runs WHERE job = ?1)";
    query(connection, sql, [job], |row| rows::window_key(row))
}

/// Columns of this store alone: they say where the rows of its ledger lie.
const INTERNAL: [&str; 4] = ["sequence", "number", "first_correction", "last_correction"];

pub(super) fn export(connection: &Connection, job: &str, table: Table, each: RowSink<'_>) -> Result<Vec<String>> {
    let connection = &*connection.unchecked_transaction()?;
    let sql = format!("SELECT * FROM {} WHERE job = ?1 ORDER BY {}", table.name(), table.key());
    let mut statement = connection.prepare(&sql)?;
    let shown = |(_, name): &(usize, &str)| !INTERNAL.contains(name);
    let digests = Digests::load(connection)?;
    let is_digest = |name: &str| {
        let mut digests = WindowReader::COLUMNS.get(WindowReader::DIGESTS).into_iter().flatten();
        table == Table::UsageWindows && digests.any(|digest| *digest == name)
    };
    let mut columns: Vec<_> =
        statement.column_names().enumerate().filter(shown).map(|(place, name)| (place, name.to_owned())).collect();
    // What is made when it is read comes last in the table, but first of what it identifies.
    columns.sort_by_key(|(_, name)| name != "correction_id");
    let (places, names): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
    let are_digests: Vec<_> = names.iter().map(|name: &String| is_digest(name)).collect();
    let mut found = statement.query([job])?;
    let mut cells = Vec::with_capacity(names.len());
    while let Some(row) = found.next()? {
        cells.clear();
        for (place, is_digest) in places.iter().zip(&are_digests) {
            cells.push(match row.get_ref(*place)? {
                ValueRef::Null => Cell::Null,
                ValueRef::Integer(number) if *is_digest => Cell::Text(digests.text(number).into_owned()),
                ValueRef::Integer(value) => Cell::Integer(value),
                other => Cell::Text(other.as_str()?.to_owned()),
            });
        }
        each(&cells)?;
    }
    Ok(names)
}
