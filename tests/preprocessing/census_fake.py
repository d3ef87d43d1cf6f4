"""Small fakes of Census-Income (KDD) and Adult: blanks after commas, periods, `?`, `NA`, comment and blank lines."""

import random

MARITAL = [
    *("Never married", "Married-civilian spouse present", "Widowed", "Divorced", "Separated", "Married-spouse absent"),
    "Married-A F spouse present",
]
COUNTRIES = ["United-States", "?", "Mexico", "Outlying-U S (Guam USVI etc)", "Holand-Netherlands"]


def kdd_line(draw, test):
    child = draw.random() < 0.3
    family = ["Householder", "Spouse of householder", "Child <18 never marr not in subfamily"]
    if not test:
        family.append("Grandchild <18 ever marr not in subfamily")  # a category that the test file lacks
    migration = draw.choice(["?", "Nonmover", "MSA to MSA"])
    fields = [
        *(draw.randrange(91), draw.choice(["Not in universe", "Private", "Self-employed-not incorporated"])),
        *(
            draw.randrange(52),
            draw.randrange(47),
            draw.choice(["Children", "1st 2nd 3rd or 4th grade", "10th grade"]),
        ),
        *(draw.choice([0, 0, 0, 1200, 9999]), "Not in universe", MARITAL[0] if child else draw.choice(MARITAL)),
        *(draw.choice(["Retail trade", "Not in universe or children"]), draw.choice(["Sales", "Not in universe"])),
        *(
            draw.choice(["White", "Black", "Other"]),
            draw.choice(["All other", "NA", "Mexican (Mexicano)"]),
        ),
        *(draw.choice(["Female", "Male"]), "Not in universe", "Not in universe", "Children or Armed Forces"),
        *(draw.choice([0, 0, 99999]), draw.choice([0, 1902]), draw.choice([0, 2500, 1]), "Joint one under 65 & one 65+"),
        *(draw.choice(["South", "Not in universe"]), draw.choice(["?", "Utah", "Not in universe"]), draw.choice(family)),
        *(draw.choice(["Householder", "Spouse of householder"]), f"{draw.uniform(40, 9999):.2f}", migration, migration),
        *(migration, "Yes" if migration == "Nonmover" else "Not in universe under 1 year old", migration, draw.randrange(7)),
        *("Both parents present" if child else "Not in universe", *(draw.choice(COUNTRIES) for _ in range(3))),
        *(draw.choice(["Native- Born in the United States", "Foreign born- Not a citizen of U S "]), draw.randrange(3)),
        *("Not in universe", draw.randrange(3), draw.randrange(53), draw.choice([94, 95])),
        draw.choice(["- 50000."] * 9 + ["50000+."]),
    ]
    return ", ".join(map(str, fields))


def write_kdd(folder, num_train=300, num_test=201, seed=0):
    """census-income.data and census-income.test; some rows twice."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for name, num_rows, test in (("census-income.data", num_train, False), ("census-income.test", num_test, True)):
        lines = [kdd_line(draw, test) for _ in range(num_rows - 3)]
        (folder / name).write_text("\n".join([*lines, *lines[:3]]) + "\n", encoding="ascii")
    return folder


def adult_line(draw, period):
    single = draw.random() < 0.3
    education = draw.randrange(3)
    fields = [
        *(draw.randrange(17, 91), draw.choice(["Private", "?", "State-gov"]), draw.randrange(12285, 1484705)),
        *(["10th", "HS-grad", "Masters"][education], [6, 9, 14][education]),
        "Never-married" if single else draw.choice(["Married-civ-spouse", "Divorced", "Widowed", "Married-AF-spouse"]),
        *(draw.choice(["?", "Sales", "Tech-support"]), "Own-child" if single else "Husband"),
        *(draw.choice(["White", "Asian-Pac-Islander"]), draw.choice(["Male", "Female"]), draw.choice([0, 0, 99999])),
        *(draw.choice([0, 1902]), draw.randrange(1, 100), draw.choice(["United-States", "?", "Trinadad&Tobago"])),
        draw.choice(["<=50K", "<=50K", "<=50K", ">50K"]) + period,
    ]
    return ", ".join(map(str, fields))


def write_adult(folder, num_train=300, num_test=201, seed=0):
    """adult.data ends with a blank line; adult.test begins with a comment too, and its labels end in a period."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    train = [adult_line(draw, "") for _ in range(num_train)]
    test = ["|1x3 Cross validator", *(adult_line(draw, ".") for _ in range(num_test))]
    (folder / "adult.data").write_text("\n".join(train) + "\n\n", encoding="ascii")
    (folder / "adult.test").write_text("\n".join(test) + "\n\n", encoding="ascii")
    return folder
