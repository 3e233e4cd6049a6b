//! A Kafka topic as a bounded snapshot: the end of every partition is frozen before
//! anything is read, and what is read is exactly what lies between start and end.
//! Partitions are assigned, never subscribed; nothing is committed.

mod topic;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rdkafka::message::{BorrowedMessage, Message};

use super::batch::TextEvent;
use super::json_event::{Defaults, JsonEvents};
use super::{BatchBuilder, EventBatch, EventSource, Moved, Part, Selection, Split, Wanted};
use crate::config::KafkaConnection;
use crate::fault::configuration;
use crate::model::columns::{ColumnMap, Field};
use crate::model::run::{InputFile, RunRecord};
use crate::model::timestamp::Timestamp;
use topic::{Extent, Offsets, Topic, written_at};

/// The events of a topic.
#[derive(Debug)]
pub struct KafkaSource {
    pub connection: KafkaConnection,
    pub topic: String,
    /// How much earlier than its event time a message may have been written.
    pub margin: Duration,
    /// Of events that name no tenant.
    pub tenant_id: Option<String>,
    pub columns: ColumnMap,
    /// Where the first copy of an event counts, copies from before the range matter.
    pub from_first_copy: bool,
    /// The offsets of an earlier run, to be read again.
    pub snapshot: Option<Snapshot>,
}

/// The offsets that a run recorded.
#[derive(Debug, Clone)]
pub struct Snapshot {
    run_id: String,
    files: Vec<InputFile>,
}

impl Snapshot {
    /// What `run` read.
    pub fn of(run: &RunRecord) -> Self {
        Snapshot { run_id: run.run_id.clone(), files: run.input.files.clone() }
    }
}

impl EventSource for KafkaSource {
    fn probe(&self) -> Result<String> {
        let partitions = Topic::connect(&self.connection, &self.topic)?.partitions()?.len();
        Ok(format!("Kafka topic {}, {partitions} partition{}", self.topic, if partitions == 1 { "" } else { "s" }))
    }

    fn splits(&self, selection: &Selection) -> Result<Vec<Split>> {
        let topic = Topic::connect(&self.connection, &self.topic)?;
        let partitions = topic.partitions()?;
        let identity = format!("kafka:{}/{}", topic.cluster(), self.topic);
        match &self.snapshot {
            Some(snapshot) => self.recorded(&topic, &partitions, selection, snapshot, &identity),
            None => self.current(&topic, &partitions, selection, &identity),
        }
    }

    /// Messages of an offset never change, so what was read comes again by its offsets, even
    /// where retention has removed it since: that shows when it is to be read. The last one
    /// tells a topic that was created anew.
    fn splits_since(&self, before: &[InputFile]) -> Result<Vec<Split>> {
        let topic = Topic::connect(&self.connection, &self.topic)?;
        let partitions = topic.partitions()?;
        let identity = format!("kafka:{}/{}", topic.cluster(), self.topic);
        let mut recorded = offsets(before, &identity)
            .map_err(|file| Moved(format!("the last run read `{}`, which is no part of {topic}", file.name)))?;
        let mut splits = Vec::new();
        for partition in partitions {
            let extent = topic.extent(partition)?;
            let place = topic.place(partition);
            let known = recorded.remove(&partition).unwrap_or_default();
            let until = known.last().map_or(0, |known| known.offsets.end);
            if extent.end < until {
                bail!(Moved(format!("{place}: offsets up to {until} were read, and it ends at {} now", extent.end)));
            }
            if extent.low > until {
                let gone = extent.low - 1;
                bail!(Moved(format!("{place}: retention has removed offsets {until} to {gone}, which no run has read")));
            }
            if let Some(Known { offsets, evidence: Some(evidence), .. }) = known.last()
                && offsets.end > extent.low
                && topic.evidence(partition, *offsets)?.is_some_and(|now| now != *evidence)
            {
                let last = offsets.end - 1;
                bail!(Moved(format!("{place}: the message at offset {last} is not the one that was read: it was created anew")));
            }
            let new = Offsets { start: until, end: extent.end };
            let evidence = topic.evidence(partition, new)?;
            let new = Some((new, None, evidence)).filter(|(new, ..)| new.start < new.end || known.is_empty());
            let known = known.into_iter().map(|Known { offsets, rows, evidence }| (offsets, Some(rows), evidence));
            for (at, (offsets, announced_rows, evidence)) in known.chain(new).enumerate() {
                splits.push(Split { announced_rows, evidence, ..self.split(&identity, partition, offsets, at > 0) });
            }
        }
        match recorded.keys().next() {
            Some(partition) => bail!(Moved(format!("{}: there is no such partition any more", topic.place(*partition)))),
            None => Ok(splits),
        }
    }

