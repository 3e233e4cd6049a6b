//! Reconciliation: what is stored against what was computed, row by row, and why
//! each difference came about.

use std::collections::BTreeMap;

use anyhow::Context as _;
use std::iter::Peekable;

use rustc_hash::{FxHashMap, FxHashSet};

use super::price::PricedWindow;
use super::sessions::SessionChanges;
use super::state::News;
use crate::model::aggregate::{
    Basis, Cause, Causes, Correction, CorrectionKind, PeriodKey, PeriodRow, StoredWindow, Text, WindowKey, WindowRow,
};
use crate::model::counts::RowCounts;
use crate::model::decimal::DecimalSum;
use crate::model::run::{RunBasis, RunRecord};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::reference::ReferenceDigests;

/// What must change in the store, and why.
#[derive(Debug, Default)]
pub struct Reconciliation {
    /// In the order of their keys, as all lists here.
    pub corrections: Vec<Correction>,
    pub upserts: Vec<WindowRow>,
    pub retractions: Vec<WindowKey>,
    pub rows: RowCounts,
    pub totals: BTreeMap<Text, Totals>,
    /// Windows outside of the range whose stored usage is not what the events say,
    /// or that are not stored yet.
    pub stale_outside: u64,
    /// Corrections whose cause only the ledger can prove, by index.
    unproved: Vec<usize>,
}

/// Cost of the rows that the run covers, before and after.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub before: DecimalSum,
    pub after: DecimalSum,
}

/// What earlier runs and definitions say about causes.
pub struct Evidence<'e> {
    pub runs: &'e [RunRecord],
    pub basis: &'e RunBasis,
    /// News of windows that lost events.
    pub withdrawn: &'e FxHashMap<WindowKey, News>,
    pub sessions: SessionChanges,
    /// Current digests by id, for rows that are computed no more.
    pub current: CurrentDigests,
}

/// Digests of the definitions as they are now.
#[derive(Debug, Default)]
pub struct CurrentDigests {
    pub meters: FxHashMap<Text, Text>,
    pub prices: FxHashMap<Text, Text>,
    /// Tenant and subscription, then the digests of subscription and customer.
    pub subscriptions: FxHashMap<(Text, Text), (Text, Text)>,
}

/// One row on either side.
enum Pair<'a> {
    Both(StoredWindow, &'a PricedWindow),
    Stored(StoredWindow),
    Computed(&'a PricedWindow),
}

/// Compares `stored` with `computed`; both are sorted by key. Only windows that
/// `range` covers may change their usage; others may change their cost.
pub fn reconcile(stored: Vec<StoredWindow>, computed: &[PricedWindow], range: Span, evidence: &Evidence<'_>) -> Reconciliation {
    let known = KnownBasis::of(&stored);
    let pairs = Pairs { stored: stored.into_iter().peekable(), computed: computed.iter().peekable() };
    let pairs: Vec<_> = pairs.flat_map(|pair| pair.unless_rebuilt(&evidence.sessions)).collect();
    let moved = moved_periods(&pairs);
    let mut out = Reconciliation::default();
    let replaced = replaced_slots(&pairs);
    let judge = Judge { evidence, known: &known, moved: &moved, replaced: &replaced };
    for pair in pairs {
        match pair {
            Pair::Both(before, after) => {
                let covered = range.covers(before.row.window()) && range.covers(after.row.window());
                if before.row.says_the_same(&after.row) {
                    out.rows.unchanged += u64::from(covered);
                    if covered {
                        out.total(Some(&before.row), Some(&after.row));
                    }
                } else if covered || before.row.same_usage(&after.row) {
                    out.rows.updated += 1;
                    out.correct(Some(&before.row), Some(&after.row), judge.update(&before, after));
                } else {
                    out.stale_outside += 1;
                }
            }
            Pair::Computed(after) if range.covers(after.row.window()) => {
                out.rows.inserted += 1;
                let (causes, proved) = judge.insert(after);
                out.correct(None, Some(&after.row), causes);
                out.unproved.extend((!proved).then(|| out.corrections.len() - 1));
            }
            Pair::Stored(before) if range.covers(before.row.window()) => {
                out.rows.retracted += 1;
                let (causes, proved) = judge.retract(&before);
                out.correct(Some(&before.row), None, causes);
                out.unproved.extend((!proved).then(|| out.corrections.len() - 1));
            }
            Pair::Stored(_) | Pair::Computed(_) => out.stale_outside += 1,
        }
    }
    out.keep_what_is_inserted_again(&evidence.sessions);
    out
}

impl Pair<'_> {
    /// A session that was joined or split is not the one that began at the same time.
    fn unless_rebuilt(self, sessions: &SessionChanges) -> impl Iterator<Item = Self> {
        let (first, second) = match self {
            Pair::Both(before, after) if sessions.rebuilt.contains(&after.row.key) => {
                (Pair::Stored(before), Some(Pair::Computed(after)))
            }
            pair => (pair, None),
        };
        std::iter::once(first).chain(second)
    }
}

