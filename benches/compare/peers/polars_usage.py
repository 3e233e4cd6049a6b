"""The comparison's task in Polars: polars_usage.py EVENTS THREADS OUT.parquet"""

import os
import sys

events, threads, out = sys.argv[1:]
os.environ["POLARS_MAX_THREADS"] = threads  # read on import

import polars as pl

kept = [pl.col(name).max_by("ingested_at") for name in ("external_customer_id", "event_name", "timestamp", "properties", "deleted")]
latest = pl.scan_parquet(f"{events}/*.parquet").group_by("tenant_id", "id").agg(kept).filter(~pl.col("deleted"))
fields = pl.col("properties").str.json_decode(pl.Struct({"units": pl.Int64, "user_id": pl.String}))
usage = (
    latest.select("tenant_id", "external_customer_id", "event_name", day=pl.col("timestamp").dt.date(), fields=fields)
    .unnest("fields")
    .group_by("tenant_id", "external_customer_id", "event_name", "day")
    .agg(events=pl.len().cast(pl.Int64), units=pl.col("units").sum(), users=pl.col("user_id").n_unique().cast(pl.Int64))
)
usage.sink_parquet(out, engine="streaming")
