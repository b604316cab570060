"""The picture of a benchmark: for each recipe, how long each arm took and how fast its training loop was."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

OURS, OTHERS, FLOOR = "#1f6fb4", "#a8adb3", "#e3e5e8"
PANELS = (
    ("wall", "seconds from start to exit (less is better)"),
    ("samples_per_second", "samples per second of the training loop (more is better)"),
)


def readable(value: float) -> str:
    """Return a figure as people read it: three digits that count, thousands in full."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw a bar for each arm (the median), a line from its least to its most, and a point for each run.

    Nothing is drawn where no arm has figures.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [run for run in runs if "samples_per_second" in run]
    if not shown:
        return
    recipes = list(dict.fromkeys(run["recipe"] for run in shown))
    arms = {recipe: _arms(shown, recipe) for recipe in recipes}
    rows = sum(len(each) + 1 for each in arms.values())
    figure = Figure(figsize=(12, 1.4 + 0.36 * rows), layout="constrained")
    grid = figure.subplots(
        len(recipes),
        len(PANELS),
        squeeze=False,
        gridspec_kw={"height_ratios": [len(arms[r]) + 1 for r in recipes]},
    )
    for axes_row, recipe in zip(grid, recipes, strict=True):
        for axes, (key, label) in zip(axes_row, PANELS, strict=True):
            floors = key != "wall"  # a floor trains for a while, not for epochs
            groups = {arm: v for arm, v in arms[recipe].items() if floors or not arm.startswith("floor")}
            _bars(axes, {arm: [run[key] for run in these if key in run] for arm, these in groups.items()})
            axes.set_title(recipe if key == "wall" else "", loc="left", fontweight="bold")
            if recipe == recipes[-1]:
                axes.set_xlabel(label)
    meaning = {"this package": OURS, "other tools": OTHERS, "floor: ready tensors": FLOOR}
    figure.legend(
        handles=[Patch(color=colour, label=text) for text, colour in meaning.items()],
        loc="outside upper right", ncols=3, frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=130)


def _arms(runs: list[dict[str, Any]], recipe: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run["recipe"] == recipe:
            found.setdefault(run["arm"], []).append(run)
    return found


def _bars(axes: Any, values: dict[str, list[float]]) -> None:
    """Draw one bar under the other, in the order of the arms, each with its figure beside it."""
    widest = max((max(each) for each in values.values() if each), default=1.0)
    for height, (arm, each) in enumerate(values.items()):
        if not each:
            continue
        middle = statistics.median(each)
        axes.barh(height, middle, height=0.72, color=_colour(arm))
        if len(each) > 1:
            axes.plot(
                [min(each), max(each)], [height, height], color="black", linewidth=1.2, solid_capstyle="butt"
            )
            axes.plot(each, [height] * len(each), "|", color="black", markersize=7)
        axes.text(max(each) + 0.012 * widest, height, readable(middle), va="center", fontsize=9)
    axes.set_yticks(range(len(values)), labels=[arm.replace(":", " ") for arm in values])
    for label, arm in zip(axes.get_yticklabels(), values, strict=True):
        label.set_fontweight("bold" if arm.startswith("ours") else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.12)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(arm: str) -> str:
    if arm.startswith("ours"):
        return OURS
    return FLOOR if arm.startswith("floor") else OTHERS
