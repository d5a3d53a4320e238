"""What a comparison would take, `bench compare --dry-run` and `bench plan`, of a recipe or of what was typed."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cache.pair import is_pair
from .outcome import Request
from .plan import PlanRequest, plan
from .plan_pair import plan_pair
from .prepare import Say
from .recipes import Recipe


def plan_request(request: Request) -> PlanRequest:
    """The plan of a comparison."""
    inputs = request.inputs
    return PlanRequest(
        backbone=inputs.backbone,
        methods=request.methods,
        settings=request.settings,
        task=inputs.task,
        limit=inputs.limit,
        batch_size=request.batch_size,
        image_size=inputs.image_size,
        max_length=inputs.max_length,
        precision=request.precision,
        capture=request.capture,
    )


def of_recipe(request: PlanRequest, recipe: Recipe, typed: Collection[str]) -> PlanRequest:
    """The same without weights and data, but for the backbone or the task that was typed."""
    if "backbone" not in typed:
        request = replace(request, backbone=recipe.architecture)
    if "task" in typed:
        return request
    return replace(
        request,
        task=None,
        goal=recipe.goal,
        num_outputs=request.num_outputs or recipe.num_outputs,
        num_examples=request.num_examples or recipe.num_examples,
        num_captions=recipe.num_captions,
        frames=recipe.frames,
    )


def plan_any(
    request: PlanRequest,
    *,
    home: Path,
    cache_dir: Path,
    say: Say,
    recipe: Recipe | None = None,
    typed: Collection[str] = (),
) -> dict[str, Any]:
    """The document of `bench plan --json`: of one backbone or a pair, with the recipe's facts where there is one.

    typed: names of the options that go before the recipe's.
    """
    if recipe is not None:
        request = of_recipe(request, recipe, typed)
    planned = plan_pair if is_pair(request.backbone) else plan
    document = planned(request, home=home, cache_dir=cache_dir, say=say)
    return document if recipe is None else {**document, "recipe": recipe.facts()}


def recipe_lines(document: Mapping[str, Any]) -> list[str]:
    """What is known of the recipe beside the table, as sentences."""
    facts = document.get("recipe")
    if facts is None:
        return []
    rows = (
        f"{name}: {row['trainable']} parameters, {row['memory_g']:g} G on {row['devices']} "
        f"device{'' if row['devices'] == 1 else 's'}, which are {row['bytes_per_device'] / 2**20:,.0f} MiB on each, at "
        f"{row['batch_per_device']} of the batch of {facts['batch_size']}"
        for name, row in facts["published"].items()
    )
    return [
        f"{facts['name']}: {facts['source']}.",
        "Reported (1 G = 2^20 x 1000 bytes):",
        *(f"  {row}" for row in rows),
        *_shares(facts["published"], document["step"]["batch_size"]),
        *(f"  {remark}" for remark in facts["remarks"]),
        "Not reproduced:",
        *(f"  {what}" for what in facts["not_reproduced"]),
    ]


def _shares(published: Mapping[str, Mapping[str, Any]], predicted: int) -> list[str]:
    """How to predict at the batches of the reported figures, where those are others."""
    shares: dict[int, list[str]] = {}
    for name, row in published.items():
        shares.setdefault(row["batch_per_device"], []).append(name)
    return [
        f"  the table is of batch {predicted}: --batch-size {share} predicts what a device had ({', '.join(names)})"
        for share, names in shares.items()
        if share != predicted
    ]
