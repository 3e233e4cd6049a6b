//! One topic of a cluster, through librdkafka: every call ends within a bounded
//! time, every error names the brokers and the topic.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rdkafka::ClientConfig;
use rdkafka::ClientContext;
use rdkafka::TopicPartitionList;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::Offset;
use rdkafka::types::RDKafkaConfRes;
use xxhash_rust::xxh3::xxh3_64;

use crate::clock::Stopwatch;
use crate::config::KafkaConnection;
use crate::fault::configuration;
use crate::model::timestamp::Timestamp;
use crate::source::Moved;

/// How long the brokers may take to answer a question.
const ANSWER: Duration = Duration::from_secs(10);
/// How long reading may stand still before it fails.
const PROGRESS: Duration = Duration::from_secs(30);
/// How long one look at the queue waits.
const POLL: Duration = Duration::from_millis(500);

/// What a connection's properties may change.
const DEFAULTS: [(&str, &str); 5] = [
    ("client.id", "trueup"),
    // librdkafka wants a group for every assignment; nothing is ever committed to it.
    ("group.id", "trueup"),
    // The end of a partition is told by an answer without messages: it need not wait.
    ("fetch.wait.max.ms", "50"),
    // Bounds the memory of each reading thread; a full queue is filled again at once.
    ("queued.max.messages.kbytes", "32768"),
    ("fetch.queue.backoff.ms", "10"),
];

/// What a snapshot relies on.
const FIXED: [(&str, &str); 7] = [
    ("enable.auto.commit", "false"),
    ("enable.auto.offset.store", "false"),
    ("isolation.level", "read_committed"),
    ("enable.partition.eof", "true"),
    // Offsets that retention has removed are an error, never a jump.
    ("auto.offset.reset", "error"),
    ("allow.auto.create.topics", "false"),
    // A follower may lag behind the end that was frozen: read from the leader.
    ("client.rack", ""),
];

/// A topic, connected.
pub(super) struct Topic<'t> {
    name: &'t str,
    brokers: &'t str,
    consumer: BaseConsumer<Complaints>,
}

/// The offsets that a partition has: from `low` up to, not including, `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub low: i64,
    /// The last stable offset: before it, every transaction is decided.
    pub end: i64,
}

/// Offsets of a partition, the end not included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Offsets {
    pub start: i64,
    pub end: i64,
}

