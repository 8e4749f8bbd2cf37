"""HGNN, HGNN+ and LightHGNN's student: the authors' answers, the papers' formulas, and the ONNX graph without loops."""

from __future__ import annotations

import importlib.util
import io
import json
from importlib import resources
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from edgekit.errors import MissingDependencyError, ShapeError, WeightsError
from edgekit.models import create_model, fuse, model_entry, seed_weights
from edgekit.models.complexity import count_parameters
from edgekit.models.hypergraph import Hypergraph
from edgekit.models.lighthgnn import HGNN, Student

NAMES = ("hgnn", "hgnnp", "lighthgnn", "hgnn_digits", "lighthgnn_digits")
TEACHERS = ("hgnn", "hgnnp")
SEEDED = Path(__file__).parent.parent / "golden" / "seeded.py"


def draw(name, shape):
    spec = importlib.util.spec_from_file_location("seeded", SEEDED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.draw(name, shape)


def relative_error(got, expected):
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def answer(model, inputs):
    with torch.no_grad():
        return model(**{name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()})


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def seeded(model):
    seed_weights(model, 0)
    return model.eval()


def random_hypergraph(seed, vertices=30, hyperedges=17, **options):
    generator = np.random.default_rng(seed)
    v, e = generator.integers(0, vertices, 80), generator.integers(0, hyperedges, 80)
    weight = generator.uniform(0.2, 3, hyperedges)
    return Hypergraph.from_incidence(v, e, num_vertices=vertices, weight=weight, **options)


# against the authors' code


@pytest.mark.parametrize(
    ("golden", "build"),
    [("lighthgnn_teacher_hgnn", lambda: HGNN(64, 7)), ("lighthgnn_student", lambda: Student(64, 7))],
    indirect=["golden"],
    ids=["teacher", "student"],
)
def test_golden(golden, build):
    model = build().eval()
    assert [(key, tuple(value.shape)) for key, value in model.state_dict().items()] == list(golden.keys.items())
    model.load_state_dict(golden.state_dict(), strict=True)
    if golden.case == "lighthgnn_student":
        inputs = {"features": draw("input:lighthgnn_student", (200, 64))}
    else:
        hypergraph = Hypergraph.from_incidence(*golden.output("incidence").numpy(), num_vertices=200)
        inputs = hypergraph.inputs(draw("input:lighthgnn_teacher", (200, 64)))
    assert relative_error(answer(model, inputs), golden.output("output")) < 1e-5
    assert relative_error(answer(fuse(model), inputs), golden.output("output")) < 2e-5


def test_dhgs_keys_with_batch_norm():
    """dhg registers the batch norm before theta, and has one in the last layer that nothing uses."""
    keys = list(HGNN(4, 3, use_bn=True).state_dict())
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    layer = [*(f"bn.{key}" for key in norm), "theta.weight", "theta.bias"]
    assert keys == [f"layers{i}.{key}" for i in (0, 1) for key in layer]


RENAMED = {
    "dhg": (
        lambda: HGNN(5, 3, use_bn=True),
        lambda key: key.replace("layers0.", "layers.0.").replace("layers1.", "layers.1."),
    ),
    "production": (lambda: Student(5, 3), lambda key: key.replace("layer0.", "0.").replace("layer1.", "1.")),
    "own": (lambda: Student(5, 3), lambda key: key),
}


@pytest.mark.parametrize(("build", "rename"), RENAMED.values(), ids=RENAMED)
def test_checkpoints_of_other_names(build, rename, tmp_path):
    from edgekit.models import load_weights

    source, model = seeded(build()), build()
    save_file({rename(key): value for key, value in source.state_dict().items()}, tmp_path / "w.safetensors")
    load_weights(model, tmp_path)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_checkpoint_of_another_architecture(tmp_path):
    from edgekit.models import load_weights

    save_file(Student(5, 3).state_dict(), tmp_path / "student.safetensors")
    with pytest.raises(WeightsError, match=r"does not fit this HGNN: 4 missing \(layers0.theta.weight"):
        load_weights(HGNN(5, 3), tmp_path / "student.safetensors")
    with pytest.raises(WeightsError, match="of another shape"):
        load_weights(Student(5, 4), tmp_path / "student.safetensors")


# against the formulas


def dense_teacher(model, hypergraph, features):
    """The papers' formulas with float64 matrices."""
    weight = hypergraph.weight.astype(np.float64)
    incidence = np.zeros((hypergraph.num_vertices, len(weight)))
    incidence[hypergraph.vertex, hypergraph.hyperedge] = 1
    dv, de = incidence @ weight, incidence.sum(0)
    inverse = np.array([1 / d if d > 0 else 0 for d in dv])
    operator = incidence @ np.diag(weight / de) @ incidence.T
    if model.kind == "hgnn":
        operator = np.diag(np.sqrt(inverse)) @ operator @ np.diag(np.sqrt(inverse))
    else:
        operator = np.diag(inverse) @ operator
    state = {key: value.double().numpy() for key, value in model.state_dict().items()}
    hidden = features.astype(np.float64) @ state["layers0.theta.weight"].T + state["layers0.theta.bias"]
    hidden = np.maximum(operator @ hidden, 0)
    if model.layers0.bn is not None:
        scale = state["layers0.bn.weight"] / np.sqrt(state["layers0.bn.running_var"] + 1e-5)
        hidden = (hidden - state["layers0.bn.running_mean"]) * scale + state["layers0.bn.bias"]
    return operator @ (hidden @ state["layers1.theta.weight"].T + state["layers1.theta.bias"])


@pytest.mark.parametrize("use_bn", [False, True], ids=["plain", "bn"])
@pytest.mark.parametrize("isolated", ["singleton", "keep"])
@pytest.mark.parametrize("kind", TEACHERS)
def test_teacher_against_dense_matrices(kind, isolated, use_bn):
    hypergraph = random_hypergraph(1, vertices=60, isolated=isolated)
    assert (hypergraph.vertex_degree == 0).any() == (isolated == "keep")
    model = seeded(HGNN(9, 4, hidden=13, kind=kind, use_bn=use_bn))
    features = normal(2, 60, 9)
    inputs = hypergraph.inputs(features)
    expected = torch.from_numpy(dense_teacher(model, hypergraph, features))
    assert relative_error(answer(model, inputs), expected) < 1e-6
    assert relative_error(answer(fuse(model), inputs), expected) < 1e-6


def test_student_against_its_formula():
    model = seeded(Student(6, 3, hidden=11))
    x = normal(0, 8, 6)
    state = {key: value.double().numpy() for key, value in model.state_dict().items()}
    hidden = np.maximum(x @ state["layer0.layers.0.weight"].T + state["layer0.layers.0.bias"], 0)
    scale = state["layer0.layers.2.weight"] / np.sqrt(state["layer0.layers.2.running_var"] + 1e-5)
    hidden = (hidden - state["layer0.layers.2.running_mean"]) * scale + state["layer0.layers.2.bias"]
    expected = torch.from_numpy(hidden @ state["layer1.weight"].T + state["layer1.bias"])
    assert relative_error(answer(model, {"features": x}), expected) < 1e-6
    assert relative_error(model.embed(torch.from_numpy(x)).detach(), torch.from_numpy(hidden)) < 1e-6


@pytest.mark.parametrize("build", [lambda: HGNN(5, 3, use_bn=True), lambda: Student(5, 3)], ids=["teacher", "student"])
def test_fused_models_have_no_batch_norm(build):
    model = seeded(build())
    fused = fuse(model)
    assert not any(isinstance(module, torch.nn.BatchNorm1d) for module in fused.modules())
    inputs = random_hypergraph(0).inputs(normal(0, 30, 5))
    if isinstance(model, Student):
        inputs = {"features": inputs["features"]}
    assert relative_error(answer(fused, inputs), answer(model, inputs)) < 1e-6
    assert relative_error(answer(fuse(fused), inputs), answer(model, inputs)) < 1e-6


def test_student_without_batch_norm():
    model = seeded(Student(5, 3, use_bn=False))
    inputs = {"features": normal(0, 4, 5)}
    assert torch.equal(answer(fuse(model), inputs), answer(model, inputs))


# what must not matter


@pytest.mark.parametrize("kind", TEACHERS)
def test_order_of_pairs_hyperedges_and_vertices(kind):
    hypergraph, features = random_hypergraph(3), normal(3, 30, 5)
    model, generator = seeded(HGNN(5, 4, kind=kind)), np.random.default_rng(0)
    inputs = hypergraph.inputs(features)
    expected = answer(model, inputs)
    shuffled = dict(inputs)
    for name in ("members", "member_chunks", "memberships", "membership_chunks"):
        shuffled[name] = generator.permuted(inputs[name], axis=1)
    assert relative_error(answer(model, shuffled), expected) < 1e-6

    def renamed(vertices, hyperedges):
        """Vertex v is now called vertices[v], hyperedge e hyperedges[e]."""
        return Hypergraph.from_incidence(
            vertices[hypergraph.vertex],
            hyperedges[hypergraph.hyperedge],
            num_vertices=30,
            weight=hypergraph.weight[np.argsort(hyperedges)],
        )

    names = generator.permutation(hypergraph.num_hyperedges)
    other = renamed(np.arange(30), names).inputs(features)
    assert relative_error(answer(model, other), expected) < 1e-6
    vertices = generator.permutation(30)
    moved = renamed(vertices, np.arange(len(names))).inputs(features[np.argsort(vertices)])
    assert relative_error(answer(model, moved)[vertices], expected) < 1e-6


@pytest.mark.parametrize("kind", TEACHERS)
def test_scale_of_the_weights_does_not_matter_but_their_ratio_does(kind):
    listed, features = [[0, 1, 2], [2, 3], [1, 3]], normal(0, 4, 5)
    model = seeded(HGNN(5, 4, kind=kind))
    once, thrice, other = (
        answer(model, Hypergraph.from_hyperedges(listed, num_vertices=4, weight=w).inputs(features))
        for w in ([1, 2, 3], [3, 6, 9], [3, 2, 1])
    )
    assert relative_error(thrice, once) < 1e-6
    assert relative_error(other, once) > 1e-2


@pytest.mark.parametrize("kind", TEACHERS)
def test_vertices_without_hyperedges_answer_zero_or_for_themselves(kind):
    model, features = seeded(HGNN(5, 4, kind=kind)), normal(0, 3, 5)
    kept = Hypergraph.from_hyperedges([[0, 1]], num_vertices=3, isolated="keep")
    assert answer(model, kept.inputs(features))[2].tolist() == [0, 0, 0, 0]
    own = Hypergraph.from_hyperedges([[0, 1]], num_vertices=3)
    alone = model.layers1.theta(model.layers0.theta(torch.from_numpy(features[2:])).relu())[0].detach()
    torch.testing.assert_close(answer(model, own.inputs(features))[2], alone)


@given(st.integers(0, 2**32), st.sampled_from(TEACHERS), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_neighbourhood_answers_as_the_whole(seed, kind, asked_count):
    generator = np.random.default_rng(seed)
    vertices, hyperedges = int(generator.integers(1, 40)), int(generator.integers(1, 30))
    count = int(generator.integers(0, 90))
    hypergraph = Hypergraph.from_incidence(
        generator.integers(0, vertices, count),
        generator.integers(0, hyperedges, count),
        num_vertices=vertices,
        weight=generator.uniform(0.1, 5, hyperedges),
        isolated="keep" if seed % 2 else "singleton",
    )
    features, asked = normal(seed, vertices, 6), generator.integers(0, vertices, asked_count)
    model = seeded(HGNN(6, 3, kind=kind))
    near = hypergraph.neighbourhood(asked)
    got = answer(model, near.inputs(features))[near.positions]
    torch.testing.assert_close(got, answer(model, hypergraph.inputs(features))[asked], rtol=1e-5, atol=1e-6)


def test_one_hop_is_not_enough_for_two_layers():
    chain = Hypergraph.from_hyperedges([[0, 1], [1, 2]], num_vertices=3)
    features, model = normal(0, 3, 5), seeded(HGNN(5, 4))
    whole = answer(model, chain.inputs(features))[0]
    near = chain.neighbourhood([0], hops=1)
    assert near.vertices.tolist() == [0, 1]
    assert relative_error(answer(model, near.inputs(features))[0], whole) > 1e-3


def test_new_vertices_of_a_stream():
    hypergraph, features = random_hypergraph(5), normal(5, 30, 6)
    model = seeded(HGNN(6, 3))
    longer = hypergraph.extended([[30, 2, 7], [30, 31]], new_vertices=2)
    features = np.concatenate([features, normal(6, 2, 6)])
    near = longer.neighbourhood([30, 31])
    got = answer(model, near.inputs(features))[near.positions]
    torch.testing.assert_close(got, answer(model, longer.inputs(features))[30:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("degree", [0.0, -1.0], ids=["zero", "negative"])
@pytest.mark.parametrize("kind", TEACHERS)
def test_degrees_that_are_not_positive_count_as_factor_zero(kind, degree):
    inputs = random_hypergraph(0).inputs(normal(0, 30, 5))
    inputs["vertex_degree"] = np.full(30, degree, np.float32)
    assert answer(seeded(HGNN(5, 4, kind=kind)), inputs).abs().max() == 0


# export


def exported_teacher(kind, threads):
    """A fused teacher, its ONNX graph with all sizes dynamic, and a session per number of threads."""
    model = fuse(seeded(HGNN(6, 3, hidden=5, kind=kind, use_bn=True)))
    table = torch.zeros(2, 2, dtype=torch.int64)
    tensors = (torch.zeros(2, 6), *(table.clone() for _ in range(4)), torch.ones(2), torch.ones(2))
    dims = {name: torch.export.Dim(name) for name in "VEMQLDTK"}
    axes = ("V", "EM", "QL", "VD", "TK", "V", "E")
    shapes = tuple({axis: dims[name] for axis, name in enumerate(names)} for names in axes)
    program = torch.export.export(model, tensors, dynamic_shapes=shapes)
    onnx_program = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
    file = io.BytesIO()
    onnx_program.save(file)
    return model, onnx_program.model.graph, [session(file.getvalue(), count) for count in threads]


def session(file, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options)


@pytest.fixture(scope="module", params=TEACHERS)
def exported(request):
    return exported_teacher(request.param, [1, 2])


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_graph_gathers_and_adds_rows(exported):
    """No Scatter: with reduction, onnxruntime loses sums where it has several threads."""
    _, graph, _ = exported
    kinds = {node.op_type for node in graph}
    assert {"Gather", "ReduceSum"} <= kinds
    assert not any(kind.startswith("Scatter") for kind in kinds)
    assert not kinds & {"GatherND", "GatherElements", "Loop", "If", "MatMul", "BatchNormalization"}


SIZES = {
    "one vertex": Hypergraph.from_hyperedges([], num_vertices=1),
    "one hyperedge": Hypergraph.from_hyperedges([list(range(20))], num_vertices=20),
    "more hyperedges than vertices": Hypergraph.from_hyperedges(
        [[0, 1], [1, 2], [0, 2], [0, 1, 2], [1]], num_vertices=3
    ),
    "nobody shares": Hypergraph.from_hyperedges([], num_vertices=9),
    "no pairs": Hypergraph.from_hyperedges([], num_vertices=4, isolated="keep"),
    "weights and isolated": Hypergraph.from_hyperedges(
        [[0, 1], [1, 4]], num_vertices=6, weight=[0.5, 3], isolated="keep"
    ),
    "many": Hypergraph.from_incidence(np.arange(3000) * 7 % 501, np.arange(3000) // 6, num_vertices=501),
    "a hub": Hypergraph.from_hyperedges([[0, v, v + 1] for v in range(1, 400)] + [list(range(300))], num_vertices=401),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hypergraph", SIZES.values(), ids=SIZES)
def test_onnx_answers_at_every_size(exported, hypergraph):
    model, _, sessions = exported
    inputs = hypergraph.inputs(normal(1, hypergraph.num_vertices, 6))
    expected = answer(model, inputs)
    for each in sessions:
        assert [tensor.name for tensor in each.get_inputs()] == list(inputs)
        (got,) = each.run(None, inputs)
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_two_threads_lose_no_sums(exported):
    """At a size where onnxruntime's ScatterND with reduction loses some in about every second run."""
    model, _, (_, two_threads) = exported
    generator, vertices = np.random.default_rng(0), 20_000
    hypergraph = Hypergraph.from_incidence(
        generator.integers(0, vertices, 200_000), np.repeat(np.arange(vertices), 10), num_vertices=vertices
    )
    inputs = hypergraph.inputs(normal(0, vertices, 6))
    expected = answer(model, inputs)
    for _ in range(20):
        (got,) = two_threads.run(None, inputs)
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-5)


def test_an_empty_hypergraph_has_no_empty_input():
    """No dimension of a bundle's inputs may be 0; the answer of vertices without a hyperedge is 0."""
    inputs = SIZES["no pairs"].inputs(normal(0, 4, 6))
    assert min(min(each.shape) for each in inputs.values()) == 1
    assert answer(seeded(HGNN(6, 3)), inputs).abs().max() == 0


# what is refused


def tables(rows, entry):
    """The first row goes from -1 to one beyond `entry`."""
    table = np.zeros((rows, 2), np.int64)
    table[0] = -1, entry + 1
    return table


def changed(**changes):
    return random_hypergraph(0).inputs(normal(0, 30, 5)) | changes


BAD_INPUTS = {
    "width": (changed(features=normal(0, 30, 4)), r"features \[V, 5\], one row per vertex; got \(30, 4\)"),
    "one vertex, flat": (changed(features=normal(0, 5)), r"got \(5,\); one vertex is a batch of one"),
    "degrees": (changed(vertex_degree=np.ones(29, np.float32)), r"vertex_degree \[29\], .*; use Hypergraph.inputs"),
    "rank": (changed(members=np.zeros(17, np.int64)), r"got members \[17\], "),
    "rows": (changed(memberships=np.zeros((29, 2), np.int64)), r"memberships \[29, 2\], .* for \[30, 5\]"),
    "nothing": (changed(member_chunks=np.zeros((0, 1), np.int64)), r"none of them empty; .* member_chunks \[0, 1\]"),
    "member too large": (changed(members=tables(19, 32)), r"members lie in 0\.\.V\+Q, which is 0\.\.32; got -1\.\.33"),
    "chunk negative": (
        changed(membership_chunks=tables(2, 20)),
        r"membership_chunks lie in 0\.\.E\+T, which is 0\.\.21; got -1\.\.21",
    ),
}


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_teacher_refuses(inputs, message):
    with pytest.raises(ShapeError, match=message):
        answer(seeded(HGNN(5, 3)), inputs)


@pytest.mark.parametrize("shape", [(3, 4), (5,), (1, 3, 5)], ids=str)
def test_student_refuses(shape):
    with pytest.raises(ShapeError, match=r"Student takes features \[V, 5\]"):
        Student(5, 3)(torch.zeros(shape))


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize(
    ("option", "value"), [("num_features", 0), ("hidden", 0), ("dropout", 1.5), ("num_classes", -1)]
)
def test_sizes_out_of_range(name, option, value):
    with pytest.raises(ShapeError, match=option):
        create_model(name, **{option: value})


# the zoo


@pytest.mark.parametrize("name", NAMES)
def test_entries(name):
    entry, model = model_entry(name), create_model(name)
    assert entry.family == "lighthgnn"
    assert entry.parameters == count_parameters(model)
    examples = [entry.input.examples(seed) for seed in (0, 0, 1)]
    assert [each.name for each in entry.input.tensors] == list(examples[0])
    for first, again, other in zip(*(each.values() for each in examples), strict=True):
        np.testing.assert_array_equal(first, again)
        assert first.shape != other.shape or not np.array_equal(first, other)
    for inputs in examples:
        for tensor in entry.input.tensors:
            assert inputs[tensor.name].dtype == tensor.dtype
        logits = answer(model, inputs)
        assert logits.shape == (len(inputs["features"]), entry.num_classes)
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES[:3])
def test_examples_follow_the_options(name):
    inputs = model_entry(name).input.examples(0, num_features=9, hidden=4)
    assert answer(create_model(name, num_features=9, hidden=4), inputs).shape[1] == 7


def test_all_digits_are_the_example_of_seed_0():
    assert len(model_entry("hgnn_digits").input.examples(0)["features"]) == 1797


@pytest.mark.parametrize("fused", [False, True], ids=["trained", "fused"])
@pytest.mark.parametrize("name", NAMES[3:])
def test_shipped_accuracy(name, fused):
    inputs, labels = model_entry(name).input.labelled()
    model = fuse(create_model(name)) if fused else create_model(name)
    counted = labels >= 0
    assert counted.sum() == 360
    right = (answer(model, inputs).argmax(1).numpy() == labels)[counted].mean()
    told = json.loads((resources.files("edgekit.models") / "pretrained" / f"{name}.json").read_text())
    assert right >= 0.97
    assert right == pytest.approx(told["test_accuracy"], abs=1e-6)
    assert told["parameters"] == count_parameters(create_model(name))


@pytest.mark.parametrize("name", NAMES[3:])
def test_digits_without_scikit_learn(name, monkeypatch):
    def missing(name):
        raise MissingDependencyError("scikit-learn", "train", "the digits")

    monkeypatch.setattr("edgekit.models.vertex_sets.load_vertex_set", missing)
    inputs = model_entry(name).input.examples(0)
    assert answer(create_model(name), inputs).isfinite().all()
    assert 0 <= inputs["features"].min() <= inputs["features"].max() <= 1
