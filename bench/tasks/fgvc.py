"""Fine-grained image tasks in two published forms: VPT's splits as JSON, and NOAH's few-shot lists.

VPT (arXiv 2203.12119) ships train.json, val.json and test.json of five sets, {path of an image: class id}. Ids become
0, 1, … in sorted order over all three files; VPT's own code sorts each file's, which agrees only while every file has
every class. NOAH (arXiv 2206.04673) ships lists of 1 to 16 images per class of five sets, each for three seeds.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...cache.errors import SidebenchError, unknown
from .files import text_lines
from .lists import Listed, existing, listed_rows, read_list
from .rows import Rows

_SPLITS = "VPT's splits of FGVC (vptfgvcsplits), to be put beside the set's own images"
_LISTS = "data/few-shot of NOAH, to be put as few-shot_split beside the folders of images"


@dataclass(frozen=True)
class FgvcTask:
    """A set: its published number of classes, the folder of its images and what its own folder is called."""

    num_classes: int
    images: str = ""
    folders: tuple[str, ...] = ()


FGVC: Mapping[str, FgvcTask] = {
    "cub": FgvcTask(200, "images", ("CUB_200_2011", "CUB200")),
    "nabirds": FgvcTask(555, "images"),
    "flowers": FgvcTask(102, "", ("OxfordFlowers", "OxfordFlower", "oxford_flowers102", "flowers102")),
    "dogs": FgvcTask(120, "Images", ("StanfordDogs",)),
    "cars": FgvcTask(196, "", ("StanfordCars",)),
}
FEW_SHOT: Mapping[str, FgvcTask] = {
    "fgvc-aircraft": FgvcTask(100, folders=("aircraft",)),
    "food101": FgvcTask(101, folders=("food",)),
    "oxford-flowers102": FgvcTask(102, folders=("flowers", "flowers102", "oxford-flowers")),
    "oxford-pets": FgvcTask(37, folders=("pets",)),
    "standford-cars": FgvcTask(196, folders=("cars", "stanford-cars")),  # the published folder is spelt so
}


def read_fgvc(name: str, root: Path, shots: str | None, seed: str | None, say: Callable[[str], None]) -> Rows:
    """Rows of a set: of NOAH's lists where `shots` are given, else of VPT's splits. Ids are the listed paths."""
    if shots is None:
        if seed is not None:
            raise SidebenchError("?seed chooses a few-shot list; give ?shots=K with it.")
        return _read_splits(_named("FGVC task", name, FGVC), root, say)
    return _read_few(
        _named("few-shot task", name, FEW_SHOT), root, _whole("shots", shots), _whole("seed", seed or "0"), say
    )


def _named(kind: str, name: str, tasks: Mapping[str, FgvcTask]) -> str:
    if name == "all":
        raise SidebenchError("fgvc:all stands for several tasks, which only `bench compare` runs; name one here.")
    by_name = {_plain(other): key for key, task in tasks.items() for other in (key, *task.folders)}
    if _plain(name) not in by_name:
        if kind == "FGVC task" and any(_plain(name) == _plain(other) for other in FEW_SHOT):
            raise SidebenchError(f"{name} has few-shot lists only; type fgvc:{name}?root=FOLDER&shots=K&seed=S.")
        raise unknown(kind, name, tasks)
    return by_name[_plain(name)]


def _plain(name: str) -> str:
    """A name without case and punctuation: StanfordDogs, stanford-dogs and stanford_dogs are one."""
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _whole(option: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise SidebenchError(f"?{option} wants a whole number; found {text[:40]!r}.")
    return int(text)


def _read_splits(name: str, root: Path, say: Callable[[str], None]) -> Rows:
    task, folder = FGVC[name], _folder(name, root)
    parts = {part: _read_split(folder / f"{part}.json") for part in ("train", "val", "test")}
    found = len({label for listed in parts.values() for label in listed.values()})
    if found > task.num_classes:
        raise SidebenchError(f"{folder} has {found} classes; {name} has {task.num_classes}. Is it another set?")
    if found < task.num_classes:
        say(f"{folder} has {found} classes; the published set has {task.num_classes}.")
    return listed_rows(parts, folder / task.images, _SPLITS)


def _folder(name: str, root: Path) -> Path:
    """The folder of a set: `root` itself, or one in it that is called as the set."""
    if (root / "train.json").is_file():
        return root
    names = {_plain(other) for other in (name, *FGVC[name].folders)}
    below = sorted(root.iterdir()) if root.is_dir() else []
    for folder in below:
        if folder.is_dir() and _plain(folder.name) in names:
            return folder
    raise SidebenchError(
        f"there is no train.json in {root} and no folder of {name} ({', '.join((name, *FGVC[name].folders))}); "
        f"train.json, val.json and test.json come with {_SPLITS}."
    )


def _read_split(path: Path) -> Listed:
    text = "".join(line for _, line in text_lines(existing(path, _SPLITS)))
    try:
        found = json.loads(text, object_pairs_hook=lambda pairs: _unrepeated(path, pairs))
    except (ValueError, RecursionError) as error:
        raise SidebenchError(f"{path} is no valid JSON ({error}).") from error
    if not isinstance(found, dict) or not found:
        raise SidebenchError(f'{path} is no object such as {{"images/1.jpg": 3}}, or an empty one.')
    for name, label in found.items():
        if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
            raise SidebenchError(f"{path}: the class of {name!r} is {json.dumps(label)[:40]}; wanted a class id.")
    return {name: str(label) for name, label in found.items()}


def _unrepeated(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; of a name that stands there twice, Python would keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise SidebenchError(
            f"{path} lists {next(n for n in names if names.count(n) > 1)!r} twice; images must differ."
        )
    return found


def _read_few(name: str, root: Path, shots: int, seed: int, say: Callable[[str], None]) -> Rows:
    count, lists = FEW_SHOT[name].num_classes, root / "few-shot_split" / name / "annotations"
    train = lists / f"train_meta.list.num_shot_{shots}.seed_{seed}"
    if lists.is_dir() and not train.is_file():
        there = ", ".join(sorted(path.name for path in lists.glob("train_meta.list.num_shot_*"))) or "none"
        raise SidebenchError(f"there is no list {train}; there are {there}.")
    files = {"train": train, "val": lists / "val_meta.list", "test": lists / "test_meta.list"}
    parts = {part: read_list(path, count, _LISTS, say) for part, path in files.items()}
    return listed_rows(parts, root / name, _LISTS, tuple(map(str, range(count))))
