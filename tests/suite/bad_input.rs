//! Input that is wrong: each ends in a clear error with its exit code and leaves
//! the store as it was, or in a dead letter of a run that succeeds.

use std::fs::{self, File};
use std::io::Write as _;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Float64Array, Int64Array, StringArray};
use serde_json::json;

use crate::support::{Row, Workspace, fixtures};

/// The job of `trueup init`, reading any event file, run once.
fn healthy() -> Workspace {
    let workspace = Workspace::of("init");
    workspace.edit("job.yaml", "events/*.ndjson", "events/*");
    workspace.run(&[]);
    workspace
}

/// The command must fail, say why, and write nothing.
#[track_caller]
fn refused(workspace: &Workspace, arguments: &[&str], code: i32, says: &[&str]) {
    let before = workspace.dump();
    let outcome = workspace.trueup(arguments);
    outcome.fails_with(code, says);
    assert_eq!(outcome.stdout, "", "a refusal has no result");
    assert_eq!(workspace.dump(), before, "{arguments:?} changed the store");
}

#[track_caller]
fn run_refused(workspace: &Workspace, code: i32, says: &[&str]) {
    refused(workspace, &["run", "job.yaml"], code, says);
    refused(workspace, &["plan", "job.yaml"], code, says);
}

/// Runs job.yaml, which must succeed; the dead letters that are open.
#[track_caller]
fn dead_letters(workspace: &Workspace) -> Vec<Row> {
    let outcome = workspace.trueup(&["run", "job.yaml", "--output", "json"]);
    outcome.json();
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    workspace.query("SELECT * FROM dead_letters WHERE resolved_run_id IS NULL ORDER BY detail")
}

/// The one dead letter that a file leads to has this reason and says this.
#[track_caller]
fn one_dead_letter(workspace: &Workspace, reason: &str, says: &[&str]) {
    let letters: Vec<_> = dead_letters(workspace).into_iter().filter(|row| row["event_id"] != "e7").collect();
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!(letters[0]["reason"], reason);
    for part in says {
        assert!(letters[0]["detail"].contains(part), "`{part}` is missing in {}", letters[0]["detail"]);
    }
}

fn event(id: &str, properties: &str) -> String {
    format!(
        r#"{{"tenant_id":"demo","id":"{id}","event_name":"api.call","external_customer_id":"acme","timestamp":"2026-01-01T12:00:00Z","ingested_at":"2026-01-02T00:00:00Z","properties":{properties}}}"#
    )
}

