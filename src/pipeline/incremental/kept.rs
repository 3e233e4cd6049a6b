//! Matches of events with meters that runs leave for later ones: what was read and enriched
//! once need not be again.
//!
//! A run that computes everything writes a *segment* with all of its matches; a run that
//! builds on it adds one with those of its own events, and with what they replace. A later
//! run takes the matches of marked windows from there instead of from the files; events that
//! changed reference rows touch, and copies of events that came again, it reads from the
//! files still. What is kept belongs to one run, and is of use as long as that is the last
//! one of the whole job. Without it, events are read again.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use rustc_hash::{FxHashMap, FxHashSet};
use xxhash_rust::xxh3::xxh3_64;

use super::marks::{Pair, PairMarks};
use super::segment::{
    Index, Listed, MANIFEST, Manifest, ShardIndex, Tables, VERSION, index_path, matches_path, span, values_path,
};
use super::values::{self, ListKey, Listing, ValueList};
use super::{Marks, Retreat};
use crate::model::spans::Spans;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::pipeline::context::Context;
use crate::pipeline::matches::{Arrived, Match, NO_WINDOW, Place, Reader};
use crate::pipeline::spill::Piece;
use crate::pipeline::state::{Interner, NO_PRICE, StateKey, index};
use crate::reference::Reference;

/// After so many segments, everything is computed again: each takes files and time to read,
/// and rows that somebody altered are found.
const MOST_SEGMENTS: usize = 30;

/// What the runs up to the baseline kept.
#[derive(Debug)]
pub struct Kept {
    folder: PathBuf,
    segments: Vec<Segment>,
    lists: FxHashMap<ListKey, ValueList>,
}

#[derive(Debug)]
struct Segment {
    listed: Listed,
    shards: Vec<ShardIndex>,
    tables: Arc<Tables>,
    /// The numbers of its subscriptions, meters and prices in the tables of now. A row that
    /// was gone meanwhile is another one, even under its old name.
    subscriptions: Vec<Option<usize>>,
    meters: Vec<Option<usize>>,
    prices: Vec<Option<u32>>,
    replaced: FxHashSet<u128>,
    /// Meters of now of which costs were rounded.
    rounded: FxHashSet<usize>,
    /// Where they are replaced, by the numbers of now.
    spans: FxHashMap<Pair, Spans>,
}

impl Kept {
    /// What is kept of a run; `None` where there is nothing, or nothing whole.
    pub fn open(folder: &Path, run_id: &str, reference: &Reference) -> Option<Kept> {
        let manifest = Manifest::read(folder)?;
        if manifest.version != VERSION || manifest.run_id != run_id {
            return None;
        }
        match Kept::read(folder, manifest, reference) {
            Ok(kept) => Some(kept),
            Err(error) => {
                tracing::info!("{}: kept matches are of no use: {error:#}", folder.display());
                None
            }
        }
    }

    fn read(folder: &Path, manifest: Manifest, reference: &Reference) -> Result<Kept> {
        let mut read = Vec::new();
        let mut tables = Arc::default();
        for listed in manifest.segments {
            let path = index_path(folder, &listed.name);
            let bytes = fs::read(&path)?;
            ensure!(xxh3_64(&bytes) == listed.checksum, "{} is not what was written", path.display());
            let mut index: Index = serde_json::from_slice(&zstd::decode_all(bytes.as_slice())?)?;
            if let Some(now) = index.tables.take() {
                tables = Arc::new(now);
            }
            read.push((listed, index, Arc::clone(&tables)));
        }
        // From the newest to the oldest: what a later one lacks was gone.
        let mut numbers = Numbers::of(reference);
        let (mut segments, mut listings) = (Vec::new(), Vec::new());
        let mut last: Option<Arc<Tables>> = None;
        for (listed, mut index, tables) in read.into_iter().rev() {
            if last.as_ref().is_none_or(|last| !Arc::ptr_eq(last, &tables)) {
                numbers.retain(&tables);
                last = Some(Arc::clone(&tables));
            }
            listings.push(std::mem::take(&mut index.lists));
            segments.push(Segment::open(folder, listed, index, tables, &numbers)?);
        }
        segments.reverse();
        let mut lists = FxHashMap::default();
        for (number, (segment, listings)) in segments.iter().zip(listings.into_iter().rev()).enumerate() {
            for listing in listings {
                let Some(key) = segment.list_key(&listing) else { continue };
                let known = lists.remove(&key);
                if let Some(list) = ValueList::add(known, number, &listing) {
                    lists.insert(key, list);
                }
            }
        }
        Ok(Kept { folder: folder.to_owned(), segments, lists })
    }

