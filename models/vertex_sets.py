"""Small labelled sets of vertices that come with scikit-learn, and hypergraphs over them.

A row of features is a vertex; its hyperedge joins it with its nearest neighbours (`Hypergraph.from_neighbours`). The
digits are those of `edgekit.models.digits`. Wine (Aeberhard and Forina, doi 10.24432/C5PC7J) and breast cancer
(Wolberg et al., doi 10.24432/C5DW2B) are UCI sets of measurements in different units, so each column is standardised
over the whole set; no label takes part in that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import MissingDependencyError, UnknownNameError
from edgekit.models.hypergraph import Hypergraph

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERTEX_SETS = ("digits", "wine", "breast-cancer")
DIGITS_NEIGHBOURS = 8
SYNTHETIC_VERTICES, SYNTHETIC_HYPEREDGES = (150, 250), (80, 160)


@dataclass(frozen=True, eq=False)
class VertexSet:
    """Features float32 `[V, F]`, and labels int64 `[V]` in 0..K-1."""

    name: str
    features: NDArray[np.float32]
    labels: NDArray[np.int64]

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.labels.max()) + 1


def load_vertex_set(name: str) -> VertexSet:
    """One of `VERTEX_SETS`, whole: 1,797 digits of 64 pixels in 0..1, 178 wines of 13 columns, 569 tumours of 30.

    Raises:
        UnknownNameError: another name.
        MissingDependencyError: scikit-learn is not installed.
    """
    if name not in VERTEX_SETS:
        raise UnknownNameError("vertex set", name, VERTEX_SETS)
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise MissingDependencyError("scikit-learn", "train", f"the {name} data set") from error
    load = {"digits": datasets.load_digits, "wine": datasets.load_wine, "breast-cancer": datasets.load_breast_cancer}
    data = load[name]()
    x = np.asarray(data.data, np.float64)
    x = x / 16 if name == "digits" else (x - x.mean(axis=0)) / x.std(axis=0)
    return VertexSet(name, x.astype(np.float32), np.asarray(data.target, np.int64))


def digits_features(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images uint8 `[n, 8, 8]` in 0..255 as features float32 `[n, 64]` in 0..1."""
    return images.reshape(len(images), 64).astype(np.float32) / np.float32(255)


def synthetic_hypergraph(seed: int) -> Hypergraph:
    """About two hundred vertices and a hundred hyperedges of two to twelve of them, drawn from `seed`."""
    generator = np.random.default_rng(seed)
    vertices = int(generator.integers(*SYNTHETIC_VERTICES, endpoint=True))
    hyperedges = int(generator.integers(*SYNTHETIC_HYPEREDGES, endpoint=True))
    sizes = generator.integers(2, 12, hyperedges, endpoint=True)
    members = generator.integers(0, vertices, int(sizes.sum()))
    return Hypergraph.from_incidence(members, np.repeat(np.arange(hyperedges), sizes), num_vertices=vertices)


def hypergraph_example(seed: int, num_features: int) -> dict[str, NDArray[Any]]:
    """Inputs of HGNN and HGNN+ for a `synthetic_hypergraph`, with standard normal features."""
    hypergraph = synthetic_hypergraph(seed)
    return hypergraph.inputs(_normal(seed, hypergraph.num_vertices, num_features))


def features_example(seed: int, num_features: int) -> dict[str, NDArray[Any]]:
    """Input of the student: standard normal features of 5 to 50 vertices."""
    return {"features": _normal(seed, int(np.random.default_rng(seed).integers(5, 50, endpoint=True)), num_features)}


def digits_hypergraph_example(seed: int) -> dict[str, NDArray[Any]]:
    """Inputs of HGNN and HGNN+ for digits: all of them for seed 0, otherwise 200 to 600 drawn from `seed`.

    Without scikit-learn, random features in 0..1 in the place of the digits.
    """
    generator = np.random.default_rng(seed)
    try:
        features = load_vertex_set("digits").features
    except MissingDependencyError:
        features = generator.random((600, 64), np.float32)
    if seed != 0:
        count = int(generator.integers(200, 600, endpoint=True))
        features = features[generator.permutation(len(features))[:count]]
    return Hypergraph.from_neighbours(features, DIGITS_NEIGHBOURS).inputs(features)


def digits_features_example(seed: int) -> dict[str, NDArray[Any]]:
    """Input of the student: 5 to 50 digits drawn from `seed`; without scikit-learn, random features in 0..1."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(5, 50, endpoint=True))
    try:
        features = load_vertex_set("digits").features
    except MissingDependencyError:
        return {"features": generator.random((count, 64), np.float32)}
    return {"features": features[generator.permutation(len(features))[:count]]}


def split_digits() -> tuple[VertexSet, dict[str, NDArray[np.int64]]]:
    """All digits, and which of them are the train, validation and test part of `edgekit.models.digits`.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    from edgekit.models.digits import SPLIT_SIZES, load_digits_split

    loaded = [load_digits_split(part) for part in ("train", "validation", "test")]
    features = np.concatenate([digits_features(images) for images, _ in loaded])
    ends = np.cumsum(list(SPLIT_SIZES.values()))
    parts = dict(zip(SPLIT_SIZES, np.split(np.arange(len(features)), ends[:-1]), strict=True))
    return VertexSet("digits", features, np.concatenate([labels for _, labels in loaded])), parts


def labelled_digits_hypergraph() -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """All digits as one hypergraph, and the classes of the 360 of the test part, -1 for the others.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    data, parts = split_digits()
    labels = np.full(len(data.labels), -1)
    labels[parts["test"]] = data.labels[parts["test"]]
    return Hypergraph.from_neighbours(data.features, DIGITS_NEIGHBOURS).inputs(data.features), labels


def labelled_digits_features() -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """The 360 digits of the test part and their classes.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    from edgekit.models.digits import load_digits_split

    images, labels = load_digits_split("test")
    return {"features": digits_features(images)}, labels


def _normal(seed: int, rows: int, columns: int) -> NDArray[np.float32]:
    return np.random.default_rng([seed, 1]).standard_normal((rows, columns), np.float32)
