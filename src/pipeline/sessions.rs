//! Sessions: how far a range must reach to cut none.

use anyhow::Result;

use super::context::Context;
use super::enrich::Enricher;
use super::letters::OpenDeadLetters;
use super::matcher::Matcher;
use super::matches::Partitioning;
use super::past::Past;
use super::read::{merge_workers, read_keys, resolve};
use super::{Inputs, Request, Timeline, range, scan};
use crate::model::aggregate::StoredWindow;
use crate::model::meter::Meter;
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowKind};
use crate::source::{Selection, Wanted};

pub fn is_session(meter: &Meter) -> bool {
    matches!(meter.window, WindowKind::Session { .. })
}

/// The range, widened until it cuts no session: neither one that the events make nor
/// one that is stored.
///
/// # Errors
/// Where the source cannot be read.
pub fn widen(inputs: &Inputs<'_>, request: &Request, past: &Past, range: Span, timeline: &mut Timeline<'_>) -> Result<Span> {
    let Inputs { job, reference, source, store, threads, .. } = *inputs;
    let meters = reference.meters.iter().filter(|meter| request.scope.meter.as_ref().is_none_or(|id| *id == meter.id));
    let gap = |meter: &Meter| if let WindowKind::Session { gap_nanos } = meter.window { Some(gap_nanos) } else { None };
    let Some(longest_gap) = meters.filter_map(gap).max() else { return Ok(range) };
    let mut range = range;
    loop {
        let reach = range::reach(range, reference, &request.scope);
        // A session of an earlier billing period can last until after its end.
        let reach = Span { start: Timestamp::from_nanos(reach.start.nanos().saturating_sub(longest_gap)), ..reach };
        let splits = source.splits(&Selection { span: Some(reach), tenant: request.scope.tenant.clone() })?;
        let keys = read_keys(inputs, &splits, timeline)?;
        let context = Context {
            enricher: Enricher::of_meters(reference, request.scope.clone(), is_session),
            rules: &job.deduplicate,
            timezone: job.timezone,
            range: reach,
            reach,
            parts: Partitioning::default(),
            repeated: keys.repeated,
            times_before: None,
            open_dead_letters: OpenDeadLetters::default(),
            marks: None,
            has_kept: false,
            keep_in: None,
        };
        let windows = timeline.step("find sessions", None, || {
            let visit =
                |matcher: &mut Matcher<'_, '_>, _: usize, batch: &crate::source::EventBatch| matcher.visit(batch, |_, _| true);
            let (workers, rows) = scan::scan(source, &splits, Wanted::Whole, threads, &|_| {}, || Matcher::new(&context), visit)?;
            let mut seen = resolve(&context, merge_workers(&context, workers), threads)?;
            Ok((seen.take_matches().all()?, rows.iter().sum()))
        })?;
        let computed = windows.iter().map(|(key, state)| Span { start: key.window_start, end: state.window_end });
        let stored = past.windows(store, job, reach)?;
        let of_sessions = |row: &&StoredWindow| {
            reference.meters.iter().any(|meter| *meter.id == *row.row.key.period.meter_id && is_session(meter))
        };
        let stored = stored.iter().filter(of_sessions).map(|stored| stored.row.window());
        let spans: Vec<_> = computed.chain(stored).collect();
        let held = cover(range, &spans);
        if held == range {
            return Ok(range);
        }
        range = range::widen_tumbling(held, job, reference, &request.scope);
    }
}

/// The smallest span around `range` that cuts none of `spans`.
fn cover(range: Span, spans: &[Span]) -> Span {
    let mut range = range;
    loop {
        let wider = spans.iter().filter(|span| span.overlaps(range)).fold(range, |range, span| range.union(*span));
        if wider == range {
            return range;
        }
        range = wider;
    }
}
