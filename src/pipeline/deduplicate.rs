//! Deduplication in bounded memory, exact whatever the order of arrival.
//!
//! A first scan reads the keys alone and finds the hashes that occur more than
//! once, in four bytes an event. A second scan lets every other event through at
//! once; only events with such a hash are held, and their keys compared in full.

use std::cmp::Ordering;

use rustc_hash::{FxHashMap, FxHashSet};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::config::{Deduplicate, Keep};
use crate::model::digest::frame;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::source::{EventRef, Field, Problem};

/// Appends the key of an event; false where it has none.
pub fn write_key(fields: &[Field], event: &EventRef<'_>, key: &mut Vec<u8>) -> bool {
    key.clear();
    if event.tenant_id.is_none_or(str::is_empty) || event.id.is_none_or(str::is_empty) {
        return false;
    }
    for field in fields {
        let text = match field {
            Field::TenantId => event.tenant_id,
            Field::Id => event.id,
            Field::EventName => event.event_name,
            Field::ExternalCustomerId => event.external_customer_id,
            Field::Timestamp => {
                frame(key, event.timestamp.map(|t| t.nanos().to_le_bytes()).as_ref().map(<[u8; 8]>::as_slice));
                continue;
            }
            Field::IngestedAt | Field::Properties | Field::Deleted => continue,
        };
        frame(key, text.map(str::as_bytes));
    }
    true
}

/// The hash of a key, cut to the 42 bits that the first scan keeps.
pub fn key_hash(key: &[u8]) -> u64 {
    xxh3_64(key) >> (64 - HASH_BITS)
}

pub const HASH_BITS: u32 = 42;

/// Hashes of keys that occur more than once, or of different keys that share a hash.
#[derive(Debug, Default)]
pub struct RepeatedKeys(pub FxHashSet<u64>);

impl RepeatedKeys {
    pub fn contains(&self, hash: u64) -> bool {
        self.0.contains(&hash)
    }

    /// Those that are among `hashes` too.
    pub fn among(mut self, hashes: &FxHashSet<u64>) -> RepeatedKeys {
        self.0.retain(|hash| hashes.contains(hash));
        self
    }
}

/// A copy of an event that owns its content.
#[derive(Debug, Clone)]
pub struct Copy {
    tenant_id: Option<Box<str>>,
    id: Option<Box<str>>,
    event_name: Option<Box<str>>,
    external_customer_id: Option<Box<str>>,
    pub timestamp: Option<Timestamp>,
    ingested_at: Option<Timestamp>,
    properties: Option<Box<str>>,
    pub deleted: bool,
    problem: Option<Box<Problem>>,
    content_hash: u128,
    /// The run before this one read it too.
    pub known: bool,
}

impl Copy {
    pub fn new(event: &EventRef<'_>, known: bool, scratch: &mut Vec<u8>) -> Copy {
        scratch.clear();
        let texts = [event.tenant_id, event.id, event.event_name, event.external_customer_id, event.properties];
        for text in texts {
            frame(scratch, text.map(str::as_bytes));
        }
        frame(scratch, event.timestamp.map(|t| t.nanos().to_le_bytes()).as_ref().map(<[u8; 8]>::as_slice));
        scratch.push(u8::from(event.deleted));
        scratch.push(u8::from(event.problem.is_some()));
        Copy {
            tenant_id: event.tenant_id.map(Into::into),
            id: event.id.map(Into::into),
            event_name: event.event_name.map(Into::into),
            external_customer_id: event.external_customer_id.map(Into::into),
            timestamp: event.timestamp,
            ingested_at: event.ingested_at,
            properties: event.properties.map(Into::into),
            deleted: event.deleted,
            problem: event.problem.cloned().map(Box::new),
            content_hash: xxh3_128(scratch),
            known,
        }
    }

    pub fn event(&self) -> EventRef<'_> {
        EventRef {
            tenant_id: self.tenant_id.as_deref(),
            id: self.id.as_deref(),
            event_name: self.event_name.as_deref(),
            external_customer_id: self.external_customer_id.as_deref(),
            timestamp: self.timestamp,
            ingested_at: self.ingested_at,
            properties: self.properties.as_deref(),
            deleted: self.deleted,
            problem: self.problem.as_deref(),
        }
    }

    /// Whether both are the same in everything.
    pub fn is_repetition_of(&self, other: &Copy) -> bool {
        self.content_hash == other.content_hash && self.ingested_at == other.ingested_at
    }

    /// Whether both differ in nothing but their times.
    pub fn says_the_same(&self, other: &Copy) -> bool {
        self.event_name == other.event_name
            && self.external_customer_id == other.external_customer_id
            && self.properties == other.properties
    }

    /// By ingestion time, then content; of copies ingested at the same time, a void
    /// is the last word.
    fn order(&self, other: &Copy) -> Ordering {
        (self.ingestion(), self.deleted, self.content_hash).cmp(&(other.ingestion(), other.deleted, other.content_hash))
    }

    /// A void that does not say when it came, came after what it voids.
    fn ingestion(&self) -> Timestamp {
        if self.deleted {
            return self.ingested_at.unwrap_or(Timestamp::MAX);
        }
        self.ingested_at.or(self.timestamp).unwrap_or(Timestamp::MIN)
    }

    /// Between equal copies a known one wins, so that a mere repetition is no news.
    fn beats(&self, other: &Copy, keep: Keep) -> bool {
        let order = match keep {
            Keep::Latest => self.order(other),
            Keep::First => other.order(self),
        };
        order.then(self.known.cmp(&other.known)).is_gt()
    }
}

