//! Where raw events come from.

pub mod batch;
pub mod files;

use anyhow::Result;

use files::Field;

pub use batch::{BatchBuilder, EventBatch, EventRef, Problem};

/// A part of a source that one thread reads from start to end.
#[derive(Debug, Clone)]
pub struct Split {
    /// What people call it: a file's path.
    pub name: String,
    /// The same however the job is started: the absolute path.
    pub identity: String,
    /// Changes when the content may have changed.
    pub fingerprint: String,
    /// Rows that the source itself announces, where it does.
    pub announced_rows: Option<u64>,
    /// Index into the source's own list.
    pub unit: usize,
    /// The part of the unit, for units that are read in several splits.
    pub part: Option<usize>,
}

impl Split {
    /// The identity, with the part where there are several.
    pub fn label(&self) -> String {
        match self.part {
            Some(part) => format!("{}#{part}", self.identity),
            None => self.identity.clone(),
        }
    }
}

/// Which columns a scan needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted<'f> {
    /// These fields, and the time of the event.
    Keys(&'f [Field]),
    /// Everything.
    Whole,
}

/// A set of raw events that can be read several times with the same result.
pub trait EventSource: Sync {
    /// What there is to read, now.
    fn splits(&self) -> Result<Vec<Split>>;

    /// Reads one split in batches, in its own order.
    ///
    /// # Errors
    /// Where the split cannot be delivered as a whole. Rows that are no events
    /// are not errors: they are delivered as [`Problem`]s.
    fn read(&self, split: &Split, wanted: Wanted<'_>, sink: &mut dyn FnMut(&EventBatch) -> Result<()>) -> Result<()>;
}
