//! Matches that runs keep for later ones: what was read once is not read again, and tables are
//! as if it had been.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::incremental::read;
use crate::incremental_windows::{Call, METERS, PRICES, check_against_a_fresh_store, day, night, shop, spared};
use crate::support::Workspace;

pub const USERS: &str = "  - {meter_id: users, event_name: call, aggregation: count_unique, property: user, dimensions: [model]}
  - {meter_id: visits, event_name: call, aggregation: count, window: {session: {gap: 3h}}}
";
pub const USER_PRICE: &str = r#"  - {price_id: p_users, plan_id: pro, meter_id: users, currency: EUR, model: per_unit, unit_amount: "1"}
  - {price_id: p_visits, plan_id: pro, meter_id: visits, currency: EUR, model: per_unit, unit_amount: "1"}
"#;

/// Five days of three customers, computed once by a job that keeps matches. Some of its
/// meters need all events of a billing period.
fn keeping() -> Workspace {
    let workspace = shop(&format!("{METERS}{USERS}"), &format!("{PRICES}{USER_PRICE}"));
    workspace.write("job.yaml", workspace.read("job.yaml") + "incremental: always\n");
    workspace.run(&["--full"]);
    workspace
}

pub fn kept(run: &Value) -> u64 {
    run["coverage"]["skipping"]["kept_matches"].as_u64().unwrap()
}

