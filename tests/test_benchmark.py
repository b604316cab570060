"""scripts/benchmark.py: the smallest benchmark runs to its end; generated data is what it claims to be."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

import benchmark
from benchmarks import ours, prepare_data

ROOT = Path(__file__).parents[1]


def run_benchmark(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/benchmark.py", *arguments, "--output", str(output)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


SMALLEST = (
    "--backbone", "shipped/tiny-resnet", "--data", "shipped/digits", "--rows", "40", "--batch-size", "8",
    "--epochs", "1", "--repeats", "1", "--floor-seconds", "0.1", "training.precision=fp32",
)  # fmt: skip


@pytest.mark.slow
def test_the_smallest_benchmark(tmp_path: Path) -> None:
    """Table, figures and picture come out, and one recipe that does not exist takes nothing from the other."""
    done = run_benchmark(tmp_path, *SMALLEST, "--recipes", "full,fulll", "--arms", "floor,ours")
    assert done.returncode == 1, done.stderr
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    floors = [
        f"floor:{precision}:{layout}"
        for precision in ("fp32", "bf16")
        for layout in ("contiguous", "channels_last")
    ]
    assert [(run["recipe"], run["arm"]) for run in runs] == [
        ("fulll", "plan"),
        *(("full", arm) for arm in [*floors, "ours"]),
    ]
    assert "fulll" in runs[0]["failed"]
    skipped = [run["arm"] for run in runs if "skipped" in run]  # on a CPU without bf16 instructions
    assert skipped in ([], floors[2:])
    for run in (run for run in runs[1:] if run["arm"] not in skipped):
        figures = [run[key] for key in ("wall", "cpu", "first_step", "samples_per_second", "peak_gb")]
        assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    assert 0 <= runs[-1]["accuracy"] <= 1
    assert runs[-1]["floor"] == "floor:fp32:channels_last"
    table = (tmp_path / "table.md").read_text()
    assert "floor:fp32:channels_last \\*" in table
    assert "| fulll | plan: failed: " in table
    assert Image.open(tmp_path / "benchmark.png").size[0] > 800


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms", "ours,timn", "--data", "shipped/digits"], "--arms: timn is none of floor, ours"),
        (["--data", "no/such/folder"], "--data: there is no folder no/such/folder"),
        (["--images", "0"], "--images: 0 is less than 1"),
        (["--images", "8", "--rows", "4"], "--rows takes part of --data"),
    ],
)
def test_wrong_options(
    arguments: Sequence[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--backbone", "shipped/tiny-resnet", *arguments])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert said in capsys.readouterr().err


RUNS = [
    {"recipe": "full", "arm": "floor:fp32:contiguous", "repeat": 0, "wall": 9.0, "cpu": 9.0, "samples_per_second": 50.0, "peak_gb": 2.0},
    {"recipe": "full", "arm": "ours", "repeat": 0, "wall": 4.0, "cpu": 5.0, "samples_per_second": 40.0, "peak_gb": 2.2,
     "floor": "floor:fp32:contiguous"},
    {"recipe": "full", "arm": "ours", "repeat": 1, "wall": 6.0, "cpu": 5.0, "samples_per_second": 50.0},
    {"recipe": "full", "arm": "trainer", "repeat": 0, "wall": 10.0, "cpu": 5.0, "samples_per_second": 25.0},
    {"recipe": "full", "arm": "trainer", "repeat": 1, "failed": "ValueError: no | luck (exit code 1)"},
    {"recipe": "full", "arm": "fastai", "repeat": 0, "skipped": "not installed"},
]  # fmt: skip


def test_the_table_says_ratios_and_why_an_arm_has_none() -> None:
    lines = benchmark.table(RUNS).splitlines()
    cells = {
        row[2].strip(): [cell.strip() for cell in row[3:-1]]
        for row in (line.split("|") for line in lines[2:6])
    }
    assert list(cells) == [
        "floor:fp32:contiguous \\*",
        "ours",
        "trainer: failed: ValueError: no / luck (exit code 1) (1 of 2 runs)",
        "fastai: skipped: not installed",
    ]
    floor, mine, trainer, fastai = cells.values()
    assert floor[0] == floor[-1] == ""
    assert (mine[0], mine[-2:]) == ("5 (4 to 6)", ["0.90", "1.00"])
    assert mine[-3] == "1.10"
    assert (trainer[0], trainer[-2:]) == ("10", ["0.50", "2.00"])
    assert set(fastai) == {""}


def test_the_speed_of_an_epoch_comes_from_that_of_its_parts() -> None:
    """Ten samples in batches of four: 4 in 4 s, 6 in 1 s; then all ten in two seconds."""
    rows = [
        {"step": 1, "samples_per_second": 1.0},
        {"step": 3, "samples_per_second": 6.0},
        {"step": 6, "samples_per_second": 5.0},
    ]
    assert ours.epoch_speeds(rows, 4, 10) == pytest.approx([2.0, 5.0])


def test_generated_images_are_photos_to_a_decoder(tmp_path: Path) -> None:
    folder = prepare_data.generate_images(8, 0, tmp_path / "a")
    assert len(list(folder.glob("train/*/*.jpg"))) == 8
    assert len(list(folder.glob("val/*/*.jpg"))) == len(prepare_data.SHAPES)
    for path in folder.glob("train/*/*.jpg"):
        assert Image.open(path).size == prepare_data.SIZE
        assert 0.3 < path.stat().st_size / (500 * 375) < 0.8  # bytes for a pixel; photos have about 0.5
    again = prepare_data.draw_image(0, 3)
    assert (
        again.tobytes() == prepare_data.draw_image(0, 3).tobytes() != prepare_data.draw_image(1, 3).tobytes()
    )


def test_rows_are_taken_evenly(tmp_path: Path) -> None:
    folder = prepare_data.data_folder("shipped/digits", 10, tmp_path)
    found = [path.parent.name for path in folder.glob("train/*/*")]
    assert sorted(found) == sorted(2 * ["five", "six", "seven", "eight", "nine"])
    table = prepare_data.data_folder("shipped/reviews", 6, tmp_path / "texts")
    with (table / "train.csv").open(newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert len(labels) == 6
    assert set(labels) == {"0", "1"}
