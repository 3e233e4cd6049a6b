//! Every command as people and programs see it: text, JSON, exit codes, and what
//! it writes.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use arrow::array::{Array, AsArray};
use arrow::datatypes::{DataType, Int64Type};
use insta::assert_snapshot;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};

use crate::support::{Outcome, Row, Workspace, normalised};

/// The job of `trueup init`.
fn fresh() -> Workspace {
    Workspace::of("init")
}

/// The same, run once.
fn published() -> Workspace {
    let workspace = fresh();
    workspace.run(&[]);
    workspace
}

/// What a command prints, which must end with `code` and say nothing on stderr.
#[track_caller]
fn shown(workspace: &Workspace, code: i32, arguments: &[&str]) -> String {
    let outcome = workspace.trueup(arguments);
    assert_eq!(outcome.code, code, "{outcome:?}");
    assert_eq!(outcome.stderr, "");
    normalised(&outcome.stdout)
}

#[track_caller]
fn document(outcome: &Outcome) -> Value {
    assert!(outcome.stdout.starts_with("{\n  \"schema\": \"trueup."), "{}", outcome.stdout);
    serde_json::from_str(&outcome.stdout).expect("one JSON document")
}

fn files(workspace: &Workspace) -> BTreeSet<String> {
    let entries = fs::read_dir(workspace.path(".")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

const NEW_PRICE: (&str, &str) = ("unit_amount: \"0.000001\"", "unit_amount: \"0.000002\"");

// --- run -------------------------------------------------------------------------------------

#[test]
fn the_first_run_says_what_it_published() {
    assert_snapshot!(shown(&fresh(), 0, &["run", "job.yaml"]), @r"
    trueup run my_usage: published 7 corrections
      range        2026-01-01T00:00:00Z to 2026-01-02T00:00:00Z
      priced       2026-01-01T00:00:00Z to 2026-02-01T00:00:00Z, the billing periods that the range touches
      events       8 read = 6 metered + 1 duplicate + 1 dead-lettered
      matches      10 with meters = 10 counted
      windows      7 inserted, 0 updated, 0 retracted, 0 unchanged
      periods      5 written, 0 removed, 0 unchanged
      cost         USD 0 -> 0.013654  +0.013654
      causes       first_computation 7
      dead letters customer_not_found 1
      time         <seconds> s (read keys <seconds>, enrich <seconds>, aggregate and price <seconds>, reconcile <seconds>, publish <seconds>)
      run          <run>

      trueup dead-letters job.yaml                     # what could not count, and the remedy
      trueup export job.yaml corrections --format csv  # every change and its cause
      trueup run job.yaml                              # run again: nothing changes
    ");
}

#[test]
fn the_second_run_says_that_nothing_changed() {
    assert_snapshot!(shown(&published(), 0, &["run", "job.yaml"]), @r"
    trueup run my_usage: nothing changed: the store agrees with the events
      range        2026-01-01T00:00:00Z to 2026-01-02T00:00:00Z
      priced       2026-01-01T00:00:00Z to 2026-02-01T00:00:00Z, the billing periods that the range touches
      events       8 read = 6 metered + 1 duplicate + 1 dead-lettered
      matches      10 with meters = 10 counted
      windows      0 inserted, 0 updated, 0 retracted, 7 unchanged
      periods      0 written, 0 removed, 5 unchanged
      cost         USD 0.013654 -> 0.013654  unchanged
      dead letters customer_not_found 1
      time         <seconds> s (read keys <seconds>, enrich <seconds>, aggregate and price <seconds>, reconcile <seconds>, publish <seconds>)
      run          <run>

      trueup dead-letters job.yaml  # what could not count, and the remedy
      trueup verify job.yaml        # prove that store, events and ledger agree
    ");
}

#[test]
fn a_run_of_a_range_says_how_it_was_widened() {
    let range = ["run", "job.yaml", "--start", "2026-01-01T09:30", "--end", "2026-01-01T10:30", "--meter", "api_calls"];
    assert_snapshot!(shown(&fresh(), 0, &range), @r"
    trueup run my_usage: published 2 corrections
      range        2026-01-01T09:00:00Z to 2026-01-01T11:00:00Z
                   asked for 2026-01-01T09:30:00Z to 2026-01-01T10:30:00Z, widened to whole windows
      priced       2026-01-01T00:00:00Z to 2026-02-01T00:00:00Z, the billing periods that the range touches
      events       8 read = 3 metered + 1 duplicate + 4 out of range
      matches      3 with meters = 3 counted
      windows      2 inserted, 0 updated, 0 retracted, 0 unchanged
      periods      2 written, 0 removed, 0 unchanged
      cost         USD 0 -> 0.01  +0.01
      causes       first_computation 2
      outside      1 window in these billing periods, out of the range: stale, or not stored yet
      time         <seconds> s (read keys <seconds>, enrich <seconds>, aggregate and price <seconds>, reconcile <seconds>, publish <seconds>)
      run          <run>

      trueup export job.yaml corrections --format csv                                        # every change and its cause
      trueup run job.yaml --start 2026-01-01T09:30 --end 2026-01-01T10:30 --meter api_calls  # run again: nothing changes
    ");
}

#[test]
fn a_run_of_nothing_says_so() {
    let workspace = fresh();
    workspace.write("events/2026-01-01.ndjson", "");
    assert_snapshot!(shown(&workspace, 0, &["run", "job.yaml"]), @r"
    trueup run my_usage: there is nothing to compute: no event and no stored row
      run          <run>

      trueup verify job.yaml  # prove that store, events and ledger agree
    ");
}

#[test]
fn a_run_as_json() {
    assert_snapshot!(shown(&fresh(), 0, &["run", "job.yaml", "--output", "json"]), @r#"
    {
      "schema": "trueup.run/1",
      "run_id": "<run>",
      "job": "my_usage",
      "status": "succeeded",
      "range": {
        "start": "2026-01-01T00:00:00Z",
        "end": "2026-01-02T00:00:00Z"
      },
      "reach": {
        "start": "2026-01-01T00:00:00Z",
        "end": "2026-02-01T00:00:00Z"
      },
      "events": {
        "read": 8,
        "out_of_range": 0,
        "duplicates": 1,
        "voided": 0,
        "unmatched": 0,
        "dead_lettered": 1,
        "metered": 6
      },
      "usage": {
        "matches": 10,
        "counted": 10,
        "skipped": 0,
        "rejected": 0
      },
      "rows": {
        "inserted": 7,
        "updated": 0,
        "retracted": 0,
        "unchanged": 0,
        "adjusted": 0
      },
      "periods": {
        "written": 5,
        "removed": 0,
        "unchanged": 0,
        "amounts": [
          {
            "currency": "USD",
            "amount_before": "0",
            "amount_after": "0.01"
          }
        ],
        "adjusted": 0,
        "adjusted_amounts": []
      },
      "totals": [
        {
          "currency": "USD",
          "cost_before": "0",
          "cost_after": "0.013654"
        }
      ],
      "causes": {
        "first_computation": 7
      },
      "dead_letters": {
        "customer_not_found": 1
      },
      "dead_letters_resolved": 0,
      "stale_outside": 0,
      "warnings": [],
      "coverage": {
        "mode": "full"
      },
      "lateness": {},
      "steps": [
        {
          "name": "read keys",
          "seconds": <seconds>,
          "rows": 8
        },
        {
          "name": "enrich",
          "seconds": <seconds>,
          "rows": 8
        },
        {
          "name": "aggregate and price",
          "seconds": <seconds>,
          "rows": 7
        },
        {
          "name": "reconcile",
          "seconds": <seconds>,
          "rows": 0
        },
        {
          "name": "publish",
          "seconds": <seconds>,
          "rows": 7
        }
      ]
    }
    "#);
}

#[test]
fn run_and_plan_hold_the_keys_of_the_contract() {
    let workspace = fresh();
    let plan = document(&workspace.trueup(&["plan", "job.yaml", "--output", "json"]));
    let run = document(&workspace.trueup(&["run", "job.yaml", "--output", "json"]));
    assert_eq!((&plan["schema"], &plan["status"], &plan["run_id"]), (&json!("trueup.plan/1"), &json!("planned"), &Value::Null));
    assert_eq!((&run["schema"], &run["status"]), (&json!("trueup.run/1"), &json!("succeeded")));
    assert_eq!(run["run_id"], workspace.query("SELECT run_id FROM runs")[0]["run_id"]);
    for document in [&plan, &run] {
        let groups: [(&str, &[&str]); 4] = [
            ("range", &["start", "end"]),
            ("events", &["read", "out_of_range", "duplicates", "voided", "unmatched", "dead_lettered", "metered"]),
            ("usage", &["matches", "counted", "skipped", "rejected"]),
            ("rows", &["inserted", "updated", "retracted", "unchanged"]),
        ];
        for (group, keys) in groups {
            for key in keys {
                let value = &document[group][key];
                assert!(if group == "range" { value.is_string() } else { value.is_u64() }, "{group}.{key}: {value}");
            }
        }
        assert_eq!(document["totals"], json!([{"currency": "USD", "cost_before": "0", "cost_after": "0.013654"}]));
    }
    // A plan is what the run then does.
    for group in ["range", "reach", "events", "usage", "rows", "periods", "totals", "causes", "dead_letters"] {
        assert_eq!(plan[group], run[group], "{group}");
    }
}

#[test]
fn quiet_and_threads_change_nothing_on_stdout() {
    let loud = shown(&fresh(), 0, &["run", "job.yaml"]);
    assert_eq!(shown(&fresh(), 0, &["run", "job.yaml", "--quiet", "--threads", "1"]), loud);
    let verbose = fresh().trueup(&["run", "job.yaml", "-v"]);
    assert_eq!(normalised(&verbose.stdout), loud);
    assert!(verbose.stderr.contains("INFO") && !verbose.stderr.contains('\x1b'), "{}", verbose.stderr);
}

// --- plan ------------------------------------------------------------------------------------

#[test]
fn a_plan_says_what_would_change() {
    let workspace = published();
    workspace.edit("prices.yaml", NEW_PRICE.0, NEW_PRICE.1);
    assert_snapshot!(shown(&workspace, 0, &["plan", "job.yaml"]), @r"
    trueup plan my_usage: 0 to insert, 3 to update, 0 to retract
      range        2026-01-01T00:00:00Z to 2026-01-02T00:00:00Z
      priced       2026-01-01T00:00:00Z to 2026-02-01T00:00:00Z, the billing periods that the range touches
      events       8 read = 6 metered + 1 duplicate + 1 dead-lettered
      matches      10 with meters = 10 counted
      windows      0 inserted, 3 updated, 0 retracted, 4 unchanged
      periods      2 written, 0 removed, 3 unchanged
      cost         USD 0.013654 -> 0.017308  +0.003654
      causes       price_changed 3
      dead letters customer_not_found 1
      time         <seconds> s (read keys <seconds>, enrich <seconds>, aggregate and price <seconds>, reconcile <seconds>)

      customer  meter       rows  cost                         change  causes
      cus_1     bytes_sent  ~2    0.00359 -> 0.00718 USD     +0.00359  price_changed 2
      cus_2     bytes_sent  ~1    0.000064 -> 0.000128 USD  +0.000064  price_changed 1

         customer  window                                                             quantity  becomes   cost change  cause
      ~  cus_1     demo / sub_1 / bytes_sent / standard_bytes / 2026-01-01T09:00:00Z      2000     2000     0.002 USD  price_changed
      ~  cus_1     demo / sub_1 / bytes_sent / standard_bytes / 2026-01-01T10:00:00Z      1590     1590   0.00159 USD  price_changed
      ~  cus_2     demo / sub_2 / bytes_sent / standard_bytes / 2026-01-01T11:00:00Z        64       64  0.000064 USD  price_changed

      trueup run job.yaml  # publish this, if nothing changes meanwhile
    ");
}

#[test]
fn a_plan_says_what_the_guard_would_refuse() {
    let workspace = published();
    workspace.edit("prices.yaml", NEW_PRICE.0, NEW_PRICE.1);
    workspace.edit("job.yaml", "window: hour ", "guard: {max_cost_change: \"5%\"} ");
    let plan = shown(&workspace, 0, &["plan", "job.yaml"]);
    assert_snapshot!(plan.split_once("note:").unwrap().1.lines().next().unwrap(), @" guard: 0.003654 USD of 0.013654 USD stored would move, more than max_cost_change 5%");
}

#[test]
fn a_plan_writes_nothing() {
    let workspace = fresh();
    let before = files(&workspace);
    assert_eq!(workspace.trueup(&["plan", "job.yaml", "--detailed-exitcode"]).code, 3);
    assert_eq!(workspace.trueup(&["plan", "job.yaml"]).code, 0);
    assert_eq!(files(&workspace), before, "a first plan creates no store");

    let workspace = published();
    let before = workspace.dump();
    assert_eq!(workspace.trueup(&["plan", "job.yaml", "--detailed-exitcode"]).code, 0);
    workspace.edit("prices.yaml", NEW_PRICE.0, NEW_PRICE.1);
    assert_eq!(workspace.trueup(&["plan", "job.yaml", "--detailed-exitcode"]).code, 3);
    assert_eq!(workspace.dump(), before);
}

#[test]
fn a_change_of_periods_without_usage_is_a_change() {
    let workspace = fresh();
    workspace.write("customers.csv", workspace.read("customers.csv") + "demo,cus_3,umbrella,,\n");
    workspace.write(
        "subscriptions.csv",
        workspace.read("subscriptions.csv") + "demo,sub_3,cus_3,flat,USD,month,,,2026-01-01T00:00:00Z,\n",
    );
    let price = "  - {price_id: flat_calls, plan_id: flat, meter_id: api_calls, currency: USD, model: graduated, \
                 tiers: [{up_to: null, unit_amount: \"0\", flat_amount: \"5\"}]}\n";
    workspace.write("prices.yaml", workspace.read("prices.yaml") + price);
    workspace.run(&[]);
    workspace.edit("prices.yaml", "flat_amount: \"5\"", "flat_amount: \"6\"");
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 3);
    let plan = shown(&workspace, 3, &["plan", "job.yaml", "--detailed-exitcode"]);
    assert_snapshot!(plan.lines().next().unwrap(), @"trueup plan my_usage: 1 billing period to write, no window to change");
    assert_snapshot!(shown(&workspace, 0, &["run", "job.yaml"]).lines().next().unwrap(), @"trueup run my_usage: published 1 billing period, no window changed");
    assert_eq!(workspace.query("SELECT amount FROM usage_periods WHERE subscription_id = 'sub_3'")[0]["amount"], "6");
    assert_eq!(workspace.trueup(&["plan", "job.yaml", "--detailed-exitcode"]).code, 0);
}

// --- verify ----------------------------------------------------------------------------------

#[test]
fn a_sound_store_verifies() {
    let workspace = published();
    let before = workspace.dump();
    assert_snapshot!(shown(&workspace, 0, &["verify", "job.yaml"]), @"trueup verify my_usage: 7 windows recomputed and equal, the ledger is whole and gives the stored table");
    assert_snapshot!(shown(&workspace, 0, &["verify", "job.yaml", "--output", "json"]), @r#"
    {
      "schema": "trueup.verify/1",
      "job": "my_usage",
      "status": "sound",
      "rows": {
        "inserted": 0,
        "updated": 0,
        "retracted": 0,
        "unchanged": 7,
        "adjusted": 0
      },
      "periods_differing": 0,
      "periods": [],
      "ledger": []
    }
    "#);
    assert_eq!(workspace.dump(), before);
}

#[test]
fn a_window_changed_by_hand_is_drift() {
    let workspace = published();
    workspace.tamper(
        "UPDATE usage_windows SET quantity = '2001' WHERE meter_id = 'bytes_sent' AND window_start = '2026-01-01T09:00:00Z'",
    );
    let before = workspace.dump();
    assert_snapshot!(shown(&workspace, 3, &["verify", "job.yaml"]), @r"
    trueup verify my_usage: 1 window differs from the events (0 missing, 1 wrong, 0 too many), 0 periods wrong, 1 finding in the ledger
      demo / sub_1 / bytes_sent / standard_bytes / 2026-01-01T09:00:00Z: stored quantity 2001 cost 0.002, should be quantity 2000 cost 0.002 (store_altered)
      usage_windows demo / sub_1 / bytes_sent / standard_bytes / 2026-01-01T09:00:00Z: holds quantity 2001 and cost 0.002, the ledger says 2000 and 0.002

      trueup plan job.yaml  # what a run would change
    ");
    assert_eq!(workspace.dump(), before);
    // A run repairs it, and says why.
    let run = workspace.run(&[]);
    assert_eq!(run["causes"], json!({"store_altered": 1}));
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    workspace.tamper("DELETE FROM usage_windows WHERE meter_id = 'seats'");
    assert_eq!(workspace.run(&[])["causes"], json!({"store_altered": 1}));
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

/// `verify` exits with 3 and says all of this, as text and as JSON.
#[track_caller]
fn drift(tampering: &str, says: &[&str]) -> Workspace {
    let workspace = published();
    workspace.edit("prices.yaml", NEW_PRICE.0, NEW_PRICE.1);
    workspace.run(&[]);
    workspace.tamper(tampering);
    let before = workspace.dump();
    let text = workspace.trueup(&["verify", "job.yaml"]);
    assert_eq!(text.code, 3, "{text:?}");
    for part in says {
        assert!(text.stdout.contains(part), "`{part}` is missing in {}", text.stdout);
    }
    let outcome = workspace.trueup(&["verify", "job.yaml", "--output", "json"]);
    assert_eq!((outcome.code, &document(&outcome)["status"]), (3, &json!("drift")));
    assert_eq!(workspace.dump(), before);
    workspace
}

#[test]
fn altered_windows_are_drift() {
    drift(
        "UPDATE usage_windows SET cost = '9' WHERE meter_id = 'seats'",
        &["demo / sub_1 / seats / 2026-01-01T00:00:00Z", "should be"],
    );
    drift("UPDATE usage_windows SET event_count = 7 WHERE meter_id = 'seats'", &["demo / sub_1 / seats / 2026-01-01T00:00:00Z"]);
    drift("DELETE FROM usage_windows WHERE meter_id = 'seats'", &["demo / sub_1 / seats", "in the ledger, but not in the table"]);
    drift(
        "INSERT INTO usage_windows SELECT job, tenant_id, customer_id, 'sub_2', meter_id, price_id, dimensions, window_start, window_end, \
         period_start, period_end, quantity, event_count, cost, currency, events_digest, meter_digest, price_digest, subscription_digest, \
         customer_digest, version, run_id, updated_at FROM usage_windows WHERE meter_id = 'seats'",
        &["demo / sub_2 / seats", "is not in the ledger"],
    );
}

#[test]
fn altered_periods_are_drift() {
    drift("UPDATE usage_periods SET amount = '9' WHERE meter_id = 'seats'", &["1 period"]);
    drift("DELETE FROM usage_periods WHERE meter_id = 'seats'", &["1 period"]);
}

#[test]
fn an_altered_ledger_is_drift() {
    const DIGEST: &str = "its ledger digest does not match the run";
    drift(
        "UPDATE corrections SET quantity_after = '2001' WHERE kind = 'update' AND quantity_after = '2000'",
        &["corrections", DIGEST],
    );
    drift("UPDATE corrections SET causes = '{\"late_event\":1}' WHERE kind = 'update'", &[DIGEST]);
    drift("DELETE FROM corrections WHERE kind = 'update' AND quantity_after = '64'", &[DIGEST]);
    drift(
        "UPDATE corrections SET run_id = 'nobody' WHERE kind = 'update'",
        &["belongs to run nobody, which is not in runs", DIGEST],
    );
    drift(
        "UPDATE runs SET ledger_digest = 'x' || ledger_digest WHERE run_id = (SELECT min(run_id) FROM runs)",
        &["runs", DIGEST],
    );
    drift("DELETE FROM runs WHERE run_id = (SELECT min(run_id) FROM runs)", &["which is not in runs", DIGEST]);
}

// --- check, runs, dead-letters ---------------------------------------------------------------

#[test]
fn a_check_counts_what_it_found() {
    let workspace = fresh();
    workspace.edit("job.yaml", "window: hour ", "schedule: {cron: \"0 2 * * *\", timezone: Europe/Berlin} ");
    workspace.edit("subscriptions.csv", "cus_2,standard", "cus_2,premium");
    let before = files(&workspace);
    assert_snapshot!(shown(&workspace, 0, &["check", "job.yaml"]), @r"
    trueup check my_usage: ok
      reference    3 meters, 2 prices, 2 subscriptions
      source       1 file
      store        trueup.db (will be created by the first run)
      schedule     0 2 * * * (Europe/Berlin)
      warning      plan `premium` has subscriptions but no price
    ");
    assert_snapshot!(shown(&workspace, 0, &["check", "job.yaml", "--output", "json"]), @r#"
    {
      "schema": "trueup.check/1",
      "job": "my_usage",
      "status": "ok",
      "checks": [
        {
          "name": "reference",
          "ok": true,
          "says": "3 meters, 2 prices, 2 subscriptions"
        },
        {
          "name": "source",
          "ok": true,
          "says": "1 file"
        },
        {
          "name": "store",
          "ok": true,
          "says": "trueup.db (will be created by the first run)"
        },
        {
          "name": "schedule",
          "ok": true,
          "says": "0 2 * * * (Europe/Berlin)"
        }
      ],
      "warnings": [
        "plan `premium` has subscriptions but no price"
      ]
    }
    "#);
    assert_eq!(files(&workspace), before);
}

#[test]
fn runs_are_listed_the_last_one_first() {
    let workspace = fresh();
    assert_snapshot!(shown(&workspace, 0, &["runs", "job.yaml"]), @"job my_usage has not run yet: trueup run job.yaml");
    workspace.run(&[]);
    workspace.run(&["--day", "2026-01-02"]);
    assert_snapshot!(shown(&workspace, 0, &["runs", "job.yaml"]), @r"
    run                                   started               status     range start           range end             inserted  updated  retracted  started by
    <run>  <time>  succeeded  2026-01-02T00:00:00Z  2026-01-03T00:00:00Z         0        0          0  <operator> trueup run
    <run>  <time>  succeeded  2026-01-01T00:00:00Z  2026-01-02T00:00:00Z         7        0          0  <operator> trueup run
    ");
    let outcome = workspace.trueup(&["runs", "job.yaml", "--output", "json"]);
    let runs = document(&outcome)["runs"].clone();
    let statuses: Vec<_> =
        runs.as_array().unwrap().iter().map(|run| (run["status"].clone(), run["counts"]["rows"]["inserted"].clone())).collect();
    assert_eq!(statuses, [(json!("succeeded"), json!(7)), (json!("succeeded"), json!(0))]);
}

/// The job of `trueup init` with one dead letter for each of three reasons, of two tenants.
fn with_dead_letters() -> Workspace {
    let workspace = fresh();
    let lines = [
        r#"{"tenant_id":"demo","id":"f1","event_name":"api.call","external_customer_id":"acme","timestamp":"2026-01-02T09:00:00Z","properties":{"bytes":"lots"}}"#,
        r#"{"tenant_id":"other","id":"f2","event_name":"api.call","external_customer_id":"acme","timestamp":"2026-01-02T09:00:00Z","properties":{}}"#,
        r#"{"tenant_id":"demo","id":"#,
    ];
    workspace.write("events/2026-01-02.ndjson", lines.join("\n"));
    workspace.run(&[]);
    workspace
}

#[test]
fn dead_letters_are_listed_by_reason() {
    let workspace = with_dead_letters();
    assert_snapshot!(shown(&workspace, 0, &["dead-letters", "job.yaml"]), @r"
    customer_not_found 2 events
      remedy: add the external id to the customers table, valid at the time of the event
      demo/e7 at 2026-01-01T11:30:00Z
        no customer has external id `initech` at 2026-01-01T11:30:00Z: add it to the customers table
      other/f2 at 2026-01-02T09:00:00Z
        no customer has external id `acme` at 2026-01-02T09:00:00Z: add it to the customers table
    invalid_property 1 event
      remedy: send the event again with the same id and a valid property, or void it
      demo/f1 meter bytes_sent at 2026-01-02T09:00:00Z
        property `bytes` is `lots`, not a decimal number
    malformed_event 1 event
      remedy: repair the row where it stands, or send the event again as it should be
      /unreadable:5c914cfaf90ce873
        events/2026-01-02.ndjson line 3: EOF while parsing a value at line 1 column 25

    They are retried by every run that covers them.
    ");
    assert_snapshot!(shown(&workspace, 0, &["dead-letters", "job.yaml", "--output", "json", "--reason", "invalid_property"]), @r#"
    {
      "schema": "trueup.dead_letters/1",
      "job": "my_usage",
      "dead_letters": [
        {
          "tenant_id": "demo",
          "event_id": "f1",
          "meter_id": "bytes_sent",
          "reason": "invalid_property",
          "remedy": "send the event again with the same id and a valid property, or void it",
          "detail": "property `bytes` is `lots`, not a decimal number",
          "event": "{\"tenant_id\":\"demo\",\"id\":\"f1\",\"event_name\":\"api.call\",\"external_customer_id\":\"acme\",\"timestamp\":\"2026-01-02T09:00:00Z\",\"properties\":{\"bytes\":\"lots\"}}",
          "event_time": "2026-01-02T09:00:00Z",
          "occurrences": 1,
          "first_run_id": "<run>",
          "last_run_id": "<run>",
          "resolved_run_id": null
        }
      ]
    }
    "#);
}

#[test]
fn dead_letters_can_be_filtered() {
    let workspace = with_dead_letters();
    let ids = |arguments: &[&str]| {
        let outcome = workspace.trueup(&[&["dead-letters", "job.yaml", "--output", "json"], arguments].concat());
        let letters = document(&outcome)["dead_letters"].clone();
        letters.as_array().unwrap().iter().map(|letter| letter["event_id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids(&["--reason", "customer_not_found"]), ["e7", "f2"]);
    assert_eq!(ids(&["--tenant", "other"]), ["f2"]);
    assert_eq!(ids(&["--tenant", "demo", "--reason", "customer_not_found"]), ["e7"]);
    assert_eq!(ids(&["--reason", "price_not_found"]), [""; 0]);
    assert_eq!(ids(&["--customer", "acme"]), ["f1", "f2"]);
    assert_eq!(ids(&["--meter", "bytes_sent"]), ["f1"]);
    assert_eq!(ids(&["--start", "2026-01-02"]), ["f1", "f2"]);
    assert_eq!(ids(&["--end", "2026-01-02"]), ["e7"]);
    assert_eq!(ids(&["--start", "2026-01-01T11:30:00Z", "--end", "2026-01-01T11:30:01Z", "--customer", "initech"]), ["e7"]);
    let run = workspace.query("SELECT run_id FROM runs")[0]["run_id"].clone();
    assert_eq!((ids(&["--run", &run]).len(), ids(&["--run", "another"]).len()), (4, 0));
    workspace
        .trueup(&["dead-letters", "job.yaml", "--reason", "bad"])
        .fails_with(2, &["no such reason: use one of malformed_event, "]);
    workspace.trueup(&["dead-letters", "job.yaml", "--start", "soon"]).fails_with(2, &["--start: `soon` is not"]);
    let empty = ["dead-letters", "job.yaml", "--start", "2026-01-02", "--end", "2026-01-01"];
    workspace.trueup(&empty).fails_with(2, &["--start must be before --end"]);
    assert_snapshot!(shown(&workspace, 0, &["dead-letters", "job.yaml", "--tenant", "nobody"]), @"job my_usage has no such dead letters");
}

#[test]
fn a_resolved_dead_letter_names_the_run_that_resolved_it() {
    let workspace = with_dead_letters();
    let customers = workspace.read("customers.csv") + "demo,cus_2,initech,,\n";
    workspace.write("customers.csv", customers);
    let run = workspace.run(&["--incremental"]);
    assert_eq!(run["dead_letters_resolved"], 1);
    assert_eq!(run["dead_letters"], json!({}), "no other was looked at");
    let open = shown(&workspace, 0, &["dead-letters", "job.yaml", "--reason", "customer_not_found"]);
    assert!(open.contains("other/f2") && !open.contains("demo/e7"), "{open}");
    let letters = workspace.query("SELECT * FROM dead_letters WHERE event_id = 'e7'");
    assert_eq!(letters[0]["resolved_run_id"], run["run_id"].as_str().unwrap());
    assert_snapshot!(shown(&workspace, 0, &["dead-letters", "job.yaml", "--all", "--reason", "customer_not_found"]), @r"
    customer_not_found 2 events
      remedy: add the external id to the customers table, valid at the time of the event
      demo/e7 at 2026-01-01T11:30:00Z resolved by <run>
        no customer has external id `initech` at 2026-01-01T11:30:00Z: add it to the customers table
      other/f2 at 2026-01-02T09:00:00Z
        no customer has external id `acme` at 2026-01-02T09:00:00Z: add it to the customers table

    They are retried by every run that covers them.
    ");
    // Asked for a run, what it resolved is shown too.
    let of_run = workspace.trueup(&["dead-letters", "job.yaml", "--output", "json", "--run", run["run_id"].as_str().unwrap()]);
    let letters_of_run = document(&of_run)["dead_letters"].clone();
    let resolved = letters_of_run.as_array().unwrap().iter().filter(|letter| letter["resolved_run_id"] == run["run_id"]);
    assert_eq!(resolved.map(|letter| letter["event_id"].clone()).collect::<Vec<_>>(), ["e7"]);
    // What goes wrong again is open again.
    let rows = workspace.read("customers.csv").replace("demo,cus_2,initech,,\n", "");
    workspace.write("customers.csv", rows);
    workspace.run(&[]);
    let again = workspace.query("SELECT * FROM dead_letters WHERE event_id = 'e7'");
    assert_eq!((again[0]["resolved_run_id"].as_str(), &again[0]["first_run_id"]), ("", &letters[0]["first_run_id"]));
}

#[test]
fn dead_letters_of_a_range_that_is_not_run_stay_open() {
    let workspace = with_dead_letters();
    let open = |workspace: &Workspace| workspace.query("SELECT event_id FROM dead_letters WHERE resolved_run_id IS NULL").len();
    assert_eq!(open(&workspace), 4);
    let customers = workspace.read("customers.csv") + "demo,cus_2,initech,,\nother,cus_2,acme,,\n";
    workspace.write("customers.csv", customers);
    assert_eq!(workspace.run(&["--day", "2026-01-03"])["dead_letters_resolved"], 0);
    assert_eq!(open(&workspace), 4);
    assert_eq!(workspace.run(&["--day", "2026-01-01"])["dead_letters_resolved"], 1);
    assert_eq!(open(&workspace), 3);
}

// --- export ----------------------------------------------------------------------------------

const TABLES: [&str; 5] = ["usage_windows", "usage_periods", "corrections", "dead_letters", "runs"];

/// Rows in no particular order.
fn sorted(mut rows: Vec<Row>) -> Vec<Row> {
    rows.sort();
    rows
}

/// The rows of a table without what is the store's own.
fn stored(workspace: &Workspace, table: &str) -> Vec<Row> {
    let mut rows = workspace.query(&format!("SELECT * FROM {table}"));
    for row in &mut rows {
        row.retain(|column, _| !["sequence", "number", "first_correction", "last_correction"].contains(&column.as_str()));
        for column in ["meter_digest", "price_digest", "subscription_digest", "customer_digest"] {
            if let Some(number) = row.get_mut(column) {
                let digest = workspace.query(&format!("SELECT digest FROM definition_digests WHERE id = {number}"));
                *number = digest[0]["digest"].clone();
            }
        }
    }
    sorted(rows)
}

#[test]
fn every_table_is_exported_as_csv() {
    let workspace = with_dead_letters();
    for table in TABLES {
        let outcome = workspace.trueup(&["export", "job.yaml", table]);
        let mut reader = csv::Reader::from_reader(outcome.stdout.as_bytes());
        let rows: Vec<Row> = reader.deserialize().map(|row| row.unwrap()).collect();
        assert_eq!(sorted(rows), stored(&workspace, table), "{table}");
    }
}

#[test]
fn every_table_is_exported_as_ndjson() {
    let workspace = with_dead_letters();
    for table in TABLES {
        let outcome = workspace.trueup(&["export", "job.yaml", table, "--format", "ndjson"]);
        let row = |line: &str| -> Row {
            let object: serde_json::Map<String, Value> = serde_json::from_str(line).unwrap();
            let cell = |value: &Value| match value {
                Value::Null => String::new(),
                Value::String(text) => text.clone(),
                Value::Number(number) => number.as_i64().expect("decimals are texts").to_string(),
                other => panic!("{other}"),
            };
            object.iter().map(|(name, value)| (name.clone(), cell(value))).collect()
        };
        let rows = outcome.stdout.lines().map(row).collect();
        assert_eq!(sorted(rows), stored(&workspace, table), "{table}");
    }
}

#[test]
fn every_table_is_exported_as_parquet() {
    let workspace = with_dead_letters();
    for table in TABLES {
        let outcome = workspace.trueup(&["export", "job.yaml", table, "--format", "parquet", "--out", "out.parquet"]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (0, ""), "{outcome:?}");
        let file = fs::File::open(workspace.path("out.parquet")).unwrap();
        let mut rows: Vec<Row> = Vec::new();
        for batch in ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap() {
            let batch = batch.unwrap();
            for row in 0..batch.num_rows() {
                let cell = |column: &arrow::array::ArrayRef| match column.data_type() {
                    _ if column.is_null(row) => String::new(),
                    DataType::Int64 => column.as_primitive::<Int64Type>().value(row).to_string(),
                    _ => column.as_string::<i32>().value(row).to_owned(),
                };
                let schema = batch.schema();
                rows.push(
                    schema
                        .fields()
                        .iter()
                        .zip(batch.columns())
                        .map(|(field, column)| (field.name().clone(), cell(column)))
                        .collect(),
                );
            }
        }
        assert_eq!(sorted(rows), stored(&workspace, table), "{table}");
    }
}

#[test]
fn an_export_needs_a_store() {
    fresh().trueup(&["export", "job.yaml", "runs"]).fails_with(1, &["job my_usage has no store yet: run it first"]);
}

#[test]
fn an_export_of_another_job_in_the_same_store_is_empty() {
    let workspace = published();
    workspace.edit("job.yaml", "job: my_usage", "job: other");
    let outcome = workspace.trueup(&["export", "job.yaml", "usage_windows"]);
    assert_eq!((outcome.code, outcome.stdout.lines().count()), (0, 1), "{outcome:?}");
    // Two jobs share a store without touching each other's rows.
    workspace.run(&[]);
    assert_eq!(workspace.query("SELECT DISTINCT job FROM usage_windows").len(), 2);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    workspace.edit("job.yaml", "job: other", "job: my_usage");
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

// --- init, help ------------------------------------------------------------------------------

#[test]
fn init_writes_a_job_that_runs() {
    let workspace = Workspace::new();
    assert_snapshot!(shown(&workspace, 0, &["init", "shop"]), @r"
    wrote shop/job.yaml
    wrote shop/customers.csv
    wrote shop/subscriptions.csv
    wrote shop/meters.yaml
    wrote shop/prices.yaml
    wrote shop/events/2026-01-01.ndjson

      trueup run shop/job.yaml  # compute usage and cost of its eight events
    ");
    let run = workspace.trueup(&["run", "shop/job.yaml", "--output", "json"]).json();
    assert_eq!((&run["events"]["read"], &run["rows"]["inserted"]), (&json!(8), &json!(7)));
    assert!(workspace.path("shop/trueup.db").exists(), "paths are relative to the job file");
}

#[test]
fn init_overwrites_nothing() {
    let workspace = Workspace::new();
    workspace.write("prices.yaml", "mine");
    let before = files(&workspace);
    workspace.trueup(&["init"]).fails_with(2, &["./prices.yaml exists already", "nothing was written"]);
    assert_eq!((files(&workspace), workspace.read("prices.yaml")), (before, "mine".to_owned()));
}

#[test]
fn the_help_lists_commands_and_exit_codes() {
    assert_snapshot!(shown(&Workspace::new(), 0, &["--help"]), @r"
    Recomputes usage and cost windows from raw events, writes only what differs, and keeps a ledger of
    every correction and its cause

    Usage: trueup [OPTIONS] <COMMAND>

    Commands:
      run           Recompute, and publish what differs
      plan          Show what a run would change, and write nothing
      apply         Publish a saved plan exactly as it is, or refuse
      verify        Recompute and compare, check the ledger, and write nothing
      explain       Take one number apart: tiers, price, events, history
      audit         Sum up what runs changed: by cause, customer, meter
      check         Check the job file, the reference tables and the source
      revert        Take back what a run changed
      resume        Run again what was interrupted
      close         Close billing periods, because they are invoiced
      runs          List the runs of a job
      dead-letters  List events that should have counted and could not
      export        Write a table as CSV, NDJSON or Parquet
      init          Write a small job that runs
      generate      Make up events, reference tables and a job, for demonstrations and sizing
      serve         Run jobs by their schedules, with health and metrics over HTTP
      help          Print this message or the help of the given subcommand(s)

    Options:
          --output <OUTPUT>
              How results are printed on stdout

              Possible values:
              - text
              - json: One JSON document

              [default: text]

          --threads <N>
              Threads that read and aggregate [default: one a core]

          --environment <NAME>
              Connections of environments/NAME.yaml beside the job [default: $TRUEUP_ENVIRONMENT]

      -v, --verbose...
              More logs on stderr; twice for still more

      -q, --quiet
              No progress and no warnings on stderr

      -h, --help
              Print help (see a summary with '-h')

      -V, --version
              Print version

    Exit codes: 0 done, 1 runtime error, 2 usage or configuration, 3 differences found,
    4 invariant failed and nothing published, 5 partly published and resumable, 6 another run
    holds the lock, 7 saved plan is stale, 8 guard tripped or approval needed, 130 and 143 signal.
    ");
    assert_snapshot!(shown(&Workspace::new(), 0, &["run", "-h"]), @r"
    Recompute, and publish what differs

    Usage: trueup run [OPTIONS] <JOB>

    Arguments:
      <JOB>  The job file

    Options:
          --start <TIME>            From this time on: a date (midnight in the job's zone) or RFC 3339
          --end <TIME>              Up to, not including, this time
          --day <DATE>              One day in the job's zone: 2026-01-31
          --month <MONTH>           One month in the job's zone: 2026-01
          --last <DURATION>         The time until now: 12h, 3d, 2w
          --tenant <TENANT_ID>      Only this tenant
          --customer <CUSTOMER_ID>  Only this customer
          --meter <METER_ID>        Only this meter
          --snapshot <RUN_ID>       Read the same Kafka offsets as this run, over its range
          --incremental             Without a range: compute only what is new since the last run, and
                                    what depends on it
          --full                    Without a range: compute everything, whatever the job says
          --yes                     Publish even if the change is larger than the job's guard allows
          --allow-closed            Write over closed periods too
          --timings                 Show every step with its rows and seconds
          --output <OUTPUT>         How results are printed on stdout [default: text] [possible values:
                                    text, json]
          --threads <N>             Threads that read and aggregate [default: one a core]
          --environment <NAME>      Connections of environments/NAME.yaml beside the job [default:
                                    $TRUEUP_ENVIRONMENT]
      -v, --verbose...              More logs on stderr; twice for still more
      -q, --quiet                   No progress and no warnings on stderr
      -h, --help                    Print help (see more with '--help')
    ");
}

// --- exports into files ----------------------------------------------------------------------

#[test]
fn an_export_takes_the_place_of_a_file_or_leaves_it() {
    let workspace = published();
    let export = ["export", "job.yaml", "usage_windows", "--out", "out.csv"];
    workspace.write("out.csv", "old\n".repeat(10_000));
    assert_eq!(workspace.trueup(&export).code, 0);
    let whole = workspace.read("out.csv");
    assert_eq!((whole.lines().count(), whole.contains("old")), (8, false));
    let before = files(&workspace);
    // A disk that is full half way: no file may be longer than a part of the export.
    workspace.tamper("UPDATE usage_windows SET currency = hex(zeroblob(100000))");
    let full = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 200; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_trueup")])
        .args(export)
        .current_dir(workspace.path("."))
        .output()
        .unwrap();
    let message = String::from_utf8(full.stderr).unwrap();
    assert!(full.status.code() == Some(1) && message.contains("cannot write out.csv: File too large"), "{message}");
    assert_eq!(workspace.read("out.csv"), whole);
    // A row that cannot be read.
    workspace.tamper("UPDATE usage_windows SET currency = x'ff'");
    workspace.trueup(&export).fails_with(1, &["reading usage_windows"]);
    assert_eq!(workspace.read("out.csv"), whole);
    let left: Vec<_> = files(&workspace).difference(&before).filter(|name| !name.starts_with("trueup.db")).cloned().collect();
    assert_eq!(left, [""; 0]);
}

#[test]
fn an_export_into_a_pipe_is_written_to_it() {
    let workspace = published();
    let outcome = workspace.trueup(&["export", "job.yaml", "usage_windows", "--out", "/dev/stdout"]);
    assert_eq!((outcome.code, outcome.stdout.lines().count()), (0, 8), "{outcome:?}");
}