/// The runs of which matches are kept.
fn segments(workspace: &Workspace) -> BTreeSet<String> {
    let entries = fs::read_dir(workspace.path("trueup.db.keys/shop")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names: Vec<_> = names.filter(|name| !name.ends_with(".keys") && name != "matches.json").collect();
    let is_known = |name: &String| [".matches", ".values", ".index"].iter().any(|suffix| name.ends_with(suffix));
    assert!(names.iter().all(is_known), "{names:?}");
    names.iter().map(|name| name.split('.').next().unwrap().to_owned()).collect()
}

#[test]
fn periods_that_need_all_their_events_read_the_new_ones_alone() {
    let workspace = keeping();
    workspace.write("events/6.ndjson", day(6));
    let run = night(&workspace);
    assert_eq!((read(&run), spared(&run).0), ((6, 6), 1));
    // Ten calls of each customer, each a visit; the users of other days are known.
    assert_eq!(kept(&run), 3 * 10);
    assert_eq!(segments(&workspace).len(), 2);
    let late = |id, customer, day, came| Call { id, customer, day, hour: 12, value: 7, came }.line();
    workspace.write("events/late.ndjson", late("l1", "a", 1, 2) + &late("l2", "b", 3, 2) + &late("l3", "c", 6, 2));
    let run = night(&workspace);
    assert_eq!(read(&run), (3, 3));
    // Of a priced meter, all users of the periods of which an earlier day changed: by their models.
    assert!(kept(&run) > 3 * 12 + 2 * 8, "{}", run["coverage"]);
    // Nothing new is nothing more to keep.
    let before = segments(&workspace);
    assert_eq!((read(&night(&workspace)), segments(&workspace)), ((0, 0), before));
}

/// Meters of which windows are known by the row of their billing period, or by its distinct values.
const KNOWN: &str = "meters:
  - {meter_id: calls, event_name: call, aggregation: count}
  - {meter_id: tokens, event_name: call, aggregation: sum, property: value, dimensions: [model]}
  - {meter_id: mean, event_name: call, aggregation: avg, property: value, charge_on: window_sum}
  - {meter_id: users, event_name: call, aggregation: count_unique, property: user, unpriced: true}
  - {meter_id: by_model, event_name: call, aggregation: count_unique, property: user, dimensions: [model], unpriced: true}
  - {meter_id: members, event_name: call, aggregation: count_unique, property: user}
  - {meter_id: daily, event_name: call, aggregation: count_unique, property: user, charge_on: window}
";
const KNOWN_PRICES: &str = r#"prices:
  - {price_id: p_calls, plan_id: pro, meter_id: calls, currency: EUR, model: per_unit, unit_amount: "0.25", minimum_amount: "3"}
  - {price_id: p_tokens, plan_id: pro, meter_id: tokens, currency: EUR, model: per_unit, unit_amount: "0.5"}
  - {price_id: p_mean, plan_id: pro, meter_id: mean, currency: EUR, model: per_unit, unit_amount: "2"}
  - {price_id: p_members, plan_id: pro, meter_id: members, currency: EUR, model: graduated, tiers: [{up_to: "4", unit_amount: "2"}, {up_to: null, unit_amount: "1"}]}
  - {price_id: p_daily, plan_id: pro, meter_id: daily, currency: EUR, model: per_unit, unit_amount: "1"}
"#;

fn knowing() -> Workspace {
    let workspace = shop(KNOWN, KNOWN_PRICES);
    workspace.write("job.yaml", workspace.read("job.yaml") + "incremental: always\n");
    workspace.run(&["--full"]);
    workspace
}

#[test]
fn what_is_new_needs_no_event_of_other_windows() {
    let workspace = knowing();
    workspace.write("events/6.ndjson", day(6));
    let run = night(&workspace);
    // Windows that are charged one by one are read one by one.
    assert_eq!((kept(&run), spared(&run)), (0, (1, 3 * 5)), "{}", run["coverage"]);
    // A late call of a new user: of its own window both others, of six meters; and all twelve of
    // the meter that charges each user of the period once. Other days of the one that charges by
    // the window are as stored.
    let late = Call { id: "late", customer: "b", day: 3, hour: 12, value: 90, came: 2 };
    workspace.write("events/late.ndjson", late.line());
    let run = night(&workspace);
    assert_eq!((kept(&run), spared(&run).1), (2 * 6 + 12, 5), "{}", run["coverage"]);
    // The same again: of the periods that it may leave, every user.
    workspace.write("events/again.ndjson", Call { value: 6, came: 3, ..late }.line());
    let run = night(&workspace);
    assert!(kept(&run) > 3 * 12, "{}", run["coverage"]);
    // Then they are known again.
    workspace.write("events/7.ndjson", day(7));
    assert_eq!(kept(&night(&workspace)), 0);
}

/// Night after night, days, late calls, calls that come again or are taken back, and other prices.
#[test]
fn made_up_nights_that_know_what_they_do_not_read() {
    let mut most = 0;
    for seed in 1..=4u64 {
        let workspace = knowing();
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut chance = |below: u32| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            u32::try_from((state >> 33) % u64::from(below)).unwrap()
        };
        for number in 0..8u32 {
            let mut lines = String::new();
            for of_night in 0..=chance(3) {
                let id = format!("n-{}-{}", chance(number + 1), chance(3));
                let fresh = format!("n-{number}-{of_night}");
                let (customer, at, value) = (["a", "b", "c"][chance(3) as usize], chance(5) + 1, chance(60));
                let call = Call { id: &fresh, customer, day: at, hour: 3, value, came: number + 2 };
                lines += &match chance(6) {
                    0 => day(6 + number),
                    1 | 2 => call.line(),
                    3 => Call { id: &id, ..call }.line(),
                    4 => Call { id: &format!("{customer}-{at}-9"), ..call }.line(),
                    _ => {
                        let came = number + 2;
                        format!(
                            "{{\"tenant_id\":\"t\",\"id\":\"{id}\",\"deleted\":true,\"ingested_at\":\"2026-04-{came:02}\"}}\n"
                        )
                    }
                };
            }
            workspace.write(&format!("events/night-{number}.ndjson"), lines);
            if chance(5) == 0 {
                let prices = workspace.read("prices.yaml");
                workspace.write("prices.yaml", prices.replace("unit_amount: \"2\"", &format!("unit_amount: \"2.{number}\"")));
            }
            let run = workspace.run(&["--incremental"]);
            check_against_a_fresh_store(&workspace);
            // A mean may be a third, which no price multiplies without rounding.
            most = most.max(run["coverage"]["skipping"]["carried_periods"].as_u64().unwrap_or_default());
        }
    }
    assert!(most >= 3 * 7, "{most}");
}

