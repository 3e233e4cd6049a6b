//! Corrections that can be trusted: saved plans, closed periods, taking back,
//! resuming, and ends that nobody planned.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::incremental_windows::{Call, shop};
use crate::support::{Row, Workspace};

/// Two customers on a graduated plan, with events in January and February.
pub fn world() -> Workspace {
    let workspace = Workspace::new();
    workspace.write(
        "job.yaml",
        "version: 1\njob: usage\nsource: {kind: files, paths: [\"events/*.ndjson\"]}\nwindow: day\nreference:\n  \
         customers: {path: customers.csv}\n  subscriptions: {path: subscriptions.csv}\n  meters: {path: meters.yaml}\n  \
         prices: {path: prices.yaml}\nstore: {kind: sqlite, path: trueup.db}\n",
    );
    workspace.write("customers.csv", "tenant_id,customer_id,external_customer_id\nt,c1,x1\nt,c2,x2\n");
    workspace.write(
        "subscriptions.csv",
        "tenant_id,subscription_id,customer_id,plan_id,currency,billing_period,started_at\n\
         t,s1,c1,pro,USD,month,2025-01-01\nt,s2,c2,pro,USD,month,2025-01-01\n",
    );
    workspace.write("meters.yaml", "meters: [{meter_id: calls, event_name: call, aggregation: sum, property: n}]\n");
    workspace.write(
        "prices.yaml",
        "prices: [{price_id: p, plan_id: pro, meter_id: calls, currency: USD, model: graduated, minimum_amount: \"5\", \
         tiers: [{up_to: \"10\", unit_amount: \"1\"}, {up_to: null, unit_amount: \"0.5\"}]}]\n",
    );
    let events =
        [("a", "x1", "2026-01-05", 6), ("b", "x1", "2026-01-20", 8), ("c", "x2", "2026-01-10", 3), ("d", "x1", "2026-02-02", 2)];
    send(&workspace, "first", &events);
    workspace
}

pub fn send(workspace: &Workspace, file: &str, events: &[(&str, &str, &str, i64)]) {
    let line = |(id, customer, day, n): &(&str, &str, &str, i64)| {
        let event = json!({"tenant_id": "t", "id": id, "event_name": "call", "external_customer_id": customer,
            "timestamp": format!("{day}T12:00:00Z"), "ingested_at": format!("{day}T13:00:00Z"), "properties": {"n": n}});
        format!("{event}\n")
    };
    workspace.write(&format!("events/{file}.ndjson"), events.iter().map(line).collect::<String>());
}

const WINDOWS: &str =
    "SELECT subscription_id, window_start, quantity, cost, event_count, events_digest FROM usage_windows ORDER BY 1, 2";
const PERIODS: &str = "SELECT subscription_id, period_start, quantity, cost, minimum_adjustment, amount, closed_at FROM usage_periods ORDER BY 1, 2";

pub fn tables(workspace: &Workspace) -> [Vec<Row>; 2] {
    [WINDOWS, PERIODS].map(|sql| workspace.query(sql))
}

fn amounts(workspace: &Workspace) -> Vec<String> {
    let rows =
        workspace.query("SELECT subscription_id || ' ' || period_start || ' ' || amount AS row FROM usage_periods ORDER BY 1");
    rows.into_iter().map(|row| row["row"].clone()).collect()
}

// --- saved plans -----------------------------------------------------------------------------

#[test]
fn a_saved_plan_is_published_exactly() {
    let workspace = world();
    let planned = workspace.trueup(&["plan", "job.yaml", "--out", "plan.json", "--output", "json"]).json();
    assert!(!workspace.path("trueup.db").exists(), "a plan writes nothing");
    let applied = workspace.trueup(&["apply", "plan.json", "--output", "json"]).json();
    assert_eq!(applied["counts"]["rows"], planned["rows"]);
    let by_plan = tables(&workspace);
    assert_eq!(workspace.run(&[])["rows"]["unchanged"], 4, "the next run finds nothing to do");
    let fresh = world();
    fresh.run(&[]);
    assert_eq!(by_plan, tables(&fresh));
    assert_eq!(workspace.query("SELECT mode FROM runs ORDER BY version")[0]["mode"], "apply");
    workspace.trueup(&["apply", "plan.json"]).fails_with(7, &["plan.json is stale", "another run was published", "plan again"]);
}

#[test]
fn a_saved_plan_is_refused_when_anything_moved() {
    let moved = |change: &dyn Fn(&Workspace), says: &str| {
        let workspace = world();
        workspace.run(&[]);
        send(&workspace, "late", &[("e", "x2", "2026-01-10", 1)]);
        assert_eq!(workspace.trueup(&["plan", "job.yaml", "--out", "plan.json"]).code, 0);
        change(&workspace);
        let before = workspace.dump();
        workspace.trueup(&["apply", "plan.json"]).fails_with(7, &["is stale", says]);
        assert_eq!(workspace.dump(), before);
    };
    moved(&|workspace| send(workspace, "more", &[("f", "x2", "2026-01-11", 1)]), "more.ndjson is new");
    moved(&|workspace| send(workspace, "late", &[("e", "x2", "2026-01-11", 100)]), "late.ndjson changed");
    moved(&|workspace| std::fs::remove_file(workspace.path("events/late.ndjson")).unwrap(), "late.ndjson is gone");
    moved(&|workspace| workspace.edit("prices.yaml", "0.5", "0.6"), "the prices table changed");
    moved(&|workspace| workspace.edit("job.yaml", "window: day", "window: hour"), "the job file changed");
    moved(
        &|workspace| workspace.tamper("UPDATE usage_windows SET quantity = '4' WHERE subscription_id = 's2'"),
        "is not what the plan saw",
    );
}

