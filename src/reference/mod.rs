//! Reference tables: loaded, checked, and joined into what events are matched with.
//!
//! The tables are Polars frames; [`customers::bind`] joins customers with their
//! subscriptions, and events look their binding up by external id and time.

mod customers;
mod definitions;
mod meters;
mod prices;
mod table;

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::Result;
use rustc_hash::{FxHashMap, FxHashSet};

use crate::config::Job;
use crate::fault::configuration;
use crate::model::basis::ReferenceDigests;
use crate::model::digest::Digest;
use crate::model::meter::{Aggregation, Meter};
use crate::model::price::Price;
use crate::model::timestamp::Timestamp;
use crate::model::window::{BillingCycle, Span, WindowKind};

/// All reference tables of a job, checked.
#[derive(Debug)]
pub struct Reference {
    pub subscriptions: Vec<Subscription>,
    pub meters: Vec<Meter>,
    pub prices: Vec<Price>,
    /// Tenant, then external customer id.
    customers: FxHashMap<String, FxHashMap<String, ExternalCustomer>>,
    /// Plan and meter index, then indexes of prices.
    price_index: FxHashMap<(String, usize), Vec<usize>>,
    /// Tenant and customer of every row of the customers table.
    known: FxHashSet<(String, String)>,
    pub digests: ReferenceDigests,
    /// What is odd but no error.
    pub warnings: Vec<String>,
}

/// A subscription of a customer to a plan.
#[derive(Debug, Clone)]
pub struct Subscription {
    pub tenant_id: String,
    pub id: String,
    pub customer_id: String,
    pub plan_id: String,
    pub currency: String,
    pub cycle: BillingCycle,
    pub active: Span,
    /// Changes when this row changes.
    pub digest: String,
    /// Changes when a row of its customer changes.
    pub customer_digest: String,
}

/// What an external customer id stands for, over time.
#[derive(Debug, Default)]
pub struct ExternalCustomer {
    /// When it stands for which customer.
    pub validity: Vec<(Span, Arc<str>)>,
    /// While the customer is valid and the subscription active: its index.
    pub bindings: Vec<(Span, usize)>,
}

impl ExternalCustomer {
    /// Whom an event at `t` belongs to, with or without a subscription.
    pub fn customer_id(&self, t: Timestamp) -> Option<&str> {
        self.validity.iter().find(|(span, _)| span.contains(t)).map(|(_, id)| &**id)
    }

    /// The index of the subscription that an event at `t` belongs to.
    ///
    /// # Errors
    /// [`Unbound`] where there is not exactly one.
    pub fn subscription(&self, t: Timestamp) -> Result<usize, Unbound> {
        if self.customer_id(t).is_none() {
            return Err(Unbound::CustomerNotFound);
        }
        let mut active = self.bindings.iter().filter(|(span, _)| span.contains(t)).map(|(_, index)| *index);
        match (active.next(), active.next()) {
            (Some(index), None) => Ok(index),
            (None, _) => Err(Unbound::NoActiveSubscription),
            (Some(_), Some(_)) => Err(Unbound::Ambiguous),
        }
    }
}

/// Why no subscription could be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unbound {
    CustomerNotFound,
    NoActiveSubscription,
    /// Several subscriptions are active.
    Ambiguous,
}

/// Why no price could be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unpriced {
    NotFound,
    /// Several prices match equally well.
    Ambiguous,
}

impl Reference {
    /// Loads and checks every table.
    ///
    /// # Errors
    /// A configuration fault that names file, row, reason and remedy.
    pub fn load(job: &Job) -> Result<Reference> {
        let customers = customers::Customers::read(&job.reference.customers)?;
        let subscriptions = customers::Subscriptions::read(&job.reference.subscriptions, job.timezone, &customers)?;
        let meters = meters::read(&job.reference.meters, job.window)?;
        check_settle(job, &meters)?;
        let prices = prices::read(&job.reference.prices, &meters)?;
        let bound = customers::bind(&customers, &subscriptions)?;

        let mut price_index: FxHashMap<_, Vec<usize>> = FxHashMap::default();
        for (index, price) in prices.iter().enumerate() {
            if let Some(meter) = meters.iter().position(|meter| meter.id == price.meter_id) {
                price_index.entry((price.plan_id.clone(), meter)).or_default().push(index);
            }
        }
        let digests = ReferenceDigests {
            customers: customers.digest(),
            subscriptions: list_digest("subscriptions", subscriptions.list.iter().map(|s| s.digest.clone())),
            meters: list_digest("meters", meters.iter().map(|m| format!("{}{}{}", m.id, m.digest, m.unpriced))),
            prices: list_digest("prices", prices.iter().map(Price::row_digest)),
        };
        let warnings = [bound.warnings, plan_warnings(&subscriptions.list, &prices)].concat();
        let known = customers.by_customer.into_keys().collect();
        let customers = bound.customers;
        Ok(Reference { subscriptions: subscriptions.list, meters, prices, customers, price_index, known, digests, warnings })
    }

