//! Where aggregates, corrections and runs are kept.

pub mod clickhouse;
mod letters;
pub mod lock;
mod reader;
pub mod rows;
pub mod sqlite;

use std::sync::Arc;

use anyhow::{Context as _, Result};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::model::aggregate::{
    Correction, CorrectionKind, DeadLetter, DeadLetterKey, PeriodCorrection, PeriodKey, PeriodRow, StoredWindow, Text, Values,
    WindowKey, WindowRow,
};
use crate::model::run::{LedgerDigests, RunRecord};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;

/// Everything that one run writes, at once or not at all.
#[derive(Debug)]
pub struct Publication {
    pub run: RunRecord,
    /// The last run when the plan was made: another one since makes it stale.
    pub previous_run_id: Option<String>,
    pub upserts: Vec<Arc<WindowRow>>,
    pub retractions: Vec<WindowKey>,
    pub corrections: Vec<Correction>,
    /// The ledger digest of the run before; that of this one is made while it is written.
    pub ledger_before: String,
    pub period_upserts: Vec<PeriodRow>,
    pub period_deletions: Vec<PeriodKey>,
    pub period_corrections: Vec<PeriodCorrection>,
    /// Dead letters of the events that the run covers.
    pub dead_letters: Vec<DeadLetter>,
    /// Dead letters of earlier runs that did not come up again.
    pub resolved: Vec<DeadLetterKey>,
    /// Name and content of states that later runs build on; each replaces the one before.
    pub states: Vec<(String, String)>,
}

impl Publication {
    /// Digests of the ledger with what this run adds to it.
    pub fn ledger(&self) -> LedgerDigests {
        LedgerDigests::of(&self.ledger_before, &self.run, &self.corrections, &self.period_corrections)
    }
}

/// A dead letter as the store has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredDeadLetter {
    pub letter: DeadLetter,
    pub occurrences: u64,
    pub first_run_id: String,
    pub last_run_id: String,
    pub resolved_run_id: Option<String>,
    /// As it was when the row was written.
    pub row_digest: i64,
}

/// A correction as the ledger has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerEntry {
    pub correction_id: String,
    pub run_id: Text,
    pub key: WindowKey,
    pub customer_id: Text,
    pub currency: Text,
    pub kind: Text,
    /// JSON, as written.
    pub causes: Text,
    pub before: Option<Values>,
    pub after: Option<Values>,
    /// JSON of the row that was replaced, as written; empty where there was none.
    pub replaced: String,
    /// As it was when the row was written.
    pub row_digest: i64,
    /// Of the row of `usage_windows` that was written; none in rows of older versions.
    pub after_digest: Option<i64>,
    pub recorded_at: Timestamp,
}

/// A change to `usage_periods` as the ledger has it; rows as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeriodEntry {
    pub correction_id: String,
    pub run_id: String,
    pub key: PeriodKey,
    pub recorded_at: Timestamp,
    /// `change` or `adjust`.
    pub kind: String,
    pub before: String,
    pub after: String,
    pub row_digest: i64,
}

impl LedgerEntry {
    /// Whether it changes no row: what one of a closed period should be.
    pub fn is_adjustment(&self) -> bool {
        *self.kind == *CorrectionKind::Adjust.name()
    }
}

impl PeriodEntry {
    /// Whether it changes no row: what the bill of a closed period should be.
    pub fn is_adjustment(&self) -> bool {
        self.kind == CorrectionKind::Adjust.name()
    }

    /// The row before and after.
    ///
    /// # Errors
    /// Where a text holds no row.
    pub fn rows(&self) -> Result<[Option<PeriodRow>; 2]> {
        let row = |json: &str| (!json.is_empty()).then(|| serde_json::from_str(json)).transpose();
        let rows = row(&self.before).and_then(|before| Ok([before, row(&self.after)?]));
        rows.with_context(|| format!("period_corrections {}: holds no row", self.correction_id))
    }
}

/// Which run wrote a row, as the row says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    pub run_id: String,
    pub version: i64,
    pub updated_at: Timestamp,
}

/// A value of an exported row.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    Null,
    Text(String),
    Integer(i64),
}

/// Which corrections somebody wants.
#[derive(Debug, Clone, Copy)]
pub enum Corrections<'c> {
    /// Of one meter of one subscription.
    OfMeter { tenant_id: &'c str, subscription_id: &'c str, meter_id: &'c str },
    /// Of one run.
    OfRun(&'c str),
}

impl Corrections<'_> {
    /// Whether a correction is among them.
    pub fn hold(&self, entry: &LedgerEntry) -> bool {
        let period = &entry.key.period;
        match *self {
            Corrections::OfMeter { tenant_id, subscription_id, meter_id } => {
                *period.tenant_id == *tenant_id && *period.subscription_id == *subscription_id && *period.meter_id == *meter_id
            }
            Corrections::OfRun(run_id) => *entry.run_id == *run_id,
        }
    }
}

