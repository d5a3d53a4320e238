"""int8 and fp8 (e4m3) activations: one scale per token, if asked after each channel was normalised.

A token x (D,) is kept as q = round(y / s) with s = max|y| / limit, where y is x, or (x - centre) / spread with the
centre and spread of each channel over a sample. It is read back as q s spread + centre.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# dtype name -> (torch dtype, largest magnitude). int8 leaves -128 unused: it fills what was never written.
QUANTISED: dict[str, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
}
LEAST_SPREAD = 0.01  # of a channel, as a share of their mean


@dataclass(frozen=True)
class Quantised:
    """Activations (…, D) as small numbers: values (…, D), scales (…) in float32, channels (D, 2) or None.

    A scale of 0 marks padding, which reads as zeros; a token that is zero everywhere has scale 1. `channels` holds
    centre and spread.
    """

    values: Tensor
    scales: Tensor
    channels: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(…, D)."""
        return self.values.shape

    def float(self) -> Tensor:
        """The activations in float32."""
        wide = self.values.float().mul_(self.scales[..., None])  # in place: this tensor is nobody else's
        if self.channels is None:
            return wide
        centre, spread = self.channels.unbind(1)
        return wide.mul_(spread).add_(centre).mul_((self.scales > 0)[..., None])

    def to(self, device: torch.device, non_blocking: bool = False) -> "Quantised":
        """The same on another device."""
        return Quantised(*(None if t is None else t.to(device, non_blocking=non_blocking) for t in self._parts()))  # type: ignore[arg-type]

    def tensors(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        return (t for t in self._parts() if t is not None)

    def __getitem__(self, where: Any) -> "Quantised":
        """Select along the axes before D."""
        return Quantised(self.values[where], self.scales[where], self.channels)

    def __len__(self) -> int:
        return len(self.values)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.values, self.scales, self.channels


def quantise(value: Tensor, dtype: str, channels: Tensor | None = None) -> Quantised:
    """Quantise (…, D) per token. What is not finite makes the scale infinite or NaN: look there."""
    kind, limit = QUANTISED[dtype]
    # Contiguous, as it comes back from disk: a sum over tokens in another order may round otherwise.
    wide = value.float().contiguous()
    if channels is not None:
        centre, spread = channels.unbind(1)
        wide = (wide - centre) / spread
    largest = wide.abs().amax(-1)
    # Below the smallest normal number a scale has few digits left, or none.
    scales = (largest / limit).clamp_min(torch.finfo(torch.float32).tiny)
    scales = torch.where(largest == 0, torch.ones_like(largest), scales)
    small = (wide / scales[..., None]).clamp_(-limit, limit)
    values = small.round_().nan_to_num_(0.0).to(kind) if kind is torch.int8 else small.to(kind)
    return Quantised(values, scales, channels)


def channels_of(value: Tensor) -> Tensor:
    """Centre and spread (D, 2) of every channel over the tokens (n, D); where all are constant the spread is 1.

    No spread is below a hundredth of their mean: a channel that hardly varies here and does elsewhere would set the
    scale of whole tokens.
    """
    wide = value.double()
    spread = wide.std(0, unbiased=False)
    spread = spread.clamp_min(LEAST_SPREAD * float(spread.mean()))
    # In float32, which is what is kept: what vanishes there would divide by zero.
    kept = torch.stack([wide.mean(0), spread], 1).float()
    kept[:, 1] = torch.where(kept[:, 1] > 0, kept[:, 1], torch.ones_like(kept[:, 1]))
    return kept
