"""Modules that `bench pretrain` trained, in a safetensors file: what it holds, and how strictly it is taken up.

Pre-trained modules in place of random ones: PVP (Song, Yang, Guan, Zhu, Qiao, Hu; arXiv 2304.13639). The file holds
what a method trains in its body and the batch norms' statistics, never a head and never a frozen weight; beside them,
as JSON in the metadata, what they are, and the hashes of the examples they were trained on. The format is ours.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.errors import SidebenchError, unknown
from ..cache.manifest import canonical_json
from ..cache.packages import sha256_of
from ._base import trained
from ._pretrained_facts import Facts, facts_from
from ._pretrained_maps import MAPPINGS, Blocks, adopted

HASH_BYTES = 16  # of each source example's sha256: a wrong match among 2^32 pairs has odds of 2^-96
_FACTS = "sidebench"  # the one key of the metadata: several would be written in no fixed order
_HASHES = "/source_hashes"  # (N, 16) bytes, sorted; the slash keeps it apart from the name of any parameter
# What does not change what the modules compute: how they are trained, where they start, and what is kept for backward.
_OF_TRAINING = ("lr", "weight_decay", "schedule", "warm_up", "optimizer", "checkpointing", "lean")
TRAINING_ONLY = frozenset((*_OF_TRAINING, "init", "fisher_examples", "spread"))


@dataclass(frozen=True)
class Pretrained:
    """A file that was found sound: its facts, and its tensors by name, of which only the sizes are read so far."""

    path: Path
    sha256: str
    facts: Facts
    shapes: Mapping[str, tuple[tuple[int, ...], str]]  # shape and safetensors' dtype

    def tensors(self) -> dict[str, Tensor]:
        """The module's tensors. Raises SidebenchError for a number that is not finite."""
        with _opened(self.path) as file:
            found = {name: file.get_tensor(name) for name in self.shapes}
        for name, tensor in found.items():
            if not torch.isfinite(tensor).all():
                raise SidebenchError(f"{self.path} is refused: its {name} holds a number that is not finite.")
        return found

    def source_hashes(self) -> set[bytes]:
        """The first bytes of each source example's sha256."""
        with _opened(self.path) as file:
            return {bytes(row) for row in file.get_tensor(_HASHES).numpy()}


def module_tensors(body: nn.Module) -> dict[str, Tensor]:
    """What training changes in a body: its trained parameters, and the statistics of the norms among them."""
    parameters = trained(body)
    owners = {name.rpartition(".")[0] for name in parameters}
    buffers = {
        name: buffer
        for name, buffer in body.named_buffers()
        if name.rpartition(".")[0] in owners and buffer.is_floating_point()
    }
    return {name: tensor.detach() for name, tensor in {**parameters, **buffers}.items()}


def save_pretrained(path: Path, body: nn.Module, facts: Facts, hashes: Tensor) -> None:
    """Write the file, whole or not at all; equal facts and tensors give equal bytes. `hashes`: (N, 16) uint8."""
    from safetensors.torch import save

    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in module_tensors(body).items()}
    tensors[_HASHES] = torch.unique(hashes, dim=0)  # sorted, so their order tells nothing
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save(tensors, {_FACTS: canonical_json(facts.document())}))
        os.replace(temporary, path)
    except OSError as error:
        raise SidebenchError(f"cannot write {path} ({error.strerror or error}); choose another --out.") from error
    finally:
        with suppress(OSError):  # gone, where all went well
            temporary.unlink()


def read_pretrained(path: Path) -> Pretrained:
    """Read what a file says of itself, which is untrusted, and the sizes of its tensors, but none of them.

    Raises SidebenchError when it is no file of ours, naming the field.
    """
    with _opened(path) as file:
        text = (file.metadata() or {}).get(_FACTS)
        if text is None:
            raise SidebenchError(f"{path} was not made by `bench pretrain`: its metadata lack {_FACTS!r}.")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: (tuple(found.get_shape()), str(found.get_dtype())) for name, found in slices.items()}
    try:
        facts = facts_from(text)
        hashes = shapes.pop(_HASHES, None)
        if hashes is None or hashes[1] != "U8" or hashes[0][1:] != (HASH_BYTES,):
            raise SidebenchError(f"its tensor {_HASHES} is not (N, {HASH_BYTES}) bytes, one row per source example.")
        if not shapes:
            raise SidebenchError("it holds no tensor of a module.")
    except SidebenchError as error:
        raise SidebenchError(f"{path} is refused: {error}") from None
    return Pretrained(path, sha256_of(path), facts, shapes)


