//! The promises as named predicates: production checks them before it publishes,
//! tests check them on everything they make up.

use rustc_hash::{FxHashMap, FxHashSet};

use super::closed::ClosedPeriods;
use super::price::Priced;
use super::reconcile::Reconciliation;
use crate::fault::{FaultKind, fault};
use crate::model::aggregate::{Correction, CorrectionKind, PeriodKey, StoredWindow, Values, WindowKey, WindowRow};
use crate::model::counts::{EventCounts, UsageCounts};
use crate::model::decimal::DecimalSum;
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
    let mut sums: FxHashMap<&PeriodKey, DecimalSum> = FxHashMap::default();
    for window in &priced.windows {
        sums.entry(&window.row.key.period).or_default().add(window.row.cost);
    }
    for period in &priced.periods {
        // Periods without usage have no windows.
        let Some(sum) = sums.remove(&period.key) else { continue };
        if sum.total() != Ok(period.cost) {
            return Err(Invariant::TelescopingCost.broken(format!(
                "{:?} costs {}, its windows {:?}",
                period.key,
                period.cost,
                sum.total()
            )));
        }
    }
    match sums.keys().next() {
        Some(key) => Err(Invariant::TelescopingCost.broken(format!("{key:?} has windows, but no period"))),
        None => Ok(()),
    }
}

/// Applies corrections to rows by key.
pub fn replay<'c>(rows: &mut FxHashMap<WindowKey, Values>, corrections: impl IntoIterator<Item = &'c Correction>) {
    for correction in corrections {
        match (correction.kind, correction.after) {
            (CorrectionKind::Insert | CorrectionKind::Update, Some(after)) => {
                rows.insert(correction.key.clone(), after);
            }
            // What is closed stays as it was invoiced.
            (CorrectionKind::Adjust, _) => {}
            (CorrectionKind::Retract, _) | (_, None) => {
                rows.remove(&correction.key);
            }
        }
    }
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
    let mut rows = stored.iter().map(|stored| (stored.row.key.clone(), Values::from(&stored.row))).collect();
    replay(&mut rows, &changes.corrections);
    // A row that reaches out of the range, before or after, is left as it is.
    let stored_outside: FxHashSet<_> =
        stored.iter().filter(|stored| !range.covers(stored.row.window())).map(|stored| &stored.row.key).collect();
    let computed_outside: FxHashSet<_> =
        priced.windows.iter().filter(|window| !range.covers(window.row.window())).map(|window| &window.row.key).collect();
    let is_open = |key: &WindowKey| !closed.hold(&key.period);
    let covered = priced.windows.iter().filter(|window| range.covers(window.row.window()) && is_open(&window.row.key));
    for window in covered.filter(|window| !stored_outside.contains(&window.row.key)) {
        if rows.remove(&window.row.key) != Some(Values::from(&window.row)) {
            return Err(Invariant::LedgerReplay.broken(format!("{:?} is not what the ledger gives", window.row.key)));
        }
    }
    let left = stored.iter().filter(|stored| range.covers(stored.row.window()) && !computed_outside.contains(&stored.row.key));
    match left.map(|stored| &stored.row.key).find(|key| is_open(key) && rows.contains_key(key)) {
        Some(key) => Err(Invariant::LedgerReplay.broken(format!("{key:?} is stored, but not computed"))),
        None => Ok(()),
    }
}

/// # Errors
/// Where a correction reaches further than it may.
pub fn nothing_outside_the_range(stored: &[StoredWindow], changes: &Reconciliation, range: Span) -> anyhow::Result<()> {
    let stored: FxHashMap<_, _> = stored.iter().map(|stored| (&stored.row.key, &stored.row)).collect();
    let reaches_out = |row: &&WindowRow| {
        !range.covers(row.window()) || stored.get(&row.key).is_some_and(|before| !range.covers(before.window()))
    };
    for row in changes.upserts.iter().filter(reaches_out) {
        let keeps_usage = stored.get(&row.key).is_some_and(|before| before.quantity == row.quantity);
        if !keeps_usage || !row.period().overlaps(range) {
            return Err(Invariant::NothingOutsideTheRange.broken(format!("{:?} would change", row.key)));
        }
    }
    let retracted_outside = |key: &&WindowKey| !stored.get(key).is_some_and(|before| range.covers(before.window()));
    match changes.retractions.iter().find(retracted_outside) {
        Some(key) => Err(Invariant::NothingOutsideTheRange.broken(format!("{key:?} would be retracted"))),
        None => Ok(()),
    }
}
