"""The Swift package of a Core ML bundle: its structure everywhere, its arithmetic where there is a Swift compiler.

`EDGEKIT_SWIFTC` names the compiler where it is not `swiftc` on the path. The parts that need Apple's frameworks are
compiled against the declarations in `tests/export/swift`; nothing here runs Core ML.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.errors import ExportError
from edgekit.export.coreml_swift import PATTERN, pattern, write_swift
from edgekit.export.coreml_swift_text import KEYWORDS, render, text, type_name, value_name
from edgekit.runtime.bundle import BundleWriter
from edgekit.runtime.preprocess import ImagePreprocessing

_SPEC = importlib.util.spec_from_file_location("coreml_folders", Path(__file__).with_name("coreml_folders.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
folders = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(folders)

STUBS = Path(__file__).with_name("swift")
SWIFTC = os.environ.get("EDGEKIT_SWIFTC") or shutil.which("swiftc")
needs_swift = pytest.mark.skipif(
    SWIFTC is None, reason="no Swift compiler: neither EDGEKIT_SWIFTC nor swiftc on the path"
)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle's folder of each kind of model."""
    return {
        name: folders.write_folder(case(), tmp_path_factory.mktemp(name.replace("-", "_")))
        for name, case in folders.CASES.items()
    }


def source_of(folder: Path) -> tuple[str, str]:
    """The package's name and its one source file."""
    (path,) = (folder / "swift" / "Sources").rglob("*.swift")
    assert path.parent.name == path.stem
    return path.stem, path.read_text(encoding="utf-8")


def tokens(code: str) -> list[str]:
    """Brackets and words of Swift code, without comments and what stands in strings, interpolations aside."""
    found: list[str] = []
    depths: list[int] = []  # of open interpolations: how many parentheses they hold
    place = 0
    in_string = False
    while place < len(code):
        rest = code[place:]
        if in_string:
            if rest[0] == '"':
                in_string = False
            elif rest.startswith("\\("):
                depths.append(0)
                in_string = False
                place += 1
            elif rest[0] == "\\":
                place += 1
            assert rest[0] != "\n", f"a string does not end: {code[:place].splitlines()[-1]}"
        elif rest.startswith("//"):
            place += rest.find("\n") - 1
        elif rest[0] == '"':
            in_string = True
        elif depths and rest[0] == ")" and depths[-1] == 0:
            depths.pop()
            in_string = True
        elif rest[0] in "()[]{}":
            if depths:
                depths[-1] += {"(": 1, ")": -1}.get(rest[0], 0)
            found.append(rest[0])
        elif match := re.match(r"[#@]?\w+", rest):
            found.append(match[0])
            place += len(match[0]) - 1
        place += 1
    assert not in_string
    assert not depths
    return found


@pytest.mark.parametrize("kind", folders.CASES)
def test_written_code_is_whole(packages: dict[str, Path], kind: str) -> None:
    files = [*sorted((packages[kind] / "swift").rglob("*.swift")), packages[kind] / "Package.swift"]
    assert len(files) == 3
    for path in files:
        code = path.read_text(encoding="utf-8")
        assert "@@" not in code
        assert not re.search(r"[ \t]+$|\n{3}", code, re.MULTILINE)
        pairs = {")": "(", "]": "[", "}": "{"}
        stack: list[str] = []
        for token in (found := tokens(code)):
            if token in "([{":
                stack.append(token)
            elif token in pairs:
                assert stack.pop() == pairs[token]
        assert not stack
        assert found.count("#if") == found.count("#endif")


@pytest.mark.parametrize("kind", folders.CASES)
def test_every_public_symbol_is_documented(packages: dict[str, Path], kind: str) -> None:
    _, code = source_of(packages[kind])
    lines = code.splitlines()
    public = [index for index, line in enumerate(lines) if re.match(r"\s*public ", line)]
    assert public
    for index in public:
        assert lines[index - 1].strip().startswith("///"), lines[index]


