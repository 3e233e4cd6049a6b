-- A digest of the whole row that a correction wrote, also of what the correction itself does not
-- tell: the row cannot be altered unseen where nothing recomputes it. NULL in older rows.
ALTER TABLE corrections ADD COLUMN IF NOT EXISTS after_digest Nullable(Int64);

CREATE OR REPLACE VIEW corrections_current AS
SELECT * FROM corrections FINAL
WHERE (job, run_id) IN (SELECT job, run_id FROM runs FINAL WHERE stage = 2);
