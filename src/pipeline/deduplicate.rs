//! Deduplication in bounded memory, exact whatever the order of arrival.
//!
//! A first scan reads the keys alone and finds the hashes that occur more than
//! once, in four bytes an event. A second scan lets every other event through at
//! once; only events with such a hash are held, and their keys compared in full.

use std::cmp::Ordering;

use rustc_hash::FxHashSet;
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128};

use crate::config::Keep;
use crate::model::digest::frame;
use crate::model::timestamp::Timestamp;
use crate::source::{EventRef, Field};

/// What a field of a key says of an event.
enum Part<'e> {
    Text(Option<&'e str>),
    Time(Option<Timestamp>),
}

/// `None` for fields that no key has.
fn part<'e>(field: &Field, event: &EventRef<'e>) -> Option<Part<'e>> {
    Some(match field {
        Field::TenantId => Part::Text(event.tenant_id),
        Field::Id => Part::Text(event.id),
        Field::EventName => Part::Text(event.event_name),
        Field::ExternalCustomerId => Part::Text(event.external_customer_id),
        Field::Timestamp => Part::Time(event.timestamp),
        Field::IngestedAt | Field::Properties | Field::Deleted => return None,
    })
}

/// Whether an event has what every key needs.
fn has_key(event: &EventRef<'_>) -> bool {
    let is_there = |text: Option<&str>| text.is_some_and(|text| !text.is_empty());
    is_there(event.tenant_id) && is_there(event.id)
}

/// Appends the key of an event; false where it has none.
pub fn write_key(fields: &[Field], event: &EventRef<'_>, key: &mut Vec<u8>) -> bool {
    key.clear();
    if !has_key(event) {
        return false;
    }
    for part in fields.iter().filter_map(|field| part(field, event)) {
        match part {
            Part::Text(text) => frame(key, text.map(str::as_bytes)),
            Part::Time(t) => frame(key, t.map(|t| t.nanos().to_le_bytes()).as_ref().map(<[u8; 8]>::as_slice)),
        }
    }
    true
}

/// The hash of an event's key, cut to the 42 bits that the first scan keeps; `None` where it has
/// no key.
pub fn key_hash(fields: &[Field], event: &EventRef<'_>) -> Option<u64> {
    if !has_key(event) {
        return None;
    }
    let add = |hash: u64, part: Part<'_>| match part {
        Part::Text(Some(text)) => xxh3_64_with_seed(text.as_bytes(), hash),
        Part::Time(Some(t)) => xxh3_64_with_seed(&t.nanos().to_le_bytes(), hash),
        Part::Text(None) | Part::Time(None) => !hash,
    };
    Some(fields.iter().filter_map(|field| part(field, event)).fold(0, add) >> (64 - HASH_BITS))
}

pub const HASH_BITS: u32 = 42;

/// Hashes of keys that occur more than once, or of different keys that share a hash.
#[derive(Debug, Default)]
pub struct RepeatedKeys {
    hashes: FxHashSet<u64>,
    /// Three bits of one word for each hash: nearly every event is told apart by it, and it
    /// fits the processor's cache where the set does not (a blocked Bloom filter; Putze, Sanders
    /// and Singler, 2007).
    filter: Vec<u64>,
}

impl RepeatedKeys {
    pub fn new(hashes: FxHashSet<u64>) -> Self {
        // 16 bits a hash.
        let mut filter = vec![0; (hashes.len() / 4).next_power_of_two()];
        for hash in &hashes {
            let (at, bits) = Self::place(*hash, filter.len());
            if let Some(word) = filter.get_mut(at) {
                *word |= bits;
            }
        }
        RepeatedKeys { hashes, filter }
    }

    pub fn contains(&self, hash: u64) -> bool {
        self.may_contain(hash) && self.hashes.contains(&hash)
    }

    /// False for nearly all hashes that are not contained.
    #[inline]
    pub fn may_contain(&self, hash: u64) -> bool {
        let (at, bits) = Self::place(hash, self.filter.len());
        self.filter.get(at).is_some_and(|word| word & bits == bits)
    }

    /// Those that are among `hashes` too.
    pub fn among(self, hashes: &FxHashSet<u64>) -> RepeatedKeys {
        RepeatedKeys::new(self.hashes.intersection(hashes).copied().collect())
    }

    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.hashes.iter().copied()
    }

    /// The word of a filter of so many words, a power of two, and the bits in it.
    fn place(hash: u64, words: usize) -> (usize, u64) {
        let at = usize::try_from(hash >> 18).unwrap_or_default() & words.saturating_sub(1);
        (at, 1 << (hash & 63) | 1 << (hash >> 6 & 63) | 1 << (hash >> 12 & 63))
    }
}

/// A copy of an event whose key repeats.
#[derive(Debug, Clone, std::marker::Copy)]
pub struct Copy<'b> {
    pub event: EventRef<'b>,
    content_hash: u128,
    /// The run before this one read it too.
    pub known: bool,
}

