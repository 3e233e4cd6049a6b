//! Incremental runs from a topic and from a table: they read what came since the last run,
//! and take what was there as it was kept.

use std::cell::Cell;
use std::fs;

use serde_json::{Value, json};

use crate::incremental::{increment, read};
use crate::incremental_windows::{Call, METERS, PRICES, check_against_a_fresh_store, day, night, shop};
use crate::kafka_topic::{Message, Topic, broker};
use crate::kept_matches::{USER_PRICE, USERS, kept};
use crate::parts::{EVENTS_TABLE, Scratch, clickhouse, replace_key};
use crate::support::Workspace;

/// A shop whose job reads from a service; `fresh.yaml` reads the same events from files.
struct Shop {
    workspace: Workspace,
    source: Source,
    sent: Cell<u32>,
}

enum Source {
    Topic(Topic),
    Table(Scratch),
}

impl Source {
    fn topic(broker: &str) -> Source {
        Source::Topic(Topic::create(broker, 3, &[]))
    }

    fn table(url: &str) -> Source {
        let scratch = Scratch::new(url);
        scratch.sql(&format!("CREATE TABLE events {EVENTS_TABLE}"));
        Source::Table(scratch)
    }

    fn send(&self, lines: &str) {
        match self {
            Source::Topic(topic) => topic.produce(&lines.lines().map(Message::of).collect::<Vec<_>>()),
            Source::Table(scratch) => {
                let rows = lines.lines().map(|line| {
                    let mut row: Value = serde_json::from_str(line).unwrap();
                    let properties = row.get("properties").map(Value::to_string);
                    row["properties"] = json!(properties);
                    row.to_string() + "\n"
                });
                let rows: String = rows.collect();
                let settings = "SETTINGS date_time_input_format = 'best_effort'";
                scratch.sql(&format!("INSERT INTO events {settings} FORMAT JSONEachRow\n{rows}"));
            }
        }
    }
}

impl Shop {
    /// Five days of three customers, computed once.
    fn new(source: Source) -> Shop {
        let workspace = shop(&format!("{METERS}{USERS}"), &format!("{PRICES}{USER_PRICE}"));
        for entry in fs::read_dir(workspace.path("")).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name().to_str().unwrap().starts_with("trueup.db") {
                fs::remove_file(entry.path()).or_else(|_| fs::remove_dir_all(entry.path())).unwrap();
            }
        }
        let (from, connections) = match &source {
            Source::Topic(topic) => (
                format!("source: {{kind: kafka, topic: {}}}", topic.name),
                format!("connections: {{kafka: {{brokers: \"{}\"}}}}\n", topic.broker),
            ),
            Source::Table(scratch) => ("source: {kind: clickhouse, table: events}".to_owned(), scratch.connection(&scratch.url)),
        };
        let job = replace_key(&workspace.read("job.yaml"), "source", &from) + &connections + "incremental: always\n";
        workspace.write("job.yaml", job);
        (1..=5).for_each(|number| source.send(&day(number)));
        assert_eq!(workspace.run(&[])["events"]["metered"], 30);
        Shop { workspace, source, sent: Cell::new(0) }
    }

    fn send(&self, lines: impl AsRef<str>) {
        let number = self.sent.replace(self.sent.get() + 1);
        self.workspace.write(&format!("events/sent-{number}.ndjson"), lines.as_ref());
        self.source.send(lines.as_ref());
    }

    /// Sends events; then an incremental run leaves what a fresh one does.
    #[track_caller]
    fn night(&self, lines: impl AsRef<str>) -> Value {
        self.send(lines);
        night(&self.workspace)
    }

    /// A run that skips nothing says why.
    #[track_caller]
    fn skips_nothing(&self, why: &str) {
        let run = self.workspace.run(&["--incremental"]);
        assert_eq!(run["coverage"]["mode"], "full", "{}", run["coverage"]);
        let found = run["coverage"]["why"].as_str().unwrap_or_default();
        assert!(found.contains(why), "`{why}` is missing in: {found}");
        assert_eq!(self.workspace.trueup(&["verify", "job.yaml"]).code, 0);
    }
}

