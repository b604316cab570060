"""The reload gate: what a run calls done loads by its own library alone, with the logits of the trained model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
from hf_finetune import record
from hf_finetune.cli import main
from hf_finetune.errors import Interrupted, TrainingError
from hf_finetune.hub import fresh, reload
from hf_finetune.recipe import dump_recipe
from hf_finetune.runfolder import load_run, read_status

ONE = {"training": {"steps": 1}, "strategy": "full"}
LORA = {"training": {"steps": 3}, "strategy": {"name": "lora", "r": 2}}
MERGED = {"training": {"steps": 3}, "strategy": {"name": "lora", "r": 2, "merge": True}}


@pytest.fixture(autouse=True)
def _compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RELOAD_CHECK", True)


@pytest.fixture
def before_gate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Let something happen to `model/` after it was written and before it is compared."""

    def between(action: Callable[[Path], None]) -> None:
        def check(run: Path, *given: Any, **named: Any) -> Any:
            action(run / "model")
            return reload.check_reload(run, *given, **named)

        monkeypatch.setattr(record, "check_reload", check)

    return between


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Collect what the fresh process answers."""
    found: list[dict[str, Any]] = []
    ask = fresh.ask

    def listen(*given: Any, **named: Any) -> dict[str, Any]:
        found.append(ask(*given, **named))
        return found[-1]

    monkeypatch.setattr(fresh, "ask", listen)
    return found


def texts(folder: Path, *, kind: str = "single", pairs: bool = False) -> dict[str, Any]:
    """Return the `data` section of texts with capitals, for each kind of label."""
    labels = {"single": ("neg", "pos"), "multi": ("a", "a b"), "regression": (0.25, 1.5)}[kind]
    rows = [(f"The {w} Film{' very' * (n % 5)}", f"We liked it {w}", labels[n % 2])
            for n, w in enumerate(("bad", "good") * 12)]  # fmt: skip
    path = runs.table(folder, rows, header=("text", "other", "label"))
    columns = {"text": ["text", "other"] if pairs else "text", "label": "label"}
    return {"path": path, "validation": 0.75, "labels": kind, "columns": columns}


# ---- what was trained comes back ---------------------------------------------------------------------------------

WHOLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "timm cnn": ("resnet", ONE, "timm"),
    "timm vit, averaged weights": ("vit", ONE | {"training": {"steps": 2, "ema": {"decay": 0.5}}}, "timm"),
    "timm adapter": ("resnet", LORA, "peft"),
    "timm adapter, merged": ("vit", MERGED, "timm"),
    "text": ("bert", ONE, "transformers"),
    "text adapter": ("bert", LORA, "peft"),
    "text adapter, merged": ("bert", MERGED, "transformers"),
    "image": ("vision-vit", ONE, "transformers"),
    "image adapter": ("vision-dinov2", LORA, "peft"),
    "image of another size": (
        "vision-mobilenetv2",
        ONE | {"backbone": {"options": {"image_size": 48}}},
        "transformers",
    ),
    "timm, of another size": ("vit", ONE | {"backbone": {"options": {"img_size": 48}}}, "timm"),
    "nothing measured": ("vit", ONE | {"monitor": {"metric": "loss"}}, "timm"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_the_kept_model_is_compared(
    case: str, tmp_path: Path, answers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes, library = WHOLE[case]
    if "backbone" in changes:
        changes = changes | {"backbone": {"id": runs.backbone(name), **changes["backbone"]}}
    if case == "nothing measured":
        monkeypatch.setattr("hf_finetune.evaluation.Evaluation.value", lambda self, metric: float("nan"))
    run = runs.run(name, tmp_path / "run", **changes)
    found = run.status["reload"]
    assert run.status["status"] == "done"
    assert (run.best is None) == (case == "nothing measured")
    assert (found["compared"], found["library"]) == (True, library)
    assert found["samples"] == (4 if name == "bert" else 7)
    assert found["max_difference"] <= found["tolerance"] < 1e-3
    assert found["raw_max_difference"] <= found["raw_tolerance"]
    assert set(found["versions"]) == {
        "torch",
        library,
        *(["timm"] if name in ("resnet", "vit") else ["transformers"]),
    }
    (answer,) = answers
    assert answer["ours"] == []


@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_every_kind_of_label(kind: str, pairs: bool, tmp_path: Path) -> None:
    given = texts(tmp_path, kind=kind, pairs=pairs) | {"max_length": 6}
    run = runs.run("bert", tmp_path / "run", data=given, **ONE)
    assert run.status["reload"]["samples"] == reload.SAMPLES
    assert run.status["reload"]["raw_max_difference"] <= run.status["reload"]["tolerance"]


def test_the_expected_logits_are_of_the_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter((0.2, 0.9, 0.1))
    monkeypatch.setattr("hf_finetune.evaluation.Evaluation.value", lambda self, metric: next(values))
    given = {"monitor": {"evaluate": "1 steps"}, "training": {"steps": 3}}
    run = runs.run("resnet", tmp_path / "run", **(ONE | given))
    assert run.best is not None
    assert run.best["step"] == 2
    assert run.status["reload"]["compared"]


def test_precision_of_training_does_not_loosen_it(tmp_path: Path) -> None:
    run = runs.run("vit", tmp_path / "run", **(ONE | {"training": {"steps": 2, "precision": "bf16"}}))
    assert run.status["reload"]["max_difference"] <= run.status["reload"]["tolerance"] < 1e-4


# ---- what was damaged does not -----------------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (file,) = model.glob("*model.safetensors")
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt"})

    return damage


def edited(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        config = json.loads((model / name).read_text(encoding="utf-8"))
        change(config)
        (model / name).write_text(json.dumps(config), encoding="utf-8")

    return damage


def nudged(name: str, by: float) -> Callable[[Path], None]:
    return tensors(lambda state: state[name].view(-1)[:1].add_(by))


def without(part: str) -> Callable[[Path], None]:
    def drop(state: dict[str, torch.Tensor]) -> None:
        gone = [name for name in state if part in name]
        assert gone
        for name in gone:
            del state[name]

    return tensors(drop)


def rounded(state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = tensor.bfloat16()


def truncated(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 40)


def swapped(config: dict[str, Any]) -> None:
    config["label_names"][:2] = reversed(config["label_names"][:2])


def relabelled(config: dict[str, Any]) -> None:
    config["id2label"] = {"0": "pos", "1": "neg"}
    config["label2id"] = {"pos": 0, "neg": 1}


# name -> (backbone, changes, damage, what the message says)
DAMAGES: dict[str, tuple[str, dict[str, Any], Callable[[Path], None], str]] = {
    "a weight of the head": ("resnet", ONE, nudged("fc.weight", 1e-3), "the logits of 7 validation samples differ by up to"),
    "a weight of a text head": ("bert", ONE, nudged("classifier.weight", 1e-3), "the weights in model.safetensors"),
    "batch statistics": ("resnet", ONE, nudged("layer4.0.bn2.running_mean", 1e-2), "normalisation statistics"),
    "another number format": ("vit", ONE, tensors(rounded), "number format"),
    "a cut file": ("vit", ONE, truncated, "cannot be loaded in a fresh process: SafetensorError"),
    "no weights": ("bert", ONE, lambda model: (model / "model.safetensors").unlink(), "cannot be loaded in a fresh process"),
    "an adapter without its head": ("bert", LORA, without("classifier"), "cannot be loaded in a fresh process"),
    "an adapter's matrix": ("resnet", LORA, without("lora_B"), "the weights in adapter_model.safetensors"),
    "labels": ("resnet", ONE, edited("config.json", swapped), "label 0 is 'green' instead of 'blue' (look at config.json)"),
    "labels of texts": ("bert", ONE, edited("config.json", relabelled), "label 0 is 'pos' instead of 'neg'"),
    "mean": ("resnet", ONE, edited("config.json", lambda c: c["pretrained_cfg"].update(mean=[0.41, 0.5, 0.6])), "mean and std in config.json"),
    "std": ("vit", ONE, edited("config.json", lambda c: c["pretrained_cfg"].update(std=[0.2, 0.3, 0.42])), "gives other pixels, by"),
    "crop": ("vit", ONE, edited("config.json", lambda c: c["pretrained_cfg"].update(crop_pct=1.0)), "gives other pixels, by"),
    "resizing": ("vit", ONE, edited("config.json", lambda c: c["pretrained_cfg"].update(interpolation="bilinear")), "gives other pixels"),
    "processor's mean": ("vision-vit", ONE, edited("preprocessor_config.json", lambda c: c.update(image_mean=[0.42, 0.5, 0.6])), "mean and std in preprocessor_config.json"),
    "processor's size": ("vision-resnet", ONE, edited("preprocessor_config.json", lambda c: c.update(size={"height": 48, "width": 48})), "gives other pixels, in size"),
    "lower case": ("bert", ONE, edited("tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"})), "its tokenizer gives other input_ids"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_fails_the_run_and_everything_is_kept(case: str, tmp_path: Path, before_gate: Any) -> None:
    name, changes, damage, said = DAMAGES[case]
    before_gate(damage)
    given = {"data": texts(tmp_path)} if name == "bert" else {}
    if name == "bert":
        said = said.replace("7 validation", "16 validation")
    with pytest.raises(TrainingError) as caught:
        runs.run(name, tmp_path / "run", **changes, **given)
    assert said in str(caught.value)
    status = read_status(tmp_path / "run")
    assert (status["status"], status["reload"]) == ("failed", None)
    assert status["why"] == str(caught.value).splitlines()[0]
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_the_command_fails_then_compares_again(
    tmp_path: Path, before_gate: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(dump_recipe(runs.recipe("resnet", folder, **ONE)), encoding="utf-8")
    old = []

    def hide_head(model: Path) -> None:
        old.append((model / "model.safetensors").read_bytes())
        nudged("fc.weight", 1e-3)(model)

    before_gate(hide_head)
    with pytest.raises(SystemExit) as left:
        main(["train", str(path), "--quiet"])
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {folder}/model, loaded by timm ")
    assert all(part in said for part in ("differ by up to ", "Everything is kept"))
    assert "Traceback" not in said
    (folder / "model" / "model.safetensors").write_bytes(old[0])
    before_gate(lambda model: None)
    main(["train", str(path), "--quiet", "--resume"])
    assert load_run(folder).status["reload"]["compared"]


def test_it_can_be_left_out(tmp_path: Path, before_gate: Any) -> None:
    before_gate(truncated)
    run = runs.run("vit", tmp_path / "run", strategy="full", training={"steps": 1, "reload_check": False})
    assert run.status["reload"] == {"compared": False, "why": "training.reload_check is false"}
    assert not (run.path / reload.EXPECTED).exists()


def test_an_extended_run_is_compared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best model is of the run's first part; its expected logits are still known."""
    values = iter((0.9, 0.1))
    monkeypatch.setattr("hf_finetune.evaluation.Evaluation.value", lambda self, metric: next(values))
    runs.run("resnet", tmp_path / "run", **ONE)
    changes = ONE | {"training": {"steps": 2}, "schedule": {"name": "constant", "warmup": None}}
    monkeypatch.setattr(reload, "write_expected", None)
    run = record_resumed("resnet", tmp_path / "run", changes)
    assert run.best["step"] == 1
    assert run.status["reload"]["compared"]


