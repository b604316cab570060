"""Train the head on a backbone that does not move."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from hf_finetune.models.anatomy import Anatomy
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import ADAPT_AND_SOLVER, BatchNorm, Phase, Solver


class Frozen(StrategySpec):
    """Only the head; gradients, BatchNorm statistics and dropout of the rest are off."""

    name: Literal["frozen"] = "frozen"
    batch_norm: BatchNorm = "auto"
    """BatchNorm layers: `frozen`, `adapt` or `train`, as in a phase; auto = by the number of training samples."""

    solver: Solver | None = None
    """Fit the output layer to convergence in one step: `lbfgs` (the task's loss, weight decay chosen on the validation
    rows) or `ridge` (least squares in closed form, chosen by leaving out training rows). null = gradient steps."""

    @model_validator(mode="after")
    def _features_stay(self) -> Frozen:
        if self.solver and self.batch_norm == "adapt":
            raise ValueError(ADAPT_AND_SOLVER)
        return self

    @property
    def solver_steps(self) -> int:
        return 1 if self.solver else 0

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        return [Phase(train="head", batch_norm=self.batch_norm, solver=self.solver)]
