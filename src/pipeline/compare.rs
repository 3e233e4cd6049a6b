//! Comparing what was computed with what is stored: windows, bills, and what is recorded of
//! closed ones.

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};

use super::adjustments::{Adjustments, Judged};
use super::causes::{ChangedRows, CurrentDigests, Evidence, NewLetters};
use super::closed::ClosedPeriods;
use super::incremental::Marks;
use super::incremental::snapshot::Differences;
use super::past::{Past, Stored, ledger_rows};
use super::price::Priced;
use super::reconcile::{self, PeriodChanges, Reconciliation};
use super::session_changes::SessionChanges;
use super::state::News;
use super::{Inputs, Lateness, Request, Timeline, invariants, range, sessions};
use crate::model::aggregate::{DeadLetter, PeriodKey, PeriodRow, StoredWindow, WindowKey};
use crate::model::basis::Scope;
use crate::model::meter::Meter;
use crate::model::run::{RunBasis, RunRecord};
use crate::model::window::Span;
use crate::store::AggregateStore;

/// What the differences of a run depend on, beside the rows.
pub struct Comparison<'c> {
    pub inputs: &'c Inputs<'c>,
    pub request: &'c Request,
    pub past: &'c Past,
    pub lateness: &'c Lateness,
    pub basis: &'c RunBasis,
    pub range: Span,
    /// What was computed, where it is not everything.
    pub marks: Option<&'c Marks>,
    /// News of windows that lost events.
    pub withdrawn: &'c FxHashMap<WindowKey, News>,
    pub dead_letters: &'c [DeadLetter],
    /// What changed in the reference tables since a run, and its id.
    pub differences: Option<&'c (String, Differences)>,
}

/// What differs, and the stored rows that it was found in.
pub struct Compared {
    pub changes: Reconciliation,
    pub periods: PeriodChanges,
    /// Rows that name definitions which they were not computed with.
    pub foreign_definitions: Vec<WindowKey>,
    pub windows: Vec<StoredWindow>,
    /// Empty where no guard asks for them.
    pub bills: Vec<PeriodRow>,
}

impl Comparison<'_> {
    /// Takes the bills of `priced`.
    ///
    /// # Errors
    /// Where the store cannot be read, a total overflows, or a promise would be broken.
    pub(super) fn reconcile(&self, stored: Stored, priced: &mut Priced, timeline: &mut Timeline<'_>) -> Result<Compared> {
        let Inputs { job, store, .. } = *self.inputs;
        let Stored { windows, periods: bills, closed, invoiced } = stored;
        let session_meters = self.meters(sessions::is_session);
        let is_session = |key: &PeriodKey| session_meters.contains(&*key.meter_id);
        let sessions = SessionChanges::find(&windows, &priced.windows, self.withdrawn, is_session);
        let evidence = self.evidence(sessions);
        let mut changes = timeline.step("reconcile", None, || {
            let changes = reconcile::reconcile(&windows, &priced.windows, self.range, &closed, &evidence);
            Ok((changes, windows.len() as u64))
        })?;
        // Only what was closed once can have been adjusted.
        let may_be_adjusted = !closed.is_empty() || self.past.have_closed_or_adjusted();
        let recorded = store.filter(|_| may_be_adjusted).map(|store| self.adjustments(store, &closed)).transpose()?;
        if let Some(recorded) = &recorded {
            changes.explain_by(recorded);
        }
        if let Some(store) = store.filter(|_| changes.asks_the_ledger()) {
            let rows = ledger_rows(store, &job.name)?;
            changes.ask_the_ledger(|key| rows.contains(key));
        }
        let guarded = if job.guard.max_cost_change.is_some() { bills.clone() } else { Vec::new() };
        let computed = std::mem::take(&mut priced.periods);
        let due = if recorded.is_some() { computed.clone() } else { Vec::new() };
        let mut periods = reconcile::reconcile_periods(bills, computed, &closed, &invoiced);
        if let Some(mut recorded) = recorded {
            let judged = Judged {
                windows: &|key| range::holds_window(self.range, key, self.inputs.reference, job.timezone),
                since: &|key| evidence.since(key),
                bills: &|row| self.knows(row),
                customer: self.request.scope.customer.as_deref(),
            };
            changes.adjust(&mut recorded, &closed, &priced.windows, &judged);
            periods.adjust(&mut recorded, &closed, &due, &judged);
        }
        changes.add_carried(&priced.carried);
        changes.check_totals()?;
        let foreign_definitions = self.past.foreign_definitions(&windows, &priced.windows, self.basis);
        invariants::ledger_replay(&windows, &changes, priced, self.range, &closed)?;
        invariants::nothing_outside_the_range(&windows, &changes, self.range)?;
        Ok(Compared { changes, periods, foreign_definitions, windows, bills: guarded })
    }

    /// What tells the causes of corrections.
    fn evidence<'e>(&'e self, sessions: SessionChanges) -> Evidence<'e> {
        let reference = self.inputs.reference;
        let open = self.past.dead_letters.iter().filter(|stored| stored.resolved_run_id.is_none());
        let open: FxHashSet<_> = open.map(|stored| &stored.letter.key).collect();
        let is_later = !self.past.runs.is_empty();
        Evidence {
            runs: &self.past.runs,
            taken_back: RunRecord::taken_back(&self.past.runs),
            basis: self.basis,
            withdrawn: self.withdrawn,
            sessions,
            current: CurrentDigests::of(reference),
            letters: NewLetters::of(self.dead_letters, reference, |letter| is_later && !open.contains(&letter.key)),
            levels: self.meters(Meter::keeps_a_level),
            changed: self.differences.map(|(run_id, differences)| ChangedRows::new(run_id, differences, reference)),
        }
    }

    /// What is recorded of closed periods.
    fn adjustments(&self, store: &dyn AggregateStore, closed: &ClosedPeriods) -> Result<Adjustments> {
        let Inputs { job, reference, .. } = *self.inputs;
        let all = Scope { customer: None, ..self.request.scope.clone() };
        let is_computed =
            |period: &PeriodKey| self.marks.is_none_or(|marks| closed.hold(period) && marks.hold_key(period, reference));
        let wants = |period: &PeriodKey| is_computed(period) && all.holds(&period.tenant_id, "", &period.meter_id);
        Adjustments::load(store, &job.name, wants)
    }

    fn meters(&self, of: fn(&Meter) -> bool) -> FxHashSet<&str> {
        self.inputs.reference.meters.iter().filter(|meter| of(meter)).map(|meter| meter.id.as_str()).collect()
    }

    /// Whether a bill was computed as it has to be.
    fn knows(&self, row: &PeriodRow) -> bool {
        let is_settled = self.lateness.settled_until.is_none_or(|until| row.period_end <= until);
        is_settled && (self.request.range.is_none() || self.range.covers(row.period()))
    }
}
