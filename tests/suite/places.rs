//! Files that are not what they should be, or not where: stores, plans, outputs, folders.

use std::os::unix::fs::symlink;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, StringArray, StructArray};
use arrow::datatypes::{DataType, Field};

use crate::corrections::{send, tables, world};

/// A name is a file's, whatever SQLite makes of such names.
#[test]
fn a_store_is_a_file_by_whatever_name() {
    for (written, file) in [(":memory:", ":memory:"), ("file:x.db?mode=memory", "file:x.db?mode=memory"), ("./a.db", "a.db")] {
        let workspace = world();
        workspace.edit("job.yaml", "path: trueup.db", &format!("path: \"{written}\""));
        workspace.run(&[]);
        assert!(workspace.path(file).is_file(), "{written}");
        assert_eq!(workspace.run(&[])["rows"]["unchanged"], 4, "{written}");
        assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0, "{written}");
    }
    for (written, code, says) in [("", 2, "must name the database file"), ("x.db/", 2, "x.db/"), ("events", 1, "is a folder")] {
        let workspace = world();
        workspace.edit("job.yaml", "path: trueup.db", &format!("path: \"{written}\""));
        for command in ["run", "plan", "check"] {
            workspace.trueup(&[command, "job.yaml"]).fails_with(code, &[says]);
        }
    }
}

/// What was approved is what was saved.
#[test]
fn an_edited_plan_is_not_applied() {
    let workspace = world();
    assert_eq!(workspace.trueup(&["plan", "job.yaml", "--out", "plan.json"]).code, 0);
    let plan = workspace.read("plan.json");
    let edits = [
        plan.replacen("\"event_count\":1", "\"event_count\":2", 1),
        plan.replace("\"completeness\":\"auto\"", "\"completeness\":\"full\""),
        plan.lines().next().unwrap().to_owned(),
    ];
    for edited in &edits {
        assert!(*edited != plan, "{plan}");
        workspace.write("plan.json", edited);
        workspace.trueup(&["apply", "plan.json"]).fails_with(7, &["plan.json is stale: the file is not as it was saved"]);
    }
    workspace.write("plan.json", &plan.as_bytes()[..plan.len() / 2]);
    workspace.trueup(&["apply", "plan.json"]).fails_with(2, &["plan.json is no saved plan"]);
    workspace.write("plan.json", plan);
    assert_eq!(workspace.trueup(&["apply", "plan.json"]).code, 0);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    assert_eq!(workspace.trueup(&["plan", "job.yaml", "--out", "plan.json"]).code, 0);
    std::fs::remove_file(workspace.path("events/first.ndjson")).unwrap();
    workspace.trueup(&["apply", "plan.json"]).fails_with(7, &["plan.json is stale", "matches no file"]);
}

#[test]
fn nothing_is_written_over_what_a_job_is_made_of() {
    let workspace = world();
    workspace.run(&[]);
    symlink("trueup.db", workspace.path("link")).unwrap();
    let before = (workspace.dump(), workspace.read("job.yaml"));
    for out in ["trueup.db", "link", "./trueup.db-wal", "job.yaml", "./events/first.ndjson", "customers.csv", "prices.yaml"] {
        for command in [&["plan", "job.yaml", "--out", out][..], &["export", "job.yaml", "runs", "--out", out]] {
            workspace.trueup(command).fails_with(2, &[out, "choose another file"]);
        }
    }
    assert_eq!((workspace.dump(), workspace.read("job.yaml")), before);
    assert_eq!(workspace.trueup(&["export", "job.yaml", "runs", "--out", "runs.csv"]).code, 0);
}

