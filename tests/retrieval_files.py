"""Tiny retrieval sets in the forms in which the real ones are published."""

import csv
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

F30K_PARTS = {"train": 4, "dev": 2, "test": 3}
COCO_PARTS = {"train": 4, "dev": 2, "test": 2, "testall": 5}
_FIRST = {"train": 1000, "dev": 2000, "test": 3000, "testall": 3000}  # ids: COCO's `test` is the start of `testall`


def write_image(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_karpathy(root: Path, name: str, parts: Mapping[str, int], *, repeated: bool = False) -> Path:
    """Folder `name` below `root`; image n of a part has the captions "PART image n caption 0" to 4.

    `repeated` writes an image's id once per caption, as older files do.
    """
    folder = root / name
    (folder / "precomp").mkdir(parents=True)
    mapping: dict[str, str] = {}
    for part, count in parts.items():
        ids = [_FIRST[part] + n for n in range(count)]
        texts = [f"{part} image {n} caption {k}" for n in range(count) for k in range(5)]
        write_lines(folder / "precomp" / f"{part}_ids.txt", [i for i in ids for _ in range(5 if repeated else 1)])
        write_lines(folder / "precomp" / f"{part}_caps.txt", texts)
        mapping |= {str(i): f"val2014/COCO_val2014_{i:012d}.jpg" if name == "coco" else f"{i}.jpg" for i in ids}
    for number, file in mapping.items():
        write_image(folder / ("images" if name == "coco" else "flickr30k-images") / file, int(number))
    (folder / "id_mapping.json").write_text(json.dumps(mapping))
    return folder


def write_lines(path: Path, lines: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_video(path: Path, greys: Sequence[int], *, rate: int = 5, codec: str = "mpeg4", bframes: int = 0) -> Path:
    """A video of 32 x 32 pixels that shows every grey for a second."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"bf": str(bframes)} if bframes else {})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for grey in np.repeat(greys, rate):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), grey, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_msrvtt(root: Path, train: int, test: int, *, form: str = "9k", each: int = 4, videos: bool = True) -> Path:
    """The files of CLIP4Clip: video n of train is video<n>, of two seconds; the test videos follow."""
    names = [f"video{n}" for n in range(train + test)]
    write_lines(root / f"MSRVTT_train.{form}.csv", ["video_id", *names[:train]])
    sentences = [
        {"caption": f"{name} caption {k}", "video_id": name, "sen_id": len(names) * k + n}
        for k in range(each)
        for n, name in enumerate(names)
    ]
    facts = [{"video_id": name, "url": "https://example.org", "id": n} for n, name in enumerate(names)]
    (root / "MSRVTT_data.json").write_text(json.dumps({"videos": facts, "sentences": sentences}))
    with (root / "MSRVTT_JSFUSION_test.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["key", "vid_key", "video_id", "sentence"])
        writer.writerows(
            [f"ret{n}", f"msr{n}", name, f"the test sentence, of {name}"] for n, name in enumerate(names[train:])
        )
    if videos:
        for n, name in enumerate(names):
            write_video(root / "MSRVTT_Videos" / f"{name}.mp4", [10 + n, 100 + n])
    return root


MSVD_PARTS = {"train": 3, "val": 1, "test": 2}


def write_msvd(root: Path, parts: Mapping[str, int] = MSVD_PARTS, *, protocol: int = 2) -> Path:
    """The files of CLIP4Clip: PART-n_0_9 has n + 2 captions and is a video of n + 1 seconds."""
    captions = {}
    for part, count in parts.items():
        names = [f"{part}-{n}_0_9" for n in range(count)]
        write_lines(root / f"{part}_list.txt", names)
        for n, name in enumerate(names):
            captions[name] = [f"{part} video {n} caption {k}".split() for k in range(n + 2)]
            write_video(root / "MSVD_Videos" / f"{name}.avi", list(range(50, 51 + n)))
    (root / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol=protocol))
    return root
