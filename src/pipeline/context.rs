//! What enrichment and aggregation rest on.

use std::path::PathBuf;

use super::deduplicate::RepeatedKeys;
use super::enrich::Enricher;
use super::incremental::marks::Marks;
use super::letters::OpenDeadLetters;
use super::matches::Partitioning;
use crate::config::Deduplicate;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;

/// Settings of one computation, shared by all threads.
pub struct Context<'r> {
    pub enricher: Enricher<'r>,
    pub rules: &'r Deduplicate,
    pub timezone: chrono_tz::Tz,
    /// The windows to compute.
    pub range: Span,
    /// The billing periods that the range touches lie in here: usage outside of
    /// the range, but inside of it, is needed for pricing.
    pub reach: Span,
    pub parts: Partitioning,
    pub repeated: RepeatedKeys,
    /// The first and the last event that counted in the run that this one builds on.
    pub times_before: Option<(Timestamp, Timestamp)>,
    pub open_dead_letters: OpenDeadLetters,
    /// What is computed, where it is not everything.
    pub marks: Option<Marks>,
    /// Whether matches of what is marked were kept by earlier runs.
    pub has_kept: bool,
    /// Where matches are kept for later runs.
    pub keep_in: Option<PathBuf>,
}