/// Links to folders lead in circles; files behind a name of their own are read once.
#[test]
fn folders_below_are_read_and_circles_are_not() {
    let workspace = world();
    workspace.edit("job.yaml", "events/*.ndjson", "**/*.ndjson");
    send(&workspace, "deep/er/second", &[("e", "x1", "2026-01-06", 1)]);
    symlink("..", workspace.path("events/up")).unwrap();
    symlink("../..", workspace.path("events/deep/up")).unwrap();
    let run = workspace.run(&[]);
    assert_eq!((&run["events"]["read"], &run["events"]["metered"]), (&5.into(), &5.into()), "{run}");
    for pattern in ["events/**/second.ndjson", "events/./**/er/*.ndjson", "./events//*/**/second.ndjson"] {
        workspace.edit("job.yaml", "**/*.ndjson", pattern);
        assert_eq!(workspace.run(&["--yes"])["events"]["read"], 1, "{pattern}");
        workspace.edit("job.yaml", pattern, "**/*.ndjson");
    }
    // A folder that lies elsewhere is read through its link.
    workspace.edit("job.yaml", "**/*.ndjson", "events/**/*.ndjson");
    std::fs::rename(workspace.path("events/deep/er"), workspace.path("archive")).unwrap();
    symlink("../../archive", workspace.path("events/deep/er")).unwrap();
    assert_eq!(workspace.run(&[])["events"]["read"], 5);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    // By either of its names.
    symlink("deep", workspace.path("events/other")).unwrap();
    for pattern in ["events/**/other/**/second.ndjson", "events/**/er/*.ndjson", "events/other/**/er/*.ndjson"] {
        workspace.edit("job.yaml", "events/**/*.ndjson", pattern);
        assert_eq!(workspace.run(&["--yes"])["events"]["read"], 1, "{pattern}");
        workspace.edit("job.yaml", pattern, "events/**/*.ndjson");
    }
}

/// JSON has no word for what is no number: it is no value that is absent.
#[test]
fn numbers_that_are_none_are_dead_letters() {
    let workspace = world();
    let texts = |values: [&str; 3]| Arc::new(StringArray::from(values.to_vec())) as ArrayRef;
    let numbers = Arc::new(Float64Array::from(vec![f64::NAN, f64::INFINITY, 2.5])) as ArrayRef;
    let properties = StructArray::from(vec![(Arc::new(Field::new("n", DataType::Float64, true)), numbers)]);
    let times = ["2026-01-05T00:00:00Z"; 3];
    let columns = vec![
        ("tenant_id", texts(["t"; 3])),
        ("id", texts(["p", "q", "r"])),
        ("event_name", texts(["call"; 3])),
        ("external_customer_id", texts(["x2"; 3])),
        ("timestamp", texts(times)),
        ("properties", Arc::new(properties) as ArrayRef),
    ];
    workspace.write_parquet("events/numbers.parquet", columns);
    workspace.edit("job.yaml", "events/*.ndjson", "events/*");
    let run = workspace.run(&[]);
    assert_eq!((&run["usage"]["skipped"], &run["dead_letters"]["invalid_property"]), (&0.into(), &2.into()), "{run}");
    let window = "SELECT quantity FROM usage_windows WHERE subscription_id = 's2' AND window_start = '2026-01-05T00:00:00Z'";
    assert_eq!(workspace.query(window)[0]["quantity"], "2.5");
}

