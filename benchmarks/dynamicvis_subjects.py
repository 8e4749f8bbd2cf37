"""What the benchmark of DynamicVis runs: its exports, and plain ViT-B/16 in three forms."""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper

import edgekit
from benchmarks.session_peak import image
from benchmarks.turns import Subject
from edgekit.custom_ops.selective_scan import reference
from edgekit.export.onnx import quiet
from edgekit.export.source import load_model
from edgekit.models import mamba
from edgekit.runtime.onnxruntime_backend import session_options

MODEL, CLASSES = "dynamicvis_base", 30
OURS, ALL_TOKENS = "dynamicvis", "dynamicvis, all tokens"
PLAIN, ATTENTION, FUSED = "ViT plain", "ViT Attention", "ViT fused"
_OPSETS = {PLAIN: 20, ATTENTION: 23}
_HEADS = 12


def model_file(subject: str, size: int, folder: Path) -> Path:
    """The ONNX file of a subject for images of `size` x `size`, exported into `folder` unless it is there."""
    path = folder / f"{subject.replace(', ', '_').replace(' ', '_')}_{size}.onnx"
    if not path.exists():
        part = path.with_suffix(".part")
        if subject in (OURS, ALL_TOKENS):
            _export_ours(subject, size, folder, part)
        elif subject == FUSED:
            fused = fuse_attention(onnx.load(model_file(ATTENTION, size, folder)))
            onnx.save(fused, part)
        else:
            _export_vit(size, _OPSETS[subject], part)
        part.rename(path)
    return path


def _overrides(subject: str, size: int) -> dict[str, object]:
    return {"img_size": size, "token_selection": subject == OURS}


def _export_ours(subject: str, size: int, folder: Path, path: Path) -> None:
    bundle = edgekit.export(
        MODEL, "onnx", folder, name=path.stem, weights="random", overrides=_overrides(subject, size), check=False
    )
    (bundle.path / bundle.manifest.model_file).replace(path)
    shutil.rmtree(bundle.path)


def _export_vit(size: int, opset: int, path: Path) -> None:
    """ViT-B/16 with a linear classifier on its class token, from the transformers library; random weights.

    At opset 20 attention is MatMul, Softmax, MatMul; from opset 23 on it is the op Attention.
    """
    from transformers import ViTConfig, ViTForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(image_size=size)
        config.num_labels = CLASSES
        config._attn_implementation = "sdpa" if opset >= 23 else "eager"
        model = _Logits(ViTForImageClassification(config)).eval()
        with torch.no_grad():  # else both would be zeros and small, and nothing that they do could be compared
            model.vit.vit.embeddings.cls_token.normal_()
            model.vit.vit.embeddings.position_embeddings.normal_(std=0.1)
    with quiet():
        program = torch.onnx.export(
            model,
            (torch.from_numpy(image(size)),),
            input_names=["image"],
            output_names=["logits"],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path)


class _Logits(torch.nn.Module):
    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.vit(pixel_values=image).logits
        return logits


def fuse_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """Attention nodes as onnxruntime's MultiHeadAttention, which computes them blockwise on the CPU.

    It takes and gives `[B, N, heads * dim]`, so that the Reshapes and Transposes around each node go.
    """
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    used = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            used[name].append(node)
    gone, fused = set(), {}
    for node in graph.node:
        if node.op_type != "Attention":
            continue
        flat = []
        for name in node.input[:3]:
            transpose = made[name]
            reshape = made[transpose.input[0]]
            if (transpose.op_type, reshape.op_type) != ("Transpose", "Reshape"):
                raise SystemExit(f"ViT's attention was exported in a form that is not known: {node.name}")
            flat.append(reshape.input[0])
            gone |= {id(transpose), id(reshape)}
        (transpose,) = used[node.output[0]]
        (reshape,) = used[transpose.output[0]]
        if (transpose.op_type, reshape.op_type) != ("Transpose", "Reshape"):
            raise SystemExit(f"ViT's attention was exported in a form that is not known: {node.name}")
        gone |= {id(transpose), id(reshape)}
        fused[id(node)] = helper.make_node(
            "MultiHeadAttention",
            flat,
            [reshape.output[0]],
            name=node.name,
            domain="com.microsoft",
            num_heads=_HEADS,
        )
    nodes = [fused.get(id(node), node) for node in graph.node if id(node) not in gone]
    del graph.node[:]
    graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def session_run(path: Path, size: int, threads: int, library: str | None = None) -> Subject:
    """Runs of a model on the image, in a session of onnxruntime with its defaults."""
    options = session_options(threads)
    if library:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: image(size)}
    return lambda: np.asarray(session.run(None, feeds)[0])


def torch_run(size: int) -> Subject:
    """The PyTorch model that is exported; its scan is the op's eager form."""
    module = copy.deepcopy(load_model(MODEL, weights="random", overrides=_overrides(OURS, size)).module)
    x = torch.from_numpy(image(size))

    @torch.inference_mode()
    def run() -> Any:
        return np.asarray(module(x).numpy())

    return run


def torch_loop_run(size: int) -> Subject:
    """The same PyTorch model with the op's reference: one token after the other."""
    run = torch_run(size)

    def loop() -> object:
        with mock.patch.object(mamba, "selective_scan", wraps=reference.selective_scan) as scan:
            answer = run()
        if scan.call_count == 0:
            raise SystemExit("the model's scan was not replaced by the token loop: not timed")
        return answer

    return loop


def transformers_loop_run(size: int) -> Subject:
    """The same PyTorch model with the mixer of the transformers library, whose scan the authors' code runs on a CPU.

    Both directions are a batch that goes through the whole mixer. exp(delta A) and delta B u of all tokens are laid out
    first, `[2, 2C, L, 16]` each; then a loop over the tokens slices them, as in the 4.50 that the authors name.
    """
    module = copy.deepcopy(load_model(MODEL, weights="random", overrides=_overrides(OURS, size)).module)
    for block in module.modules():
        if isinstance(block, mamba.MambaBlock):
            block.mamba_layer = _TransformersMixer(block.mamba_layer)  # type: ignore[assignment]
    x = torch.from_numpy(image(size))

    @torch.inference_mode()
    def run() -> Any:
        return np.asarray(module(x).numpy())

    return run


class _TransformersMixer(torch.nn.Module):
    """`edgekit.models.mamba.MambaMixer` with the library's mixer inside: the mean of both directions."""

    def __init__(self, ours: torch.nn.Module) -> None:
        super().__init__()
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        state = ours.state_dict()
        config = MambaConfig(
            hidden_size=state["out_proj.weight"].shape[0],
            state_size=state["A_log"].shape[1],
            time_step_rank=state["dt_proj.weight"].shape[1],
            use_bias=False,
            use_mambapy=False,
            use_associative_scan=False,
        )
        self.mixer = MambaMixer(config, layer_idx=0).eval()
        self.mixer.load_state_dict(state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        forward, backward = self.mixer(torch.cat([x, x.flip(1)])).chunk(2)
        mean: torch.Tensor = (forward + backward.flip(1)) / 2
        return mean
