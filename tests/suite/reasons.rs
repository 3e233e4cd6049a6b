//! Why rows change, where another reason would be near: derived, never guessed.

use serde_json::{Value, json};

use crate::corrections::{last_run, send, world};
use crate::support::Workspace;

/// The corrections of the last run: subscription, window, kind and causes.
fn reasons(workspace: &Workspace) -> Vec<String> {
    let sql = format!(
        "SELECT subscription_id || ' ' || substr(window_start, 6, 11) || ' ' || kind || ' ' || causes AS row \
         FROM corrections WHERE run_id = '{}' ORDER BY number",
        last_run(workspace)
    );
    workspace.query(&sql).into_iter().map(|mut row| row.remove("row").unwrap()).collect()
}

/// One event a call.
fn event(id: &str, customer: &str, time: &str, ingested: &str, more: &Value) -> String {
    let mut event = json!({"tenant_id": "t", "id": id, "event_name": "call", "external_customer_id": customer,
        "timestamp": time, "ingested_at": ingested, "properties": {"n": 5}});
    event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    format!("{event}\n")
}

const PER_UNIT: &str =
    "prices: [{price_id: p, plan_id: pro, meter_id: calls, currency: USD, model: per_unit, unit_amount: \"1\"}]\n";

fn is_sound(workspace: &Workspace) {
    let again = workspace.run(&[]);
    let [inserted, updated, retracted, adjusted] =
        ["inserted", "updated", "retracted", "adjusted"].map(|name| again["rows"][name].as_u64().unwrap_or_default());
    assert_eq!((inserted, updated, retracted, adjusted), (0, 0, 0, 0), "{again}");
    let verified = workspace.trueup(&["verify", "job.yaml"]);
    assert_eq!(verified.code, 0, "{verified:?}");
}

#[test]
fn the_same_event_in_another_window_is_a_duplicate_there() {
    let workspace = world();
    workspace.run(&[]);
    workspace
        .write("events/again.ndjson", event("c", "x2", "2026-01-11T12:00:00Z", "2026-02-03", &json!({"properties": {"n": 3}})));
    workspace.run(&["--yes"]);
    let expected = ["s2 01-10T00:00 retract {\"duplicate_removed\":1}", "s2 01-11T00:00 insert {\"event_amended\":1}"];
    assert_eq!(reasons(&workspace), expected);
    is_sound(&workspace);
}

/// The windows that hop hold an event several times: each says that it was voided, and the guard
/// takes none for lost.
#[test]
fn a_voided_event_is_voided_in_every_window_that_hops() {
    let workspace = world();
    let meter = "meters: [{meter_id: calls, event_name: call, aggregation: sum, property: n, unpriced: true, \
                 window: {hopping: {size: 1h, advance: 15m}}}]\n";
    workspace.write("meters.yaml", meter);
    workspace.write("prices.yaml", "prices: []\n");
    let job = workspace.read("job.yaml") + "guard: {max_changed_rows: \"100%\"}\n";
    workspace.write("job.yaml", job);
    workspace.run(&[]);
    workspace.write("events/void.ndjson", event("c", "x2", "2026-01-10T12:00:00Z", "2026-02-03", &json!({"deleted": true})));
    workspace.run(&[]);
    let found = reasons(&workspace);
    assert!(found.len() == 4 && found.iter().all(|row| row.ends_with("retract {\"event_voided\":1}")), "{found:?}");
    is_sound(&workspace);
}

/// A lost file is lost, whatever was edited before or beside it.
#[test]
fn a_file_that_is_lost_is_refused_whatever_else_changed() {
    let unpriced = "meters: [{meter_id: calls, event_name: call, aggregation: sum, property: n}, \
                    {meter_id: seen, event_name: call, aggregation: count, unpriced: true}]\n";
    type Edit = fn(&Workspace);
    let edits: [(Edit, bool); 4] = [
        (|_| {}, true),
        (|workspace| workspace.edit("job.yaml", "window: day", "window: day\ndeduplicate: {keep: first}"), true),
        (|workspace| workspace.edit("prices.yaml", "\"1\"", "\"1.1\""), true),
        // In the same night.
        (|workspace| workspace.edit("prices.yaml", "\"1\"", "\"1.1\""), false),
    ];
    for (edit, runs_before) in edits {
        let workspace = world();
        workspace.write("meters.yaml", unpriced);
        workspace.write("prices.yaml", PER_UNIT);
        let job = workspace.read("job.yaml") + "guard: {max_changed_rows: \"100%\"}\n";
        workspace.write("job.yaml", job);
        send(&workspace, "lost", &[("z", "x2", "2026-01-15", 1)]);
        workspace.run(&[]);
        edit(&workspace);
        if runs_before {
            workspace.run(&[]);
        }
        std::fs::remove_file(workspace.path("events/lost.ndjson")).unwrap();
        workspace.trueup(&["run", "job.yaml"]).fails_with(8, &["2 of 10 stored rows", "gone from the source", "c2 (2 rows)"]);
    }
}

