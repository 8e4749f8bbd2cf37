"""The bundle: a folder `NAME-TARGET.edge/` or one zip of it, with a manifest, the model, samples and a report.

Opening a bundle never runs code and never leaves its folder: names are checked, sizes and SHA-256 hashes are compared,
arrays are read without pickle. `report.json` is the one file that changes after export (devices write their
measurements into it), so it alone carries no hash.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.errors import BundleError
from edgekit.runtime.manifest import MANIFEST, REPORT, FileEntry, Manifest, safe_name
from edgekit.runtime.samples import Samples
from edgekit.runtime.storage import (
    FolderStorage,
    Storage,
    measure,
    sibling,
    storage_of,
    write_text_atomic,
    write_zip,
)
from edgekit.runtime.tolerances import default_precision

__all__ = ["MANIFEST", "REPORT", "SAMPLES", "Bundle", "BundleWriter", "Samples", "bundle_stem"]

SAMPLES = "samples.npz"
PART = "decode"  # the one part that a bundle may have besides its main graph
TEXT_LIMIT = 64 * 2**20  # bytes of the manifest, and of the report
_NO_LIMIT = 2**63 - 1
_ATTEMPTS = 50


class Bundle:
    """An opened bundle. Use `Bundle.open(path)`; `bundle.manifest` says what is inside."""

    def __init__(self, storage: Storage, manifest: Manifest, *, part_of: Bundle | None = None) -> None:
        self.path = storage.path
        self.manifest = manifest
        self._storage = storage
        self._whole = part_of

    @property
    def packed(self) -> bool:
        """Whether the bundle is one zip file rather than a folder."""
        return not isinstance(self._storage, FolderStorage)

    @property
    def name(self) -> str:
        """NAME-TARGET, with the precision where it is not the target's default."""
        return bundle_stem(self.manifest.name, self.manifest.target, self.manifest.precision)

    @property
    def size(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(entry.size for entry in self.manifest.files.values())

    @property
    def size_of_model(self) -> int:
        """Bytes of the model file, and of its weights where they lie apart."""
        files = self.manifest.files
        apart = sum(entry.size for entry in files.values() if entry.role == "weights")
        return files[self.manifest.model_file].size + apart

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
        storage = storage_of(Path(path))
        bundle = cls(storage, _read_manifest(storage))
        bundle.check(hashes=check_hashes)
        return bundle

    def check(self, *, hashes: bool = True) -> None:
        """Compare sizes (and SHA-256 hashes) of all files with the manifest; raise `BundleError` at the first fault."""
        for name, entry in self.manifest.files.items():
            size, digest = measure(self._storage.blocks(name, entry.size), digest=hashes)
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
        return self._storage.read(name, self._entry(name).size)

    def file(self, name: str) -> Path | None:
        """The path of a listed file, or None in a packed bundle."""
        self._entry(name)
        return None if self.packed else self.path / name

    def _entry(self, name: str) -> FileEntry:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path.name} lists no file {name!r}; it has {', '.join(self.manifest.files)}")
        return self.manifest.files[name]

    def part(self, name: str) -> Bundle:
        """The graph `decode` of a language model as a bundle of its own, on the same files.

        Its manifest describes that graph as the main one: its tensors, its samples and its figures, under the name
        NAME-decode. What it adds to the report stands there as the section `decode`. Raises `BundleError` where the
        bundle has no such part.
        """
        graph = self.manifest.decode if name == PART else None
        if graph is None:
            raise BundleError(f"{self.path.name} has no part {name!r}; it holds one graph")
        entries = self.manifest.files
        files = {graph.file: replace(entries[graph.file], role="model")}
        shared = ("weights", "package")
        files |= {file: entry for file, entry in entries.items() if entry.role in shared or file == graph.samples}
        coreml = self.manifest.coreml
        if coreml is not None and graph.function is not None:
            coreml = replace(coreml, function=graph.function)
        manifest = replace(
            self.manifest,
            name=f"{self.manifest.name}-{PART}",
            inputs=graph.inputs,
            outputs=graph.outputs,
            dims=graph.dims,
            ops=graph.ops,
            custom_ops=graph.custom_ops,
            files=files,
            verification=graph.verification,
            decode=None,
            generation=None,
            coreml=coreml,
        )
        return Bundle(self._storage, manifest, part_of=self)

    def parts(self) -> dict[str, Bundle]:
        """The bundles to run, each with one graph: `prefill` and `decode` of a language model, else itself, unnamed."""
        return {"": self} if self.manifest.decode is None else {"prefill": self, PART: self.part(PART)}

    def samples(self) -> Samples:
        """The stored inputs and PyTorch outputs. A bundle without them gives empty `Samples`."""
        decode = self._whole.manifest.decode if self._whole is not None else None
        name = SAMPLES if decode is None else decode.samples
        if name is None or name not in self.manifest.files:
            return Samples({}, {})
        return Samples.load(self.read(name), self.manifest, where=f"{self.path.name}/{name}")

    def report(self) -> dict[str, Any]:
        """What was measured so far (`report.json`): empty where nothing was."""
        if self._whole is not None:
            section = self._whole.report().get(PART, {})
            return section if isinstance(section, dict) else {}
        if not self._storage.has(REPORT):
            return {}
        try:
            data = json.loads(self._storage.read(REPORT, TEXT_LIMIT).decode("utf-8"))
        except BundleError:
            raise
        except (ValueError, RecursionError) as error:
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
        if self._whole is not None:
            return self._whole.add_to_report(PART, report)
        try:
            write_text_atomic(self.path / REPORT, _json(report))
        except OSError:
            return False
        return True

    def pack(self, destination: Path | None = None) -> Bundle:
        """Write the bundle as one zip (`NAME.edge.zip` beside the folder by default) and open it.

        Bundles of the same content give the same bytes. Raises `BundleError` where the zip cannot be written, or
        something else stands at its place; nothing is left then.
        """
        if self._whole is not None:
            raise BundleError(f"{self.name} is a part of {self.path.name}; pack the whole bundle")
        if self.packed:
            return self
        destination = destination or self.path.with_name(self.path.name + ".zip")
        if os.path.lexists(destination) and not _is_bundle(destination):
            raise BundleError(f"{destination} exists and is no bundle; move it away or choose another name")
        self.check()
        temporary = sibling(destination)
        try:
            write_zip(temporary, self._contents())
            manifest = Bundle.open(temporary, check_hashes=False).manifest  # what was packed must read back
            temporary.replace(destination)
        except OSError as error:
            raise BundleError(
                f"cannot write {destination}: {error.strerror or error}; nothing was left there"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return Bundle(storage_of(destination), manifest)

    def _contents(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        yield MANIFEST, iter([self.manifest.to_json().encode("utf-8")])
        for name, entry in self.manifest.files.items():
            yield name, self._storage.blocks(name, entry.size)
        if self._storage.has(REPORT):
            yield REPORT, self._storage.blocks(REPORT, TEXT_LIMIT)


class BundleWriter:
    """Builds a bundle in a hidden temporary folder beside its place and moves it there when complete.

    Use as a context manager; leaving it with an error (or an interrupt) removes the temporary folder, and whatever
    stood at the destination before is still there. The manifest is written last: a folder whose export was killed has
    none, so that nobody takes it for a bundle.
    """

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self._folder: Path | None = None
        self._roles: dict[str, str] = {}
        self._replaced: list[Path] = []

    @property
    def folder(self) -> Path:
        """The temporary folder to write into."""
        if self._folder is None:
            raise RuntimeError("BundleWriter is used outside its `with` block")
        return self._folder

    def __enter__(self) -> BundleWriter:
        destination = self.destination
        try:
            self._check_destination()
            destination.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
            self._folder.chmod(0o755)
        except (OSError, ValueError) as error:
            if isinstance(error, BundleError):
                raise
            raise BundleError(
                f"cannot write to {destination.parent}: {getattr(error, 'strerror', None) or error}; "
                "choose another folder, or make this one writable"
            ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        for path in reversed(self._replaced):
            if not os.path.lexists(self.destination):  # stopped between two renames
                with contextlib.suppress(OSError):
                    path.rename(self.destination)
            shutil.rmtree(path, ignore_errors=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder, self._replaced = None, []

    def add(self, name: str, role: str) -> Path:
        """Announce a file and get the path to write it to."""
        if not safe_name(name) or name in (MANIFEST, REPORT) or name in self._roles:
            raise BundleError(f"cannot add a file {name!r} to a bundle: it must be a new name inside the folder")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._roles[name] = role
        return path

    def preview(self, manifest: Manifest) -> Bundle:
        """Hash the announced files and open the unfinished bundle where it is being built."""
        storage = FolderStorage(self.folder)
        files = {}
        for name, role in self._roles.items():
            size, digest = measure(storage.blocks(name, _NO_LIMIT))
            files[name] = FileEntry(role, size, digest)
        text = replace(manifest, files=files).to_json()
        # What will be written must read back.
        return Bundle(storage, Manifest.from_json(text, where=f"{self.destination.name}/{MANIFEST}"))

    def finish(self, manifest: Manifest, report: dict[str, Any]) -> Bundle:
        """Write report and manifest, and move the whole into place at once.

        Raises `BundleError` where that cannot be written; nothing is left then.
        """
        manifest = self.preview(manifest).manifest
        try:
            (self.folder / REPORT).write_text(_json(report), encoding="utf-8")
            (self.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            self._move_into_place()
        except OSError as error:
            raise BundleError(
                f"cannot write {self.destination}: {error.strerror or error}; nothing was left there"
            ) from error
        return Bundle(FolderStorage(self.destination), manifest)

    def _move_into_place(self) -> None:
        """Rename the folder; what stands there is put aside first, and removed on leaving the block.

        Another writer may do the same at the same time: each attempt fails cleanly, and the last one to rename wins.
        """
        for attempt in range(_ATTEMPTS):
            self._check_destination()
            try:
                self.folder.rename(self.destination)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            else:
                self._folder = None
                return
            aside = self.folder.with_name(f"{self.folder.name}.old{attempt}")
            self._replaced.append(aside)
            with contextlib.suppress(FileNotFoundError):  # the other writer put it aside
                self.destination.rename(aside)
        raise BundleError(f"other exports keep writing {self.destination}; run one at a time")

    def _check_destination(self) -> None:
        """Refuse to replace anything but a bundle: what is replaced is deleted."""
        destination = self.destination
        if destination.is_symlink():
            raise BundleError(f"{destination} is a link; name the folder that it points to, or another -o folder")
        for _ in range(_ATTEMPTS):
            if not destination.exists() or (destination.is_dir() and _is_bundle(destination)):
                return
            time.sleep(0.001)  # another writer may be replacing it while we look
        raise BundleError(f"{destination} exists and is no bundle; move it away or choose another -o folder")


def bundle_stem(name: str, target: str, precision: str) -> str:
    """The bundle's name without its suffix: `shvit_s1-onnx`, or `shvit_s1-onnx-int8`."""
    return f"{name}-{target}" if precision == default_precision(target) else f"{name}-{target}-{precision}"


def _read_manifest(storage: Storage) -> Manifest:
    if not storage.has(MANIFEST):
        raise BundleError(f"{storage.path} has no {MANIFEST}: it is no edgekit bundle, or its export did not finish")
    where = f"{storage.path.name}/{MANIFEST}"
    try:
        text = storage.read(MANIFEST, TEXT_LIMIT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{where} is not UTF-8 text ({error}); the bundle is damaged") from error
    return Manifest.from_json(text, where=where)


def _is_bundle(path: Path) -> bool:
    """Whether a bundle stands there, damaged or of another version perhaps, but nothing of anybody else's."""
    try:
        data = json.loads(storage_of(path).read(MANIFEST, TEXT_LIMIT))
    except (ValueError, RecursionError):  # BundleError is a ValueError
        return False
    return isinstance(data, dict) and {"schema", "target", "files"} <= data.keys()


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
