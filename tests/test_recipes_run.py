"""Every shipped recipe runs, on images and on text, and one recipe runs unedited on every family of backbone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import runs
import tiny
from hf_finetune.hub.published import published_recipe
from hf_finetune.recipe import load_recipe, shipped_recipes
from hf_finetune.train import finetune

RECIPES = sorted(set(shipped_recipes()) - {"base"})
DATA = {
    "images": ["data.max_samples=40"],
    "texts": ["data=shipped/reviews", "data.max_samples=24", "data.max_length=24"],
}
REAL = ("full", "lora")
"""These run on texts with the shipped network, the others with a tiny one: what a recipe asks for is the same."""
FAMILIES = [
    *((f"timm {family}", "image", family) for family in tiny.TIMM),
    *((f"transformers {family}", "text", family) for family in tiny.TEXT),
    *((f"transformers vision {family}", "image", f"vision-{family}") for family in tiny.VISION),
]


def test_every_strategy_of_the_tutorials_is_shipped() -> None:
    assert set(RECIPES) >= {
        "scratch", "full", "frozen", "discriminative", "layer_decay", "gradual", "gradual_plateau", "lp_ft",
        "surgical", "bitfit", "norms",
    }  # fmt: skip


@pytest.mark.usefixtures("curves")
@pytest.mark.parametrize("modality", DATA)
@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_runs_on_images_and_on_text(name: str, modality: str, tmp_path: Path) -> None:
    overrides = [*DATA[modality], "training.steps=4", "monitor.evaluate=2 steps", "training.batch_size=8"]
    if modality == "texts":
        overrides += ["backbone=shipped/minilm" if name in REAL else f"backbone={runs.backbone('bert')}"]
    run = finetune(load_recipe(name, [*overrides, f"output={tmp_path / 'run'}"]), quiet=True)
    assert run.status["status"] == "done"
    assert run.best is not None
    assert (run.path / "curves.png").stat().st_size > 10_000
    assert published_recipe(load_recipe(run.recipe_path)) == load_recipe(run.model_folder / "recipe.yaml")
    assert "auto" not in (run.path / "recipe.yaml").read_text().replace("validation: auto", "").replace(
        "max_length: auto", ""
    ), "the resolved recipe writes every value out"


@pytest.mark.parametrize(("name", "modality", "family"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_full_runs_unedited_on_every_family(name: str, modality: str, family: str, tmp_path: Path) -> None:
    if name.startswith("timm"):
        folder = tiny.timm_folder(tmp_path / "backbone", family)
    else:
        folder = tiny.transformers_folder(tmp_path / "backbone", family)
    data = "shipped/digits" if modality == "image" else "shipped/reviews"
    overrides = [f"backbone={folder}", f"data={data}", "data.max_samples=16", "training.steps=2"]
    run = finetune(
        load_recipe("full", [*overrides, "training.batch_size=8", f"output={tmp_path / 'run'}"]), quiet=True
    )
    assert run.status["status"] == "done"
    first = next(row for row in run.rows if row["split"] == "train")
    tolerance = 2e-3 if modality == "image" else 0.05  # heads of text models start small, others at zero
    assert first["loss"] == pytest.approx(math.log(len(run.status["labels"])), abs=tolerance), (
        "a new head knows nothing"
    )
    config = json.loads((run.model_folder / "config.json").read_text())
    names = config.get("label_names") or [
        config["id2label"][key] for key in sorted(config["id2label"], key=int)
    ]
    assert names == run.status["labels"]