/// A level lasts: what was taken from it is missing later too.
#[test]
fn a_level_that_falls_says_why_wherever_it_reaches() {
    let workspace = world();
    workspace.write("meters.yaml", "meters: [{meter_id: calls, event_name: call, aggregation: weighted_sum, property: n}]\n");
    workspace.write("prices.yaml", PER_UNIT);
    workspace.write("events/first.ndjson", event("a", "x1", "2026-01-10T00:00:00Z", "2026-01-10", &json!({})));
    workspace.write("events/second.ndjson", event("b", "x1", "2026-01-12T00:00:00Z", "2026-01-12", &json!({})));
    workspace.write("events/other.ndjson", event("c", "x2", "2026-03-05T00:00:00Z", "2026-03-05", &json!({})));
    workspace.run(&[]);
    let first = reasons(&workspace);
    assert!(first.len() == 5 && first.iter().all(|row| row.ends_with("insert {\"first_computation\":1}")), "{first:?}");
    let void = |id: &str, day: &str| event(id, "x1", day, "2026-03-06", &json!({"deleted": true}));
    workspace.write("events/void.ndjson", void("b", "2026-01-12T00:00:00Z"));
    workspace.run(&["--yes"]);
    let expected = [
        "s1 01-12T00:00 retract {\"event_voided\":1}",
        "s1 02-01T00:00 update {\"event_voided\":1}",
        "s1 03-01T00:00 update {\"event_voided\":1}",
    ];
    assert_eq!(reasons(&workspace), expected);
    workspace.write("events/void2.ndjson", void("a", "2026-01-10T00:00:00Z"));
    workspace.run(&["--yes"]);
    let found = reasons(&workspace);
    assert!(found.len() == 3 && found.iter().all(|row| row.ends_with("retract {\"event_voided\":1}")), "{found:?}");
    is_sound(&workspace);
}

/// What was recorded of a closed period does not outlive its reason, however it is opened.
#[test]
fn an_adjustment_that_holds_no_more_is_taken_back() {
    for opens in [&["--allow-closed"][..], &[]] {
        let workspace = world();
        workspace.write("prices.yaml", PER_UNIT);
        workspace.run(&[]);
        let period = ["close", "job.yaml", "--period", "2026-01"];
        assert_eq!(workspace.trueup(&period).code, 0);
        // A new window, and one that is there.
        send(&workspace, "late", &[("y", "x1", "2026-01-07", 7), ("z", "x2", "2026-01-10", 1)]);
        workspace.run(&[]);
        assert_eq!(reasons(&workspace).len(), 2);
        send(&workspace, "late", &[]);
        if opens.is_empty() {
            assert_eq!(workspace.trueup(&[&period[..], &["--reopen"]].concat()).code, 0);
        }
        workspace.run(&[opens, &["--yes"]].concat());
        let found = reasons(&workspace);
        assert!(found.len() == 2 && found.iter().all(|row| row.contains("adjust")), "{found:?}");
        let last = "SELECT quantity_before || ' ' || coalesce(quantity_after, '-') AS change FROM corrections ORDER BY sequence DESC LIMIT 2";
        let changes: Vec<_> = workspace.query(last).into_iter().map(|mut row| row.remove("change").unwrap()).collect();
        assert_eq!(changes, ["4 3", "7 -"]);
        let bills = workspace.query("SELECT row_before, row_after FROM period_corrections WHERE kind = 'adjust' ORDER BY rowid");
        assert_eq!(bills.len(), 4, "{bills:?}");
        is_sound(&workspace);
    }
}

/// A difference that is applied after all has the reason that it was recorded with.
#[test]
fn what_a_closed_period_was_adjusted_for_is_why_it_changes_once_open() {
    let workspace = world();
    workspace.write("prices.yaml", PER_UNIT);
    workspace.run(&[]);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]).code, 0);
    workspace.edit("prices.yaml", "\"1\"", "\"2\"");
    workspace.run(&["--yes"]);
    workspace.run(&["--allow-closed", "--yes"]);
    let found = reasons(&workspace);
    assert!(found.len() == 3 && found.iter().all(|row| row.ends_with("update {\"price_changed\":1}")), "{found:?}");
    is_sound(&workspace);
}

