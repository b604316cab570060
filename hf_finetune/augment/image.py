"""Image transforms by torchvision v2: the checkpoint's own evaluation view, and random training views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from hf_finetune.augment import spec as specs
from hf_finetune.augment.rng import sample_rng as sample_rng
from hf_finetune.augment.spec import AugmentationSpec
from hf_finetune.models.backbone import ImageInput

ImageTransform = Callable[[Image.Image], Tensor]
Step = Callable[[Any], Any]

CROPS = ("random_resized_crop", "random_crop")
"""They bring the image to the model's size, in place of the evaluation resize and crop."""
ON_TENSORS = ("random_erasing",)
"""They work on the normalised tensor; the others on the PIL image."""


def build_eval_transform(image_input: ImageInput) -> ImageTransform:
    """Return PIL RGB -> float32 (3, H, W) as the checkpoint was measured: resize, crop, normalise.

    The result is that of `timm.data.create_transform(..., is_training=False)` for the same configuration.
    """
    return cast(
        ImageTransform, v2.Compose([*_resize(image_input), *_crop(image_input), *_normalise(image_input)])
    )


def build_train_transform(
    augmentations: Sequence[AugmentationSpec], image_input: ImageInput
) -> ImageTransform:
    """Return PIL RGB -> float32 (3, H, W) with the image augmentations of the list in their order.

    Without a random crop in the list the evaluation resize and crop come first. Call it inside `sample_rng`.
    """
    image_specs = [each for each in augmentations if each.name in specs.IMAGE_AUGMENTATIONS]
    has_crop = any(each.name in CROPS for each in image_specs)
    steps: list[Step] = [] if has_crop else [*_resize(image_input), *_crop(image_input)]
    for each in image_specs:
        if each.name not in ON_TENSORS:
            steps += BUILDERS[each.name](each, image_input)
    steps += _normalise(image_input)
    for each in image_specs:
        if each.name in ON_TENSORS:
            steps += BUILDERS[each.name](each, image_input)
    return cast(ImageTransform, v2.Compose(steps))


def denormalise(pixel_values: Tensor, image_input: ImageInput) -> Tensor:
    """Return normalised pixels (…, 3, H, W) as 0..1, for people to look at."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (image_input.mean, image_input.std))
    return (pixel_values * std + mean).clamp(0, 1)


# ---- evaluation: the cases of timm.data.transforms_factory.transforms_imagenet_eval ------------------------


def _scaled_size(image_input: ImageInput) -> tuple[int, int]:
    height, width = (math.floor(side / image_input.crop_pct) for side in image_input.size)
    return height, width


def _resize(image_input: ImageInput) -> list[Step]:
    scaled, interpolation = _scaled_size(image_input), v2.InterpolationMode(image_input.interpolation)
    if image_input.crop_mode == "squash":
        return [v2.Resize(scaled, interpolation=interpolation)]
    if image_input.crop_mode == "border":
        return [_ResizeKeepingShape(scaled, interpolation, fit=max)]
    if scaled[0] == scaled[1]:
        return [v2.Resize(scaled[0], interpolation=interpolation)]
    return [_ResizeKeepingShape(scaled, interpolation, fit=min)]


def _crop(image_input: ImageInput) -> list[Step]:
    # v2.CenterCrop pads what is too small with black; only `border` leaves something to pad, with the mean
    pad = [_PadTo(image_input.size, _mean_colour(image_input))] if image_input.crop_mode == "border" else []
    return [*pad, v2.CenterCrop(image_input.size)]


def _normalise(image_input: ImageInput) -> list[Step]:
    return [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=list(image_input.mean), std=list(image_input.std)),
    ]


def _mean_colour(image_input: ImageInput) -> list[int]:
    """Return the colour that is zero to the model; empty corners are painted with it."""
    return [round(255 * value) for value in image_input.mean]


class _ResizeKeepingShape:
    """Resize so that the short (fit=min) or long side (fit=max) takes up `size` (timm's ResizeKeepRatio)."""

    def __init__(
        self, size: tuple[int, int], interpolation: v2.InterpolationMode, fit: Callable[..., float]
    ) -> None:
        self.size, self.interpolation, self.fit = size, interpolation, fit

    def __call__(self, image: Image.Image) -> Image.Image:
        ratio = self.fit(image.height / self.size[0], image.width / self.size[1])
        size = [round(image.height / ratio), round(image.width / ratio)]
        return F.resize(image, size, interpolation=self.interpolation)


class _PadTo:
    """Pad around the centre where a side is shorter than `size`."""

    def __init__(self, size: tuple[int, int], fill: list[int]) -> None:
        self.size, self.fill = size, fill

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = max(0, self.size[0] - image.height), max(0, self.size[1] - image.width)
        edges = [width // 2, height // 2, (width + 1) // 2, (height + 1) // 2]
        return F.pad(image, edges, fill=self.fill) if any(edges) else image


# ---- training: a line of BUILDERS for each image augmentation ----------------------------------------------


def _random_resized_crop(spec: specs.RandomResizedCrop, image_input: ImageInput) -> list[Step]:
    interpolation = v2.InterpolationMode(image_input.interpolation)
    return [v2.RandomResizedCrop(image_input.size, spec.scale, spec.ratio, interpolation=interpolation)]


def _random_crop(spec: specs.RandomCrop, image_input: ImageInput) -> list[Step]:
    height, width = image_input.size
    padding = [round(width * spec.padding), round(height * spec.padding)]
    pad = [v2.Pad(padding, padding_mode="reflect")] if any(padding) else []
    crop = v2.RandomCrop((height, width), pad_if_needed=True, fill=_mean_colour(image_input))
    return [*_resize(image_input), *pad, crop]


def _filled(image_input: ImageInput) -> dict[str, Any]:
    return {"interpolation": v2.InterpolationMode.BILINEAR, "fill": _mean_colour(image_input)}


BUILDERS: dict[str, Callable[[Any, ImageInput], list[Step]]] = {
    "random_resized_crop": _random_resized_crop,
    "random_crop": _random_crop,
    "horizontal_flip": lambda s, _: [v2.RandomHorizontalFlip(s.p)],
    "vertical_flip": lambda s, _: [v2.RandomVerticalFlip(s.p)],
    "rotation": lambda s, image_input: [v2.RandomRotation(s.degrees, **_filled(image_input))],
    "color_jitter": lambda s, _: [v2.ColorJitter(s.brightness, s.contrast, s.saturation, s.hue)],
    "rand_augment": lambda s, image_input: [v2.RandAugment(s.num_ops, s.magnitude, **_filled(image_input))],
    "trivial_augment": lambda _, image_input: [v2.TrivialAugmentWide(**_filled(image_input))],
    "random_erasing": lambda s, _: [v2.RandomErasing(s.p, s.scale)],
}
