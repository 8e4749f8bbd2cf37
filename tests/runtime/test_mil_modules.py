"""PyTorch modules through coremltools and back: 86 small ones, in fp32 and fp16, for iOS16, 17 and 18.

They share a few conversions: one model holds them all, and each test looks at the outputs of one module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgekit.runtime.mil import MilInterpreter, load_program
from edgekit.runtime.mil.ops import KERNELS

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

T = torch.Tensor
IMAGE, WORDS, LINE = (2, 6, 9, 11), (2, 7, 12), (2, 6, 13)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: T) -> Any:
        return self.function(x)


class Attention(nn.Module):
    """Multi-head attention written out, or with PyTorch's one call."""

    def __init__(self, size: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.heads, self.fused = heads, fused

    def forward(self, x: T) -> T:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5, -1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, c))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: T) -> T:
        return x + self.inner(x)


class LinearAttention(nn.Module):
    def forward(self, x: T) -> T:
        q, k = torch.relu(x) / 4, torch.relu(x.flip(1)) / 8
        return q @ (k.transpose(1, 2) @ x) / (q @ k.sum(1)[:, :, None] + 1e-3)


def modules() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    table: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "conv3x3": (nn.Conv2d(6, 8, 3, padding=1), IMAGE),
        "conv-stride": (nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), IMAGE),
        "conv-depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), IMAGE),
        "conv-groups": (nn.Conv2d(6, 4, (3, 2), groups=2, dilation=(2, 1)), IMAGE),
        "conv1x1": (nn.Conv2d(6, 10, 1), IMAGE),
        "conv1d": (nn.Conv1d(6, 5, 4, stride=3, padding=2), LINE),
        "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6)),
        "conv-transpose": (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), IMAGE),
        "conv-transpose1d": (nn.ConvTranspose1d(6, 4, 4, stride=2), LINE),
        "conv-bn-relu": (nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), IMAGE),
        "linear": (nn.Linear(12, 5), WORDS),
        "linear-2d": (nn.Linear(12, 5, bias=False), (3, 12)),
        "mlp": (nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)), WORDS),
        "attention": (Attention(12, 3, fused=False), WORDS),
        "attention-fused": (Attention(12, 3, fused=True), WORDS),
        "linear-attention": (LinearAttention(), WORDS),
        "transformer": (Residual(nn.Sequential(nn.LayerNorm(12), Attention(12, 2, fused=True))), WORDS),
        "squeeze-excite": (Residual(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Sigmoid())), IMAGE),
        "batch-norm": (nn.BatchNorm2d(6), IMAGE),
        "layer-norm": (nn.LayerNorm((11,), eps=1e-3), IMAGE),
        "group-norm": (nn.GroupNorm(3, 6, eps=1e-3), IMAGE),
        "group-norm-1": (nn.GroupNorm(1, 6, eps=1e-3), IMAGE),
        "instance-norm": (nn.InstanceNorm2d(6, affine=True, eps=1e-3), IMAGE),
        # coremltools 9.0 divides by the largest magnitude before it adds eps, and so multiplies eps by its square.
        "rms-norm": (nn.RMSNorm(12, eps=1e-12), WORDS),
        "max-pool": (nn.MaxPool2d(3, 2, padding=1), IMAGE),
        "max-pool-ceil": (nn.MaxPool2d(2, 2, ceil_mode=True), IMAGE),
        "avg-pool": (nn.AvgPool2d(3, 2, padding=1), IMAGE),
        "avg-pool-excluded": (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), IMAGE),
        "global-pool": (nn.AdaptiveAvgPool2d(1), IMAGE),
        "pixel-shuffle": (nn.PixelShuffle(2), (1, 8, 3, 5)),
        "pixel-unshuffle": (nn.PixelUnshuffle(2), (1, 2, 4, 6)),
        "up-nearest": (nn.Upsample(scale_factor=2, mode="nearest"), IMAGE),
        "up-bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
        "up-aligned": (nn.Upsample(size=(12, 20), mode="bilinear", align_corners=True), IMAGE),
        "pad-reflect": (nn.ReflectionPad2d((1, 2, 3, 0)), IMAGE),
        "pad-replicate": (nn.ReplicationPad2d((1, 2, 3, 0)), IMAGE),
        "pad-constant": (nn.ConstantPad2d((1, 2, 0, 3), 0.5), IMAGE),
        "prelu": (nn.PReLU(6, init=0.3), IMAGE),
        "channel-softmax": (nn.Softmax(dim=1), IMAGE),
        "log-softmax": (nn.LogSoftmax(dim=-1), WORDS),
    }
    for name, activation in {
        "relu6": nn.ReLU6(),
        "gelu": nn.GELU(),
        "silu": nn.SiLU(),
        "elu": nn.ELU(0.7),
        "leaky": nn.LeakyReLU(0.2),
        "hardswish": nn.Hardswish(),
        "hardsigmoid": nn.Hardsigmoid(),
        "softplus": nn.Softplus(),
        "mish": nn.Mish(),
        "hardtanh": nn.Hardtanh(-0.5, 0.75),
        "softsign": nn.Softsign(),
        "sigmoid": nn.Sigmoid(),
        "tanh": nn.Tanh(),
    }.items():
        table[name] = (activation, WORDS)
    functions: dict[str, tuple[Callable[[T], Any], tuple[int, ...]]] = {
        "arithmetic": (lambda x: (x * 2 - 1) / (x.abs() + 0.5) + x**2, WORDS),
        "trigonometry": (lambda x: torch.sin(x) * torch.cos(x) + torch.atan(x), WORDS),
        "exp-log": (lambda x: torch.log(torch.exp(x) + 1), WORDS),
        "roots": (lambda x: torch.sqrt(x.abs() + 1) + torch.rsqrt(x.abs() + 1), WORDS),
        "rounding": (lambda x: torch.floor(x) + torch.ceil(x) * 2 + torch.round(x) * 3, WORDS),
        "clamp": (lambda x: x.clamp(-0.3, 0.4), WORDS),
        "where": (lambda x: torch.where(x > 0, x, x * 0.1), WORDS),
        "masked-fill": (lambda x: torch.softmax(x.masked_fill(x < -1, -1e4), -1), WORDS),
        "minimum": (lambda x: torch.minimum(x, x.flip(-1)) + torch.maximum(x, x.flip(1)), WORDS),
        "reductions": (lambda x: x.sum(1) + x.mean(1) + x.amax(1) + x.amin(1), WORDS),
        "variance": (lambda x: x.var(-1, unbiased=False), WORDS),
        "vector-norm": (lambda x: torch.linalg.vector_norm(x, dim=-1), WORDS),
        "normalize": (lambda x: F.normalize(x, dim=-1), WORDS),
        "log-sum-exp": (lambda x: torch.logsumexp(x, -1), WORDS),
        "argmax": (lambda x: x.argmax(-1), WORDS),
        "topk": (lambda x: x.topk(3, -1)[0], WORDS),
        "sort": (lambda x: x.sort(-1)[0], WORDS),
        "cumsum": (lambda x: x.cumsum(1), WORDS),
        "cat-chunk": (lambda x: torch.cat([part * (i + 1) for i, part in enumerate(x.chunk(3, -1))], 1), WORDS),
        "stack-split": (lambda x: torch.stack(x.split(4, -1), 1), WORDS),
        "slices": (lambda x: x[:, 1:-1, ::2] + x[:, 2:, 1::2], WORDS),
        "select": (lambda x: x[:, 3] * x[:, -1], WORDS),
        "gather": (lambda x: torch.gather(x, 1, torch.tensor([[[0] * 12, [3] * 12]] * 2)), WORDS),
        "index-select": (lambda x: x[:, torch.tensor([4, 0, 2])], WORDS),
        "unfold": (lambda x: F.unfold(x, 3, padding=1, stride=2), IMAGE),
        "einsum": (lambda x: torch.einsum("bnc,bmc->bnm", x, x.flip(1)), WORDS),
        "triangle": (lambda x: torch.tril(x[:, :, :7]) + torch.triu(x[:, :, :7], 1) * 2, WORDS),
        "expand": (lambda x: x[:, :, None].expand(2, 7, 3, 12) * 1.5, WORDS),
        "repeat": (lambda x: x.repeat(1, 2, 1), WORDS),
        "roll": (lambda x: torch.roll(x, 2, 1), WORDS),
        "window-partition": (
            lambda x: x[:, :, :8, :8].reshape(2, 6, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).flatten(0, 2),
            IMAGE,
        ),
        "glu": (lambda x: F.glu(x, -1), WORDS),
        "rotary": (
            lambda x: (
                x * torch.cos(torch.arange(7.0))[:, None]
                + torch.cat([-x[..., 6:], x[..., :6]], -1) * torch.sin(torch.arange(7.0))[:, None]
            ),
            WORDS,
        ),
    }
    table |= {name: (Apply(function), shape) for name, (function, shape) in functions.items()}
    return table


