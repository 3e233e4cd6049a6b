//! Incremental runs, window by window: a night's events need no events of other windows, for
//! these are taken from the store; tiers come out as if everything had been read.

use serde_json::{Value, json};

use crate::incremental::{increment, marked, read};
use crate::promises::{State, state};
use crate::support::{Workspace, job};

/// Their quantities add up, or the greatest, the last, the sum of means tells enough.
pub const METERS: &str = "meters:
  - {meter_id: calls, event_name: call, aggregation: count, window: hour}
  - {meter_id: tokens, event_name: call, aggregation: sum, property: value, dimensions: [model]}
  - {meter_id: peak, event_name: call, aggregation: max, property: value}
  - {meter_id: seats, event_name: call, aggregation: latest, property: value}
  - {meter_id: mean, event_name: call, aggregation: avg, property: value, charge_on: window_sum}
";
pub const PRICES: &str = r#"prices:
  - {price_id: p_calls, plan_id: pro, meter_id: calls, currency: EUR, model: graduated, tiers: [{up_to: "6", unit_amount: "2"}, {up_to: null, unit_amount: "1"}]}
  - {price_id: p_tokens, plan_id: pro, meter_id: tokens, currency: EUR, model: volume, minimum_amount: "3", tiers: [{up_to: "20", unit_amount: "1"}, {up_to: null, unit_amount: "0.5"}]}
  - {price_id: p_large, plan_id: pro, meter_id: tokens, currency: EUR, match: {model: large}, model: per_unit, unit_amount: "2", free_units: "4"}
  - {price_id: p_peak, plan_id: pro, meter_id: peak, currency: EUR, model: per_unit, unit_amount: "3"}
  - {price_id: p_seats, plan_id: pro, meter_id: seats, currency: EUR, model: per_unit, unit_amount: "1.5"}
  - {price_id: p_mean, plan_id: pro, meter_id: mean, currency: EUR, model: package, package_size: "2", amount: "1"}
"#;
const CUSTOMERS: [&str; 3] = ["a", "b", "c"];

/// One call of a customer on a day of March.
#[derive(Clone, Copy)]
pub struct Call<'c> {
    pub id: &'c str,
    pub customer: &'c str,
    pub day: u32,
    pub hour: u32,
    pub value: u32,
    /// The day of April on which it came.
    pub came: u32,
}

impl Call<'_> {
    pub fn line(self) -> String {
        let Call { id, customer, day, hour, value, came } = self;
        let model = if value.is_multiple_of(2) { "large" } else { "small" };
        format!(
            r#"{{"tenant_id":"t","id":"{id}","event_name":"call","external_customer_id":"x{customer}","timestamp":"2026-03-{day:02}T{hour:02}:30:00Z","ingested_at":"2026-04-{came:02}","properties":{{"value":{value},"model":"{model}","user":"u{value}"}}}}"#
        ) + "\n"
    }
}

/// Two calls of each customer on a day.
pub fn day(day: u32) -> String {
    let calls = CUSTOMERS.iter().zip(1..).flat_map(|(customer, number)| {
        [9, 17].map(|hour| {
            let id = format!("{customer}-{day}-{hour}");
            Call { id: &id, customer, day, hour, value: day % 4 + number + hour % 3, came: 1 }.line()
        })
    });
    calls.collect()
}

/// Five days in March, a file a day, computed once.
pub fn shop(meters: &str, prices: &str) -> Workspace {
    let workspace = Workspace::new();
    workspace.write("meters.yaml", meters);
    workspace.write("prices.yaml", prices);
    for (name, store) in [("job", "trueup"), ("fresh", "fresh")] {
        workspace.write(&format!("{name}.yaml"), job("shop", "day", store));
    }
    let rows = |row: fn(&str) -> String| CUSTOMERS.map(row).concat();
    let customers = rows(|customer| format!("t,{customer},x{customer}\n"));
    let subscriptions = rows(|customer| format!("t,s{customer},{customer},pro,EUR,month,2025-01-01\n"));
    workspace.write("customers.csv", format!("tenant_id,customer_id,external_customer_id\n{customers}"));
    workspace.write(
        "subscriptions.csv",
        format!("tenant_id,subscription_id,customer_id,plan_id,currency,billing_period,started_at\n{subscriptions}"),
    );
    (1..=5).for_each(|number| workspace.write(&format!("events/{number}.ndjson"), day(number)));
    workspace.run(&[]);
    workspace
}

