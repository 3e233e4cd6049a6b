//! Events from a topic of a real broker.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rdkafka::producer::Producer;
use serde_json::{Value, json};
use trueup::config::{Job, Source};
use trueup::source::kafka::KafkaSource;
use trueup::source::{EventBatch, EventSource as _, Selection, Wanted};

use crate::golden::{cases, check_step};
use crate::kafka_topic::{Message, Topic, broker};
use crate::parts::{self, Scratch, clickhouse, replace_key};
use crate::support::{Workspace, fixtures};

/// The case `sum`, with days as billing periods, on a topic.
fn workspace(topic: &Topic) -> Workspace {
    let workspace = Workspace::new();
    workspace.overlay(&fixtures().join("cases/sum"));
    workspace.edit("subscriptions.csv", "USD,month", "USD,day");
    read_from(&workspace, &topic.broker, &topic.name);
    workspace
}

/// Lets the job read a topic instead of files.
fn read_from(workspace: &Workspace, broker: &str, topic: &str) {
    workspace.edit("job.yaml", "kind: files", "kind: kafka");
    workspace.edit("job.yaml", "  paths: [\"events/*.ndjson\"]\n", &format!("  topic: {topic}\n"));
    let job = workspace.read("job.yaml");
    workspace.write("job.yaml", format!("{job}connections: {{kafka: {{brokers: \"{broker}\"}}}}\n"));
}

/// An event, written when it happened.
fn event(id: &str, time: &str, value: i32) -> Message {
    let event = json!({"tenant_id": "t1", "id": id, "event_name": "api.call", "external_customer_id": "acme",
        "timestamp": time, "properties": {"value": value}});
    Message::of(event.to_string()).at(time)
}

fn usage(workspace: &Workspace) -> Vec<BTreeMap<String, String>> {
    workspace.query("SELECT window_start, quantity, event_count, cost, events_digest FROM usage_windows ORDER BY window_start")
}

fn quantities(workspace: &Workspace) -> Vec<(String, String)> {
    usage(workspace).iter().map(|row| (row["window_start"].clone(), row["quantity"].clone())).collect()
}

fn window(start: &str, quantity: &str) -> (String, String) {
    (start.to_owned(), quantity.to_owned())
}

#[test]
fn every_case_gives_the_expected_rows_from_a_topic() {
    let Some(broker) = broker() else { return };
    golden_cases(&|case, problems| {
        check_case(&broker, case, None, true, problems);
        if case.join("then-1").exists() {
            check_case(&broker, case, None, false, problems);
        }
    });
}

#[test]
fn every_case_gives_the_expected_rows_from_a_topic_to_clickhouse() {
    let (Some(broker), Some(url)) = (broker(), clickhouse()) else { return };
    golden_cases(&|case, problems| check_case(&broker, case, Some(&Scratch::new(&url)), true, problems));
}

/// Whether the events of a case can be messages.
pub fn can_be_messages(case: &Path) -> bool {
    fs::read_to_string(case.join("job.yaml")).unwrap().contains(".ndjson") && !loses_events(case)
}

