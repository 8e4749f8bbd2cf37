"""The onnxruntime library: one model file that runs portably without it and natively with it."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import edgekit
from edgekit.custom_ops.registry import functions
from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.kernels.headers import find_headers
from edgekit.kernels.native.toolchain import find_toolchain, run

BSA, KLA, SCAN = "BlockSparseAttention", "KernelLinearAttention", "SelectiveScan"
INPUTS = {
    BSA: ("q", "k", "v", "block_index"),
    KLA: ("q", "k", "v"),
    SCAN: ("u", "delta", "A", "B", "C", "D", "z"),
}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    BSA: {"block_q": 16, "block_k": 16, "causal": 1, "scale": 0.25, "softcap": 0.0, "window": 0},
    KLA: {"feature_map": "relu", "eps": 1e-6},
    SCAN: {"delta_softplus": 0},
}
RANKS = {BSA: (4, 4, 4, 4), KLA: (4, 4, 4), SCAN: (3, 3, 2, 3, 3, 1, 3)}
Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.xdist_group("native")


def model_bytes(
    op: str,
    attributes: dict[str, Any] | None = None,
    *,
    gate: bool = True,
    dtype: int = TensorProto.FLOAT,
    index_dtype: int = TensorProto.INT32,
    body: bool = True,
    shapes: list[Any] | None = None,
    out_shape: list[Any] | None = None,
) -> bytes:
    """A model of one node of `op`, every axis dynamic; with a function body unless `body` is False."""
    names = INPUTS[op][: 6 if op == SCAN and not gate else None]
    node = helper.make_node(op, names, ["out"], name="the_node", domain="edgekit", **(attributes or ATTRIBUTES[op]))
    inputs = []
    for i, name in enumerate(names):
        shape = shapes[i] if shapes else [f"{name}{axis}" for axis in range(RANKS[op][i])]
        inputs.append(helper.make_tensor_value_info(name, index_dtype if name == "block_index" else dtype, shape))
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("out", dtype, out_shape)])
    bodies = functions(20, graph.node) if body else []
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgekit", 1)]
    return helper.make_model(graph, functions=bodies, opset_imports=opsets, ir_version=10).SerializeToString()


def session(model: bytes, library: Path | None, threads: int = 1, profile: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(library))
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feed(op: str, arrays: Any) -> dict[str, Array]:
    return {name: array for name, array in zip(INPUTS[op], arrays, strict=False) if array is not None}


def small(op: str) -> list[Array]:
    generator = np.random.default_rng(0)
    if op == BSA:
        q, k, v = (generator.standard_normal((1, 2, 40, 8)).astype("float32") for _ in range(3))
        return [q, k, v, np.zeros((1, 1, 3, 2), np.int32)]
    if op == KLA:
        return [generator.standard_normal((1, 2, 20, d)).astype("float32") for d in (8, 8, 5)]
    shapes = [(1, 3, 20), (1, 3, 20), (3, 4), (1, 4, 20), (1, 4, 20), (3,), (1, 3, 20)]
    return [abs(generator.standard_normal(shape)).astype("float32") for shape in shapes]


def attributes_of(op: str, case: Any) -> dict[str, Any]:
    """A node's attributes from a case of the C interface."""
    if op == BSA:
        block_q, block_k, causal, window = case.ints[8:12]
        named = {"block_q": block_q, "block_k": block_k, "causal": causal, "window": window}
        return {**named, "scale": float(case.floats[0]), "softcap": float(case.floats[1])}
    if op == KLA:
        return {"feature_map": ("relu", "elu1", "identity")[case.ints[5]], "eps": float(case.floats[0])}
    return {"delta_softplus": case.ints[4]}


@pytest.mark.parametrize("threads", [1, 2])
def test_agrees_with_the_reference(built_library: Any, parity: Any, threads: int) -> None:
    case, expected = parity.make()
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(parity.dtype))
    gate = len(case.tensors) == 7 and case.tensors[6] is not None
    model = model_bytes(parity.op, attributes_of(parity.op, case), gate=gate, dtype=dtype, body=False)
    (out,) = session(model, built_library.library, threads).run(None, feed(parity.op, case.tensors))
    assert out.dtype == parity.dtype
    assert relative_l2(out, expected) <= tolerance(parity.op, parity.dtype, "native")


@pytest.mark.parametrize("op", [BSA, KLA, SCAN])
def test_one_file_runs_portably_and_natively(built_library: Any, tmp_path: Path, op: str) -> None:
    """With the library the profile shows the op's own node, without it the nodes of its body; the answers agree."""
    model, arrays = model_bytes(op), small(op)
    kinds, outputs = [], []
    for library in (None, built_library.library):
        running = session(model, library, profile=tmp_path / "profile")
        outputs.append(running.run(None, feed(op, arrays))[0])
        events = json.loads(Path(running.end_profiling()).read_text())
        nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        kinds.append({event["args"]["op_name"] for event in nodes})
    assert op not in kinds[0]
    assert kinds[1] == {op}
    assert relative_l2(outputs[1], outputs[0]) <= 2 * tolerance(op, "float32", "native")


