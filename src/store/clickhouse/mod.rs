//! Aggregates in ClickHouse, published in an order that survives a crash at any point.

mod lease;
mod publish;
mod rows;

use std::borrow::Cow;

use anyhow::{Context, Result, bail};

use super::reader::{LedgerReader, PeriodReader, WindowReader};
use super::rows as read;
use super::{AggregateStore, Cell, Corrections, LedgerEntry, PeriodEntry, Publication, RowSink, Stamp, StoredDeadLetter, Table};
use crate::clickhouse_client::{Database, literal};
use crate::config::ClickHouseConnection;
use crate::model::aggregate::{PeriodKey, PeriodRow, StoredWindow, WindowKey};
use crate::model::run::RunRecord;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;

/// `sql/clickhouse/NNNN_name.sql`; the version of a store is how many of them it has.
const MIGRATIONS: [&str; 3] = [
    include_str!("../../../sql/clickhouse/0001_initial.sql"),
    include_str!("../../../sql/clickhouse/0002_ledger.sql"),
    include_str!("../../../sql/clickhouse/0003_lease.sql"),
];

/// A database with the tables of the contract.
pub struct ClickHouseStore {
    database: Database,
}

impl ClickHouseStore {
    /// Opens the store for writing: creates what is missing, and finishes or takes
    /// back what a run of `job` left unfinished when it was killed.
    ///
    /// # Errors
    /// Where the server cannot be reached, or the store was written by a newer version; a lock
    /// fault (exit code 6) where somebody else writes the job's rows.
    pub fn open(connection: &ClickHouseConnection, job: &str) -> Result<Self> {
        let database = Database::connect(connection)?;
        database.create_if_missing()?;
        database.execute(
            "CREATE TABLE IF NOT EXISTS trueup_schema (version UInt32, applied_at DateTime DEFAULT now()) \
             ENGINE = ReplacingMergeTree ORDER BY version",
        )?;
        let store = ClickHouseStore { database };
        let found = store.version()?;
        for (number, migration) in (1usize..).zip(MIGRATIONS).skip(found) {
            for statement in statements(migration) {
                store.database.execute(&statement).with_context(|| format!("migration {number} of the store"))?;
            }
            store.database.execute(&format!("INSERT INTO trueup_schema (version) VALUES ({number})"))?;
        }
        lease::check(&store.database, job)?;
        if publish::is_pending(&store.database, job)? {
            lease::hold(&store.database, job, "finishing what was interrupted", publish::recover)?;
        }
        Ok(store)
    }

    /// Opens the store for reading; `None` where there is none yet.
    ///
    /// # Errors
    /// As [`ClickHouseStore::open`].
    pub fn open_read_only(connection: &ClickHouseConnection) -> Result<Option<Self>> {
        let database = Database::connect(connection)?;
        let exists = format!("EXISTS TABLE {}.trueup_schema", database.quoted_name());
        let (_, rows) = database.clone_for_server().texts(&exists)?;
        if rows.first().and_then(|row| row.first()).cloned().flatten().as_deref() != Some("1") {
            return Ok(None);
        }
        let store = ClickHouseStore { database };
        Ok(if store.version()? == 0 { None } else { Some(store) })
    }

    /// # Errors
    /// Where the store is newer than this program.
    fn version(&self) -> Result<usize> {
        let (_, rows) = self.database.texts("SELECT max(version) FROM trueup_schema")?;
        let text = rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten().unwrap_or_default();
        let version: usize = text.parse().with_context(|| format!("schema version `{text}`"))?;
        if version > MIGRATIONS.len() {
            bail!(
                "the store was written by a newer trueup (schema version {version}, this one knows {}); upgrade trueup",
                MIGRATIONS.len()
            );
        }
        Ok(version)
    }

    /// Rows of a query, each through `of`.
    fn query<T>(&self, sql: &str, mut of: impl FnMut(&dyn read::Cells) -> Result<T>) -> Result<Vec<T>> {
        let mut found = Vec::new();
        self.each(sql, &mut |row| {
            found.push(of(row)?);
            Ok(())
        })?;
        Ok(found)
    }

    fn periods_where(&self, job: &str, condition: &str) -> Result<Vec<PeriodRow>> {
        let columns = PeriodReader::COLUMNS.join(", ");
        let sql = format!("SELECT {columns} FROM usage_periods FINAL WHERE job = {} AND {condition}", literal(job));
        let mut reader = PeriodReader::default();
        let mut periods = self.query(&sql, |row| reader.read(row)).context("reading usage_periods")?;
        periods.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(periods)
    }

