"""Backbones by URI: `hf:` (id or folder), `sample:` (pinned, no hub) and `module:` (any nn.Module)."""

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .architecture import Norm
from .backbone import Backbone
from .clip_towers import projected_tower, with_projection
from .efficientnet_lite import load_efficientnet
from .errors import SidebenchError, unknown
from .preprocess import FirstStep, ImagePreprocess, PlainImageProcessor, TextPreprocess, resized
from .uri import Uri, parse_uri

SCHEMES = {
    "sample": "pretrained weights inside a registry package, pinned by sha256: sample:minilm-l6, sample:dinov2-small",
    "hf": "a transformers folder or hub id: hf:./my-bert, hf:google/vit-base-patch16-224 (?tower=vision|text for CLIP, "
    "&projected=true with its projection; T5's encoder, with ?tower=both its decoder too, for one step; images: "
    "?resize=squash|crop to the square)",
    "timm": "a network of the timm library, in the extra sidebench[timm]: timm:resnet18.a1_in1k (?checkpoint=FILE)",
    "resnet": "the four stage maps of a ResNet or ResNeXt, images squashed to a square, from a file of weights with "
    "torchvision's names: resnet:resnet50?weights=FILE.pth",
    "clipvil": "a released CLIP-ViL checkpoint with bert-base-uncased's config and tokenizer: "
    "clipvil:FILE.pth?text=FOLDER",
    "mdetr": "a public MDETR checkpoint with roberta-base's config and tokenizer: mdetr:FILE.pth?text=FOLDER",
    "pair": "two of these, for a retrieval task: pair:image=URI,text=URI",
    "imported": "features without a network, from `bench cache import`, for compare: imported:NAME",
    "module": "any torch module from a factory on the path: module:package.file:factory",
    "hf-config": "an architecture without weights, for plan: hf-config:vit-base, hf-config:./folder-or-file.json",
    "resnet-config": "a ResNet or ResNeXt without weights, for plan: resnet-config:resnext101_32x8d",
    "clipvil-config": "CLIP-ViL's architecture without weights, for plan: clipvil-config:base",
    "mdetr-config": "MDETR's architecture without weights, for plan: mdetr-config:base",
}
IMPORTED = "imported:"
CONFIG_ONLY = ("hf-config:", "resnet-config:", "clipvil-config:", "mdetr-config:")
_OPTIONS = {
    "hf": ("tower", "projected", "resize"),
    "sample": ("resize",),
    "hf-config": ("tower", "projected"),
    "timm": ("checkpoint",),
    "resnet": ("weights",),
    "clipvil": ("text",),
    "mdetr": ("text",),
}
MAX_LENGTH = 128  # tokens: enough for sentences, and stated in the digest

