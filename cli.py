"""The command line: parse, call one function, print. Nothing heavy is imported before a command needs it."""

import io
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .bench.cache_commands import cache_app
from .bench.list_commands import list_app
from .bench.options import (
    PLAIN,
    AsJson,
    Backbone,
    BatchSize,
    CacheDir,
    CaptureSeed,
    Compression,
    Device,
    Dtype,
    Epochs,
    ImageSize,
    Layers,
    Limit,
    MaxLength,
    Methods,
    PerChannel,
    Precision,
    Quiet,
    RecipeName,
    Set,
    SplitSeed,
    Steps,
    Task,
    Tokens,
    Views,
    caches,
    displayed,
    names_of,
    precision_of,
    recipe_of,
    seeds_of,
    settings_of,
    shots_of,
    show,
    typed_in,
)
from .cache.errors import SidebenchError

if TYPE_CHECKING:
    from .bench.plan import PlanRequest
    from .bench.recipes import Recipe


class Guarded(TyperGroup):
    """Turns refused input into a sentence and exit code 2, Ctrl-C into how to go on and 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Any other exception is a bug and shows its traceback."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the run in its own process would go on alone
        try:
            return super().invoke(ctx)
        except SidebenchError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            again = shlex.join(["bench", *(word for word in sys.argv[1:] if word != "--fresh")])
            print(f"\ninterrupted; everything finished is kept. To go on: {again}", file=sys.stderr)
            raise SystemExit(130) from None


app = typer.Typer(
    cls=Guarded,
    pretty_exceptions_enable=False,
    help="Run a frozen backbone once, train methods from its stored activations, compare accuracy, memory and time.",
    **PLAIN,
)
app.add_typer(cache_app, name="cache")
app.add_typer(list_app)  # at the top


@app.command()
def compare(
    context: typer.Context,
    backbone: Backbone,
    task: Task,
    methods: Methods,
    set_: Set = None,
    seeds: Annotated[str, typer.Option(help="Training seeds with commas.")] = "0,1,2",
    shots: Annotated[
        str | None, typer.Option(help="Few-shot: training examples of each class, e.g. 1,2,4,8,16.")
    ] = None,
    epochs: Epochs = 10,
    steps: Steps = None,
    batch_size: BatchSize = 32,
    lr: Annotated[
        str | None,
        typer.Option(help="auto (the default with --shots), a number, or several to choose from on validation."),
    ] = None,
    precision: Precision = "fp32",
    limit: Limit = None,
    split_seed: SplitSeed = 0,
    layers: Layers = None,
    dtype: Dtype = "float16",
    tokens: Tokens = "all",
    per_channel: PerChannel = False,
    compression: Compression = None,
    views: Views = 0,
    seed: CaptureSeed = 0,
    cache_in_ram: Annotated[bool, typer.Option("--cache-in-ram", help="Hold the cache in RAM while training.")] = False,
    cache_on_device: Annotated[bool, typer.Option("--cache-on-device", help="Hold it in the device's memory.")] = False,
    image_size: ImageSize = None,
    max_length: MaxLength = None,
    device: Device = "auto",
    no_build: Annotated[bool, typer.Option("--no-build", help="Refuse instead of building a missing cache.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Run everything again / reuse finished runs.")
    ] = False,
    cache_dir: CacheDir = None,
    map_init: Annotated[
        str | None, typer.Option(help="Fit METHOD@FILE of other size: prompts, layers, or both with a comma.")
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Go on with METHOD@FILE that was trained on examples of the task.")
    ] = False,
    runs_dir: Annotated[Path, typer.Option(help="Where records, predictions and reports go.")] = Path("runs"),
    recipe: RecipeName = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Predict what it would take, as bench plan does, and run nothing.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train and test methods on one backbone and task, and report accuracy, memory and time side by side."""
    from .bench.compare import compare
    from .bench.finish import finish
    from .bench.outcome import Request
    from .bench.prepare import Inputs
    from .bench.recipes_plan import plan_request
    from .bench.report import print_table
    from .bench.suite import compare_suite, show_suite, suite_of
    from .cache.build import CaptureOptions
    from .cache.home import home

    if cache_in_ram and cache_on_device:
        raise SidebenchError("--cache-in-ram and --cache-on-device exclude each other; choose one.")
    chosen, found_recipe = names_of(methods) or (), recipe_of(recipe)
    request = Request(
        inputs=Inputs(backbone, task, image_size, max_length, limit, device),
        methods=chosen,
        settings=settings_of(set_) if found_recipe is None else found_recipe.settings_with(settings_of(set_), chosen),
        seeds=seeds_of(seeds),
        shots=shots_of(shots),
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        split_seed=split_seed,
        precision=precision_of(precision),
        capture=CaptureOptions(names_of(layers), dtype, 64, tokens, per_channel, compression, views, seed),
        tier="ram" if cache_in_ram else "device" if cache_on_device else "auto",
        may_build=not no_build,
        fresh=fresh,
        map_init=names_of(map_init) or (),
        allow_overlap=allow_overlap,
    )
    if dry_run:
        _show_plan(plan_request(request), found_recipe, context, cache_dir, as_json=as_json, quiet=quiet)
        return
    if suite := suite_of(task):
        with displayed(quiet) as display:
            where = {"home": home(), "cache_dir": caches(cache_dir), "runs_dir": runs_dir}
            found = compare_suite(suite, request, **where, listener=display.listener())
        if not show_suite(found, as_json):
            raise typer.Exit(1)
        return
    with displayed(quiet) as display:
        outcome = compare(
            request, home=home(), cache_dir=caches(cache_dir), runs_dir=runs_dir, listener=display.listener()
        )
    finished = finish(outcome)
    if as_json:
        print(json.dumps(finished.document, indent=1))
    else:
        print_table(finished.table, outcome.score_name)
        print("\n".join(finished.sentences))
    if any(row["error"] for row in finished.table):
        raise typer.Exit(1)


