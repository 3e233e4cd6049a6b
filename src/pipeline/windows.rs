//! The states of all windows while events are read.

use std::hash::{Hash, Hasher};

use rustc_hash::FxHashMap;

use super::state::{StateKey, WindowState};
use crate::model::percentage::Percentage;

/// Windows by key. The events of one subscription and meter mostly follow each other in
/// time, so their last window is at hand; and states lie in the order in which they were
/// found, so that those of one event and of one file lie together.
#[derive(Debug, Default, Clone)]
pub struct Windows {
    places: FxHashMap<StateKey, u32>,
    /// For subscriptions and meters, the window that was looked up last. Several may share
    /// an entry.
    recent: Vec<Option<(StateKey, u32)>>,
    meters: usize,
    /// In chunks, so that growing moves nothing.
    chunks: Vec<Vec<(StateKey, WindowState)>>,
}

const CHUNK: usize = 1024;

/// More would not fit the processor's cache.
const MOST_RECENT: usize = 1 << 17;

/// Indexes are small and windows begin at round instants: without mixing, most keys would
/// fall into few buckets.
impl Hash for StateKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        let names = fold(pair(self.subscription, self.meter), pair(self.price, self.dimensions));
        let times = self.window_start.nanos() ^ self.period_start.nanos().rotate_left(21);
        state.write_u64(fold(names, times.cast_unsigned()));
    }
}

/// The upper half of a product depends on all bits of its factors.
fn fold(a: u64, b: u64) -> u64 {
    const ODD: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xc2b2_ae3d_27d4_eb4f];
    let product = u128::from(a ^ ODD[0]) * u128::from(b ^ ODD[1]);
    u64::try_from(product >> 64 ^ product & u128::from(u64::MAX)).unwrap_or_default()
}

impl Windows {
    /// For reference tables of so many subscriptions and meters, with room for `expected`
    /// windows.
    pub fn new(subscriptions: usize, meters: usize, expected: usize) -> Self {
        let recent = subscriptions.saturating_mul(meters).min(MOST_RECENT).next_power_of_two();
        let places = FxHashMap::with_capacity_and_hasher(expected, rustc_hash::FxBuildHasher);
        Windows { places, recent: vec![None; recent], meters, ..Windows::default() }
    }

    /// Changes the state of a window; `new` makes that of one that is not there yet.
    pub fn change<R>(
        &mut self,
        key: StateKey,
        new: impl FnOnce() -> WindowState,
        change: impl FnOnce(&mut WindowState) -> R,
    ) -> R {
        let at = self.place(&key) as usize;
        if let Some((_, state)) = self.chunks.get_mut(at / CHUNK).and_then(|chunk| chunk.get_mut(at % CHUNK)) {
            return change(state);
        }
        let mut state = new();
        let result = change(&mut state);
        self.push(key, state);
        result
    }

    /// Adds what another state has counted.
    pub fn add(&mut self, key: StateKey, theirs: WindowState, price: Option<&Percentage>) {
        let at = self.place(&key) as usize;
        match self.chunks.get_mut(at / CHUNK).and_then(|chunk| chunk.get_mut(at % CHUNK)) {
            Some((_, ours)) => ours.merge(&theirs, price),
            None => self.push(key, theirs),
        }
    }

    fn push(&mut self, key: StateKey, state: WindowState) {
        match self.chunks.last_mut().filter(|chunk| chunk.len() < CHUNK) {
            Some(chunk) => chunk.push((key, state)),
            None => {
                let mut chunk = Vec::with_capacity(CHUNK);
                chunk.push((key, state));
                self.chunks.push(chunk);
            }
        }
    }

    /// The place of a window; of a new one, the place that comes next.
    fn place(&mut self, key: &StateKey) -> u32 {
        // The meters of one event are neighbours.
        let pair = (key.subscription as usize).wrapping_mul(self.meters).wrapping_add(key.meter as usize);
        let recent = self.recent.len().checked_sub(1).and_then(|mask| self.recent.get_mut(pair & mask));
        if let Some(Some((known, at))) = &recent
            && known == key
        {
            return *at;
        }
        let next = self.chunks.last().map_or(0, |last| (self.chunks.len() - 1) * CHUNK + last.len());
        let at = *self.places.entry(*key).or_insert(index(next));
        if let Some(recent) = recent {
            *recent = Some((*key, at));
        }
        at
    }

    pub fn len(&self) -> usize {
        self.chunks.last().map_or(0, |last| (self.chunks.len() - 1) * CHUNK + last.len())
    }

    pub fn iter(&self) -> impl Iterator<Item = (&StateKey, &WindowState)> {
        self.chunks.iter().flatten().map(|(key, state)| (key, state))
    }

    /// All windows by `rank`. Keys are sorted, not the larger states.
    pub fn into_sorted<K: Ord>(self, rank: impl Fn(&StateKey) -> K) -> impl Iterator<Item = (StateKey, WindowState)> {
        let places = self.chunks.iter().enumerate().flat_map(|(chunk, states)| (0..states.len()).map(move |at| (chunk, at)));
        let mut order: Vec<_> = places.zip(self.iter()).map(|(place, (key, _))| (rank(key), place)).collect();
        order.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        let mut chunks: Vec<Vec<_>> = self.chunks.into_iter().map(|chunk| chunk.into_iter().map(Some).collect()).collect();
        order.into_iter().filter_map(move |(_, (chunk, at))| chunks.get_mut(chunk)?.get_mut(at)?.take())
    }

    /// All windows, in the order in which they were found; their chunks are freed on the way.
    pub fn into_states(self) -> impl Iterator<Item = (StateKey, WindowState)> {
        self.chunks.into_iter().flatten()
    }
}

/// Beyond four billion windows, memory has long run out.
fn index(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}
