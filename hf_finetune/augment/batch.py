"""Augmentations of a batch: mixup and cutmix on the pairs (2k, 2k+1) of the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_finetune.augment.rng import sample_generator
from hf_finetune.augment.spec import BATCH_AUGMENTATIONS, AugmentationSpec, Cutmix, Mixup

MIX_STREAM = 1


def mixers(augmentations: Sequence[AugmentationSpec]) -> list[Mixup | Cutmix]:
    """Return the batch augmentations of a list."""
    return [
        each
        for each in augmentations
        if isinstance(each, (Mixup, Cutmix)) and each.name in BATCH_AUGMENTATIONS
    ]


def mix(
    pixel_values: Tensor,
    targets: Tensor,
    indices: Sequence[int],
    *,
    mixing: Sequence[Mixup | Cutmix],
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """Return `pixel_values` (N, 3, H, W) and soft `targets` (N, C) with the pairs (0, 1), (2, 3), … mixed.

    Both of a pair get the same weight lam ~ Beta(alpha, alpha), drawn from (seed, epoch, index of the pair's first); of
    several `mixing` one is chosen per pair with equal odds. An odd last sample stays as it is.
    """
    pixel_values, targets = pixel_values.clone(), targets.clone()
    for first in range(0, len(indices) - 1, 2):
        rng = sample_generator(seed, epoch, indices[first], MIX_STREAM)
        chosen = mixing[int(rng.integers(len(mixing)))]
        applies, lam = rng.random() < chosen.p, float(rng.beta(chosen.alpha, chosen.alpha))
        if not applies:
            continue
        pair = slice(first, first + 2)
        images, labels = pixel_values[pair], targets[pair]
        if isinstance(chosen, Cutmix):
            images, lam = _cut(images, lam, float(rng.random()), float(rng.random()))
        else:
            images = torch.lerp(images.flip(0), images, lam)
        pixel_values[pair] = images
        targets[pair] = torch.lerp(labels.flip(0), labels, lam)
    return pixel_values, targets


def _cut(images: Tensor, lam: float, at_y: float, at_x: float) -> tuple[Tensor, float]:
    """Exchange one rectangle of area about 1 - lam, centred at (at_y, at_x) in 0..1; lam becomes the share kept."""
    height, width = images.shape[-2:]
    half_h, half_w = height * (1 - lam) ** 0.5 / 2, width * (1 - lam) ** 0.5 / 2
    top, bottom = (round(min(max(at_y * height + d, 0), height)) for d in (-half_h, half_h))
    left, right = (round(min(max(at_x * width + d, 0), width)) for d in (-half_w, half_w))
    out = images.clone()
    out[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return out, 1 - (bottom - top) * (right - left) / (height * width)
