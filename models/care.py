"""CARE Transformer: decoupled dual interaction, linear attention and convolution side by side.

Zhou et al., "CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction", CVPR 2025,
arXiv 2411.16170. The channels of a map are four groups of g: memory, attention, and two convolution branches. The
early stages replace attention by two strip convolutions. The keys are those of the authors' checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgekit.custom_ops.kernel_linear_attention.torch_op import kernel_linear_attention
from edgekit.models.digits import DIGITS_INPUT, DIGITS_LABELS
from edgekit.models.fusion import Fusable, fold_affine_before, fold_norm_before, mean_layer, scale_outputs
from edgekit.models.layers import check_images, check_sizes
from edgekit.models.registry import ImageInput, register_model

if TYPE_CHECKING:
    from collections.abc import Sequence

PAPER = "arXiv 2411.16170 (CVPR 2025)"


@dataclass(frozen=True)
class Stage:
    """`depth` blocks with four channel groups of `group`; `head_dim` None stands for strip convolutions.

    `ratios` are the expansions of the first interaction (the three mixed groups) and of the second (all four).
    """

    depth: int
    group: int
    ratios: tuple[int, int]
    head_dim: int | None = None

    @property
    def dim(self) -> int:
        return 4 * self.group


class TokenMixer(nn.Module):
    """Attention or strip convolutions on one group, 3x3 and 7x7 depthwise convolutions on two; memory passes by."""

    def __init__(self, group: int, head_dim: int | None) -> None:
        super().__init__()
        self.group, self.head_dim = group, head_dim
        if head_dim is None:
            self.dwconvatt_1 = nn.Conv2d(group, group, (11, 1), padding=(5, 0), groups=group)
            self.dwconvatt_2 = nn.Conv2d(group, group, (1, 11), padding=(0, 5), groups=group)
        self.dwconv1 = nn.Conv2d(group, group, 3, padding=1, groups=group)
        self.dwconv2 = nn.Conv2d(group, group, 7, padding=3, groups=group)
        if head_dim is not None:
            self.qk = nn.Conv2d(group, 2 * group, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, 4g, H, W]` to the memory `[B, g, H, W]` and the mixed groups `[B, 3g, H, W]`."""
        memory, attending, local, wide = torch.split(x, self.group, dim=1)
        mixed = torch.cat([self._attend(attending), self.dwconv1(local), self.dwconv2(wide)], dim=1)
        return memory, mixed

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        if self.head_dim is None:
            strips: torch.Tensor = self.dwconvatt_1(x) + self.dwconvatt_2(x)
            return strips
        q, k = torch.split(self.qk(x), self.group, dim=1)
        attended = kernel_linear_attention(self._heads(q), self._heads(k), self._heads(x), feature_map="elu1")
        return attended.transpose(-2, -1).reshape(x.shape)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, g, H, W]` to `[B, heads, N, head_dim]`; a head is a run of neighbouring channels."""
        batch, channels, height, width = x.shape
        assert self.head_dim is not None
        heads = x.reshape(batch, channels // self.head_dim, self.head_dim, height * width)
        return heads.transpose(-2, -1)


class Interaction(Fusable):
    """Two inverted bottlenecks: among the mixed groups, then among these and the memory."""

    inter2_fc2: nn.Conv2d | None

    def __init__(self, group: int, ratios: tuple[int, int], last: bool) -> None:
        super().__init__()
        mixed, dim = 3 * group, 4 * group
        inner1, inner2 = ratios[0] * mixed, ratios[1] * dim
        self.act = nn.GELU()
        self.inter1_norm: nn.Module = nn.BatchNorm2d(mixed)
        self.inter1_fc1 = nn.Conv2d(mixed, inner1, 1)
        self.inter1_conv = nn.Conv2d(inner1, inner1, 3, padding=1, groups=inner1)
        self.inter1_fc2 = nn.Conv2d(inner1, mixed, 1)
        self.inter2_norm: nn.Module = nn.BatchNorm2d(dim)
        self.inter2_fc1 = nn.Conv2d(dim, inner2, 1)
        self.inter2_conv = nn.Conv2d(inner2, inner2, 3, padding=1, groups=inner2)
        self.inter2_fc2 = None if last else nn.Conv2d(inner2, dim, 1)

    def forward(self, memory: torch.Tensor, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, g, H, W]` and `[B, 3g, H, W]` to the update and the map `[B, 4g, H, W]` that it belongs to.

        In the last block of the model the update stays expanded: `[B, ratios[1] * 4g, H, W]`.
        """
        hidden = self.inter1_conv(self.act(self.inter1_fc1(self.inter1_norm(mixed))))
        whole = torch.cat([memory, mixed + self.inter1_fc2(hidden)], dim=1)
        update = self.inter2_conv(self.act(self.inter2_fc1(self.inter2_norm(whole))))
        return (update if self.inter2_fc2 is None else self.inter2_fc2(update)), whole

    def fuse(self) -> nn.Module:
        if isinstance(self.inter1_norm, nn.BatchNorm2d) and isinstance(self.inter2_norm, nn.BatchNorm2d):
            self.inter1_fc1 = fold_norm_before(self.inter1_norm, self.inter1_fc1)
            self.inter2_fc1 = fold_norm_before(self.inter2_norm, self.inter2_fc1)
            self.inter1_norm, self.inter2_norm = nn.Identity(), nn.Identity()
        return self


class Block(Fusable):
    """Token mixing, interaction, and a residual scaled per channel by `gamma`, which starts at 1e-6.

    The last block of the model has neither `gamma` nor a residual: it returns the expanded map for the heads.
    """

    gamma: nn.Parameter | None

    def __init__(self, stage: Stage, last: bool) -> None:
        super().__init__()
        self.gamma = None if last else nn.Parameter(torch.full((stage.dim,), 1e-6))
        self.gamma_folded = False
        self.token_mixer = TokenMixer(stage.group, stage.head_dim)
        self.inter_layer = Interaction(stage.group, stage.ratios, last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory, mixed = self.token_mixer(x)
        update: torch.Tensor
        update, whole = self.inter_layer(memory, mixed)
        if self.gamma is None:
            return update
        gamma = self.gamma[:, None, None]
        scaled: torch.Tensor = update + gamma * whole if self.gamma_folded else gamma * (update + whole)
        return x + scaled

    def fuse(self) -> nn.Module:
        """Fold gamma into the last convolution; its product with the mixed map remains, as that map is computed."""
        conv = self.inter_layer.inter2_fc2
        if self.gamma is not None and conv is not None and not self.gamma_folded:
            self.inter_layer.inter2_fc2 = scale_outputs(conv, self.gamma)
            self.gamma_folded = True
        return self


class StageBlocks(nn.Module):
    """One stage: batch norm and a 2x2 convolution of stride 2 (not in the first stage), then the blocks."""

    def __init__(self, stage: Stage, previous: Stage | None, last: bool) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if previous is not None:
            self.downsample = nn.Sequential(nn.BatchNorm2d(previous.dim), nn.Conv2d(previous.dim, stage.dim, 2, 2))
        self.blocks = nn.Sequential(*(Block(stage, last and i == stage.depth - 1) for i in range(stage.depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.blocks(self.downsample(x))
        return y


class Head(nn.Module):
    """GELU, layer norm and a linear layer on the pooled features `[B, dim]`."""

    def __init__(self, dim: int, num_classes: int, affine: bool = True) -> None:
        super().__init__()
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.norm(self.act(pooled)))
        return logits


class CARE(Fusable):
    """The whole classifier, with a second head for DeiT's hard distillation.

    Args:
        stages: from the highest resolution down; each halves height and width of the one before.
        patch_size: side and stride of the stem's patches.
        in_chans: channels of the image.
        num_classes: number of logits.

    Raises:
        ShapeError: `in_chans` or `num_classes` below one.
    """

    dist_head: Head | None

    def __init__(
        self, stages: Sequence[Stage], *, patch_size: int = 4, in_chans: int = 3, num_classes: int = 1000
    ) -> None:
        super().__init__()
        check_sizes(in_chans=in_chans, num_classes=num_classes)
        self.in_chans = in_chans
        self.total_stride = patch_size * 2 ** (len(stages) - 1)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stages[0].dim, patch_size, patch_size), nn.BatchNorm2d(stages[0].dim)
        )
        self.stages = nn.Sequential()
        for i, stage in enumerate(stages):
            previous = stages[i - 1] if i > 0 else None
            self.stages.append(StageBlocks(stage, previous, last=i == len(stages) - 1))
        expanded = stages[-1].ratios[1] * stages[-1].dim
        self.head = Head(expanded, num_classes)
        self.dist_head = Head(expanded, num_classes)
        self.apply(_initialise)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[B, in_chans, H, W]` to the last map, `[B, C, H / total_stride, W / total_stride]`."""
        y: torch.Tensor = self.stages(self.stem(images))
        return y

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images float `[B, in_chans, H, W]` to logits `[B, num_classes]`: the mean of both heads; in train mode, both.

        Raises:
            ShapeError: the images have another shape.
        """
        check_images(images, model="CARE", channels=self.in_chans, min_size=self.total_stride)
        pooled = self.features(images).mean((2, 3))
        logits: torch.Tensor = self.head(pooled)
        if self.dist_head is None:
            return logits
        distilled: torch.Tensor = self.dist_head(pooled)
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def fuse(self) -> nn.Module:
        """Both heads normalise the same vector: their scales fold into the linear layers, and these into one."""
        if self.dist_head is not None:
            merged = Head(self.head.fc.in_features, self.head.fc.out_features, affine=False)
            folded = (fold_affine_before(head.norm, head.fc) for head in (self.head, self.dist_head))
            merged.fc = mean_layer(*folded)
            self.head, self.dist_head = merged, None
        return self


def _initialise(module: nn.Module) -> None:
    """Usual for vision transformers, and assumed here: the paper and the checkpoints do not tell the authors' own."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# The authors' evaluation transform is not published with the numbers; this is the one usual for DeiT's recipe.
