"""Augmentations of a batch: mixup and cutmix on the pairs (2k, 2k+1) of the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_finetune.augment.rng import sample_generator
from hf_finetune.augment.spec import AugmentationSpec, Cutmix, Mixup

MIXING = 1
"""The stream of a sample's randomness that mixing draws from."""


def mixers(augmentations: Sequence[AugmentationSpec]) -> list[Mixup | Cutmix]:
    """Return the batch augmentations of a list."""
    return [each for each in augmentations if isinstance(each, (Mixup, Cutmix))]


def mix(
    pixel_values: Tensor,
    targets: Tensor,
    indices: Sequence[int],
    *,
    mixing: Sequence[Mixup | Cutmix],
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, H, W) and float targets (N, …) with the pairs (0, 1), (2, 3), … mixed, as copies.

    Both of a pair keep the share lam ~ Beta(alpha, alpha) of themselves, drawn from (seed, epoch, index of
    the first). Where several augmentations are listed, each pair gets one, with equal odds. An odd last
    sample stays as it is.
    """
    pixel_values, targets = pixel_values.clone(), targets.clone()
    for first in range(0, len(indices) - 1, 2):
        rng = sample_generator(seed, epoch, indices[first], stream=MIXING)
        chosen = mixing[int(rng.integers(len(mixing)))]
        if rng.random() >= chosen.p:
            continue
        lam = float(rng.beta(chosen.alpha, chosen.alpha))
        pair = slice(first, first + 2)
        images, labels = pixel_values[pair], targets[pair]
        if isinstance(chosen, Cutmix):
            pixel_values[pair], lam = _exchange(images, lam, centre=rng.random(2).tolist())
        else:
            pixel_values[pair] = torch.lerp(images.flip(0), images, lam)
        targets[pair] = torch.lerp(labels.flip(0), labels, lam)
    return pixel_values, targets


def _exchange(images: Tensor, lam: float, centre: Sequence[float]) -> tuple[Tensor, float]:
    """Exchange a rectangle of up to 1 - lam of the area of two images; return them and the share kept."""
    height, width = images.shape[-2:]
    half = (1 - lam) ** 0.5 / 2
    top, bottom = (round(min(max(centre[0] + side, 0.0), 1.0) * height) for side in (-half, half))
    left, right = (round(min(max(centre[1] + side, 0.0), 1.0) * width) for side in (-half, half))
    images = images.clone()
    images[..., top:bottom, left:right] = images[..., top:bottom, left:right].flip(0)
    return images, 1 - (bottom - top) * (right - left) / (height * width)
