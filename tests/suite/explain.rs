//! One number, taken apart: it is the number that a run computes, its lines sum to it,
//! and every event of it is listed with what became of it.

use insta::assert_snapshot;
use serde_json::{Value, json};
use trueup::audit::explain::{Asked, Explanation, explain};
use trueup::config::{Job, Source};
use trueup::ends;
use trueup::model::aggregate::{PeriodRow, WindowRow};
use trueup::model::decimal::Decimal;
use trueup::model::meter::ChargeOn;
use trueup::model::price_lines::total;
use trueup::model::timestamp::Timestamp;
use trueup::model::window::{Span, WindowKind};
use trueup::pipeline::{Inputs, KeyCache, Observer};
use trueup::reference::Reference;
use trueup::source::files::FileSource;

use crate::golden::cases;
use crate::support::{Workspace, normalised};

struct Nobody;

impl Observer for Nobody {
    fn step(&self, _: &'static str, _: Option<u64>) {}
    fn rows(&self, _: u64) {}
}

const ALWAYS: Span = Span { start: Timestamp::MIN, end: Timestamp::MAX };

/// What a job stores, and how to ask about it.
struct Explained {
    job: Job,
    reference: Reference,
}

impl Explained {
    fn new(workspace: &Workspace, job: &str) -> Self {
        let job = Job::load(&workspace.path(job)).unwrap();
        let reference = Reference::load(&job).unwrap();
        Explained { job, reference }
    }

    fn rows(&self) -> (Vec<WindowRow>, Vec<PeriodRow>) {
        let store = ends::read_store(&self.job).unwrap().unwrap();
        let windows =
            store.windows(&self.job.name, ALWAYS).unwrap().into_iter().map(|stored| WindowRow::clone(&stored.row)).collect();
        (windows, store.periods(&self.job.name, ALWAYS).unwrap())
    }

    fn ask(&self, asked: &Asked, threads: usize) -> Vec<Explanation<'_>> {
        let Source::Files { patterns, columns } = &self.job.source else { panic!("the fixtures are files") };
        let source = FileSource::new(patterns.clone(), columns.clone());
        let store = ends::read_store(&self.job).unwrap();
        let (job, reference, store) = (&self.job, &self.reference, store.as_deref());
        explain(
            &Inputs { job, reference, source: &source, store, threads, progress: &Nobody, keys: &KeyCache::default() },
            reference,
            asked,
        )
        .unwrap()
    }

    /// The row of a window is what its explanation computes.
    fn check_window(&self, row: &WindowRow) {
        let period = &row.key.period;
        // A window that straddles a boundary is asked about in the part that is its period's.
        let at = row.key.window_start.max(period.period_start);
        let asked = asked(period.tenant_id.to_string(), &period.subscription_id, &period.meter_id, at, false);
        let answers = self.ask(&asked, 2);
        assert_eq!(answers.len(), 1);
        let rows = &answers[0].rows;
        let found = rows.iter().find(|found| found.key == row.key).unwrap_or_else(|| panic!("{:?} is not explained", row.key));
        let computed = found.computed.as_ref().unwrap_or_else(|| panic!("{:?} is not computed", row.key));
        assert!(!found.differs(), "{:?}: {:?} and {computed:?}", row.key, found.stored);
        assert_eq!((computed.values.quantity, computed.values.cost), (row.quantity, row.cost), "{:?}", row.key);
        assert_eq!(found.events.total, row.event_count, "{:?}", row.key);
        assert_eq!(found.history.last().and_then(|change| change.after), Some(row.into()), "{:?}", row.key);
        let meter = answers[0].meter.unwrap();
        if found.price.is_none() || matches!(meter.window, WindowKind::Hopping(_)) {
            return;
        }
        // The lines say the same as the cost.
        let steps = &found.steps;
        let after = steps.after.as_ref().unwrap();
        assert_eq!(total(&after.lines).unwrap(), after.cost);
        let before = steps.before.as_ref().map_or(Decimal::ZERO, |step| step.cost);
        let lines = after.cost.checked_sub(before).unwrap();
        let lines = lines.checked_add(total(&steps.adjustments).unwrap()).unwrap();
        assert_eq!(lines, row.cost, "{:?}", row.key);
    }

