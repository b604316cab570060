"""LP-FT: a linear probe first, then everything at a small rate (Kumar et al. 2022, arXiv 2202.10054)."""

from __future__ import annotations

from typing import ClassVar, Literal

from hf_finetune.models.anatomy import HEAD, Anatomy
from hf_finetune.spec import Auto, Duration, DurationField, RateField, resolved
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import BatchNorm, Phase


class LpFt(StrategySpec):
    """The head for `probe`, then all layers at `full_lr`, starting from a head that fits the pretrained features."""

    name: Literal["lp_ft"] = "lp_ft"
    probe: DurationField = Duration(40, "%")
    """How long the head trains alone."""
    full_lr: RateField | Auto = "auto"
    """Rate of all layers afterwards."""
    batch_norm: BatchNorm = "auto"
    """BatchNorm layers: `frozen`, `adapt` or `train`, as in a phase; auto = by the number of training samples."""
    schedule_scope: ClassVar[Literal["run", "phase"]] = "phase"

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        return [
            Phase(train=HEAD, for_=self.probe),
            Phase(train="all", lr=resolved(self.full_lr), batch_norm=self.batch_norm),
        ]
