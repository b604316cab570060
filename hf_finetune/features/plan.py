"""What is computed once for a phase, within the budget, and in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hf_finetune.features.compute import Want
from hf_finetune.features.cut import Inputs, Leaf
from hf_finetune.features.spec import CacheSpec
from hf_finetune.features.store import DTYPES, Column
from hf_finetune.models.load import forward
from hf_finetune.spec import Size


@dataclass
class Plan:
    """What is computed once for a phase, and why no more than that."""

    wants: dict[str, Want] = field(default_factory=dict)
    """By split: `train`, `validation`."""
    why_not: dict[str, str] = field(default_factory=dict)
    """By split; under an empty name for both."""

    @property
    def forward(self) -> Callable[[nn.Module, Inputs], Tensor]:
        """How the model runs on these features, and on samples."""
        return next(iter(self.wants.values())).cut.forward if self.wants else forward

    def __str__(self) -> str:
        """Return what a person should know, in one line."""
        parts = []
        if self.wants:
            rows = " and ".join(f"{want.rows:,} {split} rows" for split, want in self.wants.items())
            size = Size(sum(want.size for want in self.wants.values()))
            parts = [f"computed once up to {next(iter(self.wants.values())).cut.last} for {rows} ({size})"]
        return "; ".join(
            parts
            + [f"not for {split}: {why}" if split else f"no: {why}" for split, why in self.why_not.items()]
        )


def column_of(leaf: Leaf, spec: CacheSpec) -> Column:
    """Return how an output is stored."""
    shape = leaf.shape(1, 0)[2 if leaf.ragged else 1 :]
    exact = leaf.dtype if leaf.dtype in DTYPES.values() else torch.float32
    return Column(shape, DTYPES[spec.dtype] if spec.dtype else exact, leaf.ragged)


def within_budget(plan: Plan, spec: CacheSpec) -> Plan:
    """Return the plan if it fits the budget, with half the bytes if only that does, or none."""

    def size(plan: Plan) -> int:
        return sum(want.size for want in plan.wants.values())

    if size(plan) > spec.budget.bytes and spec.dtype is None:
        plan = replace(plan, wants={split: _halved(want) for split, want in plan.wants.items()})
    if size(plan) > spec.budget.bytes:
        return Plan(why_not={"": f"{Size(size(plan))} exceed `cache.budget` ({spec.budget})"})
    return plan


def _halved(want: Want) -> Want:
    columns = {
        name: replace(column, dtype=torch.float16) if column.dtype == torch.float32 else column
        for name, column in want.columns.items()
    }
    parts = want.parts | {"dtype": [str(column.dtype) for column in columns.values()]}
    return replace(want, columns=columns, parts=parts)
