"""SelectiveScan in MIL: a loop over chunks of tokens, the recurrence unrolled within a chunk, all in float32.

Why this form. A token's work per entry of the state `[B, S, C]` is a product and a sum for the recurrence, and two
products, an exponential and a multiply-accumulate that need no state and are computed for a whole chunk at once: 6
operations, the least there is. A parallel scan in log2(L) steps does 3 log2(L) for the recurrence alone (36 at 2,176
tokens) on tensors of all tokens, and multiplies decays, which overflows where A > 0. Decays as quotients of cumulative
sums overflow anyway. A loop over single tokens starts ten small ops per token; here it is three.

Memory. Decays, inputs and states of one chunk with their slices, 5 x 4 B S C T bytes with T <= 32: for DynamicVis base
at 512 x 512 (B = 2 directions, S C = 3,072 in the first stage, 24,576 in the last) 4 to 30 MB, instead of 53.5 MB for
each tensor `[B, S, C, L]` of all tokens. The rest is of the size of u.

Size. 2 T + 14 ops in the loop's body and about 25 around it; up to 32 tokens, no loop. T is the length, cut into as few
equal chunks as possible. `while_loop` never runs on the Neural Engine, nor does float32. The names of all ops begin
with `coreml_graph.FP32`, by which `coreml.keep_fp32` knows them.

The batch may be dynamic; the length may not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.custom_ops.coreml_graph import FP32, Graph, arguments, fixed, is_half
from edgekit.custom_ops.selective_scan.contract import NAME, NAMES
from edgekit.errors import ExportError

CHUNK = 32
"""The most tokens of a chunk."""


@dataclass(frozen=True)
class _Sizes:
    """`batch` is None where it is dynamic; `chunks` of `tokens` each hold `length` tokens."""

    batch: int | None
    channels: int
    states: int
    length: int
    chunks: int
    tokens: int

    @staticmethod
    def of(u: Any, rates: Any) -> _Sizes:
        channels, length, states = fixed(u.shape[1]), fixed(u.shape[2]), fixed(rates.shape[1])
        if channels is None or length is None or states is None:
            raise ExportError(
                f"{NAME} needs fixed numbers of tokens, channels and states in Core ML (the batch may vary); got u of "
                f"shape {list(u.shape)}. Export one bundle per length, without a range for it"
            )
        chunks = -(-length // CHUNK)
        return _Sizes(fixed(u.shape[0]), channels, states, length, chunks, -(-length // chunks))


def lower(context: Any, node: Any) -> None:
    """Lower one node. Raises `ExportError` for a symbolic length."""
    given = arguments(context, node, (*NAMES, "delta_softplus"), NAMES)
    sizes = _Sizes.of(given["u"], given["A"])
    g = Graph(FP32 + node.name)
    half = is_half(given["u"])
    tensors = {name: g.cast(given[name], "fp32") if half else given[name] for name in NAMES if name in given}
    if given.get("delta_softplus", False):
        tensors["delta"] = _softplus(g, tensors["delta"])
    y = _scan(g, sizes, tensors)
    skip = g.op("mul", x=tensors["u"], y=g.reshape(tensors["D"], sizes.channels, 1))
    last = "z" not in tensors and not half
    y = g.op("add", x=y, y=skip, name=FP32 + node.name if last else None)
    if "z" in tensors:
        gate = g.op("silu", x=tensors["z"])
        y = g.op("mul", x=y, y=gate, name=None if half else FP32 + node.name)
    context.add(g.op("cast", x=y, dtype="fp16", name=node.name) if half else y, torch_name=node.name)


def _softplus(g: Graph, x: Any) -> Any:
    """max(x, 0) + log1p(exp(-|x|)), as in the ONNX body, which names the source; MIL's op may lose small steps."""
    one, zero = np.float32(1.0), np.float32(0.0)
    e = g.op("exp", x=g.scaled(g.op("abs", x=x), -1.0))
    above = g.op("add", x=e, y=one)
    quotient = g.op("real_div", x=g.op("mul", x=e, y=g.op("log", x=above)), y=g.op("sub", x=above, y=one))
    log1p = g.op("select", cond=g.op("equal", x=above, y=one), a=e, b=quotient)
    return g.op("add", x=g.op("maximum", x=x, y=zero), y=log1p)


@dataclass(frozen=True)
class _Chunk:
    """What the recurrence reads of T tokens: delta and delta u `[T, B, 1, C]`, B `[T, B, S, 1]`, C `[T, B, 1, S]`."""

    delta: Any
    driven: Any
    weights_in: Any
    weights_out: Any


