"""The device half of image augmentation: what was drawn for each image alone is done to whole batches of uint8.

A worker draws with the very transforms that it would apply: they run on a stand-in without pixels, which notes what
they would do. So the same numbers come from the same generator, wherever the work is done. They go with the sample, and
the device does to all images of a batch at once what they have in common. Every image is computed by itself, in whole
numbers or in an order that does not depend on its neighbours: a view is the same in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

OPERATIONS = "operations"
"""The name, beside `pixel_values`, of what is still to be done to them: float32 (slots, 1 + NUMBERS) for each image."""
NUMBERS = 9
"""How many numbers an operation may need: a matrix and a colour."""
ROUNDING = 1 / 128
"""Pillow cuts interpolated values off; what lies so little under a whole number is one, but for float32's rounding."""


@dataclass(frozen=True)
class Operation:
    """One thing to do to an image; its line in `TABLE` is its number."""

    functional: Callable[..., Any]
    """The function of torchvision that a transform calls for it."""
    numbers: Callable[..., Sequence[float]]
    """(stand-in, what the function is given) -> up to `NUMBERS` numbers that say all about it."""
    apply: Callable[[Tensor, Tensor], Tensor]
    """(images (N, 3, H, W), numbers (N, NUMBERS)) -> the images, each changed by its own numbers."""


@dataclass(frozen=True)
class Later:
    """Transforms of images of one size that are drawn now and done later."""

    steps: tuple[Callable[[Any], Any], ...]
    size: tuple[int, int]
    """Height and width in pixels."""

    def draw(self) -> Tensor:
        """Return what the steps do to one image, float32 (slots, 1 + NUMBERS): call it inside `sample_rng`.

        A slot holds the number of an operation, 0 for none, and what it needs. Slot by slot, all images of a run do
        the same step, so that a batch falls into few groups.
        """
        slots: list[list[float]] = []
        for step in self.steps:
            stand_in = StandIn(torch.empty((), dtype=torch.uint8).expand(3, *self.size))
            stand_in.drawn = []
            if step(stand_in) is not stand_in:
                raise TypeError(f"{step} does what no line of the table of operations stands for")
            slots += stand_in.drawn + [[0.0]] * (_most(step) - len(stand_in.drawn))
        return torch.tensor([slot + [0.0] * (1 + NUMBERS - len(slot)) for slot in slots])


class StandIn(tv_tensors.Image):
    """Stands for an image of its shape; transforms note in `drawn` what they would do to it."""

    drawn: list[list[float]]


def finish(pixels: Tensor, operations: Tensor) -> Tensor:
    """Return images as the model reads them, float32 (N, 3, H, W) in channels_last.

    Args:
        pixels: uint8 (N, 3, H, W), on the device that does the work.
        operations: what `Later.draw` gave for each of them, (N, slots, 1 + NUMBERS), in the memory of the host.
    """
    pixels = pixels.clone()  # the batch keeps its own
    numbers = operations.to(pixels.device, non_blocking=True)
    kinds = operations[..., 0].long().T  # by slot
    order = kinds.argsort(dim=1, stable=True).to(pixels.device, non_blocking=True)
    for slot in range(len(kinds)):
        start = 0
        for kind, count in zip(
            *(each.tolist() for each in kinds[slot].unique(return_counts=True)), strict=True
        ):
            rows, start = order[slot, start : start + count], start + count
            if kind == 0:
                continue
            apply = TABLE[kind - 1].apply
            if count == len(pixels):
                pixels = apply(pixels, numbers[:, slot, 1:])
            else:
                changed = apply(pixels.index_select(0, rows), numbers[:, slot, 1:].index_select(0, rows))
                pixels.index_copy_(0, rows, changed)
    return pixels.contiguous(memory_format=torch.channels_last)


def _most(step: Any) -> int:
    """Return how many operations a transform does to one image at most."""
    return 4 if isinstance(step, v2.ColorJitter) else int(getattr(step, "num_ops", 1))


# ---- what is drawn, in numbers -------------------------------------------------------------------------------


def _matrix(
    image: Tensor,
    angle: float,
    translate: Sequence[float],
    shear: Sequence[float],
    fill: Sequence[float],
    center: Sequence[float] | None = None,
    **_: Any,
) -> list[float]:
    """Return the matrix that leads from a place in the result to its place in the image, and the colour around."""
    x, y = center or (image.shape[-1] / 2, image.shape[-2] / 2)
    turn, (across, down) = math.radians(angle), map(math.radians, shear)
    a, c = (of(turn - down) / math.cos(down) for of in (math.cos, math.sin))
    b, d = -a * math.tan(across) - math.sin(turn), -c * math.tan(across) + math.cos(turn)
    left, top = -x - translate[0], -y - translate[1]
    return [d, -b, d * left - b * top + x, -c, a, -c * left + a * top + y, *fill]


def _rotate(image: StandIn, angle: float, fill: Sequence[float], **_: Any) -> Any:
    """Note a rotation as the affine map that it is."""
    return F.affine(image, angle=-angle, translate=[0, 0], scale=1.0, shear=[0.0, 0.0], fill=list(fill))


# ---- what is done to a batch: to Pillow's rules, in whole numbers where it computes in those -------------------


def _each(numbers: Tensor, at: int = 0) -> Tensor:
    """Return one number of each image, to compute with its pixels."""
    return numbers[:, at].view(-1, 1, 1, 1)


