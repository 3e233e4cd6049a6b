//! The embedded store: one SQLite file, one transaction a run.

mod bind;
mod digests;
mod fill;
mod migrate;
mod pages;
mod parallel;
mod read;
mod record;
mod write;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::{
    AggregateStore, Corrections, LedgerEntry, PeriodEntry, Publication, RowSink, Stamp, StoredDeadLetter, SubscriptionKey, Table,
    WindowChoice,
};
use crate::model::aggregate::{PeriodKey, PeriodRow, StoredWindow, WindowKey};
use crate::model::run::RunRecord;
use crate::model::window::Span;

/// Pages of a publication that are kept in memory until they are written.
const CACHE_KIBIBYTES: i64 = 64 * 1024;

/// A connection belongs to one thread: it needs no locks of its own.
const READ_ONLY: OpenFlags = OpenFlags::SQLITE_OPEN_READ_ONLY.union(OpenFlags::SQLITE_OPEN_NO_MUTEX);

/// As SQLite has it, but a path is a path: no name of one is an address with parameters.
const WRITE: OpenFlags =
    OpenFlags::SQLITE_OPEN_READ_WRITE.union(OpenFlags::SQLITE_OPEN_CREATE).union(OpenFlags::SQLITE_OPEN_NO_MUTEX);

/// A SQLite database with the tables of the contract.
#[derive(Debug)]
pub struct SqliteStore {
    connection: Connection,
}

impl SqliteStore {
    /// Opens the store for writing; creates it and brings it up to date as needed.
    ///
    /// # Errors
    /// Where the file cannot be written, or was written by a newer version.
    pub fn open(path: &Path) -> Result<SqliteStore> {
        let unwritable = || format!("store {}: cannot be written; check the path and its permissions", path.display());
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).with_context(unwritable)?;
        }
        if path.is_dir() {
            bail!("store {} is a folder: name a file in it", path.display());
        }
        SqliteStore::check_writable(path)?;
        if let Some(file) = ["-wal", "-shm"].map(|suffix| beside(path, suffix)).into_iter().find(|file| is_denied(file)) {
            bail!(
                "store {}: {} was left by a reader, and this user may not write it: remove it once nobody reads",
                path.display(),
                file.display()
            );
        }
        let mut connection = Connection::open_with_flags(as_file(path), WRITE).with_context(unwritable)?;
        connection.busy_timeout(std::time::Duration::from_secs(30))?;
        // A version check comes first: a newer store is left as it is.
        migrate::check_version(&connection, path)?;
        // Only a new file takes it on: rows are wide, four of them would fill a page.
        connection.pragma_update(None, "page_size", 8192)?;
        connection.pragma_update(None, "cache_size", -CACHE_KIBIBYTES)?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        migrate::migrate(&mut connection, path).with_context(unwritable)?;
        let mut store = SqliteStore { connection };
        if store.has_runs().with_context(unwritable)? {
            store.use_write_ahead_log().with_context(unwritable)?;
        }
        Ok(store)
    }

    /// Before anything is left beside a store.
    ///
    /// # Errors
    /// Where this user may not write it.
    pub fn check_writable(path: &Path) -> Result<()> {
        if is_denied(path) {
            bail!("store {}: cannot be written; check the path and its permissions", path.display());
        }
        Ok(())
    }

    /// Opens the store for reading; `None` where there is none yet.
    ///
    /// # Errors
    /// Where the file is no store, or was written by a newer version.
    pub fn open_read_only(path: &Path) -> Result<Option<SqliteStore>> {
        if !path.exists() {
            return Ok(None);
        }
        if path.is_dir() {
            bail!("store {} is a folder: name a file in it", path.display());
        }
        let connection = connect_read_only(path)?;
        match migrate::check_version(&connection, path)? {
            0 => Ok(None),
            _ => Ok(Some(SqliteStore { connection })),
        }
    }

    fn has_runs(&self) -> Result<bool> {
        Ok(self.connection.query_row("SELECT EXISTS (SELECT 1 FROM runs)", [], |row| row.get(0))?)
    }

    /// With the log, readers and a run do not wait for each other. But it writes every
    /// page twice, and the first run of a store may have a million rows and no readers:
    /// that one goes without.
    fn use_write_ahead_log(&mut self) -> Result<()> {
        self.connection.pragma_update(None, "journal_mode", "WAL")?;
        Ok(())
    }

    /// What SQLite keeps beside the store at `path`, while it is written or read.
    pub fn files_beside(path: &Path) -> [PathBuf; 3] {
        ["-wal", "-shm", "-journal"].map(|suffix| beside(path, suffix))
    }

    /// The file whose lock guards `job` in the store at `path`.
    pub fn lock_path(path: &Path, job: &str) -> PathBuf {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{job}.lock"));
        path.with_file_name(name)
    }
}

