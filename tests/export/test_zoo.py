"""Zoo models as bundles: the shapes they ask for, their own data as samples, labelled data, and lower precisions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from torch import nn

import edgekit
from edgekit.errors import InputError, MissingDependencyError, ShapeError
from edgekit.export.data import load_calibration, load_labelled
from edgekit.export.plan import make_plan
from edgekit.export.shapes import input_shapes, input_specs, parse_shapes
from edgekit.export.source import load_model
from edgekit.export.zoo import default_shapes, example_arrays, labelled_data
from edgekit.models import list_models, model_entry
from edgekit.models.registry import TensorInput, TensorInputs
from edgekit.runtime.verification import measure_accuracy

TEACHER = [
    "features:Vx64",
    "members:ExM@int64<V+Q+1",
    "member_chunks:QxL@int64<V+Q+1",
    "memberships:VxD@int64<E+T+1",
    "membership_chunks:TxK@int64<E+T+1",
    "vertex_degree:V",
    "member_weight:E",
]
WITHOUT_IMAGES = [name for name in list_models() if isinstance(model_entry(name).input, TensorInputs)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """hgnn_digits with its shipped weights."""
    return edgekit.export("hgnn_digits", "onnx", tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return edgekit.export("lighthgnn_digits", "onnx", tmp_path_factory.mktemp("student"))


def ask(name, options=None, seed=1, shapes=None):
    entry = model_entry(name)
    given = default_shapes(entry, options or {}) if shapes is None else parse_shapes(shapes)
    return example_arrays(entry, options or {}, *input_specs(given), seed=seed)


def plan_of(name, **options):
    loaded = load_model(name, overrides=options)
    return make_plan(loaded, None, None, None, 20, 0, True, None, lambda _: None)


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "options", "expected"),
        [
            ("shvit_digits", {}, ["image:1x1x32x32"]),
            ("care_s0", {"in_chans": 4}, ["image:1x4x224x224"]),
            ("dynamicvis_base", {"img_size": 1024}, ["image:1x3x1024x1024"]),
            ("dynamicvis_digits", {"img_size": [64, 32], "in_chans": 3}, ["image:1x3x64x32"]),
            ("lighthgnn", {"num_features": 12}, ["features:Vx12 | V=1.."]),
        ],
        ids=["image", "channels", "image size", "height and width", "features"],
    )
    def test_options_decide(self, name, options, expected):
        shapes = default_shapes(model_entry(name), options)
        assert [str(shape) for shape in shapes] == expected

    def test_of_a_model_with_several_inputs(self):
        assert default_shapes(model_entry("hgnn_digits"), {}) == parse_shapes(TEACHER)

    @pytest.mark.parametrize(("index_of", "expected"), [("num_features", "9"), ("N+num_features+1", "N+9+1")])
    def test_an_index_into_a_parameter_becomes_its_number(self, index_of, expected):
        entry = model_entry("lighthgnn")
        inputs = TensorInputs((TensorInput("ids", ("N",), "int64", index_of),), "word", lambda seed: {})
        (shape,) = default_shapes(dataclasses.replace(entry, input=inputs), {"num_features": 9})
        assert str(shape) == f"ids:N@int64<{expected} | N=1.."

    def test_changed_channels_need_no_shape(self):
        plan = plan_of("care_digits", in_chans=3)
        assert plan.shapes[0].dims == (1, 3, 32, 32)
        assert plan.preprocessing is None  # it was for gray images

    def test_image_size_as_an_option(self):
        plan = plan_of("dynamicvis_digits", img_size=[32, 48])
        assert plan.shapes[0].dims == (1, 1, 32, 48)
        assert plan.preprocessing.size == (32, 48)
        assert plan.loaded.weights.source == "shipped"

    @pytest.mark.slow
    def test_another_image_size_is_exported(self, export):
        bundle = export("dynamicvis_digits", overrides={"img_size": [32, 48]})
        assert bundle.manifest.model.macs is None
        assert edgekit.verify(bundle, live=True)

    def test_a_shape_that_contradicts_the_model(self, export):
        with pytest.raises(ShapeError, match=r"takes images \[B, 1, 32, 32\].* build it with img_size"):
            export("dynamicvis_digits", "image:1x1x64x64")

    @pytest.mark.slow
    def test_labels_fall_away_with_the_classifier(self, export):
        bundle = export("dynamicvis_digits", overrides={"features": True})
        assert len(bundle.manifest.outputs) > 1
        assert bundle.manifest.labels is None


class TestExamples:
    @pytest.mark.parametrize("name", WITHOUT_IMAGES)
    def test_fit_the_default_shapes(self, name):
        assert ask(name) is not None

    @pytest.mark.parametrize("name", ["hgnn", "lighthgnn"])
    def test_follow_the_options(self, name):
        assert ask(name, {"num_features": 7})["features"].shape[1] == 7

    def test_none_for_models_with_images(self):
        assert ask("shvit_digits") is None

    def test_none_where_the_sizes_asked_for_differ(self):
        assert ask("hgnn_digits", shapes=[f"{TEACHER[0]} | 1..100", *TEACHER[1:]]) is None

    def test_rows_of_one_input_are_cut(self):
        assert ask("lighthgnn_digits", shapes="features:3x64")["features"].shape == (3, 64)
        assert ask("lighthgnn_digits", shapes="features:Vx64 | 2..4")["features"].shape == (4, 64)

    def test_without_the_library_of_the_data(self):
        def missing(seed):
            raise MissingDependencyError("scikit-learn", "train", "the digits")

        entry = model_entry("lighthgnn_digits")
        broken = dataclasses.replace(entry, input=dataclasses.replace(entry.input, examples=missing))
        assert example_arrays(broken, {}, *input_specs(default_shapes(entry, {})), seed=0) is None


class TestTeacher:
    def test_manifest(self, teacher):
        manifest = teacher.manifest
        assert [str(shape).partition(" |")[0] for shape in input_shapes(manifest.inputs, manifest.dims)] == TEACHER
        assert set(manifest.dims) == set("VEMQLDTK")
        assert manifest.model.weights.source == "shipped"
        assert len(manifest.labels) == 10

    def test_sums_are_gathered_rows_and_nothing_is_dense(self, teacher):
        counts = teacher.manifest.ops
        assert counts["Gather"] == counts["ReduceSum"] == 8
        assert not [op for op in counts if op.startswith("Scatter") or op in ("GatherND", "GatherElements", "MatMul")]

    def test_a_sample_of_real_data_is_stored(self, teacher):
        (item,) = teacher.samples()
        expected = ask("hgnn_digits", seed=0)
        assert all(np.array_equal(item[0][name], expected[name]) for name in expected)

    def test_verify(self, teacher):
        result = edgekit.verify(teacher, live=True, layers=True, data="digits")
        assert result
        assert result.checks[1].inputs == 4
        assert result.accuracy.bundle == result.accuracy.pytorch > 0.9
        assert result.accuracy.items == 360
        assert "360 of 1797 rows counted" in result.accuracy.data

    def test_labelled_data_is_at_hand_without_the_live_model(self, teacher):
        assert edgekit.verify(teacher, live=False, data="digits").accuracy.bundle > 0.9

    def test_labelled_arrays(self, teacher, tmp_path):
        inputs, labels = model_entry("hgnn_digits").input.labelled()
        np.savez(tmp_path / "mine.npz", **inputs, labels=labels)
        mine = edgekit.verify(teacher, data=tmp_path / "mine.npz").accuracy
        named = edgekit.verify(teacher, data="digits").accuracy
        assert (mine.items, mine.bundle, mine.pytorch) == (named.items, named.bundle, named.pytorch)

    def test_an_index_out_of_range_is_told(self, teacher):
        session = edgekit.load(teacher)
        inputs = ask("hgnn_digits")
        wrong = {**inputs, "memberships": inputs["memberships"] + 1}
        limit = len(inputs["member_weight"]) + len(inputs["membership_chunks"]) + 1
        words = rf"memberships: .* < E\+T\+1 holds {limit} at .* to {limit - 1} \(E\+T\+1 is {limit}\)"
        with pytest.raises(InputError, match=words):
            session.run(wrong)

    @pytest.mark.parametrize("threads", [None, 2, 4])
    def test_answers_are_the_same_every_time(self, teacher, threads):
        """The sums of a vertex must not depend on how threads share the pairs."""
        session = edgekit.load(teacher, threads=threads)
        ((inputs, expected),) = teacher.samples()
        for _ in range(20):
            np.testing.assert_allclose(session.run(inputs)["logits"], expected["logits"], rtol=1e-4, atol=1e-4)

    def test_drawn_inputs_run(self, teacher):
        session = edgekit.load(teacher)
        answer = session.run(session.random_inputs(sizes={"V": 9, "E": 6, "M": 3, "T": 2, "K": 5}))["logits"]
        assert answer.shape == (9, 10)
        assert np.isfinite(answer).all()

    def test_profile_takes_the_stored_sample(self, teacher):
        profile = edgekit.profile(teacher, runs=2, warmup=1, ops=False)
        assert profile.input_source == "stored sample"
        assert profile.inputs["features"] == (1797, 64)

    @pytest.mark.parametrize("precision", ["fp16", "int8"])
    def test_lower_precisions(self, export, precision):
        bundle = export("hgnn_digits", precision=precision)
        assert edgekit.verify(bundle, live=True)
        accuracy = bundle.report()["precision"]["accuracy"]
        assert accuracy[precision] > accuracy["fp32"] - 0.02
        assert (bundle.manifest.calibration is None) == (precision == "fp16")

    def test_int8_without_data_of_its_own(self, export):
        with pytest.raises(InputError, match="hgnnp has none of its own for these shapes: pass --calibration"):
            export("hgnnp", precision="int8")

    def test_int8_on_drawn_values(self, export):
        bundle = export("hgnnp", precision="int8", calibration="random", overrides={"num_features": 5})
        assert len(bundle.samples()) == 1
        assert bundle.report()["precision"]["agreement"]["items"] == 16


class TestStudent:
    def test_verify(self, student):
        result = edgekit.verify(student, live=True, data="digits")
        assert result
        assert result.accuracy.bundle == result.accuracy.pytorch > 0.9
        assert result.accuracy.items == 360

    def test_one_vertex_at_a_time(self, export, student):
        """A bundle for one row gives each row the class that it has among all."""
        bundle = export("lighthgnn_digits", "features:1x64")
        assert bundle.manifest.model.macs == model_entry("lighthgnn_digits").macs
        assert len(bundle.samples()) == 4
        single, whole = (edgekit.verify(item, data="digits").accuracy for item in (bundle, student))
        assert (single.items, single.bundle) == (whole.items, whole.bundle)

    def test_int8_on_its_own_rows(self, export):
        bundle = export("lighthgnn_digits", precision="int8")
        assert "handwritten digits, as inputs of lighthgnn_digits, 256 drawn of" in bundle.manifest.calibration
        assert edgekit.verify(bundle, live=True)

    def test_calibration_rows_are_its_own(self):
        entry = model_entry("lighthgnn_digits")
        data = load_calibration(None, default_shapes(entry, {}), None, entry)
        assert not data.whole
        assert data.inputs["features"].shape == (256, 64)
        tested, _ = entry.input.labelled()
        assert not {row.tobytes() for row in data.inputs["features"]} & {row.tobytes() for row in tested["features"]}

    @pytest.mark.parametrize("name", ["hgnn_digits", "lighthgnn_digits"])
    def test_drawn_rows_never_pass_for_the_data_set(self, name):
        """Without scikit-learn the examples are drawn; a manifest must not call those digits."""

        def missing():
            raise MissingDependencyError("scikit-learn", "train", "the digits")

        entry = model_entry(name)
        broken = dataclasses.replace(entry, input=dataclasses.replace(entry.input, labelled=missing))
        with pytest.raises(MissingDependencyError, match="scikit-learn"):
            load_calibration(None, default_shapes(entry, {}), None, broken)


class TestRefusals:
    @pytest.mark.parametrize("name", ["hgnn", "lighthgnn"])
    def test_no_labelled_data(self, name):
        entry = model_entry(name)
        with pytest.raises(InputError, match=f"{name} has no data of its own in 'digits'; give an .npz .* 'labels'"):
            load_labelled("digits", *input_specs(default_shapes(entry, {})), None, entry=entry)

    def test_a_model_whose_data_has_no_labels(self):
        entry = model_entry("hgnn_digits")
        unlabelled = dataclasses.replace(entry, input=dataclasses.replace(entry.input, labelled=None))
        with pytest.raises(InputError, match=r"hgnn_digits has no labelled data of its own; give an \.npz .*features"):
            labelled_data(unlabelled, *input_specs(default_shapes(entry, {})))

    def test_labels_for_another_number_of_rows(self, teacher):
        data = labelled_data(model_entry("hgnn_digits"), teacher.manifest.inputs, teacher.manifest.dims)
        short = dataclasses.replace(data, labels=data.labels[:-1])
        with pytest.raises(InputError, match="holds 1796 labels for 1797 rows of class scores"):
            measure_accuracy(edgekit.load(teacher), short)


class Lookup(nn.Module):
    """Rows of a table, chosen by index, and of another input."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 4)

    def forward(self, ids, vertex, features):
        return self.table(ids) + features.index_select(0, vertex)


def test_models_with_indices_are_exported_with_drawn_samples(export):
    module = Lookup()
    bundle = export(module, ["ids:P@int64<11", "vertex:P@int32<V", "features:Vx4 | 2..50"])
    assert [spec.index_of for spec in bundle.manifest.inputs] == ["11", "V", None]
    assert len(bundle.samples()) == 4
    result = edgekit.verify(bundle, model=module, layers=True, inputs=6)
    assert result
    with pytest.raises(InputError, match=r"ids: int64\[P\] < 11 holds 11 at \[0\]"):
        edgekit.load(bundle).run(
            {"ids": np.array([11]), "vertex": np.zeros(1, np.int32), "features": np.zeros((2, 4), np.float32)}
        )
