"""CLIP-ViL's inputs, and its released checkpoints: a torch file of weights by name, as its pre-training saves them.

Every size but the number of heads is read off the tensors. What a checkpoint does not hold is bert-base-uncased's
tokenizer and config.json: they lie in a folder beside it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .backbone import Backbone
from .clip_resnet import ClipResNetShape
from .clip_vil import ClipVil, ClipVilShape
from .configs import TextShapes, emptied
from .errors import SidebenchError, unknown
from .joint import TextThenImage
from .load import said
from .preprocess import Inputs, TextPreprocess
from .resnet import STRIDE
from .weights_file import fit_weights, read_weights, refuse_claims

MAX_TOKENS = 20  # of a question, as in the reference
SHORTER = 384  # pixels of an image's shorter side; the longer has at most 5/3 of that
PRESETS = {"base": ClipVilShape()}
# In the file, and not read: pre-training's heads, boxes' part of the visual embedding, and the rest of CLIP.
UNREAD = (
    r"(cls|answer_head|obj_predict_head)\..*",
    r"bert\.encoder\.visn_fc\.box_.*",
    r"bert\.encoder\.visual_model\.(?!visual\.).*",
    r"bert\.encoder\.visual_model\.visual\.attnpool\..*",
    r"bert\.embeddings\.position_ids",
)
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_STEP = 3 * STRIDE  # of the shorter side, so that 5/3 of it is a multiple of the trunk's stride
_MOST_BLOCKS, _LARGEST_CONFIG_BYTES = 200, 2**20


class ClipVilPreprocess(TextThenImage):
    """A question and an image: scaled into 384 x 640 pixels, or 640 x 384 where it is no wider than high.

    It lies in the middle, black around it. Either way the trunk's map has 12 x 20 = 240 tokens.
    """

    def __init__(self, texts: Any, shorter: int | None = None, places: int = ClipVilShape.places) -> None:
        """`texts`: a TextPreprocess, or what stands in for one."""
        low = SHORTER if shorter is None else shorter
        high = low * 5 // 3
        if low < _STEP or low % _STEP or high // STRIDE > places:
            raise SidebenchError(
                f"--image-size {low} is no shorter side for CLIP-ViL: a multiple of {_STEP} up to "
                f"{places * STRIDE * 3 // 5 // _STEP * _STEP}; {SHORTER} is its own."
            )
        facts = {"resize": "bilinear", "pad": "black, centred", "mean": list(_MEAN), "std": list(_STD)}
        super().__init__(texts, self._scaled, facts, (low, high), low * high // STRIDE**2)

    def stacked(self, pixels: Sequence[Tensor]) -> Inputs:
        """`pixel_values`, and where images of both kinds meet `lying` and `upright`; see ClipVil.forward."""
        high = torch.tensor([one.shape[1] > one.shape[2] for one in pixels])
        if high.all() or not high.any():
            return super().stacked(pixels)
        turned = torch.stack([one.mT if one.shape[1] > one.shape[2] else one for one in pixels])
        every = torch.eye(len(pixels), dtype=torch.bool)
        return {"pixel_values": turned, "lying": every[:, ~high], "upright": every[:, high]}

    def _scaled(self, image: Any) -> Tensor:
        from PIL import Image

        low, high = self.image_size
        width, height = image.size
        short, long = sorted(image.size)
        side = low if long * low <= short * high else max(round(high * short / long), 1)
        size = (side, int(side * height / width)) if width < height else (int(side * width / height), side)
        canvas = (low, high) if size[0] <= size[1] else (high, low)
        padded = Image.new("RGB", canvas)
        resized = image.resize(size, Image.Resampling.BILINEAR)
        padded.paste(resized, tuple(-((one - of) // 2) for one, of in zip(size, canvas, strict=True)))
        values = torch.from_numpy(np.asarray(padded, dtype=np.float32) / 255).permute(2, 0, 1)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (_MEAN, _STD))
        return (values - mean) / std


def load_clip_vil(
    path: str, text: str | None, image_size: int | None = None, max_length: int | None = None
) -> Backbone:
    """The network in a checkpoint, or in a folder that holds one; `text`: a folder with BERT's config and tokenizer.

    Raises SidebenchError for files that are not there, are no such thing, or hold other weights than the network.
    """
    file, folder = _files(path, text)
    weights = {name.removeprefix("module."): value for name, value in read_weights(file).items()}
    weights = {name: value for name, value in weights.items() if not any(re.fullmatch(p, name) for p in UNREAD)}
    shape = _shape_of(file, weights, _heads(folder))
    with torch.device("meta"):
        refuse_claims(ClipVil(shape), file)
    module = ClipVil(shape)
    fit_weights(module.as_released(), weights, str(file))
    texts = TextPreprocess(_tokenizer(folder, shape), _text_length(shape, max_length))
    return _backbone(module, ClipVilPreprocess(texts, image_size, shape.places), shape)


def config_clip_vil(name: str, image_size: int | None = None, max_length: int | None = None) -> Backbone:
    """The architecture of the released checkpoints (`base`) without weights."""
    if name not in PRESETS:
        raise unknown("preset in clipvil-config:", name, PRESETS)
    shape = PRESETS[name]
    with torch.device("meta"):
        module = ClipVil(shape)
    with FakeTensorMode():
        texts = TextShapes(_text_length(shape, max_length))
        return _backbone(emptied(module, {}), ClipVilPreprocess(texts, image_size, shape.places), shape)


def _backbone(module: ClipVil, preprocess: ClipVilPreprocess, shape: ClipVilShape) -> Backbone:
    return Backbone(
        module,
        preprocess,
        name="CLIP-ViL",
        norm="post",
        heads=module.config.num_attention_heads,
        activation=module.config.hidden_act,
        stacks=("encoder",),
        head_parts={"pooler_weight": "pooler.weight", "pooler_bias": "pooler.bias"},
        config_facts={"model_type": "clip-vil", "text": dict(shape.text), "trunk": list(shape.trunk.layers)},
    )


def _files(path: str, text: str | None) -> tuple[Path, Path]:
    """The checkpoint, and the folder of the tokenizer."""
    file = Path(path).expanduser()
    folder = file if text is None and file.is_dir() else Path(text or "").expanduser()
    if file.is_dir():
        found = sorted(p for p in file.iterdir() if p.suffix in (".pth", ".pt", ".bin", ".safetensors"))
        if len(found) != 1:
            raise SidebenchError(f"{path} holds {len(found)} files of weights; name one: clipvil:FILE.pth?text=FOLDER.")
        file = found[0]
    if not file.is_file():
        raise SidebenchError(
            f"no CLIP-ViL checkpoint at {path}: give the authors' pre-trained RN50x4 file (Epoch11_LXRT.pth)."
        )
    if (text is None and folder != file.parent) or not (folder / "config.json").is_file():
        found_not = "" if text is None else f" There is no config.json in {text}."
        raise SidebenchError(
            "CLIP-ViL reads its questions with bert-base-uncased's tokenizer, which no checkpoint holds: write "
            f"clipvil:{path}?text=FOLDER, a folder with that model's config.json and tokenizer files.{found_not}"
        )
    return file, folder


def _shape_of(file: Path, weights: Mapping[str, Any], heads: int) -> ClipVilShape:
    def size(name: str) -> int:
        tensor = weights.get(name)
        if not isinstance(tensor, Tensor) or not tensor.ndim or not len(tensor):
            raise SidebenchError(f"{file} is no checkpoint of CLIP-ViL with a ResNet: it lacks {name}.")
        return len(tensor)

    def depth(stem: str) -> int:
        found = {match[1] for name in weights if (match := re.match(rf"{re.escape(stem)}\.(\d+)\.", name, re.A))}
        if not 0 < len(found) <= _MOST_BLOCKS:
            raise SidebenchError(f"{file} is no checkpoint of CLIP-ViL: it has {len(found)} blocks under {stem}.")
        return len(found)

    text = {
        "vocab_size": size("bert.embeddings.word_embeddings.weight"),
        "max_position_embeddings": size("bert.embeddings.position_embeddings.weight"),
        "type_vocab_size": size("bert.embeddings.token_type_embeddings.weight"),
        "hidden_size": size("bert.pooler.dense.weight"),
        "num_hidden_layers": depth("bert.encoder.layer"),
        "num_attention_heads": heads,
        "intermediate_size": size("bert.encoder.layer.0.intermediate.dense.weight"),
    }
    if text["hidden_size"] % heads:
        raise SidebenchError(f"{file} has width {text['hidden_size']}, which does not split into {heads} heads.")
    trunk = "bert.encoder.visual_model.visual"
    one, two, three, four = (depth(f"{trunk}.layer{stage}") for stage in (1, 2, 3, 4))
    return ClipVilShape(
        ClipResNetShape((one, two, three, four), width=2 * size(f"{trunk}.conv1.weight"), output=0, resolution=0),
        text,
        places=size("bert.encoder.visual_pos.x_position_embedding.weight"),
    )


def _heads(folder: Path) -> int:
    """What the text encoder's config.json says that no tensor does."""
    file = folder / "config.json"
    try:
        if file.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise SidebenchError(f"{file} is larger than any configuration ({_LARGEST_CONFIG_BYTES} bytes).")
        document = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SidebenchError(f"{file} cannot be read as a JSON configuration: {said(error)}.") from None
    if not isinstance(document, dict) or document.get("model_type") != "bert":
        raise SidebenchError(f"{file} describes no BERT; give the folder of bert-base-uncased.")
    heads = document.get("num_attention_heads")
    if type(heads) is not int or heads < 1:
        raise SidebenchError(f"{file} states num_attention_heads = {heads!r}; wanted a number from 1.")
    return heads


def _tokenizer(folder: Path, shape: ClipVilShape) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of a damaged folder transformers raises anything
        raise SidebenchError(f"{folder} holds no tokenizer that can be read: {said(error)}.") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder that has none
        raise SidebenchError(f"{folder} holds no tokenizer; every word would be unknown. Copy bert-base-uncased's.")
    if len(tokenizer) > shape.text["vocab_size"]:
        raise SidebenchError(f"{folder} has {len(tokenizer)} tokens, the network knows {shape.text['vocab_size']}.")
    return tokenizer


def _text_length(shape: ClipVilShape, max_length: int | None) -> int:
    """The longest question: as asked, else 20 or as many as there are positions."""
    positions = shape.text.get("max_position_embeddings", 512)
    length = min(MAX_TOKENS, positions) if max_length is None else max_length
    if length > positions:
        raise SidebenchError(f"--max-length {length} is beyond this text encoder's {positions} positions.")
    return length