/// Takes the rows of an export, one at a time.
pub type RowSink<'s> = &'s mut dyn FnMut(&[Cell]) -> Result<()>;

/// The tables of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    UsageWindows,
    UsagePeriods,
    Corrections,
    DeadLetters,
    Runs,
}

impl Table {
    pub const NAMES: [(&'static str, Table); 5] = [
        ("usage_windows", Table::UsageWindows),
        ("usage_periods", Table::UsagePeriods),
        ("corrections", Table::Corrections),
        ("dead_letters", Table::DeadLetters),
        ("runs", Table::Runs),
    ];

    /// Columns that hold whole numbers, in any table; the others are text, as decimals must be.
    pub const INTEGERS: [&str; 7] =
        ["event_count", "event_count_before", "event_count_after", "version", "occurrences", "row_digest", "after_digest"];

    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, table)| *table == self).map_or("", |(name, _)| name)
    }

    /// The columns that order and identify its rows within a job.
    pub fn key(self) -> &'static str {
        match self {
            Table::UsageWindows => "tenant_id, subscription_id, meter_id, price_id, dimensions, period_start, window_start",
            Table::UsagePeriods => "tenant_id, subscription_id, meter_id, price_id, dimensions, period_start",
            Table::Corrections => "correction_id",
            Table::DeadLetters => "tenant_id, event_id, meter_id, reason",
            Table::Runs => "version, run_id",
        }
    }
}

/// Tenant and subscription.
pub type SubscriptionKey = (String, String);

/// Rows of `usage_windows` that somebody wants: those of a subscription whose windows touch one
/// of some spans.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct WindowChoice {
    pub subscription: SubscriptionKey,
    /// `None` for all meters.
    pub meter_id: Option<String>,
    /// Sorted, apart from each other; at least one.
    pub spans: Vec<Span>,
}

impl WindowChoice {
    /// From the start of the first to the end of the last window that may be wanted.
    pub fn whole(&self) -> Option<Span> {
        Some(self.spans.first()?.union(*self.spans.last()?))
    }

    /// Whether a window of the subscription is wanted.
    pub fn wants(&self, window: Span) -> bool {
        let at = self.spans.partition_point(|span| span.end <= window.start);
        self.spans.get(at).is_some_and(|span| span.overlaps(window))
    }

    /// Whether a row is one of those that are wanted.
    fn hold_in<'c>(choices: &'c [WindowChoice]) -> impl Fn(&WindowRow) -> bool + 'c {
        let key = |choice: &'c WindowChoice| {
            let (tenant, subscription) = &choice.subscription;
            ((tenant.as_str(), subscription.as_str(), choice.meter_id.as_deref()), choice)
        };
        let wanted: FxHashMap<_, _> = choices.iter().map(key).collect();
        move |row| {
            let PeriodKey { tenant_id, subscription_id, meter_id, .. } = &*row.key.period;
            let of = |meter| wanted.get(&(&**tenant_id, &**subscription_id, meter));
            [of(Some(&**meter_id)), of(None)].into_iter().flatten().any(|choice| choice.wants(row.window()))
        }
    }
}

/// Subscriptions to look up.
struct SubscriptionSet<'s>(FxHashSet<(&'s str, &'s str)>);

impl<'s> SubscriptionSet<'s> {
    fn new(keys: &'s [SubscriptionKey]) -> Self {
        SubscriptionSet(keys.iter().map(|(tenant, id)| (tenant.as_str(), id.as_str())).collect())
    }

    fn holds(&self, key: &PeriodKey) -> bool {
        self.0.contains(&(&*key.tenant_id, &*key.subscription_id))
    }
}

/// A store of aggregates. Reads see one consistent state.
pub trait AggregateStore {
    /// Finished runs of a job, oldest first.
    fn runs(&self, job: &str) -> Result<Vec<RunRecord>>;

    /// Corrections that the store would not find: the table that should lead to them, and
    /// the row that leads nowhere.
    ///
    /// # Errors
    /// Where the store cannot be read.
    fn lost_corrections(&self, _job: &str) -> Result<Vec<(&'static str, String)>> {
        Ok(Vec::new())
    }

    /// A run of which only a part is there yet: somebody publishes it now, or was interrupted.
    ///
    /// # Errors
    /// Where the store cannot be read.
    fn unfinished(&self, _job: &str) -> Result<Option<String>> {
        Ok(None)
    }

    /// From the start of the first to the end of the last stored window.
    fn extent(&self, job: &str) -> Result<Option<Span>>;