impl Reconciliation {
    /// The ledger retracts a session that was joined or split, and inserts what begins at the same
    /// time; the store's row is written over.
    fn keep_what_is_inserted_again(&mut self, sessions: &SessionChanges) {
        if !sessions.rebuilt.is_empty() {
            let upserted: FxHashSet<_> = self.upserts.iter().map(|row| &row.key).collect();
            self.retractions.retain(|key| !upserted.contains(key));
        }
    }

    /// Whether every total can be told.
    ///
    /// # Errors
    /// Where a sum of costs overflows.
    pub fn check_totals(&self) -> anyhow::Result<()> {
        for (currency, totals) in &self.totals {
            let sums = totals.before.total().and(totals.after.total());
            sums.with_context(|| format!("the cost of all windows in {currency}"))?;
        }
        Ok(())
    }

    /// Whether a cause is left that only the ledger can prove.
    pub fn asks_the_ledger(&self) -> bool {
        !self.unproved.is_empty()
    }

    /// Settles what nothing else could: `in_ledger` says whether the ledger has a row
    /// of this key. A row that it has and the store lacks, or the other way round,
    /// was altered by somebody else.
    pub fn ask_the_ledger(&mut self, in_ledger: impl Fn(&WindowKey) -> bool) {
        for at in std::mem::take(&mut self.unproved) {
            let Some(correction) = self.corrections.get_mut(at) else { continue };
            let known = in_ledger(&correction.key);
            let (cause, values) = match (correction.after, correction.before) {
                (Some(after), _) if known => (Cause::StoreAltered, Some(after)),
                (Some(after), _) => (Cause::LateEvent, Some(after)),
                (None, before) if known => (Cause::EventVoided, before),
                (None, before) => (Cause::StoreAltered, before),
            };
            let count = if cause == Cause::StoreAltered { 1 } else { values.map_or(1, |values| values.event_count) };
            correction.causes = Causes::from([(cause, count)]);
        }
    }

    fn total(&mut self, before: Option<&WindowRow>, after: Option<&WindowRow>) {
        if let Some(row) = before {
            self.totals.entry(row.currency.clone()).or_default().before.add(row.cost);
        }
        if let Some(row) = after {
            self.totals.entry(row.currency.clone()).or_default().after.add(row.cost);
        }
    }

    fn correct(&mut self, before: Option<&WindowRow>, after: Option<&WindowRow>, causes: Causes) {
        self.total(before, after);
        let kind = match (before, after) {
            (None, _) => CorrectionKind::Insert,
            (Some(_), Some(_)) => CorrectionKind::Update,
            (Some(_), None) => CorrectionKind::Retract,
        };
        let Some(row) = after.or(before) else { return };
        self.corrections.push(Correction {
            key: row.key.clone(),
            customer_id: row.customer_id.clone(),
            currency: row.currency.clone(),
            kind,
            causes,
            before: before.map(Into::into),
            after: after.map(Into::into),
        });
        match after {
            Some(row) => self.upserts.push(row.clone()),
            None => self.retractions.push(row.key.clone()),
        }
    }
}

/// Merges two sorted sides.
struct Pairs<'a> {
    stored: Peekable<std::vec::IntoIter<StoredWindow>>,
    computed: Peekable<std::slice::Iter<'a, PricedWindow>>,
}

impl<'a> Iterator for Pairs<'a> {
    type Item = Pair<'a>;

    fn next(&mut self) -> Option<Pair<'a>> {
        let order = match (self.stored.peek(), self.computed.peek()) {
            (Some(stored), Some(computed)) => stored.row.key.cmp(&computed.row.key),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, _) => std::cmp::Ordering::Greater,
        };
        match order {
            std::cmp::Ordering::Less => self.stored.next().map(Pair::Stored),
            std::cmp::Ordering::Greater => self.computed.next().map(Pair::Computed),
            std::cmp::Ordering::Equal => Some(Pair::Both(self.stored.next()?, self.computed.next()?)),
        }
    }
}

/// Billing periods in which a window's usage is not what is stored.
fn moved_periods(pairs: &[Pair<'_>]) -> FxHashSet<PeriodKey> {
    let moved = |pair: &Pair<'_>| match pair {
        Pair::Both(before, after) => (!before.row.same_usage(&after.row)).then(|| after.row.key.period.clone()),
        Pair::Stored(before) => Some(before.row.key.period.clone()),
        Pair::Computed(after) => Some(after.row.key.period.clone()),
    };
    pairs.iter().filter_map(moved).collect()
}

