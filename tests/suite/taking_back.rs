//! Taking a run back where others came after it: bills add up to their windows, what is closed stays closed.

use crate::corrections::{last_run, send, tables, world};
use crate::support::Workspace;

/// The world of corrections with a price that has neither minimum nor tiers.
fn plain_world() -> Workspace {
    let workspace = world();
    workspace.write(
        "prices.yaml",
        "prices: [{price_id: p, plan_id: pro, meter_id: calls, currency: USD, model: per_unit, unit_amount: \"1.5\"}]\n",
    );
    workspace
}

/// Every bill is what its windows cost.
#[track_caller]
fn adds_up(workspace: &Workspace) {
    let sql = "SELECT p.subscription_id, p.period_start, p.quantity, p.cost, p.amount, CAST(sum(w.quantity) AS TEXT) AS of_windows, CAST(sum(w.cost) AS TEXT) AS cost_of_windows \
               FROM usage_periods p LEFT JOIN usage_windows w USING (job, tenant_id, subscription_id, meter_id, price_id, \
               dimensions, period_start) GROUP BY 1, 2, 3, 4, 5";
    for row in workspace.query(sql) {
        let number = |column: &str| row[column].parse::<f64>().unwrap();
        assert_eq!((number("quantity"), number("cost")), (number("of_windows"), number("cost_of_windows")), "{row:?}");
        assert_eq!(number("cost"), number("amount"), "{row:?}");
    }
}

fn revert(workspace: &Workspace, run: &str, options: &[&str]) -> crate::support::Outcome {
    workspace.trueup(&[&["revert", "job.yaml", "--run", run], options].concat())
}

