//! Which windows a run computes, and how far it must read for that.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::config::Job;
use crate::fault::configuration;
use crate::model::aggregate::WindowKey;
use crate::model::basis::Scope;
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowKind};
use crate::reference::Reference;

/// What somebody asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// `None` for everything.
    pub range: Option<Span>,
    pub scope: Scope,
    /// Whether closed periods are written over.
    #[serde(default)]
    pub allow_closed: bool,
    #[serde(default)]
    pub completeness: Completeness,
}

impl Request {
    /// Whether it is no range and no part of the job.
    pub fn is_of_everything(&self) -> bool {
        self.range.is_none() && self.scope.is_whole()
    }
}

/// How much of a job a request without a range looks at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Completeness {
    /// As far back as the job says, and without what cannot have changed since the last run
    /// where skipping it saves time.
    #[default]
    Auto,
    /// Everything, without what cannot have changed since the last run.
    Incremental,
    /// As far back as the job says, nothing skipped.
    Recomputed,
    /// Everything.
    Full,
}

/// The range of whole windows for a request. Without one, it covers every event.
///
/// # Errors
/// Where the scope names what does not exist.
pub(super) fn resolve(
    request: &Request,
    job: &Job,
    reference: &Reference,
    events: Option<(Timestamp, Timestamp)>,
) -> Result<Option<Span>> {
    let scope = &request.scope;
    if let Some(meter) = scope.meter.as_ref().filter(|wanted| !reference.meters.iter().any(|meter| meter.id == **wanted)) {
        let known: Vec<_> = reference.meters.iter().map(|meter| meter.id.as_str()).collect();
        return Err(configuration(format!("--meter {meter}: there is no such meter (there are {})", known.join(", "))));
    }
    let in_scope = || reference.meters.iter().filter(|meter| scope.meter.as_ref().is_none_or(|wanted| *wanted == meter.id));
    let widen = |asked: Span| {
        let windows = in_scope().map(|meter| meter.window.widen(asked, job.timezone));
        windows.reduce(Span::union).unwrap_or(asked)
    };
    let around = |(first, last): (Timestamp, Timestamp)| {
        in_scope().map(|meter| meter.window.around_events(first, last, job.timezone)).reduce(Span::union)
    };
    Ok(match request.range {
        Some(asked) => Some(widen(asked)),
        None => events.and_then(around),
    })
}

/// The range, widened to whole tumbling windows. Windows of different sizes may need more
/// than that, so only a range that changed is widened.
pub(super) fn widen_tumbling(range: Span, job: &Job, reference: &Reference, scope: &Scope) -> Span {
    let meters = reference.meters.iter().filter(|meter| scope.meter.as_ref().is_none_or(|wanted| *wanted == meter.id));
    let tumbling = meters.filter(|meter| matches!(meter.window, WindowKind::Tumbling(_)));
    tumbling.map(|meter| meter.window.widen(range, job.timezone)).fold(range, Span::union)
}

/// Whether a range holds the window of a key as a whole, or would if its meter had not changed.
pub(super) fn holds_window(range: Span, key: &WindowKey, reference: &Reference, timezone: chrono_tz::Tz) -> bool {
    let start = key.window_start;
    let end = match reference.meters.iter().find(|meter| *meter.id == *key.period.meter_id).map(|meter| meter.window) {
        Some(WindowKind::Hopping(hopping)) => {
            let windows = hopping.windows(hopping.pane(start, timezone), timezone);
            windows.iter().find(|window| window.start == start).map(|window| window.end)
        }
        Some(window @ WindowKind::Tumbling(_)) => Some(window.slot(start, timezone).end),
        // A range holds the sessions that it touches.
        Some(WindowKind::Session { .. }) | None => None,
    };
    range.contains(start) && end.is_none_or(|end| end <= range.end)
}

/// The span of every billing period that `range` touches.
pub(super) fn reach(range: Span, reference: &Reference, scope: &Scope) -> Span {
    let last = Timestamp::from_nanos(range.end.nanos() - 1);
    let in_scope = reference.subscriptions.iter().filter(|s| {
        scope.tenant.as_ref().is_none_or(|tenant| *tenant == s.tenant_id)
            && scope.customer.as_ref().is_none_or(|customer| *customer == s.customer_id)
    });
    let cycles: rustc_hash::FxHashSet<_> = in_scope.map(|subscription| subscription.cycle).collect();
    cycles.iter().map(|cycle| cycle.period(range.start).union(cycle.period(last))).fold(range, Span::union)
}