#[test]
fn a_saved_plan_beyond_the_guard_needs_approval() {
    let workspace = world();
    workspace.run(&[]);
    workspace.edit("job.yaml", "window: day", "window: day\nguard: {max_cost_change: \"1%\"}");
    workspace.edit("prices.yaml", "unit_amount: \"1\"", "unit_amount: \"2\"");
    assert_eq!(workspace.trueup(&["plan", "job.yaml", "--out", "plan.json"]).code, 0);
    workspace.trueup(&["apply", "plan.json"]).fails_with(8, &["max_cost_change 1%", "trueup apply plan.json --yes"]);
    assert_eq!(workspace.trueup(&["apply", "plan.json", "--yes"]).code, 0);
    workspace.trueup(&["apply", "job.yaml"]).fails_with(2, &["job.yaml is no saved plan"]);
}

// --- closed periods --------------------------------------------------------------------------

#[test]
fn differences_in_closed_periods_become_adjustments() {
    let workspace = world();
    workspace.run(&[]);
    let closed = workspace.trueup(&["close", "job.yaml", "--period", "2026-01", "--customer", "c1", "--output", "json"]).json();
    assert_eq!(closed["periods"][0]["amount"], "12");
    let before = tables(&workspace);
    send(&workspace, "late", &[("e", "x1", "2026-01-07", 4), ("f", "x1", "2026-02-03", 4), ("g", "x2", "2026-01-07", 4)]);
    let run = workspace.run(&[]);
    // The windows of 7 January (new) and 20 January (moved by tiers) of c1 stay as they were invoiced.
    assert_eq!(run["rows"], json!({"inserted": 2, "updated": 0, "retracted": 0, "unchanged": 3, "adjusted": 2}), "{run}");
    let of_c1 = |rows: &[Row]| -> Vec<Row> {
        let january = |row: &&Row| row["subscription_id"] == "s1" && !row.values().any(|cell| cell.starts_with("2026-02"));
        rows.iter().filter(january).cloned().collect()
    };
    let after = tables(&workspace);
    assert_eq!((of_c1(&before[0]), of_c1(&before[1])), (of_c1(&after[0]), of_c1(&after[1])));
    let adjusted = workspace.query("SELECT window_start, quantity_before, quantity_after, cost_before, cost_after FROM corrections WHERE kind = 'adjust' ORDER BY 1");
    let shown: Vec<Vec<&str>> = adjusted.iter().map(|row| row.values().map(String::as_str).collect()).collect();
    assert_eq!(shown, [["4", "", "4", "", "2026-01-07T00:00:00Z"], ["4", "6", "8", "8", "2026-01-20T00:00:00Z"]]);
    // Promise 3, and the ledger is whole.
    assert_eq!(workspace.run(&[])["rows"]["adjusted"], 0);
    let verified = workspace.trueup(&["verify", "job.yaml"]);
    assert_eq!(verified.code, 0, "{}", verified.stdout);
    // Voided again: adjusted back.
    std::fs::remove_file(workspace.path("events/late.ndjson")).unwrap();
    assert_eq!(workspace.run(&[])["rows"]["adjusted"], 2);
    send(&workspace, "late", &[("e", "x1", "2026-01-07", 4)]);
    assert_eq!(workspace.run(&["--allow-closed"])["rows"]["inserted"], 1);
    assert_eq!(amounts(&workspace)[0], "s1 2026-01-01T00:00:00Z 14");
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

/// Two sessions that become one: the one that begins at the same time differs in one adjustment.
#[test]
fn a_closed_session_that_was_joined_is_adjusted_once() {
    let meters = "meters:\n  - {meter_id: visits, event_name: call, aggregation: count, window: {session: {gap: 5h}}}\n";
    let price =
        "prices:\n  - {price_id: p, plan_id: pro, meter_id: visits, currency: EUR, model: per_unit, unit_amount: \"1\"}\n";
    let workspace = shop(meters, price);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-03"]).code, 0);
    let between = Call { id: "between", customer: "a", day: 2, hour: 13, value: 1, came: 2 };
    workspace.write("events/between.ndjson", between.line());
    for (adjusted, mode) in [(2, "--incremental"), (0, "--full"), (0, "--incremental")] {
        assert_eq!(workspace.run(&[mode])["rows"]["adjusted"], adjusted, "{mode}");
        assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    }
    let sql = "SELECT substr(window_start, 12, 5) AS start, event_count_before AS was, event_count_after AS is_now FROM corrections \
               WHERE kind = 'adjust' ORDER BY window_start";
    let rows: Vec<_> =
        workspace.query(sql).iter().map(|row| [&row["start"], &row["was"], &row["is_now"]].map(String::clone)).collect();
    assert_eq!(rows, [["09:30", "1", "3"], ["17:30", "1", ""]]);
}

#[test]
fn periods_are_chosen_closed_once_and_opened_again() {
    let workspace = world();
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]).fails_with(2, &["no stored billing period"]);
    workspace.run(&[]);
    for (period, count) in [("2026-02-15", 2), ("2026-01", 2)] {
        let closed = workspace.trueup(&["close", "job.yaml", "--period", period, "--output", "json"]).json();
        assert_eq!(closed["periods"].as_array().unwrap().len(), count, "{closed}");
    }
    let again = workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    assert_eq!((again.code, again.stdout.as_str()), (0, "trueup close usage: these periods are closed already\n"));
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-01", "--reopen"]).code, 0);
    let open = workspace.query("SELECT count(*) AS n FROM usage_periods WHERE closed_at IS NULL");
    assert_eq!(open[0]["n"], "2");
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    for (arguments, says) in [(["--period", "2026-13"], "--period"), (["--period", "soon"], "--period")] {
        workspace.trueup(&["close", "job.yaml", arguments[0], arguments[1]]).fails_with(2, &[says]);
    }
    workspace
        .trueup(&["close", "job.yaml", "--period", "2026-01", "--customer", "nobody"])
        .fails_with(2, &["no stored billing period"]);
}

