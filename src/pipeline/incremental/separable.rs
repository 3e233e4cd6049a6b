//! Which meters' windows can be computed one by one.

use rustc_hash::FxHashSet;

use crate::model::decimal::Decimal;
use crate::model::meter::{Aggregation, ChargeOn, Meter};
use crate::model::price::Price;
use crate::model::timestamp::Timestamp;
use crate::model::window::WindowKind;
use crate::pipeline::accumulator::Accumulator;
use crate::reference::{Reference, Subscription};

/// Whether a list of its distinct values tells what windows of a meter add to a billing period.
pub fn is_listed(meter: &Meter) -> bool {
    meter.aggregation == Aggregation::CountUnique
        // Otherwise the last operation on each value counts.
        && meter.operation_property.is_none()
        && meter.charge_on == ChargeOn::Period
        && matches!(meter.window, WindowKind::Tumbling(_))
}

/// Meters of which a row of one window, or a list of values, tells what it adds to its billing
/// period, whatever the price: their windows are marked one by one.
pub struct Separable<'r> {
    /// By the index of the meter, where the price is no matter.
    meters: Vec<Dependence>,
    /// Plans and meters with prices that must know events one by one.
    by_event: FxHashSet<(&'r str, usize)>,
    pub timezone: chrono_tz::Tz,
}

/// What the price of a window needs of earlier windows of its billing period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dependence {
    /// What their rows tell.
    None,
    /// All of their distinct values, whichever window each is in.
    OnValues,
    /// All of their events, whichever window each is in.
    OnEvents,
    /// All of their events, window by window.
    OnOrder,
}

impl<'r> Separable<'r> {
    /// `has_lists` where earlier runs kept distinct values.
    pub fn new(reference: &'r Reference, timezone: chrono_tz::Tz, has_lists: bool) -> Self {
        let dependence = |meter: &Meter| {
            if !matches!(meter.window, WindowKind::Tumbling(_)) || meter.aggregation == Aggregation::WeightedSum {
                Dependence::OnEvents
            } else if Accumulator::of_quantity(meter, Decimal::ZERO, 0, Timestamp::MIN).is_some() {
                Dependence::None
            } else if has_lists && is_listed(meter) {
                Dependence::OnValues
            } else {
                Dependence::OnEvents
            }
        };
        let by_event = |price: &'r Price| {
            let meter = reference.meters.iter().position(|meter| meter.id == price.meter_id)?;
            price.transactions().map(|_| (price.plan_id.as_str(), meter))
        };
        Separable {
            meters: reference.meters.iter().map(dependence).collect(),
            by_event: reference.prices.iter().filter_map(by_event).collect(),
            timezone,
        }
    }

    /// How the windows of a meter depend on those before.
    pub fn depend(&self, subscription: &Subscription, meter: usize) -> Dependence {
        match self.meters.get(meter) {
            _ if self.by_event.contains(&(subscription.plan_id.as_str(), meter)) => Dependence::OnOrder,
            Some(dependence) => *dependence,
            None => Dependence::OnEvents,
        }
    }
}
