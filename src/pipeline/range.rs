//! Which windows a run computes, and how far it must read for that.

use anyhow::Result;

use super::enrich::Scope;
use crate::config::Job;
use crate::fault::configuration;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::reference::Reference;

/// What somebody asks for.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// `None` for everything.
    pub range: Option<Span>,
    pub scope: Scope,
}

/// A range of whole windows.
pub(super) struct Resolved {
    pub range: Option<Span>,
    pub widened_from: Option<Span>,
}

/// The range of whole windows for a request. Without one, it covers every event
/// and every stored row.
///
/// # Errors
/// Where the scope names what does not exist.
pub(super) fn resolve(
    request: &Request,
    job: &Job,
    reference: &Reference,
    events: Option<(Timestamp, Timestamp)>,
    stored: Option<Span>,
) -> Result<Resolved> {
    let scope = &request.scope;
    if let Some(meter) = scope.meter.as_ref().filter(|wanted| !reference.meters.iter().any(|meter| meter.id == **wanted)) {
        let known: Vec<_> = reference.meters.iter().map(|meter| meter.id.as_str()).collect();
        return Err(configuration(format!("--meter {meter}: there is no such meter (there are {})", known.join(", "))));
    }
    let nanosecond_after = |t: Timestamp| Timestamp::from_nanos(t.nanos().saturating_add(1));
    let events = events.map(|(first, last)| Span { start: first, end: nanosecond_after(last) });
    let widen = |asked: Span| {
        let meters = reference.meters.iter().filter(|meter| scope.meter.as_ref().is_none_or(|wanted| *wanted == meter.id));
        meters.map(|meter| meter.window.widen(asked, job.timezone)).reduce(Span::union).unwrap_or(asked)
    };
    let range = match request.range {
        Some(asked) => Some(widen(asked)),
        // Stored windows are whole already: widening them again would reach further each time.
        None => [events.map(widen), stored].into_iter().flatten().reduce(Span::union),
    };
    Ok(Resolved { range, widened_from: request.range.filter(|asked| Some(*asked) != range) })
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
