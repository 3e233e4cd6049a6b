//! The promises on made-up histories: events of two months around a clock change,
//! with copies, amendments, voids and late ones, for every aggregation, price model
//! and kind of billing period; in process, through the library.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, StringArray, TimestampMicrosecondArray};
use chrono::{Duration, NaiveDate};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use trueup::audit::check_ledger;
use trueup::config::{Job, Source, Store};
use trueup::model::aggregate::{Cause, DeadLetterKey, PeriodKey, PeriodRow, WindowKey, WindowRow};
use trueup::model::basis::Scope;
use trueup::model::decimal_sum::DecimalSum;
use trueup::model::run::Origin;
use trueup::model::timestamp::Timestamp;
use trueup::model::window::Span;
use trueup::pipeline::{Inputs, KeyCache, Observer, Plan, Published, Request, plan};
use trueup::reference::Reference;
use trueup::source::files::FileSource;
use trueup::store::AggregateStore as _;
use trueup::store::sqlite::SqliteStore;

use crate::support::Workspace;

// --- a world to make up histories in ---------------------------------------------------------

const METERS: &str = "meters:
  - {meter_id: calls, event_name: call, aggregation: count}
  - {meter_id: tokens, event_name: call, aggregation: sum, property: value, dimensions: [model]}
  - {meter_id: large, event_name: call, aggregation: sum, property: value, filters: [{property: model, op: eq, value: large}], window: 15m, charge_on: window_sum}
  - {meter_id: mean, event_name: call, aggregation: avg, property: value, window: day}
  - {meter_id: least, event_name: call, aggregation: min, property: value, window: 6h}
  - {meter_id: peak, event_name: login, aggregation: max, property: value, window: day, charge_on: window}
  - {meter_id: level, event_name: login, aggregation: latest, property: value}
  - {meter_id: users, event_name: login, aggregation: count_unique, property: user, window: week, unpriced: true}
";

/// Plan basic has no price for the mean (dead letters), and none for users (unpriced).
const PRICES: &str = r#"prices:
  - {price_id: pro_calls, plan_id: pro, meter_id: calls, currency: EUR, model: graduated, tiers: [{up_to: "3", unit_amount: "0", flat_amount: "9.90"}, {up_to: "6", unit_amount: "0.FACTOR"}, {up_to: null, unit_amount: "0.1", flat_amount: "2"}]}
  - {price_id: pro_tokens, plan_id: pro, meter_id: tokens, currency: EUR, model: per_unit, unit_amount: "0.000FACTOR"}
  - {price_id: pro_tokens_large, plan_id: pro, meter_id: tokens, currency: EUR, model: volume, match: {model: large}, tiers: [{up_to: "4", unit_amount: "1"}, {up_to: null, unit_amount: "0.5", flat_amount: "1.5"}]}
  - {price_id: pro_large, plan_id: pro, meter_id: large, currency: EUR, model: package, package_size: "2", amount: "0.FACTOR"}
  - {price_id: pro_mean, plan_id: pro, meter_id: mean, currency: EUR, model: percentage, rate_percent: "2.9"}
  - {price_id: pro_least, plan_id: pro, meter_id: least, currency: EUR, model: per_unit, unit_amount: "3"}
  - {price_id: pro_peak, plan_id: pro, meter_id: peak, currency: EUR, model: graduated, tiers: [{up_to: "2", unit_amount: "1"}, {up_to: null, unit_amount: "0.333333333333333333"}]}
  - {price_id: pro_level, plan_id: pro, meter_id: level, currency: EUR, model: per_unit, unit_amount: "0.7", free_units: "2"}
  - {price_id: pro_users, plan_id: pro, meter_id: users, currency: EUR, model: per_unit, unit_amount: "5", valid_to: 2026-03-29T00:30:00Z}
  - {price_id: pro_users_2, plan_id: pro, meter_id: users, currency: EUR, model: per_unit, unit_amount: "4", free_units: "1", valid_from: 2026-03-29T00:30:00Z}
  - {price_id: basic_calls, plan_id: basic, meter_id: calls, currency: USD, model: package, package_size: "3", amount: "1.FACTOR", round: down}
  - {price_id: basic_tokens, plan_id: basic, meter_id: tokens, currency: USD, model: graduated, free_units: "1", tiers: [{up_to: "5", unit_amount: "0.2"}, {up_to: null, unit_amount: "0.FACTOR"}]}
  - {price_id: basic_large, plan_id: basic, meter_id: large, currency: USD, model: volume, tiers: [{up_to: "3", unit_amount: "1"}, {up_to: null, unit_amount: "0.9"}]}
  - {price_id: basic_least, plan_id: basic, meter_id: least, currency: USD, model: percentage, rate_percent: "FACTOR"}
  - {price_id: basic_peak, plan_id: basic, meter_id: peak, currency: USD, model: package, package_size: "10", amount: "4"}
  - {price_id: basic_level, plan_id: basic, meter_id: level, currency: USD, model: volume, tiers: [{up_to: "2", unit_amount: "2"}, {up_to: null, unit_amount: "1"}]}
