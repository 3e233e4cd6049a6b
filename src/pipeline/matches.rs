//! Matches of events with meters, on the way from enrichment to aggregation: set aside by
//! subscription, so that the windows of a part of the subscriptions can be aggregated and
//! priced on their own, in little memory.

use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};
use rustc_hash::FxHashMap;

use super::accumulator::{Measured, Moment};
use super::spill::{KeptFile, Partitions};
use super::state::{NO_DIMENSIONS, NO_PRICE, News};
use crate::model::decimal::Decimal;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::reference::Reference;

/// Bytes that one thread keeps in memory.
const MOST_IN_MEMORY: usize = 32 << 20;

/// One event that a meter counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Match<'m> {
    pub subscription: u32,
    pub meter: u32,
    pub price: u32,
    pub dimensions: u32,
    /// Numbers of spans, see [`SpanNumbers`]. A session has no window yet.
    pub window: u32,
    pub period: u32,
    /// See [`super::event_forms::identity`].
    pub identity: u128,
    pub value: Measured<'m>,
    /// Where the aggregation or the price depends on it.
    pub moment: Option<Moment<'m>>,
    pub arrived: Arrived,
}

/// What is new about an event to those who knew what there was before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Arrived {
    pub late: bool,
    pub amended: bool,
    pub resolved: bool,
}

impl Arrived {
    pub fn news(self) -> News {
        let Arrived { late, amended, resolved } = self;
        News { late: late.into(), amended: amended.into(), resolved: resolved.into(), ..News::default() }
    }
}

/// Where a match counts.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// `None` for a session, which has no window yet.
    pub window: Option<Span>,
    pub period: Span,
    /// Whether the window stays as it is: all of these are taken together.
    pub is_carried: bool,
    /// Among those of all threads.
    pub dimensions: u32,
}

/// The number of a window that is not known yet: that of a session.
pub const NO_WINDOW: u32 = u32::MAX;

/// Which subscriptions are aggregated together: those that are neighbours in the order of
/// their keys.
#[derive(Debug, Default)]
pub struct Partitioning {
    of: Vec<u32>,
    count: usize,
}

impl Partitioning {
    /// More would be too small to be worth it.
    const MOST: usize = 256;

    pub fn of(reference: &Reference) -> Self {
        let ranks = super::price::ranks(reference.subscriptions.iter().map(|row| (&row.tenant_id, &row.id)));
        let count = ranks.len().clamp(1, Partitioning::MOST);
        let part = |rank: u32| u32::try_from(rank as usize * count / ranks.len().max(1)).unwrap_or_default();
        Partitioning { of: ranks.iter().map(|rank| part(*rank)).collect(), count }
    }

    pub fn count(&self) -> usize {
        self.count.max(1)
    }

    pub fn part(&self, subscription: u32) -> usize {
        self.of.get(subscription as usize).map_or(0, |part| *part as usize)
    }
}

/// Windows and billing periods by number: many matches share few of them.
#[derive(Debug, Default)]
pub struct SpanNumbers {
    numbers: FxHashMap<Span, u32>,
    spans: Vec<Span>,
}

impl SpanNumbers {
    pub fn number(&mut self, span: Span) -> u32 {
        *self.numbers.entry(span).or_insert_with(|| {
            self.spans.push(span);
            u32::try_from(self.spans.len() - 1).unwrap_or(u32::MAX)
        })
    }

    pub fn span(&self, number: u32) -> Option<Span> {
        self.spans.get(number as usize).copied()
    }

    /// All spans, in the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = Span> + '_ {
        self.spans.iter().copied()
    }
}

/// What one thread has set aside.
#[derive(Debug)]
pub struct Matches {
    partitions: Mutex<Partitions>,
    /// By part: the event and the subscription that were written last.
    last: Vec<Option<(u128, u32)>>,
    pub spans: SpanNumbers,
}

impl Matches {
    /// In a folder, if there is one, everything is kept that is taken up.
    pub fn new(parts: &Partitioning, keep_in: Option<&Path>) -> Self {
        Matches::with_limit(parts.count(), MOST_IN_MEMORY, keep_in)
    }

