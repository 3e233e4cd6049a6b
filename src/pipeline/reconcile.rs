//! Reconciliation: what is stored against what was computed, row by row, and why
//! each difference came about.

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::sync::Arc;

use anyhow::Context as _;
use rustc_hash::{FxHashMap, FxHashSet};

use super::causes::{Evidence, Judge, KnownBasis, Slot};
use super::closed::{ClosedDifference, ClosedPeriods};
use super::price::{Carried, PricedWindow};
use super::session_changes::SessionChanges;
use crate::model::aggregate::{
    Cause, Causes, Correction, CorrectionKind, PeriodCorrection, PeriodKey, PeriodRow, Recorded, StoredWindow, Text, WindowKey,
    WindowRow,
};
use crate::model::counts::RowCounts;
use crate::model::decimal_sum::DecimalSum;
use crate::model::window::Span;

/// What must change in the store, and why.
#[derive(Debug, Default)]
pub struct Reconciliation {
    /// In the order of their keys, as all lists here.
    pub corrections: Vec<Correction>,
    /// Shared with what was computed.
    pub upserts: Vec<Arc<WindowRow>>,
    pub retractions: Vec<WindowKey>,
    pub rows: RowCounts,
    pub totals: BTreeMap<Text, Totals>,
    /// Windows outside of the range whose stored usage is not what the events say,
    /// or that are not stored yet.
    pub stale_outside: u64,
    /// The customers of rows that lose events which are gone from the source, though nobody voided them.
    pub vanished: Vec<Text>,
    /// Corrections whose cause only the ledger can prove, by index.
    pub(super) unproved: Vec<usize>,
    /// Differences in closed periods, before it is known which of them are recorded.
    pub(super) closed: Vec<ClosedDifference>,
    /// Windows of closed periods among those of `stale_outside`.
    pub(super) closed_and_stale: Vec<WindowKey>,
}

/// Cost of the rows that the run covers, before and after.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub before: DecimalSum,
    pub after: DecimalSum,
}

