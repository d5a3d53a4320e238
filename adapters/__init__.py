"""One file per method, read top to bottom; files with an underscore are plumbing. These names write a new one."""

from ._base import (
    BackboneBody,
    Batch,
    Body,
    CachedMethod,
    FittedMethod,
    LiveConfig,
    LiveMethod,
    PrefixMethod,
    TrainingConfig,
    option,
)

__all__ = [
    "BackboneBody",
    "Batch",
    "Body",
    "CachedMethod",
    "FittedMethod",
    "LiveConfig",
    "LiveMethod",
    "PrefixMethod",
    "TrainingConfig",
    "option",
]