# Which families normalise after the residual sum; all others here normalise before it.
_POST_NORM = {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet"}
_PRE_NORM = {"vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model", "clip_text_model", "vit_mae"}
_CAUSAL = {"clip_text_model"}
# What all of the first T5's sizes have in common, up to T5-large, and its later versions do not.
_FIRST_T5 = {
    "model_type": "t5",
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}


def load_backbone(
    uri: str,
    *,
    home: Path,
    device: torch.device,
    image_size: int | None = None,
    max_length: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Backbone:
    """Load the frozen network a URI names, in float32 and eval mode, on `device`.

    Raises SidebenchError for an unknown scheme, a missing folder, or a checkpoint that lacks weights.
    """
    parsed = backbone_uri(uri)
    if f"{parsed.scheme}:" in CONFIG_ONLY:
        raise SidebenchError(
            f"{uri} names an architecture; it has no weights to run. `bench plan` works with it; here give hf:, "
            "sample: or module:."
        )
    if parsed.scheme == "pair":
        raise SidebenchError(f"{uri} names two backbones, which a retrieval task reads with (bench tasks).")
    if parsed.scheme == "imported":
        raise SidebenchError(f"{uri} names features; there is no network behind them to load.")
    if parsed.scheme == "module":
        backbone = _from_module(parsed.path, image_size)
    elif parsed.scheme == "timm":
        from .timm_models import load_timm

        backbone = load_timm(parsed.path, image_size, parsed.options.get("checkpoint"))
    elif parsed.scheme == "resnet":
        from .resnet_load import load_resnet

        backbone = load_resnet(parsed.path, parsed.options.get("weights"), image_size)
    elif parsed.scheme == "clipvil":
        from .clip_vil_load import load_clip_vil

        backbone = load_clip_vil(parsed.path, parsed.options.get("text"), image_size, max_length)
    elif parsed.scheme == "mdetr":
        from .mdetr_load import load_mdetr

        backbone = load_mdetr(parsed.path, parsed.options.get("text"), image_size, max_length)
    else:
        folder = parsed.path
        if parsed.scheme == "sample":
            from .samples import fetch

            folder = str(fetch(parsed.path, home=home, say=say))
        if (parsed.scheme, parsed.path) == ("sample", "efficientnet-lite0"):
            if parsed.options.get("resize", "squash") != "squash":
                raise SidebenchError(f"{parsed.path} squashes images to a square and nothing else; leave ?resize out.")
            backbone = load_efficientnet(Path(folder), image_size)
        else:
            tower, resize = (parsed.options.get(name) for name in ("tower", "resize"))
            backbone = _from_transformers(folder, tower, projected(parsed), resize, image_size, max_length)
    backbone.module.to(device)
    return backbone


def backbone_uri(uri: str) -> Uri:
    """The parts of a backbone's name. Raises SidebenchError for an unknown scheme or option."""
    return parse_uri(uri, known={name: _OPTIONS.get(name, ()) for name in SCHEMES}, kind="backbone")


def projected(uri: Uri) -> bool:
    """Whether a backbone's name asks for CLIP's projected embedding. Raises SidebenchError for no such answer."""
    typed = uri.options.get("projected", "false")
    if typed not in ("true", "false"):
        raise SidebenchError(f"projected is true or false; found {typed!r} in {uri.text}.")
    return typed == "true"


def weights_sha256(module: nn.Module, skip: Iterable[str] = ()) -> str:
    """Hash over name, dtype, shape and bytes of every tensor, by name: the same however the files are split.

    `skip` names tensors the checkpoint does not hold, whose values are random.
    """
    digest = hashlib.sha256()
    skipped = set(skip)
    for name, tensor in sorted(module.state_dict().items()):
        if name in skipped:
            continue
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _from_transformers(
    folder: str,
    tower: str | None,
    projected: bool,
    resize: str | None,
    image_size: int | None,
    max_length: int | None,
) -> Backbone:
    import transformers
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    looks_local = folder.startswith((".", "/", "~")) or Path(folder).exists()
    source = str(Path(folder).expanduser()) if looks_local else folder
    if looks_local and not Path(source, "config.json").is_file():
        raise SidebenchError(f"no transformers model at {folder}: looked for {source}/config.json.")
    with _reading(folder, looks_local):
        config = AutoConfig.from_pretrained(source)
    config, loader = one_tower(config, tower, f"hf:{folder}", projected=projected)
    with _reading(folder, looks_local):
        module, report = loader.from_pretrained(
            source, config=config, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    missing = set(report["missing_keys"])
    needed = sorted(name for name in missing if "pooler" not in name and "mask_token" not in name)
    if needed:
        raise SidebenchError(
            f"the checkpoint of hf:{folder} lacks {len(needed)} weights of {type(module).__name__}, the first is "
            f"{needed[0]}; they would be random. Is this the right folder?"
        )
    family = {**family_facts(config, tower), "unloaded": missing}
    if projected:
        module, family["projection"] = with_projection(module, str(tower))
    patch = getattr(config, "patch_size", None)
    if patch is None:
        if resize is not None:
            raise SidebenchError(f"{folder} reads texts, and ?resize={resize} is about images; leave it out.")
        with _reading(folder, looks_local):
            tokenizer = AutoTokenizer.from_pretrained(source)
        _check_vocabulary(folder, tokenizer, getattr(config, "vocab_size", None))
        token_types = (getattr(config, "type_vocab_size", None) or 0) > 1  # BERT's two segments; RoBERTa has one
        texts = TextPreprocess(tokenizer, text_length(config, max_length), token_types)
        return Backbone(module, one_step(texts, config) if tower == "both" else texts, **family)
    with _reading(folder, looks_local):  # not torchvision: the pixels, and so the store, would depend on its presence
        processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    processor, side = resized(processor, image_size, resize)
    options = {}
    if side != getattr(config, "image_size", side) and config.model_type != "dinov2":  # DINOv2 always interpolates
        options["interpolate_pos_encoding"] = True
    return Backbone(module, ImagePreprocess(processor, side, int(patch)), forward_options=options, **family)


def text_length(config: Any, max_length: int | None) -> int:
    """The longest text in tokens: as asked, else 128 or as many as the backbone has positions."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    length = min(MAX_LENGTH, positions) if max_length is None else max_length
    if length > positions:
        raise SidebenchError(f"--max-length {length} is beyond this backbone's {positions} positions.")
    return length


def one_step(texts: Any, config: Any) -> FirstStep:
    """What an encoder-decoder reads: the texts, and the start token. Raises SidebenchError where none is configured."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise SidebenchError(f"{config.model_type}'s configuration names no decoder_start_token_id to decode from.")
    return FirstStep(texts, int(start))


def family_facts(config: Any, tower: str | None = None) -> dict[str, Any]:
    """What Backbone is told of a transformers configuration, by the names of its arguments."""
    return {
        "stacks": ("encoder", "decoder") if tower == "both" else None,
        "t5_blocks": tower == "both" and _has_t5_blocks(config),
        "norm": _norm_of(config),
        "causal": config.model_type in _CAUSAL,
        "heads": getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None),
        "activation": getattr(config, "hidden_act", None),
        "config_facts": _config_facts(config),
    }


def one_tower(config: Any, tower: str | None, uri: str, *, projected: bool = False) -> tuple[Any, Any]:
    """The configuration of one network, and the transformers class that makes it; `uri` names it in errors."""
    from transformers import AutoModel, AutoModelForTextEncoding

    if projected:
        return projected_tower(config, tower, uri)
    towers = [name for name in ("text", "vision") if hasattr(config, f"{name}_config")]
    if towers:
        if tower not in towers:
            raise SidebenchError(f"{uri} has the towers {', '.join(towers)}; say which: {uri}?tower=vision")
        config = getattr(config, f"{tower}_config")
        return config, AutoModel._model_mapping[type(config)]
    halves = ("encoder", "both") if getattr(config, "is_encoder_decoder", False) else ()
    if tower and tower not in halves:
        known = f"it has {' and '.join(halves)}" if halves else "it is one network"
        raise SidebenchError(f"{uri} is of type {config.model_type}: {known}, and no tower {tower!r}.")
    return config, AutoModelForTextEncoding if halves and tower != "both" else AutoModel


def _check_vocabulary(folder: str, tokenizer: Any, embedded: int | None) -> None:
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder that has none
        raise SidebenchError(f"hf:{folder} holds no tokenizer; every word would be unknown. Copy its tokenizer files.")
    if embedded is not None and len(tokenizer) > embedded:
        raise SidebenchError(
            f"the tokenizer of hf:{folder} has {len(tokenizer)} tokens and the backbone embeds {embedded}; "
            "they do not belong together."
        )


def _norm_of(config: Any) -> Norm | None:
    if getattr(config, "use_swiglu_ffn", False):
        return None  # DINOv2-giant's gated MLP is no block that a method here can copy
    if config.model_type in _POST_NORM:
        return "post"
    return "pre" if config.model_type in _PRE_NORM else None


def _has_t5_blocks(config: Any) -> bool:
    if any(getattr(config, name, None) != value for name, value in _FIRST_T5.items()):
        return False
    return bool(config.num_heads * config.d_kv == config.d_model <= config.d_ff)  # of T5-3B the heads are wider


def _config_facts(config: Any) -> dict[str, Any]:
    """The configuration without what does not change an activation: versions, paths, label names."""
    ignored = {"transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id", "use_cache"}
    facts = config.to_diff_dict()
    facts["model_type"] = config.model_type
    return {k: v for k, v in facts.items() if not k.startswith("_") and k not in ignored}


def _from_module(path: str, image_size: int | None) -> Backbone:
    module_name, _, factory_name = path.partition(":")
    if not factory_name:
        raise SidebenchError(f"module:{path} lacks the factory; write module:package.file:factory.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: a factory beside the user is found
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's own file raises
        raise SidebenchError(f"cannot import {module_name!r} for module:{path}: {said(error)}.") from error
    factory = getattr(module, factory_name, None)
    if factory is None:
        raise unknown(f"factory in {module_name}", factory_name, (n for n in vars(module) if not n.startswith("_")))
    try:
        built = factory()
    except SidebenchError:
        raise
    except Exception as error:
        raise SidebenchError(f"calling {factory_name}() for module:{path} failed: {said(error)}.") from error
    if isinstance(built, Backbone):
        return built
    if not isinstance(built, nn.Module):
        raise SidebenchError(f"module:{path} returned {type(built).__name__}; wanted a torch.nn.Module or a Backbone.")
    side = 224 if image_size is None else image_size
    # A plain module takes one positional image batch; Backbone passes keywords, so find that argument's name.
    name = next(iter(inspect.signature(built.forward).parameters), "input")
    return Backbone(built, ImagePreprocess(PlainImageProcessor(side), side, None, input_name=name))


@contextmanager
def _reading(folder: str, local: bool) -> Iterator[None]:
    """Say in a sentence what the library met in a folder; for a damaged one it raises anything."""
    try:
        yield
    except Exception as error:
        hint = " A folder on disk is written hf:./folder; without a hub, `bench backbones` lists the samples."
        raise SidebenchError(f"cannot load the backbone hf:{folder}: {said(error)}{'' if local else hint}") from error


def said(error: BaseException) -> str:
    """The first line of what another library said, with its kind where the words alone would not explain it."""
    lines = str(error).strip().splitlines()
    said = lines[0][:300] if lines else ""
    return said if isinstance(error, OSError | ValueError | ImportError) and said else f"{type(error).__name__}: {said}"