def record_resumed(name: str, folder: Path, changes: dict[str, Any]) -> Any:
    from hf_finetune.train import finetune

    return finetune(runs.recipe(name, folder, **changes), quiet=True, resume=True, allow_changes=True)


# ---- the process -------------------------------------------------------------------------------------------------


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def ends(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(pid)


def test_one_process_serves_many_runs_and_a_lost_one_is_replaced(tmp_path: Path) -> None:
    runs.run("resnet", tmp_path / "a", **ONE)
    assert fresh._reader is not None
    first = fresh._reader.process.pid
    assert len(list(Path(f"/proc/{first}/task").iterdir())) == 1, "what is forked has one thread"
    runs.run("resnet", tmp_path / "b", **ONE)
    assert fresh._reader.process.pid == first
    os.kill(first, signal.SIGKILL)
    assert runs.run("resnet", tmp_path / "c", **ONE).status["reload"]["compared"]
    second = fresh._reader.process.pid
    fresh.stop()
    assert all(ends(pid) for pid in (first, second))


COMMAND = """
import sys
from hf_finetune import cli
from hf_finetune.hub import fresh
cli.main(["train", sys.argv[1], "--output", sys.argv[2]])
print(type(fresh._reader.process).__name__)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_the_command_forks_it_off_before_ours_is_loaded(tmp_path: Path) -> None:
    recipe, out = tmp_path / "mine.yaml", tmp_path / "run"
    recipe.write_text(dump_recipe(runs.recipe("resnet", **ONE)), encoding="utf-8")
    command = [sys.executable, "-c", COMMAND, str(recipe), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "_Fork"
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["reload"]["compared"]


PARENT = """
import os, sys, time
from hf_finetune.hub import fresh
fresh.{start}
print(fresh._reader.process.pid, flush=True)
{then}
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "then", ["", "sys.exit(3)", "os._exit(3)", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 15)"]
)
@pytest.mark.parametrize("start", ['warm_up("json")', 'fork_off("wave")'])
def test_no_process_is_left_behind(start: str, then: str) -> None:
    code = PARENT.format(start=start, then=then)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ends(int(done.stdout))


