"""Features of a split: found on disk and compared, or computed by every process together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from hf_finetune.data.loaders import EvalSet, TrainSet, collate, eval_batches, eval_tokens, loader_over
from hf_finetune.evaluation import to_device
from hf_finetune.features.cut import Cut, Inputs, capture
from hf_finetune.features.disk import discard, features_folder, remove
from hf_finetune.features.store import Column, Stored, StoreError, Writer, bytes_of, key_of, open_features

BATCH = 32
"""Samples that run through the prefix together, on an accelerator more of short texts: always the same ones, so that
features are the same to the bit."""
CHECKED = 8
"""Stored rows that are computed anew and compared when features are found on disk."""
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""How far these may lie apart, as a share of the largest value: batches of other sizes round differently."""


@dataclass(frozen=True)
class Want:
    """The features of one split at one cut."""

    data: EvalSet
    views: int
    cut: Cut
    columns: dict[str, Column]
    ends: np.ndarray = field(repr=False)
    """Running sums of the rows' lengths; empty for images."""
    parts: dict[str, Any] = field(repr=False)
    """All that decides what the features are."""

    @property
    def rows(self) -> int:
        """Number of rows: every view of a sample is one."""
        return len(self.data) * self.views

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return bytes_of(self.columns, self.ends, self.rows)

    @cached_property
    def key(self) -> str:
        """The name under which the features are kept."""
        return key_of(self.parts)

    def sample_key(self, row: int) -> Any:
        """Return what a row's sample is asked for by: (view, index) where it may be augmented."""
        return divmod(row, len(self.data)) if isinstance(self.data, TrainSet) else row

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of texts."""
        return None if self.data.tokens is None else self.data.tokens.tokenizer

    @property
    def pads_left(self) -> bool:
        """Whether texts are padded in front."""
        return self.tokenizer is not None and self.tokenizer.padding_side == "left"


class Storable(Protocol):
    """What is to be kept: its key, what that was made of, and its form on disk."""

    @property
    def key(self) -> str: ...  # noqa: D102
    @property
    def parts(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def columns(self) -> dict[str, Column]: ...  # noqa: D102
    @property
    def ends(self) -> np.ndarray: ...  # noqa: D102
    @property
    def rows(self) -> int: ...  # noqa: D102


def find(want: Want, model: nn.Module, accelerator: Accelerator, say: Callable[[str], None]) -> Stored | None:
    """Return features from disk if they are there and are what the model computes; else None, in every process.

    Raises:
        StoreError: wrong ones stand in the way.
    """
    return find_kept(
        want, lambda stored: _holds(want, stored, model, accelerator), accelerator, say, "features"
    )


def find_kept(
    want: Storable,
    holds: Callable[[Stored], bool],
    accelerator: Accelerator,
    say: Callable[[str], None],
    what: str,
) -> Stored | None:
    """Return what is on disk under a key if the main process finds that it `holds`; else None, in every process.

    Raises:
        StoreError: wrong ones stand in the way.
    """
    stored, reason = None, None
    try:
        stored = open_features(want.key)
        if stored and accelerator.is_main_process and not holds(stored):
            reason = "they are not what is computed now"
    except StoreError as error:
        reason = str(error)
    reasons = [each for each in _gathered(reason, accelerator) if each]
    present = all(_gathered(stored is not None, accelerator))
    if reasons:
        say(f"{what}: those on disk are computed anew: {reasons[0]}")

        def go() -> None:
            if accelerator.is_main_process and not discard(want.key):
                raise StoreError(f"{want.key} in {features_folder()} is wrong and cannot be removed")

        _together(go, accelerator)
    return stored if present and not reasons else None


def compute(
    wants: Sequence[Want],
    model: nn.Module,
    accelerator: Accelerator,
    *,
    workers: int,
    on_batch: Callable[[], None],
) -> Stored:
    """Run the frozen prefix over every row of a split, once for all these wants; return the first one's features.

    Raises:
        StoreError: they cannot be written; nothing is left behind.
    """
    share = accelerator.device, accelerator.process_index, accelerator.num_processes
    batches = (
        (rows, run_prefix(wants, batch, model, accelerator))
        for rows, batch in _batches(wants[0], *share, workers)
    )
    return keep(wants, batches, accelerator, on_batch=on_batch, pad_left=wants[0].pads_left)


def keep(
    wants: Sequence[Storable],
    batches: Iterable[tuple[list[int], list[Inputs]]],
    accelerator: Accelerator,
    *,
    on_batch: Callable[[], None],
    pad_left: bool = False,
) -> Stored:
    """Write this process's batches, (rows, what each want keeps of them), while the others write theirs.

    Returns the first want's rows, those of all processes.

    Raises:
        StoreError: they cannot be written; nothing is left behind.
    """
    folders: list[Path] = []

    def reserve() -> None:
        for want in wants if accelerator.is_main_process else ():
            folders.append(Writer.reserve(want.key, want.columns, want.ends, want.rows))

    writers: list[Writer] = []

    def write() -> None:
        shared = [folders]
        if accelerator.num_processes > 1:
            broadcast_object_list(shared)
        writers.extend(Writer(f, w.columns, w.ends, w.rows) for f, w in zip(shared[0], wants, strict=True))
        for rows, batch in batches:
            for writer, features in zip(writers, batch, strict=True):
                writer.write(rows, features, pad_left=pad_left)
            on_batch()
        for writer in writers:
            writer.close()

    def finish() -> None:
        for writer, want in zip(writers, wants, strict=True):
            if accelerator.is_main_process:
                writer.finish(want.key, want.parts)

    found: list[Stored] = []

    def open_all() -> None:
        stored = open_features(wants[0].key)
        if stored is None:
            raise StoreError(
                f"not every process finds them in {features_folder()}: HF_FINETUNE_CACHE must name a folder that all "
                "nodes see"
            )
        found.append(stored)

    try:
        for action in (reserve, write, finish):
            _together(action, accelerator)
    except BaseException:
        for writer in writers:
            writer.abandon()
        for folder in folders:
            remove(folder)
        raise
    _together(open_all, accelerator)
    return found[0]


def hold(
    want: Want, model: nn.Module, accelerator: Accelerator, *, workers: int, on_batch: Callable[[], None]
) -> Stored:
    """Return features that stay in memory, for where no disk takes them; each process computes all rows."""
    entries = {True: int(want.ends[-1]) if len(want.ends) else 0, False: want.rows}
    tensors = {
        name: torch.empty(entries[column.ragged], *column.shape, dtype=column.dtype)
        for name, column in want.columns.items()
    }
    held = Stored(Path(), want.columns, tensors, want.ends)
    for rows, batch in _batches(want, accelerator.device, 0, 1, workers):
        computed = run_prefix([want], batch, model, accelerator)[0]
        for name, column in want.columns.items():
            for row, values in zip(rows, computed[name].cpu(), strict=True):
                place = held(row)[name]
                place.copy_(_unpadded(values, len(place), want.pads_left) if column.ragged else values)
        on_batch()
    return held


def _together(action: Callable[[], None], accelerator: Accelerator) -> None:
    """Let every process act; where one cannot, all raise."""
    reason = None
    try:
        action()
    except StoreError as error:
        reason = str(error)
    for each in _gathered(reason, accelerator):
        if each:
            raise StoreError(each)


def _gathered(value: Any, accelerator: Accelerator) -> list[Any]:
    return list(gather_object([value])) if accelerator.num_processes > 1 else [value]


def _batches(
    want: Want, device: torch.device, rank: int, world: int, workers: int
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield a process's batches of a split as (rows, batch); texts of like length together."""
    lengths = np.diff(want.ends, prepend=0) if len(want.ends) else None
    tokens = eval_tokens(lengths, BATCH, device)
    mine = eval_batches(np.arange(want.rows), lengths, BATCH, tokens)[rank::world]
    keys = [[want.sample_key(row) for row in batch] for batch in mine]
    loader = loader_over(want.data, keys, workers=workers, pin_memory=device.type == "cuda")
    yield from zip(mine, loader, strict=True)


