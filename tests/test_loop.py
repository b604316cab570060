"""The loop: batches, cadence, early stopping, best weights, seeds, and what is left behind when a run ends badly."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_finetune.train as loop
import nursery
import runs
from hf_finetune.errors import Interrupted, RecipeError, TrainingError, UserError
from hf_finetune.evaluation import Evaluation
from hf_finetune.inference import evaluate_model, load_trained
from hf_finetune.runfolder import load_run, read_status

PLAIN = {
    "schedule": {"name": "constant", "warmup": None},
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0},
}
EVERY = {"evaluate": "1 steps"}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the monitored metric take these values, one an evaluation."""

    def script(*values: float) -> None:
        following = iter(values)
        monkeypatch.setattr(Evaluation, "value", lambda self, metric: next(following))

    return script


# ---- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["resnet", "vit", "bert-dry"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_add_up_to_the_batch(family: str, micro: int, tmp_path: Path) -> None:
    """12 samples in batches of 8: the second of each epoch is short, and weighs its samples right."""
    one = runs.run(family, tmp_path / "a", strategy="full", **PLAIN)
    many = runs.run(family, tmp_path / "b", strategy="full", training={"micro_batch_size": micro}, **PLAIN)
    assert runs.same(runs.weights(one), runs.weights(many), tolerance=1e-6)
    assert [r["loss"] for r in many.rows] == pytest.approx([r["loss"] for r in one.rows], abs=1e-6)


