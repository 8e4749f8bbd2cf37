"""Bundles come from anywhere: whatever is wrong with one is a BundleError, and nothing outside of it is touched."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import BundleError
from edgekit.runtime.bundle import MANIFEST, REPORT, SAMPLES, Bundle, BundleWriter, Samples, bundle_stem
from edgekit.runtime.manifest import DimRange, FileEntry, Manifest, ModelInfo, TensorSpec, WeightsInfo

MANIFEST_OF_TINY = Manifest(
    name="t",
    model=ModelInfo("tests", WeightsInfo("random", "0" * 64, seed=0), parameters=1),
    target="onnx",
    precision="fp32",
    inputs=(TensorSpec("x", "float32", ("N", 4)),),
    outputs=(TensorSpec("y", "float32", ("N", 3)),),
    dims={"N": DimRange(1, 8)},
)
SAMPLE = Samples({"x": np.ones((2, 1, 4), np.float32)}, {"y": np.zeros((2, 1, 3), np.float32)})


def write(path: Path, model: bytes = b"a model", *, samples: bool = True) -> Bundle:
    with BundleWriter(path) as writer:
        writer.add("model.onnx", "model").write_bytes(model)
        if samples:
            SAMPLE.save(writer.add(SAMPLES, "samples"))
        return writer.finish(MANIFEST_OF_TINY, {"export": {"nodes": 1}})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path / "t-onnx.edge")


def edit_manifest(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle.path / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def put_file(bundle: Bundle, name: str, content: bytes, role: str = "other") -> None:
    """Write a file into a bundle and list it with its true size and hash."""
    (bundle.path / name).write_bytes(content)
    entry = {"role": role, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(bundle, lambda data: data["files"].update({name: entry}))


def zip_of(bundle: Bundle, path: Path, *, method: int = zipfile.ZIP_DEFLATED, **contents: bytes) -> Path:
    """A zip of a bundle's files; `contents` replaces the ones whose name begins so."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in (MANIFEST, *bundle.manifest.files):
            archive.writestr(name, contents.get(name.split(".")[0], (bundle.path / name).read_bytes()))
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def refused(path: Path, words: str = "") -> str:
    with pytest.raises(BundleError, match=words or None) as caught:
        Bundle.open(path)
    return str(caught.value)


# What a bundle says of itself


@pytest.mark.parametrize("packed", [False, True])
def test_a_bundle_reads_back(bundle: Bundle, packed: bool) -> None:
    opened = Bundle.open(bundle.pack().path if packed else str(bundle.path))
    assert opened.manifest == bundle.manifest
    assert opened.packed == packed
    assert (opened.name, opened.size_of_model) == ("t-onnx", 7)
    assert opened.size == sum((bundle.path / name).stat().st_size for name in ("model.onnx", SAMPLES))
    assert opened.read("model.onnx") == b"a model"
    assert (opened.file("model.onnx") is None) == packed
    assert opened.report() == {"export": {"nodes": 1}}
    samples = opened.samples()
    assert len(samples) == 2
    assert [(list(inputs), list(outputs)) for inputs, outputs in samples] == [(["x"], ["y"])] * 2
    assert Bundle.open(opened) is opened
    for action in (opened.read, opened.file):
        with pytest.raises(BundleError, match=r"lists no file 'other'; it has model\.onnx"):
            action("other")


def test_names() -> None:
    assert [bundle_stem("m", "onnx", precision) for precision in ("fp32", "int8")] == ["m-onnx", "m-onnx-int8"]


def test_a_bundle_without_samples_or_report(tmp_path: Path) -> None:
    bundle = write(tmp_path / "t.edge", samples=False)
    (bundle.path / REPORT).unlink()
    assert len(bundle.samples()) == 0
    assert bundle.report() == {}
    assert Bundle.open(bundle.pack().path).report() == {}


# Paths that are no bundle


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "plain.zip").write_bytes(b"some text that is no zip")
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "missing", "no bundle at .*edgekit export")
    refused(tmp_path / "empty", "neither a bundle folder nor a readable packed bundle")
    refused(tmp_path / "plain.zip", "neither a bundle folder nor a readable packed bundle")
    refused(tmp_path / "folder", r"has no manifest\.json")
    refused(tmp_path / "other.zip", r"has no manifest\.json")
    refused(tmp_path / "pipe", "neither a folder nor a file")
    refused(tmp_path / "loop")
    refused(tmp_path / ("n" * 300), "name too long")
    refused(tmp_path / "nul\0", "no bundle at")
    refused(tmp_path / "empty" / "below", "no bundle at")


