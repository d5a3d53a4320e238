"""What the commands have in common: their options, and how typed text becomes values and results become output."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cache.errors import SidebenchError

if TYPE_CHECKING:
    from .progress import Display
    from .recipes import Recipe

# rich's own help costs 0.2 s per call; rich serves tables and progress.
PLAIN: dict[str, Any] = {"rich_markup_mode": None, "no_args_is_help": True, "add_completion": False}

Backbone = Annotated[str, typer.Option(help="sample:NAME, hf:ID_OR_FOLDER or module:PKG.MOD:FACTORY.")]
Task = Annotated[str, typer.Option(help="sample:NAME, csv:PATH, folder:PATH, glue:NAME, vtab:NAME …: `bench tasks`.")]
Methods = Annotated[str, typer.Option(help="Names with commas, a path to a method file, or all.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="METHOD.KEY=VALUE, repeatable.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training part.")]
Steps = Annotated[int | None, typer.Option(min=1, help="In place of --epochs: as many as these steps allow.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples per training step.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16 (mixed).")]
Layers = Annotated[
    str | None, typer.Option(help="Globs with commas, e.g. 'blocks.*'. Default: embeddings, blocks, norm.")
]
Dtype = Annotated[str, typer.Option(help="Storage dtype: float16, bfloat16, float32, int8 or fp8 (e4m3).")]
Tokens = Annotated[str, typer.Option(help="all, cls, mean, cls+mean, grid:K, first:N or proj:M (random directions).")]
PerChannel = Annotated[bool, typer.Option("--per-channel", help="int8, fp8: normalise channels before tokens.")]
Compression = Annotated[str | None, typer.Option(help="zstd or lz4; random reading then decompresses whole chunks.")]
Views = Annotated[int, typer.Option(min=0, help="Augmented views of each example, to be trained on in its place.")]
CaptureSeed = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of the views and of proj:M; training has --seeds.")
]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Side of the images in pixels. Default: the backbone's own.")
]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Longest text in tokens. Default: 128.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Keep this many examples, stratified by label.")]
SplitSeed = Annotated[int, typer.Option(min=0, help="Seed of the train/val/test split, apart from training seeds.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:I.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where caches live. Default: SIDEBENCH_HOME/caches.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on stdout.")]
Store = Annotated[str, typer.Argument(help="Digest of the cache, or its beginning, or its path.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No messages and no progress.")]


def _take_recipe(context: typer.Context, name: str | None) -> str | None:
    """Let a recipe's options stand where nothing is typed."""
    if name is not None:
        from .recipes import recipe_named

        context.default_map = recipe_named(name).options()
    return name


RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A published setting: backbone, task, methods and settings, each of which may be typed as well.",
        callback=_take_recipe,
        is_eager=True,  # before the options that it stands in for
    ),
]


def typed_in(context: typer.Context) -> frozenset[str]:
    """Names of the parameters that were typed."""
    return frozenset(
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    )


def recipe_of(name: str | None) -> "Recipe | None":
    """The recipe that was asked for, if one was."""
    from .recipes import recipe_named

    return None if name is None else recipe_named(name)


@contextmanager
def displayed(quiet: bool) -> "Iterator[Display]":
    """Progress and messages on stderr while the block runs."""
    from .progress import Display

    with Display(quiet=quiet) as display:
        yield display


def agreed(question: str) -> bool:
    """Ask on the terminal; nobody there to answer means no."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")  # nobody there to answer: an empty line


def show(document: Any, as_json: bool, text: str) -> None:
    """Print a result: as JSON where asked for, else as text."""
    print(json.dumps(document, indent=1) if as_json else text)


def caches(given: Path | None) -> Path:
    """Where caches live: as given, else in sidebench's home."""
    from ..cache.home import home

    return given if given is not None else home() / "caches"


def names_of(text: str | None) -> tuple[str, ...] | None:
    """Names with commas; None where nothing was typed."""
    return None if text is None else tuple(name for name in text.split(",") if name)


def precision_of(text: str) -> str:
    """--precision, checked."""
    if text not in ("fp32", "bf16"):
        raise SidebenchError(f"--precision is fp32 or bf16; found {text!r}.")
    return text


def settings_of(given: list[str] | None) -> dict[str, dict[str, str]]:
    """--set METHOD.KEY=VALUE, as method -> key -> value."""
    found: dict[str, dict[str, str]] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        method, dot, key = name.rpartition(".")
        if not (equals and dot and method and key):
            raise SidebenchError(f"--set wants METHOD.KEY=VALUE, e.g. lora.rank=4; found {text!r}.")
        found.setdefault(method, {})[key] = value
    return found


def shots_of(text: str | None) -> tuple[int, ...]:
    """--shots: whole numbers with commas, each once, in rising order."""
    try:
        return tuple(sorted({int(shots) for shots in (text or "").split(",") if shots}))
    except ValueError:
        raise SidebenchError(f"--shots wants whole numbers with commas, e.g. 1,2,4,8,16; found {text!r}.") from None


def seeds_of(text: str) -> tuple[int, ...]:
    """--seeds: whole numbers with commas, each once."""
    try:
        found = tuple(dict.fromkeys(int(seed) for seed in text.split(",")))
    except ValueError:
        raise SidebenchError(f"--seeds wants whole numbers with commas, e.g. 0,1,2; found {text!r}.") from None
    if min(found) < 0 or max(found) >= 2**63:
        raise SidebenchError(f"--seeds wants numbers from 0 to 2^63 - 1; found {text!r}.")
    return found
