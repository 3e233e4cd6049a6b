//! The same job on real parts: a ClickHouse engine as source and as store.
//!
//! `tests/run` starts it (`tests/services/up`); another server is used where
//! `TRUEUP_TEST_CLICKHOUSE_URL` names it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use trueup::source::files::FileSource;
use trueup::source::{EventSource, Selection, Wanted};

use crate::golden::{cases, compare_json, compare_rows, has_range};
use crate::support::Workspace;

/// The server, or `None` where there is none and none is required.
#[allow(clippy::print_stderr)]
pub fn clickhouse() -> Option<String> {
    let url = std::env::var("TRUEUP_TEST_CLICKHOUSE_URL").ok();
    if url.is_none() {
        assert!(std::env::var_os("TRUEUP_TEST_REQUIRE_SERVICES").is_none(), "TRUEUP_TEST_CLICKHOUSE_URL is not set");
        eprintln!("skipped: TRUEUP_TEST_CLICKHOUSE_URL is not set (tests/run starts a server)");
    }
    url
}

/// Sends a statement; fails with the server's own words.
#[track_caller]
fn sql(url: &str, database: &str, statement: &str) -> String {
    let address = url.trim_start_matches("http://").trim_end_matches('/');
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!(
        "POST /?database={database} HTTP/1.0\r\nHost: {address}\r\nContent-Length: {}\r\n\r\n{statement}",
        statement.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200") || head.starts_with("HTTP/1.0 200"), "{statement}: {answer}");
    body.to_owned()
}

/// A database of its own for each test, dropped with it.
pub struct Scratch {
    pub url: String,
    pub name: String,
}

impl Scratch {
    pub fn new(url: &str) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!("trueup_test_{}_{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        sql(url, "default", &format!("CREATE DATABASE {name}"));
        Scratch { url: url.to_owned(), name }
    }

    #[track_caller]
    pub fn sql(&self, statement: &str) -> String {
        sql(&self.url, &self.name, statement)
    }

    /// The connection for a job file.
    pub fn connection(&self, url: &str) -> String {
        format!("connections: {{clickhouse: {{url: \"{url}\", database: {}}}}}\n", self.name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.sql(&format!("DROP DATABASE IF EXISTS {} SYNC", self.name));
        }
    }
}

/// Replaces a top-level key of a YAML file, whatever it held.
pub fn replace_key(yaml: &str, key: &str, with: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for line in yaml.lines() {
        if !line.starts_with([' ', '#', '-']) && !line.is_empty() {
            inside = line.starts_with(&format!("{key}:"));
            if inside {
                writeln!(out, "{with}").unwrap();
            }
        }
        if !inside {
            writeln!(out, "{line}").unwrap();
        }
    }
    out
}

pub const EVENTS_TABLE: &str = "(tenant_id Nullable(String), id Nullable(String), event_name Nullable(String), \
    external_customer_id Nullable(String), timestamp Nullable(DateTime64(9, 'UTC')), ingested_at Nullable(DateTime64(9, 'UTC')), \
    properties Nullable(String), deleted Nullable(Bool)) ENGINE = MergeTree ORDER BY tuple()";

/// Loads the events of a case's job into `events`; false where a row is no event at all.
fn load_events(workspace: &Workspace, scratch: &Scratch) -> bool {
    let job = trueup::config::Job::load(&workspace.path("job.yaml")).unwrap();
    let trueup::config::Source::Files { patterns, columns } = &job.source else { panic!("a case reads files") };
    let source = FileSource::new(patterns.clone(), columns.clone());
    let mut lines = String::new();
    let mut clean = true;
    for split in source.splits(&Selection::default()).unwrap() {
        source
            .read(&split, Wanted::Whole, &mut |batch| {
                for event in batch.rows() {
                    clean &= event.problem.is_none();
                    let row = serde_json::json!({
                        "tenant_id": event.tenant_id, "id": event.id, "event_name": event.event_name,
                        "external_customer_id": event.external_customer_id, "timestamp": event.timestamp,
                        "ingested_at": event.ingested_at, "properties": event.properties, "deleted": event.deleted,
                    });
                    writeln!(lines, "{row}").unwrap();
                }
                Ok(())
            })
            .unwrap();
    }
    scratch.sql("DROP TABLE IF EXISTS events SYNC");
    scratch.sql(&format!("CREATE TABLE events {EVENTS_TABLE}"));
    scratch.sql(&format!("INSERT INTO events SETTINGS date_time_input_format = 'best_effort' FORMAT JSONEachRow\n{lines}"));
    clean
}

/// Every golden case, with events read from and rows stored in the parts asked for.
fn golden_cases(url: &str, from_clickhouse: bool, to_clickhouse: bool) {
    let mut problems = String::new();
    let check = |case: &PathBuf| check_case(url, case, (from_clickhouse, to_clickhouse), true, &mut problems);
    let checked: u32 = cases().iter().map(check).sum();
    assert!(problems.is_empty(), "{problems}");
    assert!(checked > 40, "only {checked} steps");
}

/// One case, with events read from and rows stored in the parts asked for; every step in full,
/// or those that can be so incremental. Returns how many steps there were.
pub fn check_case(
    url: &str,
    case: &Path,
    (from_clickhouse, to_clickhouse): (bool, bool),
    full: bool,
    problems: &mut String,
) -> u32 {
    let name = case.file_name().unwrap().to_string_lossy().into_owned();
    let (workspace, scratch) = (Workspace::new(), Scratch::new(url));
    let mut checked = 0;
    for step in 0.. {
        let overlay = if step == 0 { case.to_owned() } else { case.join(format!("then-{step}")) };
        if !overlay.exists() {
            break;
        }
        workspace.overlay(&overlay);
        if from_clickhouse && !load_events(&workspace, &scratch) {
            break; // rows that are no events cannot be in a table
        }
        let original = workspace.read("job.yaml");
        let mut job = original.clone() + "\n" + &scratch.connection(url);
        if from_clickhouse {
            job = replace_key(&job, "source", "source: {kind: clickhouse, table: events}");
        }
        if to_clickhouse {
            job = replace_key(&job, "store", "store: {kind: clickhouse}");
        }
        workspace.write("parts.yaml", &job);
        check_step(&workspace, &overlay, &format!("{name} step {step}"), (from_clickhouse, full), problems);
        checked += 1;
    }
    checked
}

pub fn check_step(workspace: &Workspace, step: &Path, name: &str, (from_clickhouse, full): (bool, bool), problems: &mut String) {
    let arguments = fs::read_to_string(step.join("args")).unwrap_or_default();
    let mut command = vec!["run", "parts.yaml", "--output", "json"];
    command.extend(arguments.split_whitespace());
    command.extend((!full && !has_range(&arguments)).then_some("--incremental"));
    let outcome = workspace.trueup(&command);
    if outcome.code != 0 {
        writeln!(problems, "{name}: exit {}: {}", outcome.code, outcome.stderr).unwrap();
        return;
    }
    let summary: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let expected = step.join("expected");
    // An incremental run counts what it looked at.
    let counts_all = summary["coverage"]["mode"] != "incremental";
    if let Some(text) = fs::read_to_string(expected.join("summary.json")).ok().filter(|_| counts_all) {
        let mut text: Value = serde_json::from_str(&text).unwrap();
        if from_clickhouse && let Some(events) = text["events"].as_object_mut() {
            // A range is pushed down: what is out of it need not be read.
            events.remove("read");
            events.remove("out_of_range");
        }
        compare_json(&format!("{name}: summary"), &text, &summary, problems);
    }
    for table in ["usage_windows", "usage_periods", "dead_letters", "corrections"] {
        let path = expected.join(format!("{table}.csv"));
        if !path.exists() {
            continue;
        }
        let mut rows = exported(workspace, table);
        rows.retain(|row| match table {
            "dead_letters" => row["resolved_run_id"].is_empty(),
            "corrections" => row["run_id"] == summary["run_id"].as_str().unwrap(),
            _ => true,
        });
        compare_rows(&format!("{name}: {table}"), &path, &rows, problems);
    }
    let mut verify = vec!["verify", "parts.yaml"];
    verify.extend(arguments.split_whitespace());
    let verified = workspace.trueup(&verify);
    if verified.code != 0 {
        writeln!(problems, "{name}: verify exits {}: {}{}", verified.code, verified.stdout, verified.stderr).unwrap();
    }
}

/// A table of the job's store as `export` gives it.
#[track_caller]
fn exported(workspace: &Workspace, table: &str) -> Vec<BTreeMap<String, String>> {
    let outcome = workspace.trueup(&["export", "parts.yaml", table, "--format", "csv"]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let mut reader = csv::Reader::from_reader(outcome.stdout.as_bytes());
    reader.deserialize().map(|row| row.unwrap()).collect()
}

#[test]
fn clickhouse_source_gives_the_expected_rows() {
    let Some(url) = clickhouse() else { return };
    golden_cases(&url, true, false);
}

#[test]
fn clickhouse_store_holds_the_expected_rows() {
    let Some(url) = clickhouse() else { return };
    golden_cases(&url, false, true);
}

#[test]
fn clickhouse_at_both_ends_gives_the_expected_rows() {
    let Some(url) = clickhouse() else { return };
    golden_cases(&url, true, true);
}

/// A job from files to ClickHouse through `url`.
fn publishing_job(scratch: &Scratch, url: &str) -> Workspace {
    let workspace = Workspace::of("init");
    let job = replace_key(&workspace.read("job.yaml"), "store", "store: {kind: clickhouse}");
    workspace.write("parts.yaml", &(job + &scratch.connection(url)));
    workspace
}

/// Rows without what differs between two runs of the same thing.
fn comparable(workspace: &Workspace, table: &str) -> Vec<BTreeMap<String, String>> {
    let mut rows = exported(workspace, table);
    for row in &mut rows {
        for column in
            ["run_id", "row_digest", "version", "updated_at", "recorded_at", "correction_id", "first_run_id", "last_run_id"]
        {
            row.remove(column);
        }
    }
    rows.sort();
    rows
}

/// Lets requests through until the given one, then kills the process that sent it.
struct Executioner {
    url: String,
    process: Arc<AtomicUsize>,
    inserts: Arc<AtomicUsize>,
}

impl Executioner {
    /// `fatal` is the number of the insert that is the last thing the process does;
    /// `delivered` says whether the server still gets it.
    fn new(upstream: &str, fatal: usize, delivered: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (process, inserts) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let upstream = upstream.trim_start_matches("http://").trim_end_matches('/').to_owned();
        let (victim, count) = (Arc::clone(&process), Arc::clone(&inserts));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Ok(server)) = (client, TcpStream::connect(&upstream)) else { continue };
                let (victim, count) = (Arc::clone(&victim), Arc::clone(&count));
                let (mut back_from, mut back_to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut back_from, &mut back_to);
                    let _ = back_to.shutdown(std::net::Shutdown::Write);
                });
                std::thread::spawn(move || forward(client, server, &victim, &count, fatal, delivered));
            }
        });
        Executioner { url, process, inserts }
    }
}

