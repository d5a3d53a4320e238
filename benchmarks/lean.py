"""Side networks that recompute in backward against the forms that keep everything: bytes of a training step, and time.

Shapes of ViT-B/16 at batch 64 with 100 classes: 13 states (64, 197, 768) in float16, computed with in float32.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
from timing import interleaved, show

from sidebench.adapters._base import Batch, CachedMethod
from sidebench.adapters._registry import find_method
from sidebench.bench.learner import Learner
from sidebench.bench.tracker import TrackedPeak, track
from sidebench.bench.training import Settings, loss_of, make_optimizer
from sidebench.cache.architecture import Architecture

MIB = 2**20
VIT_B = Architecture(
    "ViT-B/16",
    "image",
    blocks=12,
    width=768,
    prefix_tokens=1,
    final_layer="norm",
    heads=12,
    mlp_width=3072,
    norm="pre",
    activation="gelu",
)
EXAMPLES, TOKENS, CLASSES = 64, 197, 100
# Predicted peaks of whole fine-tuning and of LoRA r8 (q, v) at these shapes, which the goals are fractions of.
FULL_MIB, LORA_MIB = 8316, 5559
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "unipt": ("unipt", {}),
    "unipt, single anchor": ("unipt", {"form": "single_anchor"}),
    "lst": ("lst", {"init": "random"}),
}


def side_networks(rounds: int = 3) -> None:
    """Peak and time of one step, lean and plain."""
    for title, (name, options) in CASES.items():
        lean, plain = (_peak(name, options, lean=lean) for lean in (True, False))
        steps = {form: _stepper(name, options, lean=form == "lean") for form in ("lean", "plain")}
        seconds = interleaved(steps, rounds)
        mib = lean.peak_bytes / MIB
        show(
            f"{title}: a training step on {EXAMPLES} examples of ViT-B/16, tracked",
            [
                ("plain, MiB", f"{plain.peak_bytes / MIB:.0f}", plain.at),
                ("lean, MiB", f"{mib:.0f}", lean.at),
                *((f"  {part}", f"{size / MIB:.0f}", "") for part, size in lean.by_category.items()),
                *((f"  most in {phase}", f"{size / MIB:.0f}", "") for phase, size in lean.by_phase.items()),
                ("lean / plain, bytes", f"{lean.peak_bytes / plain.peak_bytes:.2f}", ""),
                ("lean / full fine-tuning predicted", f"{mib / FULL_MIB:.3f}", "goal 0.05"),
                ("lean / LoRA predicted", f"{mib / LORA_MIB:.3f}", "goal 0.08"),
                ("lean / plain, time", f"{seconds['lean'] / seconds['plain']:.2f}", "goal 1.5"),
            ],
        )


def _peak(name: str, options: dict[str, str], *, lean: bool) -> TrackedPeak:
    learner, batch, targets, settings = _case(name, options, lean=lean)
    inputs = [targets, batch.mask, *batch.activations.values()]
    return track(learner, make_optimizer(learner, settings), inputs, lambda: loss_of(learner, batch, targets, "fp32"))


def _stepper(name: str, options: dict[str, str], *, lean: bool) -> Callable[[int], None]:
    learner, batch, targets, settings = _case(name, options, lean=lean)
    optimizer = make_optimizer(learner, settings)

    def step(turn: int) -> None:
        loss_of(learner, batch, targets, "fp32").backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _case(name: str, options: dict[str, str], *, lean: bool) -> tuple[Learner, Batch, torch.Tensor, Settings]:
    method = find_method(name).configured({**options, "lean": str(lean)})
    assert isinstance(method, CachedMethod)
    layers = method.layers(VIT_B)
    torch.manual_seed(0)
    body = method.build(VIT_B, dict.fromkeys(layers, VIT_B.width), _no_weights)
    generator = torch.Generator().manual_seed(1)
    shape = (EXAMPLES, TOKENS, VIT_B.width)
    states = {layer: torch.randn(shape, generator=generator).half() for layer in layers}
    targets = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    batch = Batch(torch.ones(shape[:2], dtype=torch.bool), states)
    return Learner(body, CLASSES, "mean", 1), batch, targets, Settings(0, 1, EXAMPLES, 1e-3, 0.0, "fp32")


def _no_weights() -> NoReturn:
    raise AssertionError("these start at random")


if __name__ == "__main__":
    torch.set_num_threads(1)
    side_networks()
