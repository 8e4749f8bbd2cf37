"""torch.export takes every family, with a dynamic batch, and the program gives the same answers."""

from __future__ import annotations

import pytest
import torch

from edgekit.models import create_model, fuse, model_entry, seed_weights

CASES = [
    pytest.param("shvit_digits", False, id="shvit_digits-trained"),
    pytest.param("shvit_digits", True, id="shvit_digits-fused"),
    pytest.param("care_digits", False, id="care_digits-trained"),
    pytest.param("care_digits", True, id="care_digits-fused"),
    pytest.param("shvit_s1", False, id="shvit_s1-trained"),
    pytest.param("shvit_s1", True, id="shvit_s1-fused"),
    pytest.param("care_s0", False, id="care_s0-trained"),
    pytest.param("care_s0", True, id="care_s0-fused"),
]


@pytest.mark.parametrize(("name", "fused"), CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_dynamic_batch(name, fused):
    model = create_model(name, weights="random")
    seed_weights(model, 0)
    model = fuse(model) if fused else model
    shape = model_entry(name).input
    size = min(shape.size, 96)
    images = torch.randn(5, shape.channels, size, size, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    in_place = [str(t) for t in targets if isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable]
    assert not in_place
    with torch.no_grad():
        for batch in (1, 5):
            torch.testing.assert_close(program.module()(images[:batch]), model(images[:batch]), rtol=1e-5, atol=1e-5)
