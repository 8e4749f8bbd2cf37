"""How a model is called: inputs by name to its arguments, and its return value to outputs by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree

from edgekit.errors import ExportError, ShapeError
from edgekit.runtime.manifest import DTYPES


def bind_inputs(
    module: torch.nn.Module, tensors: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], list[str]]:
    """Match inputs to the parameters of `forward`: by name where every name is one, otherwise by position.

    Returns positional arguments, keyword arguments, and the input names in the order that the exported graph has them.

    Raises:
        ShapeError: too few or too many inputs for this `forward`.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    kinds = {p.kind for p in parameters}
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    extra = [name for name in tensors if name not in named]
    # **kwargs takes any name, but a wrapper with *args, or with free parameters, rather takes them by position.
    takes_extra = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds
    if set(required) <= set(tensors) and (not extra or (takes_extra and len(tensors) > len(positional))):
        ordered = [name for name in named if name in tensors] + extra
        return (), {name: tensors[name] for name in ordered}, ordered
    takes_all = inspect.Parameter.VAR_POSITIONAL in kinds or len(tensors) <= len(positional)
    if len(tensors) < len(required) or not takes_all:
        raise ShapeError(
            f"{type(module).__name__}.forward takes {', '.join(required or named) or 'no input'}; got shapes for "
            f"{', '.join(tensors)}. Give one --shape for each input"
        )
    return tuple(tensors.values()), {}, list(tensors)


def tensor_leaves(outputs: Any) -> list[torch.Tensor]:
    """The tensors in a model's return value, in order, whatever it nests them in."""
    return [leaf.detach() for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def output_names(outputs: Any, inputs: Iterable[str] = ()) -> list[str]:
    """Names for a model's outputs from its return value: dict keys and field names, else `output`, `output_1`, ...

    Args:
        outputs: what the model returned: a tensor, or tuples, lists, dicts and dataclasses of them. None is left out.
        inputs: names that are taken.

    Raises:
        ExportError: no tensor, something that is no tensor, or a dtype that a bundle cannot hold.
    """
    names: list[str] = []
    for path, leaf in _pytree.tree_flatten_with_path(outputs)[0]:
        if leaf is None:
            continue
        words = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        name = re.sub(r"\W", "_", "_".join(filter(None, words)), flags=re.ASCII) or "output"
        if not isinstance(leaf, torch.Tensor):
            raise ExportError(f"the model returns a {type(leaf).__name__} ({name}); make it return tensors alone")
        dtype = str(leaf.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ExportError(
                f"the output {name} is {dtype}; a bundle holds {', '.join(DTYPES)}. Convert it in forward"
            )
        names.append(f"output_{name}" if not name.isidentifier() or name in inputs else name)
    if not names:
        raise ExportError("the model returns no tensor; make its forward return one")
    if len(set(names)) < len(names):
        return [f"output_{index}" for index in range(len(names))]
    return names


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
