//! Aggregating and pricing all that was matched, and billing where there was no usage.

use anyhow::Result;
use rustc_hash::FxHashMap;

use super::aggregate::AllMatches;
use super::context::Context;
use super::incremental::values::ListKeeper;
use super::names::Names;
use super::price::{self, Priced, Ranks};
use super::state::{Interner, News, StateKey};
use super::unused::{self, Billed};
use super::{Lateness, Request, levels};
use crate::config::Job;
use crate::model::basis::Scope;
use crate::model::price::Price;
use crate::model::window::Span;
use crate::reference::{Reference, Subscription};

/// What prices depend on, beside the matches.
pub struct Pricing<'p> {
    pub job: &'p Job,
    pub reference: &'p Reference,
    pub threads: usize,
    pub request: &'p Request,
    pub lateness: &'p Lateness,
    pub context: &'p Context<'p>,
    pub names: &'p Names,
    pub dimensions: &'p Interner,
    /// News of windows that lost events.
    pub lost: &'p FxHashMap<StateKey, News>,
    /// Keeps distinct values for later runs.
    pub keeper: Option<&'p ListKeeper>,
}

impl Pricing<'_> {
    /// Prices all windows, and adds the bills of what is `billed` without usage. A level is carried
    /// on to the end of what is billed: `range` is longer then.
    ///
    /// # Errors
    /// Where matches cannot be read back, or a number overflows.
    pub fn price(&self, matches: &mut AllMatches<'_, '_>, range: &mut Span, billed: &mut Billed) -> Result<Priced> {
        let Pricing { job, reference, threads, .. } = *self;
        let ranks = Ranks::new(reference, self.dimensions);
        let places = (self.dimensions, &ranks);
        let price = |windows, range| price::price(windows, places, reference, self.names, range, job.timezone, self.keeper);
        let mut priced = if reference.has_levels(self.request.scope.meter.as_deref()) {
            let mut windows = matches.all()?;
            // Where nobody asked for an end, what a level costs later in its period belongs to the range.
            let open = self.request.range.is_none() && self.lateness.settled_until.is_none();
            let mut reached = billed.whole().filter(|_| open).unwrap_or(*range);
            levels::carry_in(&mut windows, (self.dimensions, self.lost), reference, &mut reached, open, job.timezone);
            *range = range.union(reached);
            billed.add(&Scope::default(), reached);
            price(windows, *range)?
        } else {
            Priced::of_parts(matches.each(threads, |windows| price(windows, *range))?)
        };
        let range = *range;
        let wants = |(at, subscription): (usize, &Subscription), (meter, price): (usize, &Price), period: Span| {
            self.request.scope.holds(&subscription.tenant_id, &subscription.customer_id, &price.meter_id)
                && self.context.marks.as_ref().is_none_or(|marks| period.overlaps(range) && marks.hold(at, meter, period))
        };
        unused::add_periods(&mut priced.periods, reference, self.names, billed, wants)?;
        Ok(priced)
    }
}
