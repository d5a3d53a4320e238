"""One file per method, read top to bottom; `_base.py` and `_registry.py` are the only plumbing."""
