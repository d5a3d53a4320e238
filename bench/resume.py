"""A training that was stopped goes on: its state after the last whole epoch, in a file beside what it is to make."""

import glob
from pathlib import Path
from typing import Any

import torch

from ..cache.errors import SidebenchError
from .prepare import Say
from .record import replacing


class ResumeFile:
    """Keeps and gives back a state of tensors and plain values, for one training alone. See training.Checkpoints.

    `about` says which training, device and code it is of; the state of another is refused, never mixed in.
    """

    def __init__(self, path: Path, about: str, say: Say) -> None:
        self.path = path
        self._about = about
        self._say = say
        self.epochs = 0  # that were found finished

    def load(self) -> dict[str, Any] | None:
        """The state, None where there is none or it cannot be read. Raises SidebenchError for another training's."""
        if not self.path.exists():
            return None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            about, state = str(found["about"]), dict(found["state"])
            self.epochs = int(state["epoch"])
        except Exception as error:  # a damaged file makes the restricted unpickler fail in any way
            self._say(f"{self.path} cannot be read ({type(error).__name__}), so the training begins anew.")
            return None
        if about != self._about:
            raise SidebenchError(
                f"{self.path} is the unfinished state of another training than this one; finish that with the command "
                "it was begun with, choose another --out, or begin anew with --fresh."
            )
        self._say(f"goes on behind epoch {self.epochs}, from {self.path}")
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state in place of the one before, whole or not at all."""
        try:
            with replacing(self.path) as temporary:
                torch.save({"about": self._about, "state": state}, temporary)
        except (SidebenchError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            raise SidebenchError(f"cannot write {self.path}; make room, or choose another --out.") from error

    def remove(self) -> None:
        """Once what it is for is made; what a killed process was writing goes, too."""
        for path in (self.path, *self.path.parent.glob(f"{glob.escape(self.path.name)}.*.partial")):
            path.unlink(missing_ok=True)