    /// The distinct values of a unique count in a billing period, if they are known.
    pub(super) fn list(&self, key: &ListKey) -> Option<&ValueList> {
        self.lists.get(key)
    }

    /// The values of a list, sorted. Files of segments are opened once.
    ///
    /// # Errors
    /// [`Retreat`] where they cannot be read, or are not what was written.
    fn values(&self, list: &ValueList, files: &mut FxHashMap<usize, File>) -> Result<Vec<u128>> {
        let mut values = Vec::new();
        for (number, piece) in &list.pieces {
            let Some(segment) = self.segments.get(*number) else { continue };
            let path = values_path(&self.folder, &segment.listed.name);
            let useless = |error: &dyn fmt::Display| self.useless(segment, &path, error);
            let file = match files.entry(*number) {
                Entry::Occupied(file) => file.into_mut(),
                Entry::Vacant(entry) => entry.insert(File::open(&path).map_err(|error| useless(&error))?),
            };
            values::read(file, piece, &mut values).map_err(|error| useless(&error))?;
            // The last of them is blamed where one has a value of another.
            values.sort();
            if values.windows(2).any(|pair| matches!(pair, [a, b] if a == b)) {
                bail!(useless(&"a value is in two lists"));
            }
        }
        Ok(values)
    }

    /// The segments, as the manifest has them.
    pub(super) fn listed(&self) -> Vec<Listed> {
        self.segments.iter().map(|segment| segment.listed.clone()).collect()
    }

    /// Whether no cost of a meter was rounded.
    pub fn is_exact(&self, meter: usize) -> bool {
        self.segments.iter().all(|segment| !segment.rounded.contains(&meter))
    }

    /// The tables of the newest segment.
    pub(super) fn tables(&self) -> Option<&Tables> {
        self.segments.last().map(|segment| &*segment.tables)
    }

    /// Whether it is time to begin anew.
    pub fn is_full(&self) -> bool {
        self.segments.len() >= MOST_SEGMENTS
    }

    /// The matches of marked windows, but for those of events that were read again.
    pub fn matches<'k>(
        &'k self,
        context: &'k Context<'_>,
        marks: &'k Marks,
        replaced: &'k FxHashSet<u128>,
        dimensions: &mut Interner,
    ) -> KeptMatches<'k> {
        let marked: FxHashSet<usize> = marks.spans().map(|((subscription, _), _)| subscription).collect();
        let mut wanted = vec![Vec::new(); context.parts.count()];
        for subscription in &marked {
            wanted.get_mut(context.parts.part(index(*subscription))).into_iter().for_each(|of| of.push(*subscription));
        }
        let mut pieces: BTreeMap<(usize, usize), BTreeSet<usize>> = BTreeMap::new();
        for (number, segment) in self.segments.iter().enumerate() {
            let rows = segment.tables.subscriptions.iter().zip(&segment.subscriptions);
            for ((.., part), at) in rows.filter_map(|(row, at)| Some((row, at.filter(|at| marked.contains(at))?))) {
                pieces.entry((context.parts.part(index(at)), number)).or_default().insert(*part as usize);
            }
        }
        let mut all_spans = Spans::default();
        marks.spans().for_each(|(_, spans)| all_spans.merge(spans));
        let mut renamed = |shard: &ShardIndex| Renamed {
            spans: shard.spans.iter().map(|nanos| (span(*nanos), all_spans.contains(span(*nanos).start))).collect(),
            dimensions: shard.dimensions.iter().map(|text| dimensions.intern(text)).collect(),
        };
        let renamed = self.segments.iter().map(|segment| segment.shards.iter().map(&mut renamed).collect()).collect();
        let lists = (0..context.parts.count()).map(|_| Vec::new()).collect();
        KeptMatches { kept: self, marks, replaced, wanted, pieces, lists, renamed, count: AtomicU64::new(0) }
    }

    /// Why a run does without what is kept. Nobody else should try, unless another run has
    /// replaced it meanwhile.
    fn useless(&self, segment: &Segment, path: &Path, why: &dyn fmt::Display) -> Retreat {
        let manifest = Manifest::read(&self.folder);
        if manifest.is_some_and(|manifest| manifest.segments.contains(&segment.listed)) {
            let _ = fs::remove_file(self.folder.join(MANIFEST));
        }
        Retreat { why: format!("{}: kept matches are of no use: {why}", path.display()), is_choice: true }
    }
}