"#;

/// By month, week, day, from an anchor that clamps, and a change of plan within the
/// hour of the clock change.
const SUBSCRIPTIONS: &str =
    "tenant_id,subscription_id,customer_id,plan_id,currency,billing_period,anchor,timezone,started_at,ended_at
ta,s0,c0,pro,EUR,month,,Europe/Berlin,2025-01-01,
ta,s1,c1,basic,USD,week,,,2025-01-01,
ta,s2a,c2,pro,EUR,month,,,2025-01-01,2026-03-29T01:00:00Z
ta,s2b,c2,basic,USD,quarter,,,2026-03-29T01:00:00Z,
tb,s0,c0,pro,EUR,month,2026-01-31,America/New_York,2025-01-01,
tb,s1,c1,basic,USD,day,,,2025-01-01,2026-04-20
";

const COLUMNS: [&str; 8] =
    ["tenant_id", "id", "event_name", "external_customer_id", "timestamp", "ingested_at", "properties", "deleted"];
const VALUES: [&str; 10] = ["", "0", "1", "2.5", "-3", "1000.000000000000000001", "\"7\"", "null", "\"lots\"", "1e99"];
const MODELS: [&str; 4] = ["", "\"small\"", "\"large\"", "null"];
const DAYS: i64 = 61;

/// The settings that a history may change.
#[derive(Debug, Clone)]
pub struct Settings {
    timezone: &'static str,
    keep: &'static str,
    /// Two digits in the prices.
    pub factor: u8,
    /// Whose customer the external id x1 of tenant ta is.
    pub owner: &'static str,
    /// Which model the meter of large ones counts.
    pub model: &'static str,
    /// When the daily subscription ends.
    pub ended: &'static str,
}

impl Settings {
    pub fn write(&self, workspace: &Workspace) {
        workspace.write("meters.yaml", METERS.replace("value: large", &format!("value: {}", self.model)));
        workspace.write("prices.yaml", PRICES.replace("FACTOR", &self.factor.to_string()));
        workspace.write("subscriptions.csv", SUBSCRIPTIONS.replace("2026-04-20", self.ended));
        let rows =
            ["ta,c0,x0,,", &format!("ta,{},x1,,", self.owner), "ta,c2,x2,,", "tb,c0,x0,,", "tb,c1,x1,,2026-04-10T00:00:00Z"];
        workspace.write(
            "customers.csv",
            format!("tenant_id,customer_id,external_customer_id,valid_from,valid_to\n{}\n", rows.join("\n")),
        );
        for store in ["trueup", "fresh"] {
            let job = format!(
                "version: 1\njob: made_up\ntimezone: {}\nsource: {{kind: files, paths: [\"events/*\"]}}\ndeduplicate: {{keep: {}}}\nreference:\n  \
                 customers: {{path: customers.csv}}\n  subscriptions: {{path: subscriptions.csv}}\n  meters: {{path: meters.yaml}}\n  \
                 prices: {{path: prices.yaml}}\nstore: {{kind: sqlite, path: {store}.db}}\n",
                self.timezone, self.keep
            );
            workspace.write(&format!("{store}.yaml"), job);
        }
    }
}

pub fn settings() -> impl Strategy<Value = Settings> {
    let zones = prop_oneof![Just("UTC"), Just("Europe/Berlin"), Just("Asia/Kolkata")];
    let keeps = prop_oneof![3 => Just("latest"), 1 => Just("first")];
    (zones, keeps).prop_map(|(timezone, keep)| Settings {
        timezone,
        keep,
        factor: 25,
        owner: "c1",
        model: "large",
        ended: "2026-04-20",
    })
}

