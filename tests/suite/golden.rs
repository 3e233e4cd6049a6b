//! Every folder of `fixtures/cases` through the binary. The expected rows come
//! from `fixtures/oracle.py`, which shares no code with Trueup.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{Workspace, fixtures};

#[test]
fn every_case_gives_the_expected_rows() {
    let cases = cases();
    let mut problems = String::new();
    cases.iter().for_each(|case| check_case(case, &mut problems));
    assert!(problems.is_empty(), "{problems}");
}

/// Runs every step of a case in a store of its own: in full, and again with later steps
/// that skip what cannot have changed.
pub fn check_case(case: &Path, problems: &mut String) {
    let name = case.file_name().unwrap().to_string_lossy().into_owned();
    check_steps(case, &name, true, problems);
    if case.join("then-1").exists() {
        check_steps(case, &format!("{name}, incremental"), false, problems);
    }
}

fn check_steps(case: &Path, name: &str, full: bool, problems: &mut String) {
    let workspace = Workspace::new();
    workspace.overlay(case);
    check_step(&workspace, case, name, full, problems);
    for step in 1.. {
        let overlay = case.join(format!("then-{step}"));
        if !overlay.exists() {
            break;
        }
        workspace.overlay(&overlay);
        check_step(&workspace, &overlay, &format!("{name}/then-{step}"), full, problems);
    }
}

/// The folder of every case.
pub fn cases() -> Vec<PathBuf> {
    let mut cases: Vec<_> = fs::read_dir(fixtures().join("cases")).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() >= 80, "only {} cases", cases.len());
    cases
}

/// Runs a step of a case, and compares what it leaves with what is expected.
pub fn check_step(workspace: &Workspace, step: &Path, name: &str, full: bool, problems: &mut String) {
    let arguments = fs::read_to_string(step.join("args")).unwrap_or_default();
    let mut command = vec!["run", "job.yaml", "--output", "json"];
    command.extend(arguments.split_whitespace());
    command.extend((!full && !has_range(&arguments)).then_some("--incremental"));
    let outcome = workspace.trueup(&command);
    if outcome.code != 0 {
        let _ = writeln!(problems, "{name}: exit {}: {}", outcome.code, outcome.stderr);
        return;
    }
    let summary: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let expected = step.join("expected");
    assert!(expected.exists(), "{name} has nothing expected");
    // An incremental run counts what it looked at.
    let counts_all = summary["coverage"]["mode"] != "incremental";
    if let Some(text) = fs::read_to_string(expected.join("summary.json")).ok().filter(|_| counts_all) {
        compare_json(&format!("{name}: summary"), &serde_json::from_str(&text).unwrap(), &summary, problems);
    }
    let run = summary["run_id"].as_str().unwrap();
    for (file, condition) in [
        ("usage_windows", String::new()),
        ("usage_periods", String::new()),
        ("dead_letters", " WHERE resolved_run_id IS NULL".to_owned()),
        ("corrections", format!(" WHERE run_id = '{run}'")),
    ] {
        let path = expected.join(format!("{file}.csv"));
        if path.exists() {
            compare_rows(
                &format!("{name}: {file}"),
                &path,
                &workspace.query(&format!("SELECT * FROM {file}{condition}")),
                problems,
            );
        }
    }
    // Whatever the case is about, the ledger is whole and gives the table.
    let mut verify = vec!["verify", "job.yaml"];
    verify.extend(arguments.split_whitespace());
    let verified = workspace.trueup(&verify);
    if verified.code != 0 {
        let _ = writeln!(problems, "{name}: verify exits {}: {}{}", verified.code, verified.stdout, verified.stderr);
    }
}

/// Whether a run is of a range: such a one is as full as it can be.
pub fn has_range(arguments: &str) -> bool {
    ["--start", "--day", "--month", "--last"].iter().any(|option| arguments.contains(option))
}

/// Every key of `expected` must be in `actual` with the same value.
pub fn compare_json(name: &str, expected: &Value, actual: &Value, problems: &mut String) {
    match expected {
        Value::Object(keys) => {
            for (key, value) in keys {
                compare_json(&format!("{name}.{key}"), value, &actual[key], problems);
            }
        }
        value if value == actual => {}
        value => {
            let _ = writeln!(problems, "{name}: expected {value}, got {actual}");
        }
    }
}

/// The rows as a set, in the columns that the expected file has.
pub fn compare_rows(name: &str, path: &Path, actual: &[BTreeMap<String, String>], problems: &mut String) {
    let mut reader = csv::Reader::from_path(path).unwrap();
    let header: Vec<String> = reader.headers().unwrap().iter().map(str::to_owned).collect();
    let mut expected: Vec<Vec<String>> =
        reader.records().map(|record| record.unwrap().iter().map(str::to_owned).collect()).collect();
    let mut actual: Vec<Vec<String>> = actual
        .iter()
        .map(|row| {
            header.iter().map(|column| row.get(column).cloned().unwrap_or_else(|| format!("<no column {column}>"))).collect()
        })
        .collect();
    expected.sort();
    actual.sort();
    let missing = expected.iter().filter(|row| !actual.contains(row));
    let surplus = actual.iter().filter(|row| !expected.contains(row));
    for (sign, row) in missing.map(|row| ('-', row)).chain(surplus.map(|row| ('+', row))) {
        let _ = writeln!(problems, "{name} {sign} {}", row.join(","));
    }
    if expected.len() != actual.len() {
        let _ = writeln!(problems, "{name}: expected {} rows, got {}", expected.len(), actual.len());
    }
}
