"""From a data spec to labelled splits: which rows, which columns, which labels, what is wrong with them.

Nothing is decoded here that is not asked for: a split is a `datasets.Dataset` that decodes a row when it is read.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from hf_finetune.data import checks
from hf_finetune.data.labels import Labels
from hf_finetune.data.report import DataReport
from hf_finetune.data.sources import FILE_BUILDERS, SPLIT_NAMES, Source, open_source, read_files
from hf_finetune.data.spec import ColumnsSpec, DataSpec
from hf_finetune.data.targets import class_weights as class_weights
from hf_finetune.data.targets import encode, find_labels
from hf_finetune.errors import DataError, did_you_mean, nearest

Modality = Literal["image", "text"]
Task = Literal["auto", "image-classification", "text-classification"]

DEFAULT_FRACTION = 0.2
COLUMN_ALIASES: dict[str, tuple[str, ...]] = {
    "image": (
        "image",
        "img",
        "images",
        "picture",
        "photo",
        "file",
        "file_name",
        "filename",
        "path",
        "image_path",
    ),
    "text": (
        "text",
        "sentence",
        "review",
        "content",
        "comment",
        "tweet",
        "document",
        "body",
        "message",
        "question",
    ),
    "label": (
        "label",
        "labels",
        "target",
        "class",
        "category",
        "sentiment",
        "y",
        "score",
        "fine_label",
        "coarse_label",
    ),
}
"""Names tried, in this order, when the recipe leaves a column at its default and the data has none of that name."""


@dataclass(frozen=True)
class Splits:
    """What a run learns from and is measured on.

    A row is `{"image": PIL RGB}` or `{"text": str[, "text_pair": str]}` with `"label"` (class number, multi-hot list or
    float) and `"row"` (its number in the source split).
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    labels: Labels
    modality: Modality
    report: DataReport
    train_counts: tuple[int, ...]
    """Training rows per class, in the order of the labels; empty for regression."""


def load_splits(spec: DataSpec, *, seed: int, task: Task = "auto") -> Splits:
    """Load train, validation and test of a data spec, checked, with their labels and a report.

    Raises DataError naming the file, row, column, split or label that is wrong, and what to do about it.
    """
    source = open_source(spec)
    notes, warnings = list(source.notes), list[str]()
    raw_train = select_split(source, spec.train, spec)
    modality = find_modality(task, raw_train, spec)
    columns = find_columns(raw_train, spec.columns, modality, notes, where=str(spec.path))
    raws = {"train": raw_train}
    validation = _validation_name(source, spec, notes)
    if isinstance(validation, str):
        raws["validation"] = select_split(source, validation, spec)
    if spec.test is not None:
        raws["test"] = select_split(source, spec.test, spec)

    labels = find_labels(
        column_values(raw_train, columns["label"]),
        raw_train.features[columns["label"]],
        spec.labels,
        columns["label"],
    )
    loaded = {
        role: _Loader(spec, labels, columns, modality, source).load(role, raw) for role, raw in raws.items()
    }
    splits = {role: part.rows for role, part in loaded.items()}
    if isinstance(validation, float):
        chosen = draw_fraction(splits["train"], validation, labels, seed)
        rest = np.setdiff1d(np.arange(len(splits["train"])), chosen)
        splits["validation"], splits["train"] = splits["train"].select(chosen), splits["train"].select(rest)
    splits = {role: splits[role] for role in ("train", "validation", "test") if role in splits}
    _check_labels(splits, labels, spec, warnings)
    if spec.max_samples is not None:
        splits = {role: draw_samples(rows, spec.max_samples, labels, seed) for role, rows in splits.items()}

    skipped = [text for part in loaded.values() for text in part.skipped]
    report = DataReport(
        source=source.name,
        rows={role: len(rows) for role, rows in splits.items()},
        class_counts={
            role: dict(zip(labels.names, class_counts(rows, labels), strict=True))
            if labels.kind != "regression"
            else {}
            for role, rows in splits.items()
        },
        columns=columns,
        fingerprint=_hash(*(fingerprint(rows) for rows in splits.values())),
        skipped={role: len(part.skipped) for role, part in loaded.items() if part.skipped},
        skipped_rows=tuple(skipped[: checks.SHOWN]),
        image_side=loaded["train"].image_side,
        size=None,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )
    test = splits.get("test")
    return Splits(
        splits["train"],
        splits["validation"],
        test,
        labels,
        modality,
        report,
        tuple(class_counts(splits["train"], labels)),
    )


