"""Metrics by name: one table of what each is for and which way is better.

The table is light; numpy, scikit-learn and evaluate are imported when a metric is computed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from hf_finetune.data.spec import LabelKind
from hf_finetune.errors import UserError, did_you_mean, first_line
from hf_finetune.monitor import Mode

if TYPE_CHECKING:
    import numpy as np

Compute = Callable[["np.ndarray", "np.ndarray"], float]
"""(labels, logits) -> value: labels (N,) or (N, classes) of 0 and 1, logits (N, outputs)."""

EVALUATE_PREFIX = "evaluate/"
"""`evaluate/<name>` asks Hugging Face's `evaluate` for a metric that is not in the table."""


@dataclass(frozen=True)
class Metric:
    """One metric: which way is better, and how it is computed for each kind of label it is for."""

    mode: Mode
    compute: Mapping[LabelKind, Compute]

    @property
    def kinds(self) -> tuple[LabelKind, ...]:
        """The kinds of label the metric is for."""
        return tuple(self.compute)


def default_metric(kind: LabelKind) -> str:
    """Return what `monitor.metric: auto` means for a kind of label."""
    return {"single": "accuracy", "multi": "f1_micro", "regression": "mse"}[kind]


def metric_mode(name: str) -> Mode:
    """Return which way a metric is better. Raises UserError for `evaluate/…`, which does not say."""
    if name == LOSS:
        return "min"
    if name not in METRICS:
        raise UserError(
            f"metric '{name}': which way is better is not known.{did_you_mean(name, [LOSS, *METRICS])} "
            "Set monitor.mode to max or min."
        )
    return METRICS[name].mode


def metric_names(kind: LabelKind) -> list[str]:
    """Return the names of the metrics for a kind of label, the validation loss included."""
    return [LOSS, *(name for name, metric in METRICS.items() if kind in metric.kinds)]


