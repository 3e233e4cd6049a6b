//! Running jobs by themselves: when one is due, one run of each at a time, and
//! what the world outside can see of it.

mod due;
mod http;
mod metrics;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustc_hash::FxHashMap;
use tokio_cron_scheduler::{Job as Tick, JobScheduler};

use crate::clock;
use crate::config::{Job, Schedule};
use crate::ends::{self, RunOptions};
use crate::fault::{FaultKind, configuration, kind};
use crate::model::timestamp::Timestamp;
use crate::pipeline::{Lateness, Observer, Published, Request};
use due::{Attempt, Standing};
use metrics::Metrics;

/// What `serve` was told.
#[derive(Debug, Clone)]
pub struct Settings {
    pub jobs: Vec<PathBuf>,
    pub environment: Option<String>,
    pub listen: SocketAddr,
    pub threads: usize,
}

/// A job and where it stands.
struct Scheduled {
    path: PathBuf,
    name: String,
    schedule: Schedule,
    /// Since when it is served.
    since: Timestamp,
    standing: Mutex<Standing>,
    running: AtomicBool,
}

/// Everything that the parts of the server share.
struct Server {
    settings: Settings,
    jobs: Vec<Arc<Scheduled>>,
    metrics: Metrics,
    stopping: AtomicBool,
}

/// Runs until SIGTERM or SIGINT; returns the exit code.
///
/// # Errors
/// Where a job file is wrong, or the address cannot be bound.
pub fn serve(settings: Settings) -> Result<u8> {
    let jobs = settings.jobs.iter().map(|path| Scheduled::load(path, &settings).map(Arc::new)).collect::<Result<Vec<_>>>()?;
    let mut paths: FxHashMap<&str, &Path> = FxHashMap::default();
    for job in &jobs {
        if let Some(other) = paths.insert(&job.name, &job.path) {
            let (name, first, second) = (&job.name, other.display(), job.path.display());
            return Err(configuration(format!("{second}: job {name} is served already, from {first}: give it another name")));
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let server = Arc::new(Server { settings, jobs, metrics: Metrics::default(), stopping: AtomicBool::new(false) });
    runtime.block_on(run(server))
}

async fn run(server: Arc<Server>) -> Result<u8> {
    let address = server.settings.listen;
    let listener = tokio::net::TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    tracing::info!(address = %listener.local_addr()?, jobs = server.jobs.len(), "serving");
    let http = tokio::spawn(http::answer(listener, Arc::clone(&server)));

    let mut scheduler = JobScheduler::new().await.context("starting the scheduler")?;
    let ticking = Arc::clone(&server);
    let tick = Tick::new_repeated_async(Duration::from_secs(1), move |_, _| {
        let server = Arc::clone(&ticking);
        Box::pin(async move { server.start_due_jobs() })
    });
    scheduler.add(tick.context("preparing the scheduler")?).await.context("preparing the scheduler")?;
    scheduler.start().await.context("starting the scheduler")?;

    let code = signal().await?;
    tracing::info!("stopping: no new run starts, one under way is finished");
    server.stopping.store(true, Ordering::SeqCst);
    scheduler.shutdown().await.context("stopping the scheduler")?;
    while server.jobs.iter().any(|job| job.running.load(Ordering::SeqCst)) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    http.abort();
    Ok(code)
}

/// Waits for SIGTERM (143) or SIGINT (130).
async fn signal() -> Result<u8> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => Ok(143),
        _ = interrupt.recv() => Ok(130),
    }
}