fn fraction(day: u32, value: &str) -> String {
    let id = format!("f-{day}-{value}");
    let call = Call { id: &id, customer: "a", day, hour: 9, value: 0, came: 1 }.line();
    call.replace(r#""value":0"#, &format!("\"value\":{value}"))
}

/// The smallest amounts depend on how those before were rounded.
#[test]
fn where_costs_are_rounded_later_windows_are_read() {
    let smallest = format!("0.{}1", "0".repeat(17));
    let meters = "meters:\n  - {meter_id: tokens, event_name: call, aggregation: sum, property: value}\n";
    let prices = format!(
        "prices:\n  - {{price_id: p, plan_id: pro, meter_id: tokens, currency: EUR, model: per_unit, unit_amount: \"{smallest}\"}}\n"
    );
    let workspace = shop(meters, &prices);
    workspace.write("job.yaml", workspace.read("job.yaml") + "incremental: always\n");
    workspace.run(&["--full"]);
    workspace.write("events/late.ndjson", fraction(2, "3"));
    assert_eq!(spared(&night(&workspace)), (1, 0));
    // Half of the smallest amount: what comes later is not known any more.
    workspace.write("events/half.ndjson", fraction(2, "0.5"));
    let run = workspace.run(&["--incremental"]);
    assert!(run["coverage"]["why"].as_str().unwrap_or_default().contains("rounded"), "{}", run["coverage"]);
    check_against_a_fresh_store(&workspace);
    workspace.write("events/halves.ndjson", fraction(1, "0.5") + &fraction(3, "0.5"));
    assert!(spared(&night(&workspace)).1 > 0);
}

#[test]
fn what_came_again_replaces_what_was_kept() {
    let workspace = keeping();
    let old = Call { id: "a-2-9", customer: "a", day: 2, hour: 9, value: 3, came: 2 };
    let steps = [
        // Another value, another day, back again, another customer, the same once more.
        Call { value: 30, ..old },
        Call { day: 4, came: 3, ..old },
        Call { day: 2, came: 4, ..old },
        Call { customer: "b", came: 5, ..old },
        Call { customer: "b", came: 6, ..old },
    ];
    for (number, call) in (0..).zip(steps) {
        workspace.write(&format!("events/again-{number}.ndjson"), call.line());
        let run = night(&workspace);
        assert!(kept(&run) > 0, "{}", run["coverage"]);
        // Of other customers' windows, every event is still there.
        let late = Call { id: &format!("late-{number}"), customer: "c", day: 2, hour: 9, value: 1, came: 7 };
        workspace.write(
            &format!("events/late-{number}.ndjson"),
            late.line() + &Call { customer: "a", ..late }.line().replace("late-", "too-"),
        );
        night(&workspace);
    }
    let void = r#"{"tenant_id":"t","id":"a-2-9","deleted":true,"ingested_at":"2026-04-20"}"#;
    workspace.write("events/void.ndjson", format!("{void}\n"));
    assert_eq!(night(&workspace)["events"]["voided"], 1);
    workspace.write("events/6.ndjson", day(6));
    assert_eq!(read(&night(&workspace)), (6, 6));
}

#[test]
fn changed_tables_read_what_they_touch_and_nothing_else() {
    let workspace = keeping();
    let night_of = |number: u32| {
        workspace.write(&format!("events/{number}.ndjson"), day(number));
        night(&workspace)
    };
    // A new customer, whose events are old.
    let stranger = Call { id: "d", customer: "d", day: 3, hour: 9, value: 4, came: 1 };
    workspace.write("events/stranger.ndjson", stranger.line());
    assert_eq!(night(&workspace)["events"]["dead_lettered"], 1);
    workspace.write("customers.csv", workspace.read("customers.csv") + "t,d,xd\n");
    workspace.write("subscriptions.csv", workspace.read("subscriptions.csv") + "t,aa,d,pro,EUR,month,2025-01-01\n");
    let run = night_of(6);
    assert_eq!((run["events"]["read"].as_u64(), kept(&run)), (Some(6 + 1), 30));
    // A price and a meter's filter need all events of their name again, as the price was theirs.
    workspace.edit(
        "prices.yaml",
        "meter_id: peak, currency: EUR, model: per_unit, unit_amount: \"3\"",
        "meter_id: peak, currency: EUR, model: per_unit, unit_amount: \"4\"",
    );
    assert_eq!(kept(&night_of(7)), 0);
    assert!(kept(&night_of(8)) > 30);
    workspace.edit(
        "meters.yaml",
        "aggregation: max, property: value",
        "aggregation: max, property: value, filters: [{property: model, op: eq, value: large}]",
    );
    assert_eq!(kept(&night_of(9)), 0);
    // A customer who moves, and back; a subscription that begins later.
    workspace.edit("customers.csv", "t,b,xb\n", "t,b,xother\n");
    let run = night_of(10);
    assert_eq!((run["events"]["read"].as_u64(), kept(&run)), (Some(6 + 9 * 2), 2 * 9 * 2));
    workspace.edit("customers.csv", "t,b,xother\n", "t,b,xb\n");
    night_of(11);
    workspace.edit("subscriptions.csv", "t,sc,c,pro,EUR,month,2025-01-01", "t,sc,c,pro,EUR,month,2026-03-04");
    night_of(12);
    assert_eq!(read(&night_of(13)), (6, 6));
    // A subscription less, before others in the table.
    workspace.edit("subscriptions.csv", "t,sa,a,pro,EUR,month,2025-01-01\n", "");
    night_of(14);
    night_of(15);
}

#[test]
fn what_was_gone_is_another_one_when_it_comes_back() {
    let workspace = keeping();
    let subscriptions = workspace.read("subscriptions.csv");
    // The subscription of one customer, gone and then another one's.
    workspace.write("subscriptions.csv", subscriptions.replace("t,sb,b,pro,EUR,month,2025-01-01\n", ""));
    night(&workspace);
    workspace.write("subscriptions.csv", subscriptions.replace("t,sb,b,", "t,sb,c,").replace("t,sc,c,", "t,other,b,"));
    night(&workspace);
    workspace.write("subscriptions.csv", subscriptions);
    workspace.write("events/6.ndjson", day(6));
    night(&workspace);
    // A meter, gone and then one of other events.
    let meters = workspace.read("meters.yaml");
    workspace
        .write("meters.yaml", format!("{meters}  - {{meter_id: free, event_name: call, aggregation: count, unpriced: true}}\n"));
    night(&workspace);
    workspace.write("meters.yaml", &meters);
    night(&workspace);
    workspace
        .write("meters.yaml", format!("{meters}  - {{meter_id: free, event_name: chat, aggregation: count, unpriced: true}}\n"));
    night(&workspace);
    workspace.write("events/7.ndjson", day(7) + &day(8).replace(r#""call""#, r#""chat""#));
    let run = night(&workspace);
    assert!(kept(&run) > 30, "{}", run["coverage"]);
}

#[test]
fn after_many_runs_everything_is_computed_again() {
    let workspace = keeping();
    for number in 1..=30 {
        let late = Call { id: &format!("l-{number}"), customer: "a", day: 2, hour: number % 24, value: number, came: 2 };
        workspace.write(&format!("events/late-{number}.ndjson"), late.line());
        let run = workspace.run(&[]);
        let mode = if number == 30 { "full" } else { "incremental" };
        assert_eq!(run["coverage"]["mode"], mode, "{number}: {}", run["coverage"]);
    }
    assert_eq!(segments(&workspace).len(), 1);
    assert_eq!(kept(&night(&workspace)), 0);
}

#[test]
fn where_nothing_is_kept_a_run_that_would_read_much_reads_everything() {
    let workspace = keeping();
    let late = |customer: &str, day: u32| {
        let id = format!("late-{customer}-{day}");
        Call { id: &id, customer, day, hour: 12, value: 7, came: 2 }.line()
    };
    fs::remove_dir_all(workspace.path("trueup.db.keys")).unwrap();
    // Of a third of the customers, the period is read: more than a quarter of all events.
    workspace.write("events/late.ndjson", late("a", 2));
    let run = workspace.run(&[]);
    assert_eq!(run["coverage"]["mode"], "full", "{}", run["coverage"]);
    assert_eq!(run["coverage"]["why"], "what is new touches much of what there is");
    // From then on, the same is read from what that run kept.
    workspace.write("events/late-2.ndjson", late("a", 3));
    let run = workspace.run(&[]);
    assert_eq!((run["coverage"]["mode"].as_str(), read(&run)), (Some("incremental"), (1, 1)));
    assert!(kept(&run) > 0);
    // Who asks for an incremental run gets it.
    fs::remove_dir_all(workspace.path("trueup.db.keys")).unwrap();
    workspace.write("events/late-3.ndjson", late("b", 3) + &late("c", 3));
    assert_eq!(kept(&night(&workspace)), 0);
}

#[test]
fn a_run_of_everything_begins_anew() {
    let workspace = keeping();
    workspace.write("events/6.ndjson", day(6));
    night(&workspace);
    assert_eq!(segments(&workspace).len(), 2);
    workspace.run(&["--full"]);
    assert_eq!(segments(&workspace).len(), 1);
    // A part of the job says nothing about what is kept.
    workspace.run(&["--day", "2026-03-02"]);
    workspace.write("events/7.ndjson", day(7));
    assert_eq!(read(&night(&workspace)), (6, 6));
    // Nobody asks for it any more.
    workspace.edit("job.yaml", "incremental: always", "incremental: never");
    workspace.run(&[]);
    assert!(segments(&workspace).is_empty());
    // A plan keeps nothing either.
    workspace.edit("job.yaml", "incremental: never", "incremental: always");
    assert_eq!(workspace.trueup(&["plan", "job.yaml"]).code, 0);
    assert!(segments(&workspace).is_empty());
}

#[test]
fn a_plan_that_is_applied_keeps_what_it_read() {
    let workspace = keeping();
    let plan = |out: &str| assert_eq!(workspace.trueup(&["plan", "job.yaml", "--out", out]).code, 0);
    workspace.write("events/6.ndjson", day(6));
    plan("first.json");
    assert_eq!(workspace.trueup(&["apply", "first.json"]).code, 0);
    workspace.write("events/7.ndjson", day(7));
    let run = night(&workspace);
    assert_eq!((read(&run), kept(&run)), ((6, 6), 3 * 12));
    // Of plans that nobody applies, the last one leaves its files until a run is published.
    let before = segments(&workspace);
    workspace.write("events/8.ndjson", day(8));
    plan("second.json");
    plan("third.json");
    assert_eq!(segments(&workspace).len(), before.len() + 1);
    assert!(segments(&workspace).is_superset(&before));
    // The second plan holds all the same: it only keeps nothing.
    assert_eq!(workspace.trueup(&["apply", "second.json"]).code, 0);
    workspace.write("events/9.ndjson", day(9));
    let run = night(&workspace);
    assert_eq!((kept(&run), segments(&workspace).len()), (0, 0));
    // A plan of everything begins anew.
    assert_eq!(workspace.trueup(&["plan", "job.yaml", "--full", "--out", "full.json"]).code, 0);
    assert_eq!(workspace.trueup(&["apply", "full.json"]).code, 0);
    workspace.write("events/10.ndjson", day(10));
    assert!(kept(&night(&workspace)) > 0);
    // What a stale plan left is gone after the next run.
    workspace.write("events/11.ndjson", day(11));
    plan("stale.json");
    workspace.write("events/12.ndjson", day(12));
    workspace.trueup(&["apply", "stale.json"]).fails_with(7, &["12.ndjson"]);
    night(&workspace);
    assert!(segments(&workspace).iter().filter(|name| name.starts_with("plan-")).count() == 1);
}

#[test]
fn what_is_of_another_run_or_damaged_is_not_used() {
    let workspace = keeping();
    let manifest = "trueup.db.keys/shop/matches.json";
    let first = workspace.read(manifest);
    workspace.write("events/6.ndjson", day(6));
    night(&workspace);
    // As if the second run had been interrupted after it was published.
    workspace.write(manifest, &first);
    workspace.write("events/7.ndjson", day(7));
    let run = night(&workspace);
    assert_eq!((kept(&run), read(&run)), (0, (7 * 6, 7 * 6)));
    assert!(segments(&workspace).is_empty());

    let damage = |number: u32, damage: &dyn Fn(&mut Vec<u8>), suffix: &str| {
        workspace.run(&["--full"]);
        let segment = segments(&workspace).into_iter().next().unwrap();
        let path = workspace.path(&format!("trueup.db.keys/shop/{segment}.{suffix}"));
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, bytes).unwrap();
        workspace.write(&format!("events/{number}.ndjson"), day(number));
        path
    };
    let half = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2);
    let flip = |bytes: &mut Vec<u8>| bytes[70] ^= 1;
    for (number, how, suffix) in
        [(8, &half as &dyn Fn(&mut Vec<u8>), "index"), (9, &half, "0.matches"), (10, &flip, "index"), (11, &half, "values")]
    {
        damage(number, how, suffix);
        assert_eq!(kept(&night(&workspace)), 0, "{suffix}");
    }
    for (number, suffix) in [(12, "0.matches"), (13, "values")] {
        let path = damage(number, &flip, suffix);
        let run = workspace.run(&["--incremental"]);
        check_against_a_fresh_store(&workspace);
        let why = run["coverage"]["why"].as_str().unwrap_or_default();
        assert!(why.contains(path.to_str().unwrap()) && why.contains("not what was written"), "{}", run["coverage"]);
    }
    // What that run kept is of use again.
    workspace.write("events/late.ndjson", Call { id: "late", customer: "a", day: 2, hour: 12, value: 7, came: 2 }.line());
    assert!(kept(&night(&workspace)) > 0);
}

/// Killed at a random moment, before it publishes, while it does, and before it keeps: later
/// runs find nothing that is not theirs, and nothing is left behind.
#[test]
fn killed_at_any_moment_nobody_is_misled_by_what_is_kept() {
    let workspace = keeping();
    let runs = || workspace.query("SELECT run_id FROM runs").len();
    // How long it takes until something is published; it grows with the files.
    let mut length = Duration::from_millis(20);
    let (mut unpublished, mut published) = (0, 0);
    for attempt in 0..60u32 {
        let (customer, day) = (["a", "b", "c"][attempt as usize % 3], attempt % 5 + 1);
        let (late, again) = (format!("late-{attempt}"), format!("{customer}-{day}-9"));
        let late = Call { id: &late, customer, day, hour: 12, value: attempt % 7, came: 2 };
        let again = Call { id: &again, day: (day + attempt) % 5 + 1, value: attempt, came: 3 + attempt / 3, ..late };
        workspace.write(&format!("events/more-{attempt}.ndjson"), late.line() + &again.line());
        let before = runs();
        let mut child = workspace.start(&["run", "job.yaml", "--incremental"]);
        // Three times as often near the end, where it publishes and keeps.
        let share = if attempt % 4 == 0 { attempt * 90 % 1100 } else { 700 + attempt * 130 % 600 };
        std::thread::sleep(length * share / 1000);
        let _ = child.kill();
        child.wait().unwrap();
        if runs() == before {
            unpublished += 1;
            length = if share > 1000 { length * 6 / 5 } else { length };
        } else {
            published += 1;
            length = if share < 1000 { length * 9 / 10 } else { length };
        }
        // An event of the same customer finds what was kept.
        let next = format!("next-{attempt}");
        workspace.write(&format!("events/next-{attempt}.ndjson"), Call { id: &next, ..late }.line());
        let run = night(&workspace);
        segments(&workspace);
        if kept(&run) == 0 {
            workspace.run(&["--full"]);
        }
    }
    assert!(unpublished > 5 && published > 5, "{unpublished} before and {published} after the commit");
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
}

#[test]
fn the_report_says_what_was_kept() {
    let workspace = keeping();
    workspace.write("events/6.ndjson", day(6));
    let plan = workspace.trueup(&["plan", "job.yaml", "--incremental"]).stdout;
    let line = "looked at    6 of 36 events, 1 of 6 files; 30 matches of others as kept\n";
    assert!(plan.contains(line), "`{line}` is missing in:\n{plan}");
}