def test_a_signal_during_the_comparison_interrupts_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(request: dict[str, Any], *, on_wait: Callable[[], None]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(50):
            time.sleep(0.05)
            on_wait()

    with monkeypatch.context() as patched:
        patched.setattr(fresh, "ask", ask)
        with pytest.raises(Interrupted):
            runs.run("vit", tmp_path / "run", **ONE)
    assert read_status(tmp_path / "run")["status"] == "interrupted"
    assert record_resumed("vit", tmp_path / "run", ONE).status["reload"]["compared"]


def test_a_reading_that_hangs_is_ended_with_its_process(tmp_path: Path) -> None:
    """What is raised while waiting leaves neither the process nor its fork."""
    place = tmp_path / "place"
    place.mkdir()
    os.mkfifo(place / "config.json")  # opening it blocks until somebody writes

    def on_wait() -> None:
        found = Path(
            f"/proc/{fresh._reader.process.pid}/task/{fresh._reader.process.pid}/children"
        ).read_text()  # type: ignore[union-attr]
        if found.strip():
            pids.extend([fresh._reader.process.pid, *map(int, found.split())])  # type: ignore[union-attr]
            raise Interrupted("enough")

    pids: list[int] = []
    request = {"folder": str(place), "task": "image-classification", "place": str(place), "max_length": None,
               "remote_code": False, "threads": 1}  # fmt: skip
    with pytest.raises(Interrupted):
        fresh.ask(request, on_wait=on_wait)
    assert len(pids) == 2
    assert all(ends(pid) for pid in pids)
    fresh.stop()


def test_without_fork_each_reading_has_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "reader.py"
    source = Path(fresh.reader.__file__).read_text(encoding="utf-8")
    script.write_text(source.replace("if FORKS else", "if False else"), encoding="utf-8")
    fresh.stop()
    with monkeypatch.context() as patched:
        patched.setattr(fresh.reader, "__file__", str(script))
        patched.setattr(fresh.reader, "FORKS", False)
        assert runs.run("vit", tmp_path / "run", **ONE).status["reload"]["compared"]
        assert fresh._reader is None


@pytest.mark.parametrize(
    ("broken", "said"),
    [("os.kill(os.getpid(), 9)", "ended by signal 9; the system does that when memory runs out"),
     ("raise ValueError('no such thing')", "ValueError: no such thing")],
)  # fmt: skip
def test_a_reading_that_fails_says_why(
    broken: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(fresh.reader.__file__).read_text(encoding="utf-8")
    script = tmp_path / "reader.py"
    script.write_text(source.replace("    import torch\n", f"    {broken}\n", 1), encoding="utf-8")
    fresh.stop()
    with monkeypatch.context() as patched:
        patched.setattr(fresh.reader, "__file__", str(script))
        with pytest.raises(TrainingError, match=said.replace(";", ".")):
            runs.run("vit", tmp_path / "run", **ONE)
        fresh.stop()
    assert read_status(tmp_path / "run")["status"] == "failed"
