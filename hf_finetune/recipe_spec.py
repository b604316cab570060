"""The recipe: how to adapt a backbone, as the composition of every part's spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, PrivateAttr, model_validator
from pydantic_core import CoreSchema, core_schema

from hf_finetune.augment.spec import AUGMENTATIONS, AugmentationSpec, Preset
from hf_finetune.data.spec import DataSpec
from hf_finetune.features.spec import CacheSpec
from hf_finetune.hub.spec import HubSpec
from hf_finetune.models.spec import BackboneSpec
from hf_finetune.monitor import MonitorSpec
from hf_finetune.optim import OptimizerSpec
from hf_finetune.recipe_errors import Place
from hf_finetune.schedule import SCHEDULES, Cosine, ScheduleSpec
from hf_finetune.spec import Auto, Duration, DurationField, Spec
from hf_finetune.strategies import STRATEGIES
from hf_finetune.strategies.base import StrategySpec

SHORT_FORMS = {"backbone": "id", "data": "path", "strategy": "name", "optimizer": "name", "schedule": "name"}
"""Section -> the key a bare value stands for: `backbone: timm/x` is `backbone: {id: timm/x}`."""

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
TaskName = Literal["auto", "image-classification", "text-classification"]

DEFAULT = Place("default")


class EmaSpec(Spec):
    """An exponential moving average of the weights, which is what is measured and kept."""

    decay: Annotated[float, Field(gt=0, lt=1)] | Auto = "auto"
    """auto = 1 - 10/steps, within [0.9, 0.9999]: the average spans the last tenth of the run."""


class CheckpointSpec(Spec):
    """How often the state is saved that `--resume` continues from, and how much of it stays on disk."""

    every: DurationField = Duration(1, "epochs")
    """Beside these, a run saves when it ends or is interrupted."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints that stay."""


class TrainingSpec(Spec):
    """Length, batches, precision and what keeps training stable."""

    epochs: Annotated[float, Field(gt=0)] | None = 10
    """Passes over the training rows."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Samples per optimizer step over all processes."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Auto | None = None
    """Samples per device and forward pass; null = batch_size / processes, auto = the largest part of that, halved as
    often as it takes, that fits into memory. Gradients add up to the same batch_size."""
    micro_batch_tokens: Annotated[int, Field(ge=2)] | None = None
    """Tokens per device and forward pass at most, padding included: a batch of long texts takes more passes, others
    stay whole, and the result is the same; null = as many as `micro_batch_size` texts have."""
    precision: Precision = "auto"
    """Number format of the forward pass; auto = the fastest this hardware does well. Weights, output layer and loss
    are fp32 in all of them."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Run the training step through `torch.compile`; auto = on a GPU, where phases are long enough to pay for it."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of all gradients together; null clips nothing."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target spread over all classes."""
    ema: EmaSpec | None = None
    """Keep an average of the weights, which is what is measured and kept; `{}` takes its defaults."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass instead of keeping them: about a third more time, less memory."""
    checkpoint: CheckpointSpec | None = CheckpointSpec()
    """State to resume from; null saves none but that of an interruption."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Wall time after which the run saves its state and stops, to be resumed."""
    reload_check: bool = True
    """Before the run is done, load its model in a fresh process by its own library, and compare; false does not."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of splits, order, augmentation, dropout and new weights."""

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_the_default_epochs(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("steps") is not None:
            return {"epochs": None, **data}
        return data


class OneOf:
    """Marks a field that holds one of several specs, told apart by `name`; a bare text is the name."""

    def __init__(
        self,
        specs: Mapping[str, type[Spec]],
        *,
        default: str | None = None,
        by_key: Mapping[str, str] | None = None,
    ) -> None:
        self.specs = specs
        self.default = default
        self.by_key = by_key or {}
        """Key -> name of the spec that a section without a name, but with this key, is."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # In angle brackets a label in an error's path cannot be taken for a key of the recipe.
        choices: dict[Any, CoreSchema] = {f"<{n}>": handler.generate_schema(s) for n, s in self.specs.items()}
        union = core_schema.tagged_union_schema(
            choices, discriminator=lambda value: f"<{self.name_of(value)}>"
        )
        return core_schema.no_info_before_validator_function(
            lambda value: {"name": value} if isinstance(value, str) else value, union
        )

    def name_of(self, value: Any) -> Any:
        """Return the name of a section or spec; None where it has none."""
        if not isinstance(value, Mapping):
            return getattr(value, "name", None)
        told = next((name for key, name in self.by_key.items() if key in value), self.default)
        return value.get("name", told)


@dataclass(frozen=True)
class Origin:
    """Where a recipe came from. Equal to any other, so that it never tells recipes apart."""

    name: str = field(default="", compare=False)
    """The file's name without its ending; empty for a recipe from Python."""
    places: Mapping[str, Place] = field(default_factory=dict, compare=False)
    """Dotted key -> where it was written."""


class Recipe(Spec):
    """Everything about a run. `load_recipe` reads one from YAML, `parse_recipe` from plain data."""

    task: TaskName = "auto"
    """auto = by what the data holds."""
    backbone: BackboneSpec = BackboneSpec()
    """The pretrained network."""
    data: DataSpec = DataSpec()
    """The examples."""
    augment: Preset | list[Annotated[AugmentationSpec, OneOf(AUGMENTATIONS)]] = "auto"
    """Random views of the training examples."""
    strategy: Annotated[StrategySpec, OneOf(STRATEGIES, by_key={"phases": "phases"})]
    """Which layers learn when."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """The update rule and its base rate."""
    schedule: Annotated[ScheduleSpec, OneOf(SCHEDULES, default="cosine")] = Cosine()
    """The rate over time."""
    training: TrainingSpec = TrainingSpec()
    """Length, batches, precision."""
    cache: Literal["auto", "off"] | CacheSpec = "auto"
    """What frozen layers compute is computed once and kept on disk, for this run and later ones; auto = where every
    epoch shows the same views and it fits; `off` = computed anew in every epoch."""
    monitor: MonitorSpec = MonitorSpec()
    """What is measured and what follows from it."""
    trackers: list[str] = []
    """accelerate's own: tensorboard, wandb, trackio, mlflow …"""
    output: str | None = None
    """The run folder; null = runs/<recipe>-<backbone>-<time>."""
    hub: HubSpec | None = None
    """Where to push the model; null keeps it here."""

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            key: {SHORT_FORMS[key]: value} if key in SHORT_FORMS and isinstance(value, str) else value
            for key, value in data.items()
        }

    @property
    def name(self) -> str:
        """The name of the recipe's file without its ending; for a recipe from Python its strategy's."""
        return self._origin.name or self.strategy.name

    def where(self, key: str) -> str:
        """Return where a dotted key was written: `recipes/x.yaml:12: data.path` or `default: data.path`."""
        return f"{self._origin.places.get(key, DEFAULT)}: {key}"
