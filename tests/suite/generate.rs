//! `trueup generate`: the same bytes each time, a job that runs as it is, and counts
//! that are exactly what a run finds.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use insta::assert_snapshot;
use serde_json::{Value, json};

use crate::promises::state;
use crate::support::{Row, Workspace, fixtures, normalised};

/// Generates into `folder`; returns what is announced.
#[track_caller]
fn generate(workspace: &Workspace, folder: &str, arguments: &[&str]) -> Value {
    let mut all = vec!["generate", "--out", folder, "--output", "json"];
    all.extend(arguments);
    workspace.trueup(&all).json()
}

/// Every file of a folder with its content.
fn contents(workspace: &Workspace, folder: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![workspace.path(folder)];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                found.insert(
                    path.strip_prefix(workspace.path("")).unwrap().components().skip(1).collect(),
                    fs::read(&path).unwrap(),
                );
            }
        }
    }
    found
}

#[track_caller]
fn run(workspace: &Workspace, folder: &str) -> Value {
    workspace.trueup(&["run", &format!("{folder}/job.yaml"), "--output", "json"]).json()
}

/// Rows of the store of a generated job.
fn rows(workspace: &Workspace, folder: &str, sql: &str) -> Vec<Row> {
    let inner = Workspace::new();
    inner.write("trueup.db", fs::read(workspace.path(&format!("{folder}/trueup.db"))).unwrap());
    inner.query(sql)
}

/// A day may be a single file, of which several threads read parts.
#[test]
fn a_large_file_is_read_the_same_by_any_number_of_threads() {
    let workspace = Workspace::new();
    generate(&workspace, ".", &["--events", "150000", "--days", "1"]);
    workspace.write("fresh.yaml", workspace.read("job.yaml").replace("trueup.db", "fresh.db"));
    let mut events = Vec::new();
    for (job, threads) in [("job", "1"), ("fresh", "8")] {
        let run = workspace.trueup(&["run", &format!("{job}.yaml"), "--threads", threads, "--output", "json"]).json();
        events.push((run["events"].clone(), run["usage"].clone(), run["dead_letters"].clone()));
    }
    assert_eq!(events[0], events[1]);
    assert_eq!(state(&workspace, "job"), state(&workspace, "fresh"));
}

#[test]
fn the_same_seed_gives_the_same_bytes_for_any_number_of_threads() {
    let workspace = Workspace::new();
    for format in ["parquet", "ndjson"] {
        let made = |folder: &str, threads: &str, seed: &str| {
            let options =
                ["--events", "20000", "--days", "5", "--format", format, "--threads", threads, "--seed", seed, "--force"];
            generate(&workspace, folder, &options);
            contents(&workspace, folder)
        };
        let one = made(&format!("one-{format}"), "1", "7");
        assert_eq!(one.keys().filter(|path| path.starts_with("events")).count(), 5);
        assert_eq!(one, made(&format!("two-{format}"), "2", "7"));
        assert_eq!(one, made(&format!("eight-{format}"), "8", "7"));
        let other = made(&format!("other-{format}"), "8", "8");
        let day = PathBuf::from(format!("events/2026-03-20.{format}"));
        assert_ne!(one[&day], other[&day]);
    }
}

#[test]
fn a_run_finds_exactly_what_was_announced() {
    let workspace = Workspace::new();
    let announced = generate(&workspace, "made", &["--events", "30000", "--days", "5"]);
    let written = &announced["written"];
    assert_eq!((&written["rows"], &written["files"]), (&json!(30_000), &json!(5)));
    assert_eq!([&written["duplicates"], &written["amended"], &written["voided"]], [600, 150, 60]);
    assert_eq!([&written["late"], &written["missing_timestamp"]], [240, 3], "the last day has no late events");
    assert_eq!([&written["invalid_number"], &written["unknown_customer"]], [6, 9]);
    assert_eq!(written["events"], 30_000 - 600 - 150 - 60);

    let outcome = run(&workspace, "made");
    let (events, expected) = (&outcome["events"], &announced["run"]);
    assert_eq!((&events["read"], &events["out_of_range"]), (&json!(30_000), &json!(0)));
    assert_eq!([&events["duplicates"], &events["voided"]], [&expected["duplicates"], &expected["voided"]]);
    let letters = rows(&workspace, "made", "SELECT reason, count(*) AS count FROM dead_letters GROUP BY reason ORDER BY reason");
    let letters: BTreeMap<_, u64> = letters.iter().map(|row| (row["reason"].clone(), row["count"].parse().unwrap())).collect();
    assert_eq!(json!(letters), expected["dead_letters"]);
    assert_eq!(letters.values().sum::<u64>(), 18);

    let again = run(&workspace, "made");
    assert_eq!(again["rows"]["inserted"].as_u64().unwrap() + again["rows"]["updated"].as_u64().unwrap(), 0);
    assert_eq!(workspace.trueup(&["verify", "made/job.yaml"]).code, 0);
}

