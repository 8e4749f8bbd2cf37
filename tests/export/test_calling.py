from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from edgekit.errors import ExportError, ShapeError
from edgekit.export.calling import bind_inputs, output_names, tensor_leaves


def module(forward):
    """A module whose `forward` has the given function's parameters."""
    return type("Model", (torch.nn.Module,), {"forward": forward})()


BINDINGS = {
    "by name": (lambda self, a, b: 0, "a b", ((), {"a": 0, "b": 1})),
    "by name in forward's order": (lambda self, b, a: 0, "a b", ((), {"b": 1, "a": 0})),
    "by position": (lambda self, x, y: 0, "a b", ((0, 1), {})),
    "optional left out": (lambda self, a, b=None: 0, "a", ((), {"a": 0})),
    "optional in the middle left out": (lambda self, a, b=None, c=None: 0, "a c", ((), {"a": 0, "c": 1})),
    "keyword only": (lambda self, a, *, b: 0, "a b", ((), {"a": 0, "b": 1})),
    "star args": (lambda self, *args: 0, "a b c", ((0, 1, 2), {})),
    "star args and kwargs": (lambda self, *args, **kwargs: 0, "a b", ((0, 1), {})),
    "kwargs alone": (lambda self, **kwargs: 0, "a b", ((), {"a": 0, "b": 1})),
    "kwargs after optional": (lambda self, pixels=None, **kwargs: 0, "image", ((0,), {})),
}


@pytest.mark.parametrize("case", BINDINGS)
def test_binds(case):
    forward, names, (args, kwargs) = BINDINGS[case]
    tensors = {name: index for index, name in enumerate(names.split())}
    got_args, got_kwargs, order = bind_inputs(module(forward), tensors)
    assert (got_args, got_kwargs) == (args, kwargs)
    assert list(got_kwargs) == list(kwargs)
    assert [tensors[name] for name in order] == [*args, *kwargs.values()]


@pytest.mark.parametrize(
    ("forward", "names", "wanted"),
    [
        pytest.param(lambda self, a, b: 0, "a", "takes a, b; got shapes for a.", id="too few"),
        pytest.param(lambda self, a: 0, "a b", "takes a; got shapes for a, b.", id="too many"),
        pytest.param(lambda self, a, *, b: 0, "a", "takes a, b; got shapes for a.", id="keyword missing"),
        pytest.param(lambda self: 0, "a", "takes no input; got shapes for a.", id="none taken"),
    ],
)
def test_refuses_wrong_numbers(forward, names, wanted):
    with pytest.raises(ShapeError, match=wanted):
        bind_inputs(module(forward), dict.fromkeys(names.split(), 0))


@dataclass
class Out:
    logits: torch.Tensor
    hidden: torch.Tensor


torch.export.register_dataclass(Out)
T = torch.zeros(2)
NAMES = {
    "tensor": (T, ["output"]),
    "one in a tuple": ((T,), ["output_0"]),
    "tuple": ((T, T), ["output_0", "output_1"]),
    "dict": ({"logits": T, "mask": T}, ["logits", "mask"]),
    "dataclass": (Out(T, T), ["logits", "hidden"]),
    "nested": ({"a": (T, [T])}, ["a_0", "a_1_0"]),
    "None left out": ((T, None, {"b": T}), ["output_0", "output_2_b"]),
    "odd characters": ({"a/b c": T, "é": T}, ["a_b_c", "_"]),
    "a digit first": ({"1x": T}, ["output_1x"]),
    "an input's name": ({"x": T}, ["output_x"]),
    "alike": ({"a.b": T, "a-b": T}, ["output_0", "output_1"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_output_names(case):
    outputs, names = NAMES[case]
    assert output_names(outputs, ["x"]) == names
    assert len(tensor_leaves(outputs)) == len(names)


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        pytest.param(None, "returns no tensor", id="nothing"),
        pytest.param((T, 3), "returns a int", id="a number"),
        pytest.param({"past": object()}, r"returns a object \(past\)", id="an object"),
        pytest.param(T.bfloat16(), "output is bfloat16", id="bfloat16"),
        pytest.param(torch.complex(T, T), "output is complex64", id="complex"),
    ],
)
def test_outputs_that_no_bundle_holds(outputs, why):
    with pytest.raises(ExportError, match=why):
        output_names(outputs)
