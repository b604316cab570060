"""Image transforms: the checkpoint's own evaluation view, and random training views, by torchvision v2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from hf_finetune.augment import spec as specs
from hf_finetune.augment.rng import sample_rng as sample_rng
from hf_finetune.augment.spec import AugmentationSpec

if TYPE_CHECKING:
    from hf_finetune.models.backbone import ImageInput

ImageTransform = Callable[[Image.Image], Tensor]


def build_eval_transform(image_input: ImageInput) -> ImageTransform:
    """Return PIL RGB -> float32 (3, H, W) as the checkpoint was evaluated: resize, crop, normalise.

    Equal to `timm.data.create_transform(..., is_training=False)` for the same configuration.
    """
    return v2.Compose([*_eval_geometry(image_input), *_to_normalised(image_input)])


def build_train_transform(
    augmentations: Sequence[AugmentationSpec], image_input: ImageInput
) -> ImageTransform:
    """Return PIL RGB -> float32 (3, H, W) with `augmentations` in their order; batch augmentations are left out.

    Without a random crop in the list the evaluation resize and crop come first. Call it inside `sample_rng`.
    """
    names = [each.name for each in augmentations if each.name not in specs.BATCH_AUGMENTATIONS]
    own = [each for each in augmentations if each.name in names]
    crops = any(name in ("random_resized_crop", "random_crop") for name in names)
    before = [each for each in own if each.name != "random_erasing"]
    after = [each for each in own if each.name == "random_erasing"]
    steps: list[Callable] = [] if crops else _eval_geometry(image_input)
    for each in before:
        steps += BUILDERS[each.name](each, image_input)
    steps += _to_normalised(image_input)
    for each in after:
        steps += BUILDERS[each.name](each, image_input)
    return v2.Compose(steps)


def denormalise(pixel_values: Tensor, image_input: ImageInput) -> Tensor:
    """Return normalised pixels (…, 3, H, W) as floats in 0..1, for people to look at."""
    mean = torch.tensor(image_input.mean).view(3, 1, 1)
    std = torch.tensor(image_input.std).view(3, 1, 1)
    return (pixel_values * std + mean).clamp(0, 1)


class ResizeShortSide:
    """Resize so that the image covers `size` (H, W), keeping its shape (timm's ResizeKeepRatio)."""

    def __init__(
        self, size: tuple[int, int], interpolation: v2.InterpolationMode, longest: float = 0.0
    ) -> None:
        self.size, self.interpolation, self.longest = size, interpolation, longest

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = image.height, image.width
        ratios = height / self.size[0], width / self.size[1]
        ratio = max(ratios) * self.longest + min(ratios) * (1.0 - self.longest)
        return cast(
            Image.Image,
            F.resize(image, [round(height / ratio), round(width / ratio)], interpolation=self.interpolation),
        )


class CenterCropOrPad:
    """Cut or fill around the centre to exactly `size` (H, W)."""

    def __init__(self, size: tuple[int, int], fill: list[int]) -> None:
        self.size, self.fill = size, fill

    def __call__(self, image: Image.Image) -> Image.Image:
        missing_h, missing_w = max(self.size[0] - image.height, 0), max(self.size[1] - image.width, 0)
        if missing_h or missing_w:
            edges = [missing_w // 2, missing_h // 2, (missing_w + 1) // 2, (missing_h + 1) // 2]
            image = F.pad(image, edges, fill=self.fill)
        return cast(Image.Image, F.center_crop(image, list(self.size)))


def _eval_geometry(image_input: ImageInput) -> list[Callable]:
    """Return resize and crop, the order of cases that of timm.data.transforms_factory.transforms_imagenet_eval."""
    size = (image_input.size[0], image_input.size[1])
    scale = (math.floor(size[0] / image_input.crop_pct), math.floor(size[1] / image_input.crop_pct))
    interpolation = v2.InterpolationMode(image_input.interpolation)
    if image_input.crop_mode == "squash":
        return [v2.Resize(scale, interpolation=interpolation), v2.CenterCrop(size)]
    if image_input.crop_mode == "border":
        fill = [round(255 * value) for value in image_input.mean]
        return [ResizeShortSide(scale, interpolation, longest=1.0), CenterCropOrPad(size, fill)]
    return [*_eval_resize(image_input), v2.CenterCrop(size)]


def _eval_resize(image_input: ImageInput) -> list[Callable]:
    size, interpolation = image_input.size, v2.InterpolationMode(image_input.interpolation)
    scale = (math.floor(size[0] / image_input.crop_pct), math.floor(size[1] / image_input.crop_pct))
    if image_input.crop_mode == "squash":
        return [v2.Resize(scale, interpolation=interpolation)]
    if scale[0] == scale[1]:
        return [v2.Resize(scale[0], interpolation=interpolation)]
    return [ResizeShortSide(scale, interpolation)]


def _to_normalised(image_input: ImageInput) -> list[Callable]:
    return [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=list(image_input.mean), std=list(image_input.std)),
    ]


def _random_resized_crop(spec: specs.RandomResizedCrop, image_input: ImageInput) -> list[Callable]:
    interpolation = v2.InterpolationMode(image_input.interpolation)
    return [v2.RandomResizedCrop(image_input.size, spec.scale, spec.ratio, interpolation=interpolation)]


def _random_crop(spec: specs.RandomCrop, image_input: ImageInput) -> list[Callable]:
    height, width = image_input.size
    padding = [round(width * spec.padding), round(height * spec.padding)]
    pad: list[Callable] = [v2.Pad(padding, padding_mode="reflect")] if any(padding) else []
    return [*_eval_resize(image_input), *pad, v2.RandomCrop((height, width), pad_if_needed=True)]


def _fill(image_input: ImageInput) -> list[int]:
    """What an operation that leaves a corner empty paints there: the checkpoint's mean, which is 0 to the model."""
    return [round(255 * value) for value in image_input.mean]


Builder = Callable[..., list[Callable]]
BUILDERS: dict[str, Builder] = {
    "random_resized_crop": _random_resized_crop,
    "random_crop": _random_crop,
    "horizontal_flip": lambda spec, _: [v2.RandomHorizontalFlip(spec.p)],
    "vertical_flip": lambda spec, _: [v2.RandomVerticalFlip(spec.p)],
    "rotation": lambda spec, inp: [
        v2.RandomRotation(spec.degrees, interpolation=v2.InterpolationMode.BILINEAR, fill=_fill(inp))
    ],
    "color_jitter": lambda spec, _: [
        v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    ],
    "rand_augment": lambda spec, inp: [v2.RandAugment(spec.num_ops, spec.magnitude, fill=_fill(inp))],
    "trivial_augment": lambda spec, inp: [v2.TrivialAugmentWide(fill=_fill(inp))],
    "random_erasing": lambda spec, _: [v2.RandomErasing(spec.p, spec.scale)],
}