@pytest.mark.parametrize("kind", folders.CASES)
def test_the_package_names_files_that_are_there(packages: dict[str, Path], kind: str) -> None:
    folder = packages[kind]
    name, _ = source_of(folder)
    package = (folder / "Package.swift").read_text(encoding="utf-8")
    assert package.startswith("// swift-tools-version: 5.9\n")  # SwiftPM reads the first line
    excluded = re.search(r"exclude: \[\n(.*?)\]", package, re.DOTALL)
    assert excluded is not None
    listed = re.findall(r'"([^"]+)"', excluded[1])
    for path in (*listed, f"swift/Sources/{name}", "model.mlpackage", f"swift/Tests/{name}Tests/Samples/samples.bin"):
        assert (folder / path).exists(), path
    for path in folder.iterdir():  # SwiftPM warns of what it can place nowhere
        assert path.name in (*listed, "Package.swift", "model.mlpackage", "swift"), path.name


@pytest.mark.parametrize(
    ("kind", "ios", "macos"), [("image", "16.0", "13.0"), ("arrays", "17.0", "14.0"), ("language", "18.0", "15.0")]
)
def test_platforms_follow_the_deployment_target(packages: dict[str, Path], kind: str, ios: str, macos: str) -> None:
    package = (packages[kind] / "Package.swift").read_text(encoding="utf-8")
    assert f'platforms: [.iOS("{ios}"), .macOS("{macos}")]' in package


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("shvit_s1", "ShvitS1"),
        ("3d-net.v2", "Model3dNetV2"),
        ("data", "DataModel"),
        ("self", "SelfModel"),
        ("ViT", "ViT"),
        ("---", "Model"),
    ],
)
def test_names_of_types(name: str, wanted: str) -> None:
    assert type_name(name) == wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("logits", "logits"), ("present.0.key", "present0Key"), ("class", "`class`"), ("0", "value0"), ("Out", "out")],
)
def test_names_of_values(name: str, wanted: str) -> None:
    assert value_name(name) == wanted


def test_names_do_not_meet() -> None:
    assert value_name("a.b", ["aB"]) == "aB2"
    assert value_name("class", ["`class`"]) == "class2"
    assert "class" in KEYWORDS


def test_strings_cannot_break_out() -> None:
    assert text('a"b\\(c)\n') == '"a\\"b\\\\(c)\\u{a}"'
    assert text("ü€😀") == '"ü€😀"'


def test_a_placeholder_nobody_fills_is_a_fault() -> None:
    assert render("  @@A@@\n@@B@@\nx@@A@@", {"A": "1\n2", "B": ""}) == "  1\n  2\nx1\n2\n"
    with pytest.raises(ExportError, match="asks for C"):
        render("@@C@@", {"A": ""})


def test_labels_are_literals(tmp_path: Path) -> None:
    folder = folders.write_folder(folders.image_case(labels=('a"', "b\\", "\\(c)")), tmp_path)
    assert 'labels: [String]? = ["a\\"", "b\\\\", "\\\\(c)"]' in source_of(folder)[1]


@pytest.mark.parametrize("kind", folders.CASES)
def test_samples_are_the_bundles(packages: dict[str, Path], kind: str) -> None:
    manifest, samples, decode = folders.CASES[kind]()
    (listing,) = packages[kind].rglob("samples.json")
    data = listing.with_name("samples.bin").read_bytes()
    contents = json.loads(listing.read_text(encoding="utf-8"))
    assert contents["tolerance"] == (1e-5 if manifest.precision == "fp32" else 2e-3)
    expected = [*list(samples)[:2], *list(decode or [])[:2]]
    assert len(contents["samples"]) == len(expected)
    for sample, (inputs, outputs) in zip(contents["samples"], expected, strict=True):
        read = {entry["name"]: array(entry, data) for side in sample if side != "function" for entry in sample[side]}
        states = {state.input: state.name for state in manifest.coreml.states}
        for name, values in inputs.items():
            if manifest.coreml.image_input == name:
                levels = read[name].transpose(2, 0, 1)[None]
                np.testing.assert_array_equal(levels[:, ::-1] if kind.startswith("bgr") else levels, values)
            elif name in states:  # slots behind the text are zeros, and left out
                stored = read[states[name]]
                np.testing.assert_array_equal(stored, values[:, :, : stored.shape[2]])
                assert not values[:, :, stored.shape[2] :].any()
                assert stored.shape[2] == 1 or stored[:, :, -1].any()
            else:
                np.testing.assert_array_equal(read[name], values)
        for name in [entry["name"] for entry in sample["outputs"]]:
            np.testing.assert_array_equal(read[name], outputs[name])
        if states:
            assert [entry["name"] for entry in sample["states"]] == list(states.values())
            assert [entry["name"] for entry in sample["outputs"]] == ["logits"]


