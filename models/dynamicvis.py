"""DynamicVis: a state space model that scans the tokens that matter and lets the others pass.

Chen et al., "DynamicVis: An Efficient and General Visual Foundation Model for Remote Sensing Image Understanding",
arXiv 2503.16426. In each block a router scores the tokens; the best ones are scanned in the order of their scores, in
both directions, by a Mamba mixer (Gu and Dao, arXiv 2312.00752). The keys are those of the authors' checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.errors import WeightsError
from edgekit.models.digits import DIGITS_INPUT, DIGITS_LABELS
from edgekit.models.fusion import Fusable, fold_affine_before
from edgekit.models.layers import check_image_grid, check_images, check_sizes
from edgekit.models.mamba import MambaBlock
from edgekit.models.registry import ImageInput, register_model

PAPER = "arXiv 2503.16426"


@dataclass(frozen=True)
class Stage:
    """`depth` blocks of width `dim` on patches of the map before, `patch` pixels wide and `stride` apart.

    One token in `keep_ratio` is scanned.
    """

    dim: int
    depth: int
    keep_ratio: int
    patch: int = 3
    stride: int = 2


class PatchEmbed(nn.Module):
    """A strided convolution and a layer norm: a map to tokens."""

    def __init__(self, inputs: int, stage: Stage) -> None:
        super().__init__()
        self.projection = nn.Conv2d(inputs, stage.dim, stage.patch, stage.stride, padding=stage.patch // 2)
        self.norm = nn.LayerNorm(stage.dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, N, dim]`, row by row."""
        tokens: torch.Tensor = self.norm(self.projection(x).flatten(2).transpose(1, 2))
        return tokens


