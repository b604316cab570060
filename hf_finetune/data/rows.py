"""Which rows: splits by name, slice or file, the validation fraction, the draw of `max_samples`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_finetune.data.labels import Labels
from hf_finetune.data.sources import FILE_BUILDERS, SPLIT_NAMES, Source, open_folder, read_files
from hf_finetune.data.spec import DataSpec
from hf_finetune.errors import DataError, did_you_mean

DEFAULT_FRACTION = 0.2
_SLICE = re.compile(r"^(?P<name>[^\[\]]+)\[(?P<start>[^:\[\]]*):(?P<stop>[^:\[\]]*)\]$")
_BOUND = re.compile(r"(?P<number>-?\d+(?:\.\d+)?)(?P<percent>%?)")


@dataclass(frozen=True)
class Selection:
    """Rows `start` to `stop` of the split `name`."""

    rows: Dataset
    name: str
    start: int
    stop: int

    def overlap(self, other: Selection) -> int:
        """Return how many rows both selections hold."""
        shared = min(self.stop, other.stop) - max(self.start, other.start)
        return max(0, shared) if self.name == other.name else 0


def select(source: Source, expression: str) -> Selection:
    """Return what `expression` names: a split, a slice of one (`train[:90%]`), a file or a folder.

    Raises DataError with the splits there are, or with the form of a slice.
    """
    match = _SLICE.match(expression.strip())
    asked = match["name"].strip() if match else expression.strip()
    name = find_split(source, asked)
    rows = source.splits[name] if name else _elsewhere(source, asked)
    if rows is None:
        raise DataError(
            f"data '{source.name}': there is no split or file '{asked}'.{did_you_mean(asked, source.splits)} "
            f"Splits there are: {', '.join(source.splits)}. Name one, or a slice of one such as "
            "'train[:80%]'."
        )
    start = _bound(match["start"], len(rows), 0, expression) if match else 0
    stop = _bound(match["stop"], len(rows), len(rows), expression) if match else len(rows)
    if start >= stop:
        raise DataError(f"data '{source.name}': '{expression}' is empty; '{asked}' has {len(rows):,} rows.")
    whole = (start, stop) == (0, len(rows))
    return Selection(rows if whole else rows.select(range(start, stop)), name or asked, start, stop)


def find_split(source: Source, name: str) -> str | None:
    """Return the split's own name for `name`: its own, another usual one (`val` for `dev`), or its file's."""
    if name in source.splits:
        return name
    file = Path(name)
    if file.suffix in FILE_BUILDERS and file.parent == Path() and file.stem in source.splits:
        return file.stem
    usual = next((names for names in SPLIT_NAMES.values() if name.lower() in names), ())
    return next((own for each in usual for own in source.splits if own.lower() == each), None)


def choose_validation(source: Source, spec: DataSpec, notes: list[str]) -> str | float:
    """Return the split to validate on, or the fraction of train to set aside for it.

    Raises DataError for a fraction of train when the data has its own validation split.
    """
    train = spec.train.split("[")[0]
    own = find_split(source, "validation")
    own = None if own is None or own == find_split(source, train) else own
    if spec.validation == "auto":
        if own is not None:
            return own
        notes.append(
            f"no validation split (there is {', '.join(source.splits)}): {DEFAULT_FRACTION:.0%} of train is "
            "set aside, drawn with the seed"
        )
        return DEFAULT_FRACTION
    if isinstance(spec.validation, float) and own is not None:
        percent = f"{100 * (1 - spec.validation):g}%"
        raise DataError(
            f"data.validation: {spec.validation:g} of train was asked for, but '{source.name}' has its own "
            f"split '{own}', which would go unused. Write `validation: auto` to measure on it, or name "
            f"slices: `train: {train}[:{percent}]` and `validation: {train}[{percent}:]`."
        )
    return spec.validation


def draw_fraction(targets: list[Any], fraction: float, labels: Labels, seed: int) -> np.ndarray:
    """Return sorted row numbers for validation, of single labels class by class."""
    rng = np.random.default_rng((seed, 1))
    classes = np.asarray(targets) if labels.kind == "single" else np.zeros(len(targets), dtype=int)
    chosen = []
    for each in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == each))
        chosen.append(members[: min(max(1, round(len(members) * fraction)), len(members) - 1)])
    return np.sort(np.concatenate(chosen))


def draw_samples(targets: list[Any], count: int, labels: Labels, seed: int) -> np.ndarray:
    """Return `count` sorted row numbers drawn with the seed, keeping the classes' shares for single labels.

    While there is room every class keeps a row.
    """
    order = np.random.default_rng((seed, 2)).permutation(len(targets))
    if labels.kind == "single":
        classes = np.asarray(targets)[order]
        # a row's place in its class, as a share of the class: the smallest places hold every class by its
        # share
        place = np.empty(len(order))
        for each in np.unique(classes):
            members = np.flatnonzero(classes == each)
            place[members] = np.arange(len(members)) / len(members)
        order = order[np.argsort(place, kind="stable")]
    return np.sort(order[:count])


def _elsewhere(source: Source, name: str) -> Dataset | None:
    """Open a file or folder that is no split of the source: beside its files, or anywhere."""
    for place in ((source.folder or Path()) / name, Path(name).expanduser()):
        if place.suffix.lower() in FILE_BUILDERS and place.is_file():
            return read_files([place])
        if place.is_dir():
            splits = open_folder(place).splits
            if len(splits) == 1:
                return next(iter(splits.values()))
    return None


def _bound(text: str, n: int, default: int, expression: str) -> int:
    if not text.strip():
        return default
    match = _BOUND.fullmatch(text.strip())
    if match is None or (not match["percent"] and "." in match["number"]):
        raise DataError(
            f"data: the slice '{expression}' cannot be read at '{text.strip()}'. "
            "A slice is name[from:to] with row numbers or percent, such as 'train[:90%]' or 'train[100:200]'."
        )
    value = round(float(match["number"]) * n / 100) if match["percent"] else int(match["number"])
    return min(max(value + n if value < 0 else value, 0), n)