_IMAGE = ImageInput(size=224)


@register_model(
    family="care",
    input=_IMAGE,
    num_classes=1000,
    parameters=7_340_000,
    macs=717_796_096,
    paper=PAPER,
    summary="the smallest CARE Transformer: 78.4 % ImageNet top-1",
)
def care_s0(*, num_classes: int = 1000, in_chans: int = 3) -> CARE:
    """CARE-S0 for 224 x 224 images."""
    stages = (
        Stage(2, 8, (2, 2)),
        Stage(4, 16, (2, 4)),
        Stage(8, 32, (4, 4), head_dim=16),
        Stage(4, 64, (4, 4), head_dim=32),
    )
    return CARE(stages, in_chans=in_chans, num_classes=num_classes)


@register_model(
    family="care",
    input=_IMAGE,
    num_classes=1000,
    parameters=9_602_424,
    macs=1_028_617_600,
    paper=PAPER,
    summary="the middle CARE Transformer: 80.1 % ImageNet top-1",
)
def care_s1(*, num_classes: int = 1000, in_chans: int = 3) -> CARE:
    """CARE-S1 for 224 x 224 images."""
    stages = (
        Stage(3, 8, (2, 4)),
        Stage(6, 16, (2, 4)),
        Stage(10, 32, (4, 4), head_dim=16),
        Stage(6, 64, (4, 4), head_dim=32),
    )
    return CARE(stages, in_chans=in_chans, num_classes=num_classes)


