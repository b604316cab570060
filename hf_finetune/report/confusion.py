"""confusion.png: which labels are taken for which, of the best weights on the validation rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_finetune.report.curves import DPI, FAINT, GRID, INK, VALIDATION
from hf_finetune.report.results import Answers, confused_pairs
from hf_finetune.runfolder import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 40
"""Labels whose names fit beside the picture."""
COUNTED = 20
"""Labels whose counts fit into its cells."""
LONGEST = 26
"""Characters of a name."""


def save_confusion(answers: Answers, names: Sequence[str], path: str | Path, title: str = "") -> None:
    """Draw true against predicted labels, coloured by the share of the true label's rows.

    Up to 20 labels with the counts, up to 40 with their names; of more the picture as a whole, and beside it the pairs
    that are confused most.

    Args:
        answers: true and predicted class numbers by row.
        names: of the classes.
        path: of the PNG.
        title: one line above the picture.

    Raises:
        FinetuneError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    count = len(names)
    table = np.zeros((count, count), dtype=int)
    np.add.at(table, (np.asarray(answers[0], dtype=int), np.asarray(answers[1], dtype=int)), 1)
    short = [_short(name) for name in names]
    if count <= NAMED:
        # Everything has its place by the length of the names: matplotlib's own layouts draw twice to find it.
        cell, line = (0.62, 0.078) if count <= COUNTED else (0.24, 0.066)
        side, margin = max(2.2, cell * count), max(map(len, short)) * line + 0.5
        upright = count > 3 and max(map(len, short)) > 4
        below, right = (margin if upright else 0.65), (0.3 if count <= COUNTED else 1.3)
        width, height = max(margin + side + right, 0.1 * len(title)), below + side + 0.5
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        panel = figure.add_axes((margin / width, below / height, side / width, side / height))
        _draw_matrix(figure, panel, table, short, upright=upright)
    else:
        figure = Figure(figsize=(12, 6.4), dpi=DPI, layout="constrained", facecolor="white")
        panel, pairs = figure.subplots(1, 2, width_ratios=(1, 0.8))
        _draw_matrix(figure, panel, table, [])
        _draw_pairs(pairs, answers, short)
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=INK)
    path = Path(path)
    with writing(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font does not have
        figure.savefig(path, format="png")


def _draw_matrix(
    figure: Figure, panel: Axes, table: np.ndarray, names: Sequence[str], *, upright: bool = False
) -> None:
    from matplotlib.colors import PowerNorm

    counted = 0 < len(names) <= COUNTED
    rows = table.sum(axis=1, keepdims=True)
    shares = np.divide(table, rows, out=np.zeros(table.shape), where=rows > 0)
    # Where no count says it, a square root lets the few rows off the diagonal be seen.
    scale = PowerNorm(1 if counted else 0.5, vmin=0, vmax=1)
    image = panel.imshow(
        shares, cmap="Blues", norm=scale, interpolation="nearest" if names else "antialiased"
    )
    panel.set_xlabel("predicted", color=FAINT)
    panel.set_ylabel("true", color=FAINT)
    panel.tick_params(colors=FAINT, labelcolor=INK, labelsize=9 if counted else 7.5, length=0)
    for spine in panel.spines.values():
        spine.set_color("#c3c8d0")
    if names:
        panel.set_xticks(range(len(names)), names, rotation=90 if upright else 0)
        panel.set_yticks(range(len(names)), names)
        between, end = np.arange(0.5, len(names) - 1), len(names) - 0.5
        panel.hlines(between, -0.5, end, color="white", lw=1.4 if counted else 0.6)
        panel.vlines(between, -0.5, end, color="white", lw=1.4 if counted else 0.6)
    else:
        panel.set_title(
            f"{len(table)} labels, in the order of the label table", fontsize=9.5, color=FAINT, loc="left"
        )
    if counted:
        for row, column in zip(*np.nonzero(table), strict=True):
            panel.text(
                column, row, f"{table[row, column]:,}", ha="center", va="center",
                fontsize=11 if len(names) <= 10 else 8.5, color="white" if shares[row, column] > 0.55 else INK,
            )  # fmt: skip
        return
    bar = figure.colorbar(image, ax=panel, shrink=0.72, aspect=24, pad=0.02, ticks=[0, 0.1, 0.5, 1])
    bar.ax.set_yticklabels(["0", "10 %", "50 %", "100 %"])
    bar.ax.tick_params(labelsize=8.5, labelcolor=INK, length=0)
    bar.set_label("of the true label's rows", fontsize=8.5, color=FAINT)
    bar.outline.set_visible(False)


def _draw_pairs(panel: Axes, answers: Answers, names: Sequence[str]) -> None:
    """Draw the most frequent mistakes as bars."""
    pairs = confused_pairs(answers, limit=15)
    panel.set_title("confused most", fontsize=9.5, color=FAINT, loc="left")
    for side, spine in panel.spines.items():
        spine.set_visible(side == "left" and bool(pairs))
        spine.set_color("#c3c8d0")
    panel.tick_params(colors=FAINT, labelcolor=INK, labelsize=9, length=0)
    if not pairs:
        panel.text(0.5, 0.5, "no mistake", transform=panel.transAxes, ha="center", color=FAINT, fontsize=11)
        panel.set_xticks([])
        panel.set_yticks([])
        return
    places = range(len(pairs))
    counts = [rows for _, _, rows, _ in pairs]
    panel.barh(places, counts, color=VALIDATION, height=0.62, zorder=2)
    panel.set_yticks(places, [f"{names[true]} → {names[guess]}" for true, guess, _, _ in pairs])
    panel.invert_yaxis()
    panel.grid(True, axis="x", color=GRID, lw=0.8)
    panel.set_axisbelow(True)
    panel.set_xticks([])
    panel.set_xlim(0, max(counts) * 1.2)
    for place, (_, _, rows, of) in zip(places, pairs, strict=True):
        panel.text(rows + max(counts) * 0.02, place, f"{rows} of {of}", va="center", fontsize=8.5, color=INK)


def _short(name: str) -> str:
    """Return a name of one line that fits; a `$` would start a formula."""
    line = " ".join(name.split()).replace("$", r"\$")
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