def test_the_gate_is_optional(built_library: Any) -> None:
    arrays = small(SCAN)
    with_gate = session(model_bytes(SCAN), built_library.library).run(None, feed(SCAN, arrays))[0]
    without = session(model_bytes(SCAN, gate=False), built_library.library).run(None, feed(SCAN, arrays[:6]))[0]
    np.testing.assert_allclose(with_gate, without * arrays[6] / (1 + np.exp(-arrays[6])), rtol=1e-5)


def test_shapes_are_inferred_before_any_run(built_library: Any) -> None:
    kla = model_bytes(KLA, shapes=[["b", 2, "n", 8], ["b", 2, "n", 8], ["b", 2, "n", 5]], body=False)
    assert session(kla, built_library.library).get_outputs()[0].shape == ["b", 2, "n", 5]
    bsa = model_bytes(BSA, shapes=[["b", 2, "n", 8]] * 3 + [["b", 1, "r", "x"]], body=False)
    assert session(bsa, built_library.library).get_outputs()[0].shape == ["b", 2, "n", 8]
    shapes = [["b", 3, "l"]] * 2 + [[3, 4]] + [["b", 4, "l"]] * 2 + [[3], ["b", 3, "l"]]
    (half,) = session(
        model_bytes(SCAN, dtype=TensorProto.FLOAT16, shapes=shapes, body=False), built_library.library
    ).get_outputs()
    assert (half.shape, half.type) == (["b", 3, "l"], "tensor(float16)")


# ---- errors ----

BAD_NODES: dict[str, tuple[str, dict[str, Any], str]] = {
    "scale_missing": (BSA, {"block_q": 16}, "BlockSparseAttention takes a float attribute scale; the node has none"),
    "scale_zero": (BSA, {"scale": 0.0}, "BlockSparseAttention needs a scale that is finite and not 0, got 0"),
    "scale_nan": (BSA, {"scale": float("nan")}, "BlockSparseAttention needs a scale that is finite and not 0, got nan"),
    "scale_an_integer": (BSA, {"scale": 1}, "takes a float as attribute scale; the node has an integer"),
    "block_q_zero": (BSA, {"scale": 1.0, "block_q": 0}, "BlockSparseAttention needs block_q of at least 1, got 0"),
    "block_k_a_float": (
        BSA,
        {"scale": 1.0, "block_k": 16.0},
        "takes an integer as attribute block_k; the node has a float",
    ),
    "window_negative": (BSA, {"scale": 1.0, "window": -1}, "needs a window of at least 0"),
    "window_a_list": (
        BSA,
        {"scale": 1.0, "window": [1, 2]},
        "takes an integer as attribute window; the node has integers",
    ),
    "causal_two": (BSA, {"scale": 1.0, "causal": 2}, "BlockSparseAttention needs causal to be 0 or 1, got 2"),
    "feature_map_unknown": (KLA, {"feature_map": "gelu"}, "unknown feature map 'gelu'; known: elu1, identity, relu"),
    "feature_map_a_number": (
        KLA,
        {"feature_map": 1},
        "takes a string as attribute feature_map; the node has an integer",
    ),
    "eps_negative": (KLA, {"eps": -1.0}, "KernelLinearAttention takes a finite eps >= 0; got -1"),
    "delta_softplus_a_float": (
        SCAN,
        {"delta_softplus": 1.0},
        "an integer as attribute delta_softplus; the node has a float",
    ),
}


@pytest.mark.parametrize("name", BAD_NODES)
def test_bad_attributes_are_refused_when_the_model_is_loaded(built_library: Any, name: str) -> None:
    op, attributes, text = BAD_NODES[name]
    with pytest.raises(Exception, match=r"edgekit|takes|needs|unknown") as raised:
        session(model_bytes(op, attributes, body=False), built_library.library)
    assert text in str(raised.value)


def test_defaults_are_those_of_the_schema(built_library: Any) -> None:
    """A node that leaves out what the schema gives a default."""
    arrays = small(KLA)
    plain = session(model_bytes(KLA, {"eps": 1e-6}, body=False), built_library.library)
    full = session(model_bytes(KLA), built_library.library)
    np.testing.assert_array_equal(plain.run(None, feed(KLA, arrays))[0], full.run(None, feed(KLA, arrays))[0])


