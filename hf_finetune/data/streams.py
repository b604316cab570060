"""Training rows as a stream: read in one order by every process, never held whole, found again without reading anew.

A pass goes over the shards in an order drawn from (seed, pass), `LANES` of them side by side, a row of each in turn.
Blocks of `shuffle_buffer` rows are held and batched by (seed, pass, block) as `order.epoch_batches` does it. So a batch
is a function of the seed and its number. Where a block begins is a few numbers, by which a run that resumes goes on: it
reads that block again, and decodes none of it that has been trained on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from hf_finetune.data.order import epoch_batches
from hf_finetune.errors import DataError, FinetuneError, HubError
from hf_finetune.fetch import from_the_hub

LANES = 8
"""Shards that are read side by side."""
MANY_SHARDS = 4_096
"""Of more, neighbours count as one: taking a shard takes time by their number."""
KEPT_MARKS = 256
"""Blocks whose beginnings are remembered: loaders read ahead of what is trained on."""

Row = dict[str, Any]
"""`{"image": {"bytes", "path"}}` or `{"text"[, "text_pair"]}`, with `"label"`, `"row"`, its number, and `"name"`."""
Mark = dict[str, Any]
"""Where a block begins, as plain numbers: `step`, `pass`, `block`, and the shards that are open there."""


@dataclass(frozen=True)
class Shards:
    """What is read one part after the other: files or groups of rows in them, or the rows of a `Dataset`."""

    data: Dataset | IterableDataset
    names: tuple[str, ...] = ()
    """What the shards are called, where each is a file or a part of one."""

    @property
    def count(self) -> int:
        """Number of shards."""
        return len(self.data) if isinstance(self.data, Dataset) else min(self.data.num_shards, MANY_SHARDS)

    def open(self, shard: int, row: int, state: Any) -> tuple[Iterator[Row], Callable[[], Any]]:
        """Return a shard's rows from `row` on, and what tells its state: what to give as `state` to go on there."""
        if isinstance(self.data, Dataset):
            data = self.data
            return (data[at] for at in ([shard] if row == 0 else [])), lambda: None
        part = self.data.shard(self.count, shard)
        if state:
            part.load_state_dict(state)
        return iter(part), part.state_dict

    def name(self, shard: int, row: int) -> str:
        """Return what a person finds a row by."""
        if isinstance(self.data, Dataset):
            return f"row {shard}"
        return f"row {row} of {self.names[shard] if self.names else f'shard {shard}'}"


@dataclass
class _Lane:
    shard: int
    row: int
    rows: Iterator[Row]
    state: Callable[[], Any]


class Interleaved:
    """The rows of shards in an order: of `LANES` shards one each in turn, as `(shard, row in the shard, cells)`."""

    def __init__(
        self, shards: Shards, order: Sequence[int] | np.ndarray, where: str, state: Any = None
    ) -> None:
        self.shards, self.order, self.where = shards, order, where
        self.next: int = state["next"] if state else 0
        self.lanes = deque(self._open(*each) for each in (state["open"] if state else ()))

    def state(self) -> Any:
        """Return, as plain data, what continues here."""
        return {"next": self.next, "open": [[each.shard, each.row, each.state()] for each in self.lanes]}

    def __iter__(self) -> Iterator[tuple[int, int, Row]]:
        return self

    def __next__(self) -> tuple[int, int, Row]:
        while True:
            while len(self.lanes) < LANES and self.next < len(self.order):
                self.next += 1
                self.lanes.append(self._open(int(self.order[self.next - 1]), 0, None))
            if not self.lanes:
                raise StopIteration
            lane = self.lanes.popleft()
            try:
                cells = next(lane.rows, None)
            except Exception as error:
                raise self._failed(lane.shard, lane.row, error) from error
            if cells is None:
                continue
            self.lanes.append(lane)
            lane.row += 1
            return lane.shard, lane.row - 1, cells

    def _open(self, shard: int, row: int, state: Any) -> _Lane:
        try:
            return _Lane(shard, row, *self.shards.open(shard, row, state))
        except Exception as error:
            raise self._failed(shard, row, error) from error

    def _failed(self, shard: int, row: int, error: Exception) -> FinetuneError:
        cause = error.__cause__ or error
        text = (" ".join(str(cause).split()) or type(cause).__name__)[:300].rstrip(".")
        place = f"data '{self.where}': the stream broke off at {self.shards.name(shard, row)}: {text}"
        if from_the_hub(error):
            return HubError(
                f"{place}. `--resume` goes on from the run's last checkpoint once the Hub answers."
            )
        return DataError(
            f"{place}. Every row needs the same columns, in UTF-8; repair that place. Rows are counted from 0."
        )


