"""Gradual unfreezing: the head first, then one more layer group from the top at a time (ULMFiT, arXiv 1801.06146)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hf_finetune.models.anatomy import HEAD, Anatomy
from hf_finetune.monitor import PatienceSpec
from hf_finetune.spec import Auto, Duration, DurationField, RateField, resolved
from hf_finetune.strategies.base import StrategySpec
from hf_finetune.strategies.phase import BatchNorm, Phase, PlateauSpec


class Gradual(StrategySpec):
    """The head, then one more layer group from the top every `every`, or at each plateau."""

    name: Literal["gradual"] = "gradual"
    every: Literal["plateau"] | DurationField = Duration(1, "epochs")
    """When the next group wakes: after this long, or when the monitored metric stops improving."""
    patience: Annotated[int, Field(ge=1)] = 1
    """With `every: plateau`, the evaluations without improvement that unfreeze the next group."""
    groups: Annotated[int, Field(ge=1)] = 1
    """Layer groups unfrozen at a time."""
    backbone_lr: RateField | Auto | None = "auto"
    """Rate of unfrozen backbone layers; null with `decay`."""
    decay: Annotated[float, Field(ge=1)] | None = None
    """Instead of one backbone rate: each layer group runs at 1/decay of the one above it (ULMFiT: 2.6)."""
    batch_norm: BatchNorm = "auto"
    """BatchNorm layers: `frozen`, `adapt` or `train`, as in a phase; auto = by the number of training samples."""

    @model_validator(mode="after")
    def _one_way_to_rate_layers(self) -> Gradual:
        if self.decay is not None and self.backbone_lr not in (None, "auto"):
            raise ValueError(
                "`backbone_lr` and `decay` both rate the backbone's layers: keep one, remove the other"
            )
        return self

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        depth = len(anatomy.groups)
        opened = [*range(1, depth, self.groups), depth]
        rates: dict[str, Any]
        if self.decay is not None:
            rates = {"layer_decay": 1 / self.decay}
        else:
            rates = {"backbone_lr": resolved(self.backbone_lr)}
        span: dict[str, Any] = {"for_": self.every}
        if self.every == "plateau":
            span = {"until": PlateauSpec(plateau=PatienceSpec(patience=self.patience))}
        phases = []
        for count in opened:
            train = HEAD if count == 1 else "all" if count == depth else f"last:{count}"
            # The last phase has no end of its own: it takes what is left of the run.
            phases.append(
                Phase(train=train, batch_norm=self.batch_norm, **rates, **(span if count < depth else {}))
            )
        return phases