#[test]
fn clock_changes_late_and_amended_events_are_there() {
    let workspace = Workspace::new();
    generate(&workspace, "made", &["--events", "50000", "--format", "ndjson"]);
    let mut before: BTreeMap<String, Value> = BTreeMap::new();
    let (mut late, mut amended, mut near) = (0, 0, 0);
    for (path, content) in contents(&workspace, "made").into_iter().filter(|(path, _)| path.starts_with("events")) {
        let date = path.file_stem().unwrap().to_str().unwrap().to_owned();
        for line in String::from_utf8(content).unwrap().lines() {
            let event: Value = serde_json::from_str(line).unwrap();
            let (timestamp, ingested_at) =
                (event["timestamp"].as_str().unwrap_or_default(), event["ingested_at"].as_str().unwrap());
            assert!(timestamp <= ingested_at, "{line}");
            // The files are of days in Berlin, an hour or two ahead.
            assert!(day(ingested_at) <= &*date && *date <= *next_day(day(ingested_at)), "{line} in {date}");
            late += i32::from(!timestamp.is_empty() && day(timestamp) < day(ingested_at) && !timestamp.contains("T23"));
            near += i32::from(("2026-03-29T00:00".."2026-03-29T02:00").contains(&timestamp));
            let first = before.entry(event["id"].as_str().unwrap().to_owned()).or_insert_with(|| event.clone());
            if first["ingested_at"] != event["ingested_at"] && event["deleted"].is_null() {
                assert_eq!((&first["timestamp"], &first["event_name"]), (&event["timestamp"], &event["event_name"]));
                amended += i32::from(first["properties"] != event["properties"]);
            }
        }
    }
    assert!(late > 400 && amended > 150 && near > 500, "{late} {amended} {near}");
}

/// The date of an instant in UTC.
fn day(instant: &str) -> &str {
    instant.split('T').next().unwrap()
}

fn next_day(date: &str) -> String {
    date.parse::<chrono::NaiveDate>().unwrap().succ_opt().unwrap().to_string()
}

#[test]
fn both_formats_give_the_same_usage() {
    let workspace = Workspace::new();
    let usage = |format: &str| {
        generate(&workspace, format, &["--events", "20000", "--days", "3", "--format", format]);
        run(&workspace, format);
        let columns = "tenant_id, customer_id, subscription_id, meter_id, price_id, dimensions, window_start, window_end";
        let values = "period_start, quantity, event_count, cost, currency, events_digest";
        rows(&workspace, format, &format!("SELECT {columns}, {values} FROM usage_windows ORDER BY {columns}"))
    };
    let parquet = usage("parquet");
    assert!(parquet.len() > 1000);
    assert_eq!(parquet, usage("ndjson"));
}

#[test]
fn small_numbers_of_events_and_the_profiles_of_this_repository_run() {
    let workspace = Workspace::new();
    generate(&workspace, "few", &["--events", "3", "--days", "5"]);
    assert_eq!(run(&workspace, "few")["events"]["read"], 3);
    let compare = fixtures().parent().unwrap().join("benches/compare/profile.yaml");
    let announced = generate(&workspace, "compare", &[compare.to_str().unwrap(), "--events", "5000"]);
    let outcome = run(&workspace, "compare");
    assert_eq!(outcome["events"]["duplicates"], announced["run"]["duplicates"]);
    assert_eq!(outcome["events"]["dead_lettered"], 0);
}

