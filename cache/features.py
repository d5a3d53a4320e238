"""Features that somebody already has, from an HDF5 file into a store: one dataset per layer, in the task's order.

The keys become the names of the hidden states in order: `embeddings`, `blocks.0`, …, the last one is the final layer,
so every method that reads hidden states finds them; the keys themselves are among the facts. The file is read twice:
first to check and hash its contents, which the digest is over (so neither path nor compression matter), then to store.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .architecture import Architecture
from .bring_in import Altered, bring_in
from .build import BuildResult
from .errors import SidebenchError
from .examples import Examples
from .export import Progress
from .feature_file import FeatureFile
from .form import Form
from .manifest import ActivationSpec, Manifest, canonical_json
from .writer import StoreWriter

_BLOCK_BYTES = 8_000_000  # read at a time


@dataclass(frozen=True)
class ImportOptions:
    """What the file does not say. `layers` are keys in forward order; None takes all in natural order."""

    name: str | None = None
    layers: tuple[str, ...] | None = None
    prefix_tokens: int = 0
    limit: int | None = None


def import_features(
    features: FeatureFile,
    examples: Examples,
    options: ImportOptions,
    cache_dir: Path,
    *,
    notes: dict[str, Any],
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda done, total: None,
) -> BuildResult:
    """Check, hash and store the features of an opened file.

    Raises SidebenchError for a value that is not finite, naming layer and example, before anything is written.
    """
    begun = time.perf_counter()
    say(f"checking {len(features.keys)} layers of {len(examples):,} examples in {features.path.name}")
    content = _Content()
    for alias in features.states:
        for _ in _blocks(features, alias, examples, content):
            pass
    manifest = _manifest(features, examples, options, content.sha256(features))

    def copy(writer: StoreWriter) -> None:
        again = _Content()
        _store(features, examples, options.prefix_tokens, writer, again, progress)
        if again.sha256(features) != content.sha256(features):
            raise Altered(f"{features.path} was changed while it was read; import it again.")

    notes = {**notes, "created": _now(), "imported_from": features.path.name}
    return bring_in(manifest, cache_dir, copy, notes=notes, ids=examples.ids, begun=begun)


class _Content:
    """Hash of what is stored, layer by layer; how the rows were cut into blocks does not matter."""

    def __init__(self) -> None:
        self._layers: dict[str, Any] = {}

    def add(self, alias: str, rows: NDArray[Any]) -> None:
        self._layers.setdefault(alias, hashlib.sha256()).update(np.ascontiguousarray(rows).data)

    def sha256(self, features: FeatureFile) -> str:
        lengths = hashlib.sha256(features.lengths.astype("<i8").tobytes()).hexdigest()
        layers = {alias: digest.hexdigest() for alias, digest in self._layers.items()}
        about = [features.dtype, lengths, layers, [[s.tokens, s.width] for s in features.specs]]
        return hashlib.sha256(canonical_json(about).encode()).hexdigest()


def _manifest(features: FeatureFile, examples: Examples, options: ImportOptions, content_sha256: str) -> Manifest:
    """The facts of an import. There is no network, so nothing is known of one beside its name and widths."""
    last = features.specs[-1]
    return Manifest(
        architecture=Architecture(
            name=options.name or "imported",
            modality=examples.modality,
            blocks=len(features.specs) - 1,
            width=last.width,
            prefix_tokens=options.prefix_tokens,
            final_layer=last.layer,
        ),
        backbone={"imported": options.name, "features_sha256": content_sha256, "keys": list(features.keys)},
        preprocessing={},
        dataset={"sha256": examples.content_sha256, "examples": len(examples), "limit": options.limit},
        forward={},
        form=Form(dtype=features.dtype),
        specs=features.specs,
        rows=int(features.lengths.sum()) if features.ragged else len(examples),
    )


def _store(
    features: FeatureFile,
    examples: Examples,
    prefix_tokens: int,
    writer: StoreWriter,
    content: _Content,
    progress: Progress,
) -> None:
    writer.append("targets", examples.targets.astype(np.int64))
    if features.ragged:
        writer.append("offsets", np.concatenate([[0], np.cumsum(features.lengths)]).astype(np.int64))
    for done, spec in enumerate(features.specs):
        for first, stop, rows in _blocks(features, spec.layer, examples, content):
            shaped = rows if spec.tokens is None else rows.reshape(stop - first, spec.tokens, spec.width)
            writer.append(f"layers/{spec.layer}", shaped)
            pooled = _pool(rows, features.tokens[first:stop], spec, prefix_tokens)
            writer.append(f"pooled/{spec.layer}", pooled.astype(rows.dtype))
            share = done * len(examples) + stop
            progress(share // len(features.specs), len(examples))


def _pool(rows: NDArray[Any], lengths: NDArray[np.int64], spec: ActivationSpec, prefix: int) -> NDArray[np.float32]:
    """(n, 2, D): the first token, and the mean over tokens that are no prefix."""
    wide = rows.reshape(-1, spec.width).astype(np.float32)
    if spec.tokens is not None:
        tokens = wide.reshape(-1, spec.tokens, spec.width)
        return np.stack([tokens[:, 0], tokens[:, prefix:].mean(1)], 1)
    starts = np.cumsum(lengths) - lengths
    return np.stack([wide[starts], np.add.reduceat(wide, starts) / lengths[:, None].astype(np.float32)], 1)


def _blocks(
    features: FeatureFile, alias: str, examples: Examples, content: _Content
) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Runs of examples in task order with their tokens (rows, D), checked and hashed."""
    spec = next(s for s in features.specs if s.layer == alias)
    row_bytes = spec.width * features.numpy_dtype.itemsize
    ends = np.cumsum(features.tokens) * row_bytes
    first = 0
    while first < len(examples):
        begun = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, begun + _BLOCK_BYTES, side="right")))
        rows = features.read(alias, first, stop)
        if not (finite := np.isfinite(rows).all(1)).all():
            row = int(np.argmin(finite))
            example = int(np.searchsorted(ends // row_bytes, begun // row_bytes + row, side="right"))
            raise SidebenchError(
                f"{features.path}: layer {features.key_of(alias)}, example {examples.ids[example]!r}: a value is NaN, "
                f"infinite or beyond {features.dtype}; mend the features or take the layer out with --layers."
            )
        content.add(alias, rows)
        yield first, stop, rows
        first = stop


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