/// Every case whose events can be messages.
fn golden_cases(check_case: &(dyn Fn(&Path, &mut String) + Sync)) {
    let cases = cases();
    let cases: Vec<_> = cases.iter().filter(|case| can_be_messages(case)).collect();
    assert!(cases.len() >= 40, "only {} cases", cases.len());
    // Most of the time is waiting for the broker.
    let check = |cases: &[&PathBuf]| {
        let mut problems = String::new();
        cases.iter().for_each(|case| check_case(case, &mut problems));
        problems
    };
    let problems: String = std::thread::scope(|scope| {
        let threads: Vec<_> = cases.chunks(cases.len() / 8 + 1).map(|cases| scope.spawn(move || check(cases))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(problems.is_empty(), "{problems}");
}

/// Whether a later step replaces a file of events: a topic loses nothing.
fn loses_events(case: &Path) -> bool {
    let names = |step: &Path| -> Vec<_> {
        let files = fs::read_dir(step.join("events")).into_iter().flatten();
        files.map(|file| file.unwrap().file_name()).collect()
    };
    let first = names(case);
    let overlays = (1..).map(|step| case.join(format!("then-{step}"))).take_while(|overlay| overlay.exists());
    overlays.flat_map(|step| names(&step)).any(|name| first.contains(&name))
}

/// One case through a topic of its own, into SQLite or the given database.
pub fn check_case(broker: &str, case: &Path, store: Option<&Scratch>, full: bool, problems: &mut String) {
    // Cases span years: nothing is too old, and nothing too far ahead.
    let topic = Topic::create(broker, 3, &[("retention.ms", "-1"), ("message.timestamp.after.max.ms", "9223372036854775807")]);
    let workspace = Workspace::new();
    let overlays = (1..).map(|step| case.join(format!("then-{step}"))).take_while(|overlay| overlay.exists());
    for step in std::iter::once(case.to_owned()).chain(overlays) {
        assert!(step == *case || !step.join("job.yaml").exists(), "{} changes its job", step.display());
        workspace.overlay(&step);
        if step == *case {
            read_from(&workspace, broker, &topic.name);
        }
        topic.produce(&messages_of(&step.join("events")));
        let name = step.display().to_string();
        let Some(store) = store else {
            check_step(&workspace, &step, &name, full, problems);
            continue;
        };
        let both = format!(
            "connections: {{kafka: {{brokers: \"{broker}\"}}, clickhouse: {{url: \"{}\", database: {}}}}}",
            store.url, store.name
        );
        let job = replace_key(&workspace.read("job.yaml"), "connections", &both);
        workspace.write("parts.yaml", replace_key(&job, "store", "store: {kind: clickhouse}"));
        parts::check_step(&workspace, &step, &name, (false, full), problems);
    }
}

/// The lines of a step's event files, written when they say that they were ingested.
fn messages_of(events: &Path) -> Vec<Message> {
    let Ok(files) = fs::read_dir(events) else { return Vec::new() };
    let mut files: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut messages = Vec::new();
    for line in files.iter().flat_map(|file| fs::read_to_string(file).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()) {
        let event: Value = serde_json::from_str(&line).unwrap_or_default();
        let time = ["ingested_at", "time", "timestamp"].iter().find_map(|field| event[field].as_str());
        let time = time.filter(|time| time.parse::<chrono::DateTime<chrono::Utc>>().is_ok());
        messages.push(Message { written_at: time.map(str::to_owned), ..Message::of(line) });
    }
    messages.retain(|message| message.value.as_deref().is_some_and(|line| !line.trim().is_empty()));
    messages
}

#[test]
fn a_tombstone_voids_the_event_that_its_key_names() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, 2, &[]);
    let workspace = workspace(&topic);
    for (id, hour) in [("e1", 10), ("e2", 11), ("e3", 12), ("e4", 13), ("e/5", 14)] {
        topic.produce(&[event(id, &format!("2026-01-05T{hour}:30:00Z"), 7)]);
    }
    topic.produce(&[
        Message::tombstone(r#"{"tenant_id":"t1","id":"e1"}"#).at("2026-01-06T00:00:00Z"),
        Message::tombstone("t1/e2").at("2026-01-06T00:00:00Z"),
        Message::tombstone(r#""t1/e/5""#).at("2026-01-06T00:00:00Z"),
        // Not known which tenant's, and no key at all.
        Message::tombstone("e3").at("2026-01-06T00:00:00Z"),
        Message { partition: Some(1), ..Message::default() }.at("2026-01-06T00:00:00Z"),
    ]);
    let summary = workspace.run(&[]);
    assert_eq!(quantities(&workspace), [window("2026-01-05T12:00:00Z", "7"), window("2026-01-05T13:00:00Z", "7")]);
    // Each of the three lost its event and came itself.
    assert_eq!(summary["events"]["read"], 10);
    assert_eq!(summary["events"]["dead_lettered"], 2);
    let details = workspace.query("SELECT detail FROM dead_letters ORDER BY detail");
    let details: Vec<_> = details.iter().map(|row| row["detail"].as_str()).collect();
    assert!(details.iter().all(|detail| detail.starts_with(&format!("kafka {}/", topic.name))), "{details:?}");
    assert!(details.iter().all(|detail| detail.contains(" offset ") && detail.contains("tombstone")), "{details:?}");

    // With a tenant of its own, the source takes the id alone.
    workspace.edit("job.yaml", "  topic:", "  tenant_id: t1\n  topic:");
    let summary = workspace.run(&[]);
    assert_eq!(summary["events"]["dead_lettered"], 1);
    assert_eq!(quantities(&workspace), [window("2026-01-05T13:00:00Z", "7")]);
    // A slash that may belong to the id or to another tenant is not guessed at.
    topic.produce(&[Message::tombstone("t2/e4").at("2026-01-06T00:00:00Z")]);
    assert_eq!(workspace.run(&[])["events"]["dead_lettered"], 2);
}

#[test]
fn payloads_are_completed_by_the_message_and_the_source() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, 1, &[]);
    let workspace = workspace(&topic);
    workspace.edit("job.yaml", "  topic:", "  tenant_id: t1\n  topic:");
    let event = |value: i32| {
        json!({"id": "e1", "event_name": "api.call", "external_customer_id": "acme",
            "timestamp": "2026-01-05T10:30:00Z", "properties": {"value": value}})
        .to_string()
    };
    // Later in the topic, but written earlier: the first one amends the second.
    topic.produce(&[
        Message::of(event(2)).at("2026-01-05T12:00:00Z"),
        Message::of(event(1)).at("2026-01-05T11:00:00Z"),
        Message::of("{\"id\":").at("2026-01-05T11:00:00Z"),
        Message::of("").at("2026-01-05T11:00:00Z"),
    ]);
    let summary = workspace.run(&[]);
    assert_eq!(quantities(&workspace), [window("2026-01-05T10:00:00Z", "2")]);
    assert_eq!(
        summary["events"],
        json!({"read": 4, "out_of_range": 0, "duplicates": 1, "voided": 0, "unmatched": 0,
        "dead_lettered": 2, "metered": 1})
    );
    let details = workspace.query("SELECT detail FROM dead_letters ORDER BY detail");
    assert!(details[0]["detail"].starts_with(&format!("kafka {}/0 offset 2: ", topic.name)), "{details:?}");
}

#[test]
fn only_decided_transactions_count_and_their_markers_do_not_hold_up() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, 1, &[]);
    let workspace = workspace(&topic);
    let patience = Duration::from_secs(20);
    topic.produce(&[event("plain", "2026-01-05T10:30:00Z", 1)]);
    let committed = topic.begin("committed");
    topic.send(&committed, &[event("committed", "2026-01-05T11:30:00Z", 2)]);
    committed.commit_transaction(patience).unwrap();
    let aborted = topic.begin("aborted");
    topic.send(&aborted, &[event("aborted", "2026-01-05T12:30:00Z", 4)]);
    aborted.flush(patience).unwrap();
    aborted.abort_transaction(patience).unwrap();
    // The last two offsets are the aborted message and its marker.
    assert_eq!(topic.offsets(0).last(), Some(&1));
    let started = Instant::now();
    let decided = [window("2026-01-05T10:00:00Z", "1"), window("2026-01-05T11:00:00Z", "2")];
    assert_eq!(workspace.run(&[])["events"]["read"], 2);
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    assert_eq!(quantities(&workspace), decided);
    assert_eq!(offsets_read(&workspace), ["0..5"]);

    // While a transaction is open, the snapshot ends before it.
    let open = topic.begin("open");
    topic.send(&open, &[event("open", "2026-01-05T13:30:00Z", 8)]);
    open.flush(patience).unwrap();
    topic.produce(&[event("after", "2026-01-05T14:30:00Z", 16)]);
    assert_eq!(workspace.run(&[])["events"]["read"], 2);
    assert_eq!(quantities(&workspace), decided);
    assert_eq!(offsets_read(&workspace), ["0..5"]);
    open.commit_transaction(patience).unwrap();
    assert_eq!(workspace.run(&[])["events"]["read"], 4);
}

