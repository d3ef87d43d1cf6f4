"""Every method for both MSL and MTMSL under the contract of tied heads; a new one is picked up by its name."""

from mmlrec.testing.tied_heads import TiedHeads
from tests.models.support import contracts

globals().update({name: tests for name, tests in contracts(TiedHeads).items() if tests().ties()})
