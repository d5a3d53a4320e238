"""Tiny backbones and examples for the tests: random weights from a fixed seed, saved and loaded like real ones."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import BuildResult, CaptureOptions, build, plan
from sidebench.cache.examples import Modality
from sidebench.cache.load import load_backbone
from sidebench.cache.memory_store import MemoryStore

WORDS = (
    *("a", "the", "film", "is", "was", "good", "bad", "very", "dull"),
    *("joy", "and", "not", "plot", "cast", "fine", "mess"),
)
WIDTH, HEADS, BLOCKS, MLP = 32, 4, 2, 64
IMAGE_SIZE, PATCH = 16, 8
_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "intermediate_size": MLP}


@dataclass(frozen=True)
class ToyExamples:
    """Examples held in memory; `broken` maps an index to the error that loading it raises."""

    modality: Modality
    raw: tuple[Any, ...]
    targets: NDArray[np.int64]
    broken: dict[int, Exception] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"example-{i}" for i in range(len(self.raw)))

    @property
    def content_sha256(self) -> str:
        digest = hashlib.sha256()
        for name, raw, target in zip(self.ids, self.raw, self.targets, strict=True):
            content = raw.encode() if isinstance(raw, str) else np.asarray(raw).tobytes()
            digest.update(f"{name}|{target}|{len(content)}|".encode() + content)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.raw)

    def load(self, index: int) -> Any:
        if index in self.broken:
            raise self.broken[index]
        return self.raw[index]


def make_texts(count: int, *, seed: int = 0, longest: int = 12) -> ToyExamples:
    """Sentences of 1 to `longest` words; the class says whether "good" is among them."""
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(WORDS, size=draw.integers(1, longest + 1))) for _ in range(count)]
    return ToyExamples("text", tuple(texts), np.array(["good" in t.split() for t in texts], dtype=np.int64))


def make_images(count: int, *, seed: int = 0, side: int = 20) -> ToyExamples:
    """Noisy RGB images; the class says whether red or blue is stronger."""
    draw = np.random.default_rng(seed)
    targets = np.arange(count) % 2
    images = []
    for target in targets:
        pixels = draw.integers(0, 160, size=(side, side, 3))
        pixels[..., 0 if target else 2] += 80
        images.append(Image.fromarray(pixels.astype(np.uint8)))
    return ToyExamples("image", tuple(images), targets.astype(np.int64))


def save_bert(folder: Path, **changes: Any) -> Path:
    from transformers import BertConfig, BertModel

    options = {"vocab_size": 4 + len(WORDS), "max_position_embeddings": 40, **_SIZES}
    config = BertConfig(**{**options, **changes})
    return _save(folder, BertModel, config, tokenizer())


def save_vit(folder: Path, **changes: Any) -> Path:
    from transformers import ViTConfig, ViTModel

    return _save(folder, ViTModel, ViTConfig(**{**_image_options(), **changes}), image_processor("ViT"))


def save_dinov2(folder: Path, **changes: Any) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    options = {**_image_options(), "mlp_ratio": MLP // WIDTH}
    return _save(folder, Dinov2Model, Dinov2Config(**{**options, **changes}), image_processor("Bit"))


def save_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": 4 + len(WORDS), "max_position_embeddings": 40, "eos_token_id": 3, "bos_token_id": 2}
    vision = {"image_size": IMAGE_SIZE, "patch_size": PATCH}
    config = CLIPConfig(text_config={**text, **_SIZES}, vision_config={**vision, **_SIZES}, projection_dim=WIDTH)
    return _save(folder, CLIPModel, config, tokenizer(), image_processor("CLIP"))


def save_t5(folder: Path, **changes: Any) -> Path:
    from transformers import T5Config, T5Model

    sizes = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": MLP, "num_heads": HEADS}
    depths = {"num_layers": 3, "num_decoder_layers": 2}
    options = {"vocab_size": 4 + len(WORDS), "decoder_start_token_id": 0, **sizes, **depths}
    return _save(folder, T5Model, T5Config(**{**options, **changes}), tokenizer())


def tokenizer() -> Any:
    """One id per word: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then WORDS."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    made = Tokenizer(WordLevel({**special, **{word: 4 + i for i, word in enumerate(WORDS)}}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def image_processor(family: str, side: int = IMAGE_SIZE) -> Any:
    import transformers

    square = {"height": side, "width": side}
    kind = getattr(transformers, f"{family}ImageProcessor")
    if family == "ViT":
        return kind(size=square)
    return kind(size={"shortest_edge": side + 4}, crop_size=square, do_center_crop=True)


def load(folder: Path, **options: Any) -> Backbone:
    """Load `folder` as a user would: `hf:<folder>`, on the CPU; `tower` picks one of CLIP's."""
    tower = options.pop("tower", None)
    uri = f"hf:{folder}" + (f"?tower={tower}" if tower else "")
    return load_backbone(uri, home=folder, device=torch.device("cpu"), **options)


def build_store(backbone: Backbone, examples: Any, cache_dir: Path, **options: Any) -> BuildResult:
    """Build a store in float32 with small batches unless told otherwise."""
    chosen = CaptureOptions(**{"dtype": "float32", "batch_size": 8, **options})
    return build(plan(backbone, examples, chosen), cache_dir, notes={"backbone": "toy", "task": "toy"})


def in_memory(architecture: Architecture, rows: Mapping[str, Sequence[torch.Tensor]]) -> MemoryStore:
    """A MemoryStore of one (T_i, D) tensor per layer and example."""
    lengths = [len(row) for row in next(iter(rows.values()))]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return MemoryStore(architecture, {layer: torch.cat(list(found)) for layer, found in rows.items()}, offsets)


def prepare(backbone: Backbone, examples: Any) -> list[torch.Tensor]:
    """Every example as `Preprocess.prepare` yields it."""
    return backbone.preprocess.prepare([examples.load(i) for i in range(len(examples))])


def files_of(folder: Path, *, without: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file below `folder` by relative path."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: payload for name, payload in found.items() if name not in without}


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file with what `change` returns (or with its argument, changed in place)."""
    document = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(change(document) or document), "utf-8")


def _image_options() -> dict[str, Any]:
    return {"image_size": IMAGE_SIZE, "patch_size": PATCH, **_SIZES}


def _save(folder: Path, kind: Any, config: Any, *others: Any) -> Path:
    """Weights drawn wide enough that every layer, bias and norm shows in the outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind(config)
        for name, parameter in module.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, centre, 0.2)
    module.save_pretrained(folder)
    for other in others:
        other.save_pretrained(folder)
    return folder