def load_split(spec: DataSpec, name: str, labels: Labels, *, seed: int = 0, task: Task = "auto") -> Dataset:
    """Load one split whose labels are known already, to evaluate or predict; rows as in `Splits`.

    A split without a label column gives rows without `"label"`. Raises DataError as `load_splits` does.
    """
    source = open_source(spec)
    raw = select_split(source, name, spec)
    modality = find_modality(task, raw, spec)
    columns = find_columns(raw, spec.columns, modality, [], where=str(spec.path), label_needed=False)
    rows = _Loader(spec, labels, columns, modality, source).load(name, raw).rows
    return rows if spec.max_samples is None else draw_samples(rows, spec.max_samples, labels, seed)


def column_values(rows: Dataset, column: str) -> list[Any]:
    """Return one column as plain Python values, without decoding or touching the others."""
    return (
        rows.with_format("arrow")[:][column].to_pylist()
        if rows.num_columns == 1
        else column_values(rows.with_format(None).select_columns([column]), column)
    )


# ---- which rows ----------------------------------------------------------------------------------------------------

_SLICE = re.compile(r"^(?P<name>[^\[\]]+)\[(?P<start>[^:\[\]]*):(?P<stop>[^:\[\]]*)\]$")


def select_split(source: Source, expression: str, spec: DataSpec) -> Dataset:
    """Return the rows `expression` names: a split, a slice of one (`train[:90%]`, `train[100:200]`), or a file.

    Raises DataError with the splits there are.
    """
    match = _SLICE.match(expression.strip())
    name = match["name"] if match else expression.strip()
    rows = _named_split(source, name)
    if rows is None:
        raise DataError(
            f"data '{_path_words(spec)}': there is no split or file '{name}'.{did_you_mean(name, source.splits)} "
            f"Splits there are: {', '.join(source.splits)}. Name one of them, or a slice such as 'train[:80%]'."
        )
    if match is None:
        return rows
    start = _bound(match["start"], len(rows), 0, expression)
    stop = _bound(match["stop"], len(rows), len(rows), expression)
    if start >= stop:
        raise DataError(f"data: the slice '{expression}' is empty; '{name}' has {len(rows):,} rows.")
    return rows.select(range(start, stop))


def _named_split(source: Source, name: str) -> Dataset | None:
    if name in source.splits:
        return source.splits[name]
    for names in SPLIT_NAMES.values():
        if name in names:
            found = [own for own in source.splits if own.lower() in names]
            if len(found) == 1:
                return source.splits[found[0]]
    for file in (Path(name).expanduser(), (source.folder or Path()) / name):
        if file.suffix.lower() in FILE_BUILDERS and file.is_file():
            return read_files([file])
    return None


def _bound(text: str, n: int, default: int, expression: str) -> int:
    text = text.strip()
    if not text:
        return default
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)(%?)", text)
    if match is None or (not match[2] and "." in match[1]):
        raise DataError(
            f"data: the slice '{expression}' cannot be read at '{text}'. "
            "A slice is written name[from:to] with row numbers or percent, such as 'train[:90%]' or 'train[100:200]'."
        )
    value = round(float(match[1]) * n / 100) if match[2] else int(match[1])
    return min(max(value + n if value < 0 else value, 0), n)