/// A connection that only reads. SQLite itself wants to write files beside the store
/// for that; where it may not and nobody is writing, the file can be read as it is.
fn connect_read_only(path: &Path) -> Result<Connection> {
    let unreadable = || format!("store {}: cannot be read", path.display());
    // Files of SQLite's that this user leaves could not be written by whom the store belongs to.
    if is_denied(path) && !["-wal", "-journal"].iter().any(|suffix| beside(path, suffix).exists()) {
        return open_as_it_is(path).with_context(unreadable);
    }
    let connection = Connection::open_with_flags(as_file(path), READ_ONLY).with_context(unreadable)?;
    connection.busy_timeout(std::time::Duration::from_secs(30))?;
    if !needs_writing(&connection) {
        return Ok(connection);
    }
    // A first publication that was killed left its journal: rolling it back takes writing.
    if beside(path, "-journal").exists() {
        let writer = Connection::open_with_flags(as_file(path), WRITE).with_context(unreadable)?;
        writer.busy_timeout(std::time::Duration::from_secs(30))?;
        if !needs_writing(&writer) && !needs_writing(&connection) {
            return Ok(connection);
        }
    }
    if let Some(unfinished) = ["-wal", "-journal"].map(|suffix| beside(path, suffix)).into_iter().find(|file| file.exists()) {
        bail!(
            "store {}: another user is writing it, or was interrupted ({} exists), and its folder cannot be written: \
             wait, or read it as a user who may write there",
            path.display(),
            unfinished.display()
        );
    }
    open_as_it_is(path).with_context(unreadable)
}

/// Opens a store that nobody is writing, without locks and files beside it.
fn open_as_it_is(path: &Path) -> Result<Connection> {
    let name =
        as_file(path).to_str().context("its name is not UTF-8")?.replace('%', "%25").replace('?', "%3f").replace('#', "%23");
    let flags = READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    Ok(Connection::open_with_flags(format!("file:{name}?immutable=1"), flags)?)
}

/// Whether the store cannot be read by this connection without writing beside it.
fn needs_writing(connection: &Connection) -> bool {
    let probe = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0));
    matches!(probe.err().and_then(|error| error.sqlite_error_code()), Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen))
}

/// The path as SQLite takes none for a name of its own, such as `:memory:`.
fn as_file(path: &Path) -> PathBuf {
    if path.is_absolute() { path.to_owned() } else { Path::new(".").join(path) }
}

/// Whether this user may not write a file that is there.
fn is_denied(file: &Path) -> bool {
    let opened = std::fs::File::options().append(true).open(file);
    opened.is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
}

/// A file of SQLite's own beside the store.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// As rows of theirs are sorted: what is read in this order need not be sorted any more.
fn in_order<K: Ord>(keys: &[K]) -> Vec<&K> {
    let mut keys: Vec<_> = keys.iter().collect();
    keys.sort_unstable();
    keys
}