def test_batches_of_long_texts_take_more_passes_and_add_up_to_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    real = loop.to_device

    def seen(inputs: Any, device: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return real(inputs, device)

    monkeypatch.setattr(loop, "to_device", seen)
    one = runs.run("bert-dry", tmp_path / "a", strategy="full", **PLAIN)
    whole, shapes[:] = list(shapes), []
    many = runs.run("bert-dry", tmp_path / "b", strategy="full", training={"micro_batch_tokens": 40}, **PLAIN)
    assert max(rows * length for rows, length in whole) > 40
    assert max(rows * length for rows, length in shapes) <= 40
    assert len(whole) < len(shapes)
    assert runs.same(runs.weights(one), runs.weights(many), tolerance=1e-6)
    for before, after in zip(one.rows, many.rows, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-6)
        assert after.get("metrics") == before.get("metrics")
    with pytest.raises(RecipeError, match=r"7 tokens do not hold one text, of which up to \d+ are kept"):
        runs.run("bert-dry", tmp_path / "c", strategy="full", training={"micro_batch_tokens": 7})
    assert not (tmp_path / "c").exists()


def test_clipping_sees_the_whole_batch(tmp_path: Path) -> None:
    clipped = {"clip_norm": 0.01}
    one = runs.run("vit", tmp_path / "a", strategy="full", training=clipped, **PLAIN)
    many = runs.run(
        "vit", tmp_path / "b", strategy="full", training=clipped | {"micro_batch_size": 2}, **PLAIN
    )
    assert runs.same(runs.weights(one), runs.weights(many), tolerance=1e-6)


def test_clip_norm_bounds_the_update(tmp_path: Path) -> None:
    for clip, bound in ((0.01, 0.05 * 0.01), (None, math.inf)):
        run = runs.run(
            "vit", tmp_path / str(clip), strategy="full", training={"steps": 1, "clip_norm": clip}, **PLAIN
        )
        before, after = runs.start(run).model.state_dict(), runs.weights(run)
        update = math.sqrt(sum(float((after[n] - before[n]).double().square().sum()) for n in before))
        assert update <= bound * 1.001
        assert update > 0.9 * 0.05 * 0.01


# training section -> (steps, steps per epoch, epoch of the last row); 12 samples
LENGTHS = [
    ({"steps": None, "epochs": 2}, 4, 2, 2.0),
    ({"steps": None, "epochs": 0.5}, 1, 2, 0.5),
    ({"steps": 3}, 3, 2, 1.5),
    ({"steps": 3, "batch_size": 64}, 3, 1, 3.0),
    ({"steps": None, "epochs": 1, "batch_size": 5}, 3, 3, 1.0),
]


@pytest.mark.parametrize(("training", "steps", "per_epoch", "epochs"), LENGTHS)
def test_length(training: dict[str, Any], steps: int, per_epoch: int, epochs: float, tmp_path: Path) -> None:
    run = runs.run("vit", tmp_path / "run", strategy="frozen", training=training)
    assert (run.status["total_steps"], run.status["steps_per_epoch"]) == (steps, per_epoch)
    assert [row["step"] for row in runs.train_rows(run)] == [*range(1, steps + 1)]
    assert runs.train_rows(run)[-1]["epoch"] == epochs


@pytest.mark.parametrize(
    ("evaluate", "at"),
    [
        ("1 epoch", [2, 4, 6, 7]),
        ("0.5 epochs", [*range(1, 8)]),
        ("3 steps", [3, 6, 7]),
        ("50%", [4, 7]),
        ("100%", [7]),
    ],
)
def test_evaluations_come_when_asked_and_at_the_end(evaluate: str, at: list[int], tmp_path: Path) -> None:
    run = runs.run(
        "vit", tmp_path / "run", strategy="frozen", training={"steps": 7}, monitor={"evaluate": evaluate}
    )
    assert [row["step"] for row in runs.evaluations(run)] == at


# ---- what follows from evaluations -------------------------------------------------------------------------------


def test_early_stopping_counts_evaluations_and_the_best_is_kept(tmp_path: Path, scripted: Any) -> None:
    scripted(0.2, 0.5, 0.4, 0.5, 0.9)
    monitor = EVERY | {"early_stopping": {"patience": 2}}
    run = runs.run("vit", tmp_path / "run", strategy="full", training={"steps": 9}, monitor=monitor, **PLAIN)
    assert run.status["status"] == "done"
    assert run.status["why"] == "no better accuracy in 2 evaluations"
    assert len(runs.evaluations(run)) == 4
    assert run.best is not None
    assert (run.best["value"], run.best["step"]) == (0.5, 2)
    second = runs.run("vit", tmp_path / "two", strategy="full", training={"steps": 2}, **PLAIN)
    assert runs.same(runs.weights(run), runs.weights(second))


@pytest.mark.parametrize("family", ["resnet", "vit", "bert"])
def test_evaluate_gives_the_best_value_again(family: str, tmp_path: Path) -> None:
    monitor = EVERY | {"metric": "loss", "metrics": ["accuracy", "f1_macro"]}
    run = runs.run(family, tmp_path / "run", strategy="full", training={"steps": 6}, monitor=monitor)
    assert run.best is not None
    assert run.best["value"] == min(row["loss"] for row in runs.evaluations(run))
    result = evaluate_model(str(run.path), [])
    assert result.loss == run.best["value"]
    assert result.metrics == run.best["metrics"]


def test_reduce_on_plateau_lowers_every_rate(tmp_path: Path, scripted: Any) -> None:
    scripted(0.5, 0.5, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6)
    run = runs.run(
        "vit", tmp_path / "run", strategy={"name": "discriminative", "backbone_lr": "0.1x"}, training={"steps": 9}, monitor=EVERY,
        schedule={"name": "reduce_on_plateau", "factor": 0.1, "patience": 2, "floor": 0.005, "warmup": None},
    )  # fmt: skip
    head = [row["lr"]["head"] for row in runs.train_rows(run)]
    assert head == pytest.approx([1e-2] * 3 + [1e-3] * 3 + [1e-4] * 2 + [5e-5])
    assert [row["lr"]["stem"] for row in runs.train_rows(run)] == pytest.approx([rate / 10 for rate in head])


def test_a_metric_that_is_never_a_number_leaves_a_model_nonetheless(tmp_path: Path, scripted: Any) -> None:
    scripted(*[math.nan] * 4)
    run = runs.run("vit", tmp_path / "run", strategy="full", monitor=EVERY)
    assert (run.status["status"], run.best) == ("done", None)
    assert runs.moved(run)


# ---- loss ----------------------------------------------------------------------------------------------------------


def test_label_smoothing_and_class_weights_change_training_and_not_the_measured_loss(tmp_path: Path) -> None:
    plain = runs.run("vit", tmp_path / "plain", strategy="full", **PLAIN)
    smooth = runs.run("vit", tmp_path / "smooth", strategy="full", training={"label_smoothing": 0.3}, **PLAIN)
    weighted = runs.run(
        "vit", tmp_path / "weighted", strategy="full", data={"class_weights": {"red": 4.0}}, **PLAIN
    )
    # at step 0 all classes are equally likely, so the loss is ln 3 whatever the targets, times the weights
    assert runs.train_rows(smooth)[0]["loss"] == pytest.approx(math.log(3))
    assert runs.train_rows(weighted)[0]["loss"] != pytest.approx(math.log(3), abs=1e-3)
    assert not runs.same(runs.weights(plain), runs.weights(smooth))
    assert not runs.same(runs.weights(plain), runs.weights(weighted))
    for run in (smooth, weighted):
        assert evaluate_model(str(run.path), []).loss == runs.evaluations(run)[0]["loss"]


def test_class_weights_have_mean_1_over_the_training_rows(tmp_path: Path) -> None:
    """One batch that holds all rows: the weighted loss at step 0 is ln 3 again."""
    run = runs.run(
        "vit",
        tmp_path / "run",
        strategy="full",
        data={"class_weights": {"red": 4.0}},
        training={"batch_size": 12, "steps": 1},
    )
    assert runs.train_rows(run)[0]["loss"] == pytest.approx(math.log(3))


def test_ema_is_what_is_measured_and_kept(tmp_path: Path) -> None:
    """SGD, three steps: the average follows from the weights after each step, which three shorter runs give."""
    steps = [
        runs.weights(runs.run("resnet", tmp_path / str(n), strategy="full", training={"steps": n}, **PLAIN))
        for n in (1, 2, 3)
    ]
    run = runs.run(
        "resnet", tmp_path / "ema", strategy="full", training={"steps": 3, "ema": {"decay": 0.5}}, **PLAIN
    )
    average = runs.start(run).model.state_dict()
    for step in steps:
        average = {
            n: t * 0.5 + step[n] * 0.5 if t.is_floating_point() else step[n] for n, t in average.items()
        }
    assert runs.same(runs.weights(run), average, tolerance=1e-6)
    assert evaluate_model(str(run.path), []).loss == runs.evaluations(run)[0]["loss"]


def test_ema_leaves_what_is_frozen_alone(tmp_path: Path) -> None:
    run = runs.run("resnet", tmp_path / "run", strategy="frozen", training={"ema": {}})
    assert runs.moved(run) == {"fc.weight", "fc.bias"}


# ---- seeds -------------------------------------------------------------------------------------------------------

RANDOM = ["random_resized_crop", "horizontal_flip", "rand_augment"]


@pytest.mark.parametrize("family", ["resnet", "bert"])
def test_a_seed_decides_everything(family: str, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        augment = ["word_dropout"] if family == "bert" else RANDOM
        run = runs.run(family, tmp_path / name, strategy="full", training={"seed": seed}, augment=augment)
        return runs.weights(run)

    first = weights("a", 7)
    torch.rand(3)  # what else happened in this process does not matter
    assert runs.same(first, weights("b", 7))
    assert not runs.same(first, weights("c", 8))


@pytest.mark.parametrize("family", ["resnet", "bert"])
def test_workers_change_nothing(family: str, tmp_path: Path) -> None:
    """Random augmentation, and dropout in BERT: neither may depend on how many processes load data."""
    augment = ["word_dropout", "word_swap"] if family == "bert" else RANDOM
    found = [
        runs.weights(runs.run(family, tmp_path / str(workers), strategy="full", augment=augment, data={"workers": workers},
                              monitor={"evaluate": "1 epoch", "metric": "loss"}, training={"steps": 5}))
        for workers in (0, 2)
    ]  # fmt: skip
    assert runs.same(*found)


def test_how_often_a_run_is_measured_does_not_change_its_training(tmp_path: Path) -> None:
    often = runs.run("bert", tmp_path / "a", strategy="full", monitor=EVERY, training={"steps": 5})
    once = runs.run("bert", tmp_path / "b", strategy="full", training={"steps": 5})
    assert [row["loss"] for row in runs.train_rows(often)] == [row["loss"] for row in runs.train_rows(once)]


# ---- kinds of data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", ["mixup", "cutmix", ["mixup", "cutmix"]])
def test_mixing(mixing: Any, tmp_path: Path) -> None:
    augment = mixing if isinstance(mixing, list) else [mixing]
    run = runs.run(
        "resnet", tmp_path / "run", strategy="full", augment=augment, training={"micro_batch_size": 4}
    )
    assert run.status["status"] == "done"
    assert run.rows[0]["loss"] == pytest.approx(math.log(3))


def test_multi_label(tmp_path: Path) -> None:
    rows = [
        (
            f"{'good' if n % 2 else 'bad'} {'film' if n % 3 else 'soup'}",
            "|".join(["good"] * (n % 2) + ["film"] * (n % 3 > 0)),
        )
        for n in range(18)
    ]
    path = runs.table(tmp_path, rows)
    run = runs.run(
        "bert",
        tmp_path / "run",
        strategy="full",
        backbone={"id": runs.backbone("bert"), "head_init": "zero"},
        data={"path": path, "labels": "multi"},
        training={"steps": 8},
    )
    assert run.status["labels"] == ["film", "good"]
    assert run.rows[0]["loss"] == pytest.approx(math.log(2))
    assert set(run.best["metrics"]) == {"f1_micro"}  # type: ignore[index]
    assert evaluate_model(str(run.path), []).loss == runs.evaluations(run)[0]["loss"]


def test_regression(tmp_path: Path) -> None:
    path = runs.table(tmp_path, [("very " * (n % 5) + "good", n % 5 / 2) for n in range(20)])
    run = runs.run(
        "bert",
        tmp_path / "run",
        strategy="full",
        data={"path": path, "labels": "regression"},
        training={"steps": 12},
    )
    assert run.best is not None
    assert run.best["metric"] == "mse"
    assert run.best["mode"] == "min"
    assert run.best["value"] == pytest.approx(runs.evaluations(run)[0]["loss"])
    assert runs.train_rows(run)[-1]["loss"] < runs.train_rows(run)[0]["loss"]


# ---- how runs end badly --------------------------------------------------------------------------------------------


def poisoned(folder: Path) -> str:
    """Rows 0 to 15, of which row 11 is so far off that its squared error is infinite."""
    return runs.table(folder, [("very " * (n % 5) + "good", 1e30 if n == 11 else n % 5) for n in range(16)])


@pytest.mark.parametrize("micro", [None, 2])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_row(micro: int | None, tmp_path: Path) -> None:
    data = {
        "path": poisoned(tmp_path / "in"),
        "labels": "regression",
        "validation": poisoned_validation(tmp_path / "in"),
    }
    with pytest.raises(
        TrainingError, match=r"step \d, epoch 1: the loss is inf, in rows 11 of train"
    ) as caught:
        runs.run(
            "bert",
            tmp_path / "run",
            strategy="full",
            data=data,
            training={"micro_batch_size": micro, "steps": 8},
            monitor=EVERY,
        )
    run = load_run(tmp_path / "run")
    assert run.status["status"] == "failed"
    assert "the loss is inf" in run.status["why"]
    if run.best is not None:
        assert str(run.model_folder) in str(caught.value)
        assert load_trained(str(run.path)).backbone.report.share == 1


def poisoned_validation(folder: Path) -> str:
    runs.table(folder, [("good", 1.0), ("very good", 2.0)], name="check.csv")
    return "check.csv"


def test_the_best_model_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_finetune.train as loop

    real, calls = loop.sample_losses, []

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args, **kwargs) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(loop, "sample_losses", failing)
    with pytest.raises(TrainingError, match=r"step 4, .*The best model so far \(step \d\) is in"):
        runs.run(
            "vit",
            tmp_path / "run",
            strategy="full",
            monitor=EVERY | {"metric": "loss"},
            training={"steps": 6},
        )
    run = load_run(tmp_path / "run")
    assert run.status["status"] == "failed"
    assert run.best is not None
    assert evaluate_model(str(run.path), []).loss == run.best["value"]


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    first = runs.run("vit", tmp_path / "run", strategy="frozen")
    before = runs.weights(first)
    with pytest.raises(UserError, match=r"already holds a run \(done, started"):
        runs.run("vit", tmp_path / "run", strategy="full")
    assert runs.same(before, runs.weights(first))


USER_ERRORS = [
    ({"optimizer": {"name": "adamm", "lr": 1e-3}}, RecipeError, "Did you mean 'adam"),
    ({"training": {"micro_batch_tokens": 64}}, RecipeError, "images have no tokens"),
    ({"data": {"class_weights": {"purple": 2.0}}}, UserError, "there is no label 'purple'"),
    ({"training": {"precision": "fp16"}}, RecipeError, "fp16 does not train on a CPU"),
    ({"trackers": ["comet_ml"]}, UserError, "pip install comet-ml"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "text"), USER_ERRORS)
def test_a_mistake_claims_no_folder(
    changes: dict[str, Any], kind: type[Exception], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_finetune.setup.get_available_trackers", list)
    with pytest.raises(kind, match=text):
        runs.run("vit", tmp_path / "run", **({"strategy": "frozen"} | changes))
    assert not (tmp_path / "run").exists()


SCRIPT = """
import os, signal
import hf_finetune.train as loop
from hf_finetune import cli, record
from hf_finetune.report.curves import save_curves

real = loop.sample_losses
steps = iter(range(10**6))

def slow(*args, **kwargs):
    if next(steps) == {step}:
        os.kill(os.getpid(), signal.{signal})
    return real(*args, **kwargs)

loop.sample_losses = slow
record.save_curves = save_curves
cli.main(["train", {recipe!r}, "--output", {output!r}])
"""


@pytest.mark.parametrize(("name", "step", "measured"), [("SIGINT", 5, True), ("SIGTERM", 1, False)])
def test_a_signal_leaves_a_usable_folder(name: str, step: int, measured: bool, tmp_path: Path) -> None:
    from hf_finetune.recipe import dump_recipe

    recipe = runs.recipe("vit", strategy="full", training={"steps": 50}, monitor={"evaluate": "3 steps"})
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    code = SCRIPT.format(
        signal=name,
        step=step,
        recipe=str(tmp_path / "r.yaml"),
        output=str(tmp_path / "run"),
    )
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    codes, printed = nursery.run(tmp_path / "script.py", log=tmp_path / "log")
    assert codes == [130], printed
    assert "Traceback" not in printed
    assert (
        f"error: stopped by {name}; the state is saved, `--output {tmp_path / 'run'} --resume` continues"
        in printed
    )
    run = load_run(tmp_path / "run")
    assert (run.status["status"], run.status["why"]) == ("interrupted", f"stopped by {name}")
    assert (run.best is not None) == measured
    assert load_trained(str(run.path)).backbone.report.share == 1
    assert (run.path / "curves.png").stat().st_size > 0
    assert not list(run.path.glob(".model*"))


def test_an_interrupt_while_the_best_is_put_in_its_place_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between putting the old model away and the new one in its place."""
    real, renames = Path.rename, []

    def stopping(self: Path, target: Path) -> Path:
        renames.append(self.name)
        if renames.count(".model.new") == 2 and self.name == ".model.new":
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, target)

    monkeypatch.setattr(Path, "rename", stopping)
    with pytest.raises(Interrupted):
        runs.run(
            "vit",
            tmp_path / "run",
            strategy="full",
            monitor=EVERY | {"metric": "loss"},
            training={"steps": 8},
        )
    run = load_run(tmp_path / "run")
    assert run.best is not None
    assert evaluate_model(str(run.path), []).loss == run.best["value"]


def test_the_signal_handler_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    runs.run("vit", tmp_path / "run", strategy="frozen", training={"steps": 1})
    assert signal.getsignal(signal.SIGTERM) is before


# ---- what is left behind -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("curves")
def test_run_json_metrics_and_curves(tmp_path: Path) -> None:
    began = time.time()
    run = runs.run(
        "resnet",
        tmp_path / "run",
        strategy="frozen",
        monitor={"evaluate": "2 steps", "metrics": ["f1_macro"]},
    )
    status = run.status
    assert status["parameters"] == {
        "total": sum(p.size for p in runs.start(run).anatomy.parameters),
        "trainable": 99,
    }
    assert 0 < status["wall_seconds"] < time.time() - began + 1
    assert {"torch", "timm", "accelerate", "python"} <= set(status["versions"])
    assert set(run.best["metrics"]) == {"accuracy", "f1_macro"}  # type: ignore[index]
    assert [row["split"] for row in run.rows] == ["train", "train", "validation"] * 2
    assert all(row["samples_per_second"] > 0 for row in runs.train_rows(run))
    for picture in (run.path / "curves.png", run.model_folder / "curves.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert read_status(run.path)["status"] == "done"


def test_trackers_see_losses_metrics_and_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    logged: list[tuple[int, dict[str, float]]] = []

    class Fake(tracking.GeneralTracker):
        name = "wandb"
        requires_logging_directory = False
        main_process_only = True

        def __init__(self, run_name: str, **kwargs: Any) -> None:
            super().__init__()

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            logged.append((0, values))

        def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
            logged.append((step or 0, values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    run = runs.run("vit", tmp_path / "run", strategy="frozen", trackers=["wandb"], training={"steps": 2})
    assert run.status["status"] == "done"
    assert "strategy" in logged[0][1]["recipe"]
    assert {"train/loss", "lr/head"} <= set(logged[1][1])
    assert {"validation/loss", "validation/accuracy"} == set(logged[-1][1])
    assert [step for step, _ in logged] == [0, 1, 2, 2]
