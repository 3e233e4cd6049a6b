//! The whole job, from Parquet files to the published store, as a process:
//! wall time, processor time, peak memory.
//!
//! `cargo bench --bench whole_job -- --events 10000000`
//!
//! The events are made up, the same each time: 30 daily files, JSON properties,
//! 2% re-sent, customers with skew, five meters on one plan.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::float_arithmetic,
    clippy::print_stdout
)]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, RecordBatch, StringBuilder, TimestampMicrosecondBuilder};
use arrow::datatypes::{DataType, Field, Schema, TimeUnit};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

const DAYS: u64 = 30;
const CUSTOMERS: u64 = 1000;
const START_MICROS: i64 = 1_767_225_600_000_000; // 2026-01-01T00:00:00Z
const DAY_MICROS: u64 = 86_400_000_000;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let option =
        |name: &str| arguments.iter().position(|a| a == name).and_then(|at| arguments.get(at + 1)).and_then(|v| v.parse().ok());
    let events = option("--events").unwrap_or(1_000_000);
    let runs = option("--runs").unwrap_or(3);
    let folder = std::env::temp_dir().join(format!("trueup-bench-{events}"));
    prepare(&folder, events);
    println!("{events} events, {:.0} MB of Parquet", folder_size(&folder.join("events")) as f64 / 1e6);
    println!("{:<10} {:>8} {:>8} {:>10} {:>14}", "run", "wall s", "cpu s", "peak MB", "events/s");
    for run in 0..runs {
        for file in ["trueup.db", "trueup.db-wal", "trueup.db-shm"] {
            let _ = fs::remove_file(folder.join(file));
        }
        report(&format!("first {run}"), events, &measure(&folder));
        report(&format!("again {run}"), events, &measure(&folder));
    }
}

struct Measured {
    wall: Duration,
    cpu_seconds: f64,
    peak_kilobytes: u64,
}

fn report(name: &str, events: u64, measured: &Measured) {
    let wall = measured.wall.as_secs_f64();
    let peak = measured.peak_kilobytes as f64 / 1e3;
    println!("{name:<10} {wall:>8.2} {:>8.2} {peak:>10.0} {:>14.0}", measured.cpu_seconds, events as f64 / wall);
}

