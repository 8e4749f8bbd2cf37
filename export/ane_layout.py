"""`--layout ane`: the same model in the layout that suits the Neural Engine.

After Apple's "Deploying Transformers on the Apple Neural Engine"
(https://machinelearning.apple.com/research/neural-engine-transformers) and its reference implementation
(https://github.com/apple/ml-ane-transformers): tokens (B, S, C) become (B, C, 1, S), linear layers 1x1 convolutions,
layer norms run over the channels, attention is computed head by head with the einsums bchq,bkhc->bkhq and
bkhq,bchk->bchq, and transposes vanish between them.

The rewrite works on the graph that torch.export traces, so that it knows no model by name. What it has no rule for
stays as it was, behind a transpose where the layouts differ.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgekit.errors import ExportError
from edgekit.export import ane_layers, ane_views  # register the rules
from edgekit.export.ane_cost import cost
from edgekit.export.ane_forms import UnsupportedError
from edgekit.export.ane_rewriter import Change, Rewriter, op_name

__all__ = ["TOLERANCE", "AneRewrite", "Change", "rewrite_program", "to_ane"]

TOLERANCE = 1e-5  # relative L2 error of fp32 outputs
RULES = (ane_layers, ane_views)
# From the most to the least that is rewritten; where ops between have no rule, less can leave fewer transposes.
_WAYS: tuple[tuple[bool, frozenset[str]], ...] = (
    (True, frozenset()),
    (True, frozenset({"conv1d", "pad", "constant_pad_nd"})),
    (False, frozenset({"conv1d", "pad", "constant_pad_nd"})),
)


@dataclass(frozen=True)
class AneRewrite:
    """What came of a rewrite.

    Attributes:
        module: the rewritten module, with the inputs and outputs of the one before; that one itself, as a copy in eval
            mode, where nothing changed.
        changes: the ops that were rewritten, in the order of the graph.
        reason: why nothing changed; empty where something did.
    """

    module: torch.nn.Module
    changes: tuple[Change, ...]
    reason: str = ""

    def __bool__(self) -> bool:
        return bool(self.changes)

    @property
    def summary(self) -> str:
        """One line for people."""
        if not self.changes:
            return f"--layout ane changed nothing: {self.reason}"
        counted = Counter(change.op for change in self.changes)
        return "--layout ane rewrote " + ", ".join(f"{count} {op}" for op, count in counted.items())


def to_ane(
    module: torch.nn.Module,
    example_inputs: Sequence[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> AneRewrite:
    """A copy of `module` in the Neural Engine's layout, with the same outputs.

    Args:
        module: in any mode; its copy is traced in eval mode. Not changed.
        example_inputs: positional inputs to trace with, and to compare the outputs on (float32).
        example_kwargs: the inputs that are passed by name.
        dynamic_shapes: as for `torch.export.export`. Attention with dynamic sizes stays as it was.

    Raises:
        ExportError: the module cannot be traced, or the rewritten one answers otherwise (relative L2 error above 1e-5),
            which is a fault of edgekit.
    """
    model = copy.deepcopy(module).eval()
    args, kwargs = tuple(example_inputs), dict(example_kwargs or {})
    return rewrite_program(_trace(model, args, kwargs, dynamic_shapes), args, example_kwargs=kwargs, module=model)


def rewrite_program(
    program: torch.export.ExportedProgram,
    example_inputs: Sequence[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    module: torch.nn.Module | None = None,
) -> AneRewrite:
    """As `to_ane`, for a program that is traced already, with its dynamic dimensions.

    `module` is what the program was traced from; without it the program's own module takes its place.
    """
    # Without decompositions: this makes in-place ops ordinary ones, so that no tensor changes under its name.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = program.run_decompositions({}).module(check_guards=False)
    assert isinstance(traced, torch.fx.GraphModule)
    before = traced if module is None else module
    args, kwargs = tuple(example_inputs), dict(example_kwargs or {})
    best: tuple[float, torch.fx.GraphModule, tuple[Change, ...]] | None = None
    reason = "it has no linear layer, layer norm or attention that the layout knows"
    for converts, without in _WAYS:
        rewriter = Rewriter(traced, converts=converts, without=without)
        try:
            rewritten = rewriter.run()
        except UnsupportedError as error:
            reason = str(error)
            continue
        if rewriter.changes:
            price = cost(rewritten, args, kwargs)
            if best is None or price < best[0]:
                best = (price, rewritten, tuple(rewriter.changes))
            if _transposes(rewritten) <= _transposes(traced):
                break
    if best is None:
        return AneRewrite(before, (), reason)
    _check(before, best[1], args, kwargs)
    return AneRewrite(best[1], best[2])


def _transposes(module: torch.fx.GraphModule) -> int:
    return sum(op_name(node) in ("permute", "transpose") for node in module.graph.nodes)


def _trace(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    # The fast path is one opaque op for a whole nn.TransformerEncoderLayer.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    except Exception as error:  # torch.export raises whatever the model's code meets
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"--layout ane cannot trace the model: {first}; export with --layout standard") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _check(before: torch.nn.Module, after: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises `ExportError` where the outputs differ."""
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(before(*args, **kwargs))
        actual = torch.utils._pytree.tree_leaves(after(*args, **kwargs))
    for index, (first, second) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(first, torch.Tensor):
            continue
        if first.shape != second.shape:
            raise ExportError(
                f"--layout ane made output {index} {tuple(second.shape)} instead of {tuple(first.shape)}; "
                "export with --layout standard, and report it"
            )
        error = relative_error(first, second)
        if not error <= TOLERANCE:
            raise ExportError(
                f"--layout ane changed output {index} by a relative error of {error:.1e}, more than {TOLERANCE:.0e}; "
                "export with --layout standard, and report it"
            )


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """The L2 norm of the difference over that of `expected`, in float64; 0 where both are equal, NaNs included."""
    if torch.equal(torch.isnan(expected), torch.isnan(actual)) if expected.is_floating_point() else False:
        expected, actual = expected.nan_to_num(), actual.nan_to_num()
    difference = (expected.double() - actual.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30)) if float(difference) else 0.0
