"""The custom ops as Core ML sees them: lowerings into MIL, Core ML's intermediate language, for coremltools.

    register_lowerings()
    coremltools.convert(program, compute_precision=FP16ComputePrecision(op_selector=lambda op: not keep_fp32(op)), ...)

Each op's lowering is `lower(context, node)` of `edgekit.custom_ops.<folder>.coreml`, imported here when asked for. This
module imports coremltools in its functions alone.

The lowerings know iOS 16, 17 and 18 (and macOS 13, 14 and 15 of the same years). What they hold in half precision is
said in each of them. They were compared with the references through the programs that coremltools saves, run by an
interpreter in numpy; none has run on Apple's runtime.
"""

from __future__ import annotations

import importlib
from typing import Any

from edgekit.custom_ops.coreml_graph import FP32
from edgekit.errors import MissingDependencyError

__all__ = ["keep_fp32", "register_lowerings"]

_FOLDERS = ("block_sparse_attention", "kernel_linear_attention", "selective_scan")


def register_lowerings() -> None:
    """Teach coremltools `torch.ops.edgekit.*`. May be called any number of times.

    Raises:
        MissingDependencyError: coremltools is not installed.
    """
    try:
        from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
    except ImportError as error:
        raise MissingDependencyError("coremltools", "coreml", "exporting to Core ML") from error
    for folder in _FOLDERS:
        lower = importlib.import_module(f"edgekit.custom_ops.{folder}.coreml").lower

        def entry(context: Any, node: Any, lower: Any = lower) -> None:
            lower(context, node)

        # coremltools registers a function under its own name too: it must not be that of an op of torch's.
        entry.__name__ = f"edgekit_{folder}"
        register_torch_op(torch_alias=[f"edgekit::{folder}"], override=True)(entry)


def keep_fp32(op: Any) -> bool:
    """Whether a MIL op must stay in float32 when the rest of a program becomes float16.

    So far the ops of SelectiveScan, whose state is float32 by contract. coremltools' `op_selector` wants the opposite,
    the ops to convert: `FP16ComputePrecision(op_selector=lambda op: not keep_fp32(op))`.
    """
    # The last op's output may have the name of the model's output by then.
    return any(str(name).startswith(FP32) for name in (op.name, *(output.name for output in op.outputs)))
