"""Build a store with several processes: each a fresh interpreter that writes its share of the chunks."""

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from ..cache.errors import SidebenchError
from ..cache.planning import Plan, options_of
from ..cache.shares import Chunks
from .prepare import Tower

COMMAND = (sys.executable, "-P", "-m", f"{__package__}.build_worker")
_RESUME = "What is written is kept: run the same command again to resume."


@dataclass(frozen=True)
class LocalWorkers:
    """Workers on this machine; see cache.build.Workers."""

    count: int
    tower: Tower
    planned: Plan
    home: Path

    def run(self, shares: Sequence[Chunks], lock: int, computed: Callable[[int], None]) -> tuple[float, float]:
        """See cache.build.Workers."""
        events: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
        started: list[_Process] = []
        try:
            for number, share in enumerate(shares):
                started.append(_Process(number, self._job(share), lock, events))
            return _follow(started, events, computed)
        finally:
            for process in started:
                process.stop()

    def _job(self, share: Chunks) -> dict[str, Any]:
        """Everything a worker needs, as plain JSON."""
        manifest = self.planned.manifest
        device = str(self.tower.network.device)
        return {
            "inputs": asdict(replace(self.tower.inputs, device=device)),
            "home": str(self.home),
            "cache_dir": str(self.tower.cache_dir),
            "capture": asdict(options_of(manifest)),
            "digest": manifest.digest,
            # A matrix product may be summed in another order by another number of threads.
            "threads": torch.get_num_threads(),
            "share": {path: list(chunks) for path, chunks in share.items()},
        }


class _Process:
    """One worker. Its standard input stays open: when it closes, the parent is gone and the worker stops."""

    def __init__(
        self, number: int, job: dict[str, Any], lock: int, events: "queue.Queue[tuple[int, dict[str, Any]]]"
    ) -> None:
        self.number = number
        self._events = events
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        # A session of its own: Ctrl-C is the parent's to answer, by ending its workers.
        self._popen = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            pass_fds=(lock,),
            start_new_session=True,
        )
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):  # it died at once; its exit code says so
            self._popen.stdin.write(json.dumps(job) + "\n")
            self._popen.stdin.flush()
        self._reader = threading.Thread(target=self._read, name="sidebench-worker-events", daemon=True)
        self._reader.start()

    def stop(self) -> None:
        """End it whatever it does: a chunk on disk is whole or absent at any moment."""
        self._popen.kill()
        self._popen.wait()
        self._reader.join()
        for stream in (self._popen.stdin, self._popen.stdout, self._log):
            if stream is not None:
                with suppress(BrokenPipeError):  # what it never read
                    stream.close()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # a library that prints
            if isinstance(event, dict):
                self._events.put((self.number, event))
        self._events.put((self.number, {"event": "ended", "death": self._death(self._popen.wait())}))

    def _death(self, code: int) -> str | None:
        """How it ended; None when it was through."""
        if code == 0:
            return None
        if code < 0:
            why = " (often for want of memory)" if -code == signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-code).name}{why}"
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f"failed: {lines[-1] if lines else f'exit code {code}'}"


def _follow(
    workers: Sequence[_Process], events: "queue.Queue[tuple[int, dict[str, Any]]]", computed: Callable[[int], None]
) -> tuple[float, float]:
    """Pass progress on until all are through; returns their seconds of forwards and of writing."""
    done = dict.fromkeys(range(len(workers)), 0)
    finished: dict[int, dict[str, Any]] = {}
    ended: set[int] = set()
    while len(ended) < len(workers):
        number, event = events.get()
        kind = event.get("event")
        if kind == "computed":
            done[number] = int(event["examples"])
            computed(sum(done.values()))
        elif kind == "finished":
            finished[number] = event
        elif kind == "error":
            raise SidebenchError(str(event["message"]))
        elif kind == "ended":
            if number not in finished:
                death = event["death"] or "ended before its work"
                raise SidebenchError(f"build worker {number + 1} of {len(workers)} {death}. {_RESUME}")
            ended.add(number)
    seconds = [[float(event[key]) for event in finished.values()] for key in ("forward_seconds", "write_seconds")]
    return sum(seconds[0]), sum(seconds[1])