    fn check_period(&self, row: &PeriodRow) {
        let key = &row.key;
        let asked = asked(key.tenant_id.to_string(), &key.subscription_id, &key.meter_id, key.period_start, true);
        let answers = self.ask(&asked, 1);
        let found = answers[0].rows.iter().find(|found| *found.key.period == *key);
        let found = found.unwrap_or_else(|| panic!("{key:?} is not explained"));
        assert!(!found.differs(), "{key:?}: {:?} and {:?}", found.stored, found.computed);
        if found.price.is_none() {
            return;
        }
        let after = found.steps.after.as_ref().unwrap();
        assert_eq!((total(&after.lines).unwrap(), after.cost), (row.cost, row.cost), "{key:?}");
        assert_eq!(row.cost.checked_add(total(&found.steps.adjustments).unwrap()).unwrap(), row.amount, "{key:?}");
        if answers[0].meter.unwrap().charge_on != ChargeOn::Window {
            assert_eq!(after.quantity, row.quantity, "{key:?}");
        }
    }
}

fn asked(tenant: String, subscription: &str, meter: &str, at: Timestamp, of_period: bool) -> Asked {
    Asked {
        subscription: subscription.to_owned(),
        meter: meter.to_owned(),
        at,
        of_period,
        tenant: Some(tenant),
        price: None,
        dimensions: None,
        limit: usize::MAX,
    }
}

/// Tiers, percentages by event, sessions, levels that are carried in, straddling weeks,
/// and all the rest of the vocabulary: every row of every case.
#[test]
fn every_row_of_every_case_is_explained_as_it_was_computed() {
    let mut rows = (0, 0);
    for case in cases() {
        let workspace = Workspace::new();
        workspace.overlay(&case);
        let arguments = std::fs::read_to_string(case.join("args")).unwrap_or_default();
        workspace.run(&arguments.split_whitespace().collect::<Vec<_>>());
        let explained = Explained::new(&workspace, "job.yaml");
        let (windows, periods) = explained.rows();
        // A run of a range stores the rows of the range alone, and the periods as far as they go.
        windows.iter().for_each(|row| explained.check_window(row));
        periods.iter().for_each(|row| explained.check_period(row));
        rows = (rows.0 + windows.len(), rows.1 + periods.len());
    }
    assert!(rows.0 > 300 && rows.1 > 100, "{rows:?}");
}

#[test]
fn rows_of_the_bundled_job_are_explained_as_they_were_computed() {
    let workspace = Workspace::of("llm_usage");
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let job = std::fs::read_to_string(root.join("jobs/llm_usage.yaml")).unwrap();
    workspace.write("jobs/llm_usage.yaml", job.replace("../fixtures/llm_usage/", "../"));
    workspace.trueup(&["run", "jobs/llm_usage.yaml", "--output", "json"]).json();
    let explained = Explained::new(&workspace, "jobs/llm_usage.yaml");
    let (windows, periods) = explained.rows();
    windows.iter().step_by(windows.len() / 25).for_each(|row| explained.check_window(row));
    periods.iter().step_by(periods.len() / 10).for_each(|row| explained.check_period(row));
}

// --- what it says ----------------------------------------------------------------------------

#[track_caller]
fn shown(workspace: &Workspace, arguments: &[&str]) -> String {
    let outcome = workspace.trueup(&[&["explain", "job.yaml"], arguments].concat());
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{outcome:?}");
    normalised(&outcome.stdout)
}

fn event(id: &str, time: &str, ingested: &str, properties: &Value) -> String {
    let event = json!({"tenant_id": "demo", "id": id, "event_name": "api.call", "external_customer_id": "acme",
        "timestamp": time, "ingested_at": ingested, "properties": properties});
    format!("{event}\n")
}

