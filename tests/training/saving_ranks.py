"""What ranks of the tests of checkpoints do, in a module that imports nothing beside what it needs: each rank is a process."""

import json
import os
import signal
import sys
import threading
import time
import zlib
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch.distributed import distributed_c10d
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ShardMetadata

from mmlrec.distributed.world import process_group
from mmlrec.run_folder import checkpoint, summed_files, whole
from mmlrec.run_folder.one_writer import hold
from mmlrec.run_folder.saver import Saver
from mmlrec.storage.places import place

#: Rows of 64 float32 of a table on each of two ranks: the first has little.
ROWS = (2000, 6000)
NETWORK = 8


def join(rank, world_size, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def tensors_of(rank):
    """A sharded table, then what both ranks have: as much as the table, in eight tensors; then what one rank has."""
    first = sum(ROWS[:rank])
    shard = sharded_tensor.Shard(
        torch.full((ROWS[rank], 64), float(rank)),
        ShardMetadata(shard_offsets=[first, 0], shard_sizes=[ROWS[rank], 64], placement=f"rank:{rank}/cpu"),
    )
    table = sharded_tensor.init_from_local_shards([shard], (sum(ROWS), 64))
    network = {f"model.w{i}": torch.full((sum(ROWS) * 64 // NETWORK,), float(i)) for i in range(NETWORK)}
    return {"model.table": table, **network, f"random.{rank}.cpu": torch.get_rng_state()}


def counted(numbers):
    """Have the bytes that zlib takes the checksum of added up in `numbers`."""
    plain = zlib.crc32

    def crc32(content, value=0):
        numbers.append(memoryview(content).nbytes)
        return plain(content, value)

    zlib.crc32 = crc32


def save(rank, port, folder):
    """What a rank does: save twice; of how many bytes it has taken a checksum."""
    join(rank, 2, port)
    numbers: list[int] = []
    with process_group() as world:
        tensors = tensors_of(rank)
        checkpoint.save(checkpoint.step_folder(folder, 1), tensors, {"step": 1}, world)
        counted(numbers)
        checkpoint.save(checkpoint.step_folder(folder, 2), tensors, {"step": 2}, world)
    (folder / f"saved-{rank}.json").write_text(json.dumps(sum(numbers)))


def find(rank, port, folder):
    join(rank, 3, port)
    numbers: list[int] = []
    counted(numbers)
    with process_group() as world:
        found = checkpoint.latest(folder, world)
    (folder / f"found-{rank}.json").write_text(json.dumps([found.name, sum(numbers)]))


def slowly(rank, port, folder):
    """Save and check checkpoints whose checksums take one rank twice the timeout, and whose deletion never ends."""
    join(rank, 2, port)
    plain = zlib.crc32

    def crc32(content, value=0):
        if rank == 1 and memoryview(content).nbytes > 2000:
            time.sleep(4.1)
        return plain(content, value)

    zlib.crc32 = crc32
    whole.delete = lambda path: threading.Event().wait(60)
    with process_group() as world:
        # The limit of every wait in training; ranks may take longer to start here.
        distributed_c10d._set_pg_timeout(timedelta(seconds=2), world.control)
        tensors = {"model.w": torch.arange(1000.0), "model.v": torch.arange(1000.0)}
        for step, background in ((1, False), (2, True)):
            saving = Saver(world, lambda: None, background=background, most_failures=1, longest_wait=60)
            path = checkpoint.step_folder(folder, step)
            saving.save(path, tensors, {"step": step}, partial(prune, saving, folder, step))
            begun = time.monotonic()
            world.barrier()  # as a step of training does
            waited = time.monotonic() - begun
            saving.wait()
            assert waited < 2, waited
        assert checkpoint.latest(folder, world) == path
        assert [p.name for p in sorted(folder.glob("step_*")) if not p.suffix] == [path.name]


def wait_for_lease(rank, port, environment, address):
    """Take a folder whose lease is watched for twice as long as ranks wait for each other in training."""
    os.environ |= environment
    join(rank, 2, port)
    with process_group() as world:
        folder = place(address)
        world.without_limit().barrier()
        distributed_c10d._set_pg_timeout(timedelta(seconds=3), world.control)
        with hold(folder, world) as holder:
            assert holder.lost() is None


def prune(saving, folder, step):
    checkpoint.prune(folder, 1, step=step, delete=saving.delete)


def killed(folder, count, kinds):
    """Save, then save in the background; before its file operation number `count` the process kills itself."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    seen = []

    def before(kind):
        if threading.current_thread().name in ("checkpoint", "deletions"):
            seen.append(kind)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, arguments):
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            before(event)
        elif event == "open" and str(folder) in str(arguments[0]):
            before(f"open {Path(str(arguments[0])).name}")

    plain_fsync, plain_write = os.fsync, summed_files._SummedStream.write

    def fsync(descriptor):
        before("fsync")
        plain_fsync(descriptor)

    def write(self, content):
        before("write")
        return plain_write(self, content)

    with process_group() as world:
        weights = torch.full((3,), 1.0)
        with Saver(world, lambda: None, background=True, most_failures=1, longest_wait=60) as saving:
            for step in (1, 2):
                if step == 2:
                    saving.wait()
                    os.fsync, summed_files._SummedStream.write = fsync, write
                    sys.addaudithook(audit)
                path = checkpoint.step_folder(folder, step)
                saving.save(path, {"model.w": weights}, {"step": step}, partial(prune, saving, folder, step))
                weights += 1
    kinds.write_text(json.dumps(seen))
