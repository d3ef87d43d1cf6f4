"""The fused kernels count training steps, whatever else looked rows up: Adam's correction of its moments hangs on it."""

import shutil

from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen as Kernel

from mmlrec.config import RunConfig
from mmlrec.distributed.world import process_group
from mmlrec.training.run import train
from tests.datasets import write_dataset


def test_validations_are_no_steps_and_a_resume_goes_on_counting(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", rows=640, table_rows=40)
    training = {"batch_size": 32, "max_steps": 12, "validate_every_steps": 4, "checkpoint_every_steps": 6, "patience": None}
    config = RunConfig.model_validate(
        {"dataset": {"path": str(tmp_path / "data"), "setting": "mtl"}, "model": {"name": "mmoe"}, "training": training}
    )
    counted: list[int] = []
    plain = Kernel.forward

    def forward(self, *arguments, **options):
        found = plain(self, *arguments, **options)
        self.iter_cpu.add_(1)  # as each forward pass does where the optimizer is Adam, which a CPU has not
        if found.requires_grad:
            counted.append(int(self.iter_cpu))
        return found

    monkeypatch.setattr(Kernel, "forward", forward)
    with process_group() as world:
        train(config, tmp_path / "run", world)
        assert counted[-1] == 12
        assert sorted(set(counted)) == list(range(1, 13))
        counted.clear()
        for path in (tmp_path / "run" / "checkpoints").glob("step_*12*"):
            shutil.rmtree(path)
        (tmp_path / "run" / "result.json").unlink()
        train(config, tmp_path / "run", world)
        assert sorted(set(counted)) == list(range(7, 13))
