"""A small fake of the AliExpress pairs: no header, several items a page, all labels, pages without items, ids in runs."""

import random

import pandas as pd

CATEGORICAL_ITEM = {19, 34, 35, 36, 40, 41, 42}  # counted from 1, as the data's description does


def number(draw):
    """Numbers as the provider prints them."""
    return draw.choice(["0.0", "1.0", "0", "1", repr(draw.random()), f"{draw.random():.5f}", "0.032257999999999995", "1e-05"])


def write_aliexpress(folder, countries=("NL", "ES"), num_searches=60, seed=0):
    """Four files a country; both countries use the same search ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for country in countries:
        for side, low, high in (("train", 0, num_searches), ("test", num_searches, num_searches * 3 // 2)):
            draw = random.Random(f"{seed} {country} {side}")
            ids = [17 * k + 5 for k in range(low, high)]
            ids = ids[20:] + ids[:20]  # sorted in runs only
            users, items = [], []
            for search in ids:
                fields = [search, *(draw.randrange(50) for _ in range(2, 9)), *(number(draw) for _ in range(9, 32))]
                users.append([*fields, draw.randrange(9), draw.randrange(3)])
                for _ in range(draw.choice([0, 1, 3, 8])):
                    fields = [
                        draw.randrange(2 if side == "train" else 5) if k in CATEGORICAL_ITEM else number(draw)
                        for k in range(2, 49)
                    ]
                    items.append([search, *fields, draw.choice([0, 0, 0, 1, 1, 2])])
            for part, rows in (("user", users), ("item", items)):
                lines = [",".join(map(str, row)) for row in rows]
                (folder / f"{country}_{part}_{side}.csv").write_text("\n".join(lines) + "\n", encoding="ascii")
    return folder


def joined(folder, country, side):
    """The processed form of a pair, every cell as text, in the order of the item file."""
    user = pd.read_csv(folder / f"{country}_user_{side}.csv", header=None, dtype=str, keep_default_na=False)
    item = pd.read_csv(folder / f"{country}_item_{side}.csv", header=None, dtype=str, keep_default_na=False)
    user.columns = [f"u{k}" for k in range(1, 34)]
    item.columns = [f"i{k}" for k in range(1, 50)]
    rows = item.merge(user, left_on="i1", right_on="u1", how="left")
    categorical = ["u2", "u3", "u4", "u5", "u6", "u7", "u8", "u32", "u33", "i19", "i34", "i35", "i36", "i40", "i41", "i42"]
    numerical = [f"u{k}" for k in range(9, 32)] + [f"i{k}" for k in range(2, 49) if f"i{k}" not in categorical]
    names = {"i1": "search_id"}
    names |= {old: f"categorical_{k}" for k, old in enumerate(categorical, 1)}
    names |= {old: f"numerical_{k}" for k, old in enumerate(numerical, 1)}
    found = rows[list(names)].rename(columns=names)
    return found.assign(click=(rows["i49"] != "0").astype(int), conversion=(rows["i49"] == "2").astype(int))


def write_processed(raw, folder, countries=("NL", "ES")):
    """AliExpress_CC/train.csv and test.csv made of the pairs."""
    for country in countries:
        (folder / f"AliExpress_{country}").mkdir(parents=True)
        for side in ("train", "test"):
            joined(raw, country, side).to_csv(folder / f"AliExpress_{country}" / f"{side}.csv", index=False)
    return folder
