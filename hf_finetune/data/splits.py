"""From a data spec to labelled splits, with every bad row named.

A split is a `datasets.Dataset` that decodes a row when it is read; nothing is decoded here that is not asked
for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features, Image, Value

from hf_finetune.data import checks
from hf_finetune.data.columns import Modality, Task, column_values, find_columns, find_modality, image_cells
from hf_finetune.data.fingerprint import digest, fingerprint, size_in_bytes
from hf_finetune.data.labels import Labels
from hf_finetune.data.report import DataReport
from hf_finetune.data.rows import Selection, choose_validation, draw_fraction, draw_samples, select
from hf_finetune.data.sources import Source, open_source
from hf_finetune.data.spec import DataSpec
from hf_finetune.data.targets import encode, find_labels, label_feature
from hf_finetune.errors import DataError

if TYPE_CHECKING:
    from hf_finetune.data.streams import Stream

NAMED = 5
"""Classes or skipped rows a report names before it counts."""


@dataclass(frozen=True)
class Splits:
    """What a run learns from and is measured on.

    A row is `{"image": PIL RGB}` or `{"text": str[, "text_pair": str]}`, with `"label"` (a class number, a
    multi-hot list of floats or a float) and `"row"`, its number in the source's split.
    """

    train: Dataset | Stream
    validation: Dataset
    test: Dataset | None
    labels: Labels
    modality: Modality
    report: DataReport
    train_counts: tuple[int, ...]
    """Training rows per class, in the labels' order; empty for regression and for a stream."""


def load_splits(spec: DataSpec, *, seed: int, task: Task = "auto") -> Splits:
    """Load train, validation and test of a data spec, checked, with their labels and a report.

    Raises DataError naming the file, row, column, split or label that is wrong, and what to do about it.
    """
    source = open_source(spec)
    notes, warnings = [*source.notes], list[str]()
    selections = {"train": select(source, spec.train)}
    validation = choose_validation(source, spec, notes)
    if isinstance(validation, str):
        selections["validation"] = select(source, validation)
    if spec.test is not None:
        selections["test"] = select(source, spec.test)
    warnings += _overlaps(selections)
    asked = {"train": spec.train, "validation": validation, "test": spec.test}
    names = {role: _split_name(asked[role], selection) for role, selection in selections.items()}

    raw = selections["train"].rows
    modality = find_modality(task, raw, spec.columns)
    columns = find_columns(raw, spec.columns, modality, notes, where=source.name)
    column = columns["label"]
    labels = find_labels(column_values(raw, column), raw.features[column], spec.labels, column)
    read = partial(_read, spec=spec, labels=labels, columns=columns, modality=modality, source=source)
    parts = {"train": read(selections.pop("train"), "train", index=labels.label2id())}
    splits = {"train": parts["train"].rows}
    counts = class_counts(splits["train"], labels)
    _refuse_one_class(source, labels, counts)
    # a label that train never shows cannot be right elsewhere, declared by a ClassLabel or not
    seen = {name: i for i, name in enumerate(labels.names) if labels.kind == "regression" or counts[i]}
    parts |= {role: read(selection, role, index=seen) for role, selection in selections.items()}
    splits |= {role: part.rows for role, part in parts.items()}
    if isinstance(validation, float):
        splits["train"], splits["validation"] = _set_aside(splits["train"], validation, labels, seed, source)
    whole = {role: len(rows) for role, rows in splits.items() if len(rows) > (spec.max_samples or len(rows))}
    if spec.max_samples is not None:
        splits = {role: _sample(rows, spec.max_samples, labels, seed) for role, rows in splits.items()}

    splits = {role: splits[role] for role in ("train", "validation", "test") if role in splits}
    class_rows = {role: class_counts(rows, labels) for role, rows in splits.items()}
    warnings += _class_warnings(labels, class_rows)
    skipped = [
        f"{part.name(at)}: {part.problems[at]}" for part in parts.values() for at in sorted(part.problems)
    ]
    report = DataReport(
        source=source.name,
        commit=source.commit,
        rows={role: len(rows) for role, rows in splits.items()},
        class_counts={
            role: dict(zip(labels.names, counts, strict=False)) for role, counts in class_rows.items()
        },
        columns=columns,
        fingerprint=digest(*(fingerprint(rows).encode() for rows in splits.values())),
        splits={"validation": names["train"], **names},
        whole=whole,
        held_out=validation if isinstance(validation, float) else None,
        skipped={role: len(part.problems) for role, part in parts.items() if part.problems},
        skipped_rows=tuple(skipped[:NAMED]),
        image_side=parts["train"].image_side,
        size=sum(size_in_bytes(rows) for rows in splits.values()),
        notes=tuple(notes),
        warnings=tuple(warnings),
    )
    return Splits(
        train=splits["train"],
        validation=splits["validation"],
        test=splits.get("test"),
        labels=labels,
        modality=modality,
        report=report,
        train_counts=tuple(class_rows["train"]),
    )


