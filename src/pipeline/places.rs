//! Where in time events lie: the windows and billing periods that were found last are at hand.

use super::enrich::MeterPlan;
use super::matches::{NO_WINDOW, SpanNumbers};
use super::state::WindowCache;
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowKind};
use crate::reference::Reference;

/// A span and its number.
#[derive(Debug, Clone, Copy)]
pub struct Numbered {
    pub span: Span,
    pub number: u32,
}

/// Windows and billing periods of one thread. Small tables that fit the processor's cache:
/// one entry for each event name and subscription, with all of this and prices, was slower.
pub struct Places<'r> {
    reference: &'r Reference,
    timezone: chrono_tz::Tz,
    windows: WindowCache,
    /// By meter: its window that was found last.
    last_windows: Vec<Option<Numbered>>,
    /// By subscription: its billing period that was found last.
    periods: Vec<Option<Numbered>>,
}

impl<'r> Places<'r> {
    pub fn new(reference: &'r Reference, timezone: chrono_tz::Tz) -> Self {
        Places {
            reference,
            timezone,
            windows: WindowCache::default(),
            last_windows: vec![None; reference.meters.len()],
            periods: vec![None; reference.subscriptions.len()],
        }
    }

    /// The window and the billing period of an instant.
    #[inline]
    pub fn find(
        &mut self,
        t: Timestamp,
        subscription: usize,
        meter: &MeterPlan<'_>,
        spans: &mut SpanNumbers,
    ) -> Option<(Numbered, Numbered)> {
        let kind = meter.meter.window;
        let window = if matches!(kind, WindowKind::Session { .. }) {
            Numbered { span: self.windows.window(kind, t, self.timezone), number: NO_WINDOW }
        } else {
            match self.last_windows.get_mut(meter.index)? {
                Some(window) if window.span.contains(t) => *window,
                last => {
                    let span = self.windows.window(kind, t, self.timezone);
                    *last.insert(Numbered { span, number: spans.number(span) })
                }
            }
        };
        let period = match self.periods.get_mut(subscription)? {
            Some(period) if period.span.contains(t) => *period,
            last => {
                let span = self.reference.subscriptions.get(subscription)?.cycle.period(t);
                *last.insert(Numbered { span, number: spans.number(span) })
            }
        };
        Some((window, period))
    }
}
