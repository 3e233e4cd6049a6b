//! The two ends of a job, opened: its source and its store; and one whole run
//! between them.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::config::{Job, Keep, ReferenceTable, Source, Store, cache_folder, operator};
use crate::fault::{FaultKind, configuration, fault};
use crate::model::run::{InputFile, Origin, Override, RunRecord};
use crate::pipeline::draft::Draft;
use crate::pipeline::saved::{SavedPlan, stale};
use crate::pipeline::{self, Inputs, KeyCache, Observer, Plan, Published, Request, plan};
use crate::reference::Reference;
use crate::source::clickhouse::ClickHouseSource;
use crate::source::files::{FileSource, NoFile};
use crate::source::kafka::{KafkaSource, Snapshot};
use crate::source::{EventSource, Moved};
use crate::store::AggregateStore;
use crate::store::clickhouse::ClickHouseStore;
use crate::store::lock::{Holder, Intent, Lock};
use crate::store::sqlite::SqliteStore;

/// How a run is done.
pub struct RunOptions<'o> {
    pub threads: usize,
    /// Publish even beyond the job's guard.
    pub yes: bool,
    /// Who or what runs it.
    pub started_by: &'o str,
    /// Read the offsets of this earlier run again.
    pub snapshot: Option<&'o str>,
    pub progress: &'o dyn Observer,
}

/// Runs a job once: takes its lock, computes, checks the guard, publishes.
///
/// # Errors
/// Whatever the run could not do; the store is then as it was.
pub fn run(job: &Job, request: &Request, options: &RunOptions<'_>) -> Result<Published> {
    let reference = Reference::load(job)?;
    reference.check_scope(request.scope.tenant.as_deref(), request.scope.customer.as_deref())?;
    let intent = Intent { request, snapshot: options.snapshot };
    let lock = take_lock(job, Some(intent), options.yes)?;
    let result = run_locked(job, &reference, request, options);
    // Only an end that was not its own is to be resumed.
    match result.as_ref().err().and_then(crate::fault::kind).filter(|kind| kind.is_interruption()) {
        Some(kind) => {
            let job = job.path.display();
            Err(fault(kind, format!("ended on request; nothing was published, `trueup resume {job}` runs it again")))
        }
        None => {
            lock.finish();
            result
        }
    }
}

fn run_locked(job: &Job, reference: &Reference, request: &Request, options: &RunOptions<'_>) -> Result<Published> {
    let mut store = write_store(job)?;
    let (source, request) = match options.snapshot {
        None => (source(job)?, request.clone()),
        Some(run_id) => snapshot(job, &*store, run_id, request)?,
    };
    let keys = key_cache(job, true);
    let (threads, progress) = (options.threads, options.progress);
    let inputs = Inputs { job, reference, source: &*source, store: Some(&*store), threads, progress, keys: &keys };
    let plan = plan(&inputs, &request)?;
    if !options.yes {
        plan.check_guard(job)?;
    }
    crate::interrupt::check()?;
    let overrides = Override::list(&[(options.yes, Override::Guard), (request.allow_closed, Override::ClosedPeriods)]);
    plan.publish(job, &mut *store, &Origin { started_by: options.started_by.to_owned(), overrides })
}

/// Who runs a command, as the run will say: `ann@host trueup run`.
pub fn started_by(command: &str) -> String {
    format!("{} trueup {command}", operator())
}

/// What is left of a run that did not come to its end.
#[derive(Debug)]
pub enum Interrupted {
    /// What it wanted.
    Wants(Holder),
    /// Its publication had begun: this run is there as a whole now.
    Finished(String),
}

/// What an interrupted run of the job wanted. Where there is none, a publication that was cut
/// short is finished or taken back, as by whoever opens the store for writing.
///
/// # Errors
/// Where somebody is at it now, or the store cannot be opened.
pub fn interrupted(job: &Job) -> Result<Option<Interrupted>> {
    let path = lock_path(job);
    if !path.exists() && read_store(job)?.is_none() {
        return Ok(None);
    }
    let lock = take_lock(job, None, false)?;
    let found = match lock.interrupted.clone() {
        Some(holder) => Ok(Some(Interrupted::Wants(holder))),
        None => finish(job).map(|run| run.map(Interrupted::Finished)),
    };
    lock.finish();
    found
}

/// Opens the store for writing, if there is one; the run that this finished.
fn finish(job: &Job) -> Result<Option<String>> {
    let last = |store: &dyn AggregateStore| Ok(store.runs(&job.name)?.pop().map(|run| run.run_id));
    let Some(store) = read_store(job)? else { return Ok(None) };
    let before: Result<Option<String>> = last(&*store);
    let (before, after) = (before?, last(&*write_store(job)?)?);
    Ok(after.filter(|after| before.as_ref() != Some(after)))
}

