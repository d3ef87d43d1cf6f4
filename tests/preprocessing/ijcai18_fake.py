"""A small fake of IJCAI-18's text: 19-digit ids, -1 in most columns, lists of three levels, repeated instances."""

import random

HEADER = (
    "instance_id item_id item_category_list item_property_list item_brand_id item_city_id item_price_level item_sales_level"
    " item_collected_level item_pv_level user_id user_gender_id user_age_level user_occupation_id user_star_level context_id"
    " context_timestamp context_page_id predict_category_property shop_id shop_review_num_level shop_review_positive_rate"
    " shop_star_level shop_score_service shop_score_delivery shop_score_description is_trade"
)
ROOT = 7908382889764677758
FIRST_SECOND = 1537200000  # 2018-09-18 00:00 in China, still the 17th in Greenwich
ROUND1, ROUND2 = "round1_ijcai_18_train_20180301.txt", "round2_train.txt"


def write_ijcai18(folder, num_rows=4000, name=ROUND1, seed=0):
    """One file; every 90th line repeats an earlier instance_id, mostly with other fields."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)

    def identity(kind, number):
        """An id as the real ones are: up to 19 digits, which no float64 holds."""
        return (ROOT + 7_000_000_000_000_003 * number + 1_000_003 * kind) % (2**63 - 1)

    def path(number):
        leaf = f"{ROOT};{identity(1, number % 6)}"
        return f"{leaf};{identity(2, number)}" if number % 6 == 0 else leaf

    def predicted():
        if draw.random() < 0.05:
            return "-1"
        entries = []
        for _ in range(draw.randint(1, 4)):
            properties = [str(identity(3, draw.randrange(40))) for _ in range(draw.randint(0, 3))]
            entries.append(f"{identity(1, draw.randrange(8))}:{','.join(properties) or '-1'}")
        return ";".join(entries)

    def score(low):
        return draw.choice(["-1", "1.0", "0.0"]) if draw.random() < 0.1 else repr(draw.uniform(low, 1.0))

    lines = []
    for number in range(num_rows):
        item, user = draw.randrange(80), draw.randrange(300)
        fields = [
            *(identity(4, number), identity(5, item), path(item) if item else "-1"),
            ";".join(str(identity(6, draw.randrange(50))) for _ in range(draw.randint(1, 9))) if item % 19 else "-1",
            *(draw.choice([-1, identity(7, item % 9)]), identity(8, item % 13), item % 11, draw.choice([-1, *range(17)])),
            *(item % 15, 3 + item % 18, identity(9, user), [-1, 0, 0, 0, 1, 1, 2][user % 7]),
            *(draw.choice([-1, 1001, 1003, 1007]), draw.choice([-1, 2002, 2005]), draw.choice([-1, *range(3000, 3011)])),
            *(identity(10, number), FIRST_SECOND + draw.randrange(7 * 86_400), 4001 + draw.randrange(20), predicted()),
            *(identity(11, item % 25), draw.randrange(25), score(0.9), 4999 + draw.randrange(22), score(0.8), score(0.8)),
            *(score(0.8), int(draw.random() < 0.15)),
        ]
        if number % 90 == 89:
            fields[0] = lines[draw.randrange(len(lines))].split(" ")[0]
        lines.append(" ".join(map(str, fields)))
    (folder / name).write_text("\n".join([HEADER, *lines]) + "\n", encoding="ascii")
    return folder
