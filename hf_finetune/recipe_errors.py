"""Problems of a recipe: where each one is, and how all of them are written out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hf_finetune.errors import RecipeError


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of a file, or a place without lines such as the command line."""

    source: str
    line: int = 0
    order: int = field(default=0, compare=False)
    """Problems are listed by order, then by line."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe."""

    place: Place
    key: str
    """Dotted key; empty when the problem is not about one."""
    lines: tuple[str, ...]
    """What is wrong (what was given, what is allowed), then what to do."""

    def __str__(self) -> str:
        return "\n  ".join([f"{self.place}: {self.key}" if self.key else str(self.place), *self.lines])


def recipe_error(problems: Iterable[Problem], source: str) -> RecipeError:
    """Return the error that lists all problems by place, and their count in `source`."""
    listed = sorted(dict.fromkeys(problems), key=lambda p: (p.place.order, p.place.line))
    count = "1 problem" if len(listed) == 1 else f"{len(listed)} problems"
    return RecipeError("\n".join([*map(str, listed), f"{count} in {source}"]))
