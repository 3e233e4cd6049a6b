//! Enrichment: what an event means. Its meters by name and filters, its customer
//! and subscription by time, its price by plan, time and dimensions.

use std::borrow::Cow;

use rustc_hash::FxHashMap;

use super::text_memo::TextMemo;
use crate::model::aggregate::Reason;
use crate::model::basis::Scope;
use crate::model::decimal::{Decimal, DecimalError};
use crate::model::expression::ExpressionError;
use crate::model::meter::{Aggregation, FilterTest, Input, Meter};
use crate::model::percentage::Percentage;
use crate::model::price::Price;
use crate::model::properties::PropertyPlan;
use crate::model::property::{Property, write_json_text};
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowKind};
use crate::reference::{ExternalCustomer, Reference, Subscription, Unbound, Unpriced};

/// The reference tables, arranged for looking up events.
pub struct Enricher<'r> {
    pub reference: &'r Reference,
    events: FxHashMap<&'r str, EventPlan<'r>>,
    /// By subscription: its place in `prices`.
    price_lists: Vec<usize>,
    /// By plan and currency, then meter.
    prices: Vec<Vec<Prices>>,
    /// By price: whether it must know events one by one.
    by_transaction: Vec<bool>,
    scope: Scope,
    has_levels: bool,
}

/// The prices of one meter on one plan in one currency.
#[derive(Debug, Default, Clone)]
struct Prices {
    indexes: Vec<usize>,
    /// Whether some of them are for certain dimensions alone.
    by_dimension: bool,
    /// Where there is one for everything, which is the usual case: the price, and when it is valid.
    only: Option<(usize, Span)>,
}

/// What to do with the events of one name.
pub struct EventPlan<'r> {
    pub properties: PropertyPlan,
    pub meters: Vec<MeterPlan<'r>>,
    /// A meter outside of the scope knows the name too.
    pub known_outside: bool,
}

/// A meter with the slots of its properties.
pub struct MeterPlan<'r> {
    pub index: usize,
    pub meter: &'r Meter,
    filters: Vec<(usize, &'r FilterTest)>,
    /// The slots of the metered property, or of the expression's.
    inputs: Vec<usize>,
    operation: Option<usize>,
    /// Whether the aggregation depends on when an event was.
    pub needs_moment: bool,
    /// Slot, name, and `{"name":` or `,"name":`.
    dimensions: Vec<(usize, &'r str, String)>,
}

/// What names of events and customers of a batch stand for.
pub struct Memo<'c, 'r> {
    pub plans: TextMemo<1, Option<&'c EventPlan<'r>>>,
    pub customers: TextMemo<2, Option<&'r ExternalCustomer>>,
}

impl Default for Memo<'_, '_> {
    fn default() -> Self {
        Memo { plans: TextMemo::new(6), customers: TextMemo::new(12) }
    }
}

impl Memo<'_, '_> {
    pub fn begin_batch(&mut self) {
        self.plans.begin_batch();
        self.customers.begin_batch();
    }
}

/// A value to aggregate.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    /// The event itself counts.
    Event,
    Number(Decimal),
    Distinct(Cow<'a, str>),
    /// A distinct value that is added or removed.
    Operation {
        text: Cow<'a, str>,
        is_add: bool,
    },
}

/// A match of an event with a meter that cannot count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    pub reason: Reason,
    pub detail: String,
}

impl Rejection {
    fn new(reason: Reason, detail: String) -> Self {
        Rejection { reason, detail }
    }
}

impl Value<'_> {
    /// The value for people; `None` where the event itself counts.
    pub fn describe(&self) -> Option<String> {
        match self {
            Value::Event => None,
            Value::Number(number) => Some(number.to_string()),
            Value::Distinct(text) => Some(text.clone().into_owned()),
            Value::Operation { text, is_add } => Some(format!("{} {text}", if *is_add { "add" } else { "remove" })),
        }
    }
}

impl<'r> Enricher<'r> {
    pub fn new(reference: &'r Reference, scope: Scope) -> Self {
        Enricher::of_meters(reference, scope, |_| true)
    }

    /// Whether properties decide which meters count an event.
    pub fn has_filters(&self) -> bool {
        self.events.values().any(|plan| plan.meters.iter().any(|meter| !meter.filters.is_empty()))
    }

