"""Transfer on the shipped data is real: at equal budget pretrained weights beat random ones by a margin."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from hf_finetune.recipe import load_recipe
from hf_finetune.train import finetune

SEEDS = range(3)
MARGIN = 0.25
"""Accuracy on the digits 5-9 above that of training from scratch, mean over the seeds."""


def test_pretrained_weights_beat_random_ones(tmp_path: Path) -> None:
    accuracy = {name: mean(_accuracy(name, seed, tmp_path) for seed in SEEDS) for name in ARMS}
    for name in ("full", "frozen", "discriminative"):
        assert accuracy[name] > accuracy["scratch"] + MARGIN, accuracy


ARMS = ("scratch", "full", "frozen", "discriminative")


def _accuracy(name: str, seed: int, folder: Path) -> float:
    overrides = [
        f"training.seed={seed}",
        "training.epochs=6",
        "monitor.evaluate=6 epochs",
        "training.reload_check=false",
    ]
    run = finetune(load_recipe(name, [*overrides, f"output={folder / f'{name}-{seed}'}"]), quiet=True)
    assert run.best is not None
    return float(run.best["value"])
