"""Exports that many tests look at, made once for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch

import edgekit
from edgekit.export.language_graphs import LanguageGraph
from edgekit.models import state_dict_sha256
from edgekit.runtime.profiler import ProfileComparison, profile_pair

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.runtime.bundle import Bundle

Digits = Callable[[str], "Bundle"]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Threads that wait for busy cores make small layers many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="package")
def translations_once() -> Iterator[None]:
    """Let onnxscript read its translations of torch's ops once, not for every export: that is most of a small one."""
    from onnxscript._framework_apis import torch_2_5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_2_5, "get_torchlib_ops", functools.cache(torch_2_5.get_torchlib_ops))
        yield


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The weights of the small models that tests build are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a lower precision gains in time is measured with a few runs; how well is the profiler's own test."""

    def measure(a: Bundle, b: Bundle, *, sizes: dict[str, int], **_: Any) -> ProfileComparison:
        return profile_pair(a, b, sizes=sizes, runs=24, warmup=2, threads=1, ops=False)

    monkeypatch.setattr("edgekit.export.cost.profile_pair", measure)


@pytest.fixture(scope="package")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """`digits("fp16")` is the bundle of shvit_digits at that precision; treat it as read-only."""
    made: dict[str, Bundle] = {}

    def get(precision: str) -> Bundle:
        if precision not in made:
            folder = tmp_path_factory.mktemp(precision)
            made[precision] = edgekit.export("shvit_digits", "onnx", folder, precision=precision)
        return made[precision]

    return get


@pytest.fixture
def graph() -> Callable[[Bundle], onnx.ModelProto]:
    """The ONNX model of a bundle."""

    def load(bundle: Bundle) -> onnx.ModelProto:
        return onnx.load_from_string(bundle.read(bundle.manifest.model_file))

    return load


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Bundle]:
    """`edgekit.export` to onnx in a folder of the test's own, after a fixed seed."""

    def make(model: Any, shapes: Any = None, **options: Any) -> Bundle:
        return edgekit.export(model, "onnx", tmp_path / "out", shapes=shapes, **options)

    return make


@pytest.fixture(scope="session")
def converted_once() -> Iterator[None]:
    """Tracing a decoder takes longer than all that is tested of it: the same one is converted once."""
    convert = LanguageGraph.convert
    made: dict[tuple[Any, ...], Any] = {}

    def converted(graph: LanguageGraph, opset: int) -> Any:
        key = (graph.part, opset, state_dict_sha256(graph.module.decoder), str(graph.module.decoder.config))
        if key not in made:
            made[key] = convert(graph, opset)
        model, weights, program = made[key]
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy, dict(weights), program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageGraph, "convert", converted)
        yield
