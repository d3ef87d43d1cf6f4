"""Small fakes of ml-1m and of ml-20m for tests, and the bytes of a folder."""

import numpy as np


def write_movielens(folder, num_ratings=2000, num_users=40, num_movies=60, seed=0):
    """A small fake in the layout of ml-1m: zips with leading zeros, a title with a colon and a Latin-1 letter."""
    random = np.random.default_rng(seed)
    genres = ["Action", "Comedy", "Children's", "Drama", "Sci-Fi"]
    folder.mkdir(parents=True)
    users = [
        f"{u}::{'FM'[u % 3 > 0]}::{[1, 18, 25, 35, 45][u % 5]}::{u % 21}::0{1000 + u % 7}{'-12' if u % 9 == 0 else ''}"
        for u in range(1, num_users + 1)
    ]
    movies = [
        f"{3 * m}::Amélie: part {m}, again (19{m:02d})::{'|'.join(genres[m % 5 : m % 5 + 1 + m % 3])}"
        for m in range(1, num_movies + 1)
    ]
    user = np.sort(1 + (num_users * random.random(num_ratings) ** 2).astype(int))
    movie = 3 * (1 + (num_movies * random.random(num_ratings) ** 3).astype(int))
    ratings = [
        f"{u}::{m}::{r}::{978300000 + i}"
        for i, (u, m, r) in enumerate(zip(user, movie, random.integers(1, 6, num_ratings), strict=True))
    ]
    (folder / "users.dat").write_text("\n".join(users) + "\n", encoding="ascii")
    (folder / "movies.dat").write_text("\n".join(movies) + "\n", encoding="iso-8859-1")
    (folder / "ratings.dat").write_text("\n".join(ratings) + "\n", encoding="ascii")
    return folder


def write_movielens_csv(folder, num_ratings=2000, num_users=40, num_movies=60, seed=0):
    """A small fake in the layout of ml-20m and ml-25m: half stars, quoted titles, movies without genres or ratings."""
    random = np.random.default_rng(seed)
    genres = ["Action", "Children", "Film-Noir", "IMAX", "Sci-Fi"]
    folder.mkdir(parents=True)
    titles = [
        "Toy Story {m} (1995)",
        '"American President, The {m} (1995)"',
        '"""Great Performances"" Cats {m}, é"',
        "Amélie {m}",
    ]
    movies = [
        f"{3 * m},{titles[m % 4].format(m=m)},"
        f"{'(no genres listed)' if m % 7 == 2 else '|'.join(genres[m % 5 : m % 5 + 1 + m % 3])}"
        for m in range(1, num_movies + 11)  # the last ten are never rated
    ]
    user = np.sort(1 + (num_users * random.random(num_ratings) ** 2).astype(int))
    movie = 3 * (1 + (num_movies * random.random(num_ratings) ** 3).astype(int))
    ratings = [
        f"{u},{m},{r / 2},{978300000 + i}"
        for i, (u, m, r) in enumerate(zip(user, movie, random.integers(1, 11, num_ratings), strict=True))
    ]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]) + "\n", encoding="utf-8")
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *ratings]) + "\n")
    return folder


def folder_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
