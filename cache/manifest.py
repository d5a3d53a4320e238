"""What a store is: the facts that determine its bytes, their digest, and the list of every object in it."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from .architecture import Architecture, Norm
from .errors import SidebenchError
from .examples import Modality
from .form import Form, form_from_facts
from .layout import ArrayLayout
from .reduction import reduction_of

FORMAT = "sidebench-activations/2"
MANIFEST = "manifest.json"
_LAYER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_LARGEST_MANIFEST_BYTES = 512 * 2**20
_LARGEST_COUNT = 2**48
_MOST_BLOCKS = 10_000
# Of an architecture: came later, and older stores keep their digest.
_SAID_WHERE_ANY = ("stages", "decoder_blocks", "t5_blocks", "biasless", "projected_from", "bottlenecks")


@dataclass(frozen=True)
class ActivationSpec:
    """What one layer yields for ONE example: (tokens, width); `tokens` is None where it differs (text)."""

    layer: str
    tokens: int | None
    width: int


@dataclass(frozen=True)
class Manifest:
    """The facts of a store. Two builds with equal facts hold equal bytes, on any machine."""

    architecture: Architecture
    backbone: Mapping[str, Any]  # weights_sha256, config
    preprocessing: Mapping[str, Any]
    dataset: Mapping[str, Any]  # sha256, examples, limit
    forward: Mapping[str, Any]  # precision, attention kernel, canonical batch size
    form: Form
    specs: tuple[ActivationSpec, ...]
    rows: int  # stored tokens per ragged layer; for a dense store the number of items

    @property
    def layers(self) -> tuple[str, ...]:
        """Captured layers, in forward order."""
        return tuple(spec.layer for spec in self.specs)

    @property
    def examples(self) -> int:
        """Number of examples N."""
        return int(self.dataset["examples"])

    @property
    def items(self) -> int:
        """Activations per layer: item i + N v is view v of example i, and view 0 is the plain one."""
        return self.examples * (1 + self.form.views)

    @property
    def seen(self) -> Architecture:
        """What the backbone looks like through the tokens that are kept."""
        return reduction_of(self.form.tokens, self.architecture, self.form.seed).seen

    @property
    def ragged(self) -> bool:
        """Whether examples differ in their number of tokens, in some layer."""
        return any(spec.tokens is None for spec in self.specs)

    def facts(self) -> dict[str, Any]:
        """Plain JSON of everything that determines the bytes."""
        facts = {"format": FORMAT, **asdict(self)}
        seen = facts["architecture"].items()
        facts["architecture"] = {name: value for name, value in seen if value or name not in _SAID_WHERE_ANY}
        return facts

    def only(self, layers: Sequence[str]) -> "Manifest":
        """The facts of a store that holds no other layers."""
        specs = tuple(spec for spec in self.specs if spec.layer in layers)
        ragged = any(spec.tokens is None for spec in specs)
        return replace(self, specs=specs, rows=self.rows if ragged else self.items)

    @property
    def digest(self) -> str:
        """sha256 over the canonical JSON of the facts; names the folder."""
        return hashlib.sha256(canonical_json(self.facts()).encode()).hexdigest()

    @property
    def folder_name(self) -> str:
        """The store's folder: the first 16 hex digits are enough to tell stores apart."""
        return f"{self.digest[:16]}.zarr"

    def arrays(self) -> dict[str, ArrayLayout]:
        """Every array of the store by path; layouts are computed, never read from the store."""
        found: dict[str, ArrayLayout] = {}
        for spec in self.specs:
            rows: tuple[int, ...] = (self.rows,) if spec.tokens is None else (self.items, spec.tokens)
            shape = (*rows, spec.width)
            axes = ("item", "token", "width")[-len(shape) :]
            layer = ArrayLayout(shape, self.form.dtype, axes, self.form.compression)
            found[f"layers/{spec.layer}"] = layer
            if self.form.quantised:
                found[f"scales/{spec.layer}"] = ArrayLayout(shape[:-1], "float32", axes[:-1], beside=layer)
            if self.form.per_channel:
                found[f"channels/{spec.layer}"] = ArrayLayout((spec.width, 2), "float32", ("width", "centre_spread"))
        for spec in self.specs:
            shape = (self.items, 2, spec.width)
            found[f"pooled/{spec.layer}"] = ArrayLayout(shape, self.form.pooled_dtype, ("item", "token", "width"))
        found["targets"] = ArrayLayout((self.examples,), "int64", ("example",))
        if self.ragged:
            found["offsets"] = ArrayLayout((self.items + 1,), "int64", ("item",))
        return found

    def groups(self) -> tuple[str, ...]:
        """The zarr groups, by path; the first is the store itself."""
        named = dict.fromkeys(path.partition("/")[0] for path in self.arrays() if "/" in path)
        return ("", *named)

    def objects(self) -> dict[str, int | None]:
        """Every file that the manifest lists, by path, with its length where the facts fix it."""
        found: dict[str, int | None] = dict.fromkeys(self._plain_objects())
        for path, layout in self.arrays().items():
            found[f"{path}/zarr.json"] = len(layout.metadata().encode())
            found.update({f"{path}/{layout.chunk_key(chunk)}": layout.object_bytes for chunk in range(layout.chunks)})
        return found

    def _plain_objects(self) -> list[str]:
        return ["ids.json", *(f"{group}/zarr.json".lstrip("/") for group in self.groups())]

    @property
    def object_count(self) -> int:
        """How many `objects` there are, without listing them: a forged shape may claim more than memory holds."""
        return len(self._plain_objects()) + sum(1 + layout.chunks for layout in self.arrays().values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all chunk objects, before any compression."""
        return sum(layout.stored_bytes for layout in self.arrays().values())


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True)
class StoredObject:
    """One file of a store: its length and the crc32c of its payload."""

    bytes: int
    crc32c: int


def write_manifest(manifest: Manifest, objects: Mapping[str, StoredObject]) -> str:
    """The text of manifest.json: facts, their digest, and every object."""
    listed = {path: [o.bytes, o.crc32c] for path, o in sorted(objects.items())}
    document = {"digest": manifest.digest, "facts": manifest.facts(), "objects": listed}
    return json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def read_manifest(folder: Path) -> tuple[Manifest, dict[str, StoredObject]]:
    """Read and check manifest.json of a committed store: it is untrusted input.

    Raises SidebenchError when the store was never committed, is not ours, or its manifest contradicts itself.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise SidebenchError(
            f"{folder} is not a complete activation cache: it has no {MANIFEST}, so its build never finished. "
            "Run the same `bench cache build` again to resume it."
        )
    return parse_manifest(str(path), lambda: _text(path))


def _text(path: Path) -> str:
    if (size := path.stat().st_size) > _LARGEST_MANIFEST_BYTES:
        raise SidebenchError(f"it has {size} bytes, more than any manifest of ours.")
    return path.read_text("utf-8")


def parse_manifest(origin: str, text: Callable[[], str]) -> tuple[Manifest, dict[str, StoredObject]]:
    """Check a manifest wherever it was kept; `origin` names that place in the error. Raises SidebenchError."""
    try:
        document = json.loads(text())
        manifest = manifest_from_facts(document["facts"])
        objects = {str(key): StoredObject(_count(b), _count(c)) for key, (b, c) in document["objects"].items()}
        stated, digest = document["digest"], manifest.digest
        _check_objects(manifest, objects)
    except SidebenchError as error:
        raise SidebenchError(f"{origin} is refused: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise SidebenchError(f"{origin} is no manifest of format {FORMAT}: {type(error).__name__}: {error}") from None
    if stated != digest:
        raise SidebenchError(f"{origin} was altered: its facts hash to {digest[:16]}, it states {str(stated)[:16]!r}.")
    return manifest, objects


def manifest_from_facts(facts: Any) -> Manifest:
    """Rebuild a Manifest from its JSON. Raises SidebenchError (or a plain lookup error) on anything unexpected."""
    if facts["format"] != FORMAT:
        raise SidebenchError(f"its format is {str(facts['format'])[:60]!r}; this version reads {FORMAT!r}.")
    form = form_from_facts(facts["form"])
    specs = tuple(
        ActivationSpec(s["layer"], None if s["tokens"] is None else _count(s["tokens"], 1), _count(s["width"], 1))
        for s in facts["specs"]
    )
    for spec in specs:
        if not _LAYER_NAME.fullmatch(spec.layer) or ".." in spec.layer:
            raise SidebenchError(f"its layer name {spec.layer[:60]!r} could not be a folder of a store.")
    ragged = any(spec.tokens is None for spec in specs)
    if not specs or len({spec.layer for spec in specs}) != len(specs):
        raise SidebenchError("its layers are none, or repeated.")
    for name in ("backbone", "preprocessing", "dataset", "forward"):
        if not isinstance(facts[name], dict):
            raise SidebenchError(f"its {name} is no object.")
    examples, rows = _count(facts["dataset"]["examples"], 1), _count(facts["rows"], 1)
    items = examples * (1 + form.views)
    if rows < items or (rows != items and not ragged):
        raise SidebenchError(f"it holds {rows} rows for {items} items.")
    values = {k: v for k, v in facts.items() if k not in ("format", "architecture", "form", "specs", "rows")}
    made = Manifest(architecture=_architecture(facts["architecture"]), form=form, specs=specs, rows=rows, **values)
    reduction_of(form.tokens, made.architecture, form.seed)  # raises for one that is none
    return made


def differences(wanted: Manifest, found: Manifest) -> list[str]:
    """Which facts differ, as `field: wanted …, found …`; layers are left to `missing_layers`."""
    lines: list[str] = []
    a, b = wanted.facts(), found.facts()
    for field in ("architecture", "backbone", "preprocessing", "dataset", "forward", "form"):
        _compare(field, a[field], b[field], lines)
    return lines


def missing_layers(wanted: Sequence[str], found: Manifest) -> tuple[str, ...]:
    """Layers a reader wants that the store does not hold."""
    return tuple(layer for layer in wanted if layer not in found.layers)


def _compare(name: str, wanted: Any, found: Any, lines: list[str]) -> None:
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in sorted({*wanted, *found}):
            _compare(f"{name}.{key}", wanted.get(key), found.get(key), lines)
    elif wanted != found:
        lines.append(f"{name}: wanted {str(wanted)[:60]}, found {str(found)[:60]}")


def _architecture(values: Any) -> Architecture:
    stages = tuple((_count(height, 1), _count(width, 1)) for height, width in values.get("stages", ()))
    made = Architecture(**{**values, "stages": stages})
    optional_counts = [value for value in (made.heads, made.mlp_width, made.projected_from) if value is not None]
    for value in (made.width, made.prefix_tokens, *optional_counts):
        _count(value)
    texts = (made.name, made.final_layer, made.activation or "", made.norm or "", made.modality)
    if not (
        all(isinstance(text, str) for text in texts)
        and made.modality in get_args(Modality)
        and made.norm in (None, *get_args(Norm))
        and isinstance(made.norm_eps, float | int)
        and isinstance(made.layer_scale, bool)
        and isinstance(made.t5_blocks, bool)
        and isinstance(made.biasless, bool)
        and isinstance(made.bottlenecks, bool)
        and max(_count(made.blocks), _count(made.decoder_blocks)) <= _MOST_BLOCKS
        and len(stages) <= _MOST_BLOCKS
    ):
        raise SidebenchError("its architecture describes no backbone.")
    return made


def _check_objects(manifest: Manifest, objects: Mapping[str, StoredObject]) -> None:
    """Raise SidebenchError unless exactly the files that the facts imply are listed, each with its length."""
    if manifest.object_count != len(objects):
        raise SidebenchError(f"it lists {len(objects)} objects, its facts imply {manifest.object_count}.")
    for path, length in manifest.objects().items():
        if path not in objects:
            raise SidebenchError(f"it does not list {path}.")
        if length is not None and objects[path].bytes != length:
            raise SidebenchError(f"it states {objects[path].bytes} bytes for {path}, its facts imply {length}.")


def _count(value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _LARGEST_COUNT:
        raise SidebenchError(f"it holds {str(value)[:40]!r} where a count belongs.")
    return value
