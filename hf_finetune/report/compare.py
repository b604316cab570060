"""Runs side by side: which is best, and whether the difference could be chance."""

from __future__ import annotations

import json
import math
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_finetune.monitor import Mode
from hf_finetune.report.tables import Table, short_count
from hf_finetune.runfolder import Run

SIGNIFICANT = 0.05
Test = Literal["paired", "unpaired", "seeds"]
NOTES: dict[Test, str] = {
    "paired": "p by McNemar's exact test, row by row",
    "unpaired": "p by two shares, not paired by row: cautious",
    "seeds": "p by Welch's t-test over seeds",
}
LOWER_IS_BETTER = ("loss", "mse", "rmse", "mae", "error", "perplexity")
"""Metrics to be minimised; a run's own `best.mode` has precedence."""


@dataclass(frozen=True)
class Arm:
    """One run, or several of one recipe that differ in their seed."""

    name: str
    runs: tuple[Run, ...]
    metric: str
    mode: Mode
    values: tuple[float, ...]
    """The best value of each run that has one."""

    @property
    def value(self) -> float | None:
        """The best value, averaged over seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds (n - 1), None for a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of a single run's accuracy, from the number of validation rows."""
        rows = self.runs[0].status.get("validation_rows")
        if self.metric != "accuracy" or len(self.runs) != 1 or not self.values or not rows:
            return None
        return wilson_interval(self.values[0], rows)

    @property
    def shown(self) -> str:
        """The value with its uncertainty: `0.948 (0.902-0.973)` or `0.948 ± 0.006 (3 seeds)`."""
        if self.value is None:
            return "-"
        if self.std is not None:
            return f"{self.value:.4f} ± {self.std:.4f} ({len(self.values)} seeds)"
        return (
            "{:.3f} ({:.3f}-{:.3f})".format(self.value, *self.interval)
            if self.interval
            else f"{self.value:.4f}"
        )

    @property
    def rank(self) -> tuple[bool, float]:
        """Sorts the best arm first, those without a value last."""
        value = self.value
        return (value is None, 0.0 if value is None else value if self.mode == "min" else -value)


def comparison_table(runs: Mapping[str, Run], metric: str | None = None) -> Table:
    """Return one row per arm, the best first, for `print_table`.

    Args:
        runs: by the name to show; runs of one recipe that differ in their seed become one arm.
        metric: what to compare; the first run's monitored one when None.
    """
    metric = metric or monitored_metric(runs)
    compared = sorted(arms(runs, metric), key=lambda arm: arm.rank)
    verdicts = [_against(arm, compared[0]) for arm in compared]
    totals = {_count(arm, "total") for arm in compared}
    rows = [
        [
            arm.name,
            arm.shown,
            _mean(arm, _best_epoch),
            _seconds(arm),
            _memory(arm),
            _parameters(arm, len(totals) == 1),
            verdict,
        ]
        for arm, (verdict, _) in zip(compared, verdicts, strict=True)
    ]
    columns = ("run", metric, "epoch", "seconds", "memory", "trainable", "beside the best")
    notes = [f"{total} parameters" for total in totals if total and len(totals) == 1]
    notes += ["in brackets the 95 % interval"] if any(arm.interval for arm in compared) else []
    notes += [NOTES[test] for test in NOTES if any(test == used for _, used in verdicts)]
    return Table("Comparison", columns, rows, "; ".join(notes))


def monitored_metric(runs: Mapping[str, Run]) -> str:
    """Return what the first run that says so monitors; `loss` when none does."""
    return next((run.best["metric"] for run in runs.values() if run.best and run.best.get("metric")), "loss")


