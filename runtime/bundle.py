"""The bundle: a folder `NAME-TARGET.edge/` or one zip of it, with a manifest, the model, samples and a report.

Opening a bundle never runs code and never leaves its folder: names are checked, sizes and SHA-256 hashes are compared,
arrays are read without pickle. `report.json` is the one file that changes after export (devices write their
measurements into it), so it alone carries no hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BundleError
from edgekit.runtime.manifest import FileEntry, Manifest

MANIFEST = "manifest.json"
SAMPLES = "samples.npz"
REPORT = "report.json"
_MANIFEST_LIMIT = 64 * 2**20


@dataclass(frozen=True)
class Samples:
    """Stored inputs and what PyTorch answered: both map a tensor's name to an array with a leading sample axis.

    Sample i of input `image` is `inputs["image"][i]`, with the batch axis that the model takes (usually 1).
    """

    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return next((len(array) for array in self.inputs.values()), 0)

    def __iter__(self) -> Iterator[tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]]:
        for index in range(len(self)):
            yield (
                {name: array[index] for name, array in self.inputs.items()},
                {name: array[index] for name, array in self.outputs.items()},
            )

    def save(self, path: Path) -> None:
        """Write as .npz with the names `inputs/NAME` and `outputs/NAME`."""
        arrays = {f"inputs/{name}": array for name, array in self.inputs.items()}
        arrays |= {f"outputs/{name}": array for name, array in self.outputs.items()}
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # numpy types the keywords as its own options


class Bundle:
    """An opened bundle. Use `Bundle.open(path)`; `bundle.manifest` says what is inside."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def packed(self) -> bool:
        """Whether the bundle is one zip file rather than a folder."""
        return self.path.is_file()

    @property
    def name(self) -> str:
        """NAME-TARGET, with the precision where it is not fp32."""
        return bundle_stem(self.manifest.name, self.manifest.target, self.manifest.precision)

    @property
    def size(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(entry.size for entry in self.manifest.files.values())

    @property
    def size_of_model(self) -> int:
        """Bytes of the model file alone."""
        return self.manifest.files[self.manifest.model_file].size

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r})"

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Bundle, *, check_hashes: bool = True) -> Bundle:
        """Open a folder or a packed bundle and compare every file with the manifest.

        Raises `BundleError` where the path is no bundle, a file is missing, truncated, edited or misnamed, or the
        manifest is of a newer schema. `check_hashes=False` still compares names and sizes.
        """
        if isinstance(path, Bundle):
            return path
        path = Path(path)
        if not path.exists():
            raise BundleError(
                f"no bundle at {path}; make one with: edgekit export MODEL --target onnx -o {path.parent}"
            )
        bundle = cls(path, Manifest.from_json(_read_manifest(path), where=f"{path.name}/{MANIFEST}"))
        bundle.check(hashes=check_hashes)
        return bundle

    def check(self, *, hashes: bool = True) -> None:
        """Compare sizes (and SHA-256 hashes) of all files with the manifest; raise `BundleError` at the first fault."""
        for name, entry in self.manifest.files.items():
            with self._open(name) as stream:
                size, digest = _measure(stream, limit=entry.size, digest=hashes)
            if size != entry.size:
                kind = "truncated" if size < entry.size else "larger than exported"
                raise BundleError(
                    f"{self.path.name}/{name} is {kind}: the manifest says {entry.size} bytes; copy or export it again"
                )
            if hashes and digest != entry.sha256:
                raise BundleError(
                    f"{self.path.name}/{name} was changed after export: SHA-256 is {digest[:12]}.., the manifest says "
                    f"{entry.sha256[:12]}..; export it again, or restore the file"
                )

    def read(self, name: str) -> bytes:
        """The bytes of a listed file."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path.name} lists no file {name!r}; it has {', '.join(self.manifest.files)}")
        with self._open(name) as stream:
            return stream.read()

    def file(self, name: str) -> Path | None:
        """The path of a listed file, or None in a packed bundle."""
        if self.packed:
            return None
        if name not in self.manifest.files:
            raise BundleError(f"{self.path.name} lists no file {name!r}; it has {', '.join(self.manifest.files)}")
        return self.path / name

    def samples(self) -> Samples:
        """The stored inputs and PyTorch outputs. A bundle without them gives empty `Samples`."""
        if SAMPLES not in self.manifest.files:
            return Samples({}, {})
        arrays: dict[str, dict[str, NDArray[Any]]] = {"inputs": {}, "outputs": {}}
        try:
            with np.load(io.BytesIO(self.read(SAMPLES)), allow_pickle=False) as data:
                for key in data.files:
                    side, _, name = key.partition("/")
                    if side not in arrays or not name:
                        raise BundleError(f"{self.path.name}/{SAMPLES} holds the unexpected array {key!r}")
                    arrays[side][name] = data[key]
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            if isinstance(error, BundleError):
                raise
            raise BundleError(f"{self.path.name}/{SAMPLES} cannot be read without pickle ({error})") from error
        lengths = {len(array) for side in arrays.values() for array in side.values() if array.ndim}
        if len(lengths) > 1:
            raise BundleError(f"{self.path.name}/{SAMPLES} holds different numbers of samples: {sorted(lengths)}")
        return Samples(arrays["inputs"], arrays["outputs"])

    def report(self) -> dict[str, Any]:
        """What was measured so far (`report.json`): empty where nothing was."""
        try:
            if self.packed:
                with zipfile.ZipFile(self.path) as archive:
                    text = archive.read(REPORT).decode() if REPORT in archive.namelist() else "{}"
            else:
                path = self.path / REPORT
                text = path.read_text(encoding="utf-8") if path.exists() else "{}"
            data = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BundleError(f"{self.path.name}/{REPORT} is not valid JSON ({error}); delete it") from error
        if not isinstance(data, dict):
            raise BundleError(f"{self.path.name}/{REPORT} must hold a JSON object; delete it")
        return data

    def add_to_report(self, section: str, data: Any) -> bool:
        """Write one section of `report.json`. Returns False, and writes nothing, where the bundle is packed or the
        folder is read-only: measuring must work there too."""
        if self.packed:
            return False
        report = self.report()
        report[section] = data
        try:
            write_text_atomic(self.path / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        except OSError:
            return False
        return True

    def pack(self, destination: Path | None = None) -> Bundle:
        """Write the bundle as one zip (`NAME.edge.zip` beside the folder by default) and open it."""
        if self.packed:
            return self
        destination = destination or self.path.with_name(self.path.name + ".zip")
        names = [MANIFEST, *self.manifest.files]
        if (self.path / REPORT).exists():
            names.append(REPORT)
        temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
        try:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
                for name in names:
                    # A fixed date: packing the same bundle twice gives the same bytes.
                    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                    info.compress_type = zipfile.ZIP_DEFLATED
                    with (self.path / name).open("rb") as source, archive.open(info, "w", force_zip64=True) as target:
                        shutil.copyfileobj(source, target, 2**20)
            temporary.replace(destination)
        finally:
            temporary.unlink(missing_ok=True)
        return Bundle.open(destination)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if self.packed:
            try:
                with zipfile.ZipFile(self.path) as archive, archive.open(name) as stream:
                    yield stream
            except KeyError:
                raise BundleError(f"{self.path.name} has no {name}, which its manifest lists; copy it again") from None
            except (zipfile.BadZipFile, EOFError) as error:
                raise BundleError(f"{self.path.name}/{name} is corrupt ({error}); copy it again") from error
            return
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{self.path.name}/{name} is a link that leaves the bundle's folder; refusing to read it")
        if not path.is_file():
            raise BundleError(f"{self.path.name} has no {name}, which its manifest lists; copy or export it again")
        with path.open("rb") as stream:
            yield stream


class BundleWriter:
    """Builds a bundle in a temporary folder beside its place and moves it there when complete.

    Use as a context manager; leaving it with an error (or an interrupt) removes the temporary folder, and whatever
    stood at the destination before is still there.
    """

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self._folder: Path | None = None
        self._roles: dict[str, str] = {}

    @property
    def folder(self) -> Path:
        """The temporary folder to write into."""
        if self._folder is None:
            raise RuntimeError("BundleWriter is used outside its `with` block")
        return self._folder

    def __enter__(self) -> BundleWriter:
        destination = self.destination
        if destination.exists() and not (destination / MANIFEST).is_file():
            raise BundleError(f"{destination} exists and is no bundle; move it away or choose another -o folder")
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
            self._folder.chmod(0o755)
        except OSError as error:
            raise BundleError(f"cannot write to {destination.parent}: {error.strerror or error}") from error
        return self

    def __exit__(self, *exc: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def add(self, name: str, role: str) -> Path:
        """Announce a file and get the path to write it to."""
        self._roles[name] = role
        return self.folder / name

    def preview(self, manifest: Manifest) -> Bundle:
        """Hash the announced files, write the manifest, and open the unfinished bundle where it is being built."""
        files = {}
        for name, role in self._roles.items():
            with (self.folder / name).open("rb") as stream:
                size, digest = _measure(stream, limit=None, digest=True)
            files[name] = FileEntry(role, size, digest)
        manifest = replace(manifest, files=files)
        (self.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return Bundle.open(self.folder)  # what was written must read back

    def finish(self, manifest: Manifest, report: dict[str, Any]) -> Bundle:
        """Write manifest and report, and move the whole into place at once."""
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (self.folder / REPORT).write_text(text, encoding="utf-8")
        manifest = self.preview(manifest).manifest
        old: Path | None = None
        if self.destination.exists():
            old = self.folder.with_name(self.folder.name + ".old")
            self.destination.rename(old)
        try:
            self.folder.rename(self.destination)
        except OSError:
            if old is not None:
                old.rename(self.destination)
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        return Bundle(self.destination, manifest)


def bundle_stem(name: str, target: str, precision: str) -> str:
    """The bundle's name without its suffix: `shvit_s1-onnx`, or `shvit_s1-onnx-int8`."""
    return f"{name}-{target}" if precision == "fp32" else f"{name}-{target}-{precision}"


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _measure(stream: IO[bytes], *, limit: int | None, digest: bool) -> tuple[int, str]:
    """Size and SHA-256 of a stream, reading at most one block past `limit`, so that a packed file cannot unfold
    without bound."""
    sha, size = hashlib.sha256(), 0
    while block := stream.read(2**20):
        size += len(block)
        if digest:
            sha.update(block)
        if limit is not None and size > limit:
            break
    return size, sha.hexdigest()


def _read_manifest(path: Path) -> str:
    if path.is_dir():
        file = path / MANIFEST
        if not file.is_file():
            raise BundleError(f"{path} has no {MANIFEST}: it is no edgekit bundle, or its export did not finish")
        raw = file.read_bytes()
    else:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(MANIFEST) as stream:
                raw = stream.read(_MANIFEST_LIMIT + 1)
        except KeyError:
            raise BundleError(f"{path} has no {MANIFEST} inside: it is a zip, but no edgekit bundle") from None
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise BundleError(f"{path} is neither a bundle folder nor a readable packed bundle ({error})") from error
    if len(raw) > _MANIFEST_LIMIT:
        raise BundleError(f"{path}/{MANIFEST} is larger than {_MANIFEST_LIMIT // 2**20} MiB; refusing to read it")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}/{MANIFEST} is not UTF-8 text ({error}); the bundle is damaged") from error