/// The job of `trueup init` run twice, with every way for an event not to count.
fn history() -> Workspace {
    let workspace = Workspace::of("init");
    workspace.run(&[]);
    let day = |time: &str| format!("2026-01-01T{time}Z");
    let lines = [
        event("late", &day("10:30:00"), "2026-01-02T00:00:00Z", &json!({"status": 200, "bytes": 10})),
        event("e4", &day("10:06:00"), "2026-01-02T00:00:00Z", &json!({"status": 200, "bytes": 1600})),
        event("moved", &day("10:40:00"), &day("10:40:01"), &json!({"status": 200, "bytes": 5})),
        event("moved", &day("11:40:00"), &day("10:41:00"), &json!({"status": 200, "bytes": 5})),
        event("void", &day("10:50:00"), &day("10:50:01"), &json!({"status": 200, "bytes": 7})),
        json!({"tenant_id": "demo", "id": "void", "deleted": true, "ingested_at": day("10:55:00")}).to_string() + "\n",
        event("none", &day("10:51:00"), &day("10:51:01"), &json!({"status": 200})),
        event("bad", &day("10:52:00"), &day("10:52:01"), &json!({"status": 200, "bytes": "lots"})),
    ];
    workspace.write("events/2026-01-02.ndjson", lines.concat());
    workspace.run(&[]);
    workspace
}

