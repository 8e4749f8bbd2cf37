"""Data sets from array files and image folders: what is read, in which order, and every refusal."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgekit.errors import InputError
from edgekit.runtime.datasets import Dataset, load_dataset
from edgekit.runtime.preprocess import ImagePreprocessing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

TINY = ImagePreprocessing(size=(2, 2), color="gray", scale=1, mean=(0,), std=(1,))
SHAPES = {"image": ("batch", 1, 2, 2)}


def load(path: Path, **options: Any) -> Dataset:
    arguments: dict[str, Any] = {"input_name": "image", "preprocessing": TINY, "input_shapes": SHAPES} | options
    return load_dataset(path, **arguments)


def images(count: int = 5) -> NDArray[np.float32]:
    """`[N, 1, 2, 2]`; sample `i` is full of `i`."""
    return np.repeat(np.arange(count, dtype=np.float32), 4).reshape(count, 1, 2, 2)


def save_image(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (3, 3), level).save(path)


def class_folders(root: Path, folders: Mapping[str, list[int]]) -> Path:
    """One image per level, in a folder per class."""
    for name, levels in folders.items():
        for level in levels:
            save_image(root / name / f"{level:03}.png", level)
    return root


def seen(dataset: Dataset) -> list[int]:
    """The level of each sample."""
    return [int(value) for value in dataset.inputs["image"][:, 0, 0, 0]]


# Dataset


def test_batches_are_consecutive_and_the_last_may_be_smaller() -> None:
    dataset = Dataset({"image": images(5), "mask": np.ones((5, 3), bool)}, np.arange(5), "here")
    parts = list(dataset.batches(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [seen(part) for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part.labels.tolist() for part in parts if part.labels is not None] == [[0, 1], [2, 3], [4]]
    assert parts[2].inputs["mask"].shape == (1, 3)
    assert np.shares_memory(parts[0].inputs["image"], dataset.inputs["image"])


def test_take_draws_the_same_samples_for_the_same_seed() -> None:
    dataset = Dataset({"image": images(50)}, np.arange(50), "here")
    drawn = dataset.take(10, seed=3)
    assert seen(drawn) == sorted(set(seen(drawn)))
    assert drawn.labels is not None
    assert seen(drawn) == drawn.labels.tolist()
    assert seen(dataset.take(10, seed=3)) == seen(drawn)
    assert seen(dataset.take(10, seed=4)) != seen(drawn)
    assert drawn.source == "here, 10 drawn of 50 (seed 3)"


def test_take_of_more_than_there_are_is_everything() -> None:
    dataset = Dataset({"image": images(3)}, None, "here")
    assert dataset.take(9) is dataset


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        pytest.param({}, None, "here: expected at least one sample, got none", id="no-inputs"),
        pytest.param({"a": np.zeros((0, 3))}, None, "here: expected at least one sample, got none", id="no-samples"),
        pytest.param({"a": np.zeros(2), "b": np.zeros(3)}, None, "every array, got a 2, b 3", id="unequal-inputs"),
        pytest.param({"a": np.zeros(2)}, np.zeros(4, np.int64), "every array, got a 2, labels 4", id="unequal-labels"),
        pytest.param({"a": np.array(1.0)}, None, "along the first axis, got a scalar 'a'", id="scalar"),
    ],
)
def test_a_data_set_without_equal_samples_is_refused(inputs: Any, labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Dataset(inputs, labels, "here")


def test_impossible_sizes_are_refused() -> None:
    dataset = Dataset({"image": images(3)}, None, "here")
    with pytest.raises(InputError, match="batch size of at least 1, got 0"):
        dataset.batches(0)
    with pytest.raises(InputError, match="at least 1 sample, got 0"):
        dataset.take(0)


# array files


@pytest.mark.parametrize("label_name", ["labels", "label", "y"])
def test_npz_holds_inputs_by_name_and_labels(tmp_path: Path, label_name: str) -> None:
    arrays: dict[str, Any] = {"image": images(3), label_name: np.array([2, 0, 1], np.uint8)}
    np.savez(tmp_path / "data.npz", **arrays)
    dataset = load(tmp_path / "data.npz")
    np.testing.assert_array_equal(dataset.inputs["image"], images(3))
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [2, 0, 1]
    assert dataset.source == str(tmp_path / "data.npz")


def test_npz_of_several_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "text.npz", ids=np.ones((4, 7), np.int64), mask=np.ones((4, 7), bool))
    dataset = load(tmp_path / "text.npz", preprocessing=None, input_shapes={"ids": (1, "n"), "mask": (1, None)})
    assert {name: array.dtype.name for name, array in dataset.inputs.items()} == {"ids": "int64", "mask": "bool"}
    assert dataset.labels is None


def test_a_lone_array_of_another_name_is_the_only_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", arr_0=images(3), y=np.arange(3))
    assert seen(load(tmp_path / "data.npz")) == [0, 1, 2]


def test_an_input_may_be_called_like_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", y=images(3))
    dataset = load(tmp_path / "data.npz", input_shapes={"y": (None, 1, 2, 2)})
    assert list(dataset.inputs) == ["y"]
    assert dataset.labels is None


def test_npy_is_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", images(3))
    assert seen(load(tmp_path / "data.npy")) == [0, 1, 2]


def test_infinity_is_let_through(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.full((1, 1, 2, 2), -np.inf))
    assert len(load(tmp_path / "data.npy")) == 1


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (6, [0, 1, 2, 3, 4, 5]), (99, [0, 1, 2, 3, 4, 5])]
)
def test_limit_spreads_over_the_whole(tmp_path: Path, limit: int, kept: list[int]) -> None:
    np.savez(tmp_path / "data.npz", image=images(6), y=np.arange(6))
    dataset = load(tmp_path / "data.npz", limit=limit)
    assert dataset.labels is not None
    assert seen(dataset) == dataset.labels.tolist() == kept
    assert dataset.source.endswith(f"data.npz, {limit} of 6 spread evenly" if limit < 6 else "data.npz")


def nan_at(sample: int) -> NDArray[np.float32]:
    array = images(5)
    array[sample, 0, 1, 1] = np.nan
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        pytest.param({}, r"expected an array for each input \(image\).*, got no array", id="nothing"),
        pytest.param({"y": np.arange(3)}, r"each input \(image\) and optionally labels, got y", id="labels-alone"),
        pytest.param({"image": images(), "other": images()}, "got image, other", id="an-array-too-many"),
        pytest.param({"image": images(2), "y": [0, 1], "label": [0, 1]}, "got label, y; keep one", id="labels-twice"),
        pytest.param({"image": images()[:, 0]}, r"\[N, 1, 2, 2\] for N samples, got \[5, 2, 2\]", id="rank"),
        pytest.param({"image": np.zeros((5, 1, 2, 3))}, r"\[N, 1, 2, 2\].*got \[5, 1, 2, 3\]", id="shape"),
        pytest.param({"image": images(0)}, "at least one sample, got none", id="empty"),
        pytest.param({"image": nan_at(3)}, "'image' holds NaN, first in sample 3; remove it", id="nan"),
        pytest.param({"image": np.full((1, 1, 2, 2), "a")}, "expected numbers for 'image', got <U1", id="text"),
        pytest.param({"image": np.ones((1, 1, 2, 2), complex)}, "'image', got complex128", id="complex"),
        pytest.param({"image": images(3), "y": [0, 1]}, "every array, got image 3, labels 2", id="unequal"),
        pytest.param(
            {"image": images(2), "y": [0.0, 1.0]}, r"one integer per sample.*float64 \[2\]", id="float-labels"
        ),
        pytest.param({"image": images(2), "y": [[1, 0], [0, 1]]}, r"one integer.*int64 \[2, 2\]", id="one-hot"),
        pytest.param({"image": images(2), "y": [0, -1]}, "labels of at least 0, got -1 to 0", id="negative-label"),
        pytest.param({"image": np.array([[{}]])}, "cannot be read: .*pickled objects are refused", id="objects"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=r"data\.npz.*" + message) as caught:
        load(tmp_path / "data.npz")
    assert str(tmp_path / "data.npz") in str(caught.value)


def test_labels_beyond_the_models_classes_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", image=images(2), y=[0, 3])
    with pytest.raises(InputError, match="labels from 0 to 2, as the model has classes, got 0 to 3"):
        load(tmp_path / "data.npz", labels=["a", "b", "c"])


def test_npy_does_not_fit_a_model_of_two_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", images(2))
    with pytest.raises(InputError, match=r"each input \(a, b\) and optionally labels, got one array"):
        load(tmp_path / "data.npy", input_shapes={"a": (1, 2), "b": (1, 2)})


def test_of_many_arrays_only_the_first_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **{f"a{index}": np.zeros(2) for index in range(9)})  # type: ignore[arg-type]
    shapes = {f"past.{index}": ("N",) for index in range(30)}
    with pytest.raises(InputError, match=r"\(past\.0, .*, past\.5 and 24 more\) .* got a0, .*, a5 and 3 more$"):
        load_dataset(tmp_path / "x.npz", input_name="past.0", preprocessing=None, input_shapes=shapes, labels=None)


def test_a_pickle_named_npy_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.array([print, {}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="pickled objects are refused because loading them can run code"):
        load(tmp_path / "data.npy")


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize("content", [b"", b"nonsense" * 9, b"PK\x03\x04broken"], ids=["empty", "text", "broken-zip"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"data{suffix}").write_bytes(content)
    with pytest.raises(InputError, match=rf"data\{suffix} cannot be read: "):
        load(tmp_path / f"data{suffix}")


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "compressed"])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_never_raises_anything_but_input_errors(
    tmp_path_factory: pytest.TempPathFactory, compressed: bool, position: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.npz"
    (np.savez_compressed if compressed else np.savez)(path, image=images(5))
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        dataset = load(path)
    except InputError:
        return
    assert len(dataset) == 5


# image folders


def test_a_flat_folder_is_unlabelled_and_sorted(tmp_path: Path) -> None:
    for level in (30, 10, 20):
        save_image(tmp_path / f"{level}.png", level)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._10.png").write_bytes(b"what macOS leaves behind")
    (tmp_path / "empty").mkdir()
    dataset = load(tmp_path)
    assert seen(dataset) == [10, 20, 30]
    assert dataset.inputs["image"].dtype == np.float32
    assert dataset.labels is None
    assert dataset.source == f"{tmp_path}: 3 images without labels"


@pytest.mark.parametrize(
    ("folders", "labels", "expected", "rule"),
    [
        pytest.param(
            {"owl": [1, 2], "cat": [3]}, ["cat", "dog", "owl"], [(3, 0), (1, 2), (2, 2)],
            "matched to the model's labels by name", id="by-name",
        ),
        pytest.param(
            {"1": [1], "0": [2]}, ["1", "0"], [(2, 1), (1, 0)],
            "matched to the model's labels by name", id="a-name-that-is-a-number",
        ),
        pytest.param(
            {"10": [1], "2": [2]}, None, [(1, 10), (2, 2)], "folder names taken as class indices", id="by-index",
        ),
        pytest.param(
            {"001": [1], "000": [2]}, ["cat", "dog"], [(2, 0), (1, 1)],
            "folder names taken as class indices", id="by-index-with-labels",
        ),
        pytest.param(
            {"b": [1], "a": [2]}, None, [(2, 0), (1, 1)],
            "classes numbered in the sorted order of their folders", id="sorted",
        ),
        pytest.param(
            {"n02": [1], "n01": [2]}, ["cat", "dog"], [(2, 0), (1, 1)],
            "classes numbered in the sorted order of their folders", id="sorted-as-many-as-labels",
        ),
    ],
)  # fmt: skip
def test_class_folders_are_labelled(
    tmp_path: Path, folders: dict[str, list[int]], labels: list[str] | None, expected: list[tuple[int, int]], rule: str
) -> None:
    dataset = load(class_folders(tmp_path, folders), labels=labels)
    assert dataset.labels is not None
    assert list(zip(seen(dataset), dataset.labels.tolist(), strict=True)) == expected
    assert dataset.source == f"{tmp_path}: {len(expected)} images in 2 classes, {rule}"


def test_images_below_a_class_folder_belong_to_it(tmp_path: Path) -> None:
    save_image(tmp_path / "cat" / "indoor" / "1.png", 1)
    save_image(tmp_path / "dog" / "2.png", 2)
    assert seen(load(tmp_path)) == [1, 2]


def test_limit_keeps_every_class_and_reads_no_more(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    class_folders(tmp_path, {"a": list(range(6)), "b": list(range(6, 12))})
    (tmp_path / "a" / "001.png").write_bytes(b"never read")
    dataset = load(tmp_path, limit=4, progress=lambda done, total: calls.append((done, total)))
    assert seen(dataset) == [0, 3, 6, 9]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    assert dataset.source.endswith(", 4 of 12 spread evenly")
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_folders_that_match_no_label_are_named(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": [1], "dgo": [2]})
    with pytest.raises(InputError, match=r"named after the model's 2 labels or by index, got 'dgo'; rename them"):
        load(tmp_path, labels=["cat", "dog"])


def test_fewer_folders_than_labels_cannot_be_numbered(tmp_path: Path) -> None:
    class_folders(tmp_path, {"x": [1], "y": [2]})
    with pytest.raises(InputError, match=r"the model's 3 labels or by index, got 'x' and others"):
        load(tmp_path, labels=["a", "b", "c"])


def test_a_label_that_names_two_classes_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path, {"crane": [1]})
    with pytest.raises(InputError, match="several classes named 'crane'; name folders by index"):
        load(tmp_path, labels=["crane", "ant", "crane"])


def test_an_index_beyond_the_labels_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path, {"0": [1], "7": [2]})
    with pytest.raises(InputError, match="labels from 0 to 1, as the model has classes, got 0 to 7"):
        load(tmp_path, labels=["cat", "dog"])


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": [1]})
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match="the class folder 'dog' holds no image; fill or remove it"):
        load(tmp_path)


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "stray.png", 1)
    save_image(tmp_path / "cat" / "1.png", 1)
    with pytest.raises(InputError, match="holds images beside folders of images; put all of them into class folders"):
        load(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(InputError, match=r"holds no image; known endings: \.bmp, "):
        load(tmp_path)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b\.png is no image"):
        load(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"preprocessing": None}, id="no-recipe"),
        pytest.param({"input_shapes": {**SHAPES, "text": (1, 8)}}, id="two-inputs"),
        pytest.param({"input_name": "other"}, id="another-input"),
    ],
)
def test_images_for_a_model_that_takes_none_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    save_image(tmp_path / "a.png", 1)
    with pytest.raises(InputError, match=r"no image preprocessing or several inputs; store its inputs \(image"):
        load(tmp_path, **options)


def test_a_recipe_that_does_not_fit_the_model_is_refused_before_reading(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"never read")
    recipe = dataclasses.replace(TINY, size=(3, 3))
    expected = "the image preprocessing: expected 'image' of shape [N, 1, 2, 2] for N samples, got [1, 1, 3, 3]"
    with pytest.raises(InputError, match=re.escape(expected)):
        load(tmp_path, preprocessing=recipe)


# paths


@pytest.mark.parametrize("name", ["none", "none.npz", "none.npy"])
def test_a_missing_data_set_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"no such data set: .*{name}"):
        load(tmp_path / name)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"as \.npz, \.npy or a directory of images, got the file .*data\.csv"):
        load(tmp_path / "data.csv")


def test_a_limit_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="limit of at least 1 sample, got 0"):
        load(tmp_path, limit=0)


# one run's inputs as a whole

GRAPH = {"features": ("V", 3), "edge": ("P", 2)}


def save_graph(path: Path, **changes: Any) -> Path:
    arrays = {"features": np.zeros((5, 3), np.float32), "edge": np.zeros((8, 2), np.int64)} | changes
    np.savez(path, **arrays)
    return path


def load_graph(path: Path, **options: Any) -> Dataset:
    return load(path, input_name="features", preprocessing=None, input_shapes=GRAPH, **options)


def test_inputs_whose_first_axes_count_different_things_are_one_item(tmp_path: Path) -> None:
    dataset = load_graph(save_graph(tmp_path / "g.npz", labels=np.array([0, -1, 2, 1, -1])), labels=["a", "b", "c"])
    assert dataset.whole
    assert len(dataset) == 1
    assert [part is dataset for part in dataset.batches(4)] == [True]
    assert dataset.take(3) is dataset
    assert dataset.inputs["edge"].shape == (8, 2)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, -1, 2, 1, -1]


def test_the_model_decides_what_is_whole_not_the_data(tmp_path: Path) -> None:
    """As many edges as vertices, by chance."""
    assert load_graph(save_graph(tmp_path / "g.npz", edge=np.zeros((5, 2), np.int64))).whole
    both = {"a": ("N", 3), "b": ("N", 2)}
    np.savez(tmp_path / "n.npz", a=np.zeros((5, 3)), b=np.zeros((8, 2)))
    with pytest.raises(InputError, match="as many samples in every array, got a 5, b 8"):
        load(tmp_path / "n.npz", input_name="a", preprocessing=None, input_shapes=both)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": np.array([0, -2])}, "expected labels of at least -1, got -2 to 0"),
        ({"labels": np.zeros(0, np.int64)}, "labels of at least one row"),
        ({"labels": np.zeros(5)}, "one integer per row"),
        ({"features": np.zeros((5, 4))}, r"'features' of shape \[N, 3\]"),
        ({"features": np.full((5, 3), np.nan)}, "'features' holds NaN, first in row 0"),
    ],
    ids=["label", "no label", "float labels", "width", "nan"],
)
def test_graphs_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_graph(save_graph(tmp_path / "g.npz", **changes))


def test_nothing_as_a_whole_is_refused() -> None:
    with pytest.raises(InputError, match="expected inputs"):
        Dataset({}, None, "here", whole=True)
