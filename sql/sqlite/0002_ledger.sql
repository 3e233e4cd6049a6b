-- The ledger also covers what its rows did not tell. A digest of the whole row that a correction
-- wrote: the row cannot be altered unseen where nothing recomputes it. NULL in older rows.
ALTER TABLE corrections ADD COLUMN after_digest INTEGER;

-- 'adjust' for what the bill of a closed period should be, which changes no row.
ALTER TABLE period_corrections ADD COLUMN kind TEXT NOT NULL DEFAULT 'change' CHECK (kind = 'change' OR kind = 'adjust');
