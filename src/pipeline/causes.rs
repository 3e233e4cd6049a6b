//! Why a row differs: from stored digests and versions, from what is new among its
//! events, from what earlier runs covered; never guessed.

use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};

use super::incremental::snapshot::Differences;
use super::price::PricedWindow;
use super::session_changes::SessionChanges;
use super::state::News;
use crate::model::aggregate::{Basis, Cause, Causes, DeadLetter, PeriodKey, Reason, StoredWindow, Text, WindowKey, WindowRow};
use crate::model::basis::ReferenceDigests;
use crate::model::run::{RunBasis, RunRecord};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::reference::{Reference, Subscription};

/// What earlier runs and definitions say about causes.
pub struct Evidence<'e> {
    pub runs: &'e [RunRecord],
    /// As [`RunRecord::taken_back`].
    pub taken_back: FxHashSet<&'e str>,
    pub basis: &'e RunBasis,
    /// News of windows that lost events.
    pub withdrawn: &'e FxHashMap<WindowKey, News>,
    pub sessions: SessionChanges,
    /// Current digests by id, for rows that are computed no more.
    pub current: CurrentDigests,
    pub letters: NewLetters,
    /// Meters that keep a level, by their id.
    pub levels: FxHashSet<&'e str>,
    /// What changed in the reference tables, where that is known row by row.
    pub changed: Option<ChangedRows<'e>>,
}

/// Events that are dead letters since this run, because the tables changed or events came: their
/// times, sorted, by tenant, meter, and what may have changed.
#[derive(Debug, Default)]
pub struct NewLetters(FxHashMap<(String, String, Cause), Vec<Timestamp>>);

impl NewLetters {
    /// What changes of the tables can make of events.
    const CAUSES: [Cause; 3] = [Cause::CustomerChanged, Cause::SubscriptionChanged, Cause::PriceChanged];

    /// `is_new` says of a dead letter that it was not open before.
    pub fn of(letters: &[DeadLetter], reference: &Reference, is_new: impl Fn(&DeadLetter) -> bool) -> Self {
        let mut found: FxHashMap<_, Vec<_>> = FxHashMap::default();
        let mut add = |letter: &DeadLetter, meter: &str, cause| {
            let times: &mut Vec<_> = found.entry((letter.key.tenant_id.clone(), meter.to_owned(), cause)).or_default();
            times.extend(letter.event_time);
        };
        for letter in letters.iter().filter(|letter| is_new(letter)) {
            let cause = match letter.key.reason {
                Reason::PriceNotFound => {
                    add(letter, &letter.key.meter_id, Cause::PriceChanged);
                    continue;
                }
                Reason::CustomerNotFound => Cause::CustomerChanged,
                Reason::NoActiveSubscription | Reason::AmbiguousReference => Cause::SubscriptionChanged,
                _ => continue,
            };
            let event: serde_json::Value = serde_json::from_str(&letter.event).unwrap_or_default();
            let name = event.get("event_name").and_then(serde_json::Value::as_str);
            let meters = reference.meters.iter().filter(|meter| Some(meter.event_name.as_str()) == name);
            meters.for_each(|meter| add(letter, &meter.id, cause));
        }
        found.values_mut().for_each(|times| times.sort_unstable());
        NewLetters(found)
    }

    /// How many of them may have counted in a row.
    fn count(&self, row: &WindowRow, cause: Cause) -> u64 {
        let (period, window) = (&row.key.period, row.window());
        let times = self.0.get(&(period.tenant_id.to_string(), period.meter_id.to_string(), cause));
        let before = |end: Timestamp| times.map_or(0, |times| times.partition_point(|t| *t < end) as u64);
        before(window.end) - before(window.start)
    }
}

