//! Copies of events whose key repeats, set aside until all events are read.

use anyhow::{Context as _, Result};
use rustc_hash::FxHashMap;

use super::deduplicate::{Copy, write_key};
use super::spill::Partitions;
use crate::config::Deduplicate;
use crate::model::timestamp::Timestamp;
use crate::source::{EventRef, Problem};

/// Parts that copies are set aside in, by the hash of their key.
pub const PARTS: usize = 64;

/// Bytes that one thread keeps in memory.
const MOST_IN_MEMORY: usize = 32 << 20;

/// What threads have set aside.
#[derive(Debug)]
pub struct Held {
    own: Partitions,
    /// Of threads that it took over from.
    others: Vec<Partitions>,
}

impl Default for Held {
    fn default() -> Self {
        Held::with_limit(MOST_IN_MEMORY)
    }
}

impl Held {
    fn with_limit(most_in_memory: usize) -> Self {
        Held { own: Partitions::new("copies of events", PARTS, most_in_memory), others: Vec::new() }
    }

    /// Sets a copy aside. `hash` is that of its key.
    ///
    /// # Errors
    /// Where the temporary file cannot be written.
    pub fn hold(&mut self, hash: u64, event: &EventRef<'_>, known: bool) -> Result<()> {
        self.own.append(usize::try_from(hash % PARTS as u64)?, |part| encode(event, known, part))
    }

    /// Takes over what another thread has set aside.
    pub fn merge(&mut self, other: Held) {
        self.others.push(other.own);
        self.others.extend(other.others);
    }

    /// Appends one part to `out`.
    ///
    /// # Errors
    /// Where the temporary file cannot be read.
    pub fn take_part(&mut self, at: usize, out: &mut Vec<u8>) -> Result<()> {
        let mut piece = Vec::new();
        for partitions in std::iter::once(&mut self.own).chain(&mut self.others) {
            while partitions.next(at, &mut piece)? {
                out.append(&mut piece);
            }
        }
        Ok(())
    }
}

/// What is wrong with copies of one part, in order: it is kept apart, because copies
/// only refer to it.
///
/// # Errors
/// Where the part is not what was written.
pub fn problems(part: &[u8]) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    let mut rest = part;
    while !rest.is_empty() {
        let (_, problem, _) = decode(&mut rest).with_context(damaged)?;
        problems.extend(problem);
    }
    Ok(problems)
}

fn damaged() -> String {
    "a copy of an event that was set aside is damaged".to_owned()
}

/// The copies of one part, those of a key together.
///
/// # Errors
/// Where the part is not what was written.
pub fn by_key<'b>(part: &'b [u8], problems: &'b [Problem], rules: &Deduplicate) -> Result<Vec<Vec<Copy<'b>>>> {
    let mut problems = problems.iter();
    let mut by_key: FxHashMap<Box<[u8]>, Vec<Copy<'_>>> = FxHashMap::default();
    let (mut key, mut scratch) = (Vec::new(), Vec::new());
    let mut rest = part;
    while !rest.is_empty() {
        let (mut event, problem, known) = decode(&mut rest).with_context(damaged)?;
        event.problem = problem.and_then(|_| problems.next());
        write_key(&rules.key, &event, &mut key);
        let copy = Copy::new(event, known, &mut scratch);
        match by_key.get_mut(key.as_slice()) {
            Some(copies) => copies.push(copy),
            None => drop(by_key.insert(key.as_slice().into(), vec![copy])),
        }
    }
    Ok(by_key.into_values().collect())
}

const DELETED: u8 = 1;
const KNOWN: u8 = 2;
const HAS_PROBLEM: u8 = 4;

fn encode(event: &EventRef<'_>, known: bool, out: &mut Vec<u8>) {
    let flag = |is_set: bool, flag: u8| if is_set { flag } else { 0 };
    out.push(flag(event.deleted, DELETED) | flag(known, KNOWN) | flag(event.problem.is_some(), HAS_PROBLEM));
    for text in [event.tenant_id, event.id, event.event_name, event.external_customer_id, event.properties] {
        encode_bytes(text.map(str::as_bytes), out);
    }
    for instant in [event.timestamp, event.ingested_at] {
        encode_bytes(instant.map(|t| t.nanos().to_le_bytes()).as_ref().map(<[u8; 8]>::as_slice), out);
    }
    if let Some(problem) = event.problem {
        out.extend_from_slice(&(problem.row as u64).to_le_bytes());
        encode_bytes(Some(problem.detail.as_bytes()), out);
        encode_bytes(problem.raw.as_deref().map(str::as_bytes), out);
    }
}

