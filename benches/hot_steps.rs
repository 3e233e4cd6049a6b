//! The steps that every event or every window goes through, one by one:
//!
//! `cargo bench --bench hot_steps`

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::disallowed_methods)]

use std::sync::Arc;

use chrono_tz::Tz;
use divan::Bencher;
use divan::counter::ItemsCount;
use rustc_hash::{FxHashMap, FxHashSet};
use trueup::config::{Deduplicate, Keep};
use trueup::model::aggregate::{Basis, PeriodKey, StoredWindow, WindowKey, WindowRow};
use trueup::model::decimal::Decimal;
use trueup::model::digest::SetDigest;
use trueup::model::price::{Currency, Price, PriceModel, PriceOptions, Share, Tier, Usage};
use trueup::model::properties::PropertyPlan;
use trueup::model::run::{Origin, RunBasis, RunMode};
use trueup::model::timestamp::Timestamp;
use trueup::model::window::{BillingCycle, PeriodLength, Span, WindowKind, WindowSize};
use trueup::pipeline::causes::{CurrentDigests, Evidence, NewLetters};
use trueup::pipeline::closed::ClosedPeriods;
use trueup::pipeline::deduplicate::key_hash;
use trueup::pipeline::draft::Draft;
use trueup::pipeline::keys::KeyHashes;
use trueup::pipeline::price::PricedWindow;
use trueup::pipeline::reconcile::{Reconciliation, reconcile};
use trueup::pipeline::session_changes::SessionChanges;
use trueup::pipeline::state::News;
use trueup::source::{EventRef, Field};
use trueup::store::AggregateStore as _;
use trueup::store::sqlite::SqliteStore;

fn main() {
    divan::main();
}

const EVENTS: usize = 10_000;
const WINDOWS: usize = 10_000;
const SECOND: i64 = 1_000_000_000;
const START: i64 = 1_767_225_600 * SECOND; // 2026-01-01T00:00:00Z

fn properties() -> Vec<String> {
    let json = |n: usize| {
        format!(
            "{{\"model\":\"{}\",\"units\":{},\"latency_ms\":{}.5,\"user_id\":\"user-{}\"}}",
            ["large", "small", "tiny"][n % 3],
            n * 7 % 8192,
            n % 900,
            n * 31 % 4096
        )
    };
    (0..EVENTS).map(json).collect()
}

/// Two properties of four, of which one becomes a decimal.
#[divan::bench]
fn property_extraction(bencher: Bencher<'_, '_>) {
    let texts = properties();
    let mut plan = PropertyPlan::default();
    let (units, user) = (plan.slot("units"), plan.slot("user_id"));
    bencher.counter(ItemsCount::new(EVENTS)).bench_local(|| {
        let mut slots = Vec::new();
        let mut length = 0;
        for text in &texts {
            plan.read(Some(text), &mut slots).unwrap();
            divan::black_box(slots[units].decimal().unwrap());
            length += slots[user].text().len();
        }
        length
    });
}

/// Keys, their hashes, and which of these repeat (2%).
#[divan::bench]
fn deduplication(bencher: Bencher<'_, '_>) {
    let ids: Vec<String> = (0..EVENTS).map(|n| format!("event-{:09}", if n % 50 == 0 { n / 2 } else { n })).collect();
    let rules = Deduplicate { key: vec![Field::TenantId, Field::Id], keep: Keep::Latest };
    bencher.counter(ItemsCount::new(EVENTS)).bench_local(|| {
        let hash = |id: &String| {
            let event = EventRef { tenant_id: Some("tenant"), id: Some(id), ..EventRef::EMPTY };
            key_hash(&rules.key, &event).unwrap()
        };
        let hashes = KeyHashes::of(ids.iter().map(hash).collect());
        KeyHashes::repeated(std::iter::once(&hashes), 1)
    });
}

/// The window and the billing period of an instant, in a zone with clock changes.
#[divan::bench(args = [WindowSize::Minutes(60), WindowSize::Day, WindowSize::Month])]
fn window_assignment(bencher: Bencher<'_, '_>, size: WindowSize) {
    let zone = Tz::Europe__Berlin;
    let cycle = BillingCycle { length: PeriodLength::Month, anchor: None, timezone: zone };
    let times: Vec<_> = (0i64..).take(EVENTS).map(|n| Timestamp::from_nanos(START + n * 263 * SECOND)).collect();
    bencher.counter(ItemsCount::new(EVENTS)).bench_local(|| {
        times.iter().fold(0, |sum: i64, t| {
            let (window, period) = (WindowKind::Tumbling(size).slot(*t, zone), cycle.period(*t));
            sum.wrapping_add(window.start.nanos()).wrapping_add(period.end.nanos())
        })
    });
}

fn price() -> Price {
    let tier = |up_to: Option<&str>, unit_amount: &str| Tier {
        up_to: up_to.map(|text| text.parse().unwrap()),
        unit_amount: unit_amount.parse().unwrap(),
        flat_amount: Decimal::ZERO,
    };
    Price {
        id: "p".into(),
        plan_id: "pro".into(),
        meter_id: "units".into(),
        currency: Currency::from_code("EUR").unwrap(),
        model: PriceModel::Graduated(vec![tier(Some("1000"), "0.002"), tier(Some("100000"), "0.0015"), tier(None, "0.00125")]),
        options: PriceOptions::default(),
        matches: Vec::new(),
        valid: Span { start: Timestamp::MIN, end: Timestamp::MAX },
        digest: String::new(),
    }
}

