//! What a deployment relies on: layered connections and secrets, `check --connect`,
//! `serve`, and the raw-event tables of other systems.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::parts::{Scratch, clickhouse, replace_key};
use crate::support::{Workspace, fixtures};

/// A proxy that drops its first connections and cuts answers longer than `after`
/// bytes. Gives its address, and the count of connections.
fn proxy(upstream: &str, dropped: usize, after: usize) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let upstream = upstream.trim_start_matches("http://").trim_end_matches('/').to_owned();
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(client) = client else { continue };
            if count.fetch_add(1, Ordering::SeqCst) < dropped {
                continue;
            }
            let Ok(server) = TcpStream::connect(&upstream) else { continue };
            let (mut to_server, mut from_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from_client, &mut to_server);
                let _ = to_server.shutdown(std::net::Shutdown::Write);
            });
            std::thread::spawn(move || relay(server, client, after));
        }
    });
    (url, connections)
}

fn relay(mut server: TcpStream, mut client: TcpStream, after: usize) {
    let (mut buffer, mut sent) = (vec![0; 1 << 14], 0);
    while let Ok(read @ 1..) = server.read(&mut buffer) {
        sent += read;
        if sent > after || client.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = client.shutdown(std::net::Shutdown::Both);
}

#[test]
fn an_answer_that_is_cut_off_fails_the_run() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    scratch.sql(
        "CREATE TABLE events ENGINE = MergeTree ORDER BY id AS SELECT 'demo' AS tenant_id, toString(number) AS id, 'api.call' AS \
         event_name, 'acme' AS external_customer_id, toDateTime('2026-01-01 00:00:00', 'UTC') + number % 86400 AS timestamp, \
         now() AS ingested_at, '{\"status\":200,\"bytes\":1}' AS properties FROM numbers(200000)",
    );
    let workspace = Workspace::of("init");
    let job = replace_key(&workspace.read("job.yaml"), "source", "source: {kind: clickhouse, table: events}");
    for after in [100_000, 1_000_000] {
        let (proxy, _) = proxy(&url, 0, after);
        workspace.write("job.yaml", &(job.clone() + &scratch.connection(&proxy)));
        workspace.trueup(&["run", "job.yaml"]).fails_with(1, &["table events"]);
        assert!(workspace.query("SELECT * FROM runs").is_empty());
    }
    workspace.write("job.yaml", &(job + &scratch.connection(&url)));
    assert_eq!(workspace.run(&[])["events"]["metered"], 200_000);
}

#[test]
fn what_may_pass_is_tried_again_and_what_is_final_is_not() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = Workspace::of("init");
    let job = replace_key(&workspace.read("job.yaml"), "store", "store: {kind: clickhouse}");
    let (flaky, _) = proxy(&url, 2, usize::MAX);
    workspace.write("job.yaml", job.clone() + &scratch.connection(&flaky));
    let outcome = workspace.trueup(&["run", "job.yaml"]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert!(outcome.stderr.contains("trying again"), "{}", outcome.stderr);
    // A table that is not there will not come by waiting.
    let (counting, connections) = proxy(&url, 0, usize::MAX);
    let job = replace_key(&job, "source", "source: {kind: clickhouse, table: nowhere}");
    workspace.write("job.yaml", job + &scratch.connection(&counting));
    let outcome = workspace.trueup(&["plan", "job.yaml"]);
    outcome.fails_with(1, &["nowhere"]);
    assert!(!outcome.stderr.contains("trying again"), "{}", outcome.stderr);
    assert!(connections.load(Ordering::SeqCst) < 20);
}