    /// Gives the rows of a query one at a time: none is kept.
    fn each(&self, sql: &str, take: &mut dyn FnMut(&dyn read::Cells) -> Result<()>) -> Result<()> {
        // Conditions on columns outside of the key must not run before FINAL.
        let sql = format!("{sql} SETTINGS optimize_move_to_prewhere_if_final = 0");
        self.database.rows(&sql, &mut |names, cells| take(&TextRow { names, cells: &cells }))?;
        Ok(())
    }
}

/// A row of an answer.
struct TextRow<'r> {
    names: &'r [String],
    cells: &'r [Option<String>],
}

impl read::Cells for TextRow<'_> {
    fn place(&self, column: &str) -> Option<usize> {
        self.names.iter().position(|name| name == column)
    }

    fn cell_at(&self, place: usize) -> Result<Option<Cow<'_, str>>> {
        Ok(self.cells.get(place).and_then(Option::as_deref).map(Cow::Borrowed))
    }
}

/// The statements of a migration, without comments.
fn statements(migration: &str) -> Vec<String> {
    let code: Vec<_> = migration.lines().filter(|line| !line.trim_start().starts_with("--")).collect();
    code.join("\n")
        .split(";\n")
        .map(str::trim)
        .filter(|sql| !sql.is_empty())
        .map(|sql| sql.trim_end_matches(';').to_owned())
        .collect()
}

/// Instants as the server reads them, exactly.
fn instant(t: Timestamp) -> String {
    format!("fromUnixTimestamp64Nano(toInt64({}), 'UTC')", t.nanos())
}

impl AggregateStore for ClickHouseStore {
    fn runs(&self, job: &str) -> Result<Vec<RunRecord>> {
        let sql = format!("SELECT * FROM runs FINAL WHERE job = {} AND stage = 2 ORDER BY version, run_id", literal(job));
        self.query(&sql, read::run).context("reading runs")
    }

    fn unfinished(&self, job: &str) -> Result<Option<String>> {
        publish::unfinished(&self.database, job)
    }

    fn extent(&self, job: &str) -> Result<Option<Span>> {
        let sql = format!(
            "SELECT count() AS rows, min(window_start) AS start, max(window_end) AS end FROM usage_windows FINAL WHERE job = {}",
            literal(job)
        );
        let spans = self.query(&sql, |row| {
            let text = |column| -> Result<String> { Ok(row.cell(column)?.unwrap_or_default().into_owned()) };
            if text("rows")? == "0" {
                return Ok(None);
            }
            Ok(Some(Span { start: text("start")?.parse()?, end: text("end")?.parse()? }))
        })?;
        Ok(spans.into_iter().next().flatten())
    }

    fn windows(&self, job: &str, span: Span) -> Result<Vec<StoredWindow>> {
        let sql = format!(
            "SELECT {} FROM usage_windows FINAL WHERE job = {} AND window_start < {} AND window_end > {}",
            WindowReader::COLUMNS.join(", "),
            literal(job),
            instant(span.end),
            instant(span.start)
        );
        let mut reader = WindowReader::default();
        let mut windows = self.query(&sql, |row| reader.read(row)).context("reading usage_windows")?;
        windows.sort_unstable_by(|a, b| a.row.key.cmp(&b.row.key));
        Ok(windows)
    }

    fn each_window(&self, job: &str, each: &mut dyn FnMut(StoredWindow) -> Result<()>) -> Result<()> {
        let columns = WindowReader::COLUMNS.join(", ");
        let sql = format!("SELECT {columns} FROM usage_windows FINAL WHERE job = {}", literal(job));
        let mut reader = WindowReader::default();
        self.each(&sql, &mut |row| each(reader.read(row)?)).context("reading usage_windows")
    }

    fn periods(&self, job: &str, span: Span) -> Result<Vec<PeriodRow>> {
        self.periods_where(job, &format!("period_start < {} AND period_end > {}", instant(span.end), instant(span.start)))
    }

    fn periods_outside(&self, job: &str, span: Span) -> Result<Vec<PeriodRow>> {
        self.periods_where(job, &format!("(period_start >= {} OR period_end <= {})", instant(span.end), instant(span.start)))
    }

    fn period_stamps(&self, job: &str) -> Result<Vec<(PeriodKey, Stamp)>> {
        let sql = format!("SELECT * FROM usage_periods FINAL WHERE job = {}", literal(job));
        self.query(&sql, read::period_stamp).context("reading usage_periods")
    }

    fn misdated_windows(&self, job: &str) -> Result<Vec<WindowKey>> {
        let job = literal(job);
        let sql = format!(
            "SELECT * FROM usage_windows FINAL WHERE job = {job} AND (run_id, version, updated_at) NOT IN \
             (SELECT run_id, toUInt64(version), finished_at FROM runs FINAL WHERE job = {job})"
        );
        self.query(&sql, read::window_key).context("reading usage_windows")
    }