impl<'t> Topic<'t> {
    /// Prepares a connection; it is made when first needed.
    pub fn connect(connection: &'t KafkaConnection, name: &'t str) -> Result<Topic<'t>> {
        let mut config = ClientConfig::new();
        for (key, value) in DEFAULTS {
            config.set(key, value);
        }
        for (key, value) in &connection.properties {
            config.set(key, value.reveal());
        }
        for (key, value) in FIXED {
            config.set(key, value);
        }
        config.set("bootstrap.servers", &connection.brokers);
        let consumer = config.create_with_context(Complaints::default()).map_err(refused_property)?;
        Ok(Topic { name, brokers: &connection.brokers, consumer })
    }

    /// The numbers of all partitions, in order.
    pub fn partitions(&self) -> Result<Vec<i32>> {
        let metadata = self.consumer.fetch_metadata(Some(self.name), ANSWER).map_err(|error| self.no_answer(&error))?;
        let topic = metadata.topics().first().filter(|topic| topic.name() == self.name);
        let topic = topic.ok_or_else(|| anyhow!("{self}: the brokers say nothing about it"))?;
        match topic.error().map(RDKafkaErrorCode::from) {
            None => {}
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {
                bail!("{self} does not exist: check source.topic and connections.kafka.brokers")
            }
            Some(code) => bail!("{self} cannot be read: {code}"),
        }
        if let Some(lost) = topic.partitions().iter().find(|partition| partition.leader() < 0) {
            bail!("{self}: partition {} has no leader, so it cannot be read now", lost.id());
        }
        let mut partitions: Vec<i32> = topic.partitions().iter().map(rdkafka::metadata::MetadataPartition::id).collect();
        partitions.sort_unstable();
        Ok(partitions)
    }

    /// What tells the cluster from others: its id, or without one the brokers' names.
    pub fn cluster(&self) -> String {
        self.consumer.client().fetch_cluster_id(ANSWER).unwrap_or_else(|| self.brokers.to_owned())
    }

    /// The offsets of a partition, now. Under `read_committed` the brokers answer
    /// with the last stable offset where others would get the high watermark.
    pub fn extent(&self, partition: i32) -> Result<Extent> {
        let watermarks = self.consumer.fetch_watermarks(self.name, partition, ANSWER);
        let (low, end) = watermarks.map_err(|error| self.no_answer(&error)).with_context(|| self.place(partition))?;
        Ok(Extent { low, end })
    }

    /// For each partition, the first offset whose message is not older than `time`;
    /// `None` where all are older.
    pub fn offsets_at(&self, partitions: &[i32], time: Timestamp) -> Result<BTreeMap<i32, Option<i64>>> {
        // Negative numbers have meanings of their own here.
        let millis = time.nanos().div_euclid(NANOS_IN_MILLI).max(0);
        let mut times = TopicPartitionList::new();
        for partition in partitions {
            times.add_partition_offset(self.name, *partition, Offset::Offset(millis)).map_err(|error| self.no_answer(&error))?;
        }
        let found = self.consumer.offsets_for_times(times, ANSWER).map_err(|error| self.no_answer(&error))?;
        let mut offsets = BTreeMap::new();
        for element in found.elements() {
            let place = || self.place(element.partition());
            element.error().map_err(|error| self.no_answer(&error)).with_context(place)?;
            let offset = match element.offset() {
                Offset::Offset(offset) => Some(offset),
                Offset::End => None,
                other => bail!("{}: the brokers answer {other:?} where an offset for {time} was asked for", place()),
            };
            offsets.insert(element.partition(), offset);
        }
        Ok(offsets)
    }

    /// Tells the last message of some offsets from others that could be there; `None` where
    /// there is none at the very end, but perhaps the marker of a transaction.
    pub fn evidence(&self, partition: i32, Offsets { start, end }: Offsets) -> Result<Option<String>> {
        if start >= end {
            return Ok(None);
        }
        self.assign(partition, end - 1)?;
        let message = self.next(partition)?.filter(|message| message.offset() == end - 1);
        Ok(message.map(|message| {
            let written = message.timestamp().to_millis().unwrap_or_default();
            let hash = |bytes: Option<&[u8]>| xxh3_64(bytes.unwrap_or_default());
            format!("{written} {:016x} {:016x}", hash(message.key()), hash(message.payload()))
        }))
    }

    /// Reads `partition` from `start` on.
    pub fn assign(&self, partition: i32, start: i64) -> Result<()> {
        let mut assignment = TopicPartitionList::new();
        assignment
            .add_partition_offset(self.name, partition, Offset::Offset(start))
            .and_then(|()| self.consumer.assign(&assignment))
            .with_context(|| self.place(partition))
    }

    /// The next message of the assigned partition; `None` at its end.
    pub fn next(&self, partition: i32) -> Result<Option<BorrowedMessage<'_>>> {
        let standing = Stopwatch::start();
        loop {
            match self.consumer.poll(POLL) {
                Some(Ok(message)) if message.partition() == partition => return Ok(Some(message)),
                Some(Err(KafkaError::PartitionEOF(ended))) if ended == partition => return Ok(None),
                Some(Err(error)) => self.bear(&error).with_context(|| self.place(partition))?,
                Some(Ok(_)) | None => {}
            }
            if standing.seconds() > PROGRESS.as_secs_f64() {
                bail!(
                    "{}: nothing came from {} for {} s, before the end of the partition{}",
                    self.place(partition),
                    self.brokers,
                    PROGRESS.as_secs(),
                    self.complaint()
                );
            }
        }
    }

    /// Passes over what librdkafka mends by itself, or what is about the group alone.
    fn bear(&self, error: &KafkaError) -> Result<()> {
        use RDKafkaErrorCode as Code;
        match error.rdkafka_error_code() {
            Some(
                Code::BrokerTransportFailure
                | Code::AllBrokersDown
                | Code::Resolve
                | Code::OperationTimedOut
                | Code::RequestTimedOut
                | Code::PartitionEOF
                | Code::WaitingForCoordinator
                | Code::CoordinatorLoadInProgress
                | Code::CoordinatorNotAvailable
                | Code::NotCoordinator
                | Code::GroupAuthorizationFailed,
            ) => {
                tracing::info!(%error, "Kafka: going on");
                Ok(())
            }
            Some(Code::AutoOffsetReset | Code::OffsetOutOfRange) => {
                bail!(Moved("retention has removed messages that were to be read".to_owned()))
            }
            _ => bail!("the brokers {} refuse to deliver: {error}{}", self.brokers, self.complaint()),
        }
    }

    fn no_answer(&self, error: &KafkaError) -> anyhow::Error {
        // What was logged meanwhile says why; it waits in the queue.
        for _ in 0..100 {
            if let Some(Err(error)) = self.consumer.poll(Duration::ZERO) {
                tracing::debug!(%error, "Kafka");
            }
        }
        let complaint = self.complaint();
        anyhow!("{self}: no answer from the brokers {}: {error}{complaint}: check connections.kafka", self.brokers)
    }

    fn complaint(&self) -> String {
        let last = self.consumer.context().last.lock().map(|last| last.clone()).unwrap_or_default();
        last.map(|text| format!(" ({text})")).unwrap_or_default()
    }

    /// What people call a partition.
    pub fn place(&self, partition: i32) -> String {
        format!("kafka {}/{partition}", self.name)
    }
}

