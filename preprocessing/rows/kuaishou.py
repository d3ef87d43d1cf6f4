"""The user table that KuaiRec and KuaiRand share: 30 columns beside the user id, mostly codes.

Codes may be written as floats (`1.0`) and may be missing; -124 stands for unknown. Ranges such as "(0,10]" stand in quotes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.dataset import Column, dense, sparse
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import Block

#: Values of user_active_degree.
ACTIVITY = ["UNKNOWN", "full_active", "high_active", "middle_active"]
COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
_TEXTS = ("user_active_degree", *(f"{name}_range" for name in COUNTS))
_FLAGS = ("is_lowactive_period", "is_live_streamer", "is_video_author")
_COLUMNS = (
    *("user_active_degree", *_FLAGS),
    *(name for count in COUNTS for name in (count, f"{count}_range")),
    *(f"onehot_feat{k}" for k in range(18)),
)
_UNKNOWN = -124


def user_features(parity: bool) -> tuple[Column, ...]:
    """The 30 columns: the four counts dense, the others sparse; in the parity form all sparse."""

    def feature(name: str) -> Column:
        if name in COUNTS and not parity:
            return dense(name)
        return sparse(name, pa.string() if name in _TEXTS else pa.int64())

    return tuple(map(feature, _COLUMNS))


def user_table(name: str) -> DelimitedText:
    """How the file of that name is read."""
    kinds = {column: pa.string() if column in _TEXTS else pa.float64() for column in _COLUMNS}
    return DelimitedText(name, ",", {"user_id": pa.int64()} | kinds, header=True, quoted=True)


def good_users(users: Block, parity: bool) -> Block:
    """The users as raw values of `user_features`; counts that become dense as log(1 + count). The bad ones are left out."""
    users = users.require(users.present("user_id"), "the user_id is missing. Mend the line.")
    known = pc.is_in(users.table["user_active_degree"], pa.array(ACTIVITY)).to_numpy(zero_copy_only=False)
    users = users.require(
        known, f"user_active_degree must be one of {', '.join(ACTIVITY)}, found {{user_active_degree}}. Mend the line."
    )
    users = whole_numbers(users, [name for name in _COLUMNS if name not in _TEXTS])
    for name in COUNTS:
        values = users.table[name].fill_null(0).to_numpy()
        good = (values >= 0) | (values == _UNKNOWN)
        users = users.require(good, f"{name} must be 0 or more, or {_UNKNOWN} for unknown, found {{{name}}}. Mend the line.")
    users = without_empty_texts(users)
    if parity:
        return users
    columns = {name: users.table[name] for name in users.table.column_names}
    for name, values in columns.items():
        if pa.types.is_integer(values.type) and name != "user_id":
            columns[name] = pc.if_else(pc.equal(values, _UNKNOWN), None, values)
    for name in COUNTS:
        columns[name] = pc.log1p(columns[name].cast(pa.float64())).cast(pa.float32())
    return replace(users, table=pa.table(columns))


def without_empty_texts(block: Block) -> Block:
    """The block with null for texts that are empty."""
    columns = {name: block.table[name] for name in block.table.column_names}
    for name, values in columns.items():
        if pa.types.is_string(values.type):
            columns[name] = pc.if_else(pc.equal(values, ""), None, values)
    return replace(block, table=pa.table(columns))


def whole_numbers(block: Block, names: Sequence[str]) -> Block:
    """The block with these columns, float64 as read, as int64. Other values than whole numbers make bad rows."""
    for name in names:
        values = block.table[name].fill_null(0).to_numpy()
        whole = (values == np.floor(values)) & (np.abs(values) < 2**53)
        block = block.require(whole, f"{name} must be a whole number below 2^53, found {{{name}}}. Mend the line.")
    columns = {name: block.table[name] for name in block.table.column_names}
    return replace(block, table=pa.table(columns | {name: columns[name].cast(pa.int64()) for name in names}))
