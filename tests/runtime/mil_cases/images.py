"""Resizing and resampling, quantization, recurrent layers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F

from .case import RNG, Case, T, halves, normal, unary


def images() -> Iterator[Case]:
    image = normal(2, 3, 4, 6)
    up = lambda x: F.interpolate(x, (8, 18), mode="nearest")  # noqa: E731
    yield unary("upsample_nearest_neighbor", up, image, scale_factor_height=2, scale_factor_width=3)
    less = lambda x: F.interpolate(x, (7, 7), mode="nearest")  # noqa: E731
    factor = np.float32(0.7)  # 6.9999999 as a float64: the floor of 10 times it depends on the width
    yield Case(
        "upsample_nearest_neighbor",
        {"x": normal(1, 2, 10, 10)},
        less,
        {"scale_factor_height": factor, "scale_factor_width": factor},
        label="fraction",
    )
    down = lambda x: F.interpolate(x, (3, 7), mode="nearest")  # noqa: E731
    yield unary("resize_nearest_neighbor", down, image, target_size_height=3, target_size_width=7)
    for align in (False, True):
        expected = lambda x, a=align: F.interpolate(x, (8, 9), mode="bilinear", align_corners=a)  # noqa: E731
        yield Case(
            "upsample_bilinear",
            {"x": image},
            expected,
            {"scale_factor_height": np.float32(2), "scale_factor_width": np.float32(1.5), "align_corners": align},
            label=f"align-{align}",
        )
        mode = "STRICT_ALIGN_CORNERS" if align else "UNALIGN_CORNERS"
        expected = lambda x, a=align: F.interpolate(x, (3, 11), mode="bilinear", align_corners=a)  # noqa: E731
        yield Case(
            "resize_bilinear",
            {"x": image},
            expected,
            {"target_size_height": 3, "target_size_width": 11, "sampling_mode": mode},
            label=mode,
        )
        yield Case(
            "resize",
            {"x": image},
            expected,
            {
                "shape": np.array([3, 11], np.int32),
                "resized_dims": np.uint32(2),
                "sampling_mode": mode,
                "interpolation_mode": "LINEAR",
            },
            label=mode,
        )
    ramp = np.array([0, 1], np.float32).reshape(1, 1, 1, 2)
    for mode, points in (  # the examples of coremltools' documentation
        ("DEFAULT", [0, 0.4, 0.8, 1, 1]),
        ("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9]),
        ("ALIGN_CORNERS", [0, 0.25, 0.5, 0.75, 1]),
    ):
        expected = lambda x, p=points: torch.tensor(p, dtype=x.dtype).reshape(1, 1, 1, 5)  # noqa: E731
        yield Case(
            "resize_bilinear",
            {"x": ramp},
            expected,
            {"target_size_height": 1, "target_size_width": 5, "sampling_mode": mode},
            label=mode,
        )
    grid = halves(2.6 * RNG.random((2, 5, 7, 2)) - 1.3)
    modes = {"constant": "zeros", "border": "border", "reflection": "reflection", "symmetric": "reflection"}
    for padding, name in modes.items():
        align = padding != "symmetric"
        for sampling in ("bilinear", "nearest"):
            expected = lambda x, coordinates, s=sampling, n=name, a=align: F.grid_sample(x, coordinates, s, n, a)  # noqa: E731
            yield Case(
                "resample",
                {"x": image, "coordinates": grid},
                expected,
                {
                    "sampling_mode": sampling,
                    "padding_mode": padding,
                    "padding_value": np.float32(0),
                    "align_corners": align,
                    "coordinates_mode": "normalized_minus_one_to_one",
                },
                label=f"{padding}-{sampling}",
            )
    matrix = np.array([[0.75, -0.5, 0.25, 0.5, 1, -0.25]], np.float32)

    def warped(x: T, transform_matrix: T) -> T:
        theta = transform_matrix.reshape(1, 2, 3).expand(2, 2, 3)
        return F.grid_sample(x, F.affine_grid(theta, [2, 3, 5, 7], True), align_corners=True)

    yield Case(
        "affine",
        {"x": image, "transform_matrix": matrix},
        warped,
        {
            "output_height": 5,
            "output_width": 7,
            "sampling_mode": "bilinear",
            "padding_mode": "constant",
            "padding_value": np.float32(0),
            "coordinates_mode": "normalized_minus_one_to_one",
            "align_corners": True,
        },
    )


def quantized() -> Iterator[Case]:
    scale, zero = np.array([0.25, 0.5, 0.125], np.float32), np.array([3, -2, 0], np.int8)
    x = normal(2, 3, 5) * 9

    def quantize(input: T) -> T:
        steps = torch.round(input / torch.tensor(scale)[:, None]) + torch.tensor(zero)[:, None]
        return steps.clip(-128, 127).to(torch.int8)

    yield Case(
        "quantize", {"input": x}, quantize, {"scale": scale, "zero_point": zero, "axis": 1, "output_dtype": "int8"}
    )
    levels = RNG.integers(-128, 128, (2, 3, 5)).astype(np.int8)

    def dequantize(input: T) -> T:
        shape = (1, 3, 1)
        return (input.float() - torch.tensor(zero).float().reshape(shape)) * torch.tensor(scale).reshape(shape)

    yield Case("dequantize", {"input": levels}, dequantize, {"scale": scale, "zero_point": zero, "axis": 1})
    unsigned = RNG.integers(0, 256, (4, 3)).astype(np.uint8)
    yield Case(
        "dequantize", {"input": unsigned}, lambda input: input.float() * 0.5, {"scale": np.float32(0.5)}, label="scalar"
    )


def recurrent() -> Iterator[Case]:
    steps, batch, size, hidden = 4, 2, 3, 5
    x = normal(steps, batch, size)

    def weights(gates: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return normal(gates * hidden, size), normal(gates * hidden, hidden), normal(gates * hidden)

    def to_torch(module: torch.nn.Module, parts: list[tuple[np.ndarray, ...]], gates: int) -> torch.nn.Module:
        """Core ML has the cell gate last, PyTorch third."""
        order = np.r_[0:2, 3, 2] if gates == 4 else np.r_[0:1]
        for suffix, (ih, hh, bias) in zip(("", "_reverse"), parts, strict=False):
            for name, value in (("weight_ih", ih), ("weight_hh", hh), ("bias_ih", bias), ("bias_hh", bias * 0)):
                ordered = value.reshape(gates, hidden, -1)[order].reshape(value.shape)
                getattr(module, f"{name}_l0{suffix}").data = torch.tensor(ordered)
        return module

    single = weights(1)
    initial = normal(batch, hidden)

    def rnn(x: T, initial_h: T) -> tuple[T, T]:
        module = to_torch(torch.nn.RNN(size, hidden), [single], 1).to(x.dtype)
        outputs, last = module(x, initial_h[None])
        return outputs.detach(), last[0].detach()

    names = ("weight_ih", "weight_hh", "bias")
    yield Case(
        "rnn", {"x": x, "initial_h": initial}, rnn, {**dict(zip(names, single, strict=True)), "output_sequence": True}
    )
    for directions in (1, 2):
        parts = [weights(4) for _ in range(directions)]
        states = {"initial_h": normal(batch, directions * hidden), "initial_c": normal(batch, directions * hidden)}

        def lstm(x: T, initial_h: T, initial_c: T, parts: list = parts, d: int = directions) -> tuple[T, T, T]:
            module = to_torch(torch.nn.LSTM(size, hidden, bidirectional=d == 2), parts, 4).to(x.dtype)
            split = (torch.stack(part.split(hidden, -1)) for part in (initial_h, initial_c))
            outputs, (h, c) = module(x, tuple(split))
            return outputs.detach(), torch.cat(list(h), -1).detach(), torch.cat(list(c), -1).detach()

        settings = dict(zip(names, parts[0], strict=True))
        if directions == 2:
            settings |= {f"{name}_back": value for name, value in zip(names, parts[1], strict=True)}
        yield Case(
            "lstm",
            {"x": x, **states},
            lstm,
            {**settings, "output_sequence": True, "direction": "bidirectional" if directions == 2 else "forward"},
            label=str(directions),
        )