impl std::fmt::Display for Topic<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kafka topic `{}` on {}", self.name, self.brokers)
    }
}

const NANOS_IN_MILLI: i64 = 1_000_000;

/// When a message was written, as the producer or the broker says.
pub(super) fn written_at(message: &BorrowedMessage<'_>) -> Option<Timestamp> {
    message.timestamp().to_millis()?.checked_mul(NANOS_IN_MILLI).and_then(Timestamp::in_range)
}

/// librdkafka's own text would repeat the value, which may be a secret.
fn refused_property(error: KafkaError) -> anyhow::Error {
    let KafkaError::ClientConfig(kind, _, key, _) = error else {
        return anyhow::Error::new(error).context("connections.kafka: no client could be made");
    };
    let reason = match kind {
        RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN => "librdkafka knows no such property",
        _ => "librdkafka refuses its value",
    };
    let security = ["security.", "ssl.", "sasl."].iter().any(|prefix| key.starts_with(prefix));
    let hint = if security { " (TLS and SASL need a build with --features kafka-ssl or kafka-sasl)" } else { "" };
    configuration(format!("connections.kafka.properties.{key}: {reason}{hint}"))
}

/// Keeps librdkafka's last complaint, for errors that say no more than "timed out".
#[derive(Default)]
struct Complaints {
    last: Mutex<Option<String>>,
}

impl Complaints {
    fn keep(&self, text: &str) {
        // The name of the thread is of no use to anyone.
        let text = text.split_once("]: ").filter(|_| text.starts_with("[thrd:")).map_or(text, |(_, text)| text);
        if let Ok(mut last) = self.last.lock() {
            *last = Some(text.to_owned());
        }
    }
}

impl ClientContext for Complaints {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(facility, message, "librdkafka");
        if matches!(level, RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error) {
            self.keep(message);
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // The end of a partition arrives here too, and is no complaint; that all
        // brokers are down hides why.
        use RDKafkaErrorCode::{AllBrokersDown, PartitionEOF};
        if !matches!(error.rdkafka_error_code(), Some(PartitionEOF | AllBrokersDown)) {
            self.keep(reason);
        }
    }
}

impl ConsumerContext for Complaints {}