    fn state(&self, job: &str, name: &str) -> Result<Option<(String, String)>> {
        let (job, name) = (literal(job), literal(name));
        let sql = format!("SELECT run_id, content FROM job_state FINAL WHERE job = {job} AND name = {name}");
        let cell = |row: &dyn read::Cells, column| -> Result<String> { Ok(row.cell(column)?.unwrap_or_default().into_owned()) };
        let rows = self.query(&sql, |row| Ok((cell(row, "run_id")?, cell(row, "content")?))).context("reading job_state")?;
        Ok(rows.into_iter().next())
    }

    fn dead_letters(&self, job: &str) -> Result<Vec<StoredDeadLetter>> {
        let sql = format!(
            "SELECT * FROM dead_letters FINAL WHERE job = {} ORDER BY first_run_id, tenant_id, event_time, event_id, meter_id, reason",
            literal(job)
        );
        self.query(&sql, read::dead_letter).context("reading dead_letters")
    }

    fn ledger(&self, job: &str, each: &mut dyn FnMut(LedgerEntry) -> Result<()>) -> Result<()> {
        let sql = format!("SELECT * FROM corrections_current WHERE job = {} ORDER BY correction_id", literal(job));
        let mut reader = LedgerReader::default();
        self.each(&sql, &mut |row| each(reader.read(row)?)).context("reading corrections")
    }

    fn corrections(&self, job: &str, of: Corrections<'_>, each: &mut dyn FnMut(LedgerEntry) -> Result<()>) -> Result<()> {
        let wanted = match of {
            Corrections::OfMeter { tenant_id, subscription_id, meter_id } => {
                let [tenant, subscription, meter] = [tenant_id, subscription_id, meter_id].map(literal);
                format!("tenant_id = {tenant} AND subscription_id = {subscription} AND meter_id = {meter}")
            }
            Corrections::OfRun(run_id) => format!("run_id = {}", literal(run_id)),
        };
        let sql = format!("SELECT * FROM corrections_current WHERE job = {} AND {wanted} ORDER BY correction_id", literal(job));
        let mut reader = LedgerReader::default();
        self.query(&sql, |row| reader.read(row)).context("reading corrections")?.into_iter().try_for_each(each)
    }

    fn period_ledger(&self, job: &str, each: &mut dyn FnMut(PeriodEntry) -> Result<()>) -> Result<()> {
        let sql = format!("SELECT * FROM period_corrections_current WHERE job = {} ORDER BY correction_id", literal(job));
        self.each(&sql, &mut |row| each(read::period_entry(row)?)).context("reading period_corrections")
    }

    fn export(&self, job: &str, table: Table, each: RowSink<'_>) -> Result<Vec<String>> {
        let from = match table {
            Table::Runs => "(SELECT * EXCEPT (stage) FROM runs FINAL WHERE stage = 2)".to_owned(),
            Table::DeadLetters => "(SELECT * EXCEPT (version) FROM dead_letters_current)".to_owned(),
            table => format!("{}_current", table.name()),
        };
        let sql = format!("SELECT * FROM {from} WHERE job = {} ORDER BY {}", literal(job), table.key());
        let mut row = |names: &[String], row: Vec<Option<String>>| {
            let cell = |(name, cell): (&String, Option<String>)| -> Result<Cell> {
                Ok(match cell {
                    None => Cell::Null,
                    Some(text) if Table::INTEGERS.contains(&name.as_str()) => {
                        text.parse().map_or(Cell::Text(text), Cell::Integer)
                    }
                    // As every store writes instants: without a fraction of zeros.
                    Some(text) if rows::INSTANTS.contains(&name.as_str()) => Cell::Text(text.parse::<Timestamp>()?.to_string()),
                    Some(text) => Cell::Text(text),
                })
            };
            each(&names.iter().zip(row).map(cell).collect::<Result<Vec<_>>>()?)
        };
        self.database.rows(&sql, &mut row).with_context(|| format!("reading {}", table.name()))
    }

    fn publish(&mut self, publication: &Publication) -> Result<RunRecord> {
        let run = &publication.run;
        lease::hold(&self.database, &run.job, &format!("publishing run {}", run.run_id), |lease| {
            // Of somebody who was killed since the store was opened.
            if publish::is_pending(&self.database, &run.job)? {
                publish::recover(lease)?;
            }
            if self.runs(&run.job)?.last().map(|run| &run.run_id) != publication.previous_run_id.as_ref() {
                bail!("another run of job {} published meanwhile: run again", run.job);
            }
            let known = self.dead_letters(&run.job)?;
            publish::publish(lease, publication, &known)
        })
    }
}
