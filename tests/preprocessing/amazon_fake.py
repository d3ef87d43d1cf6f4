"""Small fakes of the Amazon reviews of 2018 and 2014, one JSON object a line."""

import json
import random
import time

CATEGORIES = ("Luxury_Beauty", "Prime_Pantry", "Musical_Instruments")
DAY = 86400


def review(draw, category):
    """Keys as the 2018 files have them: a vote as text with a comma, a day without zeros, style with colons and blanks."""
    moment = 1199145600 + DAY * draw.randrange(3800)
    date = time.gmtime(moment)
    found = {
        "overall": float(draw.choice([5, 5, 5, 5, 5, 4, 4, 3, 2, 1])),
        "verified": draw.random() < 0.8,
        "reviewTime": f"{date.tm_mon:02d} {date.tm_mday}, {date.tm_year}",
        "reviewerID": f"A{int(300 * draw.random() ** 2):013d}",
        "asin": f"{CATEGORIES.index(category) if category in CATEGORIES else 9}{int(200 * draw.random() ** 2):09d}",
        "reviewerName": draw.choice(["José", "Amazon Customer", 'J. "Style" Doe']),
        "reviewText": draw.choice(["Great.", 'Nice "style": {"Size:": " no"} 😀\n\\', "", "漢字"]),
        "summary": "Five Stars",
        "unixReviewTime": moment,
    }
    for name in ("reviewText", "reviewerName"):
        if draw.random() < 0.1:
            del found[name]
    if draw.random() < 0.3:
        found["vote"] = draw.choice(["2", "3", "2", "17", "1,341"])
    if draw.random() < 0.6:
        style = {
            "Size:": f" {draw.choice(['7.0 oz', 'Big', 'Small; wide'])}",
            "Color:": f" {draw.choice(['Blue/Red', 'Noir é'])}",
        }
        names = draw.sample(sorted(style), draw.choice([1, 2, 2]))
        found["style"] = {name: style[name] for name in names}
    if draw.random() < 0.05:
        found["image"] = ["https://example.org/a.jpg"]
    return found


def older(draw, found):
    """The keys of 2014: helpful instead of vote, verified and style."""
    up = draw.choice([0, 0, 0, 1, 7])
    kept = {name: value for name, value in found.items() if name not in ("vote", "verified", "style", "image")}
    return kept | {"helpful": [up, up + draw.randrange(3)]}


def write_amazon(folder, categories=CATEGORIES, num_rows=1200, seed=0, pattern="{}_5.json"):
    """A file a category. One review in twelve is an exact copy of one before, one in twelve a pair's other review."""
    folder.mkdir(parents=True)
    for category in categories:
        draw = random.Random(f"{seed} {category}")
        rows = []
        while len(rows) < num_rows:
            rows.append(review(draw, category))
            if draw.random() < 1 / 12:
                rows.append(draw.choice(rows))
            if draw.random() < 1 / 12:  # often on the same day, as when a user reviews two sizes
                again, first = review(draw, category), draw.choice(rows)
                names = ["reviewerID", "asin", *draw.choice([[], ["reviewTime", "unixReviewTime"]])]
                rows.append(again | {name: first[name] for name in names})
        rows = [older(draw, row) for row in rows] if pattern.startswith("reviews_") else rows
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / pattern.format(category)).write_text(text, encoding="utf-8")
    return folder


def write_amazon_2014(folder, categories=("Beauty", "Baby")):
    """`reviews_CATEGORY_5.json`."""
    return write_amazon(folder, categories, pattern="reviews_{}_5.json")
