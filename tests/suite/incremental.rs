//! Incremental runs: they leave what a full run would, read no more than they must, and
//! say why they skip nothing.

use std::fs;

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};
use trueup::model::basis::Scope;
use trueup::pipeline::{Completeness, Request};

use crate::promises::{self, Event, Format, Settings, cases, check_idempotence, check_stored_ledger, full, state, within};
use crate::support::{Row, Workspace, job};

// --- the promise -----------------------------------------------------------------------------

/// Something that happens between two runs.
#[derive(Debug, Clone)]
enum Change {
    Events(Vec<Event>, Format),
    Factor(u8),
    Owner(&'static str),
    Meter(&'static str),
    Subscription(&'static str),
    /// All events so far in one new file.
    Compaction(Format),
    Nothing,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        8 => (promises::events(8), promises::format()).prop_map(|(events, format)| Change::Events(events, format)),
        2 => (10u8..100).prop_map(Change::Factor),
        2 => prop_oneof![Just("c0"), Just("c1"), Just("c2"), Just("c9")].prop_map(Change::Owner),
        1 => prop_oneof![Just("large"), Just("small")].prop_map(Change::Meter),
        1 => prop_oneof![Just("2026-04-20"), Just("2026-04-02"), Just("2026-03-15")].prop_map(Change::Subscription),
        1 => promises::format().prop_map(Change::Compaction),
        2 => Just(Change::Nothing),
    ]
}

/// The run that follows a change.
#[derive(Debug, Clone)]
enum Run {
    Incremental,
    Full,
    Part(Option<(u8, u8)>, Scope),
    /// Only the next run sees the change.
    None,
}

fn kind() -> impl Strategy<Value = Run> {
    prop_oneof![
        6 => Just(Run::Incremental),
        1 => Just(Run::Full),
        2 => promises::request().prop_map(|(range, scope)| Run::Part(range, scope)),
        1 => Just(Run::None),
    ]
}

fn apply(change: Change, number: usize, workspace: &Workspace, settings: &mut Settings, events: &mut Vec<Event>) {
    match change {
        Change::Events(more, format) => {
            format.write(workspace, &format!("step-{number}"), &more);
            events.extend(more);
        }
        Change::Factor(factor) => settings.factor = factor,
        Change::Owner(owner) => settings.owner = owner,
        Change::Meter(model) => settings.model = model,
        Change::Subscription(ended) => settings.ended = ended,
        Change::Compaction(format) => {
            fs::remove_dir_all(workspace.path("events")).unwrap();
            fs::create_dir(workspace.path("events")).unwrap();
            format.write(workspace, &format!("compacted-{number}"), events);
        }
        Change::Nothing => {}
    }
    settings.write(workspace);
}

/// The store is what a full run leaves in a fresh one that was asked for the same ranges, and no
/// full run finds more to do.
fn check_against_a_fresh_store(workspace: &Workspace, asked: &[Request]) {
    for file in ["fresh.db", "fresh.db-wal", "fresh.db-shm"] {
        let _ = fs::remove_file(workspace.path(file));
    }
    for request in asked {
        promises::run(workspace, "fresh", request, 1);
    }
    promises::run(workspace, "fresh", &full(), 1);
    let (grown, fresh) = (state(workspace, "trueup"), state(workspace, "fresh"));
    assert_eq!(grown, fresh);
    check_stored_ledger(workspace);
    check_idempotence(workspace);
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn incremental_runs_leave_what_full_ones_do(
        settings in promises::settings(),
        first in promises::events(60),
        steps in vec((change(), kind()), 1..8),
        threads in prop::sample::select(vec![1usize, 2, 8]),
        // Runs that ask for it keep their matches for later ones.
        keeps in any::<bool>(),
    ) {
        let workspace = Workspace::new();
        let mut settings = settings;
        settings.write(&workspace);
        let mut events = first;
        fs::create_dir(workspace.path("events")).unwrap();
        Format::Parquet.write(&workspace, "first", &events);
        let completeness = if keeps { Completeness::Incremental } else { Completeness::Auto };
        promises::run(&workspace, "trueup", &Request { completeness, ..Request::default() }, threads);
        let mut asked = Vec::new();
        for (number, (change, kind)) in steps.into_iter().enumerate() {
            apply(change, number, &workspace, &mut settings, &mut events);
            let request = match kind {
                Run::Incremental => Request { completeness: Completeness::Incremental, ..Request::default() },
                Run::Full => full(),
                Run::Part(range, scope) => {
                    Request { range: range.and_then(|range| within(&events, range)), scope, ..Request::default() }
                }
                Run::None => continue,
            };
            let is_whole = request.range.is_none() && request.scope.is_whole();
            promises::run(&workspace, "trueup", &request, threads);
            if is_whole {
                check_against_a_fresh_store(&workspace, &asked);
            } else if request.range.is_some() {
                asked.push(request);
            }
        }
        promises::run(&workspace, "trueup", &Request::default(), threads);
        check_against_a_fresh_store(&workspace, &asked);
    }
}

// --- a shop ----------------------------------------------------------------------------------

const METERS: &str = "meters:
  - {meter_id: calls, event_name: call, aggregation: count}
  - {meter_id: tokens, event_name: call, aggregation: sum, property: value}
  - {meter_id: logins, event_name: login, aggregation: count}
";
const PRICES: &str = r#"prices:
  - {price_id: p_calls, plan_id: pro, meter_id: calls, currency: EUR, model: per_unit, unit_amount: "1"}
  - {price_id: p_tokens, plan_id: pro, meter_id: tokens, currency: EUR, model: graduated, tiers: [{up_to: "10", unit_amount: "2"}, {up_to: null, unit_amount: "1"}]}
  - {price_id: p_logins, plan_id: pro, meter_id: logins, currency: EUR, model: per_unit, unit_amount: "3"}
  - {price_id: p_fee, plan_id: lite, meter_id: calls, currency: EUR, model: flat, amount: "5"}
"#;

fn event(id: &str, name: &str, customer: &str, time: &str, value: &str) -> String {
    format!(
        r#"{{"tenant_id":"t","id":"{id}","event_name":"{name}","external_customer_id":"{customer}","timestamp":"{time}","ingested_at":"2026-03-01","properties":{{"value":{value}}}}}"#
    ) + "\n"
}

/// Three customers with a call and a login on each of two days in each of two months, a
/// file a month; run once.
fn shop() -> Workspace {
    let workspace = Workspace::new();
    workspace.write("job.yaml", job("shop", "day", "trueup"));
    for (name, content) in [("meters.yaml", METERS), ("prices.yaml", PRICES)] {
        workspace.write(name, content);
    }
    workspace.write("customers.csv", "tenant_id,customer_id,external_customer_id\nt,a,xa\nt,b,xb\nt,c,xc\n");
    workspace.write(
        "subscriptions.csv",
        "tenant_id,subscription_id,customer_id,plan_id,currency,billing_period,started_at\n\
         t,sa,a,pro,EUR,month,2025-01-01\nt,sb,b,pro,EUR,month,2025-01-01\nt,sc,c,lite,EUR,month,2025-01-01\n",
    );
    for month in ["01", "02"] {
        let mut lines = String::new();
        for customer in ["a", "b"] {
            for day in ["10", "20"] {
                let time = format!("2026-{month}-{day}T10:00:00Z");
                for name in ["call", "login"] {
                    lines += &event(&format!("{name}-{customer}-{month}-{day}"), name, &format!("x{customer}"), &time, "6");
                }
            }
        }
        workspace.write(&format!("events/{month}.ndjson"), lines);
    }
    let first = workspace.run(&[]);
    assert_eq!((&first["coverage"]["mode"], &first["events"]["metered"]), (&json!("full"), &json!(16)));
    workspace
}

/// An incremental run; then a full one finds nothing to do, and neither does `verify`.
#[track_caller]
pub fn increment(workspace: &Workspace) -> Value {
    let run = workspace.run(&["--incremental"]);
    assert_eq!(run["coverage"]["mode"], "incremental", "{}", run["coverage"]);
    // However often it looks at something, it is no more than there is.
    for (part, all) in [("files", "all_files"), ("rows", "all_rows")] {
        let [part, all] = [part, all].map(|name| run["coverage"]["skipping"][name].as_u64().unwrap());
        assert!(part <= all, "{}", run["coverage"]);
    }
    let verified = workspace.trueup(&["verify", "job.yaml"]);
    assert_eq!(verified.code, 0, "{verified:?}");
    let full = workspace.trueup(&["plan", "job.yaml", "--detailed-exitcode"]);
    assert_eq!(full.code, 0, "{full:?}");
    run
}

/// A run that skips nothing says why.
#[track_caller]
fn skips_nothing(workspace: &Workspace, why: &str) {
    let run = workspace.run(&["--incremental"]);
    assert_eq!(run["coverage"]["mode"], "full", "{}", run["coverage"]);
    let found = run["coverage"]["why"].as_str().unwrap_or_default();
    assert!(found.contains(why), "`{why}` is missing in: {found}");
    // The run after it can skip again.
    increment(workspace);
}

/// How much an incremental run read: rows of the splits it looked at, and events it took.
pub fn read(run: &Value) -> (u64, u64) {
    (run["coverage"]["skipping"]["rows"].as_u64().unwrap(), run["events"]["read"].as_u64().unwrap())
}

pub fn marked(run: &Value) -> (u64, u64) {
    let skipping = &run["coverage"]["skipping"];
    (skipping["marked_customers"].as_u64().unwrap(), skipping["marked_periods"].as_u64().unwrap())
}

/// Versions of stored rows, by subscription, meter and window.
fn versions(workspace: &Workspace) -> Vec<(String, String)> {
    let rows = workspace.query("SELECT * FROM usage_windows ORDER BY subscription_id, meter_id, window_start");
    let key = |row: &Row| ["subscription_id", "meter_id", "window_start"].map(|column| row[column].as_str()).join(" ");
    rows.iter().map(|row| (key(row), row["version"].clone())).collect()
}

fn changed(before: &[(String, String)], after: &[(String, String)]) -> Vec<String> {
    after.iter().filter(|row| !before.contains(row)).map(|(key, _)| key.clone()).collect()
}

#[test]
fn nothing_new_reads_nothing() {
    let workspace = shop();
    let run = increment(&workspace);
    assert_eq!((read(&run), marked(&run)), ((0, 0), (0, 0)));
    assert_eq!(run["range"], json!({"start": "2026-01-10T00:00:00Z", "end": "2026-02-21T00:00:00Z"}));
}

#[test]
fn a_late_event_marks_its_customer_and_its_windows_alone() {
    let workspace = shop();
    let before = versions(&workspace);
    workspace.write("events/late.ndjson", event("late", "call", "xa", "2026-02-11T10:00:00Z", "6"));
    let run = increment(&workspace);
    // January's file is not read, nor is any row of February's: it has none of that day.
    assert_eq!((read(&run), marked(&run)), ((1 + 8, 1), (1, 1)));
    // Of the days of February that calls and tokens have already, the later one and the sum of
    // the earlier one.
    let skipping = &run["coverage"]["skipping"];
    assert_eq!((&skipping["stored_windows"], &skipping["carried_periods"]), (&json!(2), &json!(2)));
    assert_eq!(run["causes"], json!({"late_event": 2, "tier_shift": 1}));
    let changed = changed(&before, &versions(&workspace));
    assert_eq!(changed, ["sa calls 2026-02-11T00:00:00Z", "sa tokens 2026-02-11T00:00:00Z", "sa tokens 2026-02-20T00:00:00Z"]);
    // A fresh month, with the fees that are due without usage.
    workspace.write("events/march.ndjson", event("march", "login", "xb", "2026-03-02T10:00:00Z", "1"));
    let run = increment(&workspace);
    assert_eq!(read(&run), (1, 1));
    let fees = workspace.query("SELECT * FROM usage_periods WHERE subscription_id = 'sc' ORDER BY period_start");
    let starts: Vec<_> = fees.iter().map(|row| row["period_start"].as_str()).collect();
    assert_eq!(starts, ["2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z"]);
}

#[test]
fn an_amended_event_marks_both_places() {
    let workspace = shop();
    workspace
        .write("events/moved.ndjson", event("call-a-01-10", "call", "xb", "2026-02-10T11:00:00Z", "1").replace("03-01", "03-02"));
    let run = increment(&workspace);
    assert_eq!((marked(&run), &run["causes"]["event_amended"]), ((2, 2), &json!(4)));
    // Gone, by a void that knows nothing but the id: both copies mark where they lie.
    workspace.write("events/void.ndjson", r#"{"tenant_id":"t","id":"call-a-01-10","deleted":true,"ingested_at":"2026-03-03"}"#);
    let run = increment(&workspace);
    assert_eq!((marked(&run), &run["causes"]["event_voided"]), ((2, 2), &json!(2)));
    assert_eq!(run["events"]["voided"], 1);
}

#[test]
fn changed_reference_rows_mark_what_depends_on_them() {
    let workspace = shop();
    workspace.edit("prices.yaml", "unit_amount: \"3\"", "unit_amount: \"4\"");
    let run = increment(&workspace);
    assert_eq!(run["coverage"]["skipping"]["changed"], json!(["price p_logins"]));
    assert_eq!((&run["rows"]["updated"], marked(&run)), (&json!(8), (2, 4)));
    workspace.edit("customers.csv", "t,b,xb", "t,a,xb");
    let run = increment(&workspace);
    assert_eq!(run["coverage"]["skipping"]["changed"], json!(["customer xb of tenant t"]));
    assert!(run["causes"]["customer_changed"].as_u64() > Some(0), "{}", run["causes"]);
    workspace.edit("meters.yaml", "meter_id: logins, event_name: login", "meter_id: logins, event_name: call");
    let run = increment(&workspace);
    assert_eq!(run["coverage"]["skipping"]["changed"], json!(["meter logins"]));
    workspace.edit("subscriptions.csv", "t,sc,c,lite,EUR,month,2025-01-01", "t,sc,c,lite,EUR,month,2026-02-01");
    let run = increment(&workspace);
    assert_eq!((&run["periods"]["removed"], read(&run).1), (&json!(1), 0));
    // Other rows of the tables, or other orders of them, mark nothing.
    let customers = workspace.read("customers.csv").replace("t,c,xc\n", "") + "t,d,xd\nt,c,xc\n";
    workspace.write("customers.csv", customers);
    assert_eq!(marked(&increment(&workspace)), (0, 0));
}

#[test]
fn causes_are_those_of_the_rows_that_changed() {
    let workspace = shop();
    // A meter of old events; and somebody else becomes a customer the same night.
    workspace.write(
        "meters.yaml",
        workspace.read("meters.yaml") + "  - {meter_id: all, event_name: login, aggregation: count, unpriced: true}\n",
    );
    workspace.write("customers.csv", workspace.read("customers.csv") + "t,d,xd\n");
    workspace.write("subscriptions.csv", workspace.read("subscriptions.csv") + "t,sd,d,pro,EUR,month,2025-01-01\n");
    let run = increment(&workspace);
    assert_eq!(run["causes"], json!({"meter_changed": 8}));
}

#[test]
fn what_cannot_be_proved_is_computed() {
    let workspace = shop();
    let extra = event("extra", "call", "xa", "2026-01-11T10:00:00Z", "1");
    workspace.write("events/extra.ndjson", &extra);
    increment(&workspace);
    workspace.write("events/extra.ndjson", extra.replace("\"value\":1", "\"value\":22"));
    skips_nothing(&workspace, "extra.ndjson changed since run");
    fs::remove_file(workspace.path("events/extra.ndjson")).unwrap();
    skips_nothing(&workspace, "extra.ndjson is gone since run");
    workspace.edit("job.yaml", "window: day", "window: day\ndeduplicate: {keep: first}");
    skips_nothing(&workspace, "job settings changed since run");
    workspace.tamper("DELETE FROM job_state");
    skips_nothing(&workspace, "what the reference tables were in run");
    // A part of the job was computed with the prices of now: that is no obstacle.
    workspace.edit("prices.yaml", "unit_amount: \"3\"", "unit_amount: \"4\"");
    workspace.run(&["--month", "2026-01"]);
    increment(&workspace);
    // With prices that were never those of a whole run.
    workspace.edit("prices.yaml", "unit_amount: \"4\"", "unit_amount: \"5\"");
    workspace.run(&["--month", "2026-01"]);
    workspace.edit("prices.yaml", "unit_amount: \"5\"", "unit_amount: \"4\"");
    skips_nothing(&workspace, "the prices table changed since run");
    let changed = workspace.run(&[]);
    assert_eq!((&changed["coverage"]["mode"], &changed["coverage"]["why"]), (&json!("full"), &Value::Null));
    let last = workspace.run(&["--month", "2026-01"]);
    assert_eq!(last["coverage"]["mode"], "part");
}

#[test]
fn a_run_that_was_taken_back_is_no_base() {
    let workspace = shop();
    workspace.write("events/late.ndjson", event("late", "call", "xa", "2026-02-11T10:00:00Z", "6"));
    let run = increment(&workspace);
    let reverted = workspace.trueup(&["revert", "job.yaml", "--run", run["run_id"].as_str().unwrap()]);
    assert_eq!(reverted.code, 0, "{reverted:?}");
    skips_nothing(&workspace, "took another one back");
}

#[test]
fn the_key_cache_is_read_again_where_it_is_damaged() {
    let workspace = shop();
    let folder = workspace.path("trueup.db.keys/shop");
    let is_keys = |path: &std::path::PathBuf| path.extension().is_some_and(|extension| extension == "keys");
    let files = || fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).filter(is_keys).collect::<Vec<_>>();
    assert_eq!(files().len(), 3);
    for (number, damage) in (0..).zip([None, Some(0usize), Some(40), Some(100)]) {
        for path in files() {
            let mut bytes = fs::read(&path).unwrap();
            match damage {
                None => fs::remove_file(&path).unwrap(),
                Some(at) => {
                    bytes[at] ^= 1;
                    fs::write(&path, bytes).unwrap();
                }
            }
        }
        // An amendment needs the keys of the old files.
        let amended = event("call-a-01-10", "call", "xb", "2026-01-10T11:00:00Z", "1");
        workspace.write(&format!("events/again-{number}.ndjson"), amended.replace("03-01", &format!("03-{:02}", number + 2)));
        increment(&workspace);
    }
    fs::remove_dir_all(&folder).unwrap();
    increment(&workspace);
    // Keys of files that are gone are removed.
    fs::remove_file(workspace.path("events/again-0.ndjson")).unwrap();
    let before = files().len();
    skips_nothing(&workspace, "is gone since run");
    assert_eq!(files().len(), before - 1);
}

#[test]
fn dead_letters_come_and_go() {
    let workspace = shop();
    let open =
        || workspace.query("SELECT event_id, meter_id, reason FROM dead_letters WHERE resolved_run_id IS NULL ORDER BY event_id");
    let strange = event("s1", "call", "stranger", "2026-01-11T10:00:00Z", "1")
        + &event("s2", "call", "xa", "2026-01-11T10:00:00Z", "\"many\"")
        + &event("s3", "call", "other", "2026-01-11T10:00:00Z", "1");
    workspace.write("events/strange.ndjson", strange);
    let run = increment(&workspace);
    assert_eq!(run["dead_letters"], json!({"customer_not_found": 2, "invalid_property": 1}));
    // Those of rows that are not looked at stay as they are.
    workspace.write("events/late.ndjson", event("late", "login", "xa", "2026-01-12T10:00:00Z", "1"));
    let run = increment(&workspace);
    assert_eq!((&run["dead_letters_resolved"], open().len()), (&json!(0), 3));
    let customers = workspace.read("customers.csv") + "t,b,stranger\n";
    workspace.write("customers.csv", customers);
    let run = increment(&workspace);
    assert_eq!((&run["dead_letters_resolved"], open().len()), (&json!(1), 2));
    workspace.write("events/amended.ndjson", event("s2", "call", "xa", "2026-01-11T10:00:00Z", "3").replace("03-01", "03-05"));
    let run = increment(&workspace);
    assert_eq!((&run["dead_letters_resolved"], open()[0]["event_id"].as_str()), (&json!(1), "s3"));
    // A customer that vanishes leaves new ones.
    workspace.edit("customers.csv", "t,b,stranger\n", "");
    let run = increment(&workspace);
    assert_eq!((&run["dead_letters"], open().len()), (&json!({"customer_not_found": 1}), 2));
}

#[test]
fn a_price_change_leaves_letters_of_other_meters_open() {
    let workspace = shop();
    workspace.write("events/odd.ndjson", event("odd", "call", "xa", "2026-01-11T10:00:00Z", "\"many\""));
    increment(&workspace);
    workspace.edit(
        "prices.yaml",
        "meter_id: calls, currency: EUR, model: per_unit, unit_amount: \"1\"",
        "meter_id: calls, currency: EUR, model: per_unit, unit_amount: \"2\"",
    );
    let run = increment(&workspace);
    assert_eq!(run["dead_letters_resolved"], 0);
}

#[test]
fn the_report_says_what_was_skipped() {
    let workspace = shop();
    workspace.write("events/late.ndjson", event("late", "call", "xa", "2026-02-11T10:00:00Z", "6"));
    workspace.edit("prices.yaml", "unit_amount: \"3\"", "unit_amount: \"4\"");
    let plan = workspace.trueup(&["plan", "job.yaml", "--incremental"]).stdout;
    for line in [
        "new          1 event in 1 file, price p_logins changed",
        "marked       2 customers, 4 billing periods",
        "looked at    17 of 17 events, 3 of 3 files",
    ] {
        assert!(plan.contains(line), "`{line}` is missing in:\n{plan}");
    }
    workspace.edit("job.yaml", "window: day", "window: hour");
    let plan = workspace.trueup(&["plan", "job.yaml", "--incremental"]).stdout;
    assert!(plan.contains("full         job settings changed since run"), "{plan}");
}
