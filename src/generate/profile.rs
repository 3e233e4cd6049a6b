//! The profile: typed as written in [`raw`](super::raw), then validated into a [`Profile`].

use std::path::{Path, PathBuf};

use anyhow::Result;
use chrono::NaiveDate;
use chrono_tz::Tz;

use super::node::{Definition, Node};
use super::property::{Property, Values};
use super::random::Weighted;
use super::raw::{RawCustomers, RawEventType, RawPlan, RawProfile, RawProperty, RawRates};
use crate::config::yaml::{self, Placed};
use crate::fault::configuration;
use crate::model::decimal::Decimal;
use crate::model::price::Currency;
use crate::model::property::write_json_text;
use crate::model::window::{PeriodLength, WindowSize};

/// The profile that is used where none is named.
pub const DEFAULT: &str = include_str!("../../fixtures/profiles/default.yaml");

/// What to make up, validated.
#[derive(Debug, Clone)]
pub struct Profile {
    pub path: PathBuf,
    /// The job's name.
    pub name: String,
    pub seed: u64,
    pub timezone: Tz,
    /// The first local day.
    pub start: NaiveDate,
    pub days: u32,
    /// Rows to write, copies included.
    pub events: u64,
    pub window: &'static str,
    pub customers: Customers,
    pub rates: Rates,
    pub event_types: EventTypes,
    pub meters: Vec<Definition>,
    pub prices: Vec<Definition>,
}

#[derive(Debug, Clone)]
pub struct Customers {
    pub count: u32,
    pub tenants: u32,
    pub weights: Weighted,
    pub plans: Vec<Plan>,
    pub plan_weights: Weighted,
}

#[derive(Debug, Clone)]
pub struct Plan {
    pub id: String,
    pub currency: String,
    pub billing_period: &'static str,
}

/// How many of a million rows are something special.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rates {
    pub duplicates: u64,
    pub amended: u64,
    pub voided: u64,
    pub late: u64,
    /// How many days after its event a row can come at most.
    pub late_days: u32,
    pub missing_timestamp: u64,
    pub invalid_number: u64,
    pub unknown_customer: u64,
    /// Of the events of a day on which clocks change: how many are close to it.
    pub near_clock_change: u64,
}

/// Rows are counted by the million.
pub const MILLION: u64 = 1_000_000;

#[derive(Debug, Clone)]
pub struct EventTypes {
    pub list: Vec<EventType>,
    pub all: Weighted,
    /// Types that some meter counts, whatever their properties.
    pub metered: Option<Weighted>,
    /// Types with a property that some meter needs to be a number.
    pub breakable: Option<Weighted>,
}

#[derive(Debug, Clone)]
pub struct EventType {
    pub name: String,
    pub properties: Vec<Property>,
    /// The property to break, and how many meters reject the event then.
    pub breakable: Option<(usize, u64)>,
}

impl Profile {
    /// Reads and validates a profile.
    ///
    /// # Errors
    /// A configuration fault that names the file, the line and the remedy.
    pub fn load(path: &Path) -> Result<Profile> {
        Validator { path }.profile(yaml::read(path)?)
    }

    /// The profile that is used where none is named.
    ///
    /// # Errors
    /// None, as tests show.
    pub fn built_in() -> Result<Profile> {
        let path = Path::new("default.yaml");
        Validator { path }.profile(yaml::parse(DEFAULT, path)?)
    }
}

/// Validates the parts of one profile.
struct Validator<'p> {
    path: &'p Path,
}

