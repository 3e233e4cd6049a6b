//! The promises as named predicates: production checks them before it publishes,
//! tests check them on everything they make up.

use std::cmp::Ordering;

use super::closed::ClosedPeriods;
use super::price::Priced;
use super::reconcile::Reconciliation;
use crate::fault::{FaultKind, fault};
use crate::model::aggregate::{Correction, CorrectionKind, StoredWindow, Values, WindowKey};
use crate::model::counts::{EventCounts, UsageCounts};
use crate::model::decimal_sum::DecimalSum;
use crate::model::window::Span;

/// A promise, by the name that reports use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Invariant {
    /// Every event and every match is in exactly one bucket.
    Conservation,
    /// The windows of a period cost what the period costs.
    TelescopingCost,
    /// What is stored, with the corrections applied, is what was computed.
    LedgerReplay,
    /// No quantity changes outside of the range, no cost outside of its billing periods.
    NothingOutsideTheRange,
}

impl Invariant {
    pub fn name(self) -> &'static str {
        match self {
            Invariant::Conservation => "conservation",
            Invariant::TelescopingCost => "telescoping_cost",
            Invariant::LedgerReplay => "ledger_replay",
            Invariant::NothingOutsideTheRange => "nothing_outside_the_range",
        }
    }

    /// The fault of a broken promise (exit code 4).
    fn broken(self, detail: impl std::fmt::Display) -> anyhow::Error {
        fault(
            FaultKind::Invariant,
            format!(
                "invariant {} failed: {detail}; nothing was published. This is a bug in trueup: please report it",
                self.name()
            ),
        )
    }
}

/// # Errors
/// Where an event or a match is in no bucket or in two.
pub fn conservation(events: &EventCounts, usage: &UsageCounts) -> anyhow::Result<()> {
    let EventCounts { read, out_of_range, duplicates, voided, unmatched, dead_lettered, metered } = events;
    let sum = out_of_range + duplicates + voided + unmatched + dead_lettered + metered;
    if *read != sum {
        return Err(Invariant::Conservation.broken(format!("read {read} events, but {sum} are accounted for: {events:?}")));
    }
    let UsageCounts { matches, counted, skipped, rejected } = usage;
    if *matches != counted + skipped + rejected {
        return Err(Invariant::Conservation.broken(format!("{matches} matches, but accounted for are {usage:?}")));
    }
    Ok(())
}

/// # Errors
/// Where window costs do not sum to their period's cost.
pub fn telescoping_cost(priced: &Priced) -> anyhow::Result<()> {
    let mut periods = Walk::new(&priced.periods, |period| &period.key);
    let mut carried = Walk::new(&priced.carried, |carried| &carried.period);
    for windows in priced.windows.chunk_by(|a, b| a.row.key.period == b.row.key.period) {
        let Some(key) = windows.first().map(|window| &window.row.key.period) else { continue };
        let mut sum = DecimalSum::default();
        windows.iter().for_each(|window| sum.add(window.row.cost));
        carried.find(key).into_iter().for_each(|carried| sum.add(carried.cost));
        // Periods without usage have no windows.
        let Some(period) = periods.find(key) else {
            return Err(Invariant::TelescopingCost.broken(format!("{key:?} has windows, but no period")));
        };
        if sum.total() != Ok(period.cost) {
            return Err(Invariant::TelescopingCost.broken(format!(
                "{key:?} costs {}, its windows {:?}",
                period.cost,
                sum.total()
            )));
        }
    }
    Ok(())
}

/// Looks keys up in rows sorted by key, one after the other and in order: no table of
/// a million texts is needed. Rows out of order are not found, which breaks the promise.
struct Walk<'r, T, K> {
    rest: &'r [T],
    key: fn(&T) -> &K,
}

impl<'r, T, K: Ord> Walk<'r, T, K> {
    fn new(rows: &'r [T], key: fn(&T) -> &K) -> Self {
        Walk { rest: rows, key }
    }

