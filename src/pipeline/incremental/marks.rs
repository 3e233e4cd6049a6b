//! What must be computed again: windows or whole billing periods of subscriptions and
//! meters that a new event or a changed reference row touches.

use std::collections::BTreeSet;

use rustc_hash::{FxHashMap, FxHashSet};

use super::choice::CustomerChoice;
use super::separable::{Dependence, Separable};
use super::snapshot::{ChangedExternal, Differences};
use crate::model::aggregate::{PeriodKey, WindowRow};
use crate::model::meter::Aggregation;
use crate::model::property::Property;
use crate::model::spans::Spans;
use crate::model::timestamp::Timestamp;
use crate::model::window::{BillingCycle, Span, WindowKind};
use crate::pipeline::enrich::{Enricher, Memo};
use crate::pipeline::state::WindowCache;
use crate::reference::Reference;
use crate::source::{EventRef, Field};
use crate::store::{SubscriptionKey, WindowChoice};

/// Subscription and meter, as indexes into the reference tables.
pub type Pair = (usize, usize);

/// What must be computed again.
#[derive(Debug, Default)]
pub struct Marks {
    pairs: FxHashMap<Pair, PairMarks>,
    /// The range of the baseline: later and earlier periods were never computed.
    known: Option<Span>,
    /// By tenant and id.
    subscriptions: FxHashMap<String, FxHashMap<String, usize>>,
    meters: FxHashMap<String, usize>,
    /// Subscriptions that there are no more.
    gone: BTreeSet<(String, String)>,
    /// A meter that there is no more has rows of any subscription.
    is_meter_gone: bool,
    /// External ids that stand for something else now: tenant and id.
    externals: FxHashSet<(String, String)>,
    /// Names of events that changed meters count.
    names: BTreeSet<String>,
}

/// What is marked of a subscription and a meter.
#[derive(Debug, Default)]
pub(super) struct PairMarks {
    /// Events in these spans count again: whole billing periods, or parts of them that
    /// single windows have.
    events: Spans,
    /// Windows that may change themselves. Later ones of a billing period may cost something
    /// else; earlier ones stay as they are.
    windows: Spans,
    /// Billing periods of which later windows stay as they are too.
    alone: Spans,
}

impl PairMarks {
    /// Whether a window stays as it is for sure that counts in a billing period from `start` on.
    fn leave(&self, period: Span, start: Timestamp) -> bool {
        if self.alone.contains(period.start) {
            !self.windows.contains(start)
        } else {
            self.windows.first_in(period).is_some_and(|first| start < first)
        }
    }
}

impl Marks {
    /// `known` is the range that the baseline computed.
    pub fn new(reference: &Reference, known: Option<Span>) -> Marks {
        let mut marks = Marks { known, ..Marks::default() };
        for (index, subscription) in reference.subscriptions.iter().enumerate() {
            marks.subscriptions.entry(subscription.tenant_id.clone()).or_default().insert(subscription.id.clone(), index);
        }
        marks.meters = reference.meters.iter().enumerate().map(|(index, meter)| (meter.id.clone(), index)).collect();
        marks
    }

    /// Whether something of a billing period of a subscription and a meter is computed again.
    pub fn hold(&self, subscription: usize, meter: usize, period: Span) -> bool {
        self.is_fresh(period) || self.pairs.get(&(subscription, meter)).is_some_and(|marked| marked.events.overlap(period))
    }

    /// Whether the window of an event at `t` is computed again.
    pub fn hold_event(&self, subscription: usize, meter: usize, period: Span, t: Timestamp) -> bool {
        self.hold_of(self.of((subscription, meter)), period, t)
    }

    pub(super) fn of(&self, pair: Pair) -> Option<&PairMarks> {
        self.pairs.get(&pair)
    }

    /// As [`Marks::hold_event`], where it is known what is marked of subscription and meter.
    #[inline]
    pub(super) fn hold_of(&self, marked: Option<&PairMarks>, period: Span, t: Timestamp) -> bool {
        self.is_fresh(period) || marked.is_some_and(|marked| marked.events.contains(t))
    }

    /// Whether a window of a marked billing period stays as it is; `start` is where it begins to
    /// count in that period.
    pub fn leave(&self, pair: Pair, period: Span, start: Timestamp) -> bool {
        self.leave_of(self.of(pair), period, start)
    }

