#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::disallowed_methods)]
//! Everything that users see, tested through the binary, and the promises on
//! made-up histories. One test binary, so that linking stays fast.

mod audit;
mod bad_input;
mod bills;
mod causes;
mod clickhouse_rows;
mod closed;
mod commands;
mod corrections;
mod deployment;
mod explain;
mod generate;
mod golden;
mod histories;
mod incremental;
mod incremental_sources;
mod incremental_windows;
mod inputs;
mod kafka;
mod kafka_topic;
mod kept_matches;
mod lateness;
mod lease;
mod parts;
mod places;
mod promises;
mod reasons;
mod reference;
mod support;
mod taking_back;
