"""Labels: from what a data set writes (names, numbers, lists) to what a model is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from datasets import ClassLabel, List, Value
from torch import Tensor

from hf_finetune.data.labels import Labels
from hf_finetune.data.spec import DataSpec, LabelKind
from hf_finetune.errors import DataError, did_you_mean

NAMED = 10
"""Labels that a message names."""

Target = int | float | list[float]
Cell = Any
"""What one row holds in the label column."""


def find_labels(cells: Sequence[Cell], feature: Any, kind: LabelKind, column: str) -> Labels:
    """Return the labels of a training column: a ClassLabel's names, else the names found, sorted.

    Raises DataError when the column does not hold labels of this kind.
    """
    if kind == "regression":
        return Labels(kind, (column,))
    inner = _inner(feature)
    if isinstance(inner, ClassLabel):
        return Labels(kind, tuple(inner.names))
    names = {name for cell in cells for name in names_in(cell, feature, kind, column) or ()}
    numbers = all(_is_int(name) for name in names)
    return Labels(kind, tuple(sorted(names, key=int) if numbers else sorted(names)))


def names_in(cell: Cell, feature: Any, kind: LabelKind, column: str) -> list[str] | None:
    """Return the label names in one cell, or None when it holds no label.

    For `multi` a cell is a list, or a text with names between `|` (or, without one, commas); empty means no
    name applies. Raises DataError when cells of this type cannot be labels of this kind.
    """
    if kind == "multi":
        if isinstance(cell, str):
            cell = [part.strip() for part in cell.split("|" if "|" in cell else ",")]
        cells = cell if isinstance(cell, (list, tuple)) else [cell]
        names = [name for each in cells if (name := _name(each, _inner(feature), column)) is not None]
        if len(set(names)) < len(names):
            raise DataError(
                f"data.labels: the column '{column}' holds {cells[:8]}, which names a label twice. For "
                "`labels: multi` a row lists the labels that apply, such as ['red', 'round'] or "
                "'red|round', not a 0 or 1 for each."
            )
        return names
    if isinstance(cell, (list, tuple)):
        raise DataError(
            f"data.labels: the column '{column}' holds lists such as {list(cell)[:4]}, but `labels: single` "
            "expects one label a row. Set `data.labels: multi`, or name another column in "
            "data.columns.label."
        )
    name = _name(cell, feature, column)
    return None if name is None else [name]


def encode(
    cell: Cell, feature: Any, labels: Labels, index: Mapping[str, int], column: str
) -> tuple[Target | None, str]:
    """Return (target, "") for a cell, or (None, what is wrong); `index` maps the names allowed to outputs.

    A target is a class number, a multi-hot list of floats, or a float, by the kind of `labels`.
    """
    if labels.kind == "regression":
        return _number(cell)
    names = names_in(cell, feature, labels.kind, column)
    if names is None:
        return None, "no label"
    unknown = next((name for name in names if name not in index), None)
    if unknown is not None:
        learned = [name for name in labels.names if name in index]
        more = ", …" if len(learned) > NAMED else ""
        return None, f"label '{unknown}' is not one that is learned ({', '.join(learned[:NAMED])}{more})"
    if labels.kind == "single":
        return index[names[0]], ""
    hot = [0.0] * labels.outputs
    for name in names:
        hot[index[name]] = 1.0
    return hot, ""


def label_feature(labels: Labels) -> Any:
    """Return the feature of an encoded label column."""
    if labels.kind == "single":
        return ClassLabel(names=list(labels.names))
    return List(Value("float32")) if labels.kind == "multi" else Value("float32")


def soft_targets(targets: Tensor, labels: Labels) -> Tensor:
    """Return targets as floats (N, C), ready to be mixed: class numbers become one-hot rows."""
    return F.one_hot(targets, labels.outputs).float() if labels.kind == "single" else targets


def class_weights(spec: DataSpec, labels: Labels, counts: Sequence[int]) -> list[float] | None:
    """Return a weight per class, with mean 1 over the training rows, or None when none are asked for.

    `counts` are the training rows per class. Raises DataError for a name that is no label, and unless labels
    are single.
    """
    if spec.class_weights == "none":
        return None
    if labels.kind != "single":
        raise DataError(
            "data.class_weights: they need `data.labels: single`, which gives a row one class; here it is "
            f"{labels.kind}."
        )
    if spec.class_weights == "balanced":
        weights = [1 / count if count else 0.0 for count in counts]
    else:
        for name in spec.class_weights:
            if name not in labels.names:
                more = ", …" if labels.outputs > NAMED else ""
                raise DataError(
                    f"data.class_weights: there is no label '{name}'.{did_you_mean(name, labels.names)} "
                    f"The labels are {', '.join(labels.names[:NAMED])}{more}."
                )
        weights = [spec.class_weights.get(name, 1.0) for name in labels.names]
    mean = sum(weight * count for weight, count in zip(weights, counts, strict=True)) / sum(counts)
    return [weight / mean for weight in weights]


def _inner(feature: Any) -> Any:
    """Return the feature of the single labels in a list column, or the column's own."""
    return _inner(feature.feature) if isinstance(feature, List) else feature


def _name(value: Any, feature: Any, column: str) -> str | None:
    """Return one label's name; None for what stands for a missing one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(feature, ClassLabel):
        # benchmarks write -1 for the hidden labels of their test split
        return feature.int2str(value) if value >= 0 else None
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(
                f"data.labels: the column '{column}' holds numbers such as {value:g}, which are no classes. "
                "Set `data.labels: regression`, or name another column in data.columns.label."
            )
        value = int(value)
    return str(value).strip() or None


def _number(cell: Cell) -> tuple[float | None, str]:
    if cell is None or cell == "":
        return None, "no label"
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None, f"label {cell!r} is no number"
    return (number, "") if math.isfinite(number) else (None, f"label {number} is not finite")


def _is_int(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