def load_split(
    spec: DataSpec, name: str, labels: Labels, *, seed: int = 0, task: Task = "auto", labelled: bool = True
) -> Dataset:
    """Load one split for a model whose labels are known, to evaluate it or to predict; rows as in `Splits`.

    `labelled=False` reads no label column. Numbers stand for the labels' places when no label's name is a
    number. Raises DataError as `load_splits` does.
    """
    source = open_source(spec.model_copy(update={"streaming": False}))  # all of its rows are asked for
    selection = select(source, name)
    modality = find_modality(task, selection.rows, spec.columns)
    columns = find_columns(selection.rows, spec.columns, modality, [], where=source.name, labelled=labelled)
    index = labels.label2id()
    if not any(name.isdecimal() for name in labels.names):
        index |= {str(number): number for number in range(labels.outputs)}
    rows = _read(selection, name, index, spec, labels, columns, modality, source).rows
    return rows if spec.max_samples is None else _sample(rows, spec.max_samples, labels, seed)


def class_counts(rows: Dataset, labels: Labels) -> list[int]:
    """Return the rows per class in the labels' order (multi: rows with the label); none for regression."""
    if labels.kind == "regression":
        return []
    targets = column_values(rows, "label")
    if labels.kind == "single":
        return [int(count) for count in np.bincount(targets, minlength=labels.outputs)]
    return [int(count) for count in np.asarray(targets).sum(axis=0)]


# ---- one split ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A split as read: its usable rows, and what is wrong with the others."""

    rows: Dataset
    problems: dict[int, str]
    names: Mapping[int, str]
    image_side: int | None

    def name(self, position: int) -> str:
        return self.names[position]


def _read(
    selection: Selection,
    role: str,
    index: Mapping[str, int],
    spec: DataSpec,
    labels: Labels,
    columns: Mapping[str, str],
    modality: Modality,
    source: Source,
) -> _Part:
    """Turn a split's raw rows into rows as `Splits` describes them, without those that cannot be used."""
    raw = selection.rows.with_format(None)
    missing = next((name for name in columns.values() if name not in raw.column_names), None)
    if missing is not None:
        raise DataError(
            f"data '{source.name}': '{selection.name}' ({role}) has no column '{missing}', which train has. "
            f"Its columns are {', '.join(raw.column_names)}."
        )
    problems: dict[int, str] = {}
    side = None
    if modality == "image":
        rows = _image_rows(raw, columns["image"], source)
        problems, side = _check_images(rows, full=spec.on_error == "skip")
    else:
        texts = {m: _texts(raw, columns[m], source) for m in ("text", "text_pair") if m in columns}
        problems = checks.check_texts(texts.values())
        rows = Dataset.from_dict(texts, features=Features({meaning: Value("string") for meaning in texts}))
    if "label" in columns:
        targets, wrong = _targets(raw, columns["label"], labels, index)
        problems |= wrong
        rows = _with_column(rows, "label", targets, label_feature(labels))
    rows = _with_column(rows, "row", list(range(selection.start, selection.stop)), Value("int64"))

    names = {at: _row_name(rows[at], selection.name) for at in sorted(problems)}
    if problems and spec.on_error == "stop":
        checks.refuse(f"data '{source.name}', {role}", problems, len(rows), names.__getitem__)
    if problems:
        rows = rows.select([at for at in range(len(rows)) if at not in problems])
    if not len(rows):
        raise DataError(
            f"data '{source.name}': no row of '{selection.name}' ({role}) can be used; {len(raw):,} were "
            "read."
        )
    return _Part(rows.with_transform(partial(decode, split=selection.name)), problems, names, side)


def _targets(
    raw: Dataset, column: str, labels: Labels, index: Mapping[str, int]
) -> tuple[list[Any], dict[int, str]]:
    """Return a target per row and what is wrong with some; a wrong row's target only fills its place."""
    filler = [0.0] * labels.outputs if labels.kind == "multi" else 0
    targets, problems = [], {}
    feature = raw.features[column]  # not in the loop: asking for features copies them all
    for at, cell in enumerate(column_values(raw, column)):
        target, problem = encode(cell, feature, labels, index, column)
        targets.append(filler if target is None else target)
        if problem:
            problems[at] = problem
    return targets, problems


def _texts(raw: Dataset, column: str, source: Source) -> list[str | None]:
    feature = raw.features[column]
    if not isinstance(feature, Value):
        raise DataError(
            f"data '{source.name}': the column '{column}' holds {type(feature).__name__.lower()}s, not "
            "texts. Name another column in data.columns.text."
        )
    return [None if cell is None else str(cell) for cell in column_values(raw, column)]


def _image_rows(raw: Dataset, column: str, source: Source) -> Dataset:
    """Return the images undecoded, as `{"bytes", "path"}`; paths in a table are relative to its folder."""
    rows = raw.select_columns([column])
    rows = rows if column == "image" else rows.rename_column(column, "image")
    feature = rows.features["image"]
    if isinstance(feature, Value) and "string" in feature.dtype:
        folder = source.folder or Path()
        paths = [None if cell is None else str(folder / cell) for cell in column_values(rows, "image")]
        return Dataset.from_dict({"image": paths}, features=Features({"image": Image(decode=False)}))
    if not isinstance(feature, Image) and not (isinstance(feature, Value) and "binary" in feature.dtype):
        raise DataError(
            f"data '{source.name}': the column '{column}' holds no images but {feature}. "
            "Name another column in data.columns.image."
        )
    return rows.cast_column("image", Image(decode=False))


