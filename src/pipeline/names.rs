//! Names in place of the indexes that states are kept by.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::state::{Interner, NO_PRICE, StateKey};
use crate::model::aggregate::{Basis, PeriodKey, Text, WindowKey};
use crate::reference::Reference;

/// Names of reference rows, shared by all rows that repeat them.
pub struct Names {
    subscriptions: Vec<SubscriptionNames>,
    meters: Vec<(Text, Text)>,
    prices: Vec<(Text, Text)>,
    none: Text,
}

struct SubscriptionNames {
    tenant: Text,
    id: Text,
    customer: Text,
    currency: Text,
    digest: Text,
    customer_digest: Text,
}

/// The names of one row beside its key.
pub struct RowNames {
    pub customer: Text,
    pub currency: Text,
    pub basis: Arc<Basis>,
}

impl Names {
    pub fn new(reference: &Reference) -> Self {
        let mut shared: FxHashMap<String, Text> = FxHashMap::default();
        let mut share = |text: &str| shared.entry(text.to_owned()).or_insert_with(|| Arc::from(text)).clone();
        Names {
            subscriptions: reference
                .subscriptions
                .iter()
                .map(|s| SubscriptionNames {
                    tenant: share(&s.tenant_id),
                    id: share(&s.id),
                    customer: share(&s.customer_id),
                    currency: share(&s.currency),
                    digest: share(&s.digest),
                    customer_digest: share(&s.customer_digest),
                })
                .collect(),
            meters: reference.meters.iter().map(|m| (share(&m.id), share(&m.digest))).collect(),
            prices: reference.prices.iter().map(|p| (share(&p.id), share(&p.digest))).collect(),
            none: Arc::from(""),
        }
    }

    pub fn period_key(&self, key: &StateKey, dimensions: &Interner) -> PeriodKey {
        let subscription = self.subscriptions.get(key.subscription as usize);
        PeriodKey {
            tenant_id: subscription.map_or_else(|| self.none.clone(), |s| s.tenant.clone()),
            subscription_id: subscription.map_or_else(|| self.none.clone(), |s| s.id.clone()),
            meter_id: self.meters.get(key.meter as usize).map_or_else(|| self.none.clone(), |(id, _)| id.clone()),
            price_id: self.price(key.price).0,
            dimensions: dimensions.text(key.dimensions),
            period_start: key.period_start,
        }
    }

    /// The key of a window whose events were withdrawn.
    pub fn window_key(&self, key: &StateKey, dimensions: &Interner) -> WindowKey {
        WindowKey { period: Arc::new(self.period_key(key, dimensions)), window_start: key.window_start }
    }

    fn price(&self, price: u32) -> (Text, Text) {
        let found = if price == NO_PRICE { None } else { self.prices.get(price as usize) };
        found.cloned().unwrap_or_else(|| (self.none.clone(), self.none.clone()))
    }

    pub fn of(&self, key: &StateKey) -> RowNames {
        let none = || self.none.clone();
        let subscription = self.subscriptions.get(key.subscription as usize);
        RowNames {
            customer: subscription.map_or_else(none, |s| s.customer.clone()),
            currency: subscription.map_or_else(none, |s| s.currency.clone()),
            basis: Arc::new(Basis {
                meter: self.meters.get(key.meter as usize).map_or_else(none, |(_, digest)| digest.clone()),
                price: self.price(key.price).1,
                subscription: subscription.map_or_else(none, |s| s.digest.clone()),
                customer: subscription.map_or_else(none, |s| s.customer_digest.clone()),
            }),
        }
    }
}
