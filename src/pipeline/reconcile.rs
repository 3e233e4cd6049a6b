//! Reconciliation: what is stored against what was computed, row by row, and why
//! each difference came about.

use std::collections::BTreeMap;
use std::iter::Peekable;

use rustc_hash::{FxHashMap, FxHashSet};

use super::aggregate::News;
use super::price::PricedWindow;
use crate::model::aggregate::{
    Basis, Cause, Causes, Correction, CorrectionKind, PeriodKey, PeriodRow, StoredWindow, Text, WindowKey, WindowRow,
};
use crate::model::counts::RowCounts;
use crate::model::decimal::DecimalSum;
use crate::model::run::{RunBasis, RunRecord};
use crate::model::window::Span;

/// What must change in the store, and why.
#[derive(Debug, Default)]
pub struct Reconciliation {
    /// In the order of their keys, as all lists here.
    pub corrections: Vec<Correction>,
    pub upserts: Vec<WindowRow>,
    pub retractions: Vec<WindowKey>,
    pub rows: RowCounts,
    pub totals: BTreeMap<Text, Totals>,
    /// Windows outside of the range whose stored usage is not what the events say.
    pub stale_outside: u64,
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
    /// Current digests by id, for rows that are computed no more.
    pub current: CurrentDigests,
}

/// Digests of the definitions as they are now.
#[derive(Debug, Default)]
pub struct CurrentDigests {
    pub meters: FxHashMap<Text, Text>,
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
    let pairs: Vec<_> = Pairs { stored: stored.into_iter().peekable(), computed: computed.iter().peekable() }.collect();
    let moved = moved_periods(&pairs);
    let mut out = Reconciliation::default();
    let judge = Judge { evidence, known: &known, moved: &moved };
    for pair in pairs {
        match pair {
            Pair::Both(before, after) => {
                let covered = range.covers(after.row.window());
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
                out.correct(None, Some(&after.row), judge.insert(after));
            }
            Pair::Stored(before) if range.covers(before.row.window()) => {
                out.rows.retracted += 1;
                out.correct(Some(&before.row), None, judge.retract(&before));
            }
            Pair::Stored(_) => out.stale_outside += 1,
            // Never computed yet: a later run will.
            Pair::Computed(_) => {}
        }
    }
    out
}

impl Reconciliation {
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
    subscriptions: FxHashMap<(Text, Text), FxHashSet<(Text, Text)>>,
}

impl KnownBasis {
    fn of(stored: &[StoredWindow]) -> Self {
        let mut known = KnownBasis::default();
        for StoredWindow { row, .. } in stored {
            let Basis { meter, subscription, customer, .. } = &row.basis;
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
        changed(Cause::MeterChanged, was.basis.meter != is.basis.meter);
        changed(Cause::PriceChanged, was.cost != is.cost && was.basis.price != is.basis.price);
        changed(Cause::SubscriptionChanged, usage_changed && was.basis.subscription != is.basis.subscription);
        changed(Cause::CustomerChanged, usage_changed && was.basis.customer != is.basis.customer);
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

    fn insert(&self, after: &PricedWindow) -> Causes {
        let key = &after.row.key;
        let Some(run) = self.covering_run(after.row.window()) else {
            return Causes::from([(Cause::FirstComputation, after.row.event_count)]);
        };
        let causes = self.news(key, after.news);
        if !causes.is_empty() {
            return causes;
        }
        let basis = &after.row.basis;
        let subscription = self.known.subscriptions.get(&(key.period.tenant_id.clone(), key.period.subscription_id.clone()));
        let changed = self.changed_definitions(
            &run.basis,
            self.known.meters.get(&key.period.meter_id).map(|known| !known.contains(&basis.meter)),
            subscription.map(|known| !known.iter().any(|(of, _)| *of == basis.subscription)),
            subscription.map(|known| !known.iter().any(|(_, of)| *of == basis.customer)),
        );
        or_else(changed, Cause::StoreAltered, 1)
    }

    fn retract(&self, before: &StoredWindow) -> Causes {
        let key = &before.row.key;
        let causes = self.news(key, News::default());
        if !causes.is_empty() {
            return causes;
        }
        let was = &before.row.basis;
        let current = &self.evidence.current;
        let subscription = current.subscriptions.get(&(key.period.tenant_id.clone(), key.period.subscription_id.clone()));
        let changed = self.basis_of(&before.run_id).map(|basis| {
            self.changed_definitions(
                basis,
                Some(current.meters.get(&key.period.meter_id) != Some(&was.meter)),
                Some(subscription.is_none_or(|(digest, _)| *digest != was.subscription)),
                Some(subscription.is_none_or(|(_, digest)| *digest != was.customer)),
            )
        });
        // Nothing changed but the source, which no longer has the events.
        or_else(changed.unwrap_or_default(), Cause::EventVoided, before.row.event_count)
    }

    /// What came, was amended, voided or resolved in this window since the run before.
    fn news(&self, key: &WindowKey, mut news: News) -> Causes {
        news.merge(self.evidence.withdrawn.get(key).copied().unwrap_or_default());
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
    ) -> Causes {
        let now = self.evidence.basis;
        let tables = [
            (Cause::MeterChanged, then.reference.meters != now.reference.meters && meter.unwrap_or(true)),
            (
                Cause::SubscriptionChanged,
                then.reference.subscriptions != now.reference.subscriptions && subscription.unwrap_or(true),
            ),
            (Cause::CustomerChanged, then.reference.customers != now.reference.customers && customer.unwrap_or(true)),
            (Cause::PriceChanged, then.reference.prices != now.reference.prices),
            (Cause::JobChanged, then.job_digest != now.job_digest),
        ];
        tables.into_iter().filter(|(_, changed)| *changed).map(|(cause, _)| (cause, 1)).collect()
    }

    fn basis_of(&self, run_id: &str) -> Option<&RunBasis> {
        self.evidence.runs.iter().find(|run| run.run_id == run_id).map(|run| &run.basis)
    }

    /// The last run that computed this window.
    fn covering_run(&self, window: Span) -> Option<&RunRecord> {
        let covers = |run: &&RunRecord| !run.basis.scoped && run.range.is_some_and(|range| range.covers(window));
        self.evidence.runs.iter().rev().find(covers)
    }
}

fn or_else(causes: Causes, cause: Cause, count: u64) -> Causes {
    if causes.is_empty() { Causes::from([(cause, count)]) } else { causes }
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