/// One row of the source.
#[derive(Debug, Clone)]
pub struct Event {
    tenant: &'static str,
    id: u8,
    name: &'static str,
    external_id: u8,
    minute: i64,
    ingested_hour: i64,
    value: usize,
    model: usize,
    user: u8,
    deleted: bool,
}

impl Event {
    fn time(minutes: i64) -> String {
        let start = NaiveDate::from_ymd_opt(2026, 3, 1).unwrap().and_hms_opt(0, 0, 0).unwrap();
        (start + Duration::minutes(minutes)).format("%Y-%m-%dT%H:%M:%SZ").to_string()
    }

    /// The texts of all columns.
    fn texts(&self) -> [String; 8] {
        let mut properties = vec![format!("\"user\":\"u{}\"", self.user)];
        for (name, text) in [("value", VALUES[self.value]), ("model", MODELS[self.model])] {
            if !text.is_empty() {
                properties.push(format!("\"{name}\":{text}"));
            }
        }
        [
            self.tenant.to_owned(),
            format!("e{}", self.id),
            self.name.to_owned(),
            format!("x{}", self.external_id),
            Event::time(self.minute),
            Event::time(DAYS * 24 * 60 + self.ingested_hour * 60),
            format!("{{{}}}", properties.join(",")),
            self.deleted.to_string(),
        ]
    }
}

fn event() -> impl Strategy<Value = Event> {
    // Every third event lies around the clock change of 29 March.
    let minute = prop_oneof![2 => 0..DAYS * 24 * 60, 1 => (28 * 24 - 6) * 60..(28i64 * 24 + 6) * 60];
    let names = prop_oneof![8 => Just("call"), 5 => Just("login"), 1 => Just("noise")];
    let tenants = prop_oneof![2 => Just("ta"), 1 => Just("tb")];
    let who = (tenants, 0u8..50, names, prop_oneof![20 => 0u8..3, 1 => Just(9u8)]);
    let what = (prop_oneof![10 => 0usize..8, 1 => 8usize..10], 0usize..4, 0u8..4, prop::bool::weighted(0.08));
    (who, minute, 0i64..30, what).prop_map(
        |((tenant, id, name, external_id), minute, ingested_hour, (value, model, user, deleted))| Event {
            tenant,
            id,
            name,
            external_id,
            minute,
            ingested_hour,
            value,
            model,
            user,
            deleted,
        },
    )
}

/// Events with some of them twice.
pub fn events(most: usize) -> impl Strategy<Value = Vec<Event>> {
    (vec(event(), 1..most), vec(any::<Index>(), 0..6)).prop_map(|(mut events, again)| {
        let copies: Vec<_> = again.iter().map(|index| index.get(&events).clone()).collect();
        events.extend(copies);
        events
    })
}

#[derive(Debug, Clone, Copy)]
pub enum Format {
    Ndjson,
    NdjsonGz,
    Csv,
    CsvZst,
    Parquet,
    ParquetGz,
}

pub fn format() -> impl Strategy<Value = Format> {
    use Format::{Csv, CsvZst, Ndjson, NdjsonGz, Parquet, ParquetGz};
    prop::sample::select(vec![Ndjson, NdjsonGz, Csv, CsvZst, Parquet, ParquetGz])
}

impl Format {
    pub fn write(self, workspace: &Workspace, name: &str, events: &[Event]) {
        match self {
            Format::Ndjson => workspace.write(&format!("events/{name}.ndjson"), ndjson(events)),
            Format::NdjsonGz => workspace.write(&format!("events/{name}.ndjson.gz"), gzip(ndjson(events).as_bytes())),
            Format::Csv => workspace.write(&format!("events/{name}.csv"), csv(events)),
            Format::CsvZst => {
                workspace.write(&format!("events/{name}.csv.zst"), zstd::encode_all(csv(events).as_slice(), 3).unwrap());
            }
            Format::Parquet => workspace.write_parquet(&format!("events/{name}.parquet"), columns(events)),
            Format::ParquetGz => {
                workspace.write_parquet("whole.parquet", columns(events));
                let bytes = fs::read(workspace.path("whole.parquet")).unwrap();
                workspace.write(&format!("events/{name}.parquet.gz"), gzip(&bytes));
            }
        }
    }
}

fn ndjson(events: &[Event]) -> String {
    let mut lines = String::new();
    for event in events {
        let fields = COLUMNS.iter().zip(event.texts()).map(|(name, text)| match *name {
            "properties" | "deleted" => format!("\"{name}\":{text}"),
            _ => format!("\"{name}\":\"{text}\""),
        });
        lines += &format!("{{{}}}\n", fields.collect::<Vec<_>>().join(","));
    }
    lines
}