# Folders


@pytest.mark.parametrize("name", ["model.onnx", SAMPLES, MANIFEST])
def test_every_prefix_of_a_file(bundle: Bundle, name: str) -> None:
    content = (bundle.path / name).read_bytes()
    end = len(content.rstrip()) if name == MANIFEST else len(content)
    for length in range(0, end, 7):
        (bundle.path / name).write_bytes(content[:length])
        refused(bundle.path)


def test_an_edited_file(bundle: Bundle) -> None:
    (bundle.path / "model.onnx").write_bytes(b"A model")
    refused(bundle.path, r"t-onnx\.edge/model\.onnx was changed after export: SHA-256 is")
    assert Bundle.open(bundle.path, check_hashes=False)
    (bundle.path / "model.onnx").write_bytes(b"a model!")
    refused(bundle.path, "larger than exported: the manifest says 7 bytes")
    (bundle.path / "model.onnx").write_bytes(b"a mode")
    with pytest.raises(BundleError, match="truncated"):
        Bundle.open(bundle.path, check_hashes=False)
    (bundle.path / "model.onnx").unlink()
    refused(bundle.path, r"has no model\.onnx; copy it whole, or export it again")


@pytest.mark.parametrize("name", ["model.onnx", MANIFEST])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_link_out_of_the_folder(bundle: Bundle, name: str, absolute: bool) -> None:
    outside = bundle.path.parent / "outside"
    shutil.move(bundle.path / name, outside)
    (bundle.path / name).symlink_to(outside if absolute else "../outside")
    refused(bundle.path, "is a link that leaves the bundle's folder")


def test_a_linked_folder_inside(bundle: Bundle) -> None:
    outside = bundle.path.parent / "secrets"
    outside.mkdir()
    (outside / "f").write_bytes(b"x")
    (bundle.path / "sub").symlink_to(outside)
    put_file(bundle, "sub/f", b"x")
    refused(bundle.path, "leaves the bundle's folder")


def test_links_that_stay_inside_are_followed(bundle: Bundle) -> None:
    (bundle.path / "model.onnx").rename(bundle.path / "real")
    (bundle.path / "model.onnx").symlink_to("real")
    (bundle.path.parent / "link.edge").symlink_to(bundle.path)
    assert Bundle.open(bundle.path.parent / "link.edge").read("model.onnx") == b"a model"


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
@pytest.mark.parametrize("name", ["model.onnx", MANIFEST])
def test_a_name_that_is_no_file(bundle: Bundle, name: str, kind: str) -> None:
    path = bundle.path / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)  # opening it would wait for ever
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(name)
    refused(bundle.path)


def test_a_huge_manifest_is_not_read(bundle: Bundle) -> None:
    with (bundle.path / MANIFEST).open("r+b") as stream:
        stream.truncate(2**40)  # sparse: takes no space
    refused(bundle.path, "is larger than")


def test_a_manifest_that_is_no_text(bundle: Bundle) -> None:
    content = (bundle.path / MANIFEST).read_bytes()
    (bundle.path / MANIFEST).write_bytes(content.replace(b'"t"', b'"\xff"'))
    refused(bundle.path, r"t-onnx\.edge/manifest\.json is not UTF-8")
    (bundle.path / MANIFEST).write_bytes(b"\xef\xbb\xbf" + content)
    refused(bundle.path, r"t-onnx\.edge/manifest\.json is not valid JSON .*BOM")
    (bundle.path / MANIFEST).write_bytes(content.decode().encode("utf-16"))
    refused(bundle.path, "is not UTF-8")


def test_a_preprocessing_error_names_the_bundle(bundle: Bundle) -> None:
    edit_manifest(bundle, lambda data: data["inputs"][0].update(preprocessing={"size": [1, 1]}))
    assert "t-onnx.edge/manifest.json: inputs[0].preprocessing: missing field" in refused(bundle.path)


