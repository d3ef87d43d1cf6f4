"""Every dataset, in every form of its fake (fakes.py), under the contract of datasets; `pytest -k NAME` runs its part."""

from mmlrec.testing.datasets import DatasetContract
from preprocessing.dataset import dataset_class
from tests.preprocessing.fakes import FAKES

for number, (name, fake) in enumerate(FAKES.items()):
    members = {"dataset": dataset_class(name.split()[0]), "fake": fake, "long_kills": number > 0}
    globals()[f"Test_{name}"] = type(f"Test_{name}", (DatasetContract,), members)
