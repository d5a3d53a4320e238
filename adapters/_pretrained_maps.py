"""From the tensors of a pre-trained module to those of one of other size: by name and shape, or as --map-init says."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.errors import SidebenchError

MAPPINGS = {
    "prompts": "another number of prompts: the first ones, or all of them over and over",
    "layers": "another number of blocks: those of the last blocks under @lastK, else matched by relative depth",
}


@dataclass(frozen=True)
class Blocks:
    """How many blocks the file's modules and ours are for; `tail`: ours are the last ones of the same network."""

    theirs: int
    ours: int
    tail: bool

    def source(self, block: int) -> int:
        """The file's block for ours: as many from the end, or at the nearest relative depth (the last for the only)."""
        if self.tail:
            return block + self.theirs - self.ours
        if self.ours == 1:
            return self.theirs - 1
        return (2 * block * (self.theirs - 1) + self.ours - 1) // (2 * (self.ours - 1))

    def places(self, theirs: int, ours: int) -> list[int] | None:
        """For each of `ours` things the file's one: equally many per block, or one more, which is what enters block 0.

        None where that is not what they are; the same ones where they are as many.
        """
        if theirs == ours:
            return list(range(ours))
        if self.theirs < 1:
            return None
        for before in (0, 1):
            each, rest = divmod(theirs - before, self.theirs)
            if each and not rest and ours - before == each * self.ours:
                behind = [before + self.source(b) * each + i for b in range(self.ours) for i in range(each)]
                return [*range(before), *behind]
        return None


def adopted(
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    blocks: Blocks,
    prompts: tuple[int | None, int | None],
    mappings: Collection[str],
    path: str,
) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors under our names and in our shapes, and sentences on what was mapped. `prompts`: theirs, ours.

    Raises SidebenchError naming the first tensor that does not fit.
    """
    by_block = "layers" in mappings and blocks.theirs != blocks.ours
    sources = _by_block(theirs, ours, blocks) if by_block else {name: name for name in ours}
    lacking = [name for name in ours if sources.get(name) not in theirs]
    foreign = [] if by_block else sorted(set(theirs) - set(ours))
    if lacking or foreign:
        what = f"it lacks {lacking[0]}" if lacking else f"it holds {foreign[0]}, which this module has not"
        raise SidebenchError(f"{path} does not fit: {what}; it was made for another network.")
    found = {}
    for name, tensor in ours.items():
        source = theirs[sources[name]]
        fitted = _fitted(source, tensor.shape, blocks if by_block else None, prompts if "prompts" in mappings else None)
        if fitted is None or fitted.dtype != tensor.dtype:
            raise SidebenchError(
                f"{path} does not fit: {name} is {tuple(source.shape)} of {str(source.dtype).removeprefix('torch.')} "
                f"in the file and {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')} here."
            )
        found[name] = fitted
    return found, _said(blocks if by_block else None, prompts if "prompts" in mappings else (None, None))


def _by_block(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], blocks: Blocks) -> dict[str, str]:
    """The file's name for each of ours: the first number in a name says the place, in sorted order on both sides."""
    groups_theirs, groups_ours = _numbered(theirs), _numbered(ours)
    sources = {name: name for name in ours if _parts(name) is None}
    for template, numbers in groups_ours.items():
        known = groups_theirs.get(template, [])
        places = blocks.places(len(known), len(numbers))
        if places is not None:
            pairs = zip(numbers, places, strict=True)
            sources |= {_named(template, number): _named(template, known[place]) for number, place in pairs}
    return sources


Template = tuple[str, str]  # what stands before and behind the number


def _parts(name: str) -> tuple[Template, int] | None:
    pieces = name.split(".")
    for place, piece in enumerate(pieces):
        if piece.isdecimal() and len(piece) < 6:
            return (".".join(pieces[:place]), ".".join(pieces[place + 1 :])), int(piece)
    return None


def _named(template: Template, number: int) -> str:
    return ".".join(piece for piece in (template[0], str(number), template[1]) if piece)


def _numbered(names: Mapping[str, Tensor]) -> dict[Template, list[int]]:
    found: dict[Template, list[int]] = {}
    for name in names:
        if (parts := _parts(name)) is not None:
            found.setdefault(parts[0], []).append(parts[1])
    return {template: sorted(numbers) for template, numbers in found.items()}


def _fitted(
    source: Tensor, shape: Sequence[int], blocks: Blocks | None, prompts: tuple[int | None, int | None] | None
) -> Tensor | None:
    """`source` in `shape`; None where no mapping leads there."""
    if source.ndim != len(shape):
        return None
    for dim, wanted in enumerate(shape):
        if source.shape[dim] == wanted:
            continue
        places: list[int] | None = None
        if dim == 0 and blocks is not None:
            places = blocks.places(source.shape[0], wanted)
        elif dim and prompts == (source.shape[dim], wanted):
            places = [place % source.shape[dim] for place in range(wanted)]
        if places is None:
            return None
        source = source.index_select(dim, torch.tensor(places))
    return source


def _said(blocks: Blocks | None, prompts: tuple[int | None, int | None]) -> list[str]:
    said = []
    if blocks is not None:
        pairs = ", ".join(f"{block} from {blocks.source(block)}" for block in range(blocks.ours))
        said.append(f"layers: of the file's {blocks.theirs} blocks, block {pairs}")
    theirs, ours = prompts
    if theirs is not None and ours is not None and theirs != ours:
        how = f"the first {ours} of {theirs}" if ours < theirs else f"the {theirs} over and over, up to {ours}"
        said.append(f"prompts: {how}")
    return said
