"""edgekit's own ops in tvm bundles: right answers in the dtypes there are, and every broken rule is an `InputError`."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit.errors import ExportError, InputError, ShapeError
from edgekit.runtime.kernel_library import NodeKernel

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from edgekit import custom_ops
from edgekit.custom_ops.block_sparse_attention import contract
from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.export import tvm as tvm_target
from edgekit.kernels.tvm import catalog
from edgekit.kernels.tvm.compat import jit
from edgekit.runtime.tvm_backend import run_error

SPARSE_SHAPES = ["q:1x2x40x16", "k:1x2x40x16", "v:1x2x40x16", "blocks:1x1x3x2@int32"]


class Sparse(nn.Module):
    """Block-sparse attention whose blocks are an input: whatever a caller puts there reaches the library."""

    def __init__(self, block_q: int = 16, block_k: int = 16) -> None:
        super().__init__()
        custom_ops.register()
        self.blocks = (block_q, block_k)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        # Samples hold 0 and 1: with -1 and 0 they name a block of any input.
        return torch.ops.edgekit.block_sparse_attention(q, k, v, blocks - 1, *self.blocks, True, None, 0.0, 0)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        custom_ops.register()

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.edgekit.kernel_linear_attention(q, k, v, "relu", 1e-6)


class Scan(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        custom_ops.register()
        self.gated = gated
        # Values that float16 holds too, so that models in any dtype have the same.
        self.a = nn.Parameter((-torch.rand(6, 4) - 0.1).half().float())
        self.b = nn.Parameter(torch.randn(1, 4, 9).half().float())
        self.d = nn.Parameter(torch.randn(6).half().float())

    def forward(self, u: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        held = (self.a, self.b, self.b, self.d)
        gate = u * 0.5 if self.gated else None
        return torch.ops.edgekit.selective_scan(u, delta, *(x.to(u.dtype) for x in held), gate, True)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    shapes = [
        "q:Bx4xNx16 | B=1..4, N=20..200",
        "k:Cx2xMx16 | C=1..4, M=20..200",
        "v:Dx2xPx16 | D=1..4, P=20..200",
        "blocks:ExHxRx2@int32 | E=1..4, H=1..8, R=2..9",
    ]
    bundle = edgekit.export(Sparse().eval(), "tvm", tmp_path_factory.mktemp("t"), shapes=shapes, kernels=[])
    return edgekit.load(bundle, backend="tvm", threads=1)


@pytest.fixture(scope="module")
def kernel_functions():
    """The generic kernels: op, function, shapes of its tensors (the output last), scalars."""
    arch = tvm_target.choose_arch(None)
    calls = {
        "edgekit_kla_f32": ([(1, 2, 5, 4)] * 2 + [(1, 2, 5, 3)] * 2, (1e-6, 0)),
        "edgekit_scan_f32": ([(1, 6, 9)] * 2 + [(6, 4)] + [(1, 4, 9)] * 2 + [(6,)] + [(1, 6, 9)] * 2, (1, 1)),
    }
    chosen = [kernel for kernel in catalog.kernels(arch) if kernel.symbol in calls]
    return {
        kernel.symbol: (kernel.op, jit(kernel.module(arch), arch.target)(kernel.symbol), *calls[kernel.symbol])
        for kernel in chosen
    }


class TestOps:
    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    def test_selective_scan(self, tmp_path, gated):
        shapes = ["u:1x6x9", "delta:1x6x9"]
        bundle = edgekit.export(Scan(gated).eval(), "tvm", tmp_path, shapes=shapes, kernels=[])
        assert bundle.manifest.verification["checked"] is True

    def test_block_indices_are_checked(self, tmp_path):
        bundle = edgekit.export(Sparse().eval(), "tvm", tmp_path, shapes=SPARSE_SHAPES, kernels=[])
        session = edgekit.load(bundle, backend="tvm", threads=1)
        inputs = session.random_inputs()
        good = session.run(inputs)
        for wrong in (3, 99, -2, -(2**31) + 1, 2**31 - 2):
            with pytest.raises(InputError, match=re.escape(contract.RANGE)):
                session.run(inputs | {"blocks": np.full((1, 1, 3, 2), wrong + 1, np.int32)})
        none = session.run(inputs | {"blocks": np.full((1, 1, 3, 2), 0, np.int32)})
        assert not next(iter(none.values())).any()
        again = session.run(inputs)
        np.testing.assert_array_equal(next(iter(again.values())), next(iter(good.values())))

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize("length", ["40", "N"], ids=["static", "dynamic"])
    @pytest.mark.parametrize("blocks", [(2**40, 2**63 - 1), (2**63 - 1, 2**40), (64, 48)], ids=str)
    def test_blocks_longer_than_the_tensors(self, tmp_path, blocks, length, dtype):
        shapes = [f"{name}:1x2x{length}x16@{dtype}" for name in "qkv"] + ["blocks:1x1x1x2@int32"]
        if length == "N":
            shapes[0] += " | N=2..48"
        model = Sparse(*blocks).eval()
        bundle = edgekit.export(model, "tvm", tmp_path, shapes=shapes, kernels=[])
        session = edgekit.load(bundle, backend="tvm", threads=1)
        inputs = session.random_inputs(sizes={"N": 40} if length == "N" else None)
        inputs["blocks"][...] = [0, 1]
        error = relative_l2(session.run(inputs)["output"], model(*map(torch.from_numpy, inputs.values())))
        assert error < tolerance("BlockSparseAttention", dtype, "tvm")
        with pytest.raises(InputError, match=re.escape(contract.RANGE)):
            session.run(inputs | {"blocks": np.full((1, 1, 1, 2), 2, np.int32)})

    @pytest.mark.parametrize(
        ("op", "model", "shapes"),
        [
            ("BlockSparseAttention", Sparse, SPARSE_SHAPES),
            ("KernelLinearAttention", Linear, SPARSE_SHAPES[:3]),
            ("SelectiveScan", lambda: Scan(gated=True), ["u:1x6x9", "delta:1x6x9"]),
        ],
        ids=["sparse", "linear", "scan"],
    )
    def test_float16(self, tmp_path, op, model, shapes):
        torch.manual_seed(0)
        model = model().eval()
        shapes = [shape if "@" in shape else f"{shape}@float16" for shape in shapes]
        limit = tolerance(op, "float16", "tvm")
        bundle = edgekit.export(model, "tvm", tmp_path, shapes=shapes, name="half", tolerance=limit, kernels=[])
        assert [entry["symbol"].split("_")[2] for entry in json.loads(bundle.read("build.json"))["kernels"]] == ["f16"]
        session = edgekit.load(bundle, backend="tvm", threads=1)
        inputs = session.random_inputs(seed=3)
        exact = {
            name: torch.from_numpy(x.astype(np.float64) if x.dtype == np.float16 else x) for name, x in inputs.items()
        }
        with torch.no_grad():
            expected = model(*exact.values())
        assert relative_l2(session.run(inputs)["output"], expected) < limit

    @pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
    def test_other_dtypes_are_refused(self, tmp_path, dtype):
        class Cast(Linear):
            def forward(self, q, k, v):
                return super().forward(*(x.to(getattr(torch, dtype)) for x in (q, k, v))).float()

        with pytest.raises(ExportError, match=f"no TVM kernel of edgekit::KernelLinearAttention in {dtype}"):
            edgekit.export(Cast().eval(), "tvm", tmp_path, shapes=SPARSE_SHAPES[:3], name="m", kernels=[])


class TestShapesAtRunTime:
    """With dynamic dimensions, calls that break an op's contract reach the library, which must refuse them."""

    @staticmethod
    def inputs(**sizes: int) -> dict[str, np.ndarray]:
        size = {"B": 2, "C": 2, "D": 2, "E": 2, "N": 40, "M": 50, "P": 50, "H": 1, "R": 3} | sizes
        rng = np.random.default_rng(0)
        shapes = {"q": ("B", 4, "N", 16), "k": ("C", 2, "M", 16), "v": ("D", 2, "P", 16), "blocks": ("E", "H", "R", 2)}
        made = {name: rng.standard_normal([size.get(axis, axis) for axis in shape]) for name, shape in shapes.items()}
        blocks = rng.integers(0, 1 + -(-size["M"] // 16), made["blocks"].shape)
        return {name: x.astype(np.float32) for name, x in made.items()} | {"blocks": blocks.astype(np.int32)}

    @pytest.mark.parametrize(
        "sizes",
        [{}, {"H": 2}, {"H": 4}, {"N": 50, "R": 4}, {"N": 33, "M": 200, "P": 200}, dict.fromkeys("BCDE", 1)],
        ids=str,
    )
    def test_calls_that_fit(self, session, sizes):
        inputs = self.inputs(**sizes)
        expected = Sparse()(*map(torch.from_numpy, inputs.values()))
        got = session.run(inputs)["output"]
        assert relative_l2(got, expected) < tolerance("BlockSparseAttention", "float32", "tvm")

    @pytest.mark.parametrize(
        ("sizes", "rule"),
        [
            ({"M": 39, "P": 39}, contract.LENGTH),
            ({"R": 2}, contract.INDEX),
            ({"R": 4}, contract.INDEX),
            ({"N": 48, "R": 4}, contract.INDEX),
            ({"H": 3}, contract.INDEX),
            ({"H": 8}, contract.INDEX),
            ({"E": 1}, contract.INDEX),
            ({"E": 3}, contract.INDEX),
            ({"P": 49}, contract.SAME),
            ({"D": 1}, contract.SAME),
            ({"C": 1, "D": 1}, contract.SAME),
            ({"B": 1, "E": 1}, contract.SAME),
        ],
        ids=str,
    )
    def test_calls_that_do_not(self, session, sizes, rule):
        with pytest.raises(InputError, match=f"^{re.escape(rule)}$"):
            session.run(self.inputs(**sizes))
        assert session.run(self.inputs())["output"].shape == (2, 4, 40, 16)

    def test_heads(self, tmp_path):
        shapes = ["q:1xGx20x16 | G=1..8", "k:1xKx20x16 | K=1..8", "v:1xKx20x16", "blocks:1x1x2x2@int32"]
        bundle = edgekit.export(Sparse().eval(), "tvm", tmp_path, shapes=shapes, kernels=[])
        session = edgekit.load(bundle, backend="tvm", threads=1)
        for heads, kv_heads in ((6, 3), (3, 3), (5, 1)):
            inputs = session.random_inputs(sizes={"G": heads, "K": kv_heads})
            expected = Sparse()(*map(torch.from_numpy, inputs.values()))
            assert relative_l2(session.run(inputs)["output"], expected) < 2e-6
        for heads, kv_heads in ((5, 3), (2, 4)):
            with pytest.raises(InputError, match=f"^{contract.RATIO}$"):
                session.run(session.random_inputs(sizes={"G": heads, "K": kv_heads}))

    @pytest.mark.parametrize(
        ("model", "shapes"),
        [
            (Linear, ["q:1x2xNx16 | N=2..40", "k:1x2xMx16 | M=2..40", "v:1x2xMx16"]),
            (Linear, ["q:1x2xNx16 | N=2..40", "k:1x2xNx16", "v:1x2xMx16 | M=2..40"]),
            (lambda: Scan(gated=False), ["u:Bx6x9 | B=1..4", "delta:Cx6x9 | C=1..4"]),
        ],
        ids=["keys", "values", "scan"],
    )
    def test_the_other_ops_fix_their_shapes_at_export(self, tmp_path, model, shapes):
        with pytest.raises((ExportError, ShapeError)):
            edgekit.export(model().eval(), "tvm", tmp_path, shapes=shapes, name="m", kernels=[])

    @pytest.mark.parametrize(
        ("symbol", "argument", "shape"),
        [
            ("edgekit_kla_f32", 0, (1, 2, 6, 4)),
            ("edgekit_kla_f32", 1, (2, 2, 5, 4)),
            ("edgekit_kla_f32", 1, (1, 2, 5, 3)),
            ("edgekit_kla_f32", 2, (1, 1, 5, 3)),
            ("edgekit_scan_f32", 1, (1, 6, 8)),
            ("edgekit_scan_f32", 2, (5, 4)),
            ("edgekit_scan_f32", 3, (1, 3, 9)),
            ("edgekit_scan_f32", 4, (2, 4, 9)),
            ("edgekit_scan_f32", 5, (7,)),
            ("edgekit_scan_f32", 6, (1, 6, 1)),
        ],
        ids=str,
    )
    def test_the_kernels_of_the_other_ops_compare_all_sizes(self, kernel_functions, symbol, argument, shape):
        op, call, sizes, scalars = kernel_functions[symbol]
        right = [np.ones(size, np.float32) for size in sizes]
        call(*map(torch.from_numpy, right), *scalars)
        right[argument] = np.ones(shape, np.float32)
        with pytest.raises(ValueError, match="Mismatched") as raised:
            call(*map(torch.from_numpy, right), *scalars)
        used = (NodeKernel("node", f"edgekit::{op}", "tvm", symbol),)
        said = run_error(str(raised.value), used, "it")
        assert re.fullmatch(rf"{op} got tensors that do not fit together: Mismatched \w+\.shape.*", said)
        assert "\n" not in said


class Branching(torch.nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


def test_control_flow_is_refused_in_words(tmp_path):
    with pytest.raises(ExportError, match="no control flow"):
        edgekit.export(Branching(), "tvm", tmp_path, shapes=["x:2x3"])
