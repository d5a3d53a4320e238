"""Tiny tasks in the official files of VQA v2 and GQA (LXMERT's), and of RefCOCO, RefCOCO+ and RefCOCOg (MDETR's)."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sidebench.bench.tasks.refcoco import REFCOCO

ANSWERS = ("yes", "no", "2", "red", "blue")
COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200)}


def write_json(path: Path, value: object) -> None:
    """Any JSON, as official files have it: on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def write_picture(path: Path, colour: str = "red", size: tuple[int, int] = (48, 32)) -> None:
    """A noisy picture of mostly one colour."""
    draw = np.random.default_rng(zlib.crc32(path.name.encode()))
    pixels = draw.integers(0, 50, size=(size[1], size[0], 3)) + np.array(COLOURS[colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_vocabulary(folder: Path, answers: Sequence[str] = ANSWERS) -> None:
    """trainval_label2ans.json and trainval_ans2label.json."""
    write_json(folder / "trainval_label2ans.json", list(answers))
    write_json(folder / "trainval_ans2label.json", {answer: i for i, answer in enumerate(answers)})


def write_vqa(root: Path, images: Mapping[str, int] | None = None) -> str:
    """VQA v2 with two questions an image, one of them of two half right answers; `images`: how many each file is of.

    All four question files are there, and what ten people answered to those of minival. Returns its URI.
    """
    folder, counts = root / "data" / "vqa", images or {"train": 4, "nominival": 3, "minival": 2, "test": 1}
    write_vocabulary(folder)
    number = 0
    for name, count in counts.items():
        year = {"train": "train2014", "test": "test2015"}.get(name, "val2014")
        items: list[dict[str, Any]] = []
        for _ in range(count):
            number += 1
            colour, image = list(COLOURS)[number % 2], f"COCO_{year}_{number:012d}"
            write_picture(root / "data" / "mscoco" / year / f"{image}.jpg", colour)
            items += _asked(image, number, colour, labelled=name != "test")
        write_json(folder / f"{name}.json", items)
        if name == "minival":
            write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": list(map(_annotated, items))})
    return f"vqa2:v2?root={root}"


def _asked(image: str, number: int, colour: str, *, labelled: bool) -> list[dict[str, Any]]:
    first = {"question_id": number * 1000, "img_id": image, "sent": "What colour is this?"}
    second = {"question_id": number * 1000 + 1, "img_id": image, "sent": "Is this red?"}
    if not labelled:
        return [first, second]
    kind = {"question_type": "what", "answer_type": "other"}
    yes, no = (0.9, 0.3) if colour == "red" else (0.3, 0.9)
    return [{**first, **kind, "label": {colour: 1}}, {**second, **kind, "label": {"yes": yes, "no": no}}]


def _annotated(item: dict[str, Any]) -> dict[str, Any]:
    """Ten people, of whom ten, or three, or one, gave an answer that scores 1, 0.9 or 0.3."""
    given = [answer for answer, score in item["label"].items() for _ in range({1: 10, 0.9: 3, 0.3: 1}[score])]
    given += ["unsure"] * (10 - len(given))
    answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(given)]
    return {"question_id": item["question_id"], "image_id": 1, "answers": answers}


def write_gqa(root: Path, images: Mapping[str, int] | None = None) -> str:
    """GQA with two questions an image; `images`: how many each file is of. Returns its URI."""
    folder, counts = root / "data" / "gqa", images or {"train": 4, "valid": 3, "testdev": 2, "submit": 1}
    write_vocabulary(folder)
    number = 0
    for name, count in counts.items():
        items: list[dict[str, Any]] = []
        for _ in range(count):
            number += 1
            colour, image = list(COLOURS)[number % 2], f"n{number}" if number % 3 else f"{number}"
            write_picture(folder / "images" / f"{image}.jpg", colour)
            asked = {"What colour is this?": colour, "Is this red?": "yes" if colour == "red" else "no"}
            for i, (text, answer) in enumerate(asked.items()):
                label = {} if name == "submit" else {"label": {answer: 1.0}}
                items.append({"img_id": image, "question_id": f"0{number}{i}", "sent": text, **label})
        write_json(folder / f"{name}.json", items)
    return f"gqa:balanced?root={root}"


def write_refcoco(
    root: Path, name: str = "refcoco", images: Mapping[str, int] | None = None, test: str | None = None
) -> str:
    """A set in MDETR's annotations, with two expressions an image. Returns the URI of the part `test` (or the last)."""
    counts = images or {file: 3 if file == "train" else 2 for file in REFCOCO[name]}
    number = 0
    for file, count in counts.items():
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for _ in range(count):
            number += 1
            picture = f"COCO_train2014_{number:012d}.jpg"
            write_picture(root / "train2014" / picture, list(COLOURS)[number % 2])
            for side, left in (("left", 1.5), ("right", 24.0)):
                _add_expression(entries, annotations, picture, number, name, (f"the {side} half", left))
        write_json(
            root / "mdetr_annotations" / f"finetune_{name}_{file}.json",
            {"info": [], "licenses": [], "images": entries, "annotations": annotations, "categories": []},
        )
    return f"{name}:{test or REFCOCO[name][-1]}?root={root}"


def _add_expression(
    entries: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    picture: str,
    original: int,
    name: str,
    said: tuple[str, float],
) -> None:
    text, left = said
    number, where = len(entries), {"original_id": original}
    entry = {"file_name": picture, "height": 32, "width": 48, "id": number, "caption": text, "dataset_name": name}
    entries.append({**entry, **where, "tokens_negative": [[0, len(text)]]})
    box = [left, 2.0, 20.25, 28.5]
    annotation = {"image_id": number, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "category_id": 1}
    annotations.append({**annotation, **where, "id": number, "tokens_positive": [[0, len(text)]]})
