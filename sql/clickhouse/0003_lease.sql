-- Who may write a job's rows, one change a row; the one with the greatest version counts. Times are
-- the server's. No deduplication of inserts: each change is one.
CREATE TABLE IF NOT EXISTS leases (
    job           String,
    holder        String,
    host          String,
    -- Boot of the host, namespace of processes and user: where these are the same, processes see
    -- each other. Empty where that is not known.
    boot          String,
    process       UInt32,
    -- Ticks since the boot: numbers of processes are used again.
    process_start UInt64,
    what          String,
    since         DateTime64(3, 'UTC'),
    expires_at    DateTime64(3, 'UTC'),
    version       UInt64
) ENGINE = ReplacingMergeTree(version)
ORDER BY job;