    /// Refuses a tenant or customer that no table knows: a slip of the pen would
    /// otherwise look like a run that found nothing to do.
    ///
    /// # Errors
    /// A configuration fault that names it.
    pub fn check_scope(&self, tenant: Option<&str>, customer: Option<&str>) -> Result<()> {
        let subscribed = self.subscriptions.iter().map(|s| (s.tenant_id.as_str(), s.customer_id.as_str()));
        let everyone =
            || self.known.iter().map(|(tenant, customer)| (tenant.as_str(), customer.as_str())).chain(subscribed.clone());
        let in_tenant = |of: &str| tenant.is_none_or(|tenant| tenant == of);
        if let Some(tenant) = tenant.filter(|_| !everyone().any(|(of, _)| in_tenant(of))) {
            return Err(configuration(format!("--tenant {tenant} is neither in the customers nor in the subscriptions table")));
        }
        if let Some(customer) = customer.filter(|wanted| !everyone().any(|(of, id)| in_tenant(of) && id == *wanted)) {
            let of = tenant.map_or(String::new(), |tenant| format!(" of tenant {tenant}"));
            return Err(configuration(format!(
                "--customer {customer} is neither in the customers nor in the subscriptions table{of}"
            )));
        }
        Ok(())
    }

    /// The index of the subscription that an event of `external_id` at `t` belongs to.
    ///
    /// # Errors
    /// [`Unbound`] where there is not exactly one.
    pub fn subscription(&self, tenant: &str, external_id: &str, t: Timestamp) -> Result<usize, Unbound> {
        self.customer(tenant, external_id).map_or(Err(Unbound::CustomerNotFound), |customer| customer.subscription(t))
    }

    /// Whether no other meter counts events of the same name.
    pub fn is_alone(&self, meter_id: &str) -> bool {
        let name = self.meters.iter().find(|meter| meter.id == meter_id).map(|meter| &meter.event_name);
        self.meters.iter().filter(|meter| Some(&meter.event_name) == name).count() == 1
    }

    /// What an external id stands for.
    pub fn customer(&self, tenant: &str, external_id: &str) -> Option<&ExternalCustomer> {
        self.customers.get(tenant)?.get(external_id)
    }

    /// The customer rows that lead to a subscription: external id and validity.
    pub fn customers_of(&self, subscription: usize) -> Vec<(&str, Span)> {
        let tenant = self.subscriptions.get(subscription).map(|subscription| subscription.tenant_id.as_str());
        let external = tenant.and_then(|tenant| self.customers.get(tenant)).into_iter().flatten();
        let mut rows = Vec::new();
        for (id, customer) in external {
            let bound: Vec<_> = customer.bindings.iter().filter(|(_, index)| *index == subscription).collect();
            // A binding lies in the validity of the row that it comes from.
            let leads = |row: &&Span| bound.iter().any(|(span, _)| row.covers(*span));
            let validity = customer.validity.iter().map(|(row, _)| row).filter(leads);
            rows.extend(validity.map(|row| (id.as_str(), *row)));
        }
        rows.sort_unstable();
        rows
    }

    /// What every external customer id stands for: tenant, id, and then its meaning.
    pub fn externals(&self) -> impl Iterator<Item = (&str, &str, &ExternalCustomer)> {
        self.customers
            .iter()
            .flat_map(|(tenant, ids)| ids.iter().map(move |(external, customer)| (tenant.as_str(), external.as_str(), customer)))
    }

    /// Whether a meter (of this id, or any) keeps a level over time.
    pub fn has_levels(&self, meter: Option<&str>) -> bool {
        let mut levels = self.meters.iter().filter(|meter| meter.aggregation == Aggregation::WeightedSum);
        levels.any(|level| meter.is_none_or(|wanted| wanted == level.id))
    }

