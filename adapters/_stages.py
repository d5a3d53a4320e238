"""What side networks on stage maps of a convolutional network share, where they bring all to the last's grid."""

from torch import Tensor, nn

from ..cache.architecture import Architecture


def refused(arch: Architecture) -> str | None:
    """Why these maps cannot be brought to the last one's grid; None when they can."""
    *earlier, (height, width) = arch.stages
    if not earlier:
        return "it needs two stage maps or more: at least one guide beside the anchor"
    if height * width == 1:
        return "its batch norms need a last map of more than one pixel; keep --tokens all or grid:2, or larger images"
    for layer, (h, w) in arch.grids.items():
        if h % height or w % width:
            return (
                f"the {h} x {w} map {layer} is no multiple of the last, {height} x {width}; choose another --image-size"
            )
    return None


class LinearNorm(nn.Module):
    """A 1 x 1 convolution and its batch norm, on tokens (B, T, D)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, m)."""
        return self.norm(self.linear(tokens).flatten(0, 1)).unflatten(0, tokens.shape[:2])
