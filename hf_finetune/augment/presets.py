"""What `augment: auto | none | light | standard | strong` means, as one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hf_finetune.augment.spec import (
    BATCH_AUGMENTATIONS,
    IMAGE_AUGMENTATIONS,
    TEXT_AUGMENTATIONS,
    AugmentationSpec,
    ColorJitter,
    Cutmix,
    HorizontalFlip,
    Mixup,
    Preset,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
    Rotation,
    WordDropout,
    WordSwap,
)
from hf_finetune.errors import RecipeError

Modality = Literal["image", "text"]
SMALL_SIDE = 64
"""Images up to this many pixels are often digits, letters or symbols, which a flip makes unreadable."""

PRESETS: dict[str, dict[str, list[AugmentationSpec]]] = {
    "none": {"image": [], "small image": [], "text": []},
    "light": {
        "image": [RandomResizedCrop(scale=[0.8, 1.0])],
        "small image": [RandomCrop(padding=0.0625)],
        "text": [WordDropout(p=0.05)],
    },
    "standard": {
        "image": [RandomResizedCrop(scale=[0.5, 1.0]), HorizontalFlip()],
        "small image": [RandomCrop()],
        "text": [WordDropout(p=0.1)],
    },
    "strong": {
        "image": [
            RandomResizedCrop(scale=[0.25, 1.0]),
            HorizontalFlip(),
            RandAugment(magnitude=9),
            RandomErasing(p=0.25),
            Mixup(alpha=0.2),
            Cutmix(alpha=0.5),
        ],
        "small image": [
            RandomCrop(),
            Rotation(degrees=10.0),
            ColorJitter(),
            RandomErasing(p=0.25),
            Mixup(alpha=0.2),
        ],
        "text": [WordDropout(p=0.15), WordSwap(share=0.1)],
    },
}

AUTO_IMAGE: list[tuple[float, list[AugmentationSpec], str]] = [
    (2_000, PRESETS["standard"]["image"], "crop and flip: under 2,000 training images"),
    (
        20_000,
        [*PRESETS["standard"]["image"], RandAugment(magnitude=9)],
        "crop, flip and RandAugment: 2,000 to 20,000 training images",
    ),
    (
        float("inf"),
        [*PRESETS["standard"]["image"], RandAugment(magnitude=9), Mixup(alpha=0.2), Cutmix(alpha=0.5)],
        "crop, flip, RandAugment and mixing: 20,000 training images or more",
    ),
]
"""Fewer training images than this -> augmentations. BiT (arXiv 1912.11370) mixes nothing below 20,000."""


def resolve_augment(
    augment: Preset | Sequence[AugmentationSpec],
    modality: Modality,
    n_train: int,
    image_side: int | None = None,
) -> tuple[list[AugmentationSpec], str]:
    """Return the augmentations that a recipe's `augment` stands for, and the reason in words.

    `image_side` is the smaller of the data's usual short side and the model's input side in pixels; up to
    `SMALL_SIDE` the presets do not flip. Raises RecipeError for an augmentation of the other modality.
    """
    if not isinstance(augment, str):
        check_modality(augment, modality)
        return list(augment), "as listed in the recipe"
    small = modality == "image" and image_side is not None and image_side <= SMALL_SIDE
    kind = "small image" if small else modality
    no_flip = f"no flip: images of {image_side} pixels are often digits or signs"
    if augment != "auto":
        reason = f"the preset '{augment}' for {kind}s"
        return list(PRESETS[augment][kind]), f"{reason}, {no_flip}" if small and augment != "none" else reason
    if modality == "text":
        return [], "none: changed words rarely help a pretrained text encoder"
    if small:
        return list(PRESETS["standard"][kind]), f"shifts, {no_flip}"
    return next((list(chosen), reason) for below, chosen, reason in AUTO_IMAGE if n_train < below)


def check_modality(augmentations: Sequence[AugmentationSpec], modality: Modality) -> None:
    """Raise RecipeError when an augmentation is for another kind of data than the run's."""
    allowed = {"image": IMAGE_AUGMENTATIONS | BATCH_AUGMENTATIONS, "text": TEXT_AUGMENTATIONS}[modality]
    wrong = [each.name for each in augmentations if each.name not in allowed]
    if wrong:
        raise RecipeError(
            f"augment: {', '.join(wrong)} cannot be applied to {modality}s. "
            f"Allowed for {modality}s: {', '.join(allowed)}; or write `augment: auto`."
        )