    /// The price of usage at an instant: `Some(None)` where the meter may go without,
    /// `None` where there is not exactly one.
    pub fn price_at(
        &self,
        subscription: &Subscription,
        meter: usize,
        t: Timestamp,
        dimensions: &[(&str, String)],
    ) -> Option<Option<usize>> {
        match self.price(self.candidates(&subscription.plan_id, meter), &subscription.currency, t, dimensions) {
            Ok(price) => Some(Some(price)),
            Err(_) if self.meters.get(meter).is_some_and(|meter| meter.unpriced) => Some(None),
            Err(_) => None,
        }
    }

    /// Until when a level counts under the price that it has at `t`: to the end of the
    /// billing period, of the subscription or of the price, or until another price fits better.
    pub fn level_end(
        &self,
        subscription: &Subscription,
        meter: usize,
        t: Timestamp,
        period: Span,
        dimensions: &[(&str, String)],
    ) -> Timestamp {
        let price = self.price_at(subscription, meter, t, dimensions);
        let end = period.end.min(subscription.active.end);
        let candidates = self.candidates(&subscription.plan_id, meter).iter().filter_map(|price| self.prices.get(*price));
        let bounds = candidates.flat_map(|price| [price.valid.start, price.valid.end]);
        let changes = |at: &Timestamp| *at > t && *at < end && self.price_at(subscription, meter, *at, dimensions) != price;
        bounds.filter(changes).min().unwrap_or(end)
    }

    /// Prices of a meter on a plan.
    pub fn candidates(&self, plan_id: &str, meter: usize) -> &[usize] {
        self.price_index.get(&(plan_id.to_owned(), meter)).map_or(&[], Vec::as_slice)
    }

    /// The one of `candidates` that is valid at `t`, in `currency`, and matches the
    /// dimensions best: the price with the most matching values.
    ///
    /// # Errors
    /// [`Unpriced`] where there is not exactly one.
    pub fn price(
        &self,
        candidates: &[usize],
        currency: &str,
        t: Timestamp,
        dimensions: &[(&str, String)],
    ) -> Result<usize, Unpriced> {
        let holds = |(name, value): &(String, String)| dimensions.iter().any(|(n, v)| n == name && v == value);
        let mut best: Option<(usize, usize)> = None;
        let mut tie = false;
        for &index in candidates {
            let Some(price) = self.prices.get(index) else { continue };
            if price.currency.code != currency || !price.valid.contains(t) || !price.matches.iter().all(holds) {
                continue;
            }
            let rank = price.matches.len();
            match best {
                Some((_, best_rank)) if rank < best_rank => {}
                Some((_, best_rank)) if rank == best_rank => tie = true,
                _ => (best, tie) = (Some((index, rank)), false),
            }
        }
        match best {
            None => Err(Unpriced::NotFound),
            Some(_) if tie => Err(Unpriced::Ambiguous),
            Some((index, _)) => Ok(index),
        }
    }
}

/// A session that may go on has no end yet, after which it could settle.
fn check_settle(job: &Job, meters: &[Meter]) -> Result<()> {
    let session = meters.iter().find(|meter| matches!(meter.window, WindowKind::Session { .. }));
    match session.filter(|_| job.lateness.settle.is_some()) {
        Some(meter) => Err(configuration(format!(
            "{}: lateness.settle is for windows that end by the clock, and meter `{}` has sessions: remove one of them",
            job.path.display(),
            meter.id
        ))),
        None => Ok(()),
    }
}

/// Whether the end of a row's validity is the usual sign for "open": the last day of
/// the year 9999, or the day before it where UTC shows a midnight of the east.
fn is_open_end(text: &str) -> bool {
    ["9999-12-31", "9999-12-30"].iter().any(|day| text.trim().starts_with(day))
}

/// A digest that does not depend on the order of rows.
fn list_digest(domain: &str, rows: impl Iterator<Item = String>) -> String {
    let mut rows: Vec<_> = rows.collect();
    rows.sort();
    rows.iter().fold(Digest::new(domain), |digest, row| digest.text(row)).hex()
}

fn plan_warnings(subscriptions: &[Subscription], prices: &[Price]) -> Vec<String> {
    let priced: BTreeSet<_> = prices.iter().map(|price| price.plan_id.as_str()).collect();
    let plans: BTreeSet<_> = subscriptions.iter().map(|s| s.plan_id.as_str()).collect();
    plans.difference(&priced).map(|plan| format!("plan `{plan}` has subscriptions but no price")).collect()
}