def test_opening_runs_nothing(bundle: Bundle) -> None:
    """Python's audit events tell of imports, code, pickles, processes and native libraries.

    `compile` is left out: numpy parses the headers of arrays as literals by it; only `exec` would run what it gives.
    """
    for name, content in (("libevil.so", b"\x7fELF"), ("evil.py", b"1/0"), ("evil.pkl", pickle.dumps(print))):
        put_file(bundle, name, content, "library")
    code = """
        import sys
        from edgekit.runtime.bundle import Bundle
        Bundle.open(sys.argv[2]).samples()  # whatever opening imports is there now
        events = []
        sys.addaudithook(lambda event, _: events.append(event))
        for path in sys.argv[1:]:
            Bundle.open(path).samples()
        suspects = ("import", "exec", "ctypes", "pickle", "os.system", "os.posix_spawn", "subprocess")
        print([event for event in events if event.startswith(suspects)], "open" in events)
    """
    packed = Bundle.open(bundle.path).pack().path
    result = run_python(code, bundle.path, packed)
    assert result.stdout.split() == ["[]", "True"], result.stderr


# Zips


def test_every_prefix_of_a_zip(bundle: Bundle) -> None:
    path = bundle.pack().path
    content = path.read_bytes()
    for length in range(0, len(content), 11):
        path.write_bytes(content[:length])
        refused(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_zip(bundle: Bundle, data: st.DataObject) -> None:
    path = bundle.path.parent / "t-onnx.edge.zip"
    if not (bundle.path.parent / "whole").exists():
        (bundle.path.parent / "whole").write_bytes(bundle.pack().path.read_bytes())
    content = bytearray((bundle.path.parent / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(BundleError):  # damage to a date does no harm
        assert Bundle.open(path).read("model.onnx") == b"a model"


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a\\..\\b", "C:evil", "a/../../evil"])
def test_a_zip_entry_that_leaves_it(bundle: Bundle, name: str) -> None:
    path = bundle.pack().path
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    refused(path, "leaves it")


@pytest.mark.parametrize("name", ["model.onnx", MANIFEST])
def test_a_zip_with_an_entry_twice(bundle: Bundle, name: str) -> None:
    path = bundle.pack().path
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(name, (bundle.path / name).read_bytes())
    refused(path, "several entries of one name")


def test_an_encrypted_zip(bundle: Bundle) -> None:
    path = bundle.pack().path
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag of the first entry in the directory
    path.write_bytes(content)
    refused(path, "encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_of_another_method(bundle: Bundle, tmp_path: Path, method: int) -> None:
    refused(zip_of(bundle, tmp_path / "b.zip", method=method), "method other than deflate")


@pytest.mark.parametrize("name", ["model", "manifest"])
def test_a_zip_bomb_is_not_unfolded(bundle: Bundle, tmp_path: Path, name: str) -> None:
    """400 MiB in 400 KiB: with 300 MiB of address space left, unfolding them would fail."""
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (MANIFEST, "model.onnx", SAMPLES):
            with archive.open(file, "w") as stream:
                stream.write((bundle.path / file).read_bytes())
                if file.startswith(name):
                    for _ in range(400):
                        stream.write(bytes(2**20))
    code = """
        import resource, sys
        from edgekit.runtime.bundle import Bundle, BundleError
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
        try:
            Bundle.open(sys.argv[1])
        except BundleError as error:
            print("refused:", error)
    """
    result = run_python(code, bomb)
    assert "refused:" in result.stdout, result.stderr
    assert "larger" in result.stdout


def test_a_size_that_lies(bundle: Bundle, tmp_path: Path) -> None:
    """An entry that unfolds to more than its zip header says is cut there and refused by its checksum."""
    path = zip_of(bundle, tmp_path / "b.zip", model=b"a model" + bytes(10**6))
    content = path.read_bytes().replace((10**6 + 7).to_bytes(4, "little"), (7).to_bytes(4, "little"))
    path.write_bytes(content)
    refused(path, r"model\.onnx")


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name / "t-onnx.edge").pack() for name in "ab")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.pack() is first
    assert write(tmp_path / "a" / "t-onnx.edge").pack().path.read_bytes() == second.path.read_bytes()


def test_packing_refuses_what_it_cannot_do(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle.path.parent
    (folder / "notes.zip").write_text("mine", encoding="utf-8")
    with pytest.raises(BundleError, match="exists and is no bundle"):
        bundle.pack(folder / "notes.zip")
    assert (folder / "notes.zip").read_text(encoding="utf-8") == "mine"
    with pytest.raises(BundleError, match="cannot write"):
        bundle.pack(folder / "missing" / "t.zip")
    (bundle.path / "model.onnx").write_bytes(b"A model")
    with pytest.raises(BundleError, match=r"t-onnx\.edge/model\.onnx was changed"):
        bundle.pack()
    assert leftovers(folder) == []


# Samples


def samples_file(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{name.replace("__", "/"): array for name, array in arrays.items()})
    return stream.getvalue()


X, Y = SAMPLE.inputs["x"], SAMPLE.outputs["y"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (samples_file(inputs__x=np.array([{}, {}], object), outputs__y=Y), "cannot be read .*pickle"),
        (pickle.dumps(X), "cannot be read"),
        (b"", "cannot be read"),
        (b"no arrays", "cannot be read"),
        (samples_file(inputs__x=X.astype(np.float64), outputs__y=Y), r"expected samples of x: float32\[N, 4\], got fl"),
        (samples_file(inputs__x=X.astype(">f4"), outputs__y=Y), "got >f4"),
        (samples_file(inputs__x=X[..., :3], outputs__y=Y), r"got float32 \[1, 3\]"),
        (samples_file(inputs__x=X[:, 0], outputs__y=Y), r"got float32 \[4\]"),
        (samples_file(inputs__x=np.ones((2, 9, 4), np.float32), outputs__y=Y), r"got float32 \[9, 4\]"),
        (samples_file(inputs__z=X, outputs__y=Y), r"samples of the inputs \['z'\], the manifest lists \['x'\]"),
        (samples_file(outputs__y=Y), r"samples of the inputs \[\]"),
        (samples_file(inputs__x=X, outputs__y=Y[:1]), r"different numbers of samples: \[1, 2\]"),
        (samples_file(inputs__x=np.float32(1), outputs__y=Y), "must hold numbers of several samples"),
        (samples_file(inputs__x=X, outputs__y=Y + 1j), "must hold numbers"),
        (samples_file(inputs__x=X, outputs__y=np.array(["a", "b"])), "must hold numbers"),
        (samples_file(inputs__x=X, extra=Y), "unexpected array 'extra'"),
    ],
)
def test_samples_that_do_not_fit(bundle: Bundle, content: bytes, words: str) -> None:
    put_file(bundle, SAMPLES, content, "samples")
    with pytest.raises(BundleError, match=words) as caught:
        Bundle.open(bundle.path).samples()
    assert "t-onnx.edge/samples.npz" in str(caught.value)


def test_a_lone_array_is_no_samples_file(bundle: Bundle) -> None:
    stream = io.BytesIO()
    np.save(stream, X)
    put_file(bundle, SAMPLES, stream.getvalue(), "samples")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(bundle.path).samples()


def test_every_prefix_of_samples_with_a_fitting_hash(bundle: Bundle) -> None:
    content = (bundle.path / SAMPLES).read_bytes()
    for length in range(0, len(content), 5):
        put_file(bundle, SAMPLES, content[:length], "samples")
        with pytest.raises(BundleError):
            Bundle.open(bundle.path).samples()


def test_samples_that_claim_to_be_huge(bundle: Bundle) -> None:
    content = samples_file(inputs__x=X, outputs__y=Y)
    put_file(
        bundle, SAMPLES, content.replace(b"(2, 1, 4), ", b"(2, 1, 4" + b"0" * 11 + b"), ")[: len(content)], "samples"
    )
    with pytest.raises(BundleError):
        Bundle.open(bundle.path).samples()
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 4), }".ljust(117) + b"\n"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("inputs/x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    put_file(bundle, SAMPLES, stream.getvalue(), "samples")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(bundle.path).samples()