/// Publishes a saved plan, exactly as it is, or not at all.
///
/// # Errors
/// A stale fault (exit code 7) that says what moved; a guard fault.
pub fn apply(job: &Job, path: &Path, saved: SavedPlan, yes: bool) -> Result<RunRecord> {
    let reference = Reference::load(job)?;
    let lock = take_lock(job, None, yes)?;
    let result = (|| {
        let mut store = write_store(job)?;
        let files = match input_files(job, &reference, &saved) {
            // Files that are gone have moved as well.
            Err(error) if error.is::<NoFile>() => return Err(stale(path, &[format!("{error:#}")])),
            files => files?,
        };
        let moved = saved.moved(&job.name, &pipeline::basis(job, &reference, &saved.request.scope), &files, &*store)?;
        if !moved.is_empty() {
            return Err(stale(path, &moved));
        }
        if let Some(refusal) = saved.guard.as_ref().filter(|_| !yes) {
            return Err(fault(
                FaultKind::Guard,
                format!("{refusal}; approve the plan with `trueup apply {} --yes`", path.display()),
            ));
        }
        crate::interrupt::check()?;
        let runs = store.runs(&job.name)?;
        let overrides = Override::list(&[(yes, Override::Guard), (saved.request.allow_closed, Override::ClosedPeriods)]);
        let origin = Origin { started_by: started_by("apply"), overrides };
        let publication = saved.draft.into_publication(&job.name, &runs, &origin);
        let run = store.publish(&publication)?;
        saved.kept.publish(&run.run_id);
        Ok(run)
    })();
    lock.finish();
    result
}

/// The inputs as they are now, for the range of a saved plan.
fn input_files(job: &Job, reference: &Reference, saved: &SavedPlan) -> Result<Vec<InputFile>> {
    let selection = pipeline::selection(&saved.request, saved.draft.range, reference);
    let then: rustc_hash::FxHashMap<_, _> = saved.draft.input.files.iter().map(|file| (&file.name, file.rows)).collect();
    let source = source(job)?;
    let since = saved.request.is_of_everything().then(|| source.splits_since(&saved.draft.input.files));
    let splits = match since {
        Some(Err(error)) if !Moved::is_in(&error) => return Err(error),
        Some(Ok(splits)) => splits,
        _ => source.splits(&selection)?,
    };
    let file = |split: &crate::source::Split| {
        let rows = split.announced_rows.or_else(|| then.get(&split.label()).copied()).unwrap_or_default();
        split.input(rows)
    };
    Ok(splits.iter().map(file).collect())
}

/// Publishes work by hand as a run of its own, begun by `origin`. `make` gets the runs so far.
///
/// # Errors
/// Whatever the work or the store cannot do; nothing is written then.
pub fn by_hand<T>(
    job: &Job,
    origin: &Origin,
    make: impl FnOnce(&dyn AggregateStore, &[RunRecord]) -> Result<Option<(Draft, T)>>,
) -> Result<Option<(RunRecord, T)>> {
    if !lock_path(job).exists() && read_store(job)?.is_none() {
        return Err(configuration(format!("job {} has not run yet: there is no stored billing period and no run", job.name)));
    }
    let lock = take_lock(job, None, false)?;
    let result = (|| {
        let mut store = write_store(job)?;
        let runs = store.runs(&job.name)?;
        let Some((draft, result)) = make(&*store, &runs)? else { return Ok(None) };
        let publication = draft.into_publication(&job.name, &runs, origin);
        Ok(Some((store.publish(&publication)?, result)))
    })();
    lock.finish();
    result
}

/// Computes what a run would change, and writes nothing; `for_later` leaves what it read
/// where a run that publishes it would. Gives the store too, if there is one.
///
/// # Errors
/// Where it cannot be computed.
pub fn preview(
    job: &Job,
    request: &Request,
    threads: usize,
    progress: &dyn Observer,
    for_later: bool,
) -> Result<(Plan, Option<Box<dyn AggregateStore>>)> {
    let reference = Reference::load(job)?;
    reference.check_scope(request.scope.tenant.as_deref(), request.scope.customer.as_deref())?;
    let store = read_store(job)?;
    let source = source(job)?;
    let keys = key_cache(job, for_later);
    let inputs = Inputs { job, reference: &reference, source: &*source, store: store.as_deref(), threads, progress, keys: &keys };
    Ok((plan(&inputs, request)?, store))
}

/// The source of a job.
///
/// # Errors
/// Where it cannot be prepared.
pub fn source(job: &Job) -> Result<Box<dyn EventSource>> {
    match &job.source {
        Source::Files { patterns, columns } => Ok(Box::new(FileSource::new(patterns.clone(), columns.clone()))),
        Source::ClickHouse { connection, events, margin, columns } => {
            let key = job.deduplicate.key.clone();
            Ok(Box::new(ClickHouseSource::new(connection, events, *margin, columns.clone(), key)?))
        }
        Source::Kafka { .. } => Ok(Box::new(kafka_source(job, None)?)),
    }
}