#[test]
fn the_report_says_what_was_written() {
    let workspace = Workspace::new();
    let outcome = workspace.trueup(&["generate", "--out", "made", "--events", "100000", "--format", "ndjson"]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    assert_snapshot!(normalised(&outcome.stdout), @r"
    trueup generate demo: wrote 100,000 rows in 14 files to made
      rows         97,300 events + 2,000 duplicates + 500 amendments + 200 voids
      of events    928 late by up to 3 days, 10 without a timestamp, 20 with a property that is no number, 30 of unknown customers
      a run finds  2,700 duplicates, 200 voided
      dead letters customer_not_found 30, invalid_property 20, malformed_event 10
      size         28,905 kB of ndjson, seed 1
      time         <seconds> s

      trueup run made/job.yaml  # compute usage and cost of these events
    ");
}

#[test]
fn the_built_in_profile_can_be_printed_and_used_as_a_file() {
    let workspace = Workspace::new();
    let printed = workspace.trueup(&["generate", "--print-profile"]);
    assert_eq!(printed.code, 0, "{printed:?}");
    workspace.write("mine.yaml", &printed.stdout);
    generate(&workspace, "mine", &["mine.yaml", "--events", "2000"]);
    generate(&workspace, "built-in", &["--events", "2000"]);
    assert_eq!(contents(&workspace, "mine"), contents(&workspace, "built-in"));
}

#[test]
fn a_folder_in_use_is_left_alone_unless_forced() {
    let workspace = Workspace::new();
    workspace.write("made/mine.txt", "mine");
    workspace.trueup(&["generate", "--out", "made"]).fails_with(2, &["made is not empty", "--force"]);
    assert_eq!(contents(&workspace, "made").len(), 1);
    generate(&workspace, "made", &["--events", "5000", "--days", "9", "--force"]);
    // A shorter generation leaves no events of the longer one; what is not its own stays.
    let announced = generate(&workspace, "made", &["--events", "1000", "--days", "2", "--force"]);
    assert_eq!(run(&workspace, "made")["events"]["read"], announced["written"]["rows"]);
    assert_eq!(workspace.read("made/mine.txt"), "mine");
    workspace.trueup(&["generate"]).fails_with(2, &["--out"]);
    workspace.trueup(&["generate", "--out", "x", "--days", "0"]).fails_with(2, &["--days must be from 1"]);
    workspace.trueup(&["generate", "missing.yaml", "--out", "x"]).fails_with(2, &["cannot read missing.yaml"]);
}

/// Whoever asks it to end finds what was there before.
#[test]
fn a_generation_that_ends_early_leaves_what_was_there() {
    let workspace = Workspace::new();
    generate(&workspace, "made", &["--events", "2000"]);
    workspace.write("made/customers.csv", "mine\n");
    let before = contents(&workspace, "made");
    let profile = workspace.trueup(&["generate", "--print-profile"]).stdout.replace("\"0.0000016\"", "cheap");
    workspace.write("bad.yaml", profile);
    workspace.trueup(&["generate", "bad.yaml", "--out", "made", "--force"]).fails_with(2, &["bad.yaml:", "cheap"]);
    assert_eq!(contents(&workspace, "made"), before);
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        for (folder, is_there) in [("made", true), ("new", false)] {
            let child = workspace.start(&["generate", "--out", folder, "--events", "900000000", "--force"]);
            let partial = workspace.path(folder).join(".trueup-generate.partial/events");
            while !partial.exists() || std::fs::read_dir(&partial).unwrap().next().is_none() {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            let id = child.id().to_string();
            assert!(std::process::Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
            assert_eq!(child.wait_with_output().unwrap().status.code(), Some(code));
            assert_eq!(workspace.path(folder).exists(), is_there);
        }
    }
    assert_eq!(contents(&workspace, "made"), before);
    // What a killed one left is in nobody's way.
    workspace.write("killed/.trueup-generate.partial/events/x", "");
    generate(&workspace, "killed", &["--events", "2000"]);
    assert_eq!(std::fs::read_dir(workspace.path("killed")).unwrap().count(), 6);
}

/// A profile with one thing wrong is refused: the message names the line and says what.
#[test]
fn wrong_profiles_are_refused_with_file_and_line() {
    let good = Workspace::new().trueup(&["generate", "--print-profile"]).stdout;
    for (from, to, message) in [
        ("window: hour", "windows: hour", "unknown field `windows`"),
        ("version: 1", "version: 2", "version 2 is unknown"),
        ("name: demo", "name: a b", "name `a b` must consist of"),
        ("name: demo", "name: .x", "not begin with `.`"),
        ("{name: gb,", "{name: usage.gb,", "property `usage.gb` must have a name without `.`"),
        ("timezone: Europe/Berlin", "timezone: Berlin", "time zone `Berlin` is unknown"),
        ("start: 2026-03-20", "start: 2026-02-30", "start `2026-02-30` is no date"),
        ("days: 14", "days: 0", "days must be from 1"),
        ("events: 1000000", "events: many", ""),
        ("window: hour", "window: fortnight", "window `fortnight` is unknown"),
        ("count: 500", "count: 0", "customers.count must be"),
        ("tenants: 3", "tenants: 501", "customers.tenants must be"),
        ("skew: 1.1", "skew: 5", "customers.skew 5 must be"),
        ("currency: USD, weight: 5", "currency: DOL, weight: 5", "currency `DOL` is unknown"),
        ("billing_period: month", "billing_period: moon", "billing_period `moon` must be one of"),
        ("duplicates: 2%", "duplicates: 0.02", "rate duplicates `0.02` must be a share"),
        ("unknown_customer: 0.03%", "unknown_customer: 99%", "rate"),
        ("late_days: 3", "late_days: 0", "late_days 0 must be"),
        ("late: 1%", "latte: 1%", "unknown field `latte`"),
        (
            "integer: {min: 1, max: 4000, skew: 2}",
            "integer: {min: 1, max: 0}",
            "property `output_tokens` has a max below its min",
        ),
        ("integer: {min: 1, max: 4000, skew: 2}", "integer: {min: 1, maximum: 9}", "unknown field `maximum`"),
        ("pool: {prefix: user-, size: 5000, skew: 0.8}", "pool: {prefix: user-, size: 0}", "property `user_id` needs a size"),
        ("min: \"0.5\"", "min: \"0.5555\"", "is no number of 3 places"),
        ("constant: eu-central", "constant: [a]", "property `region` must be a text"),
        ("constant: eu-central", "constant: a, pool: {prefix: a, size: 1}", "needs exactly one of"),
        ("{name: gb,", "{name: gb, color: red,", "unknown field `color`"),
        ("event_name: session.heartbeat", "event_name: api.request", "event_name `api.request` is empty or used twice"),
        ("aggregation: max,", "aggregation: maximum,", "aggregation `maximum` is unknown"),
        ("aggregation: max,", "agregation: max,", "unknown field `agregation`"),
        ("price_id: pro_usd_storage,", "price_id: pro_usd_storage, colour: red,", "colour"),
        (
            "price_id: pro_usd_storage, plan_id: pro",
            "price_id: other, plan_id: other",
            "meter `storage_gb` has no price on plan `pro`",
        ),
        ("unit_amount: \"0.0000016\"", "unit_amount: \"cheap\"", "cheap"),
    ] {
        let workspace = Workspace::new();
        assert_eq!(good.matches(from).count(), 1, "{from}");
        workspace.write("bad.yaml", good.replace(from, to));
        let outcome = workspace.trueup(&["generate", "bad.yaml", "--out", "made", "--events", "100"]);
        let wrong = good.lines().position(|line| line.contains(from)).unwrap() + 1;
        outcome.fails_with(2, &["bad.yaml:", message]);
        let shown: usize = outcome.stderr.split("bad.yaml:").nth(1).unwrap().split(':').next().unwrap().parse().unwrap();
        // A price stands in several lines; a price that is missing is told of its meter.
        let near =
            message.starts_with("meter `storage_gb`") || (wrong.saturating_sub(5)..=wrong).contains(&shown) || message == "rate";
        assert!(near, "`{to}` is in line {wrong}: {}", outcome.stderr);
        assert!(!workspace.path("made").exists(), "{to}");
    }
}