@torch.no_grad()
def run_prefix(
    wants: Sequence[Want], batch: dict[str, Any], model: nn.Module, accelerator: Accelerator
) -> list[Inputs]:
    """Return what each want stores of a batch, out of one pass."""
    with accelerator.autocast():
        return capture([want.cut for want in wants], model, to_device(batch["inputs"], accelerator.device))


def _holds(want: Want, stored: Stored, model: nn.Module, accelerator: Accelerator) -> bool:
    """Compare a few stored rows with what the model computes now."""
    chosen = np.random.default_rng(int(want.key[:8], 16)).choice(
        want.rows, min(CHECKED, want.rows), replace=False
    )
    rows = [int(row) for row in chosen]
    batch = collate([want.data[want.sample_key(row)] for row in rows], tokenizer=want.tokenizer)
    computed = run_prefix([want], batch, model, accelerator)[0]
    for name, column in want.columns.items():
        fresh = computed[name].float().cpu()
        # what was computed in a coarse format differs by that format's rounding, however it is stored
        coarse = max(TOLERANCES[column.dtype], TOLERANCES.get(_computed_in(want), 0.0))
        for row, values in zip(rows, fresh, strict=True):
            kept = stored(row)[name].float()
            if column.ragged:
                values = _unpadded(values, len(kept), want.pads_left)
            if not torch.allclose(kept, values, rtol=0, atol=coarse * float(fresh.abs().max())):
                return False
    return True


def _computed_in(want: Want) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(want.parts["precision"], torch.float32)


def _unpadded(values: Tensor, length: int, pads_left: bool) -> Tensor:
    return values[len(values) - length :] if pads_left else values[:length]
