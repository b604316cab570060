"""Watching the validation set: the best value, early stopping, plateaus."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from hf_finetune.spec import Auto, Duration, DurationField, Spec

Mode = Literal["max", "min"]


class PatienceSpec(Spec):
    """How many evaluations without an improvement of at least `min_delta` are too many."""

    patience: Annotated[int, Field(ge=1)] = 3
    """Evaluations in a row."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What is no larger does not count as an improvement."""


class Waits(Protocol):
    """Any section with a patience, such as PatienceSpec or a schedule that listens."""

    @property
    def patience(self) -> int:
        """Evaluations in a row."""

    @property
    def min_delta(self) -> float:
        """What is no larger does not count as an improvement."""


class MonitorSpec(Spec):
    """What is measured, how often, and what follows from it."""

    metric: str = "auto"
    """What "best" means; auto = accuracy for single labels, f1_micro for multi-label, mse for regression."""
    mode: Mode | Auto = "auto"
    """auto = what the metric says."""
    metrics: list[str] = []
    """Further metrics to report."""
    evaluate: DurationField = Duration(1, "epochs")
    """Time between two evaluations; the run always ends with one."""
    early_stopping: PatienceSpec | None = None
    """End the run when the metric stops improving; the count starts again with each phase."""


@dataclass
class Patience:
    """Counts evaluations without improvement; equal values do not improve."""

    mode: Mode
    patience: int
    min_delta: float = 0.0
    best: float | None = None
    waited: int = 0

    def exhausted_by(self, value: float) -> bool:
        """Take in one value; return whether `patience` values in a row brought no improvement (NaN brings none)."""
        better = self.best is None or is_better(value, self.best, self.mode, self.min_delta)
        if better and not math.isnan(value):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` values brought no improvement."""
        return self.waited >= self.patience

    def restart(self) -> None:
        """Count afresh, keeping the best value seen."""
        self.waited = 0


@dataclass
class Best:
    """The best value of the monitored metric so far and where it was seen."""

    mode: Mode
    value: float | None = None
    step: int = 0
    epoch: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)

    def update(self, value: float, *, step: int, epoch: float, metrics: dict[str, Any]) -> bool:
        """Take in one evaluation; return whether it is the best so far (a tie keeps the earlier one)."""
        if math.isnan(value) or (self.value is not None and not is_better(value, self.value, self.mode)):
            return False
        self.value, self.step, self.epoch, self.metrics = value, step, epoch, metrics
        return True


def is_better(value: float, than: float, mode: Mode, min_delta: float = 0.0) -> bool:
    """Return whether `value` improves on `than` by more than `min_delta`; NaN never does."""
    return value > than + min_delta if mode == "max" else value < than - min_delta


@dataclass
class Watch:
    """What the monitor remembers: the best value, and who waits for an improvement."""

    best: Best
    early: Patience | None = None
    """Early stopping."""
    reducing: Patience | None = None
    """The schedule's reduction of the rate."""
    plateau: Patience | None = None
    """The end of the phase."""

    @classmethod
    def of(cls, monitor: MonitorSpec, reduce: Waits | None) -> Watch:
        """Return the watch of a run; `reduce` is the patience of its schedule, if that listens."""
        assert monitor.mode != "auto"
        patience = [_patience(monitor.mode, spec) for spec in (monitor.early_stopping, reduce)]
        return cls(Best(monitor.mode), *patience)

    @property
    def stops(self) -> bool:
        """Whether early stopping ends the run here."""
        return self.early is not None and self.early.exhausted

    def enter_phase(self, patience: PatienceSpec | None) -> None:
        """Begin a phase: early stopping counts afresh, the phase's own plateau too."""
        if self.early:
            self.early.restart()
        self.plateau = _patience(self.best.mode, patience)

    def state(self) -> dict[str, Any]:
        """Return everything remembered, as JSON holds it."""
        return asdict(self)

    def load(self, state: dict[str, Any]) -> None:
        """Remember what `state` says."""
        self.best = Best(**state["best"])
        for name in ("early", "reducing", "plateau"):
            setattr(self, name, Patience(**state[name]) if state[name] else None)


def _patience(mode: Mode, spec: Waits | None) -> Patience | None:
    return Patience(mode, spec.patience, spec.min_delta) if spec else None
