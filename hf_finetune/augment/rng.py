"""Randomness that belongs to a sample: a pure function of (seed, epoch, index).

Workers, processes, accumulation and resume therefore cannot change what a sample looks like in an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def sample_generator(seed: int, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
    """Return the numpy generator of one sample in one epoch; `stream` separates independent uses."""
    return np.random.default_rng((seed, epoch, index, stream))


@contextmanager
def sample_rng(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed torch (CPU), `random` and numpy for one sample, and put back what they were afterwards."""
    states = random.getstate(), np.random.get_state()
    words = np.random.SeedSequence((seed, epoch, index)).generate_state(2)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
            random.seed(int(words[0]))
            np.random.seed(int(words[1]))
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
