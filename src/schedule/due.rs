//! When a job is to be run: at the times of its schedule, and again after what may pass.

use chrono::TimeZone as _;

use crate::config::Schedule;
use crate::fault::FaultKind;
use crate::model::run::RunRecord;
use crate::model::timestamp::{MINUTE, SECOND, Timestamp};
use crate::model::window::Span;

/// The longest pause between attempts.
const HOUR: i64 = 60 * MINUTE;

/// How a job stands with its schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    /// Due times until then are done with; `None` while the store could not say when the job ran last.
    done_until: Option<Timestamp>,
    /// A due time whose attempts failed so far.
    retry: Option<Retry>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Retry {
    due: Timestamp,
    not_before: Timestamp,
    /// Attempts that failed, apart from those that found the lock taken.
    failures: u32,
}

/// An attempt to run a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attempt {
    pub due: Timestamp,
    pub began: Timestamp,
    /// Whether the store is still to be asked when the job ran last: it may have missed nothing.
    pub is_guess: bool,
}

impl Standing {
    pub fn new(done_until: Option<Timestamp>) -> Self {
        Standing { done_until, retry: None }
    }

    /// What is to be tried at `now`. A due time of its own does not wait for the retry of another one.
    pub fn attempt(&self, schedule: &Schedule, now: Timestamp) -> Option<Attempt> {
        let due = due(schedule, self.done_until.unwrap_or(Timestamp::MIN), now)?;
        let waits = self.retry.is_some_and(|retry| retry.due == due && now < retry.not_before);
        (!waits).then_some(Attempt { due, began: now, is_guess: self.done_until.is_none() })
    }

    /// After an attempt that is not to be repeated. What fell due meanwhile is still to come.
    pub fn done(&mut self, attempt: Attempt) {
        *self = Standing::new(Some(attempt.began));
    }

    /// After an attempt that failed at `now`: when the same due time is tried again, if it is.
    pub fn failed(&mut self, attempt: Attempt, kind: Option<FaultKind>, now: Timestamp) -> Option<Timestamp> {
        let failures = self.retry.filter(|retry| retry.due == attempt.due).map_or(0, |retry| retry.failures);
        let Some(pause) = pause(kind, failures) else {
            self.done(attempt);
            return None;
        };
        let not_before = Timestamp::from_nanos(now.nanos().saturating_add(pause));
        let failures = if kind == Some(FaultKind::LockHeld) { failures } else { failures + 1 };
        self.retry = Some(Retry { due: attempt.due, not_before, failures });
        Some(not_before)
    }

    /// When a due time that failed is tried again.
    pub fn retry_at(&self) -> Option<Timestamp> {
        self.retry.map(|retry| retry.not_before)
    }
}

/// How long to wait after so many failures; `None` where somebody has to see to it first.
fn pause(kind: Option<FaultKind>, failures: u32) -> Option<i64> {
    match kind {
        // Whoever holds it comes to an end, and that is no failure.
        Some(FaultKind::LockHeld) => Some(MINUTE),
        // A server that is away or a disk that is full may be better soon.
        None | Some(FaultKind::Partial) => Some((MINUTE << failures.min(6)).min(HOUR)),
        Some(
            FaultKind::Configuration
            | FaultKind::Invariant
            | FaultKind::Stale
            | FaultKind::Guard
            | FaultKind::Interrupted
            | FaultKind::Terminated,
        ) => None,
    }
}

/// Whether a run did what a scheduled one would have done: all that was new in the whole job, or
/// all of `lookback`, which is how far a job that looks back to no more would have reached then.
pub(super) fn is_of_schedule(run: &RunRecord, lookback: Option<Span>) -> bool {
    let looked_back = |lookback: Span| run.range.is_some_and(|range| range.covers(lookback));
    let is_whole = run.mode.computes() && run.basis.scope.is_whole();
    is_whole && (run.is_of_everything() || lookback.is_some_and(looked_back))
}

