//! What runs changed, who started them, and which dead letters they met.

use insta::assert_snapshot;
use serde_json::{Value, json};
use trueup::model::decimal_sum::DecimalSum;

use crate::support::{Workspace, normalised};

/// Two runs of the job of `trueup init`: the first, and one after a late event, a
/// repaired price and a repaired customer; then one that changes nothing.
fn audited() -> (Workspace, [Value; 3]) {
    let workspace = Workspace::of("init");
    workspace.write("job.yaml", workspace.read("job.yaml") + "guard: {max_changed_rows: \"1%\"}\n");
    let first = workspace.run(&[]);
    let late = json!({"tenant_id": "demo", "id": "late", "event_name": "api.call", "external_customer_id": "acme",
        "timestamp": "2026-01-01T09:30:00Z", "ingested_at": "2026-01-02T00:00:00Z", "properties": {"status": 200, "bytes": 40}});
    workspace.write(
        "events/late.ndjson",
        format!("{late}\n{}\n", late.to_string().replace("\"late\"", "\"odd\"").replace("40", "\"x\"")),
    );
    workspace.edit("prices.yaml", "unit_amount: \"0.000001\"", "unit_amount: \"0.000002\"");
    workspace.write("customers.csv", workspace.read("customers.csv") + "demo,cus_2,initech,,\n");
    let second = workspace.run(&["--yes"]);
    let third = workspace.run(&[]);
    (workspace, [first, second, third])
}

#[track_caller]
fn shown(workspace: &Workspace, arguments: &[&str]) -> String {
    let outcome = workspace.trueup(&[&["audit", "job.yaml"], arguments].concat());
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{outcome:?}");
    normalised(&outcome.stdout)
}

#[track_caller]
fn document(workspace: &Workspace, arguments: &[&str]) -> Value {
    workspace.trueup(&[&["audit", "job.yaml", "--output", "json"], arguments].concat()).json()
}