# The report


def test_the_report_grows(bundle: Bundle) -> None:
    assert bundle.add_to_report("profile", {"p50": 1.5})
    assert Bundle.open(bundle.path).report() == {"export": {"nodes": 1}, "profile": {"p50": 1.5}}
    assert leftovers(bundle.path) == []
    with pytest.raises(ValueError, match="JSON compliant"):
        bundle.add_to_report("profile", float("nan"))
    packed = bundle.pack()
    assert not packed.add_to_report("profile", {})
    assert packed.report() == bundle.report()


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 10**5, b"9" * 5000], ids=lambda item: repr(item[:5]))
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_report(bundle: Bundle, content: bytes, packed: bool) -> None:
    (bundle.path / REPORT).write_bytes(content)
    with pytest.raises(BundleError, match=r"t-onnx\.edge.*/report\.json .*delete it"):
        (bundle.pack() if packed else Bundle.open(bundle.path)).report()


def test_a_report_that_is_a_link_elsewhere(bundle: Bundle) -> None:
    outside = bundle.path.parent / "secret.json"
    outside.write_text("{}", encoding="utf-8")
    (bundle.path / REPORT).unlink()
    (bundle.path / REPORT).symlink_to(outside)
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        bundle.report()
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        bundle.add_to_report("profile", {})
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        bundle.pack()
    assert outside.read_text(encoding="utf-8") == "{}"
    assert leftovers(bundle.path.parent) == []


