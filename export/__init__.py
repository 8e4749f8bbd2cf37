"""How a model becomes an artifact: one file per target, plus quantization. `edgekit.export(...)` is the entry.

The package carries the name of the function that the public API promises, so the module itself can be called:
`edgekit.export("shvit_s1", "onnx", "out")` and `from edgekit.export.shapes import parse_shape` both work. Importing it
loads neither torch nor onnx; a call does.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import MissingDependencyError

if TYPE_CHECKING:
    import torch

    from edgekit.runtime.bundle import Bundle
    from edgekit.runtime.preprocess import ImagePreprocessing

TARGETS = ("onnx", "tvm", "coreml")
REQUIRED = ("torch", "onnx", "onnxscript", "onnxsim", "safetensors")

__all__ = ["TARGETS", "export"]


def export(
    model: str | Path | torch.nn.Module,
    target: str,
    out: str | Path,
    *,
    precision: str | None = None,
    shapes: str | Sequence[str] | None = None,
    weights: str | Path | None = None,
    calibration: str | Path | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | ImagePreprocessing | None = None,
    name: str | None = None,
    opset: int | None = None,
    seed: int = 0,
    check: bool = True,
    tolerance: float | None = None,
    arch: str | None = None,
    tune: int = 0,
    kernels: Sequence[str] | None = None,
    deployment_target: str | None = None,
    layout: str = "standard",
    input: str | None = None,
    progress: Callable[[str], None] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Bundle:
    """Export a model to a bundle `out/NAME-TARGET[-PRECISION].edge`, checked against PyTorch before it appears.

    Args:
        model: a zoo name, an `nn.Module` (a copy is exported: yours stays as it is), `package.module:factory`, a path
            to a `.pt2` program, or a folder as Hugging Face's `save_pretrained` writes it (needs transformers).
        target: `onnx`; `coreml`: a package for Apple's Core ML, which is checked here on a reference runtime, since
            Apple's runs on its own systems alone; `tvm`: one native library for one kind of processor, for builds ahead
            of time, slower than onnx (the README has the ratios).
        out: the folder to put the bundle into. A bundle of the same name there is replaced, at once and whole.
        precision: None takes `fp16` for coreml, else `fp32`. onnx: `fp32`; `fp16` (weights and activations in half
            precision, but softmax, norms, means and sums in fp32); `int8` (static QDQ, needs `calibration`); language
            models `fp32` or `int4` (weights of four bits). coreml: `fp16`, `fp32`, and weights of few bits that compute
            in fp16: `int8` (per channel), `int4` (per 32 values, from iOS 18), `palette4`, `palette6`, `palette8` (a
            table of 16, 64 or 256 values per tensor).
        shapes: one string per input, `NAME:DIMxDIMx..` with `@dtype` after it for anything but float32, and
            `| 1..8` or `| N=1..8, S=16..512` for the ranges of named dimensions: `image:Nx3x224x224 | 1..8`. Indices
            say what they point into, a dynamic dimension of any input or a number: `vertex:P@int64<V`,
            `ids:1xN@int64<50257`; drawn inputs then keep to it, and sessions check it. `| S=192/224/256` lists the only
            sizes (Core ML can prepare for each of them, and runs a range on fewer of its processors). Zoo models
            default to batch 1 at their own size, or that of the override `img_size`; models without images to dynamic
            sizes.
        weights: a file or folder with weights for a zoo model, or `random`; None takes the shipped weights, or random
            ones from `seed` where none are shipped or they do not fit the overrides (the manifest says which).
        calibration: int8 only: a folder of images, an .npz, the name `digits`, or `random` (for timing only); None
            takes the zoo model's own data set.
        labels: names of the classes, in order.
        preprocessing: how an image becomes the (first) input, as an `ImagePreprocessing` or its JSON form; zoo models
            bring their own. Without one, `run` takes arrays only.
        name: the bundle's name; default the zoo name, the factory's, the class's or the file's.
        opset: the ONNX opset; default 20, with IR version 10.
        seed: for random weights and random sample inputs.
        check: compare the finished artifact with PyTorch and refuse to leave one that differs.
        tolerance: the largest relative L2 error of an output that passes the check, recorded in the bundle; None takes
            the table's for the precision.
        arch: tvm only: the processor to compile for, `x86-64-v3`, `x86-64-v4` or `aarch64`; None takes this machine's
            best. A bundle for another machine is not checked, and its manifest says so.
        tune: tvm only: how many candidates to measure on this machine in search of faster code; 0 takes the likeliest.
        kernels: names of archs (as for `arch`): put the kernels of edgekit's own ops that the model uses into the
            bundle, as objects and C sources for programs without Python. None does so in a tvm bundle, for its arch.
        deployment_target: coreml only: the oldest system that shall run the package, `iOS16`, `iOS17` or `iOS18` (macOS
            13, 14, 15); None takes the oldest one that the precision and the model allow.
        layout: coreml only: `standard`, or `ane` to rewrite the model for the layout that the Neural Engine prefers.
        input: coreml only: `image` makes the first input a Core ML image with levels of 0 to 255, whose normalisation
            the package does itself; `tensor` leaves it an array. None takes an image where the preprocessing allows.
        progress: called with the name of each step as it starts.
        overrides: keyword arguments for a zoo model's constructor, such as `{"num_classes": 10}`; for a folder with a
            language model of the families gemma2, llama and qwen2 its attention and context, such as
            `{"attention": "block", "budget": 1024, "context": 8192}`.

    Returns:
        The opened bundle.

    Raises:
        UnknownNameError: an unknown model, target or precision.
        ShapeError: a shape that does not parse or does not fit the model.
        WeightsError: weights that do not fit.
        ExportError: the model could not be converted, or the result differs from PyTorch. Nothing is left behind.
        MissingDependencyError: the extra `export` (or `coreml`, or for tvm and kernels `tvm`) is not installed.
    """
    _require_extra()
    from edgekit.export.api import export_model

    return export_model(
        model,
        target,
        Path(out),
        precision=precision,
        shapes=shapes,
        weights=weights,
        calibration=calibration,
        labels=labels,
        preprocessing=preprocessing,
        name=name,
        opset=opset,
        seed=seed,
        check=check,
        tolerance=tolerance,
        arch=arch,
        tune=tune,
        kernels=kernels,
        deployment_target=deployment_target,
        layout=layout,
        input_kind=input,
        progress=progress,
        overrides=overrides,
    )


def _require_extra() -> None:
    for package in REQUIRED:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "export", "exporting a model")


class _CallablePackage(types.ModuleType):
    """Lets `edgekit.export` be both the package and the function of that name."""

    __call__ = staticmethod(export)


sys.modules[__name__].__class__ = _CallablePackage