def array(entry: dict[str, Any], data: bytes) -> np.ndarray[Any, Any]:
    dtype = {"float32": "<f4", "int32": "<i4", "image": "u1"}[entry["dtype"]]
    if entry["offset"] is None:
        return np.zeros(entry["shape"], dtype)
    assert entry["offset"] % 4 == 0
    return np.frombuffer(data, dtype, int(np.prod(entry["shape"])), entry["offset"]).reshape(entry["shape"])


def test_large_samples_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.export.coreml_swift_samples.LIMIT", 1200)
    folder = folders.write_folder(folders.language_case(), tmp_path)
    (listing,) = folder.rglob("samples.json")
    contents = json.loads(listing.read_text(encoding="utf-8"))
    assert [sample["function"] for sample in contents["samples"]] == ["prefill_16"]  # the states of decode are larger
    assert listing.with_name("samples.bin").stat().st_size <= 1200


def test_the_image_of_the_tests_is_the_recipes(packages: dict[str, Path]) -> None:
    (listing,) = packages["image"].rglob("samples.json")
    entry = json.loads(listing.read_text(encoding="utf-8"))["image"]
    manifest, _, _ = folders.CASES["image"]()
    bytes_ = manifest.inputs[0].preprocessing(pattern(*PATTERN)).transpose(0, 2, 3, 1).reshape(-1)
    levels = array(entry, listing.with_name("samples.bin").read_bytes())
    step = re.search(r"by: (\d+)\)\.map \{ actual", next(packages["image"].rglob("*Tests.swift")).read_text())
    assert step is not None
    np.testing.assert_array_equal(np.rint(levels), bytes_[:: int(step[1])])
    assert pattern(*PATTERN)[2, 3].tolist() == [65, 166, 11]  # as the Swift formula gives: 21 + 26 + 18


def test_equal_manifests_give_equal_files(tmp_path: Path) -> None:
    first, second = (folders.write_folder(folders.image_case(), tmp_path / name) for name in "ab")
    for path in first.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path.name


def test_without_a_package_there_is_no_swift(tmp_path: Path) -> None:
    manifest, _, _ = folders.image_case()
    with BundleWriter(tmp_path / "x.edge") as writer, pytest.raises(ExportError, match=r"no model\.mlpackage yet"):
        write_swift(writer, manifest)


# From here on with a compiler.


