//! What a run computes: which part of a job, with which reference tables.

use serde::{Deserialize, Serialize};

/// What part of a job is computed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    pub tenant: Option<String>,
    /// A customer id, not an external one.
    pub customer: Option<String>,
    pub meter: Option<String>,
}

impl Scope {
    pub fn is_whole(&self) -> bool {
        *self == Scope::default()
    }

    /// Whether rows of this tenant, customer and meter belong to the scope.
    pub fn holds(&self, tenant: &str, customer: &str, meter: &str) -> bool {
        let wants = |wanted: &Option<String>, value: &str| wanted.as_ref().is_none_or(|wanted| wanted == value);
        wants(&self.tenant, tenant) && wants(&self.customer, customer) && wants(&self.meter, meter)
    }
}

/// A digest of each table, over its content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReferenceDigests {
    pub customers: String,
    pub subscriptions: String,
    pub meters: String,
    pub prices: String,
}
