"""The one training loop, the same for every method trained in steps: AdamW, a schedule, selection on validation."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..adapters._base import Batch, Method, TrainingConfig, task_loss, trained
from ..cache.errors import SidebenchError, unknown
from ..cache.feed import batches_of, drawn_views, epoch_order
from ..cache.store import Index
from .learner import Source
from .tasks.score import ACCURACY, score_named

SCHEDULES = ("cosine", "linear", "constant")


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
    schedule: str = TrainingConfig.schedule  # of SCHEDULES
    warm_up: float = TrainingConfig.warm_up  # share of the steps


@dataclass(frozen=True)
class Trained:
    """The outcome of a training: the best state on validation and what it took."""

    state: dict[str, Tensor]  # of the best epoch, as `snapshot` takes it
    best_epoch: int
    val_score: float
    train_seconds: float
    examples_per_second: float
    losses: list[float]  # mean training loss per epoch


class Objective(Protocol):
    """What is trained for: the task's loss and score, or another one that needs no labels (see contrastive.py)."""

    def items(self, index: Index, *, examples: int, views: int, seed: int, epoch: int) -> Index:
        """The items to read for a batch of examples, as `cache.feed.drawn_views`."""
        ...

    def loss(self, learner: nn.Module, batch: Any, targets: Tensor, precision: str, epoch: int = 0) -> Tensor:
        """The mean loss of a batch of these items, with gradients."""
        ...

    def score(self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings) -> float:
        """What an epoch is selected by, on the examples of `index`: the larger the better."""
        ...


class Supervised:
    """The task's own loss and score. See Objective."""

    def items(self, index: Index, *, examples: int, views: int, seed: int, epoch: int) -> Index:
        """Each example, or one of its views."""
        return drawn_views(index, examples=examples, views=views, seed=seed, epoch=epoch)

    def loss(self, learner: nn.Module, batch: Any, targets: Tensor, precision: str, epoch: int = 0) -> Tensor:
        """The task's."""
        return loss_of(learner, batch, targets, precision)

    def score(self, learner: nn.Module, source: Source, targets: Tensor, index: Index, settings: Settings) -> float:
        """The task's."""
        return score_of(settings.score, predict(learner, source, index, settings), targets[index])


SUPERVISED = Supervised()


class Checkpoints(Protocol):
    """Where the state of a training that may be stopped is kept, after every epoch (see resume.py)."""

    def load(self) -> dict[str, Any] | None:
        """The state to go on from; None to begin."""
        ...

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state in place of the one before."""
        ...


def train(
    learner: nn.Module,
    source: Source,
    targets: Tensor,
    train_index: Index,
    val_index: Index,
    settings: Settings,
    progress: Callable[[dict[str, float]], None] = lambda _: None,
    objective: Objective = SUPERVISED,
    checkpoints: Checkpoints | None = None,
) -> Trained:
    """Train and keep the epoch that is best on validation (the earliest of equals).

    targets: (N,) class indices, or numbers, of all examples. With `checkpoints` it goes on where it was stopped, and
    ends as if it had not been. Raises Diverged when the loss is not finite.
    """
    optimizer = make_optimizer(learner, settings)
    steps = settings.epochs * math.ceil(len(train_index) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, functools.partial(rate_factor, steps=steps, settings=settings)
    )
    best: tuple[float, int, dict[str, Tensor]] | None = None
    losses: list[float] = []
    train_seconds, first = 0.0, 0
    if checkpoints is not None and (state := checkpoints.load()) is not None:
        _go_on(state, learner, optimizer, schedule)
        first, best, losses, train_seconds = state["epoch"], state["best"], state["losses"], state["train_seconds"]
    for epoch in range(first, settings.epochs):
        begun = time.perf_counter()
        order = batches_of(epoch_order(train_index, seed=settings.seed, epoch=epoch), settings.batch_size)
        items = [
            objective.items(i, examples=len(targets), views=source.views, seed=settings.seed, epoch=epoch)
            for i in order
        ]
        learner.train()
        total = torch.zeros((), device=targets.device)
        for index, batch in zip(order, source.batches(items), strict=True):
            loss = objective.loss(learner, batch, targets[index], settings.precision, epoch)
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
        score = objective.score(learner, source, targets, val_index, settings)
        progress({"epoch": epoch + 1, "epochs": settings.epochs, "loss": losses[-1], "val_score": score})
        if best is None or score > best[0]:
            best = (score, epoch, snapshot(learner))
        if checkpoints is not None:
            so_far = {"epoch": epoch + 1, "best": best, "losses": losses, "train_seconds": train_seconds}
            checkpoints.save(so_far | _state(learner, optimizer, schedule))
    assert best is not None
    speed = len(train_index) * settings.epochs / train_seconds
    return Trained(best[2], best[1], best[0], train_seconds, speed, losses)


def _state(learner: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> dict[str, Any]:
    """What training changes besides what it has found, the generators of a method that draws among it."""
    return {
        "learner": snapshot(learner),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "generators": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
    }


def _go_on(state: dict[str, Any], learner: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    load_trained(learner, state["learner"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["generators"][0])
    torch.cuda.set_rng_state_all(state["generators"][1:])


def optimizer_of(method: Method) -> str:
    """The optimiser that the method's Config chooses, where it offers a choice."""
    return str(getattr(method.config, "optimizer", "adamw"))


def schedule_of(method: Method) -> tuple[str, float]:
    """The schedule and the share of warm-up that the method's Config chooses, where it offers a choice.

    Raises SidebenchError for a schedule that the loop does not know.
    """
    schedule = str(getattr(method.config, "schedule", TrainingConfig.schedule))
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    return schedule, float(getattr(method.config, "warm_up", TrainingConfig.warm_up))


def make_optimizer(learner: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW over what is trained; bitsandbytes' where its state is to be kept in 8 bits."""
    parameters = _groups(learner, settings.lr)
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _groups(learner: nn.Module, lr: float) -> list[Any]:
    """What is trained; as two groups where the task's head states at which share of `lr` it learns."""
    head: Any = getattr(learner, "head", None)
    share = getattr(head, "learning_rate_share", 1.0)
    parameters = list(trained(learner).values())
    if share == 1.0:
        return parameters
    slow = {id(parameter) for parameter in head.parameters()}
    groups = ([p for p in parameters if id(p) not in slow], lr), ([p for p in parameters if id(p) in slow], share * lr)
    return [{"params": group, "lr": rate} for group, rate in groups if group]


def loss_of(learner: nn.Module, batch: Batch, targets: Tensor, precision: str) -> Tensor:
    """The task's mean loss of one batch."""
    with autocast(targets.device, precision):
        logits = learner(batch)
    return task_loss(logits.float(), targets)


def predict(learner: nn.Module, source: Source, index: Index, settings: Settings) -> Tensor:
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


def rate_factor(step: int, steps: int, settings: Settings) -> float:
    """Factor on the learning rate: a linear warm-up, and half a cosine or a line down to zero, or neither.

    The line begins where the warm-up ends, as in published scripts; the cosine spans all steps, the warm-up's too.
    """
    warm = max(round(steps * settings.warm_up), 1)
    risen = min((step + 1) / warm, 1.0)
    if settings.schedule == "cosine":
        return risen * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
    return min(risen, (steps - step) / max(steps - warm, 1)) if settings.schedule == "linear" else risen


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """bfloat16 mixed precision where asked for."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