# Writing


@pytest.fixture
def plain_user() -> Iterator[Path]:
    """A folder of a user without privileges, who the test runs as: root may write anywhere."""
    folder, root = Path(tempfile.mkdtemp()), os.geteuid() == 0
    if root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)


def test_a_read_only_bundle_can_be_used(plain_user: Path) -> None:
    bundle = write(plain_user / "t.edge")
    bundle.path.chmod(0o555)
    opened = Bundle.open(bundle.path)
    assert len(opened.samples()) == 2
    assert not opened.add_to_report("profile", {})
    assert opened.report() == {"export": {"nodes": 1}}


def test_what_may_not_be_read_or_written(plain_user: Path) -> None:
    bundle = write(plain_user / "t.edge")
    (bundle.path / "model.onnx").chmod(0)
    refused(bundle.path, r"t\.edge/model\.onnx cannot be read")
    plain_user.chmod(0o555)
    with pytest.raises(BundleError, match=r"cannot write to .*: Permission denied; choose another folder"):
        write(plain_user / "u.edge")
    with pytest.raises(BundleError, match="cannot write"):
        write(plain_user / "new" / "u.edge")
    plain_user.chmod(0o000)
    refused(bundle.path)


def test_a_destination_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BundleError, match="cannot write to"):
        write(tmp_path / "file" / "t.edge")
    with pytest.raises(BundleError):
        write(tmp_path / ("n" * 300))


class StopError(Exception):
    """Something that goes wrong in the block."""


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("moment", ["start", "added", "preview"])
def test_an_error_in_the_block_leaves_nothing(
    tmp_path: Path, error: type[BaseException], exists: bool, moment: str
) -> None:
    path = tmp_path / "out" / "t.edge"
    if exists:
        write(path, b"the old one")

    def attempt() -> None:
        with BundleWriter(path) as writer:
            if moment != "start":
                writer.add("model.onnx", "model").write_bytes(b"the new one")
            if moment == "preview":
                writer.preview(MANIFEST_OF_TINY)
            raise error

    with pytest.raises(error):
        attempt()
    assert leftovers(tmp_path / "out") == []
    assert path.exists() == exists
    if exists:
        assert Bundle.open(path).read("model.onnx") == b"the old one"