def swiftc(*arguments: str | Path, folder: Path) -> str:
    command = [str(SWIFTC), "-module-cache-path", str(folder / "cache"), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules with the names of Apple's frameworks."""
    folder = tmp_path_factory.mktemp("stubs")
    for module in ("CoreGraphics", "CoreVideo", "ImageIO", "VideoToolbox", "CoreML"):
        options = ["-emit-module", "-parse-as-library", "-module-name", module, "-I", folder]
        swiftc(*options, STUBS / f"{module}.swift", folder=folder)
    return folder


@needs_swift
@pytest.mark.slow
@pytest.mark.parametrize("kind", folders.CASES)
@pytest.mark.parametrize(
    ("apple", "version"), [(False, "5"), (True, "5"), (True, "6")], ids=["linux", "apple", "swift6"]
)
def test_code_passes_the_compiler(
    packages: dict[str, Path], stubs: Path, tmp_path: Path, kind: str, apple: bool, version: str
) -> None:
    name, _ = source_of(packages[kind])
    source = packages[kind] / "swift" / "Sources" / name / f"{name}.swift"
    modules = ["-I", stubs] if apple else []
    options = ["-warnings-as-errors", "-swift-version", version, "-parse-as-library", "-typecheck"]
    swiftc(*options, "-module-name", name, *modules, source, folder=tmp_path)


@needs_swift
@pytest.mark.slow
@pytest.mark.parametrize("kind", folders.CASES)
def test_unit_tests_pass_the_compiler(packages: dict[str, Path], stubs: Path, tmp_path: Path, kind: str) -> None:
    name, _ = source_of(packages[kind])
    source = packages[kind] / "swift" / "Sources" / name / f"{name}.swift"
    tests = packages[kind] / "swift" / "Tests" / f"{name}Tests" / f"{name}Tests.swift"
    # SwiftPM writes this for every target with resources.
    (tmp_path / "bundle.swift").write_text(
        "import Foundation\nextension Bundle { static var module: Bundle { .main } }\n"
    )
    shared = ["-swift-version", "5", "-parse-as-library", "-I", stubs, "-I", tmp_path]
    swiftc(*shared, "-emit-module", "-enable-testing", "-module-name", name, source, folder=tmp_path)
    checked = ["-warnings-as-errors", "-typecheck", "-module-name", f"{name}Tests"]
    swiftc(*shared, *checked, tests, "bundle.swift", folder=tmp_path)


@pytest.fixture(scope="module")
def driver(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program around the package of the image model."""
    folder = tmp_path_factory.mktemp("driver")
    name, code = source_of(packages["image"])
    (folder / "package.swift").write_text(f"{code}\ntypealias Package = {name}\n", encoding="utf-8")
    shutil.copyfile(STUBS / "driver.swift", folder / "main.swift")
    swiftc("-O", "package.swift", "main.swift", "-o", "driver", folder=folder)
    return folder / "driver"


RECIPES = {
    f"{resize}-{interpolation}-{color}-{height}x{width}": ImagePreprocessing(
        size=(height, width),
        resize=resize,
        crop_pct=0.875 if resize == "shortest" else 1.0,
        interpolation=interpolation,
        color=color,
        mean=(0.485,) if color == "gray" else (0.485, 0.456, 0.406),
        std=(0.229,) if color == "gray" else (0.229, 0.224, 0.225),
        layout="NHWC" if color == "bgr" else "NCHW",
        pad_value=114.0,
    )
    for resize, interpolation, color, (height, width) in itertools.product(
        ("squash", "shortest", "letterbox"),
        ("nearest", "bilinear", "bicubic", "lanczos"),
        ("rgb", "bgr", "gray"),
        ((7, 11), (32, 32), (64, 45)),
    )
}


@needs_swift
@pytest.mark.slow
def test_images_are_scaled_as_in_python(driver: Path) -> None:
    generator = np.random.default_rng(3)
    given, expected = [], []
    for recipe, (height, width) in itertools.product(RECIPES.values(), ((37, 53), (64, 45), (1, 3), (90, 20))):
        image = generator.integers(0, 256, (height, width, 3), np.uint8)
        fields = recipe.to_json()
        case = {key: fields[key] for key in ("resize", "interpolation", "color", "layout", "scale", "mean", "std")}
        case |= {"height": recipe.size[0], "width": recipe.size[1], "cropPart": recipe.crop_pct}
        case |= {"padLevel": recipe.pad_value, "imageWidth": width, "imageHeight": height}
        given.append({**case, "levels": image.reshape(-1).tolist()})
        expected.append(recipe(image).reshape(-1))
    done = subprocess.run([driver], input=json.dumps(given), capture_output=True, text=True, timeout=300, check=True)
    answers = json.loads(done.stdout)
    assert len(answers) == len(expected) == 432
    for answer, wanted, case in zip(answers, expected, given, strict=True):
        # In the unit of the input, where a level is 0.017: both sum floats in their own order.
        np.testing.assert_allclose(answer["normalized"], wanted, atol=2e-5, rtol=0, err_msg=str(case)[:300])
        np.testing.assert_array_equal(np.rint(np.float32(answer["levels"])), answer["bytes"])
