//! What a range and a scope may change, and why each row changed.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use trueup::model::timestamp::{MINUTE, Timestamp};

use crate::support::{Row, Workspace, job};

/// Two tenants with two customers each, in the job's zone Europe/Berlin. Hours of
/// usage: one of each side of a local midnight, and of a local end of month.
const TENANTS: [&str; 2] = ["t1", "t2"];
const CUSTOMERS: [&str; 2] = ["ca", "cb"];
const HOURS: [&str; 6] = [
    "2026-01-09T23:30:00Z", // already the 10th
    "2026-01-10T12:10:00Z",
    "2026-01-10T23:10:00Z", // already the 11th
    "2026-01-31T22:50:00Z",
    "2026-01-31T23:20:00Z", // already February
    "2026-02-05T08:00:00Z",
];

const METERS: &str = "meters:
  - {meter_id: calls, event_name: api.call, aggregation: count}
  - {meter_id: tokens, event_name: api.call, aggregation: sum, property: value}
";
const PRICES: &str = r#"prices:
  - {price_id: p_calls, plan_id: pro, meter_id: calls, currency: EUR, model: per_unit, unit_amount: "1"}
  - {price_id: p_tokens, plan_id: pro, meter_id: tokens, currency: EUR, model: per_unit, unit_amount: "0.5"}
"#;
/// Tokens get cheaper beyond the first ten of a month.
const TIERS: &str = r#"model: graduated, tiers: [{up_to: "10", unit_amount: "1"}, {up_to: null, unit_amount: "0.5"}]"#;

fn event(tenant: &str, id: &str, customer: &str, time: &str, ingested: &str, value: &str) -> String {
    format!(
        r#"{{"tenant_id":"{tenant}","id":"{id}","event_name":"api.call","external_customer_id":"{customer}","timestamp":"{time}","ingested_at":"{ingested}","properties":{{"value":{value}}}}}"#
    ) + "\n"
}

/// One event of every customer in every hour.
fn everywhere(prefix: &str, ingested: &str, value: &str) -> String {
    let mut lines = String::new();
    for tenant in TENANTS {
        for customer in CUSTOMERS {
            for (number, time) in HOURS.iter().enumerate() {
                lines += &event(tenant, &format!("{prefix}-{customer}-{number}"), customer, time, ingested, value);
            }
        }
    }
    lines
}

fn shop() -> Workspace {
    let workspace = Workspace::new();
    workspace.write("job.yaml", job("shop", "hour", "trueup") + "timezone: Europe/Berlin\n");
    workspace.write("meters.yaml", METERS);
    workspace.write("prices.yaml", PRICES);
    let mut customers = "tenant_id,customer_id,external_customer_id\n".to_owned();
    let mut subscriptions = "tenant_id,subscription_id,customer_id,plan_id,currency,billing_period,started_at\n".to_owned();
    for tenant in TENANTS {
        for customer in CUSTOMERS {
            customers += &format!("{tenant},{customer},{customer}\n");
            subscriptions += &format!("{tenant},s_{customer},{customer},pro,EUR,month,2025-01-01\n");
        }
    }
    workspace.write("customers.csv", customers);
    workspace.write("subscriptions.csv", subscriptions);
    workspace.write("events/first.ndjson", everywhere("e", "2026-02-06T00:00:00Z", "4"));
    workspace
}

/// One customer with four tokens at 10:00, 11:00, 12:00 and 13:00 (UTC) of one day,
/// of which tokens are graduated; run once.
fn graduated() -> Workspace {
    let workspace = shop();
    workspace.write("prices.yaml", PRICES.replace("model: per_unit, unit_amount: \"0.5\"", TIERS));
    let lines: String = (10..14)
        .map(|hour| event("t1", &format!("e{hour}"), "ca", &format!("2026-01-10T{hour}:00:00Z"), "2026-01-11", "4"))
        .collect();
    workspace.write("events/first.ndjson", lines);
    workspace.run(&[]);
    workspace
}