    fn read(&self, split: &Split, _: Wanted<'_>, sink: &mut dyn FnMut(&EventBatch) -> Result<()>) -> Result<()> {
        let Part::Offsets { partition, start, end, .. } = split.part else {
            bail!("{} is no part of a Kafka topic: this is a bug in trueup", split.name)
        };
        if start >= end {
            return Ok(());
        }
        let topic = Topic::connect(&self.connection, &self.topic)?;
        let events = JsonEvents::new(&self.columns);
        let mut builder = BatchBuilder::default();
        topic.assign(partition, start)?;
        // The last offset may be a transaction marker or compacted away, so the
        // end is where a message lies beyond it, or where the partition ends.
        let mut rows = 0;
        loop {
            let Some(message) = topic.next(partition)? else {
                check_not_shrunk(&topic, partition, end)?;
                break;
            };
            if message.offset() < end {
                self.push(&mut builder, &events, &message);
                rows += 1;
            }
            if message.offset() + 1 >= end {
                break;
            }
            if builder.is_full() {
                sink(&builder.finish())?;
            }
        }
        if let Some(recorded) = split.announced_rows.filter(|recorded| *recorded != rows) {
            bail!(Moved(format!(
                "{}: offsets {start} to {} held {recorded} messages and hold {rows} now: compaction has removed some",
                split.name,
                end - 1
            )));
        }
        sink(&builder.finish())
    }
}

impl KafkaSource {
    /// One split a partition, from the start of the selection up to what is stable now.
    fn current(&self, topic: &Topic<'_>, partitions: &[i32], selection: &Selection, identity: &str) -> Result<Vec<Split>> {
        let since = self.since(selection);
        let extents = partitions.iter().map(|partition| topic.extent(*partition)).collect::<Result<Vec<_>>>()?;
        let by_time = self.starts(topic, partitions, selection)?;
        let mut splits = Vec::new();
        for (partition, extent) in partitions.iter().zip(extents) {
            self.check_retention(topic, *partition, extent, since)?;
            let start = match by_time.get(partition) {
                _ if self.from_first_copy => extent.low,
                None => extent.low,
                Some(None) => extent.end,
                Some(Some(offset)) => (*offset).clamp(extent.low, extent.end),
            };
            let offsets = Offsets { start, end: extent.end };
            let evidence = if since.is_none() { topic.evidence(*partition, offsets)? } else { None };
            splits.push(Split { evidence, ..self.split(identity, *partition, offsets, false) });
        }
        Ok(splits)
    }

    fn split(&self, identity: &str, partition: i32, Offsets { start, end }: Offsets, continues: bool) -> Split {
        Split {
            name: format!("kafka {}/{partition}", self.topic),
            identity: identity.to_owned(),
            fingerprint: format!("{start}..{end}"),
            evidence: None,
            announced_rows: None,
            part: Part::Offsets { partition, start, end, continues },
        }
    }

    /// Promise 8: what retention has removed must be older than the selection.
    /// Messages are removed from the oldest on, so the oldest left is the proof.
    fn check_retention(&self, topic: &Topic<'_>, partition: i32, extent: Extent, since: Option<Timestamp>) -> Result<()> {
        if extent.low == 0 {
            return Ok(());
        }
        let earliest = earliest(topic, partition, extent)?;
        if let (Some(earliest), Some(since)) = (earliest, since)
            && earliest < since
        {
            return Ok(());
        }
        let place = topic.place(partition);
        let left = match earliest {
            Some(earliest) => format!("the earliest message left is offset {} or later, of {earliest}", extent.low),
            None => format!("no message is left before offset {}, so nothing tells how old they were", extent.end),
        };
        let needed = match since {
            Some(since) => {
                format!("messages since {since} are needed (the first billing period of the range, less source.margin)")
            }
            None => "every message is needed (without a range, or for a level of `weighted_sum`)".to_owned(),
        };
        let remedy = match earliest {
            Some(earliest) => {
                let possible = plus(earliest, self.margin);
                let others = if since.is_none() { ", and with --meter one that keeps no level" } else { "" };
                let range = "choose a shorter range with --start and --end, whose first billing period begins after";
                format!("{range} {possible}{others}")
            }
            None => "wait until the partition has messages older than the range, or lengthen the topic's retention".to_owned(),
        };
        bail!(Moved(format!("{place}: retention has removed messages; {needed}, but {left}: {remedy}")))
    }

