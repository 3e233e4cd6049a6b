//! Where the events of one name go in one subscription: their windows, their billing period
//! and their prices, looked up once and good for a while.

use super::enrich::{Enricher, EventPlan};
use super::matches::{NO_WINDOW, SpanNumbers};
use super::state::WindowCache;
use crate::model::meter::Meter;
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowKind};

/// A span and its number.
#[derive(Debug, Clone, Copy)]
pub struct Numbered {
    pub span: Span,
    pub number: u32,
}

/// What one meter does with an event.
#[derive(Debug, Clone, Copy)]
pub struct Leg {
    /// Of a session, that of the event for which the route was found.
    window: Numbered,
    pub period: Numbered,
    pub price: Steady,
}

impl Leg {
    /// The window of an event at `t`. Each event begins a session of its own.
    pub fn window(&self, meter: &Meter, t: Timestamp, timezone: chrono_tz::Tz) -> Numbered {
        match meter.window {
            WindowKind::Session { .. } => Numbered { span: meter.window.slot(t, timezone), number: NO_WINDOW },
            _ => self.window,
        }
    }
}

/// A price, as far as it does not depend on the event's properties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Steady {
    Price(usize),
    ByEvent,
}

#[derive(Debug)]
struct Route {
    /// The numbers of event name and subscription.
    of: (usize, usize),
    /// The legs are the same for all events in here.
    valid: Span,
    /// By the event's meters.
    legs: Vec<Leg>,
}

/// The routes that were found last.
#[derive(Debug, Default)]
pub struct Routes {
    slots: Vec<Option<Route>>,
    windows: WindowCache,
}

/// More would not fit the processor's cache.
const MOST: usize = 1 << 15;

impl Routes {
    pub fn new(enricher: &Enricher<'_>) -> Self {
        let pairs = enricher.reference.subscriptions.len().saturating_mul(enricher.event_names());
        Routes { slots: (0..pairs.clamp(1, MOST).next_power_of_two()).map(|_| None).collect(), windows: WindowCache::default() }
    }

    /// The legs of an event at `t`, one for each meter of `plan`.
    pub fn legs(
        &mut self,
        plan: &EventPlan<'_>,
        subscription: usize,
        t: Timestamp,
        (enricher, timezone): (&Enricher<'_>, chrono_tz::Tz),
        spans: &mut SpanNumbers,
    ) -> &[Leg] {
        let of = (plan.number, subscription);
        let at = subscription.wrapping_mul(enricher.event_names()).wrapping_add(plan.number) & (self.slots.len() - 1);
        let Some(slot) = self.slots.get_mut(at) else { return &[] };
        match slot {
            Some(route) if route.of == of && route.valid.contains(t) => {}
            _ => {
                let legs = slot.take().map(|route| route.legs).unwrap_or_default();
                *slot = Route::find(plan, subscription, t, (enricher, timezone), (spans, &mut self.windows), legs);
            }
        }
        slot.as_ref().map_or(&[], |route| &route.legs)
    }
}

impl Route {
    /// `legs` is a list to use again. `None` where there is no such subscription.
    fn find(
        plan: &EventPlan<'_>,
        subscription: usize,
        t: Timestamp,
        (enricher, timezone): (&Enricher<'_>, chrono_tz::Tz),
        (spans, windows): (&mut SpanNumbers, &mut WindowCache),
        mut legs: Vec<Leg>,
    ) -> Option<Route> {
        let span = enricher.reference.subscriptions.get(subscription)?.cycle.period(t);
        let period = Numbered { span, number: spans.number(span) };
        let mut valid = span;
        let mut narrow = |span: Span| valid = Span { start: valid.start.max(span.start), end: valid.end.min(span.end) };
        legs.clear();
        for meter in &plan.meters {
            let span = windows.window(meter.meter.window, t, timezone);
            let window = if matches!(meter.meter.window, WindowKind::Session { .. }) {
                Numbered { span, number: NO_WINDOW }
            } else {
                narrow(span);
                Numbered { span, number: spans.number(span) }
            };
            let price = match enricher.steady_price(subscription, meter, t) {
                Some((price, span)) => {
                    narrow(span);
                    Steady::Price(price)
                }
                None => Steady::ByEvent,
            };
            legs.push(Leg { window, period, price });
        }
        Some(Route { of: (plan.number, subscription), valid, legs })
    }
}
