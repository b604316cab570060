"""Two processes end where one does: gloo on the CPU, through scripts/train.py and through `finetune`."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from hf_finetune.inference import evaluate_model
from hf_finetune.recipe import dump_recipe, load_recipe
from hf_finetune.runfolder import Run, load_run

ROOT = Path(__file__).parents[1]
ODD = 9
"""Rows to learn from: in batches of 8 the last one has a single sample, for two processes."""

# Adam turns the rounding of a gradient that is zero by nature (a key's bias) into steps; SGD shows what the loop does.
SGD = {"optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.01}}
FULL = {"strategy": "full", "schedule": {"name": "cosine", "warmup": "1 steps"}} | SGD
# name -> (backbone, changes); each runs in one process and in two
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    # At a real ViT's rate: where a gradient is truly zero (a key's bias) Adam makes steps out of rounding, as large as
    # the rate, and the rates of a network this narrow are ten times as high.
    "vit gradual": ("vit", {"strategy": {"name": "gradual", "every": "2 steps", "backbone_lr": "0.05x"}, "training": {"steps": 8}}),
    "cnn full": ("resnet", FULL),
    "cnn frozen, micro-batches": ("resnet", {"strategy": "frozen", "training": {"micro_batch_size": 2}}),
    "text, by length": ("bert-dry", FULL),
    "mixup": ("vit", FULL | {"augment": ["mixup", "horizontal_flip"]}),
    "cutmix, odd share": ("vit", FULL | {"augment": ["cutmix"], "training": {"batch_size": 6}}),
    "ema": ("vit", FULL | {"training": {"ema": {"decay": 0.5}}}),
    "a stream": ("vit", FULL | {"augment": ["mixup"], "data": {"streaming": True, "shuffle_buffer": 8}}),
    "class weights": ("vit", FULL | {"data": {"class_weights": "balanced"}}),
    "lp_ft": ("resnet", {"strategy": {"name": "lp_ft", "full_lr": "0.1x", "probe": "2 steps"}, "training": {"steps": 5}}),
    "an unused mask token": ("vision-dinov2", FULL),
}  # fmt: skip
# Batch statistics are each process's own, so these are not compared with one process.
LIVE = {"live batch norm": ("resnet", FULL | {"strategy": {"name": "full", "batch_norm": "train"}})}

SCRIPT = """
import json, sys, traceback
from pathlib import Path
sys.path.insert(0, {tests!r})
import conftest
from hf_finetune.recipe import load_recipe
from hf_finetune.train import finetune
for path in sorted(Path({folder!r}).glob("*.yaml")):
    try:
        finetune(load_recipe(path), quiet=True)
    except Exception:
        path.with_suffix(".error").write_text(traceback.format_exc())
"""


def launch(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *arguments,
    ]
    given = {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | given, cwd=cwd
    )


def written(folder: Path, name: str, family: str, changes: dict[str, Any], processes: int) -> Path:
    data = (
        {"data": {"path": runs.images(ODD, 5)} | changes.get("data", {})}
        if not family.startswith("bert")
        else {}
    )
    recipe = runs.recipe(family, folder / f"{name}-{processes}", **(changes | data))
    path = folder / f"{name}.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return path


@cache
def together() -> Path:
    """Run all arms but the first in two processes, one launch."""
    folder = Path(runs._ROOT.name) / "two"
    folder.mkdir(exist_ok=True)
    for name, (family, changes) in (ARMS | LIVE).items():
        if name != "vit gradual":
            written(folder, name, family, changes, 2)
    script = folder / "several.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder)), encoding="utf-8")
    done = launch(str(script))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@cache
def by_script() -> tuple[Path, str]:
    """Run the first arm in two processes through scripts/train.py."""
    folder = Path(runs._ROOT.name) / "script"
    folder.mkdir(exist_ok=True)
    path = written(folder, "vit gradual", *ARMS["vit gradual"], 2)
    done = launch(
        "scripts/train.py",
        "--recipe",
        str(path),
        "training.clip_norm=0.5",
        "training.reload_check=true",
        "--output",
        str(folder / "vit gradual-2"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def two(name: str) -> Run:
    folder = by_script()[0] if name == "vit gradual" else together()
    error = folder / f"{name}.error"
    assert not error.exists(), error.read_text()
    return load_run(folder / f"{name}-2")


@pytest.mark.parametrize("name", ARMS)
def test_two_processes_end_where_one_does(name: str, tmp_path: Path) -> None:
    double = two(name)
    recipe = load_recipe(
        double.path / "recipe.yaml", [f"output={tmp_path / 'one'}", "training.reload_check=false"]
    )
    single = runs.finetune(recipe, quiet=True)
    assert double.status["processes"] == 2
    assert runs.same(runs.weights(single), runs.weights(double), tolerance=1e-5)
    for one, other in zip(single.rows, double.rows, strict=True):
        assert (one["step"], one["split"], one.get("lr")) == (other["step"], other["split"], other.get("lr"))
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    # no sample is counted twice
    assert [row["metrics"] for row in runs.evaluations(double)] == [
        row["metrics"] for row in runs.evaluations(single)
    ]


@pytest.mark.parametrize("name", ["cnn full", "cnn frozen, micro-batches"])
def test_frozen_is_bit_equal_under_ddp(name: str) -> None:
    run = two(name)
    buffers = {n for n, _ in runs.start(run).model.named_buffers()}
    assert not runs.moved(run) & buffers
    if "frozen" in name:
        assert runs.moved(run) == {"fc.weight", "fc.bias"}


def test_the_main_process_compares_what_was_written() -> None:
    assert two("vit gradual").status["reload"]["compared"]


def test_what_is_kept_is_what_both_processes_measured() -> None:
    """With live batch statistics each process has its own; both measure with the ones that are kept."""
    run = two("live batch norm")
    assert "bn1.running_mean" in runs.moved(run)
    assert evaluate_model(str(run.path), []).loss == pytest.approx(run.best["loss"], abs=1e-6)  # type: ignore[index]


def test_one_process_speaks_for_both() -> None:
    _, printed = by_script()
    assert printed.count("done: best accuracy") == 1
    assert printed.count("* best") == 1
    assert "phase 2 of 4 from step 2: last:2 learns" in printed


def test_a_user_s_mistake_is_printed_once(tmp_path: Path) -> None:
    recipe = runs.recipe("vit", strategy={"phases": [{"train": "last:99"}]})
    (tmp_path / "wrong.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    done = launch(
        "scripts/train.py", "--recipe", str(tmp_path / "wrong.yaml"), "--output", str(tmp_path / "run")
    )
    assert done.returncode != 0
    assert done.stderr.count("'last:99' asks for 99 layer groups") == 1
    assert "hf_finetune/strategies" not in done.stderr  # no traceback of ours
    assert not (tmp_path / "run").exists()


def test_the_batch_must_be_shared_equally() -> None:
    from hf_finetune.errors import RecipeError
    from hf_finetune.setup import prepare

    for training, text in (({"batch_size": 9}, "9 samples per optimizer step cannot be shared equally by 2"),
                           ({"batch_size": 8, "micro_batch_size": 8}, "8 does not divide the 4 samples each")):  # fmt: skip
        recipe = runs.recipe("vit", strategy="frozen", training=training)
        with pytest.raises(RecipeError, match=text):
            prepare(recipe, world_size=2, device=torch.device("cpu"))
