"""A conflict, and what rules about it ask of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_finetune.augment.spec import BATCH_AUGMENTATIONS
from hf_finetune.recipe_spec import Recipe
from hf_finetune.shipped import BACKBONES, DATASETS, ShippedDataset
from hf_finetune.spec import Duration
from hf_finetune.tasks import TASKS


@dataclass(frozen=True)
class Conflict:
    """Keys that cannot stand together, or a value that cannot be met."""

    keys: tuple[str, ...]
    """The one to report first, then those it depends on."""
    reason: str
    remedy: str


SHIPPED = "shipped/"


def shipped_data(recipe: Recipe) -> ShippedDataset | None:
    """Return what the package ships under the name that `data.path` gives, None if that is no such name."""
    path = recipe.data.path
    return (
        DATASETS.get(path.removeprefix(SHIPPED))
        if isinstance(path, str) and path.startswith(SHIPPED)
        else None
    )


def modalities(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (key, modality) for everything in the recipe that says whether it is about images or texts."""
    if recipe.task != "auto":
        yield "task", TASKS[recipe.task].modality
    if data := shipped_data(recipe):
        yield "data.path", TASKS[data.task].modality
    backbone = BACKBONES.get(recipe.backbone.id.removeprefix(SHIPPED))
    if backbone and recipe.backbone.id.startswith(SHIPPED):
        yield "backbone.id", backbone.modality


def mixing_keys(recipe: Recipe) -> list[str]:
    """Return the keys of augmentations that blend samples."""
    if not isinstance(recipe.augment, list):
        return []
    return [f"augment.{i}.name" for i, each in enumerate(recipe.augment) if each.name in BATCH_AUGMENTATIONS]


def share_of_run(duration: Duration, recipe: Recipe) -> float | None:
    """Return a duration as a share of the run; None where that takes the size of the data."""
    if duration.unit == "%":
        return duration.amount / 100
    length = {"epochs": recipe.training.epochs, "steps": recipe.training.steps}[duration.unit]
    return duration.amount / length if length else None


def length_key(recipe: Recipe) -> str:
    """Return the key that says how long the run is."""
    return "training.steps" if recipe.training.steps is not None else "training.epochs"


def length_of_run(recipe: Recipe) -> str:
    """Return how long the run is, in words."""
    steps, epochs = recipe.training.steps, recipe.training.epochs
    return str(Duration(steps, "steps") if steps is not None else Duration(epochs or 0, "epochs"))


def on_hub(name: str) -> bool:
    """Return whether a name is one of the Hub: neither shipped nor a path."""
    return not (name.startswith((SHIPPED, "/", "./", "../", "~")) or Path(name).exists())


def listed(words: Sequence[str]) -> str:
    """Return words as a sentence lists them."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
