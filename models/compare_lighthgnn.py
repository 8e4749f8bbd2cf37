"""Teacher, plain MLP, LightHGNN and LightHGNN+ over several seeds: accuracies, and whether they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.errors import InputError
from edgekit.models.hypergraph import Hypergraph
from edgekit.models.train_lighthgnn import METHODS, Outcome, Recipe, train
from edgekit.models.vertex_sets import load_vertex_set

TITLES = {"mlp": "plain MLP", "lighthgnn": "LightHGNN", "lighthgnn_plus": "LightHGNN+"}


@dataclass(frozen=True)
class Difference:
    """Accuracy of one method minus that of another over the seeds, in the same splits.

    `p_value`: two-sided, exact, under random signs of the differences (Fisher's permutation test for pairs).
    """

    method: str
    rival: str
    mean: float
    p_value: float


@dataclass(frozen=True)
class Row:
    """One data set: per method the test accuracies by seed, mean and sample standard deviation (None for one seed).

    `vertices`, `hyperedges` (after merging) and the sizes of the parts say what the figures are on.
    """

    dataset: str
    vertices: int
    hyperedges: int
    labelled: int
    validation: int
    tested: int
    accuracies: dict[str, tuple[float, ...]]
    means: dict[str, float]
    deviations: dict[str, float | None]
    differences: tuple[Difference, ...]

    def cell(self, method: str) -> str:
        """The accuracy of a method as tables show it, in percent: `97.80 ± 0.44`, or `97.80` for one seed."""
        deviation = self.deviations[method]
        return f"{100 * self.means[method]:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


COMPARED = (
    ("lighthgnn", "mlp"),
    ("lighthgnn_plus", "mlp"),
    ("lighthgnn", "teacher"),
    ("lighthgnn_plus", "teacher"),
    ("lighthgnn_plus", "lighthgnn"),
)


def compare(
    dataset: str, recipe: Recipe, seeds: Sequence[int], log: Callable[[str], None] | None = None
) -> tuple[Row, list[Outcome]]:
    """Train on one data set for all seeds, and summarise.

    Raises:
        UnknownNameError: no such data set.
        MissingDependencyError: scikit-learn is not installed.
        InputError: no seeds, or the data set is too small for the recipe.
    """
    if not seeds:
        raise InputError("name at least one seed")
    data, say = load_vertex_set(dataset), log or (lambda line: None)
    outcomes = []
    for seed in seeds:
        outcomes.append(train(data, recipe, seed))
        found = ", ".join(f"{method_title(m, recipe)} {getattr(outcomes[-1], m).test_accuracy:.1%}" for m in METHODS)
        say(f"{dataset} seed {seed}: {found}")
    accuracies = {m: tuple(getattr(each, m).test_accuracy for each in outcomes) for m in METHODS}
    split = outcomes[0].split
    row = Row(
        dataset=dataset,
        vertices=len(data.labels),
        hyperedges=Hypergraph.from_neighbours(data.features, recipe.neighbours).num_hyperedges,
        labelled=len(split.labelled),
        validation=len(split.validation),
        tested=len(split.asked),
        accuracies=accuracies,
        means={m: float(np.mean(values)) for m, values in accuracies.items()},
        deviations={m: float(np.std(values, ddof=1)) if len(values) > 1 else None for m, values in accuracies.items()},
        differences=tuple(_difference(accuracies, *pair) for pair in COMPARED),
    )
    return row, outcomes


def method_title(method: str, recipe: Recipe) -> str:
    """What a table calls a method."""
    return {"hgnn": "HGNN", "hgnnp": "HGNN+"}[recipe.teacher] if method == "teacher" else TITLES[method]


def difference_cells(row: Row, recipe: Recipe) -> list[tuple[str, str, str, str]]:
    """Data set, what is compared, the difference in percentage points, and p, if there are two seeds: for a table."""
    several = len(row.accuracies["teacher"]) > 1
    return [
        (
            row.dataset,
            f"{method_title(each.method, recipe)} - {method_title(each.rival, recipe)}",
            f"{100 * each.mean:+.2f}",
            f"{each.p_value:.3f}" if several else "",
        )
        for each in row.differences
    ]


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """The fraction of all choices of signs whose sum is at least as far from 0; exact, for up to 20 differences.

    Raises:
        InputError: more than 20, whose signs are too many to go through.
    """
    if len(differences) > 20:
        raise InputError(f"the exact test goes through all signs of at most 20 differences; got {len(differences)}")
    sums = np.zeros(1)
    for value in differences:
        sums = np.concatenate([sums + value, sums - value])
    return float((np.abs(sums) >= abs(sum(differences)) - 1e-12).mean())


def _difference(accuracies: dict[str, tuple[float, ...]], method: str, rival: str) -> Difference:
    values = [a - b for a, b in zip(accuracies[method], accuracies[rival], strict=True)]
    return Difference(method, rival, float(np.mean(values)), sign_flip_p_value(values))
