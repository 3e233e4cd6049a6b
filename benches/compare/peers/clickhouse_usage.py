"""The comparison's task in the ClickHouse engine: clickhouse_usage.py EVENTS THREADS OUT.parquet"""

import sys

import chdb

events, threads, out = sys.argv[1:]
result = chdb.query(f"""
    INSERT INTO FUNCTION file('{out}', 'Parquet')
    SELECT tenant_id, event.1 AS external_customer_id, event.2 AS event_name, toDate(event.3, 'UTC') AS day,
           count() AS events, sum(JSONExtractInt(event.4, 'units')) AS units,
           uniqExact(JSONExtractString(event.4, 'user_id')) AS users
    FROM (
        SELECT tenant_id, argMax((external_customer_id, event_name, timestamp, properties, deleted), ingested_at) AS event
        FROM file('{events}/*.parquet', 'Parquet',
                  'tenant_id String, id String, event_name String, external_customer_id String,
                   timestamp DateTime64(6), ingested_at DateTime64(6), properties String, deleted Bool')
        GROUP BY tenant_id, id
    )
    WHERE NOT event.5
    GROUP BY tenant_id, external_customer_id, event_name, day
    SETTINGS max_threads = {int(threads)}, engine_file_truncate_on_insert = 1
""")
