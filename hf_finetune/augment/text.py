"""Text augmentations: words dropped or swapped before tokenisation (Wei and Zou 2019, arXiv 1901.11196)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_finetune.augment.spec import AugmentationSpec, WordDropout, WordSwap


def change_text(text: str, augmentations: Sequence[AugmentationSpec], rng: np.random.Generator) -> str:
    """Return `text` with the word augmentations of the list applied in their order; words end at spaces."""
    words = text.split()
    for each in augmentations:
        if isinstance(each, WordDropout):
            words = drop_words(words, each.p, rng)
        elif isinstance(each, WordSwap):
            words = swap_words(words, each.share, rng)
    return " ".join(words)


def drop_words(words: list[str], p: float, rng: np.random.Generator) -> list[str]:
    """Return `words` with each dropped with probability `p`; at least one stays."""
    keep = rng.random(len(words)) >= p
    if words and not keep.any():
        keep[rng.integers(len(words))] = True
    return [word for word, kept in zip(words, keep, strict=True) if kept]


def swap_words(words: list[str], share: float, rng: np.random.Generator) -> list[str]:
    """Return `words` with about `share` of them moved: pairs of neighbours change places."""
    words = list(words)
    if len(words) > 1:
        swaps = rng.binomial(len(words), share / 2)  # a swap moves two words
        for at in rng.integers(len(words) - 1, size=swaps):
            words[at], words[at + 1] = words[at + 1], words[at]
    return words
