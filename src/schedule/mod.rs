//! Running jobs by themselves: when one is due, one run of each at a time, and
//! what the world outside can see of it.

mod http;
mod metrics;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use chrono::TimeZone as _;
use tokio::sync::Mutex;
use tokio_cron_scheduler::{Job as Tick, JobScheduler};

use crate::clock;
use crate::config::{Job, Schedule};
use crate::ends::{self, RunOptions};
use crate::fault::{FaultKind, configuration, kind};
use crate::model::timestamp::{SECOND, Timestamp};
use crate::pipeline::{Observer, Published, Request};
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
    /// When its last attempt began, here or, before the start, in the store.
    last_start: Mutex<Timestamp>,
    running: AtomicBool,
}

/// Everything that the parts of the server share.
struct Server {
    settings: Settings,
    jobs: Vec<Arc<Scheduled>>,
    metrics: Metrics,
    stopping: AtomicBool,
}

/// The last time at which a schedule was due, if the job has not started since.
///
/// A night that was missed is due once, however many were. Computed from the wall
/// clock of the schedule's zone each time, so that it follows clock changes: a
/// scheduler that fixes its offset at the start would not.
pub fn due(schedule: &Schedule, last_start: Timestamp, now: Timestamp) -> Option<Timestamp> {
    let local = schedule.timezone.from_utc_datetime(&whole_second(now));
    let last_due = schedule.cron.find_previous_occurrence(&local, true).ok()?;
    let last_due = Timestamp::from_utc(last_due.naive_utc());
    (last_start < last_due).then_some(last_due)
}

/// Schedules are made of whole seconds; a fraction would come back in what is found.
fn whole_second(t: Timestamp) -> chrono::NaiveDateTime {
    Timestamp::from_nanos(t.nanos().div_euclid(SECOND) * SECOND).utc()
}

/// The next time at which a schedule is due.
fn next(schedule: &Schedule, now: Timestamp) -> Option<Timestamp> {
    let local = schedule.timezone.from_utc_datetime(&whole_second(now));
    let next = schedule.cron.find_next_occurrence(&local, false).ok()?;
    Some(Timestamp::from_utc(next.naive_utc()))
}

/// Runs until SIGTERM or SIGINT; returns the exit code.
///
/// # Errors
/// Where a job file is wrong, or the address cannot be bound.
pub fn serve(settings: Settings) -> Result<u8> {
    let jobs = settings.jobs.iter().map(|path| Scheduled::load(path, &settings).map(Arc::new)).collect::<Result<Vec<_>>>()?;
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
        Box::pin(async move { server.start_due_jobs().await })
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
    fn load(path: &std::path::Path, settings: &Settings) -> Result<Self> {
        let job = Job::load_in(path, settings.environment.as_deref())?;
        let schedule = job.schedule.clone();
        let schedule = schedule.ok_or_else(|| {
            configuration(format!("{}: has no schedule; add `schedule: {{cron: \"0 2 * * *\"}}`", path.display()))
        })?;
        // A job that never ran waits for its time; one that did catches up.
        let last_run = match ends::read_store(&job) {
            Ok(Some(store)) => store.runs(&job.name)?.last().map(|run| run.started_at),
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(job = job.name, "the store cannot be read yet, so missed runs are not known: {error:#}");
                None
            }
        };
        Ok(Scheduled {
            path: path.to_owned(),
            name: job.name,
            schedule,
            last_start: Mutex::new(last_run.unwrap_or_else(clock::now)),
            running: AtomicBool::new(false),
        })
    }
}

impl Server {
    async fn start_due_jobs(self: &Arc<Self>) {
        for job in &self.jobs {
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            let now = clock::now();
            let mut last_start = job.last_start.lock().await;
            let Some(due) = due(&job.schedule, *last_start, now) else { continue };
            // One run of a job at a time: a time that passes meanwhile is caught up after it.
            if job.running.swap(true, Ordering::SeqCst) {
                continue;
            }
            *last_start = now;
            drop(last_start);
            tracing::info!(job = job.name, %due, "starting");
            let (server, job) = (Arc::clone(self), Arc::clone(job));
            tokio::spawn(async move {
                let (working, name) = (Arc::clone(&server), Arc::clone(&job));
                let result = tokio::task::spawn_blocking(move || working.run_once(&name)).await;
                let result = result.unwrap_or_else(|error| Err(anyhow::anyhow!("the run panicked: {error}")));
                server.conclude(&job, result);
            });
        }
    }

