//! What a job says of late events: how far back a run looks, when a window has settled,
//! and the horizon beyond which nothing changes any more.

use std::time::Duration;

use serde::Serialize;

use super::Request;
use super::keys::SplitKeys;
use super::range::Completeness;
use crate::config::Job;
use crate::model::run::RunRecord;
use crate::model::timestamp::{MINUTE, Timestamp};
use crate::model::window::Span;
use crate::source::Split;

/// The job's policy at the time of a run.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Lateness {
    /// Earlier windows are not looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub looks_back_to: Option<Timestamp>,
    /// Windows that end later are left for a later run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settled_until: Option<Timestamp>,
    /// Billing periods that ended by then, and were computed before, change no more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub horizon: Option<Timestamp>,
}

impl Lateness {
    /// What the job's policy means for a request at `now`. A range that was asked for is
    /// computed as it is.
    pub fn of(job: &Job, request: &Request, now: Timestamp) -> Lateness {
        let before = |length: Duration| {
            let length = i64::try_from(length.as_nanos()).unwrap_or(i64::MAX);
            Timestamp::from_nanos(now.nanos().saturating_sub(length))
        };
        let policy = job.lateness;
        let is_open = request.range.is_none();
        let looks_back = is_open && matches!(request.completeness, Completeness::Auto | Completeness::Recomputed);
        Lateness {
            looks_back_to: policy.lookback.filter(|_| looks_back).map(before),
            // Windows of the job's own size are never cut.
            settled_until: policy.settle.filter(|_| is_open).map(|settle| job.window.window(before(settle), job.timezone).start),
            horizon: policy.horizon.map(before),
        }
    }

    /// The range that a request without one has where a run does not look back to the
    /// beginning: to the end of the current window.
    pub fn range(&self, job: &Job, now: Timestamp) -> Option<Span> {
        let start = self.looks_back_to?;
        Some(Span { start, end: self.settled_until.unwrap_or_else(|| job.window.window(now, job.timezone).end) })
    }

    /// What of a range has settled; `None` where nothing has.
    pub fn settled(&self, range: Span) -> Option<Span> {
        let end = self.settled_until.map_or(range.end, |until| range.end.min(until));
        (range.start < end).then_some(Span { end, ..range })
    }
}

/// How far ahead the clocks of those who send events may be.
const AHEAD: i64 = 24 * 60 * MINUTE;

/// Warns of events that are dated well after `now`, the `last` one of them in `range`: they
/// lengthen it, and count in windows that have not begun.
pub fn warn_of_the_future<'s>(
    splits: impl Iterator<Item = (&'s Split, &'s SplitKeys)>,
    (range, last): (Span, Option<Timestamp>),
    now: Timestamp,
) -> Option<String> {
    let limit = Timestamp::from_nanos(now.nanos().saturating_add(AHEAD));
    let last = last.filter(|last| *last > limit && range.contains(*last))?;
    // The one that reaches least beyond may have it; others may only have copies that count no more.
    let ends = splits.filter_map(|(split, keys)| Some((keys.extent?.1, split)));
    let (_, split) = ends.filter(|(end, _)| *end >= last).min_by_key(|(end, _)| *end)?;
    Some(format!(
        "events are dated up to {last}, after now (in {}): void them or send them again as they should be, \
         or leave them out by a range or `lateness.lookback`",
        split.name
    ))
}

/// Billing periods that change no more.
#[derive(Debug, Clone)]
pub struct Horizon {
    until: Timestamp,
    /// The ranges of runs that computed the whole job, and whether each covered everything
    /// that there was.
    computed: Vec<(Span, bool)>,
}

impl Horizon {
    pub fn new(until: Timestamp, runs: &[RunRecord]) -> Self {
        let of_whole_job = runs.iter().filter(|run| run.mode.computes() && run.basis.scope.is_whole());
        let computed = of_whole_job.filter_map(|run| Some((run.range?, run.is_of_everything())));
        Horizon { until, computed: computed.collect() }
    }

    /// Whether a period is settled history. One that no run has computed yet is not.
    pub fn holds(&self, period: Span) -> bool {
        let is_computed = |(range, everything): &(Span, bool)| range.covers(period) || (*everything && range.overlaps(period));
        period.end <= self.until && self.computed.iter().any(is_computed)
    }
}
