"""Train everything from random weights: the baseline every fine-tuning is measured against."""

from __future__ import annotations

from typing import ClassVar, Literal

from hf_finetune.models.anatomy import Anatomy
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import Phase


class Scratch(StrategySpec):
    """All layers, from random weights."""

    name: Literal["scratch"] = "scratch"
    from_scratch: ClassVar[bool] = True

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        return [Phase(train="all", batch_norm="train")]
