"""Tables in the memory of the host: their rows are fetched anew behind everything that reads or writes them as a whole."""

import pytest
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torchrec.distributed.model_parallel import get_unwrapped_module

from mmlrec.config import load_config
from mmlrec.distributed.world import process_group
from mmlrec.embeddings.tables import forget_cached_rows
from mmlrec.errors import ConfigError
from mmlrec.run_folder import checkpoint
from mmlrec.session.session import build_session
from tests.datasets import write_dataset


def test_state_dict_empties_the_caches_and_training_on_a_cpu_is_refused(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    write_dataset(tmp_path / "data", rows=100)
    content = {"dataset": {"path": str(tmp_path / "data"), "setting": "mtl"}, "embeddings": {"dim": 4}}
    emptied = []
    monkeypatch.setattr(SplitTableBatchedEmbeddingBagsCodegen, "reset_cache_states", lambda self: emptied.append(self))
    with process_group() as world:
        session = build_session(load_config(content), world, for_training=True)
        checkpoint.model_tensors(session.model)
        assert emptied == []
        forget_cached_rows(get_unwrapped_module(session.model).tables)
        checkpoint.model_tensors(session.model)
        assert emptied
        with pytest.raises(ConfigError, match=r"embeddings.host_cache needs GPUs"):
            build_session(load_config(content, ["embeddings.host_cache=0.1"]), world, for_training=True)
        with pytest.raises(ConfigError, match=r"embeddings.replicas: 2 copies of the tables need GPUs"):
            build_session(load_config(content, ["embeddings.replicas=2"]), world, for_training=True)
        with pytest.raises(ConfigError, match="replicas are not averaged in the memory of hosts"):
            load_config(content, ["embeddings.host_cache=0.1", "embeddings.replicas=2"])