/// Rows that nothing can be read of are found and named like others that somebody altered.
#[test]
fn rows_that_cannot_be_read_are_named() {
    for (sql, names) in [
        ("UPDATE usage_windows SET quantity = 'abc' WHERE subscription_id = 's2'", "usage_windows t / s2 / calls / p"),
        ("UPDATE usage_windows SET window_start = 'zz' WHERE subscription_id = 's2'", "usage_windows"),
        ("UPDATE usage_periods SET amount = '' WHERE subscription_id = 's2'", "usage_periods t / s2 / calls / p"),
        ("UPDATE runs SET basis = 'x'", "runs 0"),
        ("UPDATE runs SET mode = 'x'", "runs 0"),
        ("UPDATE dead_letters SET reason = 'x'", "dead_letters w"),
    ] {
        let workspace = world();
        send(&workspace, "nobody", &[("w", "x9", "2026-01-06", 1)]);
        workspace.run(&[]);
        let before = tables(&workspace);
        workspace.tamper(sql);
        let verified = workspace.trueup(&["verify", "job.yaml"]);
        assert_eq!(verified.code, 3, "{sql}: {verified:?}");
        assert!(verified.stdout.contains(names) && verified.stdout.contains("cannot be read"), "{sql}: {}", verified.stdout);
        if !sql.contains("zz") {
            workspace.trueup(&["run", "job.yaml", "--full"]).fails_with(1, &[names, "repair it from a backup"]);
        }
        if names.starts_with("usage_windows t") {
            workspace.tamper("DELETE FROM usage_windows WHERE quantity = 'abc'");
            workspace.run(&["--full", "--yes"]);
            assert!(tables(&workspace) == before);
            assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
        }
    }
}

/// A dead letter goes with its event, wherever that lay.
#[test]
fn dead_letters_beyond_all_events_are_resolved() {
    let workspace = world();
    send(&workspace, "nobody", &[("w", "x9", "2026-09-06", 1), ("v", "x9", "2025-09-06", 1)]);
    let run = workspace.run(&[]);
    assert_eq!(run["dead_letters"]["customer_not_found"], 2, "{run}");
    std::fs::remove_file(workspace.path("events/nobody.ndjson")).unwrap();
    assert_eq!(workspace.run(&["--yes"])["dead_letters_resolved"], 2);
}

/// A run of one customer or meter judges the dead letters that it meets.
#[test]
fn dead_letters_of_parts_are_opened_and_resolved() {
    let range = ["--start", "2026-01-01", "--end", "2026-02-01"];
    for part in [["--customer", "c2"], ["--meter", "calls"], ["--tenant", "t"]] {
        let workspace = world();
        workspace.edit("subscriptions.csv", "t,s2,c2,pro,USD,month,2025-01-01", "t,s2,c2,pro,USD,month,2026-01-20");
        let arguments: Vec<_> = range.into_iter().chain(part).collect();
        let run = workspace.run(&arguments);
        assert_eq!(run["dead_letters"]["no_active_subscription"], 1, "{part:?} {run}");
        workspace.edit("subscriptions.csv", "2026-01-20", "2025-01-01");
        let run = workspace.run(&arguments);
        assert_eq!((&run["causes"]["dead_letter_resolved"], &run["dead_letters_resolved"]), (&1.into(), &1.into()), "{run}");
        // Those of others stay as they are.
        workspace.edit("customers.csv", "t,c1,x1\n", "");
        workspace.run(&["--yes"]);
        let open = "SELECT * FROM dead_letters WHERE resolved_run_id IS NULL";
        let before = workspace.query(open).len();
        assert!(before > 0);
        workspace.run(&["--customer", "c2", "--yes"]);
        assert_eq!(workspace.query(open).len(), before);
    }
}

/// What was wrong with an event as a whole is right when all meters that want it have counted it.
#[test]
fn a_run_of_one_of_several_meters_leaves_dead_letters_of_events_open() {
    let workspace = world();
    let more = "{meter_id: all, event_name: call, aggregation: count, unpriced: true}]";
    workspace.edit("meters.yaml", "property: n}]", &format!("property: n}}, {more}"));
    workspace.edit("customers.csv", "t,c2,x2\n", "");
    workspace.run(&[]);
    workspace.edit("customers.csv", "t,c1,x1\n", "t,c1,x1\nt,c2,x2\n");
    assert_eq!(workspace.run(&["--meter", "calls", "--yes"])["dead_letters_resolved"], 0);
    let run = workspace.run(&["--yes"]);
    assert_eq!((&run["dead_letters_resolved"], &run["causes"]["dead_letter_resolved"]), (&1.into(), &1.into()), "{run}");
}
