//! Topics of a real broker, one for each test.

use std::cell::Cell;
use std::env;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Message as _;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

const PATIENCE: Duration = Duration::from_secs(20);

/// The broker's address; without one the test has nothing to do.
#[allow(clippy::print_stdout)]
pub fn broker() -> Option<String> {
    let broker = env::var("TRUEUP_TEST_KAFKA").ok();
    if broker.is_none() {
        assert!(env::var_os("TRUEUP_TEST_REQUIRE_SERVICES").is_none(), "TRUEUP_TEST_KAFKA is not set");
        println!("skipped: TRUEUP_TEST_KAFKA is not set (tests/run starts a broker)");
    }
    broker
}

/// A topic that vanishes with the test.
pub struct Topic {
    pub broker: String,
    pub name: String,
    partitions: i32,
    next_partition: Cell<i32>,
    producer: BaseProducer,
}

/// What is written to a topic.
#[derive(Debug, Clone, Default)]
pub struct Message {
    /// One partition after the other where none is named.
    pub partition: Option<i32>,
    pub key: Option<String>,
    pub value: Option<String>,
    /// RFC 3339; now where it is not said.
    pub written_at: Option<String>,
}

impl Message {
    pub fn of(value: impl Into<String>) -> Self {
        Message { value: Some(value.into()), ..Message::default() }
    }

    pub fn tombstone(key: &str) -> Self {
        Message { key: Some(key.to_owned()), ..Message::default() }
    }

    pub fn at(self, time: &str) -> Self {
        Message { written_at: Some(time.to_owned()), ..self }
    }

    pub fn key(self, key: &str) -> Self {
        Message { key: Some(key.to_owned()), ..self }
    }
}

impl Topic {
    pub fn create(broker: &str, partitions: i32, config: &[(&str, &str)]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let name = format!("trueup-test-{now:x}-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut topic = NewTopic::new(&name, partitions, TopicReplication::Fixed(1));
        for (key, value) in config {
            topic = topic.set(key, value);
        }
        let created = wait(admin(broker).create_topics([&topic], &options())).unwrap();
        created.into_iter().for_each(|result| drop(result.unwrap()));
        let producer = client(broker).create().unwrap();
        Topic { broker: broker.to_owned(), name, partitions, next_partition: Cell::new(0), producer }
    }

    /// Deletes the topic and creates it again, empty.
    pub fn create_anew(&self) {
        wait(admin(&self.broker).delete_topics(&[&self.name], &options())).unwrap();
        let topic = NewTopic::new(&self.name, self.partitions, TopicReplication::Fixed(1));
        for _ in 0..200 {
            // The old one goes in the background.
            let created = wait(admin(&self.broker).create_topics([&topic], &options())).unwrap();
            if created.iter().all(Result::is_ok) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("topic {} cannot be created anew", self.name);
    }

    /// Writes messages and waits until they are there.
    pub fn produce(&self, messages: &[Message]) {
        self.send(&self.producer, messages);
        self.producer.flush(PATIENCE).unwrap();
    }

    /// A producer in an open transaction.
    pub fn begin(&self, id: &str) -> BaseProducer {
        let id = format!("{}-{id}", self.name);
        let producer: BaseProducer = client(&self.broker).set("transactional.id", id).create().unwrap();
        producer.init_transactions(PATIENCE).unwrap();
        producer.begin_transaction().unwrap();
        producer
    }

    /// Hands messages to a producer.
    pub fn send(&self, producer: &BaseProducer, messages: &[Message]) {
        for message in messages {
            let next = self.next_partition.get();
            let partition = message.partition.unwrap_or(next);
            self.next_partition.set((next + 1) % self.partitions);
            let mut record = BaseRecord::<str, str>::to(&self.name).partition(partition);
            record.key = message.key.as_deref();
            record.payload = message.value.as_deref();
            record.timestamp = message.written_at.as_deref().map(millis);
            producer.send(record).map_err(|(error, _)| error).unwrap();
        }
    }

    /// Removes what lies before `offset`, as retention does.
    pub fn delete_before(&self, partition: i32, offset: i64) {
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition_offset(&self.name, partition, Offset::Offset(offset)).unwrap();
        wait(admin(&self.broker).delete_records(&offsets, &options())).unwrap();
    }

    /// The offsets of a partition that can be read.
    pub fn offsets(&self, partition: i32) -> Vec<i64> {
        let consumer: BaseConsumer =
            client(&self.broker).set("group.id", "trueup-test").set("enable.partition.eof", "true").create().unwrap();
        let mut assignment = TopicPartitionList::new();
        assignment.add_partition_offset(&self.name, partition, Offset::Beginning).unwrap();
        consumer.assign(&assignment).unwrap();
        let mut offsets = Vec::new();
        loop {
            match consumer.poll(PATIENCE).expect("an answer in time") {
                Ok(message) => offsets.push(message.offset()),
                Err(KafkaError::PartitionEOF(_)) => return offsets,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

impl Drop for Topic {
    fn drop(&mut self) {
        let _ = wait(admin(&self.broker).delete_topics(&[&self.name], &options()));
    }
}

fn client(broker: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", broker);
    config
}

fn admin(broker: &str) -> AdminClient<DefaultClientContext> {
    client(broker).create().unwrap()
}

fn options() -> AdminOptions {
    AdminOptions::new().operation_timeout(Some(PATIENCE))
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn millis(time: &str) -> i64 {
    time.parse::<chrono::DateTime<chrono::Utc>>().unwrap().timestamp_millis()
}
