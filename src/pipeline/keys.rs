//! The hashes of all keys, split by split: what repeats, and where copies of a key lie.

use std::ops::Range;

use anyhow::{Result, bail};
use rustc_hash::FxHashSet;
use xxhash_rust::xxh3::xxh3_64;

use super::deduplicate::{HASH_BITS, key_hash};
use crate::model::timestamp::Timestamp;
use crate::source::{EventBatch, Field};

const PARTITION_BITS: u32 = HASH_BITS - 32;
const PARTITIONS: usize = 1 << PARTITION_BITS;

/// Hashes of keys, sorted, in four bytes each; a hash is here as often as its key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyHashes {
    /// Where each partition ends, by the first bits of its hashes.
    ends: Vec<u32>,
    /// The other 32 bits.
    lows: Vec<u32>,
}

impl KeyHashes {
    pub fn of(mut hashes: Vec<u64>) -> Self {
        hashes.sort_unstable();
        KeyHashes::of_sorted(&hashes)
    }

    fn of_sorted(hashes: &[u64]) -> Self {
        let lows = hashes.iter().map(|hash| low(*hash)).collect();
        let end = |partition: u64| hashes.partition_point(|hash| hash >> 32 <= partition);
        let ends = (0..PARTITIONS as u64).map(|partition| u32::try_from(end(partition)).unwrap_or(u32::MAX)).collect();
        KeyHashes { ends, lows }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn len(&self) -> usize {
        self.lows.len()
    }

    fn partition(&self, at: usize) -> &[u32] {
        let end = |at: usize| self.ends.get(at).map_or(0, |end| *end as usize);
        let start = if at == 0 { 0 } else { end(at - 1) };
        self.lows.get(start..end(at)).unwrap_or_default()
    }

    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        (0..PARTITIONS).flat_map(|at| self.partition(at).iter().map(move |low| whole(at, *low)))
    }

    /// How often a hash is here.
    pub fn count(&self, hash: u64) -> usize {
        let partition = self.partition(usize::try_from(hash >> 32).unwrap_or(usize::MAX));
        let low = low(hash);
        let start = partition.partition_point(|other| *other < low);
        partition.iter().skip(start).take_while(|other| **other == low).count()
    }

    /// Calls `found` with every hash that is in `self` and in `other`, once for each
    /// time that it is in `self`.
    pub fn common(&self, other: &KeyHashes, mut found: impl FnMut(u64)) {
        for at in 0..PARTITIONS {
            let (ours, mut theirs) = (self.partition(at), other.partition(at));
            for low in ours {
                // Far apart, halving is faster than stepping.
                let skip = if theirs.len() / 16 > ours.len() {
                    theirs.partition_point(|their| their < low)
                } else {
                    theirs.iter().take_while(|their| *their < low).count()
                };
                theirs = theirs.get(skip..).unwrap_or_default();
                match theirs.first() {
                    Some(their) if their == low => found(whole(at, *low)),
                    Some(_) => {}
                    None => break,
                }
            }
        }
    }

    /// Calls `found` with every hash that is in both, perhaps several times.
    pub fn shared(&self, other: &KeyHashes, found: impl FnMut(u64)) {
        if self.len() < other.len() { self.common(other, found) } else { other.common(self, found) }
    }

    /// Calls `found` for every hash of `list`, once for each time that it is in `self`.
    pub fn count_all(&self, list: &KeyHashes, mut found: impl FnMut(u64)) {
        if self.len() / 16 < list.len() {
            return self.common(list, found);
        }
        list.iter().for_each(|hash| (0..self.count(hash)).for_each(|_| found(hash)));
    }

    /// The hashes that are more than once in all of `lists` together.
    pub fn repeated<'l>(lists: impl Iterator<Item = &'l KeyHashes>, threads: usize) -> FxHashSet<u64> {
        let lists: Vec<_> = lists.collect();
        let of = |partitions: Range<usize>| {
            let (mut repeated, mut all) = (Vec::new(), Vec::new());
            for at in partitions {
                all.clear();
                lists.iter().for_each(|list| all.extend_from_slice(list.partition(at)));
                all.sort_unstable();
                let pairs = all.iter().zip(all.iter().skip(1)).filter(|(a, b)| a == b);
                repeated.extend(pairs.map(|(low, _)| whole(at, *low)));
            }
            repeated
        };
        divided(PARTITIONS, threads, of).into_iter().flatten().collect()
    }
}

