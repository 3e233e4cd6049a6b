-- The five tables of the contract. Decimals are text with the scale trimmed,
-- instants are RFC 3339 in UTC. Keys are what the promises call a row's identity.

CREATE TABLE usage_windows (
    job                 TEXT    NOT NULL,
    tenant_id           TEXT    NOT NULL,
    customer_id         TEXT    NOT NULL,
    subscription_id     TEXT    NOT NULL,
    meter_id            TEXT    NOT NULL,
    price_id            TEXT    NOT NULL, -- '' for usage without a price
    dimensions          TEXT    NOT NULL, -- canonical JSON
    window_start        TEXT    NOT NULL,
    window_end          TEXT    NOT NULL,
    period_start        TEXT    NOT NULL,
    period_end          TEXT    NOT NULL,
    quantity            TEXT    NOT NULL,
    event_count         INTEGER NOT NULL,
    cost                TEXT    NOT NULL,
    currency            TEXT    NOT NULL,
    events_digest       TEXT    NOT NULL,
    -- Digests of the definitions that the row was computed with, by their numbers in
    -- definition_digests: they tell causes.
    meter_digest        INTEGER NOT NULL,
    price_digest        INTEGER NOT NULL,
    subscription_digest INTEGER NOT NULL,
    customer_digest     INTEGER NOT NULL,
    version             INTEGER NOT NULL,
    run_id              TEXT    NOT NULL,
    updated_at          TEXT    NOT NULL,
    PRIMARY KEY (job, tenant_id, subscription_id, meter_id, price_id, dimensions, period_start, window_start)
) WITHOUT ROWID;

-- Digests that usage_windows names by number: each is in many rows.
CREATE TABLE definition_digests (
    id     INTEGER PRIMARY KEY,
    digest TEXT    NOT NULL UNIQUE
);

CREATE TABLE usage_periods (
    job                   TEXT    NOT NULL,
    tenant_id             TEXT    NOT NULL,
    customer_id           TEXT    NOT NULL,
    subscription_id       TEXT    NOT NULL,
    meter_id              TEXT    NOT NULL,
    price_id              TEXT    NOT NULL,
    dimensions            TEXT    NOT NULL,
    period_start          TEXT    NOT NULL,
    period_end            TEXT    NOT NULL,
    quantity              TEXT    NOT NULL,
    cost                  TEXT    NOT NULL, -- exact, before adjustments
    minimum_adjustment    TEXT    NOT NULL,
    commitment_adjustment TEXT    NOT NULL,
    amount                TEXT    NOT NULL, -- rounded to the currency's minor unit
    currency              TEXT    NOT NULL,
    closed_at             TEXT,
    version               INTEGER NOT NULL,
    run_id                TEXT    NOT NULL,
    updated_at            TEXT    NOT NULL,
    PRIMARY KEY (job, tenant_id, subscription_id, meter_id, price_id, dimensions, period_start)
) WITHOUT ROWID;

-- The ledger. Append-only: nothing in Trueup updates or deletes here. Rows lie in the order
-- of writing, which is much cheaper to append to than a key of text.
CREATE TABLE corrections (
    sequence           INTEGER PRIMARY KEY,
    number             INTEGER NOT NULL, -- within its run, from 1
    run_id             TEXT    NOT NULL,
    -- Sorts in the order of writing. Made when it is read: stored, it would be a seventh of the row.
    correction_id      TEXT    GENERATED ALWAYS AS (run_id || '-' || printf('%09d', number)) VIRTUAL,
    job                TEXT    NOT NULL,
    tenant_id          TEXT    NOT NULL,
    customer_id        TEXT    NOT NULL,
    subscription_id    TEXT    NOT NULL,
    meter_id           TEXT    NOT NULL,
    price_id           TEXT    NOT NULL,
    dimensions         TEXT    NOT NULL,
    period_start       TEXT    NOT NULL,
    window_start       TEXT    NOT NULL,
    currency           TEXT    NOT NULL,
    -- Not with IN: SQLite would fill a table with the list for every row.
    kind               TEXT    NOT NULL CHECK (kind = 'insert' OR kind = 'update' OR kind = 'retract' OR kind = 'adjust'),
    causes             TEXT    NOT NULL, -- JSON: {"late_event": 3}
    quantity_before    TEXT,
    quantity_after     TEXT,
    cost_before        TEXT,
    cost_after         TEXT,
    event_count_before INTEGER,
    event_count_after  INTEGER,
    replaced           TEXT    NOT NULL, -- JSON of the row that was there before, '' for none: a run can be taken back
    row_digest         INTEGER NOT NULL, -- tells which row was altered
    recorded_at        TEXT    NOT NULL
);