    /// As [`Marks::leave`], where it is known what is marked of subscription and meter.
    #[inline]
    pub(super) fn leave_of(&self, marked: Option<&PairMarks>, period: Span, start: Timestamp) -> bool {
        !self.is_fresh(period) && marked.is_some_and(|marked| marked.leave(period, start))
    }

    /// Whether there is room in a marked billing period for windows that stay as they are, and
    /// whose events are not read.
    pub(super) fn leave_some(&self, pair: Pair, period: Span) -> bool {
        let Some(marked) = self.of(pair).filter(|_| !self.is_fresh(period)) else { return false };
        if marked.alone.contains(period.start) {
            !marked.windows.cover(period) && !marked.events.cover(period)
        } else {
            marked.leave(period, period.start) && !marked.events.contains(period.start)
        }
    }

    /// As [`Marks::hold_event`], for the window of a stored row.
    pub(super) fn hold_window(&self, (subscription, meter): Pair, row: &WindowRow) -> bool {
        self.hold_event(subscription, meter, row.period(), row.counts_from())
    }

    /// Whether single windows of a billing period may be marked, and others not.
    pub(super) fn divide(&self, (subscription, meter): Pair, period: Span) -> bool {
        !self.is_fresh(period) && self.hold(subscription, meter, period)
    }

    /// As [`Marks::hold`], for a stored row. A row that nothing can compute any more is
    /// to be taken back.
    pub fn hold_row(&self, key: &PeriodKey, period: Span) -> bool {
        self.pair(key).is_none_or(|(subscription, meter)| self.hold(subscription, meter, period))
    }

    /// The subscription and the meter of a row; `None` where there is one of them no more.
    pub(super) fn pair(&self, key: &PeriodKey) -> Option<Pair> {
        let subscription = self.subscriptions.get(&*key.tenant_id)?.get(&*key.subscription_id)?;
        Some((*subscription, *self.meters.get(&*key.meter_id)?))
    }

    /// As [`Marks::hold_row`], where only the key is known.
    pub fn hold_key(&self, key: &PeriodKey, reference: &Reference) -> bool {
        let subscription = self.subscriptions.get(&*key.tenant_id).and_then(|ids| ids.get(&*key.subscription_id));
        let subscription = subscription.and_then(|index| reference.subscriptions.get(*index));
        subscription.is_none_or(|subscription| self.hold_row(key, subscription.cycle.period(key.period_start)))
    }

    /// Whether the baseline did not reach a period.
    fn is_fresh(&self, period: Span) -> bool {
        self.known.is_none_or(|known| !period.overlaps(known))
    }

    /// Whether every period that touches `range` was computed by the baseline.
    pub fn know(&self, range: Span) -> bool {
        self.known.is_some_and(|known| known.covers(range))
    }

    /// Tenant and id of all subscriptions that may have marked windows; `None` where
    /// any may.
    pub fn marked_subscriptions(&self, reference: &Reference) -> Option<Vec<SubscriptionKey>> {
        if self.is_meter_gone {
            return None;
        }
        let indexes: BTreeSet<_> = self.pairs.keys().map(|(subscription, _)| *subscription).collect();
        let name = |at: &usize| reference.subscriptions.get(*at).map(|row| (row.tenant_id.clone(), row.id.clone()));
        Some(indexes.iter().filter_map(name).chain(self.gone.iter().cloned()).collect())
    }

    /// The stored rows that may change, or that cost something else then: of these pairs, or of
    /// all; `None` where any row may. All windows that there are end at `until` or before.
    pub fn rows_to_read(
        &self,
        reference: &Reference,
        of: Option<&FxHashSet<Pair>>,
        until: Timestamp,
    ) -> Option<Vec<WindowChoice>> {
        if self.is_meter_gone {
            return None;
        }
        let pairs = self.pairs.iter().filter(|(pair, _)| of.is_none_or(|of| of.contains(pair)));
        let marked = pairs.filter_map(|((subscription, meter), marked)| {
            let (row, meter_row) = (reference.subscriptions.get(*subscription)?, reference.meters.get(*meter)?);
            let mut spans = Spans::default();
            for span in marked.windows.iter() {
                spans.add(span);
                if span != Spans::ALWAYS {
                    // Windows that are not alone may change what later ones of their period cost.
                    let periods = row.cycle.periods(span).filter(|period| !marked.alone.contains(period.start));
                    periods.for_each(|period| spans.add(Span { start: period.start.max(span.start), end: period.end }));
                }
            }
            let subscription = (row.tenant_id.clone(), row.id.clone());
            let spans: Vec<_> = spans.iter().filter(|span| span.start < until).collect();
            (!spans.is_empty()).then(|| WindowChoice { subscription, meter_id: Some(meter_row.id.clone()), spans })
        });
        let of_all = |subscription: &SubscriptionKey| WindowChoice {
            subscription: subscription.clone(),
            meter_id: None,
            spans: vec![Spans::ALWAYS],
        };
        Some(marked.chain(self.gone.iter().filter(|_| of.is_none()).map(of_all)).collect())
    }