/// The places of rows in the reference tables of now.
struct Numbers<'r> {
    subscriptions: FxHashMap<(&'r str, &'r str), usize>,
    meters: FxHashMap<&'r str, usize>,
    prices: FxHashMap<String, u32>,
}

impl<'r> Numbers<'r> {
    fn of(reference: &'r Reference) -> Self {
        let subscriptions = reference.subscriptions.iter().enumerate();
        Numbers {
            subscriptions: subscriptions.map(|(at, row)| ((row.tenant_id.as_str(), row.id.as_str()), at)).collect(),
            meters: reference.meters.iter().enumerate().map(|(at, meter)| (meter.id.as_str(), at)).collect(),
            prices: reference.prices.iter().enumerate().map(|(at, price)| (price.row_digest(), index(at))).collect(),
        }
    }

    /// Forgets rows that tables do not have.
    fn retain(&mut self, tables: &Tables) {
        let subscriptions: FxHashSet<_> =
            tables.subscriptions.iter().map(|(tenant, id, _)| (tenant.as_str(), id.as_str())).collect();
        self.subscriptions.retain(|key, _| subscriptions.contains(key));
        let meters: FxHashSet<_> = tables.meters.iter().map(String::as_str).collect();
        self.meters.retain(|id, _| meters.contains(id));
    }
}

impl Segment {
    fn open(
        folder: &Path,
        listed: Listed,
        Index { shards, replaced, lists_length, rounded, .. }: Index,
        tables: Arc<Tables>,
        numbers: &Numbers<'_>,
    ) -> Result<Segment> {
        let matches = shards.iter().enumerate().map(|(number, shard)| (matches_path(folder, &listed.name, number), shard.length));
        let values = (lists_length > 0).then(|| (values_path(folder, &listed.name), lists_length));
        for (path, length) in matches.chain(values) {
            let metadata = fs::metadata(&path).with_context(|| path.display().to_string())?;
            ensure!(metadata.len() == length, "{} is not as long as it was", path.display());
        }
        let of_row =
            |(tenant, id, _): &(String, String, u32)| numbers.subscriptions.get(&(tenant.as_str(), id.as_str())).copied();
        let subscriptions: Vec<_> = tables.subscriptions.iter().map(of_row).collect();
        let meters: Vec<_> = tables.meters.iter().map(|id| numbers.meters.get(id.as_str()).copied()).collect();
        let prices = tables.prices.iter().map(|digest| numbers.prices.get(digest).copied()).collect();
        let mut spans: FxHashMap<Pair, Spans> = FxHashMap::default();
        for (subscription, meter, of) in &replaced.spans {
            let pair = (subscriptions.get(*subscription).copied().flatten(), meters.get(*meter).copied().flatten());
            if let (Some(subscription), Some(meter)) = pair {
                let spans = spans.entry((subscription, meter)).or_default();
                of.iter().for_each(|nanos| spans.add(span(*nanos)));
            }
        }
        let replaced = replaced.events.iter().map(|(high, low)| u128::from(*high) << 64 | u128::from(*low)).collect();
        let rounded = rounded.iter().filter_map(|meter| meters.get(*meter).copied().flatten()).collect();
        Ok(Segment { listed, shards, tables, subscriptions, meters, prices, replaced, rounded, spans })
    }

    /// What a list is of, by the numbers of now; `None` where there is no such thing any more.
    fn list_key(&self, listing: &Listing) -> Option<ListKey> {
        let subscription = self.subscriptions.get(listing.subscription).copied().flatten()?;
        let meter = self.meters.get(listing.meter).copied().flatten()?;
        let price = match listing.price {
            None => NO_PRICE,
            Some(price) => self.prices.get(price).copied().flatten()?,
        };
        let period_start = Timestamp::from_nanos(listing.period_start);
        Some(ListKey { pair: (subscription, meter), price, dimensions: listing.dimensions.clone(), period_start })
    }