/// Late events, copies, voids and changed tables.
fn nights(shop: &Shop) {
    let Shop { workspace, .. } = shop;
    let run = shop.night(day(6));
    // The visits of other days; their users are known.
    assert_eq!((read(&run), kept(&run)), ((6, 6), 3 * 10));
    assert_eq!((read(&night(workspace)), kept(&night(workspace))), ((0, 0), 0));
    let late = |id: &str, customer, day, came| Call { id, customer, day, hour: 12, value: 7, came }.line();
    let run = shop.night(late("l1", "a", 1, 2) + &late("l2", "b", 3, 2));
    assert_eq!(read(&run), (2, 2));
    // Another value, another day, another customer, the same once more, none at all.
    let old = Call { id: "a-2-9", customer: "a", day: 2, hour: 9, value: 3, came: 3 };
    for call in [Call { value: 30, ..old }, Call { day: 4, came: 4, ..old }, Call { customer: "b", came: 5, ..old }] {
        let run = shop.night(call.line() + &late(&format!("with-{}", call.came), "c", 2, call.came));
        assert!(kept(&run) > 0, "{}", run["coverage"]);
    }
    shop.night(Call { customer: "b", came: 6, ..old }.line());
    let run = shop.night("{\"tenant_id\":\"t\",\"id\":\"a-2-9\",\"deleted\":true,\"ingested_at\":\"2026-04-07\"}\n");
    assert_eq!(run["events"]["voided"], 1);
    // A customer who comes later, and a price that was wrong.
    let run = shop.night(late("stranger", "d", 3, 8));
    assert_eq!(run["events"]["dead_lettered"], 1);
    workspace.write("customers.csv", workspace.read("customers.csv") + "t,d,xd\n");
    workspace.write("subscriptions.csv", workspace.read("subscriptions.csv") + "t,sd,d,pro,EUR,month,2025-01-01\n");
    night(workspace);
    workspace.edit(
        "prices.yaml",
        "meter_id: peak, currency: EUR, model: per_unit, unit_amount: \"3\"",
        "meter_id: peak, currency: EUR, model: per_unit, unit_amount: \"4\"",
    );
    night(workspace);
    // Nothing but the source is left to read keys and matches from.
    fs::remove_dir_all(workspace.path("trueup.db.keys")).unwrap();
    let run = shop.night(late("l3", "c", 4, 9));
    assert_eq!(kept(&run), 0);
    // The last of all events had a wrong date: what it billed goes with it.
    shop.night(late("last", "a", 5, 10).replace("2026-03-05", "2026-07-05"));
    let later_bills = || workspace.query("SELECT * FROM usage_periods WHERE period_start >= '2026-04-01'").len();
    assert!(later_bills() > 0);
    shop.send("{\"tenant_id\":\"t\",\"id\":\"last\",\"deleted\":true,\"ingested_at\":\"2026-04-11\"}\n");
    shop.skips_nothing("the last event was replaced or voided");
    assert_eq!(later_bills(), 0);
}

#[test]
fn nights_read_what_came_to_a_topic() {
    let Some(broker) = broker() else { return };
    nights(&Shop::new(Source::topic(&broker)));
}

#[test]
fn nights_read_what_came_to_a_table() {
    let Some(url) = clickhouse() else { return };
    nights(&Shop::new(Source::table(&url)));
}

