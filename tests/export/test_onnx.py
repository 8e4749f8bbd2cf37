from __future__ import annotations

import site
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import edgekit
from edgekit.errors import ExportError, InputError, ShapeError
from edgekit.export.layers import compare_layers
from edgekit.export.onnx import OPSETS, convert, example_inputs, trace
from edgekit.export.shapes import parse_shapes
from edgekit.export.source import load_model


class Function(nn.Module):
    """A linear layer and a function of it and the inputs."""

    def __init__(self, function):
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.l, x)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, b, a, scale=None):
        return {"sum": self.l(a) - b, "parts": (a * 2, [b])}


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids, mask):
        return (self.table(ids) * mask.unsqueeze(-1).float()).sum(1)


class Variadic(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, *args, **kwargs):
        return self.l(args[0]) + args[1]


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, **kwargs):
        return self.l(kwargs["x"]) - kwargs["y"]


@dataclass
class Result:
    logits: torch.Tensor
    hidden: torch.Tensor


torch.export.register_dataclass(Result)


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.l(x)
        return Result(hidden.relu(), hidden)


def check(bundle, model):
    """The bundle answers as the model does, live, and layer by layer where there are layers."""
    verification = edgekit.verify(bundle, model=model)
    assert verification, [output for part in verification.checks for output in part.outputs if not output]


@pytest.mark.parametrize("limits", ["1..8", "2..8", "3..", "7..8"])
def test_dynamic_batch(export, limits):
    bundle = export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), f"input:Nx4 | {limits}")
    low, high = limits.split("..")
    session = edgekit.load(bundle)
    for size in range(int(low), int(high or 12) + 1):
        assert session.run({"input": np.zeros((size, 4), np.float32)})["output"].shape == (size, 4)
    with pytest.raises(InputError):
        session.run({"input": np.zeros((int(low) - 1, 4), np.float32)})


def test_dynamic_batch_gives_the_models_answers(export):
    model = Function(lambda layer, x: torch.cat([layer(x), x]))
    bundle = export(model, "x:Nx4 | 1..8")
    assert str(bundle.manifest.outputs[0]) == "output: float32[2*N, 4]"
    session = edgekit.load(bundle)
    for size in (1, 2, 5, 8):
        x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
        np.testing.assert_allclose(session.run({"x": x.numpy()})["output"], model(x).detach(), rtol=1e-5, atol=1e-6)
    check(bundle, model)


def test_two_dynamic_inputs_share_a_dimension(export):
    model = Two()
    bundle = export(model, ["a:Nx4 | 1..8", "b:Nx4"])
    assert [str(spec) for spec in bundle.manifest.inputs] == ["b: float32[N, 4]", "a: float32[N, 4]"]
    assert [spec.name for spec in bundle.manifest.outputs] == ["sum", "parts_0", "parts_1_0"]
    check(bundle, model)


def test_two_inputs_by_position(export):
    model = Two()
    bundle = export(model, ["first:2x4", "second:2x4"])
    first, second = (np.random.default_rng(seed).random((2, 4), np.float32) for seed in (0, 1))
    outputs = edgekit.load(bundle).run({"first": first, "second": second})
    np.testing.assert_allclose(outputs["parts_1_0"], first)
    np.testing.assert_allclose(outputs["parts_0"], 2 * second)


def test_star_args_with_a_dynamic_batch(export):
    model = Variadic()
    check(export(model, ["x:Nx4 | 1..8", "y:Nx4"]), model)


def test_kwargs(export):
    model = Keywords()
    check(export(model, ["x:2x4", "y:2x4"]), model)
    with pytest.raises(ShapeError, match=r"takes x, y as \*\*kwargs, which cannot have dynamic dimensions"):
        export(model, ["x:Nx4 | 1..8", "y:Nx4"])


def test_dataclass_outputs(export):
    model = Structured()
    bundle = export(model, "x:1x4")
    assert [spec.name for spec in bundle.manifest.outputs] == ["logits", "hidden"]
    check(bundle, model)