    /// Whether this segment replaces a match of an older one.
    fn replaces(&self, identity: u128, pair: Pair, at: Timestamp) -> bool {
        self.replaced.contains(&identity) && self.spans.get(&pair).is_some_and(|spans| spans.contains(at))
    }
}

fn read_piece(file: &mut File, piece: &Piece, out: &mut Vec<u8>) -> io::Result<()> {
    out.clear();
    file.seek(SeekFrom::Start(piece.start))?;
    file.take(piece.length).read_to_end(out)?;
    Ok(())
}

/// Kept matches of marked windows, to be aggregated beside those of events that were read.
#[derive(Debug)]
pub struct KeptMatches<'k> {
    kept: &'k Kept,
    marks: &'k Marks,
    replaced: &'k FxHashSet<u128>,
    /// By part: subscriptions that have marked windows.
    wanted: Vec<Vec<usize>>,
    /// By part and segment: the segment's parts that hold matches of it.
    pieces: BTreeMap<(usize, usize), BTreeSet<usize>>,
    /// By part: billing periods of which the windows that are not marked are known by their values.
    lists: Vec<Vec<(StateKey, Span, &'k ValueList)>>,
    /// By segment and shard.
    renamed: Vec<Vec<Renamed>>,
    count: AtomicU64,
}

/// A subscription, and what is marked of it by meter.
type MarkedSubscription<'m> = (u32, Vec<Option<&'m PairMarks>>);

/// What is marked of the subscription of a match; `last` is that of the match before, by its
/// number in the segment.
#[inline]
fn marked_of<'m>(
    of: &Match<'_>,
    segment: &Segment,
    marked: &'m FxHashMap<usize, MarkedSubscription<'m>>,
    last: &mut Option<(u32, Option<&'m MarkedSubscription<'m>>)>,
) -> Option<&'m MarkedSubscription<'m>> {
    match last {
        Some((number, found)) if *number == of.subscription => *found,
        _ => {
            let at = segment.subscriptions.get(of.subscription as usize).copied().flatten();
            let found = at.and_then(|at| marked.get(&at));
            *last = Some((of.subscription, found));
            found
        }
    }
}

/// What the numbers of a segment's shard stand for.
#[derive(Debug)]
struct Renamed {
    /// With whether something that begins with them is marked at all.
    spans: Vec<(Span, bool)>,
    dimensions: Vec<u32>,
}

impl<'k> KeptMatches<'k> {
    /// Adds what is known of the windows of a billing period that are not marked.
    pub fn add_list(&mut self, part: usize, (key, period): (StateKey, Span), list: &'k ValueList) {
        self.lists.get_mut(part).into_iter().for_each(|of| of.push((key, period, list)));
    }

