//! How far events that count reach, where a run does not look at all of them.

use anyhow::{Result, bail};
use rustc_hash::FxHashSet;

use super::{Baseline, Retreat};
use crate::model::aggregate::{WindowKey, WindowRow};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::pipeline::closed::ClosedPeriods;
use crate::pipeline::compare::Compared;
use crate::pipeline::times::Times;
use crate::pipeline::{Inputs, Request, range};

/// The first and the last time of events that count, or times as good: those reach to the same
/// windows, and no event that counts lies beyond. Where the first event counts no more, or the
/// last one, a stored window tells that others lie beside it.
///
/// # Errors
/// A [`Retreat`] where that cannot be told, or windows are shorter than they were: bills without
/// usage may reach less far than before. Where the source has no longer everything, a run `goes_on`
/// all the same, and they reach as far. Where the store cannot be read.
pub fn event_times(
    (inputs, goes_on, baseline): (&Inputs<'_>, bool, &Baseline<'_>),
    times: &Times,
    compared: &Compared,
) -> Result<Option<(Timestamp, Timestamp)>> {
    let Some((mut first, mut last)) = times.all() else { return Ok(None) };
    let around = |first, last| range::resolve(&Request::default(), inputs.job, inputs.reference, Some((first, last)));
    let Some(billed) = around(first, last)? else { return Ok(times.all()) };
    if !goes_on && baseline.run.known().is_some_and(|known| !billed.covers(known)) {
        return Err(Retreat { why: "windows end sooner than they did".to_owned(), is_choice: true }.into());
    }
    let lost = times.lost();
    let unknown = |which: &str| Retreat { why: format!("the {which} event was replaced or voided"), is_choice: true };
    if lost.first {
        // Of the events in a window, the last one may be at its very end.
        let reaches = |row: &WindowRow| {
            let t = Timestamp::from_nanos(row.window_end.nanos() - 1);
            Ok(around(t, t)?.filter(|span| span.start <= billed.start).map(|_| t))
        };
        let edge = Span { end: Timestamp::from_nanos(billed.start.nanos() + 1), ..billed };
        first = match witness(inputs, compared, edge, reaches)? {
            Some(t) => t,
            None if goes_on => first,
            None => bail!(unknown("first")),
        };
    }
    if lost.last {
        let reaches = |row: &WindowRow| {
            let t = row.key.window_start;
            Ok(around(t, t)?.filter(|span| span.end >= billed.end).map(|_| t))
        };
        let edge = Span { start: Timestamp::from_nanos(billed.end.nanos() - 1), ..billed };
        last = match witness(inputs, compared, edge, reaches)? {
            Some(t) => t,
            None if goes_on => last,
            None => bail!(unknown("last")),
        };
    }
    Ok(Some((first, last)))
}

/// What `of` says of a window at an edge that has events now; `None` where it says nothing of any.
fn witness(
    inputs: &Inputs<'_>,
    compared: &Compared,
    edge: Span,
    of: impl Fn(&WindowRow) -> Result<Option<Timestamp>>,
) -> Result<Option<Timestamp>> {
    for row in &compared.changes.upserts {
        if row.window().overlaps(edge)
            && let Some(t) = of(row)?
        {
            return Ok(Some(t));
        }
    }
    let Some(store) = inputs.store else { return Ok(None) };
    let gone: FxHashSet<&WindowKey> = compared.changes.retractions.iter().collect();
    // What is closed is there whether or not its events are; so it may be beyond a horizon.
    let closed = ClosedPeriods::of(&store.periods(&inputs.job.name, edge)?);
    for stored in store.windows(&inputs.job.name, edge)? {
        let is_open = !closed.hold(&stored.row.key.period) && inputs.job.lateness.horizon.is_none();
        let stays = is_open && !gone.contains(&stored.row.key);
        if stays && let Some(t) = of(&stored.row)? {
            return Ok(Some(t));
        }
    }
    Ok(None)
}
