//! The job file as people write it. Unknown keys are errors.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::connection::RawConnections;
use super::yaml::Placed;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawJob {
    pub version: Placed<u32>,
    pub job: Placed<String>,
    pub timezone: Option<Placed<String>>,
    pub connections: Option<RawConnections>,
    pub source: RawSource,
    pub deduplicate: Option<RawDeduplicate>,
    pub reference: RawReference,
    pub window: Option<Placed<String>>,
    pub store: RawStore,
    pub guard: Option<RawGuard>,
    pub incremental: Option<Placed<String>>,
    pub lateness: Option<RawLateness>,
    pub schedule: Option<RawSchedule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawSource {
    pub kind: Placed<String>,
    pub paths: Option<Vec<String>>,
    pub table: Option<Placed<String>>,
    pub query: Option<Placed<String>>,
    pub topic: Option<Placed<String>>,
    pub margin: Option<Placed<String>>,
    pub tenant_id: Option<Placed<String>>,
    pub columns: Option<BTreeMap<String, Placed<String>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawDeduplicate {
    pub key: Option<Vec<Placed<String>>>,
    pub keep: Option<Placed<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawReference {
    pub customers: RawTable,
    pub subscriptions: RawTable,
    pub meters: RawTable,
    pub prices: RawTable,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawTable {
    pub path: Option<Placed<String>>,
    pub query: Option<Placed<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawStore {
    pub kind: Placed<String>,
    pub path: Option<String>,
    pub database: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawGuard {
    pub max_changed_rows: Option<Placed<String>>,
    pub max_cost_change: Option<Placed<String>>,
    pub max_vanished_rows: Option<Placed<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawLateness {
    pub lookback: Option<Placed<String>>,
    pub settle: Option<Placed<String>>,
    pub horizon: Option<Placed<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawSchedule {
    pub cron: Placed<String>,
    pub timezone: Option<Placed<String>>,
}
