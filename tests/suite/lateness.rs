//! What a job says of late events: how far back runs look, when a window has settled, and
//! the horizon beyond which nothing changes. Events lie around the time of the test.

use std::sync::LazyLock;

use chrono::{DateTime, Duration, DurationRound as _, Utc};
use serde_json::{Value, json};

use crate::support::Workspace;

fn job(policy: &str) -> String {
    crate::support::job("late", "hour", "trueup") + policy + "\n"
}

/// Daily billing periods; a call is 1 EUR.
fn workspace(policy: &str) -> Workspace {
    let workspace = Workspace::new();
    workspace.write("job.yaml", job(policy));
    workspace.write("meters.yaml", "meters:\n  - {meter_id: calls, event_name: call, aggregation: count}\n");
    workspace.write(
        "prices.yaml",
        "prices:\n  - {price_id: p, plan_id: pro, meter_id: calls, currency: EUR, model: per_unit, unit_amount: \"1\"}\n",
    );
    workspace.write("customers.csv", "tenant_id,customer_id,external_customer_id\nt,a,x\n");
    workspace.write(
        "subscriptions.csv",
        "tenant_id,subscription_id,customer_id,plan_id,currency,billing_period,started_at\nt,s,a,pro,EUR,day,2020-01-01\n",
    );
    workspace
}

/// The beginning of the hour in which the tests began.
static HOUR: LazyLock<DateTime<Utc>> = LazyLock::new(|| Utc::now().duration_trunc(Duration::hours(1)).unwrap());

/// A file with one call, so long before the hour.
fn call(workspace: &Workspace, id: &str, ago: Duration) {
    let time = (*HOUR - ago).to_rfc3339();
    let ingested = Utc::now().to_rfc3339();
    workspace.write(
        &format!("events/{id}.ndjson"),
        format!(
            "{{\"tenant_id\":\"t\",\"id\":\"{id}\",\"event_name\":\"call\",\"external_customer_id\":\"x\",\
             \"timestamp\":\"{time}\",\"ingested_at\":\"{ingested}\",\"properties\":{{}}}}\n"
        ),
    );
}

fn quantities(workspace: &Workspace) -> Vec<String> {
    let rows = workspace.query("SELECT quantity FROM usage_windows ORDER BY window_start");
    rows.iter().map(|row| row["quantity"].clone()).collect()
}

fn rows(run: &Value) -> [u64; 5] {
    ["inserted", "updated", "retracted", "unchanged", "adjusted"].map(|name| run["rows"][name].as_u64().unwrap_or_default())
}

#[test]
fn a_run_looks_back_as_far_as_the_job_says() {
    let workspace = workspace("lateness: {lookback: 7d}");
    call(&workspace, "old", Duration::days(40));
    call(&workspace, "recent", Duration::days(2));
    let run = workspace.run(&[]);
    assert_eq!(rows(&run), [1, 0, 0, 0, 0], "{run}");
    let since = run["lateness"]["looks_back_to"].as_str().unwrap();
    let text = workspace.trueup(&["plan", "job.yaml"]).stdout;
    assert!(text.contains("lateness     looks back to "), "{text}");
    // Later runs move on, and what they leave behind stays.
    assert!(since < run["range"]["end"].as_str().unwrap());
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    // Ranges and --full are not bound by it; what they stored, later runs leave alone.
    assert_eq!(rows(&workspace.run(&["--full"])), [1, 0, 0, 1, 0]);
    assert_eq!(rows(&workspace.run(&[])), [0, 0, 0, 1, 0]);
    assert_eq!(quantities(&workspace), ["1", "1"]);
}

#[test]
fn a_plan_of_what_a_run_looks_back_to_can_be_applied() {
    let workspace = workspace("lateness: {lookback: 7d}");
    call(&workspace, "old", Duration::days(40));
    call(&workspace, "recent", Duration::days(2));
    assert_eq!(workspace.trueup(&["plan", "job.yaml", "--out", "p.plan"]).code, 0);
    let applied = workspace.trueup(&["apply", "p.plan"]);
    assert_eq!(applied.code, 0, "{applied:?}");
    assert_eq!(quantities(&workspace), ["1"]);
}

