"""Whether the peers' numbers are Trueup's: check.py FOLDER PEER…"""

import csv
import re
import sqlite3
import sys
from pathlib import Path

import pyarrow.parquet

METER = re.compile(r"meter_id: (\w+), event_name: ([\w.]+), aggregation: (\w+)")
COLUMNS = {"count": 0, "sum": 1, "count_unique": 2}


def main():
    folder = Path(sys.argv[1])
    expected = of_trueup(folder)
    print(f"\n{len(expected):,} rows by tenant, customer, event name and day, from Trueup's usage_windows")
    failed = False
    for peer in sys.argv[2:]:
        found = of_peer(folder / f"{peer}.parquet")
        different = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        print(f"  {peer}: {'the same numbers' if not different else f'{len(different):,} rows differ'}")
        for key in sorted(different)[:5]:
            print(f"    {' '.join(key)}: (count, sum, users) is {expected.get(key)} and {found.get(key)}")
        failed |= bool(different)
    return 1 if failed else 0


def of_trueup(folder):
    meters = {meter: (name, COLUMNS[kind]) for meter, name, kind in METER.findall((folder / "meters.yaml").read_text())}
    with open(folder / "customers.csv", newline="") as file:
        external = {(row["tenant_id"], row["customer_id"]): row["external_customer_id"] for row in csv.DictReader(file)}
    rows = {}
    store = sqlite3.connect(f"file:{folder / 'trueup.db'}?mode=ro", uri=True)
    for tenant, customer, meter, start, quantity in store.execute(
        "SELECT tenant_id, customer_id, meter_id, window_start, quantity FROM usage_windows"
    ):
        name, column = meters[meter]
        row = rows.setdefault((tenant, external[tenant, customer], name, start[:10]), [0, 0, 0])
        row[column] = int(quantity)
    return rows


def of_peer(path):
    table = pyarrow.parquet.read_table(path)
    columns = [table.column(name).to_pylist() for name in ("tenant_id", "external_customer_id", "event_name", "day")]
    numbers = [table.column(name).to_pylist() for name in ("events", "units", "users")]
    keys = zip(*(map(as_text, column) for column in columns))
    return {key: list(values) for key, values in zip(keys, zip(*numbers))}


def as_text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    sys.exit(main())
