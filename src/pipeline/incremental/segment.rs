//! The form of kept matches: a manifest, and for each segment an index, a file of matches a
//! thread, and a file of distinct values.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rustc_hash::FxHashSet;
use serde::{Deserialize, Serialize};

use super::Marks;
use super::values::Listing;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::pipeline::matches::Partitioning;
use crate::pipeline::spill::Piece;
use crate::pipeline::state::index;
use crate::reference::Reference;

/// Says which segments there are, and of which run.
pub(super) const MANIFEST: &str = "matches.json";
pub(super) const VERSION: u32 = 4;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub version: u32,
    pub run_id: String,
    /// From the oldest to the newest.
    pub segments: Vec<Listed>,
}

impl Manifest {
    /// `None` where there is none, or none that can be read.
    pub fn read(folder: &Path) -> Option<Manifest> {
        serde_json::from_slice(&fs::read(folder.join(MANIFEST)).ok()?).ok()
    }

    /// Writes it as a whole or not at all.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let partial = folder.join(MANIFEST).with_extension("json.partial");
        fs::write(&partial, serde_json::to_vec(self)?)?;
        Ok(fs::rename(&partial, folder.join(MANIFEST))?)
    }
}

/// A segment in the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// The run or the plan that wrote it: its files begin with that.
    pub name: String,
    /// Of the file of its index.
    pub checksum: u64,
}

/// What the numbers in the matches of a segment stand for, and where they lie.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Index {
    /// `None` where they are those of the segment before.
    pub tables: Option<Tables>,
    pub shards: Vec<ShardIndex>,
    pub replaced: Replaced,
    pub lists: Vec<Listing>,
    /// Bytes of the file of the values in these lists.
    pub lists_length: u64,
    /// Meters with usage that costs an amount with more than 18 places, which is rounded.
    pub rounded: Vec<usize>,
}

/// The rows of the reference tables, as far as matches name them by number.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tables {
    /// Tenant and id, and the part that holds their matches.
    pub subscriptions: Vec<(String, String, u32)>,
    pub meters: Vec<String>,
    /// Digests of their rows.
    pub prices: Vec<String>,
}

/// What one thread wrote, in a file of its own.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ShardIndex {
    pub spans: Vec<Nanos>,
    pub dimensions: Vec<String>,
    pub pieces: Vec<Piece>,
    /// Bytes of the file.
    pub length: u64,
}

/// Matches of older segments that count no more: those of events that were read again, in
/// windows that were marked.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Replaced {
    /// The upper and the lower half of each event's identity.
    pub events: Vec<(u64, u64)>,
    /// By subscription and meter of the segment.
    pub spans: Vec<(usize, usize, Vec<Nanos>)>,
}

/// A span of time: its start and its end.
pub(super) type Nanos = (i64, i64);

impl Tables {
    pub fn of(reference: &Reference, parts: &Partitioning) -> Tables {
        let subscription = |(at, row): (usize, &crate::reference::Subscription)| {
            (row.tenant_id.clone(), row.id.clone(), u32::try_from(parts.part(index(at))).unwrap_or_default())
        };
        Tables {
            subscriptions: reference.subscriptions.iter().enumerate().map(subscription).collect(),
            meters: reference.meters.iter().map(|meter| meter.id.clone()).collect(),
            prices: reference.prices.iter().map(crate::model::price::Price::row_digest).collect(),
        }
    }
}

impl Replaced {
    pub fn of(events: &FxHashSet<u128>, marks: Option<&Marks>) -> Replaced {
        if events.is_empty() {
            return Replaced::default();
        }
        let half = |bits: u128| u64::try_from(bits & u128::from(u64::MAX)).unwrap_or_default();
        let spans = marks.into_iter().flat_map(Marks::spans);
        Replaced {
            events: events.iter().map(|identity| (half(identity >> 64), half(*identity))).collect(),
            spans: spans.map(|((subscription, meter), spans)| (subscription, meter, spans.iter().map(nanos).collect())).collect(),
        }
    }
}

pub(super) fn nanos(span: Span) -> Nanos {
    (span.start.nanos(), span.end.nanos())
}

pub(super) fn span((start, end): Nanos) -> Span {
    Span { start: Timestamp::from_nanos(start), end: Timestamp::from_nanos(end) }
}

pub(super) fn matches_path(folder: &Path, segment: &str, shard: usize) -> PathBuf {
    folder.join(format!("{segment}.{shard}.matches"))
}

pub(super) fn values_path(folder: &Path, segment: &str) -> PathBuf {
    folder.join(format!("{segment}.values"))
}

pub(super) fn index_path(folder: &Path, segment: &str) -> PathBuf {
    folder.join(format!("{segment}.index"))
}