impl<'b> Copy<'b> {
    pub fn new(event: EventRef<'b>, known: bool, scratch: &mut Vec<u8>) -> Self {
        scratch.clear();
        let texts = [event.tenant_id, event.id, event.event_name, event.external_customer_id, event.properties];
        for text in texts {
            frame(scratch, text.map(str::as_bytes));
        }
        frame(scratch, event.timestamp.map(|t| t.nanos().to_le_bytes()).as_ref().map(<[u8; 8]>::as_slice));
        scratch.push(u8::from(event.deleted));
        scratch.push(u8::from(event.problem.is_some()));
        Copy { event, content_hash: xxh3_128(scratch), known }
    }

    /// Whether both are the same in everything.
    pub fn is_repetition_of(&self, other: &Copy<'_>) -> bool {
        self.content_hash == other.content_hash && self.event.ingested_at == other.event.ingested_at
    }

    /// Whether both differ in nothing but their times.
    pub fn says_the_same(&self, other: &Copy<'_>) -> bool {
        self.event.event_name == other.event.event_name
            && self.event.external_customer_id == other.event.external_customer_id
            && self.event.properties == other.event.properties
    }

    /// By ingestion time, then content; of copies ingested at the same time, a void
    /// is the last word.
    fn order(&self, other: &Copy<'_>) -> Ordering {
        let rank = |copy: &Copy<'_>| (copy.ingestion(), copy.event.deleted, copy.content_hash);
        rank(self).cmp(&rank(other))
    }

    /// A void that does not say when it came, came after what it voids.
    fn ingestion(&self) -> Timestamp {
        if self.event.deleted {
            return self.event.ingested_at.unwrap_or(Timestamp::MAX);
        }
        self.event.ingested_at.or(self.event.timestamp).unwrap_or(Timestamp::MIN)
    }

    /// Between equal copies a known one wins, so that a mere repetition is no news.
    fn beats(&self, other: &Copy<'_>, keep: Keep) -> bool {
        let order = match keep {
            Keep::Latest => self.order(other),
            Keep::First => other.order(self),
        };
        order.then(self.known.cmp(&other.known)).is_gt()
    }
}

/// All copies of one key, as far as they matter.
#[derive(Debug)]
pub struct Copies<'b> {
    /// The copy that counts.
    pub kept: Copy<'b>,
    /// The copy that counted in the run before, where it is another one.
    counted_before: Option<Copy<'b>>,
    any_deleted: bool,
    any_known_deleted: bool,
}

impl<'b> Copies<'b> {
    /// Decides about the copies of one key; `lost` is told each that does not count. `None`
    /// where there is no copy.
    pub fn of(copies: &[Copy<'b>], keep: Keep, mut lost: impl FnMut(&EventRef<'b>)) -> Option<Self> {
        let (first, others) = copies.split_first()?;
        let mut decided = Copies::new(*first);
        others.iter().for_each(|copy| lost(&decided.add(*copy, keep)));
        Some(decided)
    }

    fn new(copy: Copy<'b>) -> Self {
        let deleted = copy.event.deleted;
        Copies { kept: copy, counted_before: None, any_deleted: deleted, any_known_deleted: deleted && copy.known }
    }

    /// Whether the id counts no more.
    pub fn is_void(&self, keep: Keep) -> bool {
        match keep {
            Keep::Latest => self.kept.event.deleted,
            Keep::First => self.any_deleted,
        }
    }

    /// Whether the id did count in the run before.
    pub fn counted_before(&self, keep: Keep) -> Option<&Copy<'b>> {
        let before = if self.kept.known { Some(&self.kept) } else { self.counted_before.as_ref() };
        before.filter(|copy| match keep {
            Keep::Latest => !copy.event.deleted,
            Keep::First => !self.any_known_deleted,
        })
    }

    /// Adds a copy; returns the one of the two that does not count.
    fn add(&mut self, challenger: Copy<'b>, keep: Keep) -> EventRef<'b> {
        self.any_deleted |= challenger.event.deleted;
        self.any_known_deleted |= challenger.event.deleted && challenger.known;
        if !challenger.beats(&self.kept, keep) {
            self.remember(challenger, keep);
            return challenger.event;
        }
        let loser = std::mem::replace(&mut self.kept, challenger);
        if self.kept.known {
            self.counted_before = None;
        } else if loser.known {
            self.counted_before = Some(loser);
        }
        loser.event
    }

    /// Notes a copy that does not count now, if it is the one that did before.
    fn remember(&mut self, copy: Copy<'b>, keep: Keep) {
        let better = self.counted_before.as_ref().is_none_or(|before| copy.beats(before, keep));
        if copy.known && !self.kept.known && better {
            self.counted_before = Some(copy);
        }
    }
}
