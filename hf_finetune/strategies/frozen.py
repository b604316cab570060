"""Train the head on a backbone that does not move."""

from __future__ import annotations

from typing import Literal

from hf_finetune.models.anatomy import Anatomy
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import BatchNorm, Phase


class Frozen(StrategySpec):
    """Only the head; gradients, BatchNorm statistics and dropout of the rest are off."""

    name: Literal["frozen"] = "frozen"
    batch_norm: BatchNorm = "auto"
    """BatchNorm layers: `frozen`, `adapt` or `train`, as in a phase; auto = by the number of training samples."""

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        return [Phase(train="head", batch_norm=self.batch_norm)]
