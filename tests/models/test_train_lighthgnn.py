"""Distillation: losses against numbers computed by hand, and trainings that repeat, choose and report as they say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch

from edgekit.errors import InputError, MissingDependencyError, UnknownNameError
from edgekit.models import create_model
from edgekit.models.compare_lighthgnn import compare, sign_flip_p_value
from edgekit.models.digits import load_digits_split
from edgekit.models.distillation import Membership, disturbed, hyperedge_loss, reliability, soft_target_loss
from edgekit.models.hypergraph import Hypergraph
from edgekit.models.train_lighthgnn import (
    METHODS,
    Recipe,
    Split,
    main,
    save,
    split_vertices,
    train,
)
from edgekit.models.vertex_sets import VERTEX_SETS, digits_features, load_vertex_set, split_digits, synthetic_hypergraph
from edgekit.models.weights import read_state_dict, state_dict_sha256

SHORT = Recipe(epochs=3)


def logits(*rows):
    """Logits whose softmax is these probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


# losses


def test_proper_kl_by_hand():
    teacher, student = [[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [[0.25, 0.25, 0.5], [0.1, 0.2, 0.7]]
    expected = (0.5 * math.log(2) - 0.25 * math.log(2) + 0.1 * math.log(0.5) + 0.8 * math.log(8 / 7)) / 2
    assert float(soft_target_loss(logits(*student), logits(*teacher))) == pytest.approx(expected, rel=1e-12)
    assert float(soft_target_loss(logits(*teacher), logits(*teacher))) == pytest.approx(0, abs=1e-12)


def test_authors_loss_by_hand():
    """exp(p_t) (p_t - log p_s): two halves against two halves is 2 sqrt(e) (1/2 + log 2), not 0."""
    half = logits([0.5, 0.5])
    expected = 2 * math.exp(0.5) * (0.5 + math.log(2))
    assert float(soft_target_loss(half, half, "authors")) == pytest.approx(expected, rel=1e-12)
    assert float(soft_target_loss(half, half)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("form", "sure"), [("kl", 0.999991), ("authors", math.e / (math.e + 9))])
def test_what_student_each_loss_asks_for(form, sure):
    """The optimum for a teacher that is sure of the first of ten classes: the authors' form asks for 23 %."""
    teacher = logits([1 - 9e-6, *[1e-6] * 9])
    student = torch.zeros(1, 10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([student], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = soft_target_loss(student, teacher, form)
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    assert float(student.detach().softmax(1)[0, 0]) == pytest.approx(sure, abs=1e-4)


def membership(*listed, vertices):
    return Membership.of(Hypergraph.from_hyperedges(listed, num_vertices=vertices, isolated="keep"))


@pytest.mark.parametrize("form", ["kl", "authors"])
def test_hyperedge_loss_by_hand(form):
    members = membership([0, 1], [1, 2], [0, 1, 2], vertices=3)
    teacher, student = [[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]], [[0.6, 0.4], [0.5, 0.5], [0.3, 0.7]]
    chosen = torch.tensor([True, False, True])
    means = [([0.6, 0.4], [0.55, 0.45]), ([1.3 / 3, 1.7 / 3], [1.4 / 3, 1.6 / 3])]

    def divergence(p, q):
        if form == "authors":
            return sum(math.exp(a) * (a - math.log(b)) for a, b in zip(p, q, strict=True))
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    expected = sum(divergence(p, q) for p, q in means) / 2
    got = hyperedge_loss(logits(*student), logits(*teacher), members, chosen, form)
    assert float(got) == pytest.approx(expected, rel=1e-10)


def test_tau_divides_the_probabilities():
    members, teacher, student = membership([0], vertices=1), logits([0.8, 0.2]), logits([0.5, 0.5])
    chosen = torch.tensor([True])
    once, halved = (float(hyperedge_loss(student, teacher, members, chosen, "kl", tau)) for tau in (1.0, 2.0))
    assert halved == pytest.approx(once / 2, rel=1e-12)
    authors = float(hyperedge_loss(student, teacher, members, chosen, "authors", 2.0))
    assert authors == pytest.approx(math.exp(0.4) * (0.4 - math.log(0.25)) + math.exp(0.1) * (0.1 - math.log(0.25)))


def test_no_chosen_hyperedge_is_no_loss():
    student = torch.randn(2, 3, requires_grad=True)
    loss = hyperedge_loss(student, torch.randn(2, 3), membership([0, 1], vertices=2), torch.tensor([False]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("form", ["kl", "authors"])
def test_a_class_that_vanishes_is_finite(form):
    """float32 probabilities of 0 on either side."""
    sure = torch.tensor([[200.0, -200.0]], requires_grad=True)
    members = membership([0], vertices=1)
    loss = soft_target_loss(sure, -sure.detach(), form)
    loss = loss + hyperedge_loss(sure, -sure.detach(), members, torch.tensor([True]), form)
    loss.backward()
    assert loss.isfinite()
    assert sure.grad.isfinite().all()


def test_unknown_form():
    with pytest.raises(UnknownNameError, match="form of the loss 'klx'; did you mean kl"):
        soft_target_loss(torch.zeros(1, 2), torch.zeros(1, 2), "klx")


def test_reliability_by_hand():
    """Entropies 0 and log 2; the noise turns vertex 2 from sure to undecided and leaves the others."""
    members = membership([0, 1], [1, 2], [2], vertices=3)
    sure, undecided = [200.0, -200.0], [0.0, 0.0]
    clean, noisy = torch.tensor([undecided, sure, sure]), torch.tensor([undecided, sure, undecided])
    torch.testing.assert_close(reliability(clean, noisy, members), torch.tensor([1, 0.5, 0]))
    assert reliability(clean, clean, members).tolist() == [1, 1, 1]


def test_reliability_without_hyperedges():
    assert reliability(torch.zeros(2, 3), torch.ones(2, 3), membership(vertices=2)).shape == (0,)


def test_noise_is_the_authors():
    features = torch.tensor([[2.0, 0.0]]).repeat(20_000, 1)
    noisy = disturbed(features, 0.5, torch.Generator().manual_seed(0))
    assert noisy[:, 1].abs().max() == 0
    assert float(noisy[:, 0].mean()) == pytest.approx(1, abs=0.03)
    assert float(noisy[:, 0].std()) == pytest.approx(1, abs=0.03)


# data and splits


@pytest.mark.parametrize(
    ("name", "shape", "classes"), [("digits", (1797, 64), 10), ("wine", (178, 13), 3), ("breast-cancer", (569, 30), 2)]
)
def test_vertex_sets(name, shape, classes):
    data = load_vertex_set(name)
    assert (data.features.shape, data.features.dtype, data.num_classes) == (shape, np.float32, classes)
    if name == "digits":
        assert (data.features.min(), data.features.max()) == (0, 1)
    else:
        np.testing.assert_allclose(data.features.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(data.features.std(0), 1, atol=1e-5)


def test_unknown_vertex_set_and_missing_scikit_learn(monkeypatch):
    with pytest.raises(UnknownNameError, match="vertex set 'wines'; did you mean wine"):
        load_vertex_set("wines")
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(MissingDependencyError, match=r"the wine data set needs scikit-learn.*edgekit\[train\]"):
        load_vertex_set("wine")


def test_split_digits_is_the_digits_split():
    data, parts = split_digits()
    images, labels = load_digits_split("test")
    np.testing.assert_array_equal(data.labels[parts["test"]], labels)
    np.testing.assert_array_equal(data.features[parts["test"]], digits_features(images))
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1797))


def test_synthetic_hypergraphs():
    made = synthetic_hypergraph(3)
    assert 150 <= made.num_vertices <= 250
    np.testing.assert_array_equal(made.vertex, synthetic_hypergraph(3).vertex)
    assert made.num_vertices != synthetic_hypergraph(4).num_vertices


@pytest.mark.parametrize("setting", ["transductive", "production"])
@pytest.mark.parametrize("name", VERTEX_SETS)
def test_splits(name, setting):
    labels = load_vertex_set(name).labels
    splits = [split_vertices(labels, Recipe(setting=setting), seed) for seed in range(5)]
    for split in splits:
        assert np.bincount(labels[split.labelled]).tolist() == [20] * (labels.max() + 1)
        together = np.concatenate([split.labelled, split.validation, split.test])
        assert sorted(together) == list(range(len(labels)))
        assert len(split.validation) == min(100, (len(labels) - len(split.labelled)) // 4)
        assert set(split.hidden) <= set(split.test)
        hidden = int(0.9 * len(split.test)) if setting == "production" else 0
        assert len(split.hidden) == hidden
        assert len(split.asked) == (hidden or len(split.test))
    assert not np.array_equal(splits[0].validation, splits[1].validation)
    again = split_vertices(labels, Recipe(setting=setting), 0)
    np.testing.assert_array_equal(again.test, splits[0].test)


def test_validation_has_the_classes_of_what_is_not_labelled():
    """The small classes too: labels are the first in an order, and validation must not be what they passed over."""
    labels = load_vertex_set("wine").labels
    splits = [split_vertices(labels, Recipe(), seed) for seed in range(200)]
    found = np.mean([np.bincount(labels[split.validation], minlength=3) for split in splits], axis=0)
    left = np.bincount(labels) - 20
    np.testing.assert_allclose(found, 29 * left / left.sum(), atol=0.6)


BAD_RECIPES = {
    "teacher": ({"teacher": "gcn"}, UnknownNameError, "teacher 'gcn'"),
    "loss": ({"loss": "mse"}, UnknownNameError, "form of the loss 'mse'; known: authors, kl"),
    "setting": ({"setting": "inductive"}, UnknownNameError, "setting 'inductive'"),
    "ties": ({"ties": "last"}, UnknownNameError, "choice among equal epochs 'last'"),
    "epochs": ({"epochs": 0}, InputError, "epochs must be at least 1; got 0"),
    "unseen": ({"unseen": 1.0}, InputError, r"between 0 and 1; got 1\.0"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_bad_recipes(options, error, message):
    with pytest.raises(error, match=message):
        Recipe(**options)


def test_too_many_labels():
    with pytest.raises(InputError, match="got 48 for a class of 48"):
        split_vertices(load_vertex_set("wine").labels, Recipe(labels_per_class=48), 0)


# training


def test_training_repeats_and_leaves_torch_as_it_was():
    data = load_vertex_set("wine")
    before = torch.get_rng_state()
    first, again, other = (train(data, SHORT, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()
    hashes = [[state_dict_sha256(getattr(each, m).model) for m in METHODS] for each in (first, again, other)]
    assert hashes[0] == hashes[1]
    assert not set(hashes[0]) & set(hashes[2])
    assert len(set(hashes[0])) == 4


@pytest.mark.parametrize("setting", ["transductive", "production"])
@pytest.mark.parametrize("teacher", ["hgnn", "hgnnp"])
def test_reported_accuracies_are_those_of_the_models(teacher, setting):
    """Asked again from outside, with the whole hypergraph and the vertices that count."""
    data, recipe = load_vertex_set("wine"), replace(SHORT, teacher=teacher, setting=setting)
    outcome = train(data, recipe, 2)
    inputs = Hypergraph.from_neighbours(data.features, recipe.neighbours).inputs(data.features)
    inputs = {name: torch.from_numpy(value) for name, value in inputs.items()}
    for method in METHODS:
        trained = getattr(outcome, method)
        assert not trained.model.training
        with torch.no_grad():
            seen = inputs if method == "teacher" else {"features": inputs["features"]}
            right = trained.model(**seen).argmax(1).numpy() == data.labels
        assert trained.test_accuracy == pytest.approx(right[outcome.split.asked].mean())
        if setting == "transductive" or method != "teacher":
            assert trained.validation_accuracy == pytest.approx(right[outcome.split.validation].mean())


def test_unseen_vertices_have_no_part_in_training():
    """Other features and labels for them change what is answered, and no weight."""
    data, recipe = load_vertex_set("wine"), replace(SHORT, setting="production")
    split = split_vertices(data.labels, recipe, 0)
    features, labels = data.features.copy(), data.labels.copy()
    features[split.hidden] = features[split.hidden[::-1]]
    labels[split.hidden] = (labels[split.hidden] + 1) % 3
    other = replace(data, features=features, labels=labels)
    first, again = (train(each, recipe, 0, split=split) for each in (data, other))
    for method in METHODS:
        ours, theirs = (getattr(each, method) for each in (first, again))
        assert state_dict_sha256(ours.model) == state_dict_sha256(theirs.model)
        assert ours.test_accuracy != theirs.test_accuracy


@pytest.mark.parametrize("part", ["test", "validation"])
def test_labels_of_other_parts_are_not_learned(part):
    """Wrong labels for validation may choose another epoch, wrong labels for the test part may not."""
    data = load_vertex_set("wine")
    recipe = replace(SHORT, epochs=1)  # so that there is no choice
    split = split_vertices(data.labels, recipe, 0)
    labels = data.labels.copy()
    labels[getattr(split, part)] = 0
    first, again = (train(each, recipe, 0, split=split) for each in (data, replace(data, labels=labels)))
    for method in METHODS:
        ours, theirs = (state_dict_sha256(getattr(each, method).model) for each in (first, again))
        assert ours == theirs


def test_label_share_one_is_the_plain_mlp():
    outcome = train(load_vertex_set("wine"), replace(SHORT, label_share=1.0), 0)
    hashes = {state_dict_sha256(getattr(outcome, m).model) for m in METHODS[1:]}
    assert len(hashes) == 1


def test_the_best_epoch_is_kept():
    """With the whole set as validation part, no epoch may beat the one that is kept."""
    data = load_vertex_set("wine")
    everything = np.arange(len(data.labels))
    split = Split(split_vertices(data.labels, SHORT, 0).labelled, everything, everything, everything[:0])
    best = [train(data, replace(SHORT, epochs=n), 0, split=split).mlp.validation_accuracy for n in (1, 2, 4, 8, 16)]
    assert best == sorted(best)
    assert best[-1] > best[0]


def test_compare_summarises():
    row, outcomes = compare("wine", SHORT, [0, 1, 2])
    assert [each.seed for each in outcomes] == [0, 1, 2]
    assert (row.vertices, row.labelled, row.validation, row.tested) == (178, 60, 29, 89)
    for method in METHODS:
        values = [getattr(each, method).test_accuracy for each in outcomes]
        assert row.accuracies[method] == tuple(values)
        assert row.means[method] == pytest.approx(np.mean(values))
        assert row.deviations[method] == pytest.approx(np.std(values, ddof=1))
    first = row.differences[0]
    assert (first.method, first.rival) == ("lighthgnn", "mlp")
    assert first.mean == pytest.approx(row.means["lighthgnn"] - row.means["mlp"])


def test_compare_refuses_no_seeds():
    with pytest.raises(InputError, match="at least one seed"):
        compare("wine", SHORT, [])


@pytest.mark.parametrize(
    ("differences", "p"),
    [([1, 1, 1], 2 / 8), ([0, 0], 1), ([2, -1], 1), ([3, 1], 0.5), ([0.1] * 10, 2 / 1024), ([], 1)],
    ids=["all up", "none", "mixed", "two", "ten", "empty"],
)
def test_sign_flips_by_hand(differences, p):
    assert sign_flip_p_value(differences) == pytest.approx(p)


def test_too_many_sign_flips():
    with pytest.raises(InputError, match="at most 20"):
        sign_flip_p_value([1.0] * 21)


# weights that ship


def test_save(tmp_path):
    recipe = replace(SHORT, teacher="hgnnp")
    outcome = train(load_vertex_set("wine"), recipe, 0)
    paths = save(outcome, recipe, tmp_path, ("a", "b"), 1.0)
    name, student = outcome.student
    assert [path.name for path in paths] == ["a.safetensors", "b.safetensors"]
    told = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    assert [each["method"] for each in told] == ["hgnnp", name]
    assert told[1]["test_accuracy"] == student.test_accuracy
    assert told[0]["recipe"]["teacher"] == "hgnnp"
    for path, model in zip(paths, (outcome.teacher.model, student.model), strict=True):
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in read_state_dict(path).items())


def test_the_shipped_pair_comes_from_the_script(tmp_path, capsys):
    main(["--out", str(tmp_path), "--epochs", "2"])
    assert f"wrote {tmp_path / 'lighthgnn_digits.safetensors'}" in capsys.readouterr().out
    for name in ("hgnn_digits", "lighthgnn_digits"):
        create_model(name, weights=tmp_path / f"{name}.safetensors")
        told = json.loads((tmp_path / f"{name}.json").read_text())
        shipped = json.loads((resources.files("edgekit.models") / "pretrained" / f"{name}.json").read_text())
        assert told.keys() == shipped.keys()
        assert told["split"] == shipped["split"]
        assert told["split"]["labelled"] == 200


@pytest.mark.slow
def test_the_full_run_reproduces(tmp_path):
    main(["--out", str(tmp_path)])
    for name in ("hgnn_digits", "lighthgnn_digits"):
        told = json.loads((tmp_path / f"{name}.json").read_text())
        shipped = json.loads((resources.files("edgekit.models") / "pretrained" / f"{name}.json").read_text())
        assert told["test_accuracy"] >= 0.97
        if (told["versions"], told["machine"]) == (shipped["versions"], shipped["machine"]):
            assert told["test_accuracy"] == pytest.approx(shipped["test_accuracy"], abs=0.01)


@pytest.mark.slow
def test_students_beat_the_plain_mlp_on_digits():
    """The point of it all, on three seeds: the measured lead is about four points."""
    row, _ = compare("digits", Recipe(), range(3))
    assert row.means["lighthgnn"] > row.means["mlp"] + 0.02
    assert row.means["lighthgnn_plus"] > row.means["mlp"] + 0.02
