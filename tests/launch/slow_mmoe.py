"""A method from outside the package: MMoE, whose training steps take a fifth of a second while a file is there."""

import os
import time
from pathlib import Path

from mmlrec.models.mmoe import MMoE


class SlowMmoe(MMoE):
    """The file is the one that SLOW_WHILE names."""

    def forward(self, *arguments, **options):
        if self.training and Path(os.environ["SLOW_WHILE"]).exists():
            time.sleep(0.2)
        return super().forward(*arguments, **options)