    /// For some of the meters: the others are unknown.
    pub fn of_meters(reference: &'r Reference, scope: Scope, wants: impl Fn(&Meter) -> bool) -> Self {
        let mut events: FxHashMap<&str, EventPlan<'r>> = FxHashMap::default();
        for (index, meter) in reference.meters.iter().enumerate().filter(|(_, meter)| wants(meter)) {
            let plan = events.entry(&meter.event_name).or_insert_with(|| EventPlan {
                properties: PropertyPlan::default(),
                meters: Vec::new(),
                known_outside: false,
            });
            if scope.meter.as_ref().is_some_and(|wanted| *wanted != meter.id) {
                plan.known_outside = true;
            } else {
                let meter = MeterPlan::new(index, meter, &mut plan.properties);
                plan.meters.push(meter);
            }
        }
        let mut known: FxHashMap<(&str, &str), usize> = FxHashMap::default();
        let mut prices: Vec<Vec<Prices>> = Vec::new();
        let price_list = |subscription: &'r Subscription| {
            *known.entry((&subscription.plan_id, &subscription.currency)).or_insert_with(|| {
                prices.push((0..reference.meters.len()).map(|meter| Prices::of(reference, subscription, meter)).collect());
                prices.len() - 1
            })
        };
        let price_lists = reference.subscriptions.iter().map(price_list).collect();
        let has_levels = reference.has_levels(scope.meter.as_deref());
        let by_transaction = reference.prices.iter().map(|price| price.transactions().is_some()).collect();
        Enricher { reference, events, price_lists, prices, by_transaction, scope, has_levels }
    }

    /// Whether a meter of the scope keeps a level, to which all earlier events belong.
    pub fn has_levels(&self) -> bool {
        self.has_levels
    }

    /// Whether events of this tenant belong to the scope.
    pub fn wants_tenant(&self, tenant: &str) -> bool {
        self.scope.tenant.as_ref().is_none_or(|wanted| wanted == tenant)
    }

    /// Whether an event of this customer at `t` belongs to the scope; `None` stands for one
    /// that is not known.
    pub fn wants_customer(&self, customer: Option<&ExternalCustomer>, t: Timestamp) -> bool {
        let Some(wanted) = &self.scope.customer else { return true };
        customer.and_then(|customer| customer.customer_id(t)).is_some_and(|id| id == *wanted)
    }

    /// Whether it looks at a customer or a meter alone: of other events, it says nothing.
    pub fn is_of_few(&self) -> bool {
        self.scope.customer.is_some() || self.scope.meter.is_some()
    }

    /// What to do with events of this name; `None` where no meter knows it.
    pub fn plan(&self, event_name: &str) -> Option<&EventPlan<'r>> {
        self.events.get(event_name)
    }

    /// The subscription that pays for an event.
    ///
    /// # Errors
    /// The reason for a dead letter where there is not exactly one.
    pub fn subscription(&self, tenant: &str, external_id: &str, t: Timestamp) -> Result<usize, Rejection> {
        self.subscription_of(self.reference.customer(tenant, external_id), external_id, t)
    }

    /// As [`Enricher::subscription`], where the customer was looked up before.
    ///
    /// # Errors
    /// As [`Enricher::subscription`].
    pub fn subscription_of(
        &self,
        customer: Option<&ExternalCustomer>,
        external_id: &str,
        t: Timestamp,
    ) -> Result<usize, Rejection> {
        let found = customer.map_or(Err(Unbound::CustomerNotFound), |customer| customer.subscription(t));
        found.map_err(|unbound| match unbound {
            Unbound::CustomerNotFound => Rejection::new(
                Reason::CustomerNotFound,
                format!("no customer has external id `{external_id}` at {t}: add it to the customers table"),
            ),
            Unbound::NoActiveSubscription => Rejection::new(
                Reason::NoActiveSubscription,
                format!("customer `{external_id}` has no active subscription at {t}: check started_at and ended_at"),
            ),
            Unbound::Ambiguous => Rejection::new(
                Reason::AmbiguousReference,
                format!("customer `{external_id}` has several active subscriptions at {t}: end all but one"),
            ),
        })
    }

    /// The value of a match and its price, which its meter may go without; `None` where the
    /// property is absent or null.
    ///
    /// # Errors
    /// The reason for a dead letter where it cannot count, or its fee overflows.
    #[inline]
    pub fn charge<'s>(
        &self,
        subscription: usize,
        plan: &MeterPlan<'r>,
        t: Timestamp,
        slots: &'s [Property<'_>],
    ) -> Result<Option<(Value<'s>, Option<usize>)>, Rejection> {
        let Some(value) = plan.value(slots)? else { return Ok(None) };
        let price = self.price(subscription, plan, t, slots)?;
        if let (Some(percentage), Value::Number(value)) = (price.and_then(|price| self.transactions(price)), &value) {
            let fee_error = |error| Rejection::new(Reason::ValueOutOfRange, format!("the fee of the event: {error}"));
            percentage.check(*value).map_err(fee_error)?;
        }
        Ok(Some((value, price)))
    }

    /// Whether a price must know events one by one.
    pub fn needs_transactions(&self, price: usize) -> bool {
        self.by_transaction.get(price).is_some_and(|by_transaction| *by_transaction)
    }

    fn transactions(&self, price: usize) -> Option<&'r Percentage> {
        self.reference.prices.get(price).filter(|_| self.needs_transactions(price)).and_then(Price::transactions)
    }

    /// The price of a match; `None` where its meter may go without.
    ///
    /// # Errors
    /// The reason for a dead letter where there is not exactly one.
    #[inline]
    pub fn price(
        &self,
        subscription: usize,
        plan: &MeterPlan<'r>,
        t: Timestamp,
        slots: &[Property<'_>],
    ) -> Result<Option<usize>, Rejection> {
        let list = self.price_lists.get(subscription).and_then(|list| self.prices.get(*list));
        let Some(Prices { indexes: candidates, by_dimension, only }) = list.and_then(|meters| meters.get(plan.index)) else {
            return Ok(None);
        };
        if let Some((price, _)) = only.filter(|(_, valid)| valid.contains(t)) {
            return Ok(Some(price));
        }
        let Some(of) = self.reference.subscriptions.get(subscription) else { return Ok(None) };
        let dimensions = if *by_dimension { plan.dimension_values(slots) } else { Vec::new() };
        match self.reference.price(candidates, &of.currency, t, &dimensions) {
            Ok(price) => Ok(Some(price)),
            Err(Unpriced::NotFound) if plan.meter.unpriced => Ok(None),
            Err(Unpriced::NotFound) => Err(Rejection::new(
                Reason::PriceNotFound,
                format!(
                    "plan `{}` has no price in {} for meter `{}` at {t}: add one, or declare the meter unpriced",
                    of.plan_id, of.currency, plan.meter.id
                ),
            )),
            Err(Unpriced::Ambiguous) => Err(Rejection::new(
                Reason::AmbiguousReference,
                format!("several prices of plan `{}` match meter `{}` equally well at {t}", of.plan_id, plan.meter.id),
            )),
        }
    }
}

