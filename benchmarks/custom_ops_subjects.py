"""What the benchmark of the custom ops runs: its inputs, our kernels in three wrappings, and their rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from benchmarks.turns import Subject
from edgekit.custom_ops.registry import find_op
from edgekit.runtime.kernel_library import KernelLibrary, find_libraries, kernels_root, misfit, this_host
from edgekit.runtime.onnxruntime_backend import session_options

OPSET = 20
HEADS, DIM, BLOCK = 8, 64, 64
CHANNELS, STATES = 192, 16
PEAK_SIZE, COPY_FLOATS = 1024, 2**26

Tensors = dict[str, torch.Tensor]


@cache
def native_library() -> KernelLibrary:
    """The best built library that fits this CPU."""
    host = this_host()
    found = [each.library for each in find_libraries(kernels_root()) if each.library and not misfit(each.library, host)]
    if not found:
        raise SystemExit("no native kernels for this CPU; run: edgekit kernels build")
    return max(found, key=lambda library: len(library.features))


def sparse_inputs(length: int, budget: int) -> Tensors:
    """Random q, k, v, and for each query block its own key block and others before it, `budget` at most."""
    generator = torch.Generator().manual_seed(length + budget)
    blocks = length // BLOCK
    index = torch.full((1, HEADS, blocks, min(budget, blocks)), -1, dtype=torch.int32)
    for head in range(HEADS):
        for row in range(blocks):
            count = min(budget, row + 1)
            others = torch.randperm(row, generator=generator)[: count - 1]
            index[0, head, row, :count] = torch.cat([others, torch.tensor([row])]).sort().values
    tensors = {name: torch.randn(1, HEADS, length, DIM, generator=generator) for name in "qkv"}
    return {**tensors, "block_index": index}


def scan_inputs(length: int) -> Tensors:
    """Random inputs with steps and decays as a trained model has them: 0.001 to 0.1, and -1 to -16."""
    generator = torch.Generator().manual_seed(length)
    steps = torch.rand(1, CHANNELS, length, generator=generator)
    return {
        "u": torch.randn(1, CHANNELS, length, generator=generator),
        "delta": 0.001 * 100**steps,
        "A": -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1),
        "B": torch.randn(1, STATES, length, generator=generator),
        "C": torch.randn(1, STATES, length, generator=generator),
        "D": torch.randn(CHANNELS, generator=generator),
    }


def block_pairs(inputs: Tensors) -> int:
    """How many pairs of a query block and a key block are processed."""
    return int((inputs["block_index"] >= 0).sum())


def sparse_truth(inputs: Tensors) -> torch.Tensor:
    q, k, v = (inputs[name].double() for name in "qkv")
    return torch.ops.edgekit.block_sparse_attention(q, k, v, inputs["block_index"])  # tested against the reference


def bare_kernel(op: str, parameters: Mapping[str, int], threads: int) -> Callable[..., object]:
    """The kernel that the library would choose for these parameters, compiled for this CPU, on TVM's threads."""
    from edgekit.kernels.tvm import catalog, compat, targets

    arch = targets.get_arch(native_library().arch)
    fitting = [
        kernel
        for kernel in catalog.kernels(arch)
        if kernel.op == op and kernel.dtype == "float32" and set(kernel.parameters) <= set(parameters.items())
    ]
    compat.set_threads(threads)
    return compat.jit(fitting[0].module(arch), arch.target)(fitting[0].symbol)


def sparse_kernel(inputs: Tensors, threads: int) -> Subject:
    kernel = bare_kernel("BlockSparseAttention", {"head_dim": DIM, "block_q": BLOCK, "block_k": BLOCK}, threads)
    out = torch.empty_like(inputs["q"])

    def run() -> torch.Tensor:
        kernel(*inputs.values(), out, DIM**-0.5, 0.0, 1, 0, BLOCK, BLOCK)
        return out

    return run


def one_node_model(op: str, inputs: Tensors, attributes: Mapping[str, Any]) -> onnx.ModelProto:
    """A model of one node, with the op's function body."""
    dtypes = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32}
    values = [
        helper.make_tensor_value_info(name, dtypes[tensor.dtype], tensor.shape) for name, tensor in inputs.items()
    ]
    node = helper.make_node(op, list(inputs), ["out"], domain="edgekit", **attributes)
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], op, values, [out]),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("edgekit", 1)],
        ir_version=10,
    )
    model.functions.extend(find_op(op).functions(OPSET, model.graph.node))
    return model


