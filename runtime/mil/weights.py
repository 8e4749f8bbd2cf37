"""Core ML's weights file (`weight.bin`): blobs at offsets, each behind a header of 64 bytes.

The format is MILBlob's "StorageFormat" (coremltools, mlmodel/src/MILBlob/Blob): the file begins with a header of 64
bytes (uint32 number of blobs, uint32 version 2); at each offset that the program names stands a blob's own header:
uint32 0xDEADBEEF, uint32 dtype, uint64 bytes, uint64 offset of the data, uint64 unused bits at the end.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import BundleError
from edgekit.runtime.mil.program import BITS, STORAGE, ValueType

_SENTINEL = 0xDEADBEEF
_HEADER = 64
_VERSION = 2
_DTYPES = {
    1: "float16", 2: "float32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1", 10: "uint2",
    11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip


class WeightsFile:
    """One weights file, mapped into memory. `where` is what messages call it."""

    def __init__(self, path: Path, where: str) -> None:
        self._where = where
        try:
            self._data: np.ndarray[Any, np.dtype[np.uint8]] = np.memmap(path, np.uint8, mode="r")
        except FileNotFoundError as error:
            raise BundleError(f"{where} is missing; copy the whole package, or export it again") from error
        except (OSError, ValueError) as error:  # numpy refuses to map an empty file with a ValueError
            raise BundleError(f"{where} cannot be read ({error}); export the package again") from error
        if len(self._data) < _HEADER or int(self._data[4:8].view("<u4")[0]) != _VERSION:
            raise BundleError(f"{where} is damaged: it does not begin as a weights file does; export the package again")

    def read(self, offset: int, type_: ValueType) -> np.ndarray[Any, Any]:
        """The array at `offset`, of the declared type; sub-byte integers one to a byte. Raises `BundleError`."""
        if None in type_.shape:
            raise BundleError(f"{self._where}: weights of unknown size ({type_}); export the package again")
        shape = tuple(int(size or 0) for size in type_.shape)
        if not 0 <= offset <= len(self._data) - _HEADER or offset % 4:
            raise self._damaged(offset, f"the file has {len(self._data)} bytes")
        header = self._data[offset : offset + _HEADER]
        sentinel, code = (int(word) for word in header[:8].view("<u4"))
        size, start, _unused = (int(word) for word in header[8:32].view("<u8"))
        if sentinel != _SENTINEL:
            raise self._damaged(offset, "no blob begins there")
        if _DTYPES.get(code) != type_.dtype:
            raise self._damaged(
                offset, f"it holds {_DTYPES.get(code, f'dtype {code}')}, the program says {type_.dtype}"
            )
        count = math.prod(shape)
        needed = -(-count * BITS[type_.dtype] // 8)
        if size != needed:
            raise self._damaged(offset, f"it holds {size} bytes, {type_} takes {needed}")
        if start + size > len(self._data):
            raise self._damaged(offset, f"it ends at byte {start + size}, the file has {len(self._data)}")
        data = self._data[start : start + size]
        try:
            if BITS[type_.dtype] < 8:
                return unpack_bits(data, type_.dtype, count).reshape(shape)
            return np.frombuffer(data.tobytes(), STORAGE[type_.dtype]).reshape(shape)
        except (ValueError, OverflowError) as error:  # no elements, but a size that numpy has not
            raise self._damaged(offset, f"{type_} is no array's shape ({error})") from error

    def _damaged(self, offset: int, problem: str) -> BundleError:
        return BundleError(f"{self._where} is damaged at offset {offset}: {problem}; export the package again")


def unpack_bits(data: np.ndarray[Any, Any], dtype: str, count: int) -> np.ndarray[Any, Any]:
    """`count` integers narrower than a byte, packed from the lowest bit on without gaps; int4 is two's complement.

    Raises `ValueError` where `data` (uint8) is too short.
    """
    bits = BITS[dtype]
    if len(data) * 8 < count * bits:
        raise ValueError(f"{len(data)} bytes hold fewer than {count} values of {dtype}")
    single = np.unpackbits(np.asarray(data), bitorder="little", count=count * bits).reshape(count, bits)
    values = np.zeros(count, np.uint8)
    for place in range(bits):
        values |= single[:, place] << place
    if dtype == "int4":
        return ((values ^ 8).astype(np.int8) - 8).astype(np.int8)
    return values
