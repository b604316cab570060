"""A solver fits what gradient steps approach: the same head, further down, in one step of the run."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

import runs
import tiny
from hf_finetune import solve
from hf_finetune.errors import Interrupted, UserError
from hf_finetune.features import disk, store
from hf_finetune.inference import evaluate_model
from hf_finetune.linear import lbfgs_path, mean_loss, ridge, scale_of
from hf_finetune.models.load import forward
from hf_finetune.recipe import Recipe
from hf_finetune.runfolder import Run, load_run
from hf_finetune.setup import prepare
from hf_finetune.tasks.loss import sample_losses
from test_features import full

FAMILIES = ["resnet", "vit", "vision-convnext", "bert"]
"""A CNN and a ViT of timm, an image and a text network of transformers: with and without a norm or pooler below."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FINETUNE_CACHE", str(tmp_path / "cache"))


def solved(family: str, output: Path, solver: str | None, **changes: Any) -> Run:
    return runs.run(family, output, strategy={"name": "frozen", "solver": solver}, **changes)


@cache
def fitted(family: str, solver: str) -> Run:
    """Return a run whose head a solver fitted, for all tests that look at it."""
    return solved(family, Path(runs._ROOT.name) / f"{solver} {family}", solver)


def facts(run: Run) -> dict[str, Any]:
    (found,) = run.status["solved"].values()
    return found


# ---- the mathematics ---------------------------------------------------------------------------------------------------


