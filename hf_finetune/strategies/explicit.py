"""Phases written out in the recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from hf_finetune.models.anatomy import Anatomy
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.methods import AdapterSpec
from hf_finetune.strategies.phase import Phase


class Explicit(StrategySpec):
    """Phases of your own: `strategy: {phases: […]}`, with no name."""

    name: Literal["phases"] = "phases"
    phases: Annotated[list[Phase], Field(min_length=1)]
    """One after the other; the last one lasts to the end of the run."""
    adapter: AdapterSpec | None = None
    """Adapters for phases to train (`train: adapters`): a method's name, or a section."""

    @field_validator("adapter", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @property
    def solver_steps(self) -> int:
        return len(self.phases) if all(phase.solver for phase in self.phases) else 0

    def to_adapter(self) -> AdapterSpec | None:
        return self.adapter

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        return self.phases