def sparse_model(inputs: Tensors) -> onnx.ModelProto:
    attributes = {"block_q": BLOCK, "block_k": BLOCK, "causal": 1, "scale": DIM**-0.5, "softcap": 0.0, "window": 0}
    return one_node_model("BlockSparseAttention", inputs, attributes)


def onnxruntime_run(model: onnx.ModelProto, inputs: Tensors, threads: int, *, native: bool) -> Subject:
    options = session_options(threads)
    if native:
        options.register_custom_ops_library(str(native_library().path))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


def onnx_attention(inputs: Tensors, threads: int) -> Subject:
    """ONNX's own Attention, dense and causal."""
    names = ("q", "k", "v")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, inputs[name].shape) for name in names]
    node = helper.make_node("Attention", list(names), ["out"], is_causal=1)
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "attention", values, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return onnxruntime_run(model, {name: inputs[name] for name in names}, threads, native=False)


def group_query_attention(
    inputs: Tensors, threads: int, *, scale: float | None = None, softcap: float = 0.0, window: int = 0
) -> Subject:
    """onnxruntime's GroupQueryAttention, causal; heads are packed and unpacked outside of the timing.

    Args:
        inputs: q `[1, Hq, N, D]`, k and v `[1, Hkv, N, D]`.
        threads: of the session.
        scale: factor of the scores; None for D^-0.5.
        softcap, window: 0 for none.
    """
    _, heads, length, dim = inputs["q"].shape
    packed = {name: inputs[name].transpose(1, 2).reshape(1, length, -1).contiguous() for name in "qkv"}
    feeds = {
        **packed,
        "seqlens_k": torch.full((1,), length - 1, dtype=torch.int32),
        "total": torch.tensor(length, dtype=torch.int32),
    }
    values = [
        helper.make_tensor_value_info(
            name, TensorProto.INT32 if tensor.dtype == torch.int32 else TensorProto.FLOAT, tensor.shape
        )
        for name, tensor in feeds.items()
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "", "", "seqlens_k", "total"],
        ["out", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=inputs["k"].shape[1],
        scale=dim**-0.5 if scale is None else scale,
        softcap=softcap,
        local_window_size=window or -1,
    )
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    model = helper.make_model(
        helper.make_graph([node], "attention", values, outputs),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    run = onnxruntime_run(model, feeds, threads, native=False)
    return lambda: run().unflatten(-1, (heads, dim)).transpose(1, 2)


def flex_attention_run(inputs: Tensors) -> Subject:
    """torch's compiled flex_attention, skipping the blocks that ours skips."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (inputs[name] for name in "qkv")
    length, blocks = q.shape[2], q.shape[2] // BLOCK
    listed = torch.zeros(HEADS, blocks, blocks + 1, dtype=torch.bool)
    listed.scatter_(2, inputs["block_index"][0].long() % (blocks + 1), True)  # -1 goes to the last column

    def allowed(_: Any, head: Any, query: Any, key: Any) -> Any:
        return listed[head, query // BLOCK, key // BLOCK] & (query >= key)

    mask = create_block_mask(allowed, B=None, H=HEADS, Q_LEN=length, KV_LEN=length, BLOCK_SIZE=BLOCK, device="cpu")
    torch._dynamo.reset()  # or it counts this as one recompilation too many, and runs uncompiled
    compiled = torch.compile(flex_attention)
    return torch.no_grad()(lambda: compiled(q, k, v, block_mask=mask))


def matmul() -> Subject:
    a, b = torch.randn(PEAK_SIZE, PEAK_SIZE), torch.randn(PEAK_SIZE, PEAK_SIZE)
    return lambda: torch.mm(a, b)


def memory_copy() -> Subject:
    """A copy between buffers that fit no cache: the yardstick of memory bandwidth."""
    source, target = torch.zeros(COPY_FLOATS), torch.zeros(COPY_FLOATS)
    return lambda: target.copy_(source)
