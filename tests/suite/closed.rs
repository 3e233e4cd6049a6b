//! Closed periods: what differs is recorded once, whatever a run covers, and what was closed stays closed.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::corrections::{send, tables, world};
use crate::support::{Row, Workspace};

/// A range changes the cost of later windows of its billing period.
#[test]
fn a_range_records_an_adjustment_once() {
    let workspace = world();
    workspace.run(&[]);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]).code, 0);
    let before = tables(&workspace);
    // Late within the range, and late out of it.
    send(&workspace, "late", &[("e", "x1", "2026-01-06", 4), ("f", "x1", "2026-01-20", 1)]);
    let range = ["--day", "2026-01-06"];
    let run = workspace.run(&range);
    assert_eq!(run["rows"]["adjusted"], 1, "{run}");
    for _ in 0..2 {
        assert_eq!(workspace.run(&range)["rows"]["adjusted"], 0);
    }
    assert_eq!(workspace.run(&[])["rows"]["adjusted"], 1);
    for range in [&range[..], &[], &["--day", "2026-01-20"]] {
        assert_eq!(workspace.run(range)["rows"]["adjusted"], 0, "{range:?}");
    }
    assert_eq!(tables(&workspace), before);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

/// A price that changes moves windows before the range, too.
#[test]
fn a_price_that_changed_is_an_adjustment_once() {
    let workspace = world();
    workspace.run(&[]);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    workspace.edit("prices.yaml", "unit_amount: \"1\"", "unit_amount: \"2\"");
    let range = ["--day", "2026-01-20"];
    assert_eq!(workspace.run(&range)["rows"]["adjusted"], 3, "all windows of the bills");
    assert_eq!(workspace.run(&range)["rows"]["adjusted"], 0);
}

