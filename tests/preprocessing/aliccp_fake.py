"""A small fake of Ali-CCP: bytes 0x01-0x03, fields that repeat, histories, purchases without click, places missing."""

import random

PLACES = [9351665, 9351666, 9351670]  # raw features of field 301


def entry(field, feature, value="1.0"):
    return f"{field}\x02{feature}\x03{value}"


def common_line(draw, index):
    """User fields, some missing; histories of any length, with equal values and a feature twice."""
    entries = [entry(field, 100 * k + draw.randrange(6)) for k, field in enumerate((121, 122, 124, 125, 126, 127, 128, 129), 1)]
    if draw.random() < 0.9:
        entries.append(entry(101, 1000 + draw.randrange(60)))
    if draw.random() < 0.3:
        entries.pop(2)
    if draw.random() < 0.1:
        entries.append(entry(122, 299))  # a field with one value, once more: the last one counts
    for field in ("109_14", "110_14", "127_14", "150_14"):
        for _ in range(draw.choice([0, 1, 5, 12, 45])):
            value = draw.choice(["1.0", "0.69315", "2.3979", f"{draw.random() * 5:.5f}", "1e-05"])
            entries.append(entry(field, int(field[:3]) * 1000 + draw.randrange(30), value))
    if draw.random() < 0.5:
        draw.shuffle(entries)
    return f"{index},{len(entries)}," + "\x01".join(entries)


def sample_line(draw, sample, index):
    click = int(draw.random() < 0.3)
    purchase = int(draw.random() < (0.4 if click else 0.02))
    entries = [
        entry(216, 9340000 + draw.randrange(30)),
        entry(301, draw.choice([PLACES[0]] * 5 + [PLACES[2]] * 4 + [PLACES[1]])),
    ]
    if draw.random() < 0.02:
        entries.pop()  # without field 301
    entries += [entry(field, 8000000 + field * 1000 + draw.randrange(25)) for field in (205, 206, 207)]
    entries += [entry(210, 9050000 + draw.randrange(25)) for _ in range(draw.choice([0, 1, 1, 5]))]
    for field in (508, 509, 702, 853):
        entries += [
            entry(field, 9350000 + field * 10 + draw.randrange(15), "2.30259") for _ in range(draw.choice([0, 1, 1, 2]))
        ]
    return f"{sample},{click},{purchase},{index},{len(entries)}," + "\x01".join(entries)


def write_aliccp(folder, num_train=2500, num_test=1200, seed=0):
    """Skeleton and common features of both sides; samples of one index stand together; no index is shared by the sides."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for side, num_rows in (("train", num_train), ("test", num_test)):
        indices = [f"{draw.randrange(2**64):016x}" for _ in range(num_rows // 20)]
        indices[0] = "000" + indices[0][3:]
        lines = [common_line(draw, index) for index in indices]
        (folder / f"common_features_{side}.csv").write_text("\n".join(lines) + "\n", encoding="ascii")
        of_rows = sorted(draw.randrange(len(indices)) for _ in range(num_rows))
        lines = [sample_line(draw, k, indices[row]) for k, row in enumerate(of_rows, 1)]
        (folder / f"sample_skeleton_{side}.csv").write_text("\n".join(lines) + "\n", encoding="ascii")
    return folder
