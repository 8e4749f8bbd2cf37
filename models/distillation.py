"""The losses of LightHGNN and LightHGNN+ (Feng et al., ICLR 2024, arXiv 2402.04296).

LightHGNN: the student's class probabilities per vertex follow the teacher's. LightHGNN+ adds the same for the mean
probabilities of hyperedges, drawn anew in each step by how reliable they are.

Each loss comes in two forms:

- "kl", the default: the Kullback-Leibler divergence sum p_t (log p_t - log p_s), as the paper writes it;
- "authors": what the published code computes. It passes probabilities to `kl_div` with `log_target=True`, as if they
  were their logarithms, which gives sum exp(p_t) (p_t - log p_s). As a function of the student this is a cross-entropy
  with weights exp(p_t) between 1 and e instead of p_t: heavily smoothed targets, whose optimum is
  exp(p_t) / sum exp(p_t). For ten classes and a teacher that is sure, that is a student that gives 23 % to its class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from edgekit.errors import UnknownNameError
from edgekit.models.segment_sums import Bags

if TYPE_CHECKING:
    from edgekit.models.hypergraph import Hypergraph

LossForm = Literal["kl", "authors"]
LOSS_FORMS = ("kl", "authors")


def soft_target_loss(student: torch.Tensor, teacher: torch.Tensor, form: LossForm = "kl") -> torch.Tensor:
    """The loss of LightHGNN: the mean over vertices, for logits float `[V, K]` of both.

    Raises:
        UnknownNameError: another form.
    """
    return _divergence(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), form)


def hyperedge_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    members: Membership,
    chosen: torch.Tensor,
    form: LossForm = "kl",
    tau: float = 1.0,
) -> torch.Tensor:
    """What LightHGNN+ adds: the mean over the chosen hyperedges of the divergence of their mean probabilities.

    Args:
        student: logits float `[V, K]`.
        teacher: logits float `[V, K]`.
        members: which vertices each hyperedge has.
        chosen: bool `[E]`. With none chosen the loss is 0.
        form: see the module.
        tau: divides the probabilities, not the logits, as in the authors' code: with "kl" it only divides the loss.

    Raises:
        UnknownNameError: another form.
    """
    theirs = members.means(F.softmax(teacher, dim=1))[chosen] / tau
    ours = members.means(F.softmax(student, dim=1))[chosen] / tau
    if len(ours) == 0:
        return 0 * student.sum()
    return _divergence(ours.clamp_min(torch.finfo(ours.dtype).tiny).log(), theirs, form)


def reliability(clean: torch.Tensor, noisy: torch.Tensor, members: Membership) -> torch.Tensor:
    """How reliable the teacher is on each hyperedge, float `[E]` in 0..1: 1 where noise leaves its entropy as it is.

    The entropy of a hyperedge is the mean of the entropies of its vertices' class probabilities. The score is 1 minus
    the change of entropy over the largest change.

    Args:
        clean: the teacher's logits float `[V, K]`.
        noisy: its logits for disturbed features.
        members: which vertices each hyperedge has.
    """
    change = (members.means(_entropy(noisy)) - members.means(_entropy(clean))).abs().squeeze(1)
    largest = change.max() if len(change) else change.sum()
    return 1 - change / largest if float(largest) > 0 else torch.ones_like(change)


def disturbed(features: torch.Tensor, level: float, generator: torch.Generator) -> torch.Tensor:
    """The authors' noise: each feature times `level` times (1 + a standard normal number)."""
    noise = torch.randn(features.shape, generator=generator, dtype=features.dtype)
    return features * (1 + noise) * level


@dataclass(frozen=True)
class Membership:
    """The vertices of each hyperedge, made once per hypergraph."""

    sums: Bags
    sizes: torch.Tensor

    @staticmethod
    def of(hypergraph: Hypergraph) -> Membership:
        vertex, hyperedge = torch.from_numpy(hypergraph.vertex), torch.from_numpy(hypergraph.hyperedge)
        sizes = torch.from_numpy(hypergraph.hyperedge_degree).unsqueeze(1)
        return Membership(Bags.of(vertex, hyperedge, hypergraph.num_hyperedges), sizes)

    def means(self, x: torch.Tensor) -> torch.Tensor:
        """`[V, C]` to the mean over the vertices of each hyperedge, `[E, C]`; the weights have no part in it."""
        return self.sums(x) / self.sizes.to(x.dtype)


def _divergence(student_log: torch.Tensor, teacher: torch.Tensor, form: LossForm) -> torch.Tensor:
    """The mean over rows; `student_log` are logarithms, `teacher` probabilities."""
    if form not in LOSS_FORMS:
        raise UnknownNameError("form of the loss", form, LOSS_FORMS)
    return F.kl_div(student_log, teacher, reduction="batchmean", log_target=form == "authors")


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """Of each row's class probabilities, float `[V, 1]`, in nats."""
    p = F.softmax(logits, dim=1)
    entropy: torch.Tensor = -torch.special.xlogy(p, p).sum(dim=1, keepdim=True)
    return entropy