@pytest.mark.parametrize("moment", range(1, 4))
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")], ids=["^C", "EIO"])
def test_an_interrupt_while_moving_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, error: BaseException
) -> None:
    """Renames: 1 fails since the old bundle is there, 2 puts it aside, 3 moves the new one in."""
    path = tmp_path / "t.edge"
    write(path, b"the old one")
    real, calls = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == moment:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((KeyboardInterrupt, BundleError)):
        write(path, b"the new one")
    monkeypatch.undo()
    assert Bundle.open(path).read("model.onnx") == b"the old one"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["model.onnx", REPORT, MANIFEST])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "t.edge"
    write(path, b"the old one")
    real = io.open

    def full(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith(name) and args and "w" in args[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", full)
    with pytest.raises((BundleError, OSError), match="No space left"):
        write(path, b"the new one")
    monkeypatch.undo()
    assert Bundle.open(path).read("model.onnx") == b"the old one"
    assert leftovers(tmp_path) == []


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """The system itself refuses to write on, in the model and while packing."""
    code = """
        import os, resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_bundle import BundleError, write
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        folder = Path(sys.argv[1])
        small = write(folder / "small.edge", os.urandom(9000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        for action in (lambda: write(folder / "big.edge", bytes(10**5)), small.pack):
            try:
                action()
            except (BundleError, OSError) as error:
                print(error)
    """
    result = run_python(code, tmp_path, Path(__file__).parent)
    assert result.stdout.count("File too large") == 2, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.edge"]


@pytest.mark.parametrize("moment", ["added", "preview"])
def test_a_killed_export(tmp_path: Path, moment: str) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_bundle import MANIFEST_OF_TINY, BundleWriter
        with BundleWriter(Path(sys.argv[1]) / "t.edge") as writer:
            writer.add("model.onnx", "model").write_bytes(b"half")
            if sys.argv[3] == "preview":
                assert writer.preview(MANIFEST_OF_TINY).read("model.onnx") == b"half"
            os.kill(os.getpid(), signal.SIGKILL)
    """
    result = run_python(code, tmp_path, Path(__file__).parent, moment)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    refused(left, "its export did not finish")
    assert write(tmp_path / "t.edge").read("model.onnx") == b"a model"


def test_two_writers_at_once(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_bundle import write
        for _ in range(60):
            write(Path(sys.argv[1]) / "t.edge", sys.argv[3].encode() * 1000, samples=False)
    """
    path = tmp_path / "t.edge"
    writers = [start_python(code, tmp_path, Path(__file__).parent, letter) for letter in "ab"]
    for writer in writers:
        _, stderr = writer.communicate(timeout=120)
        assert writer.returncode == 0, stderr
    assert Bundle.open(path).read("model.onnx") in (b"a" * 1000, b"b" * 1000)
    assert [item.name for item in tmp_path.iterdir()] == ["t.edge"]


def test_a_replaced_bundle_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.edge"
    write(path, b"the old one")
    (path / "notes.txt").write_text("of the old one", encoding="utf-8")
    assert write(path, b"the new one", samples=False).path == path
    assert sorted(file.name for file in path.iterdir()) == [MANIFEST, "model.onnx", REPORT]
    assert Bundle.open(path).read("model.onnx") == b"the new one"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "foreign manifest", "broken manifest", "link", "packed"])
