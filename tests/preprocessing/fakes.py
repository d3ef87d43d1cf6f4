"""A fake of every dataset, for the tests that hold for all of them: tests/preprocessing/test_every_dataset.py and the like.

A dataset's own fake writes raw files with what makes the real ones awkward; here it gets one line.
"""

from dataclasses import dataclass
from pathlib import Path

from mmlrec.testing import raw_folders
from tests.preprocessing.aliccp_fake import write_aliccp
from tests.preprocessing.aliexpress_fake import write_aliexpress, write_processed
from tests.preprocessing.amazon_fake import write_amazon, write_amazon_2014
from tests.preprocessing.census_fake import write_adult, write_kdd
from tests.preprocessing.criteo_fake import TABLE_ROWS, write_arrays, write_days, write_kaggle
from tests.preprocessing.ijcai15_fake import write_ijcai15
from tests.preprocessing.ijcai18_fake import write_ijcai18
from tests.preprocessing.kuairand_fake import write_kuairand
from tests.preprocessing.kuairec_fake import write_kuairec
from tests.preprocessing.movielens_fake import write_movielens, write_movielens_csv
from tests.preprocessing.table_fake import write_table


@dataclass(frozen=True)
class Fake(raw_folders.Fake):
    """A fake as the contract of datasets takes it, and what trains on it.

    Attributes:
        configs: names below configs/ that train on the dataset, with the tasks that they report.
    """

    configs: dict[str, list[str]] | None = None


def _processed(folder: Path) -> Path:
    write_processed(write_aliexpress(folder / "pairs", num_searches=600), folder)
    return folder


_TABLE = ("--config", "{raw}/my_table.yaml")
_CRITEO_TABLES = ("--days", "0-2", "--table-rows", ",".join(map(str, TABLE_ROWS)))

#: Dataset, or dataset and a word for its form -> fake.
FAKES: dict[str, Fake] = {
    "movielens-1m": Fake(
        lambda folder: write_movielens(folder, 6000),
        configs={
            "mtl/movielens": ["label2", "label3"],
            "msl/movielens": ["label3"],
            "mtmsl/movielens": ["label2", "label3"],
        },
    ),
    "movielens-20m": Fake(
        lambda folder: write_movielens_csv(folder, 4000), configs={"mtl/movielens-20m": ["label2", "label3"]}
    ),
    "movielens-25m": Fake(lambda folder: write_movielens_csv(folder, 4000, seed=1)),
    "census-income": Fake(lambda folder: write_kdd(folder, 3000, 1000), configs={"mtl/census": ["income", "marital"]}),
    "adult-income": Fake(lambda folder: write_adult(folder, 3000, 1000), configs={"mtl/adult": ["income", "marital"]}),
    "aliexpress": Fake(lambda folder: write_aliexpress(folder, num_searches=600), configs={"msl/aliexpress": ["click"]}),
    "aliexpress processed": Fake(_processed, ("--form", "processed")),
    "ijcai15": Fake(lambda folder: write_ijcai15(folder, 800), configs={"mtl/ijcai15": ["label", "label2"]}),
    "ijcai15 lists": Fake(lambda folder: write_ijcai15(folder, 800), ("--form", "2")),
    "ijcai15 funnel": Fake(write_ijcai15, ("--variant", "funnel"), configs={"mtl/ijcai15": ["label", "label2"]}),
    "ijcai15 time": Fake(write_ijcai15, ("--variant", "funnel", "--form", "2", "--split", "time")),
    "ijcai18": Fake(write_ijcai18, configs={"msl/ijcai18": ["is_trade"]}, own=("instance_id",)),
    "ijcai18 last-day": Fake(write_ijcai18, ("--split", "last_day", "--ids"), own=("instance_id",)),
    "kuairec": Fake(write_kuairec, configs={"mtl/kuairec": ["label", "label2"], "msl/kuairec": ["label"]}),
    "kuairec ids": Fake(write_kuairec, ("--ids",)),
    "kuairec small": Fake(write_kuairec, ("--variant", "train-big-eval-small"), configs={"msl/kuairec": ["label"]}),
    "kuairand": Fake(write_kuairand),
    "kuairand 27k": Fake(lambda folder: write_kuairand(folder, "27k"), ("--version", "27k", "--tabs", "0,1")),
    "amazon-2018": Fake(
        write_amazon,
        configs={
            "mtl/amazon": ["label", "label2"],
            "msl/amazon": ["label"],
            "mtmsl/amazon": ["label", "label2"],
        },
        own=("reviewerID", "asin", "unixReviewTime"),
        labels=("overall",),
    ),
    "amazon-2018 time": Fake(
        write_amazon, ("--split", "time"), own=("reviewerID", "asin", "unixReviewTime"), labels=("overall",)
    ),
    "amazon-2018 2014": Fake(
        write_amazon_2014,
        ("--release", "2014", "--categories", "Beauty,Baby"),
        configs={"mtl/amazon": ["label", "label2"]},
        own=("reviewerID", "asin", "unixReviewTime"),
        labels=("overall",),
    ),
    "aliccp": Fake(write_aliccp, configs={"msl/aliexpress": ["click"]}),
    "criteo": Fake(write_days, ("--days", "0-2", "--scenario", "day"), configs={"scaling/criteo": ["click"]}),
    "criteo by-day": Fake(write_days, ("--days", "0-2", "--dense", "min-max")),
    "criteo kaggle": Fake(write_kaggle, ("--form", "kaggle")),
    "criteo npy": Fake(lambda folder: write_arrays(folder, False), ("--form", "npy", *_CRITEO_TABLES)),
    "criteo multi-hot": Fake(
        lambda folder: write_arrays(folder, True),
        ("--form", "multi-hot", *_CRITEO_TABLES, "--scenario", "day"),
        configs={"scaling/criteo": ["click"]},
    ),
    "table": Fake(write_table, _TABLE, configs={"scaling/synthetic": ["click", "buy", "liked"]}),
    "table json": Fake(
        lambda folder: write_table(folder, "json"), _TABLE, labels=("clicked", "orders", "rating", "row", "time")
    ),
    "table parquet": Fake(lambda folder: write_table(folder, "parquet"), _TABLE),
}