fn csv(events: &[Event]) -> Vec<u8> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(COLUMNS).unwrap();
    for event in events {
        writer.write_record(event.texts()).unwrap();
    }
    writer.into_inner().unwrap()
}

fn columns(events: &[Event]) -> Vec<(&'static str, ArrayRef)> {
    let texts: Vec<_> = events.iter().map(Event::texts).collect();
    let column = |(at, name): (usize, &&'static str)| -> (&'static str, ArrayRef) {
        let cells = texts.iter().map(|row| row[at].as_str());
        let array: ArrayRef = match *name {
            "deleted" => Arc::new(cells.map(|text| Some(text == "true")).collect::<BooleanArray>()),
            "timestamp" | "ingested_at" => {
                let micros = cells.map(|text| text.parse::<Timestamp>().unwrap().nanos() / 1000);
                Arc::new(TimestampMicrosecondArray::from_iter_values(micros).with_timezone("UTC"))
            }
            _ => Arc::new(StringArray::from_iter_values(cells)),
        };
        (name, array)
    };
    COLUMNS.iter().enumerate().map(column).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

// --- running it ------------------------------------------------------------------------------

struct Nobody;

impl Observer for Nobody {
    fn step(&self, _: &'static str, _: Option<u64>) {}
    fn rows(&self, _: u64) {}
}

/// Plans a job, and hands plan, job and store on.
pub fn planned<T>(
    workspace: &Workspace,
    job: &str,
    request: &Request,
    threads: usize,
    then: impl FnOnce(Plan, &Job, &mut SqliteStore) -> T,
) -> T {
    let job = Job::load(&workspace.path(&format!("{job}.yaml"))).unwrap();
    let reference = Reference::load(&job).unwrap();
    let Source::Files { patterns, columns } = &job.source else { panic!("made-up jobs read files") };
    let source = FileSource::new(patterns.clone(), columns.clone());
    let mut store = open(&job);
    let keys = KeyCache {
        folder: Some(workspace.path(&format!("{}.keys", job.path.file_stem().unwrap().display()))),
        job: job.digest.clone(),
        writes: true,
    };
    let inputs = Inputs {
        job: &job,
        reference: &reference,
        source: &source,
        store: Some(&store),
        threads,
        progress: &Nobody,
        keys: &keys,
    };
    let plan = plan(&inputs, request).unwrap();
    then(plan, &job, &mut store)
}

fn open(job: &Job) -> SqliteStore {
    let Store::Sqlite { path } = &job.store else { panic!("made-up jobs write SQLite") };
    SqliteStore::open(path).unwrap()
}

pub fn run(workspace: &Workspace, job: &str, request: &Request, threads: usize) -> Published {
    let published =
        planned(workspace, job, request, threads, |plan, job, store| plan.publish(job, store, &Origin::default()).unwrap());
    // Conservation, as the run's record tells it too.
    let (events, usage) = (published.plan.events, published.plan.usage);
    let accounted =
        events.out_of_range + events.duplicates + events.voided + events.unmatched + events.dead_lettered + events.metered;
    assert_eq!(events.read, accounted, "{events:?}");
    assert_eq!(usage.matches, usage.counted + usage.skipped + usage.rejected, "{usage:?}");
    let counts = &published.run.counts;
    assert_eq!((&counts["events"]["read"], &counts["usage"]["matches"]), (&events.read.into(), &usage.matches.into()));
    published
}

/// Everything, also what cannot have changed.
pub fn full() -> Request {
    Request::default()
}

/// What a store says, without how that came about.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    pub windows: BTreeMap<WindowKey, WindowRow>,
    pub periods: BTreeMap<PeriodKey, PeriodRow>,
    dead_letters: BTreeSet<DeadLetterKey>,
}

pub fn state(workspace: &Workspace, job: &str) -> State {
    let job = Job::load(&workspace.path(&format!("{job}.yaml"))).unwrap();
    let store = open(&job);
    let always = Span { start: Timestamp::MIN, end: Timestamp::MAX };
    let windows = store.windows(&job.name, always).unwrap().into_iter();
    let periods = store.periods(&job.name, always).unwrap().into_iter();
    let letters = store.dead_letters(&job.name).unwrap().into_iter().filter(|stored| stored.resolved_run_id.is_none());
    State {
        windows: windows
            .map(|stored| (stored.row.key.clone(), WindowRow { basis: Arc::default(), ..WindowRow::clone(&stored.row) }))
            .collect(),
        periods: periods.map(|row| (row.key.clone(), row)).collect(),
        dead_letters: letters.map(|stored| stored.letter.key).collect(),
    }
}

/// Promise 4, on what is stored.
pub fn check_telescoping(state: &State) {
    let mut sums: BTreeMap<&PeriodKey, DecimalSum> = BTreeMap::new();
    for (key, row) in &state.windows {
        sums.entry(&key.period).or_default().add(row.cost);
    }
    for (key, sum) in sums {
        assert_eq!(sum.total().unwrap(), state.periods[key].cost, "{key:?}");
    }
}

/// Promise 5, as `verify` checks it.
pub fn check_stored_ledger(workspace: &Workspace) {
    let job = Job::load(&workspace.path("trueup.yaml")).unwrap();
    assert_eq!(check_ledger(&open(&job), &job.name).unwrap(), []);
}

/// Promises 3: the same again changes nothing.
pub fn check_idempotence(workspace: &Workspace) {
    planned(workspace, "trueup", &full(), 1, |plan, _, _| {
        assert_eq!(plan.changes.rows.changed(), 0, "{:?}", plan.changes.corrections);
        assert_eq!((plan.periods.upserts.len(), plan.periods.deletions.len()), (0, 0), "{:?}", plan.periods);
        assert_eq!((plan.changes.stale_outside, plan.resolved.len()), (0, 0));
    });
}

/// Promise 7: quantities change in the range and the scope alone, costs in their
/// billing periods.
fn check_outside(before: &State, after: &State, range: Span, scope: &Scope) {
    let keys: BTreeSet<_> = before.windows.keys().chain(after.windows.keys()).collect();
    for key in keys {
        let (was, is) = (before.windows.get(key), after.windows.get(key));
        if was == is {
            continue;
        }
        let holds = |row: &WindowRow| scope.holds(&key.period.tenant_id, &row.customer_id, &key.period.meter_id);
        let rows = || was.into_iter().chain(is);
        assert!(rows().any(holds), "{key:?} is not in {scope:?}");
        if rows().all(|row| range.covers(row.window())) {
            continue;
        }
        let (was, is) = (was.expect("no row comes up outside"), is.expect("no row goes outside"));
        assert_eq!((was.quantity, was.event_count), (is.quantity, is.event_count), "{key:?} is not in {range:?}");
        assert!(is.period().overlaps(range), "{key:?} costs something else, its period is not in {range:?}");
    }
}

// --- the promises ----------------------------------------------------------------------------

pub fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 300, ..ProptestConfig::default() }
}

