//! Sessions: how far a range must reach to cut none, and which stored sessions
//! became which.

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};

use super::aggregate::{Aggregator, Context};
use super::enrich::Enricher;
use super::letters::OpenDeadLetters;
use super::past::Past;
use super::price::PricedWindow;
use super::state::News;
use super::{Inputs, Request, Timeline, merge_workers, range, read_keys, resolve, scan};
use crate::model::aggregate::{PeriodKey, StoredWindow, WindowKey};
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
            repeated: keys.repeated,
            open_dead_letters: OpenDeadLetters::default(),
            marks: None,
        };
        let seen = timeline.step("find sessions", None, || {
            let visit = |aggregator: &mut Aggregator<'_, '_>, _: usize, batch: &crate::source::EventBatch| {
                aggregator.visit(batch, |_, _| true)
            };
            let (workers, rows) =
                scan::scan(source, &splits, Wanted::Whole, threads, &|_| {}, || Aggregator::new(&context), visit)?;
            Ok((resolve(&context, merge_workers(&context, workers), threads)?, rows.iter().sum()))
        })?;
        let computed = seen.windows.iter().map(|(key, state)| Span { start: key.window_start, end: state.window_end });
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

/// What became of sessions.
#[derive(Debug, Default)]
pub struct SessionChanges {
    /// Sessions that were joined or split: none of them is the same as before.
    pub rebuilt: FxHashSet<WindowKey>,
    /// For each session, the news of all that it was joined with or split from.
    pub news: FxHashMap<WindowKey, News>,
}

/// A session, or an event that is withdrawn from one.
struct Item<'a> {
    period: &'a PeriodKey,
    span: Span,
    /// Whether it is stored; `None` for an event.
    session: Option<(&'a WindowKey, bool)>,
    news: News,
}

impl SessionChanges {
    /// Finds which stored sessions overlap which computed ones.
    pub fn find(
        stored: &[StoredWindow],
        computed: &[PricedWindow],
        withdrawn: &FxHashMap<WindowKey, News>,
        is_session: impl Fn(&PeriodKey) -> bool,
    ) -> SessionChanges {
        let mut items = Vec::new();
        for StoredWindow { row, .. } in stored.iter().filter(|stored| is_session(&stored.row.key.period)) {
            let session = Some((&row.key, true));
            items.push(Item { period: &row.key.period, span: row.window(), session, news: News::default() });
        }
        for PricedWindow { row, news } in computed.iter().filter(|computed| is_session(&computed.row.key.period)) {
            items.push(Item { period: &row.key.period, span: row.window(), session: Some((&row.key, false)), news: *news });
        }
        for (key, news) in withdrawn.iter().filter(|(key, _)| is_session(&key.period)) {
            let end = Timestamp::from_nanos(key.window_start.nanos().saturating_add(1));
            let span = Span { start: key.window_start, end };
            items.push(Item { period: &key.period, span, session: None, news: *news });
        }
        items.sort_unstable_by_key(|item| (item.period, item.span));
        let mut changes = SessionChanges::default();
        let mut rest = items.as_slice();
        while let Some(first) = rest.first() {
            let mut end = first.span.end;
            let mut length = 0;
            for item in rest.iter().take_while(|item| item.period == first.period) {
                if item.span.start >= end {
                    break;
                }
                end = end.max(item.span.end);
                length += 1;
            }
            let (cluster, others) = rest.split_at(length.max(1));
            changes.note(cluster);
            rest = others;
        }
        changes
    }

    fn note(&mut self, cluster: &[Item<'_>]) {
        let mut news = News::default();
        cluster.iter().for_each(|item| news.merge(item.news));
        let sessions: Vec<_> = cluster.iter().filter_map(|item| item.session).collect();
        let is_same = matches!(sessions.as_slice(), [(a, was), (b, is)] if a == b && was != is);
        for (key, _) in &sessions {
            self.news.insert((*key).clone(), news);
            if !is_same {
                self.rebuilt.insert((*key).clone());
            }
        }
    }
}
