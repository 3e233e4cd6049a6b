//! Random histories against the oracle: `fixtures/random_case.py` makes up meters, prices,
//! subscriptions and events, and what happens to them later; the binary must store what
//! the oracle expects after every step.
//!
//! `TRUEUP_TEST_HISTORIES` is how many (40, and 10 from services), `TRUEUP_TEST_FIRST_HISTORY` the first seed (1).

use std::env;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use crate::kafka_topic::broker;
use crate::parts::clickhouse;
use crate::support::fixtures;
use crate::{golden, kafka, parts};

/// A Python with PyYAML, or `None` where there is none and none is required.
#[allow(clippy::print_stderr)]
fn python() -> Option<String> {
    let python = env::var("TRUEUP_TEST_PYTHON").ok();
    if python.is_none() {
        assert!(env::var_os("TRUEUP_TEST_REQUIRE_SERVICES").is_none(), "TRUEUP_TEST_PYTHON is not set");
        eprintln!("skipped: TRUEUP_TEST_PYTHON is not set (tests/run sets it to a Python with PyYAML)");
    }
    python
}

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[test]
fn random_histories_give_what_the_oracle_expects() {
    histories(40, &|_| true, &|case, problems| golden::check_case(case, problems));
}

/// Nights that read what came since the last one, from a topic.
#[test]
fn random_histories_give_the_same_from_a_topic() {
    let Some(broker) = broker() else { return };
    let check = |case: &Path, problems: &mut String| kafka::check_case(&broker, case, None, false, problems);
    histories(10, &kafka::can_be_messages, &check);
}

/// Nights that read what came since the last one, from a table; every other history is stored
/// there too.
#[test]
fn random_histories_give_the_same_from_a_table() {
    let Some(url) = clickhouse() else { return };
    histories(10, &|_| true, &|case, problems| {
        let to_clickhouse = case.to_string_lossy().ends_with(['1', '3', '5', '7', '9']);
        parts::check_case(&url, case, (true, to_clickhouse), false, problems);
    });
}

/// Checks so many histories, or as many as were asked for.
fn histories(count: u64, is_fit: &dyn Fn(&Path) -> bool, check: &dyn Fn(&Path, &mut String)) {
    let Some(python) = python() else { return };
    let (first, count) = (number("TRUEUP_TEST_FIRST_HISTORY", 1), number("TRUEUP_TEST_HISTORIES", count));
    let folder = tempfile::tempdir().unwrap();
    let made = Command::new(python)
        .arg(fixtures().join("random_case.py"))
        .args(["--seed", &first.to_string(), "--count", &count.to_string()])
        .arg(folder.path())
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let cases = (first..first + count).map(|seed| (seed, folder.path().join(seed.to_string())));
    let cases: Vec<_> = cases.filter(|(_, case)| is_fit(case)).collect();
    assert!(!cases.is_empty(), "no history of {count} is fit");
    let mut problems = String::new();
    for (seed, case) in &cases {
        let mut found = String::new();
        check(case, &mut found);
        if !found.is_empty() {
            let _ = writeln!(problems, "--- {}\n{}", repeat(*seed), shortened(&found));
        }
    }
    if !problems.is_empty() {
        let kept: &Path = &folder.keep();
        panic!("the histories are kept in {}\n{problems}", kept.display());
    }
}

/// How to run one history again.
fn repeat(seed: u64) -> String {
    format!("seed {seed}: TRUEUP_TEST_FIRST_HISTORY={seed} TRUEUP_TEST_HISTORIES=1")
}

/// The first lines of a long list.
fn shortened(text: &str) -> String {
    const LINES: usize = 12;
    let more = text.lines().count().saturating_sub(LINES);
    let mut out: String = text.lines().take(LINES).fold(String::new(), |out, line| out + line + "\n");
    if more > 0 {
        let _ = write!(out, "... and {more} lines more");
    }
    out
}