#[test]
fn what_later_runs_made_of_a_bill_stays() {
    let workspace = plain_world();
    workspace.run(&[]);
    send(&workspace, "late", &[("e", "x1", "2026-01-06", 1), ("f", "x1", "2026-02-03", 7), ("g", "x2", "2026-03-03", 7)]);
    workspace.run(&[]);
    let middle = last_run(&workspace);
    send(&workspace, "later", &[("h", "x1", "2026-01-21", 2), ("i", "x2", "2026-03-04", 1)]);
    workspace.run(&[]);
    let reverted = revert(&workspace, &middle, &[]);
    assert_eq!(reverted.code, 0, "{reverted:?}");
    adds_up(&workspace);
    let january =
        workspace.query("SELECT quantity, cost FROM usage_periods WHERE subscription_id = 's1' AND period_start LIKE '2026-01%'");
    assert_eq!((january[0]["quantity"].as_str(), january[0]["cost"].as_str()), ("16", "24"), "6 + 8 + 2");
    let march = workspace.query("SELECT quantity FROM usage_periods WHERE period_start LIKE '2026-03%'");
    assert_eq!(march[0]["quantity"], "1");
    // The next run finds the events again.
    assert_eq!(workspace.run(&[])["rows"]["inserted"], 3);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

/// With tiers and a minimum, nothing but a run can tell what is left of a bill.
#[test]
fn a_bill_that_nobody_can_tell_is_a_conflict() {
    let workspace = world();
    workspace.run(&[]);
    send(&workspace, "late", &[("e", "x2", "2026-01-06", 1)]);
    workspace.run(&[]);
    let middle = last_run(&workspace);
    send(&workspace, "later", &[("f", "x2", "2026-01-21", 1)]);
    workspace.run(&[]);
    let before = workspace.dump();
    revert(&workspace, &middle, &[])
        .fails_with(8, &["1 of its 2 rows were changed by later runs", "period 2026-01-01", "--force"]);
    assert_eq!(workspace.dump(), before);
    assert_eq!(revert(&workspace, &middle, &["--force"]).code, 0);
    workspace.run(&["--yes"]);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

#[test]
fn what_was_closed_meanwhile_stays_closed() {
    let workspace = plain_world();
    workspace.run(&[]);
    send(&workspace, "late", &[("e", "x1", "2026-01-05", 4)]);
    workspace.run(&[]);
    let run = last_run(&workspace);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    assert_eq!(revert(&workspace, &run, &["--allow-closed"]).code, 0);
    adds_up(&workspace);
    let january = workspace
        .query("SELECT quantity, closed_at FROM usage_periods WHERE subscription_id = 's1' AND period_start LIKE '2026-01%'");
    assert_eq!(january[0]["quantity"], "14");
    assert_ne!(january[0]["closed_at"], "");
}

/// An event that moved within its period left the bill as it was, but not what it is made of.
#[test]
fn windows_of_a_closed_bill_are_closed_too() {
    let workspace = plain_world();
    workspace.run(&[]);
    let move_to = |day: &str| {
        let line = format!(
            "{{\"tenant_id\":\"t\",\"id\":\"b\",\"event_name\":\"call\",\"external_customer_id\":\"x1\",\
             \"timestamp\":\"{day}T12:00:00Z\",\"ingested_at\":\"2026-01-30T13:00:00Z\",\"properties\":{{\"n\":8}}}}\n"
        );
        workspace.write("events/moved.ndjson", line);
    };
    move_to("2026-01-22");
    workspace.run(&[]);
    let run = last_run(&workspace);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    let before = tables(&workspace);
    revert(&workspace, &run, &[]).fails_with(8, &["is closed", "--allow-closed"]);
    assert_eq!(tables(&workspace), before);
}

#[test]
fn opening_again_is_taken_back_without_what_happened_since() {
    let workspace = plain_world();
    workspace.run(&[]);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-01", "--reopen"]).code, 0);
    let opened = last_run(&workspace);
    send(&workspace, "late", &[("e", "x1", "2026-01-05", 4)]);
    workspace.run(&[]);
    assert_eq!(revert(&workspace, &opened, &[]).code, 0);
    adds_up(&workspace);
    let january = workspace
        .query("SELECT quantity, closed_at FROM usage_periods WHERE subscription_id = 's1' AND period_start LIKE '2026-01%'");
    assert_eq!(january[0]["quantity"], "18");
    assert_ne!(january[0]["closed_at"], "");
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    // Taken back already.
    revert(&workspace, &opened, &["--allow-closed"]).fails_with(8, &["changed by later runs"]);
    revert(&workspace, &opened, &["--allow-closed", "--force"]).fails_with(2, &["is as it was before it already"]);
}

/// With tiers, free units or a maximum, a bill is not the sum of what runs added to it.
#[test]
fn a_bill_that_is_not_linear_is_a_conflict() {
    for price in [
        "model: graduated, tiers: [{up_to: \"10\", unit_amount: \"1\"}, {up_to: null, unit_amount: \"0.5\"}]",
        "model: per_unit, unit_amount: \"1\", free_units: \"10\"",
        "model: per_unit, unit_amount: \"1\", maximum_amount: \"10\"",
    ] {
        let workspace = plain_world();
        workspace
            .write("prices.yaml", format!("prices: [{{price_id: p, plan_id: pro, meter_id: calls, currency: USD, {price}}}]\n"));
        std::fs::remove_file(workspace.path("events/first.ndjson")).unwrap();
        for (id, day, n) in [("a", "2026-01-05", 8), ("b", "2026-01-06", 4), ("c", "2026-01-07", 2)] {
            send(&workspace, id, &[(id, "x1", day, n)]);
            workspace.run(&[]);
        }
        let runs = workspace.query("SELECT run_id FROM runs ORDER BY version");
        revert(&workspace, &runs[1]["run_id"], &[]).fails_with(8, &["changed by later runs"]);
        assert_eq!(revert(&workspace, &runs[1]["run_id"], &["--force"]).code, 0, "{price}");
        let sums = "SELECT p.quantity AS bill, CAST(sum(w.quantity) AS TEXT) AS windows, p.cost AS costs, CAST(sum(w.cost) AS TEXT) AS cost \
                    FROM usage_periods AS p JOIN usage_windows AS w USING (subscription_id, period_start)";
        let number = |name: &str| workspace.query(sums)[0][name].parse::<f64>().unwrap();
        assert_eq!((number("bill"), number("costs")), (number("windows"), number("cost")), "{price}");
        workspace.run(&["--yes"]);
        assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    }
}

#[test]
fn what_lies_beyond_the_horizon_is_not_taken_back_unless_told() {
    let workspace = plain_world();
    workspace.edit("job.yaml", "window: day", "window: day\nlateness: {horizon: 1d}");
    workspace.run(&[]);
    let run = last_run(&workspace);
    revert(&workspace, &run, &[]).fails_with(8, &["is closed", "--allow-closed"]);
    assert_eq!(revert(&workspace, &run, &["--allow-closed"]).code, 0);
}

/// A period is closed as a whole, and so it is opened, whatever became of its rows.
#[test]
fn closing_is_taken_back_as_a_whole() {
    let workspace = plain_world();
    workspace.run(&[]);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    let closing = last_run(&workspace);
    workspace.edit("prices.yaml", "price_id: p", "price_id: q");
    workspace.run(&["--allow-closed", "--yes"]);
    // The rows that were closed are gone: those in their place are of the same periods.
    assert_eq!(revert(&workspace, &closing, &["--allow-closed"]).code, 0);
    let rows = "SELECT price_id, count(*) AS rows, count(closed_at) AS closed FROM usage_periods WHERE period_start LIKE '2026-01%' GROUP BY 1";
    let found: Vec<_> =
        workspace.query(rows).iter().map(|row| [&row["price_id"], &row["rows"], &row["closed"]].map(String::clone)).collect();
    assert_eq!(found, [["q", "2", "0"]]);
    adds_up(&workspace);
    // Taken back in turn, they are closed again.
    let opening = last_run(&workspace);
    assert_eq!(revert(&workspace, &opening, &[]).code, 0);
    assert_eq!(workspace.query(rows)[0]["closed"], "2");
    // Who closed once more in between is asked.
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01", "--reopen"]);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    let twice = last_run(&workspace);
    revert(&workspace, &closing, &["--allow-closed"]).fails_with(8, &["changed by later runs"]);
    assert_eq!(revert(&workspace, &twice, &["--allow-closed"]).code, 0);
    assert_eq!(workspace.query(rows)[0]["closed"], "0");
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

/// A row that comes back is open where its period is by now.
#[test]
fn what_comes_back_is_closed_as_its_period_is() {
    let workspace = plain_world();
    workspace.run(&[]);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01"]);
    workspace.edit("prices.yaml", "price_id: p", "price_id: q");
    workspace.run(&["--allow-closed", "--yes"]);
    let run = last_run(&workspace);
    workspace.trueup(&["close", "job.yaml", "--period", "2026-01", "--reopen"]);
    assert_eq!(revert(&workspace, &run, &["--force"]).code, 0);
    let rows = "SELECT price_id, count(closed_at) AS closed FROM usage_periods WHERE period_start LIKE '2026-01%' GROUP BY 1";
    assert_eq!(
        workspace.query(rows)[0],
        crate::support::Row::from([("price_id".into(), "p".into()), ("closed".into(), "0".into())])
    );
}

/// What a run that was taken back had found is found again, for the same reasons.
#[test]
fn causes_are_those_of_before() {
    let workspace = plain_world();
    let causes = || {
        let sql = format!(
            "SELECT kind, causes, count(*) AS n FROM corrections WHERE run_id = '{}' GROUP BY 1, 2 ORDER BY 1, 2",
            last_run(&workspace)
        );
        workspace.query(&sql).iter().map(|row| format!("{} {} {}", row["n"], row["kind"], row["causes"])).collect::<Vec<_>>()
    };
    let again = || {
        let (run, before) = (last_run(&workspace), causes());
        assert_eq!(revert(&workspace, &run, &[]).code, 0);
        workspace.run(&["--yes"]);
        assert_eq!(causes(), before);
        assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
        // Restored and taken back again, it is as if nobody had restored it.
        let (run, before) = (last_run(&workspace), tables(&workspace));
        assert_eq!(revert(&workspace, &run, &[]).code, 0);
        assert_eq!(revert(&workspace, &last_run(&workspace), &[]).code, 0);
        assert_eq!(tables(&workspace), before);
        assert_eq!(workspace.run(&[])["rows"]["updated"], 0);
    };
    workspace.run(&[]);
    assert_eq!(causes(), ["4 insert {\"first_computation\":1}"]);
    again();
    workspace.edit("prices.yaml", "unit_amount: \"1.5\"", "unit_amount: \"2\"");
    workspace.run(&["--yes"]);
    assert_eq!(causes(), ["4 update {\"price_changed\":1}"]);
    again();
    send(&workspace, "late", &[("e", "x1", "2026-01-05", 1), ("f", "x2", "2026-01-20", 7)]);
    workspace.run(&["--yes"]);
    assert_eq!(causes(), ["1 insert {\"late_event\":1}", "1 update {\"late_event\":1}"]);
    again();
    workspace.edit("subscriptions.csv", "t,s2,c2,pro,USD,month,2025-01-01\n", "");
    workspace.run(&["--yes"]);
    let gone = causes();
    assert!(gone.iter().all(|cause| cause.contains("retract {\"subscription_changed\":1}")), "{gone:?}");
    again();
}