/// The length plus one, zero for nothing, and the bytes.
fn encode_bytes(bytes: Option<&[u8]>, out: &mut Vec<u8>) {
    let bytes_and_one = bytes.map_or(0, |bytes| bytes.len() as u64 + 1);
    out.extend_from_slice(&bytes_and_one.to_le_bytes());
    out.extend_from_slice(bytes.unwrap_or_default());
}

/// The next event, its problem, and whether it is known; `None` where the bytes are damaged.
fn decode<'b>(rest: &mut &'b [u8]) -> Option<(EventRef<'b>, Option<Problem>, bool)> {
    let flags = *rest.split_off_first()?;
    let mut text = || {
        Some(match decode_bytes(rest)? {
            Some(bytes) => Some(std::str::from_utf8(bytes).ok()?),
            None => None,
        })
    };
    let (tenant_id, id, event_name, external_customer_id, properties) = (text()?, text()?, text()?, text()?, text()?);
    let mut instant = || {
        Some(match decode_bytes(rest)? {
            Some(bytes) => Some(Timestamp::from_nanos(i64::from_le_bytes(bytes.try_into().ok()?))),
            None => None,
        })
    };
    let (timestamp, ingested_at) = (instant()?, instant()?);
    let mut problem = None;
    if flags & HAS_PROBLEM != 0 {
        let row = u64::from_le_bytes(rest.split_off(..8)?.try_into().ok()?);
        let detail = String::from_utf8(decode_bytes(rest)??.to_vec()).ok()?;
        let raw = decode_bytes(rest)?.map(|raw| String::from_utf8_lossy(raw).into_owned());
        problem = Some(Problem { row: usize::try_from(row).ok()?, detail, raw });
    }
    let deleted = flags & DELETED != 0;
    let event =
        EventRef { tenant_id, id, event_name, external_customer_id, timestamp, ingested_at, properties, deleted, problem: None };
    Some((event, problem, flags & KNOWN != 0))
}

fn decode_bytes<'b>(rest: &mut &'b [u8]) -> Option<Option<&'b [u8]>> {
    let bytes_and_one = u64::from_le_bytes(rest.split_off(..8)?.try_into().ok()?);
    match usize::try_from(bytes_and_one).ok()?.checked_sub(1) {
        Some(length) => rest.split_off(..length).map(Some),
        None => Some(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Keep;
    use crate::pipeline::deduplicate::Copies;
    use crate::source::Field;

    fn event(id: &str, properties: &'static str) -> (String, &'static str) {
        (id.to_owned(), properties)
    }

    #[test]
    fn copies_come_back_as_they_were_whether_spilled_or_not() {
        let problem = Problem { row: 3, detail: "line 4: damaged".into(), raw: Some("{".into()) };
        let events: Vec<_> =
            (0..1000).map(|n| event(&format!("id-{}", n % 400), if n < 400 { "{}" } else { "{\"a\":1}" })).collect();
        let rules = Deduplicate { key: vec![Field::TenantId, Field::Id], keep: Keep::Latest };
        let outcome = |limit: usize| {
            let mut held = Held::with_limit(limit);
            for (number, (id, properties)) in (0i64..).zip(&events) {
                let event = EventRef {
                    tenant_id: Some("t"),
                    id: Some(id),
                    properties: (number != 7).then_some(properties),
                    ingested_at: Some(Timestamp::from_nanos(number)),
                    problem: (number % 100 == 5).then_some(&problem),
                    ..EventRef::EMPTY
                };
                held.hold(xxhash_rust::xxh3::xxh3_64(id.as_bytes()), &event, number % 2 == 0).unwrap();
            }
            assert_eq!(held.own.has_spilled(), limit <= 10_000);
            let (mut kept, mut lost) = (Vec::new(), 0);
            for part in 0..PARTS {
                let mut bytes = Vec::new();
                held.take_part(part, &mut bytes).unwrap();
                let problems = problems(&bytes).unwrap();
                let copies = by_key(&bytes, &problems, &rules).unwrap();
                kept.extend(copies.iter().map(|copies| {
                    let copies = Copies::of(copies, rules.keep, |_| lost += 1).unwrap();
                    let EventRef { id, properties, ingested_at, problem, .. } = copies.kept.event;
                    let problem = problem.map(|problem| (problem.row, problem.detail.clone(), problem.raw.clone()));
                    (id.map(str::to_owned), properties.map(str::to_owned), ingested_at, copies.kept.known, problem)
                }));
            }
            kept.sort();
            (kept, lost)
        };
        let in_memory = outcome(usize::MAX);
        assert_eq!((in_memory.0.len(), in_memory.1), (400, 600));
        assert_eq!(in_memory, outcome(1000));
        assert!(problems(&[0, 1, 2]).is_err());
    }
}
