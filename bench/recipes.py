"""Published comparisons by name, `--recipe NAME`: backbone, task, methods and settings, each with what was reported.

With `--dry-run` a recipe needs neither data nor weights: its architecture on fake tensors stands for the backbone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..cache.errors import unknown
from .choice import Settings
from .goals.base import Goal

PAPER_G = 2**20 * 1000  # bytes of what the papers print as "G": bytes / 1024^2 / 1000


@dataclass(frozen=True)
class Published:
    """A row of the published comparison: parameters in millions (or percent), memory in "G" over all devices."""

    trainable: str
    memory_g: float
    devices: int = 1

    @property
    def bytes_per_device(self) -> int:
        """Of its peak: totals are sums over devices."""
        return round(self.memory_g / self.devices * PAPER_G)


@dataclass(frozen=True)
class Recipe:
    """A published setting, as far as the common loop can express it.

    backbone and task are what a run takes, in files below the working directory; architecture is the backbone without
    weights, goal what its step is for, num_examples and num_captions how much there is (None: not stated).
    """

    name: str
    source: str
    backbone: str
    architecture: str
    task: str
    settings: Mapping[str, Mapping[str, str]]
    epochs: int
    batch_size: int
    goal: Goal | None
    published: Mapping[str, Published]
    not_reproduced: tuple[str, ...]
    trained: int  # parameters of UniPT with the task's head, as counted in its released code
    methods: tuple[str, ...] = ("unipt",)
    image_size: int | None = None
    max_length: int | None = None
    num_outputs: int | None = None
    num_examples: int | None = None
    num_captions: int | None = None
    frames: int = 1
    remarks: tuple[str, ...] = field(default=())

    def options(self) -> dict[str, Any]:
        """What it says of the options of `bench compare`, by the names of its parameters; typed ones go before it."""
        sizes = {"image_size": self.image_size, "max_length": self.max_length}
        return {
            "backbone": self.backbone,
            "task": self.task,
            "methods": ",".join(self.methods),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            **{name: value for name, value in sizes.items() if value is not None},
        }

    def settings_with(self, typed: Settings, methods: tuple[str, ...]) -> dict[str, dict[str, str]]:
        """What --set said, over the recipe's for those of its methods that are asked for."""
        keys = {text.partition("@")[0] for text in methods}
        found = {key: dict(options) for key, options in self.settings.items() if key in keys or "all" in keys}
        for key, options in typed.items():
            found[key] = {**found.get(key, {}), **options}
        return found

    def facts(self) -> dict[str, Any]:
        """What a report or a dry run says of it, as plain JSON."""
        published = {
            name: {
                "trainable": row.trainable,
                "memory_g": row.memory_g,
                "devices": row.devices,
                "bytes_per_device": row.bytes_per_device,
                "batch_per_device": self.batch_size // row.devices,
            }
            for name, row in self.published.items()
        }
        return {
            "name": self.name,
            "source": self.source,
            "trained": self.trained,
            "batch_size": self.batch_size,
            "published": published,
            "not_reproduced": list(self.not_reproduced),
            "remarks": list(self.remarks),
        }


def recipe_named(name: str) -> Recipe:
    """A recipe by name. Raises SidebenchError for another one, naming the nearest."""
    from .recipes_table import RECIPES

    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
