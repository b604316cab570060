"""Labels as a data set writes them (names, numbers, lists) to what the model is trained on, and back to names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from datasets import ClassLabel, List
from datasets import Sequence as SequenceFeature
from torch import Tensor

from hf_finetune.data.labels import Labels
from hf_finetune.data.spec import DataSpec, LabelKind
from hf_finetune.errors import DataError, did_you_mean

Target = int | float | list[float]


def find_labels(values: Sequence[Any], feature: Any, kind: LabelKind, column: str) -> Labels:
    """Return the labels of a training column: names from ClassLabel, strings, whole numbers or booleans, sorted.

    Raises DataError when the column does not hold labels of this kind.
    """
    if kind == "regression":
        return Labels("regression", (column,))
    inner = _inner(feature)
    if isinstance(inner, ClassLabel) and inner.names:
        return Labels(kind, tuple(inner.names))
    names = {name for value in values for name in names_of(value, feature, kind, column) or ()}
    numeric = all(_is_int(name) for name in names)
    return Labels(kind, tuple(sorted(names, key=(lambda name: (int(name), name)) if numeric else None)))


def names_of(value: Any, feature: Any, kind: LabelKind, column: str = "label") -> list[str] | None:
    """Return the label names one cell holds, or None for a cell without a label."""
    if kind == "multi":
        if isinstance(value, str):
            value = [part.strip() for part in value.split("|" if "|" in value else ",") if part.strip()]
        elif value is None:
            value = []
        elif not isinstance(value, (list, tuple)):
            value = [value]
        names = [_name(each, _inner(feature), column) for each in value]
        return [name for name in names if name is not None]
    if isinstance(value, (list, tuple)):
        raise DataError(
            f"data.labels: the column '{column}' holds lists such as {list(value)[:4]}, but `labels: single` expects one "
            "label a row. Set `data.labels: multi`, or name another column in data.columns.label."
        )
    name = _name(value, feature, column)
    return None if name is None else [name]


def encode(
    value: Any, feature: Any, labels: Labels, index: dict[str, int], column: str
) -> tuple[Target | None, str]:
    """Return (target, "") for a cell, or (None, why it cannot be used).

    A target is a class number, a multi-hot list of floats or a float, by the kind of `labels`.
    """
    if labels.kind == "regression":
        return _number(value)
    names = names_of(value, feature, labels.kind, column)
    if names is None:
        return None, "no label"
    unknown = [name for name in names if name not in index]
    if unknown:
        return None, f"label '{unknown[0]}' is unknown"
    if labels.kind == "multi":
        hot = [0.0] * labels.outputs
        for name in names:
            hot[index[name]] = 1.0
        return hot, ""
    return index[names[0]], ""


def class_weights(spec: DataSpec, labels: Labels, counts: Sequence[int]) -> list[float] | None:
    """Return a weight per class whose mean over the training rows is 1, or None when the recipe asks for none.

    Raises DataError for a label name that is not in the data, and for labels that are not single.
    """
    if spec.class_weights == "none":
        return None
    if labels.kind != "single":
        raise DataError(
            f"data.class_weights: weights per class need `labels: single`; this run has `labels: {labels.kind}`."
        )
    total = sum(counts)
    if spec.class_weights == "balanced":
        present = sum(1 for count in counts if count)
        return [total / (present * count) if count else 0.0 for count in counts]
    unknown = [name for name in spec.class_weights if name not in labels.names]
    if unknown:
        raise DataError(
            f"data.class_weights: there is no label '{unknown[0]}'.{did_you_mean(unknown[0], labels.names)} "
            f"The labels are {', '.join(labels.names[:20])}."
        )
    weights = [spec.class_weights.get(name, 1.0) for name in labels.names]
    mean = sum(weight * count for weight, count in zip(weights, counts, strict=True)) / total
    return [weight / mean for weight in weights]


def soft_targets(targets: Tensor, labels: Labels) -> Tensor:
    """Return targets as floats (N, C), ready to be mixed: class numbers become one-hot rows."""
    return F.one_hot(targets, labels.outputs).float() if labels.kind == "single" else targets


def _inner(feature: Any) -> Any:
    while isinstance(feature, (List, SequenceFeature)) and hasattr(feature, "feature"):
        feature = feature.feature
    return feature[0] if isinstance(feature, list) else feature


def _name(value: Any, feature: Any, column: str) -> str | None:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(feature, ClassLabel) and isinstance(value, int):
        # the Hub's benchmarks write -1 for the hidden labels of their test split
        return feature.int2str(value) if value >= 0 else None
    if isinstance(value, float):
        if value != int(value):
            raise DataError(
                f"data.labels: the column '{column}' holds numbers such as {value:g}, which are no classes. "
                "Set `data.labels: regression`, or name another column in data.columns.label."
            )
        return str(int(value))
    return str(value).strip() if not isinstance(value, bool) else str(value)


def _number(value: Any) -> tuple[float | None, str]:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None, "no label" if value in (None, "") else f"label {value!r} is no number"
    return (number, "") if math.isfinite(number) else (None, f"label {number} is not finite")


def _is_int(name: str) -> bool:
    return name.lstrip("-").isdigit()