/// All copies of one key, as far as they matter.
#[derive(Debug)]
pub struct Copies {
    /// The copy that counts.
    pub kept: Copy,
    /// The copy that counted in the run before, where it is another one.
    pub counted_before: Option<Copy>,
    any_deleted: bool,
    any_known_deleted: bool,
}

impl Copies {
    /// Whether the id counts no more.
    pub fn is_void(&self, keep: Keep) -> bool {
        match keep {
            Keep::Latest => self.kept.deleted,
            Keep::First => self.any_deleted,
        }
    }

    /// Whether the id did count in the run before.
    pub fn counted_before(&self, keep: Keep) -> Option<&Copy> {
        let before = if self.kept.known { Some(&self.kept) } else { self.counted_before.as_ref() };
        before.filter(|copy| match keep {
            Keep::Latest => !copy.deleted,
            Keep::First => !self.any_known_deleted,
        })
    }

    fn note(&mut self, deleted: bool, known: bool) {
        self.any_deleted |= deleted;
        self.any_known_deleted |= deleted && known;
    }
}

/// Copies whose key repeats, held until all are read.
#[derive(Debug, Default)]
pub struct Held {
    copies: FxHashMap<Box<[u8]>, Copies>,
    /// Copies that were not kept, by whether they are in range.
    pub duplicates: u64,
    pub out_of_range: u64,
    scratch: Vec<u8>,
}

impl Held {
    /// Holds a copy; of two copies of a key, the one that does not count is counted out.
    pub fn hold(&mut self, rules: &Deduplicate, range: Option<Span>, key: &[u8], event: &EventRef<'_>, known: bool) {
        let copy = Copy::new(event, known, &mut self.scratch);
        let deleted = copy.deleted;
        match self.copies.get_mut(key) {
            None => {
                let copies =
                    Copies { kept: copy, counted_before: None, any_deleted: deleted, any_known_deleted: deleted && known };
                self.copies.insert(key.into(), copies);
            }
            Some(copies) => {
                copies.note(deleted, known);
                let lost = compete(copies, copy, rules.keep);
                self.count_out(range, lost);
            }
        }
    }

    /// Takes over what another thread holds.
    pub fn merge(&mut self, rules: &Deduplicate, range: Option<Span>, other: Held) {
        self.duplicates += other.duplicates;
        self.out_of_range += other.out_of_range;
        for (key, theirs) in other.copies {
            let Some(ours) = self.copies.get_mut(&key) else {
                self.copies.insert(key, theirs);
                continue;
            };
            ours.any_deleted |= theirs.any_deleted;
            ours.any_known_deleted |= theirs.any_known_deleted;
            let lost = compete(ours, theirs.kept, rules.keep);
            if let Some(before) = theirs.counted_before {
                remember(ours, before, rules.keep);
            }
            self.count_out(range, lost);
        }
    }

    fn count_out(&mut self, range: Option<Span>, lost: Option<Timestamp>) {
        // A copy without a time is a duplicate: nothing says that it is out of range.
        let inside = lost.is_none_or(|t| range.is_some_and(|range| range.contains(t)));
        if inside { self.duplicates += 1 } else { self.out_of_range += 1 }
    }

    /// All keys with their copies.
    pub fn into_copies(self) -> impl Iterator<Item = Copies> {
        self.copies.into_values()
    }
}

/// Puts the better of two copies first; returns the event time of the other.
fn compete(copies: &mut Copies, challenger: Copy, keep: Keep) -> Option<Timestamp> {
    if challenger.beats(&copies.kept, keep) {
        let loser = std::mem::replace(&mut copies.kept, challenger);
        let time = loser.timestamp;
        if copies.kept.known {
            copies.counted_before = None;
        } else if loser.known {
            copies.counted_before = Some(loser);
        }
        time
    } else {
        let time = challenger.timestamp;
        remember(copies, challenger, keep);
        time
    }
}

/// Notes a copy that does not count now, if it is the one that did before.
fn remember(copies: &mut Copies, copy: Copy, keep: Keep) {
    let better = copies.counted_before.as_ref().is_none_or(|before| copy.beats(before, keep));
    if copy.known && !copies.kept.known && better {
        copies.counted_before = Some(copy);
    }
}
