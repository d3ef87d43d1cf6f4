"""What the server of `processes.py` imports before it forks."""

import gc

import mmlrec.evaluation.prediction
import mmlrec.session.recommender
import mmlrec.training.run  # noqa: F401
from tests.processes import end_with_parent

end_with_parent()
gc.freeze()  # so that collections in children leave the pages shared
