"""In which form activations are kept: which tokens, in which numbers, compressed or not, how many views.

A form is part of a store's facts, so two forms are two stores.
"""

from dataclasses import dataclass
from typing import Any

from .errors import SidebenchError, unknown
from .layout import COMPRESSIONS, STORAGE_DTYPES
from .quantise import QUANTISED

MOST_VIEWS = 1000


@dataclass(frozen=True)
class Form:
    """What is kept of each activation. `seed` draws the views and the projection; None where neither is asked for."""

    tokens: str = "all"  # all | cls | mean | cls+mean | grid:K | first:N | proj:M
    dtype: str = "float16"
    per_channel: bool = False  # int8 and fp8: normalise each channel before each token
    compression: str | None = None
    views: int = 0  # augmented views of every example beside the plain one
    seed: int | None = None

    @property
    def quantised(self) -> bool:
        """Whether every token has a scale of its own."""
        return self.dtype in QUANTISED

    @property
    def lossy(self) -> bool:
        """Whether more is lost than the rounding of a floating-point dtype."""
        return self.quantised or self.tokens != "all"

    @property
    def pooled_dtype(self) -> str:
        """Pooled rows are small: they are not quantised."""
        return "float32" if self.quantised else self.dtype


def make_form(*, tokens: str, dtype: str, per_channel: bool, compression: str | None, views: int, seed: int) -> Form:
    """The form that these options ask for. Raises SidebenchError for one that is unknown or has no effect."""
    if dtype not in STORAGE_DTYPES:
        raise unknown("storage dtype", dtype, STORAGE_DTYPES)
    if per_channel and dtype not in QUANTISED:
        raise SidebenchError(f"--per-channel is for --dtype {' or '.join(QUANTISED)}; {dtype} has no scales.")
    if compression is not None and compression not in COMPRESSIONS:
        raise unknown("compression", compression, COMPRESSIONS)
    if not 0 <= views <= MOST_VIEWS:
        raise SidebenchError(f"--views wants 0 to {MOST_VIEWS}; found {views}.")
    drawn = views > 0 or tokens.startswith("proj:")
    return Form(tokens, dtype, per_channel, compression, views, seed if drawn else None)


def form_from_facts(values: Any) -> Form:
    """Rebuild a Form from a manifest, which is untrusted; how `tokens` is spelled is checked by `reduction_of`.

    Raises SidebenchError, or a TypeError where the fields are not a form's.
    """
    form = Form(**values)
    counts = (form.views, 0 if form.seed is None else form.seed)
    if not (
        isinstance(form.tokens, str)
        and form.dtype in STORAGE_DTYPES
        and isinstance(form.per_channel, bool)
        and form.compression in (None, *COMPRESSIONS)
        and all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
        and form.views <= MOST_VIEWS
        and (form.quantised or not form.per_channel)
    ):
        raise SidebenchError(f"its form {str(values)[:100]} is none that this version reads.")
    return form
