"""Every method under the contract of compilation; a new one is picked up by its name."""

import pytest
import torch

from mmlrec.testing.compiled import Compiled
from tests.models.support import build, contracts, make_data, spec_of

globals().update(contracts(Compiled))


def test_a_recompilation_is_seen():
    # The contract would notice: another width of the batch's fields does compile again.
    net = build("mlp", spec_of("mtl"))
    torch._dynamo.reset()
    compiled = torch.compile(net.forward, backend="aot_eager", fullgraph=True)
    data = make_data(net, 8)
    compiled(data.x, data.fields, data.scenario)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(data.x.double(), data.fields, data.scenario)
