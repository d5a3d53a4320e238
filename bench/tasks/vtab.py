"""The 19 tasks of VTAB-1k (Zhai et al., arXiv 1910.04867) from the lists that NOAH and SSF share as vtab-1k.

A task's folder holds train800.txt, val200.txt, train800val200.txt and test.txt with lines "path label". The lists name
every class of the published head by its number, and some classes lack training examples: the head is as wide as
published all the same. The literature has two averages, over 19 tasks and over three group means, some points apart.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...cache.errors import SidebenchError, unknown
from .lists import Listed, listed_rows, read_list
from .rows import Rows

_SOURCE = "vtab-1k.tar of NOAH or SSF"
_PARTS = {"train": ("train800.txt", 800), "val": ("val200.txt", 200)}  # and what the published lists hold
_UNION, _TEST = "train800val200.txt", "test.txt"


@dataclass(frozen=True)
class VtabTask:
    """A task: its group, the width of its head, and what it is called besides the name of its published folder."""

    folder: str
    group: str
    num_classes: int
    aliases: tuple[str, ...] = ()


VTAB: Mapping[str, VtabTask] = {
    task.folder: task
    for task in (
        VtabTask("caltech101", "natural", 102, ("caltech",)),
        VtabTask("cifar", "natural", 100, ("cifar100",)),
        VtabTask("dtd", "natural", 47),
        VtabTask("oxford_flowers102", "natural", 102, ("flowers102", "flowers", "oxford_flowers")),
        VtabTask("oxford_iiit_pet", "natural", 37, ("pets", "oxford_pet", "oxford_pets")),
        VtabTask("svhn", "natural", 10),
        VtabTask("sun397", "natural", 397),
        VtabTask("patch_camelyon", "specialised", 2, ("camelyon", "pcam")),
        VtabTask("eurosat", "specialised", 10),
        VtabTask("resisc45", "specialised", 45, ("resisc",)),
        VtabTask("diabetic_retinopathy", "specialised", 5, ("retinopathy",)),
        VtabTask("clevr_count", "structured", 8),
        VtabTask("clevr_dist", "structured", 6, ("clevr_distance",)),
        VtabTask("dmlab", "structured", 6),
        VtabTask("kitti", "structured", 4, ("kitti_dist", "kitti_distance")),
        VtabTask("dsprites_loc", "structured", 16, ("dsprites_location",)),
        VtabTask("dsprites_ori", "structured", 16, ("dsprites_orientation",)),
        VtabTask("smallnorb_azi", "structured", 18, ("smallnorb_azimuth",)),
        VtabTask("smallnorb_ele", "structured", 9, ("smallnorb_elevation",)),
    )
}
GROUPS = tuple(dict.fromkeys(task.group for task in VTAB.values()))
SUITES = ("all", *GROUPS)
_BY_NAME = {name: task for task in VTAB.values() for name in (task.folder, *task.aliases)}


def vtab_task(name: str) -> VtabTask:
    """The task of a published folder's name or a usual other one. Raises SidebenchError for another."""
    if name in SUITES:
        raise SidebenchError(f"vtab:{name} stands for several tasks, which only `bench compare` runs; name one here.")
    key = name.casefold().replace("-", "_")
    if key not in _BY_NAME:
        raise unknown("VTAB task", name, _BY_NAME)
    return _BY_NAME[key]


def read_vtab(task: VtabTask, root: Path, say: Callable[[str], None]) -> Rows:
    """Rows of a task below `root`, which is the folder vtab-1k or holds it; ids are the listed paths."""
    folder = _folder(task, root)
    parts: dict[str, Listed] = {}
    for part, (name, published) in _PARTS.items():
        parts[part] = read_list(folder / name, task.num_classes, _SOURCE, say)
        if len(parts[part]) != published:
            say(f"{folder / name} lists {len(parts[part])} images; the published list has {published}.")
    _check_union(folder, read_list(folder / _UNION, task.num_classes, _SOURCE, say), parts)
    parts["test"] = read_list(folder / _TEST, task.num_classes, _SOURCE, say)
    return listed_rows(parts, folder, _SOURCE, tuple(map(str, range(task.num_classes))))


def _folder(task: VtabTask, root: Path) -> Path:
    below = [root, root / "vtab-1k"]
    for folder in (top / name for top in below for name in (task.folder, *task.aliases)):
        if folder.is_dir():
            return folder
    raise SidebenchError(f"there is no folder {root / task.folder}; ?root=FOLDER is what {_SOURCE} unpacks to.")


def _check_union(folder: Path, union: Listed, parts: Mapping[str, Listed]) -> None:
    """That the list to retrain on is the other two together.

    NOAH's script writes the images of every list into a folder of its own, so of its copies only labels can tell.
    """
    both = [pair for listed in parts.values() for pair in listed.items()]
    apart = not any(name in union for name, _ in both)
    same = (
        Counter(union.values()) == Counter(label for _, label in both)
        if apart
        else sorted(union.items()) == sorted(both)
    )
    if not same:
        lists = " and ".join(name for name, _ in _PARTS.values())
        raise SidebenchError(f"{folder / _UNION} is not {lists} together; get the lists anew from {_SOURCE}.")
