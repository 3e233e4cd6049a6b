//! Proving that the store says what the events and the ledger say.

pub mod explain;
mod ledger;
pub mod report;

pub use ledger::check_ledger;

use crate::model::aggregate::{PeriodKey, WindowKey};

/// Something that the ledger does not bear out.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// The table.
    pub table: &'static str,
    /// The row.
    pub row: String,
    pub problem: String,
}

/// A window's key for people.
pub fn describe(key: &WindowKey) -> String {
    format!("{} / {}", describe_accumulation(&key.period), key.window_start)
}

/// A billing period's key for people.
pub fn describe_period(key: &PeriodKey) -> String {
    format!("{} / period {}", describe_accumulation(key), key.period_start)
}

fn describe_accumulation(period: &PeriodKey) -> String {
    let mut text = format!("{} / {} / {}", period.tenant_id, period.subscription_id, period.meter_id);
    if &*period.dimensions != "{}" {
        text.push_str(&format!(" {}", period.dimensions));
    }
    if !period.price_id.is_empty() {
        text.push_str(&format!(" / {}", period.price_id));
    }
    text
}
