"""How an array lies on disk: zarr v3, regular chunks along the first axis, codecs `bytes` and `crc32c`.

With these codecs a chunk object is the raw little-endian array followed by a 4-byte checksum, so a local store is read
straight from the files while any zarr v3 library opens it too. A compressed array has `blosc` between the two.
"""

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 16_000_000  # large enough for sequential writing, small enough that a resume loses little
ROWS_MULTIPLE = 64
CHECKSUM_BYTES = 4

# storage dtype -> (zarr data_type, numpy dtype, fill value as zarr's JSON spells it). The fill is NaN wherever there is
# one, and a value that is never stored in int8, so that a missing chunk can never read as a plausible activation. zarr
# has neither bfloat16 nor the fp8 format e4m3fn: their bits are stored.
_BFLOAT16_NAN = 0x7FC0
_FP8_NAN = 0x7F
_DTYPES: dict[str, tuple[str, str, Any]] = {
    "float16": ("float16", "<f2", "NaN"),
    "float32": ("float32", "<f4", "NaN"),
    "bfloat16": ("uint16", "<u2", _BFLOAT16_NAN),
    "int8": ("int8", "|i1", -128),
    "fp8": ("uint8", "|u1", _FP8_NAN),
    "int64": ("int64", "<i8", 0),
}
COMPRESSIONS = ("zstd", "lz4")  # inside blosc, which puts the bytes of equal weight together first
LARGEST_COMPRESSED = 2**31 - 17  # bytes of a chunk that blosc takes
_LEVEL = 3
STORAGE_DTYPES = ("float16", "bfloat16", "float32", "int8", "fp8")


@dataclass(frozen=True)
class ArrayLayout:
    """Shape and storage dtype of one array; everything else about its files follows.

    `beside` is the array whose rows this one has something for: it is cut where that one is.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    compression: str | None = None
    beside: "ArrayLayout | None" = None

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
        if self.beside is not None:
            return self.beside.chunk_rows
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
    def chunk_bytes(self) -> int:
        """Length of every chunk's content."""
        return self.chunk_rows * self.row_bytes

    @property
    def object_bytes(self) -> int | None:
        """Length of every chunk object, payload and checksum; None where compression decides."""
        return None if self.compression else self.chunk_bytes + CHECKSUM_BYTES

    @property
    def stored_bytes(self) -> int:
        """Length of all chunk objects, before any compression."""
        return self.chunks * (self.chunk_bytes + CHECKSUM_BYTES)

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
            "codecs": [_bytes_codec(self.numpy_dtype), *self._compressor(), {"name": "crc32c"}],
            "dimension_names": list(self.axes),
            "attributes": {"sidebench_dtype": self.dtype},
        }
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    def encode(self, chunk: NDArray[Any]) -> NDArray[np.uint8] | bytes:
        """The payload of a chunk object."""
        if self.compression is None:
            return chunk.reshape(-1).view(np.uint8)
        return bytes(self._blosc().encode(chunk))

    def decode(self, payload: NDArray[np.uint8]) -> NDArray[Any]:
        """The chunk in a payload, (rows, …). Raises ValueError for one that is not exactly a chunk."""
        raw = payload if self.compression is None else self._decompressed(payload)
        return np.asarray(raw).view(self.numpy_dtype).reshape(self.chunk_shape)

    def _decompressed(self, payload: NDArray[np.uint8]) -> NDArray[np.uint8]:
        # The header states how much comes out and how much goes in: it is believed only if these are a chunk and the
        # payload, before anything is allocated, and before blosc reads as far as it says.
        head = payload[4:16].tobytes()
        stated, _, length = struct.unpack("<III", head) if len(head) == 12 else (-1, 0, -1)
        if stated != self.chunk_bytes:
            raise ValueError(f"its content takes {stated} bytes, a chunk {self.chunk_bytes}")
        if length != len(payload):
            raise ValueError(f"it states a length of {length} bytes and has {len(payload)}")
        out = np.empty(self.chunk_bytes, dtype=np.uint8)
        try:
            self._blosc().decode(np.ascontiguousarray(payload), out)
        except RuntimeError as error:
            raise ValueError(f"it cannot be decompressed: {error}") from None
        return out

    def _compressor(self) -> list[dict[str, Any]]:
        if self.compression is None:
            return []
        shuffle = "shuffle" if self.numpy_dtype.itemsize > 1 else "bitshuffle"
        options = {"cname": self.compression, "clevel": _LEVEL, "shuffle": shuffle}
        return [{"name": "blosc", "configuration": {**options, "typesize": self.numpy_dtype.itemsize, "blocksize": 0}}]

    def _blosc(self) -> Any:
        import numcodecs

        # Threads write their blocks as they finish: the same chunk would be other bytes each time.
        numcodecs.blosc.use_threads = False
        shuffle = numcodecs.Blosc.SHUFFLE if self.numpy_dtype.itemsize > 1 else numcodecs.Blosc.BITSHUFFLE
        return numcodecs.Blosc(cname=self.compression, clevel=_LEVEL, shuffle=shuffle)


def _bytes_codec(dtype: np.dtype[Any]) -> dict[str, Any]:
    if dtype.itemsize == 1:
        return {"name": "bytes"}  # a byte has no order
    return {"name": "bytes", "configuration": {"endian": "little"}}


GROUP_METADATA = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}, indent=1) + "\n"


def checksum(payload: NDArray[Any] | bytes) -> int:
    """crc32c of a contiguous array or of bytes (the library takes both without a copy, but no memoryview)."""
    return int(google_crc32c.value(payload))


def trailer(crc: int) -> bytes:
    """The four bytes that zarr's crc32c codec appends."""
    return crc.to_bytes(CHECKSUM_BYTES, "little")