    /// Calls `each` with the values of all windows of a billing period that are not marked, for
    /// those of a part.
    ///
    /// # Errors
    /// As [`KeptMatches::read`].
    pub fn read_lists(&self, part: usize, mut each: impl FnMut(StateKey, Span, Vec<u128>)) -> Result<()> {
        let mut files = FxHashMap::default();
        for (key, period, list) in self.lists.get(part).into_iter().flatten() {
            each(*key, *period, self.kept.values(list, &mut files)?);
        }
        Ok(())
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Calls `each` with the matches of one part, and with the windows that they count in.
    ///
    /// # Errors
    /// [`Retreat`] where they cannot be read, or are not what was written. Or where `each`
    /// fails.
    pub fn read(&self, at: usize, mut each: impl FnMut(&Match<'_>, &Place) -> Result<()>) -> Result<()> {
        let (mut bytes, mut count) = (Vec::new(), 0);
        let marked = self.marked(at);
        for ((_, number), parts) in self.pieces.range((at, 0)..(at + 1, 0)) {
            let Some(segment) = self.kept.segments.get(*number) else { continue };
            let later = self.kept.segments.get(number + 1..).unwrap_or_default();
            let later: Vec<_> = later.iter().filter(|segment| !segment.replaced.is_empty()).collect();
            let renamed = self.renamed.get(*number).into_iter().flatten();
            let shards = segment.shards.iter().enumerate().zip(renamed);
            for ((number, shard), renamed) in shards.filter(|(_, renamed)| renamed.spans.iter().any(|(_, marked)| *marked)) {
                let mut readers: FxHashMap<usize, Reader> = FxHashMap::default();
                let mut last = None;
                let mut pieces = shard.pieces.iter().filter(|piece| parts.contains(&piece.part)).peekable();
                if pieces.peek().is_none() {
                    continue;
                }
                // Opened for as long as it is read: there may be many segments.
                let path = matches_path(&self.kept.folder, &segment.listed.name, number);
                let useless = |why: &dyn fmt::Display| self.kept.useless(segment, &path, why);
                let mut file = File::open(&path).map_err(|error| useless(&error))?;
                for piece in pieces {
                    read_piece(&mut file, piece, &mut bytes).map_err(|error| useless(&error))?;
                    if xxh3_64(&bytes) != piece.checksum {
                        bail!(useless(&"they are not what was written"));
                    }
                    readers.entry(piece.part).or_default().read(&bytes, |of| {
                        let Some(subscription) = marked_of(of, segment, &marked, &mut last) else { return Ok(()) };
                        let Some((found, place)) = self.find(of, subscription, (segment, &later), renamed)? else {
                            return Ok(());
                        };
                        count += 1;
                        each(&found, &place)
                    })?;
                }
            }
        }
        self.count.fetch_add(count, Ordering::Relaxed);
        Ok(())
    }

    /// What is marked of the subscriptions of a part. Small tables: millions of matches are
    /// looked up.
    fn marked(&self, part: usize) -> FxHashMap<usize, MarkedSubscription<'_>> {
        let meters =
            self.kept.segments.iter().flat_map(|segment| segment.meters.iter().flatten()).max().map_or(0, |last| last + 1);
        let of = |at: &usize| (*at, (index(*at), (0..meters).map(|meter| self.marks.of((*at, meter))).collect()));
        self.wanted.get(part).into_iter().flatten().map(of).collect()
    }

    /// A match in the numbers of now, if it counts.
    #[inline]
    fn find<'m>(
        &self,
        of: &Match<'m>,
        (subscription, meters): &MarkedSubscription<'_>,
        (segment, later): (&Segment, &[&Segment]),
        renamed: &Renamed,
    ) -> Result<Option<(Match<'m>, Place)>> {
        let unknown = || format!("segment {}: a match of meter {} has no window", segment.listed.name, of.meter);
        let (period, mut is_marked) = *renamed.spans.get(of.period as usize).with_context(unknown)?;
        let (mut window, mut start) = (None, period.start);
        if of.window != NO_WINDOW {
            let (span, marked) = *renamed.spans.get(of.window as usize).with_context(unknown)?;
            window = Some(span);
            if span.start > start {
                (start, is_marked) = (span.start, marked);
            }
        }
        if !is_marked {
            return Ok(None);
        }
        let Some(meter) = segment.meters.get(of.meter as usize).copied().flatten() else { return Ok(None) };
        let pair = (*subscription as usize, meter);
        let marked = meters.get(meter).copied().flatten();
        if !self.marks.hold_of(marked, period, start)
            || self.replaced.contains(&of.identity)
            || later.iter().any(|later| later.replaces(of.identity, pair, start))
        {
            return Ok(None);
        }
        let price = match of.price {
            NO_PRICE => NO_PRICE,
            price => match segment.prices.get(price as usize).copied().flatten() {
                Some(price) => price,
                None => {
                    let path = index_path(&self.kept.folder, &segment.listed.name);
                    bail!(self.kept.useless(segment, &path, &"a match has a price that there is no more"))
                }
            },
        };
        let dimensions = *renamed.dimensions.get(of.dimensions as usize).with_context(unknown)?;
        // Whatever was news to the run that kept it is known now.
        let found = Match { subscription: *subscription, meter: index(meter), price, arrived: Arrived::default(), ..*of };
        let is_carried = self.marks.leave_of(marked, period, start);
        Ok(Some((found, Place { window, period, is_carried, dimensions })))
    }
}
