//! Which meters' windows can be computed one by one.

use rustc_hash::FxHashSet;

use crate::model::decimal::Decimal;
use crate::model::meter::{Aggregation, Meter};
use crate::model::price::Price;
use crate::model::timestamp::Timestamp;
use crate::model::window::WindowKind;
use crate::pipeline::accumulator::Accumulator;
use crate::reference::{Reference, Subscription};

/// Meters of which a row of one window tells what it adds to its billing period, whatever
/// the price: their windows are marked one by one.
pub struct Separable<'r> {
    /// By the index of the meter.
    meters: Vec<bool>,
    /// Plans and meters with prices that must know events one by one.
    by_event: FxHashSet<(&'r str, usize)>,
    pub timezone: chrono_tz::Tz,
}

impl<'r> Separable<'r> {
    pub fn new(reference: &'r Reference, timezone: chrono_tz::Tz) -> Self {
        let is_separable = |meter: &Meter| {
            matches!(meter.window, WindowKind::Tumbling(_))
                && meter.aggregation != Aggregation::WeightedSum
                && Accumulator::of_quantity(meter, Decimal::ZERO, 0, Timestamp::MIN).is_some()
        };
        let by_event = |price: &'r Price| {
            let meter = reference.meters.iter().position(|meter| meter.id == price.meter_id)?;
            price.transactions().map(|_| (price.plan_id.as_str(), meter))
        };
        Separable {
            meters: reference.meters.iter().map(is_separable).collect(),
            by_event: reference.prices.iter().filter_map(by_event).collect(),
            timezone,
        }
    }

    /// Whether the windows of a meter can be computed one by one; `None` where not even later
    /// ones can without those before.
    pub fn by_window(&self, subscription: &Subscription, meter: usize) -> Option<bool> {
        let by_event = !self.by_event.is_empty() && self.by_event.contains(&(subscription.plan_id.as_str(), meter));
        (!by_event).then(|| self.meters.get(meter) == Some(&true))
    }
}