/// Digests that stored rows were computed with.
#[derive(Default)]
struct KnownBasis {
    meters: FxHashMap<Text, FxHashSet<Text>>,
    prices: FxHashMap<Text, FxHashSet<Text>>,
    subscriptions: FxHashMap<(Text, Text), FxHashSet<(Text, Text)>>,
}

impl KnownBasis {
    fn of(stored: &[StoredWindow]) -> Self {
        let mut known = KnownBasis::default();
        for StoredWindow { row, .. } in stored {
            let Basis { meter, price, subscription, customer } = &row.basis;
            known.prices.entry(row.key.period.price_id.clone()).or_default().insert(price.clone());
            known.meters.entry(row.key.period.meter_id.clone()).or_default().insert(meter.clone());
            let key = (row.key.period.tenant_id.clone(), row.key.period.subscription_id.clone());
            known.subscriptions.entry(key).or_default().insert((subscription.clone(), customer.clone()));
        }
        known
    }
}

/// Finds causes.
struct Judge<'j> {
    evidence: &'j Evidence<'j>,
    known: &'j KnownBasis,
    moved: &'j FxHashSet<PeriodKey>,
    replaced: &'j FxHashSet<Slot>,
}

impl Judge<'_> {
    fn update(&self, before: &StoredWindow, after: &PricedWindow) -> Causes {
        let (was, is) = (&before.row, &after.row);
        let mut causes = self.news(&is.key, after.news);
        let usage_changed = !was.same_usage(is);
        if !usage_changed {
            // News that left the usage as it was explain nothing.
            causes.clear();
        }
        let mut changed = |cause: Cause, is_changed: bool| {
            if is_changed {
                causes.insert(cause, 1);
            }
        };
        // A digest on the row can be old news: the last run that computed it tells.
        let then = self.covering_run(is).map(|run| &run.basis.reference);
        let now = &self.evidence.basis.reference;
        let since = |table: fn(&ReferenceDigests) -> &String| then.is_none_or(|then| table(then) != table(now));
        let price_changed = was.cost != is.cost && was.basis.price != is.basis.price && since(|tables| &tables.prices);
        let recharged = was.cost != is.cost && !price_changed;
        changed(Cause::PriceChanged, price_changed);
        changed(
            Cause::MeterChanged,
            (usage_changed || recharged) && was.basis.meter != is.basis.meter && since(|tables| &tables.meters),
        );
        changed(
            Cause::SubscriptionChanged,
            usage_changed && was.basis.subscription != is.basis.subscription && since(|tables| &tables.subscriptions),
        );
        changed(
            Cause::CustomerChanged,
            usage_changed && was.basis.customer != is.basis.customer && since(|tables| &tables.customers),
        );
        if !causes.is_empty() {
            return causes;
        }
        let job_changed = self.basis_of(&before.run_id).is_some_and(|basis| basis.job_digest != self.evidence.basis.job_digest);
        let (cause, count) = if usage_changed && job_changed {
            (Cause::JobChanged, 1)
        } else if was.events_digest != is.events_digest {
            // The source itself changed under unchanged ingestion times.
            match is.event_count.cmp(&was.event_count) {
                std::cmp::Ordering::Greater => (Cause::LateEvent, is.event_count - was.event_count),
                std::cmp::Ordering::Less => (Cause::EventVoided, was.event_count - is.event_count),
                std::cmp::Ordering::Equal => (Cause::EventAmended, 1),
            }
        } else if !usage_changed && self.moved.contains(&is.key.period) {
            (Cause::TierShift, 1)
        } else {
            (Cause::StoreAltered, 1)
        };
        causes.insert(cause, count);
        causes
    }

    /// The causes, and whether they are proved.
    fn insert(&self, after: &PricedWindow) -> (Causes, bool) {
        let key = &after.row.key;
        let Some(run) = self.covering_run(&after.row) else {
            return (Causes::from([(Cause::FirstComputation, after.row.event_count)]), true);
        };
        let mut causes = self.news(key, after.news);
        if causes.values().sum::<u64>() >= after.row.event_count {
            return (causes, true);
        }
        let basis = &after.row.basis;
        let subscription = self.known.subscriptions.get(&(key.period.tenant_id.clone(), key.period.subscription_id.clone()));
        let slot = Slot::of(key);
        let price = self.known.prices.get(&key.period.price_id).map(|known| !known.contains(&basis.price));
        causes.extend(self.changed_definitions(
            &run.basis,
            self.known.meters.get(&key.period.meter_id).map(|known| !known.contains(&basis.meter)),
            subscription.map(|known| !known.iter().any(|(of, _)| *of == basis.subscription)),
            subscription.map(|known| !known.iter().any(|(_, of)| *of == basis.customer)),
            price.map(|changed| changed || self.replaced.contains(&slot)),
        ));
        let proved = !causes.is_empty();
        (causes, proved)
    }

    /// The causes, and whether they are proved.
    fn retract(&self, before: &StoredWindow) -> (Causes, bool) {
        let key = &before.row.key;
        let mut causes = self.news(key, News::default());
        if causes.values().sum::<u64>() >= before.row.event_count {
            return (causes, true);
        }
        let was = &before.row.basis;
        let current = &self.evidence.current;
        let subscription = current.subscriptions.get(&(key.period.tenant_id.clone(), key.period.subscription_id.clone()));
        if let Some(basis) = self.basis_of(&before.run_id) {
            causes.extend(self.changed_definitions(
                basis,
                Some(current.meters.get(&key.period.meter_id) != Some(&was.meter)),
                Some(subscription.is_none_or(|(digest, _)| *digest != was.subscription)),
                Some(subscription.is_none_or(|(_, digest)| *digest != was.customer)),
                Some(current.prices.get(&key.period.price_id) != Some(&was.price) || self.replaced.contains(&Slot::of(key))),
            ));
        }
        let proved = !causes.is_empty();
        (causes, proved)
    }

    /// What came, was amended, voided or resolved in this window since the run before.
    fn news(&self, key: &WindowKey, mut news: News) -> Causes {
        match self.evidence.sessions.news.get(key) {
            Some(of_sessions) => news = *of_sessions,
            None => news.merge(self.evidence.withdrawn.get(key).copied().unwrap_or_default()),
        }
        let counts = [
            (Cause::LateEvent, news.late),
            (Cause::EventAmended, news.amended),
            (Cause::EventVoided, news.voided),
            (Cause::DeadLetterResolved, news.resolved),
        ];
        counts.into_iter().filter(|(_, count)| *count > 0).collect()
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
        let now = self.evidence.basis;
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
        self.evidence.runs.iter().find(|run| run.run_id == run_id).map(|run| &run.basis)
    }

    /// The last run that computed this row's window: it covers the window, was about
    /// this part of the job, and came after the window began.
    fn covering_run(&self, row: &WindowRow) -> Option<&RunRecord> {
        let covers = |run: &&RunRecord| {
            let period = &row.key.period;
            let began = |until: Option<Timestamp>| until.is_none_or(|until| row.key.window_start <= until);
            run.range.is_some_and(|range| range.covers(row.window()))
                && run.basis.scope.holds(&period.tenant_id, &row.customer_id, &period.meter_id)
                && began(run.input.events_until)
                && began(run.input.ingested_until)
        };
        self.evidence.runs.iter().rev().find(covers)
    }
}

