"""What can go wrong, as types: each carries its exit code, so the command line needs no table of cases.

An error's text says where it happened, what was given, what is allowed and what to do next; the command line prints it
without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FinetuneError(Exception):
    """The run failed for a reason we can name (exit code 1)."""

    exit_code = 1
    told = False
    """Another process of the run prints the same: this one leaves without a word."""


class TrainingError(FinetuneError):
    """Training cannot go on: a non-finite loss, a frozen tensor that moved, memory that ran out."""


class HubError(FinetuneError):
    """The Hub refused or could not be reached."""


class UserError(FinetuneError):
    """What the user asked for cannot be done as written (exit code 2)."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe is wrong; the text lists every problem found, one block each."""


class DataError(UserError):
    """The data is wrong or cannot be found."""


class ModelError(UserError):
    """The backbone is wrong, cannot be found, or does not fit."""


class Interrupted(FinetuneError):
    """The run was stopped from outside; what was trained is on disk (exit code 130)."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line, its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name closest to `name`, or None when nothing is close."""
    allowed = list(allowed)
    lowered = {choice.lower(): choice for choice in allowed}
    matches = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return lowered[matches[0]] if matches else None


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest allowed name, or an empty string."""
    match = nearest(name, allowed)
    return f" Did you mean '{match}'?" if match else ""
