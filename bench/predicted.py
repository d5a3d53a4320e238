"""A run's own prediction: the step whose memory was measured, on fake tensors, as the run's device would do it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..adapters._base import Batch, CachedMethod, FittedMethod, LiveMethod, Method, PrefixMethod
from .assemble import Assembled
from .measure import Memory
from .predict import Prediction, predict_again, predict_copy
from .predict_fit import predict_fit
from .record import Job
from .step import Step
from .towers import PairBatch


def with_prediction(memory: Memory, job: Job, method: Method, assembled: Assembled, batch: Batch | PairBatch) -> Memory:
    """`memory` with the requested bytes predicted for a training step on `batch`."""
    step = Step(
        batch_size=len(batch.mask),
        precision=job.precision,
        semantics=_semantics(job),
        form=assembled.form,
        goal=assembled.goal,
    )

    def predicted() -> Prediction:
        if isinstance(method, CachedMethod):
            return predict_copy(method, assembled.learner, batch, step)
        assert isinstance(method, LiveMethod | PrefixMethod)
        return predict_again(method, assembled.fakes, batch, step)

    return _added(memory, predicted)


def with_fit_prediction(memory: Memory, job: Job, method: FittedMethod, features: Tensor) -> Memory:
    """The same for a method that is solved on all `features` (N, D)."""
    examples, width = features.shape
    semantics = _semantics(job)
    return _added(
        memory,
        lambda: predict_fit(method, examples=examples, width=width, num_outputs=job.num_outputs, semantics=semantics),
    )


def _semantics(job: Job) -> str:
    return "cuda" if job.device.startswith("cuda") else "cpu"


def _added(memory: Memory, predicted: Callable[[], Prediction]) -> Memory:
    values: dict[str, Any] = {"predicted_peak_bytes": None}
    reasons: dict[str, str] = {}
    try:
        values["predicted_peak_bytes"] = predicted().peak.peak_bytes
    except Exception as error:  # a prediction never costs a run: whatever a method does with fake tensors is a reason
        reasons["predicted_peak_bytes"] = f"{type(error).__name__}: {error}"
    return Memory({**memory.values, **values}, {**memory.unavailable, **reasons})
