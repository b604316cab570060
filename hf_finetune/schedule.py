"""Learning-rate schedules: pure curves from progress to a multiple of each group's rate.

A curve sees progress in [0, 1] over what it spans (the run or one phase), so a schedule has no state to lose. The one
exception listens to the monitor: `reduce_on_plateau`, whose curve is flat and whose factor the loop applies.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hf_finetune.spec import Auto, DurationField, Spec

Share = Annotated[float, Field(ge=0, le=1)]


class ScheduleSpec(Spec):
    """What every schedule has; each subclass is one line of `SCHEDULES`."""

    name: str
    warmup: DurationField | Auto | None = "auto"
    """Linear rise from zero at the start of what the schedule spans; null for none."""
    scope: Literal["auto", "run", "phase"] = "auto"
    """One curve over the whole run, or a new one for each phase; auto = what the strategy asks for."""
    warms_up: ClassVar[bool] = True
    """False for curves that rise by themselves, which take no warmup."""

    def multiple(self, progress: float) -> float:
        """Return the multiple of the rate at `progress` in [0, 1] after the warmup."""
        raise AssertionError(f"{type(self).__name__} defines no curve")


class Constant(ScheduleSpec):
    """The same rate throughout."""

    name: Literal["constant"] = "constant"

    def multiple(self, progress: float) -> float:
        return 1.0


class Linear(ScheduleSpec):
    """A straight line down to `floor`."""

    name: Literal["linear"] = "linear"
    floor: Share = 0.0
    """Last multiple of the rate."""

    def multiple(self, progress: float) -> float:
        return self.floor + (1 - self.floor) * (1 - progress)


class Cosine(ScheduleSpec):
    """Cosine annealing to `floor` (SGDR without restarts, arXiv 1608.03983)."""

    name: Literal["cosine"] = "cosine"
    floor: Share = 0.0
    """Last multiple of the rate."""

    def multiple(self, progress: float) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


class CosineRestarts(ScheduleSpec):
    """Cosine annealing in `cycles`, each `stretch` times as long as the one before (arXiv 1608.03983)."""

    name: Literal["cosine_restarts"] = "cosine_restarts"
    cycles: Annotated[int, Field(ge=1)] = 3
    """Number of cycles."""
    stretch: Annotated[float, Field(gt=0)] = 1.0
    """Length of each cycle as a multiple of the one before."""
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Peak of each cycle as a multiple of the one before."""
    floor: Share = 0.0
    """Last multiple of the rate."""

    def multiple(self, progress: float) -> float:
        lengths = [self.stretch**cycle for cycle in range(self.cycles)]
        position, peak = progress * sum(lengths), 1.0
        for length in lengths[:-1]:
            if position < length:
                break
            position, peak = position - length, peak * self.decay
        else:
            length = lengths[-1]
        within = min(1.0, position / length)
        return peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * within)))


class Polynomial(ScheduleSpec):
    """`(1 - progress) ** power` down to `floor`."""

    name: Literal["polynomial"] = "polynomial"
    power: Annotated[float, Field(gt=0)] = 2.0
    """1 is a straight line; the larger, the earlier the fall."""
    floor: Share = 0.0
    """Last multiple of the rate."""

    def multiple(self, progress: float) -> float:
        return self.floor + (1 - self.floor) * (1 - progress) ** self.power


class OneCycle(ScheduleSpec):
    """Cosine up to the rate, cosine down to almost nothing (Smith 2018; fastai's `fit_one_cycle` defaults)."""

    name: Literal["one_cycle"] = "one_cycle"
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the span spent rising."""
    start: Annotated[float, Field(ge=0, le=1)] = 1 / 25
    """First rate as a multiple of the peak."""
    end: Annotated[float, Field(ge=0, le=1)] = 1e-5
    """Last rate as a multiple of the peak."""
    warms_up: ClassVar[bool] = False

    def multiple(self, progress: float) -> float:
        if progress < self.rise:
            return _cosine_between(self.start, 1.0, progress / self.rise)
        return _cosine_between(1.0, self.end, (progress - self.rise) / (1 - self.rise))


class SlantedTriangular(ScheduleSpec):
    """A short straight rise and a long straight fall (ULMFiT, arXiv 1801.06146)."""

    name: Literal["slanted_triangular"] = "slanted_triangular"
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The paper's cut_frac."""
    ratio: Annotated[float, Field(ge=1)] = 32.0
    """The peak is this many times the lowest rate."""
    warms_up: ClassVar[bool] = False

    def multiple(self, progress: float) -> float:
        height = (
            progress / self.rise if progress < self.rise else 1 - (progress - self.rise) / (1 - self.rise)
        )
        return (1 + height * (self.ratio - 1)) / self.ratio


class WarmupStableDecay(ScheduleSpec):
    """Flat, then a straight fall over the last `decay` of the span (arXiv 2404.06395)."""

    name: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the span spent falling."""
    floor: Share = 0.0
    """Last multiple of the rate."""

    def multiple(self, progress: float) -> float:
        return self.floor + (1 - self.floor) * min(1.0, (1 - progress) / self.decay)


class ReduceOnPlateau(ScheduleSpec):
    """Multiply the rate by `factor` when the monitored metric stops improving."""

    name: Literal["reduce_on_plateau"] = "reduce_on_plateau"
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """What the rate is multiplied by."""
    patience: Annotated[int, Field(ge=1)] = 2
    """Evaluations without improvement."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What is no larger does not count as an improvement."""
    floor: Share = 0.0
    """The rate never falls below this multiple of its start."""

    def multiple(self, progress: float) -> float:
        return 1.0


SCHEDULES: dict[str, type[ScheduleSpec]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "cosine_restarts": CosineRestarts,
    "polynomial": Polynomial,
    "one_cycle": OneCycle,
    "slanted_triangular": SlantedTriangular,
    "warmup_stable_decay": WarmupStableDecay,
    "reduce_on_plateau": ReduceOnPlateau,
}


def multiple_at(schedule: ScheduleSpec, step: int, *, span_steps: int, warmup_steps: int) -> float:
    """Return the multiple of the rate for optimizer step `step` (from 0) of a span of `span_steps`.

    The warmup rises in equal parts; the step after it is the first at the full rate. The curve covers the steps that
    remain, and its end lies on the last step's far side: no step is spent at a rate of zero.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1) * schedule.multiple(0.0)
    remaining = max(1, span_steps - warmup_steps)
    return schedule.multiple(min(1.0, (step - warmup_steps) / remaining))


def _cosine_between(start: float, end: float, share: float) -> float:
    return start + (end - start) * 0.5 * (1 - math.cos(math.pi * share))