def problem(rows: int, features: int) -> tuple[Tensor, Tensor]:
    """Return features of another mean and size, and classes that they tell in part."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator)
    y = (x[:, :3] + torch.randn(rows, 3, generator=generator)).argmax(1)
    return 3 * x + 5, y


def scaled(x: Tensor, weights: Tensor | None = None) -> np.ndarray:
    scale = scale_of(x, weights)
    return ((x.double() - scale.mean) / scale.spread).numpy()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(("rows", "features"), [(40, 6), (20, 50)])
def test_ridge_is_ridge_and_leaves_out_exactly(rows: int, features: int, views: int, weighted: bool) -> None:
    x, y = problem(rows, features)
    targets = solve.scores_wanted("single", y, 3)
    weights = torch.linspace(0.2, 2, rows).double() if weighted else torch.ones(rows).double()
    plain, samples = scaled(x, weights), rows // views

    def by_sklearn(kept: list[int], strength: float) -> Ridge:
        model = Ridge(alpha=strength * float(weights.sum()))
        return model.fit(plain[kept], targets[kept], sample_weight=weights[kept].numpy())

    for fit in ridge(x, targets, weights=weights, views=views, strengths=(1e-3, 0.1, 10)):
        whole = by_sklearn(list(range(rows)), fit.strength)
        scores = x.double() @ fit.weight.T + fit.bias
        np.testing.assert_allclose(scores, whole.predict(plain), atol=1e-10)
        assert fit.left_out is not None
        for sample in range(samples):
            out = [sample + view * samples for view in range(views)]
            without = by_sklearn([row for row in range(rows) if row not in out], fit.strength)
            np.testing.assert_allclose(fit.left_out[out], without.predict(plain[out]), atol=1e-6)


def test_lbfgs_finds_the_minimum_for_every_kind_of_label() -> None:
    x, y = problem(60, 8)
    plain, hot = scaled(x), torch.nn.functional.one_hot(y, 3).float()
    value = x[:, 0] * 1000 + y
    for strength in (1.0, 1e-2, 1e-4):
        (single,) = lbfgs_path(x, y, 3, partial(sample_losses, "single"), strengths=[strength])
        logistic = LogisticRegression(C=1 / (strength * 60), tol=1e-10, max_iter=10_000).fit(plain, y)
        scores = x.double() @ single.weight.T + single.bias
        np.testing.assert_allclose(scores.softmax(1), logistic.predict_proba(plain), atol=1e-4)
        (multi,) = lbfgs_path(x, hot, 3, partial(sample_losses, "multi"), strengths=[strength])
        for each in range(3):  # the loss is a mean over classes
            one = LogisticRegression(C=1 / (strength * 60 * 3), tol=1e-10, max_iter=10_000).fit(
                plain, hot[:, each]
            )
            found = (x.double() @ multi.weight.T + multi.bias)[:, each].sigmoid()
            np.testing.assert_allclose(found, one.predict_proba(plain)[:, 1], atol=1e-4)
        (line,) = lbfgs_path(x, value, 1, partial(sample_losses, "regression"), strengths=[strength])
        least = Ridge(alpha=strength * 60 / 2).fit(plain, value)
        np.testing.assert_allclose(
            (x.double() @ line.weight.T + line.bias)[:, 0], least.predict(plain), rtol=1e-4
        )


def test_class_weights_and_smoothing_count() -> None:
    x, y = problem(60, 8)
    weights = torch.tensor([0.5, 1.0, 2.0])
    given = partial(sample_losses, "single", class_weights=weights)
    (fit,) = lbfgs_path(x, y, 3, given, strengths=[1e-2])
    total = float(weights[y].sum())
    twin = LogisticRegression(
        C=1 / (1e-2 * 60), class_weight=dict(enumerate(weights.tolist())), tol=1e-10, max_iter=10_000
    )
    expected = twin.fit(scaled(x), y).predict_proba(scaled(x))
    np.testing.assert_allclose((x.double() @ fit.weight.T + fit.bias).softmax(1), expected, atol=1e-4)
    assert total != 60
    smooth = partial(sample_losses, "single", label_smoothing=0.2)
    (smoothed,) = lbfgs_path(x, y, 3, smooth, strengths=[1e-6])
    (sharp,) = lbfgs_path(x, y, 3, partial(sample_losses, "single"), strengths=[1e-6])
    assert mean_loss(x, y, smoothed.weight, smoothed.bias, smooth) < mean_loss(
        x, y, sharp.weight, sharp.bias, smooth
    )
    assert solve.scores_wanted("single", y[:1], 3, 0.3).tolist()[0][int(y[0])] == pytest.approx(0.6)


# ---- runs --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def features_of(run: Run) -> tuple[Tensor, Tensor, torch.nn.Linear]:
    """Return what enters the output layer of a run's model for its training rows, the labels, and the layer."""
    recipe = Recipe.model_validate(runs.load_trained(str(run.path)).recipe.model_dump(by_alias=True))
    setup = prepare(recipe, world_size=1, device=torch.device("cpu"))
    model = setup.backbone.model.eval()
    layer = solve.output_layer(setup, model)
    model.load_state_dict(runs.weights(run))
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    from hf_finetune.data.loaders import collate
    from hf_finetune.setup import build_sets

    train = build_sets(setup)[0].unchanged()
    tokenizer = None if train.tokens is None else train.tokens.tokenizer
    batch = collate([train[0, row] for row in range(len(train))], tokenizer=tokenizer)
    forward(model, batch["inputs"])
    return seen[0], batch["labels"], layer


@cache
def by_gradient(family: str) -> Run:
    """Return a run whose output layer alone took 20 epochs of gradient steps."""
    name = {"resnet": r"^fc\.", "vit": r"^head\."}.get(family, r"^classifier\.")
    phases = [{"train": {"match": name}}]
    return runs.run(
        family,
        Path(runs._ROOT.name) / f"gradient {family}",
        strategy={"phases": phases},
        training={"steps": 40},
    )


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_fitted_to_the_minimum(family: str, solver: str) -> None:
    run = fitted(family, solver)
    assert (run.status["status"], run.status["total_steps"]) == ("done", 1)
    (row,), (measured,) = runs.train_rows(run), runs.evaluations(run)
    assert (row["step"], row["epoch"], row["lr"]) == (1, 1.0, {})
    x, y, layer = features_of(run)
    outputs = {f"{name}.{part}" for name, module in runs.start(run).model.named_modules()
               if isinstance(module, torch.nn.Linear) and module.out_features == layer.out_features for part in ("weight", "bias")}  # fmt: skip
    assert runs.moved(run) == outputs
    assert run.status["parameters"]["trainable"] == sum(p.numel() for p in layer.parameters())
    chosen, plain = facts(run), scaled(x)
    losses = partial(sample_losses, "single")
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    assert row["loss"] == pytest.approx(mean_loss(x, y, weight, bias, losses), rel=1e-4)
    scores = (x @ layer.weight.T + layer.bias).detach()
    if solver == "ridge":
        targets = solve.scores_wanted("single", y, layer.out_features)
        twin = Ridge(alpha=chosen["strength"] * len(x)).fit(plain, targets)
        np.testing.assert_allclose(scores, twin.predict(plain).reshape(scores.shape), atol=1e-3)
    else:
        twin = LogisticRegression(C=1 / (chosen["strength"] * len(x)), tol=1e-10, max_iter=10_000).fit(
            plain, y
        )
        np.testing.assert_allclose(scores.softmax(1), twin.predict_proba(plain), atol=1e-3)
        _, _, theirs = features_of(by_gradient(family))
        spread = scale_of(x).spread

        def objective(layer: torch.nn.Linear) -> float:
            weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
            decay = chosen["strength"] / 2 * float((weight * spread).square().sum())
            return mean_loss(x, y, weight, bias, losses) + decay

        assert objective(layer) <= objective(theirs)
    assert evaluate_model(str(run.path), []).metrics["accuracy"] == measured["metrics"]["accuracy"]
    card = (run.model_folder / "README.md").read_text(encoding="utf-8")
    assert f"fitted to convergence by {chosen['note'].split(',')[0]}" in card


