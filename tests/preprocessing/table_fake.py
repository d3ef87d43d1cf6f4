"""A table of one's own in three forms, with what real ones have: quotes, missing cells, rare ids, lists, odd scenarios."""

import json
import random

import pandas as pd
import yaml

from preprocessing.command_line import main

CONFIG = {
    "features": {
        "user": {"kind": "id", "type": "int"},
        "item": {"kind": "id", "min_count": 3},
        "bought": {"kind": "ids", "separator": "|", "table": "item"},
        "tags": {"kind": "ids", "type": "int"},
        "page": {"kind": "id", "column": "url", "hash": {"num_buckets": 50, "num_hashes": 2, "seed": 7}},
        "seller": {"kind": "id", "type": "int", "hash": {"num_buckets": 20, "seed": 3}},
        "visitor": {"kind": "id", "type": "int", "managed": {"slots": 40, "seed": 5}},
        "seen": {"kind": "ids", "separator": " ", "managed": {"slots": 30}},
        "price": {"kind": "number"},
        "sold": {"kind": "number", "scale": "log"},
        "rank": {"kind": "number", "scale": "none"},
        "age": {"kind": "number", "buckets": 5},
    },
    "tasks": [
        {"name": "click", "label": "clicked", "role": "ctr", "implied_by_next": True},
        {"name": "buy", "label": "clicked == 1 and orders in [1, 2]"},
        {"name": "liked", "label": "rating > 3"},
    ],
    "scenario": {"column": "device", "values": {"phone": "mobile", "desktop": "desktop", "tablet": "mobile"}, "others": "drop"},
    "keys": {"row": {"type": "int"}, "user": {"type": "int"}, "time": {"type": "datetime"}},
    "group_key": "user",
}


#: The same for methods that take no managed tables.
UNMANAGED = CONFIG | {"features": {name: of for name, of in CONFIG["features"].items() if "managed" not in of}}


def records(num_rows=2000, seed=0):
    """Rows as Python sees them; None = missing."""
    draw, of_keys = random.Random(seed), random.Random(-1 - seed)
    rows = []
    for row in range(num_rows):
        price = draw.lognormvariate(2, 1)
        rows.append(
            {
                "row": row,
                "user": draw.randrange(2**61, 2**61 + 60),
                "item": draw.choice([None, *(f'item {k}, the "{k}th"' if k % 4 == 0 else f"i{k}" for k in range(40))]),
                "bought": [f"i{draw.randrange(50)}" for _ in range(draw.choice([0, 1, 3]))],
                "tags": [draw.randrange(-5, 30) for _ in range(draw.choice([0, 1, 2]))],
                "url": draw.choice([None, "/", *(f"/straße/{k}" for k in range(100))]),
                "seller": draw.choice([None, *range(30)]),
                "price": draw.choice([None, round(price, 2), round(price), price]),
                "sold": draw.choice([0, -3, 10 ** draw.randrange(7)]),
                "rank": draw.choice([None, draw.random()]),
                "age": draw.choice([None, 18, draw.randrange(18, 90)]),
                "clicked": draw.choice([0, 0, 1, 1, None]),
                "orders": draw.choice([0, 1, 2, 3]),
                "rating": draw.choice([None, 1, 2.5, 3, 3.5, 5]),
                "device": draw.choice(["phone", "phone", "desktop", "tablet", "watch"]),
                "time": f"2024-0{draw.randrange(1, 6)}-1{draw.randrange(10)}T0{draw.randrange(10)}:00:00",
                "not wanted": draw.random(),
                "visitor": of_keys.choice([None, -(2**63), 0, 2**63 - 1, of_keys.randrange(50), -of_keys.randrange(2**62)]),
                "seen": " ".join(f"/straße/{of_keys.randrange(60)}" for _ in range(of_keys.choice([0, 1, 3]))),
            }
        )
    for row in rows:
        if row["clicked"] is None and row["orders"] in (1, 2):
            row["clicked"] = 1
    return rows


def as_text(rows):
    """The frame that a CSV file of these rows has: lists joined, or as JSON."""
    integers = [name for name in ("seller", "sold", "age", "clicked", "visitor") if name in rows[0]]
    return pd.DataFrame(rows).assign(
        bought=["|".join(row["bought"]) for row in rows],
        tags=[json.dumps(row["tags"]) for row in rows],
        **{name: pd.array([row[name] for row in rows], "Int64") for name in integers},
    )


def write_csv(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    as_text(rows).to_csv(path, index=False, **options)


def write_json(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [
        {key: value for key, value in row.items() if value is not None} | {"bought": "|".join(row["bought"])} for row in rows
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")


def write_parquet(path, rows, **options):
    """As pandas does: integers with gaps become float, unless they are told to stay what they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows).assign(bought=["|".join(row["bought"]) for row in rows])
    frame["time"] = pd.to_datetime(frame["time"])
    frame["device"] = frame["device"].astype("category")
    if "visitor" in frame:
        frame["visitor"] = pd.array([row["visitor"] for row in rows], "Int64")
    frame.to_parquet(path, **options)


WRITERS = {"csv": ("rows.csv", write_csv), "json": ("rows.jsonl", write_json), "parquet": ("rows.parquet", write_parquet)}


def write_config(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "my_table.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def write_table(folder, form="csv", num_rows=3000):
    """Two files of a form, with their configuration beside them."""
    name, write = WRITERS[form]
    rows = records(num_rows)
    files = {f"a-{name}": rows[: num_rows // 3], f"b-{name}": rows[num_rows // 3 :]}
    for file, part in files.items():
        write(folder / file, part)
    write_config(folder, CONFIG | {"files": list(files)})
    return folder


GOOD_LINES = ["user,x,y,t,d,tags,list", *(f"{i},{i}.5,{i % 2},2024-01-0{i % 9 + 1},a,1|2,[1]" for i in range(30))]
GOOD_LINES_CONFIG = {
    "features": {
        "user": {"kind": "id", "type": "int"},
        "x": {"kind": "number"},
        "tags": {"kind": "ids", "type": "int", "separator": "|"},
        "list": {"kind": "ids", "type": "int"},
    },
    "scenario": {"column": "d", "values": ["a", "b"]},
    "keys": {"t": {"type": "datetime"}},
    "split": {"rule": "time", "key": "t"},
}
SMALL = "user,x,y\n" + "".join(f"u{i % 3},{i},{i % 2}\n" for i in range(20))


def small(tmp_path, content=SMALL, name="rows.csv", **config):
    (tmp_path / "raw").mkdir(exist_ok=True)
    (tmp_path / "raw" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    base = {
        "files": [name],
        "features": {"user": {"kind": "id"}, "x": {"kind": "number"}},
        "tasks": [{"name": "y", "label": "y"}],
    }
    return write_config(tmp_path / "raw", base | config)


def run(config, out, *options):
    return main(["table", "--config", str(config), "--out", str(out), *options])