fn forward(
    mut client: TcpStream,
    mut server: TcpStream,
    victim: &AtomicUsize,
    count: &AtomicUsize,
    fatal: usize,
    delivered: bool,
) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(read) = client.read(&mut buffer) {
        if read == 0 {
            break;
        }
        let head = String::from_utf8_lossy(&buffer[..read.min(4000)]).into_owned();
        let is_insert = head.starts_with("POST") && head.lines().next().is_some_and(|line| line.contains("INSERT"));
        if is_insert && count.fetch_add(1, Ordering::SeqCst) + 1 == fatal {
            if delivered {
                let _ = server.write_all(&buffer[..read]);
                std::thread::sleep(std::time::Duration::from_millis(50));
                client.set_nonblocking(true).unwrap();
                while let Ok(more @ 1..) = client.read(&mut buffer) {
                    let _ = server.write_all(&buffer[..more]);
                }
                std::thread::sleep(std::time::Duration::from_millis(300));
            }
            let process = victim.load(Ordering::SeqCst).to_string();
            Command::new("kill").args(["-9", &process]).status().unwrap();
            // The sockets of a killed process are closed; an insert half sent is aborted.
            let _ = server.shutdown(std::net::Shutdown::Both);
            return;
        }
        if server.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = server.shutdown(std::net::Shutdown::Write);
}

