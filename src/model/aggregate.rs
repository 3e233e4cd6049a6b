//! The rows of the store, and the corrections between what it was and what it is.

use std::cmp::Ordering;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use super::causes::Causes;
use super::decimal::Decimal;
use super::digest::SetDigest;
use super::timestamp::Timestamp;
use super::window::Span;

/// Shared text: names repeat in every row.
pub type Text = Arc<str>;

/// Shared text in saved plans and in the ledger.
mod text {
    use std::sync::Arc;

    use serde::{Deserialize as _, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(text)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<str>, D::Error> {
        String::deserialize(deserializer).map(Arc::from)
    }
}

/// What rows share, in saved plans and in the ledger.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<T: Serialize, S: Serializer>(value: &Arc<T>, serializer: S) -> Result<S::Ok, S::Error> {
        value.as_ref().serialize(serializer)
    }

    pub fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<T>, D::Error> {
        T::deserialize(deserializer).map(Arc::new)
    }
}

mod shared_option {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<T: Serialize, S: Serializer>(value: &Option<Arc<T>>, serializer: S) -> Result<S::Ok, S::Error> {
        value.as_deref().serialize(serializer)
    }

    pub fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Arc<T>>, D::Error> {
        Option::deserialize(deserializer).map(|value| value.map(Arc::new))
    }
}

/// What accumulates together: one subscription, meter, price and combination of
/// dimensions in one billing period.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PeriodKey {
    #[serde(with = "text")]
    pub tenant_id: Text,
    #[serde(with = "text")]
    pub subscription_id: Text,
    #[serde(with = "text")]
    pub meter_id: Text,
    /// Empty for usage without a price.
    #[serde(with = "text")]
    pub price_id: Text,
    /// Canonical JSON.
    #[serde(with = "text")]
    pub dimensions: Text,
    pub period_start: Timestamp,
}

/// The key of an aggregate. The windows of a period share its key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WindowKey {
    #[serde(with = "shared")]
    pub period: Arc<PeriodKey>,
    pub window_start: Timestamp,
}

impl Ord for WindowKey {
    fn cmp(&self, other: &Self) -> Ordering {
        let is_same = Arc::ptr_eq(&self.period, &other.period);
        let periods = if is_same { Ordering::Equal } else { self.period.cmp(&other.period) };
        periods.then(self.window_start.cmp(&other.window_start))
    }
}

impl PartialOrd for WindowKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// One row of `usage_windows`: an aggregate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowRow {
    pub key: WindowKey,
    #[serde(with = "text")]
    pub customer_id: Text,
    pub window_end: Timestamp,
    pub period_end: Timestamp,
    pub quantity: Decimal,
    pub event_count: u64,
    pub cost: Decimal,
    #[serde(with = "text")]
    pub currency: Text,
    /// Of the events counted, in any order.
    pub events_digest: SetDigest,
    #[serde(with = "shared")]
    pub basis: Arc<Basis>,
}

/// Digests of the definitions that a row was computed with. They tell why a row
/// changed; a difference here alone changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Basis {
    #[serde(with = "text")]
    pub meter: Text,
    #[serde(with = "text")]
    pub price: Text,
    #[serde(with = "text")]
    pub subscription: Text,
    #[serde(with = "text")]
    pub customer: Text,
}

impl WindowRow {
    pub fn window(&self) -> Span {
        Span { start: self.key.window_start, end: self.window_end }
    }

    /// Where what it counts begins: a window that lasts longer than its billing period has a row
    /// in each.
    pub fn counts_from(&self) -> Timestamp {
        self.key.window_start.max(self.key.period.period_start)
    }

    pub fn period(&self) -> Span {
        Span { start: self.key.period.period_start, end: self.period_end }
    }

    /// Whether both say the same; how they came about does not count.
    pub fn says_the_same(&self, other: &WindowRow) -> bool {
        self.same_usage(other) && self.cost == other.cost && self.currency == other.currency
    }

    /// Whether both count the same usage, at whatever cost.
    pub fn same_usage(&self, other: &WindowRow) -> bool {
        self.key == other.key
            && self.customer_id == other.customer_id
            && self.window_end == other.window_end
            && self.period_end == other.period_end
            && self.quantity == other.quantity
            && self.event_count == other.event_count
            && self.events_digest == other.events_digest
    }
}

/// A row of `usage_windows` as the store has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredWindow {
    pub row: Arc<WindowRow>,
    pub version: i64,
    pub run_id: Text,
}