def test_lp_ft_goes_on_from_the_head_that_was_solved(tmp_path: Path) -> None:
    """Augmentation is for what comes after: the head is fitted to, and measured on, the rows as they are."""
    solved("resnet", tmp_path / "probe", "lbfgs")
    both = runs.run(
        "resnet", tmp_path / "both", strategy={"name": "lp_ft", "full_lr": 1e-12}, training={"steps": 4},
        augment=["horizontal_flip", "random_crop"], monitor={"evaluate": "2 steps", "metric": "loss"},
    )  # fmt: skip
    assert both.status["auto"]["strategy.solver"].startswith("lbfgs (")
    # of 4 steps gradient steps would have spent 2 on the head
    assert [row["phase"] for row in runs.train_rows(both)] == ["head"] + ["all"] * 2
    assert [row["step"] for row in runs.evaluations(both)] == [1, 2, 3]
    assert runs.evaluations(both)[-1]["loss"] == pytest.approx(runs.evaluations(both)[0]["loss"], abs=1e-6)
    assert facts(both)["metric"] == "validation loss"
    assert facts(both)["value"] == pytest.approx(runs.evaluations(both)[0]["loss"], abs=1e-6)
    # another run's features serve: those of rows as they are
    assert len(disk.kept()) == 2


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_views_are_fitted_where_they_are_kept(solver: str, tmp_path: Path) -> None:
    augment = ["horizontal_flip", "random_resized_crop"]
    run = solved("resnet", tmp_path / "run", solver, augment=augment, cache={"views": 3})
    assert "36 train rows and 7 validation rows" in run.status["features"]["1 head"]


def test_what_solvers_leave_to_gradient_steps_is_told(tmp_path: Path) -> None:
    dense = tiny.transformers_folder(tmp_path / "dense", "distilbert")
    twins = tiny.timm_folder(tmp_path / "twins", "deit")
    reasons: list[tuple[str, dict[str, Any], str]] = [
        ("bert", {"backbone": str(dense)}, "the head has new layers below the output layer (pre_classifier.weight), which must learn too"),
        ("vit", {"backbone": str(twins)}, "the head has 2 output layers (head.weight, head_dist.weight)"),
        ("resnet", {"cache": {"budget": "1KB"}}, "their features, 1.216KB at the least, exceed `cache.budget` (1KB)"),
        ("resnet", {"cache": "off"}, "`cache: off` keeps no features"),
        ("resnet", {"augment": ["mixup"]}, "mixup and cutmix mix targets that a solver takes row by row"),
        ("resnet", {"strategy": {"name": "lp_ft", "probe": "1 epoch"}}, "strategy.probe asks for 1 epoch of gradient steps"),
    ]  # fmt: skip
    for number, (family, changes, why) in enumerate(reasons):
        run = runs.run(family, tmp_path / str(number), **({"strategy": "lp_ft"} | changes))
        told = run.status["auto"]["strategy.solver"]
        assert told in (f"null (gradient steps: {why})", f"null ({why})")
        assert "solved" not in run.status
    for family, changes, why in reasons[:3]:
        named = {"strategy": {"name": "frozen", "solver": "lbfgs"}}
        with pytest.raises(UserError) as refused:
            runs.run(family, tmp_path / "none", **(named | changes))
        text = "strategy: phase 1: `solver: lbfgs` cannot fit "
        assert str(refused.value).partition(": strategy")[2] or str(refused.value).startswith("strategy")
        assert text in str(refused.value)
        assert why in str(refused.value)
        assert str(refused.value).endswith("gradient steps train it.")
    assert not (tmp_path / "none").exists()