/// A plan of a run that skips holds as long as nothing comes.
fn plans(shop: &Shop) {
    let Shop { workspace, .. } = shop;
    shop.send(day(6));
    assert_eq!(workspace.trueup(&["plan", "job.yaml", "--out", "first.json"]).code, 0);
    assert_eq!(workspace.trueup(&["apply", "first.json"]).code, 0);
    check_against_a_fresh_store(workspace);
    shop.send(day(7).replace("2026-04-01", "2026-04-02"));
    assert_eq!(workspace.trueup(&["plan", "job.yaml", "--out", "second.json"]).code, 0);
    shop.send(Call { id: "late", customer: "a", day: 2, hour: 10, value: 2, came: 3 }.line());
    workspace.trueup(&["apply", "second.json"]).fails_with(7, &["is new"]);
    night(workspace);
}

#[test]
fn plans_over_a_topic_hold_until_a_message_comes() {
    let Some(broker) = broker() else { return };
    plans(&Shop::new(Source::topic(&broker)));
}

#[test]
fn plans_over_a_table_hold_until_a_row_comes() {
    let Some(url) = clickhouse() else { return };
    plans(&Shop::new(Source::table(&url)));
}

/// What retention has removed was read, and its matches are kept.
#[test]
fn retention_does_not_end_nights() {
    let Some(broker) = broker() else { return };
    let shop = Shop::new(Source::topic(&broker));
    let Shop { workspace, source: Source::Topic(topic), .. } = &shop else { panic!() };
    shop.night(day(6));
    (0..3).for_each(|partition| topic.delete_before(partition, 12));
    // More nights than matches are kept of otherwise.
    for number in 7..=31 + 12 {
        let id = format!("late-{number}");
        let late = Call { id: &id, customer: "a", day: number % 6 + 1, hour: 11, value: number, came: 2 }.line();
        shop.send(if number <= 31 { day(number) + &late } else { late });
        let run = workspace.run(&[]);
        assert_eq!(run["coverage"]["mode"], "incremental", "{}", run["coverage"]);
        assert!(kept(&run) > 0, "{}", run["coverage"]);
    }
    check_against_a_fresh_store(workspace);
    // A copy of what is gone cannot be told from it.
    let runs = || workspace.query("SELECT run_id FROM runs").len();
    let before = runs();
    shop.send(Call { id: "a-2-9", customer: "a", day: 2, hour: 9, value: 30, came: 3 }.line());
    let place = format!("kafka {}/", topic.name);
    workspace.trueup(&["run", "job.yaml"]).fails_with(1, &[&place, "retention has removed messages"]);
    assert_eq!(runs(), before);
}

/// A topic that was created anew may have as many messages as the old one.
#[test]
fn messages_that_are_not_those_that_were_read_are_read() {
    let Some(broker) = broker() else { return };
    let shop = Shop::new(Source::topic(&broker));
    let Shop { workspace, source: Source::Topic(topic), .. } = &shop else { panic!() };
    topic.create_anew();
    fs::remove_dir_all(workspace.path("events")).unwrap();
    (7..=13).for_each(|number| shop.send(day(number)));
    shop.skips_nothing("created anew");
    check_against_a_fresh_store(workspace);
}

#[test]
fn messages_that_no_run_has_read_are_missed() {
    let Some(broker) = broker() else { return };
    let shop = Shop::new(Source::topic(&broker));
    let Shop { workspace, source: Source::Topic(topic), .. } = &shop else { panic!() };
    shop.send(day(6));
    topic.delete_before(0, 11);
    workspace.trueup(&["run", "job.yaml"]).fails_with(1, &[&format!("kafka {}/0", topic.name), "retention"]);
}

#[test]
fn rows_that_changed_are_read_again() {
    let Some(url) = clickhouse() else { return };
    let shop = Shop::new(Source::table(&url));
    let Shop { workspace, source: Source::Table(table), .. } = &shop else { panic!() };
    shop.night(day(6));
    table.sql("ALTER TABLE events UPDATE properties = '{\"value\":50}' WHERE id = 'a-2-9' SETTINGS mutations_sync = 2");
    shop.skips_nothing("rows changed since run");
    table.sql("ALTER TABLE events DELETE WHERE id = 'b-3-9' SETTINGS mutations_sync = 2");
    shop.skips_nothing("rows changed since run");
    // As if it had been on its way for long.
    shop.source.send(&Call { id: "slow", customer: "c", day: 2, hour: 10, value: 2, came: 1 }.line());
    shop.skips_nothing("rows changed since run");
    shop.source.send(&Call { id: "new", customer: "c", day: 3, hour: 10, value: 2, came: 9 }.line());
    workspace.run(&["--day", "2026-03-03"]);
    shop.skips_nothing("computed a part");
}