def _scan(g: Graph, sizes: _Sizes, tensors: dict[str, Any]) -> Any:
    """y_t = C_t . h_t as `[B, C, L]`."""
    chunks, tokens, channels, states = sizes.chunks, sizes.tokens, sizes.channels, sizes.states

    def tokens_first(x: Any, *last: int) -> Any:
        """`[B, X, L]` to `[chunks, tokens, B, *last]`, or without the first axis where there is one chunk.

        Tokens that fill up the last chunk have delta 0: they leave the state as it is.
        """
        x = g.padded(g.op("transpose", x=x, perm=[2, 0, 1]), 0, chunks * tokens - sizes.length)
        return g.reshape(x, *([chunks] if chunks > 1 else []), tokens, _rest(sizes.batch), *last)

    driven = g.op("mul", x=tensors["delta"], y=tensors["u"])
    rates = g.op("transpose", x=tensors["A"], perm=[1, 0])  # [S, C]
    whole = _Chunk(
        tokens_first(tensors["delta"], 1, channels),
        tokens_first(driven, 1, channels),
        tokens_first(tensors["B"], states, 1),
        tokens_first(tensors["C"], 1, states),
    )
    y = _advance(g, sizes, rates, None, whole)[1] if chunks == 1 else _loop(g, sizes, rates, whole)
    y = g.sliced(g.reshape(y, chunks * tokens, _rest(sizes.batch), channels), 0, 0, sizes.length)
    return g.op("transpose", x=y, perm=[1, 2, 0])


def _rest(batch: int | None) -> int:
    return -1 if batch is None else batch


def _advance(g: Graph, sizes: _Sizes, rates: Any, state: Any, chunk: _Chunk) -> tuple[Any, Any]:
    """The state `[1, B, S, C]` behind a chunk, and its y `[T, B, 1, C]`; the `state` before it is None for zeros."""
    decay = g.op("exp", x=g.op("mul", x=chunk.delta, y=rates))  # [T, B, S, C]
    drive = g.op("mul", x=chunk.weights_in, y=chunk.driven)
    decays, drives = _each(g, decay, sizes.tokens), _each(g, drive, sizes.tokens)
    states = []
    for decay_t, drive_t in zip(decays, drives, strict=True):
        state = drive_t if state is None else g.op("add", x=g.op("mul", x=decay_t, y=state), y=drive_t)
        states.append(state)
    every = states[0] if len(states) == 1 else g.op("concat", values=states, axis=0)
    return state, g.op("matmul", x=chunk.weights_out, y=every)


def _each(g: Graph, x: Any, count: int) -> list[Any]:
    """The slices of the first axis, which they keep."""
    return [x] if count == 1 else list(g.op("split", x=x, num_splits=count, axis=0))


def _loop(g: Graph, sizes: _Sizes, rates: Any, whole: _Chunk) -> Any:
    """y `[chunks, tokens, B, C]`: the state goes from chunk to chunk."""
    shape = (sizes.chunks, sizes.tokens, _rest(sizes.batch), sizes.channels)
    # Any tensor of this shape will do: every entry is written. A constant of zeros would be stored in the package.
    result = g.reshape(whole.driven, *shape)

    def more(number: Any, state: Any, result: Any) -> Any:
        return g.op("less", x=number, y=np.int32(sizes.chunks))

    def body(number: Any, state: Any, result: Any) -> tuple[Any, Any, Any]:
        tensors = (whole.delta, whole.driven, whole.weights_in, whole.weights_out)
        chunk = _Chunk(*(g.gather(x, number, axis=0) for x in tensors))
        state, y = _advance(g, sizes, rates, state, chunk)
        rows = g.reshape(y, 1, *shape[1:])
        place = g.op("expand_dims", x=number, axes=[0])
        result = g.op("scatter", data=result, indices=place, updates=rows, axis=0, mode="update")
        return g.op("add", x=number, y=np.int32(1)), state, result

    variables = (np.int32(0), _zeros(g, sizes, whole), result)
    _, _, result = g.op("while_loop", _cond=more, _body=body, loop_vars=variables)
    return result


def _zeros(g: Graph, sizes: _Sizes, whole: _Chunk) -> Any:
    """The first state, `[1, B, S, C]`."""
    if sizes.batch is not None:
        return np.zeros((1, sizes.batch, sizes.states, sizes.channels), np.float32)
    shape = g.op("shape", x=whole.driven)
    batch = g.op("slice_by_index", x=shape, begin=[2], end=[3])
    one = np.array([1], np.int32)
    rest = np.array([sizes.states, sizes.channels], np.int32)
    return g.op("fill", shape=g.op("concat", values=[one, batch, rest], axis=0), value=np.float32(0.0))