// --- taking back -----------------------------------------------------------------------------

pub fn last_run(workspace: &Workspace) -> String {
    workspace.query("SELECT run_id FROM runs ORDER BY version DESC LIMIT 1").remove(0).remove("run_id").unwrap()
}

#[test]
fn a_run_is_taken_back() {
    let workspace = world();
    workspace.run(&[]);
    let before = tables(&workspace);
    workspace.edit("prices.yaml", "unit_amount: \"1\"", "unit_amount: \"2\"");
    send(&workspace, "late", &[("e", "x2", "2026-01-11", 1)]);
    std::fs::write(workspace.path("events/voids.ndjson"), "{\"tenant_id\":\"t\",\"id\":\"b\",\"deleted\":true}\n").unwrap();
    workspace.run(&[]);
    let wrong = tables(&workspace);
    let run = last_run(&workspace);
    let reverted = workspace.trueup(&["revert", "job.yaml", "--run", &run, "--output", "json"]).json();
    assert_eq!(tables(&workspace), before, "{reverted}");
    let causes =
        workspace.query("SELECT DISTINCT causes FROM corrections WHERE run_id = (SELECT run_id FROM runs WHERE mode = 'revert')");
    assert_eq!(causes.len(), 1);
    assert_eq!(causes[0]["causes"], "{\"manual_revert\":1}");
    // The ledger is whole, though the events say something else.
    let verified = workspace.trueup(&["verify", "job.yaml", "--output", "json"]);
    assert_eq!(verified.code, 3);
    let verified: Value = serde_json::from_str(&verified.stdout).unwrap();
    assert_eq!(verified["ledger"], json!([]));
    // Taking the revert back gives what the run had made.
    let run = last_run(&workspace);
    assert_eq!(workspace.trueup(&["revert", "job.yaml", "--run", &run]).code, 0);
    assert_eq!(tables(&workspace), wrong);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

#[test]
fn a_run_whose_rows_changed_later_is_not_taken_back_unless_told() {
    let workspace = world();
    workspace.run(&[]);
    send(&workspace, "late", &[("e", "x1", "2026-01-05", 1)]);
    workspace.run(&[]);
    let middle = last_run(&workspace);
    send(&workspace, "later", &[("f", "x1", "2026-01-05", 1)]);
    workspace.run(&[]);
    let before = workspace.dump();
    workspace.trueup(&["revert", "job.yaml", "--run", &middle]).fails_with(8, &["changed by later runs", "--force"]);
    assert_eq!(workspace.dump(), before);
    assert_eq!(workspace.trueup(&["revert", "job.yaml", "--run", &middle, "--force"]).code, 0);
    let row = workspace.query("SELECT quantity FROM usage_windows WHERE window_start LIKE '2026-01-05%'");
    assert_eq!(row[0]["quantity"], "6");
    workspace.trueup(&["revert", "job.yaml", "--run", "nonsense"]).fails_with(2, &["has no such run", "trueup runs"]);
    workspace.run(&["--yes"]);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

#[test]
fn what_is_invoiced_is_not_taken_back_unless_told() {
    let workspace = world();
    workspace.run(&[]);
    let run = last_run(&workspace);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    workspace.trueup(&["revert", "job.yaml", "--run", &run]).fails_with(8, &["is closed", "--allow-closed"]);
    assert_eq!(workspace.trueup(&["revert", "job.yaml", "--run", &run, "--allow-closed"]).code, 0);
    assert!(tables(&workspace).iter().all(Vec::is_empty));
}

// --- ends that nobody planned ----------------------------------------------------------------

/// A workspace with enough events that a run takes a while.
fn large_world() -> Workspace {
    let workspace = world();
    let mut lines = String::new();
    for n in 0..60_000 {
        let (day, hour, customer) = (n % 28 + 1, n % 24, n % 2 + 1);
        lines += &format!(
            "{{\"tenant_id\":\"t\",\"id\":\"n{n}\",\"event_name\":\"call\",\"external_customer_id\":\"x{customer}\",\
             \"timestamp\":\"2026-03-{day:02}T{hour:02}:00:00Z\",\"properties\":{{\"n\":1}}}}\n"
        );
    }
    workspace.write("events/many.ndjson", lines);
    workspace
}

fn signal(child: &std::process::Child, name: &str) {
    Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
}

/// Waits until the run holds the lock.
fn wait_for_lock(workspace: &Workspace) {
    let lock = workspace.path("trueup.db.usage.lock");
    for _ in 0..1000 {
        if std::fs::read_to_string(&lock).is_ok_and(|text| !text.is_empty()) {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("no run took the lock");
}

#[test]
fn a_run_that_is_asked_to_end_writes_nothing_and_can_be_resumed() {
    for (name, code) in [("-TERM", 143), ("-INT", 130)] {
        let workspace = large_world();
        let mut child = workspace.start(&["run", "job.yaml", "--month", "2026-03"]);
        wait_for_lock(&workspace);
        signal(&child, name);
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert!(workspace.query("SELECT * FROM runs").is_empty());
        let resumed = workspace.trueup(&["resume", "job.yaml", "--output", "json"]).json();
        assert_eq!(resumed["range"]["start"], "2026-03-01T00:00:00Z");
        assert_eq!(resumed["usage"]["counted"], 60_000);
        let nothing = workspace.trueup(&["resume", "job.yaml"]);
        assert_eq!((nothing.code, nothing.stdout.as_str()), (0, "trueup resume usage: there is nothing to resume\n"));
    }
}

#[test]
fn a_held_lock_names_its_holder_and_a_dead_holder_is_taken_over() {
    let workspace = large_world();
    let mut child = workspace.start(&["run", "job.yaml"]);
    wait_for_lock(&workspace);
    signal(&child, "-STOP");
    let held = format!("process {} since", child.id());
    for command in [&["run", "job.yaml"][..], &["resume", "job.yaml"], &["close", "job.yaml", "--period", "2026-01"]] {
        workspace.trueup(command).fails_with(6, &[&held]);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(workspace.run(&[])["usage"]["counted"], 60_004);
}

/// Killed at a random moment, the store is as before or as after; the next run makes
/// it as if nothing had happened.
#[test]
fn killed_at_any_moment_the_next_run_makes_it_right() {
    let workspace = world();
    let many: Vec<_> = (0..400)
        .map(|n| (format!("m{n}"), format!("x{}", n % 2 + 1), format!("2026-{:02}-{:02}", n % 3 + 1, n % 27 + 1)))
        .collect();
    let many: Vec<_> = many.iter().map(|(id, customer, day)| (id.as_str(), customer.as_str(), day.as_str(), 1)).collect();
    send(&workspace, "base", &many);
    workspace.run(&[]);
    let before = tables(&workspace);
    let kept = std::fs::read(workspace.path("trueup.db")).unwrap();
    workspace.edit("prices.yaml", "0.5", "0.7");
    send(&workspace, "late", &[("z1", "x1", "2026-01-03", 5), ("z2", "x2", "2026-02-03", 5), ("z3", "x2", "2026-03-28", 5)]);
    let clock = std::time::Instant::now();
    workspace.run(&[]);
    let length = u64::try_from(clock.elapsed().as_micros()).unwrap();
    let after = tables(&workspace);
    assert_ne!(before, after);
    let restore = || {
        for file in ["trueup.db-wal", "trueup.db-shm"] {
            let _ = std::fs::remove_file(workspace.path(file));
        }
        std::fs::write(workspace.path("trueup.db"), &kept).unwrap();
    };
    let (mut unchanged, mut published) = (0, 0);
    for attempt in 0..200u64 {
        restore();
        let mut child = workspace.start(&["run", "job.yaml"]);
        // Everywhere, and three times as often near the end, where it publishes.
        let share = if attempt % 4 == 0 { attempt * 9 % 1100 } else { 600 + attempt * 13 % 600 };
        std::thread::sleep(Duration::from_micros(length * share / 1000));
        let _ = child.kill();
        child.wait().unwrap();
        let now = tables(&workspace);
        assert!(now == before || now == after, "attempt {attempt}: a store between two runs");
        if now == after {
            published += 1;
        } else {
            unchanged += 1;
        }
        workspace.run(&[]);
        assert_eq!(tables(&workspace), after, "attempt {attempt}");
        let verified = workspace.trueup(&["verify", "job.yaml"]);
        assert_eq!(verified.code, 0, "attempt {attempt}: {}", verified.stdout);
    }
    assert!(unchanged > 5 && published > 5, "{unchanged} before and {published} after the commit");
}

/// The first publication of a store, which fills its tables page by page, is killed too.
#[test]
fn killed_while_a_store_is_new_the_next_run_makes_it_right() {
    let workspace = Workspace::of("llm_usage");
    let shipped = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("jobs/llm_usage.yaml")).unwrap();
    workspace.write("job.yaml", shipped.replace("../fixtures/llm_usage/", "").replace("../data/", ""));
    let forget = || {
        for file in ["trueup.db", "trueup.db-journal", "trueup.db-wal", "trueup.db-shm"] {
            let _ = fs::remove_file(workspace.path(file));
        }
    };
    let count = || {
        assert!(workspace.dump().is_some());
        ["runs", "usage_windows", "corrections"].map(|table| workspace.query(&format!("SELECT 1 FROM {table}")).len())
    };
    let clock = std::time::Instant::now();
    workspace.run(&[]);
    let length = u64::try_from(clock.elapsed().as_micros()).unwrap();
    assert_eq!(count(), [1, 5979, 5979]);
    for attempt in 0..30u64 {
        forget();
        let mut child = workspace.start(&["run", "job.yaml"]);
        std::thread::sleep(Duration::from_micros(length * (500 + attempt * 13 % 600) / 1000));
        let _ = child.kill();
        child.wait().unwrap();
        let read = workspace.trueup(&["runs", "job.yaml"]);
        assert_eq!(read.code, 0, "attempt {attempt}: {read:?}");
        if workspace.path("trueup.db").exists() && !workspace.query("SELECT 1 FROM sqlite_schema").is_empty() {
            let now = count();
            assert!(now == [0, 0, 0] || now == [1, 5979, 5979], "attempt {attempt}: a store between two runs: {now:?}");
        }
        workspace.run(&[]);
        assert_eq!(count()[1..], [5979, 5979], "attempt {attempt}");
        let verified = workspace.trueup(&["verify", "job.yaml"]);
        assert_eq!(verified.code, 0, "attempt {attempt}: {}", verified.stdout);
    }
}

// --- the whole store, row by row -------------------------------------------------------------

/// One altered row in any table is found and named.
#[test]
fn an_altered_row_is_found_and_named() {
    let altered = |sql: &str, named: &[&str]| {
        let workspace = world();
        send(&workspace, "bad", &[("nobody", "x9", "2026-01-05", 1)]);
        workspace.run(&[]);
        send(&workspace, "late", &[("e", "x1", "2026-01-05", 1)]);
        workspace.run(&[]);
        assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
        workspace.tamper(sql);
        let verified = workspace.trueup(&["verify", "job.yaml"]);
        assert_eq!(verified.code, 3, "{sql}: {}", verified.stdout);
        named.iter().for_each(|name| assert!(verified.stdout.contains(name), "{sql}: {}", verified.stdout));
    };
    let window = "t / s1 / calls / p / 2026-01-05T00:00:00Z";
    altered("DELETE FROM correction_ranges WHERE subscription_id = 's1'", &["correction_ranges", "does not lead"]);
    altered("UPDATE correction_ranges SET last_sequence = first_sequence - 1", &["correction_ranges", "does not lead"]);
    altered("UPDATE runs SET first_correction = first_correction + 1", &["runs", "does not lead"]);
    for digest in ["meter_digest = 999", "price_digest = 'x'", "subscription_digest = meter_digest", "customer_digest = ''"] {
        let sql = format!("UPDATE usage_windows SET {digest} WHERE window_start LIKE '2026-01-05%' AND subscription_id = 's1'");
        altered(&sql, &[window, "names definitions"]);
    }
    altered(
        "UPDATE usage_windows SET events_digest = 'x' WHERE window_start LIKE '2026-01-05%' AND subscription_id = 's1'",
        &[window],
    );
    altered("UPDATE usage_windows SET cost = '0.1' WHERE window_start LIKE '2026-01-05%' AND subscription_id = 's1'", &[window]);
    altered("UPDATE usage_windows SET version = version + 1 WHERE window_start LIKE '2026-01-05%'", &[window, "version"]);
    altered("UPDATE usage_windows SET customer_id = 'c2' WHERE window_start LIKE '2026-01-05%'", &[window]);
    altered("DELETE FROM usage_windows WHERE window_start LIKE '2026-01-05%' AND subscription_id = 's1'", &[window]);
    let period = "usage_periods t / s2 / calls / p / period 2026-01-01T00:00:00Z";
    altered("UPDATE usage_periods SET amount = '6' WHERE subscription_id = 's2' AND period_start LIKE '2026-01%'", &[period]);
    altered(
        "UPDATE usage_periods SET closed_at = '2026-02-02T00:00:00Z' WHERE subscription_id = 's2' AND period_start LIKE '2026-01%'",
        &[period],
    );
    altered("DELETE FROM usage_periods WHERE subscription_id = 's2' AND period_start LIKE '2026-01%'", &[period]);
    altered(
        "UPDATE corrections SET causes = '{\"event_voided\":1}' WHERE kind = 'update' AND event_count_after = 2",
        &["-000000001: was altered"],
    );
    altered(
        "UPDATE corrections SET customer_id = 'c7' WHERE kind = 'update' AND event_count_after = 2",
        &["-000000001: was altered"],
    );
    altered("DELETE FROM corrections WHERE kind = 'update' AND event_count_after = 2", &["runs ", "does not match"]);
    altered(
        "UPDATE period_corrections SET row_after = replace(row_after, '\"5\"', '\"6\"')",
        &["period_corrections ", "was altered"],
    );
    altered("UPDATE runs SET counts = '{}' WHERE version = (SELECT min(version) FROM runs)", &["runs ", "does not match"]);
    altered("UPDATE runs SET started_at = '2020-01-01T00:00:00Z'", &["runs "]);
    altered("UPDATE dead_letters SET detail = 'fine'", &["dead_letters t / nobody /  / customer_not_found: was altered"]);
    altered("DELETE FROM dead_letters", &["dead_letters the table: has 0 rows, the last run left 1"]);
}

#[test]
fn a_source_that_shrank_is_refused_by_the_guard() {
    let workspace = world();
    workspace.edit("job.yaml", "window: day", "window: day\nguard: {max_changed_rows: \"100%\"}");
    send(&workspace, "more", &[("e", "x1", "2026-01-06", 1)]);
    workspace.run(&[]);
    std::fs::remove_file(workspace.path("events/more.ndjson")).unwrap();
    let before = workspace.dump();
    workspace
        .trueup(&["run", "job.yaml"])
        .fails_with(8, &["their events are gone from the source", "max_vanished_rows 0", "c1 (1 row)"]);
    assert_eq!(workspace.dump(), before);
    workspace.edit("job.yaml", "max_changed_rows: \"100%\"", "max_vanished_rows: \"30%\"");
    assert_eq!(workspace.run(&[])["rows"]["retracted"], 1);
    // A window that keeps some of its events lost the others all the same.
    send(&workspace, "one", &[("g", "x1", "2026-01-07", 1)]);
    send(&workspace, "other", &[("h", "x1", "2026-01-07", 1)]);
    workspace.run(&[]);
    workspace.edit("job.yaml", "max_vanished_rows: \"30%\"", "max_vanished_rows: 0");
    std::fs::remove_file(workspace.path("events/other.ndjson")).unwrap();
    send(&workspace, "late", &[("i", "x1", "2026-01-08", 1)]);
    workspace
        .trueup(&["run", "job.yaml"])
        .fails_with(8, &["would be retracted or lose events", "max_vanished_rows 0", "c1 (1 row)"]);
    // What a price says does not make up for them.
    let prices = workspace.read("prices.yaml");
    for (from, to) in [("unit_amount: \"1\"", "unit_amount: \"2\""), ("currency: USD,", "currency: USD, valid_to: 2027-01-01,")] {
        workspace.write("prices.yaml", prices.replace(from, to));
        workspace.trueup(&["run", "job.yaml"]).fails_with(8, &["max_vanished_rows 0", "c1 (1 row)"]);
    }
    workspace.write("prices.yaml", prices);
    workspace.edit("job.yaml", "max_vanished_rows: 0", "max_vanished_rows: \"30%\"");
    assert_eq!(workspace.run(&[])["causes"]["event_voided"], 1);
    // What somebody voided is no surprise.
    workspace.edit("job.yaml", "max_vanished_rows: \"30%\"", "max_changed_rows: \"100%\"");
    workspace.write("events/voids.ndjson", "{\"tenant_id\":\"t\",\"id\":\"b\",\"deleted\":true}\n");
    assert_eq!(workspace.run(&[])["rows"]["retracted"], 1);
}

/// Other rows of the tables, and dead letters that were there, explain no loss.
#[test]
fn what_the_tables_say_of_others_makes_up_for_no_loss() {
    let workspace = world();
    workspace.edit("job.yaml", "window: day", "window: day\nguard: {max_changed_rows: \"100%\"}");
    send(&workspace, "one", &[("g", "x1", "2026-01-07", 1)]);
    send(&workspace, "two", &[("h", "x1", "2026-01-07", 1), ("k", "x2", "2026-01-07", 1)]);
    send(&workspace, "nobody", &[("n", "x9", "2026-01-07", 1)]);
    workspace.run(&[]);
    std::fs::remove_file(workspace.path("events/two.ndjson")).unwrap();
    workspace.edit("customers.csv", "t,c1,x1\n", "t,c1,x1\nt,c5,x5\n");
    for mode in ["--full", "--incremental"] {
        workspace.trueup(&["run", "job.yaml", mode]).fails_with(8, &["max_vanished_rows 0", "c1 (1 row)", "c2 (1 row)"]);
    }
}

/// Where another price takes over in the midst of a window, what neither counts is gone.
#[test]
fn a_price_that_takes_over_makes_up_for_what_it_counts() {
    let workspace = world();
    workspace.edit("job.yaml", "window: day", "window: month\nguard: {max_vanished_rows: 0}");
    let events = ["01", "02", "03", "20", "21"].map(|day| (format!("e{day}"), format!("2026-01-{day}")));
    let events: Vec<_> = events.iter().map(|(id, day)| (id.as_str(), "x1", day.as_str(), 1)).collect();
    send(&workspace, "first", &events);
    let price = "price_id: p, plan_id: pro, meter_id: calls, currency: USD, model: per_unit, unit_amount: \"1\"";
    workspace.write("prices.yaml", format!("prices: [{{{price}}}]\n"));
    workspace.run(&[]);
    let next = price.replace("price_id: p", "price_id: q");
    let prices = format!("prices: [{{{price}, valid_to: 2026-01-15}}, {{{next}, valid_from: 2026-01-15}}]\n");
    workspace.write("prices.yaml", prices);
    assert_eq!(workspace.trueup(&["plan", "job.yaml"]).code, 0);
    send(&workspace, "first", &events[1..]);
    workspace.trueup(&["run", "job.yaml"]).fails_with(8, &["max_vanished_rows 0", "c1 (1 row)"]);
    send(&workspace, "first", &events);
    assert_eq!(workspace.run(&[])["causes"]["event_voided"], json!(null));
    // What no price is for any more is a dead letter.
    workspace.edit("prices.yaml", "valid_from: 2026-01-15", "valid_from: 2026-01-21");
    let run = workspace.run(&[]);
    assert_eq!((&run["dead_letters"]["price_not_found"], &run["causes"]["event_voided"]), (&json!(1), &json!(null)), "{run}");
}

/// The first job of a store fills its tables page by page, the second one inserts its rows beside
/// those that are there: both have the same.
#[test]
fn two_jobs_share_a_store() {
    let workspace = Workspace::of("llm_usage");
    let shipped = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("jobs/llm_usage.yaml")).unwrap();
    let shipped = shipped.replace("../fixtures/llm_usage/", "").replace("../data/", "");
    for job in ["first", "second"] {
        workspace.write(&format!("{job}.yaml"), shipped.replace("job: llm_usage", &format!("job: {job}")));
        let outcome = workspace.trueup(&["run", &format!("{job}.yaml"), "-v"]);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        assert_eq!(outcome.stderr.contains("filled page by page"), job == "first", "{}", outcome.stderr);
        assert!(workspace.dump().is_some());
    }
    for job in ["first", "second"] {
        let outcome = workspace.trueup(&["verify", &format!("{job}.yaml")]);
        assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{}", outcome.stdout);
    }
    // What tells runs apart.
    let except = ["job", "run_id", "version", "updated_at", "recorded_at", "sequence", "correction_id"];
    let rows = |table: &str, job: &str| {
        let mut rows = workspace.query(&format!("SELECT * FROM {table} WHERE job = '{job}'"));
        rows.iter_mut().for_each(|row| row.retain(|column, _| !except.contains(&column.as_str())));
        rows
    };
    for (table, count) in [("usage_windows", 5979), ("corrections", 5979)] {
        let first = rows(table, "first");
        assert_eq!(first.len(), count);
        assert!(first == rows(table, "second"), "{table} differs");
    }
}

/// A minimum is in no window, but on the bill.
#[test]
fn bills_whose_windows_stay_are_guarded_too() {
    let workspace = world();
    workspace.edit("job.yaml", "window: day", "window: day\nguard: {max_cost_change: \"5%\"}");
    workspace.run(&[]);
    workspace.edit("prices.yaml", "minimum_amount: \"5\"", "minimum_amount: \"500\"");
    let plan = workspace.trueup(&["plan", "job.yaml", "--output", "json"]).json();
    assert_eq!(plan["periods"]["amounts"], json!([{"currency": "USD", "amount_before": "27", "amount_after": "2000"}]));
    let text = workspace.trueup(&["plan", "job.yaml"]).stdout;
    assert!(text.contains("amount       USD 27 -> 2000  +1973"), "{text}");
    let before = workspace.dump();
    workspace
        .trueup(&["run", "job.yaml"])
        .fails_with(8, &["1973 USD of 27 USD", "beyond what windows cost", "c1 (2 rows), c2 (2 rows)"]);
    assert_eq!(workspace.dump(), before);
    workspace.run(&["--yes"]);
    let audit = workspace.trueup(&["audit", "job.yaml"]).stdout;
    assert!(audit.contains(&last_run(&workspace)), "{audit}");
}

/// What moves from one customer to another is money that moves, for both.
#[test]
fn money_that_moves_between_customers_is_seen() {
    let workspace = world();
    workspace.edit("job.yaml", "window: day", "window: day\nguard: {max_cost_change: \"5%\"}");
    workspace.run(&[]);
    workspace.edit("customers.csv", "t,c2,x2", "t,c3,x2");
    workspace.edit("subscriptions.csv", "t,s2,c2", "t,s2,c3");
    workspace.trueup(&["run", "job.yaml"]).fails_with(8, &["6 USD of 17 USD stored would move"]);
    workspace.run(&["--yes"]);
    let audit = workspace.trueup(&["audit", "job.yaml", "--run", &last_run(&workspace), "--output", "json"]).json();
    let by_customer = audit["by_customer"].to_string();
    assert!(by_customer.contains("c2") && by_customer.contains("c3"), "{by_customer}");
}

/// Every column of every table, of rows that no run computes again too.
#[test]
fn no_column_can_be_altered_unseen() {
    let workspace = world();
    send(&workspace, "bad", &[("nobody", "x9", "2026-01-05", 1)]);
    workspace.run(&[]);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    send(&workspace, "late", &[("e", "x1", "2026-01-05", 1), ("f", "x1", "2026-02-02", 1)]);
    workspace.run(&[]);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    let tables = "SELECT m.name AS \"table\", t.name AS \"column\", t.type FROM sqlite_schema AS m, pragma_table_info(m.name) AS t \
                  WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite_%'";
    let columns = workspace.query(tables);
    assert!(columns.len() > 100, "{}", columns.len());
    let keys = "SELECT m.name AS \"table\", group_concat(t.name) AS keys FROM sqlite_schema AS m, pragma_table_info(m.name) AS t \
                WHERE m.type = 'table' AND t.pk > 0 GROUP BY 1";
    let keys: HashMap<_, _> = workspace.query(keys).into_iter().map(|row| (row["table"].clone(), row["keys"].clone())).collect();
    let mut unseen = Vec::new();
    for row in columns {
        let (table, column) = (row["table"].as_str(), row["column"].as_str());
        let value = match column {
            _ if row["type"] == "INTEGER" => format!("coalesce({column}, 0) + 17"),
            _ if column.ends_with("_at") || column.ends_with("_start") || column.ends_with("_end") || column == "event_time" => {
                "'2026-01-07T00:00:00Z'".to_owned()
            }
            "quantity"
            | "cost"
            | "amount"
            | "minimum_adjustment"
            | "commitment_adjustment"
            | "quantity_before"
            | "quantity_after"
            | "cost_before"
            | "cost_after" => "'17.5'".to_owned(),
            "reason" => "'price_not_found'".to_owned(),
            "kind" if table == "period_corrections" => "'adjust'".to_owned(),
            "kind" => "iif(kind = 'insert', 'update', 'insert')".to_owned(),
            "mode" => "iif(mode = 'run', 'apply', 'run')".to_owned(),
            "counts" => "json_set(counts, '$.rows.inserted', 17)".to_owned(),
            "overrides" => "'[\"guard\"]'".to_owned(),
            "input" => "json_set(input, '$.files', json('[]'))".to_owned(),
            "basis" => "json_set(basis, '$.job_digest', 'x')".to_owned(),
            "replaced" | "row_before" | "row_after" => format!("replace({column}, 'USD', 'EUR')"),
            _ => format!("coalesce({column}, '') || 'x'"),
        };
        // What is closed, what is open, and the first row of all others.
        let rows = match table {
            "usage_windows" | "usage_periods" => vec!["period_start LIKE '2026-01%'", "period_start LIKE '2026-02%'"],
            "corrections" => vec!["kind = 'adjust'", "kind = 'update'", "sequence = 1"],
            "period_corrections" => vec!["row_before <> ''"],
            _ => vec!["1"],
        };
        for which in rows {
            let copy = Workspace::new();
            copy.overlay(&workspace.path(""));
            let sql = format!(
                "UPDATE {table} SET {column} = {value} WHERE ({which}) AND coalesce({column}, '') <> coalesce({value}, '') \
                 AND ({keys}) IN (SELECT {keys} FROM {table} WHERE {which} LIMIT 1)",
                keys = keys.get(table).map_or("rowid", String::as_str),
            );
            let changed = rusqlite::Connection::open(copy.path("trueup.db")).unwrap().execute(&sql, []).unwrap();
            assert!(changed > 0 || column == "replaced", "{sql}");
            let verified = copy.trueup(&["verify", "job.yaml"]);
            // Digests of definitions have no rows of their own: they are named by those of windows.
            let named = if table == "definition_digests" { "usage_windows" } else { table };
            if changed > 0 && !(verified.code == 3 && verified.stdout.contains(named)) {
                unseen.push(format!("{sql}: {verified:?}"));
            }
        }
    }
    assert!(unseen.is_empty(), "{}", unseen.join("\n\n"));
}

/// New usage does not hide what else moves a bill; a bill that takes another's place is no money that moves.
#[test]
fn bills_are_guarded_beside_new_usage() {
    let guarded = || {
        let workspace = world();
        workspace.edit("job.yaml", "window: day", "window: day\nguard: {max_cost_change: \"20%\"}");
        workspace.run(&[]);
        workspace
    };
    let workspace = guarded();
    workspace.edit("prices.yaml", "minimum_amount: \"5\"", "minimum_amount: \"5000\"");
    let events =
        [("e", "x1", "2026-01-08", 0), ("f", "x2", "2026-01-08", 1), ("g", "x1", "2026-02-08", 1), ("h", "x2", "2026-02-08", 1)];
    send(&workspace, "more", &events);
    workspace.trueup(&["run", "job.yaml"]).fails_with(8, &["beyond what windows cost"]);
    // A fee that nobody paid before.
    let workspace = guarded();
    let fee =
        "prices: [{price_id: fee, plan_id: pro, meter_id: calls, currency: USD, model: flat, amount: \"1000\", match: {}}, ";
    workspace.edit("prices.yaml", "prices: [", fee);
    let with_fee = workspace.trueup(&["run", "job.yaml"]);
    assert_ne!(with_fee.code, 0, "{with_fee:?}");
    // New usage beneath a minimum, a new month, and a price under another name are no surprise.
    let workspace = guarded();
    send(&workspace, "more", &[("f", "x2", "2026-01-12", 1), ("g", "x1", "2026-03-08", 1)]);
    workspace.edit("prices.yaml", "price_id: p", "price_id: q");
    workspace.run(&[]);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}