/// The job's topic, or the offsets of it that an earlier run read.
fn kafka_source(job: &Job, snapshot: Option<Snapshot>) -> Result<KafkaSource> {
    let Source::Kafka { connection, topic, margin, tenant_id, columns } = &job.source else {
        return Err(configuration(format!("{}: the source is no Kafka topic: only Kafka has snapshots", job.path.display())));
    };
    Ok(KafkaSource {
        connection: connection.clone(),
        topic: topic.clone(),
        margin: *margin,
        tenant_id: tenant_id.clone(),
        columns: columns.clone(),
        from_first_copy: job.deduplicate.keep == Keep::First,
        snapshot,
    })
}

/// What an earlier run read, and the range that it computed. Any other range could
/// take windows back whose events the snapshot does not hold.
fn snapshot(job: &Job, store: &dyn AggregateStore, run_id: &str, request: &Request) -> Result<(Box<dyn EventSource>, Request)> {
    let error = |reason: String| configuration(format!("--snapshot {run_id}: {reason}"));
    let runs = store.runs(&job.name)?;
    let run = runs.iter().find(|run| run.run_id == run_id);
    let run = run.ok_or_else(|| error(format!("job {} has no such run: `trueup runs` lists them", job.name)))?;
    let source = kafka_source(job, Some(Snapshot::of(run)))?;
    let range = run.range.ok_or_else(|| error("that run found nothing to compute".to_owned()))?;
    Ok((Box::new(source), Request { range: Some(range), ..request.clone() }))
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

/// Takes the lock of a job, where this user may write its store.
fn take_lock(job: &Job, run: Option<Intent<'_>>, yes: bool) -> Result<Lock> {
    if let Store::Sqlite { path } = &job.store {
        SqliteStore::check_writable(path)?;
    }
    Lock::take(&lock_path(job), &job.name, run, yes)
}

/// The file whose lock keeps a second run of the job on this machine away.
pub fn lock_path(job: &Job) -> PathBuf {
    match &job.store {
        // The file itself, by whatever path it is reached.
        Store::Sqlite { path } => SqliteStore::lock_path(&path.canonicalize().unwrap_or_else(|_| path.clone()), &job.name),
        Store::ClickHouse { connection } => {
            let store = crate::model::digest::Digest::new("lock").text(&connection.url).text(&connection.database).hex();
            std::env::temp_dir().join(format!("trueup-{store}-{}.lock", job.name))
        }
    }
}

/// Where runs keep the keys that they read: beside the store, or where caches go.
fn key_cache(job: &Job, writes: bool) -> KeyCache {
    let folder = match &job.store {
        Store::Sqlite { path } => {
            let path = path.canonicalize().unwrap_or_else(|_| path.clone());
            let mut name = path.file_name().unwrap_or_default().to_owned();
            name.push(".keys");
            Some(path.with_file_name(name))
        }
        Store::ClickHouse { connection } => cache_folder().map(|folder| {
            folder.join(crate::model::digest::Digest::new("keys").text(&connection.url).text(&connection.database).hex())
        }),
    };
    KeyCache { folder: folder.map(|folder| folder.join(&job.name)), job: job.digest.clone(), writes }
}

/// Refuses to write over what a job is made of.
///
/// # Errors
/// A configuration fault where `out` is the job file, its store, or something that it reads.
pub fn check_output(job: &Job, out: &Path) -> Result<()> {
    let place =
        |path: &Path| Some((std::path::absolute(path).ok()?.parent()?.canonicalize().ok()?, path.file_name()?.to_owned()));
    if let Store::Sqlite { path } = &job.store {
        let beside = SqliteStore::files_beside(&path.canonicalize().unwrap_or_else(|_| path.clone()));
        if beside.iter().chain([&lock_path(job)]).any(|file| place(file).is_some_and(|file| Some(file) == place(out))) {
            return Err(configuration(format!(
                "--out {}: that is a file of the job's store: choose another file",
                out.display()
            )));
        }
    }
    let Ok(out_file) = out.canonicalize() else { return Ok(()) };
    let is_out = |path: &Path| path.canonicalize().is_ok_and(|path| path == out_file);
    let tables = [&job.reference.customers, &job.reference.subscriptions, &job.reference.meters, &job.reference.prices];
    let is_table = |table: &&ReferenceTable| matches!(table, ReferenceTable::File(path) if is_out(path));
    let what = match (&job.store, &job.source) {
        _ if is_out(&job.path) => "the job file",
        (Store::Sqlite { path }, _) if is_out(path) => "the job's store",
        _ if tables.iter().any(is_table) => "one of the job's reference tables",
        (_, Source::Files { patterns, .. }) if patterns.iter().any(|pattern| pattern.matches_file(&out_file)) => {
            "one of the job's event files"
        }
        _ => return Ok(()),
    };
    Err(configuration(format!("--out {}: that is {what}: choose another file", out.display())))
}

/// What people call the store.
pub fn store_name(job: &Job) -> String {
    match &job.store {
        Store::Sqlite { path } => path.display().to_string(),
        Store::ClickHouse { connection } => format!("{} database {}", connection.url, connection.database),
    }
}
