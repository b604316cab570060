"""Normalisation layers and the head (LN-Tune, arXiv 2304.01917)."""

from __future__ import annotations

from typing import Literal

from hf_finetune.models.anatomy import HEAD, Anatomy
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import BatchNorm, Phase


class Norms(StrategySpec):
    """Scale and shift of every normalisation layer, and the head."""

    name: Literal["norms"] = "norms"
    batch_norm: BatchNorm = "auto"
    """BatchNorm layers: `frozen`, `adapt` or `train`, as in a phase; auto = by the number of training samples."""

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        return [Phase(train=["norms", HEAD], batch_norm=self.batch_norm)]