    /// The first row of `key`.
    fn find(&mut self, key: &K) -> Option<&'r T> {
        while let Some((first, rest)) = self.rest.split_first() {
            match (self.key)(first).cmp(key) {
                Ordering::Less => self.rest = rest,
                Ordering::Equal => return Some(first),
                Ordering::Greater => return None,
            }
        }
        None
    }

    /// Takes the next row if it is of `key`.
    fn next_of(&mut self, key: &K) -> Option<&'r T> {
        let (first, rest) = self.rest.split_first()?;
        if (self.key)(first) != key {
            return None;
        }
        self.rest = rest;
        Some(first)
    }

    fn next_key(&self) -> Option<&'r K> {
        self.rest.first().map(self.key)
    }
}

/// The values of a row after its corrections, in their order.
fn replay<'c>(before: Option<Values>, corrections: impl Iterator<Item = &'c Correction>) -> Option<Values> {
    corrections.fold(before, |known, correction| match correction.kind {
        CorrectionKind::Insert | CorrectionKind::Update => correction.values_after(),
        // What is closed stays as it was invoiced.
        CorrectionKind::Adjust => known,
        CorrectionKind::Retract => None,
    })
}

/// # Errors
/// Where the stored rows with the corrections applied are not the computed ones.
pub fn ledger_replay(
    stored: &[StoredWindow],
    changes: &Reconciliation,
    priced: &Priced,
    range: Span,
    closed: &ClosedPeriods,
) -> anyhow::Result<()> {
    let broken = |key: &WindowKey, problem: &str| Err(Invariant::LedgerReplay.broken(format!("{key:?} {problem}")));
    let mut stored = Walk::new(stored, |stored| &stored.row.key);
    let mut computed = Walk::new(&priced.windows, |window| &window.row.key);
    let mut corrections = Walk::new(&changes.corrections, |correction| &correction.key);
    // Everything is sorted by key: the least of the three comes next.
    while let Some(key) = [stored.next_key(), computed.next_key(), corrections.next_key()].into_iter().flatten().min() {
        let (stored, computed) = (stored.next_of(key), computed.next_of(key));
        let left = replay(stored.map(|stored| Values::from(&*stored.row)), std::iter::from_fn(|| corrections.next_of(key)));
        // A row that reaches out of the range, before or after, is left as it is.
        let windows = [stored.map(|stored| stored.row.window()), computed.map(|window| window.row.window())];
        if closed.hold(&key.period) || windows.into_iter().flatten().any(|window| !range.covers(window)) {
            continue;
        }
        match computed {
            Some(window) if left != Some(Values::from(&*window.row)) => return broken(key, "is not what the ledger gives"),
            None if left.is_some() => return broken(key, "is in the ledger, but not computed"),
            Some(_) | None => {}
        }
    }
    Ok(())
}

/// # Errors
/// Where a correction reaches further than it may.
pub fn nothing_outside_the_range(stored: &[StoredWindow], changes: &Reconciliation, range: Span) -> anyhow::Result<()> {
    let mut before = Walk::new(stored, |stored| &stored.row.key);
    for row in &changes.upserts {
        let before = before.find(&row.key).map(|stored| &stored.row);
        let is_inside = range.covers(row.window()) && before.is_none_or(|before| range.covers(before.window()));
        let keeps_usage = before.is_some_and(|before| before.quantity == row.quantity) && row.period().overlaps(range);
        if !is_inside && !keeps_usage {
            return Err(Invariant::NothingOutsideTheRange.broken(format!("{:?} would change", row.key)));
        }
    }
    let mut before = Walk::new(stored, |stored| &stored.row.key);
    for key in &changes.retractions {
        if !before.find(key).is_some_and(|before| range.covers(before.row.window())) {
            return Err(Invariant::NothingOutsideTheRange.broken(format!("{key:?} would be retracted")));
        }
    }
    Ok(())
}
