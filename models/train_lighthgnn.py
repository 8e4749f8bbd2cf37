"""Teachers, plain MLPs, LightHGNN and LightHGNN+ on small real data: `edgekit train lighthgnn`.

Per data set and seed: a k-nearest-neighbour hypergraph over all vertices, a few labels per class, and four models with
the same labels. The teacher (HGNN or HGNN+) and the plain MLP learn from the labels; the students LightHGNN and
LightHGNN+ have the MLP's architecture and learn from the teacher's answers to all vertices. Hyper-parameters are those
of the authors' code. Of every training, the epoch with the best validation accuracy is kept; test vertices are looked
at once, at the end. Among epochs of equal accuracy it is the one with the least cross-entropy on the validation part.
The authors keep the first (`ties="first"`), which for small validation parts is one of the first epochs of all.

Two settings, as in the paper: "transductive", where the hypergraph in training has all vertices, and "production",
where most test vertices are unknown to teacher, hypergraph and student until they are asked for. Then the teacher has
the hypergraph of all vertices.

`python -m edgekit.models.train_lighthgnn` makes the weights of `hgnn_digits` and `lighthgnn_digits` that ship with
edgekit.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes

from edgekit.errors import InputError, UnknownNameError
from edgekit.models.complexity import count_parameters
from edgekit.models.digits import SPLIT_SEED, SPLIT_SIZES
from edgekit.models.distillation import (
    LOSS_FORMS,
    LossForm,
    Membership,
    disturbed,
    hyperedge_loss,
    reliability,
    soft_target_loss,
)
from edgekit.models.hypergraph import Hypergraph
from edgekit.models.lighthgnn import HGNN, Kind, Student
from edgekit.models.training import reproducible
from edgekit.models.vertex_sets import DIGITS_NEIGHBOURS, VertexSet, split_digits
from edgekit.models.weights import state_dict_sha256

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import nn

Setting = Literal["transductive", "production"]
Ties = Literal["entropy", "first"]
SETTINGS, TEACHERS, TIES = ("transductive", "production"), ("hgnn", "hgnnp"), ("entropy", "first")
METHODS = ("teacher", "mlp", "lighthgnn", "lighthgnn_plus")


@dataclass(frozen=True)
class Recipe:
    """All hyper-parameters. Adam (arXiv 1412.6980) on all vertices at once.

    Attributes:
        teacher: "hgnn" or "hgnnp".
        loss: "kl" or "authors", see `edgekit.models.distillation`.
        setting: "transductive" or "production".
        neighbours: k of the hypergraph.
        labels_per_class: labelled vertices of each class.
        validation: validation vertices, at most a quarter of those that are not labelled.
        unseen: in the production setting, the fraction of the test vertices that training does not know.
        epochs, learning_rate, weight_decay: of all trainings.
        teacher_hidden, student_hidden, dropout: of the models.
        label_share: weight of the labels' cross-entropy in the students' loss; the rest is the teacher's.
        ties: which of several epochs with the best validation accuracy is kept: that with the least "entropy", or
            the "first".
        tau, noise: of LightHGNN+: divisor of the hyperedges' probabilities, and level of the noise on the features.
    """

    teacher: Kind = "hgnn"
    loss: LossForm = "kl"
    setting: Setting = "transductive"
    neighbours: int = DIGITS_NEIGHBOURS
    labels_per_class: int = 20
    validation: int = 100
    unseen: float = 0.9
    epochs: int = 200
    learning_rate: float = 0.01
    weight_decay: float = 5e-4
    teacher_hidden: int = 32
    student_hidden: int = 128
    dropout: float = 0.5
    label_share: float = 0.0
    ties: Ties = "entropy"
    tau: float = 1.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("teacher", self.teacher, TEACHERS),
            ("form of the loss", self.loss, LOSS_FORMS),
            ("setting", self.setting, SETTINGS),
            ("choice among equal epochs", self.ties, TIES),
        ):
            if value not in known:
                raise UnknownNameError(kind, value, known)
        for name in ("neighbours", "labels_per_class", "validation", "epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.unseen < 1:
            raise InputError(f"unseen is a fraction between 0 and 1; got {self.unseen}")


@dataclass(frozen=True, eq=False)
class Split:
    """Vertex ids int64 of the parts; `hidden` are those of the test part that training does not know."""

    labelled: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    hidden: NDArray[np.int64]

    @property
    def asked(self) -> NDArray[np.int64]:
        """The vertices that the reported accuracy is on: the hidden ones where there are any."""
        return self.hidden if len(self.hidden) else self.test


@dataclass(frozen=True, eq=False)
class Trained:
    """A model with the weights of its best epoch, in eval mode; accuracies are fractions of right answers."""

    model: nn.Module
    epoch: int
    validation_accuracy: float
    test_accuracy: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """The four models of one data set and seed."""

    dataset: str
    seed: int
    split: Split
    teacher: Trained
    mlp: Trained
    lighthgnn: Trained
    lighthgnn_plus: Trained

    @property
    def student(self) -> tuple[str, Trained]:
        """The better of the two students on the validation part, and its name; LightHGNN where they are equal."""
        better = self.lighthgnn_plus.validation_accuracy > self.lighthgnn.validation_accuracy
        return ("lighthgnn_plus", self.lighthgnn_plus) if better else ("lighthgnn", self.lighthgnn)


def split_vertices(labels: NDArray[np.int64], recipe: Recipe, seed: int) -> Split:
    """A split drawn from `seed`: labels per class, validation, and the rest as test part.

    Raises:
        InputError: a class has too few vertices, so that none would be left.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    per_class = [order[labels[order] == label] for label in range(int(labels.max()) + 1)]
    fewest = min(len(ids) for ids in per_class)
    if fewest <= recipe.labels_per_class:
        raise InputError(
            f"labels_per_class must leave some of every class; got {recipe.labels_per_class} for a class of {fewest}"
        )
    labelled = np.concatenate([ids[: recipe.labels_per_class] for ids in per_class])
    # A fresh order: in this one, classes whose labelled vertices are found soon come first among the rest.
    rest = generator.permutation(np.setdiff1d(order, labelled))
    count = min(recipe.validation, max(1, len(rest) // 4))
    test = rest[count:]
    hidden = test[: int(recipe.unseen * len(test))] if recipe.setting == "production" else test[:0]
    return Split(labelled, rest[:count], test, hidden)


def train(
    data: VertexSet, recipe: Recipe, seed: int, *, split: Split | None = None, log: Callable[[str], None] | None = None
) -> Outcome:
    """Train the four models for one seed. The same seed gives the same weights on the same machine.

    Args:
        data: the vertices.
        recipe: the hyper-parameters.
        seed: of the split, the initialisation, dropout, and the noise and choice of hyperedges.
        split: instead of one that is drawn.
        log: called with a line per model.

    Raises:
        InputError: the data set is too small for the recipe.
    """
    split = split_vertices(data.labels, recipe, seed) if split is None else split
    whole = Hypergraph.from_neighbours(data.features, recipe.neighbours)
    known = np.setdiff1d(np.arange(len(data.labels)), split.hidden)
    # What training does not know has no part in who is near to whom either.
    observed = Hypergraph.from_neighbours(data.features[known], recipe.neighbours) if len(split.hidden) else whole
    task = _Task(data, split, recipe, known)
    say = log or (lambda line: None)
    with reproducible(1, seed):
        graph, whole_graph = _tensors(observed, data.features[known]), _tensors(whole, data.features)
        teacher = task.fit(_new_teacher(data, recipe, seed), graph, whole_graph, task.label_loss)
        say(f"teacher {teacher.test_accuracy:.1%}")
        with torch.no_grad():
            targets = teacher.model(**graph)
            generator = torch.Generator().manual_seed(seed)
            noisy = teacher.model(**{**graph, "features": disturbed(graph["features"], recipe.noise, generator)})
        members = Membership.of(observed)
        scores = reliability(targets, noisy, members)

        def soft(logits: torch.Tensor) -> torch.Tensor:
            ours = soft_target_loss(logits, targets, recipe.loss)
            return recipe.label_share * task.label_loss(logits) + (1 - recipe.label_share) * ours

        def soft_plus(logits: torch.Tensor) -> torch.Tensor:
            chosen = torch.bernoulli(scores, generator=generator).bool()
            more = hyperedge_loss(logits, targets, members, chosen, recipe.loss, recipe.tau)
            return soft(logits) + (1 - recipe.label_share) * more

        students = {}
        for name, loss in (("mlp", task.label_loss), ("lighthgnn", soft), ("lighthgnn_plus", soft_plus)):
            torch.manual_seed(seed)  # the three start alike and drop alike: they differ in their loss alone
            inputs, whole_inputs = ({"features": each["features"]} for each in (graph, whole_graph))
            students[name] = task.fit(_new_student(data, recipe), inputs, whole_inputs, loss)
            say(f"{name} {students[name].test_accuracy:.1%}")
    return Outcome(data.name, seed, split, teacher, **students)


class _Task:
    """Fits models to one split of one data set."""

    def __init__(self, data: VertexSet, split: Split, recipe: Recipe, known: NDArray[np.int64]) -> None:
        self.recipe, self.split = recipe, split
        self.labels = torch.from_numpy(data.labels)
        self.known_labels = self.labels[torch.from_numpy(known)]
        self.labelled, self.validation = (
            torch.from_numpy(np.searchsorted(known, ids)) for ids in (split.labelled, split.validation)
        )

    def label_loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy on the labelled vertices, for logits of the known ones."""
        return F.cross_entropy(logits[self.labelled], self.known_labels[self.labelled])

    def fit(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        whole: dict[str, torch.Tensor],
        loss_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> Trained:
        """Train on what is known (`inputs`) and test on the whole."""
        recipe = self.recipe
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        best, kept, kept_epoch = (-1.0, 0.0), model.state_dict(), 0
        for epoch in range(1, recipe.epochs + 1):
            model.train()
            optimizer.zero_grad()
            loss_of(model(**inputs)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            right, entropy = _accuracy(model, inputs, self.known_labels, self.validation)
            score = (right, -entropy if recipe.ties == "entropy" else 0.0)
            if score > best:
                best, kept, kept_epoch = score, deepcopy(model.state_dict()), epoch
        model.load_state_dict(kept)
        test, _ = _accuracy(model, whole, self.labels, torch.from_numpy(self.split.asked))
        return Trained(model.eval(), kept_epoch, best[0], test)


def train_shipped(recipe: Recipe, seed: int, log: Callable[[str], None] | None = None) -> Outcome:
    """The digits with edgekit's own split: labels from its train part, its validation part, its test part.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    data, parts = split_digits()
    drawn = split_vertices(data.labels[parts["train"]], recipe, seed).labelled
    none = np.empty(0, np.int64)
    split = Split(parts["train"][drawn], parts["validation"], parts["test"], none)
    return train(data, recipe, seed, split=split, log=log)


def save(outcome: Outcome, recipe: Recipe, folder: Path, names: tuple[str, str], seconds: float) -> list[Path]:
    """Write teacher and chosen student as `<name>.safetensors` (float32), each with a `.json` on how it was made.

    Args:
        names: of the teacher's and the student's files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    student_name, student = outcome.student
    written = []
    for name, method, trained in zip(names, (recipe.teacher, student_name), (outcome.teacher, student), strict=True):
        report: dict[str, object] = {
            "model": name,
            "method": method,
            "dataset": f"{outcome.dataset} (scikit-learn)",
            "recipe": asdict(recipe),
            "seed": outcome.seed,
            "split": {
                "labelled": len(outcome.split.labelled),
                "validation": len(outcome.split.validation),
                "test": len(outcome.split.asked),
            },
            "epoch": trained.epoch,
            "validation_accuracy": trained.validation_accuracy,
            "test_accuracy": trained.test_accuracy,
            "test_accuracies": {each: getattr(outcome, each).test_accuracy for each in METHODS},
            "parameters": count_parameters(trained.model),
            "weights_sha256": state_dict_sha256(trained.model),
            "seconds": round(seconds, 1),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
            "machine": platform.machine(),
        }
        if outcome.dataset == "digits" and len(outcome.split.test) == SPLIT_SIZES["test"]:
            report["split"] = {"seed": SPLIT_SEED, "labelled": len(outcome.split.labelled), **SPLIT_SIZES}
        path = folder / f"{name}.safetensors"
        path.write_bytes(safetensors_bytes(trained.model.state_dict()))
        path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: train the pair that ships."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(prog="python -m edgekit.models.train_lighthgnn", description=__doc__)
    shipped = Path(str(resources.files("edgekit.models"))) / "pretrained"
    parser.add_argument("--out", type=Path, default=shipped, metavar="DIR")
    parser.add_argument("--epochs", type=int, default=recipe.epochs)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    recipe = replace(recipe, epochs=options.epochs, validation=SPLIT_SIZES["validation"])
    started = time.perf_counter()
    outcome = train_shipped(recipe, options.seed, log=lambda line: print(line, flush=True))
    seconds = time.perf_counter() - started
    for path in save(outcome, recipe, options.out, ("hgnn_digits", "lighthgnn_digits"), seconds):
        print(f"wrote {path} and {path.with_suffix('.json').name}")


def _tensors(hypergraph: Hypergraph, features: NDArray[np.float32]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in hypergraph.inputs(features).items()}


def _new_teacher(data: VertexSet, recipe: Recipe, seed: int) -> HGNN:
    torch.manual_seed(seed)
    return HGNN(
        data.features.shape[1],
        data.num_classes,
        hidden=recipe.teacher_hidden,
        kind=recipe.teacher,
        dropout=recipe.dropout,
    )


def _new_student(data: VertexSet, recipe: Recipe) -> Student:
    return Student(data.features.shape[1], data.num_classes, hidden=recipe.student_hidden, dropout=recipe.dropout)


def _accuracy(
    model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor, rows: torch.Tensor
) -> tuple[float, float]:
    """The fraction of right answers and the mean cross-entropy on some rows."""
    model.eval()
    with torch.no_grad():
        logits = model(**inputs)[rows]
    right = (logits.argmax(1) == labels[rows]).double().mean()
    return float(right), float(F.cross_entropy(logits, labels[rows]))


if __name__ == "__main__":
    main()