    fn with_limit(parts: usize, most_in_memory: usize, keep_in: Option<&Path>) -> Self {
        let partitions = Partitions::new("matches of events with meters", parts, most_in_memory).kept_in(keep_in);
        Matches { partitions: Mutex::new(partitions), last: vec![None; parts], spans: SpanNumbers::default() }
    }

    /// Sets a match aside.
    ///
    /// # Errors
    /// Where the temporary file cannot be written.
    #[inline]
    pub fn write(&mut self, part: usize, of: &Match<'_>) -> Result<()> {
        let event = Some((of.identity, of.subscription));
        let Some(last) = self.last.get_mut(part) else { return Ok(()) };
        let is_same = *last == event;
        *last = event;
        let partitions = self.partitions.get_mut().unwrap_or_else(PoisonError::into_inner);
        partitions.append(part, |out| encode(of, is_same, out))
    }

    /// Takes the next piece of one part in place of what `out` held, for its [`Reader`]; false
    /// where nothing is left. Nothing can be written to the part any more.
    ///
    /// # Errors
    /// Where the temporary file cannot be read.
    pub fn next(&self, part: usize, out: &mut Vec<u8>) -> Result<bool> {
        self.partitions.lock().unwrap_or_else(PoisonError::into_inner).next(part, out)
    }

    /// What was kept of them, with the spans that their numbers stand for.
    ///
    /// # Errors
    /// Where it could not be written.
    pub fn into_kept(self) -> io::Result<Option<(KeptFile, SpanNumbers)>> {
        let kept = self.partitions.into_inner().unwrap_or_else(PoisonError::into_inner).into_kept()?;
        Ok(kept.map(|kept| (kept, self.spans)))
    }

    /// Calls `each` with all matches, and forgets them.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub fn drain(&mut self, mut each: impl FnMut(&Match<'_>)) -> Result<()> {
        let mut bytes = Vec::new();
        for part in 0..self.last.len() {
            let mut reader = Reader::default();
            while self.next(part, &mut bytes)? {
                reader.read(&bytes, |of| {
                    each(of);
                    Ok(())
                })?;
            }
        }
        self.last.fill(None);
        Ok(())
    }
}

const SAME_EVENT: u8 = 1;
const MOMENT: u8 = 2;
const DIMENSIONS: u8 = 4;
const LATE: u8 = 8;
const OTHER_NEWS: u8 = 16;
const KIND: u32 = 5;

const AMENDED: u8 = 1;
const RESOLVED: u8 = 2;

#[inline]
fn encode(of: &Match<'_>, is_same: bool, out: &mut Vec<u8>) {
    let flag = |is_set: bool, flag: u8| if is_set { flag } else { 0 };
    let kind: u8 = match of.value {
        Measured::Event => 0,
        Measured::Number(_) => 1,
        Measured::Distinct(_) => 2,
        Measured::Text(_) => 3,
        Measured::Operation { is_add: false, .. } => 4,
        Measured::Operation { is_add: true, .. } => 5,
    };
    let other_news = flag(of.arrived.amended, AMENDED) | flag(of.arrived.resolved, RESOLVED);
    out.push(
        flag(is_same, SAME_EVENT)
            | flag(of.moment.is_some(), MOMENT)
            | flag(of.dimensions != NO_DIMENSIONS, DIMENSIONS)
            | flag(of.arrived.late, LATE)
            | flag(other_news != 0, OTHER_NEWS)
            | kind << KIND,
    );
    if !is_same {
        number(of.subscription, out);
        out.extend_from_slice(&of.identity.to_le_bytes());
    }
    // Without a price is the number zero.
    for index in [of.meter, of.price.wrapping_add(1), of.window, of.period] {
        number(index, out);
    }
    if of.dimensions != NO_DIMENSIONS {
        number(of.dimensions, out);
    }
    if other_news != 0 {
        out.push(other_news);
    }
    match of.value {
        Measured::Event => {}
        Measured::Number(value) => out.extend_from_slice(&value.to_le_bytes()),
        Measured::Distinct(value) | Measured::Operation { value, .. } => out.extend_from_slice(&value.to_le_bytes()),
        Measured::Text(value) => text(value, out),
    }
    if let Some(Moment { timestamp, ingested_at, id, remaining }) = of.moment {
        for nanos in [timestamp.nanos(), ingested_at.nanos(), remaining] {
            out.extend_from_slice(&nanos.to_le_bytes());
        }
        text(id, out);
    }
}