@register_model(
    family="care",
    input=_IMAGE,
    num_classes=1000,
    parameters=19_481_288,
    macs=1_923_109_952,
    paper=PAPER,
    summary="the largest CARE Transformer: 82.1 % ImageNet top-1",
)
def care_s2(*, num_classes: int = 1000, in_chans: int = 3) -> CARE:
    """CARE-S2 for 224 x 224 images."""
    stages = (
        Stage(3, 8, (4, 4)),
        Stage(6, 16, (4, 4)),
        Stage(10, 48, (4, 4), head_dim=16),
        Stage(6, 96, (4, 4), head_dim=32),
    )
    return CARE(stages, in_chans=in_chans, num_classes=num_classes)


@register_model(
    family="care",
    input=DIGITS_INPUT,
    num_classes=10,
    parameters=216_860,
    macs=8_514_048,
    paper=PAPER,
    summary="a small CARE Transformer for handwritten digits, with weights",
    dataset="digits",
    weights="care_digits.safetensors",
    labels=DIGITS_LABELS,
)
def care_digits(*, num_classes: int = 10, in_chans: int = 1) -> CARE:
    """CARE for 32 x 32 gray images: three stages at strides 2, 4 and 8, where attention sees 64 and 16 tokens."""
    stages = (
        Stage(1, 8, (2, 2)),
        Stage(2, 16, (2, 2), head_dim=8),
        Stage(2, 24, (2, 2), head_dim=12),
    )
    return CARE(stages, patch_size=2, in_chans=in_chans, num_classes=num_classes)
