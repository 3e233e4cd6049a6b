//! The profile as people write it. Unknown keys are errors.

use serde::Deserialize;

use super::node::{Definition, Node};
use crate::config::yaml::Placed;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawProfile {
    pub version: Placed<u32>,
    pub name: Placed<String>,
    #[serde(default)]
    pub seed: u64,
    pub timezone: Option<Placed<String>>,
    pub start: Placed<String>,
    pub days: Placed<u32>,
    pub events: Placed<u64>,
    pub window: Option<Placed<String>>,
    pub customers: RawCustomers,
    #[serde(default)]
    pub rates: RawRates,
    pub event_types: Placed<Vec<Placed<RawEventType>>>,
    pub meters: Placed<Vec<Definition>>,
    #[serde(default)]
    pub prices: Vec<Definition>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawCustomers {
    pub count: Placed<u32>,
    pub tenants: Option<Placed<u32>>,
    pub skew: Option<Placed<f64>>,
    pub plans: Placed<Vec<Placed<RawPlan>>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPlan {
    pub plan_id: String,
    pub currency: Placed<String>,
    pub billing_period: Option<Placed<String>>,
    pub weight: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawRates {
    pub duplicates: Option<Placed<String>>,
    pub amended: Option<Placed<String>>,
    pub voided: Option<Placed<String>>,
    pub late: Option<Placed<String>>,
    pub late_days: Option<Placed<u32>>,
    pub missing_timestamp: Option<Placed<String>>,
    pub invalid_number: Option<Placed<String>>,
    pub unknown_customer: Option<Placed<String>>,
    pub near_clock_change: Option<Placed<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawEventType {
    pub event_name: String,
    pub weight: Option<u32>,
    #[serde(default)]
    pub properties: Vec<Placed<RawProperty>>,
}

/// One of the kinds, by its key.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawProperty {
    pub name: String,
    pub integer: Option<RawInteger>,
    pub decimal: Option<RawDecimal>,
    pub choice: Option<Vec<RawChoice>>,
    pub pool: Option<RawPool>,
    pub constant: Option<Node>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawInteger {
    pub min: i64,
    pub max: i64,
    #[serde(default)]
    pub skew: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawDecimal {
    pub min: String,
    pub max: String,
    pub places: u32,
    #[serde(default)]
    pub skew: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawChoice {
    pub value: Node,
    pub weight: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPool {
    pub prefix: String,
    pub size: u32,
    #[serde(default)]
    pub skew: f64,
}
