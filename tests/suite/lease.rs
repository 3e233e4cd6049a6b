//! Who may write a store in ClickHouse that more than one machine reaches.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use crate::parts::{Scratch, clickhouse, replace_key};
use crate::support::Workspace;

/// A job from files to ClickHouse, run once.
fn published(scratch: &Scratch) -> Workspace {
    let workspace = Workspace::of("init");
    let job = replace_key(&workspace.read("job.yaml"), "store", "store: {kind: clickhouse}");
    workspace.write("job.yaml", job + &scratch.connection(&scratch.url));
    workspace.run(&[]);
    workspace
}

/// One more event, in a window of its own.
fn change(workspace: &Workspace) {
    let event = "{\"tenant_id\":\"demo\",\"id\":\"e9\",\"event_name\":\"api.call\",\"external_customer_id\":\"globex\",\
        \"timestamp\":\"2026-01-01T15:00:00Z\",\"ingested_at\":\"2026-01-02T00:00:00Z\",\
        \"properties\":{\"status\":200,\"bytes\":5}}\n";
    workspace.write("events/late.ndjson", event);
}

/// Puts the last lease into other hands.
fn hand_over(scratch: &Scratch, replaced: &str) {
    scratch.sql(&format!(
        "INSERT INTO leases SELECT * REPLACE ('another' AS holder, {replaced}, version + 4294967296 AS version) \
         FROM (SELECT * FROM leases ORDER BY version DESC LIMIT 1)"
    ));
}

/// Ledger rows of a run that has not published, as of a publication under way.
fn begin_ledger(scratch: &Scratch) {
    for ledger in ["corrections", "period_corrections"] {
        scratch.sql(&format!(
            "INSERT INTO {ledger} SELECT * REPLACE ('elsewhere' AS run_id, concat('elsewhere-', correction_id) AS correction_id) \
             FROM {ledger}"
        ));
    }
}

fn begun(scratch: &Scratch) -> String {
    let count = |ledger| scratch.sql(&format!("SELECT count() FROM {ledger} FINAL WHERE run_id = 'elsewhere'"));
    format!("{} {}", count("corrections").trim(), count("period_corrections").trim())
}

fn active(scratch: &Scratch) -> String {
    scratch.sql("SELECT count() FROM leases FINAL WHERE expires_at > now64(3)").trim().to_owned()
}

#[track_caller]
fn is_right(workspace: &Workspace) {
    let verified = workspace.trueup(&["verify", "job.yaml"]);
    assert_eq!(verified.code, 0, "{verified:?}");
}

#[test]
fn a_lease_of_another_host_keeps_writers_away_until_it_expires() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = published(&scratch);
    assert_eq!((scratch.sql("SELECT count() > 0 FROM leases").trim(), active(&scratch).as_str()), ("1", "0"));
    hand_over(&scratch, "'db-two' AS host, 4711 AS process, 'publishing' AS what, now64(3) + INTERVAL 1 HOUR AS expires_at");
    begin_ledger(&scratch);
    let orphans = begun(&scratch);
    assert!(!orphans.starts_with('0') && !orphans.ends_with(" 0"), "{orphans}");
    change(&workspace);
    for command in [&["run", "job.yaml"][..], &["close", "job.yaml", "--period", "2026-01"], &["resume", "job.yaml"]] {
        let says =
            ["job my_usage is being written", "process 4711 on host db-two", "publishing, since 20", "its lease ends at 20"];
        workspace.trueup(command).fails_with(6, &says);
    }
    assert_eq!(begun(&scratch), orphans);
    // Readers need no lease, and see nothing of it.
    for command in [&["plan", "job.yaml"][..], &["runs", "job.yaml"], &["export", "job.yaml", "corrections", "--format", "csv"]] {
        let outcome = workspace.trueup(command);
        assert!(outcome.code == 0 && !outcome.stdout.contains("elsewhere"), "{outcome:?}");
    }
    let verified = workspace.trueup(&["verify", "job.yaml"]);
    assert_eq!(verified.code, 3, "{verified:?}");
    assert_eq!((begun(&scratch), active(&scratch).as_str()), (orphans, "1"));
    hand_over(&scratch, "now64(3) - INTERVAL 1 SECOND AS expires_at");
    workspace.run(&["--yes"]);
    assert_eq!((begun(&scratch).as_str(), active(&scratch).as_str()), ("0 0", "0"));
    is_right(&workspace);
}

#[test]
fn a_lease_of_this_host_is_taken_over_once_its_process_is_dead() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = published(&scratch);
    let mut sleeper = Command::new("sleep").arg("600").spawn().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", sleeper.id())).unwrap();
    let start = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap();
    let lease = |process: u32, start: &str| {
        let lasts = "now64(3) + INTERVAL 1 HOUR AS expires_at";
        hand_over(&scratch, &format!("{process} AS process, {start} AS process_start, {lasts}"));
        begin_ledger(&scratch);
    };
    lease(sleeper.id(), start);
    change(&workspace);
    workspace.trueup(&["run", "job.yaml", "--yes"]).fails_with(6, &[&format!("process {} on host", sleeper.id())]);
    // Another process with the number of the one that is gone.
    lease(sleeper.id(), "7");
    workspace.run(&["--yes"]);
    assert_eq!((begun(&scratch).as_str(), active(&scratch).as_str()), ("0 0", "0"));
    lease(sleeper.id(), start);
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    workspace.run(&["--yes"]);
    assert_eq!((begun(&scratch).as_str(), active(&scratch).as_str()), ("0 0", "0"));
    // Elsewhere a process of that number may well be alive.
    for other in ["'db-two' AS host", "'another boot' AS boot", "'' AS boot"] {
        hand_over(&scratch, &format!("{} AS process, {other}, now64(3) + INTERVAL 1 HOUR AS expires_at", sleeper.id()));
        workspace.trueup(&["run", "job.yaml", "--yes"]).fails_with(6, &["is being written"]);
        scratch.sql("TRUNCATE TABLE leases");
        workspace.run(&["--yes"]);
    }
    is_right(&workspace);
}

