"""The one training loop, the same for every method trained in steps: AdamW, cosine, selection on validation."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters._base import Batch, Method, task_loss, trained
from ..cache.errors import SidebenchError
from ..cache.feed import batches_of, drawn_views, epoch_order
from ..cache.store import Index
from .learner import Learner, Source
from .tasks.score import ACCURACY, score_named

WARM_UP = 0.1  # share of the steps in which the learning rate rises linearly; the same for every method


class Diverged(SidebenchError):
    """Training left the finite numbers: of several learning rates this one is out, a single one fails the run."""


@dataclass(frozen=True)
class Settings:
    """How a run trains; equal for all methods but for what their Config states of the optimiser."""

    seed: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    precision: str  # "fp32" | "bf16"
    score: str = ACCURACY  # what the epoch is selected by
    optimizer: str = "adamw"  # "adamw" | "adamw8bit"


@dataclass(frozen=True)
class Trained:
    """The outcome of a training: the best state on validation and what it took."""

    state: dict[str, Tensor]  # of the best epoch, as `snapshot` takes it
    best_epoch: int
    val_score: float
    train_seconds: float
    examples_per_second: float
    losses: list[float]  # mean training loss per epoch


def train(
    learner: Learner,
    source: Source,
    targets: Tensor,
    train_index: Index,
    val_index: Index,
    settings: Settings,
    progress: Callable[[dict[str, float]], None] = lambda _: None,
) -> Trained:
    """Train and keep the epoch that is best on validation (the earliest of equals).

    targets: (N,) class indices, or numbers, of all examples. Raises Diverged when the loss is not finite.
    """
    optimizer = make_optimizer(learner, settings)
    steps = settings.epochs * math.ceil(len(train_index) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    best: tuple[float, int, dict[str, Tensor]] | None = None
    losses = []
    train_seconds = 0.0
    for epoch in range(settings.epochs):
        begun = time.perf_counter()
        order = batches_of(epoch_order(train_index, seed=settings.seed, epoch=epoch), settings.batch_size)
        items = [
            drawn_views(i, examples=len(targets), views=source.views, seed=settings.seed, epoch=epoch) for i in order
        ]
        learner.train()
        total = torch.zeros((), device=targets.device)
        for index, batch in zip(order, source.batches(items), strict=True):
            loss = loss_of(learner, batch, targets[index], settings.precision)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            total += loss.detach() * len(index)
        losses.append(float(total) / len(train_index))  # also waits for the device
        train_seconds += time.perf_counter() - begun
        if not math.isfinite(losses[-1]):
            raise Diverged(
                f"the loss is {losses[-1]} in epoch {epoch + 1} at learning rate {settings.lr:g}; try a smaller --lr."
            )
        score = score_of(settings.score, predict(learner, source, val_index, settings), targets[val_index])
        progress({"epoch": epoch + 1, "epochs": settings.epochs, "loss": losses[-1], "val_score": score})
        if best is None or score > best[0]:
            best = (score, epoch, snapshot(learner))
    assert best is not None
    speed = len(train_index) * settings.epochs / train_seconds
    return Trained(best[2], best[1], best[0], train_seconds, speed, losses)


def optimizer_of(method: Method) -> str:
    """The optimiser that the method's Config chooses, where it offers a choice."""
    return str(getattr(method.config, "optimizer", "adamw"))


def make_optimizer(learner: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW over what is trained; bitsandbytes' where its state is to be kept in 8 bits."""
    parameters = list(trained(learner).values())
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def loss_of(learner: Learner, batch: Batch, targets: Tensor, precision: str) -> Tensor:
    """The task's mean loss of one batch."""
    with autocast(targets.device, precision):
        logits = learner(batch)
    return task_loss(logits.float(), targets)


def predict(learner: Learner, source: Source, index: Index, settings: Settings) -> Tensor:
    """Logits (len(index), K) in float32 on the run's device, in the order of `index`."""
    learner.eval()
    batches = batches_of(index, settings.batch_size)
    with torch.inference_mode():
        rows = []
        for batch in source.batches(batches):
            with autocast(batch.mask.device, settings.precision):
                rows.append(learner(batch).float())
    return torch.cat(rows)


def snapshot(learner: nn.Module) -> dict[str, Tensor]:
    """Copies of what training changes, on the host: on the device they would count as memory of the method."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _changing(learner).items()}


def load_trained(learner: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a snapshot back, in place."""
    with torch.no_grad():
        for name, tensor in _changing(learner).items():
            tensor.copy_(state[name])


def _changing(learner: nn.Module) -> dict[str, Tensor]:
    """What is trained, and the buffers: a batch norm's running statistics are those of its epoch."""
    return {**trained(learner), **dict(learner.named_buffers())}


def score_of(name: str, outputs: Tensor, targets: Tensor) -> float:
    """The task's score of outputs (N, K)."""
    return score_named(name).value(outputs.float().cpu().numpy(), targets.cpu().numpy())


def cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to zero."""
    warm = max(round(steps * WARM_UP), 1)
    return min((step + 1) / warm, 1.0) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """bfloat16 mixed precision where asked for."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
