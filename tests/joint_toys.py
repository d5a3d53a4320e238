"""A tiny network that reads an image and a text together, and examples for it: random weights from a fixed seed.

`module:joint_toys:tiny_joint` names the backbone, where this folder is the working directory or on the path.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import toys
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sidebench.cache.backbone import Backbone
from sidebench.cache.examples import ImageText, Modality
from sidebench.cache.joint import TextThenImage
from sidebench.cache.preprocess import TextPreprocess

WIDTH, HEADS, BLOCKS, MLP = 32, 4, 2, 64
HEIGHT, SIDE, PATCH = 16, 24, 8  # pixels; the grid is 2 x 3
VISUAL = (HEIGHT // PATCH) * (SIDE // PATCH)
MAX_LENGTH = 12


@dataclass(frozen=True)
class JointToyExamples:
    """Images with texts, held in memory."""

    raw: tuple[ImageText, ...]
    targets: NDArray[np.int64]
    modality: Modality = "image-text"

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"pair-{i}" for i in range(len(self.raw)))

    @property
    def content_sha256(self) -> str:
        digest = hashlib.sha256()
        for name, both, target in zip(self.ids, self.raw, self.targets, strict=True):
            digest.update(f"{name}|{target}|{both.text}|{both.image.size}|".encode() + np.asarray(both.image).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.raw)

    def load(self, index: int) -> ImageText:
        return self.raw[index]

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(both.text for both in self.raw)

    def size(self, index: int) -> tuple[int, int]:
        return self.raw[index].image.size


def make_joint(count: int, *, seed: int = 0, longest: int = 8) -> JointToyExamples:
    """The class says whether "good" is said of a red image, or "bad" of a blue one: neither half alone tells."""
    texts, images = toys.make_texts(count, seed=seed, longest=longest), toys.make_images(count, seed=seed)
    raw = tuple(ImageText(image, text) for image, text in zip(images.raw, texts.raw, strict=True))
    return JointToyExamples(raw, (texts.targets == images.targets).astype(np.int64))


def pixels_of(image: Image.Image) -> Tensor:
    """(3, H, W) of 0 to 1, squashed."""
    values = np.asarray(image.resize((SIDE, HEIGHT), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


class Embedded(nn.Module):
    """Words with their positions, then patches with theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(4 + len(toys.WORDS), WIDTH)
        self.positions = nn.Embedding(40, WIDTH)
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.places = nn.Parameter(torch.empty(VISUAL, WIDTH))

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        text = self.words(input_ids) + self.positions.weight[: input_ids.shape[1]]
        image = self.patches(pixel_values).flatten(2).mT + self.places  # (B, 6, D)
        return torch.cat([text, image], 1)


class Block(nn.Module):
    """A pre-norm transformer block; padded keys are not looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, MLP), nn.Linear(MLP, WIDTH)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm1(hidden_states)
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        hidden_states = hidden_states + self.out(seen.transpose(1, 2).flatten(2))
        return hidden_states + self.fc2(nn.functional.gelu(self.fc1(self.norm2(hidden_states))))


class JointToy(nn.Module):
    """Two blocks over words and patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embedded()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embeddings(input_ids, pixel_values)
        for block in self.blocks:
            x = block(x, attention_mask=attention_mask[:, None, None, :].bool())
        return self.norm(x)


def tiny_joint() -> Backbone:
    """The network with its preprocessing: texts of at most 12 tokens, then 6 tokens of the image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = JointToy()
        for name, parameter in module.named_parameters():
            nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    facts = {"resize": "bilinear", "scale": "0-1"}
    texts = TextPreprocess(toys.tokenizer(), MAX_LENGTH)
    preprocess = TextThenImage(texts, pixels_of, facts, (HEIGHT, SIDE), VISUAL)
    return Backbone(module, preprocess, heads=HEADS, norm="pre", activation="gelu")