/// Something that happens between two runs.
#[derive(Debug, Clone)]
enum Change {
    Events(Vec<Event>, Format),
    Factor(u8),
    Owner(&'static str),
    /// All events so far in one new file.
    Compaction(Format),
    Nothing,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        5 => (events(12), format()).prop_map(|(events, format)| Change::Events(events, format)),
        2 => (10u8..100).prop_map(Change::Factor),
        1 => prop_oneof![Just("c0"), Just("c1"), Just("c2")].prop_map(Change::Owner),
        1 => format().prop_map(Change::Compaction),
        1 => Just(Change::Nothing),
    ]
}

/// A range from one share of the events' time to another, if any, and a scope.
pub fn request() -> impl Strategy<Value = (Option<(u8, u8)>, Scope)> {
    let range = prop::option::weighted(0.7, (0u8..100, 1u8..40));
    let of = |names: &'static [&'static str]| prop::option::weighted(0.15, prop::sample::select(names).prop_map(str::to_owned));
    let scope = (of(&["ta", "tb"]), of(&["c0", "c1"]), of(&["calls", "tokens", "peak", "users"]));
    (range, scope.prop_map(|(tenant, customer, meter)| Scope { tenant, customer, meter }))
}

/// A share of the way from the first to the last event, so that no run covers more
/// than a full one.
pub fn within(events: &[Event], (from, length): (u8, u8)) -> Option<Span> {
    let minutes = events.iter().map(|event| event.minute);
    let (first, last) = (minutes.clone().min()?, minutes.max()?);
    let at = |share: i64| Event::time(first + (last - first) * share.min(100) / 100).parse().unwrap();
    let (start, end): (Timestamp, Timestamp) = (at(from.into()), at(i64::from(from) + i64::from(length)));
    (start < end).then_some(Span { start, end })
}

