"""Backbones without weights: an architecture alone, on fake tensors, from which shapes and memory can be told.

A fake tensor has a shape, a dtype and a device and no memory behind it; every operation on it yields the shape that the
real one would have. So a backbone of any size is here in a second, on any machine, and nothing is downloaded.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .backbone import Backbone
from .clip_towers import with_projection
from .errors import SidebenchError, unknown
from .examples import Modality
from .load import family_facts, one_step, one_tower, said, text_length
from .preprocess import ImagePreprocess, Inputs, Preprocess

_LARGEST_CONFIG_BYTES = 2**20
_MOST_LAYERS = 1000
_LARGEST_SIZE = 10_000_000  # no width, vocabulary or image side is larger; beyond it a shape overflows
_CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"

_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}
_LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 4096}
_HUGE = {"hidden_size": 1280, "num_attention_heads": 16, "num_hidden_layers": 32, "intermediate_size": 5120}
_DINOV2 = {"model_type": "dinov2", "patch_size": 14, "image_size": 518}
_T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0}
_T5_LARGE = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "decoder_start_token_id": 0}
# What differs from the defaults of transformers' configuration classes, as in the config.json of
# google/vit-*-patch16-224 (huge: patch14-224-in21k), facebook/deit-small-patch16-224 (which is a ViT),
# facebook/dinov2-*, openai/clip-vit-base-patch32, google-bert/bert-base-uncased, FacebookAI/roberta-base,
# google-t5/t5-*.
PRESETS: dict[str, dict[str, Any]] = {
    "vit-base": {"model_type": "vit"},
    "vit-large": {"model_type": "vit", **_LARGE},
    "vit-huge": {"model_type": "vit", "patch_size": 14, **_HUGE},
    "deit-small": {"model_type": "vit", "intermediate_size": 1536, **_SMALL},
    "dinov2-small": {**_DINOV2, **_SMALL},
    "dinov2-base": {**_DINOV2},
    "clip-vit-b32": {"model_type": "clip"},
    "bert-base": {"model_type": "bert"},
    "roberta-base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    },
    "t5-base": {"model_type": "t5", **_T5_BASE},
    "t5-large": {"model_type": "t5", **_T5_LARGE},
}
_PRESET_TOWER = {"clip-vit-b32": "vision"}
_PRESET_SIDE = {"dinov2-small": 224, "dinov2-base": 224}  # pretrained at 518, read at 224 by their image processors


class TextShapes:
    """Stands in for a tokenizer that is not there: it knows the length of a text and no word."""

    modality: Modality = "text"

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def facts(self) -> dict[str, Any]:
        """See Preprocess."""
        return {"kind": "text", "max_length": self.max_length}

    def prepare(self, raw: Sequence[Any]) -> list[Tensor]:
        """See Preprocess. Raises SidebenchError: there is no tokenizer."""
        raise _no_weights()

    def collate(self, prepared: Sequence[Tensor]) -> tuple[Inputs, Tensor | None]:
        """See Preprocess. Raises SidebenchError: nothing was prepared."""
        raise _no_weights()

    def dummy(self, device: torch.device) -> Inputs:
        """See Preprocess."""
        ids = torch.ones((1, 4), dtype=torch.long, device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prefix_tokens(self, tokens: int) -> int:
        """See Preprocess."""
        return 0

    def special_ids(self) -> frozenset[int]:
        """See Preprocess."""
        return frozenset()


def config_backbone(
    name: str,
    *,
    tower: str | None = None,
    projected: bool = False,
    image_size: int | None = None,
    max_length: int | None = None,
) -> Backbone:
    """The architecture that a preset, a transformers configuration folder or a JSON file describes, without weights.

    Raises SidebenchError for a name that is none of these, and for a file that describes no backbone.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    document, side = _described(name)
    kind = document.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise SidebenchError(
            f"hf-config:{name} is of model type {str(kind)[:60]!r}, which this transformers does not know; "
            'wanted "model_type": "vit", "bert", "dinov2", "clip", … in its JSON.'
        )
    _check_sizes(name, document)
    with _refusing(name):
        config, loader = one_tower(
            CONFIG_MAPPING[kind].from_dict(document),
            tower or _PRESET_TOWER.get(name),
            f"hf-config:{name}",
            projected=projected,
        )
        with torch.device("meta"):  # not under fake tensors: initialisations that look at values fail there
            make = getattr(loader, "from_config", None) or loader._from_config  # an Auto class, or one tower's own
            module = make(config, attn_implementation="sdpa")
        facts = family_facts(config, tower)
        if projected:
            module, facts["projection"] = with_projection(module, tower or _PRESET_TOWER[name])
        preprocess, options = _inputs_of(config, image_size, side, max_length)
        if tower == "both":
            preprocess = one_step(preprocess, config)
        mode = FakeTensorMode()
        with mode:
            return Backbone(emptied(module, {}), preprocess, forward_options=options, **facts)


