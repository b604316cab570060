"""Optimizers by name: each learns, and what cannot be built says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_finetune.train as loop
import runs
from hf_finetune.defaults import REFERENCE_WIDTHS, STARTS, WIDTH_FACTORS
from hf_finetune.errors import RecipeError

# name -> base rate at which the tiny ViT learns the three colours in a few steps
RATES = {
    "adamw": 3e-3, "sgd": 0.1, "momentum": 0.1, "lion": 1e-3, "lamb": 2e-2, "adafactor": 1e-2, "muon": 1e-2, "nadamw": 3e-3,
    "adan": 1e-2, "adam": 3e-3, "radam": 1e-2, "adopt": 3e-3, "rmsprop": 1e-3,
}  # fmt: skip


@pytest.mark.parametrize("name", RATES)
def test_the_loss_falls(name: str, tmp_path: Path) -> None:
    run = runs.run("vit", tmp_path / "run", strategy={"name": "discriminative", "backbone_lr": "0.5x"},
                   optimizer={"name": name, "lr": RATES[name], "weight_decay": 0.01}, training={"steps": 12, "batch_size": 12})  # fmt: skip
    losses = [row["loss"] for row in runs.train_rows(run)]
    assert losses[-1] < 0.95 * losses[0]
    rates = runs.train_rows(run)[0]["lr"]
    assert rates["head"] == pytest.approx(RATES[name])
    assert rates["stem"] == pytest.approx(RATES[name] / 2)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "lamb"])
def test_frozen_stays_frozen_under_any_optimizer(name: str, tmp_path: Path) -> None:
    strategy = {"phases": [{"train": "all", "for": "2 steps"}, {"train": "head", "for": "2 steps"}]}
    optimizer = {"name": name, "lr": 1e-3, "weight_decay": 0.5}
    run = runs.run(
        "resnet", tmp_path / "run", strategy=strategy, optimizer=optimizer
    )  # the run itself compares, bit by bit
    assert run.status["status"] == "done"


@pytest.mark.parametrize(("name", "fused"), [("adamw", True), ("sgd", True), ("lion", None)])
def test_torch_s_fused_kernels_are_used(
    name: str, fused: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[torch.optim.Optimizer] = []
    real = loop.build_optimizer

    def listening(*args: Any, **more: Any) -> torch.optim.Optimizer:
        built.append(real(*args, **more))
        return built[-1]

    monkeypatch.setattr(loop, "build_optimizer", listening)
    runs.run(
        "vit",
        tmp_path / "run",
        strategy="frozen",
        optimizer={"name": name, "lr": 1e-3},
        training={"steps": 1},
    )
    assert {group.get("fused") for group in built[0].param_groups} == {fused}


def test_options_reach_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[torch.optim.Optimizer] = []
    real = loop.build_optimizer
    monkeypatch.setattr(
        loop, "build_optimizer", lambda *args, **more: built.append(real(*args, **more)) or built[-1]
    )
    options = {"betas": [0.8, 0.9], "eps": 1e-5, "fused": False}
    runs.run("vit", tmp_path / "run", strategy="full", optimizer={"name": "adamw", "lr": 1e-3, "weight_decay": 0.3, "options": options},
             training={"steps": 1})  # fmt: skip
    for group in built[0].param_groups:
        assert tuple(group["betas"]) == (0.8, 0.9)
        assert (group["eps"], group["fused"]) == (1e-5, False)
        assert group["weight_decay"] == (0.0 if group["name"].endswith("no_decay") else 0.3)


WRONG = [
    (
        {"name": "adamww", "lr": 1e-3},
        ("optimizer.name: 'adamww'", "Did you mean 'adamw'?", "lion, lamb, adafactor, muon"),
    ),
    ({"name": "adahessian", "lr": 1e-3}, ("'adahessian' needs second-order gradients",)),
    (
        {"name": "adamw", "lr": 1e-3, "options": {"beta": 0.9}},
        ("adamw cannot be built", "'beta'", "Its options are", "betas, eps"),
    ),
    ({"name": "lion", "lr": 1e-3, "options": {"betas": [0.9, 2.0]}}, ("lion cannot be built", "beta")),
    ({"name": "adamw", "lr": 1e-3, "options": {"betas": 0.9}}, ("adamw cannot be built",)),
    ({"name": "adabelief"}, ("auto has no starting rate for 'adabelief'", "adamw", "Set optimizer.lr")),
]


@pytest.mark.parametrize(("optimizer", "texts"), WRONG)
def test_what_cannot_be_built(optimizer: dict[str, Any], texts: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        runs.run("vit", tmp_path / "run", strategy="full", optimizer=optimizer)
    assert all(text in str(caught.value) for text in texts), caught.value
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "factor"), [("auto", 1), ("adamw", 1), ("lion", 0.2), ("sgd", 30), ("lamb", 10)]
)
def test_auto_rates_follow_the_optimizer(name: str, factor: float, tmp_path: Path) -> None:
    run = runs.run(
        "vit",
        tmp_path / "run",
        strategy="full",
        optimizer=name,
        schedule={"name": "constant", "warmup": None},
        training={"steps": 1},
    )
    narrow = min(WIDTH_FACTORS[1], REFERENCE_WIDTHS["vit"] / 32)  # the tiny ViT is 32 wide
    assert run.rows[0]["lr"]["head"] == pytest.approx(STARTS["full"]["vit"].lr * narrow * factor)
    assert "vit, full" in run.status["auto"]["optimizer.lr"]
