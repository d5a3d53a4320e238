"""`lora@last4`: a live method on the backbone's last blocks alone, fed from a cache."""

from ..cache.architecture import Architecture
from ..cache.suffix import Suffix
from ._base import Body, LiveMethod, PrefixMethod


class AtLast(PrefixMethod):
    """A live method, built on the last `blocks` blocks as if they were the whole backbone."""

    projected = True

    def __init__(self, method: LiveMethod, blocks: int) -> None:
        super().__init__(method.config)
        self.method = method
        self.blocks = blocks

    def first_block(self, arch: Architecture) -> int:
        """See PrefixMethod."""
        return arch.blocks - self.blocks

    def refusal(self, arch: Architecture) -> str | None:
        """It needs as many blocks as it is to hold, and whatever the method needs."""
        if not 0 < self.blocks <= arch.blocks:
            return f"@last{self.blocks} wants {self.blocks} blocks, and {arch.name} has {arch.blocks}"
        return self.method.refusal(arch)

    def build(self, suffix: Suffix) -> Body:
        """See PrefixMethod."""
        return self.method.network(suffix)
