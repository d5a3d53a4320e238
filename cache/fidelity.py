"""What a form loses: the relative error of every layer against the full activations, on a sample of the task.

The same forward gives the centre and spread of every channel where a form asks for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .encode import encode, not_finite
from .joint import Packing
from .planning import Plan
from .quantise import channels_of
from .views import prepare_items

SAMPLE_EXAMPLES = 32


@dataclass(frozen=True)
class Fidelity:
    """Per layer: |x - read back| / |x| over all real tokens of the sample (L2), and the channels (D, 2)."""

    relative_errors: Mapping[str, float]
    channels: Mapping[str, Tensor]


def examine(planned: Plan) -> Fidelity:
    """Forward examples spread over the task in one batch of their own: the same sample whoever builds, or resumes.

    Tokens that are not kept and cannot be inferred from what is kept count as lost. Raises SidebenchError for an
    activation that is not finite.
    """
    manifest, total = planned.manifest, len(planned.examples)
    sample = np.linspace(0, total - 1, min(SAMPLE_EXAMPLES, total)).astype(int).tolist()
    preprocess = planned.backbone.preprocess
    inputs, mask = preprocess.collate(prepare_items(preprocess, planned.examples, sample, manifest.form.seed))
    device = planned.backbone.device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    real_ones, every_one = Packing(mask), Packing(None)
    errors: dict[str, float] = {}
    channels: dict[str, Tensor] = {}

    def look(layer: str, value: Tensor) -> None:
        packing = every_one if layer in planned.fixed else real_ones
        whole, real_tokens = packing(value.to("cpu", torch.float32)), packing.mask
        kept, kept_mask = planned.reduction.keep(whole, real_tokens)
        real = torch.ones(kept.shape[:2], dtype=torch.bool) if kept_mask is None else kept_mask
        bad = real & ~torch.isfinite(kept).all(-1)
        if bool(bad.any()):  # it would spoil the channels of all examples
            raise not_finite(layer, planned.examples.ids[sample[int(bad.any(1).nonzero()[0])]])
        if manifest.form.per_channel:
            channels[layer] = channels_of(kept[real])
        stored = encode(kept, manifest.form, channels.get(layer))
        back = planned.reduction.restore(stored.float() * real[..., None], real_tokens, whole.shape)
        every = torch.ones(whole.shape[:2], dtype=torch.bool) if real_tokens is None else real_tokens
        lost, size = (back - whole)[every].double().norm(), whole[every].double().norm()
        errors[layer] = float(lost / size) if size > 0 else float(lost)

    with torch.inference_mode():
        planned.backbone.run(inputs, manifest.layers, look)
    return Fidelity(errors, channels)


def stated(relative_errors: Mapping[str, float]) -> str:
    """The sentence for people."""
    return "relative error on a sample: " + ", ".join(f"{layer} {e:.2g}" for layer, e in relative_errors.items())