#[test]
fn raw_event_tables_of_other_systems() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    // Flexprice: environments within tenants, properties as JSON text.
    scratch.sql(
        "CREATE TABLE events (id String, tenant_id String, environment_id String, external_customer_id String, event_name String, \
         timestamp DateTime64(3) DEFAULT now(), ingested_at DateTime64(3) DEFAULT now(), source Nullable(String), properties String) \
         ENGINE = ReplacingMergeTree(ingested_at) ORDER BY (tenant_id, environment_id, timestamp, id)",
    );
    scratch.sql(
        "INSERT INTO events VALUES ('1', 'demo', 'live', 'acme', 'api.call', '2026-01-01 09:00:00', '2026-01-01 09:00:01', NULL, \
         '{\"status\":200,\"bytes\":700}'), ('1', 'demo', 'test', 'acme', 'api.call', '2026-01-01 09:00:00', '2026-01-01 09:00:01', \
         NULL, '{\"status\":200,\"bytes\":1}')",
    );
    // OpenMeter: CloudEvents in columns.
    scratch.sql(
        "CREATE TABLE om_events (namespace String, id String, type LowCardinality(String), subject String, source String, \
         time DateTime, data String, ingested_at DateTime, stored_at DateTime) ENGINE = MergeTree ORDER BY (namespace, type, subject)",
    );
    scratch.sql(
        "INSERT INTO om_events VALUES ('demo', '1', 'api.call', 'acme', 'gw', '2026-01-01 09:00:00', '{\"status\":200,\"bytes\":700}', \
         '2026-01-01 09:00:01', '2026-01-01 09:00:02')",
    );
    let jobs = fixtures().join("../jobs");
    for (job, tenant) in [("flexprice.yaml", "demo/live"), ("openmeter.yaml", "demo")] {
        // The job as shipped; only its tables are elsewhere, and its reference tables smaller.
        let shipped = std::fs::read_to_string(jobs.join(job)).unwrap();
        let shipped = shipped.replace("flexprice.events", "events").replace("openmeter.om_events", "om_events");
        let workspace = Workspace::of("init");
        for table in ["customers", "subscriptions"] {
            workspace.edit(&format!("{table}.csv"), "demo,", &format!("{tenant},"));
        }
        let job = replace_key(&shipped, "store", "store: {kind: sqlite, path: trueup.db}");
        let job = job.replace("../fixtures/llm_usage/", "") + &scratch.connection(&url);
        workspace.write("job.yaml", &job);
        workspace.run(&[]);
        let rows = workspace.query("SELECT quantity, tenant_id FROM usage_windows WHERE meter_id = 'bytes_sent'");
        assert_eq!(rows.len(), 1, "{tenant}");
        assert_eq!((rows[0]["quantity"].as_str(), rows[0]["tenant_id"].as_str()), ("700", tenant));
    }
}

#[test]
fn connections_come_in_layers_and_secrets_stay_secret() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = Workspace::of("init");
    let job = replace_key(&workspace.read("job.yaml"), "store", "store: {kind: clickhouse}");
    workspace.write("job.yaml", &job);
    workspace.write("secret.txt", "hunter2hunter2\n");
    workspace.write(
        "platform.yaml",
        format!(
            "connections:\n  clickhouse: {{url: \"http://127.0.0.1:1\", database: {}, password: \"${{file:secret.txt}}\"}}\n",
            scratch.name
        ),
    );
    workspace.write("environments/here.yaml", format!("connections: {{clickhouse: {{url: \"{url}\", password: \"\"}}}}\n"));
    // The environment's address wins, the platform's database stays.
    let outcome = workspace.trueup(&["run", "job.yaml", "--environment", "here"]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(scratch.sql("SELECT count() > 0 FROM usage_windows FINAL").trim(), "1");
    workspace
        .trueup(&["run", "job.yaml", "--environment", "nowhere"])
        .fails_with(2, &["environments/nowhere.yaml does not exist"]);
    let outcome = workspace.trueup(&["run", "job.yaml", "-vv"]);
    outcome.fails_with(1, &["ClickHouse"]);
    assert!(!(outcome.stdout + &outcome.stderr).contains("hunter2"), "a secret was printed");
    workspace.edit("platform.yaml", "${file:secret.txt}", "${vault:x}");
    workspace.trueup(&["run", "job.yaml"]).fails_with(2, &["${vault:x}", "${env:NAME}"]);
    workspace.write("platform.yaml", "connections: {clickhuose: {}}\n");
    workspace.trueup(&["run", "job.yaml"]).fails_with(2, &["platform.yaml:1", "clickhuose"]);
}

