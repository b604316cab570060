"""Figures on real images and texts with real weights, where they lie beside the repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hf_finetune.recipe import load_recipe
from hf_finetune.train import finetune

pytestmark = pytest.mark.slow

IMAGES = {"full": 0.92, "frozen": 0.92, "lp_ft": 0.92, "lora": 0.92}
TEXTS = {"full": 0.80, "frozen": 0.70, "lora": 0.80}


@pytest.mark.parametrize(("name", "least"), IMAGES.items())
def test_ants_and_bees(name: str, least: float, shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    data, backbone = shared_data("hymenoptera"), shared_data("mobilenetv2_100_in1k")
    assert _best(name, [f"backbone={backbone}", f"data={data}"], tmp_path) >= least


@pytest.mark.parametrize(("name", "least"), TEXTS.items())
def test_sentiment(name: str, least: float, shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    rows = ["data.train=train[:2000]", "training.epochs=4"]
    assert _best(name, ["backbone=shipped/minilm", f"data={shared_data('sst2')}", *rows], tmp_path) >= least


def _best(name: str, overrides: list[str], folder: Path) -> float:
    run = finetune(load_recipe(name, [*overrides, f"output={folder / 'run'}"]), quiet=True)
    assert run.best is not None
    return float(run.best["value"])
