//! Bills without usage, where there are neither events nor windows.

use crate::corrections::{send, tables, world};
use crate::support::Workspace;

/// A flat fee of 10 a month, and one event in January.
fn flat_world() -> Workspace {
    let workspace = world();
    let price = "prices: [{price_id: p, plan_id: pro, meter_id: calls, currency: USD, model: flat, amount: \"10\"}]\n";
    workspace.write("prices.yaml", price);
    workspace.edit("subscriptions.csv", "t,s2,c2,pro,USD,month,2025-01-01\n", "");
    send(&workspace, "first", &[("a", "x1", "2026-01-01", 6)]);
    workspace
}

fn bills(workspace: &Workspace) -> Vec<String> {
    let sql =
        "SELECT subscription_id || ' ' || substr(period_start, 1, 10) || ' ' || amount AS bill FROM usage_periods ORDER BY 1";
    workspace.query(sql).into_iter().map(|mut row| row.remove("bill").unwrap()).collect()
}

fn is_sound(workspace: &Workspace) {
    assert_eq!(workspace.run(&[])["rows"]["updated"], 0);
    let before = tables(workspace);
    workspace.run(&[]);
    assert!(tables(workspace) == before, "the same run again changes nothing");
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

/// What was billed month by month follows its price, its subscription and its customer.
#[test]
fn months_that_were_asked_for_stay_right() {
    for mode in ["--full", "--incremental"] {
        let workspace = flat_world();
        for month in ["2026-01", "2026-02", "2026-03"] {
            workspace.run(&["--month", month]);
        }
        workspace.run(&[]);
        assert_eq!(bills(&workspace), ["s1 2026-01-01 10", "s1 2026-02-01 10", "s1 2026-03-01 10"]);
        is_sound(&workspace);
        workspace.edit("prices.yaml", "\"10\"", "\"12\"");
        assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 3);
        workspace.run(&[mode, "--yes"]);
        assert_eq!(bills(&workspace), ["s1 2026-01-01 12", "s1 2026-02-01 12", "s1 2026-03-01 12"]);
        is_sound(&workspace);
        workspace.edit("subscriptions.csv", "2025-01-01\n", "2025-01-01\nt,s2,c2,pro,USD,month,2026-02-10\n");
        workspace.run(&[mode, "--yes"]);
        let all = ["s1 2026-01-01 12", "s1 2026-02-01 12", "s1 2026-03-01 12", "s2 2026-02-01 12", "s2 2026-03-01 12"];
        assert_eq!(bills(&workspace), all);
        workspace.edit("subscriptions.csv", "t,s1,c1,pro,USD,month,2025-01-01", "t,s1,c1,pro,USD,month,2025-01-01T00:00:00Z");
        workspace.edit("subscriptions.csv", "started_at", "started_at,ended_at");
        workspace.edit("subscriptions.csv", "2025-01-01T00:00:00Z", "2025-01-01T00:00:00Z,2026-02-01");
        workspace.edit("subscriptions.csv", "2026-02-10", "2026-02-10,");
        workspace.run(&[mode, "--yes"]);
        assert_eq!(bills(&workspace), ["s1 2026-01-01 12", "s2 2026-02-01 12", "s2 2026-03-01 12"]);
        is_sound(&workspace);
        workspace.edit("prices.yaml", "price_id: p", "price_id: q");
        workspace.run(&[mode, "--yes"]);
        let ids = workspace.query("SELECT DISTINCT price_id FROM usage_periods");
        assert_eq!((bills(&workspace).len(), ids[0]["price_id"].as_str(), ids.len()), (3, "q", 1));
        is_sound(&workspace);
    }
}

/// Nobody asked for the months up to an event with a wrong date: they go with it.
#[test]
fn what_a_wrong_date_billed_goes_with_it() {
    let workspace = flat_world();
    send(&workspace, "misdated", &[("b", "x1", "2026-04-01", 1)]);
    workspace.run(&[]);
    assert_eq!(bills(&workspace).len(), 4);
    workspace.run(&["--month", "2026-02"]);
    send(&workspace, "misdated", &[("b", "x1", "2026-01-02", 1)]);
    workspace.run(&["--yes"]);
    assert_eq!(bills(&workspace), ["s1 2026-01-01 10", "s1 2026-02-01 10"]);
    is_sound(&workspace);
}

/// A month that was taken back is not billed again, unless somebody asks again.
#[test]
fn a_month_that_was_taken_back_stays_away() {
    let workspace = flat_world();
    workspace.run(&[]);
    workspace.run(&["--month", "2026-02", "--customer", "c1"]);
    let run = crate::corrections::last_run(&workspace);
    workspace.edit("prices.yaml", "\"10\"", "\"12\"");
    workspace.run(&["--yes"]);
    assert_eq!(bills(&workspace), ["s1 2026-01-01 12", "s1 2026-02-01 12"]);
    assert_eq!(workspace.trueup(&["revert", "job.yaml", "--run", &run, "--force"]).code, 0);
    assert_eq!(bills(&workspace), ["s1 2026-01-01 12"]);
    is_sound(&workspace);
}

