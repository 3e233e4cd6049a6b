"""The comparison's task in DuckDB: duckdb_usage.py EVENTS THREADS OUT.parquet"""

import sys

import duckdb

events, threads, out = sys.argv[1:]
connection = duckdb.connect(config={"threads": int(threads), "preserve_insertion_order": False})
connection.execute(f"""
    COPY (
        WITH latest AS (
            SELECT tenant_id, arg_max({{
                       'external_customer_id': external_customer_id, 'event_name': event_name, 'timestamp': timestamp,
                       'fields': json_extract_string(properties, ['$.units', '$.user_id']), 'deleted': deleted
                   }}, ingested_at) AS event
            FROM read_parquet('{events}/*.parquet')
            GROUP BY tenant_id, id
        )
        SELECT tenant_id, event.external_customer_id, event.event_name,
               CAST(event.timestamp AT TIME ZONE 'UTC' AS DATE) AS day,
               count(*) AS events,
               CAST(sum(CAST(event.fields[1] AS BIGINT)) AS BIGINT) AS units,
               count(DISTINCT event.fields[2]) AS users
        FROM latest
        WHERE NOT event.deleted
        GROUP BY ALL
    ) TO '{out}' (FORMAT parquet)
""")