    /// Aggregates whose window touches `span`, sorted by key.
    fn windows(&self, job: &str, span: Span) -> Result<Vec<StoredWindow>>;

    /// All aggregates, in any order; none is kept.
    fn each_window(&self, job: &str, each: &mut dyn FnMut(StoredWindow) -> Result<()>) -> Result<()>;

    /// Period rows whose period touches `span`, sorted by key.
    fn periods(&self, job: &str, span: Span) -> Result<Vec<PeriodRow>>;

    /// As [`AggregateStore::windows`], of these choices or all.
    fn windows_of(&self, job: &str, span: Span, choices: Option<&[WindowChoice]>) -> Result<Vec<StoredWindow>> {
        let Some(choices) = choices else { return self.windows(job, span) };
        let Some(whole) = choices.iter().filter_map(WindowChoice::whole).reduce(Span::union) else { return Ok(Vec::new()) };
        let is_wanted = WindowChoice::hold_in(choices);
        let mut windows = self.windows(job, Span { start: span.start.max(whole.start), end: span.end.min(whole.end) })?;
        windows.retain(|stored| is_wanted(&stored.row));
        Ok(windows)
    }

    /// As [`AggregateStore::periods`], of these subscriptions (tenant and id) or of all.
    fn periods_of(&self, job: &str, span: Span, subscriptions: Option<&[SubscriptionKey]>) -> Result<Vec<PeriodRow>> {
        let mut periods = self.periods(job, span)?;
        if let Some(subscriptions) = subscriptions.map(SubscriptionSet::new) {
            periods.retain(|row| subscriptions.holds(&row.key));
        }
        Ok(periods)
    }

    /// Period rows whose period lies outside of `span`, sorted by key.
    fn periods_outside(&self, job: &str, span: Span) -> Result<Vec<PeriodRow>>;

    /// Which run each row of `usage_periods` says that it is of.
    fn period_stamps(&self, job: &str) -> Result<Vec<(PeriodKey, Stamp)>>;

    /// Rows of `usage_windows` whose version and time are not those of their run.
    fn misdated_windows(&self, job: &str) -> Result<Vec<WindowKey>>;

    /// A state of the job that runs keep for later ones: the id of the run that wrote
    /// it, and its content.
    fn state(&self, job: &str, name: &str) -> Result<Option<(String, String)>>;

    /// Dead letters, resolved ones too, oldest run first.
    fn dead_letters(&self, job: &str) -> Result<Vec<StoredDeadLetter>>;

    /// Corrections in the order they were written.
    fn ledger(&self, job: &str, each: &mut dyn FnMut(LedgerEntry) -> Result<()>) -> Result<()>;

    /// Some of the corrections, in the order they were written.
    fn corrections(&self, job: &str, of: Corrections<'_>, each: &mut dyn FnMut(LedgerEntry) -> Result<()>) -> Result<()> {
        self.ledger(job, &mut |entry| if of.hold(&entry) { each(entry) } else { Ok(()) })
    }

    /// Changes to `usage_periods`, in the order they were written.
    fn period_ledger(&self, job: &str, each: &mut dyn FnMut(PeriodEntry) -> Result<()>) -> Result<()>;

    /// Rows of a table, in the order of its key; returns the names of its columns.
    fn export(&self, job: &str, table: Table, each: RowSink<'_>) -> Result<Vec<String>>;

    /// Writes everything, or nothing.
    fn publish(&mut self, publication: &Publication) -> Result<RunRecord>;
}

/// The id of the run after `runs`: a UUIDv7 that sorts after all before it, even if
/// the clock was set back.
pub fn next_run_id(runs: &[RunRecord], now: Timestamp) -> String {
    let millis_of = |run: &RunRecord| Some(uuid::Uuid::parse_str(&run.run_id).ok()?.get_timestamp()?.to_unix().0 * 1000 + 1000);
    let now = u64::try_from(now.nanos() / 1_000_000).unwrap_or_default();
    let last = runs.iter().filter_map(millis_of).max().unwrap_or_default();
    // The last run's second has passed, or is made to have.
    let millis = if runs.last().is_some_and(|run| run.run_id > uuid_at(now)) { last } else { now };
    uuid_at(millis)
}

fn uuid_at(millis: u64) -> String {
    let nanos = u32::try_from(millis % 1000 * 1_000_000).unwrap_or_default();
    uuid::Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, millis / 1000, nanos)).to_string()
}

/// The version of the run after `runs`: greater than all before it.
pub fn next_version(runs: &[RunRecord], now: Timestamp) -> i64 {
    let last = runs.iter().map(|run| run.version).max().unwrap_or_default();
    (now.nanos() / 1_000_000).max(last + 1)
}