#[test]
fn the_last_run_that_changed_something_is_summed_up() {
    let (workspace, _) = audited();
    assert_snapshot!(shown(&workspace, &[]), @r"
    trueup audit my_usage: 1 run, 5 corrections
      run          <run> <time> run by <operator> trueup run, told --yes
      windows      0 inserted, 5 updated, 0 retracted
      cost         USD 0.003654 -> 0.027408  +0.023754
      periods      4 changed
      amount       USD 0.01 -> 0.04  +0.03
      dead letters 1 opened, 1 resolved

      by cause                                                 corrections    cost change
        late_event                                                       1      +0.02 USD
        late_event, price_changed                                        1   +0.00208 USD
        price_changed                                                    1   +0.00159 USD
        customer_changed, dead_letter_resolved, price_changed            1  +0.000084 USD
        customer_changed, dead_letter_resolved                           1  unchanged USD

      by customer     corrections    cost change
        demo / cus_1            3   +0.02367 USD
        demo / cus_2            2  +0.000084 USD

      by meter      corrections    cost change
        api_calls             2      +0.02 USD
        bytes_sent            3  +0.003754 USD

      largest changes
                customer  window                                                             quantity  becomes    cost change  cause
        update  cus_1     demo / sub_1 / api_calls / standard_calls / 2026-01-01T09:00:00Z          2        4      +0.02 USD  late_event
        update  cus_1     demo / sub_1 / bytes_sent / standard_bytes / 2026-01-01T09:00:00Z      2000     2040   +0.00208 USD  late_event, price_changed
        update  cus_1     demo / sub_1 / bytes_sent / standard_bytes / 2026-01-01T10:00:00Z      1590     1590   +0.00159 USD  price_changed
        update  cus_2     demo / sub_2 / bytes_sent / standard_bytes / 2026-01-01T11:00:00Z        64       74  +0.000084 USD  customer_changed, dead_letter_resolved, price_changed
        update  cus_2     demo / sub_2 / api_calls / standard_calls / 2026-01-01T11:00:00Z          1        2  unchanged USD  customer_changed, dead_letter_resolved

      dead letters opened
        event       time                  meter       reason
        demo / odd  2026-01-01T09:30:00Z  bytes_sent  invalid_property

      dead letters resolved
        event      time                  meter  reason
        demo / e7  2026-01-01T11:30:00Z  -      customer_not_found
    ");
}

#[test]
fn runs_are_chosen_by_id_time_and_number() {
    let (workspace, runs) = audited();
    let ids = |arguments: &[&str]| {
        let document = document(&workspace, arguments);
        document["runs"].as_array().unwrap().iter().map(|run| run["run_id"].clone()).collect::<Vec<_>>()
    };
    let [first, second, third] = runs.each_ref().map(|run| run["run_id"].clone());
    assert_eq!(ids(&[]), std::slice::from_ref(&second));
    assert_eq!(ids(&["--run", first.as_str().unwrap()]), std::slice::from_ref(&first));
    assert_eq!(ids(&["--last", "2"]), [second.clone(), third.clone()]);
    assert_eq!(ids(&["--last", "9"]), [first.clone(), second, third]);
    assert_eq!(ids(&["--start", "2026-01-01"]).len(), 3);
    assert_eq!(ids(&["--end", "2026-01-01"]), [""; 0]);
    let finished = document(&workspace, &["--run", first.as_str().unwrap()])["runs"][0]["finished_at"].clone();
    assert_eq!(ids(&["--end", finished.as_str().unwrap()]), [""; 0]);
    assert!(shown(&workspace, &["--end", "2026-01-01"]).starts_with("no run of job my_usage finished in that time"));
    assert!(shown(&workspace, &["--last", "1"]).starts_with("trueup audit my_usage: 1 run, nothing changed\n"));
    workspace.trueup(&["audit", "job.yaml", "--run", "x"]).fails_with(2, &["--run x: job my_usage has no such run"]);
    workspace.trueup(&["audit", "job.yaml", "--run", "x", "--last", "1"]).fails_with(2, &["cannot be used with"]);
    workspace.trueup(&["audit", "job.yaml", "--start", "2026-02-01", "--end", "2026-01-01"]).fails_with(2, &["is empty"]);
    workspace.trueup(&["audit", "job.yaml", "--start", "soon"]).fails_with(2, &["--start: `soon` is not"]);
}

#[test]
fn totals_and_groups_are_those_of_the_ledger() {
    let (workspace, runs) = audited();
    let second = runs[1]["run_id"].as_str().unwrap();
    let audit = document(&workspace, &["--run", second]);
    let (rows, planned) = (&audit["rows"], &runs[1]["rows"]);
    assert_eq!(
        [&rows["inserted"], &rows["updated"], &rows["retracted"]],
        [&planned["inserted"], &planned["updated"], &planned["retracted"]]
    );
    let ledger = workspace.query(&format!("SELECT * FROM corrections WHERE run_id = '{second}'"));
    assert_eq!(audit["changes"].as_array().unwrap().len(), ledger.len());
    for groups in ["by_cause", "by_customer", "by_meter"] {
        let groups = audit[groups].as_array().unwrap();
        assert_eq!(groups.iter().map(|group| group["corrections"].as_u64().unwrap()).sum::<u64>(), ledger.len() as u64);
    }
    // Over all runs, the totals go from nothing to what is stored, however often a row changed.
    let all = document(&workspace, &["--last", "3"]);
    let mut stored = DecimalSum::default();
    workspace.query("SELECT cost FROM usage_windows").iter().for_each(|row| stored.add(row["cost"].parse().unwrap()));
    let stored = stored.total().unwrap().to_string();
    assert_eq!(all["totals"], json!([{"currency": "USD", "before": "0", "after": stored, "change": stored}]));
    assert_eq!(all["dead_letters"]["opened"].as_array().unwrap().len(), 2);
    assert_eq!(all["dead_letters"]["resolved"][0]["resolved_run_id"], second);
}

#[test]
fn runs_say_who_started_them_and_what_they_were_told() {
    let (workspace, _) = audited();
    let rows = workspace.query("SELECT started_by, overrides FROM runs ORDER BY version");
    let started_by = format!("{} trueup run", trueup::config::operator());
    assert!(rows.iter().all(|row| row["started_by"] == started_by), "{rows:?}");
    assert_eq!(rows.iter().map(|row| row["overrides"].as_str()).collect::<Vec<_>>(), ["[]", r#"["guard"]"#, "[]"]);
    // Part of the chain: nobody can claim later that it was somebody else.
    workspace.tamper("UPDATE runs SET started_by = 'nobody@nowhere trueup run'");
    let verified = workspace.trueup(&["verify", "job.yaml"]);
    assert_eq!(verified.code, 3, "{verified:?}");
}

#[test]
fn adjustments_of_closed_periods_are_told_apart() {
    let (workspace, _) = audited();
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01", "--customer", "cus_1", "--output", "json"]).json();
    assert!(shown(&workspace, &[]).contains("close by <operator> trueup close"));
    let late = json!({"tenant_id": "demo", "id": "later", "event_name": "api.call", "external_customer_id": "acme",
        "timestamp": "2026-01-01T09:31:00Z", "ingested_at": "2026-01-03T00:00:00Z", "properties": {"status": 200, "bytes": 1000}});
    workspace.write("events/later.ndjson", late.to_string());
    workspace.run(&["--yes"]);
    assert_snapshot!(shown(&workspace, &[]), @r"
    trueup audit my_usage: 1 run, 2 corrections
      run          <run> <time> run by <operator> trueup run, told --yes
      windows      0 inserted, 0 updated, 0 retracted
      periods      0 changed
      adjusted     2 in closed periods, USD +0.012
                   2 bills of closed periods
                   USD 0.04 -> 0.05  +0.01
      dead letters 0 opened, 0 resolved

      closed periods: recorded, the rows stay as invoiced
                customer  window                                                             quantity  becomes  cost change  cause
        adjust  cus_1     demo / sub_1 / api_calls / standard_calls / 2026-01-01T09:00:00Z          4        5    +0.01 USD  late_event
        adjust  cus_1     demo / sub_1 / bytes_sent / standard_bytes / 2026-01-01T09:00:00Z      2040     3040   +0.002 USD  late_event
    ");
}

#[test]
fn a_job_that_has_not_run_has_nothing_to_audit() {
    let workspace = Workspace::of("init");
    assert_snapshot!(shown(&workspace, &[]), @"job my_usage has not run yet: trueup run job.yaml");
    assert_eq!(document(&workspace, &[]), json!({"schema": "trueup.audit/1", "job": "my_usage", "runs": []}));
    workspace.trueup(&["audit", "job.yaml", "--run", "x"]).fails_with(2, &["--run x: job my_usage has no such run"]);
}