#[test]
fn usage_that_moves_to_another_customer_is_adjusted_for_both() {
    let workspace = world();
    workspace.run(&[]);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    workspace.edit("customers.csv", "t,c2,x2", "t,c3,x2");
    workspace.edit("subscriptions.csv", "t,s2,c2", "t,s2,c3");
    let run = workspace.run(&[]);
    assert_eq!(run["rows"]["adjusted"], 2, "{run}");
    assert_eq!(workspace.run(&[])["rows"]["adjusted"], 0);
    let sql = "SELECT customer_id, cost_before AS was, cost_after AS is_now FROM corrections WHERE kind = 'adjust' ORDER BY correction_id";
    let rows: Vec<_> =
        workspace.query(sql).iter().map(|row| [&row["customer_id"], &row["was"], &row["is_now"]].map(String::clone)).collect();
    assert_eq!(rows, [["c2", "3", ""], ["c3", "", "3"]]);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

/// A period is closed as a whole: what takes the place of its rows is closed too.
#[test]
fn a_new_price_does_not_open_a_period() {
    let workspace = world();
    workspace.run(&[]);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    workspace.edit("prices.yaml", "price_id: p", "price_id: q");
    workspace.run(&["--allow-closed"]);
    let open =
        workspace.query("SELECT count(*) AS n FROM usage_periods WHERE period_start LIKE '2026-01%' AND closed_at IS NULL");
    assert_eq!(open[0]["n"], "0");
    let before = tables(&workspace);
    send(&workspace, "late", &[("e", "x1", "2026-01-06", 4)]);
    assert_eq!(workspace.run(&[])["rows"]["adjusted"], 2);
    assert_eq!(tables(&workspace), before);
}

/// Months and days are those of the subscriptions, not of the job.
#[test]
fn a_month_is_closed_in_the_zone_of_each_subscription() {
    let workspace = world();
    workspace.write(
        "subscriptions.csv",
        "tenant_id,subscription_id,customer_id,plan_id,currency,billing_period,started_at,timezone\n\
         t,s1,c1,pro,USD,month,2025-01-01,Asia/Tokyo\nt,s2,c2,pro,USD,month,2025-01-01,America/New_York\n",
    );
    workspace.run(&[]);
    let starts = |period: &str| {
        let closed = workspace.trueup(&["close", "job.yaml", "--period", period, "--output", "json"]).json();
        let starts = closed["periods"].as_array().unwrap().iter().map(|row| row["period_start"].clone()).collect::<Vec<_>>();
        json!(starts)
    };
    assert_eq!(starts("2026-01"), json!(["2025-12-31T15:00:00Z", "2026-01-01T05:00:00Z"]));
    assert_eq!(starts("2026-02-01"), json!(["2026-01-31T15:00:00Z", "2026-02-01T05:00:00Z"]));
    assert_eq!(starts("2026-02"), json!([]), "closed already");
    workspace.trueup(&["close", "job.yaml", "--period", "2026-03"]).fails_with(2, &["no stored billing period"]);
}

/// What is on a bill and in no window: a minimum that was raised, and a fee that a late event does not change.
#[test]
fn bills_of_closed_periods_are_adjusted_too() {
    let workspace = world();
    workspace.run(&[]);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    let before = tables(&workspace);
    // c2 used 3 and paid the minimum of 5: what is late costs nothing more.
    send(&workspace, "late", &[("e", "x2", "2026-01-11", 1)]);
    let run = workspace.run(&[]);
    assert_eq!((&run["rows"]["adjusted"], &run["periods"]["adjusted"]), (&json!(1), &json!(1)), "{run}");
    let amounts = |run: &serde_json::Value| run["periods"]["adjusted_amounts"].clone();
    assert_eq!(amounts(&run), json!([{"currency": "USD", "amount_before": "5", "amount_after": "5"}]));
    workspace.edit("prices.yaml", "minimum_amount: \"5\"", "minimum_amount: \"7\"");
    let plan = workspace.trueup(&["plan", "job.yaml"]).stdout;
    assert!(plan.contains("closed       1 bill of closed periods, recorded as adjustments"), "{plan}");
    let run = workspace.run(&["--yes"]);
    assert_eq!(amounts(&run), json!([{"currency": "USD", "amount_before": "5", "amount_after": "7"}]));
    let audit = workspace.trueup(&["audit", "job.yaml"]).stdout;
    assert!(audit.contains("1 bill of closed periods") && audit.contains("USD 5 -> 7  +2"), "{audit}");
    for range in [&[][..], &["--month", "2026-01"], &["--incremental"]] {
        let run = workspace.run(range);
        assert_eq!((&run["rows"]["adjusted"], &run["periods"]["adjusted"]), (&json!(0), &json!(0)), "{run}");
        assert_eq!(workspace.trueup(&[&["verify", "job.yaml"], &range[..range.len() / 2 * 2]].concat()).code, 0);
    }
    let explained =
        workspace.trueup(&["explain", "job.yaml", "--subscription", "s2", "--meter", "calls", "--period", "2026-01-05"]);
    assert!(explained.stdout.contains("adjust"), "{}", explained.stdout);
    // Closed again without a run in between, it is not recorded again.
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01", "--reopen"]);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    assert_eq!(workspace.run(&[])["periods"]["adjusted"], 0);
    // Right again: taken back.
    workspace.edit("prices.yaml", "minimum_amount: \"7\"", "minimum_amount: \"5\"");
    std::fs::remove_file(workspace.path("events/late.ndjson")).unwrap();
    let run = workspace.run(&["--yes"]);
    assert_eq!(
        (&run["rows"]["adjusted"], amounts(&run)),
        (&json!(1), json!([{"currency": "USD", "amount_before": "7", "amount_after": "5"}]))
    );
    let without_time = |mut rows: Vec<crate::support::Row>| {
        rows.iter_mut().for_each(|row| {
            row.remove("closed_at");
        });
        rows
    };
    assert_eq!(tables(&workspace).map(without_time), before.map(without_time));
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

/// Key columns and what a row says.
type Said = BTreeMap<String, String>;

const KEY: &str = "subscription_id || ' ' || price_id || ' ' || period_start";

/// What the windows and bills should be as the store has it: the rows, with the adjustments of
/// those that did not change later.
fn effective(workspace: &Workspace) -> [Said; 2] {
    let rows = |sql: &str| {
        workspace.query(sql).into_iter().map(|mut row| ["key", "kind", "says"].map(|name| row.remove(name).unwrap_or_default()))
    };
    let overlay = |table: &str, ledger: &str| {
        let mut said: Said = rows(table).map(|[key, _, says]| (key, says)).collect();
        let mut adjusted = Said::new();
        for [key, kind, says] in rows(ledger) {
            if kind == "adjust" {
                adjusted.insert(key, says)
            } else {
                adjusted.remove(&key)
            };
        }
        said.extend(adjusted);
        said.retain(|_, says| !says.is_empty());
        said
    };
    let windows = overlay(
        &format!(
            "SELECT {KEY} || ' ' || window_start AS key, customer_id || ' ' || quantity || ' ' || cost || ' ' || event_count AS says FROM usage_windows"
        ),
        &format!(
            "SELECT {KEY} || ' ' || window_start AS key, kind, coalesce(customer_id || ' ' || quantity_after || ' ' || cost_after || ' ' || \
             event_count_after, '') AS says FROM corrections ORDER BY sequence"
        ),
    );
    let says = |row: &str| {
        let fields = ["customer_id", "quantity", "cost", "minimum_adjustment", "amount"];
        fields.map(|field| format!("json_extract({row}, '$.{field}')")).join(" || ' ' || ")
    };
    let periods = overlay(
        &format!(
            "SELECT {KEY} AS key, customer_id || ' ' || quantity || ' ' || cost || ' ' || minimum_adjustment || ' ' || amount AS says FROM usage_periods"
        ),
        &format!(
            "SELECT {KEY} AS key, kind, coalesce({}, '') AS says FROM period_corrections WHERE kind = 'adjust' OR \
             coalesce(json_remove(nullif(row_before, ''), '$.closed_at'), '') <> coalesce(json_remove(nullif(row_after, ''), '$.closed_at'), '') \
             ORDER BY rowid",
            says("nullif(row_after, '')")
        ),
    );
    [windows, periods]
}

/// The rows of closed periods.
fn closed_rows(workspace: &Workspace) -> Vec<Row> {
    workspace.query(
        "SELECT w.* FROM usage_windows AS w WHERE EXISTS (SELECT 1 FROM usage_periods AS p WHERE p.subscription_id = w.subscription_id \
         AND p.period_start = w.period_start AND p.closed_at IS NOT NULL)",
    )
}

/// Whatever happens around them, closed periods keep their rows, and what is recorded of them
/// makes up the difference to what a fresh store has, once.
#[test]
fn made_up_histories_of_closed_periods() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, count) = (number("TRUEUP_TEST_FIRST_HISTORY").unwrap_or(1), number("TRUEUP_TEST_HISTORIES").unwrap_or(12));
    for seed in first..first + count {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut choose = |among: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % among
        };
        let workspace = world();
        workspace.write("customers.csv", "tenant_id,customer_id,external_customer_id\nt,c1,x1\nt,c2,x2\nt,c3,y\n");
        workspace.run(&["--full"]);
        let mut said = Vec::new();
        let with_ranges = seed % 2 == 0;
        for step in 0..12 {
            let month = format!("2026-0{}", choose(2) + 1);
            let day = format!("{month}-{:02}", choose(28) + 1);
            let before = closed_rows(&workspace);
            let what = choose(11);
            match what {
                0..=2 => {
                    let (id, customer) = (format!("n{step}"), ["x1", "x2"][usize::from(choose(2) == 0)]);
                    send(&workspace, &id, &[(&id, customer, &day, i64::try_from(choose(9)).unwrap() - 1)]);
                }
                3 => {
                    let id = ["a", "b", "c", "d"][usize::try_from(choose(4)).unwrap()];
                    workspace.write(&format!("events/void{step}.ndjson"), format!("{{\"tenant_id\":\"t\",\"id\":\"{id}\",\"deleted\":true}}\n"));
                }
                4 => workspace.write(
                    "prices.yaml",
                    format!(
                        "prices: [{{price_id: p{}, plan_id: pro, meter_id: calls, currency: USD, model: graduated, minimum_amount: \"{}\", \
                         tiers: [{{up_to: \"10\", unit_amount: \"{}\"}}, {{up_to: null, unit_amount: \"0.5\"}}]}}]\n",
                        choose(2),
                        choose(3) * 4,
                        choose(3)
                    ),
                ),
                5 => {
                    let (owner, other) = if choose(2) == 0 { ("c2", "c3") } else { ("c3", "c2") };
                    workspace.write(
                        "customers.csv",
                        format!("tenant_id,customer_id,external_customer_id\nt,c1,x1\nt,{owner},x2\nt,{other},y\n"),
                    );
                    workspace.write(
                        "subscriptions.csv",
                        format!(
                            "tenant_id,subscription_id,customer_id,plan_id,currency,billing_period,started_at\n\
                             t,s1,c1,pro,USD,month,2025-01-01\nt,s2,{owner},pro,USD,month,2025-01-01\n"
                        ),
                    );
                }
                6 | 7 => {
                    workspace.trueup(&["close", "job.yaml", "--period", &month]);
                }
                8 => {
                    workspace.trueup(&["close", "job.yaml", "--period", &month, "--reopen"]);
                }
                _ => {
                    let runs = workspace.query("SELECT run_id FROM runs ORDER BY version DESC");
                    let run = &runs[usize::try_from(choose(runs.len().min(4) as u64)).unwrap()]["run_id"];
                    let reverted = workspace.trueup(&["revert", "job.yaml", "--run", run]);
                    assert!([0, 2, 8].contains(&reverted.code), "{reverted:?}");
                    let bills = "SELECT p.cost AS bill, CAST(total(w.cost) AS TEXT) AS windows FROM usage_periods AS p LEFT JOIN usage_windows AS w \
                                 USING (job, subscription_id, price_id, period_start) GROUP BY p.subscription_id, p.price_id, p.period_start";
                    // A range prices whole periods, but stores its own windows alone.
                    for row in workspace.query(bills).iter().filter(|_| !with_ranges) {
                        let [bill, windows] = ["bill", "windows"].map(|name| row[name].parse::<f64>().unwrap());
                        assert!((bill - windows).abs() < 1e-9, "seed {seed}: {said:#?}: {row:?}");
                    }
                    let verified: Value = serde_json::from_str(&workspace.trueup(&["verify", "job.yaml", "--output", "json"]).stdout).unwrap();
                    assert_eq!(verified["ledger"], json!([]), "seed {seed}: {said:#?}");
                }
            }
            let mode: &[&str] = match choose(5) {
                0 => &["--full", "--yes"],
                1 => &["--incremental", "--yes"],
                2 if with_ranges => &["--day", &day, "--yes"],
                3 if with_ranges => &["--month", &month, "--yes"],
                _ => &["--customer", ["c1", "c2", "c3"][usize::try_from(choose(3)).unwrap()], "--yes"],
            };
            said.push(format!("{what} {day} {mode:?}"));
            workspace.run(mode);
            if what < 8 {
                let after = closed_rows(&workspace);
                assert!(before.iter().all(|row| after.contains(row)), "seed {seed}: {said:#?}");
            }
            let again = workspace.run(mode);
            let changes = ["inserted", "updated", "retracted", "adjusted"].map(|name| again["rows"][name].as_u64().unwrap());
            assert_eq!((changes, again["periods"]["adjusted"].as_u64()), ([0; 4], Some(0)), "seed {seed}: {said:#?}");
            if choose(3) == 0 {
                workspace.run(&["--full", "--yes"]);
                let fresh = Workspace::new();
                fresh.overlay(&workspace.path(""));
                std::fs::remove_file(fresh.path("trueup.db")).unwrap();
                fresh.run(&["--full"]);
                assert_eq!(effective(&workspace), effective(&fresh), "seed {seed}: {said:#?}");
                let verified = workspace.trueup(&["verify", "job.yaml"]);
                assert_eq!(verified.code, 0, "seed {seed}: {said:#?}: {}", verified.stdout);
            }
        }
    }
}

