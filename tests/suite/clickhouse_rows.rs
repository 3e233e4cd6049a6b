//! Rows and columns of ClickHouse in shapes that people really have: flags as texts, rows
//! without a key or a time, amounts in floats.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::parts::{Scratch, clickhouse, replace_key};
use crate::support::{Row, Workspace};

/// The job of `trueup init`, with these events in files and in a table.
struct Both {
    files: Workspace,
    table: Workspace,
    scratch: Scratch,
}

impl Both {
    fn new(url: &str, time: &str, deduplicate: &str) -> Both {
        let scratch = Scratch::new(url);
        scratch.sql(&format!(
            "CREATE TABLE events (tenant_id Nullable(String), id LowCardinality(Nullable(String)), event_name String, \
             external_customer_id String, timestamp {time}, ingested_at DateTime64(6), properties String) \
             ENGINE = MergeTree ORDER BY event_name"
        ));
        let files = Workspace::of("init");
        let job = replace_key(&files.read("job.yaml"), "deduplicate", &format!("deduplicate: {deduplicate}"));
        files.write("job.yaml", &job);
        let table = Workspace::of("init");
        let job = replace_key(&job, "source", "source: {kind: clickhouse, table: events}");
        table.write("job.yaml", job + &scratch.connection(url));
        Both { files, table, scratch }
    }

    /// From now on there are these events and no others.
    fn hold(&self, events: &[Value]) {
        let (mut lines, mut rows) = (String::new(), String::new());
        for event in events {
            writeln!(lines, "{event}").unwrap();
            let mut row = event.clone();
            row["properties"] = json!(event["properties"].to_string());
            writeln!(rows, "{row}").unwrap();
        }
        self.files.write("events/2026-01-01.ndjson", lines);
        self.scratch.sql("TRUNCATE TABLE events SYNC");
        self.scratch
            .sql(&format!("INSERT INTO events SETTINGS date_time_input_format = 'best_effort' FORMAT JSONEachRow\n{rows}"));
    }

    /// The table gives what the files give; returns the open dead letters.
    #[track_caller]
    fn run(&self, arguments: &[&str]) -> Vec<String> {
        let [files, table] = [&self.files, &self.table].map(|workspace| {
            let run = workspace.run(arguments);
            let counts =
                ["duplicates", "voided", "unmatched", "dead_lettered", "metered"].map(|name| run["events"][name].clone());
            let rows = ["inserted", "updated", "retracted"].map(|name| run["rows"][name].clone());
            let all = "SELECT tenant_id, event_id, reason, resolved_run_id IS NULL AS open FROM dead_letters ORDER BY 1, 2, 3";
            (
                counts,
                rows,
                workspace.query(all),
                workspace.query("SELECT meter_id, window_start, quantity FROM usage_windows ORDER BY 1, 2"),
            )
        });
        assert_eq!(table, files, "{arguments:?}");
        let open = |row: &Row| (row["open"] == "1").then(|| format!("{} {}", row["tenant_id"], row["event_id"]));
        table.2.iter().filter_map(open).collect()
    }
}

fn event(tenant: impl Into<Value>, id: impl Into<Value>, time: impl Into<Value>, second: u32) -> Value {
    json!({
        "tenant_id": tenant.into(), "id": id.into(), "event_name": "api.call", "external_customer_id": "acme",
        "timestamp": time.into(), "ingested_at": format!("2026-01-09T00:00:{second:02}Z"), "properties": {"bytes": 7},
    })
}

const DAYS: [&str; 3] = ["2026-01-01", "2026-01-02", "2026-01-05"];

/// Events of two days, and rows that lack something.
fn events() -> Vec<Value> {
    let [first, second, _] = DAYS.map(|day| format!("{day}T10:00:00Z"));
    vec![
        event("demo", "first", first.clone(), 1),
        event("demo", "second", second.clone(), 2),
        event("demo", "timeless", Value::Null, 3),
        event("demo", "far", "2290-01-01T00:00:00Z", 4),
        event("demo", Value::Null, first.clone(), 5),
        event("demo", Value::Null, second.clone(), 6),
        event("demo", Value::Null, Value::Null, 7),
        event(Value::Null, "nobodys", first.clone(), 8),
        event(Value::Null, "timeless", Value::Null, 9),
        // The copy that counts has no time any more, or another day's.
        event("demo", "lost", first.clone(), 10),
        event("demo", "lost", Value::Null, 11),
        event("demo", "moved", first, 10),
        event("demo", "moved", second, 11),
        event("other", "shared", "2026-01-02T11:00:00Z", 12),
        event("demo", "shared", "2026-01-01T11:00:00Z", 11),
    ]
}

