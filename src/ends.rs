//! The two ends of a job, opened: its source and its store; and one whole run
//! between them.

use std::path::PathBuf;

use anyhow::Result;

use crate::config::{Job, Source, Store};
use crate::pipeline::{Inputs, Observer, Published, Request, plan};
use crate::reference::Reference;
use crate::source::EventSource;
use crate::source::clickhouse::ClickHouseSource;
use crate::source::files::FileSource;
use crate::store::AggregateStore;
use crate::store::clickhouse::ClickHouseStore;
use crate::store::lock::Lock;
use crate::store::sqlite::SqliteStore;

/// How a run is done.
pub struct RunOptions<'o> {
    pub threads: usize,
    /// Publish even beyond the job's guard.
    pub yes: bool,
    pub progress: &'o dyn Observer,
}

/// Runs a job once: takes its lock, computes, checks the guard, publishes.
///
/// # Errors
/// Whatever the run could not do; the store is then as it was.
pub fn run(job: &Job, request: &Request, options: &RunOptions<'_>) -> Result<Published> {
    let reference = Reference::load(job)?;
    check_scope(&reference, request)?;
    let _lock = Lock::take(&lock_path(job), &job.name)?;
    let mut store = write_store(job)?;
    let source = source(job)?;
    let inputs = Inputs {
        job,
        reference: &reference,
        source: &*source,
        store: Some(&*store),
        threads: options.threads,
        progress: options.progress,
    };
    let plan = plan(&inputs, request)?;
    if !options.yes {
        plan.check_guard(job)?;
    }
    plan.publish(job, &mut *store, &uuid::Uuid::now_v7().to_string())
}

/// Refuses a tenant or customer that the reference tables do not know.
///
/// # Errors
/// A configuration fault that names it.
pub fn check_scope(reference: &Reference, request: &Request) -> Result<()> {
    reference.check_scope(request.scope.tenant.as_deref(), request.scope.customer.as_deref())
}

/// The source of a job.
///
/// # Errors
/// Where it cannot be prepared.
pub fn source(job: &Job) -> Result<Box<dyn EventSource>> {
    match &job.source {
        Source::Files { patterns, columns } => Ok(Box::new(FileSource::new(patterns.clone(), columns.clone()))),
        Source::ClickHouse { connection, events, columns } => {
            Ok(Box::new(ClickHouseSource::new(connection, events, columns.clone(), job.deduplicate.key.clone())?))
        }
        Source::Kafka { .. } => anyhow::bail!("not yet"),
    }
}

/// The store for reading, if there is one.
///
/// # Errors
/// Where it cannot be read.
pub fn read_store(job: &Job) -> Result<Option<Box<dyn AggregateStore>>> {
    match &job.store {
        Store::Sqlite { path } => Ok(SqliteStore::open_read_only(path)?.map(|store| Box::new(store) as Box<dyn AggregateStore>)),
        Store::ClickHouse { connection } => {
            Ok(ClickHouseStore::open_read_only(connection)?.map(|store| Box::new(store) as Box<dyn AggregateStore>))
        }
    }
}

/// The store for writing, created and brought up to date as needed.
///
/// # Errors
/// Where it cannot be written.
pub fn write_store(job: &Job) -> Result<Box<dyn AggregateStore>> {
    match &job.store {
        Store::Sqlite { path } => Ok(Box::new(SqliteStore::open(path)?)),
        Store::ClickHouse { connection } => Ok(Box::new(ClickHouseStore::open(connection, &job.name)?)),
    }
}

/// The file whose lock keeps a second run of the job on this machine away.
pub fn lock_path(job: &Job) -> PathBuf {
    match &job.store {
        Store::Sqlite { path } => SqliteStore::lock_path(path, &job.name),
        Store::ClickHouse { connection } => {
            let store = crate::model::digest::Digest::new("lock").text(&connection.url).text(&connection.database).hex();
            std::env::temp_dir().join(format!("trueup-{store}-{}.lock", job.name))
        }
    }
}

/// What people call the store.
pub fn store_name(job: &Job) -> String {
    match &job.store {
        Store::Sqlite { path } => path.display().to_string(),
        Store::ClickHouse { connection } => format!("{} database {}", connection.url, connection.database),
    }
}