/// Three tiers, the period to date after each window.
#[divan::bench]
fn pricing(bencher: Bencher<'_, '_>) {
    let price = price();
    bencher.counter(ItemsCount::new(WINDOWS)).bench_local(|| {
        let mut quantity = Decimal::ZERO;
        for n in 0..WINDOWS as u64 {
            quantity = quantity.checked_add(Decimal::from_u64(n % 97)).unwrap();
            divan::black_box(price.cost(Usage { quantity, events: n, ..Usage::NONE }, Share::WHOLE).unwrap());
        }
    });
}

/// Days of customers, sorted by key.
fn rows() -> Vec<Arc<WindowRow>> {
    let text = |text: &str| -> Arc<str> { Arc::from(text) };
    let (tenant, meter, price, none, digest) = (text("tenant"), text("units"), text("p"), text("{}"), text("0123456789abcdef"));
    let basis = Basis { meter: digest.clone(), price: digest.clone(), subscription: digest.clone(), customer: digest };
    let basis = Arc::new(basis);
    let instant = |day: i64| Timestamp::from_nanos(START + day * 86_400 * SECOND);
    let mut rows = Vec::with_capacity(WINDOWS);
    for customer in 0..WINDOWS / 25 {
        let period = Arc::new(PeriodKey {
            tenant_id: tenant.clone(),
            subscription_id: text(&format!("subscription-{customer:05}")),
            meter_id: meter.clone(),
            price_id: price.clone(),
            dimensions: none.clone(),
            period_start: instant(0),
        });
        rows.extend((0..25).map(|day| row(&period, (instant(day), instant(day + 1)), instant(31), &basis)));
    }
    rows
}

fn row(period: &Arc<PeriodKey>, window: (Timestamp, Timestamp), period_end: Timestamp, basis: &Arc<Basis>) -> Arc<WindowRow> {
    Arc::new(WindowRow {
        key: WindowKey { period: Arc::clone(period), window_start: window.0 },
        customer_id: Arc::clone(&period.subscription_id),
        window_end: window.1,
        period_end,
        quantity: Decimal::from_u64(17),
        event_count: 9,
        cost: "0.034".parse().unwrap(),
        currency: Arc::from("EUR"),
        events_digest: SetDigest::default(),
        basis: Arc::clone(basis),
    })
}

fn computed(rows: &[Arc<WindowRow>]) -> Vec<PricedWindow> {
    rows.iter().map(|row| PricedWindow { row: Arc::clone(row), news: News { late: 9, ..News::default() }.into() }).collect()
}

fn compare(stored: &[StoredWindow], computed: &[PricedWindow]) -> Reconciliation {
    let evidence = Evidence {
        runs: &[],
        taken_back: FxHashSet::default(),
        letters: NewLetters::default(),
        levels: FxHashSet::default(),
        basis: &RunBasis::default(),
        withdrawn: &FxHashMap::default(),
        sessions: SessionChanges::default(),
        current: CurrentDigests::default(),
        changed: None,
    };
    let range = Span { start: Timestamp::MIN, end: Timestamp::MAX };
    reconcile(stored, computed, range, &ClosedPeriods::default(), &evidence)
}

/// As many windows stored as computed, every tenth with another cost.
#[divan::bench]
fn reconciliation(bencher: Bencher<'_, '_>) {
    let rows = rows();
    let change = |(at, row): (usize, &Arc<WindowRow>)| {
        let cost = if at % 10 == 0 { Decimal::ZERO } else { row.cost };
        StoredWindow { row: Arc::new(WindowRow { cost, ..(**row).clone() }), version: 1, run_id: Arc::from("run") }
    };
    let stored: Vec<_> = rows.iter().enumerate().map(change).collect();
    let computed = computed(&rows);
    bencher.counter(ItemsCount::new(WINDOWS)).bench_local(|| {
        let changes = compare(&stored, &computed);
        assert_eq!(changes.rows.updated, (WINDOWS / 10) as u64);
        changes
    });
}

/// Windows and their ledger into a new SQLite file, synced.
#[divan::bench(sample_count = 20, sample_size = 1)]
fn publishing(bencher: Bencher<'_, '_>) {
    let changes = compare(&[], &computed(&rows()));
    let draft = Draft {
        upserts: changes.upserts,
        corrections: changes.corrections,
        ..Draft::by_hand(RunMode::Run, None, serde_json::json!({}))
    };
    let prepare = || {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&folder.path().join("trueup.db")).unwrap();
        (folder, store, draft.clone())
    };
    bencher.counter(ItemsCount::new(WINDOWS)).with_inputs(prepare).bench_local_values(|(folder, mut store, draft)| {
        let publication = draft.into_publication("job", &[], &Origin::default());
        store.publish(&publication).unwrap();
        (folder, store)
    });
}
