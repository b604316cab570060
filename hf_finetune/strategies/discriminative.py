"""Discriminative learning rates: small ones for pretrained layers, large ones for new layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hf_finetune.models.anatomy import Anatomy
from hf_finetune.spec import Auto, RateField, resolved
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import BatchNorm, Phase


class Discriminative(StrategySpec):
    """Two rates (`backbone_lr`, arXiv 1801.06146) or one for each layer (`layer_decay`, arXiv 2003.10555)."""

    name: Literal["discriminative"] = "discriminative"
    backbone_lr: RateField | Auto | None = "auto"
    """Rate of the backbone; the head runs at the base rate. A multiple of 0 freezes it."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | Auto | None = None
    """Each layer group runs at this multiple of the one above it."""
    batch_norm: BatchNorm = "auto"
    """BatchNorm layers: `frozen`, `adapt` or `train`, as in a phase; auto = by the number of training samples."""

    @model_validator(mode="after")
    def _one_way_to_rate_layers(self) -> Discriminative:
        if self.layer_decay is not None and self.backbone_lr not in (None, "auto"):
            raise ValueError(
                "`backbone_lr` and `layer_decay` both rate the backbone's layers: keep one, remove the other"
            )
        return self

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        if self.layer_decay is not None:
            return [Phase(train="all", layer_decay=resolved(self.layer_decay), batch_norm=self.batch_norm)]
        return [Phase(train="all", backbone_lr=resolved(self.backbone_lr), batch_norm=self.batch_norm)]