impl Evidence<'_> {
    /// What came, was amended, voided or resolved in this window since the run before.
    fn all_news(&self, key: &WindowKey, mut news: News) -> News {
        match self.sessions.news.get(key) {
            Some(of_sessions) => *of_sessions,
            None => {
                news.merge(self.withdrawn.get(key).copied().unwrap_or_default());
                news
            }
        }
    }

    /// Why a window of a closed period is not what the last run of everything found: where it was
    /// not what was recorded of it, that was recorded.
    pub fn since(&self, key: &WindowKey) -> Causes {
        let news = self.all_news(key, News::default()).causes();
        let Some(changed) = self.changed.as_ref().filter(|_| news.is_empty()) else { return news };
        let Some(then) = self.basis_of(changed.run_id) else { return news };
        self.changed_definitions(
            then,
            Some(changed.differences.meters.contains_key(&*key.period.meter_id)),
            Some(changed.subscription(&key.period)),
            Some(changed.customer(&key.period)),
            Some(changed.price(&key.period)),
        )
    }

    /// Definitions that changed since a run; where a row's own digest is known, it
    /// decides, otherwise that of the whole table.
    fn changed_definitions(
        &self,
        then: &RunBasis,
        meter: Option<bool>,
        subscription: Option<bool>,
        customer: Option<bool>,
        price: Option<bool>,
    ) -> Causes {
        let now = self.basis;
        let tables = [
            (Cause::MeterChanged, then.reference.meters != now.reference.meters && meter.unwrap_or(true)),
            (
                Cause::SubscriptionChanged,
                then.reference.subscriptions != now.reference.subscriptions && subscription.unwrap_or(true),
            ),
            (Cause::CustomerChanged, then.reference.customers != now.reference.customers && customer.unwrap_or(true)),
            (Cause::PriceChanged, then.reference.prices != now.reference.prices && price.unwrap_or(true)),
            (Cause::JobChanged, then.job_digest != now.job_digest),
        ];
        tables.into_iter().filter(|(_, changed)| *changed).map(|(cause, _)| (cause, 1)).collect()
    }

    fn basis_of(&self, run_id: &str) -> Option<&RunBasis> {
        self.runs.iter().find(|run| run.run_id == run_id).map(|run| &run.basis)
    }
}

/// Rows of the reference tables that are not what they were to a run.
pub struct ChangedRows<'e> {
    run_id: &'e str,
    differences: &'e Differences,
    /// Tenant and id of subscriptions that external ids stand for, or stood for, which belong to
    /// other customers now, or at other times.
    of_customers: FxHashSet<(&'e str, &'e str)>,
    /// Of those that are bound otherwise because of other subscriptions.
    of_subscriptions: FxHashSet<(&'e str, &'e str)>,
}

impl<'e> ChangedRows<'e> {
    pub fn new(run_id: &'e str, differences: &'e Differences, reference: &'e Reference) -> Self {
        let mut rows =
            ChangedRows { run_id, differences, of_customers: FxHashSet::default(), of_subscriptions: FxHashSet::default() };
        let now: FxHashMap<_, _> = reference.externals().map(|(tenant, id, customer)| ((tenant, id), customer)).collect();
        for external in &differences.externals {
            let tenant = external.tenant.as_str();
            let now = now.get(&(tenant, external.id.as_str())).into_iter().flat_map(|customer| &customer.bindings);
            let now = now.filter_map(|(_, at)| Some(reference.subscriptions.get(*at)?.id.as_str()));
            let bound = external.subscriptions.iter().map(String::as_str).chain(now).map(|id| (tenant, id));
            if external.is_other_customer { rows.of_customers.extend(bound) } else { rows.of_subscriptions.extend(bound) }
        }
        rows
    }

    fn subscription(&self, key: &PeriodKey) -> bool {
        self.of_subscriptions.contains(&(&*key.tenant_id, &*key.subscription_id))
            || self.differences.subscriptions.contains(&(key.tenant_id.to_string(), key.subscription_id.to_string()))
    }

    fn customer(&self, key: &PeriodKey) -> bool {
        self.of_customers.contains(&(&*key.tenant_id, &*key.subscription_id))
    }