    fn run_once(&self, job: &Scheduled) -> Result<Published> {
        // Read anew each time: a job file that was repaired is used as it is now.
        let job = Job::load_in(&job.path, self.settings.environment.as_deref())?;
        let options = RunOptions {
            threads: self.settings.threads,
            yes: false,
            started_by: "schedule",
            snapshot: None,
            progress: &Unobserved,
        };
        ends::run(&job, &Request::default(), &options)
    }

    fn conclude(&self, job: &Scheduled, result: Result<Published>) {
        let now = clock::now();
        match result {
            Ok(published) => {
                let rows = published.plan.changes.rows;
                tracing::info!(
                    job = job.name,
                    run = published.run.run_id,
                    inserted = rows.inserted,
                    updated = rows.updated,
                    retracted = rows.retracted,
                    "published"
                );
                self.metrics.succeeded(&job.name, &published, now);
            }
            Err(error) => {
                tracing::error!(job = job.name, "the run failed: {error:#}");
                let status = match kind(&error) {
                    Some(FaultKind::Guard) => "guarded",
                    Some(FaultKind::LockHeld) => "locked",
                    _ => "failed",
                };
                self.metrics.failed(&job.name, status, now);
            }
        }
        job.running.store(false, Ordering::SeqCst);
    }
}

/// Nobody watches a scheduled run.
struct Unobserved;

impl Observer for Unobserved {
    fn step(&self, _: &'static str, _: Option<u64>) {}
    fn rows(&self, _: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use croner::parser::{CronParser, Seconds};

    fn schedule(cron: &str, zone: &str) -> Schedule {
        let cron = CronParser::builder().seconds(Seconds::Optional).dom_and_dow(true).build().parse(cron).unwrap();
        Schedule { cron, timezone: zone.parse().unwrap() }
    }

    fn t(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn shown(schedule: &Schedule, last_start: &str, now: &str) -> Option<String> {
        due(schedule, t(last_start), t(now)).map(|t| t.to_string())
    }

    #[test]
    fn follows_the_clocks_of_the_zone() {
        let nightly = schedule("0 2 * * *", "Europe/Berlin");
        // Winter: 02:00 is 01:00 UTC. Summer: midnight UTC.
        assert_eq!(shown(&nightly, "2026-01-10T01:00:05Z", "2026-01-11T00:59:59Z"), None);
        assert_eq!(shown(&nightly, "2026-01-10T01:00:05Z", "2026-01-11T01:00:00Z").as_deref(), Some("2026-01-11T01:00:00Z"));
        assert_eq!(shown(&nightly, "2026-07-10T00:00:05Z", "2026-07-11T00:00:01Z").as_deref(), Some("2026-07-11T00:00:00Z"));
    }

    #[test]
    fn missed_nights_are_due_once() {
        let nightly = schedule("0 2 * * *", "UTC");
        assert_eq!(shown(&nightly, "2026-01-01T02:00:01Z", "2026-01-05T09:00:00Z").as_deref(), Some("2026-01-05T02:00:00Z"));
        assert_eq!(shown(&nightly, "2026-01-05T09:00:00Z", "2026-01-05T09:00:01Z"), None);
        let often = schedule("*/5 * * * * *", "UTC");
        assert_eq!(shown(&often, "2026-01-05T09:00:05.2Z", "2026-01-05T09:00:05.9Z"), None);
        assert_eq!(shown(&often, "2026-01-05T09:00:05.2Z", "2026-01-05T09:00:10.3Z").as_deref(), Some("2026-01-05T09:00:10Z"));
    }

    #[test]
    fn the_next_time_is_after_now() {
        let nightly = schedule("0 2 * * *", "Europe/Berlin");
        assert_eq!(next(&nightly, t("2026-10-24T12:00:00Z")).map(|t| t.to_string()).as_deref(), Some("2026-10-25T00:00:00Z"));
    }
}