impl Validator<'_> {
    fn error<T>(&self, at: &Placed<T>, message: impl std::fmt::Display) -> anyhow::Error {
        configuration(format!("{}:{}: {message}", self.path.display(), at.defined.line()))
    }

    fn profile(&self, raw: RawProfile) -> Result<Profile> {
        if raw.version.value != 1 {
            return Err(
                self.error(&raw.version, format!("version {} is unknown: this trueup reads version 1", raw.version.value))
            );
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        let name = &raw.name.value;
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            let must = "must consist of letters, digits, `_`, `-` and `.`, and not begin with `.`";
            return Err(self.error(&raw.name, format!("name `{name}` {must}")));
        }
        let timezone = match &raw.timezone {
            None => Tz::UTC,
            Some(zone) => zone.value.parse().map_err(|_| {
                self.error(zone, format!("time zone `{}` is unknown: use an IANA name such as Europe/Berlin", zone.value))
            })?,
        };
        // Far from the ends of what an instant can be.
        let years = NaiveDate::from_ymd_opt(1970, 1, 2)..NaiveDate::from_ymd_opt(2150, 1, 1);
        let start: NaiveDate = raw.start.value.parse().ok().filter(|start| years.contains(&Some(*start))).ok_or_else(|| {
            self.error(&raw.start, format!("start `{}` is no date between 1970 and 2150, such as 2026-03-20", raw.start.value))
        })?;
        let window = match &raw.window {
            None => "hour",
            Some(window) => WindowSize::parse(&window.value).map(WindowSize::name).ok_or_else(|| {
                self.error(window, format!("window `{}` is unknown: use one such as hour or day", window.value))
            })?,
        };
        check_days(raw.days.value).map_err(|message| self.error(&raw.days, message))?;
        check_events(raw.events.value).map_err(|message| self.error(&raw.events, message))?;
        let customers = self.customers(&raw.customers)?;
        let event_types = self.event_types(&raw.event_types, &raw.meters.value)?;
        self.check_prices(&customers.plans, &raw.meters.value, &raw.prices)?;
        let rates = self.rates(&raw.rates, &event_types)?;
        Ok(Profile {
            path: self.path.to_owned(),
            name: raw.name.value,
            seed: raw.seed,
            timezone,
            start,
            days: raw.days.value,
            events: raw.events.value,
            window,
            customers,
            rates,
            event_types,
            meters: raw.meters.value,
            prices: raw.prices,
        })
    }

    fn customers(&self, raw: &RawCustomers) -> Result<Customers> {
        if !(1..=10_000_000).contains(&raw.count.value) {
            return Err(self.error(&raw.count, "customers.count must be from 1 to 10000000"));
        }
        let tenants = raw.tenants.as_ref().map_or(1, |tenants| tenants.value);
        if let Some(given) = raw.tenants.as_ref().filter(|_| !(1..=raw.count.value).contains(&tenants)) {
            return Err(self.error(given, "customers.tenants must be from 1 to the number of customers"));
        }
        let skew = raw.skew.as_ref().map_or(0.0, |skew| skew.value);
        let weights = raw.skew.as_ref().map(|given| (given, is_skew(skew))).map_or(Ok(()), |(given, fine)| {
            if fine { Ok(()) } else { Err(self.error(given, format!("customers.skew {skew} must be from 0 to 4"))) }
        });
        weights?;
        let nobody = || self.error(&raw.plans, "customers.plans must list at least one plan that has a weight");
        let weights: Vec<_> = raw.plans.value.iter().map(|plan| u64::from(plan.value.weight.unwrap_or(1))).collect();
        let plan_weights = Weighted::new(&weights).ok_or_else(nobody)?;
        let plans = raw.plans.value.iter().map(|plan| self.plan(&plan.value)).collect::<Result<Vec<_>>>()?;
        let weights = Weighted::zipf(raw.count.value, skew).ok_or_else(nobody)?;
        Ok(Customers { count: raw.count.value, tenants, weights, plans, plan_weights })
    }

    fn plan(&self, raw: &RawPlan) -> Result<Plan> {
        let currency = &raw.currency;
        if Currency::from_code(&currency.value).is_none() {
            let message = format!("currency `{}` is unknown: use an ISO 4217 code such as USD", currency.value);
            return Err(self.error(currency, message));
        }
        let billing_period = match &raw.billing_period {
            None => PeriodLength::Month,
            Some(period) => PeriodLength::parse(&period.value).ok_or_else(|| {
                let names: Vec<_> = PeriodLength::NAMES.iter().map(|(name, _)| *name).collect();
                self.error(period, format!("billing_period `{}` must be one of {}", period.value, names.join(", ")))
            })?,
        };
        if raw.plan_id.trim() != raw.plan_id || raw.plan_id.is_empty() {
            let message = format!("plan_id `{}` must not be empty, nor begin or end with a space", raw.plan_id);
            return Err(self.error(currency, message));
        }
        Ok(Plan { id: raw.plan_id.clone(), currency: currency.value.clone(), billing_period: billing_period.name() })
    }

    fn event_types(&self, raw: &Placed<Vec<Placed<RawEventType>>>, meters: &[Definition]) -> Result<EventTypes> {
        let mut list: Vec<EventType> = Vec::new();
        let (mut all, mut metered, mut breakable) = (Vec::new(), Vec::new(), Vec::new());
        for event_type in &raw.value {
            let name = &event_type.value.event_name;
            if list.iter().any(|known| known.name == *name) || name.is_empty() {
                return Err(self.error(event_type, format!("event_name `{name}` is empty or used twice")));
            }
            let mut properties: Vec<Property> = Vec::new();
            for property in &event_type.value.properties {
                let name = property.value.name.clone();
                // A meter reads `a.b` as b in a, which a property of this name is not.
                if name.is_empty() || name.contains('.') {
                    return Err(self.error(property, format!("property `{name}` must have a name without `.`")));
                }
                if properties.iter().any(|known| known.name == name) {
                    return Err(self.error(property, format!("property `{name}` is there twice")));
                }
                let mut lead = String::from(if properties.is_empty() { "{" } else { "," });
                write_json_text(&name, &mut lead);
                lead.push(':');
                properties.push(Property { name, lead, values: self.values(property)? });
            }
            let of_type: Vec<&Node> =
                meters.iter().map(|meter| &meter.value).filter(|meter| meter.text("event_name") == Some(name)).collect();
            for (property, at) in properties.iter().zip(&event_type.value.properties) {
                if let Some(meter) = of_type.iter().find(|meter| sums(meter, &property.name) && !property.values.are_numbers()) {
                    let meter = meter.text("meter_id").unwrap_or_default();
                    let message =
                        format!("property `{}` must be a number or null, for meter `{meter}` adds it up", property.name);
                    return Err(self.error(at, message));
                }
            }
            let broken = breakable_property(&properties, &of_type);
            let weight = u64::from(event_type.value.weight.unwrap_or(1));
            all.push(weight);
            metered.push(if of_type.iter().any(|meter| is_unfiltered(meter)) { weight } else { 0 });
            breakable.push(if broken.is_some() { weight } else { 0 });
            list.push(EventType { name: name.clone(), properties, breakable: broken });
        }
        let all = Weighted::new(&all).ok_or_else(|| self.error(raw, "event_types must list at least one that has a weight"))?;
        Ok(EventTypes { list, all, metered: Weighted::new(&metered), breakable: Weighted::new(&breakable) })
    }

    fn values(&self, at: &Placed<RawProperty>) -> Result<Values> {
        let raw = &at.value;
        let wrong = |message: String| self.error(at, format!("property `{}` {message}", raw.name));
        let number = |min: i64, max: i64, skew: u32, places: u32| {
            let count = i128::from(max) - i128::from(min) + 1;
            let count = u64::try_from(count).ok().filter(|count| *count > 0);
            let count = count.ok_or_else(|| wrong("has a max below its min".to_owned()))?;
            if skew > 16 {
                return Err(wrong(format!("has skew {skew}, which must be from 0 to 16")));
            }
            Ok(Values::Number { min, count, skew, places })
        };
        let kinds = (&raw.integer, &raw.decimal, &raw.choice, &raw.pool, &raw.constant);
        match kinds {
            (Some(integer), None, None, None, None) => number(integer.min, integer.max, integer.skew, 0),
            (None, Some(decimal), None, None, None) => {
                let units = |text: &str| {
                    units(text, decimal.places)
                        .ok_or_else(|| wrong(format!("has `{text}`, which is no number of {} places", decimal.places)))
                };
                number(units(&decimal.min)?, units(&decimal.max)?, decimal.skew, decimal.places)
            }
            (None, None, Some(choices), None, None) => {
                let texts = choices.iter().map(|choice| json(&choice.value)).collect::<Option<Vec<_>>>();
                let texts = texts.ok_or_else(|| wrong("can only have texts, numbers, true, false and null".to_owned()))?;
                let weights: Vec<_> = choices.iter().map(|choice| u64::from(choice.weight.unwrap_or(1))).collect();
                let weights = Weighted::new(&weights).ok_or_else(|| wrong("has no choice that has a weight".to_owned()))?;
                Ok(Values::Choice { texts, weights })
            }
            (None, None, None, Some(pool), None) => {
                if !is_skew(pool.skew) || !(1..=100_000_000).contains(&pool.size) {
                    return Err(wrong("needs a size from 1 to 100000000, and a skew from 0 to 4".to_owned()));
                }
                if json(&Node::Text(pool.prefix.clone())).is_none_or(|text| text.len() != pool.prefix.len() + 2) {
                    return Err(wrong("has a prefix with quotes, backslashes or control characters".to_owned()));
                }
                let weights = Weighted::zipf(pool.size, pool.skew);
                let weights = weights.ok_or_else(|| wrong("has an empty pool".to_owned()))?;
                Ok(Values::Pool { prefix: pool.prefix.clone(), weights })
            }
            (None, None, None, None, Some(constant)) => {
                let text = json(constant);
                text.map(Values::Constant).ok_or_else(|| wrong("must be a text, a number, true, false or null".to_owned()))
            }
            _ => Err(wrong("needs exactly one of integer, decimal, choice, pool and constant".to_owned())),
        }
    }

    /// What is announced is what a run finds: an event without a price would be a dead letter too.
    fn check_prices(&self, plans: &[Plan], meters: &[Definition], prices: &[Definition]) -> Result<()> {
        for meter in meters.iter().filter(|meter| !meter.value.is_true("unpriced")) {
            let id = meter.value.text("meter_id").unwrap_or_default();
            let missing = plans.iter().find(|plan| {
                !prices.iter().any(|price| {
                    let price = &price.value;
                    let matches_all = ["match", "valid_from", "valid_to"].iter().all(|key| price.get(key).is_none());
                    let texts = (price.text("plan_id"), price.text("meter_id"), price.text("currency"));
                    matches_all && texts == (Some(&plan.id), Some(id), Some(&plan.currency))
                })
            });
            if let Some(plan) = missing {
                return Err(self.error(
                    meter,
                    format!(
                        "meter `{id}` has no price on plan `{}` in {} that holds for all of its events: add one, or `unpriced: true`",
                        plan.id, plan.currency
                    ),
                ));
            }
        }
        Ok(())
    }

    fn rates(&self, raw: &RawRates, event_types: &EventTypes) -> Result<Rates> {
        let share = |rate: &Option<Placed<String>>, name: &str| match rate {
            None => Ok(0),
            Some(text) => share(&text.value).ok_or_else(|| {
                self.error(text, format!("rate {name} `{}` must be a share from 0% to 100% such as \"2%\"", text.value))
            }),
        };
        let late_days = raw.late_days.as_ref().map_or(3, |days| days.value);
        if let Some(days) = raw.late_days.as_ref().filter(|days| !(1..=200).contains(&days.value)) {
            return Err(self.error(days, format!("late_days {} must be from 1 to 200", days.value)));
        }
        let rates = Rates {
            duplicates: share(&raw.duplicates, "duplicates")?,
            amended: share(&raw.amended, "amended")?,
            voided: share(&raw.voided, "voided")?,
            late: share(&raw.late, "late")?,
            late_days,
            missing_timestamp: share(&raw.missing_timestamp, "missing_timestamp")?,
            invalid_number: share(&raw.invalid_number, "invalid_number")?,
            unknown_customer: share(&raw.unknown_customer, "unknown_customer")?,
            near_clock_change: share(&raw.near_clock_change, "near_clock_change")?,
        };
        let copied = rates.duplicates + rates.amended + rates.voided;
        let single = rates.late + rates.missing_timestamp + rates.invalid_number + rates.unknown_customer;
        let all = [
            &raw.duplicates,
            &raw.amended,
            &raw.voided,
            &raw.late,
            &raw.missing_timestamp,
            &raw.invalid_number,
            &raw.unknown_customer,
        ];
        if let Some(last) = all.into_iter().flatten().last().filter(|_| 2 * copied + single > MILLION) {
            return Err(self.error(last, "the rates sum to more than 100% (copies count twice: an event and its copy)"));
        }
        if let Some(rate) = raw.invalid_number.as_ref().filter(|_| rates.invalid_number > 0 && event_types.breakable.is_none()) {
            return Err(self.error(rate, "invalid_number needs a meter without filters on a property, such as a sum"));
        }
        if let Some(rate) = raw.unknown_customer.as_ref().filter(|_| rates.unknown_customer > 0 && event_types.metered.is_none())
        {
            return Err(self.error(rate, "unknown_customer needs a meter without filters"));
        }
        Ok(rates)
    }
}

