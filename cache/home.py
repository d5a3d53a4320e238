"""Where samples, caches and remembered hashes live: SIDEBENCH_HOME, else the platform's cache folder."""

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """Absolute path of the home folder; it need not exist yet."""
    named = os.environ.get("SIDEBENCH_HOME", "")
    return Path(named).expanduser().absolute() if named else Path(platformdirs.user_cache_dir("sidebench"))
