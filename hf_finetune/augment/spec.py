"""Augmentations by name: the table of what a recipe may list, and the presets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_finetune.spec import Spec

Probability = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
Preset = Literal["auto", "none", "light", "standard", "strong"]


class AugmentationSpec(Spec):
    """One augmentation; each subclass is one line of `AUGMENTATIONS`."""

    name: str


class RandomResizedCrop(AugmentationSpec):
    """Crop a random area and resize it to the model's size; replaces the evaluation crop."""

    name: Literal["random_resized_crop"] = "random_resized_crop"
    scale: Pair = [0.5, 1.0]
    """Least and largest share of the image's area."""
    ratio: Pair = [0.75, 4 / 3]
    """Least and largest width over height."""


class RandomCrop(AugmentationSpec):
    """Pad, then crop the model's size at a random place; replaces the evaluation crop."""

    name: Literal["random_crop"] = "random_crop"
    padding: Annotated[float, Field(ge=0, le=0.5)] = 0.125
    """Share of the side padded at each edge (reflected)."""


class HorizontalFlip(AugmentationSpec):
    """Mirror left and right."""

    name: Literal["horizontal_flip"] = "horizontal_flip"
    p: Probability = 0.5
    """Probability of each image."""


class VerticalFlip(AugmentationSpec):
    """Mirror top and bottom."""

    name: Literal["vertical_flip"] = "vertical_flip"
    p: Probability = 0.5
    """Probability of each image."""


class Rotation(AugmentationSpec):
    """Rotate by an angle drawn from ±degrees."""

    name: Literal["rotation"] = "rotation"
    degrees: Annotated[float, Field(gt=0, le=180)] = 15.0
    """Largest angle either way."""


class ColorJitter(AugmentationSpec):
    """Change brightness, contrast, saturation and hue."""

    name: Literal["color_jitter"] = "color_jitter"
    brightness: Annotated[float, Field(ge=0)] = 0.2
    """The factor is drawn from 1 - x to 1 + x, as for the next two."""
    contrast: Annotated[float, Field(ge=0)] = 0.2
    """As brightness."""
    saturation: Annotated[float, Field(ge=0)] = 0.2
    """As brightness."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest turn of the colour circle either way, as a share of it."""


class RandAugment(AugmentationSpec):
    """Apply `num_ops` operations at one magnitude (arXiv 1909.13719)."""

    name: Literal["rand_augment"] = "rand_augment"
    num_ops: Annotated[int, Field(ge=1)] = 2
    """Operations one after the other."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 7
    """Their strength, on a scale of 30."""


class TrivialAugment(AugmentationSpec):
    """Apply one operation at a random strength (arXiv 2103.10158)."""

    name: Literal["trivial_augment"] = "trivial_augment"


class RandomErasing(AugmentationSpec):
    """Erase a rectangle of the normalised image (arXiv 1708.04896)."""

    name: Literal["random_erasing"] = "random_erasing"
    p: Probability = 0.25
    """Probability of each image."""
    scale: Pair = [0.02, 0.33]
    """Least and largest share of the area erased."""


class Mixup(AugmentationSpec):
    """Blend pairs of samples and their targets (arXiv 1710.09412)."""

    name: Literal["mixup"] = "mixup"
    alpha: Annotated[float, Field(gt=0)] = 0.2
    """The share of the other sample is drawn from Beta(alpha, alpha)."""
    p: Probability = 1.0
    """Probability of each pair."""


class Cutmix(AugmentationSpec):
    """Paste a rectangle of a sample's pair into it and blend the targets (arXiv 1905.04899)."""

    name: Literal["cutmix"] = "cutmix"
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """The share of the other sample is drawn from Beta(alpha, alpha)."""
    p: Probability = 1.0
    """Probability of each pair."""


class WordDropout(AugmentationSpec):
    """Drop words of a text, each with probability p; at least one word stays (Wei and Zou 2019, arXiv 1901.11196)."""

    name: Literal["word_dropout"] = "word_dropout"
    p: Probability = 0.1
    """Probability of each word."""


class WordSwap(AugmentationSpec):
    """Swap `share` of a text's words with their neighbours (Wei and Zou 2019, arXiv 1901.11196)."""

    name: Literal["word_swap"] = "word_swap"
    share: Probability = 0.1
    """Share of the words that move."""


IMAGE_AUGMENTATIONS: dict[str, type[AugmentationSpec]] = {
    "random_resized_crop": RandomResizedCrop,
    "random_crop": RandomCrop,
    "horizontal_flip": HorizontalFlip,
    "vertical_flip": VerticalFlip,
    "rotation": Rotation,
    "color_jitter": ColorJitter,
    "rand_augment": RandAugment,
    "trivial_augment": TrivialAugment,
    "random_erasing": RandomErasing,
}
BATCH_AUGMENTATIONS: dict[str, type[AugmentationSpec]] = {"mixup": Mixup, "cutmix": Cutmix}
TEXT_AUGMENTATIONS: dict[str, type[AugmentationSpec]] = {"word_dropout": WordDropout, "word_swap": WordSwap}
AUGMENTATIONS = IMAGE_AUGMENTATIONS | BATCH_AUGMENTATIONS | TEXT_AUGMENTATIONS