#[test]
fn a_window_is_taken_apart() {
    let of = ["--subscription", "sub_1", "--meter", "bytes_sent", "--window", "2026-01-01T10:59"];
    assert_snapshot!(shown(&history(), &of), @r"
    trueup explain my_usage: demo / sub_1 / bytes_sent

      window       2026-01-01T10:00:00Z to 2026-01-01T11:00:00Z
      period       2026-01-01T00:00:00Z to 2026-02-01T00:00:00Z
      price        standard_bytes
      quantity     1700
      cost         0.0017 USD
      stored       the same

      price per_unit
        the period to the window's end: 3700, 5 events
          units     3700 x 0.000001  0.0037
        the period to the window's start: 2000, 2 events
          units     2000 x 0.000001   0.002
        the window   0.0037 - 0.002  0.0017

      events 3 counted
        time                  ingested              id    value
        2026-01-01T10:05:00Z  2026-01-01T10:05:01Z  e3       90
        2026-01-01T10:06:00Z  2026-01-02T00:00:00Z  e4     1600
        2026-01-01T10:30:00Z  2026-01-02T00:00:00Z  late     10

      history 2 corrections
        run                                   when                  kind    quantity  becomes     cost  becomes  causes
        <run>  <time>  insert         -     1590        -  0.00159  first_computation 2
        <run>  <time>  update      1590     1700  0.00159   0.0017  event_amended 1, late_event 1

      set aside 6 events that do not count
        time                  ingested              id     why
        2026-01-01T10:06:00Z  2026-01-01T10:06:01Z  e4     superseded        the copy ingested 2026-01-02T00:00:00Z counts
        2026-01-01T10:06:00Z  2026-01-01T10:06:09Z  e4     superseded        the copy ingested 2026-01-02T00:00:00Z counts
        2026-01-01T10:40:00Z  2026-01-01T10:40:01Z  moved  superseded        the copy ingested 2026-01-01T10:41:00Z counts, at 2026-01-01T11:40:00Z
        2026-01-01T10:50:00Z  2026-01-01T10:50:01Z  void   voided            by a deletion ingested 2026-01-01T10:55:00Z
        2026-01-01T10:51:00Z  2026-01-01T10:51:01Z  none   skipped           property bytes is absent or null
        2026-01-01T10:52:00Z  2026-01-01T10:52:01Z  bad    invalid_property  property `bytes` is `lots`, not a decimal number

      reference
        customer     acme is cus_1, valid always
        subscription sub_1 on plan standard in USD, billed by month (UTC), active from 2026-01-01T00:00:00Z
        meter        bytes_sent: sum of bytes over api.call; window hour; charged on the period
        price        standard_bytes: per_unit on plan standard, valid always
    ");
    let of = ["--subscription", "sub_1", "--meter", "api_calls", "--window", "2026-01-01T10:00"];
    assert_snapshot!(shown(&history(), &of), @r"
    trueup explain my_usage: demo / sub_1 / api_calls

      window       2026-01-01T10:00:00Z to 2026-01-01T11:00:00Z
      period       2026-01-01T00:00:00Z to 2026-02-01T00:00:00Z
      price        standard_calls
      quantity     4
      cost         0.04 USD
      stored       the same

      price graduated
        the period to the window's end: 6, 6 events
          up to 2      2 x 0     0
          beyond 2  4 x 0.01  0.04
          together            0.04
        the period to the window's start: 2, 2 events
          up to 2      2 x 0     0
        the window  0.04 - 0  0.04

      events 4 counted
        time                  ingested              id
        2026-01-01T10:06:00Z  2026-01-02T00:00:00Z  e4
        2026-01-01T10:30:00Z  2026-01-02T00:00:00Z  late
        2026-01-01T10:51:00Z  2026-01-01T10:51:01Z  none
        2026-01-01T10:52:00Z  2026-01-01T10:52:01Z  bad

      history 2 corrections
        run                                   when                  kind    quantity  becomes  cost  becomes  causes
        <run>  <time>  insert         -        1     -     0.01  first_computation 1
        <run>  <time>  update         1        4  0.01     0.04  event_amended 1, late_event 3

      set aside 5 events that do not count
        time                  ingested              id     why
        2026-01-01T10:05:00Z  2026-01-01T10:05:01Z  e3     filtered    not status lt 500
        2026-01-01T10:06:00Z  2026-01-01T10:06:01Z  e4     superseded  the copy ingested 2026-01-02T00:00:00Z counts
        2026-01-01T10:06:00Z  2026-01-01T10:06:09Z  e4     superseded  the copy ingested 2026-01-02T00:00:00Z counts
        2026-01-01T10:40:00Z  2026-01-01T10:40:01Z  moved  superseded  the copy ingested 2026-01-01T10:41:00Z counts, at 2026-01-01T11:40:00Z
        2026-01-01T10:50:00Z  2026-01-01T10:50:01Z  void   voided      by a deletion ingested 2026-01-01T10:55:00Z

      reference
        customer     acme is cus_1, valid always
        subscription sub_1 on plan standard in USD, billed by month (UTC), active from 2026-01-01T00:00:00Z
        meter        api_calls: count over api.call where status lt 500; window hour; charged on the period
        price        standard_calls: graduated on plan standard, valid always
    ");
}

#[test]
fn a_period_is_taken_apart() {
    let of = ["--subscription", "sub_1", "--meter", "api_calls", "--period", "2026-01-15"];
    assert_snapshot!(shown(&history(), &of), @r"
    trueup explain my_usage: demo / sub_1 / api_calls

      period       2026-01-01T00:00:00Z to 2026-02-01T00:00:00Z
      price        standard_calls
      quantity     7
      cost         0.05 USD
      amount       0.05 USD
      stored       the same

      price graduated
        the period: 7, 7 events
          up to 2      2 x 0     0
          beyond 2  5 x 0.01  0.05
          together            0.05

      events 7 counted
        time                  ingested              id
        2026-01-01T09:00:00Z  2026-01-01T09:00:01Z  e1
        2026-01-01T09:10:00Z  2026-01-01T09:10:01Z  e2
        2026-01-01T10:06:00Z  2026-01-02T00:00:00Z  e4
        2026-01-01T10:30:00Z  2026-01-02T00:00:00Z  late
        2026-01-01T10:51:00Z  2026-01-01T10:51:01Z  none
        2026-01-01T10:52:00Z  2026-01-01T10:52:01Z  bad
        2026-01-01T11:40:00Z  2026-01-01T10:41:00Z  moved

      history 2 corrections
        run                                   when                  kind    quantity  becomes  cost  becomes  causes
        <run>  <time>  insert         -        3     -     0.01  first_computation 3
        <run>  <time>  update         3        7  0.01     0.05  event_amended 1, late_event 4

      set aside 5 events that do not count
        time                  ingested              id     why
        2026-01-01T10:05:00Z  2026-01-01T10:05:01Z  e3     filtered    not status lt 500
        2026-01-01T10:06:00Z  2026-01-01T10:06:01Z  e4     superseded  the copy ingested 2026-01-02T00:00:00Z counts
        2026-01-01T10:06:00Z  2026-01-01T10:06:09Z  e4     superseded  the copy ingested 2026-01-02T00:00:00Z counts
        2026-01-01T10:40:00Z  2026-01-01T10:40:01Z  moved  superseded  the copy ingested 2026-01-01T10:41:00Z counts, at 2026-01-01T11:40:00Z
        2026-01-01T10:50:00Z  2026-01-01T10:50:01Z  void   voided      by a deletion ingested 2026-01-01T10:55:00Z

      reference
        customer     acme is cus_1, valid always
        subscription sub_1 on plan standard in USD, billed by month (UTC), active from 2026-01-01T00:00:00Z
        meter        api_calls: count over api.call where status lt 500; window hour; charged on the period
        price        standard_calls: graduated on plan standard, valid always
    ");
}

#[test]
fn a_row_that_differs_says_so() {
    let workspace = history();
    workspace.edit("prices.yaml", "unit_amount: \"0.000001\"", "unit_amount: \"0.000002\"");
    let of = ["--subscription", "sub_1", "--meter", "bytes_sent", "--window", "2026-01-01T09:00"];
    let lines = |text: String, name: &str| {
        let lines = text.lines().filter(|line| line.trim_start().starts_with(name)).map(|line| line.trim().to_owned());
        lines.collect::<Vec<_>>().join("\n")
    };
    assert_snapshot!(lines(shown(&workspace, &of), "stored"), @"stored       differs: quantity 2000, cost 0.002 USD; trueup plan job.yaml shows what a run would change");
    // Gone from the source, and then from the store.
    std::fs::remove_file(workspace.path("events/2026-01-01.ndjson")).unwrap();
    assert_snapshot!(lines(shown(&workspace, &of), "stored"), @"stored       quantity 2000, cost 0.002 USD, but nothing counts here now: a run would retract it");
    workspace.run(&["--yes"]);
    assert_snapshot!(lines(shown(&workspace, &of), "stored"), @"stored       no more: it was retracted, and nothing counts here");
    let rows = workspace.trueup(&[&["explain", "job.yaml", "--output", "json"], of.as_slice()].concat()).json();
    let kinds = rows["explanations"][0]["rows"][0]["history"].clone();
    let kinds: Vec<_> = kinds.as_array().unwrap().iter().map(|change| change["kind"].clone()).collect();
    assert_eq!(kinds, ["insert", "retract"]);
    // Never any.
    let of = ["--subscription", "sub_2", "--meter", "bytes_sent", "--window", "2026-01-01T05:00"];
    assert!(
        shown(&workspace, &of).contains("no row: nothing counts in the window at 2026-01-01T05:00:00Z, and nothing is stored")
    );
}

#[test]
fn rows_are_told_apart_by_dimensions_and_price() {
    let workspace = Workspace::of("init");
    workspace.edit("meters.yaml", "    property: bytes\n", "    property: bytes\n    dimensions: [status]\n");
    workspace.run(&[]);
    let of = ["explain", "job.yaml", "--output", "json", "--subscription", "sub_1", "--meter", "bytes_sent"];
    let rows = |more: &[&str]| {
        let document = workspace.trueup(&[of.as_slice(), more].concat()).json();
        assert_eq!(document["schema"], "trueup.explain/1");
        let rows = document["explanations"][0]["rows"].clone();
        rows.as_array().unwrap().iter().map(|row| row["dimensions"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let window = ["--window", "2026-01-01T10:00:00Z"];
    assert_eq!(rows(&window), [r#"{"status":200}"#, r#"{"status":503}"#]);
    assert_eq!(rows(&[window.as_slice(), &["--dimensions", r#"{"status":503}"#]].concat()), [r#"{"status":503}"#]);
    assert_eq!(rows(&[window.as_slice(), &["--price", "standard_bytes"]].concat()).len(), 2);
    assert_eq!(rows(&[window.as_slice(), &["--price", "other"]].concat()).len(), 0);
    assert_eq!(rows(&["--period", "2026-01-01"]).len(), 2);
}

#[test]
fn long_lists_are_folded() {
    let workspace = Workspace::of("init");
    let many = |n: usize| {
        let time = format!("2026-01-01T12:{:02}:{:02}Z", n / 60, n % 60);
        event(&format!("m{n}"), &time, &time, &json!({"status": 200, "bytes": n}))
    };
    workspace.write("events/many.ndjson", (0..1500).map(many).collect::<String>());
    workspace.run(&[]);
    let of = ["--subscription", "sub_1", "--meter", "bytes_sent", "--window", "2026-01-01T12:00"];
    let text = shown(&workspace, &of);
    assert!(text.contains("1,500 counted") && text.contains("… and 1,480 more: --all shows them"), "{text}");
    assert!(text.contains(" m19 ") && !text.contains(" m20 "), "{text}");
    assert!(shown(&workspace, &[of.as_slice(), &["--all"]].concat()).contains(" m1499 "));
    let listed = |more: &[&str]| {
        let all = [&["explain", "job.yaml", "--output", "json"], of.as_slice(), more].concat();
        let events = workspace.trueup(&all).json()["explanations"][0]["rows"][0]["events"].clone();
        (events["total"].as_u64().unwrap(), events["events"].as_array().unwrap().len())
    };
    assert_eq!(listed(&[]), (1500, 1000));
    assert_eq!(listed(&["--limit", "7"]), (1500, 7));
    assert_eq!(listed(&["--all"]), (1500, 1500));
    // Whatever the number of threads.
    assert_eq!(listed(&["--limit", "7", "--threads", "3"]), (1500, 7));
}

#[test]
fn what_cannot_be_explained_is_a_usage_error() {
    let workspace = history();
    let fails = |arguments: &[&str], says: &str| {
        workspace.trueup(&[&["explain", "job.yaml"], arguments].concat()).fails_with(2, &[says]);
    };
    let window = ["--window", "2026-01-01"];
    let of = |subscription, meter| ["--subscription", subscription, "--meter", meter];
    fails(
        &[&of("sub_9", "api_calls"), window.as_slice()].concat(),
        "--subscription sub_9: neither the subscriptions table nor the store has it",
    );
    fails(
        &[&of("sub_1", "calls"), window.as_slice()].concat(),
        "--meter calls: there is no such meter (there are api_calls, bytes_sent, seats)",
    );
    fails(&of("sub_1", "api_calls"), "<--window <TIME>|--period <TIME>>");
    fails(&[of("sub_1", "api_calls").as_slice(), &["--window", "noon"]].concat(), "--window: `noon` is not");
    fails(
        &[&of("sub_1", "api_calls"), window.as_slice(), &["--dimensions", "large"]].concat(),
        "--dimensions large: no JSON object",
    );
}

/// The job of `trueup init` with bytes that are metered and priced otherwise, run over events of `(id, time, bytes)`.
fn of_bytes(meter: &str, prices: &str, events: &[(&str, &str, i64)]) -> Workspace {
    let workspace = Workspace::of("init");
    workspace.edit("subscriptions.csv", "2026-01-01T00:00:00Z", "2025-01-01T00:00:00Z");
    workspace.edit("meters.yaml", "    aggregation: sum\n    property: bytes\n", meter);
    workspace.edit("prices.yaml", "    model: per_unit\n    unit_amount: \"0.000001\"\n", prices);
    let lines = events.iter().map(|(id, time, bytes)| event(id, time, time, &json!({"status": 200, "bytes": bytes})));
    workspace.write("events/2026-01-01.ndjson", lines.collect::<String>());
    workspace.run(&[]);
    workspace
}

/// The rows of the bytes of `sub_1`, none of which differs from what is stored.
#[track_caller]
fn rows_of_bytes(workspace: &Workspace, at: [&str; 2]) -> Vec<Value> {
    let of = ["explain", "job.yaml", "--output", "json", "--subscription", "sub_1", "--meter", "bytes_sent"];
    let document = workspace.trueup(&[of.as_slice(), at.as_slice()].concat()).json();
    let rows = document["explanations"][0]["rows"].as_array().unwrap().clone();
    rows.iter().for_each(|row| assert_eq!(row["differs"], false, "{row}"));
    rows
}

fn listed<'r>(row: &'r Value, column: &str) -> Vec<&'r str> {
    row["events"]["events"].as_array().unwrap().iter().map(|event| event[column].as_str().unwrap()).collect()
}

/// What is free is free in each window anew, also where the period is asked about.
#[test]
fn fees_of_a_period_sum_to_the_cost_of_windows_priced_alone() {
    let workspace = of_bytes(
        "    aggregation: sum\n    property: bytes\n    window: day\n    charge_on: window\n",
        "    model: percentage\n    rate_percent: \"10\"\n    free_events: \"1\"\n",
        &[("a", "2026-01-01T10:00:00Z", 100), ("b", "2026-01-01T11:00:00Z", 10), ("c", "2026-01-02T10:00:00Z", 50)],
    );
    let rows = rows_of_bytes(&workspace, ["--period", "2026-01-01"]);
    assert_eq!(rows[0]["computed"]["cost"], "1");
    assert_eq!((listed(&rows[0], "charged"), listed(&rows[0], "fee")), (vec!["0", "10", "0"], vec!["0", "1", "0"]));
    let rows = rows_of_bytes(&workspace, ["--window", "2026-01-01T10:00"]);
    assert_eq!(listed(&rows[0], "fee"), ["0", "1"]);
}

/// A session ends a gap after its last event: that can be in the next period, where another one may have begun.
#[test]
fn a_session_that_lasts_into_the_next_period_is_found() {
    let workspace = of_bytes(
        "    aggregation: sum\n    property: bytes\n    window: {session: {gap: 30m}}\n",
        "    model: per_unit\n    unit_amount: \"1\"\n",
        &[("a", "2026-01-31T23:50:00Z", 7), ("b", "2026-02-01T00:15:00Z", 5)],
    );
    let events = |at: &str| {
        let rows = rows_of_bytes(&workspace, ["--window", at]);
        rows.iter().map(|row| listed(row, "id").join(" ")).collect::<Vec<_>>()
    };
    assert_eq!(events("2026-01-31T23:55:00Z"), ["a"]);
    assert_eq!(events("2026-02-01T00:10:00Z"), ["a"]);
    assert_eq!(events("2026-02-01T00:19:59Z"), ["a", "b"]);
    assert_eq!(events("2026-02-01T00:20:00Z"), ["b"]);
    assert_eq!(events("2026-02-01T00:45:00Z"), [""; 0]);
}

/// Events that come later than a price, in the same window, left nothing to it.
#[test]
fn a_level_is_carried_in_as_it_was_where_the_price_begins() {
    let second = "    valid_to: 2026-01-16T12:00:00Z\n  - price_id: later_bytes\n    plan_id: standard\n    meter_id: bytes_sent\n    \
                  currency: USD\n    model: per_unit\n    unit_amount: \"2\"\n    valid_from: 2026-01-16T12:00:00Z\n";
    let workspace = of_bytes(
        "    aggregation: weighted_sum\n    property: bytes\n    window: month\n",
        &format!("    model: per_unit\n    unit_amount: \"1\"\n{second}"),
        &[
            ("a", "2025-12-15T00:00:00Z", 10),
            ("b", "2026-01-08T18:00:00Z", -4),
            ("c", "2026-01-24T06:00:00Z", 8),
            ("d", "2026-02-15T00:00:00Z", 0),
        ],
    );
    let carried = |at: &str| {
        let rows = rows_of_bytes(&workspace, ["--window", at]);
        let carried = |row: &Value| {
            let of = ["level", "quantity"].map(|name| row["carried_in"][name].as_str().unwrap_or("-").to_owned());
            (row["price_id"].as_str().unwrap().to_owned(), of.join(" "))
        };
        rows.iter().map(carried).collect::<std::collections::BTreeMap<_, _>>()
    };
    let expected = |of: &[(&str, &str)]| of.iter().map(|(price, of)| ((*price).to_owned(), (*of).to_owned())).collect();
    assert_eq!(carried("2025-12-20"), expected(&[("standard_bytes", "- -")]));
    assert_eq!(carried("2026-01-20"), expected(&[("later_bytes", "6 3"), ("standard_bytes", "10 5")]));
    assert_eq!(carried("2026-02-20"), expected(&[("later_bytes", "14 14")]));
}