/// The last time at which a schedule was due, if the job has not started since.
///
/// A night that was missed is due once, however many were. Computed from the wall
/// clock of the schedule's zone each time, so that it follows clock changes: a
/// scheduler that fixes its offset at the start would not.
pub(super) fn due(schedule: &Schedule, last_start: Timestamp, now: Timestamp) -> Option<Timestamp> {
    let local = schedule.timezone.from_utc_datetime(&whole_second(now));
    let last_due = schedule.cron.find_previous_occurrence(&local, true).ok()?;
    let last_due = Timestamp::from_utc(last_due.naive_utc());
    (last_start < last_due).then_some(last_due)
}

/// The next time at which a schedule is due.
pub(super) fn next(schedule: &Schedule, now: Timestamp) -> Option<Timestamp> {
    let local = schedule.timezone.from_utc_datetime(&whole_second(now));
    let next = schedule.cron.find_next_occurrence(&local, false).ok()?;
    Some(Timestamp::from_utc(next.naive_utc()))
}

/// Schedules are made of whole seconds; a fraction would come back in what is found.
fn whole_second(t: Timestamp) -> chrono::NaiveDateTime {
    Timestamp::from_nanos(t.nanos().div_euclid(SECOND) * SECOND).utc()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::basis::Scope;
    use crate::model::run::{Origin, RunBasis, RunInput, RunMode};
    use croner::parser::{CronParser, Seconds};
    use serde_json::json;

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

    /// A job that ran last night, with its schedule.
    fn nightly() -> (Schedule, Standing) {
        (schedule("0 2 * * *", "UTC"), Standing::new(Some(t("2026-01-04T02:00:01Z"))))
    }

    fn at(time: &str) -> Timestamp {
        t(&format!("2026-01-05T{time}Z"))
    }

    #[test]
    fn a_lock_that_is_held_uses_no_night_up() {
        let (schedule, mut standing) = nightly();
        assert_eq!(standing.attempt(&schedule, at("01:59:59")), None);
        let mut now = at("02:00:00");
        // However long another run takes, the pause does not grow.
        for minute in 1..=100 {
            let attempt = standing.attempt(&schedule, now).unwrap();
            assert_eq!((attempt.due, attempt.began, attempt.is_guess), (at("02:00:00"), now, false));
            let again = standing.failed(attempt, Some(FaultKind::LockHeld), now).unwrap();
            assert_eq!((again.nanos() - now.nanos(), standing.retry_at()), (MINUTE, Some(again)));
            assert_eq!(standing.attempt(&schedule, Timestamp::from_nanos(again.nanos() - SECOND)), None, "minute {minute}");
            now = again;
        }
        let attempt = standing.attempt(&schedule, now).unwrap();
        standing.done(attempt);
        assert_eq!((standing.attempt(&schedule, at("23:00:00")), standing.retry_at()), (None, None));
        assert!(standing.attempt(&schedule, t("2026-01-06T02:00:00Z")).is_some());
    }

    #[test]
    fn what_may_pass_is_tried_again_with_longer_pauses() {
        let (schedule, mut standing) = nightly();
        let mut now = at("02:00:00");
        let mut pauses = Vec::new();
        for kind in [None, None, Some(FaultKind::LockHeld), None, Some(FaultKind::Partial), None, None, None, None] {
            let attempt = standing.attempt(&schedule, now).unwrap();
            let again = standing.failed(attempt, kind, now).unwrap();
            pauses.push((again.nanos() - now.nanos()) / MINUTE);
            now = again;
        }
        assert_eq!(pauses, [1, 2, 1, 4, 8, 16, 32, 60, 60]);
        // The next night waits for no pause, and begins anew.
        let tomorrow = t("2026-01-06T02:00:00Z");
        let attempt = standing.attempt(&schedule, tomorrow).unwrap();
        assert_eq!(attempt.due, tomorrow);
        assert_eq!(standing.failed(attempt, None, tomorrow), Some(t("2026-01-06T02:01:00Z")));
    }

    #[test]
    fn what_somebody_has_to_see_to_waits_for_the_next_night() {
        for kind in [FaultKind::Configuration, FaultKind::Invariant, FaultKind::Guard] {
            let (schedule, mut standing) = nightly();
            let attempt = standing.attempt(&schedule, at("02:00:00")).unwrap();
            assert_eq!(standing.failed(attempt, Some(kind), at("02:10:00")), None);
            assert_eq!((standing.attempt(&schedule, at("02:10:00")), standing.retry_at()), (None, None));
            assert!(standing.attempt(&schedule, t("2026-01-06T02:00:00Z")).is_some());
        }
    }

    #[test]
    fn what_falls_due_during_a_run_comes_after_it() {
        let schedule = schedule("*/5 * * * *", "UTC");
        let mut standing = Standing::new(Some(at("01:55:00")));
        let attempt = standing.attempt(&schedule, at("02:00:00.3")).unwrap();
        standing.done(attempt);
        assert_eq!(standing.attempt(&schedule, at("02:04:59")), None);
        assert_eq!(standing.attempt(&schedule, at("02:11:00")).map(|attempt| attempt.due), Some(at("02:10:00")));
    }

    #[test]
    fn an_unknown_past_is_asked_for_until_it_is_known() {
        let (schedule, _) = nightly();
        let mut standing = Standing::new(None);
        let attempt = standing.attempt(&schedule, at("14:00:00")).unwrap();
        assert_eq!((attempt.due, attempt.is_guess), (at("02:00:00"), true));
        assert_eq!(standing.failed(attempt, None, at("14:00:08")), Some(at("14:01:08")));
        assert_eq!(standing.attempt(&schedule, at("14:01:07")), None);
        let attempt = standing.attempt(&schedule, at("14:01:08")).unwrap();
        assert!(attempt.is_guess);
        standing.done(attempt);
        assert_eq!(standing.attempt(&schedule, at("14:01:09")), None);
    }

    #[test]
    fn only_what_a_scheduled_run_would_do_counts_as_one() {
        let run = |mode, customer: Option<&str>, coverage: &str, range: Option<Span>| RunRecord {
            run_id: "run".to_owned(),
            job: "job".to_owned(),
            mode,
            status: "succeeded".to_owned(),
            range,
            started_at: at("02:00:00"),
            finished_at: at("02:10:00"),
            origin: Origin::default(),
            version: 1,
            counts: json!({"coverage": {"mode": coverage}}),
            input: RunInput::default(),
            basis: RunBasis { scope: Scope { customer: customer.map(str::to_owned), ..Scope::default() }, ..RunBasis::default() },
            ledger_digest: String::new(),
        };
        let span = |start: &str, end: &str| Some(Span { start: t(start), end: t(end) });
        let recent = span("2025-12-01T00:00:00Z", "2026-01-05T03:00:00Z");
        for (mode, coverage) in [(RunMode::Run, "full"), (RunMode::Run, "incremental"), (RunMode::Apply, "full")] {
            assert!(is_of_schedule(&run(mode, None, coverage, None), None));
            assert!(is_of_schedule(&run(mode, None, coverage, None), recent));
        }
        assert!(!is_of_schedule(&run(RunMode::Run, Some("c"), "part", None), None));
        assert!(!is_of_schedule(&run(RunMode::Run, None, "part", recent), None));
        // What closes or takes back knows what the run before it knew.
        for mode in [RunMode::Close, RunMode::Revert] {
            assert!(!is_of_schedule(&run(mode, None, "full", None), None));
        }
        // A job that looks back only so far records a range.
        assert!(is_of_schedule(&run(RunMode::Run, None, "part", recent), recent));
        assert!(!is_of_schedule(&run(RunMode::Run, Some("c"), "part", recent), recent));
        let day = span("2026-01-04T00:00:00Z", "2026-01-05T00:00:00Z");
        assert!(!is_of_schedule(&run(RunMode::Run, None, "part", day), recent));
        assert!(!is_of_schedule(&run(RunMode::Run, None, "part", None), recent));
    }
}
