"""Pictures of runs: curves.png of one, compare.png of several.

Drawn on Figure objects, so that no global state is changed; matplotlib is imported when drawing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.models.anatomy import HEAD
from hf_finetune.report.compare import arms
from hf_finetune.runfolder import Row, Run, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID, BAND = "#1f2430", "#8a919e", "#e4e7ec", "#f3f5f8"
TRAIN, VALIDATION, BEST, ALARM = "#4878b0", "#dd7a27", "#1f8a5b", "#c8323c"
OTHER_METRICS = ("#7e6bb4", "#5b9aa0", "#a8905a", "#b06a8f")
ARMS = (
    "#4878b0",
    "#dd7a27",
    "#3f9a6b",
    "#b8474f",
    "#7e6bb4",
    "#8a6d5b",
    "#c874a8",
    "#5f6b7a",
    "#b0a53a",
    "#3fa7b5",
)
DPI = 100
MAX_LEGEND = 7
LOG_RANGE = 20

Points = tuple[list[float], list[float]]


def save_curves(
    rows: Sequence[Row], best: Mapping[str, Any] | None, path: str | Path, title: str = ""
) -> None:
    """Draw loss, metrics and learning rates over optimizer steps, phases shaded, 1200 pixels wide.

    Args:
        rows: of metrics.jsonl, see `runfolder.Row`; any of the kinds may be missing.
        best: `{metric, value, step}` of the best evaluation, None before the first.
        path: of the PNG.
        title: one line above the picture.

    Raises:
        FinetuneError: the file cannot be written.
    """
    rows = sorted(rows, key=lambda row: row["step"])
    figure, (loss, metric, rate) = _panels((12, 9.2), (3, 3, 2.6), title)
    _draw_losses(loss, rows)
    _draw_metrics(metric, rows, best)
    _draw_rates(rate, rows)
    end = max((row["step"] for row in rows), default=1) or 1
    for panel in (loss, metric, rate):
        panel.set_xlim(0, end * 1.012)
    _shade_phases((loss, metric, rate), _phases(rows), end)
    rate.set_xlabel("optimizer steps" + _steps_per_epoch(rows), color=INK)
    _save(figure, path)


def save_comparison(runs: Mapping[str, Run], metric: str, path: str | Path, title: str = "") -> None:
    """Draw the losses and one metric of several runs over epochs; seeds of one recipe share a colour.

    Raises:
        FinetuneError: the file cannot be written.
    """
    figure, (loss, score) = _panels((12, 7.6), (1, 1), title or f"{metric} and loss, {len(runs)} runs")
    legend = []
    for number, arm in enumerate(arms(runs, metric)):
        look: dict[str, Any] = {"color": ARMS[number % len(ARMS)], "ls": "-" if number < len(ARMS) else "--"}
        line = look | {"lw": 1.9 if len(arm.runs) == 1 else 1.1, "marker": "o", "ms": 3.5}
        for run in arm.runs:
            train, validation = _of_split(run.rows, "train"), _of_split(run.rows, "validation")
            loss.plot(*_smooth(_points(train, "epoch", _loss)), lw=1, alpha=0.35, **look)
            loss.plot(*_points(validation, "epoch", _loss), **line)
            xs, ys = _points(validation, "epoch", partial(_value, metric=metric))
            score.plot(xs, ys, **line)
            if xs:
                best = (min if arm.mode == "min" else max)(ys)
                score.plot(xs[ys.index(best)], best, color=look["color"], zorder=5, **_STAR | {"ms": 14})
        name = arm.name if len(arm.name) <= 24 else arm.name[:23] + "…"
        legend.append((arm.rank, score.plot([], [], label=f"{name}  {arm.shown}", **line | {"lw": 1.9})[0]))
    # What the smoothed curves and the evaluations span; axis limits of a lone wild value would hide the rest.
    _limit(loss, [float(y) for line in loss.lines for y in list(line.get_ydata())])  # type: ignore[arg-type]
    kinds = [loss.plot([], [], color=FAINT, lw=1.9, marker="o", ms=3.5, label="validation")[0]]
    kinds += loss.plot([], [], color=FAINT, lw=1, alpha=0.5, label="train")
    loss.legend(handles=kinds, **_LEGEND)
    if legend:
        score.legend(
            handles=[line for _, line in sorted(legend, key=lambda entry: entry[0])], title="best", **_LEGEND
        )
    loss.set_ylabel("loss", color=INK)
    score.set_ylabel(metric, color=INK)
    score.set_xlabel("epochs", color=INK)
    end = max((row["epoch"] for run in runs.values() for row in run.rows), default=1) or 1
    score.set_xlim(0, end * 1.015)
    _save(figure, path)


_STAR: dict[str, Any] = {"marker": "*", "ms": 17, "mec": "white", "mew": 0.9, "ls": "", "clip_on": False}
_LEGEND: dict[str, Any] = {
    "loc": "upper left", "bbox_to_anchor": (1.008, 1.02), "frameon": False, "fontsize": 9, "labelcolor": INK,
    "alignment": "left", "title_fontproperties": {"size": 9, "weight": "bold"}, "handlelength": 1.8,
}  # fmt: skip


def _panels(size: tuple[float, float], heights: Sequence[float], title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.07, w_pad=0.08, hspace=0.02)  # type: ignore[union-attr, call-arg]
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for panel in panels:
        panel.grid(True, color=GRID, lw=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=FAINT, labelcolor=INK, labelsize=9, length=0)
        for side, spine in panel.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color("#c3c8d0")
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    figure.align_ylabels()
    return figure, list(panels)


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    with writing(path):
        figure.savefig(path, format="png")


def _draw_losses(panel: Axes, rows: Sequence[Row]) -> None:
    panel.set_ylabel("loss", color=INK)
    train, validation = _of_split(rows, "train"), _of_split(rows, "validation")
    raw, seen = _points(train, "step", _loss), _points(validation, "step", _loss)
    smooth = _smooth(raw)
    if len(raw[0]) > 1 and smooth != raw:
        panel.plot(*raw, color=TRAIN, lw=0.8, alpha=0.28)
    if raw[0]:
        panel.plot(
            *smooth, color=TRAIN, lw=1.9, label="train", marker="o" if len(raw[0]) < 12 else None, ms=4
        )
    if seen[0]:
        panel.plot(
            *seen,
            color=VALIDATION,
            lw=1.9,
            marker="o",
            ms=_dot(seen),
            mec="white",
            mew=0.6,
            label="validation",
        )
    broken = [row["step"] for row in train if _loss(row) is None]
    if broken:
        panel.axvline(broken[0], color=ALARM, lw=1.4, ls=":", label=f"not finite\nat step {broken[0]}")
    _limit(panel, smooth[1] + seen[1], also=raw[1])
    if raw[0] or seen[0] or broken:
        panel.legend(**_LEGEND)
    else:
        _nothing(panel, "no loss logged yet")


def _draw_metrics(panel: Axes, rows: Sequence[Row], best: Mapping[str, Any] | None) -> None:
    evaluations = _of_split(rows, "validation")
    main = (best or {}).get("metric") or next(
        (name for row in evaluations for name in row.get("metrics") or {}), None
    )
    panel.set_ylabel(main or "metric", color=INK)
    if main is None:
        return _nothing(panel, "no evaluation yet")
    line = _points(evaluations, "step", partial(_value, metric=main))
    handles = panel.plot(
        *line, color=VALIDATION, lw=2, marker="o", ms=_dot(line), mec="white", mew=0.6, label=main, zorder=4
    )
    for name, color in zip(_like(main, evaluations), OTHER_METRICS, strict=False):
        other = _points(evaluations, "step", partial(_value, metric=name))
        handles += panel.plot(*other, color=color, lw=1.1, marker="o", ms=_dot(line) * 0.55, label=name)
    tests = _points(_of_split(rows, "test"), "step", partial(_value, metric=main))
    if tests[0]:
        label = f"test {tests[1][-1]:.4g}"
        handles += panel.plot(
            *tests, color=INK, ls="", marker="D", ms=6, label=label, zorder=5, clip_on=False
        )
    if best and best.get("value") is not None:
        at, value = best["step"], best["value"]
        panel.axvline(at, color=BEST, lw=1, ls=(0, (4, 3)), alpha=0.8)
        label = f"best {value:.4g}\nat step {at:,}"
        handles += panel.plot(at, value, color=BEST, label=label, zorder=6, **_STAR)
    panel.margins(y=0.12)
    panel.legend(handles=handles, **_LEGEND)


def _draw_rates(panel: Axes, rows: Sequence[Row]) -> None:
    from matplotlib import colormaps

    panel.set_ylabel("learning rate", color=INK)
    train = [row for row in _of_split(rows, "train") if row.get("lr")]
    curves = _rate_curves(train)
    if not curves:
        return _nothing(panel, "no learning rate logged yet")
    phases: dict[int, list[Row]] = {}
    for row in train:
        phases.setdefault(row.get("phase_index", 0), []).append(row)
    # Peaks, because a schedule that ends at zero spans any range by itself.
    peaks = [
        peak
        for members in phases.values()
        for name in {name for row in members for name in row["lr"]}
        if (peak := max(row["lr"].get(name) or 0.0 for row in members)) > 0
    ]
    logarithmic = max(peaks) > LOG_RANGE * min(peaks)
    ramp = colormaps["plasma"]
    lines = []
    for place, (name, (xs, ys)) in enumerate(curves):
        depth = place / (len(curves) - 1) if len(curves) > 1 else 0.6
        start = next(i for i, y in enumerate(ys) if not math.isnan(y))
        (line,) = panel.plot(
            xs, ys, color=ramp(0.06 + 0.74 * depth), lw=1.3 + 1.3 * depth, label=name, zorder=3 - depth
        )
        lines.append(line)
        if start > 0 or len(xs) < 3:
            panel.plot(xs[start], ys[start], marker="o", ms=4.5, color=line.get_color(), zorder=4)
    if logarithmic:
        panel.set_yscale("log")
        panel.set_ylim(min(peaks) / 30, max(peaks) * 2)
    else:
        panel.set_ylim(0, max(peaks) * 1.1)
        panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        panel.yaxis.get_offset_text().set(color=INK, size=8)
    # From the top of the network down; of many groups a few, evenly, whose colours show the ramp.
    kept = lines[::-1]
    if len(kept) > MAX_LEGEND:
        kept = [kept[round(i * (len(kept) - 1) / (MAX_LEGEND - 1))] for i in range(MAX_LEGEND)]
    panel.legend(handles=kept, title=f"{len(lines)} rates" if len(lines) > len(kept) else None, **_LEGEND)


def _rate_curves(train: Sequence[Row]) -> list[tuple[str, Points]]:
    """(label, curve) of every distinct rate from stem to head; NaN where a group does not learn."""
    names = list(dict.fromkeys(name for row in train for name in row["lr"]))
    steps = [float(row["step"]) for row in train]
    alike: dict[tuple[float | None, ...], list[str]] = {}
    for name in sorted(names, key=_depth):
        curve = tuple(float(f"{rate:.5g}") if (rate := row["lr"].get(name)) else None for row in train)
        if any(curve):
            alike.setdefault(curve, []).append(name)
    return [
        (_join(names), (steps, [math.nan if rate is None else rate for rate in curve]))
        for curve, names in alike.items()
    ]


def _depth(group: str) -> tuple[int, int]:
    """Where a group sits between stem and head; groups of unknown name keep their order in the middle."""
    block = re.search(r"block\.(\d+)", group)
    return (
        (0, int(block[1]))
        if block
        else (1, 0)
        if group.startswith(HEAD)
        else (-1 if "stem" in group else 0, 0)
    )


def _join(names: Sequence[str]) -> str:
    """One label for groups that share a rate."""
    bases = list(dict.fromkeys(re.split(r"[ /:(]", name)[0] for name in names))
    return names[0] if len(names) == 1 else bases[0] if len(bases) == 1 else f"{bases[0]} … {bases[-1]}"


def _phases(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """(name, last step) of each phase in order."""
    ends: dict[int, tuple[str, float]] = {}
    for row in rows:
        if row.get("phase") is not None and row.get("split") != "test":
            index = row.get("phase_index", 0)
            ends[index] = (str(row["phase"]), max(row["step"], ends.get(index, ("", 0))[1]))
    return [ends[index] for index in sorted(ends)]


def _shade_phases(panels: Sequence[Axes], phases: Sequence[tuple[str, float]], end: float) -> None:
    """Alternate bands, and above the first panel each phase's name, or its number where names do not fit."""
    if len(phases) < 2:
        return
    top, characters = panels[0], 145 / end  # so many fit over one step: measured for size 8.5 on 1200 pixels
    starts = [0.0] + [last for _, last in phases[:-1]]
    widths = [(last - start) * characters for start, (_, last) in zip(starts, phases, strict=True)]
    fits = [len(name) <= width for (name, _), width in zip(phases, widths, strict=True)]
    every = max(1, math.ceil(3.2 / max(1e-9, sorted(widths)[len(widths) // 2])))
    for number, (start, (name, last)) in enumerate(zip(starts, phases, strict=True)):
        for panel in panels:
            if number % 2:
                panel.axvspan(start, last, color=BAND, lw=0, zorder=0)
            if number and len(phases) <= 20:
                panel.axvline(start, color="#cfd4dc", lw=0.9, zorder=1)
        label = name if all(fits) else str(number + 1) if number % every == 0 else ""
        top.text(
            (start + last) / 2, 1.015, label, transform=top.get_xaxis_transform(),
            ha="center", va="bottom", fontsize=8.5, color=FAINT,
        )  # fmt: skip
    if not all(fits):
        names = [name for name, _ in phases]
        shown = names if len(names) <= 12 else [*names[:4], "…", names[-1]]
        text = f"{len(names)} phases: {', '.join(shown)}"
        top.set_title(
            text if len(text) < 170 else f"{len(names)} phases", fontsize=8.5, color=FAINT, loc="left", pad=16
        )


def _of_split(rows: Iterable[Row], split: str) -> list[Row]:
    return [row for row in rows if row.get("split") == split]


def _loss(row: Row) -> float | None:
    return row.get("loss")


def _value(row: Row, metric: str) -> float | None:
    values = row.get("metrics") or {}
    return values.get(metric, row.get("loss") if metric == "loss" else None)


def _like(main: str, evaluations: Sequence[Row]) -> list[str]:
    """The other metrics whose values share the main one's scale."""
    scale = max((abs(value) for row in evaluations if (value := _value(row, main))), default=0.0)
    names = dict.fromkeys(name for row in evaluations for name in row.get("metrics") or {})
    peak = {name: max((abs(_value(row, name) or 0.0) for row in evaluations), default=0.0) for name in names}
    return [name for name in names if name != main and scale / 3 <= peak[name] <= scale * 3]


def _points(rows: Iterable[Row], axis: str, value: Callable[[Row], float | None]) -> Points:
    pairs = [
        (float(row[axis]), float(y)) for row in rows if (y := value(row)) is not None and math.isfinite(y)
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _smooth(points: Points) -> Points:
    """An exponential moving average over a twentieth of the points; few points stay as they are."""
    xs, ys = points
    if len(ys) < 12:
        return points
    keep = 1 - 2 / (max(5, len(ys) / 20) + 1)
    smooth, total, weight = [], 0.0, 0.0
    for y in ys:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        smooth.append(total / weight)
    return xs, smooth


def _limit(panel: Axes, values: Iterable[Any], also: Sequence[float] = ()) -> None:
    """Set the height by what must be seen, and of the raw values all but the wildest hundredth."""
    tamed = sorted(also)[: max(1, math.floor(len(also) * 0.99))] if also else []
    shown = [float(y) for y in [*values, *tamed] if math.isfinite(y)]
    if not shown:
        return
    low, high = min(shown), max(shown)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    panel.set_ylim(max(0.0, low - room) if low >= 0 else low - room, high + room)


def _dot(points: Points) -> float:
    return 6 if len(points[0]) <= 25 else 4 if len(points[0]) <= 60 else 2.2


def _steps_per_epoch(rows: Sequence[Row]) -> str:
    last = max((row for row in rows if row.get("epoch")), key=lambda row: row["step"], default=None)
    return f"  ({last['step'] / last['epoch']:.4g} per epoch)" if last and last["epoch"] > 0 else ""


def _nothing(panel: Axes, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color=FAINT, fontsize=11)
    panel.set_yticks([])
