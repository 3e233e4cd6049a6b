//! Where every event and every match went (promise 1, conservation).

use serde::Serialize;

/// Events by where they ended. Every event read is in exactly one of the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct EventCounts {
    pub read: u64,
    /// Outside of the run's range or of the tenant, customer or meter asked for.
    pub out_of_range: u64,
    /// Copies that were not kept.
    pub duplicates: u64,
    pub voided: u64,
    /// No meter counts them.
    pub unmatched: u64,
    pub dead_lettered: u64,
    pub metered: u64,
}

impl EventCounts {
    pub fn merge(&mut self, other: &EventCounts) {
        self.read += other.read;
        self.out_of_range += other.out_of_range;
        self.duplicates += other.duplicates;
        self.voided += other.voided;
        self.unmatched += other.unmatched;
        self.dead_lettered += other.dead_lettered;
        self.metered += other.metered;
    }
}

/// Matches of an event with a meter. Every match is in exactly one of the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct UsageCounts {
    pub matches: u64,
    pub counted: u64,
    /// The metered property is absent or null.
    pub skipped: u64,
    /// Dead letters of one meter.
    pub rejected: u64,
}

impl UsageCounts {
    pub fn merge(&mut self, other: &UsageCounts) {
        self.matches += other.matches;
        self.counted += other.counted;
        self.skipped += other.skipped;
        self.rejected += other.rejected;
    }
}

/// Rows of `usage_windows` by what happened to them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct RowCounts {
    pub inserted: u64,
    pub updated: u64,
    pub retracted: u64,
    pub unchanged: u64,
    /// Differences in closed periods: recorded, not written over.
    pub adjusted: u64,
}

impl RowCounts {
    /// Corrections of any kind.
    pub fn changed(&self) -> u64 {
        self.inserted + self.updated + self.retracted + self.adjusted
    }
}