impl AggregateStore for SqliteStore {
    fn runs(&self, job: &str) -> Result<Vec<RunRecord>> {
        read::runs(&self.connection, job).context("reading runs")
    }

    fn lost_corrections(&self, job: &str) -> Result<Vec<(&'static str, String)>> {
        read::lost_corrections(&self.connection, job).context("reading where corrections lie")
    }

    fn extent(&self, job: &str) -> Result<Option<Span>> {
        read::extent(&self.connection, job).context("reading the extent of usage_windows")
    }

    fn windows(&self, job: &str, span: Span) -> Result<Vec<StoredWindow>> {
        read::windows(&self.connection, job, span).context("reading usage_windows")
    }

    fn each_window(&self, job: &str, each: &mut dyn FnMut(StoredWindow) -> Result<()>) -> Result<()> {
        read::each_window(&self.connection, job, each).context("reading usage_windows")
    }

    fn periods(&self, job: &str, span: Span) -> Result<Vec<PeriodRow>> {
        read::periods(&self.connection, job, span).context("reading usage_periods")
    }

    fn windows_of(&self, job: &str, span: Span, choices: Option<&[WindowChoice]>) -> Result<Vec<StoredWindow>> {
        let Some(choices) = choices else { return self.windows(job, span) };
        parallel::windows_of(&self.connection, job, span, &in_order(choices)).context("reading usage_windows")
    }

    fn periods_of(&self, job: &str, span: Span, subscriptions: Option<&[SubscriptionKey]>) -> Result<Vec<PeriodRow>> {
        let Some(subscriptions) = subscriptions else { return self.periods(job, span) };
        read::periods_of(&self.connection, job, span, &in_order(subscriptions)).context("reading usage_periods")
    }

    fn periods_outside(&self, job: &str, span: Span) -> Result<Vec<PeriodRow>> {
        read::periods_outside(&self.connection, job, span).context("reading usage_periods")
    }

    fn period_stamps(&self, job: &str) -> Result<Vec<(PeriodKey, Stamp)>> {
        read::period_stamps(&self.connection, job).context("reading usage_periods")
    }

    fn misdated_windows(&self, job: &str) -> Result<Vec<WindowKey>> {
        read::misdated_windows(&self.connection, job).context("reading usage_windows")
    }

    fn state(&self, job: &str, name: &str) -> Result<Option<(String, String)>> {
        read::state(&self.connection, job, name).context("reading job_state")
    }

    fn dead_letters(&self, job: &str) -> Result<Vec<StoredDeadLetter>> {
        read::dead_letters(&self.connection, job).context("reading dead_letters")
    }

    fn ledger(&self, job: &str, each: &mut dyn FnMut(LedgerEntry) -> Result<()>) -> Result<()> {
        read::ledger(&self.connection, job, each).context("reading corrections")
    }

    fn corrections(&self, job: &str, of: Corrections<'_>, each: &mut dyn FnMut(LedgerEntry) -> Result<()>) -> Result<()> {
        read::corrections(&self.connection, job, of, each).context("reading corrections")
    }

    fn period_ledger(&self, job: &str, each: &mut dyn FnMut(PeriodEntry) -> Result<()>) -> Result<()> {
        read::period_ledger(&self.connection, job, each).context("reading period_corrections")
    }

    fn export(&self, job: &str, table: Table, each: RowSink<'_>) -> Result<Vec<String>> {
        read::export(&self.connection, job, table, each).with_context(|| format!("reading {}", table.name()))
    }

    fn publish(&mut self, publication: &Publication) -> Result<RunRecord> {
        let run = write::publish(&mut self.connection, publication).context("publishing; the store is as it was before")?;
        // It is published: that somebody reads just now, so that the log cannot begin, is no failure.
        if let Err(error) = self.use_write_ahead_log() {
            tracing::debug!(%error, "the write-ahead log begins with the next run");
        }
        Ok(run)
    }
}
