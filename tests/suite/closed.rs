//! Closed periods: what differs is recorded once, whatever a run covers, and what was closed stays closed.

use serde_json::json;

use crate::corrections::{send, tables, world};

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