/// The offsets that the last run recorded.
fn offsets_read(workspace: &Workspace) -> Vec<String> {
    let runs = workspace.query("SELECT input FROM runs ORDER BY run_id DESC LIMIT 1");
    let input: Value = serde_json::from_str(&runs[0]["input"]).unwrap();
    input["files"].as_array().unwrap().iter().map(|file| file["fingerprint"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn gaps_of_a_compacted_topic_are_normal() {
    let Some(broker) = broker() else { return };
    let compact = [("cleanup.policy", "compact"), ("segment.ms", "1000"), ("min.cleanable.dirty.ratio", "0.001")];
    let topic = Topic::create(&broker, 1, &compact);
    let workspace = workspace(&topic);
    // Every message opens a segment, for they lie an hour apart; only closed ones are compacted.
    for (id, hour) in [("e1", 10), ("e2", 11), ("e1", 12), ("e3", 13), ("e1", 14), ("e3", 15), ("e4", 16)] {
        topic.produce(&[event(id, &format!("2026-01-05T{hour}:00:00Z"), hour).key(id)]);
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while topic.offsets(0).len() > 4 {
        assert!(Instant::now() < deadline, "not compacted: {:?}", topic.offsets(0));
        std::thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(topic.offsets(0), [1, 4, 5, 6]);
    assert_eq!(workspace.run(&[])["events"]["read"], 4);
    let expected = [(11, "11"), (14, "14"), (15, "15"), (16, "16")];
    assert_eq!(quantities(&workspace), expected.map(|(hour, n)| window(&format!("2026-01-05T{hour}:00:00Z"), n)));
}

#[test]
fn retention_past_the_start_fails_and_writes_nothing() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, 2, &[]);
    let workspace = workspace(&topic);
    for (id, day) in [("e1", 3), ("e2", 4), ("e3", 5), ("e4", 6)] {
        let time = format!("2026-01-0{day}T12:00:00Z");
        topic.produce(&[
            Message { partition: Some(0), ..event(id, &time, day) },
            Message { partition: Some(1), ..event(&format!("{id}b"), &time, day) },
        ]);
    }
    topic.delete_before(1, 2);
    let place = format!("kafka {}/1", topic.name);
    for range in [&[][..], &["--day", "2026-01-04"], &["--start", "2026-01-05", "--end", "2026-01-06"]] {
        let outcome = workspace.trueup(&[&["run", "job.yaml"], range].concat());
        outcome.fails_with(1, &[&place, "2026-01-05T12:00:00Z", "--start", "retention"]);
    }
    assert!(usage(&workspace).is_empty());
    assert!(workspace.query("SELECT run_id FROM runs").is_empty());
    // What is left reaches back far enough for this day.
    workspace.run(&["--day", "2026-01-06"]);
    assert_eq!(quantities(&workspace), [window("2026-01-06T12:00:00Z", "12")]);
    // Nothing is left to tell how old it was.
    topic.delete_before(1, 4);
    workspace.trueup(&["run", "job.yaml", "--day", "2026-01-06"]).fails_with(1, &[&place, "no message is left"]);
}

#[test]
fn retention_that_overtakes_a_run_fails_it() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, 1, &[]);
    let workspace = workspace(&topic);
    let events: Vec<_> = (10..20).map(|hour| event(&format!("e{hour}"), &format!("2026-01-05T{hour}:00:00Z"), 1)).collect();
    topic.produce(&events);
    let job = Job::load(&workspace.path("job.yaml")).unwrap();
    let Source::Kafka { connection, topic: name, margin, tenant_id, columns } = job.source else { panic!() };
    let source = KafkaSource { connection, topic: name, margin, tenant_id, columns, from_first_copy: false, snapshot: None };
    let splits = source.splits(&Selection::default()).unwrap();
    // What comes later is not delivered; what is gone is missed.
    topic.produce(&events);
    let read = || {
        let mut rows = 0;
        let sink = &mut |batch: &EventBatch| {
            rows += batch.len();
            Ok(())
        };
        source.read(&splits[0], Wanted::Whole, sink).map(|()| rows)
    };
    assert_eq!(read().unwrap(), 10);
    topic.delete_before(0, 5);
    let error = format!("{:#}", read().unwrap_err());
    assert!(error.contains(&format!("kafka {}/0", topic.name)) && error.contains("retention"), "{error}");
}

#[test]
fn a_range_starts_by_the_time_of_messages_less_the_margin() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, 1, &[]);
    let workspace = workspace(&topic);
    workspace.edit("job.yaml", "  topic:", "  margin: 30m\n  topic:");
    topic.produce(&[
        event("e0", "2026-01-03T10:00:00Z", 1),
        event("e1", "2026-01-04T23:29:59Z", 2),
        // Written before they happened, as clocks that differ have it.
        event("e2", "2026-01-05T00:10:00Z", 4).at("2026-01-04T23:40:00Z"),
        event("e3", "2026-01-05T10:00:00Z", 8),
        event("e4", "2026-01-06T10:00:00Z", 16),
    ]);
    let summary = workspace.run(&["--day", "2026-01-05"]);
    assert_eq!(offsets_read(&workspace), ["2..5"]);
    assert_eq!(summary["events"]["read"], 3);
    assert_eq!(quantities(&workspace), [window("2026-01-05T00:00:00Z", "4"), window("2026-01-05T10:00:00Z", "8")]);
    // A longer billing period begins before what that run read.
    let run = &workspace.query("SELECT run_id FROM runs")[0]["run_id"];
    workspace.edit("subscriptions.csv", "USD,day", "USD,month");
    workspace.trueup(&["run", "job.yaml", "--snapshot", run]).fails_with(1, &[run, "begins at offset 2", "offset 0"]);
    workspace.edit("subscriptions.csv", "USD,month", "USD,day");
    // Where the first copy counts, older ones must be seen.
    workspace.edit("job.yaml", "keep: latest", "keep: first");
    workspace.run(&["--day", "2026-01-05"]);
    assert_eq!(offsets_read(&workspace), ["0..5"]);
}

