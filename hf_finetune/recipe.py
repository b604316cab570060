"""The recipe: how to adapt a backbone, as the composition of every part's spec."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny

from hf_finetune.augment.spec import AugmentationSpec, Preset
from hf_finetune.data.spec import DataSpec
from hf_finetune.models.spec import BackboneSpec
from hf_finetune.monitor import MonitorSpec
from hf_finetune.optim import OptimizerSpec
from hf_finetune.schedule import ScheduleSpec
from hf_finetune.spec import Auto, Spec
from hf_finetune.strategies import StrategySpec

Precision = Literal["auto", "fp32", "bf16", "fp16"]
TaskName = Literal["auto", "image-classification", "text-classification"]


class EmaSpec(Spec):
    """An exponential moving average of the weights, which is what is measured and kept."""

    decay: Annotated[float, Field(gt=0, lt=1)] | Auto = "auto"
    """auto = 1 - 10/steps, within [0.9, 0.9999]: the average spans the last tenth of the run."""


class TrainingSpec(Spec):
    """Length, batches, precision and what keeps training stable."""

    epochs: Annotated[float, Field(gt=0)] | None = 10
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Samples per optimizer step over all processes."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Samples per device and forward pass; null = batch_size / processes."""
    precision: Precision = "auto"
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema: EmaSpec | None = None
    seed: Annotated[int, Field(ge=0)] = 0


class Recipe(Spec):
    """Everything about a run. `load_recipe` reads one from YAML."""

    task: TaskName = "auto"
    backbone: BackboneSpec = BackboneSpec()
    data: DataSpec = DataSpec()
    augment: Preset | list[SerializeAsAny[AugmentationSpec]] = "auto"
    strategy: SerializeAsAny[StrategySpec]
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: SerializeAsAny[ScheduleSpec]
    training: TrainingSpec = TrainingSpec()
    monitor: MonitorSpec = MonitorSpec()
    trackers: list[str] = []
    output: str | None = None