#[test]
fn killed_at_any_step_of_publishing_the_next_run_makes_it_right() {
    let Some(url) = clickhouse() else { return };
    // What it must look like: two runs without a crash.
    let reference = Scratch::new(&url);
    let calm = publishing_job(&reference, &url);
    assert_eq!(calm.trueup(&["run", "parts.yaml"]).code, 0);
    change(&calm);
    assert_eq!(calm.trueup(&["run", "parts.yaml", "--yes"]).code, 0);

    let mut killed = 0;
    for fatal in 1..=20 {
        for delivered in [false, true] {
            let scratch = Scratch::new(&url);
            let executioner = Executioner::new(&url, fatal, delivered);
            let workspace = publishing_job(&scratch, &url);
            assert_eq!(workspace.trueup(&["run", "parts.yaml"]).code, 0);
            change(&workspace);
            let direct = workspace.read("parts.yaml");
            workspace.write("parts.yaml", direct.replace(&url, &executioner.url));
            let mut child = Command::new(env!("CARGO_BIN_EXE_trueup"))
                .args(["run", "parts.yaml", "--yes"])
                .current_dir(workspace.path("."))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            executioner.process.store(child.id() as usize, Ordering::SeqCst);
            let status = child.wait().unwrap();
            if status.success() {
                // Fewer inserts than this: every step has had its turn.
                assert!(killed >= 12, "only {killed} kills, {} inserts", executioner.inserts.load(Ordering::SeqCst));
                return;
            }
            killed += 1;
            workspace.write("parts.yaml", &direct);
            let again = workspace.trueup(&["run", "parts.yaml", "--yes"]);
            assert_eq!(again.code, 0, "insert {fatal}, delivered {delivered}: {again:?}");
            for table in ["usage_windows", "usage_periods", "corrections", "dead_letters"] {
                assert_eq!(
                    comparable(&workspace, table),
                    comparable(&calm, table),
                    "insert {fatal}, delivered {delivered}: {table}"
                );
            }
            let verified = workspace.trueup(&["verify", "parts.yaml"]);
            assert_eq!(verified.code, 0, "insert {fatal}, delivered {delivered}: {verified:?}");
            assert_eq!(scratch.sql("SELECT count() FROM write_ahead").trim(), "0");
        }
    }
    panic!("the run never got through");
}

