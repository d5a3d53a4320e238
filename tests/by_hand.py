"""Which tokens a form keeps, as loops over one example in float64: what the reductions are held against."""

import numpy as np
from numpy.typing import NDArray

from sidebench.cache.architecture import Architecture

Array = NDArray[np.float64]


def kept(tokens: str, arch: Architecture, x: Array, seed: int = 0) -> Array:
    """What is kept of one example's real tokens (T, D)."""
    kind, _, number = tokens.partition(":")
    prefix = arch.prefix_tokens
    cls = x[-1] if arch.causal else x[0]
    if kind == "grid":
        return np.stack([*x[:prefix], *_cells(x[prefix:], int(number))])
    if kind == "proj":
        return x @ basis(x.shape[1], int(number), seed)
    return {
        "all": lambda: x,
        "first": lambda: x[: int(number or 0)],
        "cls": lambda: cls[None],
        "mean": lambda: x[prefix:].mean(0)[None],
        "cls+mean": lambda: np.stack([cls, x[prefix:].mean(0)]),
    }[kind]()


def restored(tokens: str, arch: Architecture, x: Array, seed: int = 0) -> Array:
    """The best guess of an example's real tokens (T, D) from what is kept of them."""
    rows, prefix = kept(tokens, arch, x, seed), arch.prefix_tokens
    kind, _, number = tokens.partition(":")
    if kind == "all":
        return x
    if kind == "proj":
        return rows @ basis(x.shape[1], int(number), seed).T
    whole = np.zeros_like(x)
    if kind == "first":
        whole[: len(rows)] = rows
    elif kind == "grid":
        side, k = round((len(x) - prefix) ** 0.5), int(number)
        whole[:prefix] = rows[:prefix]
        for i in range(side):
            for j in range(side):
                whole[prefix + i * side + j] = rows[prefix + (i * k // side) * k + j * k // side]
    else:
        if "mean" in kind:
            whole[prefix:] = rows[-1]
        if "cls" in kind:
            whole[-1 if arch.causal else 0] = rows[0]
    return whole


def basis(width: int, count: int, seed: int) -> Array:
    """(D, M): PCG64's normal numbers, made orthonormal by Gram and Schmidt."""
    drawn = np.random.Generator(np.random.PCG64([seed, width])).standard_normal((width, count))
    columns: list[Array] = []
    for column in drawn.T:
        for known in columns:
            column = column - (column @ known) * known
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, 1)


def _cells(patches: Array, k: int) -> list[Array]:
    side = round(len(patches) ** 0.5)
    cells = []
    for row in range(k):
        for column in range(k):
            rows = range(row * side // k, -(-(row + 1) * side // k))
            columns = range(column * side // k, -(-(column + 1) * side // k))
            cells.append(np.mean([patches[i * side + j] for i in rows for j in columns], axis=0))
    return cells
