-- The ledger also covers what its rows did not tell. A digest of the whole row that a correction
-- wrote: the row cannot be altered unseen where nothing recomputes it. NULL in older rows.
ALTER TABLE corrections ADD COLUMN IF NOT EXISTS after_digest Nullable(Int64);

CREATE OR REPLACE VIEW corrections_current AS
SELECT * FROM corrections FINAL
WHERE (job, run_id) IN (SELECT job, run_id FROM runs FINAL WHERE stage = 2);

-- 'adjust' for what the bill of a closed period should be, which changes no row.
ALTER TABLE period_corrections ADD COLUMN IF NOT EXISTS kind LowCardinality(String) DEFAULT 'change';

CREATE OR REPLACE VIEW period_corrections_current AS
SELECT * FROM period_corrections FINAL
WHERE (job, run_id) IN (SELECT job, run_id FROM runs FINAL WHERE stage = 2);