/// How often a run is killed at a random moment; `TRUEUP_TEST_KILLS` says otherwise.
const KILLS: u64 = 24;

/// Each time something changed, a run is killed at some moment and the next one begins at
/// once: the store is then what it is where nobody was killed.
#[test]
fn killed_at_random_moments_the_next_runs_make_it_right() {
    let Some(url) = clickhouse() else { return };
    let kills = std::env::var("TRUEUP_TEST_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    let (calm, killed) = (Scratch::new(&url), Scratch::new(&url));
    let workspaces = [publishing_job(&calm, &url), publishing_job(&killed, &url)];
    let run = |workspace: &Workspace| {
        let outcome = workspace.trueup(&["run", "parts.yaml", "--yes"]);
        assert_eq!(outcome.code, 0, "{outcome:?}");
    };
    workspaces.iter().for_each(run);
    let (mut early, mut random) = (0, 88_172_645_463_325_252_u64);
    for attempt in 0..kills {
        for workspace in &workspaces {
            again(workspace, attempt);
        }
        let [calm, killed] = &workspaces;
        let clock = std::time::Instant::now();
        run(calm);
        let length = clock.elapsed();
        // Marsaglia's xorshift.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let mut child = Command::new(env!("CARGO_BIN_EXE_trueup"))
            .args(["run", "parts.yaml", "--yes"])
            .current_dir(killed.path("."))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(length.mul_f64(f64::from(u32::try_from(random % 1000).unwrap()) / 1000.0));
        child.kill().unwrap();
        early += u64::from(!child.wait().unwrap().success());
        run(killed);
        for table in ["usage_windows", "usage_periods", "corrections", "dead_letters"] {
            assert_eq!(comparable(killed, table), comparable(calm, table), "attempt {attempt}: {table}");
        }
        let verified = killed.trueup(&["verify", "parts.yaml"]);
        assert_eq!(verified.code, 0, "attempt {attempt}: {verified:?}");
    }
    assert!(early * 4 > kills, "only {early} of {kills} runs were killed");
    assert_eq!(killed.sql("SELECT count() FROM write_ahead").trim(), "0");
}

/// Changes something each time: a window comes or goes, and every price moves.
fn again(workspace: &Workspace, attempt: u64) {
    let second = attempt + 1;
    let event = format!(
        "{{\"tenant_id\":\"demo\",\"id\":\"again-{}\",\"event_name\":\"api.call\",\"external_customer_id\":\"globex\",\
         \"timestamp\":\"2026-01-{:02}T15:00:00Z\",\"ingested_at\":\"2026-02-01T00:{:02}:{:02}Z\",\
         \"properties\":{{\"status\":200,\"bytes\":5}}}}\n",
        attempt / 2,
        attempt % 2 + 2,
        second / 60,
        second % 60
    );
    let void = format!("{{\"tenant_id\":\"demo\",\"id\":\"again-{}\",\"deleted\":true}}\n", (attempt / 2).saturating_sub(1));
    workspace.write(&format!("events/again-{attempt}.ndjson"), if attempt % 4 == 3 { event + &void } else { event });
}

/// A change that inserts, updates and retracts.
fn change(workspace: &Workspace) {
    let more = "{\"tenant_id\":\"demo\",\"id\":\"e1\",\"deleted\":true,\"ingested_at\":\"2026-01-02T00:00:00Z\"}\n\
        {\"tenant_id\":\"demo\",\"id\":\"e6\",\"deleted\":true,\"ingested_at\":\"2026-01-02T00:00:00Z\"}\n\
        {\"tenant_id\":\"demo\",\"id\":\"e9\",\"event_name\":\"api.call\",\"external_customer_id\":\"globex\",\
        \"timestamp\":\"2026-01-01T15:00:00Z\",\"ingested_at\":\"2026-01-02T00:00:00Z\",\"properties\":{\"status\":200,\"bytes\":5}}\n";
    workspace.write("events/late.ndjson", more);
}

#[test]
fn superseded_copies_that_are_not_merged_yet_do_not_count() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    scratch.sql(
        "CREATE TABLE events (tenant_id String, id String, event_name LowCardinality(String), external_customer_id String, \
         timestamp DateTime, ingested_at DateTime, properties Map(String, String)) \
         ENGINE = ReplacingMergeTree(ingested_at) ORDER BY (tenant_id, timestamp, id)",
    );
    scratch.sql("SYSTEM STOP MERGES events");
    // The amended copy moves to the day after: a filter before deduplication would find the old one.
    for (time, ingested, bytes) in
        [("2026-01-01 09:00:00", "2026-01-01 09:00:00", 100), ("2026-01-02 09:00:00", "2026-01-03 00:00:00", 7)]
    {
        scratch.sql(&format!(
            "INSERT INTO events VALUES ('demo', 'a', 'api.call', 'acme', '{time}', '{ingested}', {{'status': '200', 'bytes': '{bytes}'}})"
        ));
    }
    let workspace = Workspace::of("init");
    let job = replace_key(&workspace.read("job.yaml"), "source", "source: {kind: clickhouse, table: events}");
    workspace.write("job.yaml", &(job + &scratch.connection(&url)));
    let summary = workspace.run(&["--day", "2026-01-01"]);
    assert_eq!(summary["rows"]["inserted"], 0, "{summary}");
    let summary = workspace.run(&["--day", "2026-01-02"]);
    assert_eq!(summary["events"]["metered"], 1, "{summary}");
    let rows = workspace.query("SELECT quantity FROM usage_windows WHERE meter_id = 'bytes_sent'");
    assert_eq!(rows[0]["quantity"], "7");
}

