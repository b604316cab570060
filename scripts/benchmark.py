"""Ours against a bare loop, transformers.Trainer, timm, fastai and Lightning: same data, weights, batch, epochs, seed.

    python scripts/benchmark.py --backbone DIR --data DIR --recipes frozen,full --epochs 10 --repeats 3 --output DIR

Each arm is a fresh process; the arms of one repeat follow each other, so that what else the machine does falls on all
of them alike. `ours` starts without cached features, `ours-again` with those of the `ours` before it, `ours-uncached`
caches none; `floor` measures ready tensors in each precision and memory format. The others get the rate, decay,
precision, learning layers and number of loading processes that our recipe resolves to, and are otherwise as their users
write them. Written to --output: results.json (every run), table.md (medians and spreads), benchmark.png.

Exit code 1 where an arm failed; its line in the table says why, and the rest is measured all the same.
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
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.chart import draw, readable
from benchmarks.job import BEGAN, Job
from benchmarks.prepare_data import data_folder, generate_images, random_weights

HERE = Path(__file__).parent
Run = dict[str, Any]


def floors(job: Job) -> list[str]:
    """Return the floors of a job: fp32, bf16 and what ours computes in; two memory formats for images."""
    precisions = dict.fromkeys(("fp32", "bf16", job.precision))
    layouts = ("contiguous", "channels_last") if job.modality == "image" else ("contiguous",)
    return [f"floor:{precision}:{layout}" for precision in precisions for layout in layouts]


def alone(job: Job) -> list[str]:
    """Return the one arm of a name."""
    return [job.arm]


ARMS: dict[str, tuple[Callable[[Job], list[str]], str, list[str]]] = {
    "floor": (floors, "floor.py", []),
    "ours": (alone, "ours.py", []),
    "ours-again": (alone, "ours.py", []),
    "ours-uncached": (alone, "ours.py", ["cache=off"]),
    "trainer": (alone, "trainer.py", []),
    "timm": (alone, "timm_loop.py", []),
    "fastai": (alone, "fastai_learner.py", []),
    "lightning": (alone, "lightning_module.py", []),
}
"""What --arms names -> the runs it stands for, their program, further changes to our recipe."""
FIGURES = {
    "wall": "wall s",
    "cpu": "CPU s",
    "first_step": "first step s",
    "samples_per_second": "samples/s",
    "accuracy": "accuracy",
    "peak_gb": "peak GB",
    "above_gb": "above loaded GB",
}
CAPTION = """\
Medians (least to most). *wall*: seconds from the start of the process to its exit, imports, evaluations and saving
included. *CPU*: seconds of all its cores. *first step*: from the start to the end of the first optimizer step.
*samples/s*: the training loop alone, evaluations and saving apart, over a whole epoch with its loading of data: the
median of the epochs after the first, or the one epoch there is, which has the loop's start in it. Of `floor`: forward,
backward and step on ready tensors, for texts the batches of our first epoch. *of floor*: samples/s by those of the
floor in the precision and memory format that ours computes in (marked \\*); above 1 where frozen layers run once, not
in each epoch. *accuracy*: on the validation samples after the last epoch. *peak*: {memory}. *wall / ours*: the others'
time by that of `ours`.
"""


def main() -> int:
    """Run every arm of every recipe `--repeats` times; write table, JSON and picture; 1 where something failed."""
    options = _options()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []

    def keep(run: Run) -> None:
        runs.append(run)
        print(_line(run), flush=True)
        _write(output, options, runs)

    with tempfile.TemporaryDirectory(prefix="hf-finetune-benchmark-") as scratch:
        folder = Path(scratch)
        data = (
            generate_images(options.images, options.seed, folder / "images")
            if options.images
            else data_folder(options.data, options.rows, folder / "data")
        )
        backbone = options.backbone
        if options.random_weights:
            backbone = str(random_weights(backbone, options.seed, folder / "backbone"))
        plans: dict[str, Job] = {}
        for recipe in options.recipes:
            job = Job(
                "plan", recipe, backbone, str(data), "", options.epochs, options.batch_size, options.seed,
                floor_seconds=options.floor_seconds, overrides=options.overrides,
            )  # fmt: skip
            found = _run(job, "plan.py", folder, folder / "features-plan")
            if "failed" in found:
                keep({"recipe": recipe, "arm": "plan", "repeat": 0, **found})
            else:
                known = {key: found[key] for key in Job.__dataclass_fields__}
                plans[recipe] = Job(**known)
        for repeat in range(options.repeats):
            for recipe, plan in plans.items():
                features = folder / f"features-{recipe}"
                shutil.rmtree(features, ignore_errors=True)
                for name in options.arms:
                    named, program, overrides = ARMS[name]
                    for arm in named(replace(plan, arm=name)):
                        job = replace(plan, arm=arm, overrides=[*plan.overrides, *overrides])
                        found = _run(job, program, folder, features)
                        keep({"recipe": recipe, "arm": arm, "repeat": repeat, **found})
    print((output / "table.md").read_text(encoding="utf-8"))
    return 1 if any("failed" in run for run in runs) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbone",
        required=True,
        help="a local folder in Hub layout, or shipped/…; with --random-weights a timm architecture",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="start from random weights of the seed: nothing to download",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data",
        help="an image folder with train/ and val/, a folder with train.csv and dev.csv, or shipped/…",
    )
    source.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="generate N training JPEGs of 500x375, and N/4 to be measured on",
    )
    parser.add_argument("--recipes", default="frozen,full", type=_names)
    parser.add_argument("--arms", default=",".join(ARMS), type=_names, help=", ".join(ARMS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--rows",
        type=int,
        help="rows of --data to take, evenly, and at most as many to be measured on; default all",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--floor-seconds",
        type=float,
        default=8.0,
        help="how long each floor is measured; default %(default)s",
    )
    parser.add_argument("--output", default="benchmark")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to our recipes, in every arm of ours"
    )
    options = parser.parse_args()
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        parser.error(f"--arms: {', '.join(unknown)} is none of {', '.join(ARMS)}")
    for name in ("epochs", "batch_size", "repeats", "rows", "images"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: {value} is less than 1")
    if options.images and options.rows:
        parser.error("--rows takes part of --data; --images N is the number of images already")
    if options.data and not options.data.startswith("shipped/") and not Path(options.data).is_dir():
        parser.error(f"--data: there is no folder {options.data}")
    return options


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _run(job: Job, program: str, scratch: Path, features: Path) -> dict[str, Any]:
    """Run one arm in a process of its own; return its answer, wall and CPU seconds, peak memory; or why it failed."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    written = folder / "job.json"
    written.write_text(json.dumps(vars(replace(job, folder=str(folder / "out")))), encoding="utf-8")
    (folder / "out").mkdir()
    python_path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    # What any tool stores on its way starts empty, as in its user's first run.
    caches = {"HF_FINETUNE_CACHE": str(features), "HF_DATASETS_CACHE": str(folder / "datasets")}
    env = os.environ | {"PYTHONPATH": python_path} | caches
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
    text = log.read_text(encoding="utf-8", errors="replace")
    shutil.rmtree(folder, ignore_errors=True)
    said = [line for line in text.splitlines() if line.startswith("{")]
    if process.returncode or not said:
        return {"failed": _reason(text, process.returncode), "log": text[-4000:]}
    found = json.loads(said[-1])
    if "skipped" in found:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {} if "peak_gb" in found else {"peak_gb": usage.ru_maxrss * unit / 1e9}
    memory = (
        "memory of the GPU that was allocated" if "peak_gb" in found else "resident memory of the process"
    )
    return found | {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "memory": memory} | peak


