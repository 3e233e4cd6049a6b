-- A digest of the whole row that a correction wrote, also of what the correction itself does not
-- tell: the row cannot be altered unseen where nothing recomputes it. NULL in older rows.
ALTER TABLE corrections ADD COLUMN after_digest INTEGER;