/// Whether this many days can be made up.
pub fn check_days(days: u32) -> Result<(), &'static str> {
    if (1..=10_000).contains(&days) { Ok(()) } else { Err("days must be from 1 to 10000") }
}

/// Whether this many events can be made up.
pub fn check_events(events: u64) -> Result<(), &'static str> {
    if (1..=100_000_000_000).contains(&events) { Ok(()) } else { Err("events must be from 1 to 100000000000") }
}

fn is_skew(skew: f64) -> bool {
    (0.0..=4.0).contains(&skew)
}

fn is_unfiltered(meter: &Node) -> bool {
    match meter.get("filters") {
        None => true,
        Some(Node::List(filters)) => filters.is_empty(),
        Some(_) => false,
    }
}

/// Whether a meter needs a property to be a number.
fn sums(meter: &Node, property: &str) -> bool {
    const NUMERIC: [&str; 5] = ["sum", "avg", "min", "max", "latest"];
    let is_numeric = meter.text("aggregation").is_some_and(|aggregation| NUMERIC.contains(&aggregation));
    is_numeric && meter.text("property") == Some(property)
}

/// The first property that meters need to be a number, whatever the other properties
/// are, and how many meters do.
fn breakable_property(properties: &[Property], meters: &[&Node]) -> Option<(usize, u64)> {
    let rejecting = |name: &str| -> Option<u64> {
        let mut count = 0;
        for meter in meters {
            let mentions = |key: &str| meter.get(key).is_some_and(|node| node.to_string().contains(name));
            if ["expression", "multiplier", "filters", "dimensions", "operation_property"].into_iter().any(mentions) {
                return None;
            }
            if sums(meter, name) {
                count += 1;
                if !is_unfiltered(meter) {
                    return None;
                }
            }
        }
        Some(count).filter(|count| *count > 0)
    };
    let with_count = |(index, property): (usize, &Property)| Some((index, rejecting(&property.name)?));
    properties.iter().enumerate().find_map(with_count)
}

/// `2%` and the like, in millionths.
fn share(text: &str) -> Option<u64> {
    let percent: Decimal = text.trim().strip_suffix('%')?.trim().parse().ok()?;
    let millionths = percent.checked_mul(Decimal::from_u64(MILLION / 100)).ok()?;
    millionths.to_string().parse().ok().filter(|millionths| *millionths <= MILLION)
}

/// A decimal in units of its last place.
fn units(text: &str, places: u32) -> Option<i64> {
    let value: Decimal = text.parse().ok()?;
    let unit = Decimal::from_u64(10u64.checked_pow(places).filter(|_| places <= 18)?);
    value.checked_mul(unit).ok()?.to_string().parse().ok()
}

/// A scalar as JSON.
fn json(node: &Node) -> Option<String> {
    match node {
        Node::Plain(text) => Some(text.clone()),
        Node::Text(text) => {
            let mut json = String::new();
            write_json_text(text, &mut json);
            Some(json)
        }
        Node::List(_) | Node::Map(_) => None,
    }
}