    /// The splits that a run recorded, with as many rows as it read.
    fn recorded(
        &self,
        topic: &Topic<'_>,
        partitions: &[i32],
        selection: &Selection,
        snapshot: &Snapshot,
        identity: &str,
    ) -> Result<Vec<Split>> {
        let by_time = self.starts(topic, partitions, selection)?;
        let recorded = offsets(&snapshot.files, identity).map_err(|file| {
            let run = &snapshot.run_id;
            configuration(format!("--snapshot {run}: that run read `{}`, which is no part of {topic}", file.name))
        })?;
        let mut splits = Vec::new();
        for (partition, parts) in recorded {
            let rows = parts.iter().map(|known| known.rows).sum();
            let whole = parts.into_iter().map(|known| known.offsets).reduce(|a, b| Offsets { end: b.end, ..a });
            let Some(Offsets { start, end }) = whole else { continue };
            let needed = by_time.get(&partition).copied().flatten().unwrap_or(start);
            check_still_there(topic, partitions, partition, start, end)
                .and_then(|()| check_reaches_back(topic, partition, start, needed))
                .with_context(|| format!("--snapshot {} cannot be read again", snapshot.run_id))?;
            splits.push(Split { announced_rows: Some(rows), ..self.split(identity, partition, Offsets { start, end }, false) });
        }
        Ok(splits)
    }

    /// Where the messages of a selection begin, by partition; `None` where none is
    /// that young, nothing at all where there is no span.
    fn starts(&self, topic: &Topic<'_>, partitions: &[i32], selection: &Selection) -> Result<BTreeMap<i32, Option<i64>>> {
        match self.since(selection) {
            Some(since) => topic.offsets_at(partitions, since),
            None => Ok(BTreeMap::new()),
        }
    }

    fn since(&self, selection: &Selection) -> Option<Timestamp> {
        selection.span.map(|span| minus(span.start, self.margin))
    }

    fn push(&self, builder: &mut BatchBuilder, events: &JsonEvents<'_>, message: &BorrowedMessage<'_>) {
        let ingested_at = written_at(message);
        let place = || format!("kafka {}/{} offset {}", self.topic, message.partition(), message.offset());
        if let Some(payload) = message.payload() {
            let defaults = Defaults { tenant_id: self.tenant_id.as_deref(), ingested_at };
            return events.push(builder, payload.trim_ascii(), defaults, place);
        }
        let key = message.key().unwrap_or_default();
        match self.voided(events, key) {
            Ok((tenant, id)) => {
                let void = TextEvent { tenant_id: Some(&tenant), id: Some(&id), deleted: Some("true"), ..TextEvent::default() };
                builder.push_ingested(&void, ingested_at, place);
            }
            Err(reason) => {
                let raw = String::from_utf8_lossy(key).into_owned();
                builder.push_unreadable(raw, format!("{}: a tombstone, {reason}", place()));
            }
        }
    }

    /// Tenant and id of the event that a message without a value voids, by its key.
    fn voided(&self, events: &JsonEvents<'_>, key: &[u8]) -> Result<(String, String), String> {
        let key = key.trim_ascii();
        let (tenant, id) = if key.starts_with(b"{") {
            let [tenant, id] = events.tenant_and_id(key).map_err(|error| format!("whose key cannot be read: {error}"))?;
            (tenant.map(String::from), id.map(String::from))
        } else {
            let text = std::str::from_utf8(key).map_err(|error| format!("whose key is no text: {error}"))?;
            // Serializers for JSON write a plain text with quotes.
            let unquoted = serde_json::from_str::<String>(text).ok();
            self.tenant_and_id(unquoted.as_deref().unwrap_or(text))?
        };
        let tenant = tenant.filter(|tenant| !tenant.is_empty()).or_else(|| self.tenant_id.clone());
        match (tenant, id.filter(|id| !id.is_empty())) {
            (Some(tenant), Some(id)) => Ok((tenant, id)),
            _ => Err(format!(
                "whose key names no event: it must be a JSON object with {} and {}, or `tenant/id`, \
                 or the id alone where source.tenant_id is set",
                self.columns.name(Field::TenantId),
                self.columns.name(Field::Id)
            )),
        }
    }