impl Prices {
    fn of(reference: &Reference, subscription: &Subscription, meter: usize) -> Prices {
        let prices =
            reference.candidates(&subscription.plan_id, meter).iter().filter_map(|at| Some((*at, reference.prices.get(*at)?)));
        let mut list = Prices::default();
        for (index, price) in prices.filter(|(_, price)| price.currency.code == subscription.currency) {
            list.indexes.push(index);
            list.by_dimension |= !price.matches.is_empty();
            list.only = (list.indexes.len() == 1 && !list.by_dimension).then_some((index, price.valid));
        }
        list
    }
}

impl<'r> MeterPlan<'r> {
    fn new(index: usize, meter: &'r Meter, properties: &mut PropertyPlan) -> Self {
        let mut dimensions = Vec::new();
        for name in &meter.dimensions {
            let mut prefix = String::from(if dimensions.is_empty() { "{" } else { "," });
            write_json_text(name, &mut prefix);
            prefix.push(':');
            dimensions.push((properties.slot(name), name.as_str(), prefix));
        }
        MeterPlan {
            index,
            meter,
            filters: meter.filters.iter().map(|filter| (properties.slot(&filter.property), &filter.test)).collect(),
            inputs: match &meter.input {
                Input::Event => Vec::new(),
                Input::Property(property) => vec![properties.slot(property)],
                Input::Expression(expression) => {
                    expression.properties().iter().map(|property| properties.slot(property)).collect()
                }
            },
            needs_moment: meter.operation_property.is_some()
                || matches!(meter.aggregation, Aggregation::Latest | Aggregation::WeightedSum)
                || matches!(meter.window, WindowKind::Session { .. }),
            operation: meter.operation_property.as_ref().map(|property| properties.slot(property)),
            dimensions,
        }
    }

