"""Image transforms by torchvision v2: the checkpoint's own evaluation view, and random training views."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from hf_finetune.augment import spec as specs
from hf_finetune.augment.device import OPERATIONS, Later
from hf_finetune.augment.rng import sample_rng as sample_rng
from hf_finetune.augment.spec import AugmentationSpec
from hf_finetune.models.backbone import ImageInput

Step = Callable[[Any], Any]

CROPS = ("random_resized_crop", "random_crop")
"""They bring the image to the model's size, in place of the evaluation resize and crop."""
FULL_SIZE = "full_size"
"""Under this name the `info` of a smaller copy holds height and width of its image."""
ON_TENSORS = ("random_erasing",)
"""They work on the normalised tensor; the others on the PIL image."""


@dataclass(frozen=True)
class ImageTransform:
    """How an image becomes what the model reads, in two parts: `transform(image)` is `rest(fixed(image))`.

    What comes out of `fixed` can be kept in place of the image.
    """

    scale: Scale | None
    """What every view begins with, if anything: another size."""
    crop: tuple[Step, ...]
    """What comes next in every view: the evaluation crop, or nothing."""
    rest: Callable[[Image.Image], Tensor]
    """PIL -> float32 (3, H, W), with what is random: call it inside `sample_rng`. With `later`: -> uint8 (3, H, W)."""
    later: Later | None = None
    """What the device does to these when they are a batch, if anything; `device.finish` does it."""

    def fixed(self, image: Image.Image) -> Image.Image:
        """Return the image as far as every view of it is the same."""
        scaled = self.scale(image) if self.scale else image
        for step in self.crop:
            scaled = step(scaled)
        return scaled

    def __call__(self, image: Image.Image) -> Tensor:
        """Return what the model reads; with `later`, what the device makes that of."""
        return self.rest(self.fixed(image))

    def inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """Return what a sample holds of an image that has been through `fixed`; call it inside `sample_rng`."""
        pixels = {"pixel_values": self.rest(image)}
        return pixels | {OPERATIONS: self.later.draw()} if self.later else pixels

    def fixed_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of what `fixed` makes of an image of this size."""
        if self.crop:
            assert isinstance(self.scale, EvalScale)
            return self.scale.image_input.size
        return self.scale.size(height, width) if self.scale else (height, width)

    def describe(self) -> dict[str, Any]:
        """Return everything that decides what `fixed` makes of an image."""
        return {"scale": self.scale.describe() if self.scale else None, "crop": bool(self.crop)}


def build_eval_transform(image_input: ImageInput, *, on_device: bool = False) -> ImageTransform:
    """Return PIL RGB -> float32 (3, H, W) as the checkpoint was measured: resize, crop, normalise.

    The result is that of `timm.data.create_transform(..., is_training=False)` for the same configuration. With
    `on_device` it is uint8, and the device normalises.
    """
    return ImageTransform(
        EvalScale(image_input), tuple(_crop(image_input)), *_halves([], [], [], image_input, on_device)
    )


def build_train_transform(
    augmentations: Sequence[AugmentationSpec],
    image_input: ImageInput,
    *,
    shrink: bool = False,
    on_device: bool = False,
) -> ImageTransform:
    """Return PIL RGB -> float32 (3, H, W) with the image augmentations of the list in their order.

    Without a random crop in the list the evaluation resize and crop come first. With `shrink`, where
    `random_resized_crop` comes first, it is given an image no larger than its smallest crop needs (see `Shrink`). With
    `on_device` the result is uint8, and what follows the last random crop is left to the device.
    """
    image_specs = [each for each in augmentations if each.name in specs.IMAGE_AUGMENTATIONS]
    on_images = [each for each in image_specs if each.name not in ON_TENSORS]
    cut = max((at for at, each in enumerate(on_images, 1) if each.name in CROPS), default=0)
    first, then, last = (
        [step for each in part for step in BUILDERS[each.name](each, image_input)]
        for part in (
            on_images[:cut],
            on_images[cut:],
            [each for each in image_specs if each.name in ON_TENSORS],
        )
    )
    if not cut:
        return ImageTransform(
            EvalScale(image_input),
            tuple(_crop(image_input)),
            *_halves([], then, last, image_input, on_device),
        )
    scale: Scale | None = None
    if isinstance(spec := image_specs[0], specs.RandomResizedCrop) and shrink:
        scale = Shrink(image_input, spec)
    elif isinstance(begin := first[0], EvalScale):
        scale, first = begin, first[1:]
    return ImageTransform(scale, (), *_halves(first, then, last, image_input, on_device))


def _halves(
    first: list[Step], then: list[Step], last: list[Step], image_input: ImageInput, on_device: bool
) -> tuple[Step, Later | None]:
    """Return `rest` and `later`: steps up to the last crop, those after it, and those on normalised tensors."""
    to_tensor, to_float, normalise = _normalise(image_input)
    if not on_device:
        return v2.Compose([*first, *then, to_tensor, to_float, normalise, *last]), None
    return v2.Compose([*first, to_tensor]), Later((*then, normalise, *last), image_input.size)


def denormalise(pixel_values: Tensor, image_input: ImageInput) -> Tensor:
    """Return normalised pixels (…, 3, H, W) as 0..1, for people to look at."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (image_input.mean, image_input.std))
    return (pixel_values * std + mean).clamp(0, 1)


