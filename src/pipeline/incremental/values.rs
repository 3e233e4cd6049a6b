//! The distinct values of unique counts by billing period, as runs keep them for later ones. As
//! long as nothing is taken away, windows that are not looked at add to a period what they did:
//! none of their events is needed.
//!
//! A segment has a list of a whole period, or of what it adds to those of older segments.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::xxh3_64;

use super::marks::Pair;
use crate::model::timestamp::Timestamp;
use crate::pipeline::spill::partial;
use crate::pipeline::state::{Interner, NO_PRICE, StateKey};

/// Bytes of a value.
const WIDTH: u64 = 16;

/// A unique count in a billing period, by the numbers of now.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct ListKey {
    pub pair: Pair,
    /// [`NO_PRICE`] for usage without a price.
    pub price: u32,
    pub dimensions: String,
    pub period_start: Timestamp,
}

/// What is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueList {
    /// How many values there are.
    pub count: u64,
    /// The end of its last window.
    pub until: Timestamp,
    /// By segment, from the oldest to the newest; no value is in two of them.
    pub(super) pieces: Vec<(usize, ListPiece)>,
}

/// Values in the file of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ListPiece {
    start: u64,
    count: u64,
    checksum: u64,
}

/// A list as a segment has it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Listing {
    /// Numbers in the tables of the segment.
    pub subscription: usize,
    pub meter: usize,
    pub price: Option<usize>,
    pub dimensions: String,
    pub period_start: i64,
    pub until: i64,
    /// Whether older lists count no more.
    pub is_whole: bool,
    pub piece: ListPiece,
}

impl ValueList {
    /// Adds what a newer segment has.
    pub(super) fn add(known: Option<ValueList>, segment: usize, listing: &Listing) -> Option<ValueList> {
        let until = Timestamp::from_nanos(listing.until);
        let known = match known {
            _ if listing.is_whole => ValueList { count: 0, until, pieces: Vec::new() },
            // What it adds to is not known.
            None => return None,
            Some(known) => known,
        };
        let mut pieces = known.pieces;
        pieces.push((segment, listing.piece));
        Some(ValueList { count: known.count + listing.piece.count, until: known.until.max(until), pieces })
    }
}

/// Reads values from the file of a segment.
///
/// # Errors
/// Where they are not what was written.
pub(super) fn read(file: &mut File, piece: &ListPiece, out: &mut Vec<u128>) -> io::Result<()> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(piece.start))?;
    file.take(piece.count.saturating_mul(WIDTH)).read_to_end(&mut bytes)?;
    if xxh3_64(&bytes) != piece.checksum {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "they are not what was written"));
    }
    out.extend(bytes.as_chunks().0.iter().map(|value| u128::from_le_bytes(*value)));
    Ok(())
}

/// Lists that the periods of one part of the subscriptions have or add.
#[derive(Debug, Default)]
pub struct NewLists {
    bytes: Vec<u8>,
    lists: Vec<NewList>,
}

#[derive(Debug)]
struct NewList {
    /// Of a window of the period.
    key: StateKey,
    until: Timestamp,
    is_whole: bool,
    piece: ListPiece,
}

impl NewLists {
    /// Adds a list of a billing period, of which `key` is that of a window.
    pub fn add(&mut self, key: StateKey, until: Timestamp, is_whole: bool, values: impl Iterator<Item = u128>) {
        let start = self.bytes.len();
        values.for_each(|value| self.bytes.extend_from_slice(&value.to_le_bytes()));
        let bytes = self.bytes.get(start..).unwrap_or_default();
        if bytes.is_empty() && !is_whole {
            return;
        }
        let piece = ListPiece { start: start as u64, count: bytes.len() as u64 / WIDTH, checksum: xxh3_64(bytes) };
        self.lists.push(NewList { key, until, is_whole, piece });
    }
}

/// Gathers the lists of all parts in a file.
#[derive(Debug)]
pub struct ListKeeper {
    folder: PathBuf,
    written: Mutex<Written>,
}

#[derive(Debug, Default)]
struct Written {
    file: Option<NamedTempFile>,
    length: u64,
    lists: Vec<NewList>,
    /// Why nothing can be kept.
    failure: Option<io::Error>,
}

/// Lists that a run keeps.
#[derive(Debug, Default)]
pub(super) struct KeptLists {
    pub file: Option<NamedTempFile>,
    pub listings: Vec<Listing>,
    /// Bytes of the file.
    pub length: u64,
}

impl ListKeeper {
    pub fn new(folder: &Path) -> Self {
        ListKeeper { folder: folder.to_owned(), written: Mutex::default() }
    }

    /// Writes the lists of a part. Where that fails, none are kept: [`ListKeeper::finish`] says so.
    pub fn add(&self, new: NewLists) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if written.failure.is_none()
            && !new.lists.is_empty()
            && let Err(error) = written.add(&self.folder, new)
        {
            written.failure = Some(error);
        }
    }

    /// What was written; `dimensions` are those that keys have numbers of.
    ///
    /// # Errors
    /// Where it could not be.
    pub(super) fn finish(self, dimensions: &Interner) -> io::Result<KeptLists> {
        let Written { file, length, lists, failure } = self.written.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(failure) = failure {
            return Err(failure);
        }
        let listing = |NewList { key, until, is_whole, piece }: NewList| Listing {
            subscription: key.subscription as usize,
            meter: key.meter as usize,
            price: (key.price != NO_PRICE).then_some(key.price as usize),
            dimensions: dimensions.text(key.dimensions).to_string(),
            period_start: key.period_start.nanos(),
            until: until.nanos(),
            is_whole,
            piece,
        };
        Ok(KeptLists { file, listings: lists.into_iter().map(listing).collect(), length })
    }
}

impl Written {
    fn add(&mut self, folder: &Path, new: NewLists) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(partial(folder)?),
        };
        file.write_all(&new.bytes)?;
        let start = self.length;
        let moved = |list: NewList| NewList { piece: ListPiece { start: start + list.piece.start, ..list.piece }, ..list };
        self.lists.extend(new.lists.into_iter().map(moved));
        self.length += new.bytes.len() as u64;
        Ok(())
    }
}
