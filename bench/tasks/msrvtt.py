"""MSR-VTT (Xu et al., CVPR 2016) from the files that CLIP4Clip (arXiv 2104.08860) trains and tests on.

`MSRVTT_train.9k.csv` or `.7k.csv` lists the training videos, whose sentences (twenty of each) `MSRVTT_data.json` holds;
`MSRVTT_JSFUSION_test.csv` has the 1,000 test videos of the split 1k-A with one sentence each. The published files have
no validation part and the reference picks its epoch by the test score. We never do: about a tenth of the training
videos, at most 1,000, validates instead, drawn by the hash of their names.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from ...cache.errors import SidebenchError, unknown
from .files import csv_lines
from .items import Item, folder_with, json_object, numbered
from .lists import existing
from .rows import id_order
from .videos import video_below

FORMS: Mapping[str, int] = {"9k": 9_000, "7k": 7_010}  # training videos of the published lists
_TEST, _TESTED = "MSRVTT_JSFUSION_test.csv", 1_000
_SENTENCES = "MSRVTT_data.json"
_SOURCE = "msrvtt_data.zip of CLIP4Clip's releases on GitHub"
_VIDEOS_SOURCE = "MSRVTT.zip, the raw videos that CLIP4Clip's README links to"
_FOLDERS = ("MSRVTT_Videos", "videos/all", "videos", "MSRVTT/videos/all")
_MOST = 1_000  # videos that validate


def read_msrvtt(form: str, root: Path, say: Callable[[str], None]) -> list[Item]:
    """Items of a form (`9k`, `7k`) below `root`; ids are the names of the videos, such as video7010."""
    if form not in FORMS:
        raise unknown("form of MSR-VTT", form, FORMS)
    folder = folder_with(root, (".", "msrvtt_data", "MSRVTT"), _TEST, _SOURCE)
    listed = folder / f"MSRVTT_train.{form}.csv"
    train = [row["video_id"] for row in _rows(listed, ("video_id",))]
    tested = {row["video_id"]: row["sentence"] for row in _rows(folder / _TEST, ("video_id", "sentence"))}
    for path, found, published in ((listed, train, FORMS[form]), (folder / _TEST, list(tested), _TESTED)):
        if len(found) != published:
            say(f"{path} lists {len(found)} videos; the published list has {published}.")
    said = _sentences(folder / _SENTENCES)
    held = validating(train)
    say(f"MSR-VTT has no validation part: {len(held)} of {len(train)} training videos validate, drawn by their names.")
    videos = next((root / name for name in _FOLDERS if (root / name).is_dir()), root / _FOLDERS[0])
    items = []
    for name in train:
        if name not in said:
            raise SidebenchError(f"{folder / _SENTENCES} has no sentence for {name!r}, which {listed} lists.")
        file = video_below(videos, name, _VIDEOS_SOURCE)
        items.append(Item(name, file, "val" if name in held else "train", numbered(name, said[name])))
    for name, sentence in tested.items():
        items.append(Item(name, video_below(videos, name, _VIDEOS_SOURCE), "test", numbered(name, [sentence])))
    return items


def validating(train: list[str]) -> set[str]:
    """The training videos that validate: the same ones whatever the order of the list."""
    count = min(_MOST, max(1, len(train) // 10))
    return set(sorted(train, key=lambda name: id_order("msrvtt", name))[:count])


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """These columns of a list of videos, each of which stands once."""
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for where, fields in csv_lines(existing(path, _SOURCE)):
        row = {column: str(fields.get(column, "")).strip() for column in columns}
        if "" in row.values():
            missing = next(column for column in columns if not row[column])
            raise SidebenchError(f"{where} has no {missing!r}; get the file anew, it comes with {_SOURCE}.")
        if row["video_id"] in seen:
            raise SidebenchError(f"{where} lists {row['video_id']!r} again; wanted every video once.")
        seen.add(row["video_id"])
        rows.append(row)
    if not rows:
        raise SidebenchError(f"{path} lists no videos; get it anew, it comes with {_SOURCE}.")
    return rows


def _sentences(path: Path) -> dict[str, list[str]]:
    """The sentences of every video, in order of the file."""
    entries = json_object(path, _SOURCE).get("sentences")
    if not isinstance(entries, list):
        raise SidebenchError(f"{path} has no list of 'sentences'; get it anew, it comes with {_SOURCE}.")
    found: dict[str, list[str]] = {}
    for number, entry in enumerate(entries):
        name, text = (entry.get("video_id"), entry.get("caption")) if isinstance(entry, dict) else (None, None)
        if not (isinstance(name, str) and isinstance(text, str)):
            raise SidebenchError(f"{path}: sentence {number} has no 'video_id' and 'caption' that are texts.")
        found.setdefault(name, []).append(text.strip())
    return found
