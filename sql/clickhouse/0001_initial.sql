-- The five tables of the contract, the write-ahead rows of a publication under
-- way, and views for readers. Statements end with a semicolon at the end of a line.
--
-- ReplacingMergeTree(version, is_deleted), ordered by exactly the row's key: a
-- change is a row with a greater version, a retraction a tombstone. Tables are read
-- with FINAL, or through the views, which have it.
--
-- Sessions begin and end at instants of events, which have nanoseconds.

CREATE TABLE IF NOT EXISTS usage_windows (
    job                 String,
    tenant_id           String,
    customer_id         String,
    subscription_id     String,
    meter_id            String,
    price_id            String,
    dimensions          String,
    window_start        DateTime64(9, 'UTC'),
    window_end          DateTime64(9, 'UTC'),
    period_start        DateTime64(3, 'UTC'),
    period_end          DateTime64(3, 'UTC'),
    quantity            Decimal(38, 18),
    event_count         UInt64,
    cost                Decimal(38, 18),
    currency            LowCardinality(String),
    events_digest       String,
    meter_digest        LowCardinality(String),
    price_digest        LowCardinality(String),
    subscription_digest String,
    customer_digest     String,
    version             UInt64,
    run_id              LowCardinality(String),
    updated_at          DateTime64(3, 'UTC'),
    is_deleted          UInt8
) ENGINE = ReplacingMergeTree(version, is_deleted)
ORDER BY (job, tenant_id, subscription_id, meter_id, price_id, dimensions, period_start, window_start)
SETTINGS non_replicated_deduplication_window = 10000;

CREATE TABLE IF NOT EXISTS usage_periods (
    job                   String,
    tenant_id             String,
    customer_id           String,
    subscription_id       String,
    meter_id              String,
    price_id              String,
    dimensions            String,
    period_start          DateTime64(3, 'UTC'),
    period_end            DateTime64(3, 'UTC'),
    quantity              Decimal(38, 18),
    cost                  Decimal(38, 18),
    minimum_adjustment    Decimal(38, 18),
    commitment_adjustment Decimal(38, 18),
    amount                Decimal(38, 18),
    currency              LowCardinality(String),
    closed_at             Nullable(DateTime64(3, 'UTC')),
    version               UInt64,
    run_id                LowCardinality(String),
    updated_at            DateTime64(3, 'UTC'),
    is_deleted            UInt8
) ENGINE = ReplacingMergeTree(version, is_deleted)
ORDER BY (job, tenant_id, subscription_id, meter_id, price_id, dimensions, period_start)
SETTINGS non_replicated_deduplication_window = 10000;

-- The ledger, written first. Rows of a run that is not in runs were never published.
CREATE TABLE IF NOT EXISTS corrections (
    correction_id      String,
    run_id             LowCardinality(String),
    job                String,
    tenant_id          String,
    customer_id        String,
    subscription_id    String,
    meter_id           String,
    price_id           String,
    dimensions         String,
    period_start       DateTime64(3, 'UTC'),
    window_start       DateTime64(9, 'UTC'),
    currency           LowCardinality(String),
    kind               LowCardinality(String),
    causes             String,
    quantity_before    Nullable(Decimal(38, 18)),
    quantity_after     Nullable(Decimal(38, 18)),
    cost_before        Nullable(Decimal(38, 18)),
    cost_after         Nullable(Decimal(38, 18)),
    event_count_before Nullable(UInt64),
    event_count_after  Nullable(UInt64),
    replaced           String,
    row_digest         Int64,
    recorded_at        DateTime64(3, 'UTC')
) ENGINE = ReplacingMergeTree
ORDER BY (job, correction_id)
SETTINGS non_replicated_deduplication_window = 10000;

-- The ledger of usage_periods: each row as it was and as it is, as JSON.
CREATE TABLE IF NOT EXISTS period_corrections (
    correction_id   String,
    run_id          LowCardinality(String),
    job             String,
    tenant_id       String,
    subscription_id String,
    meter_id        String,
    price_id        String,
    dimensions      String,
    period_start    DateTime64(3, 'UTC'),
    row_before      String,
    row_after       String,
    row_digest      Int64,
    recorded_at     DateTime64(3, 'UTC')
) ENGINE = ReplacingMergeTree
ORDER BY (job, correction_id)
SETTINGS non_replicated_deduplication_window = 10000;

CREATE TABLE IF NOT EXISTS runs (
    run_id        String,
    job           String,
    mode          String,
    status        String,
    range_start   Nullable(DateTime64(9, 'UTC')),
    range_end     Nullable(DateTime64(9, 'UTC')),
    started_at    DateTime64(3, 'UTC'),
    finished_at   DateTime64(3, 'UTC'),
    started_by    String,
    overrides     String,
    version       Int64,
    counts        String,
    input         String,
    basis         String,
    ledger_digest String,
    -- 1 publishing: ledger and write-ahead rows are whole; 2 succeeded.
    stage         UInt8
) ENGINE = ReplacingMergeTree(stage)
ORDER BY (job, run_id)
SETTINGS non_replicated_deduplication_window = 10000;

CREATE TABLE IF NOT EXISTS dead_letters (
    job             String,
    tenant_id       String,
    event_id        String,
    meter_id        String,
    reason          LowCardinality(String),
    detail          String,
    event           String,
    event_time      Nullable(DateTime64(9, 'UTC')),
    occurrences     UInt64,
    first_run_id    LowCardinality(String),
    last_run_id     LowCardinality(String),
    resolved_run_id Nullable(String),
    row_digest      Int64,
    version         UInt64
) ENGINE = ReplacingMergeTree(version)
ORDER BY (job, tenant_id, event_id, meter_id, reason)
SETTINGS non_replicated_deduplication_window = 10000;

-- What runs keep for later ones. Each replaces what the run before it kept.
CREATE TABLE IF NOT EXISTS job_state (
    job     String,
    name    String,
    run_id  String,
    content String,
    version UInt64
) ENGINE = ReplacingMergeTree(version)
ORDER BY (job, name)
SETTINGS non_replicated_deduplication_window = 10000;

-- Rows of a publication under way, as JSON; gone when it is done.
CREATE TABLE IF NOT EXISTS write_ahead (
    job      String,
    run_id   String,
    target   LowCardinality(String),
    sequence UInt64,
    row      String
) ENGINE = ReplacingMergeTree
ORDER BY (job, run_id, target, sequence)
SETTINGS non_replicated_deduplication_window = 10000;

CREATE VIEW IF NOT EXISTS usage_windows_current AS
SELECT * EXCEPT (is_deleted) FROM usage_windows FINAL WHERE is_deleted = 0;

CREATE VIEW IF NOT EXISTS usage_periods_current AS
SELECT * EXCEPT (is_deleted) FROM usage_periods FINAL WHERE is_deleted = 0;

CREATE VIEW IF NOT EXISTS dead_letters_current AS
SELECT * FROM dead_letters FINAL;

-- Only what was published.
CREATE VIEW IF NOT EXISTS corrections_current AS
SELECT * FROM corrections FINAL
WHERE (job, run_id) IN (SELECT job, run_id FROM runs FINAL WHERE stage = 2);

CREATE VIEW IF NOT EXISTS period_corrections_current AS
SELECT * FROM period_corrections FINAL
WHERE (job, run_id) IN (SELECT job, run_id FROM runs FINAL WHERE stage = 2);