    /// The subscription, the meter and the billing period of a row by the tables; `None` where
    /// these have nothing like it.
    pub fn period_of(&self, key: &PeriodKey, reference: &Reference) -> Option<(Pair, Span)> {
        let pair = self.pair(key)?;
        let period = reference.subscriptions.get(pair.0)?.cycle.period(key.period_start);
        // A former billing cycle may have left closed rows.
        (period.start == key.period_start).then_some((pair, period))
    }

    /// All billing periods that marked rows may be of lie in here.
    pub fn span(&self, reference: &Reference, (range, reach): (Span, Span)) -> Span {
        let Some(known) = self.known.filter(|_| self.gone.is_empty() && !self.is_meter_gone) else { return reach };
        let mut cycles: FxHashMap<BillingCycle, Span> = FxHashMap::default();
        for ((subscription, _), spans) in self.spans() {
            let (Some(row), Some(span)) = (reference.subscriptions.get(subscription), spans.whole()) else { continue };
            cycles.entry(row.cycle).and_modify(|known| *known = known.union(span)).or_insert(span);
        }
        let marked = cycles.iter().filter_map(|(cycle, span)| periods(cycle, *span, reach));
        let earlier = Some(Span { end: known.start, ..reach }).filter(|_| range.start < known.start);
        let later = Some(Span { start: known.end, ..reach }).filter(|_| range.end > known.end);
        let nothing = Span { end: range.start, ..range };
        marked.chain(earlier).chain(later).reduce(Span::union).unwrap_or(nothing)
    }

    /// Subscriptions and meters with the spans whose events count again.
    pub(super) fn spans(&self) -> impl Iterator<Item = (Pair, &Spans)> {
        self.pairs.iter().map(|(pair, marked)| (*pair, &marked.events))
    }

    pub(super) fn mark(&mut self, pair: Pair, span: Span) {
        let marked = self.pairs.entry(pair).or_default();
        marked.events.add(span);
        marked.windows.add(span);
    }

    /// Lets all events of a span count again, though not all of its windows change.
    pub(super) fn need_events(&mut self, pair: Pair, span: Span) {
        self.pairs.entry(pair).or_default().events.add(span);
    }

    /// Whether all events of a billing period count again.
    pub(super) fn need_all_events(&self, pair: Pair, period: Span) -> bool {
        self.is_fresh(period) || self.of(pair).is_some_and(|marked| marked.events.cover(period))
    }

    /// Whether the first of the windows that may change in a billing period begins at an instant or later.
    pub(super) fn change_after(&self, pair: Pair, period: Span, t: Timestamp) -> bool {
        self.of(pair).and_then(|marked| marked.windows.first_in(period)).is_some_and(|first| first >= t)
    }

    /// Lets the windows of a billing period stay as they are that are not marked themselves.
    pub(super) fn let_stand_alone(&mut self, pair: Pair, period: Span) {
        self.pairs.entry(pair).or_default().alone.add(period);
    }

    /// Whether windows of a meter stand alone in some billing period.
    pub fn stand_alone(&self, meter: usize) -> bool {
        self.pairs.iter().any(|((_, of), marked)| *of == meter && marked.alone.whole().is_some())
    }

    /// Lets all windows of a span change, though not all of their events are needed.
    pub(super) fn let_change(&mut self, pair: Pair, span: Span) {
        self.pairs.entry(pair).or_default().windows.add(span);
    }

