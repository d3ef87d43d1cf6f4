"""Rows between ranks, none at all among them."""

import numpy as np

from mmlrec.distributed.world import process_group
from mmlrec.slots.exchange import exchange, share
from tests.processes import spawn
from tests.training.launch import free_port
from tests.training.saving_ranks import join

WORLD_SIZE = 3
#: How many rows go from a rank to another one in an array.
COUNTS = (
    lambda sender, receiver, array: (sender + 2 * receiver + array) % 4,
    lambda sender, receiver, array: 0,
    lambda sender, receiver, array: 2 * (sender == 1),
)


def rows(sender: int, receiver: int, array: int, count: int) -> np.ndarray:
    """So many rows that name where they are from and where they go."""
    return np.full((count, 3), 100 * sender + 10 * receiver + array, np.int64) + np.arange(count)[:, None] * 1000


def meet(rank: int, port: str) -> None:
    join(rank, WORLD_SIZE, port)
    with process_group() as world:
        for counts in COUNTS:
            sent = [[rows(rank, to, array, counts(rank, to, array)) for array in range(2)] for to in range(WORLD_SIZE)]
            for sender, found in enumerate(exchange(world, sent)):
                expected = [rows(sender, rank, array, counts(sender, rank, array)) for array in range(2)]
                assert [array.tolist() for array in found] == [array.tolist() for array in expected]
            shared = [rows(rank, 0, array, counts(rank, 0, array)) for array in range(2)]
            for sender, found in enumerate(share(world, shared)):
                expected = [rows(sender, 0, array, counts(sender, 0, array)) for array in range(2)]
                assert [array.tolist() for array in found] == [array.tolist() for array in expected]


def test_each_rank_gets_what_is_sent_to_it_and_what_is_sent_to_all():
    spawn(meet, (str(free_port()),), WORLD_SIZE)
