"""Train everything at one rate."""

from __future__ import annotations

from typing import Literal

from hf_finetune.models.anatomy import Anatomy
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import BatchNorm, Phase


class Full(StrategySpec):
    """All layers at one rate."""

    name: Literal["full"] = "full"
    batch_norm: BatchNorm = "auto"
    """BatchNorm layers: `frozen`, `adapt` or `train`, as in a phase; auto = by the number of training samples."""

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        return [Phase(train="all", batch_norm=self.batch_norm)]
