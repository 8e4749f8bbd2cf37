"""The `tvm` target: torch.export, then relax, to one native library with the weights and our kernels inside.

The library is for ahead-of-time builds without onnxruntime: whole models run slower in it than in onnxruntime (the
README has the measured ratios). The pipeline: import, batch norms and constants folded, convolutions in NHWC, operators
fused, every function scheduled by `tvm_schedule`, LLVM.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax, te, tirx, topi
from tvm.ir import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.relax.frontend.torch import from_exported_program

from edgekit.custom_ops.registry import DOMAIN, VERSION
from edgekit.errors import ExportError
from edgekit.export.calling import first_line
from edgekit.export.onnx import quiet
from edgekit.export.shapes import InputShape, input_specs, output_specs
from edgekit.export.tvm_ops import KernelCalls, ServedNode, used_ops
from edgekit.export.tvm_schedule import Registers, schedule_module
from edgekit.kernels.native.toolchain import KernelBuildError, find_toolchain, run
from edgekit.kernels.tvm.compat import versions
from edgekit.kernels.tvm.targets import Arch, best_arch, get_arch
from edgekit.runtime.kernel_library import Host, this_host
from edgekit.runtime.manifest import CustomOp, TensorSpec
from edgekit.runtime.tvm_backend import BUILD, resize_pool

__all__ = [
    "BUILD",
    "LIBRARY",
    "TvmExport",
    "choose_arch",
    "convert",
    "runs_on_this_machine",
    "tools",
    "write_description",
    "write_library",
]

LIBRARY = "model.so"
# In this layout the lanes of a vector are channels: neighbours in memory, for 1x1 and depthwise convolutions too.
_LAYOUTS = {"relax.nn.conv2d": ["NHWC", "HWIO"]}


@dataclass(frozen=True)
class TvmExport:
    """A compiled model and its tensors.

    `ops` counts the operators of the imported graph; `kernels` says which kernel of ours serves which node.
    """

    executable: Any
    arch: Arch
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ops: dict[str, int]
    kernels: tuple[ServedNode, ...]
    tuning: dict[str, Any] | None = None

    @property
    def custom_ops(self) -> tuple[CustomOp, ...]:
        """The custom ops for the manifest."""
        return tuple(CustomOp(DOMAIN, op, VERSION, n, ("tvm",)) for op, n in used_ops(self.kernels).items())


def choose_arch(name: str | None, host: Host | None = None) -> Arch:
    """The arch of this name; None takes the best one that this machine's processor has.

    Raises:
        UnknownNameError: no such arch.
        InputError: this machine is none of them, and none was named.
    """
    if name is not None:
        return get_arch(name)
    host = host or this_host()
    return best_arch(host.machine, host.system, host.features)


def runs_on_this_machine(arch: Arch) -> bool:
    """Whether the processor here runs code for `arch`."""
    return runs_on(arch, this_host())


def runs_on(arch: Arch, host: Host) -> bool:
    """Whether code for `arch` runs on this host."""
    return (host.machine, host.system) == (arch.machine, "linux") and set(arch.features) <= host.features


def convert(
    program: torch.export.ExportedProgram,
    shapes: Sequence[InputShape],
    *,
    names: Sequence[str],
    arch: Arch,
    tune: int = 0,
    step: Callable[[str], None] = lambda _: None,
) -> TvmExport:
    """Compile a traced program.

    Args:
        shapes: in the order of the program's inputs.
        names: names of the outputs.
        tune: how many candidates to measure in search of faster tiles; 0 takes the likeliest.
        step: called with the name of each step.

    Raises:
        ExportError: an operator that TVM cannot import, or a custom op without a kernel.
    """
    resize_pool(1)  # folding constants runs functions, before any session sets up the threads
    branching = {torch.ops.higher_order.cond: "torch.cond", torch.ops.higher_order.while_loop: "torch.while_loop"}
    if used := [branching[node.target] for node in program.graph.nodes if node.target in branching]:
        raise ExportError(f"the target tvm has no control flow, and the model uses {used[0]}; export to onnx")
    calls = KernelCalls(arch)
    try:
        with quiet():
            mod = from_exported_program(program, custom_convert_map=calls.converters())
    except ExportError:
        raise
    except Exception as error:  # the importer asserts, and raises errors of several kinds
        raise ExportError(f"TVM cannot import the model: {_import_reason(error)}") from error
    ops = _count_ops(mod, calls.uses)
    step(f"compile for {arch.name}")
    registers = Registers(arch.lanes, arch.registers)
    try:
        with arch.target:
            mod = _optimize(mod)
            tuning = None
            if tune:
                from edgekit.export.tvm_tuning import tune_module

                step("tune")
                mod, tuning = tune_module(mod, arch.target, registers, trials=tune)
            mod = schedule_module(mod, registers)
            executable = tvm.compile(mod, target=arch.target)
    except ExportError:
        raise
    except Exception as error:  # TVM's passes raise errors of many kinds, none with a common base of its own
        raise ExportError(f"TVM cannot compile the model for {arch.name}: {first_line(error)}") from error
    inputs = tuple(replace(spec, layout="NCHW" if len(spec.shape) == 4 else None) for spec in input_specs(shapes)[0])
    outputs = output_specs(program, shapes, names)
    return TvmExport(executable, arch, inputs, outputs, ops, tuple(calls.uses), tuning)


def write_library(export: TvmExport, path: Path) -> None:
    """Link the compiled model, its weights inside, to a shared library.

    Raises:
        KernelBuildError: there is no linker for the arch, or it failed.
    """
    linker = find_toolchain(export.arch.machine).cxx

    def link(output: str, objects: Sequence[str], **_: Any) -> None:
        # Without a build id and symbol names of the build, equal exports give equal files.
        command = [*linker, "-shared", "-fPIC", "-Wl,--build-id=none", "-s", "-o", output, *objects]
        run(command, f"linking {path.name}")

    link.object_format = "o"  # type: ignore[attr-defined]
    try:
        export.executable.export_library(str(path), fcompile=link)
    except KernelBuildError:
        raise
    except (OSError, RuntimeError) as error:
        raise ExportError(f"TVM cannot write the library for {export.arch.name}: {first_line(error)}") from error


def tools() -> dict[str, str]:
    """The versions of the compiler, for the manifest."""
    return versions()


def write_description(export: TvmExport, path: Path) -> None:
    """Write `build.json`: what the library needs of a machine, and which kernel serves which node."""
    arch = export.arch
    data = {
        "schema": 1,
        "arch": arch.name,
        "machine": arch.machine,
        "system": "linux",
        "features": list(arch.features),
        "kernels": [
            {"node": use.node, "op": use.op, "symbol": use.symbol, "parameters": use.parameters}
            for use in export.kernels
        ],
    }
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _optimize(mod: tvm.IRModule) -> tvm.IRModule:
    passes = relax.transform
    mod = passes.CanonicalizeBindings()(mod)
    mod = passes.DecomposeOpsForInference()(mod)
    # The layout is for speed alone, and the pass gives up on some graphs (std::bad_alloc on DynamicVis).
    with contextlib.suppress(tvm.error.InternalError):
        mod = passes.ConvertLayout(_LAYOUTS)(mod)
    mod["main"] = _FoldTransposes(mod).visit_expr(mod["main"])
    return tvm.transform.Sequential(
        [
            passes.CanonicalizeBindings(),
            passes.EliminateCommonSubexpr(),
            passes.LegalizeOps(_ACTIVATIONS),
            passes.AnnotateTIROpPattern(),
            passes.FoldConstant(),
            passes.FuseOps(),
            passes.FuseTIR(),
            passes.DeadCodeElimination(),
        ]
    )(mod)


def _gelu(x: te.Tensor) -> te.Tensor:
    half_of_x = topi.multiply(x, tirx.const(0.5, x.dtype))
    return topi.multiply(half_of_x, topi.add(topi.fast_erf(topi.multiply(x, tirx.const(0.5**0.5, x.dtype))), _one(x)))


def _gelu_tanh(x: te.Tensor) -> te.Tensor:
    cube = topi.multiply(topi.multiply(x, x), topi.multiply(x, tirx.const(0.044715, x.dtype)))
    inner = topi.multiply(topi.add(x, cube), tirx.const((2 / math.pi) ** 0.5, x.dtype))
    return topi.multiply(topi.multiply(x, tirx.const(0.5, x.dtype)), topi.add(topi.fast_tanh(inner), _one(x)))


def _silu(x: te.Tensor) -> te.Tensor:
    return topi.divide(x, topi.add(topi.fast_exp(topi.negative(x)), _one(x)))


def _one(x: te.Tensor) -> Any:
    """1 in the dtype of x."""
    return tirx.const(1.0, x.dtype)


def _legalized(formula: Callable[[te.Tensor], te.Tensor]) -> Callable[[relax.BlockBuilder, relax.Call], relax.Expr]:
    return lambda builder, call: builder.call_te(formula, call.args[0], primfunc_name_hint=formula.__name__[1:])


# LLVM calls the C library for erf, tanh and exp, value by value; these polynomials run over vectors and are within
# 4e-7. Each formula multiplies by x, so that NaN stays NaN although the polynomials clamp their argument.
_ACTIVATIONS = {
    "relax.nn.gelu": _legalized(_gelu),
    "relax.nn.gelu_tanh": _legalized(_gelu_tanh),
    "relax.nn.silu": _legalized(_silu),
}


@mutator
class _FoldTransposes(PyExprMutator):  # type: ignore[misc]  # TVM has no types
    """Transpose weights here: TVM's own folding compiles a function for each of them, which takes most of an export."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if getattr(call.op, "name", "") != "relax.permute_dims":
            return call
        value = call.args[0]
        if isinstance(value, relax.Var):
            value = self.lookup_binding(value)
        if not isinstance(value, GenericConst):
            return call
        axes = None if call.attrs.axes is None else [int(axis) for axis in call.attrs.axes]
        return relax.const(np.ascontiguousarray(np.transpose(value.value.numpy(), axes)))


def _count_ops(mod: tvm.IRModule, uses: Sequence[ServedNode]) -> dict[str, int]:
    """The operators of the imported graph, by their relax names, ours with their domain."""
    counts = Counter({f"{DOMAIN}::{op}": count for op, count in used_ops(uses).items()})

    def count(expression: Any) -> None:
        name = getattr(getattr(expression, "op", None), "name", "")
        if isinstance(expression, relax.Call) and name.startswith("relax.") and name != "relax.call_tir":
            counts[name.removeprefix("relax.")] += 1

    relax.analysis.post_order_visit(mod["main"], count)
    return dict(sorted(counts.items()))


def _import_reason(error: Exception) -> str:
    if match := re.match(r"Unsupported function types (\[.*\])", str(error)):
        return f"it knows no {match[1][1:-1]}. Rewrite that part of the model, or export to onnx"
    return first_line(error)