class SparseMixer(nn.Module):
    """The block: route, scan the kept tokens behind the means of the rows, write them back.

    Args:
        dim: channels.
        rows: height of the token map; the mean of each row leads the sequence as a global token. 0: none do.
        keep_ratio: one token in so many is kept, at least one.
        scale_all: whether a token also takes its own weighted value, as in all models with token selection.
    """

    def __init__(self, dim: int, rows: int, keep_ratio: int, scale_all: bool) -> None:
        super().__init__()
        self.rows, self.keep_ratio, self.scale_all = rows, keep_ratio, scale_all
        self.noise = 0.0
        self.spatial_gate = nn.Linear(dim, 1, bias=False)
        self.spatial_mamba_mixer = MambaBlock(dim)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[B, N, C]` to weights float32 `[B, N]`, which sum to one, and the kept tokens int64 `[B, K]`.

        In float32 whatever the dtype of `x`: the weights are near 1 / N, and their order is the order of the scan, from
        the largest down. Of equal weights the first token leads, as with ONNX's TopK; only in a program that
        torch.compile or torch.export made, run by torch, may another one. In train mode `noise` times Gumbel noise from
        torch's global generator is added to the scores.
        """
        tracing = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        x, gate = x.float(), self.spatial_gate.weight.float()
        # A graph has the sum of products, which stays in float32 when its matrix products become float16.
        scores = (x * gate.squeeze(0)).sum(-1) if tracing else F.linear(x, gate).squeeze(-1)
        if self.training and self.noise > 0:
            scores = scores - self.noise * torch.empty_like(scores).exponential_().log()
        weights = scores.softmax(-1)
        kept = max(1, x.shape[1] // self.keep_ratio)
        if tracing:
            return weights, weights.topk(kept).indices
        return weights, weights.sort(dim=-1, descending=True, stable=True).indices[:, :kept]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, N, C]` to the same shape."""
        batch, count, dim = x.shape
        weights, ids = self.route(x)
        # Rows of one matrix of all images: exporters make a Gather and a ScatterND of whole rows from these.
        rows = (ids + torch.arange(batch, device=ids.device).unsqueeze(1) * count).flatten()
        kept = x.reshape(-1, dim).index_select(0, rows).reshape(batch, -1, dim)
        scanned = kept
        if self.rows:
            scanned = torch.cat([x.reshape(batch, self.rows, -1, dim).mean(2), kept], dim=1)
        scanned = self.spatial_mamba_mixer(scanned)[:, self.rows :]
        changed = kept + (scanned * weights.gather(1, ids).unsqueeze(-1)).to(x.dtype)
        # What is scaled here shows only in the tokens that are left out: the kept ones are written over below.
        if self.scale_all and ids.shape[1] < count:
            x = (x * (1 + weights.unsqueeze(-1))).to(x.dtype)
        return x.reshape(-1, dim).index_put((rows,), changed.reshape(-1, dim)).reshape(batch, count, dim)


class StageLayers(nn.ModuleList):
    """Embedding, mixers and a layer norm. `rows`: height of the map if the means of its rows are scanned, else 0."""

    def __init__(self, inputs: int, stage: Stage, rows: int, scale_all: bool) -> None:
        mixers = (SparseMixer(stage.dim, rows, stage.keep_ratio, scale_all) for _ in range(stage.depth))
        super().__init__([PatchEmbed(inputs, stage), nn.Sequential(*mixers), nn.LayerNorm(stage.dim, eps=1e-6)])

    def forward(self, x: torch.Tensor, position: torch.Tensor | None) -> torch.Tensor:
        """A map `[B, C, H, W]` to tokens `[B, N, dim]`; `position` `[1, N, dim]` is added after the embedding."""
        embed, mixers, norm = self
        tokens: torch.Tensor = embed(x)
        normed: torch.Tensor = norm(mixers(tokens if position is None else tokens + position))
        return normed


class DynamicVis(nn.Module):
    """The backbone: images to one map per stage.

    Args:
        stages: from the highest resolution down.
        img_size: height and width of the images in pixels, or one number for both. Position embedding and number of
            global tokens belong to this size: another one is another model, with resized embedding.
        in_chans: channels of the image.
        global_tokens: whether the means of the rows are scanned before the kept tokens.
        scale_all: as for `SparseMixer`.
        pooled: return the normalised mean of the last map, `[B, dim]`, instead of the maps.

    Raises:
        ShapeError: a size that the strides do not divide, or `in_chans` below one.
    """

    post_meanpool_norm: nn.LayerNorm | None

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        img_size: int | Sequence[int],
        in_chans: int = 3,
        global_tokens: bool = True,
        scale_all: bool = True,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(in_chans=in_chans)
        self.in_chans = in_chans
        self.img_size = check_image_grid(img_size, math.prod(stage.stride for stage in stages))
        height, width = (size // stages[0].stride for size in self.img_size)
        self.grid = (height, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, height * width, stages[0].dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.strides = [stage.stride for stage in stages]
        self.layers = nn.ModuleList()
        inputs, height = in_chans, self.img_size[0]
        for stage in stages:
            height //= stage.stride
            self.layers.append(StageLayers(inputs, stage, height if global_tokens else 0, scale_all))
            inputs = stage.dim
        self.post_meanpool_norm = nn.LayerNorm(inputs, eps=1e-6) if pooled else None

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Images float `[B, in_chans, H, W]` of `img_size` to the maps `[B, dim, H / stride, W / stride]`, or pooled.

        A NaN or infinite pixel makes the whole answer for its image NaN: the router's softmax sees all tokens, and with
        `scale_all`, or where all are kept, each token is scaled by its weight.

        Raises:
            ShapeError: the images have another shape.
        """
        check_images(images, model="DynamicVis", channels=self.in_chans, size=self.img_size)
        maps, x, tokens = [], images, images
        height, width = self.img_size
        for index, (layers, stride) in enumerate(zip(self.layers, self.strides, strict=True)):
            height, width = height // stride, width // stride
            tokens = layers(x, self.pos_embed if index == 0 else None)
            x = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)
            maps.append(x)
        if self.post_meanpool_norm is None:
            return tuple(maps)
        pooled: torch.Tensor = self.post_meanpool_norm(tokens.mean(1))
        return pooled

    def set_progress(self, epoch: int, epochs: int) -> None:
        """Set the routers' noise for training epoch `epoch` of `epochs`, counted from 0: from 0.1 down to 1e-4."""
        for module in self.modules():
            if isinstance(module, SparseMixer):
                module.noise = (0.1 - 1e-4) * (1 - epoch / epochs) + 1e-4

    def adapt_checkpoint(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint as this backbone wants them: without heads, embedding resized.

        Of a whole model's checkpoint, a classifier's or a pretraining's, only the keys `backbone.` are taken, without
        that prefix. The norm behind the pooling is left out where this backbone does not pool.

        Raises:
            WeightsError: an embedding that is not square or of another width.
        """
        prefix = "backbone."
        if any(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if self.post_meanpool_norm is None:
            tensors = {key: value for key, value in tensors.items() if not key.startswith("post_meanpool_norm.")}
        return self.resize_embedding(tensors, "pos_embed")

    def resize_embedding(self, tensors: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
        """`tensors` with the square position embedding under `key` resized to this model's grid, bicubic.

        As in the authors' loader, one of the right shape stays as it is, even where that is 8 x 32 tokens for a
        checkpoint of 16 x 16: the shape does not tell them apart, and a model's own weights must load again.

        Raises:
            WeightsError: as for `adapt_checkpoint`.
        """
        given = tensors.get(key)
        if given is None or given.shape == self.pos_embed.shape:
            return tensors
        side = math.isqrt(given.shape[1]) if given.ndim == 3 else 0
        dim = self.pos_embed.shape[2]
        if given.ndim != 3 or given.shape != (1, side * side, dim) or side == 0:
            raise WeightsError(
                f"{key} of a checkpoint for another image size must be [1, side * side, {dim}] to be resized to "
                f"{self.grid[0]} x {self.grid[1]} tokens; got {list(given.shape)}. Take a checkpoint of square images "
                f"and of this model, or build with the img_size that it was trained at"
            )
        square = given.float().transpose(1, 2).reshape(1, dim, side, side)
        resized = F.interpolate(square, size=self.grid, mode="bicubic", align_corners=False)
        return {**tensors, key: resized.flatten(2).transpose(1, 2).contiguous().to(given.dtype)}


class Head(nn.Module):
    """The linear classifier."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(pooled)
        return logits


class DynamicVisClassifier(Fusable):
    """Backbone with pooling, and a linear layer.

    Raises:
        ShapeError: `num_classes` below one.
    """

    def __init__(self, backbone: DynamicVis, dim: int, num_classes: int) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes)
        self.backbone = backbone
        self.head = Head(dim, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images as for `DynamicVis` to logits `[B, num_classes]`."""
        logits: torch.Tensor = self.head(self.backbone(images))
        return logits

    def set_progress(self, epoch: int, epochs: int) -> None:
        """As `DynamicVis.set_progress`; a trainer calls it before each epoch."""
        self.backbone.set_progress(epoch, epochs)

    def adapt_checkpoint(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint with the position embedding resized; see `DynamicVis.resize_embedding`.

        Raises:
            WeightsError: a backbone alone, or with other parts than a classifier; or an embedding that does not fit.
        """
        others = sorted({key.split(".")[0] for key in tensors} - {"backbone", "head"})
        if others and ("pos_embed" in tensors or "backbone.pos_embed" in tensors):
            raise WeightsError(
                f"the checkpoint holds a DynamicVis backbone, but not with this classifier: expected the keys "
                f"backbone.* and head.fc.*; got {', '.join(f'{other}.*' for other in others)} too. Build with "
                f"features=True to load its backbone"
            )
        return self.backbone.resize_embedding(tensors, "backbone.pos_embed")

    def fuse(self) -> nn.Module:
        """The scale and shift of the last norm fold into the linear layer."""
        norm = self.backbone.post_meanpool_norm
        if norm is not None and norm.elementwise_affine:
            self.head.fc = fold_affine_before(norm, self.head.fc)
            self.backbone.post_meanpool_norm = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
        return self


def _build(
    stages: Sequence[Stage],
    img_size: int | Sequence[int],
    in_chans: int,
    num_classes: int,
    token_selection: bool,
    features: bool,
) -> DynamicVis | DynamicVisClassifier:
    """The backbone or the classifier. Without token selection all tokens are scanned, still in order of score."""
    if not token_selection:
        stages = [Stage(stage.dim, stage.depth, 1, stage.patch, stage.stride) for stage in stages]
    backbone = DynamicVis(
        stages,
        img_size=img_size,
        in_chans=in_chans,
        global_tokens=token_selection,
        scale_all=token_selection,
        pooled=not features,
    )
    return backbone if features else DynamicVisClassifier(backbone, stages[-1].dim, num_classes)


_IMAGE = ImageInput(size=512, crop_pct=1.0)
# Thousands of tokens have scores that differ in the last bits alone: rounding decides which of two is scanned first.
# With seeded weights PyTorch's own logits move by up to 8e-4 when the input is changed by one part in ten million.
_TOLERANCE = 2e-3
# In fp16 it decides more: when its weights alone are rounded to fp16, PyTorch's own logits move by 4e-4 for half of the
# digits, but by up to 0.14 for one of 64 (2e-2 over all of them), and as much when only its input is rounded. With the
# first stage's weights kept in fp32 it is 2e-3 over all and 0.02 at worst; packages keep none. The accuracy says what
# such a package is worth.
_HALF_TOLERANCE = 0.15


@register_model(
    family="dynamicvis",
    input=_IMAGE,
    num_classes=30,
    parameters=36_770_142,
    macs=17_577_564_672,
    paper=PAPER,
    summary="DynamicVis base for remote sensing scenes: 96.0 % F1 on AID",
    tolerance=_TOLERANCE,
)
def dynamicvis_base(
    *,
    num_classes: int = 30,
    in_chans: int = 3,
    img_size: int | Sequence[int] = 512,
    token_selection: bool = True,
    features: bool = False,
) -> DynamicVis | DynamicVisClassifier:
    """DynamicVis base. `features`: the backbone alone, which gives the maps at strides 4, 8, 16 and 32."""
    stages = (Stage(96, 2, 8, patch=7, stride=4), Stage(192, 4, 4), Stage(384, 16, 2), Stage(768, 4, 1))
    return _build(stages, img_size, in_chans, num_classes, token_selection, features)


@register_model(
    family="dynamicvis",
    input=_IMAGE,
    num_classes=30,
    parameters=91_275_038,
    macs=46_535_309_312,
    paper=PAPER,
    summary="DynamicVis large for remote sensing scenes: 96.3 % F1 on AID",
    tolerance=_TOLERANCE,
)
def dynamicvis_large(
    *,
    num_classes: int = 30,
    in_chans: int = 3,
    img_size: int | Sequence[int] = 512,
    token_selection: bool = True,
    features: bool = False,
) -> DynamicVis | DynamicVisClassifier:
    """DynamicVis large. `features`: the backbone alone, which gives the maps at strides 4, 8, 16 and 32."""
    stages = (Stage(128, 2, 8, patch=7, stride=4), Stage(256, 4, 4), Stage(512, 32, 2), Stage(1024, 4, 1))
    return _build(stages, img_size, in_chans, num_classes, token_selection, features)


@register_model(
    family="dynamicvis",
    input=DIGITS_INPUT,
    num_classes=10,
    parameters=176_506,
    macs=7_887_488,
    paper=PAPER,
    summary="a small DynamicVis for handwritten digits, with weights",
    dataset="digits",
    weights="dynamicvis_digits.safetensors",
    labels=DIGITS_LABELS,
    half_tolerance=_HALF_TOLERANCE,
)
def dynamicvis_digits(
    *,
    num_classes: int = 10,
    in_chans: int = 1,
    img_size: int | Sequence[int] = 32,
    token_selection: bool = True,
    features: bool = False,
) -> DynamicVis | DynamicVisClassifier:
    """DynamicVis for 32 x 32 gray images: of 256, 64 and 16 tokens it scans 64, 32 and all 16."""
    stages = (Stage(32, 2, 4), Stage(48, 2, 2), Stage(64, 2, 1))
    return _build(stages, img_size, in_chans, num_classes, token_selection, features)
