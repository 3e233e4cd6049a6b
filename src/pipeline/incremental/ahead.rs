//! What an incremental run knows before it reads events, and what it makes of that.

use anyhow::Result;
use rustc_hash::FxHashSet;

use super::choice::CustomerChoice;
use super::kept::Kept;
use super::passes::{Again, Marked, Passes};
use super::snapshot::{Differences, Snapshot};
use super::stored_windows::{self, StoodIn};
use super::{Marks, Retreat, Skipping};
use crate::model::window::Span;
use crate::pipeline::aggregate::AllMatches;
use crate::pipeline::context::Context;
use crate::pipeline::matcher::Matcher;
use crate::pipeline::past::{Coverage, Past, Stored};
use crate::pipeline::price::Priced;
use crate::pipeline::read::resolve;
use crate::pipeline::state::Interner;
use crate::pipeline::{Lateness, Request, Timeline};

/// What an incremental run knows before it reads events.
pub struct Ahead<'p> {
    passes: Passes<'p>,
    /// What earlier runs kept.
    pub kept: Option<Kept>,
    /// The rows of known splits that changed reference rows touch.
    changed: CustomerChoice,
    again: Again,
    pub skipping: Skipping,
    /// Rows of the billing periods that are marked.
    pub stored: Stored,
    /// What changed in the reference tables since the baseline, and its id.
    pub differences: (String, Differences),
}

impl<'p> Passes<'p> {
    /// Marks what must be computed again, and reads what is stored beside it.
    ///
    /// # Errors
    /// A [`Retreat`] where that saves nothing; where source or store cannot be read.
    pub(in crate::pipeline) fn look_ahead(
        self,
        now: &Snapshot,
        past: &Past,
        asked: (&Request, &Lateness),
        spans: (Span, Span),
        timeline: &mut Timeline<'_>,
    ) -> Result<(Ahead<'p>, Marks)> {
        let kept = self.baseline.kept(self.inputs);
        let marked = self.marks(now, spans, kept.as_ref(), timeline).map_err(Retreat::of)?;
        let Marked { mut marks, changed, differences, skipping, again } = marked;
        if self.are_in_vain(asked.0, &marks, kept.as_ref()) {
            let why = match kept {
                None => "what is new touches much of what there is",
                Some(_) => "many runs have built on the last one of everything",
            };
            return Err(Retreat { why: why.to_owned(), is_choice: true }.into());
        }
        let stored = timeline.step("read stored", None, || {
            let stored = stored_windows::read(self.inputs, past, asked, spans, &mut marks, kept.as_ref())?;
            let rows = stored.windows.len() as u64;
            Ok((stored, rows))
        })?;
        let differences = (self.baseline.run.run_id.clone(), differences);
        Ok((Ahead { passes: self, kept, changed, again, skipping, stored, differences }, marks))
    }
}

impl<'p> Ahead<'p> {
    /// Matches new events, and old ones of what is marked, with their meters.
    ///
    /// # Errors
    /// A [`Retreat`] where the source has no longer what the baseline read.
    pub(in crate::pipeline) fn enrich<'c, 'r>(
        &mut self,
        context: &'c Context<'r>,
        coverage: &[Coverage<'_>],
        timeline: &mut Timeline<'_>,
    ) -> Result<Matcher<'c, 'r>> {
        timeline.step("enrich", None, || {
            let of_marks = match (&self.kept, &context.marks) {
                (None, Some(marks)) => Some(marks.choice(self.passes.inputs.reference)),
                _ => None,
            };
            let choice = of_marks.as_ref().unwrap_or(&self.changed);
            let seen = self.passes.enrich(context, coverage, (choice, &self.again), &mut self.skipping);
            let seen = resolve(context, seen.map_err(Retreat::of)?, self.passes.inputs.threads)?;
            let read = seen.events.read;
            Ok((seen, read))
        })
    }

    /// Adds what need not be read to the matches of what was: those that earlier runs kept, but
    /// for events that were `replaced`, and windows as they are stored.
    pub fn add_what_is_known<'c, 'r>(
        &'c self,
        matches: &mut AllMatches<'c, 'r>,
        context: &'c Context<'r>,
        replaced: &'c FxHashSet<u128>,
        dimensions: &mut Interner,
    ) -> StoodIn {
        let Some(marks) = &context.marks else { return StoodIn::default() };
        matches.kept = self.kept.as_ref().map(|kept| kept.matches(context, marks, replaced, dimensions));
        let from = (self.passes.inputs, self.kept.as_ref());
        stored_windows::stand_in(marks, &self.stored, from, dimensions, |key, known| matches.add(key, known))
    }

    /// Lets everything be computed where what was not looked at depends on what was.
    ///
    /// # Errors
    /// A [`Retreat`] then.
    pub fn check_priced(&self, context: &Context<'_>, priced: &Priced) -> Result<()> {
        let stand_alone = |meter: &u32| context.marks.as_ref().is_some_and(|marks| marks.stand_alone(*meter as usize));
        if priced.rounded.iter().any(stand_alone) {
            let why = "what windows cost that were not read depends on a rounded cost".to_owned();
            return Err(Retreat { why, is_choice: true }.into());
        }
        Ok(())
    }
}
