"""Which tokens of an activation are kept, and what a backbone looks like to whoever reads only those."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, pad

from .architecture import Architecture
from .errors import SidebenchError
from .pooling import masked_mean, pooling_mask

FORMS = ("all", "cls", "mean", "cls+mean", "grid:K", "first:N", "proj:M")
_COUNTED = re.compile(r"(grid|first|proj):([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Reduction:
    """All tokens of (B, T, D) as they are; the subclasses keep less. `mask` (B, T) marks real tokens, None all."""

    arch: Architecture  # the backbone's own

    @property
    def seen(self) -> Architecture:
        """The architecture as it looks through what is kept: what methods and stores are told."""
        return self.arch

    def shape(self, tokens: int | None, width: int) -> tuple[int | None, int]:
        """(tokens, width) that is kept of one example; tokens are None where examples differ.

        Raises SidebenchError for a layer that cannot be reduced like this.
        """
        return tokens, width

    def lengths(self, tokens: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Kept tokens of each text, from its tokens in the forward; None: the same number of all."""
        return tokens

    def keep(self, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What is kept of (B, T, D): (B, T', D') and its mask."""
        return value, mask

    def restore(self, kept: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
        """The best guess of the whole activation, of `shape` (B, T, D), from what was kept; what was not is zero."""
        return kept


@dataclass(frozen=True)
class First(Reduction):
    """The first `count` tokens."""

    count: int = 1

    @property
    def seen(self) -> Architecture:
        """See Reduction."""
        return replace(self.arch, prefix_tokens=min(self.arch.prefix_tokens, self.count))

    def shape(self, tokens: int | None, width: int) -> tuple[int | None, int]:
        """See Reduction."""
        return None if tokens is None else min(tokens, self.count), width

    def lengths(self, tokens: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """See Reduction."""
        return np.minimum(tokens, self.count)

    def keep(self, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See Reduction."""
        return value[:, : self.count], None if mask is None else mask[:, : self.count]

    def restore(self, kept: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
        """See Reduction."""
        return pad(kept, (0, 0, 0, shape[1] - kept.shape[1]))


@dataclass(frozen=True)
class Summary(Reduction):
    """The summary token, the mean over real tokens that are no prefix, or both in this order."""

    cls: bool = False
    mean: bool = False

    @property
    def seen(self) -> Architecture:
        """Both: the summary token is a prefix, so that a mean over what is kept is the mean."""
        prefix = 1 if self.cls and (self.mean or self.arch.prefix_tokens) else 0
        causal = self.arch.causal and not self.mean
        return replace(self.arch, prefix_tokens=prefix, causal=causal, stages=((1, 1),) * len(self.arch.stages))

    def shape(self, tokens: int | None, width: int) -> tuple[int | None, int]:
        """See Reduction."""
        return self.cls + self.mean, width

    def lengths(self, tokens: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """See Reduction."""
        return None

    def keep(self, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See Reduction."""
        real = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device) if mask is None else mask
        kept = []
        if self.cls:
            kept.append(value[torch.arange(len(value), device=value.device), self._position(real)])
        if self.mean:
            value = value if mask is None else value.masked_fill(~mask[..., None], 0)  # NaN in padding times 0 is NaN
            kept.append(masked_mean(value, pooling_mask(real, self.arch.prefix_tokens)))
        return torch.stack(kept, 1), None  # (B, 1 or 2, D)

    def restore(self, kept: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
        """See Reduction."""
        real = torch.ones(shape[:2], dtype=torch.bool) if mask is None else mask
        whole = torch.zeros(shape)
        if self.mean:
            whole += kept[:, -1:] * pooling_mask(real, self.arch.prefix_tokens)[..., None]
        if self.cls:
            whole[torch.arange(len(kept)), self._position(real)] = kept[:, 0]
        return whole

    def _position(self, real: Tensor) -> Tensor:
        """A causal text tower (CLIP) sums a text up in its last token, others in their first."""
        return real.sum(1) - 1 if self.arch.causal else torch.zeros_like(real[:, 0], dtype=torch.long)


@dataclass(frozen=True)
class Grid(Reduction):
    """The prefix tokens, and the patches averaged to a grid of `side` x `side`."""

    side: int = 1

    @property
    def seen(self) -> Architecture:
        """See Reduction."""
        return replace(self.arch, stages=((self.side, self.side),) * len(self.arch.stages))

    def shape(self, tokens: int | None, width: int) -> tuple[int | None, int]:
        """See Reduction."""
        own = self._side(tokens or 0)
        if own is None or own < self.side:
            raise SidebenchError(
                f"--tokens grid:{self.side} wants a square of {self.side} x {self.side} patches or more; this layer "
                f"has {(tokens or 0) - self.arch.prefix_tokens} patches. Type a smaller grid, or mean."
            )
        return self.arch.prefix_tokens + self.side**2, width

    def keep(self, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See Reduction."""
        prefix, patches = value.split([self.arch.prefix_tokens, value.shape[1] - self.arch.prefix_tokens], 1)
        side = self._side(value.shape[1])
        assert side is not None
        square = patches.mT.unflatten(2, (side, side))  # (B, D, S, S)
        return torch.cat([prefix, adaptive_avg_pool2d(square, self.side).flatten(2).mT], 1), None

    def restore(self, kept: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
        """See Reduction."""
        prefix, cells = kept.split([self.arch.prefix_tokens, self.side**2], 1)
        side = self._side(shape[1])
        assert side is not None
        square = interpolate(cells.mT.unflatten(2, (self.side, self.side)), size=(side, side))
        return torch.cat([prefix, square.flatten(2).mT], 1)

    def _side(self, tokens: int) -> int | None:
        patches = max(tokens - self.arch.prefix_tokens, 0)
        side = round(patches**0.5)
        return side if side * side == patches else None


@dataclass(frozen=True)
class Projection(Reduction):
    """Every token's `width` coordinates in a fixed random orthonormal basis, drawn from `seed`."""

    width: int = 1
    seed: int = 0

    @property
    def seen(self) -> Architecture:
        """A backbone of that width whose blocks nobody can copy."""
        inner = self.arch.projected_from and self.width
        return replace(self.arch, width=self.width, projected_from=inner, norm=None)

    def shape(self, tokens: int | None, width: int) -> tuple[int | None, int]:
        """See Reduction."""
        if self.width >= width:
            raise SidebenchError(f"--tokens proj:{self.width} keeps no less than this layer's width {width}.")
        return tokens, self.width

    def keep(self, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See Reduction."""
        return value @ self.basis(value.shape[-1]).to(value.device), mask

    def restore(self, kept: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
        """See Reduction."""
        return kept @ self.basis(shape[2]).mT

    def basis(self, width: int) -> Tensor:
        """(D, M) orthonormal columns: the same for every layer of a width."""
        return _basis(self.seed, width, self.width)


@lru_cache(maxsize=8)
def _basis(seed: int, width: int, kept: int) -> Tensor:
    drawn = np.random.Generator(np.random.PCG64([seed, width])).standard_normal((width, kept))
    columns, triangle = np.linalg.qr(drawn)
    # The signs of a QR factorisation are the library's choice; these are not.
    return torch.from_numpy(columns * np.sign(np.diag(triangle))).float()


def reduction_of(tokens: str, arch: Architecture, seed: int | None) -> Reduction:
    """The reduction that `tokens` names. Raises SidebenchError for a name unknown or impossible on this backbone."""
    plain: dict[str, Callable[[], Reduction]] = {
        "all": lambda: Reduction(arch),
        "cls": lambda: Summary(arch, cls=True),
        "mean": lambda: Summary(arch, mean=True),
        "cls+mean": lambda: Summary(arch, cls=True, mean=True),
    }
    if "cls" in tokens and arch.modality == "image" and not arch.prefix_tokens:
        raise SidebenchError(f"--tokens {tokens} wants a class token, and {arch.name} has none; type mean.")
    if tokens in plain:
        return plain[tokens]()
    matched = _COUNTED.fullmatch(tokens)
    if matched is None:
        raise SidebenchError(
            f"no tokens {tokens[:40]!r}; wanted {', '.join(FORMS)}, with a number from 1 for the letter."
        )
    kind, count = matched[1], int(matched[2])
    if kind == "grid" and arch.modality != "image":
        raise SidebenchError(
            f"--tokens {tokens} is for images; {arch.name} reads {arch.modality}. Type first:N or mean."
        )
    if kind == "first" and arch.stages:
        raise SidebenchError(f"--tokens {tokens}: the first tokens of a map are its upper edge; type mean or grid:4.")
    if kind == "grid":
        return Grid(arch, count)
    return First(arch, count) if kind == "first" else Projection(arch, count, seed or 0)