/// An incremental run after which nobody finds anything to do.
#[track_caller]
pub fn night(workspace: &Workspace) -> Value {
    let run = increment(workspace);
    check_against_a_fresh_store(workspace);
    run
}

/// The store is as a full run leaves a fresh one.
#[track_caller]
pub fn check_against_a_fresh_store(workspace: &Workspace) {
    for file in ["fresh.db", "fresh.db-wal", "fresh.db-shm"] {
        let _ = std::fs::remove_file(workspace.path(file));
    }
    assert_eq!(workspace.trueup(&["run", "fresh.yaml"]).code, 0);
    assert_eq!(state(workspace, "job"), state(workspace, "fresh"));
}

/// Windows that a run took from the store one by one, and sums of others.
fn stood_in(run: &Value) -> (u64, u64) {
    let skipping = &run["coverage"]["skipping"];
    (skipping["stored_windows"].as_u64().unwrap(), skipping["carried_periods"].as_u64().unwrap())
}

/// Files that a run looked at, and windows that it took from the store.
pub fn spared(run: &Value) -> (u64, u64) {
    let skipping = &run["coverage"]["skipping"];
    (skipping["files"].as_u64().unwrap(), skipping["stored_windows"].as_u64().unwrap())
}

/// Kinds of corrections of a run, with their causes, and how many there are.
fn ledger(workspace: &Workspace, run: &Value) -> Vec<(String, u64)> {
    let sql = format!(
        "SELECT kind || ' ' || group_concat(key) AS what, count(*) AS n FROM (SELECT kind, correction_id, key FROM corrections, \
         json_each(causes) WHERE run_id = '{}' ORDER BY key) GROUP BY correction_id",
        run["run_id"].as_str().unwrap()
    );
    let mut counts = std::collections::BTreeMap::new();
    workspace.query(&sql).iter().for_each(|row| *counts.entry(row["what"].clone()).or_default() += 1);
    counts.into_iter().collect()
}

fn said(what: &[(&str, u64)]) -> Vec<(String, u64)> {
    what.iter().map(|(text, count)| ((*text).to_owned(), *count)).collect()
}

#[test]
fn a_night_reads_its_own_file_alone() {
    let workspace = shop(METERS, PRICES);
    workspace.write("events/6.ndjson", day(6));
    let run = night(&workspace);
    assert_eq!((read(&run), marked(&run), spared(&run).0), ((6, 6), (3, 3), 1));
    // The greatest and the last of a month are not known by what is known of the whole.
    let earlier = "FROM usage_windows WHERE window_start < '2026-03-06' AND meter_id";
    let one_by_one = workspace.query(&format!("SELECT * {earlier} IN ('peak', 'seats')")).len() as u64;
    let by_sum = workspace
        .query(&format!("SELECT DISTINCT subscription_id, price_id, dimensions {earlier} NOT IN ('peak', 'seats')"))
        .len();
    assert_eq!(stood_in(&run), (one_by_one, by_sum as u64));
    let rows = workspace.query("SELECT * FROM usage_windows WHERE window_start >= '2026-03-06'").len() as u64;
    assert_eq!(ledger(&workspace, &run), said(&[("insert first_computation", rows)]));
    assert_eq!(run["rows"]["unchanged"], one_by_one);
    // The night after finds nothing new, and reads nothing.
    assert_eq!((read(&night(&workspace)), marked(&night(&workspace))), ((0, 0), (0, 0)));
}

#[test]
fn a_late_event_of_the_night_reads_its_window_alone() {
    let workspace = shop(METERS, PRICES);
    let late = Call { id: "late", customer: "b", day: 2, hour: 10, value: 9, came: 2 };
    workspace.write("events/6.ndjson", day(6) + &late.line());
    let run = night(&workspace);
    // Of the file of 2 March, the rows of one customer.
    assert_eq!((read(&run), marked(&run), spared(&run).0), ((7 + 6, 7 + 2), (3, 3), 2));
}

