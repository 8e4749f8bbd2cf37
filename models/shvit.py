"""SHViT, the single-head vision transformer.

Yun and Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", CVPR 2024, arXiv 2401.16456.
Three stages at strides 16, 32 and 64; the first mixes tokens with depthwise convolutions alone, the other two add
attention with one head over the first part of the channels. The keys are those of the authors' checkpoints. The image
preprocessing is assumed: the one usual for DeiT's recipe, not read from their code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.models.digits import DIGITS_INPUT, DIGITS_LABELS
from edgekit.models.fusion import (
    Fusable,
    add_identity,
    fold_norm_after,
    fold_norm_before,
    keeps_shape_depthwise,
    mean_layer,
)
from edgekit.models.layers import check_images, check_sizes
from edgekit.models.registry import ImageInput, register_model

if TYPE_CHECKING:
    from collections.abc import Sequence

PAPER = "arXiv 2401.16456 (CVPR 2024)"


class ConvNorm(Fusable):
    """Convolution without bias, then batch norm. `norm_scale` is the initial scale: 0 starts a branch silent."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, norm_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.constant_(self.bn.weight, norm_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.bn(self.c(x))
        return normed

    def fuse(self) -> nn.Module:
        return fold_norm_after(self.c, self.bn)


class NormLinear(Fusable):
    """Batch norm, then a linear layer: the classifier."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(inputs)
        self.l = nn.Linear(inputs, outputs)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.l(self.bn(x))
        return logits

    def fuse(self) -> nn.Module:
        return fold_norm_before(self.bn, self.l)


class Residual(Fusable):
    """`x + m(x)`; around a depthwise convolution it fuses to one convolution."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.m(x)
        return y

    def fuse(self) -> nn.Module:
        if isinstance(self.m, nn.Conv2d) and keeps_shape_depthwise(self.m):
            return add_identity(self.m)
        return self


class FeedForward(nn.Module):
    """Two 1x1 convolutions with twice the channels between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, 2 * dim)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(2 * dim, dim, norm_scale=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.pw2(self.act(self.pw1(x)))
        return y


class SingleHeadAttention(nn.Module):
    """Softmax attention with one head over the first `partial_dim` channels; the others pass by, not normalised."""

    def __init__(self, dim: int, partial_dim: int, qk_dim: int) -> None:
        super().__init__()
        self.parts = [partial_dim, dim - partial_dim]
        self.projections = [qk_dim, qk_dim, partial_dim]
        self.scale = qk_dim**-0.5
        self.pre_norm = nn.GroupNorm(1, partial_dim)
        self.qkv = ConvNorm(partial_dim, 2 * qk_dim + partial_dim)
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(dim, dim, norm_scale=0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, dim, H, W]` to the same shape; the tokens are the N = H * W positions."""
        attending, passing = torch.split(x, self.parts, dim=1)
        q, k, v = torch.split(self.qkv(self.pre_norm(attending)).flatten(2), self.projections, dim=1)  # [B, *, N]
        attention = ((q * self.scale).transpose(-2, -1) @ k).softmax(dim=-1)  # [B, N, N], rows are queries
        attended = (v @ attention.transpose(-2, -1)).reshape(attending.shape)
        mixed: torch.Tensor = self.proj(torch.cat([attended, passing], dim=1))
        return mixed