/// The end of a subscription changes what a part of a month costs, and its currency every cost.
#[test]
fn a_subscription_that_changes_what_is_charged_is_named() {
    let workspace = world();
    let price =
        "prices: [{price_id: p, plan_id: pro, meter_id: calls, currency: USD, model: flat, amount: \"62\", prorate: true}]\n";
    workspace.write("prices.yaml", price);
    workspace.edit("subscriptions.csv", "started_at", "started_at,ended_at");
    workspace.edit("subscriptions.csv", "t,s1,c1,pro,USD,month,2025-01-01", "t,s1,c1,pro,USD,month,2025-01-01,");
    workspace.edit("subscriptions.csv", "t,s2,c2,pro,USD,month,2025-01-01", "t,s2,c2,pro,USD,month,2025-01-01,");
    workspace.run(&[]);
    workspace.edit("subscriptions.csv", "t,s2,c2,pro,USD,month,2025-01-01,", "t,s2,c2,pro,USD,month,2025-01-01,2026-01-16");
    workspace.run(&["--yes"]);
    assert_eq!(reasons(&workspace), ["s2 01-10T00:00 update {\"subscription_changed\":1}"]);
    workspace
        .write("meters.yaml", "meters: [{meter_id: calls, event_name: call, aggregation: sum, property: n, unpriced: true}]\n");
    workspace.write("prices.yaml", "prices: []\n");
    workspace.run(&["--yes"]);
    workspace.edit("subscriptions.csv", "t,s1,c1,pro,USD", "t,s1,c1,pro,EUR");
    workspace.run(&["--yes"]);
    let found = reasons(&workspace);
    assert!(found.len() == 3 && found.iter().all(|row| row.ends_with("update {\"subscription_changed\":1}")), "{found:?}");
    is_sound(&workspace);
}

/// There and back: what a row says that stayed as it was is no proof that nothing changed.
#[test]
fn a_customer_that_comes_back_is_named() {
    let workspace = world();
    workspace.write("customers.csv", "tenant_id,customer_id,external_customer_id\nt,c1,x1\nt,c1,x3\nt,c2,x2\n");
    send(&workspace, "third", &[("e", "x3", "2026-01-08", 1)]);
    workspace.run(&[]);
    for (from, to) in [("c1,x3", "c2,x3"), ("c2,x3", "c1,x3")] {
        workspace.edit("customers.csv", from, to);
        workspace.run(&["--yes", "--full"]);
        let found = reasons(&workspace);
        let named: Vec<_> = found.iter().filter(|row| !row.contains("tier_shift")).collect();
        assert!(named.len() == 2 && named.iter().all(|row| row.ends_with("{\"customer_changed\":1}")), "{found:?}");
    }
    is_sound(&workspace);
}

/// Files that become one file bring nothing new but what is new.
#[test]
fn events_in_other_files_are_not_late() {
    let workspace = world();
    workspace.write("prices.yaml", PER_UNIT);
    send(&workspace, "second", &[("e", "x1", "2026-01-05", 1), ("f", "x2", "2026-01-10", 1)]);
    workspace.run(&[]);
    let all = workspace.read("events/first.ndjson") + &workspace.read("events/second.ndjson");
    let late = event("g", "x2", "2026-01-10T13:00:00Z", "2026-03-01", &json!({}));
    workspace.write("events/compacted.ndjson", all + &late);
    for file in ["first", "second"] {
        std::fs::remove_file(workspace.path(&format!("events/{file}.ndjson"))).unwrap();
    }
    workspace.edit("customers.csv", "c1,x1", "c2,x1");
    workspace.run(&["--yes"]);
    let found = reasons(&workspace);
    let counted = "s2 01-10T00:00 update {\"customer_changed\":1,\"late_event\":1}".to_owned();
    assert!(found.contains(&counted), "{found:?}");
    let others: Vec<_> = found.iter().filter(|row| !row.starts_with("s2 01-10")).collect();
    assert!(others.iter().all(|row| row.ends_with("{\"customer_changed\":1}")), "{found:?}");
    is_sound(&workspace);
}

#[test]
fn a_bill_of_an_average_of_nothing_is_explained() {
    let workspace = world();
    workspace.write("meters.yaml", "meters: [{meter_id: calls, event_name: call, aggregation: avg, property: n}]\n");
    workspace.run(&[]);
    let explained =
        workspace.trueup(&["explain", "job.yaml", "--subscription", "s2", "--meter", "calls", "--period", "2026-02-10"]);
    assert!(explained.code == 0 && explained.stdout.contains('5'), "{explained:?}");
}

