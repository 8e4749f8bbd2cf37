"""torch.export takes every family, with a dynamic batch, and the program gives the same answers."""

from __future__ import annotations

import pytest
import torch

from edgekit.models import create_model, fuse, model_entry, seed_weights

CASES = [
    pytest.param("dynamicvis_digits", True, id="dynamicvis_digits-fused"),
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
    assert not in_place_ops(program)
    with torch.no_grad():
        for batch in (1, 5):
            torch.testing.assert_close(program.module()(images[:batch]), model(images[:batch]), rtol=1e-5, atol=1e-5)


def in_place_ops(program):
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return [str(t) for t in targets if isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable]


@pytest.mark.parametrize("name", ["hgnn", "hgnnp", "hgnn_digits", "lighthgnn", "lighthgnn_digits"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_dynamic_size(name):
    entry, model = model_entry(name), fuse(create_model(name, weights="random"))
    tensors = [as_tensors(entry.input.examples(seed)) for seed in (1, 2)]
    dims = {item.name: item.dims for item in entry.input.tensors}
    names = {dim for shape in dims.values() for dim in shape if isinstance(dim, str)} - entry.arguments().keys()
    symbols = {dim: torch.export.Dim(dim, min=1) for dim in names}
    axes = {key: {i: symbols[dim] for i, dim in enumerate(shape) if dim in symbols} for key, shape in dims.items()}
    program = torch.export.export(model, (), tensors[0], dynamic_shapes=axes)
    assert not in_place_ops(program)
    with torch.no_grad():
        for inputs in tensors:
            torch.testing.assert_close(program.module()(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)


def as_tensors(arrays):
    return {key: torch.from_numpy(array) for key, array in arrays.items()}