/// Runs of ranges see the rows that lack something as they do in files, and see it when these
/// are gone.
fn ranges(url: &str, time: &str, deduplicate: &str, more: &[Value]) {
    let both = Both::new(url, time, deduplicate);
    let mut all = events();
    all.extend_from_slice(more);
    both.hold(&all);
    for day in DAYS {
        both.run(&["--day", day]);
    }
    both.run(&["--day", "2026-01-01", "--tenant", "demo"]);
    let open = both.run(&["--day", "2026-01-05"]);
    let texts = more.iter().map(|event| format!("demo {}", event["id"].as_str().unwrap()));
    let timeless: Vec<_> =
        ["demo timeless", "demo far", "demo lost", " timeless"].map(str::to_owned).into_iter().chain(texts).collect();
    let of_days = |letters: &[String]| letters.iter().filter(|letter| !timeless.contains(letter)).count();
    assert_eq!(open.len() - of_days(&open), timeless.len(), "{time} {deduplicate}: {open:?}");
    // What has no time is settled by any range, what has one by its own.
    all.retain(|event| event["id"] == "first" || event["id"] == "second");
    both.hold(&all);
    let left = both.run(&["--day", "2026-01-05"]);
    assert_eq!((left.len(), left.len()), (of_days(&left), of_days(&open) - 1), "{time} {deduplicate}: {left:?} of {open:?}");
    both.run(&["--day", "2026-01-02"]);
    assert_eq!(both.run(&["--day", "2026-01-01"]), Vec::<String>::new());
    assert_eq!(both.run(&[]), Vec::<String>::new());
}

#[test]
fn ranges_of_a_table_have_the_rows_without_key_or_time() {
    let Some(url) = clickhouse() else { return };
    ranges(&url, "Nullable(DateTime64(3, 'UTC'))", "{key: [tenant_id, id]}", &[]);
    ranges(&url, "Nullable(DateTime64(3, 'UTC'))", "{key: [id]}", &[]);
}

#[test]
fn ranges_of_a_table_have_the_rows_whose_text_is_no_time() {
    let Some(url) = clickhouse() else { return };
    // Some of them are a time to the server.
    let texts =
        ["yesterday", "", "1767261600", "2026-01-01T25:00:00Z", "2026-01-01T10:00:00+1", "2026-02-30", "2026-01-01T10:00:00.Z"];
    let more: Vec<_> = texts.iter().map(|text| event("demo", format!("text {text}"), *text, 20)).collect();
    ranges(&url, "LowCardinality(Nullable(String))", "{key: [tenant_id, id]}", &more);
    // Those that are a time have their place.
    let both = Both::new(&url, "String", "{key: [tenant_id, id]}");
    let texts = [
        "2026-01-02",
        "2026-01-02T10:00",
        "2026-01-01 23:30:00.5-01:00",
        "2026-01-02T10:00:00.1234567891Z",
        "2026-01-02t10:00:00z",
        "2026-01-02 10:00:00+0200",
        "2026-01-02 10:00 UTC",
        " 2026-01-02T10:00:00Z ",
        "2026-01-01T23:59:60Z",
        "2026-01-02T00:30:00+01",
    ];
    let times: Vec<_> = texts.iter().map(|text| event("demo", *text, *text, 20)).collect();
    both.hold(&times);
    for day in DAYS {
        assert_eq!(both.run(&["--day", day]), Vec::<String>::new());
    }
    assert_eq!(both.table.run(&["--day", "2026-01-02"])["events"]["metered"], 8);
}

