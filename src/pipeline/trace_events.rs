//! Events as an explanation lists them: those that count, and those set aside.

use std::collections::BTreeSet;

use super::deduplicate::Copy;
use super::price::Parts;
use super::price_steps::PriceSteps;
use crate::model::decimal::Decimal;
use crate::model::meter::{Input, Meter};
use crate::model::price::Price;
use crate::model::timestamp::Timestamp;
use crate::source::EventRef;

/// The first events by time, up to a limit, and how many there are.
#[derive(Debug, Clone)]
pub struct Listing<T> {
    pub total: u64,
    events: BTreeSet<(T, u64)>,
    limit: usize,
}

impl<T: Ord + Clone> Listing<T> {
    pub fn new(limit: usize) -> Self {
        Listing { total: 0, events: BTreeSet::new(), limit }
    }

    pub fn add(&mut self, event: T) {
        // Numbered: two events can look the same.
        self.insert(event, self.total);
        self.total += 1;
    }

    fn insert(&mut self, event: T, number: u64) {
        self.events.insert((event, number));
        if self.events.len() > self.limit {
            self.events.pop_last();
        }
    }

    pub fn merge(&mut self, other: Listing<T>) {
        let before = self.total;
        self.total += other.total;
        other.events.into_iter().for_each(|(event, number)| self.insert(event, before + number));
    }

    /// Leaves those that `wants`, of a list that holds all of them, and at most `limit`.
    pub fn keep(&mut self, limit: usize, wants: impl Fn(&T) -> bool) {
        if self.events.len() as u64 == self.total {
            self.events.retain(|(event, _)| wants(event));
            self.total = self.events.len() as u64;
        }
        self.limit = limit;
        while self.events.len() > limit {
            self.events.pop_last();
        }
    }

    /// By time.
    pub fn events(&self) -> impl ExactSizeIterator<Item = &T> {
        self.events.iter().map(|(event, _)| event)
    }
}

/// An event that counts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct CountedEvent {
    pub timestamp: Timestamp,
    pub ingested_at: Option<Timestamp>,
    pub id: String,
    /// What is aggregated; `None` where the event itself counts.
    pub value: Option<String>,
    /// Where a price charges by event: what of the value is not free, and the fee.
    pub charged: Option<Decimal>,
    pub fee: Option<Decimal>,
}

impl CountedEvent {
    pub fn new(event: &EventRef<'_>, timestamp: Timestamp, value: Option<String>) -> Self {
        let id = event.id.unwrap_or_default().to_owned();
        CountedEvent { timestamp, ingested_at: event.ingested_at, id, value, charged: None, fee: None }
    }
}

impl Listing<CountedEvent> {
    /// With what each event is charged, where the price charges by event.
    #[must_use]
    pub(super) fn charged(mut self, steps: &PriceSteps, parts: Parts<'_>) -> Self {
        let price = parts.price.and_then(Price::transactions);
        let Some(price) = price else { return self };
        let charged = |(mut event, number): (CountedEvent, u64)| {
            let key = (event.timestamp, event.ingested_at.unwrap_or(event.timestamp), event.id.as_str().into());
            let value = event.value.as_deref().and_then(|value| value.parse::<Decimal>().ok());
            let charge = steps.charges.get(&key).copied();
            let charge = charge.or_else(|| value.and_then(|value| price.whole_charge(value).ok()));
            (event.charged, event.fee) = (charge.map(|charge| charge.charged), charge.map(|charge| charge.fee));
            (event, number)
        };
        self.events = std::mem::take(&mut self.events).into_iter().map(charged).collect();
        self
    }
}

/// An event that does not count.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct SetAside {
    pub timestamp: Timestamp,
    pub ingested_at: Option<Timestamp>,
    pub id: String,
    #[serde(flatten)]
    pub why: Why,
}

impl SetAside {
    pub fn new(event: &EventRef<'_>, timestamp: Timestamp, why: Why) -> Self {
        SetAside { timestamp, ingested_at: event.ingested_at, id: event.id.unwrap_or_default().to_owned(), why }
    }
}

/// Why an event does not count.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum Why {
    /// Another copy of the id is kept.
    Superseded {
        detail: String,
    },
    Voided {
        detail: String,
    },
    DeadLetter {
        reason: &'static str,
        detail: String,
    },
    /// A property is absent or null.
    Skipped {
        detail: String,
    },
    /// A filter of the meter does not let it pass.
    Filtered {
        detail: String,
    },
}

impl Why {
    pub fn superseded(event: &EventRef<'_>, kept: &EventRef<'_>) -> Why {
        let ingested = kept.ingested_at.map_or_else(|| "kept".to_owned(), |t| format!("ingested {t}"));
        let mut detail = format!("the copy {ingested} counts");
        if let Some(t) = kept.timestamp.filter(|_| kept.timestamp != event.timestamp) {
            detail.push_str(&format!(", at {t}"));
        }
        if let Some(customer) = kept.external_customer_id.filter(|_| kept.external_customer_id != event.external_customer_id) {
            detail.push_str(&format!(", for customer {customer}"));
        }
        Why::Superseded { detail }
    }

    pub fn voided(copies: &[Copy<'_>]) -> Why {
        let void = copies.iter().map(|copy| copy.event).filter(|event| event.deleted).filter_map(|event| event.ingested_at).max();
        Why::Voided { detail: void.map_or_else(|| "by a deletion".to_owned(), |t| format!("by a deletion ingested {t}")) }
    }

    pub fn skipped(meter: &Meter) -> Why {
        let detail = match &meter.input {
            Input::Event => "it has no value".to_owned(),
            Input::Property(property) => format!("property {property} is absent or null"),
            Input::Expression(expression) => format!("a property of `{}` is absent or null", expression.text()),
        };
        Why::Skipped { detail }
    }

    pub fn filtered(meter: &Meter, failed: Option<usize>) -> Why {
        let filter = failed.and_then(|at| meter.filters.get(at));
        Why::Filtered { detail: filter.map_or_else(|| "no filter lets it pass".to_owned(), |filter| format!("not {filter}")) }
    }

    /// Its name, as JSON has it, and what there is to say.
    pub fn describe(&self) -> (&'static str, &str) {
        match self {
            Why::Superseded { detail } => ("superseded", detail),
            Why::Voided { detail } => ("voided", detail),
            Why::DeadLetter { reason, detail } => (reason, detail),
            Why::Skipped { detail } => ("skipped", detail),
            Why::Filtered { detail } => ("filtered", detail),
        }
    }
}
