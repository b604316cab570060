"""Ours against a bare loop, transformers.Trainer and timm: the same data, weights, batch, epochs, seed and rate.

    python scripts/benchmark.py --backbone DIR --data DIR --recipes frozen,full --epochs 10 --repeats 3 --output DIR

Each arm is a fresh process; the arms of one repeat follow each other, so that what else the machine does falls on all
of them alike. `ours` starts without cached features, `ours-again` with those of the `ours` before it, `ours-uncached`
caches none. Written to --output: results.json (every run), table.md (medians and spreads), benchmark.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.job import BEGAN, Job

HERE = Path(__file__).parent
FLOORS = [
    f"floor:{precision}:{layout}"
    for precision in ("fp32", "bf16")
    for layout in ("contiguous", "channels_last")
]
ARMS: dict[str, tuple[list[str], str, list[str]]] = {
    "floor": (FLOORS, "floor.py", []),
    "ours": (["ours"], "ours.py", []),
    "ours-again": (["ours-again"], "ours.py", []),
    "ours-uncached": (["ours-uncached"], "ours.py", ["cache=off"]),
    "trainer": (["trainer"], "trainer.py", []),
    "timm": (["timm"], "timm_loop.py", []),
}
"""What --arms names -> the runs it stands for, their program, further changes to our recipe."""
FIGURES = {
    "wall": "wall s",
    "cpu": "CPU s",
    "first_step": "first step s",
    "samples_per_second": "samples/s",
    "accuracy": "accuracy",
    "peak_gb": "peak GB",
}
ARMS_WITH_PREPARATION_ONLY = ("floor",)
"""Their wall time says nothing: they train for a while, not for epochs."""


def main() -> None:
    """Run every arm of every recipe `--repeats` times; write table, JSON and picture."""
    options = _options()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hf-finetune-benchmark-") as scratch:
        plans = {recipe: _plan(options, recipe, Path(scratch)) for recipe in options.recipes.split(",")}
        for repeat in range(options.repeats):
            for recipe, job in plans.items():
                features = Path(scratch) / f"features-{recipe}"
                shutil.rmtree(features, ignore_errors=True)
                for name in options.arms.split(","):
                    arms, program, overrides = ARMS[name]
                    for arm in arms:
                        ours = replace(job, arm=arm, overrides=[*job.overrides, *overrides])
                        found = _run(ours, program, Path(scratch), features)
                        runs.append({"recipe": recipe, "arm": arm, "repeat": repeat, **found})
                        print(_line(runs[-1]), flush=True)
                        _write(output, options, runs)
    print((output / "table.md").read_text(encoding="utf-8"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", required=True, help="a local folder in Hub layout, or shipped/…")
    parser.add_argument(
        "--data", required=True, help="an image folder, or a folder with train.csv and dev.csv"
    )
    parser.add_argument("--recipes", default="frozen,full")
    parser.add_argument(
        "--arms", default="floor,ours,ours-again,ours-uncached,trainer,timm", help=", ".join(ARMS)
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rows", type=int, help="training rows to take; default all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="benchmark")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to our recipes, in every arm of ours"
    )
    options = parser.parse_args()
    if unknown := set(options.arms.split(",")) - set(ARMS):
        parser.error(f"--arms: {', '.join(sorted(unknown))} is none of {', '.join(ARMS)}")
    return options


def _plan(options: argparse.Namespace, recipe: str, scratch: Path) -> Job:
    """Return the job of a recipe with what `auto` means resolved by us; it also warms the disk's cache."""
    job = Job(
        arm="plan", recipe=recipe, backbone=options.backbone, data=options.data, folder="", epochs=options.epochs,
        batch_size=options.batch_size, seed=options.seed, rows=options.rows, overrides=options.overrides,
    )  # fmt: skip
    found = _run(job, "plan.py", scratch, scratch / "features-plan")
    if "failed" in found:
        sys.exit(f"{recipe}: {found['failed']}")
    return Job(**{key: value for key, value in found.items() if key in Job.__dataclass_fields__})