@app.command()
def pretrain(
    backbone: Backbone,
    task: Task,
    method: Annotated[str, typer.Option(help="One method, as in bench compare, lora@last4 too.")],
    out: Annotated[Path, typer.Option(help="FILE.safetensors for the modules; then bench compare METHOD@FILE.")],
    set_: Set = None,
    objective: Annotated[str, typer.Option(help="supervised, or contrastive with --views 2 or more.")] = "supervised",
    temperature: Annotated[float, typer.Option(help="Of the contrastive objective.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Training seed.")] = 0,
    epochs: Epochs = 10,
    steps: Steps = None,
    batch_size: BatchSize = 32,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the method's own.")] = None,
    precision: Precision = "fp32",
    limit: Limit = None,
    split_seed: SplitSeed = 0,
    dtype: Dtype = "float16",
    tokens: Tokens = "all",
    views: Views = 0,
    image_size: ImageSize = None,
    max_length: MaxLength = None,
    device: Device = "auto",
    zero_shot: Annotated[
        str | None, typer.Option(help="A task of the same classes: try the source head on its test part, a control.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Begin anew, over what is there / go on where it was stopped.")
    ] = False,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a method's modules on a source task and keep them, without the head, as a start for other tasks."""
    from .bench.prepare import Inputs
    from .bench.pretrain import pretrain
    from .bench.pretrain import sentence as pretrained_sentence
    from .bench.pretrain_request import PretrainRequest
    from .bench.training import Diverged
    from .cache.build import CaptureOptions
    from .cache.home import home

    request = PretrainRequest(
        inputs=Inputs(backbone, task, image_size, max_length, limit, device),
        method=method,
        settings=settings_of(set_),
        out=out,
        objective=objective,
        temperature=temperature,
        seed=seed,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        precision=precision_of(precision),
        split_seed=split_seed,
        capture=CaptureOptions(None, dtype, 64, tokens, views=views),
        zero_shot=zero_shot,
        fresh=fresh,
    )
    with displayed(quiet) as display:
        try:
            found = pretrain(
                request, home=home(), cache_dir=caches(cache_dir), say=display.say, progress=display.examples
            )
        except Diverged as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
    show(found, as_json, pretrained_sentence(found))


@app.command()
def plan(
    context: typer.Context,
    backbone: Annotated[str, typer.Option(help="hf-config:PRESET, a folder or JSON file, or any backbone.")],
    methods: Methods,
    set_: Set = None,
    task: Annotated[str | None, typer.Option(help="Says how many classes and examples there are.")] = None,
    limit: Limit = None,
    num_examples: Annotated[int | None, typer.Option(min=1, help="Examples, where no task says how many.")] = None,
    num_outputs: Annotated[int | None, typer.Option(min=1, help="Classes. Default: the task's, else 100.")] = None,
    batch_size: BatchSize = 32,
    image_size: ImageSize = None,
    max_length: MaxLength = None,
    precision: Precision = "fp32",
    semantics: Annotated[str, typer.Option(help="cuda or cpu: whose kernels and optimiser defaults.")] = "cuda",
    attention: Annotated[str, typer.Option(help="auto, efficient, flash or math.")] = "auto",
    device_memory: Annotated[str | None, typer.Option(help="24GiB, 24GB or bytes: say what fits.")] = None,
    with_forward: Annotated[
        bool, typer.Option("--with-forward", help="Cached methods also with the frozen forward beside them.")
    ] = False,
    layers: Layers = None,
    dtype: Dtype = "float16",
    tokens: Tokens = "all",
    per_channel: PerChannel = False,
    compression: Compression = None,
    views: Views = 0,
    seed: CaptureSeed = 0,
    recipe: RecipeName = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Predict every method's peak memory, what fits, and the cache's size and gain; needs no GPU, weights or data."""
    from .bench.plan import PlanRequest
    from .cache.build import CaptureOptions

    chosen, found_recipe = names_of(methods) or (), recipe_of(recipe)
    request = PlanRequest(
        backbone=backbone,
        methods=chosen,
        settings=settings_of(set_) if found_recipe is None else found_recipe.settings_with(settings_of(set_), chosen),
        task=task,
        limit=limit,
        batch_size=batch_size,
        image_size=image_size,
        max_length=max_length,
        num_outputs=num_outputs,
        num_examples=num_examples,
        precision=precision,
        semantics=semantics,
        attention=attention,
        capture=CaptureOptions(names_of(layers), dtype, 64, tokens, per_channel, compression, views, seed),
        device_memory=device_memory,
        with_forward=with_forward,
    )
    _show_plan(request, found_recipe, context, cache_dir, as_json=as_json, quiet=quiet)


def _show_plan(
    request: "PlanRequest",
    recipe: "Recipe | None",
    context: typer.Context,
    cache_dir: Path | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from .bench.plan_report import print_plan
    from .bench.recipes_plan import plan_any, recipe_lines
    from .cache.home import home

    where = {"home": home(), "cache_dir": caches(cache_dir)}
    with displayed(quiet) as display:
        document = plan_any(request, **where, say=display.say, recipe=recipe, typed=typed_in(context))
    if as_json:
        print(json.dumps(document, indent=1))
        return
    print_plan(document)
    for line in recipe_lines(document):
        print(line)