#[test]
fn without_an_ingestion_time_nothing_tells_what_is_new() {
    let Some(url) = clickhouse() else { return };
    let shop = Shop::new(Source::table(&url));
    let Shop { workspace, source: Source::Table(table), .. } = &shop else { panic!() };
    table.sql("CREATE VIEW timeless AS SELECT * EXCEPT ingested_at FROM events");
    workspace.edit("job.yaml", "table: events", "table: timeless");
    workspace.run(&[]);
    shop.skips_nothing("without an ingestion time");
}

#[test]
fn rows_that_may_still_be_on_their_way_are_left_for_later() {
    let Some(url) = clickhouse() else { return };
    let shop = Shop::new(Source::table(&url));
    let Shop { workspace, source: Source::Table(table), .. } = &shop else { panic!() };
    workspace.edit("job.yaml", "table: events", "table: events, margin: 1h");
    let copy = |id: &str, age: u32| {
        let ingested_at = format!("now64(9, 'UTC') - toIntervalSecond({age}) AS ingested_at");
        let old = "(SELECT * FROM events WHERE id = 'a-2-9')";
        table.sql(&format!("INSERT INTO events SELECT * REPLACE ('{id}' AS id, {ingested_at}) FROM {old}"));
    };
    copy("new", 60);
    assert_eq!(read(&increment(workspace)), (0, 0));
    copy("old", 7200);
    assert_eq!(read(&increment(workspace)), (1, 1));
    // It is no part of a full run either.
    assert_eq!(workspace.run(&["--full"])["events"]["metered"], 31);
}

#[test]
fn after_a_run_of_an_earlier_snapshot_everything_is_computed() {
    let Some(broker) = broker() else { return };
    let shop = Shop::new(Source::topic(&broker));
    let Shop { workspace, .. } = &shop;
    let first = workspace.query("SELECT run_id FROM runs")[0]["run_id"].clone();
    shop.night(Call { id: "late", customer: "a", day: 2, hour: 11, value: 5, came: 2 }.line());
    // It takes the late event back.
    workspace.run(&["--snapshot", &first]);
    shop.skips_nothing("computed a part");
    check_against_a_fresh_store(workspace);
}

#[test]
fn a_run_of_a_part_does_not_end_nights_past_retention() {
    let Some(broker) = broker() else { return };
    let shop = Shop::new(Source::topic(&broker));
    let Shop { workspace, source: Source::Topic(topic), .. } = &shop else { panic!() };
    let late = |id: &str| Call { id, customer: "a", day: 2, hour: 12, value: 7, came: 2 }.line();
    shop.night(day(6));
    workspace.run(&["--day", "2026-03-03"]);
    // As long as everything is there, everything is read once more.
    shop.send(late("first"));
    let run = workspace.run(&[]);
    assert_eq!(run["coverage"]["mode"], "full", "{}", run["coverage"]);
    assert!(run["coverage"]["why"].as_str().unwrap().contains("computed a part"), "{}", run["coverage"]);
    workspace.run(&["--day", "2026-03-03"]);
    (0..3).for_each(|partition| topic.delete_before(partition, 12));
    shop.send(late("second"));
    let run = workspace.run(&[]);
    assert_eq!((&run["coverage"]["mode"], kept(&run) > 0), (&json!("incremental"), true), "{}", run["coverage"]);
    check_against_a_fresh_store(workspace);
}