def test_a_full_disk_means_features_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("resnet", "bert"):
        usual = fitted(family, "lbfgs")
        disk.prune(0)
        with monkeypatch.context() as patch:
            patch.setattr(store.os, "pwrite", full)
            run = solved(family, tmp_path / f"full {family}", "lbfgs")
        assert "No space left" in run.status["features"]["1 head"]
        assert runs.same(runs.weights(usual), runs.weights(run))


def test_the_last_layer_can_be_fitted_anew_after_training(tmp_path: Path) -> None:
    strategy = {"phases": [{"train": "all"}, {"train": "head", "solver": "ridge"}]}
    run = runs.run("resnet", tmp_path / "run", strategy=strategy, training={"steps": 4})
    assert [row["phase"] for row in runs.train_rows(run)] == ["all"] * 3 + ["head"]
    early = {"phases": [{"train": "all", "until": "plateau"}, {"train": "head", "solver": "ridge"}]}
    short = runs.run(
        "resnet", tmp_path / "short", strategy=early, training={"steps": 20}, monitor={"evaluate": "1 steps", "metric": "accuracy"}
    )  # fmt: skip
    assert short.status["status"] == "done"
    assert [row["phase"] for row in runs.train_rows(short)][-2:] == ["all", "head"]


def test_an_average_starts_from_the_head_that_was_solved(tmp_path: Path) -> None:
    averaged = solved("vit", tmp_path / "ema", "lbfgs", training={"ema": {"decay": 0.9}})
    assert runs.same(runs.weights(averaged), runs.weights(fitted("vit", "lbfgs")))


# ---- resume -------------------------------------------------------------------------------------------------------

LP_FT = {"strategy": {"name": "lp_ft", "full_lr": "0.1x"}}


def test_a_run_stopped_at_every_step_ends_the_same(tmp_path: Path) -> None:
    def recipe(folder: str, **training: Any) -> Recipe:
        return runs.recipe("bert", tmp_path / folder, **LP_FT, training={"steps": 3} | training)

    whole = runs.finetune(recipe("whole"), quiet=True)
    for _ in range(3):
        with pytest.raises(Interrupted):
            runs.finetune(recipe("torn", max_hours=1e-9), resume=True, quiet=True)
    torn = runs.finetune(recipe("torn"), resume=True, quiet=True)
    assert runs.same(runs.weights(whole), runs.weights(torn))
    assert [row["loss"] for row in whole.rows] == [row["loss"] for row in torn.rows]
    assert whole.status["solved"] == torn.status["solved"]


def test_a_fit_that_is_interrupted_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fitted("vit", "lbfgs")
    real = solve.evaluate

    def stopping(*given: Any, **options: Any) -> Any:
        os.kill(os.getpid(), 15)
        return real(*given, **options)

    monkeypatch.setattr(solve, "evaluate", stopping)
    with pytest.raises(Interrupted, match="SIGTERM"):
        solved("vit", tmp_path / "torn", "lbfgs")
    assert load_run(tmp_path / "torn").status["status"] == "interrupted"
    monkeypatch.setattr(solve, "evaluate", real)
    recipe = runs.recipe("vit", tmp_path / "torn", strategy={"name": "frozen", "solver": "lbfgs"})
    torn = runs.finetune(recipe, resume=True, quiet=True)
    assert runs.same(runs.weights(whole), runs.weights(torn))
    assert [row["step"] for row in torn.rows] == [1, 1]