fn texts<const N: usize>(values: [&str; N]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

fn parquet_columns() -> Vec<(&'static str, ArrayRef)> {
    vec![
        ("tenant_id", texts(["demo", "demo"])),
        ("id", texts(["p1", "p2"])),
        ("event_name", texts(["api.call", "api.call"])),
        ("external_customer_id", texts(["acme", "acme"])),
        ("timestamp", texts(["2026-01-01T12:00:00Z", "2026-01-01T12:01:00Z"])),
        ("properties", texts([r#"{"status":200,"bytes":1}"#, r#"{"status":200,"bytes":2}"#])),
    ]
}

// --- event files -----------------------------------------------------------------------------

#[test]
fn a_truncated_parquet_file_is_refused_wherever_it_breaks_off() {
    let workspace = healthy();
    let whole = fs::read(fixtures().join("llm_usage/events/2026-01-01.parquet")).unwrap();
    for length in [0, 3, 4, 11, whole.len() / 2, whole.len() - 9, whole.len() - 1] {
        workspace.write("events/cut.parquet", &whole[..length]);
        run_refused(&workspace, 1, &["events/cut.parquet", "truncated or no Parquet file"]);
    }
}

#[test]
fn a_parquet_file_of_garbage_is_refused() {
    let workspace = healthy();
    workspace.write("events/garbage.parquet", "this is no Parquet file, whatever its name says".repeat(50));
    run_refused(&workspace, 1, &["events/garbage.parquet", "truncated or no Parquet file"]);
    workspace.write("events/garbage.parquet", [b"PAR1".as_slice(), &[0xff; 500], b"PAR1"].concat());
    run_refused(&workspace, 1, &["events/garbage.parquet"]);
}

#[test]
fn a_parquet_file_with_damaged_pages_never_panics() {
    let workspace = Workspace::of("init");
    workspace.edit("job.yaml", "events/*.ndjson", "events/*.parquet");
    let whole = fs::read(fixtures().join("llm_usage/events/2026-01-01.parquet")).unwrap();
    let mut refusals = 0;
    for at in (4..whole.len()).step_by(whole.len() / 40) {
        let mut damaged = whole.clone();
        for byte in damaged.iter_mut().skip(at).take(16) {
            *byte ^= 0xa5;
        }
        workspace.write("events/damaged.parquet", damaged);
        let outcome = workspace.trueup(&["plan", "job.yaml"]);
        assert!(!outcome.stderr.contains("panicked"), "damaged at {at}: {}", outcome.stderr);
        if outcome.code != 0 {
            outcome.fails_with(1, &["events/damaged.parquet"]);
            refusals += 1;
        }
    }
    assert!(refusals > 20, "only {refusals}");
}

#[test]
fn columns_of_the_wrong_type_are_refused_by_name() {
    let workspace = healthy();
    let wrong: [(&str, ArrayRef, &str); 6] = [
        ("timestamp", Arc::new(Int64Array::from(vec![1_767_225_600, 1_767_225_601])), "expected a timestamp, or RFC 3339 text"),
        ("timestamp", Arc::new(BooleanArray::from(vec![true, false])), "expected a timestamp"),
        ("id", Arc::new(Float64Array::from(vec![1.0, 2.0])), "expected text"),
        ("tenant_id", Arc::new(BooleanArray::from(vec![true, false])), "expected text"),
        ("properties", Arc::new(Float64Array::from(vec![1.0, 2.0])), "expected JSON text, a struct or a map"),
        ("deleted", Arc::new(Float64Array::from(vec![1.0, 0.0])), "expected a boolean"),
    ];
    for (column, array, expected) in wrong {
        let mut columns = parquet_columns();
        columns.retain(|(name, _)| *name != column);
        columns.push((column, array));
        workspace.write_parquet("events/wrong.parquet", columns);
        run_refused(&workspace, 1, &["events/wrong.parquet", &format!("column `{column}`"), expected]);
    }
}

#[test]
fn missing_columns_are_refused_by_name() {
    let workspace = healthy();
    for column in ["tenant_id", "id", "event_name", "external_customer_id", "timestamp"] {
        let mut columns = parquet_columns();
        columns.retain(|(name, _)| *name != column);
        workspace.write_parquet("events/short.parquet", columns);
        let says = [&format!("no column `{column}`"), "source.columns", "columns found: "];
        run_refused(&workspace, 1, &[&["events/short.parquet"], says.map(|text| text as &str).as_slice()].concat());
        fs::remove_file(workspace.path("events/short.parquet")).unwrap();

        let header = ["tenant_id", "id", "event_name", "external_customer_id", "timestamp"]
            .map(|name| if name == column { "other" } else { name });
        workspace.write("events/short.csv", header.join(",") + "\n");
        run_refused(&workspace, 1, &[&["events/short.csv"], says.map(|text| text as &str).as_slice()].concat());
        fs::remove_file(workspace.path("events/short.csv")).unwrap();
    }
    workspace.write_parquet("events/mapped.parquet", parquet_columns());
    workspace.edit("job.yaml", "  kind: files", "  kind: files\n  columns: {ingested_at: arrived}");
    run_refused(&workspace, 1, &["events/mapped.parquet", "no column `arrived`"]);
}

#[test]
fn a_malformed_json_line_is_a_dead_letter() {
    let workspace = healthy();
    let lines = [
        event("a1", r#"{"status":200,"bytes":5}"#),
        r#"{"tenant_id":"demo","id":"#.to_owned(),
        event("a2", r#"{"status":200,"bytes":7}"#),
    ];
    workspace.write("events/bad.ndjson", lines.join("\n"));
    one_dead_letter(&workspace, "malformed_event", &["events/bad.ndjson line 2"]);
    let row = &workspace
        .query("SELECT * FROM usage_windows WHERE meter_id = 'bytes_sent' AND window_start = '2026-01-01T12:00:00Z'")[0];
    assert_eq!((row["quantity"].as_str(), row["event_count"].as_str()), ("12", "2"));
}

#[test]
fn every_kind_of_malformed_line_is_a_dead_letter_of_its_line() {
    let workspace = healthy();
    let deep = "[".repeat(20_000);
    let broken: [(Vec<u8>, &str); 9] = [
        (b"[1, 2]".to_vec(), "a JSON object"),
        (b"\"text\"".to_vec(), "a JSON object"),
        (b"{\"tenant_id\":\"demo\"} trailing".to_vec(), "trailing"),
        (b"{\"tenant_id\":\"demo\",\"id\":\"\xff\xfe\"}".to_vec(), "utf-8"),
        (event("b1", "{}").replace("2026-01-01T12:00:00Z", "yesterday").into_bytes(), "timestamp `yesterday`"),
        (event("b2", "{}").replace("2026-01-01T12:00:00Z", "9999-12-31T00:00:00Z").into_bytes(), "between the years"),
        (
            event("line-7", "{}").replace(r#""external_customer_id":"acme","#, "").into_bytes(),
            "`external_customer_id` is missing",
        ),
        (
            event("b4", "[1]").replace(r#""event_name":"api.call""#, r#""event_name":{"a":1}"#).into_bytes(),
            "where a text is expected",
        ),
        (event("b5", &deep).into_bytes(), "expected value"),
    ];
    let lines: Vec<_> = broken.iter().map(|(line, _)| line.as_slice()).collect();
    workspace.write("events/bad.ndjson", lines.join(&b'\n'));
    let letters = dead_letters(&workspace);
    for (number, (_, says)) in (1..).zip(&broken) {
        let place = format!("bad.ndjson line {number}: ");
        // A line that could be taken apart is known by its id.
        let is_there = |row: &&Row| {
            row["detail"].contains(says) && (row["detail"].contains(&place) || row["event_id"] == format!("line-{number}"))
        };
        let details: Vec<_> = letters.iter().map(|row| &row["detail"]).collect();
        assert_eq!(letters.iter().filter(is_there).count(), 1, "line {number} ({says}): {details:#?}");
    }
    let counted = workspace.query("SELECT * FROM dead_letters WHERE reason = 'malformed_event'");
    assert_eq!(counted.len(), broken.len());
}

#[test]
fn hostile_values_are_dead_letters_of_their_meter_or_counted() {
    let workspace = healthy();
    let values = [
        ("c1", "1e999999999999", "value_out_of_range"),
        ("c2", "-1e40", "value_out_of_range"),
        ("c3", "\"NaN\"", "invalid_property"),
        ("c4", "true", "invalid_property"),
        ("c5", "{\"a\":1}", "invalid_property"),
        ("c6", "\"\"", "invalid_property"),
        ("c7", "9999999999", ""),
        ("c8", "1e-999999999999", ""),
        ("c9", "null", ""),
    ];
    let lines: Vec<_> = values.iter().map(|(id, value, _)| event(id, &format!(r#"{{"status":503,"bytes":{value}}}"#))).collect();
    workspace.write("events/hostile.ndjson", lines.join("\n"));
    let letters = dead_letters(&workspace);
    for (id, value, reason) in values {
        let found: Vec<_> = letters
            .iter()
            .filter(|row| row["event_id"] == id)
            .map(|row| (row["meter_id"].as_str(), row["reason"].as_str()))
            .collect();
        let expected: &[(&str, &str)] = if reason.is_empty() { &[] } else { &[("bytes_sent", reason)] };
        assert_eq!(found, expected, "bytes {value}");
    }
}

#[test]
fn a_sum_that_overflows_fails_and_names_the_window() {
    let workspace = healthy();
    let huge = "9".repeat(20);
    let lines = [event("d1", &format!(r#"{{"bytes":{huge}}}"#)), event("d2", &format!(r#"{{"bytes":{huge}}}"#))];
    workspace.write("events/huge.ndjson", lines.join("\n"));
    run_refused(&workspace, 1, &["2026-01-01T12:00:00Z", "sub_1", "bytes_sent"]);
}

#[test]
fn a_csv_row_with_a_wrong_number_of_fields_is_a_dead_letter() {
    let workspace = healthy();
    let rows = "tenant_id,id,event_name,external_customer_id,timestamp,properties\n\
                demo,r1,api.call,acme,2026-01-01T12:00:00Z,\"{\"\"status\"\":200,\"\"bytes\"\":3}\"\n\
                demo,r2,api.call,acme,2026-01-01T12:00:00Z\n\
                demo,r3,api.call,acme,2026-01-01T12:00:00Z,\"{\"\"status\"\":200,\"\"bytes\"\":4}\"\n";
    workspace.write("events/rows.csv", rows);
    one_dead_letter(&workspace, "malformed_event", &["events/rows.csv line 3", "5 fields where the header has 6"]);
    let row = &workspace
        .query("SELECT * FROM usage_windows WHERE meter_id = 'bytes_sent' AND window_start = '2026-01-01T12:00:00Z'")[0];
    assert_eq!(row["quantity"], "7");
}

#[test]
fn invalid_utf8_in_csv_is_a_dead_letter() {
    let workspace = healthy();
    let mut rows =
        b"tenant_id,id,event_name,external_customer_id,timestamp\ndemo,r1,api.call,acme,2026-01-01T12:00:00Z\ndemo,".to_vec();
    rows.extend(b"\xff\xfe,api.call,acme,2026-01-01T12:00:00Z\n");
    workspace.write("events/latin.csv", rows);
    one_dead_letter(&workspace, "malformed_event", &["events/latin.csv line 3", "utf-8"]);
}

#[test]
fn compressed_files_that_break_off_are_refused() {
    let workspace = healthy();
    let lines: String = (0..2000).map(|number| event(&format!("z{number}"), "{}") + "\n").collect();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(lines.as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(lines.as_bytes(), 3).unwrap();
    for (name, bytes) in [("events/cut.ndjson.gz", gzip), ("events/cut.ndjson.zst", zstd)] {
        for length in [bytes.len() / 2, bytes.len() - 1] {
            workspace.write(name, &bytes[..length]);
            run_refused(&workspace, 1, &[name, "truncated, damaged, or no"]);
        }
        workspace.write(name, "neither of the two");
        run_refused(&workspace, 1, &[name]);
        fs::remove_file(workspace.path(name)).unwrap();
    }
}

#[test]
fn files_that_cannot_be_read_are_refused_by_name() {
    let workspace = healthy();
    workspace.write("events/notes.txt", "no events here");
    run_refused(&workspace, 1, &["events/notes.txt", ".parquet, .ndjson, .jsonl or .csv"]);
    fs::remove_file(workspace.path("events/notes.txt")).unwrap();
    workspace.write("events/notes.gz", "no events here");
    run_refused(&workspace, 1, &["events/notes.gz"]);
}

#[test]
fn a_pattern_that_matches_nothing_is_refused() {
    let workspace = healthy();
    workspace.edit("job.yaml", "events/*", "evnets/*.ndjson");
    run_refused(&workspace, 1, &["`evnets/*.ndjson` matches no file", "source.paths"]);
    refused(&workspace, &["check", "job.yaml"], 1, &["matches no file"]);
    workspace.edit("job.yaml", "evnets/*.ndjson", "events/***.ndjson");
    run_refused(&workspace, 1, &["events/***.ndjson", "no glob pattern"]);
}

#[test]
fn empty_files_are_no_error() {
    let workspace = healthy();
    workspace.write("events/empty.ndjson", "");
    workspace.write("events/blank.ndjson", "\n\n  \n");
    workspace.write("events/empty.csv", "tenant_id,id,event_name,external_customer_id,timestamp\n");
    let run = workspace.run(&[]);
    assert_eq!(run["events"]["read"], 8);
    assert_eq!((&run["rows"]["inserted"], &run["rows"]["updated"], &run["rows"]["retracted"]), (&0.into(), &0.into(), &0.into()));
}

// --- the job file ----------------------------------------------------------------------------

/// Each edit of the job file is refused with its line.
#[track_caller]
fn job_edits_refused(edits: &[(&str, &str, &str)]) {
    let workspace = healthy();
    let whole = workspace.read("job.yaml");
    for (from, to, says) in edits {
        workspace.edit("job.yaml", from, to);
        let line = 1 + workspace.read("job.yaml").split(to).next().unwrap().matches('\n').count() + to.matches('\n').count();
        refused(&workspace, &["run", "job.yaml"], 2, &[&format!("job.yaml:{line}"), says]);
        workspace.write("job.yaml", &whole);
    }
}

#[test]
fn unknown_keys_of_the_job_file_are_refused_at_every_level() {
    job_edits_refused(&[
        ("timezone: UTC", "timezoen: UTC", "timezoen"),
        ("kind: files", "kinds: files", "kinds"),
        ("keep: latest", "kepe: latest", "kepe"),
        ("customers: {path: customers.csv}", "custommers: {path: customers.csv}", "custommers"),
        ("{path: prices.yaml}", "{paht: prices.yaml}", "paht"),
        ("path: trueup.db", "paht: trueup.db", "paht"),
        ("window: hour ", "guard: {max_rows: 3} ", "max_rows"),
        ("window: hour ", "schedule: {crom: x} ", "crom"),
        ("kind: files", "kind: files\n  columns: {tenant: t}", "`tenant`, which is no event field"),
    ]);
}

#[test]
fn wrong_values_of_the_job_file_are_refused() {
    job_edits_refused(&[
        ("version: 1", "version: 2", "version 2 is unknown"),
        ("version: 1", "version: one", ""),
        ("job: my_usage", "job: \"my usage\"", "letters, digits"),
        ("timezone: UTC", "timezone: Europe/Berlim", "time zone `Europe/Berlim` is unknown"),
        ("window: hour", "window: 7m", "window `7m` is unknown: use one of 1m, 5m"),
        ("kind: sqlite", "kind: postgres", "store kind `postgres` is not available"),
        ("kind: files", "kind: kinesis", "source kind `kinesis` is unknown"),
        ("kind: files", "kind: kafka", "source.paths does not belong to kind kafka"),
        ("window: hour ", "schedule: {cron: banana} ", "cron `banana`"),
        ("keep: latest", "keep: newest", "keep `newest` must be latest or first"),
        ("[tenant_id, id]", "[tenant_id, uuid]", "`uuid`, which is no event field"),
        ("window: hour ", "guard: {max_changed_rows: lots} ", "max_changed_rows `lots`"),
        ("window: hour ", "guard: {max_cost_change: \"-5%\"} ", "max_cost_change `-5%`"),
        ("window: hour ", "schedule: {cron: \"0 2 * * *\", timezone: Mars/Base} ", "time zone `Mars/Base` is unknown"),
        ("window: hour ", "schedule: {timezone: UTC} ", "cron"),
        ("window: hour ", "window: [hour] ", ""),
    ]);
}

#[test]
fn a_deduplication_key_must_hold_the_id() {
    let workspace = healthy();
    workspace.edit("job.yaml", "[tenant_id, id]", "[tenant_id]");
    run_refused(&workspace, 2, &["job.yaml", "must contain `id`"]);
    workspace.edit("job.yaml", "[tenant_id]", "[id, properties]");
    run_refused(&workspace, 2, &["job.yaml", "cannot use `properties`"]);
}

#[test]
fn job_files_that_are_none_are_refused() {
    let workspace = healthy();
    refused(&workspace, &["run", "jbo.yaml"], 2, &["cannot read jbo.yaml"]);
    refused(&workspace, &["run", "events"], 2, &["cannot read events"]);
    refused(&workspace, &["run"], 2, &["<JOB>"]);
    let whole = workspace.read("job.yaml");
    let broken: [(&[u8], &str); 6] = [
        (b"", "job.yaml"),
        (b"\xff\xfe", "cannot read job.yaml"),
        (b"just text", "job.yaml"),
        (b"version: 1\njob: [", "job.yaml:"),
        (b"version: 1\nversion: 1\n", "job.yaml:2"),
        (b"a: &a [*a, *a]\n", "job.yaml"),
    ];
    for (content, says) in broken {
        workspace.write("job.yaml", content);
        refused(&workspace, &["run", "job.yaml"], 2, &[says]);
    }
    for key in ["version: 1\n", "job: my_usage\n", "  kind: files\n", "  customers: {path: customers.csv}\n"] {
        workspace.write("job.yaml", whole.replace(key, ""));
        let name = key.trim().split(':').next().unwrap();
        refused(&workspace, &["run", "job.yaml"], 2, &["job.yaml", &format!("`{name}`")]);
    }
    workspace.write("job.yaml", whole.replace("path: trueup.db", ""));
    refused(&workspace, &["run", "job.yaml"], 2, &["store.path"]);
    workspace.write("job.yaml", whole.replace("[\"events/*\"]", "[]"));
    refused(&workspace, &["run", "job.yaml"], 2, &["source.paths"]);
}

// --- reference tables ------------------------------------------------------------------------

/// With a good row on line 2, each of the rows on line 3 is refused there.
#[track_caller]
fn rows_refused(file: &str, head: &str, good: &str, bad: &[(&str, &str)]) {
    let workspace = healthy();
    for (row, says) in bad {
        workspace.write(file, format!("{head}\n{good}\n{row}\n"));
        let before = workspace.dump();
        let outcome = workspace.trueup(&["run", "job.yaml"]);
        outcome.fails_with(2, &[file, says]);
        let names_row = outcome.stderr.contains(&format!("{file} line 3")) || outcome.stderr.contains(&format!("{file}:3"));
        assert!(names_row, "`{row}`: {}", outcome.stderr);
        assert_eq!(workspace.dump(), before);
    }
}

#[test]
fn wrong_customers_are_refused_by_row() {
    let head = "tenant_id,customer_id,external_customer_id,valid_from,valid_to";
    rows_refused(
        "customers.csv",
        head,
        "demo,cus_1,acme,,",
        &[
            ("demo,cus_1,acme,,", "already valid at that time by customers.csv line 2"),
            ("demo,cus_2,acme,2026-01-01T00:00:00Z,", "already valid at that time"),
            ("demo,cus_2,beta,2026-01-02T00:00:00Z,2026-01-02T00:00:00Z", "is not after valid_from"),
            ("demo,cus_2,beta,soon,", "valid_from `soon`"),
            ("demo,cus_2,,,", "`external_customer_id` is empty"),
            (",cus_2,beta,,", "`tenant_id` is empty"),
        ],
    );
    rows_refused(
        "customers.csv",
        head,
        "demo,cus_1,acme,2026-01-01T00:00:00Z,2026-02-01T00:00:00Z",
        &[
            ("demo,cus_2,acme,2026-01-31T23:59:59Z,", "end the earlier row"),
            ("demo,cus_2,acme,,2026-01-01T00:00:01Z", "already valid at that time"),
        ],
    );
    let workspace = healthy();
    workspace.write("customers.csv", format!("{head}\ndemo,cus_1,acme\n"));
    run_refused(&workspace, 2, &["customers.csv", "line 2"]);
    workspace.write("customers.csv", "tenant_id,customer_id\ndemo,cus_1\n");
    run_refused(&workspace, 2, &["customers.csv", "no column `external_customer_id`", "columns found: tenant_id, customer_id"]);
    fs::remove_file(workspace.path("customers.csv")).unwrap();
    run_refused(&workspace, 2, &["customers.csv"]);
}

#[test]
fn rows_that_follow_each_other_do_not_overlap() {
    let workspace = healthy();
    let rows = "demo,cus_1,acme,,2026-01-01T09:05:00Z\ndemo,cus_2,acme,2026-01-01T09:05:00Z,\ndemo,cus_2,globex,,\n";
    workspace.write("customers.csv", format!("tenant_id,customer_id,external_customer_id,valid_from,valid_to\n{rows}"));
    workspace.run(&[]);
}

#[test]
fn wrong_customers_of_other_formats_are_refused_by_row() {
    let workspace = healthy();
    workspace.edit("job.yaml", "customers.csv", "customers.parquet");
    let twice = vec![
        ("tenant_id", texts(["demo", "demo"])),
        ("customer_id", texts(["cus_1", "cus_2"])),
        ("external_customer_id", texts(["acme", "acme"])),
    ];
    workspace.write_parquet("customers.parquet", twice);
    run_refused(&workspace, 2, &["customers.parquet row 2", "already valid at that time by customers.parquet row 1"]);
    workspace.write("customers.parquet", "garbage");
    run_refused(&workspace, 2, &["customers.parquet"]);
    workspace.edit("job.yaml", "customers.parquet", "customers.ndjson");
    let row = r#"{"tenant_id":"demo","customer_id":"cus_1","external_customer_id":"acme"}"#;
    workspace.write("customers.ndjson", format!("{row}\n\n{row}\n"));
    run_refused(&workspace, 2, &["customers.ndjson line 3", "already valid at that time by customers.ndjson line 1"]);
    workspace.write("customers.ndjson", format!("{row}\n{{\n"));
    run_refused(&workspace, 2, &["customers.ndjson", "line 2"]);
    workspace.edit("job.yaml", "customers.ndjson", "customers.xlsx");
    run_refused(&workspace, 2, &["customers.xlsx", ".csv, .ndjson, .jsonl or .parquet"]);
}

#[test]
fn wrong_subscriptions_are_refused_by_row() {
    let head = "tenant_id,subscription_id,customer_id,plan_id,currency,billing_period,anchor,timezone,started_at,ended_at";
    rows_refused(
        "subscriptions.csv",
        head,
        "demo,sub_1,cus_1,standard,USD,month,,,2026-01-01T00:00:00Z,",
        &[
            ("demo,sub_1,cus_2,standard,USD,month,,,2026-01-01T00:00:00Z,", "already used by subscriptions.csv line 2"),
            ("demo,sub_2,cus_2,standard,USS,month,,,2026-01-01T00:00:00Z,", "currency `USS` is unknown"),
            ("demo,sub_2,cus_2,standard,usd,month,,,2026-01-01T00:00:00Z,", "currency `usd` is unknown"),
            ("demo,sub_2,cus_2,standard,USD,fortnight,,,2026-01-01T00:00:00Z,", "billing_period `fortnight` is unknown"),
            ("demo,sub_2,cus_2,standard,USD,month,31st,,2026-01-01T00:00:00Z,", "anchor `31st`"),
            ("demo,sub_2,cus_2,standard,USD,month,,Berlin,2026-01-01T00:00:00Z,", "timezone `Berlin` is unknown"),
            ("demo,sub_2,cus_2,standard,USD,month,,,,", "`started_at` is empty"),
            ("demo,sub_2,cus_2,standard,USD,month,,,2026-01-01T00:00:00Z,2025-01-01T00:00:00Z", "is not after started_at"),
            ("demo,sub_2,cus_2,,USD,month,,,2026-01-01T00:00:00Z,", "`plan_id` is empty"),
        ],
    );
}

#[test]
fn wrong_meters_are_refused_by_row() {
    let good = "  - {meter_id: api_calls, event_name: api.call, aggregation: count}";
    rows_refused(
        "meters.yaml",
        "meters:",
        good,
        &[
            ("  - {meter_id: api_calls, event_name: login, aggregation: count}", "already used by meters.yaml line 2"),
            (
                "  - {meter_id: m, event_name: e, aggregation: median, property: p}",
                "aggregation `median` is unknown: use one of count, sum",
            ),
            ("  - {meter_id: m, event_name: e, aggregation: sum}", "aggregation sum needs `property`"),
            ("  - {meter_id: m, event_name: e, aggregation: count, property: p}", "remove `property` and `expression`"),
            ("  - {meter_id: m, event_name: e, aggregation: count, window: 2h}", "window `2h` is unknown"),
            (
                "  - {meter_id: m, event_name: e, aggregation: count, window: {session: {gap: soon}}}",
                "gap `soon` is no length such as 15m",
            ),
            ("  - {meter_id: m, event_name: e, aggregation: count, window: {sliding: {size: 1h}}}", "`sliding`"),
            (
                "  - {meter_id: m, event_name: e, aggregation: count, window: {hopping: {size: 1h, advance: 30m}}}",
                "declare the meter `unpriced: true`",
            ),
            (
                "  - {meter_id: m, event_name: e, aggregation: count, unpriced: true, window: {hopping: {size: 1h, advance: 7m}}}",
                "does not divide a day",
            ),
            (
                "  - {meter_id: m, event_name: e, aggregation: weighted_sum, property: p, window: {session: {gap: 1h}}}",
                "weighted_sum needs a tumbling window",
            ),
            ("  - {meter_id: m, event_name: e, aggregation: sum_with_multiplier, property: p}", "needs `multiplier`"),
            ("  - {meter_id: m, event_name: e, aggregation: sum, property: p, multiplier: \"2\"}", "multiplier belongs to"),
            (
                "  - {meter_id: m, event_name: e, aggregation: sum, property: p, operation_property: op}",
                "operation_property belongs to count_unique",
            ),
            ("  - {meter_id: m, event_name: e, aggregation: sum, property: p, expression: a + b}", "exclude each other"),
            ("  - {meter_id: m, event_name: e, aggregation: sum, expression: a + }", "expression `a +` cannot be read"),
            ("  - {meter_id: m, event_name: e, aggregation: count_unique, expression: a + b}", "not of an expression"),
            ("  - {meter_id: m, event_name: e, aggregation: count, charge_on: month}", "charge_on `month` is unknown"),
            ("  - {meter_id: m, event_name: e, aggregation: count, dimensions: [a, a]}", "dimension `a` is named twice"),
            ("  - {meter_id: m, event_name: e, aggregation: count, filter: []}", "filter"),
            (
                "  - {meter_id: m, event_name: e, aggregation: count, filters: [{property: p, op: like, value: x}]}",
                "filter op `like` is unknown",
            ),
            (
                "  - {meter_id: m, event_name: e, aggregation: count, filters: [{property: p, op: gt, value: x}]}",
                "needs a number",
            ),
            ("  - {meter_id: m, event_name: e, aggregation: count, filters: [{property: p, op: in}]}", "needs values"),
            (
                "  - {meter_id: m, event_name: e, aggregation: count, filters: [{property: p, op: eq, values: [a, b]}]}",
                "needs one value",
            ),
            (
                "  - {meter_id: m, event_name: e, aggregation: count, filters: [{property: p, op: exists, value: a}]}",
                "takes no value",
            ),
            ("  - {meter_id: m, event_name: e, aggregation: count, filters: [{property: p, op: eq, vlaue: a}]}", "vlaue"),
            ("  - {meter_id: m, aggregation: count}", "event_name"),
        ],
    );
    let workspace = healthy();
    workspace.write("meters.yaml", "meters: []\n");
    run_refused(&workspace, 2, &["meters.yaml", "has no meter"]);
    workspace.write("meters.yaml", "metres: []\n");
    run_refused(&workspace, 2, &["meters.yaml", "`metres`", "`meters`"]);
}

#[test]
fn wrong_prices_are_refused_by_row() {
    const PRICE: &str = "plan_id: standard, meter_id: api_calls, currency: USD";
    let good = format!("  - {{price_id: a, {PRICE}, valid_to: 2026-01-01, model: per_unit, unit_amount: \"1\"}}");
    let bad = [
        ("price_id: a, valid_from: 2026-01-01, model: per_unit, unit_amount: \"1\"", "`a` is already used by prices.yaml line 2"),
        (
            "price_id: b, valid_from: 2025-12-31, model: per_unit, unit_amount: \"1\"",
            "`b` is valid at the same time as `a` (prices.yaml line 2)",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, valid_to: 2026-01-01, model: per_unit, unit_amount: \"1\"",
            "is not after valid_from",
        ),
        ("price_id: b, valid_from: 2026-01-02, model: per_unit, unit_amount: 0.01", "0.01"),
        ("price_id: b, valid_from: 2026-01-02, model: per_unit, unit_amount: \"1,5\"", "1,5"),
        ("price_id: b, valid_from: 2026-01-02, model: per_unit", "model per_unit needs `unit_amount`"),
        (
            "price_id: b, valid_from: 2026-01-02, model: per_unit, unit_amount: \"1\", rate_percent: \"3\"",
            "`rate_percent` does not belong",
        ),
        ("price_id: b, valid_from: 2026-01-02, model: per_units, unit_amount: \"1\"", "model `per_units` is unknown"),
        ("price_id: b, valid_from: 2026-01-02, model: flat", "model flat needs `amount`"),
        ("price_id: b, valid_from: 2026-01-02, model: dynamic, unit_amount: \"1\"", "(it takes multiplier)"),
        (
            "price_id: b, valid_from: 2026-01-02, model: graduated_percentage, tiers: [{up_to: null, unit_amount: \"1\"}]",
            "tier 1 has unit_amount; tiers of graduated_percentage have rate_percent",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, model: percentage, rate_percent: \"1\", free_events: \"1.5\"",
            "free_events 1.5 must be a whole number",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, model: percentage, rate_percent: \"1\", free_events: \"1\"",
            "they need aggregation sum, and meter `api_calls` has another one",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, model: package, package_size: \"0\", amount: \"1\"",
            "package_size must be greater than zero",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, model: package, package_size: \"10\", amount: \"1\", round: half",
            "round `half` must be up or down",
        ),
        ("price_id: b, valid_from: 2026-01-02, model: graduated", "model graduated needs `tiers`"),
        ("price_id: b, valid_from: 2026-01-02, model: graduated, tiers: []", "needs `tiers`"),
        ("price_id: b, valid_from: 2026-01-02, model: graduated, tiers: [{up_to: \"5\", unit_amount: \"1\"}]", "`up_to: null`"),
        (
            "price_id: b, valid_from: 2026-01-02, model: volume, tiers: [{up_to: \"9\", unit_amount: \"1\"}, {up_to: \"9\", unit_amount: \"1\"}, {up_to: null, unit_amount: \"1\"}]",
            "tiers are out of order: tier 2 ends at 9",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, model: graduated, tiers: [{up_to: null, unit_amount: \"1\"}, {up_to: null, unit_amount: \"1\"}]",
            "tier 1 has `up_to: null`, but is not the last",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, model: graduated, tiers: [{up_to: \"-1\", unit_amount: \"1\"}, {up_to: null, unit_amount: \"1\"}]",
            "out of order",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, model: graduated, tiers: [{up_to: null}]",
            "tier 1 needs unit_amount or flat_amount",
        ),
        ("price_id: b, valid_from: 2026-01-02, model: graduated, tiers: [{up_to: null, unit_amout: \"1\"}]", "unit_amout"),
        (
            "price_id: b, valid_from: 2026-01-02, model: per_unit, unit_amount: \"1\", free_units: \"-1\"",
            "free_units is negative",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, model: per_unit, unit_amount: \"1\", match: {region: eu}",
            "`region`, which is no dimension of meter `api_calls`",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, model: per_unit, unit_amount: \"1\", minimum_amount: \"5\", maximum_amount: \"4\"",
            "minimum_amount 5 is above maximum_amount 4",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, model: per_unit, unit_amount: \"1\", commitment: {amount: \"5\", factor: \"2\"}",
            "factor",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, model: per_unit, unit_amount: \"1\", transform: {operation: divide, factor: \"0\"}",
            "transform.factor must be greater than zero",
        ),
        (
            "price_id: b, valid_from: 2026-01-02, model: per_unit, unit_amount: \"1\", transform: {operation: divide, factor: \"2\", rounding: half_even}",
            "transform.rounding `half_even` must be",
        ),
        ("price_id: b, valid_from: 2026-01-02, model: per_unit, unit_amount: \"1\", unit_price: \"5\"", "unit_price"),
    ];
    let rows: Vec<_> = bad.iter().map(|(row, says)| (format!("  - {{{PRICE}, {row}}}"), *says)).collect();
    let mut rows: Vec<_> = rows.iter().map(|(row, says)| (row.as_str(), *says)).collect();
    rows.push((
        "  - {price_id: b, plan_id: standard, meter_id: calls, currency: USD, model: per_unit, unit_amount: \"1\"}",
        "names meter `calls`, which is not in the meters table",
    ));
    rows.push((
        "  - {price_id: b, plan_id: standard, meter_id: api_calls, currency: XYZ, model: per_unit, unit_amount: \"1\"}",
        "currency `XYZ` is unknown",
    ));
    rows_refused("prices.yaml", "prices:", &good, &rows);
}

#[test]
fn wrong_meters_and_prices_of_tables_are_refused_by_row() {
    let workspace = healthy();
    workspace.edit("job.yaml", "prices.yaml", "prices.csv");
    let head = "price_id,plan_id,meter_id,currency,model,unit_amount,tiers";
    let bad = [
        ("a,standard,api_calls,USD,per_unit,2,", "`a` is already used by prices.csv line 2"),
        ("b,standard,api_calls,USD,per_unit,2,", "valid at the same time as `a` (prices.csv line 2)"),
        ("b,standard,nope,USD,per_unit,2,", "names meter `nope`"),
        ("b,pro,api_calls,USD,per_unit,two,", "`two`"),
        ("b,pro,api_calls,USD,graduated,,\"[{\"\"up_to\"\": null\"", "`tiers` is no JSON"),
        ("b,pro,api_calls,USD,graduated,,\"[{\"\"up_to\"\": null, \"\"unit_amount\"\": 0.1}]\"", "quote the decimal"),
    ];
    for (row, says) in bad {
        workspace.write("prices.csv", format!("{head}\na,standard,api_calls,USD,per_unit,1,\n{row}\n"));
        run_refused(&workspace, 2, &["prices.csv line 3", says]);
    }
    workspace.edit("job.yaml", "meters.yaml", "meters.ndjson");
    let good = r#"{"meter_id":"api_calls","event_name":"api.call","aggregation":"count"}"#;
    workspace.write("meters.ndjson", format!("{good}\n{good}\n"));
    run_refused(&workspace, 2, &["meters.ndjson line 2", "already used by meters.ndjson line 1"]);
}

#[test]
fn an_unknown_plan_or_customer_is_only_a_warning() {
    let workspace = healthy();
    workspace.edit("subscriptions.csv", "cus_2,standard", "cus_2,premium");
    let rows = workspace.read("subscriptions.csv") + "demo,sub_9,cus_9,standard,USD,month,,,2026-01-01T00:00:00Z,\n";
    workspace.write("subscriptions.csv", rows);
    let check = workspace.trueup(&["check", "job.yaml"]);
    assert_eq!(check.code, 0, "{check:?}");
    for warning in
        ["plan `premium` has subscriptions but no price", "subscription `sub_9` belongs to customer `cus_9` of tenant `demo`"]
    {
        assert!(check.stdout.contains(warning), "{}", check.stdout);
    }
    let run = workspace.run(&[]);
    assert_eq!(run["warnings"].as_array().unwrap().len(), 2, "{}", run["warnings"]);
    assert_eq!(run["dead_letters"]["price_not_found"], 2);
}

// --- ranges and scopes -----------------------------------------------------------------------

#[test]
fn ranges_that_are_none_are_refused() {
    let workspace = healthy();
    let bad: [(&[&str], &str); 14] = [
        (&["--start", "2026-01-02", "--end", "2026-01-02"], "is empty"),
        (&["--start", "2026-01-02", "--end", "2026-01-01"], "--start must be before --end"),
        (&["--start", "2026-01-02"], "--end"),
        (&["--end", "2026-01-02"], "--start"),
        (&["--start", "yesterday", "--end", "2026-01-02"], "--start: `yesterday`"),
        (&["--start", "2026-01-01", "--end", "2026-02-30"], "--end: `2026-02-30`"),
        (&["--start", "0001-01-01", "--end", "2026-02-01"], "--start: `0001-01-01`"),
        (&["--day", "2026-02-30"], "--day 2026-02-30 is no date"),
        (&["--day", "2026-01"], "--day 2026-01 is no date"),
        (&["--month", "2026-13"], "--month 2026-13 is no month"),
        (&["--month", "January"], "--month January is no month"),
        (&["--last", "0d"], "--last 0d is no duration"),
        (&["--last", "3 days"], "--last 3 days is no duration"),
        (&["--day", "2026-01-01", "--month", "2026-01"], "cannot be used with"),
    ];
    for (range, says) in bad {
        for command in ["run", "plan", "verify"] {
            refused(&workspace, &[&[command, "job.yaml"], range].concat(), 2, &[says]);
        }
    }
}

#[test]
fn an_unknown_meter_is_refused() {
    let workspace = healthy();
    for command in ["run", "plan", "verify"] {
        refused(&workspace, &[command, "job.yaml", "--meter", "calls"], 2, &["--meter calls", "api_calls, bytes_sent, seats"]);
    }
}

#[test]
fn unknown_words_of_the_command_line_are_refused() {
    let workspace = healthy();
    refused(&workspace, &["rnu", "job.yaml"], 2, &["rnu"]);
    refused(&workspace, &["run", "job.yaml", "--daay", "x"], 2, &["--daay"]);
    refused(&workspace, &["run", "job.yaml", "--threads", "0"], 2, &["--threads"]);
    refused(&workspace, &["run", "job.yaml", "--output", "xml"], 2, &["xml"]);
    refused(&workspace, &["export", "job.yaml", "usage"], 2, &["table `usage` is unknown", "usage_windows, usage_periods"]);
    refused(&workspace, &["dead-letters", "job.yaml", "--reason", "bad"], 2, &["--reason bad"]);
}

// --- stores ----------------------------------------------------------------------------------

#[test]
fn a_store_that_cannot_be_written_is_refused() {
    let workspace = healthy();
    for path in ["job.yaml/below/trueup.db", "/proc/trueup.db", "events"] {
        workspace.edit("job.yaml", "path: trueup.db", &format!("path: {path}"));
        refused(&workspace, &["run", "job.yaml"], 1, &[path.trim_end_matches("/trueup.db")]);
        workspace.edit("job.yaml", &format!("path: {path}"), "path: trueup.db");
    }
    assert!(workspace.read("job.yaml").contains("version: 1"));
}

/// Everything that opens the store refuses it and leaves the file as it is.
#[track_caller]
fn store_refused(workspace: &Workspace, says: &[&str]) {
    let before = fs::read(workspace.path("trueup.db")).unwrap();
    for command in [&["run"][..], &["plan"], &["verify"], &["runs"], &["dead-letters"], &["check"], &["export", "usage_windows"]]
    {
        let mut arguments = vec![command[0], "job.yaml"];
        arguments.extend(&command[1..]);
        let outcome = workspace.trueup(&arguments);
        outcome.fails_with(1, &[&["store", "trueup.db"], says].concat());
        assert_eq!(fs::read(workspace.path("trueup.db")).unwrap(), before, "{command:?}");
    }
}

#[test]
fn a_store_that_is_no_database_is_refused() {
    let workspace = Workspace::of("init");
    workspace.write("trueup.db", "Dear diary, this is no database. ".repeat(100));
    store_refused(&workspace, &["this is no SQLite database"]);
}

#[test]
fn a_database_of_another_program_is_refused() {
    let workspace = Workspace::of("init");
    workspace.tamper("CREATE TABLE songs (title TEXT); INSERT INTO songs VALUES ('Yesterday')");
    store_refused(&workspace, &["belongs to another program", "store.path"]);
}

#[test]
fn a_store_of_a_newer_version_is_refused() {
    let workspace = healthy();
    // Out of WAL mode, so that all of it is in the one file.
    workspace.tamper("PRAGMA journal_mode = DELETE; PRAGMA user_version = 999");
    store_refused(&workspace, &["written by a newer trueup", "999", "upgrade trueup"]);
}

#[test]
fn a_damaged_store_is_an_error() {
    let workspace = healthy();
    workspace.tamper("PRAGMA journal_mode = DELETE");
    let mut bytes = fs::read(workspace.path("trueup.db")).unwrap();
    for byte in bytes.iter_mut().skip(4096) {
        *byte = 0x5a;
    }
    workspace.write("trueup.db", bytes);
    workspace.trueup(&["run", "job.yaml"]).fails_with(1, &["store trueup.db", "malformed"]);
}

#[test]
fn values_that_no_store_of_ours_holds_are_an_error() {
    let workspace = healthy();
    workspace.tamper("UPDATE usage_windows SET quantity = 'many' WHERE meter_id = 'seats'");
    run_refused(&workspace, 1, &["usage_windows", "quantity", "many"]);
    workspace.tamper("UPDATE usage_windows SET quantity = '1' WHERE meter_id = 'seats'; UPDATE runs SET input = '{'");
    run_refused(&workspace, 1, &["runs", "input"]);
}

#[test]
fn two_runs_at_once_are_refused() {
    let workspace = healthy();
    let lock = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(workspace.path("trueup.db.my_usage.lock"))
        .unwrap();
    lock.try_lock().unwrap();
    refused(&workspace, &["run", "job.yaml"], 6, &["job my_usage is already running", "trueup.db.my_usage.lock"]);
    // Who only reads does not wait.
    assert_eq!(workspace.trueup(&["plan", "job.yaml"]).code, 0);
    assert_eq!(workspace.trueup(&["verify", "job.yaml"]).code, 0);
    lock.unlock().unwrap();
    workspace.run(&[]);
}

#[test]
fn a_change_beyond_the_guard_needs_a_yes() {
    let workspace = healthy();
    workspace.edit("prices.yaml", "unit_amount: \"0.000001\"", "unit_amount: \"0.000002\"");
    for (guard, says) in
        [("max_changed_rows: \"10%\"", "max_changed_rows 10%"), ("max_cost_change: 0.001", "max_cost_change 0.001")]
    {
        let whole = workspace.read("job.yaml");
        workspace.write("job.yaml", format!("{whole}guard: {{{guard}}}\n"));
        refused(&workspace, &["run", "job.yaml"], 8, &["guard:", says, "Nothing was published", "cus_1", "--yes"]);
        // A plan shows it, and says what a run would do.
        let plan = workspace.trueup(&["plan", "job.yaml"]);
        assert_eq!(plan.code, 0, "{plan:?}");
        assert!(plan.stdout.contains(says), "{}", plan.stdout);
        workspace.write("job.yaml", whole);
    }
    let whole = workspace.read("job.yaml");
    workspace.write("job.yaml", whole + "guard: {max_changed_rows: \"10%\"}\n");
    let run = workspace.run(&["--yes"]);
    assert_eq!(run["causes"], serde_json::json!({"price_changed": 3}));
    workspace.run(&[]);
}

#[test]
fn a_number_of_too_many_digits_passes_the_filters_that_it_is_beyond() {
    let workspace = healthy();
    workspace.edit("meters.yaml", "property: bytes", "property: bytes\n    filters: [{property: bytes, op: gt, value: 0}]");
    let lines = [event("o1", r#"{"bytes":1e25}"#), event("o2", r#"{"bytes":-1e25}"#), event("o3", r#"{"bytes":"x"}"#)];
    workspace.write("events/overflow.ndjson", lines.join("\n"));
    one_dead_letter(&workspace, "value_out_of_range", &["property `bytes` is 1e25", "38 digits"]);
}

#[test]
fn numbers_whose_digits_may_be_lost_are_to_be_quoted() {
    let workspace = healthy();
    let meters = workspace.read("meters.yaml");
    for number in ["20000000000000000001", "1234567890.123456789", "9007199254740993.0"] {
        workspace.write("meters.yaml", meters.replace("op: lt, value: 500", &format!("op: eq, value: {number}")));
        run_refused(&workspace, 2, &["meters.yaml:5:", "a number near", "quote it"]);
    }
    workspace.write("meters.yaml", meters.replace("op: lt, value: 500", r#"op: in, values: ["20000000000000000001", 0.5]"#));
    let statuses = ["20000000000000000001", "20000000000000000000", "0.50"];
    let lines: Vec<_> = statuses.iter().map(|status| event(status, &format!(r#"{{"status":{status}}}"#))).collect();
    workspace.write("events/statuses.ndjson", lines.join("\n"));
    workspace.run(&["--yes"]);
    let rows = workspace.query("SELECT quantity FROM usage_windows WHERE meter_id = 'api_calls'");
    assert_eq!(rows, [Row::from([("quantity".to_owned(), "2".to_owned())])]);
    workspace.edit(
        "prices.yaml",
        "    meter_id: api_calls\n",
        "    meter_id: api_calls\n    match: {status: 1234567890.123456789}\n",
    );
    run_refused(&workspace, 2, &["prices.yaml:", "a number near", "let events send the dimension as text"]);
}

#[test]
fn cloud_events_whose_binary_data_is_no_json_are_dead_letters_of_the_meters_that_want_them() {
    let workspace = healthy();
    for (data, says) in [
        (r#""data_base64":"AAECAw==""#, "data_base64 holds no JSON object: send the usage as JSON in `data`"),
        (r#""data_base64":"WzFd""#, "data_base64 holds no JSON object"),
        (r#""data_base64":"""#, "data_base64 holds no JSON object"),
        (r#""data_base64":"not base64""#, "data_base64 is no base64: "),
        (r#""data_base64":{}"#, "data_base64 is an object or array where a text is expected"),
        (r#""data_base64":"e30=","data":{"bytes":1}"#, "data_base64 stands beside `data`: keep one"),
        // {"bytes":1,}
        (r#""data_base64":"eyJieXRlcyI6MSx9""#, "properties are no JSON object: trailing comma"),
    ] {
        let event = |id: &str, name: &str| {
            format!(
                r#"{{"specversion":"1.0","id":"{id}","source":"demo","type":"{name}","subject":"acme","time":"2026-01-01T12:00:00Z",{data}}}"#
            )
        };
        workspace.write("events/cloud.ndjson", event("ce", "api.call") + "\n" + &event("other", "nobody.knows"));
        one_dead_letter(&workspace, "malformed_event", &[says]);
    }
}

/// Errors go to logs.
#[test]
fn passwords_are_in_no_error() {
    for (connections, says) in [
        ("  clickhouse: {url: \"http://127.0.0.1:1\", password: \"hunter2${x\"}", "`password` of a connection"),
        ("  clickhouse: {url: \"http://127.0.0.1:1\", password: \"hunter2${x}\"}", "`password` of a connection"),
        ("  clickhouse:\n    url: \"http://127.0.0.1:1\"\n    password: \"hunter2\"\n    databse: x", "databse"),
        ("  clickhouse:\n    url: \"http://127.0.0.1:1\"\n    pasword: \"hunter2\"", "pasword"),
    ] {
        let workspace = healthy();
        workspace.edit("job.yaml", "store: {kind: sqlite, path: trueup.db}", "store: {kind: clickhouse}");
        let job = workspace.read("job.yaml");
        workspace.write("job.yaml", format!("{job}\nconnections:\n{connections}\n"));
        let outcome = workspace.trueup(&["check", "job.yaml"]);
        outcome.fails_with(2, &["job.yaml", says]);
        assert!(!outcome.stderr.contains("hunter2"), "{}", outcome.stderr);
    }
}

/// The name is that of a folder, too.
#[test]
fn a_job_is_not_called_like_a_folder_above() {
    for name in ["..", ".", ".hidden"] {
        let workspace = healthy();
        workspace.edit("job.yaml", "job: my_usage", &format!("job: \"{name}\""));
        workspace.trueup(&["run", "job.yaml"]).fails_with(2, &["job.yaml", "does not begin with `.`"]);
    }
}

/// What of an event could not be read is kept as it was written.
#[test]
fn a_dead_letter_keeps_what_could_not_be_read() {
    let workspace = Workspace::new();
    assert_eq!(workspace.trueup(&["init", "."]).code, 0);
    let bad = json!({"tenant_id": "demo", "id": "q1", "event_name": "api.call", "external_customer_id": "acme",
        "timestamp": "notatime", "ingested_at": "nope", "deleted": "maybe"});
    workspace.write("events/bad.ndjson", format!("{bad}\n"));
    workspace.run(&[]);
    let letter = workspace.query("SELECT event FROM dead_letters WHERE event_id = 'q1'").remove(0);
    let event: serde_json::Value = serde_json::from_str(&letter["event"]).unwrap();
    let raw: serde_json::Value = serde_json::from_str(event["raw"].as_str().unwrap()).unwrap();
    assert_eq!(raw, json!({"timestamp": "notatime", "ingested_at": "nope", "deleted": "maybe"}));
    assert_eq!((&event["id"], &event["external_customer_id"]), (&json!("q1"), &json!("acme")));
}
