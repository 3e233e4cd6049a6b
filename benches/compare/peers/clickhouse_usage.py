"""The comparison's task in the ClickHouse engine: clickhouse_usage.py EVENTS THREADS OUT.parquet"""

import sys

import chdb

events, threads, out = sys.argv[1:]
chdb.query(f"""
    INSERT INTO FUNCTION file('{out}', 'Parquet')
    SELECT tenant_id, customer AS external_customer_id, name AS event_name, day,
           count() AS events, sum(units) AS units, uniqExact(user_id) AS users
    FROM (
        SELECT tenant_id,
               argMax(external_customer_id, ingested_at) AS customer,
               argMax(event_name, ingested_at) AS name,
               argMax(toDate(timestamp, 'UTC'), ingested_at) AS day,
               argMax(simpleJSONExtractInt(properties, 'units'), ingested_at) AS units,
               argMax(simpleJSONExtractString(properties, 'user_id'), ingested_at) AS user_id,
               argMax(deleted, ingested_at) AS is_void
        FROM file('{events}/*.parquet', 'Parquet',
                  'tenant_id String, id String, event_name String, external_customer_id String,
                   timestamp DateTime64(6), ingested_at DateTime64(6), properties String, deleted Bool')
        GROUP BY tenant_id, id
    )
    WHERE NOT is_void
    GROUP BY tenant_id, customer, name, day
    SETTINGS max_threads = {int(threads)}, engine_file_truncate_on_insert = 1
""")