#[test]
fn a_late_event_in_an_early_window_shifts_the_tiers_of_stored_ones() {
    let workspace = shop(METERS, PRICES);
    let sql = "SELECT cost FROM usage_windows WHERE subscription_id = 'sa' AND meter_id = 'calls' ORDER BY window_start";
    let costs = |workspace: &Workspace| workspace.query(sql).iter().map(|row| row["cost"].clone()).collect::<Vec<_>>().join(" ");
    assert_eq!(costs(&workspace), "2 2 2 2 2 2 1 1 1 1");
    let late = Call { id: "late", customer: "a", day: 1, hour: 8, value: 1, came: 2 };
    workspace.write("events/late.ndjson", late.line());
    let run = night(&workspace);
    assert_eq!(costs(&workspace), "2 2 2 2 2 2 1 1 1 1 1");
    // The window of an hour is new; of the days' windows, the late event's is read.
    assert_eq!((read(&run), spared(&run).0), ((1 + 6, 1 + 2), 2));
    let shifted = workspace.query(&format!(
        "SELECT window_start, cost_before, cost_after FROM corrections WHERE run_id = '{}' AND meter_id = 'calls' AND kind = 'update'",
        run["run_id"].as_str().unwrap()
    ));
    let shifted: Vec<_> = shifted.iter().map(|row| row.values().map(String::as_str).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(shifted, ["1 2 2026-03-03T17:00:00Z"]);
    assert!(ledger(&workspace, &run).iter().any(|(what, _)| what == "update tier_shift"), "{:?}", ledger(&workspace, &run));
}

#[test]
fn copies_of_old_events_mark_the_windows_that_they_leave_and_reach() {
    let workspace = shop(METERS, PRICES);
    let old = Call { id: "a-2-9", customer: "a", day: 2, hour: 9, value: 3, came: 2 };
    // The same again, as it was: the windows are looked at, nothing changes.
    let same = day(2).lines().next().unwrap().replace("2026-04-01", "2026-04-02") + "\n";
    workspace.write("events/same.ndjson", same);
    let run = night(&workspace);
    assert_eq!((read(&run), ledger(&workspace, &run)), ((1 + 6, 1 + 2), vec![]));
    // Moved to another day: where it was and where it is, a file each. So is the other copy's.
    workspace.write("events/moved.ndjson", Call { day: 4, hour: 12, came: 3, ..old }.line());
    let run = night(&workspace);
    assert_eq!((read(&run), marked(&run), run["events"]["duplicates"].as_u64()), ((1 + 6 + 1 + 6, 1 + 3 + 2), (1, 1), Some(2)));
    assert!(run["causes"]["event_amended"].as_u64() > Some(0), "{}", run["causes"]);
    // To another customer: the old windows lose it, though no event of theirs is left to read.
    workspace.write("events/given.ndjson", Call { customer: "c", day: 4, hour: 12, came: 4, ..old }.line());
    let run = night(&workspace);
    assert_eq!((marked(&run), run["rows"]["retracted"].as_u64()), ((2, 2), Some(1)));
    // Voided by its id alone.
    let void = r#"{"tenant_id":"t","id":"a-2-9","deleted":true,"ingested_at":"2026-04-05"}"#;
    workspace.write("events/void.ndjson", format!("{void}\n"));
    let run = night(&workspace);
    assert_eq!((run["events"]["voided"].as_u64(), run["rows"]["retracted"].as_u64()), (Some(1), Some(1)));
    assert!(run["causes"]["event_voided"].as_u64() > Some(0), "{}", run["causes"]);
}

#[test]
fn a_meter_that_needs_all_events_reads_its_period() {
    let users = "  - {meter_id: users, event_name: call, aggregation: count_unique, property: user}\n";
    let price = "  - {price_id: p_users, plan_id: pro, meter_id: users, currency: EUR, model: per_unit, unit_amount: \"1\"}\n";
    let workspace = shop(&format!("{METERS}{users}"), &format!("{PRICES}{price}"));
    workspace.write("events/6.ndjson", day(6));
    let run = night(&workspace);
    assert_eq!((read(&run), spared(&run).0), ((36, 36), 6));
    // The other meters' windows are as stored all the same, one by one or by their sum.
    assert_eq!(stood_in(&run), (3 * 5 * 2, 3 * 4));
    // Its own earlier windows cannot change: nobody compares them.
    assert_eq!(run["rows"]["unchanged"], 3 * 5 * 2);
    // What is charged window by window needs no other window.
    workspace.edit("meters.yaml", "property: user}", "property: user, charge_on: window}");
    night(&workspace);
    workspace.write("events/7.ndjson", day(7));
    assert_eq!(read(&night(&workspace)), (6, 6));
}

#[test]
fn a_price_that_knows_events_one_by_one_reads_its_period() {
    let meters = "meters:\n  - {meter_id: volume, event_name: call, aggregation: sum, property: value}\n";
    let price = |terms: &str| {
        format!(
            "prices:\n  - {{price_id: p, plan_id: pro, meter_id: volume, currency: EUR, model: percentage, rate_percent: \"2\", {terms}}}\n"
        )
    };
    let by_event = r#"free_events: "3", maximum_amount_per_event: "0.05""#;
    for (terms, rows) in [(by_event, 36), (r#"fixed_amount_per_event: "0.1", free_units: "5""#, 6)] {
        let workspace = shop(meters, &price(terms));
        workspace.write("events/6.ndjson", day(6));
        assert_eq!(read(&night(&workspace)), (rows, rows), "{terms}");
    }
}

#[test]
fn what_is_closed_is_compared_with_its_events() {
    let workspace = shop(METERS, PRICES);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-03", "--customer", "a"]).code, 0);
    let mut adjusted = Vec::new();
    for (number, day) in [(1, 2), (2, 4)] {
        let late = Call { id: &format!("late-{number}"), customer: "a", day, hour: 11, value: 8, came: 2 };
        workspace.write(&format!("events/late-{number}.ndjson"), late.line());
        let run = increment(&workspace);
        adjusted.push((run["rows"]["adjusted"].as_u64().unwrap(), spared(&run)));
        // It is recorded once.
        assert_eq!(workspace.run(&["--incremental"])["rows"]["adjusted"], 0);
    }
    // Rows that the first one should have changed cannot stand in for the second.
    assert!(adjusted.iter().all(|(count, spared)| *count > 0 && spared.1 == 0), "{adjusted:?}");
    let rows = "SELECT * FROM corrections WHERE kind = 'adjust' AND meter_id = 'calls' AND event_count_before IS NULL";
    assert_eq!(workspace.query(rows).len(), 2);
    // Another customer's month is open.
    workspace.write("events/b.ndjson", Call { id: "b", customer: "b", day: 2, hour: 12, value: 8, came: 2 }.line());
    assert!(spared(&increment(&workspace)).1 > 0);
}

/// A store in which the row of one window of 3 March was altered, and a night's events.
fn altered(damage: &str) -> Workspace {
    let workspace = shop(METERS, PRICES);
    let one = "meter_id = 'peak' AND subscription_id = 'sb' AND window_start LIKE '2026-03-03%'";
    workspace.tamper(&format!("UPDATE usage_windows SET {damage} WHERE {one}"));
    workspace.write("events/6.ndjson", day(6));
    workspace
}

#[test]
fn a_row_that_does_not_fit_does_not_stand_in() {
    for (damage, cause) in [
        ("price_id = 'p_gone'", "store_altered"),
        ("window_end = '2026-03-05T00:00:00Z'", "store_altered"),
        ("period_end = '2026-03-30T00:00:00Z'", "store_altered"),
        ("quantity = '99'", "store_altered"),
        ("cost = '99'", "tier_shift"),
    ] {
        let workspace = altered(damage);
        let run = workspace.run(&["--incremental"]);
        check_against_a_fresh_store(&workspace);
        // The month of one meter of one customer.
        assert_eq!(read(&run), (36, 6 + 10), "{damage}");
        assert!(run["causes"][cause].as_u64() > Some(0), "{damage}: {}", run["causes"]);
    }
}

/// The tables say when a billing period ends, whatever its rows do.
#[test]
fn an_altered_end_of_a_period_cuts_no_window() {
    for end in ["2026-03-06T00:30:00Z", "2026-03-06T12:00:00Z", "2026-04-03T12:00:00Z"] {
        let workspace = shop(METERS, PRICES);
        workspace.tamper(&format!("UPDATE usage_windows SET period_end = '{end}' WHERE subscription_id = 'sb'"));
        workspace.write("events/6.ndjson", day(6));
        workspace.run(&["--incremental", "--yes"]);
        // What was computed is right; what nobody had to look at is mended when somebody does.
        assert_eq!(workspace.trueup(&["run", "fresh.yaml"]).code, 0);
        let (found, right) = (state(&workspace, "job"), state(&workspace, "fresh"));
        assert_eq!(found.periods, right.periods);
        let day = |state: State| -> Vec<_> {
            let sixth = state.windows.into_values().filter(|row| row.key.window_start.to_string().starts_with("2026-03-06"));
            sixth.collect()
        };
        assert_eq!(day(found), day(right));
        workspace.run(&["--full", "--yes"]);
        check_against_a_fresh_store(&workspace);
    }
}

#[test]
fn a_row_that_fits_is_believed_until_somebody_verifies() {
    let workspace = altered("event_count = 7");
    let run = workspace.run(&["--incremental"]);
    assert_eq!((read(&run), run["causes"].get("store_altered")), ((6, 6), None), "{}", run["causes"]);
    let verified = workspace.trueup(&["verify", "job.yaml"]);
    assert!(verified.stdout.contains(": 1 window differs from the events (0 missing, 1 wrong, 0 too many)"), "{verified:?}");
    assert_eq!(workspace.run(&["--full"])["causes"], json!({"store_altered": 1}));
}

/// Late, amended, voided and copied events of 500 customers, night after night.
#[test]
fn made_up_nights_leave_what_a_full_run_does() {
    let workspace = Workspace::new();
    let made = workspace.trueup(&["generate", "--out", ".", "--events", "12000", "--days", "4"]);
    assert_eq!(made.code, 0, "{made:?}");
    workspace.write("fresh.yaml", workspace.read("job.yaml").replace("trueup.db", "fresh.db"));
    let files = std::fs::read_dir(workspace.path("events")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut files: Vec<_> = files.map(|name| name.into_string().unwrap()).collect();
    files.sort_unstable();
    assert_eq!(files.len(), 4);
    let rename = |from: &str, to: &str, file: &str| {
        std::fs::rename(workspace.path(&format!("{from}{file}")), workspace.path(&format!("{to}{file}"))).unwrap();
    };
    files[2..].iter().for_each(|file| rename("events/", "", file));
    workspace.run(&[]);
    for file in &files[2..] {
        rename("", "events/", file);
        let run = night(&workspace);
        let (windows, sums) = stood_in(&run);
        assert!(marked(&run).0 > 300 && windows > 500 && sums > 500, "{}", run["coverage"]);
        assert!(run["rows"]["updated"].as_u64() > Some(0), "{}", run["rows"]);
    }
}

#[test]
fn a_plan_says_what_comes_from_the_store() {
    let workspace = shop(METERS, PRICES);
    workspace.write("events/6.ndjson", day(6));
    let plan = workspace.trueup(&["plan", "job.yaml", "--incremental"]).stdout;
    for line in [
        "marked       3 customers, 3 billing periods; ",
        "; 30 windows of them and 12 sums of others as stored",
        "looked at    6 of 36 events, 1 of 6 files",
    ] {
        assert!(plan.contains(line), "`{line}` is missing in:\n{plan}");
    }
    assert_eq!(json!("incremental"), workspace.run(&["--incremental"])["coverage"]["mode"]);
}

/// What the row of a billing period says of its first windows must be what they cost.
#[test]
fn a_sum_that_does_not_fit_carries_nothing() {
    for damage in [
        "usage_periods SET quantity = '9.5'",
        "usage_periods SET cost = '99'",
        "usage_periods SET period_end = '2026-03-30T00:00:00Z'",
        "usage_windows SET cost = '99' WHERE window_start LIKE '2026-03-04%'",
        "usage_windows SET quantity = '99', event_count = 99 WHERE window_start LIKE '2026-03-04%'",
    ] {
        let workspace = shop(METERS, PRICES);
        let one = "meter_id IN ('calls', 'tokens', 'mean') AND subscription_id = 'sb'";
        let condition = if damage.contains("WHERE") { "AND" } else { "WHERE" };
        workspace.tamper(&format!("UPDATE {damage} {condition} {one}"));
        // Late by three days: of that day, windows are read, of earlier ones their sum.
        workspace.write("events/late.ndjson", Call { id: "late", customer: "b", day: 3, hour: 12, value: 4, came: 2 }.line());
        let run = workspace.run(&["--incremental", "--yes"]);
        assert_eq!(run["coverage"]["skipping"]["carried_periods"], 0, "{damage}: {}", run["coverage"]);
        check_against_a_fresh_store(&workspace);
    }
}

/// An event of the meter `net`: so much of a customer on a day of March.
fn net(customer: &str, day: u32, model: &str, value: i32) -> String {
    let id = format!("net-{customer}-{day}-{model}-{value}");
    let call = Call { id: &id, customer, day, hour: 9, value: 0, came: 1 }.line();
    let amount = format!(r#""value":{value},"model":"{model}""#);
    call.replace(r#""call""#, r#""net""#).replace(r#""value":0,"model":"large""#, &amount)
}

fn void(id: &str) -> String {
    format!("{{\"tenant_id\":\"t\",\"id\":\"{id}\",\"deleted\":true,\"ingested_at\":\"2026-04-05\"}}\n")
}

/// A shop that sells sums alone, with these first events.
fn net_shop(meter: &str, terms: &str, first: &str) -> Workspace {
    let workspace = shop(
        &format!("meters:\n  - {{meter_id: net, event_name: net, aggregation: sum, property: value{meter}}}\n"),
        &format!("prices:\n  - {{price_id: p, plan_id: pro, meter_id: net, currency: EUR, {terms}}}\n"),
    );
    workspace.write("events/net.ndjson", first);
    workspace.run(&["--full"]);
    workspace
}

/// Earlier windows may be there though their sum is nothing.
#[test]
fn a_sum_that_cancels_keeps_the_row_of_its_period() {
    let terms = "model: per_unit, unit_amount: \"2\"";
    // The first and the last event are of somebody else.
    let others = net("b", 1, "small", 1) + &net("b", 3, "small", 1);
    let first = net("a", 1, "small", 5) + &net("a", 2, "small", -5) + &net("a", 3, "small", 7) + &others;
    let workspace = net_shop("", terms, &first);
    workspace.write("events/void.ndjson", void("net-a-3-small-7"));
    night(&workspace);
    assert_eq!(workspace.query("SELECT * FROM usage_periods").len(), 2);
    // And goes with the last of them.
    workspace.write("events/void-more.ndjson", void("net-a-1-small-5") + &void("net-a-2-small--5"));
    night(&workspace);
    assert_eq!(workspace.query("SELECT * FROM usage_periods").len(), 1);
    // Of another combination of dimensions, nothing is new.
    let first = net("a", 1, "large", 3) + &net("a", 1, "small", 0) + &net("a", 2, "small", 0);
    let workspace = net_shop(", dimensions: [model]", &format!("{terms}, minimum_amount: \"5\""), &first);
    workspace.write("events/late.ndjson", net("a", 4, "large", 3));
    night(&workspace);
}

/// The row of a billing period may say what is due without usage: that is no sum of windows.
#[test]
fn what_is_due_without_usage_carries_nothing() {
    let terms =
        r#"model: graduated, tiers: [{up_to: "10", unit_amount: "1", flat_amount: "5"}, {up_to: null, unit_amount: "2"}]"#;
    for meter in ["", ", dimensions: [model]"] {
        let workspace = net_shop(meter, terms, &net("a", 1, "small", 3));
        workspace.write("events/first.ndjson", net("b", 4, "large", 3));
        night(&workspace);
        workspace.write("events/second.ndjson", net("b", 2, "large", 4));
        night(&workspace);
    }
}

/// It prices whole billing periods, also events that lie outside of its range and have no windows
/// yet.
#[test]
fn after_a_run_of_a_part_nothing_is_carried() {
    let first = net("a", 1, "small", 3) + &net("a", 2, "small", 4) + &net("a", 7, "small", 4);
    for (lateness, part) in [("", &["--day", "2026-03-03"] as &[&str]), ("lateness: {lookback: 2d}\n", &[])] {
        let workspace = net_shop("", "model: per_unit, unit_amount: \"2\"", &first);
        workspace.write("job.yaml", workspace.read("job.yaml") + lateness);
        workspace.run(&["--full"]);
        workspace.write("events/more.ndjson", net("a", 3, "small", 3) + &net("a", 6, "small", 5));
        workspace.run(part);
        workspace.run(&["--incremental"]);
        check_against_a_fresh_store(&workspace);
        workspace.write("events/last.ndjson", net("a", 9, "small", 2));
        workspace.run(&["--incremental"]);
        check_against_a_fresh_store(&workspace);
    }
}

/// Closed rows of a former billing cycle belong to none of the periods of now.
#[test]
fn rows_of_a_former_billing_cycle_stand_for_nothing() {
    let days = [2, 12, 27].map(|day| net("a", day, "small", 3)).concat();
    let workspace = net_shop("", "model: per_unit, unit_amount: \"2\"", &days);
    assert_eq!(workspace.trueup(&["close", "job.yaml", "--period", "2026-03"]).code, 0);
    workspace.edit("subscriptions.csv", "t,sa,a,pro,EUR,month", "t,sa,a,pro,EUR,week");
    workspace.run(&["--incremental"]);
    for (number, late) in [net("a", 1, "small", 1), net("a", 29, "small", 1), net("a", 25, "small", 1)].iter().enumerate() {
        workspace.write(&format!("events/late-{number}.ndjson"), late);
        let run = workspace.run(&["--incremental"]);
        assert_eq!(run["rows"]["adjusted"], 0, "{}", run["rows"]);
        assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0, "{late}");
    }
}