#[test]
fn flags_of_a_table_are_booleans_whole_numbers_or_texts() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = Workspace::of("init");
    scratch.sql(
        "CREATE TABLE events (tenant_id String, id String, event_name String, external_customer_id String, timestamp DateTime('UTC'), \
         ingested_at DateTime) ENGINE = MergeTree ORDER BY id",
    );
    scratch.sql(
        "INSERT INTO events SELECT 'demo', arrayJoin(['gone', 'there', 'odd']), 'api.call', 'acme', '2026-01-01 10:00:00', now() - 60",
    );
    let job = workspace.read("job.yaml") + &scratch.connection(&url);
    let select = |flag: &str| {
        let query = format!("SELECT *, {flag} AS deleted FROM events");
        workspace.write("job.yaml", replace_key(&job, "source", &format!("source: {{kind: clickhouse, query: \"{query}\"}}")));
    };
    let gone = "id = 'gone'";
    let texts = |yes: &str| format!("multiIf({gone}, '{yes}', id = 'odd', 'maybe', '')");
    for (flag, voided, odd) in [
        (format!("({gone})::Bool"), 1, 0),
        (format!("toNullable({gone})::Nullable(Bool)"), 1, 0),
        (format!("if(id = 'odd', NULL, toUInt8({gone}))"), 1, 0),
        (format!("toLowCardinality(toUInt8({gone}))"), 1, 0),
        (format!("toLowCardinality(if(id = 'odd', NULL, toUInt8({gone})))"), 1, 0),
        (format!("toInt256({gone})"), 1, 0),
        ("NULL".to_owned(), 0, 0),
        (format!("if({gone}, 'true', NULL)"), 1, 0),
        (texts("true"), 1, 1),
        (texts("1"), 1, 1),
        (format!("toLowCardinality(toNullable({}))", texts("TRUE")), 1, 1),
        (format!("toFixedString({}, 5)", texts("true")), 1, 1),
        (format!("CAST(if({gone}, 'true', 'false') AS Enum8('true' = 3, 'false' = 4))"), 1, 0),
    ] {
        select(&flag);
        let check = workspace.trueup(&["check", "job.yaml", "--connect"]);
        assert_eq!(check.code, 0, "{flag}: {check:?}");
        for range in [&[][..], &["--day", "2026-01-01"]] {
            let plan = workspace.trueup(&[&["plan", "job.yaml", "--output", "json"][..], range].concat()).json();
            let found = ["voided", "dead_lettered", "metered"].map(|name| plan["events"][name].as_u64().unwrap());
            assert_eq!(found, [voided, odd, 3 - voided - odd], "{flag} {range:?}");
        }
    }
    select(&texts("true"));
    workspace.run(&[]);
    let letters = workspace.query("SELECT event_id, detail FROM dead_letters");
    assert!(letters[0]["detail"].contains("deleted `maybe` is neither true nor false"), "{letters:?}");
    for (flag, type_name) in [(format!("toFloat64({gone})"), "Float64"), ("timestamp".to_owned(), "DateTime('UTC')")] {
        select(&flag);
        let says = format!("column `deleted` is {type_name}, expected a boolean");
        let check = workspace.trueup(&["check", "job.yaml", "--connect"]);
        assert!(check.code == 1 && check.stdout.contains(&says), "{check:?}");
        workspace.trueup(&["run", "job.yaml"]).fails_with(1, &[&says, "cast it in source.query"]);
    }
}

#[test]
fn amounts_of_a_query_are_decimals_or_texts_never_floats() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = Workspace::of("init");
    let job = workspace.read("job.yaml") + &scratch.connection(&url);
    let prices = |amount: &str| {
        let price = |id: &str, meter: &str| {
            format!(
                "SELECT '{id}' AS price_id, 'standard' AS plan_id, '{meter}' AS meter_id, 'USD' AS currency, \
                 'per_unit' AS model, {amount} AS unit_amount"
            )
        };
        let query = format!("{} UNION ALL {}", price("a", "api_calls"), price("b", "bytes_sent"));
        workspace.write("job.yaml", job.replace("{path: prices.yaml}", &format!("{{query: \"{query}\"}}")));
    };
    for float in ["0.1", "toFloat32(0.1)", "toNullable(0.1)", "toLowCardinality(toNullable(0.1))"] {
        prices(float);
        let says = ["reference", "row 1", "column `unit_amount` holds binary floats", "Decimal", "toString"];
        let outcome = workspace.trueup(&["run", "job.yaml"]);
        outcome.fails_with(2, &says[1..]);
        let check = workspace.trueup(&["check", "job.yaml", "--connect"]);
        assert!(check.code == 1 && says.iter().all(|part| check.stdout.contains(part)), "{check:?}");
    }
    assert!(workspace.dump().is_none_or(|tables| tables.iter().all(Vec::is_empty)));
    for exact in ["toString(0.1)", "toDecimal64('0.1', 4)", "toNullable(toDecimal128('0.1', 18))"] {
        prices(exact);
        assert_eq!(workspace.trueup(&["plan", "job.yaml", "--output", "json"]).json()["totals"][0]["currency"], "USD", "{exact}");
    }
}