@pytest.mark.parametrize("index", [3, 99, -2], ids=lambda index: f"index_{index}")
def test_indices_out_of_range_are_refused(built_library: Any, index: int) -> None:
    arrays = small(BSA)
    arrays[3][0, 0, 2, 1] = index
    native = session(model_bytes(BSA), built_library.library)
    with pytest.raises(Exception, match=rf"got block index {index} out of range -1\.\.2: 40 keys make 3 blocks of 16"):
        native.run(None, feed(BSA, arrays))
    with pytest.raises(Exception, match=r"needs every block index in -1\.\.ceil"):
        session(model_bytes(BSA), None).run(None, feed(BSA, arrays))
    arrays[3][0, 0, 2, 1] = 0
    assert np.isfinite(native.run(None, feed(BSA, arrays))[0]).all()  # the session still works


BAD_SHAPES: dict[str, tuple[str, int, tuple[int, ...], str]] = {
    "rank": (BSA, 0, (2, 40, 8), "takes q [B, Hq, N, D]"),
    "empty_sequence": (BSA, 0, (1, 2, 0, 8), "needs every axis of q, k, v and block_index to be at least 1"),
    "head_ratio": (BSA, 0, (1, 3, 40, 8), "multiple of the number of key heads"),
    "head_dim": (BSA, 1, (1, 2, 40, 9), "needs k and v of one shape"),
    "rows": (BSA, 3, (1, 1, 4, 2), "needs block_index [B, Hm, ceil(N / block_q), K]"),
    "index_heads": (BSA, 3, (1, 5, 3, 2), "with Hm one of 1, Hkv, Hq"),
    "more_queries": (BSA, 0, (1, 2, 41, 8), "at least as many keys as queries"),
    "keys_differ": (KLA, 1, (1, 2, 21, 8), "KernelLinearAttention takes q and k [B, H, N, D] and v [B, H, N, E]"),
    "kla_empty": (KLA, 2, (1, 2, 20, 0), "each axis at least 1; got q [1, 2, 20, 8], k [1, 2, 20, 8], v [1, 2, 20, 0]"),
    "kla_rank": (KLA, 2, (2, 20, 5), "v [2, 20, 5]"),
    "scan_state": (SCAN, 2, (3, 5), "SelectiveScan takes u and delta [B, C, L], A [C, S]"),
    "scan_rank": (SCAN, 5, (3, 1), "D [3, 1]"),
    "scan_gate": (SCAN, 6, (1, 3, 19), "where given, z [B, C, L]"),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_shapes_that_do_not_fit_are_refused(built_library: Any, name: str) -> None:
    op, place, shape, text = BAD_SHAPES[name]
    arrays = small(op)
    arrays[place] = np.zeros(shape, arrays[place].dtype)
    shapes = [[None] * array.ndim for array in arrays]
    native = session(model_bytes(op, body=False, shapes=shapes), built_library.library)
    with pytest.raises(Exception, match=op) as raised:
        native.run(None, feed(op, arrays))
    assert text in str(raised.value)


@pytest.mark.parametrize("body", [False, True], ids=["node_alone", "with_function_body"])
@pytest.mark.parametrize("op", [BSA, KLA, SCAN])
def test_a_dtype_without_kernel_is_an_error_not_a_crash(built_library: Any, op: str, body: bool) -> None:
    """onnxruntime does not fall back to the body by itself: such a model must be loaded without the library."""
    with pytest.raises(Exception, match=r"tensor\(double\)"):
        session(model_bytes(op, dtype=TensorProto.DOUBLE, body=body), built_library.library)


def test_int64_indices_are_an_error(built_library: Any) -> None:
    with pytest.raises(Exception, match=r"block_index|int64"):
        session(model_bytes(BSA, index_dtype=TensorProto.INT64, body=False), built_library.library)


# An onnxruntime whose ParallelFor fails once: registers the library next to it with a copy of the API.
NO_THREADS = """
#include <dlfcn.h>
#include <stddef.h>
#include "onnxruntime_c_api.h"
static OrtApi api;
static const OrtApi* real;
static OrtApiBase base;
static int failed;
static OrtStatus* ORT_API_CALL parallel_for(const OrtKernelContext* context, void (*call)(void*, size_t), size_t total,
                                            size_t batches, void* data) {
  if (!failed++) return real->CreateStatus(ORT_FAIL, "no threads today");
  return real->KernelContext_ParallelFor(context, call, total, batches, data);
}
static const OrtApi* ORT_API_CALL get_api(uint32_t version) {
  (void)version;
  return &api;
}
OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* given) {
  real = given->GetApi(ORT_API_VERSION);
  api = *real;
  api.KernelContext_ParallelFor = parallel_for;
  base = *given;
  base.GetApi = get_api;
  void* library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) return real->CreateStatus(ORT_FAIL, dlerror());
  OrtStatus* (*registered)(OrtSessionOptions*, const OrtApiBase*);
  *(void**)&registered = dlsym(library, "RegisterCustomOps");
  return registered(options, &base);
}
"""


@pytest.mark.parametrize("op", [BSA, KLA, SCAN])
def test_a_failing_thread_pool_is_an_error_of_the_run(built_library: Any, tmp_path: Path, op: str) -> None:
    """No exception crosses the kernel's frames; the session and its scratch memory are fine afterwards."""
    copy = Path(shutil.copy(built_library.library, tmp_path))  # its own API pointer, apart from other tests'
    source, between = tmp_path / "between.c", tmp_path / "between.so"
    source.write_text(NO_THREADS)
    flags = ["-std=gnu11", "-shared", "-fPIC", f'-DLIBRARY="{copy}"', f"-I{find_headers().folder}"]
    run([*find_toolchain(platform.machine()).cc, *flags, str(source), "-o", str(between), "-ldl"], "building")
    running = session(model_bytes(op, body=False), between, threads=2)
    with pytest.raises(Exception, match=rf"{op}: kernel .* failed: parallel_for ran 0 of \d+ tasks"):
        running.run(None, feed(op, small(op)))
    (expected,) = session(model_bytes(op, body=False), built_library.library).run(None, feed(op, small(op)))
    np.testing.assert_array_equal(running.run(None, feed(op, small(op)))[0], expected)


# ---- life of the library ----


def test_registering_twice_in_one_session_is_a_clean_error(built_library: Any) -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(built_library.library))
    options.register_custom_ops_library(str(built_library.library))
    with pytest.raises(Exception, match="Domain already set in registry"):
        onnxruntime.InferenceSession(model_bytes(KLA), options)