@pytest.mark.parametrize("dtypes", ["int64 int64", "int32 bool"])
def test_integer_inputs(export, dtypes):
    ids, mask = dtypes.split()
    model = Tokens()
    bundle = export(model, [f"ids:Nx6@{ids} | 1..8", f"mask:Nx6@{mask}"])
    assert [spec.dtype for spec in bundle.manifest.inputs] == [ids, mask]
    check(bundle, model)


OUTPUTS = {
    "views of the input": lambda layer, x: (layer(x), x, x.reshape(-1)),
    "nothing but the input": lambda layer, x: x,
    "one tensor twice": lambda layer, x: (lambda y: (y, y))(layer(x)),
    "None among them": lambda layer, x: (layer(x), None, {"a": None, "b": x + 1}),
    "bool": lambda layer, x: layer(x) > 0,
    "class index": lambda layer, x: layer(x).argmax(-1),
    "a weight": lambda layer, x: (layer(x), layer.weight),
    "scalar": lambda layer, x: layer(x).sum(),
    "float64": lambda layer, x: layer(x).double(),
    "named as inner tensors": lambda layer, x: {"linear": layer(x).relu() + 1, "relu": layer(x)},
    "named as a weight": lambda layer, x: {"l_weight": layer(x)},
    "named as the input": lambda layer, x: {"x": layer(x)},
    "both sides of a branch": lambda layer, x: torch.cond(
        x.sum() > 0, lambda x: layer(x) + 1, lambda x: layer(x), (x,)
    ),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_of_many_kinds(export, case):
    model = Function(OUTPUTS[case])
    check(export(model, "x:2x4"), model)


@pytest.mark.parametrize("name", ["linear", "weight", "output"])
def test_inputs_named_as_inner_tensors(export, name):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    bundle = export(model, f"{name}:1x4")
    assert bundle.manifest.inputs[0].name == name
    check(bundle, model)
    assert compare_layers(bundle, load_model(model))


def test_deep_names_and_buffers(export):
    class Buffers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.arange(4.0))
            self.register_buffer("left_out", torch.ones(4) * 3, persistent=False)

        def forward(self, x):
            return x + self.kept * self.left_out

    model = Buffers()
    for depth in range(40):
        model = nn.Sequential(OrderedDict([(f"a_rather_long_name_at_depth_{depth}", model)]))
    check(export(model, "input:1x4"), model)


def test_float64_inputs(export):
    model = Function(lambda layer, x: layer(x.float()))
    check(export(model, "x:2x4@float64"), model)


def test_dropout_and_norms_are_exported_for_inference(export):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.9)).train()
    bundle = export(model, "input:2x4")
    assert all(part.training for part in model)
    check(bundle, model)


def test_an_unused_input_stays(export):
    class Unused(nn.Module):
        def forward(self, x, mask):
            return x * 2

    bundle = export(Unused(), ["x:1x4", "mask:1x4"])
    assert [spec.name for spec in bundle.manifest.inputs] == ["x", "mask"]


def data_dependent(layer, x):
    return layer(x) if x.sum() > 0 else x


def changes_input(layer, x):
    return layer(x.mul_(2))