impl Scheduled {
    fn load(path: &Path, settings: &Settings) -> Result<Self> {
        let job = Job::load_in(path, settings.environment.as_deref())?;
        let schedule = job.schedule.clone();
        let schedule = schedule.ok_or_else(|| {
            configuration(format!("{}: has no schedule; add `schedule: {{cron: \"0 2 * * *\"}}`", path.display()))
        })?;
        let since = clock::now();
        let last_start = match last_start(&job) {
            Ok(start) => Some(start.unwrap_or(since)),
            Err(error) => {
                tracing::warn!(job = job.name, "the store cannot be read yet, so missed runs are not known: {error:#}");
                None
            }
        };
        let standing = Mutex::new(Standing::new(last_start));
        Ok(Scheduled { path: path.to_owned(), name: job.name, schedule, since, standing, running: AtomicBool::new(false) })
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// When the last run began that did what a scheduled one does. A job that never had one waits
/// for its time; one that did catches up.
fn last_start(job: &Job) -> Result<Option<Timestamp>> {
    let Some(store) = ends::read_store(job)? else { return Ok(None) };
    let runs = store.runs(&job.name)?;
    let lookback = |at| Lateness::of(job, &Request::default(), at).range(job, at);
    let last = runs.iter().rfind(|run| due::is_of_schedule(run, lookback(run.started_at)));
    Ok(last.map(|run| run.started_at))
}

impl Server {
    fn start_due_jobs(self: &Arc<Self>) {
        for job in &self.jobs {
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            let standing = job.standing();
            let Some(attempt) = standing.attempt(&job.schedule, clock::now()) else { continue };
            // One run of a job at a time: a time that passes meanwhile is caught up after it.
            if job.running.swap(true, Ordering::SeqCst) {
                continue;
            }
            drop(standing);
            let (server, job) = (Arc::clone(self), Arc::clone(job));
            tokio::spawn(async move {
                let (working, attempted) = (Arc::clone(&server), Arc::clone(&job));
                let result = tokio::task::spawn_blocking(move || working.run_once(&attempted, attempt)).await;
                let result = result.unwrap_or_else(|error| Err(anyhow::anyhow!("the run panicked: {error}")));
                server.conclude(&job, attempt, &result);
            });
        }
    }

    /// `None` where nothing had been missed.
    fn run_once(&self, scheduled: &Scheduled, attempt: Attempt) -> Result<Option<Published>> {
        // Read anew each time: a job file that was repaired is used as it is now.
        let job = Job::load_in(&scheduled.path, self.settings.environment.as_deref())?;
        if attempt.is_guess {
            let last_start = last_start(&job)?.unwrap_or(scheduled.since);
            if due::due(&scheduled.schedule, last_start, attempt.began).is_none() {
                return Ok(None);
            }
        }
        tracing::info!(job = job.name, due = %attempt.due, "starting");
        let options = RunOptions {
            threads: self.settings.threads,
            yes: false,
            started_by: "schedule",
            snapshot: None,
            progress: &Unobserved,
        };
        ends::run(&job, &Request::default(), &options).map(Some)
    }

    fn conclude(&self, job: &Scheduled, attempt: Attempt, result: &Result<Option<Published>>) {
        let now = clock::now();
        // Held until it runs no more: nobody sees the one without the other.
        let mut standing = job.standing();
        match result {
            Ok(published) => {
                standing.done(attempt);
                if let Some(published) = published {
                    self.published(&job.name, published, now);
                }
            }
            Err(error) => {
                let kind = kind(error);
                let status = match kind {
                    Some(FaultKind::Guard) => "guarded",
                    Some(FaultKind::LockHeld) => "locked",
                    _ => "failed",
                };
                self.metrics.failed(&job.name, status, now);
                match standing.failed(attempt, kind, now) {
                    Some(again) if status == "locked" => tracing::warn!(job = job.name, %again, "not run yet: {error:#}"),
                    Some(again) => tracing::error!(job = job.name, %again, "the run failed: {error:#}"),
                    None => tracing::error!(job = job.name, "the run failed, and is not tried again before it is due: {error:#}"),
                }
            }
        }
        job.running.store(false, Ordering::SeqCst);
    }

    fn published(&self, job: &str, published: &Published, now: Timestamp) {
        let rows = published.plan.changes.rows;
        tracing::info!(
            job,
            run = published.run.run_id,
            inserted = rows.inserted,
            updated = rows.updated,
            retracted = rows.retracted,
            "published"
        );
        self.metrics.succeeded(job, published, now);
    }
}

/// Nobody watches a scheduled run.
struct Unobserved;

impl Observer for Unobserved {
    fn step(&self, _: &'static str, _: Option<u64>) {}
    fn rows(&self, _: u64) {}
}