class Block(nn.Module):
    """Depthwise convolution, optional attention, feed-forward, each around a residual."""

    def __init__(self, dim: int, partial_dim: int, qk_dim: int, attention: bool) -> None:
        super().__init__()
        self.conv = Residual(ConvNorm(dim, dim, 3, groups=dim, norm_scale=0.0))
        self.mixer = Residual(SingleHeadAttention(dim, partial_dim, qk_dim)) if attention else nn.Identity()
        self.ffn = Residual(FeedForward(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.ffn(self.mixer(self.conv(x)))
        return y


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in 0..1 computed from the means of all channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        squeezed = max(8, (dim // 4 + 4) // 8 * 8)  # a quarter, rounded to a multiple of 8
        self.fc1 = nn.Conv2d(dim, squeezed, 1)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(squeezed, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class PatchMerging(nn.Module):
    """Halve height and width with a depthwise convolution at four times the channels."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv1 = ConvNorm(dim, hidden)
        self.act = nn.ReLU()
        self.conv2 = ConvNorm(hidden, hidden, 3, stride=2, groups=hidden)
        self.se = SqueezeExcite(hidden)
        self.conv3 = ConvNorm(hidden, out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.conv2(self.act(self.conv1(x))))
        y: torch.Tensor = self.conv3(self.se(hidden))
        return y


def _mix(dim: int) -> nn.Sequential:
    """The attention-free pair that stands before and after a `PatchMerging`."""
    return nn.Sequential(Residual(ConvNorm(dim, dim, 3, groups=dim)), Residual(FeedForward(dim)))


class SHViT(Fusable):
    """The whole classifier.

    Args:
        embed_dims: channels of the three stages; the first must be a multiple of 8.
        depths: blocks of the three stages.
        partial_dims: channels that attend, per stage.
        qk_dim: channels of a query and of a key.
        attention: which stages have attention.
        stem_strides: strides of the four stem convolutions.
        in_chans: channels of the image.
        num_classes: number of logits.
        distillation: whether there is a second head, for DeiT's hard distillation.

    Raises:
        ShapeError: `in_chans` or `num_classes` below one.
    """

    head_dist: nn.Module | None

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        partial_dims: Sequence[int],
        *,
        qk_dim: int = 16,
        attention: Sequence[bool] = (False, True, True),
        stem_strides: Sequence[int] = (2, 2, 2, 2),
        in_chans: int = 3,
        num_classes: int = 1000,
        distillation: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(in_chans=in_chans, num_classes=num_classes)
        self.in_chans = in_chans
        widths = [in_chans, *(embed_dims[0] // divisor for divisor in (8, 4, 2, 1))]
        stem: list[nn.Module] = []
        for i, stride in enumerate(stem_strides):
            stem += [ConvNorm(widths[i], widths[i + 1], 3, stride), nn.ReLU()]
        self.patch_embed = nn.Sequential(*stem[:-1])

        stages = []
        for i, dim in enumerate(embed_dims):
            entry = [] if i == 0 else [_mix(embed_dims[i - 1]), PatchMerging(embed_dims[i - 1], dim), _mix(dim)]
            blocks = [Block(dim, partial_dims[i], qk_dim, attention[i]) for _ in range(depths[i])]
            stages.append(nn.Sequential(*entry, *blocks))
        self.blocks1, self.blocks2, self.blocks3 = stages
        self.head: nn.Module = NormLinear(embed_dims[-1], num_classes)
        self.head_dist = NormLinear(embed_dims[-1], num_classes) if distillation else None

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images float `[B, in_chans, H, W]` to logits `[B, num_classes]`.

        With distillation the logits are the mean of the two heads; in train mode, both of them.

        Raises:
            ShapeError: the images have another shape.
        """
        check_images(images, model="SHViT", channels=self.in_chans, min_size=1)
        features = self.blocks3(self.blocks2(self.blocks1(self.patch_embed(images))))
        pooled = F.adaptive_avg_pool2d(features, 1).flatten(1)
        logits: torch.Tensor = self.head(pooled)
        if self.head_dist is None:
            return logits
        distilled: torch.Tensor = self.head_dist(pooled)
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def fuse(self) -> nn.Module:
        if isinstance(self.head, nn.Linear) and isinstance(self.head_dist, nn.Linear):
            self.head, self.head_dist = mean_layer(self.head, self.head_dist), None
        return self


@register_model(
    family="shvit",
    input=ImageInput(size=224),
    num_classes=1000,
    parameters=6_330_808,
    macs=241_320_768,
    paper=PAPER,
    summary="the smallest SHViT: 72.8 % ImageNet top-1",
)
def shvit_s1(*, num_classes: int = 1000, in_chans: int = 3, distillation: bool = False) -> SHViT:
    """SHViT-S1 for 224 x 224 images."""
    return SHViT(
        (128, 224, 320),
        (2, 4, 5),
        (32, 48, 68),
        in_chans=in_chans,
        num_classes=num_classes,
        distillation=distillation,
    )


@register_model(
    family="shvit",
    input=ImageInput(size=224),
    num_classes=1000,
    parameters=11_483_072,
    macs=365_394_896,
    paper=PAPER,
    summary="the second SHViT: 75.2 % ImageNet top-1",
)
def shvit_s2(*, num_classes: int = 1000, in_chans: int = 3, distillation: bool = False) -> SHViT:
    """SHViT-S2 for 224 x 224 images."""
    return SHViT(
        (128, 308, 448),
        (2, 4, 5),
        (32, 66, 96),
        in_chans=in_chans,
        num_classes=num_classes,
        distillation=distillation,
    )


@register_model(
    family="shvit",
    input=ImageInput(size=224),
    num_classes=1000,
    parameters=14_245_273,
    macs=600_570_164,
    paper=PAPER,
    summary="the third SHViT: 77.4 % ImageNet top-1",
)
def shvit_s3(*, num_classes: int = 1000, in_chans: int = 3, distillation: bool = False) -> SHViT:
    """SHViT-S3 for 224 x 224 images."""
    return SHViT(
        (192, 352, 448),
        (3, 5, 5),
        (48, 75, 96),
        in_chans=in_chans,
        num_classes=num_classes,
        distillation=distillation,
    )


@register_model(
    family="shvit",
    input=ImageInput(size=256),
    num_classes=1000,
    parameters=16_588_484,
    macs=986_216_960,
    paper=PAPER,
    summary="the largest SHViT: 79.4 % ImageNet top-1 at 256 x 256",
)
def shvit_s4(*, num_classes: int = 1000, in_chans: int = 3, distillation: bool = False) -> SHViT:
    """SHViT-S4 for 256 x 256 images."""
    return SHViT(
        (224, 336, 448),
        (4, 7, 6),
        (48, 72, 96),
        in_chans=in_chans,
        num_classes=num_classes,
        distillation=distillation,
    )


@register_model(
    family="shvit",
    input=DIGITS_INPUT,
    num_classes=10,
    parameters=188_278,
    macs=10_206_848,
    paper=PAPER,
    summary="a small SHViT for handwritten digits, with weights",
    dataset="digits",
    weights="shvit_digits.safetensors",
    labels=DIGITS_LABELS,
)
def shvit_digits(*, num_classes: int = 10, in_chans: int = 1, distillation: bool = False) -> SHViT:
    """SHViT for 32 x 32 gray images. The stem halves once, so that attention sees 64 and then 16 tokens."""
    return SHViT(
        (32, 48, 64),
        (1, 2, 2),
        (8, 12, 16),
        stem_strides=(2, 1, 1, 1),
        in_chans=in_chans,
        num_classes=num_classes,
        distillation=distillation,
    )
