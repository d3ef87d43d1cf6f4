"""A small fake of KuaiRec 2.0: quoted ranges and lists, flags as floats with gaps, -124, UNKNOWN, empty and float dates."""

import csv
import random

ACTIVITY = ["full_active", "high_active", "middle_active", "UNKNOWN"]
COUNTS = ["follow_user_num", "fans_user_num", "friend_user_num", "register_days"]
USER = [
    *("user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
    *(name for count in COUNTS for name in (count, f"{count}_range")),
    *(f"onehot_feat{k}" for k in range(18)),
]
MATRIX = ["user_id", "video_id", "play_duration", "video_duration", "time", "date", "timestamp", "watch_ratio"]


def write_csv(path, header, rows):
    """As pandas writes it: quotes where a comma stands inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def number_range(number):
    if number <= 0:
        return "0"
    return "(0,10]" if number <= 10 else "(10,50]" if number <= 50 else "[1,5)" if number % 2 else "500+"


def user_row(draw, user):
    """One line of the user table that KuaiRec and KuaiRand share."""
    counts = [draw.choice([0, draw.randrange(30), draw.randrange(3000)]) for _ in COUNTS]
    counts[draw.randrange(4)] = draw.choice([counts[0], -124])
    return [
        *(user, ACTIVITY[3 if user % 50 == 7 else draw.randrange(3)], draw.randrange(2), draw.choice([0, 1, -124])),
        *(draw.choice([0, 1]), *(cell for count in counts for cell in (count, number_range(count)))),
        *(draw.randrange(size) for size in (2, 8, 30, 1076, 12, 10, 3, 47, 340, 7, 5, 3)),
        *(draw.choice(["0.0", "0.0", "1.0", ""]) for _ in range(6)),
    ]


def view(draw, user, video, small):
    length = 5000 + video * 37
    ratio = draw.choice([draw.random() * 1.2, draw.random() * 1.2, draw.random() * 3, 1, 2, 0, draw.random() * 40])
    ratio = f"{int(ratio * length) / length:.6f}" if ratio not in (1, 2, 0) else f"{ratio}.0"
    day = draw.randrange(5, 32)
    when = [f"2020-07-{day:02} 00:08:23.438", f"202007{day:02}", "1.593879e+09"]
    if small:
        when = ["", "", ""] if draw.random() < 0.1 else [when[0], f"{when[1]}.0", when[2]]
    return [user, video, int(float(ratio) * length), length, *when, ratio]


def write_kuairec(folder, num_big=3000, num_small=400, num_users=150, num_videos=80, seed=0):
    """The four tables in the folders of the archive, sorted by user as the real ones are."""
    draw = random.Random(seed)
    data = folder / "KuaiRec 2.0" / "data"
    write_csv(data / "user_features.csv", USER, [user_row(draw, user) for user in range(num_users)])
    videos = [[video, str(draw.sample(range(31), draw.choice([1, 1, 1, 2, 4])))] for video in range(num_videos)]
    write_csv(data / "item_categories.csv", ["video_id", "feat"], videos)
    for name, num_rows, small in (("big_matrix.csv", num_big, False), ("small_matrix.csv", num_small, True)):
        users = sorted(draw.randrange(num_users) for _ in range(num_rows))
        rows = [view(draw, user, draw.randrange(num_videos), small) for user in users]
        write_csv(data / name, MATRIX, rows)
    write_csv(data / "social_network.csv", ["user_id", "friend_list"], [[5, "[4, 7]"], [9, "[3]"]])
    return folder