/// The name of an event is nobody's to choose: not even what some formats write for NULL.
#[test]
fn an_id_that_looks_like_null_is_an_id() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = Workspace::of("init");
    let job = replace_key(&workspace.read("job.yaml"), "store", "store: {kind: clickhouse}");
    workspace.write("job.yaml", job + &scratch.connection(&url));
    let event = json!({"tenant_id": "demo", "id": "ᴺᵁᴸᴸ", "event_name": "api.call", "external_customer_id": "nobody",
        "timestamp": "2026-01-01T10:00:00Z", "properties": {}});
    workspace.write("events/odd.ndjson", format!("{event}\n"));
    workspace.run(&[]);
    assert_eq!(workspace.run(&[])["rows"]["inserted"], 0);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    let letters = workspace.trueup(&["dead-letters", "job.yaml", "--output", "json"]).json();
    assert!(letters.to_string().contains("\"event_id\":\"ᴺᵁᴸᴸ\""), "{letters}");
}

/// A byte that is no UTF-8 makes a dead letter of its event, and stops no others.
#[test]
fn a_byte_that_is_no_text_is_a_dead_letter() {
    let Some(url) = clickhouse() else { return };
    let both = Both::new(&url, "DateTime64(9, 'UTC')", "{key: [tenant_id, id]}");
    both.hold(&[event("demo", "good", "2026-01-01T10:00:00Z", 1)]);
    for (id, name, customer, properties) in [
        ("'note'", "'api.call'", "'acme'", "concat('{\"bytes\": 7, \"note\": \"', unhex('E9'), '\"}')"),
        ("concat('id', unhex('FF'))", "'api.call'", "'acme'", "'{}'"),
        ("'name'", "unhex('FF')", "'acme'", "'{}'"),
        ("'customer'", "'api.call'", "unhex('C3')", "'{}'"),
    ] {
        both.scratch.sql(&format!(
            "INSERT INTO events SELECT 'demo', {id}, {name}, {customer}, toDateTime64('2026-01-01 11:00:00', 9, 'UTC'), \
             toDateTime64('2026-01-09 00:00:00', 6), {properties}"
        ));
    }
    let run = both.table.run(&[]);
    assert_eq!((&run["events"]["metered"], &run["dead_letters"]["malformed_event"]), (&1.into(), &4.into()), "{run}");
    assert_eq!(both.table.run(&[])["rows"]["inserted"], 0);
    assert_eq!(both.table.trueup(&["verify", "job.yaml"]).code, 0);
}

/// What is published in part proves nothing, and is no drift.
#[test]
fn verify_says_that_a_run_is_published_in_part() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = Workspace::of("init");
    let job = replace_key(&workspace.read("job.yaml"), "store", "store: {kind: clickhouse}");
    workspace.write("job.yaml", job + &scratch.connection(&url));
    workspace.run(&[]);
    workspace.edit("prices.yaml", "\"0.01\"", "\"0.02\"");
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 3);
    scratch.sql("INSERT INTO runs SELECT * REPLACE ('zz' AS run_id, 1 AS stage) FROM (SELECT * FROM runs FINAL WHERE stage = 2)");
    workspace
        .trueup(&["verify", "job.yaml"])
        .fails_with(5, &["run zz is being published, or was interrupted", "trueup resume job.yaml"]);
}

/// No answer is no rows: even of an empty table, the names of its columns come.
#[test]
fn an_empty_answer_is_no_answer() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(mut client) = client else { continue };
            std::thread::spawn(move || {
                let mut buffer = vec![0; 1 << 16];
                let _ = std::io::Read::read(&mut client, &mut buffer);
                let empty = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                let _ = std::io::Write::write_all(&mut client, empty);
            });
        }
    });
    let workspace = Workspace::of("init");
    workspace.edit("job.yaml", "prices: {path: prices.yaml}", "prices: {query: \"SELECT * FROM prices\"}");
    let job = workspace.read("job.yaml") + &format!("connections: {{clickhouse: {{url: \"{url}\"}}}}\n");
    workspace.write("job.yaml", job);
    workspace.trueup(&["run", "job.yaml"]).fails_with(1, &["SELECT * FROM prices", "the server's answer is empty"]);
}
