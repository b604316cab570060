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
"""Images up to this many pixels are often signs (digits, letters, symbols), which a flip turns into something else."""

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
    (2_000, PRESETS["standard"]["image"], "crop and flip"),
    (20_000, [*PRESETS["standard"]["image"], RandAugment(magnitude=9)], "crop, flip and RandAugment"),
    (
        float("inf"),
        [*PRESETS["standard"]["image"], RandAugment(magnitude=9), Mixup(alpha=0.2), Cutmix(alpha=0.5)],
        "crop, flip, RandAugment, mixup and cutmix",
    ),
]
"""Rows of train below which -> augmentations. BiT (arXiv 1912.11370) mixes no images below 20,000 rows."""


def resolve_augment(
    augment: Preset | Sequence[AugmentationSpec],
    modality: Modality,
    n_train: int,
    image_side: int | None = None,
) -> tuple[list[AugmentationSpec], str]:
    """Return the augmentations a recipe's `augment` stands for, and the reason in words.

    `image_side` is the smaller of the data's typical short side and the model's input side, in pixels; up to `SMALL_SIDE`
    the presets do not flip. Raises RecipeError for an augmentation that does not fit the modality.
    """
    if not isinstance(augment, str):
        check_modality(augment, modality)
        return list(augment), "listed in the recipe"
    small = modality == "image" and image_side is not None and image_side <= SMALL_SIDE
    kind = "small image" if small else modality
    no_flip = f"; no flip: images of {image_side} px are often digits or signs" if small else ""
    if augment != "auto":
        return list(
            PRESETS[augment][kind]
        ), f"the preset '{augment}' for {kind}s{no_flip if augment != 'none' else ''}"
    if modality == "text":
        return [], "none for texts: a pretrained encoder gains little from changed words"
    if small:
        return list(PRESETS["standard"][kind]), f"shifted crops{no_flip}"
    limit, augmentations, words = next(row for row in AUTO_IMAGE if n_train < row[0])
    size = f"under {limit:,.0f}" if limit != float("inf") else "20,000 or more"
    return list(augmentations), f"{words}: {n_train:,} training images, {size}"


def check_modality(augmentations: Sequence[AugmentationSpec], modality: Modality) -> None:
    """Raise RecipeError when an augmentation is for another kind of data than the run's."""
    allowed = {"image": IMAGE_AUGMENTATIONS | BATCH_AUGMENTATIONS, "text": TEXT_AUGMENTATIONS}[modality]
    wrong = [each.name for each in augmentations if each.name not in allowed]
    if wrong:
        raise RecipeError(
            f"augment: {', '.join(wrong)} cannot be applied to {modality} data. "
            f"For {modality}s there are {', '.join(allowed)}; take the others out, or write `augment: auto`."
        )