    fn price(&self, key: &PeriodKey) -> bool {
        self.differences.prices.iter().any(|price| *price.id == *key.price_id)
    }
}

/// Digests of the definitions as they are now.
#[derive(Debug, Default)]
pub struct CurrentDigests {
    pub meters: FxHashMap<Text, Text>,
    /// When each price holds.
    pub prices: FxHashMap<Text, Span>,
    /// Tenant and subscription, then the digests of subscription and customer.
    pub subscriptions: FxHashMap<(Text, Text), (Text, Text)>,
}

impl CurrentDigests {
    pub fn of(reference: &Reference) -> Self {
        let text = |text: &str| Text::from(text);
        let subscription = |s: &Subscription| ((text(&s.tenant_id), text(&s.id)), (text(&s.digest), text(&s.customer_digest)));
        CurrentDigests {
            meters: reference.meters.iter().map(|meter| (text(&meter.id), text(&meter.digest))).collect(),
            prices: reference.prices.iter().map(|price| (text(&price.id), price.valid)).collect(),
            subscriptions: reference.subscriptions.iter().map(subscription).collect(),
        }
    }
}

/// Digests that the stored rows of a subscription were computed with: others may have been computed
/// since with what is new.
#[derive(Default)]
pub struct KnownBasis<'s>(FxHashMap<(&'s str, &'s str), KnownOf<'s>>);

/// Of one subscription.
#[derive(Default)]
struct KnownOf<'s> {
    meters: FxHashMap<&'s str, FxHashSet<&'s str>>,
    prices: FxHashMap<&'s str, FxHashSet<&'s str>>,
    subscription: FxHashSet<&'s str>,
    customer: FxHashSet<&'s str>,
}

impl<'s> KnownBasis<'s> {
    pub fn of(stored: &'s [StoredWindow]) -> Self {
        let mut known = KnownBasis::default();
        let mut last: Option<&WindowRow> = None;
        for StoredWindow { row, .. } in stored {
            let is_known =
                |last: &WindowRow| Arc::ptr_eq(&last.key.period, &row.key.period) && Arc::ptr_eq(&last.basis, &row.basis);
            if last.replace(row).is_some_and(is_known) {
                continue;
            }
            let (period, Basis { meter, price, subscription, customer }) = (&*row.key.period, &*row.basis);
            let of = known.0.entry((&period.tenant_id, &period.subscription_id)).or_default();
            of.prices.entry(&period.price_id).or_default().insert(price);
            of.meters.entry(&period.meter_id).or_default().insert(meter);
            of.subscription.insert(subscription);
            of.customer.insert(customer);
        }
        known
    }

    fn subscription<'k>(&'k self, period: &'k PeriodKey) -> Option<&'k KnownOf<'k>> {
        self.0.get(&(&*period.tenant_id, &*period.subscription_id))
    }
}

/// How many events a window has less than it had, though no copy says why. Others that came make up
/// for them: they may be the copies that a source has left.
fn lost(was: &WindowRow, is: &WindowRow, news: News) -> u64 {
    // A count that somebody altered is no event.
    let lost = if was.events_digest == is.events_digest { 0 } else { was.event_count };
    lost.saturating_sub(is.event_count + news.voided + news.amended + news.duplicates)
}

/// What can change which events a window counts, beside the events.
const DEFINITIONS: [Cause; 4] = [Cause::CustomerChanged, Cause::SubscriptionChanged, Cause::MeterChanged, Cause::JobChanged];

/// Finds causes.
pub struct Judge<'j> {
    pub evidence: &'j Evidence<'j>,
    pub known: &'j KnownBasis<'j>,
    /// Billing periods in which a window's usage is not what is stored.
    pub moved: &'j FxHashSet<Arc<PeriodKey>>,
    /// Places where a price gives way to another.
    pub replaced: &'j FxHashSet<Slot>,
    /// How many events prices count more than they did, where nothing came, by place.
    pub gained: &'j FxHashMap<Slot, u64>,
    /// Of runs among all of them, by their id: there may be many, and many rows.
    pub places: FxHashMap<&'j str, usize>,
}