/// Where it is closed, its bill stays, and what it should be is recorded once.
#[test]
fn closed_months_are_adjusted() {
    for mode in ["--full", "--incremental"] {
        let workspace = flat_world();
        workspace.run(&[]);
        workspace.run(&["--start", "2026-01-01", "--end", "2026-03-01"]);
        assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-02"]).code, 0);
        workspace.edit("prices.yaml", "\"10\"", "\"12\"");
        workspace.run(&[mode, "--yes"]);
        assert_eq!(bills(&workspace), ["s1 2026-01-01 12", "s1 2026-02-01 10"]);
        let adjusted = || workspace.query("SELECT row_after FROM period_corrections WHERE kind = 'adjust'");
        assert!(adjusted().len() == 1 && adjusted()[0]["row_after"].contains("\"12\""), "{:?}", adjusted());
        is_sound(&workspace);
        workspace.run(&["--incremental"]);
        assert_eq!(adjusted().len(), 1);
    }
}

/// A run that skips looks neither at closed bills beyond its events nor at those that are right.
#[test]
fn a_run_that_skips_leaves_bills_beyond_its_events_alone() {
    let workspace = flat_world();
    workspace.run(&[]);
    workspace.run(&["--month", "2026-03"]);
    workspace.run(&[]);
    let before = tables(&workspace);
    assert_eq!(workspace.run(&["--incremental"])["periods"]["written"], 0);
    assert!(tables(&workspace) == before);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-03"]).code, 0);
    workspace.edit("prices.yaml", "\"10\"", "\"12\"");
    workspace.run(&["--full", "--yes"]);
    let before = tables(&workspace);
    workspace.run(&["--incremental", "--yes"]);
    assert!(tables(&workspace) == before, "{:?}", bills(&workspace));
    is_sound(&workspace);
}

/// After events went that had made the range longer, bills reach as far as the rest; new events
/// bring them back, also in a run that skips.
#[test]
fn bills_come_back_with_events() {
    let workspace = flat_world();
    send(&workspace, "later", &[("b", "x1", "2026-03-07", 1)]);
    workspace.run(&[]);
    std::fs::remove_file(workspace.path("events/later.ndjson")).unwrap();
    workspace.run(&["--yes"]);
    assert_eq!(bills(&workspace), ["s1 2026-01-01 10"]);
    send(&workspace, "again", &[("c", "x1", "2026-03-08", 1)]);
    workspace.run(&["--incremental", "--yes"]);
    assert_eq!(bills(&workspace), ["s1 2026-01-01 10", "s1 2026-02-01 10", "s1 2026-03-01 10"]);
    is_sound(&workspace);
}

/// A part of the job bills what the whole job does; so does a job that keeps levels, whatever is stored.
#[test]
fn bills_do_not_depend_on_what_else_is_computed_or_stored() {
    let workspace = flat_world();
    workspace.edit("subscriptions.csv", "USD,month", "USD,week");
    let meters = "meters: [{meter_id: calls, event_name: call, aggregation: sum, property: n}, \
                  {meter_id: of_months, event_name: call, aggregation: count, window: month, unpriced: true}]\n";
    workspace.write("meters.yaml", meters);
    workspace.run(&[]);
    let before = bills(&workspace);
    workspace.run(&["--meter", "calls", "--yes"]);
    assert_eq!((bills(&workspace), before.len()), (before, 6));
    workspace.write("meters.yaml", meters.replace("aggregation: count, window: month", "aggregation: weighted_sum, property: n"));
    send(&workspace, "later", &[("b", "x1", "2026-03-07", 1)]);
    workspace.run(&["--yes"]);
    std::fs::remove_file(workspace.path("events/later.ndjson")).unwrap();
    workspace.run(&["--yes"]);
    is_sound(&workspace);
    let bills_here = bills(&workspace);
    std::fs::remove_file(workspace.path("trueup.db")).unwrap();
    workspace.run(&[]);
    assert_eq!(bills(&workspace), bills_here);
}

/// A level lasts, but a range that only touches the next period does not begin it.
#[test]
fn a_range_bills_no_level_of_a_period_that_it_only_touches() {
    let workspace = flat_world();
    let meters = "meters: [{meter_id: calls, event_name: call, aggregation: weighted_sum, property: n, window: month}, \
                  {meter_id: of_weeks, event_name: call, aggregation: count, window: week, unpriced: true}]\n";
    workspace.write("meters.yaml", meters);
    workspace.edit("prices.yaml", "model: flat, amount: \"10\"", "model: per_unit, unit_amount: \"2\"");
    send(&workspace, "first", &[("a", "x1", "2026-03-02", 3), ("b", "x1", "2026-03-10", 3)]);
    workspace.run(&[]);
    let before = tables(&workspace);
    workspace.run(&["--month", "2026-03"]);
    assert!(tables(&workspace) == before, "{:?}", bills(&workspace));
    is_sound(&workspace);
}