class Battery(nn.Module):
    """All modules, each on an input of its own."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *inputs: T) -> tuple[T, ...]:
        return tuple(part(x) for part, x in zip(self.parts, inputs, strict=True))


TABLE = modules()
SETTINGS = [("iOS16", "fp32"), ("iOS18", "fp16")]
SLOW_SETTINGS = [("iOS16", "fp16"), ("iOS17", "fp16")]
INTEGER = {"argmax"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Callable[[str, str], dict[str, Any]]:
    """For a target and precision: per module its input, PyTorch's output and the package's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools as ct

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Battery([module for module, _ in TABLE.values()]).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.data = torch.randn(module.num_features) / 2
            module.running_var.data = torch.rand(module.num_features) + 0.5
    inputs = [rng.standard_normal(shape).astype(np.float16).astype(np.float32) for _, shape in TABLE.values()]
    tensors = tuple(map(torch.tensor, inputs))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [value.numpy() for value in model(*tensors)]
        exported = torch.export.export(model, tensors).run_decompositions({})
    done: dict[tuple[str, str], dict[str, Any]] = {}

    def convert(target: str, precision: str) -> dict[str, Any]:
        if (target, precision) not in done:
            package = tmp_path_factory.mktemp("battery") / "battery.mlpackage"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = ct.convert(
                    exported,
                    convert_to="mlprogram",
                    minimum_deployment_target=getattr(ct.target, target),
                    compute_precision=ct.precision.FLOAT32 if precision == "fp32" else ct.precision.FLOAT16,
                    outputs=[ct.TensorType(name=f"output_{index}") for index in range(len(TABLE))],
                    skip_model_load=True,
                )
                made.save(str(package))
            interpreter = MilInterpreter(load_program(package))
            names = [value.name for value in interpreter.inputs]
            given = dict(zip(names, inputs, strict=True))
            rounded = list(interpreter.run(given).values())
            done[target, precision] = {
                "interpreter": interpreter,
                "results": dict(zip(TABLE, zip(expected, rounded, strict=True), strict=True)),
            }
        return done[target, precision]

    return convert


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize(
    "setting",
    [pytest.param(s, id="-".join(s)) for s in SETTINGS]
    + [pytest.param(s, id="-".join(s), marks=pytest.mark.slow) for s in SLOW_SETTINGS],
)
def test_module(name, setting, converted):
    want, got = converted(*setting)["results"][name]
    assert got.shape == want.shape
    if name in INTEGER:
        np.testing.assert_array_equal(got, want)
        return
    error = np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want)
    assert error < (2e-6 if setting[1] == "fp32" else 2e-3), f"relative error {error:.1e}"


def test_the_battery_meets_most_ops(converted):
    """So that ops are tested as the converter writes them, and not only as the builder does."""
    used = {op.op_type for s in SETTINGS for op in converted(*s)["interpreter"].function.walk()} - {"const"}
    assert used <= set(KERNELS)
    assert len(used) >= 60