-- The ledger of usage_periods: each row as it was and as it is, as JSON. Append-only too.
CREATE TABLE period_corrections (
    correction_id   TEXT NOT NULL,
    run_id          TEXT NOT NULL,
    job             TEXT NOT NULL,
    tenant_id       TEXT NOT NULL,
    subscription_id TEXT NOT NULL,
    meter_id        TEXT NOT NULL,
    price_id        TEXT NOT NULL,
    dimensions      TEXT NOT NULL,
    period_start    TEXT NOT NULL,
    row_before      TEXT NOT NULL, -- '' for none
    row_after       TEXT NOT NULL, -- '' for none
    row_digest      INTEGER NOT NULL,
    recorded_at     TEXT NOT NULL
);

-- Where the corrections of a meter of a subscription lie. The corrections of a run are sorted
-- by key, so that one row stands for many: much smaller than an index.
CREATE TABLE correction_ranges (
    job             TEXT    NOT NULL,
    tenant_id       TEXT    NOT NULL,
    subscription_id TEXT    NOT NULL,
    meter_id        TEXT    NOT NULL,
    first_sequence  INTEGER NOT NULL,
    last_sequence   INTEGER NOT NULL,
    PRIMARY KEY (job, tenant_id, subscription_id, meter_id, first_sequence)
) WITHOUT ROWID;

CREATE TABLE runs (
    run_id        TEXT    NOT NULL PRIMARY KEY, -- UUIDv7: sorts by time
    job           TEXT    NOT NULL,
    mode          TEXT    NOT NULL,
    status        TEXT    NOT NULL,
    range_start   TEXT,
    range_end     TEXT,
    started_at    TEXT    NOT NULL,
    finished_at   TEXT    NOT NULL,
    started_by    TEXT    NOT NULL, -- ann@host trueup run, or schedule
    overrides     TEXT    NOT NULL, -- JSON: ["guard"] where --yes was given; closed_periods, later_runs
    version       INTEGER NOT NULL,
    counts        TEXT    NOT NULL, -- JSON
    input         TEXT    NOT NULL, -- JSON: files, ingestion cut-off
    basis         TEXT    NOT NULL, -- JSON: versions and digests of job and reference tables
    ledger_digest TEXT    NOT NULL, -- SHA-256, chained over all runs of the job
    first_correction INTEGER NOT NULL, -- corrections.sequence; none where the last comes before the first
    last_correction  INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE dead_letters (
    job             TEXT    NOT NULL,
    tenant_id       TEXT    NOT NULL,
    event_id        TEXT    NOT NULL,
    meter_id        TEXT    NOT NULL, -- '' where the event as a whole could not count
    reason          TEXT    NOT NULL,
    detail          TEXT    NOT NULL,
    event           TEXT    NOT NULL, -- JSON
    event_time      TEXT,
    occurrences     INTEGER NOT NULL,
    first_run_id    TEXT    NOT NULL,
    last_run_id     TEXT    NOT NULL,
    resolved_run_id TEXT,
    row_digest      INTEGER NOT NULL,
    PRIMARY KEY (job, tenant_id, event_id, meter_id, reason)
) WITHOUT ROWID;

-- What runs keep for later ones. Each replaces what the run before it kept.
CREATE TABLE job_state (
    job     TEXT NOT NULL,
    name    TEXT NOT NULL,
    run_id  TEXT NOT NULL,
    content TEXT NOT NULL,
    PRIMARY KEY (job, name)
) WITHOUT ROWID;