/// A range begins at an offset: what lies before it is not read, and not repaired because it is not met.
#[test]
fn a_message_that_a_range_does_not_read_is_no_repaired_one() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, 1, &[]);
    let workspace = workspace(&topic);
    topic.produce(&[
        Message::of("{broken").at("2026-01-03T10:00:00Z"),
        event("e1", "2026-01-05T10:00:00Z", 1),
        Message::of("{broken too").at("2026-01-05T11:00:00Z"),
    ]);
    let open = |run: serde_json::Value| {
        let rows = workspace.query("SELECT event_time FROM dead_letters WHERE resolved_run_id IS NULL");
        (run["dead_letters_resolved"].as_u64(), rows.len())
    };
    assert_eq!(open(workspace.run(&["--day", "2026-01-05"])), (Some(0), 1));
    assert_eq!(open(workspace.run(&[])), (Some(0), 2));
    assert_eq!(open(workspace.run(&["--day", "2026-01-05"])), (Some(0), 2));
    assert_eq!(open(workspace.run(&["--full"])), (Some(0), 2));
}

#[test]
fn a_snapshot_is_read_again_whatever_came_later() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, 3, &[]);
    let workspace = workspace(&topic);
    let files: Vec<_> = (10..20).map(|hour| event(&format!("e{hour}"), &format!("2026-01-05T{hour}:00:00Z"), hour)).collect();
    topic.produce(&files);
    let first = workspace.run(&[]);
    let (rows, offsets) = (usage(&workspace), offsets_read(&workspace));
    topic.produce(&[
        event("late", "2026-01-05T11:30:00Z", 5),
        event("outside", "2026-01-07T11:30:00Z", 5),
        Message::tombstone("t1/e12").at("2026-01-08T00:00:00Z"),
    ]);
    workspace.run(&[]);
    let later = usage(&workspace);
    assert_ne!(later, rows);
    let run_id = first["run_id"].as_str().unwrap();
    let again = workspace.run(&["--snapshot", run_id]);
    assert_eq!((&again["events"], &again["range"]), (&first["events"], &first["range"]));
    assert_eq!(offsets_read(&workspace), offsets);
    // What lies outside of that run's range stays.
    let outside: Vec<_> = later.into_iter().filter(|row| row["window_start"].starts_with("2026-01-07")).collect();
    assert_eq!(usage(&workspace), [rows, outside].concat());

    let unknown = workspace.trueup(&["run", "job.yaml", "--snapshot", "nothing"]);
    unknown.fails_with(2, &["--snapshot nothing", "no such run"]);
    topic.delete_before(0, 1);
    let removed = workspace.trueup(&["run", "job.yaml", "--snapshot", run_id]);
    removed.fails_with(1, &[run_id, &format!("kafka {}/0", topic.name), "retention"]);
}