def _validation_name(source: Source, spec: DataSpec, notes: list[str]) -> str | float:
    """Return the split to validate on, or the fraction of train to set aside."""
    train_name = spec.train.split("[")[0]
    own = [name for role in SPLIT_NAMES["validation"] for name in source.splits if name.lower() == role]
    own = [name for name in own if name != train_name]
    if spec.validation == "auto":
        if own:
            return own[0]
        notes.append(
            f"no validation split: {DEFAULT_FRACTION:.0%} of train is set aside, drawn with the seed"
        )
        return DEFAULT_FRACTION
    if isinstance(spec.validation, float):
        if own:
            percent = round(100 * (1 - spec.validation))
            raise DataError(
                f"data.validation: {spec.validation:g} of train was asked for, but '{_path_words(spec)}' has its own split "
                f"'{own[0]}', which would go unused. Use `validation: auto` to measure on it, or name slices: "
                f"`train: {spec.train}[:{percent}%]` and `validation: {spec.train}[{percent}%:]`."
            )
        return spec.validation
    return spec.validation


# ---- which columns -------------------------------------------------------------------------------------------------


def find_modality(task: Task, rows: Dataset, spec: DataSpec) -> Modality:
    """Return what the rows are: by the task, else by an image feature or a column named like one."""
    if task != "auto":
        return "image" if task == "image-classification" else "text"
    has_image = any(isinstance(feature, Image) for feature in rows.features.values())
    named = spec.columns.image in rows.column_names and spec.columns.image != ColumnsSpec().image
    path_column = any(alias in rows.column_names for alias in COLUMN_ALIASES["image"])
    text_names = {
        *COLUMN_ALIASES["text"],
        *([spec.columns.text] if isinstance(spec.columns.text, str) else spec.columns.text),
    }
    return (
        "image" if has_image or named or (path_column and not text_names & set(rows.column_names)) else "text"
    )


def find_columns(
    rows: Dataset,
    spec: ColumnsSpec,
    modality: Modality,
    notes: list[str],
    *,
    where: str,
    label_needed: bool = True,
) -> dict[str, str]:
    """Return meaning -> column of `rows`; a column left at its default is also found by its usual other names.

    Raises DataError with the nearest name and the columns there are.
    """
    asked: dict[str, str] = {}
    if modality == "image":
        asked["image"] = spec.image
    else:
        texts = [spec.text] if isinstance(spec.text, str) else spec.text
        asked |= dict(zip(("text", "text_pair"), texts, strict=False))
    asked["label"] = spec.label
    default = ColumnsSpec().model_dump()
    found: dict[str, str] = {}
    for meaning, name in asked.items():
        if name in rows.column_names:
            found[meaning] = name
            continue
        is_default = default.get(meaning) == name
        candidates = (
            [alias for alias in COLUMN_ALIASES.get(meaning, ()) if alias in rows.column_names]
            if is_default
            else []
        )
        candidates = candidates or (
            [c for c in _by_type(rows, meaning) if c not in asked.values()] if is_default else []
        )
        if candidates:
            found[meaning] = candidates[0]
            notes.append(
                f"the {meaning} is read from the column '{candidates[0]}' (data.columns.{meaning} names another)"
            )
        elif meaning != "label" or label_needed:
            key = "text" if meaning == "text_pair" else meaning
            raise DataError(
                f"data '{where}': there is no column '{name}' to read the {key} from.{did_you_mean(name, rows.column_names)} "
                f"The columns are {', '.join(rows.column_names)}. Name the right one in data.columns.{key}."
            )
    return found