    fn mark_subscription(&mut self, tenant: &str, id: &str) {
        match self.subscriptions.get(tenant).and_then(|ids| ids.get(id)).copied() {
            Some(index) => (0..self.meters.len()).for_each(|meter| self.mark((index, meter), Spans::ALWAYS)),
            None => {
                self.gone.insert((tenant.to_owned(), id.to_owned()));
            }
        }
    }

    /// Marks what depends on changed rows, in the periods that `reach` holds.
    pub fn add_differences(&mut self, differences: &Differences, reference: &Reference, reach: Span) {
        for ChangedExternal { tenant, id: external_id, subscriptions, .. } in &differences.externals {
            self.externals.insert((tenant.clone(), external_id.clone()));
            subscriptions.iter().for_each(|id| self.mark_subscription(tenant, id));
        }
        for (tenant, external_id, customer) in reference.externals() {
            if self.externals.contains(&(tenant.to_owned(), external_id.to_owned())) {
                let bound = customer.bindings.iter().filter_map(|(_, index)| reference.subscriptions.get(*index));
                bound.for_each(|subscription| self.mark_subscription(tenant, &subscription.id));
            }
        }
        differences.subscriptions.iter().for_each(|(tenant, id)| self.mark_subscription(tenant, id));
        for (id, names) in &differences.meters {
            self.names.extend(names.iter().cloned());
            match self.meters.get(id) {
                Some(meter) => {
                    let meter = *meter;
                    (0..reference.subscriptions.len()).for_each(|index| self.mark((index, meter), Spans::ALWAYS));
                }
                None => self.is_meter_gone = true,
            }
        }
        for price in &differences.prices {
            let Some(meter) = self.meters.get(&price.meter_id).copied() else { continue };
            for (index, subscription) in reference.subscriptions.iter().enumerate() {
                if subscription.plan_id == price.plan_id {
                    let span = if is_level(reference, meter) {
                        Some(Spans::ALWAYS)
                    } else {
                        periods(&subscription.cycle, price.valid(), reach)
                    };
                    span.into_iter().for_each(|span| self.mark((index, meter), span));
                }
            }
        }
    }

    /// Levels reach to the end of the last period of a range: marks the subscriptions
    /// for which that is another one than it was.
    pub fn add_levels(&mut self, reference: &Reference, before: Timestamp, now: Timestamp) {
        let last = |end: Timestamp| Timestamp::from_nanos(end.nanos().saturating_sub(1));
        for meter in (0..reference.meters.len()).filter(|meter| is_level(reference, *meter)) {
            for (index, subscription) in reference.subscriptions.iter().enumerate() {
                let cycle = &subscription.cycle;
                if before != now && cycle.period(last(before)).end != cycle.period(last(now)).end {
                    self.mark((index, meter), Spans::ALWAYS);
                }
            }
        }
    }

    /// Adds what the events of one thread mark.
    pub fn add_events(&mut self, scan: MarkScan<'_, '_>) {
        for (pair, found) in scan.pairs {
            let marked = self.pairs.entry(pair).or_default();
            marked.events.merge(&found.events);
            marked.windows.merge(&found.windows);
        }
    }

    /// The rows of known splits that belong to marked windows and periods.
    pub fn choice(&self, reference: &Reference) -> CustomerChoice {
        let mut by_subscription: FxHashMap<usize, FxHashMap<&str, Spans>> = FxHashMap::default();
        for ((subscription, meter), marked) in self.spans() {
            let Some(meter) = reference.meters.get(meter) else { continue };
            by_subscription.entry(subscription).or_default().entry(&meter.event_name).or_default().merge(marked);
        }
        let mut choice = CustomerChoice::default();
        for (tenant, external_id, customer) in reference.externals() {
            for (binding, subscription) in &customer.bindings {
                for (name, spans) in by_subscription.get(subscription).into_iter().flatten() {
                    for span in spans.iter() {
                        let both = Span { start: span.start.max(binding.start), end: span.end.min(binding.end) };
                        if both.start < both.end {
                            choice.add((tenant, external_id), name, both);
                        }
                    }
                }
            }
        }
        self.externals.iter().for_each(|(tenant, external_id)| choice.add_customer(tenant, external_id));
        self.names.iter().for_each(|name| choice.add_name(name));
        choice
    }
}

