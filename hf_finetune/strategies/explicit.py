"""Phases written out in the recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_finetune.models.anatomy import Anatomy
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import Phase


class Explicit(StrategySpec):
    """Phases of your own: `strategy: {phases: […]}`, with no name."""

    name: Literal["phases"] = "phases"
    phases: Annotated[list[Phase], Field(min_length=1)]
    """One after the other; the last one lasts to the end of the run."""

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        return self.phases