proptest! {
    #![proptest_config(cases(64))]

    /// Promise 2: order, files, formats and threads do not matter. Promise 3: neither
    /// does a second run.
    #[test]
    fn aggregates_do_not_depend_on_layout_or_threads(
        settings in settings(),
        (events, shuffled) in events(120).prop_flat_map(|events| (Just(events.clone()), Just(events).prop_shuffle())),
        formats in vec(format(), 1..6),
        threads in prop::sample::select(vec![1usize, 2, 8]),
    ) {
        let workspace = Workspace::new();
        settings.write(&workspace);
        Format::Ndjson.write(&workspace, "all", &events);
        let whole = run(&workspace, "fresh", &Request::default(), 1);
        fs::remove_dir_all(workspace.path("events")).unwrap();
        fs::create_dir(workspace.path("events")).unwrap();
        for (number, format) in formats.iter().enumerate() {
            let part: Vec<_> = shuffled.iter().skip(number).step_by(formats.len()).cloned().collect();
            format.write(&workspace, &format!("part-{number}"), &part);
        }
        let split = run(&workspace, "trueup", &Request::default(), threads);
        prop_assert_eq!(whole.plan.events, split.plan.events);
        prop_assert_eq!(whole.plan.usage, split.plan.usage);
        prop_assert_eq!(whole.plan.range, split.plan.range);
        let (whole, split) = (state(&workspace, "fresh"), state(&workspace, "trueup"));
        prop_assert_eq!(&whole, &split);
        check_telescoping(&split);
        check_stored_ledger(&workspace);
        check_idempotence(&workspace);
    }

    /// Whatever comes later, in whatever order it is recomputed: a full run at the end
    /// leaves what a first run would have computed, and a ledger that leads there.
    #[test]
    fn histories_end_where_a_fresh_store_starts(
        settings in settings(),
        first in events(60),
        steps in vec((change(), request()), 1..6),
        threads in prop::sample::select(vec![1usize, 2, 8]),
    ) {
        let workspace = Workspace::new();
        let mut settings = settings;
        settings.write(&workspace);
        let mut events = first;
        let mut asked = Vec::new();
        Format::Ndjson.write(&workspace, "first", &events);
        run(&workspace, "trueup", &Request::default(), threads);
        for (number, (change, (range, scope))) in steps.into_iter().enumerate() {
            match change {
                Change::Events(more, format) => {
                    format.write(&workspace, &format!("step-{number}"), &more);
                    events.extend(more);
                }
                Change::Factor(factor) => settings.factor = factor,
                Change::Owner(owner) => settings.owner = owner,
                Change::Compaction(format) => {
                    fs::remove_dir_all(workspace.path("events")).unwrap();
                    fs::create_dir(workspace.path("events")).unwrap();
                    format.write(&workspace, &format!("compacted-{number}"), &events);
                }
                Change::Nothing => {}
            }
            settings.write(&workspace);
            let request = Request { range: range.and_then(|range| within(&events, range)), scope, ..Request::default() };
            let before = state(&workspace, "trueup");
            let published = run(&workspace, "trueup", &request, threads);
            let after = state(&workspace, "trueup");
            check_outside(&before, &after, published.plan.range.unwrap(), &request.scope);
            check_stored_ledger(&workspace);
            // Nobody else wrote to the store. After the run of a range, a cost may have
            // been computed with events outside of it that were never stored.
            if request.range.is_some() {
                asked.push(request);
            }
            let causes = published.plan.changes.corrections.iter().flat_map(|correction| correction.causes.names());
            let is_sound = !asked.is_empty() || causes.into_iter().all(|cause| cause != Cause::StoreAltered);
            prop_assert!(is_sound, "{:?}", published.plan.changes.corrections);
        }
        run(&workspace, "trueup", &Request::default(), threads);
        // Ranges that somebody asked for are billed though later copies lie elsewhere.
        for request in &asked {
            run(&workspace, "fresh", request, 1);
        }
        run(&workspace, "fresh", &Request::default(), 1);
        let (grown, fresh) = (state(&workspace, "trueup"), state(&workspace, "fresh"));
        prop_assert_eq!(&grown, &fresh);
        check_telescoping(&grown);
        check_stored_ledger(&workspace);
        check_idempotence(&workspace);
    }
}
