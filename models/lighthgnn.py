"""HGNN and HGNN+, which classify the vertices of a hypergraph, and LightHGNN's student, which does so without it.

HGNN: Feng et al., AAAI 2019, arXiv 1809.09401. HGNN+: Gao et al., TPAMI 2022, doi 10.1109/TPAMI.2022.3182052.
LightHGNN: Feng et al., "LightHGNN: Distilling Hypergraph Neural Networks into MLPs for 100x Faster Inference", ICLR
2024, arXiv 2402.04296; the student is trained in `edgekit.models.train_lighthgnn`. The keys are those of the authors'
models; checkpoints of dhg and of the authors' production setting are renamed on loading.

Smoothing with the Laplacian H W De^-1 H^T is written as what it factors into: every hyperedge gathers and sums its
vertices, every vertex its hyperedges, by the tables of `edgekit.models.sum_tables`. Nothing of size V x V exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.errors import ShapeError
from edgekit.models.digits import DIGITS_LABELS
from edgekit.models.fusion import Fusable, fold_norm_before
from edgekit.models.layers import check_sizes
from edgekit.models.registry import TensorInput, TensorInputs, register_model
from edgekit.models.segment_sums import table_sums
from edgekit.models.vertex_sets import (
    digits_features_example,
    digits_hypergraph_example,
    features_example,
    hypergraph_example,
    labelled_digits_features,
    labelled_digits_hypergraph,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

HGNN_PAPER = "arXiv 1809.09401 (AAAI 2019)"
HGNNP_PAPER = "doi 10.1109/TPAMI.2022.3182052 (TPAMI 2022)"
LIGHTHGNN_PAPER = "arXiv 2402.04296 (ICLR 2024)"

Kind = Literal["hgnn", "hgnnp"]


@dataclass(frozen=True, eq=False)
class Incidence:
    """Who belongs to what, as all layers of a forward pass take it; see `HGNN.forward`."""

    members: torch.Tensor
    member_chunks: torch.Tensor
    memberships: torch.Tensor
    membership_chunks: torch.Tensor
    vertex_degree: torch.Tensor
    member_weight: torch.Tensor

    def smooth(self, x: torch.Tensor, kind: Kind) -> torch.Tensor:
        """`[V, C]` to `[V, C]`: from vertices to hyperedges and back, with the factors between.

        HGNN multiplies by Dv^-1/2 before and after, HGNN+ by Dv^-1 after. A degree that is not positive gives factor 0.
        """
        positive = self.vertex_degree > 0
        degree = torch.where(positive, self.vertex_degree, torch.ones_like(self.vertex_degree))
        factor = degree.rsqrt() if kind == "hgnn" else degree.reciprocal()
        factor = torch.where(positive, factor, torch.zeros_like(factor)).unsqueeze(1)
        if kind == "hgnn":
            x = factor * x
        sums = self.member_weight.unsqueeze(1) * table_sums(x, self.members, self.member_chunks)
        return factor * table_sums(sums, self.memberships, self.membership_chunks)


class HypergraphConv(nn.Module):
    """A linear layer, whose bias is smoothed too, smoothing, and unless it is the last: ReLU, batch norm, dropout.

    This is the order of dhg 0.9.4. The last layer has a batch norm too, where `use_bn`, which nothing uses: dhg's
    checkpoints have it.
    """

    bn: nn.BatchNorm1d | None

    def __init__(
        self, in_features: int, out_features: int, *, kind: Kind, use_bn: bool, dropout: float, last: bool
    ) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.last = last
        self.bn = nn.BatchNorm1d(out_features) if use_bn else None
        self.drop = nn.Dropout(dropout)
        self.theta = nn.Linear(in_features, out_features)

    def forward(self, x: torch.Tensor, incidence: Incidence) -> torch.Tensor:
        """`[V, in]` to `[V, out]`."""
        y = incidence.smooth(self.theta(x), self.kind)
        if not self.last:
            y = F.relu(y)
            if self.bn is not None:
                y = self.bn(y)
            y = self.drop(y)
        return y


class HGNN(Fusable):
    """Two hypergraph convolutions: HGNN, or HGNN+ with `kind="hgnnp"`.

    Args:
        num_features: F, columns of the features.
        num_classes: K, number of logits.
        hidden: width between the two layers.
        kind: which smoothing.
        use_bn: batch norm after the first layer's ReLU.
        dropout: rate after the first layer, in training.

    Raises:
        ShapeError: a size below one, or a dropout that is not in 0..1.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        hidden: int = 32,
        kind: Kind = "hgnn",
        use_bn: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_sizes(num_features=num_features, num_classes=num_classes, hidden=hidden)
        _check_dropout(dropout)
        self.kind: Kind = kind
        self.layers0 = HypergraphConv(num_features, hidden, kind=kind, use_bn=use_bn, dropout=dropout, last=False)
        self.layers1 = HypergraphConv(hidden, num_classes, kind=kind, use_bn=use_bn, dropout=dropout, last=True)

    def forward(
        self,
        features: torch.Tensor,
        members: torch.Tensor,
        member_chunks: torch.Tensor,
        memberships: torch.Tensor,
        membership_chunks: torch.Tensor,
        vertex_degree: torch.Tensor,
        member_weight: torch.Tensor,
    ) -> torch.Tensor:
        """Logits `[V, num_classes]`. `edgekit.models.hypergraph.Hypergraph.inputs` gives all seven.

        Args:
            features: float `[V, F]`.
            members: int64 `[E, M]` in 0..V+Q: what each hyperedge sums up, vertices and chunks of them.
            member_chunks: int64 `[Q, L]` in 0..V+Q: the vertices of each chunk. See `edgekit.models.sum_tables`.
            memberships: int64 `[V, D]` in 0..E+T: what each vertex sums up, hyperedges and chunks of them.
            membership_chunks: int64 `[T, K]` in 0..E+T: the hyperedges of each chunk.
            vertex_degree: float `[V]`, sum of the weights of a vertex's hyperedges.
            member_weight: float `[E]`, weight of a hyperedge over its number of vertices.

        Raises:
            ShapeError: the shapes do not fit together, indices out of range, or the features have another width.
        """
        width = self.layers0.theta.in_features
        _check_features(features, width, type(self).__name__)
        incidence = Incidence(members, member_chunks, memberships, membership_chunks, vertex_degree, member_weight)
        if not (torch.compiler.is_exporting() or torch.compiler.is_compiling()):
            _check_incidence(features, incidence)
        logits: torch.Tensor = self.layers1(self.layers0(features, incidence), incidence)
        return logits

    def fuse(self) -> nn.Module:
        """The first layer's batch norm stands right before the second's linear layer, and folds into it."""
        if self.layers0.bn is not None:
            self.layers1.theta = fold_norm_before(self.layers0.bn, self.layers1.theta)
        self.layers0.bn = self.layers1.bn = None
        return self

    def adapt_checkpoint(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """dhg's own models keep their layers in a list: `layers.0.` and `layers.1.`."""
        return {re.sub(r"^layers\.([01])\.", r"layers\1.", key): value for key, value in tensors.items()}


class Hidden(nn.Module):
    """Linear, ReLU, batch norm, dropout: in this order, as dhg's MLP."""

    def __init__(self, num_features: int, hidden: int, *, use_bn: bool, dropout: float) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(hidden) if use_bn else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(num_features, hidden), nn.ReLU(), norm, nn.Dropout(dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


class Student(Fusable):
    """LightHGNN's student: a plain MLP of two layers on the features of each vertex, without the hypergraph.

    Args:
        num_features: F, columns of the features.
        num_classes: K, number of logits.
        hidden: width of the hidden layer.
        use_bn: batch norm after the ReLU.
        dropout: rate after the hidden layer, in training.

    Raises:
        ShapeError: a size below one, or a dropout that is not in 0..1.
    """

    def __init__(
        self, num_features: int, num_classes: int, *, hidden: int = 128, use_bn: bool = True, dropout: float = 0.5
    ) -> None:
        super().__init__()
        check_sizes(num_features=num_features, num_classes=num_classes, hidden=hidden)
        _check_dropout(dropout)
        self.num_features = num_features
        self.layer0 = Hidden(num_features, hidden, use_bn=use_bn, dropout=dropout)
        self.layer1 = nn.Linear(hidden, num_classes)

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Features float `[V, F]` to the hidden layer's answers `[V, hidden]`."""
        _check_features(features, self.num_features, type(self).__name__)
        y: torch.Tensor = self.layer0(features)
        return y

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features float `[V, F]` to logits `[V, K]`.

        Raises:
            ShapeError: the features have another shape.
        """
        logits: torch.Tensor = self.layer1(self.embed(features))
        return logits

    def fuse(self) -> nn.Module:
        """The batch norm comes after the ReLU, so it folds forward, into the last layer."""
        norm = self.layer0.layers[2]
        if isinstance(norm, nn.BatchNorm1d):
            self.layer1 = fold_norm_before(norm, self.layer1)
            self.layer0.layers[2] = nn.Identity()
        return self

    def adapt_checkpoint(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The authors' production setting puts both layers into a Sequential: `0.layers.` and `1.`."""
        names = {"0.": "layer0.", "1.": "layer1."}
        return {names[key[:2]] + key[2:] if key[:2] in names else key: value for key, value in tensors.items()}


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout <= 1:
        raise ShapeError(f"dropout is a rate in 0..1; got {dropout}")


def _check_features(features: torch.Tensor, width: int, model: str) -> None:
    if features.ndim != 2 or features.shape[1] != width:
        hint = "; one vertex is a batch of one: features[None]" if features.ndim == 1 else ""
        raise ShapeError(
            f"this {model} takes features [V, {width}], one row per vertex; got {tuple(features.shape)}{hint}"
        )


def _check_incidence(features: torch.Tensor, incidence: Incidence) -> None:
    """Eager PyTorch would answer some of these mistakes with a broadcast or with memory that is not its own."""
    tensors = vars(incidence)
    ranks = [tensor.ndim for tensor in tensors.values()] == [2, 2, 2, 2, 1, 1]
    degrees, weights = incidence.vertex_degree.shape[:1], incidence.member_weight.shape[:1]
    rows = (features.shape[:1], incidence.memberships.shape[:1], incidence.members.shape[:1])
    if not ranks or rows != (degrees, degrees, weights) or not all(map(len, tensors.values())):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ShapeError(
            "expected members [E, M], member_chunks [Q, L], memberships [V, D], membership_chunks [T, K], "
            "vertex_degree [V], member_weight [E] for features [V, F], none of them empty; got "
            f"{shapes} for {list(features.shape)}; use Hypergraph.inputs"
        )
    for names, items in ((("members", "member_chunks"), "V+Q"), (("memberships", "membership_chunks"), "E+T")):
        first, second = (tensors[name] for name in names)
        last = (len(features) if items == "V+Q" else len(incidence.member_weight)) + len(second)
        for name, table in zip(names, (first, second), strict=True):
            if table.numel() and (int(table.min()) < 0 or int(table.max()) > last):
                raise ShapeError(
                    f"{name} lie in 0..{items}, which is 0..{last}; got {int(table.min())}..{int(table.max())}"
                )


def _incidence_inputs(num_features: int | str = "num_features") -> tuple[TensorInput, ...]:
    return (
        TensorInput("features", ("V", num_features)),
        TensorInput("members", ("E", "M"), "int64", index_of="V+Q+1"),
        TensorInput("member_chunks", ("Q", "L"), "int64", index_of="V+Q+1"),
        TensorInput("memberships", ("V", "D"), "int64", index_of="E+T+1"),
        TensorInput("membership_chunks", ("T", "K"), "int64", index_of="E+T+1"),
        TensorInput("vertex_degree", ("V",)),
        TensorInput("member_weight", ("E",)),
    )


def _teacher_example(seed: int, *, num_features: int = 1433, **_: object) -> dict[str, NDArray[Any]]:
    return hypergraph_example(seed, num_features)


def _student_example(seed: int, *, num_features: int = 1433, **_: object) -> dict[str, NDArray[Any]]:
    return features_example(seed, num_features)


def _digits_teacher_example(seed: int, **_: object) -> dict[str, NDArray[Any]]:
    return digits_hypergraph_example(seed)


def _digits_student_example(seed: int, **_: object) -> dict[str, NDArray[Any]]:
    return digits_features_example(seed)


_TEACHER_INPUT = TensorInputs(_incidence_inputs(), "vertex", _teacher_example)
_STUDENT_INPUT = TensorInputs((TensorInput("features", ("V", "num_features")),), "vertex", _student_example)


@register_model(
    family="lighthgnn",
    input=_TEACHER_INPUT,
    num_classes=7,
    parameters=46_119,
    macs=46_080,
    paper=HGNN_PAPER,
    summary="HGNN for the features of Cora: classifies the vertices of a hypergraph",
)
def hgnn(
    *, num_features: int = 1433, num_classes: int = 7, hidden: int = 32, use_bn: bool = False, dropout: float = 0.5
) -> HGNN:
    """HGNN, the usual teacher of LightHGNN."""
    return HGNN(num_features, num_classes, hidden=hidden, use_bn=use_bn, dropout=dropout)


@register_model(
    family="lighthgnn",
    input=_TEACHER_INPUT,
    num_classes=7,
    parameters=46_119,
    macs=46_080,
    paper=HGNNP_PAPER,
    summary="HGNN+ for the features of Cora: smooths by means",
)
def hgnnp(
    *, num_features: int = 1433, num_classes: int = 7, hidden: int = 32, use_bn: bool = False, dropout: float = 0.5
) -> HGNN:
    """HGNN+."""
    return HGNN(num_features, num_classes, hidden=hidden, kind="hgnnp", use_bn=use_bn, dropout=dropout)


@register_model(
    family="lighthgnn",
    input=_STUDENT_INPUT,
    num_classes=7,
    parameters=184_711,
    macs=184_320,
    paper=LIGHTHGNN_PAPER,
    summary="LightHGNN's student for the features of Cora: an MLP alone",
)
def lighthgnn(
    *, num_features: int = 1433, num_classes: int = 7, hidden: int = 128, use_bn: bool = True, dropout: float = 0.5
) -> Student:
    """The student of LightHGNN and LightHGNN+."""
    return Student(num_features, num_classes, hidden=hidden, use_bn=use_bn, dropout=dropout)


@register_model(
    family="lighthgnn",
    input=TensorInputs(_incidence_inputs(64), "vertex", _digits_teacher_example, labelled_digits_hypergraph),
    num_classes=10,
    parameters=2_410,
    macs=2_368,
    paper=HGNN_PAPER,
    summary="HGNN on digits joined with their nearest neighbours, with weights",
    dataset="digits",
    weights="hgnn_digits.safetensors",
    labels=DIGITS_LABELS,
)
def hgnn_digits(*, num_classes: int = 10) -> HGNN:
    """HGNN for digits of 64 pixels, trained on 20 labels per class."""
    return HGNN(64, num_classes)


@register_model(
    family="lighthgnn",
    input=TensorInputs(
        (TensorInput("features", ("V", 64)),), "vertex", _digits_student_example, labelled_digits_features
    ),
    num_classes=10,
    parameters=9_866,
    macs=9_472,
    paper=LIGHTHGNN_PAPER,
    summary="the student that hgnn_digits taught, with weights",
    dataset="digits",
    weights="lighthgnn_digits.safetensors",
    labels=DIGITS_LABELS,
)
def lighthgnn_digits(*, num_classes: int = 10) -> Student:
    """The student for digits of 64 pixels, distilled from `hgnn_digits`."""
    return Student(64, num_classes)