def _reason(log: str, code: int) -> str:
    """Return in one line why a program failed: the error at the end of its log."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    kinds = ("Error", "Exception", "Interrupt")
    errors = [at for at, line in enumerate(lines) if line.partition(":")[0].endswith(kinds)]
    said = " ".join(lines[errors[-1] :] if errors else lines[-1:])  # a message may run over several lines
    return f"{said[:400]} (exit code {code})"


def _line(run: Run) -> str:
    shown = ", ".join(f"{label} {run[key]:.4g}" for key, label in FIGURES.items() if key in run)
    return f"{run['recipe']}, {run['arm']}, repeat {run['repeat'] + 1}: {_absent(run) or shown}"


def _absent(run: Run) -> str | None:
    """Return why a run has no figures; None where it has."""
    return next((f"{what}: {run[what]}" for what in ("skipped", "failed") if what in run), None)


def _write(output: Path, options: argparse.Namespace, runs: list[Run]) -> None:
    machine = {
        "command": " ".join(["python", *sys.argv]),
        "cpu": _cpu(),
        "gpu": _gpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": _versions(),
    }
    text = json.dumps({"machine": machine, "options": vars(options), "runs": runs}, indent=2)
    (output / "results.json").write_text(text + "\n", encoding="utf-8")
    (output / "table.md").write_text(table(runs), encoding="utf-8")
    draw(runs, output / "benchmark.png")


def table(runs: list[Run]) -> str:
    """Return medians (least to most) as a Markdown table, by the floor and as a multiple of our wall time."""
    header = ["recipe", "arm", *FIGURES.values(), "peak of floor", "of floor", "wall / ours"]
    lines = ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        arms: dict[str, list[Run]] = {}
        for run in runs:
            if run["recipe"] == recipe:
                arms.setdefault(run["arm"], []).append(run)
        floor = floor_of_ours(runs, recipe)
        for arm, these in arms.items():
            name = f"{arm} \\*" if arm == floor else arm
            done = [run for run in these if not _absent(run)]
            cells = [_cell([run[key] for run in done if key in run]) for key in FIGURES]
            if arm.startswith("floor"):
                cells[:2] = ["", ""]  # it trains for a while, not for epochs
            ratios = [
                _ratio(done, arms.get(floor, []), "peak_gb"),
                _ratio(done, arms.get(floor, []), "samples_per_second"),
                "" if arm.startswith("floor") else _ratio(done, arms.get("ours", []), "wall"),
            ]
            why = next((why for run in these if (why := _absent(run))), None)
            if why:
                name = f"{name}: {why.replace('|', '/')}" + (
                    f" ({len(these) - len(done)} of {len(these)} runs)" if done else ""
                )
            lines.append("| " + " | ".join([recipe, name, *cells, *ratios]) + " |")
    memory = next((run["memory"] for run in runs if "memory" in run), "resident memory of the process")
    return "\n".join(lines) + "\n\n" + CAPTION.format(memory=memory)


def floor_of_ours(runs: list[Run], recipe: str) -> str:
    """Return the name of the floor in the precision and memory format that ours computed in; empty without ours."""
    return next((run["floor"] for run in runs if run["recipe"] == recipe and "floor" in run), "")


def _ratio(these: list[Run], those: list[Run], key: str) -> str:
    middles = [
        statistics.median(values)
        for group in (these, those)
        if (values := [run[key] for run in group if key in run])
    ]
    return f"{middles[0] / middles[1]:.2f}" if len(middles) == 2 else ""


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    middle = readable(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({readable(min(values))} to {readable(max(values))})"


def _versions() -> dict[str, str]:
    names = ("torch", "timm", "transformers", "accelerate", "datasets", "peft", "fastai", "lightning")
    installed = {each.metadata["Name"].lower(): each.version for each in metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _gpu() -> str | None:
    """Return the GPU's name as its driver tells it: this process loads no torch."""
    if not shutil.which("nvidia-smi"):
        return None
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