/// A later copy of an event, or its void.
fn send_again(workspace: &Workspace, file: &str, day: &str, rest: &str) {
    let line = format!(
        r#"{{"tenant_id": "t", "id": "b", "event_name": "call", "external_customer_id": "x1",
            "timestamp": "{day}T12:00:00Z", "ingested_at": "2127-01-01T00:00:00Z", "properties": {{"n": 1}}{rest}}}"#
    );
    workspace.write(&format!("events/{file}.ndjson"), line.replace('\n', " ") + "\n");
}

/// An event with a wrong date bills the months up to it until it is sent again or voided; so
/// the warning says.
#[test]
fn a_wrong_date_that_is_sent_again_or_voided_bills_nothing() {
    for mode in ["--full", "--incremental"] {
        for (day, rest) in [("2026-01-02", ""), ("2126-04-01", ", \"deleted\": true")] {
            let workspace = flat_world();
            send(&workspace, "misdated", &[("b", "x1", "2126-04-01", 1)]);
            let warnings = workspace.run(&[])["warnings"].to_string();
            assert!(warnings.contains("dated up to 2126-04-01T12:00:00Z") && warnings.contains("misdated"), "{warnings}");
            assert_eq!(bills(&workspace).len(), 1204);
            send_again(&workspace, "again", day, rest);
            let report = workspace.run(&[mode, "--yes"]);
            assert_eq!(report["warnings"].as_array().unwrap().len(), 0, "{report}");
            assert_eq!(bills(&workspace), ["s1 2026-01-01 10"], "{mode} {day}");
            is_sound(&workspace);
            // What is new is found from there on.
            send(&workspace, "later", &[("c", "x1", "2026-03-08", 1)]);
            workspace.run(&["--incremental", "--yes"]);
            assert_eq!(bills(&workspace).len(), 3);
            is_sound(&workspace);
            let before = tables(&workspace);
            std::fs::remove_file(workspace.path("trueup.db")).unwrap();
            workspace.run(&[]);
            assert!(tables(&workspace)[1] == before[1]);
        }
    }
}

/// A part of the job reads events of other tenants too: their wrong dates bill nobody.
#[test]
fn a_tenant_is_billed_as_the_whole_job_bills_it() {
    let workspace = flat_world();
    send(&workspace, "misdated", &[("b", "x1", "2026-04-01", 1)]);
    send_again(&workspace, "again", "2026-01-02", "");
    workspace.edit("customers.csv", "t,c1,x1\n", "t,c1,x1\nu,c1,x1\n");
    workspace.edit(
        "subscriptions.csv",
        "t,s1,c1,pro,USD,month,2025-01-01\n",
        "t,s1,c1,pro,USD,month,2025-01-01\nu,s9,c1,pro,USD,month,2025-01-01\n",
    );
    let report = workspace.run(&["--tenant", "u"]);
    assert_eq!(bills(&workspace), ["s9 2026-01-01 10"]);
    assert_eq!((&report["events"]["read"], &report["events"]["out_of_range"]), (&3.into(), &3.into()), "{report}");
    workspace.run(&[]);
    assert_eq!(bills(&workspace), ["s1 2026-01-01 10", "s9 2026-01-01 10"]);
    is_sound(&workspace);
}

/// Shorter windows end sooner: the bills that only reached to the end of longer ones go.
#[test]
fn bills_end_with_shorter_windows() {
    let workspace = flat_world();
    workspace.edit("subscriptions.csv", "USD,month", "USD,week");
    workspace.edit("meters.yaml", "property: n", "property: n, window: month");
    workspace.run(&[]);
    assert_eq!(bills(&workspace).len(), 5);
    workspace.edit("meters.yaml", ", window: month", "");
    workspace.run(&["--incremental", "--yes"]);
    assert_eq!(bills(&workspace), ["s1 2025-12-29 10"]);
    is_sound(&workspace);
}

/// What is closed stays though its events are gone: it does not tell how far events reach.
#[test]
fn closed_windows_are_no_witness() {
    let workspace = flat_world();
    workspace.edit(
        "subscriptions.csv",
        "t,s1,c1,pro,USD,month,2025-01-01\n",
        "t,s1,c1,pro,USD,month,2025-01-01\nt,s2,c2,pro,USD,month,2025-01-01\n",
    );
    send(&workspace, "march", &[("b", "x2", "2026-03-10", 1), ("c", "x1", "2026-03-10", 1)]);
    workspace.run(&[]);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-03", "--customer", "c1"]).code, 0);
    for id in ["c", "b"] {
        let void = format!("{{\"tenant_id\":\"t\",\"id\":\"{id}\",\"deleted\":true}}\n");
        workspace.write(&format!("events/void-{id}.ndjson"), void);
        workspace.run(&["--incremental", "--yes"]);
        assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0, "{:?}", bills(&workspace));
    }
    assert_eq!(bills(&workspace), ["s1 2026-01-01 10", "s1 2026-03-01 10", "s2 2026-01-01 10"]);
}