#[test]
fn check_connect_says_what_is_missing() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = Workspace::of("init");
    let job = replace_key(&workspace.read("job.yaml"), "source", "source: {kind: clickhouse, table: events}");
    let job = replace_key(&job, "store", "store: {kind: clickhouse}");
    workspace.write("job.yaml", &(job + &scratch.connection(&url)));
    let untried = workspace.trueup(&["check", "job.yaml"]);
    assert_eq!(untried.code, 0, "{untried:?}");
    assert!(untried.stdout.contains("source       not tried: add --connect"), "{}", untried.stdout);
    let missing = workspace.trueup(&["check", "job.yaml", "--connect"]);
    assert_eq!(missing.code, 1, "{missing:?}");
    assert!(missing.stdout.contains("source       fails:") && missing.stdout.contains("events"), "{}", missing.stdout);
    assert!(missing.stdout.contains("will be created by the first run"), "{}", missing.stdout);
    scratch.sql(
        "CREATE TABLE events (tenant_id String, id String, event_name String, external_customer_id String, timestamp DateTime) \
         ENGINE = MergeTree ORDER BY id",
    );
    let ready = workspace.trueup(&["check", "job.yaml", "--connect"]);
    assert_eq!(ready.code, 0, "{ready:?}");
    assert!(ready.stdout.contains("ClickHouse table events, 5 of 8 event columns"), "{}", ready.stdout);
    workspace.edit("job.yaml", &url, "http://127.0.0.1:1");
    assert_eq!(workspace.trueup(&["check", "job.yaml", "--connect"]).code, 1);
}

/// `trueup serve`, ended with the test.
struct Server(Child, String);