/// A range judges only windows that it holds as a whole.
#[test]
fn a_range_leaves_adjustments_of_windows_that_it_cuts() {
    let workspace = world();
    let meters = "meters: [{meter_id: calls, event_name: call, aggregation: sum, property: n, window: week, unpriced: true}, \
                  {meter_id: other, event_name: other, aggregation: count, window: month, unpriced: true}]\n";
    workspace.write("meters.yaml", meters);
    workspace.write("prices.yaml", "prices: []\n");
    send(&workspace, "first", &[("a", "x1", "2026-04-02", 5)]);
    workspace.run(&[]);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-04"]).code, 0);
    send(&workspace, "late", &[("b", "x1", "2026-04-03", 5)]);
    assert_eq!(workspace.run(&[])["rows"]["adjusted"], 1);
    let part = workspace.run(&["--start", "2026-03-02", "--end", "2026-03-05"]);
    assert_eq!(part["rows"]["adjusted"], 0, "{part}");
    is_sound(&workspace);
}

/// A row that somebody altered says so, though it was adjusted before.
#[test]
fn what_was_altered_is_not_explained_by_what_was_recorded() {
    let workspace = world();
    workspace.write("prices.yaml", PER_UNIT);
    workspace.run(&[]);
    let period = ["close", "job.yaml", "--period", "2026-01"];
    assert_eq!(workspace.trueup(&period).code, 0);
    send(&workspace, "late", &[("z", "x2", "2026-01-10", 1)]);
    workspace.run(&[]);
    send(&workspace, "late", &[]);
    workspace.run(&[]);
    assert_eq!(workspace.trueup(&[&period[..], &["--reopen"]].concat()).code, 0);
    workspace.tamper("UPDATE usage_windows SET quantity = '9' WHERE subscription_id = 's2'");
    workspace.run(&["--yes"]);
    assert_eq!(reasons(&workspace), ["s2 01-10T00:00 update {\"store_altered\":1}"]);
    is_sound(&workspace);
}

/// Late events stay late where something else changed too.
#[test]
fn a_late_event_is_named_beside_a_changed_meter() {
    let workspace = world();
    workspace.write("prices.yaml", PER_UNIT);
    send(&workspace, "second", &[("e", "x1", "2026-01-05", 1)]);
    workspace.run(&[]);
    workspace.edit("meters.yaml", "property: n", "property: n, filters: [{property: n, op: gt, values: [2]}]");
    workspace.write("events/late.ndjson", event("f", "x1", "2026-01-05T13:00:00Z", "2026-03-01", &json!({})));
    workspace.run(&["--yes"]);
    assert!(
        reasons(&workspace).contains(&"s1 01-05T00:00 update {\"late_event\":1,\"meter_changed\":1}".to_owned()),
        "{:?}",
        reasons(&workspace)
    );
}

/// What was recorded is taken back for the reason that it is.
#[test]
fn an_adjustment_that_is_taken_back_says_why() {
    let workspace = world();
    workspace.write("prices.yaml", PER_UNIT);
    workspace.run(&[]);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]).code, 0);
    let late = |deleted: Value| {
        event("z", "x2", "2026-01-07T12:00:00Z", if deleted == json!({}) { "2026-03-01" } else { "2026-03-02" }, &deleted)
    };
    workspace.write("events/late.ndjson", late(json!({})));
    workspace.run(&[]);
    assert_eq!(reasons(&workspace), ["s2 01-07T00:00 adjust {\"late_event\":1}"]);
    workspace.write("events/void.ndjson", late(json!({"deleted": true})));
    workspace.run(&[]);
    assert_eq!(reasons(&workspace), ["s2 01-07T00:00 adjust {\"event_voided\":1}"]);
    std::fs::remove_file(workspace.path("events/void.ndjson")).unwrap();
    workspace.run(&[]);
    workspace.edit("subscriptions.csv", "t,s2,c2,pro,USD,month,2025-01-01", "t,s2,c2,pro,USD,month,2026-01-08");
    workspace.run(&[]);
    assert_eq!(reasons(&workspace), ["s2 01-07T00:00 adjust {\"subscription_changed\":1}"]);
}

/// A closed period names what an open one would: no table that changed elsewhere.
#[test]
fn adjustments_name_no_rows_that_changed_elsewhere() {
    let workspace = world();
    workspace.write("prices.yaml", PER_UNIT);
    workspace.run(&[]);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]).code, 0);
    send(&workspace, "late", &[("z", "x2", "2026-01-10", 1)]);
    workspace.run(&[]);
    let customers = workspace.read("customers.csv") + "t,c9,x9\n";
    workspace.write("customers.csv", customers);
    workspace.run(&[]);
    send(&workspace, "late", &[]);
    workspace.run(&[]);
    assert_eq!(reasons(&workspace), ["s2 01-10T00:00 adjust {\"event_voided\":1}"]);
    is_sound(&workspace);
}

