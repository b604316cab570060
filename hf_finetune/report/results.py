"""What a run measured, as tables for people: its evaluations, its labels one by one, what it confuses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hf_finetune.report.compare import wilson_interval
from hf_finetune.report.tables import Table
from hf_finetune.runfolder import Row

SHARES = ("accuracy", "top5_accuracy", "subset_accuracy")
"""Metrics that are the share of rows answered right, whose uncertainty follows from the number of rows."""
MANY_EVALUATIONS = 20

Answers = tuple[Sequence[Any], Sequence[Any]]
"""True and predicted labels by row: class numbers, or lists of them."""


def metric_table(values: Mapping[str, float | None], loss: float | None, rows: int) -> Table:
    """Return each metric with its 95 % interval where it is a share of `rows`."""
    lines = [
        [name, _number(value), "{:.4f} to {:.4f}".format(*wilson_interval(value, rows))
         if name in SHARES and value is not None and math.isfinite(value) else None]
        for name, value in values.items()
    ]  # fmt: skip
    lines.append(["loss", _number(loss), None])
    if not any(line[2] for line in lines):
        return Table("Metrics", ("metric", "value"), [line[:2] for line in lines])
    return Table("Metrics", ("metric", "value", "95 % interval"), lines)


def evaluation_table(
    rows: Sequence[Row], best: Mapping[str, Any] | None, limit: int = MANY_EVALUATIONS
) -> Table:
    """Return the evaluations of a run, of very many a few at even steps, with first, last and best.

    A star marks the row of the best one.
    """
    evaluations = [row for row in rows if row.get("split") == "validation"]
    names = list(dict.fromkeys(name for row in evaluations for name in row.get("metrics") or {}))
    losses = [(row["step"], row.get("loss")) for row in rows if row.get("split") == "train"]
    phases = len({row.get("phase_index") for row in evaluations}) > 1
    best_step = best["step"] if best else None
    at_best = next((i for i, row in enumerate(evaluations) if row["step"] == best_step), None)
    shown = _thinned(len(evaluations), limit, keep=at_best)
    lines = []
    for index in shown:
        row = evaluations[index]
        train = next((loss for step, loss in reversed(losses) if step <= row["step"]), None)
        metrics = row.get("metrics") or {}
        lines.append([
            "★" if index == at_best else "", row["step"], f"{row['epoch']:.4g}",
            *([row.get("phase", "")] if phases else []), _number(train), _number(row.get("loss")),
            *(_number(metrics.get(name)) for name in names),
        ])  # fmt: skip
    columns = (
        "",
        "step",
        "epoch",
        *(["phase"] if phases else []),
        "loss of the last batch",
        "validation loss",
        *names,
    )
    left_out = len(evaluations) - len(lines)
    note = f"{left_out} of {len(evaluations)} evaluations are left out." if left_out else ""
    return Table("Evaluations", columns, lines, note)


def label_scores(answers: Answers, count: int) -> list[tuple[float | None, float | None, float | None]]:
    """Return precision, recall and F1 of each label; None where nothing was predicted or nothing was there."""
    right, predicted, present = Counter[int](), Counter[int](), Counter[int]()
    for true, guess in zip(*answers, strict=True):
        there, said = (set(each if isinstance(each, (list, tuple)) else [each]) for each in (true, guess))
        right.update(there & said)
        predicted.update(said)
        present.update(there)
    scores = []
    for label in range(count):
        precision = right[label] / predicted[label] if predicted[label] else None
        recall = right[label] / present[label] if present[label] else None
        both = predicted[label] + present[label]
        scores.append((precision, recall, 2 * right[label] / both if both else None))
    return scores


def confused_pairs(answers: Answers, limit: int = 10) -> list[tuple[int, int, int, int]]:
    """Return (true label, predicted label, rows, rows of the true label) of the most frequent mistakes."""
    present = Counter(answers[0])
    mistakes = Counter((true, guess) for true, guess in zip(*answers, strict=True) if true != guess)
    ranked = sorted(mistakes.items(), key=lambda item: (-item[1], item[0]))
    return [(true, guess, rows, present[true]) for (true, guess), rows in ranked[:limit]]


def _thinned(count: int, limit: int, *, keep: int | None) -> list[int]:
    """Return at most `limit` numbers below `count` at even steps, with 0, the last and `keep`."""
    if count <= limit:
        return list(range(count))
    chosen = {round(i * (count - 1) / (limit - 2)) for i in range(limit - 1)}
    return sorted(chosen | ({keep} if keep is not None else set()))


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1000 else f"{value:.4g}"