/// One row of `usage_periods`: a bill, or a line of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeriodRow {
    pub key: PeriodKey,
    #[serde(with = "text")]
    pub customer_id: Text,
    pub period_end: Timestamp,
    pub quantity: Decimal,
    /// Exact, before adjustments.
    pub cost: Decimal,
    pub minimum_adjustment: Decimal,
    pub commitment_adjustment: Decimal,
    /// Cost and adjustments, rounded to the currency's minor unit.
    pub amount: Decimal,
    #[serde(with = "text")]
    pub currency: Text,
    /// When the period was closed, because it was invoiced.
    pub closed_at: Option<Timestamp>,
}

impl PeriodRow {
    pub fn period(&self) -> Span {
        Span { start: self.key.period_start, end: self.period_end }
    }

    /// Whether both say the same; whether it is closed does not count.
    pub fn says_the_same(&self, other: &PeriodRow) -> bool {
        *self == PeriodRow { closed_at: self.closed_at, ..other.clone() }
    }
}

/// What a correction does to its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CorrectionKind {
    Insert,
    Update,
    Retract,
    /// A difference in a closed period: recorded, the row stays as it was invoiced.
    Adjust,
}

impl CorrectionKind {
    pub fn name(self) -> &'static str {
        match self {
            CorrectionKind::Insert => "insert",
            CorrectionKind::Update => "update",
            CorrectionKind::Retract => "retract",
            CorrectionKind::Adjust => "adjust",
        }
    }
}

/// Why a row changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    FirstComputation,
    LateEvent,
    /// A copy of an event that had counted counts no more, because another one was
    /// kept elsewhere.
    DuplicateRemoved,
    EventAmended,
    EventVoided,
    DeadLetterResolved,
    CustomerChanged,
    SubscriptionChanged,
    PriceChanged,
    MeterChanged,
    JobChanged,
    /// Another window of the period moved the accumulation.
    TierShift,
    /// Nothing that the row depends on changed: the store itself was altered.
    StoreAltered,
    /// Somebody took a run back.
    ManualRevert,
}

impl Cause {
    const ALL: [Cause; 14] = [
        Cause::FirstComputation,
        Cause::LateEvent,
        Cause::DuplicateRemoved,
        Cause::EventAmended,
        Cause::EventVoided,
        Cause::DeadLetterResolved,
        Cause::CustomerChanged,
        Cause::SubscriptionChanged,
        Cause::PriceChanged,
        Cause::MeterChanged,
        Cause::JobChanged,
        Cause::TierShift,
        Cause::StoreAltered,
        Cause::ManualRevert,
    ];

    pub fn parse(name: &str) -> Option<Cause> {
        Cause::ALL.into_iter().find(|cause| cause.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Cause::FirstComputation => "first_computation",
            Cause::LateEvent => "late_event",
            Cause::DuplicateRemoved => "duplicate_removed",
            Cause::EventAmended => "event_amended",
            Cause::EventVoided => "event_voided",
            Cause::DeadLetterResolved => "dead_letter_resolved",
            Cause::CustomerChanged => "customer_changed",
            Cause::SubscriptionChanged => "subscription_changed",
            Cause::PriceChanged => "price_changed",
            Cause::MeterChanged => "meter_changed",
            Cause::JobChanged => "job_changed",
            Cause::TierShift => "tier_shift",
            Cause::StoreAltered => "store_altered",
            Cause::ManualRevert => "manual_revert",
        }
    }
}

/// The values of an aggregate, as far as a correction tells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Values {
    pub quantity: Decimal,
    pub cost: Decimal,
    pub event_count: u64,
}

impl From<&WindowRow> for Values {
    fn from(row: &WindowRow) -> Self {
        Values { quantity: row.quantity, cost: row.cost, event_count: row.event_count }
    }
}

/// The values of a row as a correction tells them, in little memory: most runs that correct
/// much have the row itself at hand.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(from = "Values", into = "Values")]
pub enum Recorded {
    Of(Arc<WindowRow>),
    Values(Box<Values>),
}

impl Recorded {
    pub fn values(&self) -> Values {
        match self {
            Recorded::Of(row) => Values::from(&**row),
            Recorded::Values(values) => **values,
        }
    }
}

impl From<Values> for Recorded {
    fn from(values: Values) -> Self {
        Recorded::Values(Box::new(values))
    }
}

impl From<&Arc<WindowRow>> for Recorded {
    fn from(row: &Arc<WindowRow>) -> Self {
        Recorded::Of(Arc::clone(row))
    }
}

