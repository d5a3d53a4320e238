"""MDETR's inputs, its public checkpoints, and the network without weights.

A checkpoint is a torch file of {"model": …, "model_ema": …, "args": …}. The averaged weights are read where there are
any, because the authors evaluate those, and sizes are read off the tensors. The tokenizer and the text encoder's
config.json are in none: they are roberta-base's, from a folder.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .backbone import Backbone
from .configs import TextShapes, emptied
from .errors import SidebenchError, unknown
from .examples import Examples, ImageText, Modality
from .joint import image_sizes_of, texts_of
from .load import said
from .mdetr import ROBERTA_BASE, Mdetr, MdetrShape
from .preprocess import Inputs, TextPreprocess
from .resnet import STAGES, STRIDE, ResNetShape
from .weights_file import fit_weights, read_weights, refuse_claims

SHORTER, LONGER = 800, 1333  # pixels a side, as the reference evaluates
MAX_TOKENS = 256  # of a text, as in the reference
STACKS = ("transformer.encoder", "transformer.decoder")
PRESETS = {"base": MdetrShape()}
_HEADS = ("class_embed.", "bbox_embed.", "contrastive_align_projection_")  # no forward pass reads them
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Counters, and what no forward pass reads.
_IGNORED = ("transformer.text_encoder.embeddings.position_ids", "transformer.text_encoder.pooler.")
# Of how it was trained: what the network here has.
_SETTINGS = {"pass_pos_and_query": True, "pre_norm": False, "dilation": False, "position_embedding": "sine"}
_MOST_BLOCKS, _LARGEST_SIZE, _LARGEST_CONFIG_BYTES = 200, 10_000_000, 2**20


class MdetrPreprocess:
    """An image and a text. The image's shorter side becomes `shorter` unless the longer would pass 1333/800 of that."""

    modality: Modality = "image-text"

    def __init__(self, texts: Any, shorter: int | None = None) -> None:
        """`texts`: a TextPreprocess, or what stands in for one."""
        self.texts = texts
        self.image_size = SHORTER if shorter is None else shorter
        if self.image_size < STRIDE:
            raise SidebenchError(f"--image-size {shorter} is no shorter side for MDETR; give {STRIDE} or more.")
        self.longer = self.image_size * LONGER // SHORTER
        self.max_length: int = texts.max_length  # of the text
        self.longest = -(-self.image_size // STRIDE) * -(-self.longer // STRIDE) + self.max_length

    def facts(self) -> dict[str, Any]:
        """See Preprocess."""
        sides = {"shorter": self.image_size, "longer": self.longer, "resize": "bilinear"}
        image = {**sides, "mean": list(_MEAN), "std": list(_STD)}
        return {**self.texts.facts(), "kind": self.modality, "image": image}

    def prepare(self, raw: Sequence[ImageText]) -> list[dict[str, Tensor]]:
        """`pixel_values` (3, H, W) and `input_ids` (T,) of each example."""
        ids = self.texts.prepare([both.text for both in raw])
        images = [self._pixels(both.image) for both in raw]
        return [{"pixel_values": image, "input_ids": text} for image, text in zip(images, ids, strict=True)]

    def collate(self, prepared: Sequence[dict[str, Tensor]]) -> tuple[Inputs, Tensor]:
        """A batch, and the (B, T) mask of the encoder's real tokens: of the image row by row, then of the text.

        Images of one size need no padding and come without `sizes`.
        """
        texts, words = self.texts.collate([both["input_ids"] for both in prepared])
        sizes = torch.tensor([both["pixel_values"].shape[1:] for both in prepared])  # (B, 2)
        pixels = torch.zeros(len(prepared), 3, *sizes.amax(0).tolist())
        for row, (both, (height, width)) in enumerate(zip(prepared, sizes.tolist(), strict=True)):
            pixels[row, :, :height, :width] = both["pixel_values"]
        grids = -(-sizes // STRIDE)
        rows, columns = (torch.arange(most) < grids[:, side, None] for side, most in enumerate(grids.amax(0).tolist()))
        mask = torch.cat([(rows[:, :, None] & columns[:, None]).flatten(1), words], 1)
        inputs = {"pixel_values": pixels, "input_ids": texts["input_ids"], "attention_mask": mask.long()}
        return {**inputs, "sizes": sizes} if (sizes != sizes[0]).any() else inputs, mask

    def token_counts(self, examples: Examples) -> NDArray[np.int64]:
        """See JointPreprocess."""
        ids, sizes = self.texts.prepare(texts_of(examples)), image_sizes_of(examples)
        grids = [[-(-side // STRIDE) for side in self.scaled(*size)] for size in sizes]
        return np.array([h * w + len(text) for (h, w), text in zip(grids, ids, strict=True)], dtype=np.int64)

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """(H, W) that an image of this width and height is resized to, rounded as in the reference."""
        short, long = sorted((width, height))
        shorter = (
            self.image_size if long * self.image_size <= short * self.longer else round(self.longer * short / long)
        )
        longer = int(max(shorter, 1) * long / short)
        return (max(shorter, 1), longer) if height < width else (longer, max(shorter, 1))

    def dummy(self, device: torch.device) -> Inputs:
        """See Preprocess: a square image and a text of four tokens."""
        return self.sized((-(-self.image_size // STRIDE)) ** 2 + 4, device)

    def sized(self, tokens: int, device: torch.device) -> Inputs:
        """See JointPreprocess: an image of usual height, as wide as it may be beside a text of at least four tokens."""
        rows = -(-self.image_size // STRIDE)
        columns = min(max((tokens - 4) // rows, 1), -(-self.longer // STRIDE))
        width = self.image_size if columns == rows else columns * STRIDE
        return {
            "pixel_values": torch.zeros((1, 3, self.image_size, width), device=device),
            "input_ids": torch.full((1, tokens - rows * columns), 5, device=device),
            "attention_mask": torch.ones((1, tokens), dtype=torch.long, device=device),
        }

    def prefix_tokens(self, tokens: int) -> int:
        """See Preprocess: the queries are all alike."""
        return 0

    def special_ids(self) -> frozenset[int]:
        """See Preprocess."""
        special: frozenset[int] = self.texts.special_ids()
        return special

    def _pixels(self, image: Any) -> Tensor:
        from PIL.Image import Resampling

        height, width = self.scaled(*image.size)
        values = np.asarray(image.resize((width, height), Resampling.BILINEAR), dtype=np.float32) / 255
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (_MEAN, _STD))
        return (torch.from_numpy(values).permute(2, 0, 1) - mean) / std


def load_mdetr(path: str, text: str | None, image_size: int | None = None, max_length: int | None = None) -> Backbone:
    """The network in a checkpoint; `text`: a folder with roberta-base's config.json and tokenizer files.

    Raises SidebenchError for files that are not there, are no such thing, or hold other weights than the network.
    """
    file, folder = _files(path, text)
    state, settings = _read(file)
    shape = _shape_of(file, state, settings, _text_shape(folder))
    texts = _texts(folder, shape, max_length)
    with torch.device("meta"):
        refuse_claims(Mdetr(shape), file)
    module = Mdetr(shape)
    fit_weights(module, state, str(file))
    return _backbone(module, MdetrPreprocess(texts, image_size), shape)


def config_mdetr(name: str, image_size: int | None = None, max_length: int | None = None) -> Backbone:
    """The architecture of the public checkpoints (`base`) without weights."""
    if name not in PRESETS:
        raise unknown("preset in mdetr-config:", name, PRESETS)
    shape = PRESETS[name]
    with torch.device("meta"):
        module = Mdetr(shape)
    with FakeTensorMode():
        texts = TextShapes(_text_length(shape, max_length))
        return _backbone(emptied(module, {}), MdetrPreprocess(texts, image_size), shape)


def split_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with every fused `in_proj_weight` and `in_proj_bias` as those of queries, keys and values."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, fused, kind = name.rpartition("in_proj_")
        if not fused:
            found[name] = tensor
            continue
        for part, rows in zip("qkv", tensor.chunk(3), strict=False):  # of another number of rows, one will not fit
            found[f"{stem}{part}_proj.{kind}"] = rows
    return found


def _backbone(module: Mdetr, preprocess: MdetrPreprocess, shape: MdetrShape) -> Backbone:
    return Backbone(
        module,
        preprocess,
        name="MDETR",
        norm="post",
        heads=shape.heads,
        activation="relu",
        stacks=STACKS,
        positions="positions",
        head_parts={name: name for name, _ in module.named_parameters() if name.startswith(_HEADS)},
        config_facts={"model_type": "mdetr", "heads": shape.heads, "text": dict(shape.text)},
    )


def _files(path: str, text: str | None) -> tuple[Path, Path]:
    file, folder = Path(path).expanduser(), Path(text or "").expanduser()
    if not file.is_file():
        raise SidebenchError(
            f"no MDETR checkpoint at {path}: give one of the authors' .pth files (pretrained_resnet101_checkpoint.pth, "
            "or one tuned for RefCOCO, RefCOCO+ or RefCOCOg)."
        )
    if text is None or not (folder / "config.json").is_file():
        found = "" if text is None else f" There is no config.json in {text}."
        raise SidebenchError(
            f"MDETR reads its texts with roberta-base's tokenizer, which no checkpoint holds: write mdetr:{path}?text="
            f"FOLDER, a folder with that model's config.json and tokenizer files.{found}"
        )
    return file, folder


def _read(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The weights by name, and the settings they were trained with, where the file states them."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # a bag of attributes; nothing else is built or run
        held = read_weights(file)
    state = held.get("model_ema") or held.get("model")
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise SidebenchError(f"{file} holds no weights under model_ema or model; found {', '.join(held)[:200]}.")
    args = held.get("args")
    settings = vars(args) if isinstance(args, argparse.Namespace) else {}
    for name, wanted in _SETTINGS.items():
        if settings.get(name, wanted) != wanted:
            raise SidebenchError(f"{file} was trained with {name}={settings[name]}; the network here has {wanted}.")
    return split_attention({n: value for n, value in state.items() if not n.startswith(_IGNORED)}), settings


def _shape_of(
    file: Path, state: Mapping[str, Tensor], settings: Mapping[str, Any], text: Mapping[str, Any]
) -> MdetrShape:
    def size(name: str) -> int:
        tensor = state.get(name)
        if tensor is None or not tensor.ndim or not 0 < len(tensor) <= _LARGEST_SIZE:
            raise SidebenchError(f"{file} is no checkpoint of MDETR with a ResNet: it lacks {name}, or has none such.")
        return len(tensor)

    def depth(stem: str) -> int:
        found = {match[1] for name in state if (match := re.match(rf"{re.escape(stem)}\.(\d+)\.", name, re.A))}
        if not 0 < len(found) <= _MOST_BLOCKS:
            raise SidebenchError(f"{file} is no checkpoint of MDETR: it has {len(found)} blocks under {stem}.")
        return len(found)

    width, heads = size("input_proj.weight"), settings.get("nheads", MdetrShape.heads)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise SidebenchError(f"{file} has {width} channels, which do not split into nheads={heads} heads.")
    if depth("transformer.text_encoder.encoder.layer") != text["num_hidden_layers"]:
        raise SidebenchError(f"{file} and the text encoder's config.json differ in blocks; is that roberta-base's?")
    one, two, three, four = (depth(f"backbone.0.body.{stage}") for stage in STAGES)
    return MdetrShape(
        trunk=ResNetShape((one, two, three, four), planes=size("backbone.0.body.conv1.weight")),
        text=text,
        width=width,
        heads=heads,
        mlp_width=size("transformer.encoder.layers.0.linear1.weight"),
        encoder_blocks=depth("transformer.encoder.layers"),
        decoder_blocks=depth("transformer.decoder.layers"),
        queries=size("query_embed.weight"),
        classes=size("class_embed.weight"),
        aligned=size("contrastive_align_projection_image.weight"),
    )


def _text_shape(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        if file.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise SidebenchError(f"{file} is larger than any configuration ({_LARGEST_CONFIG_BYTES} bytes).")
        document = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SidebenchError(f"{file} cannot be read as a JSON configuration: {said(error)}.") from None
    if not isinstance(document, dict) or document.get("model_type") != "roberta":
        raise SidebenchError(f"{file} describes no RoBERTa; give the folder of roberta-base.")
    text: dict[str, Any] = {name: document.get(name, usual) for name, usual in ROBERTA_BASE.items()}
    for name, value in text.items():
        kind = type(ROBERTA_BASE[name])
        if type(value) is not kind or not 0 <= value <= _LARGEST_SIZE:
            raise SidebenchError(f"{file} states {name} = {value!r}; wanted {kind.__name__} of 0 or more.")
    return text


def _texts(folder: Path, shape: MdetrShape, max_length: int | None) -> TextPreprocess:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of a damaged folder transformers raises anything
        raise SidebenchError(f"{folder} holds no tokenizer that can be read: {said(error)}.") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder that has none
        raise SidebenchError(f"{folder} holds no tokenizer; every word would be unknown. Copy roberta-base's files.")
    if len(tokenizer) > shape.text["vocab_size"]:
        raise SidebenchError(f"{folder} has {len(tokenizer)} tokens, the network knows {shape.text['vocab_size']}.")
    return TextPreprocess(tokenizer, _text_length(shape, max_length))


def _text_length(shape: MdetrShape, max_length: int | None) -> int:
    """The longest text: as asked, else 256 or as many as there are positions (RoBERTa's begin behind the padding's)."""
    positions = shape.text["max_position_embeddings"] - shape.text["pad_token_id"] - 1
    length = min(MAX_TOKENS, positions) if max_length is None else max_length
    if length > positions:
        raise SidebenchError(f"--max-length {length} is beyond this text encoder's {positions} positions.")
    return length
