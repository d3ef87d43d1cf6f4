from pathlib import Path

import pytest

from mmlrec.config import load_config
from mmlrec.registry import method_names, model_config
from mmlrec.schema import Setting

CONFIGS = Path(__file__).parents[1] / "configs"
RUNNABLE = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("base", "tables"))


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_loads_and_its_folder_says_its_setting(path):
    config = load_config(path)
    if path.parent.name != "scaling":
        assert config.dataset.setting == Setting(path.parent.name)
        assert config.dataset.tasks is not None
    assert config.dataset.path.startswith("data/")


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_method_takes_its_options_from_every_config(path):
    config = load_config(path)
    assert config.model["name"] in method_names()
    for name in method_names():
        options = model_config({"name": name}, config.model_defaults, str(path))
        for key in type(options).model_fields.keys() & config.model_defaults.keys():
            assert getattr(options, key) == config.model_defaults[key]


def test_benchmark_sizes():
    """models.md appendix B, the rows of MovieLens: expert sizes, gate, tower, epochs, patience."""
    expected = {
        "mtl": ([256, 128], [256, 128], [64], [64], 40, 3),
        "msl": ([256, 128], [256, 128, 64], [64], [64], 40, 3),
        "mtmsl": ([128, 128], [128, 128], [], [], 20, 5),
    }
    for setting, row in expected.items():
        config = load_config(CONFIGS / setting / "movielens.yaml")
        sizes = config.model_defaults
        assert (
            sizes["expert_hidden_units"],
            sizes["dnn_hidden_units"],
            sizes["gate_hidden_units"],
            sizes["tower_hidden_units"],
            config.training.epochs,
            config.training.patience,
        ) == row
        assert (config.training.batch_size, config.embeddings.dim) == (4096, 8)


def test_quickstart_differs_from_movielens_1m_in_the_dataset_only():
    large, small = (load_config(CONFIGS / "mtl" / f"{name}.yaml") for name in ("movielens", "movielens-100k"))
    assert small.dataset.path == "data/movielens-100k"
    assert small.model_copy(update={"dataset": large.dataset}) == large
