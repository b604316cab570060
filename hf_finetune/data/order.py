"""Which samples form which batch: pure functions of (seed, epoch), the same in every process and worker.

A run that resumes, or moves to another number of processes, sees the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

import numpy as np

WINDOW_BATCHES = 50
"""Batches whose samples are sorted by length together, at most: enough for little padding."""
MIN_WINDOWS = 4
"""Windows an epoch has at least, so that a small set's batches differ from epoch to epoch."""


def epoch_batches(
    n: int,
    batch_size: int,
    seed: int,
    epoch: int | tuple[int, int],
    lengths: Sequence[int] | np.ndarray | None = None,
) -> list[list[int]]:
    """Return the global batches of an epoch, or of a stream's (pass, block), as lists of sample indices, each once.

    One batch may be short. With `lengths` (one per sample) a batch holds samples of similar length: shuffled
    samples are sorted by length within windows of many batches, then the batches are shuffled (the scheme of
    transformers' `get_length_grouped_indices`, with the batches shuffled too).
    """
    rng = np.random.default_rng((seed, *(epoch if isinstance(epoch, tuple) else (epoch,))))
    order = rng.permutation(n)
    if lengths is not None:
        lengths = np.asarray(lengths)
        window = batch_size * max(1, min(WINDOW_BATCHES, n // (batch_size * MIN_WINDOWS)))
        for start in range(0, n, window):
            part = order[start : start + window]
            order[start : start + window] = part[np.argsort(lengths[part], kind="stable")]
    batches = [order[start : start + batch_size].tolist() for start in range(0, n, batch_size)]
    return batches if lengths is None else [batches[at] for at in rng.permutation(len(batches))]


def share(
    batch: Sequence[int], rank: int, world: int, micro_batch_size: int, pairs: bool = False
) -> list[tuple[list[int], list[float]]]:
    """Return the micro-batches of process `rank` of `world` for one global batch, as (indices, weights).

    The processes take contiguous slices, and all have the same number of micro-batches, none of them empty:
    where a process has no sample left, a repeated one comes with weight 0 (real samples weigh 1). A sample
    left alone is repeated likewise, since BatchNorm cannot learn from one. With `pairs`, the samples 2k and
    2k+1 of the global batch stay in one micro-batch, which then holds two samples at least.
    """
    step = 2 if pairs else 1
    units = [list(batch[start : start + step]) for start in range(0, len(batch), step)]
    bounds = [-(-len(units) * process // world) for process in range(world + 1)]
    largest = max(stop - start for start, stop in pairwise(bounds))
    count = -(-largest // max(1, micro_batch_size // step))
    mine = units[bounds[rank] : bounds[rank + 1]]
    # shared out evenly, so that no micro-batch is much smaller than the others
    cuts = [len(mine) * part // count for part in range(count + 1)]
    chunks = [list(chain.from_iterable(mine[start:stop])) for start, stop in pairwise(cuts)]
    smallest = 2 if micro_batch_size > 1 or pairs else 1
    return [_filled(chunk, smallest, spare=batch[0]) for chunk in chunks]


def cut_by_tokens(indices: Sequence[int], lengths: np.ndarray, tokens: int) -> list[list[int]]:
    """Cut samples, in their order, into runs of at most `tokens` tokens, padding included; a longer one is alone."""
    runs: list[list[int]] = []
    longest = 0
    for index in indices:
        longest = max(longest, int(lengths[index]))
        if not runs or (len(runs[-1]) + 1) * longest > tokens:
            runs.append([])
            longest = int(lengths[index])
        runs[-1].append(index)
    return runs


def share_by_tokens(
    batch: Sequence[int], rank: int, world: int, micro_batch_size: int, lengths: np.ndarray, tokens: int
) -> list[tuple[list[int], list[float]]]:
    """Return what `share` does for texts, each micro-batch cut further to at most `tokens` tokens, padding included.

    All processes get the same number of micro-batches here too: a process with shorter texts is given its batch's
    shortest one again, at weight 0.
    """

    def cut(rank: int) -> Iterator[tuple[list[int], list[float]]]:
        for indices, weights in share(batch, rank, world, micro_batch_size):
            real = [index for index, weight in zip(indices, weights, strict=True) if weight]
            for run in cut_by_tokens(real, lengths, tokens):
                room = 2 * int(lengths[run[0]]) <= tokens
                yield _filled(run, min(len(indices), 2) if room else 1, spare=run[0])

    shares = [list(cut(each)) for each in range(world)]
    missing = max(map(len, shares)) - len(shares[rank])
    return shares[rank] + [([min(batch, key=lambda index: int(lengths[index]))], [0.0])] * missing


def _filled(chunk: list[int], smallest: int, spare: int) -> tuple[list[int], list[float]]:
    missing = max(0, smallest - len(chunk))
    filler = chunk[0] if chunk else spare
    return [*chunk, *[filler] * missing], [1.0] * len(chunk) + [0.0] * missing