/// What is done before an insert goes on.
type Hook = Box<dyn FnOnce() + Send>;

/// Passes requests on; before the first insert into `table`, `hook` is called.
fn proxy(upstream: &str, table: &'static str, hook: Hook) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let upstream = upstream.trim_start_matches("http://").trim_end_matches('/').to_owned();
    let hook = Arc::new(Mutex::new(Some(hook)));
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(mut client), Ok(mut server)) = (client, TcpStream::connect(&upstream)) else { continue };
            let (mut back_from, mut back_to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut back_from, &mut back_to);
                let _ = back_to.shutdown(std::net::Shutdown::Write);
            });
            let hook = Arc::clone(&hook);
            std::thread::spawn(move || {
                let mut buffer = vec![0; 1 << 16];
                while let Ok(read @ 1..) = client.read(&mut buffer) {
                    let head = String::from_utf8_lossy(&buffer[..read.min(4000)]).into_owned();
                    let line = head.lines().next().unwrap_or_default().replace("%20", "+");
                    if line.starts_with("POST") && line.contains(&format!("INSERT+INTO+{table}+")) {
                        hook.lock().unwrap().take().into_iter().for_each(|hook| hook());
                    }
                    if server.write_all(&buffer[..read]).is_err() {
                        break;
                    }
                }
                let _ = server.shutdown(std::net::Shutdown::Write);
            });
        }
    });
    url
}

#[test]
fn a_publication_whose_lease_was_taken_over_does_not_go_on() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = published(&scratch);
    change(&workspace);
    let direct = workspace.read("job.yaml");
    // While the ledger is written, another machine takes the lease.
    let scratch = Arc::new(scratch);
    let taker = Arc::clone(&scratch);
    let hook = move || hand_over(&taker, "'db-two' AS host, now64(3) + INTERVAL 1 HOUR AS expires_at");
    workspace.write("job.yaml", direct.replace(&url, &proxy(&url, "corrections", Box::new(hook))));
    let outcome = workspace.trueup(&["run", "job.yaml", "--yes"]);
    outcome.fails_with(1, &["is not published: run again", "was taken over meanwhile", "host db-two"]);
    assert_eq!((scratch.sql("SELECT count() FROM runs FINAL").trim(), active(&scratch).as_str()), ("1", "1"));
    workspace.write("job.yaml", &direct);
    workspace.trueup(&["run", "job.yaml", "--yes"]).fails_with(6, &["host db-two"]);
    hand_over(&scratch, "now64(3) AS expires_at");
    workspace.run(&["--yes"]);
    is_right(&workspace);
}

#[test]
fn another_machine_is_kept_away_while_a_run_publishes() {
    let Some(url) = clickhouse() else { return };
    let scratch = Scratch::new(&url);
    let workspace = published(&scratch);
    change(&workspace);
    let direct = workspace.read("job.yaml");
    // The same job as another machine has it: with a folder for temporary files, and so locks, of its own.
    let elsewhere = Workspace::of("init");
    elsewhere.write("job.yaml", &direct);
    let refused = Arc::new(Mutex::new(None));
    let outcome = Arc::clone(&refused);
    let hook = move || {
        let close = Command::new(env!("CARGO_BIN_EXE_trueup"))
            .args(["close", "job.yaml", "--period", "2026-01"])
            .current_dir(elsewhere.path("."))
            .env("TMPDIR", elsewhere.path("."))
            .output()
            .unwrap();
        *outcome.lock().unwrap() = Some((close.status.code(), String::from_utf8(close.stderr).unwrap()));
    };
    workspace.write("job.yaml", direct.replace(&url, &proxy(&url, "write_ahead", Box::new(hook))));
    workspace.run(&["--yes"]);
    let (code, says) = refused.lock().unwrap().take().unwrap();
    assert!(code == Some(6) && says.contains("publishing run "), "{code:?}: {says}");
    workspace.write("job.yaml", &direct);
    is_right(&workspace);
}

#[test]
fn after_a_kill_the_next_run_on_the_machine_need_not_wait() {
    let Some(url) = clickhouse() else { return };
    for table in ["corrections", "write_ahead", "runs", "usage_windows"] {
        let scratch = Scratch::new(&url);
        let workspace = published(&scratch);
        change(&workspace);
        let direct = workspace.read("job.yaml");
        let victim = Arc::new(Mutex::new(0));
        let process = Arc::clone(&victim);
        let hook = move || {
            let id = process.lock().unwrap().to_string();
            assert!(Command::new("kill").args(["-9", &id]).status().unwrap().success());
        };
        workspace.write("job.yaml", direct.replace(&url, &proxy(&url, table, Box::new(hook))));
        let mut child = {
            let mut id = victim.lock().unwrap();
            let child = Command::new(env!("CARGO_BIN_EXE_trueup"))
                .args(["run", "job.yaml", "--yes"])
                .current_dir(workspace.path("."))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            *id = child.id();
            child
        };
        assert_eq!(child.wait().unwrap().code(), None, "{table}");
        assert_eq!(active(&scratch), "1", "{table}");
        workspace.write("job.yaml", &direct);
        workspace.run(&["--yes"]);
        assert_eq!(active(&scratch), "0", "{table}");
        is_right(&workspace);
    }
}