impl Server {
    fn start(workspace: &Workspace) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_trueup"))
            .args(["serve", "job.yaml", "--listen", &port.to_string()])
            .current_dir(workspace.path("."))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Server(child, port.to_string())
    }

    /// The body at `path`, once it holds `text`.
    #[track_caller]
    fn wait_for(&self, path: &str, text: &str) -> String {
        let start = Instant::now();
        let mut body = String::new();
        while start.elapsed() < Duration::from_secs(20) {
            if let Ok(mut stream) = TcpStream::connect(&self.1) {
                body.clear();
                let _ = write!(stream, "GET {path} HTTP/1.0\r\n\r\n");
                let _ = stream.read_to_string(&mut body);
                if body.contains(text) {
                    return body;
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("{path} never said `{text}`: {body}");
    }

    fn terminate(mut self) -> i32 {
        Command::new("kill").arg(self.0.id().to_string()).status().unwrap();
        self.0.wait().unwrap().code().unwrap_or(-1)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

#[test]
fn serve_runs_jobs_by_schedule_and_ends_cleanly() {
    let workspace = Workspace::of("init");
    workspace.write("job.yaml", &(workspace.read("job.yaml") + "schedule: {cron: \"* * * * * *\"}\n"));
    let server = Server::start(&workspace);
    server.wait_for("/health", "\"status\":\"ok\"");
    let metrics = server.wait_for("/metrics", "trueup_corrections_total{job=\"my_usage\",kind=\"insert\"}");
    assert!(metrics.contains("trueup_events_total{job=\"my_usage\",bucket=\"metered\"}"), "{metrics}");
    // A price is repaired while it serves: the next run finds it.
    workspace.edit("prices.yaml", "0.000001", "0.000002");
    server.wait_for("/metrics", "kind=\"update\"} 3");
    assert_eq!(server.terminate(), 143);
    let runs = workspace.query("SELECT * FROM runs");
    assert!(runs.len() >= 2);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

/// A job that was last run as a whole years ago, and has been due since.
fn missed() -> Workspace {
    let workspace = Workspace::of("init");
    workspace.run(&[]);
    workspace.tamper("UPDATE runs SET started_at = '2020-01-01T00:00:00Z'");
    workspace.write("job.yaml", &(workspace.read("job.yaml") + "schedule: {cron: \"0 2 1 1 *\"}\n"));
    workspace
}

#[test]
fn serve_catches_up_once_on_a_missed_time() {
    let workspace = missed();
    let server = Server::start(&workspace);
    server.wait_for("/metrics", "trueup_runs_total{job=\"my_usage\",status=\"succeeded\"} 1");
    std::thread::sleep(Duration::from_secs(3));
    server.wait_for("/metrics", "trueup_runs_total{job=\"my_usage\",status=\"succeeded\"} 1");
    assert_eq!(server.terminate(), 143);
}

#[test]
fn what_is_done_by_hand_since_a_missed_time_makes_up_for_it_only_as_a_whole() {
    let workspace = missed();
    workspace.run(&["--customer", "cus_1"]);
    workspace.run(&["--day", "2026-01-01"]);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]).code, 0);
    let server = Server::start(&workspace);
    server.wait_for("/metrics", "trueup_runs_total{job=\"my_usage\",status=\"succeeded\"} 1");
    assert_eq!(server.terminate(), 143);
    // That run, which was of everything, is known to the next server.
    let server = Server::start(&workspace);
    server.wait_for("/health", "\"last_status\":null");
    std::thread::sleep(Duration::from_secs(3));
    server.wait_for("/health", "\"last_status\":null");
    assert_eq!(server.terminate(), 143);
}

#[test]
fn a_time_at_which_the_lock_is_held_is_tried_again() {
    let workspace = missed();
    let lock = std::fs::File::options().write(true).open(workspace.path("trueup.db.my_usage.lock")).unwrap();
    lock.lock().unwrap();
    let server = Server::start(&workspace);
    server.wait_for("/metrics", "trueup_runs_total{job=\"my_usage\",status=\"locked\"} 1");
    server.wait_for("/health", "\"retry_at\":\"20");
    drop(lock);
    assert_eq!(server.terminate(), 143);
}

#[test]
fn a_run_of_a_snapshot_is_resumed_with_it() {
    let workspace = Workspace::of("init");
    workspace.run(&[]);
    let lock = "{\"process\": 1, \"since\": \"2026-01-01T00:00:00Z\", \"request\": {\"range\": null, \"scope\": {}}, \"snapshot\": \"nothing\"}";
    workspace.write("trueup.db.my_usage.lock", lock);
    workspace.trueup(&["resume", "job.yaml"]).fails_with(2, &["--snapshot nothing", "no such run"]);
    // It came to its end by itself: there is nothing left of it.
    let nothing = workspace.trueup(&["resume", "job.yaml"]);
    assert_eq!((nothing.code, nothing.stdout.as_str()), (0, "trueup resume my_usage: there is nothing to resume\n"));
}

#[test]
fn the_jobs_that_are_shipped_are_valid() {
    let workspace = Workspace::new();
    let jobs = fixtures().join("../jobs");
    let mut checked = 0;
    for entry in std::fs::read_dir(&jobs).unwrap() {
        let path = entry.unwrap().path();
        let is_job = path.is_file() && path.file_name().is_some_and(|name| name != "platform.yaml");
        if is_job {
            let outcome = workspace.trueup(&["check", path.to_str().unwrap()]);
            assert_eq!(outcome.code, 0, "{outcome:?}");
            checked += 1;
        }
    }
    assert!(checked >= 5, "only {checked} jobs");
}

#[test]
fn serve_refuses_jobs_that_it_cannot_run() {
    let workspace = Workspace::of("init");
    workspace.trueup(&["serve", "job.yaml"]).fails_with(2, &["has no schedule"]);
}