/// Seven bits a byte, the lowest first. Most are small.
#[inline]
fn number(value: u32, out: &mut Vec<u8>) {
    match u8::try_from(value) {
        Ok(byte) if byte <= 0x7f => out.push(byte),
        _ => long_number(value, out),
    }
}

fn long_number(mut value: u32, out: &mut Vec<u8>) {
    while value > 0x7f {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

fn text(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Reads what one thread has written of one part, piece by piece.
#[derive(Debug, Default)]
pub struct Reader {
    /// Of the match before: the next one may be of the same event.
    subscription: u32,
    identity: u128,
}

impl Reader {
    /// Calls `each` with every match of the next piece.
    ///
    /// # Errors
    /// Where the piece is not what was written, or `each` fails.
    pub fn read<'b>(&mut self, piece: &'b [u8], mut each: impl FnMut(&Match<'b>) -> Result<()>) -> Result<()> {
        let mut rest = piece;
        let mut of = Match {
            subscription: self.subscription,
            meter: 0,
            price: NO_PRICE,
            dimensions: NO_DIMENSIONS,
            window: NO_WINDOW,
            period: 0,
            identity: self.identity,
            value: Measured::Event,
            moment: None,
            arrived: Arrived::default(),
        };
        while !rest.is_empty() {
            decode(&mut rest, &mut of).context("matches of events with meters that were set aside are damaged")?;
            each(&of)?;
        }
        (self.subscription, self.identity) = (of.subscription, of.identity);
        Ok(())
    }
}

/// Decodes in place of the match before: it may be of the same event, and is too large to be
/// handed around by the million.
#[inline]
fn decode<'b>(rest: &mut &'b [u8], of: &mut Match<'b>) -> Option<()> {
    let flags = take_byte(rest)?;
    if flags & SAME_EVENT == 0 {
        of.subscription = take_number(rest)?;
        of.identity = u128::from_le_bytes(take_bytes(rest)?);
    }
    of.meter = take_number(rest)?;
    of.price = take_number(rest)?.wrapping_sub(1);
    of.window = take_number(rest)?;
    of.period = take_number(rest)?;
    of.dimensions = if flags & DIMENSIONS == 0 { NO_DIMENSIONS } else { take_number(rest)? };
    let other_news = if flags & OTHER_NEWS == 0 { 0 } else { take_byte(rest)? };
    of.value = match flags >> KIND {
        0 => Measured::Event,
        1 => Measured::Number(Decimal::from_le_bytes(take_bytes(rest)?)),
        2 => Measured::Distinct(u128::from_le_bytes(take_bytes(rest)?)),
        3 => Measured::Text(take_text(rest)?),
        kind => Measured::Operation { value: u128::from_le_bytes(take_bytes(rest)?), is_add: kind == 5 },
    };
    of.moment = if flags & MOMENT == 0 {
        None
    } else {
        let [timestamp, ingested_at, remaining] =
            [take_bytes(rest)?, take_bytes(rest)?, take_bytes(rest)?].map(i64::from_le_bytes);
        let [timestamp, ingested_at] = [timestamp, ingested_at].map(Timestamp::from_nanos);
        Some(Moment { timestamp, ingested_at, id: take_text(rest)?, remaining })
    };
    of.arrived = Arrived { late: flags & LATE != 0, amended: other_news & AMENDED != 0, resolved: other_news & RESOLVED != 0 };
    Some(())
}

fn take_byte(rest: &mut &[u8]) -> Option<u8> {
    rest.split_off_first().copied()
}

fn take_bytes<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (bytes, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(*bytes)
}

#[inline]
fn take_number(rest: &mut &[u8]) -> Option<u32> {
    match rest.split_first() {
        Some((byte, after)) if *byte <= 0x7f => {
            *rest = after;
            Some(u32::from(*byte))
        }
        _ => take_long_number(rest),
    }
}

fn take_long_number(rest: &mut &[u8]) -> Option<u32> {
    let mut value = 0;
    for shift in (0..u32::BITS).step_by(7) {
        let byte = take_byte(rest)?;
        value |= u32::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take_text<'b>(rest: &mut &'b [u8]) -> Option<&'b str> {
    let length = usize::try_from(u64::from_le_bytes(take_bytes(rest)?)).ok()?;
    std::str::from_utf8(rest.split_off(..length)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn measured(kind: u8, value: u128) -> Measured<'static> {
        match kind {
            0 => Measured::Event,
            1 => Measured::Number(Decimal::from_le_bytes(value.to_le_bytes())),
            2 => Measured::Distinct(value),
            3 => Measured::Text(["", "ä", "user-1"][(value % 3) as usize]),
            kind => Measured::Operation { value, is_add: kind == 5 },
        }
    }

    proptest! {
        #[test]
        fn matches_come_back_as_they_were_whether_spilled_and_kept_or_not(
            written in proptest::collection::vec((0u32..5, any::<u32>(), any::<u128>(), 0u8..6, any::<u8>()), 0..200),
            limit in 0usize..20_000,
            keeps in any::<bool>(),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let keep_in = keeps.then_some(folder.path());
            let parts = 3;
            let matches: Vec<_> = written.iter().map(|(subscription, index, value, kind, bits)| Match {
                subscription: *subscription,
                meter: index >> 20,
                price: if bits & 1 == 0 { NO_PRICE } else { *index },
                dimensions: if bits & 2 == 0 { NO_DIMENSIONS } else { *index },
                window: index & 0xffff,
                period: index & 0xff,
                // Often the same event as before.
                identity: value & 1,
                value: measured(*kind, *value),
                moment: (bits & 4 != 0).then_some(Moment {
                    timestamp: Timestamp::from_nanos(i64::from(*index)),
                    ingested_at: Timestamp::from_nanos(-7),
                    id: "id",
                    remaining: 5,
                }),
                arrived: Arrived { late: bits & 8 != 0, amended: bits & 16 != 0, resolved: bits & 32 != 0 },
            }).collect();
            let part = |of: &Match<'_>| of.subscription as usize % parts;
            let mut set_aside = Matches::with_limit(parts, limit, keep_in);
            matches.iter().try_for_each(|of| set_aside.write(part(of), of)).unwrap();
            for at in 0..parts {
                let (mut bytes, mut found, mut reader) = (Vec::new(), Vec::new(), Reader::default());
                while set_aside.next(at, &mut bytes).unwrap() {
                    // What a match holds may lie in the piece.
                    let piece: &'static [u8] = Box::leak(bytes.clone().into_boxed_slice());
                    prop_assert!(Reader::default().read(&piece[..piece.len() - 1], |_| Ok(())).is_err());
                    reader.read(piece, |of| { found.push(*of); Ok(()) }).unwrap();
                }
                let expected: Vec<_> = matches.iter().filter(|of| part(of) == at).copied().collect();
                prop_assert_eq!(found, expected);
            }
            let kept = set_aside.into_kept().unwrap().map(|(kept, _)| kept);
            prop_assert_eq!(kept.is_some(), keeps && !matches.is_empty());
            let Some(KeptFile { file, pieces, length }) = kept else { return Ok(()) };
            let path = folder.path().join("kept");
            file.persist(&path).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            prop_assert_eq!(bytes.len() as u64, length);
            for at in 0..parts {
                let (mut found, mut reader) = (Vec::new(), Reader::default());
                for piece in pieces.iter().filter(|piece| piece.part == at) {
                    let [start, length] = [piece.start, piece.length].map(|of| usize::try_from(of).unwrap());
                    let piece = bytes[start..][..length].to_vec();
                    reader.read(Box::leak(piece.into_boxed_slice()), |of| { found.push(*of); Ok(()) }).unwrap();
                }
                let expected: Vec<_> = matches.iter().filter(|of| part(of) == at).copied().collect();
                prop_assert_eq!(found, expected);
            }
            // What is not kept is removed.
            drop(Matches::with_limit(parts, 0, keep_in));
            prop_assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }
}
