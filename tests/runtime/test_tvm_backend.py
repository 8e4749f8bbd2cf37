"""Sessions on tvm bundles: native code runs only where it is asked for, on the processor it was made for."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit.errors import BundleError, InputError, MissingDependencyError, UnknownNameError
from edgekit.runtime import tvm_backend
from edgekit.runtime.bundle import Bundle, BundleWriter
from edgekit.runtime.kernel_library import Host, NodeKernel, this_host

tvm = pytest.importorskip("tvm", reason="the tvm extra is not installed")

BUILD = {"schema": 1, "arch": "x86-64-v3", "machine": "x86_64", "system": "linux", "features": ["avx2"], "kernels": []}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    torch.manual_seed(0)
    return edgekit.export(Small().eval(), "tvm", tmp_path_factory.mktemp("tvm"), shapes="x:64x512")


@pytest.fixture
def rebuilt(bundle, tmp_path):
    """A copy of the bundle with another `build.json`."""

    def make(description: object) -> Bundle:
        with BundleWriter(tmp_path / "copy-tvm.edge") as writer:
            for name, entry in bundle.manifest.files.items():
                content = json.dumps(description).encode() if name == "build.json" else bundle.read(name)
                writer.add(name, entry.role).write_bytes(content)
            return writer.finish(bundle.manifest, {})

    return make


class TestConsent:
    def test_native_code_runs_only_where_asked_for(self, bundle):
        with pytest.raises(InputError, match=r"native code.*backend='tvm'.*--backend tvm"):
            edgekit.load(bundle)

    def test_another_backend(self, bundle):
        with pytest.raises(InputError, match="onnxruntime cannot run Small-tvm"):
            edgekit.load(bundle, backend="onnxruntime")
        with pytest.raises(UnknownNameError, match="onnxruntime, tvm"):
            edgekit.load(bundle, backend="abacus")

    @pytest.mark.parametrize("kernels", ["/no/such/library.so", "portabel", Path("kernels")], ids=str)
    def test_kernels_of_another_library_are_refused(self, bundle, kernels):
        with pytest.raises(InputError, match="has its kernels in its library"):
            edgekit.load(bundle, backend="tvm", kernels=kernels)
        for accepted in ("auto", "portable"):
            assert edgekit.load(bundle, backend="tvm", kernels=accepted).backend == "tvm-cpu"

    def test_without_tvm(self, bundle, monkeypatch):
        monkeypatch.setitem(sys.modules, "tvm", None)
        with pytest.raises(MissingDependencyError, match=r"edgekit\[tvm\]"):
            edgekit.load(bundle, backend="tvm")


class TestRuns:
    @pytest.mark.parametrize("threads", [1, 2, None])
    def test_answers(self, bundle, threads):
        session = edgekit.load(bundle, backend="tvm", threads=threads)
        for inputs, expected in bundle.samples():
            np.testing.assert_allclose(session.run(inputs)["output"], expected["output"], atol=1e-5)

    def test_inputs_of_any_layout(self, bundle):
        session = edgekit.load(bundle, backend="tvm", threads=1)
        inputs, expected = next(iter(bundle.samples()))
        fortran = np.asfortranarray(inputs["x"])
        raw = np.empty(inputs["x"].nbytes + 4, np.uint8)
        misaligned = raw[4:].view(np.float32).reshape(inputs["x"].shape)
        misaligned[:] = inputs["x"]
        for x in (fortran, misaligned, inputs["x"].copy()[::-1][::-1]):
            np.testing.assert_allclose(session.run({"x": x})["output"], expected["output"], atol=1e-5)

    def test_wrong_inputs_are_refused(self, bundle):
        session = edgekit.load(bundle, backend="tvm")
        with pytest.raises(InputError, match="dtype"):
            session.run({"x": np.zeros((64, 512))})
        with pytest.raises(InputError, match="shape"):
            session.run({"x": np.zeros((63, 512), np.float32)})

    def test_each_session_has_its_threads(self, bundle):
        sizes = tvm.get_global_func("runtime.NumThreads")
        sessions = {count: edgekit.load(bundle, backend="tvm", threads=count) for count in (1, 2)}
        x = sessions[1].random_inputs()
        for count in (1, 2, 1):
            sessions[count].run(x)
            assert sizes() == count

    def test_calls_from_many_threads(self, bundle):
        session = edgekit.load(bundle, backend="tvm", threads=1)
        inputs = [session.random_inputs(seed=seed) for seed in range(8)]
        alone = [session.run(each)["output"] for each in inputs]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda each: session.run(each)["output"], inputs * 4))
        for index, output in enumerate(together):
            np.testing.assert_array_equal(output, alone[index % 8])

    def test_results_are_the_callers(self, bundle):
        session = edgekit.load(bundle, backend="tvm", threads=1)
        first = session.run(session.random_inputs(seed=1))["output"]
        kept = first.copy()
        session.run(session.random_inputs(seed=2))
        np.testing.assert_array_equal(first, kept)

    def test_packed(self, bundle, tmp_path):
        packed = bundle.pack(tmp_path / "small.edge.zip")
        inputs, expected = next(iter(packed.samples()))
        got = edgekit.load(packed, backend="tvm").run(inputs)
        np.testing.assert_allclose(got["output"], expected["output"], atol=1e-5)

    def test_an_export_in_the_place_of_a_loaded_one(self, tmp_path):
        sessions = []
        for bias in (1.0, 2.0):
            model = nn.Linear(3, 2)
            nn.init.zeros_(model.weight)
            nn.init.constant_(model.bias, bias)
            made = edgekit.export(model, "tvm", tmp_path, shapes="x:1x3", name="same")
            sessions.append(edgekit.load(made, backend="tvm", threads=1))
        x = np.ones((1, 3), np.float32)
        assert [float(session.run({"x": x})["output"][0, 0]) for session in sessions] == [1.0, 2.0]

    def test_op_times(self, bundle):
        session = edgekit.load(bundle, backend="tvm", threads=1)
        times = session.op_times(session.random_inputs(), runs=3)
        assert all(len(entry["microseconds"]) == 3 for entry in times)
        assert any("matmul" in entry["op"] for entry in times)


class TestMachine:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"machine": "riscv64"}, "code for riscv64 linux, this is"),
            ({"features": ["avx10_of_2040"]}, "lacks avx10_of_2040"),
            ({"schema": 2}, "schema 2"),
            ({"kernels": [{}]}, "damaged"),
            ({"features": None}, "damaged"),
            ({"arch": 7}, "damaged"),
        ],
        ids=["machine", "features", "schema", "kernels", "no-features", "arch"],
    )
    def test_refused_before_anything_is_loaded(self, rebuilt, monkeypatch, change, message):
        monkeypatch.setattr(tvm_backend.TvmSession, "_load", lambda self: pytest.fail("the library was loaded"))
        host = this_host()
        description = BUILD | {"machine": host.machine, "features": []} | change
        with pytest.raises(BundleError, match=message):
            edgekit.load(rebuilt(description), backend="tvm")

    def test_description_that_is_no_object(self, rebuilt):
        with pytest.raises(BundleError, match="damaged"):
            edgekit.load(rebuilt([1]), backend="tvm")

    def test_fitting_host(self):
        tvm_backend.check_host(BUILD, Host("x86_64", "linux", frozenset({"avx2", "fma"}), "0", None), "it")


def test_library_that_is_none(bundle, tmp_path):
    with BundleWriter(tmp_path / "bad-tvm.edge") as writer:
        for name, entry in bundle.manifest.files.items():
            writer.add(name, entry.role).write_bytes(b"no library" if name == "model.so" else bundle.read(name))
        bad = writer.finish(bundle.manifest, {})
    with pytest.raises(BundleError, match=r"cannot load bad-tvm\.edge/model\.so"):
        edgekit.load(bad, backend="tvm")


class TestRunErrors:
    KERNELS = (NodeKernel("node", "edgekit::KernelLinearAttention", "tvm x86-64-v3", "edgekit_kla_f32"),)
    MISMATCH = (
        "Mismatched k.shape[2] on argument #1 when calling:\n  `{}(q: Tensor(...))`,\n  expected to match q.shape[2]"
    )

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("KernelLinearAttention needs a hat\n  at line 7", "KernelLinearAttention needs a hat"),
            (
                MISMATCH.format("edgekit_kla_f32"),
                "KernelLinearAttention got tensors that do not fit together: Mismatched k.shape[2] on argument #1, "
                "expected to match q.shape[2]",
            ),
            (
                MISMATCH.format("add7"),
                "TVM could not run it: Mismatched k.shape[2] on argument #1, expected to match q.shape[2], in add7",
            ),
            ("Check failed: x", "TVM could not run it: Check failed: x"),
            ("", "TVM could not run it: no reason given"),
        ],
        ids=["check", "kernel", "function", "other", "none"],
    )
    def test_texts(self, text, said):
        assert tvm_backend.run_error(text, self.KERNELS, "it") == said