/// Aggregates by tenant, customer, meter and window, without how they came about.
fn windows(workspace: &Workspace) -> BTreeMap<[String; 4], Row> {
    let rows = workspace.query("SELECT * FROM usage_windows");
    let keyed = rows.into_iter().map(|mut row| {
        row.retain(|name, _| !matches!(name.as_str(), "version" | "run_id" | "updated_at") && !name.ends_with("_digest"));
        (["tenant_id", "customer_id", "meter_id", "window_start"].map(|name| row[name].clone()), row)
    });
    keyed.collect()
}

/// After new events in every hour of every customer, a run of these arguments changes
/// exactly the rows that `names`, and a full run then all others.
#[track_caller]
fn changes_only(arguments: &[&str], names: impl Fn(&[&str; 4]) -> bool) {
    let workspace = shop();
    workspace.run(&[]);
    let before = windows(&workspace);
    assert_eq!(before.len(), 2 * 2 * 2 * HOURS.len());
    workspace.write("events/late.ndjson", everywhere("late", "2026-02-07T00:00:00Z", "3"));
    let run = workspace.run(arguments);
    let after = windows(&workspace);
    let changed: BTreeSet<_> =
        after.iter().filter(|(key, row)| before.get(*key) != Some(*row)).map(|(key, _)| key.clone()).collect();
    let named: BTreeSet<_> = before.keys().filter(|key| names(&key.each_ref().map(String::as_str))).cloned().collect();
    assert!(!named.is_empty() && named.len() < before.len());
    assert_eq!(changed, named, "{arguments:?}");
    assert_eq!(run["rows"]["updated"], named.len());
    // Everything in range is counted, everything else is out of range.
    let events = &run["events"];
    assert_eq!(
        events["read"].as_u64().unwrap(),
        events["metered"].as_u64().unwrap() + events["out_of_range"].as_u64().unwrap(),
        "{events}"
    );
    // The ledger names the same rows.
    let corrections =
        workspace.query(&format!("SELECT * FROM corrections WHERE run_id = {}", run["run_id"].to_string().replace('"', "'")));
    assert_eq!(corrections.len(), named.len());
    // What was left out comes with the next full run, and nothing else.
    // It was late when the other run did not compute it, and still is.
    let rest = workspace.run(&[]);
    assert_eq!(rest["rows"]["updated"], before.len() - named.len());
    assert_eq!(rest["causes"], json!({"late_event": before.len() - named.len()}));
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

#[test]
fn a_day_is_a_day_of_the_jobs_zone() {
    changes_only(&["--day", "2026-01-10"], |[.., start]| ["2026-01-09T23:00:00Z", "2026-01-10T12:00:00Z"].contains(start));
}

#[test]
fn a_month_is_a_month_of_the_jobs_zone() {
    changes_only(&["--month", "2026-01"], |[.., start]| *start < "2026-01-31T23:00:00Z");
    changes_only(&["--month", "2026-02"], |[.., start]| *start >= "2026-01-31T23:00:00Z");
}

#[test]
fn a_range_starts_with_its_start_and_stops_before_its_end() {
    let range = ["--start", "2026-01-10", "--end", "2026-02-01"];
    changes_only(&range, |[.., start]| *start < "2026-01-31T23:00:00Z");
    let range = ["--start", "2026-01-10T12:00:00Z", "--end", "2026-01-10T23:00:00Z"];
    changes_only(&range, |[.., start]| *start == "2026-01-10T12:00:00Z");
    // Wall-clock time of the zone; widened to the hours that it touches.
    let range = ["--start", "2026-01-10 13:59", "--end", "2026-01-11 00:00:01"];
    changes_only(&range, |[.., start]| ["2026-01-10T12:00:00Z", "2026-01-10T23:00:00Z"].contains(start));
}

#[test]
fn a_tenant_a_customer_and_a_meter_narrow_a_run() {
    changes_only(&["--tenant", "t1"], |[tenant, ..]| *tenant == "t1");
    changes_only(&["--customer", "cb"], |[_, customer, ..]| *customer == "cb");
    changes_only(&["--meter", "tokens"], |[_, _, meter, _]| *meter == "tokens");
    let all = ["--tenant", "t2", "--customer", "ca", "--meter", "calls", "--day", "2026-02-05"];
    changes_only(&all, |row| *row == ["t2", "ca", "calls", "2026-02-05T08:00:00Z"]);
}

#[test]
fn the_last_days_reach_back_from_now() {
    let workspace = shop();
    let now = trueup::clock::now().nanos();
    let at = |hours: i64| Timestamp::from_nanos(now - hours * 60 * MINUTE).to_string();
    let lines: String = [1, 47, 80].map(|hours| event("t1", &format!("h{hours}"), "ca", &at(hours), &at(0), "1")).concat();
    workspace.write("events/recent.ndjson", lines);
    let run = workspace.run(&["--last", "2d", "--meter", "calls"]);
    assert_eq!((&run["events"]["metered"], &run["rows"]["inserted"]), (&json!(2), &json!(2)));
    assert_eq!(workspace.run(&["--last", "1w", "--meter", "calls"])["rows"]["inserted"], 1);
}

// --- causes ----------------------------------------------------------------------------------

/// The corrections of a run: meter, hour of the window, kind and causes, and the cost
/// before and after.
fn corrections(workspace: &Workspace, run: &Value) -> Vec<String> {
    let rows = workspace.query(&format!("SELECT * FROM corrections WHERE run_id = '{}'", run["run_id"].as_str().unwrap()));
    let line = |row: &Row| {
        let hour = row["window_start"].get(11..16).unwrap();
        format!(
            "{} {} {hour} {} {} {}->{}",
            row["subscription_id"], row["meter_id"], row["kind"], row["causes"], row["cost_before"], row["cost_after"]
        )
    };
    let mut lines: Vec<_> = rows.iter().map(line).collect();
    lines.sort();
    lines
}

/// A run after a change writes exactly these corrections; then store, events and
/// ledger agree.
#[track_caller]
fn corrects(workspace: &Workspace, expected: &[&str]) {
    let run = workspace.run(&[]);
    assert_eq!(corrections(workspace, &run), expected);
    let verified = workspace.trueup(&["verify", "job.yaml"]);
    assert_eq!(verified.code, 0, "{verified:?}");
}

#[test]
fn the_first_run_computes_everything_for_the_first_time() {
    let workspace = graduated();
    let run = json!({"run_id": workspace.query("SELECT run_id FROM runs")[0]["run_id"]});
    assert_eq!(
        corrections(&workspace, &run),
        [
            r#"s_ca calls 10:00 insert {"first_computation":1} ->1"#,
            r#"s_ca calls 11:00 insert {"first_computation":1} ->1"#,
            r#"s_ca calls 12:00 insert {"first_computation":1} ->1"#,
            r#"s_ca calls 13:00 insert {"first_computation":1} ->1"#,
            r#"s_ca tokens 10:00 insert {"first_computation":1} ->4"#,
            r#"s_ca tokens 11:00 insert {"first_computation":1} ->4"#,
            r#"s_ca tokens 12:00 insert {"first_computation":1} ->3"#,
            r#"s_ca tokens 13:00 insert {"first_computation":1} ->2"#,
        ]
    );
}

#[test]
fn an_event_that_comes_later_is_late_and_shifts_tiers() {
    let workspace = graduated();
    workspace.write("events/late.ndjson", event("t1", "late", "ca", "2026-01-10T11:59:59.999999999Z", "2026-01-12", "1"));
    corrects(
        &workspace,
        &[
            r#"s_ca calls 11:00 update {"late_event":1} 1->2"#,
            r#"s_ca tokens 11:00 update {"late_event":1} 4->5"#,
            r#"s_ca tokens 12:00 update {"tier_shift":1} 3->2.5"#,
        ],
    );
    // Where there was nothing before; two at once.
    let lines = event("t1", "l2", "cb", "2026-01-10T12:00:00Z", "2026-01-13", "1")
        + &event("t1", "l3", "cb", "2026-01-10T12:30:00Z", "2026-01-13", "1");
    workspace.write("events/later.ndjson", lines);
    corrects(
        &workspace,
        &[r#"s_cb calls 12:00 insert {"late_event":2} ->2"#, r#"s_cb tokens 12:00 insert {"late_event":2} ->2"#],
    );
    // A window that no run has covered before is computed for the first time.
    workspace.write("events/new.ndjson", event("t1", "n", "ca", "2026-01-10T20:00:00Z", "2026-01-14", "1"));
    corrects(
        &workspace,
        &[r#"s_ca calls 20:00 insert {"first_computation":1} ->1"#, r#"s_ca tokens 20:00 insert {"first_computation":1} ->0.5"#],
    );
}

#[test]
fn an_event_sent_again_with_other_content_is_amended() {
    let workspace = graduated();
    workspace.write("events/amended.ndjson", event("t1", "e10", "ca", "2026-01-10T10:00:00Z", "2026-01-12", "5"));
    corrects(
        &workspace,
        &[r#"s_ca tokens 10:00 update {"event_amended":1} 4->5"#, r#"s_ca tokens 12:00 update {"tier_shift":1} 3->2.5"#],
    );
    // Into another window: both sides are amended.
    workspace.write("events/moved.ndjson", event("t1", "e13", "cb", "2026-01-10T11:30:00Z", "2026-01-13", "4"));
    corrects(
        &workspace,
        &[
            r#"s_ca calls 13:00 retract {"event_amended":1} 1->"#,
            r#"s_ca tokens 13:00 retract {"event_amended":1} 2->"#,
            r#"s_cb calls 11:00 insert {"event_amended":1} ->1"#,
            r#"s_cb tokens 11:00 insert {"event_amended":1} ->4"#,
        ],
    );
}

#[test]
fn an_event_sent_again_unchanged_changes_nothing() {
    let workspace = graduated();
    workspace.write("events/again.ndjson", event("t1", "e10", "ca", "2026-01-10T10:00:00Z", "2026-01-12", "4.0"));
    corrects(&workspace, &[]);
}

#[test]
fn a_voided_event_is_taken_back() {
    let workspace = graduated();
    workspace.write("events/extra.ndjson", event("t1", "x", "ca", "2026-01-10T10:30:00Z", "2026-01-12", "1"));
    workspace.run(&[]);
    let void = |id: &str| {
        format!(
            r#"{{"tenant_id":"t1","id":"{id}","deleted":true,"timestamp":"2026-01-10T12:00:00Z","ingested_at":"2026-01-13"}}"#
        )
    };
    workspace.write("events/voids.ndjson", void("x") + "\n" + &void("e12"));
    corrects(
        &workspace,
        &[
            r#"s_ca calls 10:00 update {"event_voided":1} 2->1"#,
            r#"s_ca calls 12:00 retract {"event_voided":1} 1->"#,
            r#"s_ca tokens 10:00 update {"event_voided":1} 5->4"#,
            r#"s_ca tokens 12:00 retract {"event_voided":1} 2.5->"#,
            r#"s_ca tokens 13:00 update {"tier_shift":1} 2->3"#,
        ],
    );
}

#[test]
fn a_changed_price_is_the_only_cause_where_it_alone_changed() {
    let workspace = graduated();
    workspace.edit("prices.yaml", "up_to: \"10\", unit_amount: \"1\"", "up_to: \"10\", unit_amount: \"2\"");
    corrects(
        &workspace,
        &[
            r#"s_ca tokens 10:00 update {"price_changed":1} 4->8"#,
            r#"s_ca tokens 11:00 update {"price_changed":1} 4->8"#,
            r#"s_ca tokens 12:00 update {"price_changed":1} 3->5"#,
        ],
    );
    // With a late event: its own window has both causes, later ones the price.
    workspace.edit("prices.yaml", "up_to: \"10\", unit_amount: \"2\"", "up_to: \"10\", unit_amount: \"1\"");
    workspace.write("events/late.ndjson", event("t1", "late", "ca", "2026-01-10T11:30:00Z", "2026-01-12", "1"));
    corrects(
        &workspace,
        &[
            r#"s_ca calls 11:00 update {"late_event":1} 1->2"#,
            r#"s_ca tokens 10:00 update {"price_changed":1} 8->4"#,
            r#"s_ca tokens 11:00 update {"late_event":1,"price_changed":1} 8->5"#,
            r#"s_ca tokens 12:00 update {"price_changed":1} 5->2.5"#,
        ],
    );
    workspace.write("events/later.ndjson", event("t1", "later", "ca", "2026-01-10T11:31:00Z", "2026-01-13", "1"));
    corrects(
        &workspace,
        &[
            r#"s_ca calls 11:00 update {"late_event":1} 2->3"#,
            r#"s_ca tokens 11:00 update {"late_event":1} 5->6"#,
            r#"s_ca tokens 12:00 update {"tier_shift":1} 2.5->2"#,
        ],
    );
}

#[test]
fn a_price_that_changed_before_is_no_cause_again() {
    let workspace = graduated();
    // The price of what is beyond the first tier: the windows before it stay as they are.
    workspace.edit("prices.yaml", "up_to: null, unit_amount: \"0.5\"", "up_to: null, unit_amount: \"0.25\"");
    corrects(
        &workspace,
        &[r#"s_ca tokens 12:00 update {"price_changed":1} 3->2.5"#, r#"s_ca tokens 13:00 update {"price_changed":1} 2->1"#],
    );
    workspace.edit("subscriptions.csv", "t1,s_ca,ca,pro,EUR,month,2025-01-01\n", "");
    let run = workspace.run(&[]);
    assert_eq!((&run["rows"]["retracted"], &run["causes"]), (&json!(8), &json!({"subscription_changed": 8})));
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

#[test]
fn a_new_price_id_moves_its_windows() {
    let workspace = graduated();
    workspace.edit("prices.yaml", "price_id: p_tokens", "price_id: p_tokens_2");
    let run = workspace.run(&[]);
    assert_eq!(
        (&run["rows"]["inserted"], &run["rows"]["retracted"], &run["causes"]),
        (&json!(4), &json!(4), &json!({"price_changed": 8}))
    );
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

#[test]
fn a_changed_meter_is_named() {
    let workspace = graduated();
    workspace.edit("meters.yaml", "aggregation: count", "aggregation: count, filters: [{property: value, op: gt, value: 4}]");
    corrects(
        &workspace,
        &[
            r#"s_ca calls 10:00 retract {"meter_changed":1} 1->"#,
            r#"s_ca calls 11:00 retract {"meter_changed":1} 1->"#,
            r#"s_ca calls 12:00 retract {"meter_changed":1} 1->"#,
            r#"s_ca calls 13:00 retract {"meter_changed":1} 1->"#,
        ],
    );
    workspace.edit("meters.yaml", "op: gt, value: 4", "op: gte, value: 4");
    corrects(
        &workspace,
        &[
            r#"s_ca calls 10:00 insert {"meter_changed":1} ->1"#,
            r#"s_ca calls 11:00 insert {"meter_changed":1} ->1"#,
            r#"s_ca calls 12:00 insert {"meter_changed":1} ->1"#,
            r#"s_ca calls 13:00 insert {"meter_changed":1} ->1"#,
        ],
    );
    // From a sum to a greatest value: later windows cost nothing more.
    workspace.edit("meters.yaml", "aggregation: sum", "aggregation: max");
    corrects(
        &workspace,
        &[
            r#"s_ca tokens 11:00 update {"meter_changed":1} 4->0"#,
            r#"s_ca tokens 12:00 update {"meter_changed":1} 3->0"#,
            r#"s_ca tokens 13:00 update {"meter_changed":1} 2->0"#,
        ],
    );
}

#[test]
fn a_customer_that_moves_is_named_on_both_sides() {
    let workspace = graduated();
    workspace.edit("customers.csv", "t1,ca,ca", "t1,cb,ca");
    let run = workspace.run(&[]);
    assert_eq!(
        (&run["rows"]["inserted"], &run["rows"]["retracted"], &run["causes"]),
        (&json!(8), &json!(8), &json!({"customer_changed": 16}))
    );
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

#[test]
fn a_changed_subscription_is_named() {
    let workspace = graduated();
    workspace.edit("subscriptions.csv", "t1,s_ca,ca,pro,EUR,month,2025-01-01", "t1,s_ca,ca,pro,EUR,month,2026-01-10T12:00:00Z");
    let run = workspace.run(&[]);
    let causes: Vec<_> = corrections(&workspace, &run).iter().map(|line| line.split(" {").next().unwrap().to_owned()).collect();
    assert_eq!(
        causes,
        [
            "s_ca calls 10:00 retract",
            "s_ca calls 11:00 retract",
            "s_ca tokens 10:00 retract",
            "s_ca tokens 11:00 retract",
            "s_ca tokens 12:00 update",
            "s_ca tokens 13:00 update"
        ]
    );
    assert_eq!(run["causes"], json!({"subscription_changed": 4, "tier_shift": 2}));
    assert_eq!(run["dead_letters"], json!({"no_active_subscription": 2}));
}

#[test]
fn a_changed_job_is_named() {
    let workspace = graduated();
    workspace.write("events/amended.ndjson", event("t1", "e10", "ca", "2026-01-10T10:00:00Z", "2026-01-12", "5"));
    workspace.run(&[]);
    let job = workspace.read("job.yaml") + "deduplicate: {keep: first}\n";
    workspace.write("job.yaml", job);
    corrects(
        &workspace,
        &[r#"s_ca tokens 10:00 update {"job_changed":1} 5->4"#, r#"s_ca tokens 12:00 update {"tier_shift":1} 2.5->3"#],
    );
    // Other windows altogether.
    workspace.edit("job.yaml", "window: hour", "window: day");
    let run = workspace.run(&[]);
    assert_eq!((&run["rows"]["inserted"], &run["rows"]["retracted"]), (&json!(2), &json!(8)));
    assert!(run["causes"]["meter_changed"].as_u64() >= Some(8), "a meter without a window has the job's: {}", run["causes"]);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

#[test]
fn a_dead_letter_that_counts_at_last_is_named() {
    let workspace = graduated();
    workspace.write("events/odd.ndjson", event("t1", "odd", "stranger", "2026-01-10T10:30:00Z", "2026-01-12", "1"));
    corrects(&workspace, &[]);
    let customers = workspace.read("customers.csv") + "t1,ca,stranger\n";
    workspace.write("customers.csv", customers);
    let run = workspace.run(&[]);
    let lines: Vec<_> = corrections(&workspace, &run).iter().filter(|line| line.contains(" 10:00 ")).cloned().collect();
    for line in &lines {
        assert!(line.contains(r#""dead_letter_resolved":1"#) && !line.contains("late_event"), "{line}");
    }
    assert_eq!((lines.len(), &run["dead_letters_resolved"]), (2, &json!(1)));
}

#[test]
fn a_file_that_vanishes_takes_its_events_back() {
    let workspace = graduated();
    workspace.write("events/extra.ndjson", event("t1", "x", "ca", "2026-01-10T13:30:00Z", "2026-01-12", "1"));
    workspace.run(&[]);
    std::fs::remove_file(workspace.path("events/extra.ndjson")).unwrap();
    corrects(
        &workspace,
        &[r#"s_ca calls 13:00 update {"event_voided":1} 2->1"#, r#"s_ca tokens 13:00 update {"event_voided":1} 2.5->2"#],
    );
}
