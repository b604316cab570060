"""scikit-learn's 8x8 handwritten digits as small colour photographs of the classes five to nine.

The backbone `shipped/tiny-resnet` has seen only zero to four (`PRETRAINING_CLASSES`), drawn the same way, so
fine-tuning on this set is a real transfer to new classes.
"""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits

PRETRAINING_CLASSES = (0, 1, 2, 3, 4)
TARGET_CLASSES = (5, 6, 7, 8, 9)
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 32
TRAIN_PER_CLASS = 20
_SEED = 0


def load() -> DatasetDict:
    """Build the target set, always the same: columns `image` (RGB, 32x32) and `label` (five … nine)."""
    images, labels = digits(TARGET_CLASSES)
    splits: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for label in range(len(TARGET_CLASSES)):
        # scikit-learn keeps the order of collection, writer after writer: shuffle
        indices = np.random.default_rng((_SEED, label)).permutation(np.flatnonzero(labels == label)).tolist()
        rest = indices[TRAIN_PER_CLASS:]
        splits["train"] += indices[:TRAIN_PER_CLASS]
        splits["validation"] += rest[: len(rest) // 2]
        splits["test"] += rest[len(rest) // 2 :]
    names = [CLASS_NAMES[i] for i in TARGET_CLASSES]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {
                    "image": [PILImage.fromarray(images[i]) for i in sorted(chosen)],
                    "label": labels[sorted(chosen)],
                },
                features=features,
            )
            for split, chosen in splits.items()
        }
    )


def digits(classes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Draw every digit of `classes`: uint8 images (n, 32, 32, 3), labels (n,) as positions in it."""
    bunch = load_digits()
    chosen = np.flatnonzero(np.isin(bunch.target, classes))
    images = np.stack([draw(bunch.images[i] / 16.0, np.random.default_rng((_SEED, int(i)))) for i in chosen])
    return images, np.searchsorted(classes, bunch.target[chosen])


def draw(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint one digit, `ink` (8, 8) in 0..1, in a random colour on a random background: uint8 (32, 32, 3).

    Colour carries no label here: a network that starts from nothing has first to learn to look past it.
    """
    small = PILImage.fromarray(ink.astype(np.float32))
    large = small.resize((IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.BICUBIC)
    cover = np.clip(np.asarray(large), 0.0, 1.0)[..., None]
    paper, pen = rng.uniform(0, 130, 3), rng.uniform(125, 255, 3)
    return np.rint(paper + cover * (pen - paper)).astype(np.uint8)
