//! Where raw events come from.

pub mod arrow_batch;
pub mod batch;
pub mod clickhouse;
pub mod files;
mod json_event;
pub mod kafka;

use std::collections::BTreeSet;

use anyhow::Result;

use crate::model::run::InputFile;
use crate::model::window::Span;

pub use crate::model::columns::{ColumnMap, Field};
pub use batch::{BatchBuilder, EventBatch, EventRef, Problem, Texts};

/// A part of a source that one thread reads from start to end.
#[derive(Debug, Clone)]
pub struct Split {
    /// What people call it: a file's path.
    pub name: String,
    /// The same however the job is started: the absolute path.
    pub identity: String,
    /// Changes when the content may have changed.
    pub fingerprint: String,
    /// What shows later that the content is still the same, where the fingerprint does not.
    pub evidence: Option<String>,
    /// Rows that the source itself announces, where it does.
    pub announced_rows: Option<u64>,
    pub part: Part,
}

/// The part of the named thing that a split is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// Of a Parquet file.
    RowGroup(usize),
    /// Some rows of a row group, from `start` on: what one of several threads reads of a split.
    Slice {
        group: usize,
        start: u64,
        rows: u64,
    },
    /// Rows that a SQL condition selects; a weaker one lets the server skip others.
    Rows {
        condition: String,
        hint: Option<String>,
    },
    /// Of a Kafka partition, the end not included.
    Offsets {
        partition: i32,
        start: i64,
        end: i64,
        /// Whether what lies before is in parts of its own.
        continues: bool,
    },
}

/// What of a source a computation needs. A source may deliver more, and must
/// deliver every copy of an event of which it delivers one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// Events of this span; `None` for all.
    pub span: Option<Span>,
    pub tenant: Option<String>,
}

impl Split {
    /// What a run that read so many rows of it records.
    pub fn input(&self, rows: u64) -> InputFile {
        InputFile { name: self.label(), fingerprint: self.fingerprint.clone(), rows, evidence: self.evidence.clone() }
    }

    /// The identity, with the part where there are several.
    pub fn label(&self) -> String {
        match &self.part {
            Part::Whole => self.identity.clone(),
            Part::RowGroup(group) | Part::Slice { group, .. } => format!("{}#{group}", self.identity),
            Part::Rows { condition, .. } => format!("{}?{condition}", self.identity),
            Part::Offsets { partition, continues: false, .. } => format!("{}/{partition}", self.identity),
            Part::Offsets { partition, start, .. } => format!("{}/{partition}@{start}", self.identity),
        }
    }
}

/// What an earlier run read is not there any more as it was.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Moved(pub String);

impl Moved {
    /// Whether that is why something failed.
    pub fn is_in(error: &anyhow::Error) -> bool {
        error.chain().any(|cause| cause.is::<Moved>())
    }
}

/// Which columns a scan needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted<'f> {
    /// These fields, the time of the event, and what no key is without: tenant and id.
    Keys(&'f [Field]),
    /// Everything.
    Whole,
}

impl Wanted<'_> {
    /// Whether a field is among them.
    pub fn holds(self, field: Field) -> bool {
        match self {
            Wanted::Whole => true,
            Wanted::Keys(fields) => matches!(field, Field::TenantId | Field::Id | Field::Timestamp) || fields.contains(&field),
        }
    }
}

/// Chooses rows by some of their fields, before they are read as a whole.
pub trait RowChoice: Sync {
    /// The fields that it looks at.
    fn fields(&self) -> &[Field];

    /// Whether a row is wanted; all other fields may be missing here.
    fn wants(&self, event: &EventRef<'_>) -> bool;

    /// Tenant and id of all wanted rows, and perhaps others, where they are known.
    fn names(&self) -> Option<&Names> {
        None
    }

    /// As [`RowChoice::wants`], for one batch after the other.
    fn chooser<'c>(&'c self) -> Chooser<'c> {
        Box::new(|batch| batch.rows().enumerate().filter(|(_, event)| self.wants(event)).map(|(row, _)| row).collect())
    }
}

/// Tenants and ids of events.
pub type Names = BTreeSet<(String, String)>;

/// Gives the rows of a batch that are wanted.
pub type Chooser<'c> = Box<dyn FnMut(&EventBatch) -> Vec<usize> + 'c>;

/// A set of raw events that can be read several times with the same result.
pub trait EventSource: Sync {
    /// Whether it can be read at all, and what there is, in a few words.
    ///
    /// # Errors
    /// What is missing: a file, a server, a table, a column, a topic.
    fn probe(&self) -> Result<String>;

    /// What there is to read, now.
    fn splits(&self, selection: &Selection) -> Result<Vec<Split>>;

    /// Everything there is to read, now, in such splits that those of `before`, which an
    /// earlier run read, come again with their labels, and with their fingerprints unless they
    /// changed; what came later is in splits of its own.
    ///
    /// # Errors
    /// As [`EventSource::splits`], or [`Moved`] where nothing tells what came later.
    fn splits_since(&self, _before: &[InputFile]) -> Result<Vec<Split>> {
        self.splits(&Selection::default())
    }

    /// Whether rows that have no time are read too, whatever the selection.
    fn reads_rows_without_time(&self, selection: &Selection) -> bool {
        selection.span.is_none()
    }

    /// Whether what was read is still there as it was when `splits` was made.
    ///
    /// # Errors
    /// The first that changed meanwhile.
    fn check_unchanged(&self, _splits: &[Split]) -> Result<()> {
        Ok(())
    }

    /// A split in at most so many slices that can be read each on its own; a single one where it
    /// is small or cannot be divided.
    fn slices(&self, split: &Split, _most: usize) -> Vec<Split> {
        vec![split.clone()]
    }

    /// Reads one split, or a slice of one, in batches, in its own order.
    ///
    /// # Errors
    /// Where the split cannot be delivered as a whole. Rows that are no events
    /// are not errors: they are delivered as [`Problem`]s.
    fn read(&self, split: &Split, wanted: Wanted<'_>, sink: &mut dyn FnMut(&EventBatch) -> Result<()>) -> Result<()>;

    /// Reads the rows of a split that `choice` wants, and perhaps others. Returns how
    /// many it left out.
    ///
    /// # Errors
    /// As [`EventSource::read`].
    fn read_chosen(
        &self,
        split: &Split,
        _choice: &dyn RowChoice,
        sink: &mut dyn FnMut(&EventBatch) -> Result<()>,
    ) -> Result<u64> {
        self.read(split, Wanted::Whole, sink)?;
        Ok(0)
    }
}
