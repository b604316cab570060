"""BitFit: the biases and the head (Ben Zaken et al. 2021, arXiv 2106.10199)."""

from __future__ import annotations

from typing import Literal

from hf_finetune.models.anatomy import HEAD, Anatomy
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import Phase


class BitFit(StrategySpec):
    """All biases, those of normalisation layers included, and the head."""

    name: Literal["bitfit"] = "bitfit"

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        return [Phase(train=["biases", HEAD])]