def without_weights(backbone: Backbone) -> Backbone:
    """A copy on fake tensors, of a real backbone or of another fake one; the original is left as it is."""
    known: dict[int, Any] = {id(backbone.preprocess): backbone.preprocess}
    with fake_mode(backbone) or FakeTensorMode():
        return emptied(backbone, known)


def fake_mode(backbone: Backbone) -> FakeTensorMode | None:
    """The mode that the backbone's fake tensors belong to; None for a backbone with weights."""
    first = next(backbone.module.parameters())
    return first.fake_mode if isinstance(first, FakeTensor) else None


def emptied(thing: Any, known: dict[int, Any]) -> Any:
    """A deep copy of a backbone or module on fake tensors of the same shapes; `known` (by id) is not copied.

    Ties stay ties; needs a FakeTensorMode to be on.
    """
    module = thing.module if isinstance(thing, Backbone) else thing
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        known[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(thing, known)


def _described(name: str) -> tuple[dict[str, Any], int | None]:
    """The configuration and, where something says so, the side of the images it reads."""
    if name in PRESETS:
        return dict(PRESETS[name]), _PRESET_SIDE.get(name)
    path = Path(name).expanduser()
    if not path.exists():
        looks_like_path = name.startswith((".", "/", "~")) or name.endswith(".json")
        if looks_like_path:
            raise SidebenchError(f"no configuration at {name}: give a folder with {_CONFIG}, or a JSON file.")
        raise unknown("preset or file in hf-config:", name, PRESETS)
    if path.is_dir():
        processor = path / _PROCESSOR
        side = _processor_side(_read_json(processor)) if processor.is_file() else None
        return _read_json(path / _CONFIG), side
    return _read_json(path), None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise SidebenchError(f"{path} is larger than any configuration ({_LARGEST_CONFIG_BYTES} bytes).")
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SidebenchError(f"{path} cannot be read as a JSON configuration: {said(error)}.") from None
    if not isinstance(document, dict):
        raise SidebenchError(f"{path} holds a JSON {type(document).__name__}; a configuration is an object.")
    return document


def _processor_side(document: Mapping[str, Any]) -> int | None:
    size = document.get("crop_size") if document.get("do_center_crop", True) else None
    size = size or document.get("size")
    side = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    return side if isinstance(side, int) and not isinstance(side, bool) else None


def _check_sizes(name: str, document: Mapping[str, Any]) -> None:
    """A forged configuration must not make the machine build a million layers."""
    for key, value in document.items():
        if isinstance(value, dict):
            _check_sizes(name, value)
        elif isinstance(value, int) and not isinstance(value, bool):
            most = _MOST_LAYERS if "layer" in key and "norm" not in key else _LARGEST_SIZE
            if abs(value) > most:
                raise SidebenchError(f"hf-config:{name} states {key} = {value}; at most {most:,} is believed.")


def _inputs_of(
    config: Any, image_size: int | None, side: int | None, max_length: int | None
) -> tuple[Preprocess, dict[str, Any]]:
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return TextShapes(text_length(config, max_length)), {}
    pretrained = getattr(config, "image_size", None)
    chosen = image_size or side or pretrained
    if not isinstance(chosen, int) or not isinstance(patch, int):
        raise SidebenchError(f"no image side in the configuration (image_size {pretrained!r}); give --image-size.")
    options = {}
    if chosen != pretrained and config.model_type != "dinov2":  # DINOv2 always interpolates
        options["interpolate_pos_encoding"] = True
    return ImagePreprocess(_no_processor, chosen, patch), options


def _no_processor(*_: Any, **__: Any) -> Any:
    raise _no_weights()


def _no_weights() -> SidebenchError:
    return SidebenchError("hf-config: names an architecture without weights; only `bench plan` works with it.")


class _refusing:
    """Whatever transformers raises on a configuration that describes nothing becomes a sentence."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, SidebenchError):
            raise SidebenchError(f"hf-config:{self._name} describes no backbone: {said(error)}.") from error