def test_what_is_no_bundle_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "t.edge"
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "link":
        path.symlink_to(write(tmp_path / "real.edge").path)
    elif kind == "packed":
        shutil.copy(write(tmp_path / "real.edge").pack().path, path)
    else:
        path.mkdir()
        if kind != "folder":
            (path / MANIFEST).write_text('{"name": "My App", "icons": []}' if "f" in kind else "{", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=r"t\.edge (exists and is no bundle|is a link)"):
        write(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_or_newer_bundle_is_replaced(tmp_path: Path) -> None:
    for change in ({"schema": 99}, {"name": 3}):
        bundle = write(tmp_path / "t.edge")
        edit_manifest(bundle, lambda data, change=change: data.update(change))  # type: ignore[misc]
        refused(bundle.path)
        assert Bundle.open(write(tmp_path / "t.edge").path)


@pytest.mark.parametrize("name", ["../x", "/x", MANIFEST, REPORT, "model.onnx", ""])
def test_names_that_cannot_be_added(tmp_path: Path, name: str) -> None:
    with BundleWriter(tmp_path / "t.edge") as writer:
        writer.add("model.onnx", "model")
        with pytest.raises(BundleError, match="cannot add"):
            writer.add(name, "other")


def test_files_in_folders(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "t.edge") as writer:
        writer.add("model.onnx", "model").write_bytes(b"m")
        writer.add("kernels/linux/lib.so", "library").write_bytes(b"l")
        bundle = writer.finish(MANIFEST_OF_TINY, {})
    assert Bundle.open(bundle.path).read("kernels/linux/lib.so") == b"l"
    assert Bundle.open(bundle.pack().path).read("kernels/linux/lib.so") == b"l"


def test_an_announced_file_that_was_not_written(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "t.edge") as writer:
        writer.add("model.onnx", "model")
        with pytest.raises(BundleError, match=r"has no model\.onnx"):
            writer.finish(MANIFEST_OF_TINY, {})
    assert list(tmp_path.iterdir()) == []


def test_the_writer_outside_its_block(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="with"):
        BundleWriter(tmp_path / "t.edge").add("model.onnx", "model")


def test_the_given_files_are_ignored(tmp_path: Path) -> None:
    """The writer lists what was announced, whatever the manifest that it gets says."""
    strange = replace(MANIFEST_OF_TINY, files={"other": FileEntry("model", 1, "0" * 64)})
    with BundleWriter(tmp_path / "t.edge") as writer:
        writer.add("model.onnx", "model").write_bytes(b"m")
        assert list(writer.finish(strange, {}).manifest.files) == ["model.onnx"]


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    process = start_python(code, *arguments)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


# Bundles of two graphs


def test_a_part_is_a_bundle_of_its_own(make_language_model: Callable[..., Bundle]) -> None:
    whole = make_language_model()
    part = whole.part("decode")
    assert (part.name, part.path) == ("toy-decode-onnx", whole.path)
    assert part.manifest.model_file == "decode.onnx"
    assert part.read("decode.onnx") == whole.read("decode.onnx")
    assert part.manifest.inputs == whole.manifest.decode.inputs  # type: ignore[union-attr]
    assert part.manifest.decode is None
    assert list(whole.parts()) == ["prefill", "decode"]
    part.check()
    with pytest.raises(BundleError, match=r"lists no file 'model\.onnx'"):
        part.read("model.onnx")
    with pytest.raises(BundleError, match="has no part 'encode'"):
        whole.part("encode")
    with pytest.raises(BundleError, match="pack the whole bundle"):
        part.pack()
    assert Manifest.from_json(part.manifest.to_json()) == part.manifest


def test_a_bundle_of_one_graph_has_no_parts(bundle: Bundle) -> None:
    assert bundle.parts() == {"": bundle}
    with pytest.raises(BundleError, match="has no part 'decode'; it holds one graph"):
        bundle.part("decode")


def test_a_part_writes_into_the_report_of_the_whole(make_language_model: Callable[..., Bundle]) -> None:
    whole = make_language_model()
    part = whole.part("decode")
    assert part.report() == {}
    assert whole.add_to_report("profile", {"p50": 1})
    assert part.add_to_report("profile", {"p50": 2})
    assert part.add_to_report("other", 3)
    assert part.report() == {"profile": {"p50": 2}, "other": 3}
    assert whole.report() == {"profile": {"p50": 1}, "decode": {"profile": {"p50": 2}, "other": 3}}
    assert not whole.pack().part("decode").add_to_report("profile", {})


def test_samples_of_different_sizes(tmp_path: Path) -> None:
    pairs = [({"x": np.full((n, 4), n, np.float32)}, {"y": np.float32(n)}) for n in (1, 3)]
    samples = Samples.of(pairs)
    samples.save(tmp_path / "s.npz")
    manifest = replace(
        write(tmp_path / "t.edge").manifest,
        inputs=(TensorSpec("x", "float32", ("N", 4)),),
        dims={"N": DimRange(1, 3)},
    )
    content = (tmp_path / "s.npz").read_bytes()
    found = Samples.load(content, manifest, where="s.npz")
    assert len(found) == 2
    for (inputs, outputs), (wanted, answers) in zip(found, pairs, strict=True):
        np.testing.assert_array_equal(inputs["x"], wanted["x"])
        assert outputs["y"] == answers["y"]
    narrow = replace(manifest, dims={"N": DimRange(1, 2)})
    with pytest.raises(BundleError, match=r"expected samples of x: float32\[N, 4\], got float32 \[3, 4\]"):
        Samples.load(content, narrow, where="s.npz")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["inputs.0/x", "inputs.2/x"], "lacks a sample"),
        (["inputs.1/x"], "lacks a sample"),
        (["inputs.0/x", "inputs/x"], "lacks a sample"),
        (["inputs.00/x"], "unexpected array"),
        (["inputs./x"], "unexpected array"),
        (["inputs.0/x", "inputs.1/x", "outputs.0/y"], r"different numbers of samples: \[1, 2\]"),
    ],
)
def test_lists_of_samples_that_are_not_whole(tmp_path: Path, names: list[str], words: str) -> None:
    manifest = write(tmp_path / "t.edge").manifest
    content = samples_file(**{name: np.ones((1, 4), np.float32) for name in names})
    with pytest.raises(BundleError, match=words):
        Samples.load(content, manifest, where="s.npz")
