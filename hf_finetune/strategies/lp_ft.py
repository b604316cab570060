"""LP-FT: a linear probe first, then everything at a small rate (Kumar et al. 2022, arXiv 2202.10054)."""

from __future__ import annotations

from typing import ClassVar, Literal

from hf_finetune.models.anatomy import HEAD, Anatomy
from hf_finetune.spec import Auto, Duration, DurationField, RateField, resolved
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import BatchNorm, Phase, Solver

PROBE = Duration(40, "%")
"""What the head takes of a run by gradient steps: long enough to converge, and most of the run is left."""


class LpFt(StrategySpec):
    """The head alone, then all layers at `full_lr`, starting from a head that fits the pretrained features."""

    name: Literal["lp_ft"] = "lp_ft"
    solver: Solver | Auto | None = "auto"
    """How the head is fitted: `lbfgs` or `ridge` to convergence, null by gradient steps for `probe`. auto = lbfgs
    where a solver applies and `probe` asks for nothing else."""
    probe: DurationField | Auto = "auto"
    """How long the head trains alone by gradient steps; auto = 40%. A solver takes one step in its place, and the run
    is as much shorter."""
    full_lr: RateField | Auto = "auto"
    """Rate of all layers afterwards."""
    batch_norm: BatchNorm = "auto"
    """BatchNorm layers: `frozen`, `adapt` or `train`, as in a phase; auto = by the number of training samples."""
    schedule_scope: ClassVar[Literal["run", "phase"]] = "phase"

    def steps_of(self, total: int) -> int:
        if self.solver in (None, "auto"):
            return total
        return 1 + max(1, total - PROBE.to_steps(steps_per_epoch=1, total_steps=total))

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        solver = resolved(self.solver)
        return [
            Phase(train=HEAD, solver=solver) if solver else Phase(train=HEAD, for_=resolved(self.probe)),
            Phase(train="all", lr=resolved(self.full_lr), batch_norm=self.batch_norm),
        ]
