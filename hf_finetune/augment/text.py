"""Text augmentations: words dropped or swapped before tokenisation (Wei and Zou 2019, arXiv 1901.11196)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hf_finetune.augment.spec import AugmentationSpec, WordDropout, WordSwap


def drop_words(words: list[str], p: float, rng: np.random.Generator) -> list[str]:
    """Return `words` with each dropped with probability `p`; at least one stays."""
    keep = rng.random(len(words)) >= p
    if words and not keep.any():
        keep[int(rng.integers(len(words)))] = True
    return [word for word, kept in zip(words, keep, strict=True) if kept]


def swap_words(words: list[str], share: float, rng: np.random.Generator) -> list[str]:
    """Return `words` with about `share` of them exchanged with a neighbour."""
    words = list(words)
    if len(words) > 1:
        # a swap moves two words
        for at in rng.integers(len(words) - 1, size=int(rng.binomial(len(words), share / 2))):
            words[at], words[at + 1] = words[at + 1], words[at]
    return words


def build_text_transform(
    augmentations: Sequence[AugmentationSpec],
) -> Callable[[str, np.random.Generator], str]:
    """Return (text, generator) -> text with the word augmentations of the list applied in order."""
    return _TextTransform([each for each in augmentations if isinstance(each, (WordDropout, WordSwap))])


class _TextTransform:
    """A class and not a closure: worker processes need it pickled."""

    def __init__(self, augmentations: Sequence[WordDropout | WordSwap]) -> None:
        self.augmentations = augmentations

    def __call__(self, text: str, rng: np.random.Generator) -> str:
        words = text.split()
        for each in self.augmentations:
            if isinstance(each, WordDropout):
                words = drop_words(words, each.p, rng)
            else:
                words = swap_words(words, each.share, rng)
        return " ".join(words)