/// A row's place, whatever its price: where one price takes over from another, both
/// rows have the same.
#[derive(PartialEq, Eq, Hash)]
struct Slot {
    tenant: Text,
    subscription: Text,
    meter: Text,
    dimensions: Text,
    window_start: Timestamp,
}

impl Slot {
    fn of(key: &WindowKey) -> Self {
        Slot {
            tenant: key.period.tenant_id.clone(),
            subscription: key.period.subscription_id.clone(),
            meter: key.period.meter_id.clone(),
            dimensions: key.period.dimensions.clone(),
            window_start: key.window_start,
        }
    }
}

/// Places where a price gives way to another: one side is stored alone, the other
/// computed alone.
fn replaced_slots(pairs: &[Pair<'_>]) -> FxHashSet<Slot> {
    let stored =
        pairs.iter().filter_map(|pair| if let Pair::Stored(before) = pair { Some(Slot::of(&before.row.key)) } else { None });
    let stored: FxHashSet<_> = stored.collect();
    let computed =
        pairs.iter().filter_map(|pair| if let Pair::Computed(after) = pair { Some(Slot::of(&after.row.key)) } else { None });
    computed.filter(|slot| stored.contains(slot)).collect()
}

/// Changes to `usage_periods`.
#[derive(Debug, Default)]
pub struct PeriodChanges {
    pub upserts: Vec<PeriodRow>,
    pub deletions: Vec<PeriodKey>,
    pub unchanged: u64,
}

impl PeriodChanges {
    /// Rows to write or to remove.
    pub fn changed(&self) -> u64 {
        (self.upserts.len() + self.deletions.len()) as u64
    }
}

/// Compares stored and computed period rows; both are sorted by key.
pub fn reconcile_periods(stored: Vec<PeriodRow>, computed: Vec<PeriodRow>) -> PeriodChanges {
    let mut changes = PeriodChanges::default();
    let mut stored = stored.into_iter().peekable();
    for row in computed {
        while let Some(gone) = stored.next_if(|before| before.key < row.key) {
            changes.deletions.push(gone.key);
        }
        match stored.next_if(|before| before.key == row.key) {
            Some(before) if before == row => changes.unchanged += 1,
            _ => changes.upserts.push(row),
        }
    }
    changes.deletions.extend(stored.map(|row| row.key));
    changes
}