def _run(job: Job, program: str, scratch: Path, features: Path) -> dict[str, Any]:
    """Run one arm in a process of its own; return its answer, wall and CPU seconds and peak memory."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    written = folder / "job.json"
    written.write_text(json.dumps(vars(replace(job, folder=str(folder / "out")))), encoding="utf-8")
    (folder / "out").mkdir()
    python_path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": python_path, "HF_FINETUNE_CACHE": str(features)}
    log = folder / "log"
    began = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "benchmarks" / program), str(written)],
            stdout=out, stderr=subprocess.STDOUT, env=env | {BEGAN: repr(time.monotonic())},
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)  # what this process alone took, its workers included
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - began
    said = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    if process.returncode or not said:
        return {"failed": log.read_text(encoding="utf-8")[-2000:]}
    shutil.rmtree(folder, ignore_errors=True)
    unit = 1 if sys.platform == "darwin" else 1024
    measured = {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak_gb": usage.ru_maxrss * unit / 1e9}
    return json.loads(said[-1]) | measured


def _line(run: dict[str, Any]) -> str:
    what = run.get("skipped") or run.get("failed")
    shown = ", ".join(f"{label} {run[key]:.4g}" for key, label in FIGURES.items() if key in run)
    return f"{run['recipe']}, {run['arm']}, repeat {run['repeat'] + 1}: {what or shown}"


def _write(output: Path, options: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    machine = {
        "command": " ".join(["python", *sys.argv]),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {
            p: metadata.version(p) for p in ("torch", "timm", "transformers", "accelerate", "datasets")
        },
    }
    text = json.dumps({"machine": machine, "options": vars(options), "runs": runs}, indent=2)
    (output / "results.json").write_text(text + "\n", encoding="utf-8")
    (output / "table.md").write_text(table(runs), encoding="utf-8")
    _draw(runs, output / "benchmark.png")


def table(runs: list[dict[str, Any]]) -> str:
    """Return medians (least to most) as a Markdown table, with the wall time as a multiple of ours."""
    lines = ["| recipe | arm | " + " | ".join(FIGURES.values()) + " | wall / ours |"]
    lines.append("| --- | --- |" + " --- |" * (len(FIGURES) + 1))
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        mine = [run for run in runs if run["recipe"] == recipe]
        ours = [run["wall"] for run in mine if run["arm"] == "ours" and "wall" in run]
        for arm in dict.fromkeys(run["arm"] for run in mine):
            these = [run for run in mine if run["arm"] == arm]
            why = these[0].get("skipped") or ("failed" if "failed" in these[0] else None)
            if why:
                lines.append(f"| {recipe} | {arm} | {why} |" + " |" * len(FIGURES))
                continue
            cells = [_cell([run[key] for run in these if key in run]) for key in FIGURES]
            bare = arm.startswith(ARMS_WITH_PREPARATION_ONLY)
            if bare:
                cells[0] = cells[1] = ""
            ratio = (
                ""
                if bare or not ours
                else f"{statistics.median(r['wall'] for r in these) / statistics.median(ours):.2f}"
            )
            lines.append(f"| {recipe} | {arm} | " + " | ".join([*cells, ratio]) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    middle = f"{statistics.median(values):.4g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.4g} to {max(values):.4g})"


def _draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the wall time of every arm, one point per run."""
    from matplotlib.figure import Figure

    timed = [run for run in runs if "wall" in run and not run["arm"].startswith(ARMS_WITH_PREPARATION_ONLY)]
    if not timed:
        return
    names = list(dict.fromkeys(f"{run['recipe']}, {run['arm']}" for run in timed))
    figure = Figure(figsize=(8, 0.6 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    for height, name in enumerate(reversed(names)):
        walls = [run["wall"] for run in timed if f"{run['recipe']}, {run['arm']}" == name]
        axes.barh(
            height, statistics.median(walls), color="tab:blue" if ", ours" in name else "tab:grey", alpha=0.6
        )
        axes.plot(walls, [height] * len(walls), "k.", markersize=4)
    axes.set_yticks(range(len(names)), labels=list(reversed(names)))
    axes.set_xlabel("wall seconds from start to exit; a bar is the median, a point one run")
    figure.savefig(path, dpi=120)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