/// What a run of one customer records of usage that moved, later runs know, whoever they are of.
#[test]
fn runs_of_one_customer_do_not_record_twice_what_moved() {
    let workspace = world();
    workspace.write("customers.csv", "tenant_id,customer_id,external_customer_id\nt,c1,x1\nt,c2,x2\nt,c3,y\n");
    workspace.run(&[]);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    send(&workspace, "late", &[("e", "x2", "2026-01-15", 4)]);
    workspace.run(&[]);
    workspace.write("customers.csv", "tenant_id,customer_id,external_customer_id\nt,c1,x1\nt,c2,y\nt,c3,x2\n");
    workspace.edit("subscriptions.csv", "t,s2,c2", "t,s2,c3");
    let adjusted = |customer: &str| {
        let run = if customer.is_empty() { workspace.run(&["--yes"]) } else { workspace.run(&["--customer", customer, "--yes"]) };
        (run["rows"]["adjusted"].as_u64().unwrap(), run["periods"]["adjusted"].as_u64().unwrap())
    };
    assert_eq!(["c3", "", "c2", "", "c3"].map(adjusted), [(4, 1), (0, 0), (0, 0), (0, 0), (0, 0)]);
    let sums = "SELECT customer_id, CAST(total(cost_after) - total(cost_before) AS TEXT) AS sum FROM corrections WHERE kind = 'adjust' GROUP BY 1";
    let sums: Vec<_> = workspace.query(sums).iter().map(|row| (row["customer_id"].clone(), row["sum"].clone())).collect();
    assert_eq!(sums, [("c2".to_owned(), "-3.0".to_owned()), ("c3".to_owned(), "7.0".to_owned())]);
}

/// A window that has not settled is not taken back from a closed period.
#[test]
fn what_has_not_settled_is_adjusted_once() {
    let workspace = world();
    workspace.edit("job.yaml", "window: day", "window: hour\nlateness: {settle: 15m}");
    workspace.edit("meters.yaml", "aggregation: sum", "window: day, aggregation: sum");
    let today = chrono::Utc::now().format("%Y-%m-%d").to_string();
    send(&workspace, "today", &[("t1", "x2", &format!("{}-01", &today.rsplit_once('-').unwrap().0), 1)]);
    workspace.run(&["--full"]);
    workspace.trueup(&["close", "job.yaml", "--period", &today]);
    let line = json!({"tenant_id": "t", "id": "now", "event_name": "call", "external_customer_id": "x1",
        "timestamp": format!("{today}T00:00:01Z"), "properties": {"n": 4}});
    workspace.write("events/now.ndjson", line.to_string());
    let mut adjusted = Vec::new();
    for mode in [&["--day", &today][..], &[], &["--day", &today], &[]] {
        adjusted.push(workspace.run(mode)["rows"]["adjusted"].as_u64().unwrap());
    }
    assert!(adjusted.iter().sum::<u64>() <= 1, "{adjusted:?}");
}
