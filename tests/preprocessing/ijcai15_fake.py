"""A small fake of the IJCAI-15 packages: both formats of the same events, with every empty and odd cell of the real ones."""

import random

DAYS = [*range(511, 532), *range(829, 832), *range(1001, 1032), *range(1101, 1111), *[1111] * 12, 1112]


def write_ijcai15(folder, num_users=300, seed=0):
    """Four files of format 1 and two of format 2. The users of train are the odd ones, those of test the even ones."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    merchants = [7 * k + 2 for k in range(12)]  # the last three are in the log only
    users, pairs, events = [], {}, {}
    for user in range(1, num_users + 1):
        users.append((user * 11, draw.choice(["", *range(9), "3.0"]), draw.choice(["", 0, 1, 2, "1.0"])))
        visited = draw.sample(merchants, draw.randint(1, 5))
        for merchant in visited:
            log = []
            for _ in range(draw.choice([1, 3, 9, 15])):
                item = draw.randrange(merchant * 10, merchant * 10 + 10)
                brand = draw.choice(["", f"{merchant * 3}.0", merchant * 3, draw.randrange(9000)])
                log.append((item, item % 5 + 800, brand, draw.choice(DAYS), draw.choice([0, 0, 0, 0, 1, 2, 2, 3])))
            events[user * 11, merchant] = log
            pairs[user * 11, merchant] = -1 if merchant in merchants[-3:] or draw.random() < 0.3 else int(draw.random() < 0.3)
        missed = [merchant for merchant in merchants if merchant not in visited]
        if draw.random() < 0.05:  # a pair without any event
            pairs[user * 11, missed[0]] = 0
    write(folder / _LOG, "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type", log_lines(events))
    draw.shuffle(users)
    write(folder / "user_info_format1.csv", "user_id,age_range,gender", users)
    about = {user: (age, gender) for user, age, gender in users}
    for number, (side, label) in enumerate((("test", "prob"), ("train", "label"))):
        mine = [(key, value) for key, value in pairs.items() if key[0] // 11 % 2 == number]
        draw.shuffle(mine)
        rows = [(*key, value if number else "") for key, value in mine if value >= 0]
        write(folder / f"{side}_format1.csv", f"user_id,merchant_id,{label}", rows)
        lists = [
            (user, *about[user], merchant, value if number or value < 0 else "", as_list(events.get((user, merchant), ())))
            for (user, merchant), value in mine
        ]
        write(folder / f"{side}_format2.csv", f"user_id,age_range,gender,merchant_id,{label},activity_log", lists)
    return folder


_LOG = "user_log_format1.csv"


def log_lines(events):
    """As in the real log: user after user, the days of one user mixed."""
    return [
        (user, item, category, merchant, brand, day, action)
        for (user, merchant), log in events.items()
        for item, category, brand, day, action in log
    ]


def as_list(log):
    return "#".join(":".join(map(str, event)) for event in log)


def write(path, header, rows):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="ascii")
