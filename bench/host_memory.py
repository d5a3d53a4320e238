"""Sample this process's memory from a thread: what it allocated, apart from the files it mapped (a cache)."""

import ctypes
import gc
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

_STATUS = Path("/proc/self/status")
_FIELDS = {"RssAnon": "anonymous", "VmRSS": "resident"}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SMALL, _LARGE = 2**17, 2**25  # glibc's first threshold, and the one it ends at once blocks of 32 MiB were freed


@dataclass(frozen=True)
class HostMemory:
    """Peaks above the level at entry; a field that could not be measured is None and `unavailable` says why.

    `peak_anonymous_bytes`: pages that belong to no file, so a memory-mapped cache is not in it. `peak_resident_bytes`:
    these plus resident pages of mapped files. Both are sampled, so a spike shorter than `longest_gap_seconds` may be
    missed, and Linux updates its counters in batches of pages (some 100 kB per core).
    """

    peak_anonymous_bytes: int | None
    peak_resident_bytes: int | None
    samples: int
    longest_gap_seconds: float
    unavailable: dict[str, str] = field(default_factory=dict)


class _Probe(Protocol):
    def read_bytes(self) -> dict[str, int]: ...


class HostMeter:
    """Measure what runs inside the `with` block; read `result()` after it.

    At entry garbage is collected and the C library gives its free pages back, else the block could grow into memory
    that the process already held and show nothing. Inside, glibc returns every freed block above 128 KiB to the system
    at once; left alone it keeps them, and the figure would be its free list (many times the tensors alive, for a solver
    that makes and drops large ones).
    """

    def __init__(self, interval_seconds: float = 0.002) -> None:
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="host-meter", daemon=True)
        self._samples, self._longest_gap_seconds, self._last_seconds = 0, 0.0, 0.0
        self._result: HostMemory | None = None

    def __enter__(self) -> "HostMeter":
        gc.collect()
        _keep_freed_blocks_up_to(_SMALL)
        _give_free_pages_back()
        self._probe, self._unavailable = _choose_probe()
        self._baseline = self._probe.read_bytes() if self._probe else {}
        self._peak = dict(self._baseline)
        self._last_seconds = time.perf_counter()
        if self._probe:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._probe:
            self._thread.join()
            self._sample(self._probe)
        _keep_freed_blocks_up_to(_LARGE)  # fast again, and alike for every method whatever it freed before
        above = {name: self._peak[name] - start for name, start in self._baseline.items()}
        self._result = HostMemory(
            peak_anonymous_bytes=above.get("anonymous"),
            peak_resident_bytes=above.get("resident"),
            samples=self._samples,
            longest_gap_seconds=self._longest_gap_seconds,
            unavailable=self._unavailable,
        )

    def result(self) -> HostMemory:
        """Return what was measured; only after the block."""
        if self._result is None:
            raise RuntimeError("the meter's block has not ended")
        return self._result

    def _sample_until_stopped(self) -> None:
        assert self._probe is not None
        while not self._stop.wait(self._interval_seconds):
            self._sample(self._probe)

    def _sample(self, probe: _Probe) -> None:
        for name, now_bytes in probe.read_bytes().items():
            self._peak[name] = max(self._peak[name], now_bytes)
        now_seconds = time.perf_counter()
        self._longest_gap_seconds = max(self._longest_gap_seconds, now_seconds - self._last_seconds)
        self._last_seconds = now_seconds
        self._samples += 1


class _LinuxStatus:
    def read_bytes(self) -> dict[str, int]:
        lines = (line.split() for line in _STATUS.read_text().splitlines())
        return {_FIELDS[name[:-1]]: int(rest[0]) * 1024 for name, *rest in lines if name[:-1] in _FIELDS}


class _Psutil:
    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()

    def read_bytes(self) -> dict[str, int]:
        return {"resident": int(self._process.memory_info().rss)}


def _choose_probe() -> tuple[_Probe | None, dict[str, str]]:
    linux = _LinuxStatus()
    try:
        if set(linux.read_bytes()) == set(_FIELDS.values()):
            return linux, {}
    except OSError:
        pass
    why = "this system does not tell anonymous memory apart (no RssAnon in /proc/self/status)"
    try:
        return _Psutil(), {"peak_anonymous_bytes": f"{why}; the resident memory counts mapped files too"}
    except ImportError:
        return None, {"peak_anonymous_bytes": why, "peak_resident_bytes": f"{why}, and psutil is not installed"}


def _keep_freed_blocks_up_to(size_bytes: int) -> None:
    """Larger blocks are mapped, and unmapped when freed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc
    mallopt(_M_MMAP_THRESHOLD, size_bytes)
    mallopt(_M_TRIM_THRESHOLD, 2 * size_bytes)


def _give_free_pages_back() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # not glibc: there the baseline includes free pages and the peak is a lower bound