#[test]
fn a_stream_that_fails_midway_fails_the_run() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    // The last rows cannot be read: the error comes after much was delivered.
    scratch.sql(&format!("CREATE TABLE events {EVENTS_TABLE}"));
    scratch.sql(
        "INSERT INTO events SELECT 'demo', toString(number), 'api.call', 'acme', toDateTime64('2026-01-01 00:00:00', 9, 'UTC') \
         + number % 86400, now64(9), '{\"status\":200,\"bytes\":1}', false FROM numbers(400000)",
    );
    let workspace = Workspace::of("init");
    let query = "SELECT * REPLACE (if(id = '399999', throwIf(1)::String, id) AS id) FROM events";
    let source = format!("source: {{kind: clickhouse, query: \"{query}\"}}");
    let job = replace_key(&workspace.read("job.yaml"), "source", &source);
    workspace.write("job.yaml", &(job + &scratch.connection(&url)));
    let outcome = workspace.trueup(&["run", "job.yaml"]);
    outcome.fails_with(1, &["ClickHouse"]);
    assert!(workspace.query("SELECT * FROM runs").is_empty());
    assert!(workspace.query("SELECT * FROM usage_windows").is_empty());
}

#[test]
fn reference_tables_by_query() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = Workspace::of("init");
    for table in ["customers", "subscriptions"] {
        let csv = workspace.read(&format!("{table}.csv"));
        let header: Vec<_> = csv.lines().next().unwrap().split(',').map(|name| format!("{name} Nullable(String)")).collect();
        scratch.sql(&format!("CREATE TABLE {table} ({}) ENGINE = MergeTree ORDER BY tuple()", header.join(", ")));
        scratch.sql(&format!("INSERT INTO {table} FORMAT CSVWithNames\n{csv}"));
        workspace.edit("job.yaml", &format!("{{path: {table}.csv}}"), &format!("{{query: \"SELECT * FROM {table}\"}}"));
    }
    workspace.write("job.yaml", &(workspace.read("job.yaml") + &scratch.connection(&url)));
    let from_queries = workspace.run(&[]);
    let from_files = Workspace::of("init");
    assert_eq!(from_queries["rows"], from_files.run(&[])["rows"]);
    workspace.edit("job.yaml", "SELECT * FROM customers", "SELECT * FROM nowhere");
    workspace.trueup(&["run", "job.yaml"]).fails_with(1, &["reference query", "nowhere"]);
}

#[test]
fn errors_of_connections_name_the_remedy() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = Workspace::of("init");
    let job = replace_key(&workspace.read("job.yaml"), "source", "source: {kind: clickhouse, table: nowhere}");
    workspace.write("job.yaml", &(job.clone() + &scratch.connection(&url)));
    workspace.trueup(&["run", "job.yaml"]).fails_with(1, &["nowhere"]);
    scratch.sql("CREATE TABLE short (tenant_id String, id String) ENGINE = MergeTree ORDER BY id");
    workspace.edit("job.yaml", "nowhere", "short");
    workspace.trueup(&["run", "job.yaml"]).fails_with(1, &["table short has no column `event_name`", "source.columns"]);
    workspace.write("job.yaml", &job);
    workspace.trueup(&["run", "job.yaml"]).fails_with(2, &["connections.clickhouse.url is not set"]);
    let secret = "connections: {clickhouse: {url: \"http://127.0.0.1:1\", password: \"${env:TRUEUP_TEST_NO_SUCH_VARIABLE}\"}}\n";
    workspace.write("job.yaml", &(job + secret));
    workspace.trueup(&["run", "job.yaml"]).fails_with(2, &["TRUEUP_TEST_NO_SUCH_VARIABLE is not set"]);
}