    /// Whether the event passes every filter.
    pub fn accepts(&self, slots: &[Property<'_>]) -> bool {
        self.failed_filter(slots).is_none()
    }

    /// The place of the first filter of the meter that the event does not pass.
    pub fn failed_filter(&self, slots: &[Property<'_>]) -> Option<usize> {
        let passes = |(slot, test): &(usize, &FilterTest)| slots.get(*slot).is_some_and(|property| test.passes(property));
        self.filters.iter().position(|filter| !passes(filter))
    }

    /// The value to aggregate; `None` where the property is absent or null.
    ///
    /// # Errors
    /// The reason for a dead letter where the property is no number.
    #[inline]
    pub fn value<'s>(&self, slots: &'s [Property<'_>]) -> Result<Option<Value<'s>>, Rejection> {
        let mut inputs = self.inputs.iter().filter_map(|slot| slots.get(*slot));
        if !inputs.clone().all(Property::is_present) {
            return Ok(None);
        }
        match &self.meter.input {
            Input::Event => Ok(Some(Value::Event)),
            Input::Property(name) => {
                let Some(property) = inputs.next() else { return Ok(None) };
                if !self.meter.aggregation.is_of_values() {
                    return number(name, property).map(|number| Some(Value::Number(number)));
                }
                match self.operation {
                    None => Ok(Some(Value::Distinct(property.text()))),
                    Some(slot) => {
                        let is_add = self.is_add(slots.get(slot))?;
                        Ok(Some(Value::Operation { text: property.text(), is_add }))
                    }
                }
            }
            Input::Expression(expression) => {
                let names = expression.properties().iter();
                let values = names.zip(inputs).map(|(name, property)| number(name, property)).collect::<Result<Vec<_>, _>>()?;
                expression.evaluate(&values).map(|number| Some(Value::Number(number))).map_err(|error| {
                    let reason = match error {
                        ExpressionError::Overflow => Reason::ValueOutOfRange,
                        ExpressionError::DivisionByZero | ExpressionError::Syntax => Reason::InvalidProperty,
                    };
                    Rejection::new(reason, format!("expression `{}` {error}", expression.text()))
                })
            }
        }
    }

    fn is_add(&self, operation: Option<&Property<'_>>) -> Result<bool, Rejection> {
        let text = operation.filter(|property| property.is_present()).map_or(Cow::Borrowed("add"), Property::text);
        match text.as_ref() {
            "add" => Ok(true),
            "remove" => Ok(false),
            other => Err(Rejection::new(
                Reason::InvalidProperty,
                format!(
                    "property `{}` is `{}`, neither add nor remove",
                    self.meter.operation_property.as_deref().unwrap_or_default(),
                    shorten(other)
                ),
            )),
        }
    }

    /// Appends the dimensions as canonical JSON.
    pub fn write_dimensions(&self, slots: &[Property<'_>], out: &mut String) {
        for (slot, _, prefix) in &self.dimensions {
            out.push_str(prefix);
            slots.get(*slot).unwrap_or(&Property::Absent).write_json(out);
        }
        out.push_str(if self.dimensions.is_empty() { "{}" } else { "}" });
    }

    /// The values of the dimensions as canonical JSON.
    pub fn dimension_values(&self, slots: &[Property<'_>]) -> Vec<(&'r str, String)> {
        let value = |(slot, name, _): &(usize, &'r str, String)| {
            let mut text = String::new();
            slots.get(*slot).unwrap_or(&Property::Absent).write_json(&mut text);
            (*name, text)
        };
        self.dimensions.iter().map(value).collect()
    }
}

fn number(name: &str, property: &Property<'_>) -> Result<Decimal, Rejection> {
    property.decimal().map_err(|error| match error {
        DecimalError::Syntax => Rejection::new(
            Reason::InvalidProperty,
            format!("property `{name}` is `{}`, not a decimal number", shorten(&property.text())),
        ),
        DecimalError::Overflow => Rejection::new(
            Reason::ValueOutOfRange,
            format!("property `{name}` is {}, beyond 38 digits at 18 decimal places", shorten(&property.text())),
        ),
    })
}

/// Enough of a value to recognise it.
fn shorten(text: &str) -> String {
    let start: String = text.chars().take(60).collect();
    if start.len() < text.len() { start + "…" } else { start }
}
