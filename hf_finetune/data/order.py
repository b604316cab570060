"""Which samples form which batch: pure functions of (seed, epoch), the same on every process and worker.

A run that resumes, or that moves to another number of processes, sees the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW_BATCHES = 50
"""Batches that are sorted by length together: long enough for little padding, short enough to stay random."""


def epoch_batches(
    n: int, batch_size: int, seed: int, epoch: int, lengths: Sequence[int] | np.ndarray | None = None
) -> list[list[int]]:
    """Return the global batches of one epoch as lists of sample indices; every sample is in exactly one.

    The last batch may be short. With `lengths` (one per sample) a batch holds samples of similar length: the shuffled
    samples are sorted by length in windows of `WINDOW_BATCHES` batches, then the batches are shuffled.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(n)
    if lengths is None:
        return [order[start : start + batch_size].tolist() for start in range(0, n, batch_size)]
    lengths = np.asarray(lengths)
    window = batch_size * WINDOW_BATCHES
    parts = [order[start : start + window] for start in range(0, n, window)]
    order = (
        np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts]) if parts else order
    )
    batches = [order[start : start + batch_size].tolist() for start in range(0, n, batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def share(
    batch: Sequence[int], rank: int, world: int, micro_batch_size: int, pairs: bool = False
) -> list[tuple[list[int], list[float]]]:
    """Return the micro-batches of process `rank` of `world` for one global batch, as (indices, weights).

    Processes take contiguous slices, so their union in order is the global batch. Every process gets the same number of
    micro-batches; one with too few samples gets micro-batches of one repeated sample with weight 0 (real samples weigh 1).
    With `pairs`, samples 2k and 2k+1 of the global batch are never separated, and a micro-batch holds at least two.
    """
    if not batch:
        raise ValueError("share: the batch is empty; a global batch holds at least one sample")
    step = 2 if pairs else 1
    units = [list(batch[start : start + step]) for start in range(0, len(batch), step)]
    per_micro = max(1, micro_batch_size // step)
    bounds = [len(units) * r // world for r in range(world + 1)]
    largest = max(after - before for before, after in zip(bounds, bounds[1:], strict=False))
    count = -(-largest // per_micro)
    mine = units[bounds[rank] : bounds[rank + 1]]
    cuts = [len(mine) * i // count for i in range(count + 1)]
    chunks = [sum(mine[before:after], []) for before, after in zip(cuts, cuts[1:], strict=False)]
    return [(chunk, [1.0] * len(chunk)) if chunk else ([batch[0]], [0.0]) for chunk in chunks]