REFUSED = {
    "control flow on data": (data_dependent, "x:1x4", ExportError, r"depends on the data at .*if x\.sum\(\) > 0"),
    "a fixed batch": (lambda _, x: x + torch.ones(4, 4), "x:Nx4 | 1..8", ShapeError, "does not run on x"),
    "one size fits": (
        lambda layer, x: layer(x.reshape(-1, 4, 4)[0]), "x:Nx4 | 4..8", ExportError, "works with N = 4 alone"
    ),
    "no tensor": (lambda layer, x: 3, "x:1x4", ExportError, "returns a int"),
    "random numbers": (lambda layer, x: torch.randn_like(x), "x:1x4", ExportError, "the same input differently"),
    "a changed input": (changes_input, "x:1x4", ExportError, "changes its input 'x' in place"),
    "nothing finite": (lambda layer, x: layer(x) / 0, "x:1x4", ExportError, "no finite value to compare"),
    "another shape": (lambda layer, x: layer(x), "x:1x5", ShapeError, r"does not run on x \[1, 5\]"),
    "no memory is so large": (lambda layer, x: x, "x:99999999999999x4", ShapeError, "choose smaller sizes"),
    "too many inputs": (lambda layer, x: x, ["x:1x4", "y:1x4"], ShapeError, "Give one --shape for each input"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_and_says_why(export, capfd, tmp_path, case):
    function, shapes, error, why = REFUSED[case]
    with pytest.raises(error, match=why):
        export(Function(function), shapes)
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.rglob("*.edge*"))


def test_a_changed_buffer_is_refused(export):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls.add_(1)
            return x

    model = Counts()
    with pytest.raises(ExportError, match="changes its buffer 'calls'"):
        export(model, "x:1x4")
    assert model.calls == 0


def test_a_dimension_that_the_model_fixes():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(2, 4))

        def forward(self, x):
            return x + self.table

    with pytest.raises(ExportError, match="works with N = 2 alone; write the number"):
        trace(Fixed(), parse_shapes("x:Nx4 | 2..8"))


@pytest.mark.parametrize("opset", [pytest.param(n, marks=() if n in (18, 24) else pytest.mark.slow) for n in OPSETS])
def test_every_opset_loads(export, graph, opset):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(144, 4), nn.Softmax(-1)
    )
    bundle = export(model, "x:Nx3x8x8 | 1..4", opset=opset)
    assert bundle.manifest.opsets["ai.onnx"] == opset
    content = graph(bundle)
    assert content.ir_version == bundle.manifest.ir_version <= 13
    onnxruntime.InferenceSession(content.SerializeToString(), providers=["CPUExecutionProvider"])
    check(bundle, model)


@pytest.mark.parametrize("opset", [17, 19, 25, 27, 0])
def test_opsets_that_are_refused(export, opset):
    with pytest.raises(InputError, match=f"opset {opset} is not supported; choose one of 18, 20"):
        export(nn.Linear(4, 4), "x:1x4", opset=opset)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_nothing_tells_of_the_exporting_machine(digits, precision):
    bundle = digits(precision)
    content = b"".join(path.read_bytes() for path in sorted(bundle.path.iterdir()))
    places = [
        Path(edgekit.__file__).parent,
        Path(edgekit.__file__).resolve().parents[2],
        Path.cwd(),
        *site.getsitepackages(),
    ]
    for text in (*map(str, places), str(Path.home()) + "/", "site-packages", ".py", "stack_trace", "Traceback"):
        assert text.encode() not in content, text


def test_two_exports_are_equal_to_the_byte(digits, tmp_path):
    first, second = digits("fp32"), edgekit.export("shvit_digits", "onnx", tmp_path)
    for name in ("model.onnx", "manifest.json", "samples.npz"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name


def test_the_node_names_of_the_program_stay(digits, graph):
    names = {name for node in graph(digits("fp32")).graph.node for name in node.output}
    assert {"conv2d", "relu", "softmax", "logits"} <= names


def test_example_inputs_take_the_smallest_size_or_two():
    shapes = parse_shapes(["a:NxT@int64 | N=1..8, T=3..9", "b:Nx4"])
    small, large = example_inputs(shapes), example_inputs(shapes, large=True)
    assert [tuple(t.shape) for t in small.values()] == [(1, 3), (1, 4)]
    assert [tuple(t.shape) for t in large.values()] == [(2, 3), (2, 4)]
    assert set(small["a"].unique().tolist()) <= {0, 1}
    assert torch.equal(example_inputs(shapes, seed=1)["b"], example_inputs(shapes, seed=1)["b"])


def test_a_graph_that_onnxsim_cannot_take(monkeypatch):
    def fails(_):
        raise RuntimeError("no such op")

    monkeypatch.setattr("onnxsim.simplify", fails)
    shapes = parse_shapes("x:1x4")
    exported = convert(trace(nn.Linear(4, 4), shapes), shapes, names=["y"])
    assert [spec.name for spec in exported.outputs] == ["y"]