# ---- evaluation: the cases of timm.data.transforms_factory.transforms_imagenet_eval ------------------------


def _scaled_size(image_input: ImageInput) -> tuple[int, int]:
    height, width = (math.floor(side / image_input.crop_pct) for side in image_input.size)
    return height, width


class Scale(ABC):
    """Brings an image to another size."""

    image_input: ImageInput

    @abstractmethod
    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that an image of this size gets."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image in its other size."""
        size = self.size(image.height, image.width)
        interpolation = v2.InterpolationMode(self.image_input.interpolation)
        return F.resize(image, list(size), interpolation=interpolation)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return everything that decides what comes out."""


@dataclass(frozen=True)
class EvalScale(Scale):
    """The evaluation resize: `size / crop_pct`, of the shape that `crop_mode` says."""

    image_input: ImageInput

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that an image of this size gets."""
        target, mode = _scaled_size(self.image_input), self.image_input.crop_mode
        if mode == "squash":
            return target
        if mode != "border" and target[0] == target[1]:  # as torchvision rounds
            short, long = min(height, width), max(height, width)
            sides = target[0], int(target[0] * long / short)
            return sides if height <= width else sides[::-1]
        # as timm rounds (its ResizeKeepRatio): the long side is `target` for `border`, else the short one
        fit = max if mode == "border" else min
        ratio = fit(height / target[0], width / target[1])
        return round(height / ratio), round(width / ratio)

    def describe(self) -> dict[str, Any]:
        """Return everything that decides what comes out, the crop that may follow included."""
        return {"eval": asdict(self.image_input)}


@dataclass(frozen=True)
class Shrink(Scale):
    """Down as far as the smallest random crop still has a pixel for each of the model's, where that halves the size."""

    image_input: ImageInput
    crop: specs.RandomResizedCrop

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that an image of this size gets."""
        (wanted_height, wanted_width), (narrow, wide) = self.image_input.size, self.crop.ratio
        area = self.crop.scale[0] * height * width  # of the smallest crop
        needed = (
            wanted_height / math.sqrt(area / wide),
            wanted_width / math.sqrt(area * narrow),
            wanted_height / height,  # where no crop of that shape fits, it takes up a side
            wanted_width / width,
        )
        share = max(needed)
        return (height, width) if share**2 > 0.5 else (math.ceil(height * share), math.ceil(width * share))

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image, or a smaller copy that knows how large it was."""
        full_size = (image.height, image.width)
        if self.size(*full_size) == full_size:
            return image
        smaller = super().__call__(image)
        smaller.info[FULL_SIZE] = full_size
        return smaller

    def describe(self) -> dict[str, Any]:
        """Return everything that decides what comes out."""
        known = self.image_input
        return {"shrink": [known.size, known.interpolation, self.crop.scale[0], self.crop.ratio]}


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
    return [_RandomResizedCrop(image_input.size, spec.scale, spec.ratio, interpolation=interpolation)]


class _RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's; of a smaller copy it takes the part of the picture that it would take of the image."""

    def forward(self, image: Image.Image) -> Image.Image:
        """Return the crop."""
        if FULL_SIZE not in image.info:
            return cast(Image.Image, super().forward(image))
        height, width = image.info[FULL_SIZE]
        drawn = self.make_params([torch.empty((3, height, width), device="meta")])
        down, across = image.height / height, image.width / width
        top, left = drawn["top"] * down, drawn["left"] * across
        bottom, right = top + drawn["height"] * down, left + drawn["width"] * across
        return image.resize(
            (self.size[1], self.size[0]),
            Image.Resampling[self.interpolation.name],
            box=(left, top, min(right, image.width), min(bottom, image.height)),
        )


def _random_crop(spec: specs.RandomCrop, image_input: ImageInput) -> list[Step]:
    height, width = image_input.size
    padding = [round(width * spec.padding), round(height * spec.padding)]
    pad = [v2.Pad(padding, padding_mode="reflect")] if any(padding) else []
    crop = v2.RandomCrop((height, width), pad_if_needed=True, fill=_mean_colour(image_input))
    return [EvalScale(image_input), *pad, crop]


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