fn is_level(reference: &Reference, meter: usize) -> bool {
    reference.meters.get(meter).is_some_and(|meter| meter.aggregation == Aggregation::WeightedSum)
}

/// The billing periods of a cycle that `span` touches, as far as they are in `reach`.
fn periods(cycle: &BillingCycle, span: Span, reach: Span) -> Option<Span> {
    let (start, end) = (span.start.max(reach.start), span.end.min(reach.end));
    let last = Timestamp::from_nanos(end.nanos().saturating_sub(1));
    (start < end).then(|| cycle.period(start).union(cycle.period(last)))
}

/// Finds what events mark; each thread has one.
pub struct MarkScan<'c, 'r> {
    enricher: &'c Enricher<'r>,
    separable: &'c Separable<'r>,
    /// Whether what it visits may be taken away.
    removes: bool,
    has_filters: bool,
    memo: Memo<'c, 'r>,
    pairs: FxHashMap<Pair, PairMarks>,
    /// The period of each subscription that was found last.
    last: FxHashMap<usize, Span>,
    windows: WindowCache,
}

impl<'c, 'r> MarkScan<'c, 'r> {
    /// What it needs of events; `key` is what others do.
    pub fn wanted(enricher: &Enricher<'_>, key: &[Field]) -> Vec<Field> {
        let properties = enricher.has_filters().then_some(Field::Properties);
        let own = [Field::TenantId, Field::Id, Field::EventName, Field::ExternalCustomerId];
        own.iter().chain(key).copied().chain(properties).collect()
    }

    /// Of events that are new; `removes` where they are copies that may count no more.
    pub fn new(enricher: &'c Enricher<'r>, separable: &'c Separable<'r>, removes: bool) -> Self {
        MarkScan {
            enricher,
            separable,
            removes,
            has_filters: enricher.has_filters(),
            memo: Memo::default(),
            pairs: FxHashMap::default(),
            last: FxHashMap::default(),
            windows: WindowCache::default(),
        }
    }

    pub fn begin_batch(&mut self) {
        self.memo.begin_batch();
    }

    /// Marks the windows or the periods that an event counts in, or would if its properties
    /// were right.
    pub fn visit<'e>(&mut self, event: &EventRef<'e>, slots: &mut Vec<Property<'e>>) {
        let (Some(tenant), Some(name), Some(external_id), Some(t)) =
            (event.tenant_id, event.event_name, event.external_customer_id, event.timestamp)
        else {
            return;
        };
        let Some(plan) = self.memo.plans.get([name], || self.enricher.plan(name)) else { return };
        let is_unread = self.has_filters && plan.properties.read(event.properties, slots).is_err();
        if Timestamp::in_range(t.nanos()).is_none() || is_unread {
            return;
        }
        let customer = self.memo.customers.get([tenant, external_id], || self.enricher.reference.customer(tenant, external_id));
        let Ok(subscription) = self.enricher.subscription_of(customer, external_id, t) else { return };
        let Some(row) = self.enricher.reference.subscriptions.get(subscription) else { return };
        let period = match self.last.get(&subscription) {
            Some(period) if period.contains(t) => *period,
            _ => row.cycle.period(t),
        };
        self.last.insert(subscription, period);
        for meter in plan.meters.iter().filter(|meter| !self.has_filters || meter.accepts(slots)) {
            let marked = self.pairs.entry((subscription, meter.index)).or_default();
            if marked.windows.contains(t) {
                continue;
            }
            let (events, windows) = if meter.meter.aggregation == Aggregation::WeightedSum {
                (Spans::ALWAYS, Spans::ALWAYS)
            } else if matches!(meter.meter.window, WindowKind::Tumbling(_)) {
                let window = self.windows.window(meter.meter.window, t, self.separable.timezone);
                // What counts in both: a window that lasts longer has a row in each period.
                let window = Span { start: window.start.max(period.start), end: window.end.min(period.end) };
                match self.separable.depend(row, meter.index) {
                    Dependence::None => (window, window),
                    Dependence::OnValues if !self.removes => (window, window),
                    Dependence::OnValues | Dependence::OnEvents => (period, window),
                    Dependence::OnOrder => (period, period),
                }
            } else {
                (period, period)
            };
            marked.events.add(events);
            marked.windows.add(windows);
        }
    }
}
