"""Surgical fine-tuning: one contiguous block of layers and the head (Lee et al. 2023, arXiv 2210.11466)."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator

from hf_finetune.models.anatomy import HEAD, Anatomy
from hf_finetune.spec import Auto, RateField, resolved
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import BatchNorm, Phase


class Surgical(StrategySpec):
    """A third of the layer groups: `first` for shifts of the input, `middle` or `last` for shifts of the classes."""

    name: Literal["surgical"] = "surgical"
    block: str = "first"
    """`first`, `middle` or `last` third of the backbone's layer groups, or one of them by name (`block.2`)."""
    backbone_lr: RateField | Auto = "auto"
    """Rate of the chosen layers; the head runs at the base rate."""
    batch_norm: BatchNorm = "auto"
    """BatchNorm layers: `frozen`, `adapt` or `train`, as in a phase; auto = by the number of training samples."""

    @field_validator("block")
    @classmethod
    def _known_block(cls, value: str) -> str:
        if value in {"first", "middle", "last", "stem"} or re.fullmatch(r"block\.\d+", value):
            return value
        raise ValueError("choose first, middle, last, stem or block.N")

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        backbone = anatomy.groups[:-1]
        third = max(1, len(backbone) // 3)
        middle = (len(backbone) - third) // 2
        chosen = {
            "first": backbone[:third],
            "middle": backbone[middle : middle + third],
            "last": backbone[-third:],
        }.get(self.block, (self.block,))
        return [
            Phase(train=[*chosen, HEAD], backbone_lr=resolved(self.backbone_lr), batch_norm=self.batch_norm)
        ]
