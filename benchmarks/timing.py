"""Ratios taken within one run: contenders take turns, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(contenders: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender over `rounds` turns; each turn passes its number, the same to all."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(0)  # warm: page cache, thread pools, first-touch checksums
    for turn in range(1, rounds + 1):
        for name, run in contenders.items():
            begun = time.perf_counter()
            run(turn)
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in seconds.items()}


def show(title: str, rows: list[tuple[str, str, str]]) -> None:
    """A table of figure, value and goal."""
    print(f"\n{title}")
    width = max(len(name) for name, _, _ in rows)
    for name, value, goal in rows:
        print(f"  {name:<{width}}  {value:>12}  {goal}", flush=True)
