"""A method from outside the package: MMoE, whose training gets slow while a file is there."""

import os
import time
from pathlib import Path

from mmlrec.models.mmoe import MMoE

FAST_STEPS = 45


class SlowMmoe(MMoE):
    """The file is the one that SLOW_WHILE names; the first steps of a process are as fast as they can be."""

    taken = 0

    def forward(self, *arguments, **options):
        self.taken += self.training
        if self.training and self.taken > FAST_STEPS and Path(os.environ["SLOW_WHILE"]).exists():
            time.sleep(0.5)
        return super().forward(*arguments, **options)
