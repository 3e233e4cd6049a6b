//! Input in shapes that people really have: odd file names, byte order marks,
//! floats, open ends, read-only folders.

use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, Date32Array, Date64Array, Decimal128Array, Float64Array, Int32Array, NullArray, StringArray,
    TimestampMicrosecondArray,
};

use crate::support::{Row, Workspace};

/// The job of `trueup init`, reading any event file.
fn job() -> Workspace {
    let workspace = Workspace::of("init");
    workspace.edit("job.yaml", "events/*.ndjson", "events/*");
    workspace
}

#[track_caller]
fn run_refused(workspace: &Workspace, code: i32, says: &[&str]) {
    workspace.trueup(&["run", "job.yaml"]).fails_with(code, says);
    for rows in workspace.dump().unwrap_or_default() {
        assert_eq!(rows, Vec::<Row>::new(), "something was written");
    }
}

fn event(id: &str, properties: &str) -> String {
    format!(
        r#"{{"tenant_id":"demo","id":"{id}","event_name":"api.call","external_customer_id":"acme","timestamp":"2026-01-01T12:00:00Z","properties":{properties}}}"#
    )
}

fn texts<const N: usize>(values: [&str; N]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

fn parquet_events(replaced: Vec<(&'static str, ArrayRef)>) -> Vec<(&'static str, ArrayRef)> {
    let mut columns = vec![
        ("tenant_id", texts(["demo", "demo"])),
        ("id", texts(["p1", "p2"])),
        ("event_name", texts(["api.call", "api.call"])),
        ("external_customer_id", texts(["acme", "acme"])),
        ("timestamp", texts(["2026-01-01T12:00:00Z", "2026-01-01T12:01:00Z"])),
    ];
    columns.retain(|(name, _)| !replaced.iter().any(|(other, _)| other == name));
    columns.extend(replaced);
    columns
}

/// The prices of the small job as a Parquet table with these amounts.
fn parquet_prices(workspace: &Workspace, amounts: ArrayRef, more: Vec<(&'static str, ArrayRef)>) {
    let mut columns = vec![
        ("price_id", texts(["standard_calls", "standard_bytes"])),
        ("plan_id", texts(["standard", "standard"])),
        ("meter_id", texts(["api_calls", "bytes_sent"])),
        ("currency", texts(["USD", "USD"])),
        ("model", texts(["per_unit", "per_unit"])),
        ("unit_amount", amounts),
    ];
    columns.extend(more);
    workspace.write_parquet("prices.parquet", columns);
    workspace.edit("job.yaml", "prices.yaml", "prices.parquet");
}

// --- which files are read --------------------------------------------------------------------

#[test]
fn a_file_name_that_is_not_utf_8_is_an_error() {
    let workspace = job();
    let name = std::ffi::OsString::from_vec(b"events/more-\xff.ndjson".to_vec());
    fs::write(workspace.path("").join(name), event("x", "{}")).unwrap();
    run_refused(&workspace, 1, &["events/more-", "not UTF-8", "rename"]);
    workspace.edit("job.yaml", "events/*\"", "*/2026*.ndjson\"");
    workspace.run(&[]);
    let name = std::ffi::OsString::from_vec(b"ev\xff".to_vec());
    fs::create_dir(workspace.path("").join(name)).unwrap();
    workspace.trueup(&["plan", "job.yaml"]).fails_with(1, &["not UTF-8"]);
}

#[test]
fn a_link_that_leads_nowhere_is_an_error_and_a_folder_is_not() {
    let workspace = job();
    fs::create_dir(workspace.path("events/folder.ndjson")).unwrap();
    workspace.run(&[]);
    let workspace = job();
    std::os::unix::fs::symlink("gone.ndjson", workspace.path("events/linked.ndjson")).unwrap();
    run_refused(&workspace, 1, &["events/linked.ndjson", "cannot be read"]);
}

#[test]
fn the_folder_of_the_job_is_no_pattern() {
    let workspace = Workspace::new();
    let folder = workspace.path("2026 [a-b] {x} ?*");
    fs::create_dir(&folder).unwrap();
    let fixture = Workspace::of("init");
    for entry in ["job.yaml", "customers.csv", "subscriptions.csv", "meters.yaml", "prices.yaml", "events"] {
        fs::rename(fixture.path(entry), folder.join(entry)).unwrap();
    }
    let outcome = workspace.trueup(&["run", "2026 [a-b] {x} ?*/job.yaml", "--output", "json"]);
    assert_eq!(outcome.json()["events"]["read"], 8);
    fs::remove_dir_all(folder.join("events")).unwrap();
    workspace.trueup(&["plan", "2026 [a-b] {x} ?*/job.yaml"]).fails_with(1, &["2026 [a-b] {x} ?*/events/*.ndjson", "no file"]);
}

// --- CSV and NDJSON --------------------------------------------------------------------------

const HEADER: &str = "tenant_id,id,event_name,external_customer_id,timestamp,properties\n";

#[test]
fn a_csv_file_that_ends_inside_quotes_is_refused() {
    let workspace = job();
    let row = |id: &str, rest: &str| format!("demo,{id},api.call,acme,2026-01-01T12:00:00Z,{rest}\n");
    for broken in [row("q1", "\"{}"), row("q1", "\"{}") + &row("q2", ""), row("q0", "") + "demo,\"q1", "\"".to_owned()] {
        workspace.write("events/quotes.csv", HEADER.to_owned() + &broken);
        run_refused(&workspace, 1, &["events/quotes.csv", "ends inside quotes"]);
    }
    workspace.write("events/quotes.csv", format!("\"{HEADER}"));
    run_refused(&workspace, 1, &["events/quotes.csv", "ends inside quotes"]);
    // Whole, with and without a last line feed.
    let whole = HEADER.to_owned() + &row("q1", "\"{\"\"bytes\"\":\n1}\"") + row("q2", "\"\"").trim_end();
    workspace.write("events/quotes.csv", &whole);
    assert_eq!(workspace.run(&[])["events"]["read"], 10);
    workspace.write("events/quotes.csv", HEADER);
    assert_eq!(workspace.trueup(&["plan", "job.yaml", "--output", "json"]).json()["events"]["read"], 8);
}

#[test]
fn a_reference_csv_that_ends_inside_quotes_is_refused() {
    let workspace = job();
    let whole = workspace.read("customers.csv");
    workspace.write("customers.csv", whole.replace("demo,cus_1,acme,,", "demo,cus_1,acme,,\""));
    run_refused(&workspace, 2, &["customers.csv", "ends inside quotes"]);
    workspace.write("customers.csv", whole.replace("globex,,", "globex"));
    run_refused(&workspace, 2, &["customers.csv", "line 3: 3 fields where the header has 5"]);
}

#[test]
fn a_header_with_a_repeated_name_is_refused() {
    let workspace = job();
    workspace.write("events/twice.csv", HEADER.replace("event_name", "id"));
    run_refused(&workspace, 1, &["events/twice.csv", "two columns `id`"]);
    fs::remove_file(workspace.path("events/twice.csv")).unwrap();
    workspace.edit("customers.csv", "valid_from,valid_to", "valid_to,valid_to");
    run_refused(&workspace, 2, &["customers.csv", "two columns `valid_to`"]);
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_first_line() {
    let workspace = job();
    for name in ["events/2026-01-01.ndjson", "customers.csv", "subscriptions.csv"] {
        workspace.write(name, format!("\u{feff}{}", workspace.read(name)));
    }
    workspace.write("events/bom.csv", format!("\u{feff}{HEADER}demo,b1,api.call,acme,2026-01-01T12:00:00Z,\n"));
    workspace.write(
        "prices.ndjson",
        "\u{feff}{\"price_id\":\"a\",\"plan_id\":\"standard\",\"meter_id\":\"api_calls\",\"currency\":\"USD\",\"model\":\"per_unit\",\"unit_amount\":\"1\"}\n",
    );
    workspace.edit("job.yaml", "prices.yaml", "prices.ndjson");
    let run = workspace.run(&[]);
    assert_eq!(run["events"]["read"], 9);
    assert_eq!(run["dead_letters"]["malformed_event"], serde_json::Value::Null, "{run}");
}

#[test]
fn a_missing_field_is_reported_with_its_place() {
    let workspace = job();
    workspace.write("events/short.ndjson", event("n1", "{}").replace(r#""external_customer_id":"acme","#, ""));
    workspace.write("events/short.csv", format!("{HEADER}demo,c1,api.call,,2026-01-01T12:00:00Z,\n"));
    let nobody: ArrayRef = Arc::new(StringArray::from(vec![Some("acme"), None]));
    workspace.write_parquet("events/short.parquet", parquet_events(vec![("external_customer_id", nobody)]));
    workspace.run(&[]);
    let letters = workspace.query("SELECT event_id, detail FROM dead_letters WHERE reason = 'malformed_event' ORDER BY event_id");
    for (row, says) in letters.iter().zip(["short.csv line 2: ", "short.ndjson line 1: ", "short.parquet row 2: "]) {
        assert!(row["detail"].ends_with(&format!("{says}`external_customer_id` is missing")), "{row:?}");
    }
    assert_eq!(letters.len(), 3);
}

#[test]
fn a_cloud_event_belongs_to_its_source_whatever_namespace_it_names() {
    let workspace = job();
    let cloud = |more: &str| {
        format!(
            r#"{{"specversion":"1.0","id":"ce","source":"demo","type":"api.call","subject":"acme","time":"2026-01-01T12:00:00Z"{more}}}"#
        )
    };
    workspace.write("events/cloud.ndjson", cloud(r#","namespace":"other""#));
    let run = workspace.run(&[]);
    // One event of the small job is nobody's.
    assert_eq!(run["dead_letters"]["customer_not_found"], 1, "{run}");
    workspace.write("events/cloud.ndjson", cloud(r#","tenantid":"other""#));
    assert_eq!(workspace.run(&[])["dead_letters"]["customer_not_found"], 2);
}

#[test]
fn composite_dimensions_keep_every_digit_at_any_depth() {
    let workspace = job();
    workspace.edit("meters.yaml", "    property: bytes\n", "    property: bytes\n    dimensions: [tag]\n");
    let deep = "[".repeat(300) + &"]".repeat(300);
    let values = ["[0.1234567890123456789]", "[0.1234567890123456781]", "{\"b\": 1.0, \"a\": [2]}", "{\"a\":[2],\"b\":1}", &deep];
    let lines: Vec<_> =
        (1..).zip(values).map(|(at, value)| event(&format!("t{at}"), &format!(r#"{{"bytes":1,"tag":{value}}}"#))).collect();
    workspace.write("events/tags.ndjson", lines.join("\n"));
    workspace.run(&[]);
    let rows = workspace.query(
        "SELECT dimensions, event_count FROM usage_windows WHERE window_start = '2026-01-01T12:00:00Z' AND dimensions LIKE '%tag%' ORDER BY 1",
    );
    let found: Vec<_> = rows.iter().map(|row| (row["dimensions"].as_str(), row["event_count"].as_str())).collect();
    let deep = format!(r#"{{"tag":{deep}}}"#);
    let expected = [
        (r#"{"tag":[0.123456789012345678]}"#, "1"),
        (r#"{"tag":[0.123456789012345679]}"#, "1"),
        (deep.as_str(), "1"),
        (r#"{"tag":{"a":[2],"b":1}}"#, "2"),
    ];
    assert_eq!(found, expected);
}

// --- reference tables ------------------------------------------------------------------------

#[test]
fn amounts_of_a_json_table_keep_every_digit() {
    let workspace = job();
    let price = |id: &str, meter: &str, amount: &str| {
        format!(
            r#"{{"price_id":"{id}","plan_id":"standard","meter_id":"{meter}","currency":"USD","model":"per_unit","unit_amount":{amount}}}"#
        )
    };
    let rows =
        [price("c", "api_calls", "0.123456789012345678"), price("b", "bytes_sent", "12345678901234567.000000000000000001")];
    workspace.write("prices.ndjson", rows.join("\n"));
    workspace.write("events/2026-01-01.ndjson", event("e", r#"{"status":200,"bytes":1}"#));
    workspace.edit("job.yaml", "prices.yaml", "prices.ndjson");
    workspace.run(&[]);
    let costs: Vec<_> =
        workspace.query("SELECT cost FROM usage_windows ORDER BY meter_id").iter().map(|row| row["cost"].clone()).collect();
    assert_eq!(costs, ["0.123456789012345678", "12345678901234567.000000000000000001"]);
    workspace.edit("prices.ndjson", "\"currency\":\"USD\"", "\"currency\":\"USD\",\"currency\":\"EUR\"");
    workspace.trueup(&["plan", "job.yaml"]).fails_with(2, &["prices.ndjson", "line 1", "`currency` twice"]);
}

#[test]
fn parquet_amounts_are_decimals_or_texts_never_floats() {
    let workspace = job();
    parquet_prices(&workspace, Arc::new(Float64Array::from(vec![0.1, 0.2])), vec![]);
    run_refused(&workspace, 2, &["prices.parquet row 1", "`unit_amount`", "text or decimal"]);
    let workspace = job();
    workspace.write("events/2026-01-01.ndjson", event("e", r#"{"status":200,"bytes":1}"#));
    let exact = Decimal128Array::from(vec![123_456_789_012_345_678, 1]).with_precision_and_scale(38, 18).unwrap();
    parquet_prices(&workspace, Arc::new(exact), vec![]);
    workspace.run(&[]);
    let costs: Vec<_> =
        workspace.query("SELECT cost FROM usage_windows ORDER BY meter_id").iter().map(|row| row["cost"].clone()).collect();
    assert_eq!(costs, ["0.123456789012345678", "0.000000000000000001"]);
}

#[test]
fn the_last_day_of_9999_is_an_open_end_in_every_format() {
    let plain = job();
    plain.run(&[]);
    let rows =
        |workspace: &Workspace| workspace.query("SELECT meter_id, window_start, quantity, cost FROM usage_windows ORDER BY 1, 2");
    let workspace = job();
    workspace.edit("customers.csv", "acme,,", "acme,,9999-12-31");
    workspace.edit("subscriptions.csv", "2026-01-01T00:00:00Z,\n", "2026-01-01T00:00:00Z,9999-12-31T23:59:59Z\n");
    workspace.edit("prices.yaml", "    unit_amount: \"0.000001\"", "    unit_amount: \"0.000001\"\n    valid_to: 9999-12-31");
    workspace.run(&[]);
    assert_eq!(rows(&workspace), rows(&plain));

    let workspace = job();
    let days: ArrayRef = Arc::new(Date32Array::from(vec![2_932_896, 2_932_896]));
    parquet_prices(&workspace, texts(["1", "1"]), vec![("valid_to", days)]);
    workspace.run(&[]);
}

#[test]
fn instants_of_a_reference_table_are_in_range_or_an_error_of_their_row() {
    let columns: [ArrayRef; 3] = [
        Arc::new(Date32Array::from(vec![None, Some(200_000)])),
        Arc::new(TimestampMicrosecondArray::from(vec![None, Some(i64::MAX)])),
        texts(["", "2500-01-01"]),
    ];
    for ends in columns {
        let workspace = job();
        parquet_prices(&workspace, texts(["1", "1"]), vec![("valid_to", Arc::clone(&ends))]);
        run_refused(&workspace, 2, &["prices.parquet row 2", "between the years"]);
        let workspace = job();
        let columns = vec![
            ("tenant_id", texts(["demo", "demo"])),
            ("customer_id", texts(["cus_1", "cus_2"])),
            ("external_customer_id", texts(["acme", "globex"])),
            ("valid_to", ends),
        ];
        workspace.write_parquet("customers.parquet", columns);
        workspace.edit("job.yaml", "customers.csv", "customers.parquet");
        run_refused(&workspace, 2, &["customers.parquet row 2", "between the years"]);
    }
}

// --- Parquet events --------------------------------------------------------------------------

/// Keys are made of some columns, but an event without tenant or id has none.
#[test]
fn copies_in_parquet_are_told_by_any_key() {
    for (key, metered) in [("[id]", 1), ("[tenant_id, id]", 1), ("[event_name, id]", 1), ("[id, timestamp]", 2)] {
        let workspace = job();
        workspace.edit("job.yaml", "key: [tenant_id, id]", &format!("key: {key}"));
        let counts = |run: serde_json::Value| ["metered", "duplicates"].map(|name| run["events"][name].as_u64().unwrap());
        let before = counts(workspace.run(&[]));
        workspace.write_parquet("events/copies.parquet", parquet_events(vec![("id", texts(["p1", "p1"]))]));
        assert_eq!(counts(workspace.run(&[])), [before[0] + metered, before[1] + 2 - metered], "{key}");
    }
}

#[test]
fn parquet_flags_and_empty_columns_are_taken_as_csv_has_them() {
    let flags: [ArrayRef; 4] = [
        Arc::new(BooleanArray::from(vec![true, false])),
        Arc::new(Int32Array::from(vec![1, 0])),
        texts(["true", "0"]),
        texts(["1", "false"]),
    ];
    for deleted in flags {
        let workspace = job();
        let kind = deleted.data_type().clone();
        let columns = vec![("properties", Arc::new(NullArray::new(2)) as ArrayRef), ("deleted", deleted)];
        workspace.write_parquet("events/flags.parquet", parquet_events(columns));
        let run = workspace.run(&[]);
        assert_eq!((&run["events"]["read"], &run["events"]["voided"]), (&10.into(), &1.into()), "{kind} {run}");
    }
    let workspace = job();
    workspace.write_parquet("events/flags.parquet", parquet_events(vec![("deleted", texts(["yes", "0"]))]));
    workspace.run(&[]);
    let letters = workspace.query("SELECT detail FROM dead_letters WHERE reason = 'malformed_event'");
    assert!(letters[0]["detail"].ends_with("flags.parquet row 1: deleted `yes` is neither true nor false"), "{letters:?}");
}

#[test]
fn dates_out_of_range_are_dead_letters() {
    let columns: [ArrayRef; 2] = [
        Arc::new(Date32Array::from(vec![20_454, 2_932_896])),
        Arc::new(Date64Array::from(vec![1_767_225_600_000, 253_402_214_400_000])),
    ];
    for times in columns {
        let workspace = job();
        workspace.write_parquet("events/days.parquet", parquet_events(vec![("timestamp", times)]));
        workspace.run(&[]);
        let letters = workspace.query("SELECT detail FROM dead_letters WHERE reason = 'malformed_event'");
        assert_eq!(letters.len(), 1, "{letters:?}");
        assert!(letters[0]["detail"].contains("days.parquet row 2: timestamp is outside of the years"), "{letters:?}");
    }
}

// --- the store -------------------------------------------------------------------------------

/// Runs a command as a user who may read the workspace and write nothing.
fn as_reader(workspace: &Workspace, arguments: &[&str]) -> (Option<i32>, String) {
    // The binary may lie in a folder that the other user cannot enter.
    let binary = workspace.path("trueup-for-all");
    if !binary.exists() {
        let built = env!("CARGO_BIN_EXE_trueup");
        fs::hard_link(built, &binary).or_else(|_| fs::copy(built, &binary).map(|_| ())).unwrap();
    }
    let mut command = Command::new(&binary);
    command.args(arguments).current_dir(workspace.path(""));
    if fs::metadata(workspace.path("")).unwrap().uid() == 0 {
        // No permission keeps root away.
        command.uid(65_534).gid(65_534);
    }
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_store_in_a_read_only_folder_can_be_read() {
    let workspace = job();
    workspace.run(&[]);
    let mode = |mode: u32| fs::set_permissions(workspace.path(""), fs::Permissions::from_mode(mode)).unwrap();
    mode(0o555);
    for arguments in [["runs", "job.yaml"], ["verify", "job.yaml"], ["plan", "job.yaml"]] {
        let (code, stderr) = as_reader(&workspace, &arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {stderr}");
    }
    mode(0o755);
    workspace.write("trueup.db-wal", "");
    mode(0o555);
    let (code, stderr) = as_reader(&workspace, &["runs", "job.yaml"]);
    mode(0o755);
    assert!(code == Some(1) && stderr.contains("trueup.db-wal exists"), "{code:?} {stderr}");
}

// --- the command line ------------------------------------------------------------------------

#[test]
fn ranges_and_scopes_that_cannot_be_are_refused() {
    let workspace = job();
    for (arguments, says) in [
        (["--last", "20000w"], "before the year 1700"),
        (["--tenant", "nobody"], "--tenant nobody is neither"),
        (["--customer", "nobody"], "--customer nobody is neither"),
        (["--meter", "nothing"], "nothing"),
    ] {
        for command in ["run", "plan", "verify"] {
            let all = [&[command, "job.yaml"], arguments.as_slice()].concat();
            workspace.trueup(&all).fails_with(2, &[says]);
        }
    }
    assert_eq!(workspace.dump().unwrap_or_default().concat(), Vec::<Row>::new());
}

#[test]
fn a_plan_names_its_job() {
    let plan = job().trueup(&["plan", "job.yaml", "--output", "json"]).json();
    assert_eq!(plan["job"], "my_usage");
}

#[test]
fn the_hints_after_a_run_repeat_its_range() {
    let workspace = job();
    let run = workspace.trueup(&["run", "job.yaml", "--day", "2026-01-01", "--customer", "cus_1"]);
    assert!(run.stdout.contains("trueup run job.yaml --day 2026-01-01 --customer cus_1 "), "{}", run.stdout);
}

#[test]
fn a_yaml_error_names_its_file_once() {
    let workspace = job();
    workspace.edit("job.yaml", "window: hour ", "windoww: hour ");
    let outcome = workspace.trueup(&["check", "job.yaml"]);
    outcome.fails_with(2, &["error: job.yaml:15:1: unknown field `windoww`", "--> job.yaml:15:1", "windoww: hour"]);
    assert_eq!(outcome.stderr.matches("unknown field").count(), 1, "{}", outcome.stderr);
}

// --- properties ------------------------------------------------------------------------------

#[test]
fn unique_objects_do_not_depend_on_how_they_are_written() {
    let workspace = job();
    let values = [r#"{"a":1}"#, r#"{"a": 1}"#, r#"{"a":1.0}"#, "[1,2]", "[1.0, 2]", "7", "7.0", r#""7""#];
    let event = |(at, value)| event(&format!("u{at}"), &format!(r#"{{"user":{value}}}"#)).replace("api.call", "login");
    let lines: Vec<_> = (1..).zip(values).map(event).collect();
    workspace.write("events/unique.ndjson", lines.join("\n").replace("2026-01-01", "2026-01-09"));
    workspace.run(&[]);
    let rows = workspace.query(
        "SELECT quantity, event_count FROM usage_windows WHERE meter_id = 'seats' AND window_start = '2026-01-09T00:00:00Z'",
    );
    let found: Vec<_> = rows.iter().map(|row| (row["quantity"].as_str(), row["event_count"].as_str())).collect();
    assert_eq!(found, [("3", "8")]);
}

#[test]
fn cloud_events_carry_json_as_base64_too() {
    let workspace = job();
    let cloud = |id: &str, data: &str| {
        format!(
            r#"{{"specversion":"1.0","id":"{id}","source":"demo","type":"api.call","subject":"acme","time":"2026-01-09T12:00:00Z",{data}}}"#
        )
    };
    // {"bytes":1.5}, {"bytes":20,"x":"???"} with its slash escaped, and nothing.
    let data = [
        r#""data_base64":"eyJieXRlcyI6MS41fQ==""#,
        r#""data":null,"data_base64":"eyJieXRlcyI6MjAsIngiOiI\/Pz8ifQ==""#,
        r#""data_base64":null"#,
    ];
    let lines: Vec<_> = (1..).zip(data).map(|(at, data)| cloud(&format!("ce{at}"), data)).collect();
    workspace.write("events/cloud.ndjson", lines.join("\n"));
    for columns in ["", "  columns: {properties: data}\n"] {
        workspace.edit("job.yaml", "source:\n", &format!("source:\n{columns}"));
        let run = workspace.run(&["--day", "2026-01-09"]);
        assert_eq!(run["dead_letters"]["malformed_event"], serde_json::Value::Null, "{run}");
        let rows = workspace
            .query("SELECT quantity FROM usage_windows WHERE meter_id = 'bytes_sent' AND window_start = '2026-01-09T12:00:00Z'");
        assert_eq!(rows, [Row::from([("quantity".to_owned(), "21.5".to_owned())])]);
    }
}

#[test]
fn of_an_object_that_is_named_twice_the_last_counts() {
    let workspace = job();
    workspace.edit("meters.yaml", "property: bytes", "property: u.bytes");
    let lines = [event("r1", r#"{"u":{"bytes":1},"u":{"in":2}}"#), event("r2", r#"{"u":{"bytes":1},"u":{"bytes":8}}"#)];
    workspace.write("events/twice.ndjson", lines.join("\n"));
    let run = workspace.run(&[]);
    assert_eq!(run["usage"]["rejected"], 0, "{run}");
    let rows = workspace.query("SELECT quantity, event_count FROM usage_windows WHERE meter_id = 'bytes_sent'");
    let found: Vec<_> = rows.iter().map(|row| (row["quantity"].as_str(), row["event_count"].as_str())).collect();
    assert_eq!(found, [("8", "1")]);
}

/// Words that YAML 1.1 takes for booleans are names like any other.
#[test]
fn a_country_called_no_is_no_boolean() {
    let workspace = crate::corrections::world();
    workspace.write(
        "prices.yaml",
        "prices:\n  - {price_id: all, plan_id: pro, meter_id: calls, currency: USD, model: per_unit, unit_amount: \"1\"}\n  \
         - {price_id: norway, plan_id: pro, meter_id: calls, currency: USD, model: per_unit, unit_amount: \"5\", match: {country: NO}}\n",
    );
    workspace.write(
        "meters.yaml",
        "meters:\n  - {meter_id: calls, event_name: call, aggregation: sum, property: n, dimensions: [country], \
         filters: [{property: country, op: in, values: [NO, SE, on]}, {property: answer, op: not_in, values: [no, off]}]}\n",
    );
    let event = |id: &str, country: &str, answer: &str| {
        let event = serde_json::json!({"tenant_id": "t", "id": id, "event_name": "call", "external_customer_id": "x1",
            "timestamp": "2026-01-05T12:00:00Z", "properties": {"n": 10, "country": country, "answer": answer}});
        format!("{event}\n")
    };
    let events = [("1", "NO", "yes"), ("2", "SE", "y"), ("3", "on", "n"), ("4", "NO", "no"), ("5", "DK", "yes")];
    workspace.write("events/first.ndjson", events.map(|(id, country, answer)| event(id, country, answer)).concat());
    workspace.run(&[]);
    let rows = workspace.query("SELECT dimensions, price_id, cost FROM usage_windows ORDER BY 1");
    let rows: Vec<_> = rows.iter().map(|row| [&row["dimensions"], &row["price_id"], &row["cost"]].map(String::as_str)).collect();
    let expected =
        [[r#"{"country":"NO"}"#, "norway", "50"], [r#"{"country":"SE"}"#, "all", "10"], [r#"{"country":"on"}"#, "all", "10"]];
    assert_eq!(rows, expected);
    // Where a boolean is meant, it says so.
    workspace.edit("meters.yaml", "property: n,", "property: n, unpriced: yes,");
    workspace.trueup(&["check", "job.yaml"]).fails_with(2, &["meters.yaml:2"]);
}

/// Replaces a file once the keys are read.
struct Replacing<'w>(&'w Workspace);

impl trueup::pipeline::Observer for Replacing<'_> {
    fn step(&self, name: &'static str, _: Option<u64>) {
        if name == "enrich" {
            self.0.write("other", event("e1", "{}") + "\n");
            fs::rename(self.0.path("other"), self.0.path("events/more.ndjson")).unwrap();
        }
    }

    fn rows(&self, _: u64) {}
}

/// A file that is replaced between two passes would be read as two, and copies of the one and the
/// other counted both: nothing is published.
#[test]
fn a_file_that_changes_while_it_is_read_is_found() {
    let workspace = job();
    workspace.write("events/more.ndjson", event("more", "{}") + "\n");
    let job = trueup::config::Job::load(&workspace.path("job.yaml")).unwrap();
    let observer = Replacing(&workspace);
    let options = trueup::ends::RunOptions { threads: 2, yes: false, started_by: "test", snapshot: None, progress: &observer };
    let error = trueup::ends::run(&job, &trueup::pipeline::Request::default(), &options).unwrap_err();
    assert!(error.to_string().contains("more.ndjson changed while it was read: run again"), "{error:#}");
    assert!(workspace.dump().into_iter().flatten().all(|rows| rows.is_empty()), "something was written");
    assert_eq!(workspace.run(&[])["events"]["duplicates"], 2);
}

/// Bytes have no JSON: as hexadecimal digits they would be billed.
#[test]
fn bytes_inside_of_parquet_properties_are_refused() {
    use arrow::array::{BinaryArray, StructArray};
    use arrow::datatypes::{DataType, Field};

    let workspace = job();
    let bytes: ArrayRef = Arc::new(BinaryArray::from(vec![b"12".as_slice(), b"7"]));
    let properties = StructArray::from(vec![(Arc::new(Field::new("bytes", DataType::Binary, true)), bytes)]);
    workspace.write_parquet("events/bytes.parquet", parquet_events(vec![("properties", Arc::new(properties))]));
    run_refused(&workspace, 1, &["events/bytes.parquet", "`properties`", "it.bytes holds bytes: write them as text"]);
}

/// A customer may be the tenant.
#[test]
fn one_column_can_be_two_fields_in_every_format() {
    let rows = |name: &str, write: &dyn Fn(&Workspace)| {
        let workspace = job();
        fs::remove_file(workspace.path("events/2026-01-01.ndjson")).unwrap();
        workspace.edit("job.yaml", "  kind: files", "  kind: files\n  columns: {external_customer_id: tenant_id}");
        workspace.edit("customers.csv", "acme", "demo");
        write(&workspace);
        let run = workspace.run(&[]);
        assert_eq!(run["events"]["metered"], 1, "{name}: {run}");
        workspace.query("SELECT meter_id, quantity FROM usage_windows ORDER BY 1")
    };
    let line = event("a", r#"{"status":200,"bytes":5}"#);
    let ndjson = rows("ndjson", &|workspace| workspace.write("events/a.ndjson", &line));
    let csv = rows("csv", &|workspace| {
        let row = "demo,a,api.call,2026-01-01T12:00:00Z,\"{\"\"status\"\":200,\"\"bytes\"\":5}\"\n";
        workspace.write("events/a.csv", format!("tenant_id,id,event_name,timestamp,properties\n{row}"));
    });
    assert_eq!(ndjson, csv);
}

#[test]
fn an_empty_text_is_no_time_in_parquet_too() {
    let workspace = job();
    workspace.write_parquet("events/times.parquet", parquet_events(vec![("ingested_at", texts(["", "2026-01-02T00:00:00Z"]))]));
    assert_eq!(workspace.run(&[])["dead_letters"]["malformed_event"], serde_json::Value::Null);
}

/// Lines end in one character or two, some are empty, and some lie inside of quotes.
#[test]
fn csv_lines_are_counted_as_editors_count_them() {
    let row = |id: &str, time: &str| format!("demo,{id},api.call,acme,{time},");
    let (good, bad) = (|id: &str| row(id, "2026-01-01T12:00:00Z"), |id: &str| row(id, "never"));
    for (name, end) in [("lf", "\n"), ("crlf", "\r\n")] {
        let quoted = "demo,q,api.call,acme,2026-01-01T12:00:00Z,\"{\n}\"".to_owned();
        let lines = [
            HEADER.trim_end().to_owned(),
            good("a"),
            bad("b"),
            String::new(),
            String::new(),
            bad("c"),
            quoted,
            bad("d"),
            bad("e"),
        ];
        let workspace = job();
        workspace.write("events/lines.csv", lines.join(end));
        workspace.run(&[]);
        let letters = workspace.query("SELECT detail FROM dead_letters WHERE reason = 'malformed_event' ORDER BY event_id");
        let found: Vec<_> =
            letters.iter().map(|row| row["detail"].split(": ").next().unwrap().rsplit(' ').next().unwrap()).collect();
        assert_eq!(found, ["3", "6", "9", "10"], "{name}: {letters:?}");
        // Tables too.
        workspace.write("customers.csv", workspace.read("customers.csv").replace('\n', end) + end + end + "demo,cus_9" + end);
        let line = workspace.read("customers.csv").lines().count();
        workspace.trueup(&["check", "job.yaml"]).fails_with(2, &[&format!("customers.csv: line {line}: 2 fields")]);
    }
}