impl PartialEq for Recorded {
    fn eq(&self, other: &Recorded) -> bool {
        self.values() == other.values()
    }
}

impl Eq for Recorded {}

impl From<Recorded> for Values {
    fn from(recorded: Recorded) -> Self {
        recorded.values()
    }
}

/// One change to one aggregate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Correction {
    pub key: WindowKey,
    #[serde(with = "text")]
    pub customer_id: Text,
    #[serde(with = "text")]
    pub currency: Text,
    pub kind: CorrectionKind,
    pub causes: Causes,
    pub before: Option<Recorded>,
    pub after: Option<Recorded>,
    /// The row that was written over or taken away, so that it can be restored.
    #[serde(with = "shared_option")]
    pub replaced: Option<Arc<WindowRow>>,
}

impl Correction {
    pub fn values_before(&self) -> Option<Values> {
        self.before.as_ref().map(Recorded::values)
    }

    pub fn values_after(&self) -> Option<Values> {
        self.after.as_ref().map(Recorded::values)
    }

    /// The row that is written; none by a retraction or an adjustment.
    pub fn written(&self) -> Option<&Arc<WindowRow>> {
        match &self.after {
            Some(Recorded::Of(row)) if self.kind != CorrectionKind::Adjust => Some(row),
            _ => None,
        }
    }

    /// Whose row it was before, and in what currency: another's where a customer or a plan changed.
    pub fn owner_before(&self) -> (&Text, &Text) {
        self.replaced.as_ref().map_or((&self.customer_id, &self.currency), |row| (&row.customer_id, &row.currency))
    }
}

/// One change to one row of `usage_periods`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeriodCorrection {
    pub key: PeriodKey,
    pub before: Option<PeriodRow>,
    pub after: Option<PeriodRow>,
    /// What the bill of a closed period should be: recorded, the row stays as it was invoiced.
    #[serde(default)]
    pub is_adjustment: bool,
}

impl PeriodCorrection {
    /// `change` or `adjust`.
    pub fn kind(&self) -> &'static str {
        if self.is_adjustment { CorrectionKind::Adjust.name() } else { PERIOD_CHANGE }
    }
}

/// The kind of corrections of `usage_periods` that change a row.
pub const PERIOD_CHANGE: &str = "change";

/// Why an event that should have counted could not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    MalformedEvent,
    CustomerNotFound,
    NoActiveSubscription,
    PriceNotFound,
    AmbiguousReference,
    InvalidProperty,
    ValueOutOfRange,
}

impl Reason {
    pub const ALL: [Reason; 7] = [
        Reason::MalformedEvent,
        Reason::CustomerNotFound,
        Reason::NoActiveSubscription,
        Reason::PriceNotFound,
        Reason::AmbiguousReference,
        Reason::InvalidProperty,
        Reason::ValueOutOfRange,
    ];

    /// What makes such an event count, in one line.
    pub fn remedy(self) -> &'static str {
        match self {
            Reason::MalformedEvent => "repair the row where it stands, or send the event again as it should be",
            Reason::CustomerNotFound => "add the external id to the customers table, valid at the time of the event",
            Reason::NoActiveSubscription => "add a subscription, or repair started_at and ended_at",
            Reason::PriceNotFound => "add a price for plan, meter and currency, or declare the meter unpriced",
            Reason::AmbiguousReference => "end or remove all but one of the rows that match",
            Reason::InvalidProperty => "send the event again with the same id and a valid property, or void it",
            Reason::ValueOutOfRange => "send the event again with the same id and a value that fits, or void it",
        }
    }

    pub fn parse(name: &str) -> Option<Reason> {
        Reason::ALL.into_iter().find(|reason| reason.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Reason::MalformedEvent => "malformed_event",
            Reason::CustomerNotFound => "customer_not_found",
            Reason::NoActiveSubscription => "no_active_subscription",
            Reason::PriceNotFound => "price_not_found",
            Reason::AmbiguousReference => "ambiguous_reference",
            Reason::InvalidProperty => "invalid_property",
            Reason::ValueOutOfRange => "value_out_of_range",
        }
    }
}

/// What identifies a dead letter within its job.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeadLetterKey {
    pub tenant_id: String,
    pub event_id: String,
    /// Empty where the event as a whole could not count.
    pub meter_id: String,
    pub reason: Reason,
}

/// An event that should have counted and could not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetter {
    pub key: DeadLetterKey,
    pub detail: String,
    /// The event as JSON.
    pub event: String,
    /// Unknown for rows that are no events at all.
    pub event_time: Option<Timestamp>,
}
