//! What the reference tables meant to the baseline, row by row: so that a later run
//! knows which rows changed.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::model::digest::Digest;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::reference::{ExternalCustomer, Reference};

/// Under this name the store keeps it.
pub const STATE: &str = "reference";
const VERSION: u32 = 2;

/// The reference tables as digests of their rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    version: u32,
    /// The end of the range when levels were carried on.
    pub levels_until: i64,
    /// By tenant and external id.
    externals: BTreeMap<String, BTreeMap<String, External>>,
    /// By tenant and id: the digest.
    subscriptions: BTreeMap<String, BTreeMap<String, String>>,
    /// By id.
    meters: BTreeMap<String, MeterRow>,
    /// By digest.
    prices: BTreeMap<String, PriceRow>,
}

/// What an external id of a customer stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct External {
    digest: String,
    /// Of whom it stands for when, with or without a subscription.
    customers: String,
    subscriptions: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct MeterRow {
    digest: String,
    event_name: String,
}

/// A price, as far as it says what depends on it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PriceRow {
    pub id: String,
    pub plan_id: String,
    pub meter_id: String,
    valid: (i64, i64),
}

impl PriceRow {
    pub fn valid(&self) -> Span {
        Span { start: Timestamp::from_nanos(self.valid.0), end: Timestamp::from_nanos(self.valid.1) }
    }
}

/// An external id of a customer that stands for something else.
#[derive(Debug)]
pub struct ChangedExternal {
    pub tenant: String,
    pub id: String,
    /// The subscriptions that it stood for.
    pub subscriptions: Vec<String>,
    /// Whether the customers table says so, rather than that of subscriptions.
    pub is_other_customer: bool,
}

/// Rows of the reference tables that are not what they were.
#[derive(Debug, Default)]
pub struct Differences {
    pub externals: Vec<ChangedExternal>,
    /// Tenant and id.
    pub subscriptions: BTreeSet<(String, String)>,
    /// With the names of the events that they counted and count.
    pub meters: BTreeMap<String, BTreeSet<String>>,
    pub prices: BTreeSet<PriceRow>,
}

impl Differences {
    /// `price p, meter m and 3 more`, for people.
    pub fn in_words(&self) -> Vec<String> {
        let externals = self.externals.iter().map(|external| format!("customer {} of tenant {}", external.id, external.tenant));
        let subscriptions = self.subscriptions.iter().map(|(tenant, id)| format!("subscription {id} of tenant {tenant}"));
        let meters = self.meters.keys().map(|id| format!("meter {id}"));
        let prices: BTreeSet<_> = self.prices.iter().map(|price| format!("price {}", price.id)).collect();
        meters.chain(prices).chain(subscriptions).chain(externals).collect()
    }
}

impl Snapshot {
    pub fn of(reference: &Reference, levels_until: Timestamp) -> Snapshot {
        let mut externals: BTreeMap<String, BTreeMap<String, External>> = BTreeMap::new();
        for (tenant, id, customer) in reference.externals() {
            externals.entry(tenant.to_owned()).or_default().insert(id.to_owned(), External::of(customer, reference));
        }
        let mut subscriptions: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for row in &reference.subscriptions {
            subscriptions.entry(row.tenant_id.clone()).or_default().insert(row.id.clone(), row.digest.clone());
        }
        let meter = |meter: &crate::model::meter::Meter| {
            let digest = Digest::new("meter row").text(&meter.digest).text(&meter.unpriced.to_string()).hex();
            (meter.id.clone(), MeterRow { digest, event_name: meter.event_name.clone() })
        };
        let price = |price: &crate::model::price::Price| {
            let valid = (price.valid.start.nanos(), price.valid.end.nanos());
            let [id, plan_id, meter_id] = [&price.id, &price.plan_id, &price.meter_id].map(String::clone);
            (price.row_digest(), PriceRow { id, plan_id, meter_id, valid })
        };
        Snapshot {
            version: VERSION,
            levels_until: levels_until.nanos(),
            externals,
            subscriptions,
            meters: reference.meters.iter().map(meter).collect(),
            prices: reference.prices.iter().map(price).collect(),
        }
    }