class Stream:
    """Training rows that are read as they are needed; `len()` is the samples of an epoch."""

    def __init__(
        self,
        shards: Shards,
        to_row: Callable[[str, int, Row], tuple[Row, str]],
        where: str,
        *,
        samples: int,
        buffer: int,
        seed: int,
        skip: bool,
        skipped: dict[str, int],
    ) -> None:
        self.shards, self.where, self.samples, self.buffer, self.seed = shards, where, samples, buffer, seed
        self.set_aside: dict[int, int] = {}
        """Shard -> its first rows that belong to validation."""
        self.read = 0
        """Rows read so far in this process."""
        self._to_row, self._skip, self._skipped = to_row, skip, skipped
        self._marks: list[Mark] = [
            {"step": 0, "pass": 0, "block": 0, "skipped": 0, "reader": None},
        ]

    def __len__(self) -> int:
        return self.samples

    def batches(self, batch_size: int, step: int = 0) -> Iterator[tuple[int, list[Row]]]:
        """Yield (pass, rows) of each global batch from number `step` on, without an end.

        Raises:
            DataError: a row cannot be used, or a pass holds none.
            HubError: the Hub stopped answering.
        """
        mark = self.mark_at(step)
        number, block, at = mark["pass"], mark["block"], mark["step"]
        reader = self._reader(number, mark["reader"])
        size = batch_size * math.ceil(self.buffer / batch_size)
        self._count_skipped(mark["skipped"], number)
        while True:
            self._remember(
                {
                    "step": at,
                    "pass": number,
                    "block": block,
                    "skipped": self._skipped.get("train", 0),
                    "reader": reader.state(),
                }
            )
            rows = list(islice(self._usable(reader, number), size))
            texts = [[row[name] for name in ("text", "text_pair") if name in row] for row in rows]
            # characters stand in for tokens: what others train on is not tokenised here
            lengths = [sum(map(len, each)) for each in texts] if rows and "text" in rows[0] else None
            planned = epoch_batches(len(rows), batch_size, self.seed, (number, block), lengths)
            for places in planned[max(0, step - at) :]:
                yield number, [rows[place] for place in places]
            at, block = at + len(planned), block + 1
            if len(rows) < size:
                if block == 1 and not rows:
                    raise DataError(f"data '{self.where}': the stream of train holds no row to learn from.")
                number, block = number + 1, 0
                reader = self._reader(number, None)

    def take(self, count: int) -> list[Row]:
        """Return the first `count` rows of the seed's first order, of all there are if these are fewer."""
        return list(islice(self._usable(self._reader(0, None), 1), count))

    def hold_back(self, count: int) -> list[Row]:
        """Return `count` rows for validation, from the beginnings of shards drawn with the seed; no pass has them."""
        order = np.random.default_rng((self.seed, 1)).permutation(self.shards.count)
        reader, rows = Interleaved(self.shards, order, self.where), list[Row]()
        while len(rows) < count and (found := next(reader, None)) is not None:
            shard, at, _ = found
            rows += self._rows(*found, number=1)
            self.set_aside[shard] = at + 1
        return rows

    def mark_at(self, step: int) -> Mark:
        """Return where the block of a batch begins."""
        return max((mark for mark in self._marks if mark["step"] <= step), key=lambda mark: mark["step"])

    def resume(self, mark: Mark) -> None:
        """Let batches from `mark` on be found without reading those before."""
        self._remember(mark)

    def names(self, rows: Sequence[int]) -> list[str]:
        """Return what a person finds rows by, from their numbers."""
        return [self.shards.name(*divmod(row, 1 << 32)) for row in sorted(rows)]

    def _reader(self, number: int, state: Any) -> Interleaved:
        order = np.random.default_rng((self.seed, number, 2)).permutation(self.shards.count)
        return Interleaved(self.shards, order, self.where, state)

    def _usable(self, reader: Interleaved, number: int) -> Iterator[Row]:
        for shard, at, cells in reader:
            self.read += 1
            if at >= self.set_aside.get(shard, 0):
                yield from self._rows(shard, at, cells, number)

    def _rows(self, shard: int, at: int, cells: Row, number: int) -> list[Row]:
        name = self.shards.name(shard, at)
        row, problem = self._to_row(name, shard << 32 | at, cells)
        if not problem:
            return [row]
        if not self._skip:
            raise DataError(
                f"data '{self.where}', train: {row.get('name', name)} (rows are counted from 0) cannot be used: "
                f"{problem}. Repair or remove it, or set `data.on_error: skip` to leave such rows out."
            )
        if number == 0:
            self._count_skipped(self._skipped.get("train", 0) + 1, 0)
        return []

    def _count_skipped(self, count: int, number: int) -> None:
        if count and number == 0:
            self._skipped["train"] = count

    def _remember(self, mark: Mark) -> None:
        later = [each for each in self._marks[1:] if each["step"] != mark["step"]]
        later = sorted([*later, mark] if mark["step"] else later, key=lambda each: each["step"])
        self._marks = [self._marks[0], *later[-KEPT_MARKS:]]