def _check_images(rows: Dataset, *, full: bool) -> tuple[dict[int, str], int | None]:
    """Return what is wrong with some images, and the median short side; of very many it reads a sample."""
    if full or len(rows) <= checks.MAX_HEADERS:
        problems, sides = checks.check_images(image_cells(rows), full=full)
    else:
        sample = rows.select(range(0, len(rows), max(1, len(rows) // 100)))
        problems, sides = {}, checks.check_images(image_cells(sample), full=False)[1]
    return problems, round(median(sides)) if sides else None


def decode(batch: dict[str, list[Any]], split: str) -> dict[str, list[Any]]:
    """Decode the images of rows that `datasets` has read; what is not an image passes."""
    if "image" not in batch:
        return batch
    rows = [dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]
    return {**batch, "image": [checks.read_image(row["image"], _row_name(row, split)) for row in rows]}


def _row_name(row: Mapping[str, Any], split: str) -> str:
    """Return what a person finds a row by: its file, or its number."""
    cell = row.get("image") or {}
    return (
        f"'{cell['path']}'"
        if cell.get("path") and cell["bytes"] is None
        else f"row {row.get('row')} of '{split}'"
    )


# ---- all splits --------------------------------------------------------------------------------------------


def _set_aside(
    rows: Dataset, fraction: float, labels: Labels, seed: int, source: Source
) -> tuple[Dataset, Dataset]:
    """Split train into (train, validation)."""
    chosen = draw_fraction(column_values(rows, "label"), fraction, labels, seed)
    if not len(chosen):
        raise DataError(
            f"data '{source.name}': {len(rows)} rows, one of each class, cannot be split into train and "
            "validation. Name a validation split or file in data.validation."
        )
    return rows.select(np.setdiff1d(np.arange(len(rows)), chosen)), rows.select(chosen)


def _sample(rows: Dataset, count: int, labels: Labels, seed: int) -> Dataset:
    if len(rows) <= count:
        return rows
    labelled = "label" in rows.column_names
    targets = column_values(rows, "label" if labelled else "row")
    return rows.select(draw_samples(targets, count, labels if labelled else Labels("regression", ()), seed))


def _split_name(asked: object, selection: Selection) -> str:
    """Return the split's own name, or the slice of it that was asked for."""
    return str(asked) if "[" in str(asked) else selection.name


def _overlaps(selections: Mapping[str, Selection]) -> list[str]:
    train = selections["train"]
    return [
        f"{shared:,} rows are in both train and {role}: the measured value is too good to be true"
        for role, selection in selections.items()
        if role != "train" and (shared := train.overlap(selection))
    ]


def _refuse_one_class(source: Source, labels: Labels, counts: Sequence[int]) -> None:
    present = [name for name, count in zip(labels.names, counts, strict=False) if count]
    needed = {"single": 2, "multi": 1, "regression": 0}[labels.kind]
    if len(present) < needed:
        only = f"only one class, '{present[0]}'" if present else "no label"
        raise DataError(
            f"data '{source.name}': train holds {only}; there is nothing to tell apart. Check data.train (a "
            "slice of rows that are sorted by class?) and data.columns.label."
        )


def _class_warnings(labels: Labels, counts: Mapping[str, Sequence[int]]) -> list[str]:
    if labels.kind == "regression":
        return []
    train, validation = counts["train"], counts["validation"]
    unseen = [name for name, count in zip(labels.names, train, strict=True) if not count]
    unmeasured = [n for n, t, v in zip(labels.names, train, validation, strict=True) if t and not v]
    warnings = []
    if unseen:
        warnings.append(f"{_named(unseen)} without a training row: the model cannot learn to answer so")
    if unmeasured:
        warnings.append(unmeasured_classes(unmeasured))
    if labels.kind == "single" and labels.outputs > 50 and labels.outputs > sum(train) / 2:
        warnings.append(
            f"{labels.outputs:,} classes for {sum(train):,} training rows: is the label column right, or is "
            "it a number to predict (`data.labels: regression`)?"
        )
    return warnings


def unmeasured_classes(names: list[str]) -> str:
    """Return what to say of classes that validation does not show."""
    return f"{_named(names)} without a validation row: how well the model does there is not measured"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return (
        f"{'class' if len(names) == 1 else 'classes'} {', '.join(repr(name) for name in names[:NAMED])}{more}"
    )


def _with_column(rows: Dataset, name: str, values: list[Any], feature: Any) -> Dataset:
    # `datasets` would pickle the values to fingerprint them, which takes longer than adding them
    derived = digest(rows._fingerprint.encode(), name.encode(), repr(values).encode())
    return rows.add_column(name, values, new_fingerprint=derived, feature=feature)