def arms(runs: Mapping[str, Run], metric: str) -> list[Arm]:
    """Gather runs of one recipe that differ in nothing but their seed, in the order given."""
    groups: dict[tuple[str, int], list[str]] = {}
    seen: dict[tuple[str, Any], int] = {}
    for name, run in runs.items():
        recipe, seed = _recipe_and_seed(run)
        # The same seed twice is no further evidence: such a run stands alone.
        repeat = seen[recipe, seed] = seen.get((recipe, seed), -1) + 1
        groups.setdefault((recipe, repeat), []).append(name)
    named: dict[str, list[str]] = {}
    for names in groups.values():
        stem = _common_start(names)
        named[names[0] if len(names) == 1 or not stem or stem in named else stem] = names
    return [_arm(label, [runs[name] for name in names], metric) for label, names in named.items()]


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share seen in `count` trials (Wilson 1927), honest near 0 and 1."""
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, center - half), min(1.0, center + half)


def paired_p_value(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> float:
    """Return how likely a difference this large is if both models were equally good: McNemar's exact test.

    Args:
        correct_a: whether the first model was right, sample by sample.
        correct_b: the same of the second, on the same samples.
    """
    only_a = sum(1 for a, b in zip(correct_a, correct_b, strict=True) if a and not b)
    only_b = sum(1 for a, b in zip(correct_a, correct_b, strict=True) if b and not a)
    differing = only_a + only_b
    ways, term = 0, 1  # term = C(differing, k)
    for k in range(min(only_a, only_b) + 1):
        ways += term
        term = term * (differing - k) // (k + 1)
    return min(1.0, 2 * ways / 2**differing)


def _common_start(names: Sequence[str]) -> str:
    """What names of one recipe share: `full` of `full-seed0` and `full-seed1`."""
    start = names[0]
    while not all(name.startswith(start) for name in names):
        start = start[:-1]
    return re.sub(r"[-_. ]*(seed)?[-_. =\d]*$", "", start)


def _arm(name: str, runs: Sequence[Run], metric: str) -> Arm:
    mode: Mode = "min" if metric in LOWER_IS_BETTER else "max"
    for run in runs:
        if run.best and run.best.get("metric") == metric:
            mode = run.best.get("mode", mode)
    values = [value for run in runs if (value := _best_value(run, metric, mode)) is not None]
    return Arm(name, tuple(runs), metric, mode, tuple(values))


def _best_value(run: Run, metric: str, mode: Mode) -> float | None:
    if run.best and run.best.get("metric") == metric:
        return run.best.get("value")
    seen = [
        value
        for row in run.rows
        if row.get("split") == "validation"
        and (value := (row.get("metrics") or {}).get(metric, row.get("loss") if metric == "loss" else None))
        is not None
    ]
    return (min if mode == "min" else max)(seen, default=None)


def _recipe_and_seed(run: Run) -> tuple[str, Any]:
    """The resolved recipe as text without what tells seeds apart, and the seed."""
    import yaml

    try:
        recipe = yaml.safe_load(run.recipe_path.read_text(encoding="utf-8"))
        training = dict(recipe.get("training") or {})
    except (OSError, AttributeError, TypeError, ValueError, yaml.YAMLError):
        return str(run.path), None
    seed = training.pop("seed", 0)
    rest = {key: value for key, value in recipe.items() if key not in ("output", "hub", "trackers")}
    return json.dumps(rest | {"training": training}, sort_keys=True, default=str), seed


def _against(arm: Arm, best: Arm) -> tuple[str, Test | None]:
    """A short note on whether the difference to the best arm is more than chance, and the test used."""
    for run in arm.runs:
        if run.status.get("status") not in (None, "done"):
            return ": ".join(str(run.status[key]) for key in ("status", "why") if run.status.get(key)), None
    if arm is best or arm.value is None or best.value is None:
        return "best" if arm.value is not None else "", None
    p, test = _p_value(arm, best)
    if p is None:
        return "", None
    size = "p<0.001" if p < 0.001 else f"p={p:.2f}" if p >= 0.095 else f"p={p:.3f}"
    return f"{'within noise' if p >= SIGNIFICANT else 'worse'}, {size}", test


def _p_value(arm: Arm, best: Arm) -> tuple[float | None, Test]:
    if len(arm.values) > 1 and len(best.values) > 1:
        return _welch_p_value(arm.values, best.values), "seeds"
    if arm.metric != "accuracy" or len(arm.runs) != 1 or len(best.runs) != 1:
        return None, "unpaired"
    mine, theirs = arm.runs[0].predictions(), best.runs[0].predictions()
    if mine and theirs and mine[0] == theirs[0]:
        return paired_p_value(_correct(*mine), _correct(*theirs)), "paired"
    rows, best_rows = (side.runs[0].status.get("validation_rows") for side in (arm, best))
    if not rows or not best_rows:
        return None, "unpaired"
    return _two_shares_p_value(arm.values[0], rows, best.values[0], best_rows), "unpaired"


def _correct(true: Sequence[Any], predicted: Sequence[Any]) -> list[bool]:
    return [a == b for a, b in zip(true, predicted, strict=True)]


def _welch_p_value(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Welch's t-test; None when neither varies."""
    if statistics.stdev(a) == statistics.stdev(b) == 0:
        return None
    from scipy.stats import ttest_ind

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a loss of precision where the seeds of an arm are nearly equal
        return float(ttest_ind(a, b, equal_var=False).pvalue)


def _two_shares_p_value(a: float, rows_a: int, b: float, rows_b: int) -> float:
    """The pooled z-test of two shares; cautious where both saw the same samples."""
    pooled = (a * rows_a + b * rows_b) / (rows_a + rows_b)
    error = math.sqrt(pooled * (1 - pooled) * (1 / rows_a + 1 / rows_b))
    return math.erfc(abs(a - b) / error / math.sqrt(2)) if error else 1.0


def _mean(arm: Arm, of: Any) -> float | None:
    values = [value for run in arm.runs if (value := of(run)) is not None]
    return statistics.fmean(values) if values else None


def _best_epoch(run: Run) -> float | None:
    return run.best.get("epoch") if run.best else None


def _seconds(arm: Arm) -> str | None:
    seconds = _mean(arm, lambda run: run.status.get("wall_seconds"))
    return None if seconds is None else f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"


def _memory(arm: Arm) -> str | None:
    bytes_used = _mean(arm, lambda run: (run.status.get("memory") or {}).get("peak"))
    return None if bytes_used is None else f"{bytes_used / 1e9:.3g} GB"


def _count(arm: Arm, which: str) -> str | None:
    count = (arm.runs[0].status.get("parameters") or {}).get(which)
    return None if count is None else short_count(count)


def _parameters(arm: Arm, common_total: bool) -> str | None:
    trainable, total = _count(arm, "trainable"), _count(arm, "total")
    return f"{trainable} of {total}" if trainable and total and not common_total else trainable
