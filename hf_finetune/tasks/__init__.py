"""Tasks: what the examples are and what the Hub calls it. Adding one is a line in `TASKS` and its collation in data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Task:
    """One kind of problem."""

    name: str
    """The Hub's pipeline tag."""
    modality: Literal["image", "text"]


TASKS: dict[str, Task] = {
    "image-classification": Task("image-classification", "image"),
    "text-classification": Task("text-classification", "text"),
}