/// What `of` makes of the parts of a range from zero, one for each thread.
pub(super) fn divided<T: Send>(length: usize, threads: usize, of: impl Fn(Range<usize>) -> T + Sync) -> Vec<T> {
    let share = length.div_ceil(threads.max(1)).max(1);
    let of = &of;
    std::thread::scope(|scope| {
        let starts = (0..length).step_by(share);
        let threads: Vec<_> = starts.map(|start| scope.spawn(move || of(start..length.min(start + share)))).collect();
        // Nothing in them fails; a panic goes on here.
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// Keys of new splits that known ones have too.
#[derive(Debug, Default)]
pub struct CameAgain {
    pub hashes: FxHashSet<u64>,
    /// By split, whether it is a known one that has one of them.
    pub holders: Vec<bool>,
}

impl CameAgain {
    /// Compares the keys of all splits with `new`, those of all new ones.
    pub fn find(keys: &[SplitKeys], is_new: &[bool], new: &KeyHashes, threads: usize) -> CameAgain {
        let of = |splits: Range<usize>| {
            let mut again = CameAgain::default();
            for (keys, is_new) in keys.iter().zip(is_new).skip(splits.start).take(splits.len()) {
                let mut holds = false;
                if !is_new {
                    keys.hashes.shared(new, |hash| {
                        again.hashes.insert(hash);
                        holds = true;
                    });
                }
                again.holders.push(holds);
            }
            again
        };
        let parts = divided(keys.len(), threads, of);
        parts.into_iter().fold(CameAgain::default(), |mut all, part| {
            all.hashes.extend(part.hashes);
            all.holders.extend(part.holders);
            all
        })
    }
}

fn low(hash: u64) -> u32 {
    u32::try_from(hash & u64::from(u32::MAX)).unwrap_or_default()
}

fn whole(partition: usize, low: u32) -> u64 {
    (partition as u64) << 32 | u64::from(low)
}

/// What the scan for keys found in one split.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SplitKeys {
    pub rows: u64,
    /// From the first to the last event time.
    pub extent: Option<(Timestamp, Timestamp)>,
    pub hashes: KeyHashes,
}

/// Reads the keys of one split after the other.
#[derive(Debug, Default)]
pub struct KeyReader {
    /// The split at hand.
    split: Option<usize>,
    rows: u64,
    extent: Option<(Timestamp, Timestamp)>,
    hashes: Vec<u64>,
    done: Vec<(usize, SplitKeys)>,
}

impl SplitKeys {
    /// The keys of two slices of a split.
    fn and(&self, other: &SplitKeys) -> SplitKeys {
        let extents = [self.extent, other.extent].into_iter().flatten();
        let extent = extents.reduce(|(first, last), (from, to)| (first.min(from), last.max(to)));
        let mut hashes: Vec<_> = self.hashes.iter().chain(other.hashes.iter()).collect();
        // Two sorted parts are merged in linear time.
        hashes.sort();
        SplitKeys { rows: self.rows + other.rows, extent, hashes: KeyHashes::of_sorted(&hashes) }
    }
}

impl KeyReader {
    /// Takes a batch of a split; those of a slice come in a row.
    pub fn visit(&mut self, split: usize, fields: &[Field], batch: &EventBatch) {
        if self.split != Some(split) {
            self.close();
            self.split = Some(split);
        }
        self.rows += batch.len() as u64;
        let has_others = fields.iter().any(|field| !matches!(field, Field::TenantId | Field::Id | Field::Timestamp));
        for row in 0..batch.len() {
            let event = if has_others { batch.row(row) } else { batch.key(row) };
            if let Some(t) = event.timestamp.filter(|t| Timestamp::in_range(t.nanos()).is_some()) {
                let (first, last) = self.extent.unwrap_or((t, t));
                self.extent = Some((first.min(t), last.max(t)));
            }
            self.hashes.extend(key_hash(fields, &event));
        }
    }

    fn close(&mut self) {
        let Some(split) = self.split.take() else { return };
        let hashes = KeyHashes::of(std::mem::take(&mut self.hashes));
        let keys = SplitKeys { rows: std::mem::take(&mut self.rows), extent: self.extent.take(), hashes };
        self.done.push((split, keys));
    }

    /// The keys by split; splits without a batch have none.
    pub fn finish(readers: Vec<KeyReader>, splits: usize) -> Vec<SplitKeys> {
        let mut keys = vec![SplitKeys::default(); splits];
        for mut reader in readers {
            reader.close();
            for (split, found) in reader.done {
                if let Some(keys) = keys.get_mut(split) {
                    *keys = if keys.rows == 0 { found } else { keys.and(&found) };
                }
            }
        }
        keys
    }
}

// --- as bytes --------------------------------------------------------------------------------

const MAGIC: &[u8; 8] = b"TRUEUPK2";
const CHECKSUM: usize = 8;

impl SplitKeys {
    /// The keys as bytes, with `identity`: what they are the keys of.
    pub fn encode(&self, identity: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64 + (PARTITIONS + self.hashes.len()) * 4);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&identity.to_le_bytes());
        bytes.extend_from_slice(&self.rows.to_le_bytes());
        let (first, last) = self.extent.unwrap_or((Timestamp::MAX, Timestamp::MIN));
        bytes.extend_from_slice(&first.nanos().to_le_bytes());
        bytes.extend_from_slice(&last.nanos().to_le_bytes());
        bytes.extend_from_slice(&(self.hashes.ends.len() as u64).to_le_bytes());
        for number in self.hashes.ends.iter().chain(&self.hashes.lows) {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let checksum = xxh3_64(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// # Errors
    /// Where the bytes are damaged, or the keys of something else.
    pub fn decode(bytes: &[u8], identity: u64) -> Result<Self> {
        let (content, checksum) = bytes.split_at(bytes.len().saturating_sub(CHECKSUM));
        if checksum != xxh3_64(content).to_le_bytes() {
            bail!("damaged");
        }
        let Some(content) = content.strip_prefix(MAGIC) else { bail!("of another version") };
        let (header, numbers) = content.split_at(content.len().min(5 * 8));
        let mut header = header.chunks_exact(8).map(|bytes| <[u8; 8]>::try_from(bytes).unwrap_or_default());
        let mut next = || header.next().unwrap_or_default();
        if u64::from_le_bytes(next()) != identity {
            bail!("of other content");
        }
        let rows = u64::from_le_bytes(next());
        let [first, last] = [next(), next()].map(|bytes| Timestamp::from_nanos(i64::from_le_bytes(bytes)));
        let ends = usize::try_from(u64::from_le_bytes(next()))?;
        let mut numbers = numbers.chunks_exact(4).map(|bytes| u32::from_le_bytes(<[u8; 4]>::try_from(bytes).unwrap_or_default()));
        let hashes = KeyHashes { ends: numbers.by_ref().take(ends).collect(), lows: numbers.collect() };
        Ok(SplitKeys { rows, extent: (first <= last).then_some((first, last)), hashes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(seed: u64, count: u64) -> Vec<u64> {
        (0..count).map(|at| xxh3_64(&(seed + at).to_le_bytes()) >> (64 - HASH_BITS)).collect()
    }

    #[test]
    fn lists_know_what_they_hold() {
        let (a, b) = (hashes(0, 5000), hashes(4000, 100_000));
        let (left, right) = (KeyHashes::of(a.clone()), KeyHashes::of(b.clone()));
        let mut common = Vec::new();
        left.common(&right, |hash| common.push(hash));
        common.sort_unstable();
        let mut expected: Vec<_> = a.iter().filter(|hash| b.contains(hash)).copied().collect();
        expected.sort_unstable();
        assert_eq!(common, expected);
        let mut back = Vec::new();
        right.common(&left, |hash| back.push(hash));
        assert_eq!(back, expected);
        assert_eq!(KeyHashes::repeated([&left, &right].into_iter(), 3), expected.iter().copied().collect());
        assert_eq!((left.count(expected[0]), left.count(b[90_000])), (1, 0));
        assert_eq!(KeyHashes::of([a.clone(), a].concat()).count(expected[0]), 2);
        assert!(left.iter().is_sorted() && left.iter().count() == 5000);
    }

    #[test]
    fn bytes_are_checked() {
        let extent = Some((Timestamp::from_nanos(-5), Timestamp::from_nanos(7)));
        let keys = SplitKeys { rows: 12, extent, hashes: KeyHashes::of(hashes(1, 1000)) };
        let bytes = keys.encode(42);
        assert_eq!(SplitKeys::decode(&bytes, 42).unwrap(), keys);
        assert!(SplitKeys::decode(&bytes, 43).is_err());
        let none = SplitKeys::default();
        assert_eq!(SplitKeys::decode(&none.encode(1), 1).unwrap(), none);
        for at in [0, 9, 40, 100, bytes.len() - 1] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(SplitKeys::decode(&damaged, 42).is_err(), "{at}");
        }
        assert!((0..bytes.len()).step_by(7).all(|length| SplitKeys::decode(&bytes[..length], 42).is_err()));
    }
}