/// When a price holds is part of what it says.
#[test]
fn a_price_that_ends_sooner_is_why() {
    let cases = [
        ("aggregation: sum, property: n", "model: flat, amount: \"10\", prorate: true", "2026-01-25"),
        ("aggregation: weighted_sum, property: n", "model: per_unit, unit_amount: \"10\"", "2026-01-25"),
        // Between two events of a window.
        ("aggregation: sum, property: n, window: month", "model: per_unit, unit_amount: \"10\"", "2026-01-10"),
    ];
    for (meter, price, end) in cases {
        let workspace = world();
        workspace.write("meters.yaml", format!("meters: [{{meter_id: calls, event_name: call, {meter}}}]\n"));
        let price = format!("prices: [{{price_id: p, plan_id: pro, meter_id: calls, currency: USD, {price}}}]\n");
        workspace.write("prices.yaml", &price);
        workspace.edit("subscriptions.csv", "t,s2,c2,pro,USD,month,2025-01-01\n", "");
        workspace.edit("customers.csv", "t,c2,x2\n", "");
        for mode in ["--full", "--incremental"] {
            workspace.write("prices.yaml", &price);
            workspace.run(&["--full", "--yes"]);
            workspace.edit("prices.yaml", "currency: USD,", &format!("currency: USD, valid_to: {end}T00:00:00Z,"));
            let run = workspace.run(&[mode, "--yes"]);
            assert!(run["causes"]["price_changed"].as_u64() > Some(0), "{meter} {mode}: {run}");
            for other in ["store_altered", "event_voided"] {
                assert!(run["causes"][other].is_null(), "{meter} {mode}: {}", run["causes"]);
            }
            is_sound(&workspace);
        }
    }
}

/// That somebody else's rows were computed with what a meter says now does not make it old news.
#[test]
fn a_meter_that_others_were_computed_with_is_still_why() {
    let workspace = world();
    workspace.edit("subscriptions.csv", "t,s2,c2,", "u,s2,c1,");
    workspace.edit("customers.csv", "t,c2,x2", "u,c1,x2");
    workspace.write("events/other.ndjson", event("o", "x2", "2026-01-10T12:00:00Z", "2026-01-11", &json!({"tenant_id": "u"})));
    workspace.run(&[]);
    workspace.run(&["--start", "2026-01-01", "--end", "2026-03-01", "--customer", "c1"]);
    workspace.edit("meters.yaml", "property: n", "property: n, window: hour");
    workspace.run(&["--start", "2026-01-01", "--end", "2026-03-01", "--tenant", "t", "--yes"]);
    workspace.run(&["--yes"]);
    let expected = ["s2 01-10T00:00 retract {\"meter_changed\":1}", "s2 01-10T12:00 insert {\"meter_changed\":1}"];
    assert_eq!(reasons(&workspace), expected);
    is_sound(&workspace);
}

/// An end that lies elsewhere is no reason for a window that moved by its tier.
#[test]
fn a_price_that_ends_elsewhere_is_not_why() {
    for mode in ["--full", "--incremental"] {
        let workspace = world();
        workspace.run(&[]);
        send(&workspace, "late", &[("e", "x1", "2026-01-06", 3)]);
        workspace.edit("prices.yaml", "currency: USD,", "currency: USD, valid_to: 2027-06-01,");
        workspace.run(&[mode, "--yes"]);
        let expected = ["s1 01-06T00:00 insert {\"late_event\":1}", "s1 01-20T00:00 update {\"tier_shift\":1}"];
        assert_eq!(reasons(&workspace), expected, "{mode}");
        is_sound(&workspace);
    }
}

/// A second subscription that begins within a window makes its later events ambiguous.
#[test]
fn a_subscription_beside_another_one_is_why() {
    let workspace = world();
    workspace.edit("meters.yaml", "property: n", "property: n, window: month");
    workspace.run(&[]);
    workspace.edit("subscriptions.csv", "t,s2,", "t,s3,c1,pro,USD,month,2026-01-15\nt,s2,");
    workspace.edit("customers.csv", "t,c2,x2", "t,c9,x9\nt,c2,x2");
    workspace.run(&["--yes"]);
    let of_s1: Vec<_> = reasons(&workspace).into_iter().filter(|row| row.starts_with("s1 01-01")).collect();
    assert_eq!(of_s1, ["s1 01-01T00:00 update {\"subscription_changed\":1}"]);
    is_sound(&workspace);
}