#[test]
fn a_run_over_files_is_no_snapshot() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, 1, &[]);
    let workspace = Workspace::new();
    workspace.overlay(&fixtures().join("cases/sum"));
    let run = workspace.run(&[]);
    let run_id = run["run_id"].as_str().unwrap();
    workspace.trueup(&["run", "job.yaml", "--snapshot", run_id]).fails_with(2, &["no Kafka topic"]);
    read_from(&workspace, &broker, &topic.name);
    workspace.trueup(&["run", "job.yaml", "--snapshot", run_id]).fails_with(2, &[run_id, "events.ndjson", &topic.name]);
}

#[test]
fn an_empty_topic_has_nothing_and_a_missing_one_is_an_error() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, 3, &[]);
    let workspace = workspace(&topic);
    assert_eq!(workspace.run(&[])["events"]["read"], 0);
    topic.produce(&[event("e1", "2026-01-05T10:00:00Z", 3)]);
    assert_eq!(workspace.run(&[])["events"]["read"], 1);
    workspace.edit("job.yaml", &topic.name, "no-such-topic");
    workspace.trueup(&["run", "job.yaml"]).fails_with(1, &["`no-such-topic`", &broker, "does not exist"]);
}

#[test]
fn an_unreachable_broker_is_told_in_time() {
    let workspace = Workspace::new();
    workspace.overlay(&fixtures().join("cases/sum"));
    read_from(&workspace, "127.0.0.1:1", "usage");
    let started = Instant::now();
    workspace.trueup(&["run", "job.yaml"]).fails_with(1, &["127.0.0.1:1", "`usage`", "refused"]);
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[test]
fn a_property_that_is_refused_does_not_show_its_value() {
    let workspace = Workspace::new();
    workspace.overlay(&fixtures().join("cases/sum"));
    read_from(&workspace, "127.0.0.1:1", "usage");
    for (property, said) in [("no.such.property", "knows no such property"), ("security.protocol", "refuses its value")] {
        let job = workspace.read("job.yaml");
        workspace.edit("job.yaml", "1\"}", &format!("1\", properties: {{{property}: hunter2}}}}"));
        let outcome = workspace.trueup(&["run", "job.yaml"]);
        outcome.fails_with(2, &[property, said]);
        assert!(!outcome.stderr.contains("hunter2"), "{}", outcome.stderr);
        workspace.write("job.yaml", &job);
    }
}
