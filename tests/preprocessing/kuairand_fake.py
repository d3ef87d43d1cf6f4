"""A small fake of KuaiRand: two logs by time, 15 tabs, codes as floats with gaps, quoted lists of tags, -124."""

import random

from tests.preprocessing.kuairec_fake import USER, user_row, write_csv

LOG = [
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment", "is_forward"),
    *("is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter"),
    *("is_rand", "tab"),
]
VIDEO = [
    *("video_id", "author_id", "video_type", "upload_dt", "upload_type", "visible_status", "video_duration", "server_width"),
    *("server_height", "music_id", "music_type", "tag"),
]
TABS = [1] * 12 + [0] * 5 + [4, 4, 2, 2, 6, 6, *range(15)]


def video_row(draw, video):
    gap = draw.random() < 0.2
    return [
        *(video, draw.randrange(40), draw.choice(["NORMAL", "NORMAL", "AD"])),
        *(f"2022-04-{draw.randrange(1, 30):02}", draw.choice(["ShortImport", "LongImport", "Web", ""])),
        *("" if gap else f"{draw.choice([0, 1, 3])}.0", "" if gap else f"{draw.randrange(1, 300000)}.0"),
        *("720.0", draw.choice(["1280.0", "960.0", ""]), 9155697141 - video // 3, draw.choice(["9.0", "4.0", ""])),
        draw.choice(["", "12", "12,65", ",".join(str(draw.randrange(40)) for _ in range(4)), "-124"]),
    ]


def log_row(draw, user, video, date):
    click, hour = int(draw.random() < 0.4), draw.randrange(24)
    play = draw.randrange(40000) if click else draw.randrange(7000)
    return [
        *(user, video, date, hour * 100, 1650000000000 + draw.randrange(10**9), click, 0, 0, 0, 0, 0),
        *(int(draw.random() < (0.6 if click else 0.05)), play, 20000, 0, 0, 0, 0, draw.choice(TABS)),
    ]


def write_kuairand(folder, version="pure", num_rows=3000, num_users=120, num_videos=90, seed=0):
    """The tables of one version in the folders of its archive; 27k has two parts of each log."""
    draw = random.Random(seed)
    data = folder / f"KuaiRand-{version}" / "data"
    write_csv(data / f"user_features_{version}.csv", USER, [user_row(draw, user) for user in range(num_users)])
    write_csv(data / f"video_features_basic_{version}.csv", VIDEO, [video_row(draw, 3 * k) for k in range(num_videos)])
    april, may = [20220408 + k for k in range(14)], [*range(20220422, 20220431), *range(20220501, 20220509)]
    for period, days, share in (("4_08_to_4_21", april, 0.7), ("4_22_to_5_08", may, 0.3)):
        rows = [
            log_row(draw, user, 3 * draw.randrange(num_videos), draw.choice(days))
            for user in sorted(draw.randrange(num_users) for _ in range(int(num_rows * share)))
        ]
        parts = {"_part1": rows[: len(rows) // 2], "_part2": rows[len(rows) // 2 :]} if version == "27k" else {"": rows}
        for part, lines in parts.items():
            write_csv(data / f"log_standard_{period}_{version}{part}.csv", LOG, lines)
    return folder
