"""How fast a run goes: samples per second, and the share of its time that it waited for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
HIGH_SHARE = 0.2
"""Waiting longer than this share of the training time is worth a remark."""
LONG_SECONDS = 5.0
"""Waiting less than this in all is not: workers take their time to start."""


@dataclass
class Pace:
    """The clock of one process: only optimizer steps and evaluations count, by wall time.

    A batch is waited for from the moment it is asked for until it is there. The loop reads each step's loss, so
    the accelerator has little left to do by then: waiting is time in which it stands idle.
    """

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("training", "training_waited", "evaluating", "evaluating_waited"), 0.0
        )
    )
    _began: float = 0.0
    """When the step began."""
    _row: tuple[int, float] = (0, 0.0)
    """Samples and seconds since the last training row."""

    def begin(self) -> None:
        """Begin a step."""
        self._began = time.monotonic()

    def next_of(self, batches: Iterator[T]) -> T:
        """Begin an optimizer step: return its batch."""
        self.begin()
        batch = next(batches)
        self.seconds["training_waited"] += time.monotonic() - self._began
        return batch

    def stepped(self, samples: int) -> None:
        """End a step of so many samples."""
        taken = time.monotonic() - self._began
        self.seconds["training"] += taken
        self._row = self._row[0] + samples, self._row[1] + taken

    def samples_per_second(self) -> float:
        """Return the speed of the steps since this was last asked."""
        (samples, seconds), self._row = self._row, (0, 0.0)
        return samples / seconds

    def evaluating(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches of an evaluation, timed."""
        asked, stream = time.monotonic(), iter(batches)
        while True:
            batch = next(stream, None)
            there = time.monotonic()
            self.seconds["evaluating_waited"] += there - asked
            if batch is not None:
                yield batch
            self.seconds["evaluating"] += time.monotonic() - asked
            if batch is None:
                return
            asked = time.monotonic()

    @property
    def wait_share(self) -> float:
        """Share of the training time that was spent waiting for batches."""
        training = self.seconds["training"]
        return self.seconds["training_waited"] / training if training else 0.0

    def facts(self, earlier: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Take in what the run had taken before an interruption; return what run.json says."""
        for name, before in (earlier or {}).items():
            self.seconds[name] += before
        rounded = {name: round(value, 3) for name, value in self.seconds.items()}
        return {"seconds": rounded, "data_wait_share": round(self.wait_share, 4)}

    def told(self, helps: Sequence[str]) -> str:
        """Return the share for people, with what helps where it is high."""
        said = f"{self.wait_share:.1%} of the training time was spent waiting for data"
        high = self.wait_share > HIGH_SHARE and self.seconds["training_waited"] > LONG_SECONDS
        return "; ".join([said, *helps]) if high else said
