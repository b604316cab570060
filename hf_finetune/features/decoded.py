"""Images decoded once: what every view of a row begins with, kept as bytes on disk and mapped into memory.

A row is decoded, turned upright, converted to RGB and run through the fixed part of its transform; what comes out is
kept without loss. To read it or to do all that anew gives the same bits, so nothing depends on whether it was kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from hf_finetune.augment.image import FULL_SIZE, Shrink
from hf_finetune.data.checks import image_sizes
from hf_finetune.data.columns import image_cells
from hf_finetune.data.loaders import EvalSet
from hf_finetune.features.compute import CHECKED, find_kept, keep
from hf_finetune.features.store import Column, Stored, StoreError, bytes_of, key_of
from hf_finetune.runfolder import versions
from hf_finetune.spec import Size

DECODING_PACKAGES = ("torch", "torchvision", "pillow", "hf-finetune")
"""Packages whose other version may decode or resize to other pixels."""
CHUNK = 64
"""Images that are decoded ahead of what is written."""
_COLUMNS = {"sizes": Column((2, 2), torch.int32), "pixels": Column((), torch.uint8, ragged=True)}
"""Height and width, those that the whole image had, and the rows of RGB."""


@dataclass(frozen=True)
class Kept:
    """The images of a split from disk; call it with a row's number."""

    stored: Stored

    def __call__(self, row: int) -> Image.Image:
        """Return what the fixed part of the transform makes of a row's image."""
        found = self.stored(row)
        (height, width), full_size = found["sizes"].tolist()
        image = Image.fromarray(found["pixels"][: height * width * 3].view(height, width, 3).numpy())
        if full_size != [height, width]:
            image.info[FULL_SIZE] = tuple(full_size)
        return image


@dataclass(frozen=True)
class Decoding:
    """The images of a split that are to be kept."""

    data: EvalSet
    split: str
    ends: np.ndarray = field(repr=False)
    """Running sums of the bytes set aside for the rows."""
    shrunk: int
    """Images that are kept smaller than they are: their crops differ from those of the image itself."""
    digest: str = ""
    """Of the rows' content."""

    columns = _COLUMNS

    @property
    def rows(self) -> int:
        """Number of images."""
        return len(self.data)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return bytes_of(self.columns, self.ends, self.rows)

    @cached_property
    def parts(self) -> dict[str, Any]:
        """All that decides what is kept: the images' content, the fixed part of the transform, what computes it."""
        known = versions()
        assert self.data.transform is not None, "texts are not decoded"
        return {
            "rows": self.digest,
            "images": self.data.transform.describe(),
            "versions": {name: known.get(name) for name in DECODING_PACKAGES},
        }

    @cached_property
    def key(self) -> str:
        """The name under which the images are kept."""
        return key_of(self.parts)

    def __str__(self) -> str:
        """Return what is kept, and what that changes, in one line."""
        said = f"{self.rows:,} {self.split} images decoded once ({Size(self.size)})"
        if not self.shrunk:
            return f"{said}, every view as without"
        return (
            f"{said}, {self.shrunk:,} of them no larger than the smallest random crop needs: crops show what they "
            "would show without, resized twice"
        )

    def differs(self, row: int, kept: Kept) -> bool:
        """Return whether another image is kept than a row gives now."""
        fresh = self.data.fixed(row)
        try:
            image = kept(row)
        except (RuntimeError, ValueError):  # sizes that its bytes cannot have
            return True
        full_sizes = [each.info.get(FULL_SIZE) for each in (fresh, image)]
        return (
            fresh.size != image.size or fresh.tobytes() != image.tobytes() or full_sizes[0] != full_sizes[1]
        )


def survey(data: EvalSet) -> tuple[np.ndarray, int]:
    """Return, by the headers of a split's images, `ends` and `shrunk` of a `Decoding`."""
    assert data.transform is not None, "texts are not decoded"
    size, shrinks = data.transform.fixed_size, isinstance(data.transform.scale, Shrink)
    taken, shrunk = [], 0
    for height, width in image_sizes(image_cells(data.rows)):
        if not height * width:  # to decode it will say what is wrong
            taken.append(0)
            continue
        # A header does not say which side is up: room for both.
        taken.append(3 * max(math.prod(size(height, width)), math.prod(size(width, height))))
        shrunk += shrinks and size(height, width) != (height, width)
    return np.cumsum(taken, dtype=np.int64), shrunk


def decode(
    wanted: Decoding,
    accelerator: Accelerator,
    *,
    threads: int,
    say: Callable[[str], None],
    on_batch: Callable[[], None],
) -> Kept:
    """Return a split's images from disk, or decode every one once; every process calls this.

    Raises:
        StoreError: they cannot be kept; nothing is left behind.
        DataError: an image cannot be decoded.
    """

    def holds(stored: Stored) -> bool:
        chosen = np.random.default_rng(int(wanted.key[:8], 16)).choice(
            wanted.rows, min(CHECKED, wanted.rows), replace=False
        )
        return not any(wanted.differs(int(row), Kept(stored)) for row in chosen)

    stored = find_kept(wanted, holds, accelerator, say, "decoded images")
    return Kept(stored or keep([wanted], _rows(wanted, accelerator, threads), accelerator, on_batch=on_batch))


def _rows(
    wanted: Decoding, accelerator: Accelerator, threads: int
) -> Iterator[tuple[list[int], list[dict[str, Tensor]]]]:
    """Yield this process's rows one by one, decoded by threads: libjpeg and Pillow's resize let each other run."""
    room = np.diff(wanted.ends, prepend=0)
    starts = range(0, wanted.rows, CHUNK)[accelerator.process_index :: accelerator.num_processes]
    with ThreadPoolExecutor(threads) as pool:
        for start in starts:
            rows = range(start, min(start + CHUNK, wanted.rows))
            for row, image in zip(rows, pool.map(wanted.data.fixed, rows), strict=True):
                pixels = torch.from_numpy(np.array(image)).flatten()
                if len(pixels) > room[row]:
                    raise StoreError(f"row {row} of {wanted.split} is larger than its header says")
                size = image.height, image.width
                sizes = torch.tensor([[size, image.info.get(FULL_SIZE, size)]])
                yield [row], [{"sizes": sizes, "pixels": pixels[None]}]
