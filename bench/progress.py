"""Progress on stderr: a bar with its ETA on a terminal, plain lines elsewhere, nothing when quiet."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from .launch import Listener
from .record import Job
from .tasks.score import printed

_PLAIN_INTERVAL_SECONDS = 5.0


class Display:
    """Says things and shows how far a build or a comparison is. Use as a context manager."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._said: set[str] = set()
        self._bar: Any = None
        self._task: Any = None
        self._begun: float | None = None
        self._last = 0.0

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def say(self, sentence: str) -> None:
        """One line."""
        if not self._quiet:
            self._stop()
            print(sentence, file=sys.stderr, flush=True)

    def listener(self) -> Listener:
        """This display as the listener of a comparison."""
        return Listener(self.say, self.examples, self.run_event)

    def examples(self, done: int, total: int) -> None:
        """Examples of a build that are done."""
        if self._quiet:
            return
        if sys.stderr.isatty():
            self._show_bar(done, total)
        else:
            self._print_plain(done, total)

    def run_event(self, job: Job, event: Mapping[str, Any]) -> None:
        """What a run tells."""
        name = f"{job.method} seed {job.seed}" + ("" if job.shots is None else f", {job.shots} shots")
        kind = event.get("event")
        if kind == "epoch":
            if event["epoch"] % max(event["epochs"] // 10, 1) and event["epoch"] < event["epochs"]:
                return  # few shots make short epochs, and hundreds of them
            loss = f", loss {event['loss']:.4f}" if "loss" in event else ""
            score = printed(job.score, event["val_score"])
            self.say(f"{name}: epoch {event['epoch']}/{event['epochs']}{loss}, validation {score}")
        elif kind == "failed":
            self.say(f"{name}: failed: {event['message']}")
        elif kind == "tier" and event["why"] not in self._said:
            self._said.add(event["why"])
            self.say(f"{name}: cache {event['why']}")
        elif kind == "initialisation":
            took = f"{event['seconds']:.1f} s and {event['peak_tracked_bytes'] / 2**20:.1f} MiB tracked"
            self.say(
                f"{name}: back-propagated through the whole backbone over {event['examples']} training examples to "
                f"initialise, {took}; once, and in no other figure of the run"
            )
        elif kind == "mapped":
            self.say(f"{name}: {event['how']}")
        elif kind == "reused":
            self.say(f"{name}: finished before, reused")
        elif kind == "started":
            self.say(f"{name}: started")

    def _show_bar(self, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            columns = (
                TextColumn("caching"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("caching", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
        if done >= total:
            self._stop()

    def _print_plain(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._begun is None:
            self._begun, self._first = now, done
        if now - self._last < _PLAIN_INTERVAL_SECONDS and done < total:
            return
        self._last = now
        fresh = done - self._first
        left = f", about {(now - self._begun) * (total - done) / fresh:.0f} s left" if fresh and done < total else ""
        print(f"cached {done:,} of {total:,} examples{left}", file=sys.stderr, flush=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
