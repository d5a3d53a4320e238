"""Visual grounding: an expression's thing is boxed by one of an encoder-decoder's queries (MDETR, methods.md 1.7).

The heads begin as the checkpoint has them and learn at a tenth of the rate. The losses are on every level of the
decoder that a method yields, as in the reference: of one that runs the decoder each block's output behind the final
norm, of UniPT and SHERL those of their own; of a side network that has but its end (LST) that alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...adapters._base import Batch, Body
from ...cache.errors import SidebenchError
from ...cache.feed import batches_of
from ...cache.store import Index
from ..learner import Source
from ..training import Settings, autocast
from .base import Tested, Tower, Towers
from .box_head import TOKENS, BoxHead, Found
from .box_loss import Wanted, box_loss
from .boxes_score import Grounded, grounded
from .overlap import corners

HEAD_RATE = 0.1  # of the method's learning rate: 5e-5 beside 5e-4 in the released scripts


class BoxLearner(nn.Module):
    """A method's body and the heads, and what the encoder says of the text.

    forward: levels (L, B, Q, D) of the decoder, the last being the prediction, and the text's tokens (B, N, D) as the
    encoder yields them. memory: the encoder's last layer. N: the most tokens that a text has.
    """

    def __init__(self, tower: Tower, memory: str, head: BoxHead) -> None:
        super().__init__()
        self.body: Body = tower.body
        self.head = head
        self._memory = memory
        self._heard: dict[str, Tensor] = {}
        self._norm: list[nn.Module] = []  # in a list: it is the backbone's
        if (backbone := tower.backbone) is not None:
            for layer in (memory, *backbone.arch.decoder_states[1:-1]):
                module = backbone.module.get_submodule(backbone.tap_path(layer))
                module.register_forward_hook(partial(self._hear, layer))
            self._norm.append(backbone.module.get_submodule(backbone.tap_path(backbone.final_layer)))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Levels (L, B, Q, D), and the encoder's tokens (B, T, D) with their mask (B, T)."""
        self._heard.clear()
        levels = getattr(self.body, "levels", None)
        decoded = levels(batch) if levels and self.training else [self.body(batch)]
        if self._memory not in self._heard:
            return torch.stack(decoded), batch.state(self._memory), batch.mask_of(self._memory)
        memory = self._heard.pop(self._memory)
        earlier = [norm(state) for norm in self._norm for state in self._heard.values()] if self.training else []
        self._heard.clear()
        return torch.stack([*earlier, *decoded]), memory, batch.inputs["attention_mask"].bool()

    def _hear(self, layer: str, _: nn.Module, __: Any, out: Any) -> None:
        self._heard[layer] = out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True, eq=False)
class Boxes:
    """See Goal. Targets are the examples' own numbers, by which labels are found.

    arrays: `boxes` (N, 4) centre, width and height in fractions of the image; `text_tokens` (N,) how many tokens a text
    has; `named_of` (N + 1,) and `named` (M,) which of them name the box; `head.…` the heads as the checkpoint has them.
    memory: the layer that the encoder yields.
    """

    memory: str
    arrays: Mapping[str, NDArray[Any]]

    def learner(self, towers: Towers) -> nn.Module:
        """See Goal."""
        (tower,) = towers.values()
        head = BoxHead(tower.body.width, HEAD_RATE)
        start = {name.removeprefix("head."): a for name, a in self.arrays.items() if name.startswith("head.")}
        own = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()} if start else {}
        if wrong := next((name for name, shape in own.items() if start[name].shape != shape), None):
            raise SidebenchError(
                f"the checkpoint's head {wrong} is {start[wrong].shape}, and {own[wrong]} is wanted for the method's "
                f"width {tower.body.width} and texts of {TOKENS} tokens."
            )
        if start:
            head.load_state_dict({name: torch.tensor(array) for name, array in start.items()})
        return BoxLearner(tower, self.memory, head)

    def blank_targets(self, examples: int) -> Tensor:
        """See Goal."""
        return torch.zeros(examples, dtype=torch.int64)

    def items(self, index: Index, *, examples: int, views: int, seed: int, epoch: int) -> Index:
        """See Objective: the examples themselves."""
        return index

    def loss(self, learner: nn.Module, batch: Any, targets: Tensor, precision: str, epoch: int = 0) -> Tensor:
        """See Objective."""
        found, real = self._found(learner, batch, targets, precision)
        return box_loss(found, self._wanted(targets), real)

    def score(self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings) -> float:
        """See Objective: P@1 by IoU."""
        return float(self._grounded(learner, source, targets, index, settings).contributions().mean())

    def test(self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings) -> Tested:
        """See Goal. Kept: place (N,) of the first box that hits, 0 being the top, by both measures."""
        found = self._grounded(learner, source, targets, index, settings)
        added = found.contributions()
        arrays = {"contributions": added, "places_by_iou": found.by_iou, "places_by_giou": found.by_giou}
        return Tested(float(added.mean()), found.figures(), index, arrays)

    def _found(self, learner: nn.Module, batch: Any, targets: Tensor, precision: str) -> tuple[Found, Tensor]:
        """What the heads say, and which (B, N) of the texts' tokens are real."""
        assert isinstance(learner, BoxLearner)
        with autocast(targets.device, precision):
            levels, memory, mask = learner(batch)
        most = int(self.arrays["text_tokens"].max())
        counts = self._of("text_tokens", targets)
        place = torch.arange(most, device=memory.device)
        # Of the encoder's real tokens the text's are the last ones, whatever padding lies between them.
        order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        rank = (mask.sum(1, keepdim=True) - counts[:, None] + place).clamp(0, mask.shape[1] - 1)
        where = order.gather(1, rank)
        text = memory.gather(1, where[..., None].expand(-1, -1, memory.shape[2]))
        # In float32: bfloat16 leaves a box some 8 bits, and makes ties of scores.
        return learner.head(levels.float(), text.float()), place < counts[:, None]

    def _wanted(self, targets: Tensor) -> Wanted:
        count, most = len(targets), int(self.arrays["text_tokens"].max())
        named = torch.zeros(count, most, dtype=torch.bool)
        if not isinstance(targets, FakeTensor):  # of which no value is known, and none matters
            for row, example in enumerate(targets.tolist()):
                first, last = self.arrays["named_of"][example : example + 2]
                named[row, torch.from_numpy(self.arrays["named"][first:last])] = True
        return Wanted(self._of("boxes", targets).float(), named.to(targets.device), [1] * count)

    def _of(self, name: str, targets: Tensor) -> Tensor:
        """The rows of an array that belong to these examples."""
        array = self.arrays[name]
        if isinstance(targets, FakeTensor):
            return torch.zeros((len(targets), *array.shape[1:]), dtype=torch.from_numpy(array[:0]).dtype)
        return torch.from_numpy(array[targets.cpu().numpy()]).to(targets.device)

    def _grounded(
        self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings
    ) -> Grounded:
        assert isinstance(learner, BoxLearner)
        learner.eval()
        scores, boxes = [], []
        batches = batches_of(index, settings.batch_size)
        with torch.inference_mode():
            for batch in source.batches(batches):
                with autocast(targets.device, settings.precision):
                    levels, memory, _ = learner(batch)
                score, box = learner.head(levels.float(), memory[:, :1].float()).scored()
                scores.append(score.cpu().numpy())
                boxes.append(box.cpu().numpy())
        examples = targets.cpu().numpy()[index]
        wanted = corners(torch.from_numpy(self.arrays["boxes"][examples])).numpy()
        return grounded(np.concatenate(scores), np.concatenate(boxes), wanted)