/// One row on either side.
#[derive(Clone, Copy)]
enum Pair<'a> {
    Both(&'a StoredWindow, &'a PricedWindow),
    Stored(&'a StoredWindow),
    Computed(&'a PricedWindow),
}

/// Compares `stored` with `computed`; both are sorted by key. Only windows that
/// `range` covers may change their usage; others may change their cost.
///
/// Differences in `closed` periods are set aside.
pub fn reconcile(
    stored: &[StoredWindow],
    computed: &[PricedWindow],
    range: Span,
    closed: &ClosedPeriods,
    evidence: &Evidence<'_>,
) -> Reconciliation {
    let known = KnownBasis::of(stored);
    let pairs = Pairs { stored: stored.iter().peekable(), computed: computed.iter().peekable() };
    let pairs: Vec<_> = pairs.flat_map(|pair| pair.unless_rebuilt(&evidence.sessions, closed)).collect();
    let moved = moved_periods(&pairs);
    let is_new = |pair: &&Pair<'_>| matches!(pair, Pair::Computed(_));
    let new = pairs.iter().filter(is_new).count();
    // Doubling would hold half of them twice.
    let mut out =
        Reconciliation { corrections: Vec::with_capacity(new), upserts: Vec::with_capacity(new), ..Reconciliation::default() };
    let replaced = replaced_slots(&pairs);
    let places = evidence.runs.iter().enumerate().map(|(at, run)| (run.run_id.as_str(), at)).collect();
    let gained = gained_by_prices(&pairs);
    let judge = Judge { evidence, known: &known, moved: &moved, replaced: &replaced, gained: &gained, places };
    for pair in pairs {
        match pair {
            pair if closed.hold(pair.period()) => out.set_aside(pair, range, &judge),
            Pair::Both(before, after) => {
                let covered = range.covers(before.row.window()) && range.covers(after.row.window());
                if before.row.says_the_same(&after.row) {
                    out.rows.unchanged += u64::from(covered);
                    if covered {
                        out.total(Some(&before.row), Some(&after.row));
                    }
                } else if covered || before.row.same_usage(&after.row) {
                    out.rows.updated += 1;
                    let (causes, vanished) = judge.update(before, after, false);
                    out.vanished.extend(vanished.then(|| after.row.customer_id.clone()));
                    out.correct(Some(&before.row), Some(&after.row), causes);
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
                let (causes, proved) = judge.retract(before);
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
    fn period(&self) -> &Arc<PeriodKey> {
        match self {
            Pair::Stored(before) => &before.row.key.period,
            Pair::Both(_, after) | Pair::Computed(after) => &after.row.key.period,
        }
    }

    /// A session that was joined or split is not the one that began at the same time; but what is
    /// closed keeps its row, and what differs from it is one adjustment.
    fn unless_rebuilt(self, sessions: &SessionChanges, closed: &ClosedPeriods) -> impl Iterator<Item = Self> {
        let (first, second) = match self {
            Pair::Both(before, after) if sessions.rebuilt.contains(&after.row.key) && !closed.hold(&after.row.key.period) => {
                (Pair::Stored(before), Some(Pair::Computed(after)))
            }
            pair => (pair, None),
        };
        std::iter::once(first).chain(second)
    }
}

impl Reconciliation {
    /// A pair of a closed period: what is stored stays, a difference is noted.
    fn set_aside(&mut self, pair: Pair<'_>, range: Span, judge: &Judge<'_>) {
        let (before, after, causes) = match pair {
            Pair::Both(before, after) if before.row.says_the_same(&after.row) => {
                let covered = range.covers(after.row.window());
                self.rows.unchanged += u64::from(covered);
                if covered {
                    self.total(Some(&before.row), Some(&before.row));
                }
                // It may have been adjusted, and be right again.
                (Some(&before.row), Some(&after.row), Causes::new())
            }
            Pair::Both(before, after) => (Some(&before.row), Some(&after.row), judge.update(before, after, true).0),
            Pair::Computed(after) => (None, Some(&after.row), judge.insert(after).0),
            Pair::Stored(before) => (Some(&before.row), None, judge.retract(before).0),
        };
        let Some(row) = after.or(before) else { return };
        // Beyond the range, only what a window costs can be told, as in periods that are open.
        let same_usage = before.zip(after).is_some_and(|(before, after)| before.same_usage(after));
        if !range.covers(row.window()) && !same_usage {
            self.stale_outside += 1;
            self.closed_and_stale.push(row.key.clone());
        } else {
            let copy = |row: Option<&Arc<WindowRow>>| row.map(|row| WindowRow::clone(row));
            let (before, after) = (copy(before), copy(after));
            self.closed.push(ClosedDifference { before, after, causes });
        }
    }

    /// The ledger retracts a session that was joined or split, and inserts what begins at the same
    /// time; the store's row is written over.
    fn keep_what_is_inserted_again(&mut self, sessions: &SessionChanges) {
        if !sessions.rebuilt.is_empty() {
            let upserted: FxHashSet<_> = self.upserts.iter().map(|row| &row.key).collect();
            self.retractions.retain(|key| !upserted.contains(key));
        }
    }

    /// Adds what stays as it is, and was not compared.
    pub fn add_carried(&mut self, carried: &[Carried]) {
        for Carried { currency, cost, .. } in carried {
            let totals = self.totals.entry(currency.clone()).or_default();
            totals.before.add(*cost);
            totals.after.add(*cost);
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
            // A level that is carried on has no event of its own.
            let had_events = correction.values_before().is_some_and(|values| values.event_count > 0);
            if correction.after.is_none() && known && had_events {
                self.vanished.push(correction.customer_id.clone());
            }
            let (cause, values) = match (correction.values_after(), correction.values_before()) {
                (Some(after), _) if known => (Cause::StoreAltered, Some(after)),
                (Some(after), _) => (Cause::LateEvent, Some(after)),
                (None, before) if known => (Cause::EventVoided, before),
                (None, before) => (Cause::StoreAltered, before),
            };
            let count = if cause == Cause::StoreAltered { 1 } else { values.map_or(1, |values| values.event_count.max(1)) };
            correction.causes = Causes::from([(cause, count)]);
        }
    }

    pub(super) fn total(&mut self, before: Option<&WindowRow>, after: Option<&WindowRow>) {
        if let Some(row) = before {
            self.totals.entry(row.currency.clone()).or_default().before.add(row.cost);
        }
        if let Some(row) = after {
            self.totals.entry(row.currency.clone()).or_default().after.add(row.cost);
        }
    }

    fn correct(&mut self, before: Option<&Arc<WindowRow>>, after: Option<&Arc<WindowRow>>, causes: Causes) {
        self.total(before.map(|row| &**row), after.map(|row| &**row));
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
            before: before.map(Recorded::from),
            after: after.map(Recorded::from),
            replaced: before.map(Arc::clone),
        });
        match after {
            Some(row) => self.upserts.push(Arc::clone(row)),
            None => self.retractions.push(row.key.clone()),
        }
    }
}

/// Merges two sorted sides.
struct Pairs<'a> {
    stored: Peekable<std::slice::Iter<'a, StoredWindow>>,
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
fn moved_periods(pairs: &[Pair<'_>]) -> FxHashSet<Arc<PeriodKey>> {
    let has_moved = |pair: &&Pair<'_>| match pair {
        Pair::Both(before, after) => !before.row.same_usage(&after.row),
        Pair::Stored(_) | Pair::Computed(_) => true,
    };
    let mut moved: Vec<_> = pairs.iter().filter(has_moved).map(Pair::period).collect();
    // The windows of a period follow each other.
    moved.dedup();
    moved.into_iter().cloned().collect()
}

/// Places where a price gives way to another: one side is stored alone, the other
/// computed alone.
fn replaced_slots(pairs: &[Pair<'_>]) -> FxHashSet<Slot> {
    let stored =
        pairs.iter().filter_map(|pair| if let Pair::Stored(before) = pair { Some(Slot::of(&before.row.key)) } else { None });
    let stored: FxHashSet<_> = stored.collect();
    if stored.is_empty() {
        return stored;
    }
    let computed =
        pairs.iter().filter_map(|pair| if let Pair::Computed(after) = pair { Some(Slot::of(&after.row.key)) } else { None });
    computed.filter(|slot| stored.contains(slot)).collect()
}

/// How many events rows have more than they had, where fewer came, by place: where a price takes
/// over from another in the midst of a window, one row has what the other one lost.
fn gained_by_prices(pairs: &[Pair<'_>]) -> FxHashMap<Slot, u64> {
    let mut gained = FxHashMap::default();
    let shrinks = |pair: &Pair<'_>| matches!(pair, Pair::Both(before, after) if before.row.event_count > after.row.event_count);
    if !pairs.iter().any(shrinks) {
        return gained;
    }
    for pair in pairs {
        let (before, after) = match pair {
            Pair::Both(before, after) => (before.row.event_count, after),
            Pair::Computed(after) => (0, after),
            Pair::Stored(_) => continue,
        };
        let came = after.news.all().late + after.news.all().resolved;
        let more = after.row.event_count.saturating_sub(before + came);
        if more > 0 {
            *gained.entry(Slot::of(&after.row.key)).or_default() += more;
        }
    }
    gained
}

/// Changes to `usage_periods`.
#[derive(Debug, Default)]
pub struct PeriodChanges {
    pub upserts: Vec<PeriodRow>,
    pub deletions: Vec<PeriodKey>,
    /// The same, with what was there before.
    pub corrections: Vec<PeriodCorrection>,
    pub unchanged: u64,
    /// Rows of closed periods that should be others: recorded, not written over.
    pub adjusted: u64,
    /// What is stored and computed of closed periods, before it is known what is recorded.
    pub(super) closed: BTreeMap<PeriodKey, (Option<PeriodRow>, Option<PeriodRow>)>,
}

impl PeriodChanges {
    /// Rows to write or to remove.
    pub fn changed(&self) -> u64 {
        (self.upserts.len() + self.deletions.len()) as u64
    }

    /// What the rows amount to that change, by currency; or those of closed periods that should.
    pub fn amounts(&self, of_closed: bool) -> BTreeMap<Text, Totals> {
        let mut amounts: BTreeMap<Text, Totals> = BTreeMap::new();
        let chosen = self.corrections.iter().filter(|correction| correction.is_adjustment == of_closed);
        for PeriodCorrection { before, after, .. } in chosen {
            before.iter().for_each(|row| amounts.entry(row.currency.clone()).or_default().before.add(row.amount));
            after.iter().for_each(|row| amounts.entry(row.currency.clone()).or_default().after.add(row.amount));
        }
        amounts
    }

    /// Whether a minimum or a commitment makes a bill change by something else than its windows do.
    pub fn change_adjustments(&self) -> bool {
        let of = |row: &PeriodRow| (row.minimum_adjustment, row.commitment_adjustment);
        let changed = self.corrections.iter().filter(|correction| !correction.is_adjustment);
        changed
            .filter_map(|correction| correction.before.as_ref().zip(correction.after.as_ref()))
            .any(|(before, after)| of(before) != of(after))
    }

    fn delete(&mut self, gone: PeriodRow) {
        self.deletions.push(gone.key.clone());
        self.corrections.push(PeriodCorrection { key: gone.key.clone(), before: Some(gone), after: None, is_adjustment: false });
    }

    fn upsert(&mut self, before: Option<PeriodRow>, row: PeriodRow) {
        self.corrections.push(PeriodCorrection { key: row.key.clone(), before, after: Some(row.clone()), is_adjustment: false });
        self.upserts.push(row);
    }
}

/// Compares stored and computed period rows; both are sorted by key. Rows of closed
/// periods stay as they are, and are set aside; where somebody allows that `invoiced` ones change, they are closed still.
pub fn reconcile_periods(
    stored: Vec<PeriodRow>,
    computed: Vec<PeriodRow>,
    closed: &ClosedPeriods,
    invoiced: &ClosedPeriods,
) -> PeriodChanges {
    let mut changes = PeriodChanges::default();
    let is_closed = |row: &PeriodRow| closed.hold(&row.key);
    let (closed_rows, stored): (Vec<_>, Vec<_>) = stored.into_iter().partition(is_closed);
    changes.closed.extend(closed_rows.into_iter().map(|row| (row.key.clone(), (Some(row), None))));
    let (closed_rows, computed): (Vec<_>, Vec<_>) = computed.into_iter().partition(is_closed);
    for row in closed_rows {
        let pair = changes.closed.entry(row.key.clone()).or_default();
        pair.1 = Some(row);
    }
    let mut stored = stored.into_iter().peekable();
    for mut row in computed {
        while let Some(gone) = stored.next_if(|before| before.key < row.key) {
            changes.delete(gone);
        }
        let before = stored.next_if(|before| before.key == row.key);
        row.closed_at = before.as_ref().and_then(|before| before.closed_at).or_else(|| invoiced.closed_at(&row.key));
        if before.as_ref() == Some(&row) {
            changes.unchanged += 1;
        } else {
            changes.upsert(before, row);
        }
    }
    stored.for_each(|gone| changes.delete(gone));
    changes
}
