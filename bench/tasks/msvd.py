"""MSVD (Chen and Dolan, ACL 2011) from the files that CLIP4Clip (arXiv 2104.08860) trains and tests on.

`train_list.txt`, `val_list.txt` and `test_list.txt` name 1,200, 100 and 670 videos, and `raw-captions.pkl` holds some
forty captions of each as lists of words. Every caption of a test video searches on its own, and a video is found by the
best of its captions, as the literature counts.
"""

from collections.abc import Callable
from pathlib import Path

from ...cache.errors import SidebenchError
from .items import Item, folder_with, listed_lines, numbered
from .lists import existing
from .plain_pickle import read_lists
from .videos import video_below

_PARTS = {"train": 1_200, "val": 100, "test": 670}  # videos of the published lists
_CAPTIONS = "raw-captions.pkl"
_SOURCE = "msvd_data.zip of CLIP4Clip's releases on GitHub"
_VIDEOS_SOURCE = "YouTubeClips.tar, which CLIP4Clip's README links to"
_FOLDERS = ("MSVD_Videos", "YouTubeClips", "videos")


def read_msvd(root: Path, say: Callable[[str], None]) -> list[Item]:
    """Items below `root`; ids are the names of the videos, such as -4wsuPCjDBc_5_15."""
    folder = folder_with(root, (".", "msvd_data", "MSVD"), _CAPTIONS, _SOURCE)
    captions = read_lists(existing(folder / _CAPTIONS, _SOURCE))
    videos = next((root / name for name in _FOLDERS if (root / name).is_dir()), root / _FOLDERS[0])
    items, wordless = [], 0
    for part, published in _PARTS.items():
        path = folder / f"{part}_list.txt"
        names = listed_lines(path, _SOURCE)
        if len(names) != published:
            say(f"{path} lists {len(names)} videos; the published list has {published}.")
        for name in names:
            if not captions.get(name):
                raise SidebenchError(f"{folder / _CAPTIONS} has no captions of {name!r}, which {path} lists.")
            texts = [text for words in captions[name] if (text := " ".join(words).strip())]
            wordless += len(captions[name]) - len(texts)
            items.append(Item(name, video_below(videos, name, _VIDEOS_SOURCE), part, numbered(name, texts)))
    if wordless:
        say(f"{folder / _CAPTIONS}: {wordless} captions without a word are left out.")
    return items