    /// As text, compressed.
    ///
    /// # Errors
    /// None that could be told.
    pub fn encode(&self) -> Result<String> {
        Ok(STANDARD.encode(zstd::encode_all(serde_json::to_vec(self)?.as_slice(), 3)?))
    }

    /// # Errors
    /// Where the text is no snapshot of this version.
    pub fn decode(text: &str) -> Result<Snapshot> {
        let bytes = STANDARD.decode(text).context("no base64")?;
        let snapshot: Snapshot = serde_json::from_slice(&zstd::decode_all(bytes.as_slice())?)?;
        ensure!(snapshot.version == VERSION, "version {}", snapshot.version);
        Ok(snapshot)
    }

    /// What differs in `now`.
    pub fn differences(&self, now: &Snapshot) -> Differences {
        let mut differences = Differences::default();
        for (tenant, id) in changed(&self.externals, &now.externals) {
            let [before, after] = [self, now].map(|of| of.externals.get(&tenant).and_then(|ids| ids.get(&id)));
            let subscriptions = before.map(|external| external.subscriptions.clone()).unwrap_or_default();
            let is_other_customer = before.map(|external| &external.customers) != after.map(|external| &external.customers);
            differences.externals.push(ChangedExternal { tenant, id, subscriptions, is_other_customer });
        }
        differences.subscriptions = changed(&self.subscriptions, &now.subscriptions);
        for (rows, others) in [(&self.meters, &now.meters), (&now.meters, &self.meters)] {
            for (id, row) in rows.iter().filter(|(id, row)| others.get(*id) != Some(*row)) {
                differences.meters.entry(id.clone()).or_default().insert(row.event_name.clone());
            }
        }
        for (rows, others) in [(&self.prices, &now.prices), (&now.prices, &self.prices)] {
            let gone = rows.iter().filter(|(digest, _)| !others.contains_key(*digest));
            differences.prices.extend(gone.map(|(_, row)| row.clone()));
        }
        differences
    }
}

impl External {
    fn of(customer: &ExternalCustomer, reference: &Reference) -> External {
        let mut meaning: Vec<String> = customer.validity.iter().map(|(span, _)| format!("valid {span:?}")).collect();
        let mut subscriptions = BTreeSet::new();
        for (span, index) in &customer.bindings {
            let id = reference.subscriptions.get(*index).map_or("", |subscription| &subscription.id);
            meaning.push(format!("{id} {span:?}"));
            subscriptions.insert(id.to_owned());
        }
        meaning.sort();
        let digest = meaning.iter().fold(Digest::new("external"), |digest, text| digest.text(text)).hex();
        let mut customers: Vec<_> = customer.validity.iter().map(|(span, id)| format!("{id} {span:?}")).collect();
        customers.sort();
        let customers = customers.iter().fold(Digest::new("customers of"), |digest, text| digest.text(text)).hex();
        External { digest, customers, subscriptions: subscriptions.into_iter().collect() }
    }
}

type ByTenant<T> = BTreeMap<String, BTreeMap<String, T>>;

/// Tenant and id of the rows that are on one side alone, or not the same.
fn changed<T: PartialEq>(before: &ByTenant<T>, after: &ByTenant<T>) -> BTreeSet<(String, String)> {
    let mut changed = BTreeSet::new();
    for (rows, others) in [(before, after), (after, before)] {
        for (tenant, ids) in rows {
            let others = others.get(tenant);
            let differs = |(id, row): &(&String, &T)| others.and_then(|others| others.get(*id)) != Some(*row);
            changed.extend(ids.iter().filter(differs).map(|(id, _)| (tenant.clone(), id.clone())));
        }
    }
    changed
}