fn measure(folder: &Path) -> Measured {
    let start = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_trueup"))
        .args(["run", "job.yaml", "--quiet"])
        .current_dir(folder)
        .stdout(Stdio::null())
        .spawn()
        .expect("the binary starts");
    let (mut peak_kilobytes, mut ticks) = (0, 0);
    loop {
        // The kernel keeps the high-water mark; it is gone with the process.
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        peak_kilobytes = peak.unwrap_or(0).max(peak_kilobytes);
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
        // After the name in parentheses: user and system time are the 12th and 13th fields (proc(5)).
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let field = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        ticks = (field(11) + field(12)).max(ticks);
        if let Some(status) = child.try_wait().expect("waiting for the binary") {
            assert!(status.success(), "the run failed");
            return Measured { wall: start.elapsed(), cpu_seconds: ticks as f64 / 100.0, peak_kilobytes };
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn prepare(folder: &Path, events: u64) {
    if folder.join("complete").exists() {
        return;
    }
    fs::create_dir_all(folder.join("events")).unwrap();
    let files: Vec<(PathBuf, u64)> = (0..DAYS).map(|day| (folder.join(format!("events/{day:02}.parquet")), day)).collect();
    let mut customers = String::from("tenant_id,customer_id,external_customer_id,valid_from,valid_to\n");
    let mut subscriptions = String::from(
        "tenant_id,subscription_id,customer_id,plan_id,currency,billing_period,anchor,timezone,started_at,ended_at\n",
    );
    for customer in 0..CUSTOMERS {
        let tenant = customer % 4;
        writeln!(customers, "t{tenant},c{customer},ext-{customer},,").unwrap();
        writeln!(subscriptions, "t{tenant},s{customer},c{customer},plan,USD,month,,,2025-01-01T00:00:00Z,").unwrap();
    }
    for (name, content) in [
        ("job.yaml", JOB),
        ("meters.yaml", METERS),
        ("prices.yaml", PRICES),
        ("customers.csv", &customers),
        ("subscriptions.csv", &subscriptions),
    ] {
        fs::write(folder.join(name), content).unwrap();
    }
    std::thread::scope(|scope| {
        for half in files.chunks(files.len().div_ceil(2)) {
            scope.spawn(move || half.iter().for_each(|(path, day)| write_day(path, *day, events / DAYS)));
        }
    });
    fs::write(folder.join("complete"), "").unwrap();
}

/// A 64-bit mix (splitmix64): the same numbers each time.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn write_day(path: &Path, day: u64, count: u64) {
    let instant = || DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
    let schema = Arc::new(Schema::new(vec![
        Field::new("tenant_id", DataType::Utf8, false),
        Field::new("id", DataType::Utf8, false),
        Field::new("event_name", DataType::Utf8, false),
        Field::new("external_customer_id", DataType::Utf8, false),
        Field::new("timestamp", instant(), false),
        Field::new("ingested_at", instant(), false),
        Field::new("properties", DataType::Utf8, false),
    ]));
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1).unwrap()))
        .set_max_row_group_row_count(Some(250_000))
        .build();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), Arc::clone(&schema), Some(properties)).unwrap();
    let mut done = 0;
    while done < count {
        let rows = (count - done).min(50_000);
        let mut texts: [StringBuilder; 5] = Default::default();
        let mut times = [TimestampMicrosecondBuilder::new(), TimestampMicrosecondBuilder::new()];
        for at in done..done + rows {
            // Every fiftieth event is a copy of an earlier one of the day.
            let re_sent = at % 50 == 49;
            let number = day * count + if re_sent { at - 25 } else { at };
            let random = mix(number);
            let customer = (random % CUSTOMERS) * (random >> 20 & 1023) / 1024; // few are large
            let micros = START_MICROS + i64::try_from(day * DAY_MICROS + mix(random) % DAY_MICROS).unwrap();
            let name = ["llm.completion", "api.request", "api.request"][usize::try_from(random >> 40 & 3).unwrap().min(2)];
            let model = ["large", "small", "tiny"][usize::try_from(random >> 44 & 3).unwrap().min(2)];
            let user = random >> 13 & 4095;
            texts[0].append_value(format!("t{}", customer % 4));
            texts[1].append_value(format!("{:016x}-{number:012x}", mix(number ^ 0xABCD)));
            texts[2].append_value(name);
            texts[3].append_value(format!("ext-{customer}"));
            texts[4].append_value(format!(
                r#"{{"model":"{model}","input_tokens":{},"output_tokens":{},"user_id":"user-{user}","latency_ms":{}.{}}}"#,
                random >> 8 & 8191,
                random >> 24 & 2047,
                random >> 30 & 511,
                random >> 50 & 7
            ));
            times[0].append_value(micros);
            times[1].append_value(micros + if re_sent { 60_000_000 } else { 1_000_000 });
        }
        let [timestamp, ingested_at] = times.map(|mut builder| Arc::new(builder.finish().with_timezone("UTC")) as ArrayRef);
        let [tenant, id, name, customer, properties] = texts.map(|mut builder| Arc::new(builder.finish()) as ArrayRef);
        let columns = vec![tenant, id, name, customer, timestamp, ingested_at, properties];
        writer.write(&RecordBatch::try_new(Arc::clone(&schema), columns).unwrap()).unwrap();
        done += rows;
    }
    writer.close().unwrap();
}

fn folder_size(folder: &Path) -> u64 {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

const JOB: &str = r#"
version: 1
job: bench
source: {kind: files, paths: ["events/*.parquet"]}
reference:
  customers: {path: customers.csv}
  subscriptions: {path: subscriptions.csv}
  meters: {path: meters.yaml}
  prices: {path: prices.yaml}
window: day
store: {kind: sqlite, path: trueup.db}
"#;

const METERS: &str = r#"
meters:
  - {meter_id: input_tokens, event_name: llm.completion, aggregation: sum, property: input_tokens, dimensions: [model]}
  - {meter_id: output_tokens, event_name: llm.completion, aggregation: sum, property: output_tokens, dimensions: [model]}
  - {meter_id: users, event_name: llm.completion, aggregation: count_unique, property: user_id}
  - {meter_id: requests, event_name: api.request, aggregation: count}
  - {meter_id: latency, event_name: api.request, aggregation: avg, property: latency_ms, unpriced: true}
"#;

const PRICES: &str = r#"
prices:
  - price_id: input
    plan_id: plan
    meter_id: input_tokens
    currency: USD
    model: graduated
    tiers: [{up_to: "1000000", unit_amount: "0.000002"}, {up_to: null, unit_amount: "0.0000015"}]
  - {price_id: output, plan_id: plan, meter_id: output_tokens, currency: USD, model: per_unit, unit_amount: "0.000008"}
  - {price_id: users, plan_id: plan, meter_id: users, currency: USD, model: package, package_size: "10", amount: "5"}
  - price_id: requests
    plan_id: plan
    meter_id: requests
    currency: USD
    model: volume
    tiers: [{up_to: "10000", unit_amount: "0.001"}, {up_to: null, unit_amount: "0.0008"}]
"#;
