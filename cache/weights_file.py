"""Files of weights: read without running anything, fitted into a network by name and shape."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SidebenchError

_CLASSIFIER = "fc."  # torchvision's classifier
_POOLING = "attnpool."  # CLIP's, where the trunk is read without it
_COUNTERS = ("num_batches_tracked",)  # of batch norms that learn


def read_weights(path: Path) -> dict[str, Any]:
    """What a `.safetensors`, `.pth` or `.pt` file holds, by name; nothing in it is run.

    Raises SidebenchError for a file that is not there, is a TorchScript archive, or holds something other than tensors.
    """
    if not path.is_file():
        raise SidebenchError(f"no weights file at {path}.")
    if _is_torchscript(path):
        raise SidebenchError(
            f"{path} is a TorchScript archive, which is a program and is not run here (OpenAI's CLIP files are such). "
            "Convert it where you trust it: python -c \"import torch; torch.save(torch.jit.load('IN.pt', "
            "map_location='cpu').state_dict(), 'OUT.pth')\", and give OUT.pth."
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the library raise
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise SidebenchError(f"{path} cannot be read as weights: {type(error).__name__}: {said}.") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise SidebenchError(f"{path} holds no state dict (tensors by name): a {type(found).__name__}.")
    return found


def refuse_claims(module: nn.Module, file: Path) -> None:
    """Raise SidebenchError where a file speaks of more weights than it has room for, before they are allocated.

    `module`: the network that it describes, on the meta device.
    """
    claimed = sum(parameter.numel() for parameter in module.parameters())
    if 2 * claimed > file.stat().st_size:  # in two bytes each, at the very least
        raise SidebenchError(f"{file} speaks of {claimed:,} weights and has {file.stat().st_size:,} bytes.")


def fit_weights(module: nn.Module, weights: Mapping[str, Any], source: str, prefix: str = "") -> None:
    """Copy the tensors called `prefix` + a name of the module's; what lies outside the prefix is left alone.

    A classifier (`fc.`), CLIP's pooling where the module has none, and batch counters are passed over. Raises
    SidebenchError, `source` and the first name in it, for one that is missing, too many or of another shape.
    """
    wanted = {name: value for name, value in module.state_dict().items() if not name.endswith(_COUNTERS)}
    held = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    held = {name: value for name, value in held.items() if name in wanted or not _is_passed_over(name)}
    if missing := [name for name in wanted if name not in held]:
        raise SidebenchError(
            f"{source} lacks {len(missing)} of {len(wanted)} weights, the first is {prefix}{missing[0]}."
        )
    if strange := [name for name in held if name not in wanted]:
        raise SidebenchError(
            f"{source} holds {len(strange)} weights that this network has not, the first is {prefix}{strange[0]}; is "
            "it of another size?"
        )
    for name, value in wanted.items():
        found = held[name]
        if not isinstance(found, Tensor) or found.shape != value.shape or not found.is_floating_point():
            said = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise SidebenchError(f"{source}: {prefix}{name} is {said}; wanted floats {tuple(value.shape)}.")
    module.load_state_dict(held, strict=False)


def _is_passed_over(name: str) -> bool:
    return name.startswith((_CLASSIFIER, _POOLING)) or name.endswith(_COUNTERS)


def _is_torchscript(path: Path) -> bool:
    """By the constants that an archive of code has beside its tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