def _affine(images: Tensor, numbers: Tensor) -> Tensor:
    """Take every pixel from its place in the image, between pixels bilinearly; outside is the colour around."""
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device).view(1, 1, -1) + 0.5
    y = torch.arange(height, device=images.device).view(1, -1, 1) + 0.5
    a, b, c, d, e, f = (numbers[:, at].view(-1, 1, 1) for at in range(6))
    across, down = a * x + b * y + c, d * x + e * y + f
    grid = torch.stack([across * 2 / width - 1, down * 2 / height - 1], dim=-1)
    taken = grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    taken = torch.where(inside[:, None], taken + ROUNDING, numbers[:, 6:9, None, None])
    return taken.clamp(0, 255).to(torch.uint8)


def _blend(poorer: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
    """Move images away from what is poorer by something, or towards it, by a factor."""
    poorer = poorer.float()
    return (poorer + _each(numbers) * (images - poorer)).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _brightness(images: Tensor, numbers: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, numbers)


def _saturation(images: Tensor, numbers: Tensor) -> Tensor:
    return _blend(_grey(images), images, numbers)


def _contrast(images: Tensor, numbers: Tensor) -> Tensor:
    grey = _grey(images)
    count = grey[0].numel()
    return _blend((2 * grey.sum((1, 2, 3), keepdim=True) + count) // (2 * count), images, numbers)


def _sharpness(images: Tensor, numbers: Tensor) -> Tensor:
    """Blend with the images smoothed by [1 1 1, 1 5 1, 1 1 1] / 13, their edges as they are."""
    height, width = images.shape[-2:]
    wide, smooth = images.short(), images.clone()
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[..., 1:-1, 1:-1]
    smooth[..., 1 : height - 1, 1 : width - 1] = ((around + 6) // 13).to(torch.uint8)
    return _blend(smooth, images, numbers)


def _hue(images: Tensor, numbers: Tensor) -> Tensor:
    """Turn the hue, a whole number from 0 to 255, as hue and saturation are in Pillow's HSV."""
    red, green, blue = images.float().split(1, dim=1)
    value, least = images.float().amax(1, keepdim=True), images.float().amin(1, keepdim=True)
    colour = value - least
    shares = [(value - each) / colour.clamp(min=1) for each in (red, green, blue)]
    hue = torch.where(red == value, shares[2] - shares[1], 4 + shares[1] - shares[0])
    hue = torch.where((green == value) & (red != value), 2 + shares[0] - shares[2], hue)
    hue = ((hue / 6 + 1) % 1 * 255).floor()
    saturation = (colour / value.clamp(min=1) * 255).floor()
    turned = (hue + _each(numbers)) % 256 * 6 / 255
    from_top = (5 - 2 * torch.arange(3, device=images.device).view(1, 3, 1, 1) + turned) % 6
    share = torch.minimum(from_top, 4 - from_top).clamp(0, 1)
    return (value - value * saturation / 255 * share + 0.5).to(torch.uint8)


def _autocontrast(images: Tensor, numbers: Tensor) -> Tensor:
    """Spread every channel over all values, one that is even stays."""
    wide = images.int()
    low, high = wide.amin((2, 3), keepdim=True), wide.amax((2, 3), keepdim=True)
    return torch.where(high > low, (wide - low) * 255 // (high - low).clamp(min=1), wide).to(torch.uint8)


def _erase(images: Tensor, numbers: Tensor) -> Tensor:
    top, left, height, width = (_each(numbers, at) for at in range(4))
    y = torch.arange(images.shape[-2], device=images.device).view(1, 1, -1, 1)
    x = torch.arange(images.shape[-1], device=images.device)
    return images.masked_fill((y >= top) & (y < top + height) & (x >= left) & (x < left + width), 0.0)


def _normalise(images: Tensor, numbers: Tensor) -> Tensor:
    mean, std = numbers[:, :3, None, None], numbers[:, 3:6, None, None]
    return F.to_dtype(images, torch.float32, scale=True).sub_(mean).div_(std)


TABLE: tuple[Operation, ...] = (
    Operation(F.horizontal_flip, lambda _: (), lambda images, _: images.flip(-1)),
    Operation(F.vertical_flip, lambda _: (), lambda images, _: images.flip(-2)),
    Operation(F.affine, _matrix, _affine),
    Operation(F.adjust_brightness, lambda _, brightness_factor: [brightness_factor], _brightness),
    Operation(F.adjust_contrast, lambda _, contrast_factor: [contrast_factor], _contrast),
    Operation(F.adjust_saturation, lambda _, saturation_factor: [saturation_factor], _saturation),
    Operation(F.adjust_sharpness, lambda _, sharpness_factor: [sharpness_factor], _sharpness),
    Operation(F.adjust_hue, lambda _, hue_factor: [int(hue_factor * 255) % 256], _hue),
    Operation(
        F.posterize,
        lambda _, bits: [(255 << (8 - bits)) & 255],
        lambda images, n: images & _each(n).to(torch.uint8),
    ),
    Operation(
        F.solarize,
        lambda _, threshold: [math.ceil(threshold)],
        lambda images, n: torch.where(images >= _each(n), 255 - images, images),
    ),
    Operation(F.autocontrast, lambda _: (), _autocontrast),
    Operation(F.equalize, lambda _: (), lambda images, _: F.equalize(images)),
    Operation(F.normalize, lambda _, mean, std, **rest: [*mean, *std], _normalise),
    Operation(F.erase, lambda _, i, j, h, w, **rest: [i, j, h, w], _erase),
)
"""All that the transforms of `image.BUILDERS` do to an image of the model's size, and making it the model's."""


def _note(number: int, operation: Operation, image: StandIn, *given: Any, **named: Any) -> StandIn:
    image.drawn.append([float(number), *map(float, operation.numbers(image, *given, **named))])
    return image


for _number, _operation in enumerate(TABLE, 1):
    F.register_kernel(_operation.functional, StandIn)(partial(_note, _number, _operation))
F.register_kernel(F.rotate, StandIn)(_rotate)