impl Judge<'_> {
    /// Why a row changes, and whether events of it are gone from the source, though nobody voided
    /// them. Where a period is closed, what differs from its row is not all new.
    pub fn update(&self, before: &StoredWindow, after: &PricedWindow, is_closed: bool) -> (Causes, bool) {
        let (was, is) = (&before.row, &after.row);
        let usage_changed = !was.same_usage(is);
        // News that left the usage as it was explain nothing.
        let news = if usage_changed { self.evidence.all_news(&is.key, after.news.all()) } else { News::default() };
        let mut causes = self.limited(news, was, is, is_closed).causes();
        let has_news = !causes.is_empty();
        let moved_to_another = was.customer_id != is.customer_id || was.currency != is.currency;
        let is_shifted = self.moved.contains(&is.key.period);
        let mut changed = |cause: Cause, is_changed: bool| {
            if is_changed {
                causes.insert(cause, 1);
            }
        };
        // A digest on the row can be old news: the last run that computed it tells.
        let run = self.covering_run(before);
        let then = run.map(|run| &run.basis.reference);
        let now = &self.evidence.basis.reference;
        let since = |table: fn(&ReferenceDigests) -> &String| then.is_none_or(|then| table(then) != table(now));
        let charged_otherwise = was.cost != is.cost || was.currency != is.currency;
        let lost = if usage_changed && !is_closed { lost(was, is, news) } else { 0 };
        let gained = if lost == 0 { None } else { self.gained.get(&Slot::of(&is.key)) };
        let (dead, tables) = if lost == 0 { (0, Causes::new()) } else { self.dead_now(was, run) };
        // What another price counts now, or is a dead letter since, is not gone.
        let gone = lost.saturating_sub(gained.copied().unwrap_or_default()).saturating_sub(dead);
        // Where it holds no more, events of the window are not charged by it.
        let price_changed = (((charged_otherwise || (usage_changed && !has_news) || gone > 0)
            && was.basis.price != is.basis.price)
            || gained.is_some())
            && since(|tables| &tables.prices);
        let recharged = was.cost != is.cost && !price_changed;
        changed(Cause::PriceChanged, price_changed);
        changed(
            Cause::MeterChanged,
            (usage_changed || recharged) && was.basis.meter != is.basis.meter && since(|tables| &tables.meters),
        );
        changed(
            Cause::SubscriptionChanged,
            // Its start or end may change what a part of a period costs.
            (usage_changed || moved_to_another || (recharged && !is_shifted))
                && was.basis.subscription != is.basis.subscription
                && since(|tables| &tables.subscriptions),
        );
        changed(
            Cause::CustomerChanged,
            (usage_changed || moved_to_another) && was.basis.customer != is.basis.customer && since(|tables| &tables.customers),
        );
        if usage_changed
            && causes.is_empty()
            && let Some((run, changed)) =
                run.zip(self.evidence.changed.as_ref()).filter(|(run, changed)| changed.run_id == run.run_id)
        {
            // Rows of the tables beside those that this one was computed with.
            let period = &is.key.period;
            let (subscription, customer) = (changed.subscription(period), changed.customer(period));
            let basis = RunBasis { job_digest: self.evidence.basis.job_digest.clone(), ..run.basis.clone() };
            causes.extend(self.evidence.changed_definitions(
                &basis,
                Some(false),
                Some(subscription),
                Some(customer),
                Some(false),
            ));
        }
        causes.extend(tables);
        let job_changed =
            self.evidence.basis_of(&before.run_id).is_some_and(|basis| basis.job_digest != self.evidence.basis.job_digest);
        if gone > 0 && !job_changed && !DEFINITIONS.iter().any(|cause| causes.hold(*cause)) {
            causes.insert(Cause::EventVoided, gone + news.voided);
            return (causes, true);
        }
        if !causes.is_empty() {
            return (causes, false);
        }
        let (cause, count) = if usage_changed && job_changed {
            (Cause::JobChanged, 1)
        } else if was.events_digest != is.events_digest {
            // The source itself changed under unchanged ingestion times.
            match is.event_count.cmp(&was.event_count) {
                std::cmp::Ordering::Greater => (Cause::LateEvent, is.event_count - was.event_count),
                std::cmp::Ordering::Less => (Cause::EventVoided, was.event_count - is.event_count),
                std::cmp::Ordering::Equal => (Cause::EventAmended, 1),
            }
        } else if !usage_changed && is_shifted {
            (Cause::TierShift, 1)
        } else {
            (Cause::StoreAltered, 1)
        };
        causes.insert(cause, count);
        (causes, cause == Cause::EventVoided)
    }

    /// The causes, and whether they are proved.
    pub fn insert(&self, after: &PricedWindow) -> (Causes, bool) {
        let key = &after.row.key;
        // Of a row that is not there, what was taken back tells nothing.
        let stands = |run: &RunRecord| !self.evidence.taken_back.contains(run.run_id.as_str());
        let Some(run) = self.last_covering(&after.row, false, stands) else {
            // A level that is carried in has no event of its own.
            return (Causes::from([(Cause::FirstComputation, after.row.event_count.max(1))]), true);
        };
        let mut causes = self.evidence.all_news(key, after.news.all()).causes();
        if !causes.is_empty() && causes.total() >= after.row.event_count {
            return (causes, true);
        }
        let basis = &after.row.basis;
        let known = self.known.subscription(&key.period);
        let meter = known.and_then(|of| of.meters.get(&*key.period.meter_id)).map(|known| !known.contains(&*basis.meter));
        let price = known.and_then(|of| of.prices.get(&*key.period.price_id)).map(|known| !known.contains(&*basis.price));
        let customer = known.map(|of| !of.customer.contains(&*basis.customer));
        let subscription = known.map(|of| !of.subscription.contains(&*basis.subscription));
        // What the tables were to that run is better than what rows say that others may have left.
        let changed = self.evidence.changed.as_ref().filter(|changed| changed.run_id == run.run_id);
        let or = |known: Option<bool>, is_changed: &dyn Fn(&ChangedRows<'_>) -> bool| changed.map(is_changed).or(known);
        let slot = Slot::of(key);
        causes.extend(self.evidence.changed_definitions(
            &run.basis,
            or(meter, &|changed| changed.differences.meters.contains_key(&*key.period.meter_id)),
            or(subscription, &|changed| changed.subscription(&key.period)),
            or(customer, &|changed| changed.customer(&key.period)),
            or(price, &|changed| changed.price(&key.period)).map(|changed| changed || self.replaced.contains(&slot)),
        ));
        let proved = !causes.is_empty();
        (causes, proved)
    }

    /// The causes, and whether they are proved.
    pub fn retract(&self, before: &StoredWindow) -> (Causes, bool) {
        let key = &before.row.key;
        let mut causes = self.evidence.all_news(key, News::default()).causes();
        if !causes.is_empty() && causes.total() >= before.row.event_count {
            return (causes, true);
        }
        let was = &before.row.basis;
        let current = &self.evidence.current;
        let subscription = current.subscriptions.get(&(key.period.tenant_id.clone(), key.period.subscription_id.clone()));
        // What a price says does not take a window away; that it holds no more does.
        let price_is_gone = match &*key.period.price_id {
            "" => self.replaced.contains(&Slot::of(key)),
            id => {
                current.prices.get(id).is_none_or(|valid| !valid.overlaps(before.row.window()))
                    || self.replaced.contains(&Slot::of(key))
                    || self.evidence.letters.count(&before.row, Cause::PriceChanged) > 0
            }
        };
        // A digest on the row can be old news: the last run that computed it tells.
        if let Some(run) = self.covering_run(before) {
            causes.extend(self.evidence.changed_definitions(
                &run.basis,
                Some(current.meters.get(&key.period.meter_id) != Some(&was.meter)),
                Some(subscription.is_none_or(|(digest, _)| *digest != was.subscription)),
                Some(subscription.is_none_or(|(_, digest)| *digest != was.customer)),
                Some(price_is_gone),
            ));
        }
        let (dead, tables) =
            if causes.is_empty() { self.dead_now(&before.row, self.covering_run(before)) } else { (0, Causes::new()) };
        if dead >= before.row.event_count {
            causes.extend(tables);
        }
        let proved = !causes.is_empty();
        (causes, proved)
    }

    /// How many events of a window are dead letters since tables changed after a run, and which.
    fn dead_now(&self, row: &WindowRow, run: Option<&RunRecord>) -> (u64, Causes) {
        let changed = run.map(|run| self.evidence.changed_definitions(&run.basis, Some(false), None, None, None));
        let changed = changed.unwrap_or_default();
        let (mut all, mut causes) = (0, Causes::new());
        for cause in NewLetters::CAUSES.into_iter().filter(|cause| changed.hold(*cause)) {
            let count = self.evidence.letters.count(row, cause);
            all += count;
            if count > 0 {
                causes.insert(cause, 1);
            }
        }
        (all, causes)
    }

    /// No more events are late than a window has more, if all others count still: where files were
    /// merged into others, their events only look new. A level is changed by late events of other
    /// windows too.
    fn limited(&self, news: News, was: &WindowRow, is: &WindowRow, is_closed: bool) -> News {
        if is_closed || was.basis != is.basis || self.evidence.levels.contains(&*is.key.period.meter_id) {
            return news;
        }
        let came = is.event_count.saturating_add(news.voided + news.amended + news.duplicates);
        News { late: news.late.min(came.saturating_sub(was.event_count.saturating_add(news.resolved))), ..news }
    }

    /// The last run that computed the window of a stored row as it is. Where the row was restored,
    /// that was before the run that was taken back.
    fn covering_run(&self, stored: &StoredWindow) -> Option<&RunRecord> {
        let at = |run_id: &str| self.places.get(run_id).copied();
        let by = at(&stored.run_id);
        // From the run that was taken back until it was, the row was another.
        let reverted = by.and_then(|by| Some(at(self.evidence.runs.get(by)?.reverted()?)?..=by));
        let stood = |run: &RunRecord| reverted.as_ref().is_none_or(|range| at(&run.run_id).is_none_or(|at| !range.contains(&at)));
        self.last_covering(&stored.row, true, stood)
    }

    /// The last run that computed this row's window: it covers the window, was about
    /// this part of the job, and came after the window began.
    fn last_covering(&self, row: &WindowRow, is_stored: bool, wants: impl Fn(&RunRecord) -> bool) -> Option<&RunRecord> {
        let covers = |run: &&RunRecord| {
            let period = &row.key.period;
            let began = |until: Option<Timestamp>| until.is_none_or(|until| row.key.window_start <= until);
            run.range.is_some_and(|range| range.covers(row.window()))
                && run.basis.scope.holds(&period.tenant_id, &row.customer_id, &period.meter_id)
                // Of a row that was there, no clock that goes wrong says otherwise.
                && (is_stored || (began(run.input.events_until) && began(run.input.ingested_until)))
                && wants(run)
        };
        self.evidence.runs.iter().rev().find(covers)
    }
}

/// A row's place, whatever its price: where one price takes over from another, both
/// rows have the same.
#[derive(PartialEq, Eq, Hash)]
pub struct Slot {
    tenant: Text,
    subscription: Text,
    meter: Text,
    dimensions: Text,
    window_start: Timestamp,
}

impl Slot {
    pub fn of(key: &WindowKey) -> Self {
        Slot {
            tenant: key.period.tenant_id.clone(),
            subscription: key.period.subscription_id.clone(),
            meter: key.period.meter_id.clone(),
            dimensions: key.period.dimensions.clone(),
            window_start: key.window_start,
        }
    }
}