def compute(
    names: Iterable[str], kind: LabelKind, labels: np.ndarray, logits: np.ndarray
) -> dict[str, float]:
    """Return each metric's value on a split; NaN where undefined (one class present, constant values).

    Args:
        names: of `METRICS`, or `evaluate/<name>`.
        kind: kind of the labels.
        labels: (N,) class indices or values, or (N, classes) of 0 and 1 for multi-label.
        logits: (N, outputs).

    Raises:
        UserError: a metric is not known, not for this kind of label, or cannot be loaded.
    """
    values = {}
    for name in names:
        if name.startswith(EVALUATE_PREFIX):
            function: Compute = partial(_from_evaluate, name.removeprefix(EVALUATE_PREFIX), kind)
        elif name in METRICS and kind in METRICS[name].compute:
            function = METRICS[name].compute[kind]
        else:
            raise UserError(
                f"metric '{name}' is not one for {kind} labels.{did_you_mean(name, metric_names(kind))} "
                f"Choose from {', '.join(metric_names(kind))}, or {EVALUATE_PREFIX}<name>."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn and scipy say in a warning what NaN and 0 say here
            values[name] = function(labels, logits)
    return values


def _classes(logits: np.ndarray) -> np.ndarray:
    return logits.argmax(axis=1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    import numpy as np

    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    import numpy as np

    return 0.5 * (1 + np.tanh(logits.astype(np.float64) / 2))  # the stable form


def _accuracy(labels: np.ndarray, logits: np.ndarray) -> float:
    return float((_classes(logits) == labels).mean())


def _balanced_accuracy(labels: np.ndarray, logits: np.ndarray) -> float:
    from sklearn.metrics import balanced_accuracy_score

    return float(balanced_accuracy_score(labels, _classes(logits)))


def _top5_accuracy(labels: np.ndarray, logits: np.ndarray) -> float:
    import numpy as np

    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    return float((best == labels[:, None]).any(axis=1).mean())


def _mcc(labels: np.ndarray, logits: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, _classes(logits)))


def _score(which: str, average: str, labels: np.ndarray, logits: np.ndarray) -> float:
    """Precision, recall or F1. `macro` is over the classes present in labels or predictions."""
    from sklearn import metrics

    predicted = (logits > 0).astype(int) if labels.ndim == 2 else _classes(logits)
    truth = labels.astype(int)
    return float(getattr(metrics, f"{which}_score")(truth, predicted, average=average, zero_division=0))


def _roc_auc(labels: np.ndarray, logits: np.ndarray) -> float:
    """Area under the ROC curve: one class against the rest, the mean over the classes that have both."""
    import numpy as np
    from sklearn.metrics import roc_auc_score

    scores = logits if labels.ndim == 2 else _softmax(logits)
    truth = labels if labels.ndim == 2 else np.eye(logits.shape[1])[labels.astype(int)]
    columns = [1] if labels.ndim == 1 and logits.shape[1] == 2 else range(logits.shape[1])
    areas = [roc_auc_score(truth[:, i], scores[:, i]) for i in columns if 0 < truth[:, i].sum() < len(truth)]
    return float(np.mean(areas)) if areas else math.nan


def _average_precision(labels: np.ndarray, logits: np.ndarray) -> float:
    """The mean of the average precision over the labels that occur."""
    import numpy as np
    from sklearn.metrics import average_precision_score

    areas = [
        average_precision_score(labels[:, i], logits[:, i])
        for i in range(labels.shape[1])
        if labels[:, i].any()
    ]
    return float(np.mean(areas)) if areas else math.nan


def _subset_accuracy(labels: np.ndarray, logits: np.ndarray) -> float:
    return float(((logits > 0) == (labels > 0.5)).all(axis=1).mean())


def _log_loss(labels: np.ndarray, logits: np.ndarray) -> float:
    from sklearn.metrics import log_loss

    return float(log_loss(labels, _softmax(logits), labels=range(logits.shape[1])))


def _binary_log_loss(labels: np.ndarray, logits: np.ndarray) -> float:
    """Binary cross-entropy, the mean over samples and labels."""
    import numpy as np

    wide = logits.astype(np.float64)
    return float((np.logaddexp(0, wide) - labels * wide).mean())


def _mse(labels: np.ndarray, logits: np.ndarray) -> float:
    return float(((logits.reshape(-1) - labels.reshape(-1)) ** 2).mean(dtype=float))


def _rmse(labels: np.ndarray, logits: np.ndarray) -> float:
    return math.sqrt(_mse(labels, logits))


def _mae(labels: np.ndarray, logits: np.ndarray) -> float:
    return float(abs(logits.reshape(-1) - labels.reshape(-1)).mean(dtype=float))


def _r2(labels: np.ndarray, logits: np.ndarray) -> float:
    from sklearn.metrics import r2_score

    return float(r2_score(labels.reshape(-1), logits.reshape(-1)))


def _correlation(which: str, labels: np.ndarray, logits: np.ndarray) -> float:
    from scipy import stats

    return float(getattr(stats, which)(labels.reshape(-1), logits.reshape(-1)).statistic)


@cache
def load_from_evaluate(name: str, kind: LabelKind) -> Any:
    """Return the metric `name` of Hugging Face's `evaluate`. Raises UserError when it cannot be loaded."""
    try:
        import evaluate

        return evaluate.load(name)
    except Exception as error:  # whatever a metric script from the Hub may raise
        raise UserError(_no_metric(name, kind, error)) from error


def _from_evaluate(name: str, kind: LabelKind, labels: np.ndarray, logits: np.ndarray) -> float:
    metric = load_from_evaluate(name, kind)
    try:
        predictions = {
            "single": lambda: _classes(logits),
            "multi": lambda: (logits > 0).astype(int),
            "regression": lambda: logits.reshape(-1),
        }[kind]()
        result: dict[str, Any] = metric.compute(predictions=predictions, references=labels)
    except Exception as error:
        raise UserError(_no_metric(name, kind, error)) from error
    return float(result[name] if name in result else next(iter(result.values())))


def _no_metric(name: str, kind: LabelKind, error: Exception) -> str:
    reason = first_line(error)
    return (
        f"metric '{EVALUATE_PREFIX}{name}' cannot be computed: {reason} "
        f"Use one of {', '.join(metric_names(kind))}, or check the name and the network."
    )


def _averaged(which: str, average: str) -> dict[LabelKind, Compute]:
    return {"single": partial(_score, which, average), "multi": partial(_score, which, average)}


LOSS = "loss"
"""The validation loss, which the loop computes: a metric like any other to a recipe."""

METRICS: dict[str, Metric] = {
    "accuracy": Metric("max", {"single": _accuracy}),
    "balanced_accuracy": Metric("max", {"single": _balanced_accuracy}),
    "top5_accuracy": Metric("max", {"single": _top5_accuracy}),
    "f1_macro": Metric("max", _averaged("f1", "macro")),
    "f1_micro": Metric("max", _averaged("f1", "micro")),
    "precision_macro": Metric("max", _averaged("precision", "macro")),
    "recall_macro": Metric("max", _averaged("recall", "macro")),
    "mcc": Metric("max", {"single": _mcc}),
    "roc_auc": Metric("max", {"single": _roc_auc, "multi": _roc_auc}),
    "average_precision": Metric("max", {"multi": _average_precision}),
    "subset_accuracy": Metric("max", {"multi": _subset_accuracy}),
    "log_loss": Metric("min", {"single": _log_loss, "multi": _binary_log_loss}),
    "mse": Metric("min", {"regression": _mse}),
    "rmse": Metric("min", {"regression": _rmse}),
    "mae": Metric("min", {"regression": _mae}),
    "r2": Metric("max", {"regression": _r2}),
    "pearson": Metric("max", {"regression": partial(_correlation, "pearsonr")}),
    "spearman": Metric("max", {"regression": partial(_correlation, "spearmanr")}),
}
