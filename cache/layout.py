"""How an array lies on disk: zarr v3, regular chunks along the first axis, codecs `bytes` and `crc32c`.

With these codecs a chunk object is the raw little-endian array followed by a 4-byte checksum, so a local store is read
straight from the files while any zarr v3 library opens it too.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 16_000_000  # large enough for sequential writing, small enough that a resume loses little
ROWS_MULTIPLE = 64
CHECKSUM_BYTES = 4

# storage dtype -> (zarr data_type, numpy dtype, fill value as zarr's JSON spells it). The fill is NaN wherever there is
# one, so that a missing chunk can never read as a plausible activation. zarr has no bfloat16: its bits are stored.
_BFLOAT16_NAN = 0x7FC0
_DTYPES: dict[str, tuple[str, str, Any]] = {
    "float16": ("float16", "<f2", "NaN"),
    "float32": ("float32", "<f4", "NaN"),
    "bfloat16": ("uint16", "<u2", _BFLOAT16_NAN),
    "int64": ("int64", "<i8", 0),
}
STORAGE_DTYPES = ("float16", "bfloat16", "float32")
_AXES = {1: ("example",), 2: ("token", "width"), 3: ("example", "token", "width")}


@dataclass(frozen=True)
class ArrayLayout:
    """Shape and storage dtype of one array; everything else about its files follows."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """What the bytes are."""
        return np.dtype(_DTYPES[self.dtype][1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return math.prod(self.shape[1:]) * self.numpy_dtype.itemsize

    @property
    def chunk_rows(self) -> int:
        """Rows per chunk: a multiple of 64 near 16 MB, spread evenly so that the last chunk pads little."""
        rows = max(self.shape[0], 1)
        chunks = max(round(rows * self.row_bytes / CHUNK_BYTES), 1)
        return math.ceil(rows / chunks / ROWS_MULTIPLE) * ROWS_MULTIPLE

    @property
    def chunks(self) -> int:
        """Number of chunk objects."""
        return math.ceil(self.shape[0] / self.chunk_rows)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of every chunk, the last one included (its tail holds the fill value)."""
        return (self.chunk_rows, *self.shape[1:])

    @property
    def object_bytes(self) -> int:
        """Length of every chunk object: payload and checksum."""
        return self.chunk_rows * self.row_bytes + CHECKSUM_BYTES

    @property
    def stored_bytes(self) -> int:
        """Length of all chunk objects."""
        return self.chunks * self.object_bytes

    def chunk_key(self, chunk: int) -> str:
        """File of a chunk below the array's folder, in zarr's default key encoding."""
        return "/".join(["c", str(chunk), *("0" for _ in self.shape[1:])])

    def empty_chunk(self) -> NDArray[Any]:
        """A chunk full of the fill value, to be written row by row."""
        fill = _DTYPES[self.dtype][2]
        return np.full(self.chunk_shape, np.nan if fill == "NaN" else fill, dtype=self.numpy_dtype)

    def metadata(self) -> str:
        """The array's zarr.json. Written by us, so that it is the same under every version of every library."""
        document = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": _DTYPES[self.dtype][0],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": _DTYPES[self.dtype][2],
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "dimension_names": list(_AXES[len(self.shape)]),
            "attributes": {"sidebench_dtype": self.dtype},
        }
        return json.dumps(document, indent=1, sort_keys=True) + "\n"


GROUP_METADATA = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}, indent=1) + "\n"


def checksum(payload: NDArray[Any] | bytes) -> int:
    """crc32c of a contiguous array or of bytes (the library takes both without a copy, but no memoryview)."""
    return int(google_crc32c.value(payload))


def trailer(crc: int) -> bytes:
    """The four bytes that zarr's crc32c codec appends."""
    return crc.to_bytes(CHECKSUM_BYTES, "little")
