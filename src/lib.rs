//! Trueup recomputes usage and cost windows from raw events, compares them with
//! what is stored, writes only what differs, and keeps a ledger of every
//! correction and its cause.
//!
//! ```text
//! read -> deduplicate -> enrich -> aggregate -> price -> reconcile -> publish -> audit
//! ```
//!
//! [`pipeline`] owns that order; [`source`] and [`store`] are its two ends,
//! [`reference`] what events are matched with, [`model`] the words.

pub mod audit;
pub mod cli;
pub mod clickhouse_client;
pub mod clock;
pub mod config;
pub mod ends;
pub mod fault;
pub mod generate;
pub mod interrupt;
pub mod model;
pub mod pipeline;
pub mod reference;
pub mod schedule;
pub mod source;
pub mod store;
pub mod telemetry;
mod whole_file;
mod workers;
