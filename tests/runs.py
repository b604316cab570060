"""Short runs on tiny models and tiny data, as users start them: a recipe in, a run folder out."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tiny
from hf_finetune.data.labels import Labels
from hf_finetune.inference import load_trained
from hf_finetune.models.load import Backbone, load_backbone
from hf_finetune.recipe import Recipe, parse_recipe
from hf_finetune.runfolder import Run
from hf_finetune.train import finetune

_ROOT = tempfile.TemporaryDirectory(prefix="hf-finetune-tests-")
CLASSES = ("blue", "green", "red")
RELOAD_CHECK = False
"""Whether runs load their model in a fresh process before they are done: tests/test_reload.py is about that."""
TRAIN = 12
"""Rows to learn from: with batches of 8 the second is short."""


@cache
def backbone(name: str) -> str:
    """Return the folder of a tiny backbone: `resnet` or `vit` of timm, `bert` of transformers, `bert-dry` without dropout."""
    folder = Path(_ROOT.name) / name
    if name == "bert":
        tiny.transformers_folder(folder, "bert")
    elif name.startswith("vision-"):
        tiny.transformers_folder(folder, name)
    elif name == "bert-dry":
        tiny.transformers_folder(folder, "bert")
        config = folder / "config.json"
        text = config.read_text(encoding="utf-8")
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            text = text.replace(f'"{key}": 0.1', f'"{key}": 0.0')
        config.write_text(text, encoding="utf-8")
    else:
        tiny.timm_folder(folder, name)
    return str(folder)


@cache
def images(train: int = TRAIN, validation: int = 7) -> str:
    """Return an image folder of three colours."""
    folder, rng = Path(_ROOT.name) / f"images-{train}-{validation}", np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        for number in range(count):
            name = CLASSES[number % 3]
            pixels = rng.integers(0, 120, (36, 36, 3), dtype=np.uint8)
            pixels[..., 2 - number % 3] += 100
            path = folder / split / name / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return str(folder)


def table(
    folder: Path,
    rows: Sequence[tuple[Any, ...]],
    name: str = "rows.csv",
    header: Sequence[str] = ("text", "label"),
) -> str:
    """Write a csv file and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return str(folder / name)


@cache
def texts() -> str:
    """Return a csv of good and bad films."""
    rows = [
        (f"the {('bad', 'good')[n % 2]} film {'very ' * (n % 4)}", ("neg", "pos")[n % 2]) for n in range(16)
    ]
    return table(Path(_ROOT.name) / "texts", rows)


def data(name: str) -> dict[str, Any]:
    """Return the `data` section that suits a tiny backbone."""
    return {"path": texts(), "validation": 0.25} if name.startswith("bert") else {"path": images()}


def recipe(name: str, output: Path | None = None, **changes: Any) -> Recipe:
    """Return a recipe for a tiny backbone: 4 steps of 8 samples in fp32, measured once, at the end.

    `changes` are sections; what they say of `training` and `data` is merged with the defaults here.
    """
    training = {"steps": 4, "batch_size": 8, "precision": "fp32", "reload_check": RELOAD_CHECK}
    training |= changes.pop("training", {})
    sections = {
        "backbone": backbone(name),
        "data": data(name) | changes.pop("data", {}),
        "augment": "none",
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "schedule": {"name": "cosine", "warmup": None},
        "monitor": {"evaluate": "100%"},
        "training": training,
        "output": None if output is None else str(output),
    }
    return parse_recipe(sections | changes)


def run(name: str, output: Path, **changes: Any) -> Run:
    """Train and return the run."""
    return finetune(recipe(name, output, **changes), quiet=True)


def start(done: Run) -> Backbone:
    """Return the backbone a run started from, output layer included."""
    read = load_trained(str(done.path))
    modality = "text" if done.status["task"].startswith("text") else "image"
    given = read.recipe.backbone
    return load_backbone(
        given, Labels(read.recipe.data.labels, read.labels.names), modality, seed=read.recipe.training.seed
    )


def weights(done: Run) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that a run kept, read back from its model folder."""
    return load_trained(str(done.path)).backbone.model.state_dict()


def moved(done: Run) -> set[str]:
    """Return the names of the parameters and buffers whose bits differ from the start's."""
    before, after = start(done).model.state_dict(), weights(done)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def train_rows(done: Run) -> list[dict[str, Any]]:
    """Return the training rows of metrics.jsonl."""
    return [row for row in done.rows if row["split"] == "train"]


def evaluations(done: Run) -> list[dict[str, Any]]:
    """Return the validation rows of metrics.jsonl."""
    return [row for row in done.rows if row["split"] == "validation"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    """Return whether two models are equal: bit by bit, or within `tolerance`."""
    assert one.keys() == other.keys()
    if not tolerance:
        return all(torch.equal(one[name], other[name]) for name in one)
    return all(torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one)