    /// `tenant/id`, or the id alone where the source has a tenant.
    fn tenant_and_id(&self, key: &str) -> Result<(Option<String>, Option<String>), String> {
        match (key.split_once('/'), &self.tenant_id) {
            (Some((tenant, _)), Some(own)) if tenant != own => Err(format!(
                "whose key `{key}` may be an id with a slash or name a tenant other than source.tenant_id: \
                 use a JSON object as key"
            )),
            (Some((tenant, id)), _) => Ok((Some(tenant.to_owned()), Some(id.to_owned()))),
            (None, Some(_)) => Ok((None, Some(key.to_owned()))),
            (None, None) => Ok((None, None)),
        }
    }
}

/// When the first message that is still there was written.
fn earliest(topic: &Topic<'_>, partition: i32, extent: Extent) -> Result<Option<Timestamp>> {
    if extent.low >= extent.end {
        return Ok(None);
    }
    topic.assign(partition, extent.low)?;
    let message = topic.next(partition)?.filter(|message| message.offset() < extent.end);
    Ok(message.as_ref().and_then(written_at))
}

/// The end of a partition only ever grows, unless messages are lost.
fn check_not_shrunk(topic: &Topic<'_>, partition: i32, end: i64) -> Result<()> {
    let now = topic.extent(partition)?.end;
    if now < end {
        bail!("{}: it ended at offset {end} and now ends at {now}: the cluster has lost messages", topic.place(partition));
    }
    Ok(())
}

fn check_still_there(topic: &Topic<'_>, partitions: &[i32], partition: i32, start: i64, end: i64) -> Result<()> {
    if start >= end {
        return Ok(());
    }
    let place = topic.place(partition);
    if !partitions.contains(&partition) {
        bail!("{place}: there is no such partition any more");
    }
    let extent = topic.extent(partition)?;
    if extent.low > start {
        bail!("{place}: offsets {start} to {} were read, and retention has removed those before {}", end - 1, extent.low);
    }
    if extent.end < end {
        bail!("{place}: offsets up to {} were read, and it now ends before {}: it was created anew", end - 1, extent.end);
    }
    Ok(())
}

/// A job that changed may need more than its run did: longer billing periods, say.
fn check_reaches_back(topic: &Topic<'_>, partition: i32, start: i64, needed: i64) -> Result<()> {
    if needed < start {
        bail!(
            "{}: the snapshot begins at offset {start}, and the job as it is now needs messages from offset {needed} on",
            topic.place(partition)
        );
    }
    Ok(())
}

/// Offsets that a run has read, and how many messages were there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Known {
    offsets: Offsets,
    rows: u64,
    evidence: Option<String>,
}

/// By partition.
type Recorded = BTreeMap<i32, Vec<Known>>;

/// What recorded splits of the topic with this identity read: offsets that follow each
/// other. Otherwise one that is of something else.
fn offsets<'f>(files: &'f [InputFile], identity: &str) -> Result<Recorded, &'f InputFile> {
    let parse = |file: &InputFile| -> Option<(i32, Offsets)> {
        let name = file.name.strip_prefix(identity)?.strip_prefix('/')?;
        let partition = name.split_once('@').map_or(name, |(partition, _)| partition);
        let (start, end) = file.fingerprint.split_once("..")?;
        Some((partition.parse().ok()?, Offsets { start: start.parse().ok()?, end: end.parse().ok()? }))
    };
    let mut by_partition = Recorded::new();
    for file in files {
        let (partition, offsets) = parse(file).ok_or(file)?;
        let known = Known { offsets, rows: file.rows, evidence: file.evidence.clone() };
        by_partition.entry(partition).or_default().push(known);
    }
    by_partition.values_mut().for_each(|parts| parts.sort_unstable());
    Ok(by_partition)
}

/// Where the offsets of a partition end that a run has read; `None` where it read none.
pub fn read_until(files: &[InputFile], identity: &str, partition: i32) -> Option<i64> {
    offsets(files, identity).ok()?.get(&partition)?.last().map(|known| known.offsets.end)
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

fn minus(t: Timestamp, duration: Duration) -> Timestamp {
    Timestamp::from_nanos(t.nanos().saturating_sub(nanos(duration)))
}

fn plus(t: Timestamp, duration: Duration) -> Timestamp {
    Timestamp::from_nanos(t.nanos().saturating_add(nanos(duration)))
}