def check_fit(file: Pretrained, wanted: Facts, mappings: Collection[str] = ()) -> None:
    """Refuse modules of another method, backbone or network than `wanted`, before anything runs.

    `wanted` needs only the fields that are compared. What a mapping asked for bridges is let through; what neither
    the method, the backbone nor an option of the network shows is left to `load_into`.
    """
    for mapping in mappings:
        if mapping not in MAPPINGS:
            raise unknown("mapping in --map-init", mapping, MAPPINGS)
    found, key = file.facts, wanted.method

    def refuse(field: str, theirs: object, ours: object, advice: str) -> SidebenchError:
        return SidebenchError(
            f"{file.path} does not fit {key}: {field} is {str(theirs)[:60]} in the file and {str(ours)[:60]} here; "
            f"{advice}."
        )

    if found.method != key:
        raise refuse("method", found.method, key, f"give {found.method}@{file.path}, or pre-train {key}")
    _check_backbone(file, wanted, mappings, refuse)
    for option in sorted({*found.config, *wanted.config} - TRAINING_ONLY):
        theirs, ours = found.config.get(option, "not there"), wanted.config.get(option, "not there")
        if theirs == ours or (option in mappings and option == "prompts"):
            continue
        typed = str(theirs).lower() if isinstance(theirs, bool) else theirs
        advice = f"type --set {key}.{option}={typed}" if option in wanted.config and option in found.config else ""
        if option == "prompts":
            advice += ", or --map-init prompts to take the first ones, or repeat them"
        raise refuse(f"{key}.{option}", theirs, ours, advice or "pre-train again with this version")


def _check_backbone(
    file: Pretrained,
    wanted: Facts,
    mappings: Collection[str],
    refuse: Callable[[str, object, object, str], SidebenchError],
) -> None:
    found = file.facts
    ours, theirs = wanted.backbone, found.backbone
    by_depth = found.last is None and wanted.last is None and theirs["blocks"] != ours["blocks"]
    if theirs["weights_sha256"] != ours["weights_sha256"]:
        if not (by_depth and "layers" in mappings):
            name = theirs["name"]
            same = f"the weights of {name}" if name == ours["name"] else name
            hint = ", or --map-init layers to match blocks by depth" if by_depth else ""
            advice = f"it was pre-trained on {same}; give that backbone, or pre-train on this one{hint}"
            raise refuse(
                "backbone.weights_sha256", theirs["weights_sha256"][:16], str(ours["weights_sha256"])[:16], advice
            )
        for field in ("name", "width"):
            if theirs[field] != ours[field]:
                raise refuse(f"backbone.{field}", theirs[field], ours[field], "blocks are matched within one family")
        return
    if found.last == wanted.last:
        return
    here, there = (f"the last {last}" if last else "every block" for last in (wanted.last, found.last))
    if wanted.last is None or found.blocks < wanted.last:
        typed = f"{found.method}@last{found.last}@{file.path}"
        raise refuse("blocks", there, here, f"type {typed}, or pre-train {wanted.method} on as many blocks")
    if "layers" not in mappings:
        raise refuse("blocks", there, here, f"type --map-init layers to take those of the last {wanted.last}")


def load_into(body: nn.Module, file: Pretrained, wanted: Facts, mappings: Collection[str] = ()) -> list[str]:
    """Put the tensors into a body that was built, and say what was mapped; nothing is drawn, nothing else changes.

    Raises SidebenchError naming the tensor when names, shapes or dtypes differ; the body is then as it was.
    """
    check_fit(file, wanted, mappings)
    ours = module_tensors(body)
    blocks = Blocks(file.facts.blocks, wanted.blocks, tail=wanted.last is not None)
    prompts = file.facts.config.get("prompts"), wanted.config.get("prompts")
    loaded, said = adopted(file.tensors(), ours, blocks, prompts, mappings, str(file.path))
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(loaded[name])
    return said


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file by safetensors, which checks offsets against the length; its errors become sentences."""
    from safetensors import SafetensorError, safe_open

    reader: Callable[..., Any] = safe_open
    try:
        with reader(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SidebenchError(f"{path} cannot be read as safetensors: {why}.") from None