#[test]
fn windows_wait_until_they_have_settled() {
    let workspace = workspace("lateness: {settle: 2h}");
    call(&workspace, "settled", Duration::hours(5));
    call(&workspace, "fresh", Duration::zero());
    let run = workspace.run(&[]);
    assert_eq!(rows(&run), [1, 0, 0, 0, 0], "{run}");
    assert_eq!((&run["events"]["metered"], &run["events"]["out_of_range"]), (&json!(1), &json!(1)));
    assert_eq!(run["range"]["end"], run["lateness"]["settled_until"]);
    let text = workspace.trueup(&["plan", "job.yaml"]).stdout;
    assert!(text.contains(" wait for a later run"), "{text}");
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    // The window comes with a run for which it has settled, for the first time.
    workspace.write("job.yaml", job(""));
    let run = workspace.run(&["--incremental"]);
    assert_eq!((rows(&run)[0], &run["coverage"]["mode"]), (1, &json!("full")), "{run}");
    assert_eq!(quantities(&workspace), ["1", "1"]);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

#[test]
fn nothing_has_settled_yet() {
    let workspace = workspace("lateness: {settle: 2h}");
    call(&workspace, "fresh", Duration::zero());
    let run = workspace.run(&[]);
    assert_eq!((rows(&run), &run["events"]["read"]), ([0; 5], &json!(1)), "{run}");
}

#[test]
fn sessions_cannot_settle() {
    let workspace = workspace("lateness: {settle: 2h}");
    workspace.write(
        "meters.yaml",
        "meters:\n  - {meter_id: calls, event_name: call, aggregation: count, window: {session: {gap: 30m}}}\n",
    );
    workspace.trueup(&["check", "job.yaml"]).fails_with(2, &["job.yaml: lateness.settle", "meter `calls` has sessions"]);
}

#[test]
fn beyond_the_horizon_differences_are_recorded_and_nothing_changes() {
    let workspace = workspace("lateness: {horizon: 5d}");
    // What was never computed is not history yet.
    call(&workspace, "old", Duration::days(10));
    call(&workspace, "recent", Duration::days(2));
    assert_eq!(rows(&workspace.run(&[])), [2, 0, 0, 0, 0]);

    // Late for a window that is stored, late for one that is not, and late within the horizon.
    call(&workspace, "late-old", Duration::days(10));
    call(&workspace, "late-other", Duration::days(10) + Duration::hours(3));
    call(&workspace, "late-recent", Duration::days(2));
    for mode in ["--full", "--incremental"] {
        let plan = workspace.trueup(&["plan", "job.yaml", "--output", "json", mode]).json();
        assert_eq!(rows(&plan)[4], 2, "{mode}: {plan}");
    }
    let text = workspace.trueup(&["plan", "job.yaml"]).stdout;
    assert!(text.contains("2 differences in closed periods or beyond the horizon, recorded as adjustments"), "{text}");
    let run = workspace.run(&[]);
    assert_eq!((run["rows"]["adjusted"].as_u64(), quantities(&workspace)), (Some(2), vec!["1".into(), "2".into()]), "{run}");
    let adjusted = workspace.query("SELECT quantity_before, quantity_after FROM corrections WHERE kind = 'adjust' ORDER BY 2");
    let adjusted: Vec<_> = adjusted.iter().map(|row| (row["quantity_before"].as_str(), row["quantity_after"].as_str())).collect();
    assert_eq!(adjusted, [("", "1"), ("1", "2")]);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);

    // They are recorded once, also by runs that skip.
    assert_eq!(rows(&workspace.run(&[]))[4], 0);
    call(&workspace, "late-again", Duration::days(10));
    assert_eq!(rows(&workspace.run(&["--incremental"]))[4], 1);
    // Whoever wants it applied says so.
    let run = workspace.run(&["--allow-closed"]);
    assert_eq!(rows(&run)[4], 0, "{run}");
    assert_eq!(quantities(&workspace).iter().map(|quantity| quantity.parse::<u64>().unwrap()).sum::<u64>(), 6);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

#[test]
fn events_of_the_future_are_told_unless_a_range_leaves_them_out() {
    let workspace = workspace("");
    call(&workspace, "recent", Duration::hours(2));
    call(&workspace, "soon", -Duration::hours(20));
    let warnings = |arguments: &[&str]| workspace.run(arguments)["warnings"].clone();
    assert_eq!(warnings(&[]), json!([]));
    call(&workspace, "later", -Duration::days(3));
    call(&workspace, "latest", -Duration::days(400));
    let last = (*HOUR + Duration::days(400)).format("%Y-%m-%dT%H:%M:%SZ").to_string();
    for arguments in [&["--full"][..], &["--incremental"]] {
        let found = warnings(arguments)[0].as_str().unwrap().to_owned();
        assert!(found.starts_with(&format!("events are dated up to {last}, after now (in ")), "{found}");
        assert!(found.contains("latest.ndjson): void them"), "{found}");
    }
    let plan = workspace.trueup(&["plan", "job.yaml"]).stdout;
    assert!(plan.contains("warning      events are dated up to "), "{plan}");
    assert_eq!(warnings(&["--last", "3d"]), json!([]));
    workspace.write("job.yaml", job("lateness: {lookback: 7d}"));
    assert_eq!(warnings(&[]), json!([]));
}

#[test]
fn a_job_can_skip_always_and_never() {
    let workspace = workspace("incremental: always");
    call(&workspace, "first", Duration::days(2));
    workspace.run(&[]);
    assert_eq!(workspace.run(&[])["coverage"]["mode"], "incremental");
    assert_eq!(workspace.run(&["--full"])["coverage"]["mode"], "full");
    for (policy, mode) in [("incremental: never", "full"), ("", "full")] {
        workspace.write("job.yaml", job(policy));
        assert_eq!(workspace.run(&[])["coverage"]["mode"], mode, "{policy}");
        assert_eq!(workspace.run(&["--incremental"])["coverage"]["mode"], "incremental");
    }
}

#[test]
fn a_policy_that_is_none_is_refused() {
    let workspace = workspace("lateness: {horizon: soon}");
    workspace.trueup(&["check", "job.yaml"]).fails_with(2, &["job.yaml:11", "lateness.horizon `soon` is no duration such as"]);
    workspace.write("job.yaml", job("incremental: sometimes"));
    workspace.trueup(&["check", "job.yaml"]).fails_with(2, &["job.yaml:11", "must be auto, always or never"]);
}

/// Where the job looks back no further than to what has not settled, there is nothing to compute.
#[test]
fn what_settles_later_than_a_run_looks_back_is_not_computed() {
    let workspace = workspace("lateness: {lookback: 1d, settle: 25h}");
    workspace.edit("job.yaml", "window: hour", "window: day");
    call(&workspace, "old", Duration::days(40));
    call(&workspace, "recent", Duration::hours(20));
    let run = workspace.run(&[]);
    assert_eq!((rows(&run), &run["range"]["start"]), ([0; 5], &json!(null)), "{run}");
    assert_eq!(workspace.run(&["--full"])["rows"]["inserted"], 1);
    // Nor is anything taken away.
    call(&workspace, "late", Duration::days(40));
    assert_eq!(rows(&workspace.run(&[])), [0; 5]);
    assert_eq!(quantities(&workspace), ["1"]);
}

/// What is gone from a table does not take history back.
#[test]
fn beyond_the_horizon_a_subscription_that_is_gone_keeps_its_rows() {
    let workspace = workspace("lateness: {horizon: 5d}");
    call(&workspace, "old", Duration::days(10));
    call(&workspace, "recent", Duration::days(2));
    workspace.run(&[]);
    workspace.edit("subscriptions.csv", "t,s,a,pro,EUR,day,2020-01-01\n", "");
    assert_eq!(rows(&workspace.run(&["--yes"])), [0, 0, 1, 0, 1]);
    assert_eq!(quantities(&workspace), ["1"]);
    assert_eq!(rows(&workspace.run(&["--yes"]))[4], 0);
}