def test_many_sessions_and_registrations(built_library: Any) -> None:
    """Sessions come and go, the library is loaded again after the last one, several live side by side."""
    expected = None
    for _ in range(3):
        living = [
            session(model_bytes(op), built_library.library, threads=2) for op in (BSA, KLA, SCAN) for _ in range(2)
        ]
        outputs = [living[0].run(None, feed(BSA, small(BSA)))[0], living[3].run(None, feed(KLA, small(KLA)))[0]]
        expected = expected or outputs
        for out, first in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(out, first)
        del living


def test_one_session_from_many_threads(built_library: Any) -> None:
    shared = session(model_bytes(BSA), built_library.library, threads=2)
    arrays = [
        feed(BSA, [array * (i + 1) if array.dtype == "float32" else array for array in small(BSA)]) for i in range(4)
    ]
    expected = [shared.run(None, each)[0] for each in arrays]
    equal: list[bool] = []

    def work(mine: int) -> None:
        for _ in range(25):
            equal.append(bool((shared.run(None, arrays[mine])[0] == expected[mine]).all()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 100


def test_a_process_with_the_library_ends_cleanly(built_library: Any, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model_bytes(KLA))
    code = (
        "import sys, numpy, onnxruntime as ort\n"
        "o = ort.SessionOptions(); o.register_custom_ops_library(sys.argv[1])\n"
        "s = ort.InferenceSession(sys.argv[2], o)\n"
        "x = numpy.ones((1, 1, 9, 4), 'float32'); print(s.run(None, dict(q=x, k=x, v=x))[0].sum())\n"
    )
    command = [sys.executable, "-c", code, str(built_library.library), str(tmp_path / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) == pytest.approx(36.0, rel=1e-5)


def test_the_model_is_valid_onnx() -> None:
    """The files above are what an exporter writes: the checker takes them."""
    for op in (BSA, KLA, SCAN):
        model = onnx.load_from_string(model_bytes(op, out_shape=["x"] * (3 if op == SCAN else 4)))
        onnx.checker.check_model(model)


@pytest.mark.parametrize("img_size", [32, pytest.param([64, 48], marks=pytest.mark.slow)], ids=str)
def test_a_zoo_model_runs_portably_and_natively(built_library: Any, tmp_path: Path, img_size: Any) -> None:
    """DynamicVis with its routers and scans: one bundle, both kinds of kernels, the same answers."""
    bundle = edgekit.export("dynamicvis_digits", "onnx", tmp_path, overrides={"img_size": img_size})
    scans = bundle.manifest.ops["edgekit::SelectiveScan"]
    folder = built_library.library.parent
    portable, native = (edgekit.load(bundle, kernels=kernels) for kernels in ("portable", folder))
    assert [kernel.native for kernel in portable.kernels] == [False] * scans
    assert [kernel.native for kernel in native.kernels] == [True] * scans
    for inputs, expected in bundle.samples():
        for session_ in (portable, native):
            (answer,) = session_.run(inputs).values()
            assert relative_l2(answer, expected["logits"]) < 1e-5
    assert edgekit.verify(bundle, live=True, kernels=folder)
