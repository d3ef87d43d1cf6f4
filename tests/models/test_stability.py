"""Every method under the contract of finite numbers; a new one is picked up by its name."""

from mmlrec.testing.stability import Stability
from tests.models.support import contracts

globals().update(contracts(Stability))