def _by_type(rows: Dataset, meaning: str) -> list[str]:
    """Return the one column whose type fits, when there is exactly one."""
    if meaning == "image":
        fits = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    elif meaning == "text":
        strings = [n for n, f in rows.features.items() if isinstance(f, Value) and "string" in f.dtype]
        fits = [name for name in strings if name not in COLUMN_ALIASES["label"]]
    else:
        fits = [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    return fits if len(fits) == 1 else []


# ---- one split -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    rows: Dataset
    skipped: list[str]
    image_side: int | None


@dataclass(frozen=True)
class _Loader:
    """Turns raw rows into checked rows under the names of `Splits`."""

    spec: DataSpec
    labels: Labels
    columns: dict[str, str]
    modality: Modality
    source: Source

    def load(self, role: str, raw: Dataset) -> _Part:
        missing = [name for name in self.columns.values() if name not in raw.column_names]
        if missing:
            raise DataError(
                f"data '{_path_words(self.spec)}': the {role} split has no column '{missing[0]}', which train has."
                f"{did_you_mean(missing[0], raw.column_names)} Its columns are {', '.join(raw.column_names)}."
            )
        problems: dict[int, str] = {}
        raw = raw.with_format(None)
        targets: list[Any] = []
        label = self.columns.get("label")
        if label is not None:
            index = self.labels.label2id()
            feature = raw.features[label]
            for position, value in enumerate(column_values(raw, label)):
                target, problem = encode(value, feature, self.labels, index, label)
                targets.append(target)
                if problem:
                    problems[position] = (
                        problem if role == "train" else problem.replace("unknown", "not in train")
                    )
        rows, side = (self._images if self.modality == "image" else self._texts)(raw, problems)
        if targets:
            rows = rows.add_column(
                "label",
                self._filled(targets),
                new_fingerprint=_hash(rows._fingerprint, "label"),
                feature=_label_feature(self.labels),
            )
        rows = rows.add_column("row", np.arange(len(rows)), new_fingerprint=_hash(rows._fingerprint, "row"))
        texts = [f"{self._row_name(role, rows, at)}: {problems[at]}" for at in sorted(problems)]
        if texts and self.spec.on_error == "stop":
            checks.refuse(f"data '{_path_words(self.spec)}', {role}", texts, len(rows))
        if texts:
            rows = rows.select([at for at in range(len(rows)) if at not in problems])
        if not len(rows):
            raise DataError(f"data '{_path_words(self.spec)}': the {role} split has no usable row.")
        return _Part(rows.with_transform(partial(_decode, role=role)), texts, side)

    def _filled(self, targets: list[Any]) -> list[Any]:
        empty: Any = [0.0] * self.labels.outputs if self.labels.kind == "multi" else 0
        return [empty if target is None else target for target in targets]

    def _images(self, raw: Dataset, problems: dict[int, str]) -> tuple[Dataset, int | None]:
        column = self.columns["image"]
        rows = (
            raw.select_columns([column]).rename_column(column, "image")
            if column != "image"
            else raw.select_columns(["image"])
        )
        feature = rows.features["image"]
        if isinstance(feature, Value) and "string" in feature.dtype:
            folder = self.source.folder or Path()
            cells = [
                None if p is None else {"bytes": None, "path": str(folder / p)}
                for p in column_values(rows, "image")
            ]
            rows = Dataset.from_dict({"image": cells}, features=Features({"image": Image(decode=False)}))
        else:
            rows = rows.cast_column("image", Image(decode=False))
        full = self.spec.on_error == "skip"
        if not full and len(rows) > checks.MAX_HEADERS:
            some = rows.select(range(0, len(rows), len(rows) // 64))
            sides = checks.check_images(column_values(some, "image"), full=False)[1]
        else:
            found, sides = checks.check_images(column_values(rows, "image"), full=full)
            problems.update(found)
        return rows, int(median(sides)) if sides else None

    def _texts(self, raw: Dataset, problems: dict[int, str]) -> tuple[Dataset, None]:
        meanings = {self.columns[m]: m for m in ("text", "text_pair") if m in self.columns}
        columns = {meaning: column_values(raw, name) for name, meaning in meanings.items()}
        problems.update(checks.check_texts(list(columns.values())))
        texts = {m: [None if cell is None else str(cell) for cell in column] for m, column in columns.items()}
        return Dataset.from_dict(texts, features=Features({m: Value("string") for m in texts})), None

    def _row_name(self, role: str, rows: Dataset, at: int) -> str:
        if self.modality == "image":
            path = (rows[at]["image"] or {}).get("path")
            if path and Path(path).is_absolute():
                return path
        return f"row {at} (counted from 0)"


def _decode(batch: dict[str, list[Any]], role: str) -> dict[str, list[Any]]:
    """Decode the images of a batch that `datasets` has read; other columns pass."""
    if "image" not in batch:
        return batch
    rows = batch.get("row", ["?"] * len(batch["image"]))
    images = [
        checks.read_image(cell, _cell_name(cell, row, role))
        for cell, row in zip(batch["image"], rows, strict=True)
    ]
    return {**batch, "image": images}


def _cell_name(cell: Any, row: Any, role: str) -> str:
    path = (cell or {}).get("path") if isinstance(cell, dict) else None
    return f"'{path}'" if path and Path(path).is_absolute() else f"in row {row} (counted from 0) of {role}"


def _label_feature(labels: Labels) -> Any:
    if labels.kind == "single":
        return ClassLabel(names=list(labels.names))
    return List(Value("float32")) if labels.kind == "multi" else Value("float32")


# ---- draws and counts ----------------------------------------------------------------------------------------------


def class_counts(rows: Dataset, labels: Labels) -> list[int]:
    """Return rows per class (multi-label: rows that carry the label), in label order; empty for regression."""
    if labels.kind == "regression" or "label" not in rows.column_names:
        return []
    targets = column_values(rows, "label")
    if labels.kind == "multi":
        return [int(n) for n in np.asarray(targets, dtype=np.float32).reshape(-1, labels.outputs).sum(0)]
    return np.bincount(np.asarray(targets, dtype=np.int64), minlength=labels.outputs).tolist()


def draw_fraction(rows: Dataset, fraction: float, labels: Labels, seed: int) -> np.ndarray:
    """Return sorted row numbers for validation: per class for single labels (a class of one row stays in train)."""
    rng = np.random.default_rng((seed, 1))
    if labels.kind != "single":
        count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
        return np.sort(rng.permutation(len(rows))[:count])
    targets = np.asarray(column_values(rows, "label"))
    chosen = []
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        chosen.append(members[: min(max(1, round(len(members) * fraction)), len(members) - 1)])
    return np.sort(np.concatenate(chosen))


def draw_samples(rows: Dataset, count: int, labels: Labels, seed: int) -> Dataset:
    """Return `count` rows drawn with the seed, keeping the shares of the classes; all rows when there are fewer."""
    if len(rows) <= count:
        return rows
    order = np.random.default_rng((seed, 2)).permutation(len(rows))
    if labels.kind == "single" and "label" in rows.column_names:
        targets = np.asarray(column_values(rows, "label"))[order]
        # a row's place within its class, as a share of the class: taking the smallest keeps every class's share
        place = np.empty(len(order))
        for label in np.unique(targets):
            members = np.flatnonzero(targets == label)
            place[members] = (np.arange(len(members)) + 0.5) / len(members)
        order = order[np.argsort(place, kind="stable")]
    return rows.select(np.sort(order[:count]))


def _check_labels(splits: dict[str, Dataset], labels: Labels, spec: DataSpec, warnings: list[str]) -> None:
    if labels.kind == "regression":
        return
    counts = {role: class_counts(rows, labels) for role, rows in splits.items()}
    if labels.kind == "single" and sum(1 for count in counts["train"] if count) < 2:
        present = [name for name, count in zip(labels.names, counts["train"], strict=True) if count]
        raise DataError(
            f"data '{_path_words(spec)}': train holds only one class, '{present[0]}'; telling classes apart takes two. "
            "Check data.train (a slice of sorted rows?) and data.columns.label."
        )
    for at, name in enumerate(labels.names):
        if counts["train"][at] and not counts["validation"][at]:
            warnings.append(f"class '{name}' has no validation sample: its accuracy is not measured")


def fingerprint(rows: Dataset) -> str:
    """Return a hash of the rows' labels and texts or images (a file on disk counts by name and size)."""
    parts: list[str] = [
        repr(column_values(rows, name)) for name in rows.column_names if name not in ("image", "row")
    ]
    if "image" in rows.column_names:
        for cell in column_values(rows, "image"):
            path, content = cell["path"], cell["bytes"]
            parts.append(
                _hash(content) if content is not None else f"{Path(path).name}:{Path(path).stat().st_size}"
            )
    return _hash(*parts)


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _path_words(spec: DataSpec) -> str:
    return spec.path if isinstance(spec.path, str) else ", ".join(spec.path)


_ = (Counter, replace, nearest)
