"""The command line: verbs, output, exit codes, and that what is light stays light."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import runs
from hf_finetune import cli
from hf_finetune.recipe import dump_recipe, shipped_recipes
from hf_finetune.runfolder import Run, load_run

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "datasets",
    "accelerate",
    "peft",
    "evaluate",
    "sklearn",
    "matplotlib",
    "numpy",
)


def call(*arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runs.run(
        "vit", tmp_path_factory.mktemp("image") / "run", strategy="full", monitor={"evaluate": "1 epoch"}
    )


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runs.run("bert", tmp_path_factory.mktemp("text") / "run", strategy="frozen")


def recipe_file(folder: Path, name: str = "vit", **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / f"{changes.pop('called', 'mine')}.yaml"
    path.write_text(dump_recipe(runs.recipe(name, **({"strategy": "frozen"} | changes))), encoding="utf-8")
    return str(path)


# ---- light verbs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["check", "frozen"], ["recipes"]])
def test_light_verbs_load_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = (
        f"import sys; from hf_finetune.cli import main; main({arguments!r}); "
        f"sys.stderr.write(' '.join(sorted(set(sys.modules) & set({HEAVY!r}))))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout
    assert time.monotonic() - began < 5  # 0.2 s on an idle machine


def test_recipes_are_listed_with_their_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("recipes") == 0
    printed = capsys.readouterr().out
    for name, shipped in shipped_recipes().items():
        assert any(line.split(maxsplit=1) == [name, shipped.purpose] for line in printed.splitlines())


def test_a_copied_recipe_stands_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in shipped_recipes():
        assert call("recipes", "copy", name, "--to", "mine") == 0
        assert call("check", f"mine/{name}.yaml") == 0
    capsys.readouterr()
    assert call("recipes", "copy", "full", "--to", "mine") == 2
    assert "exists already" in capsys.readouterr().err
    assert call("recipes", "copy", "fulll") == 2
    assert "Did you mean 'full'?" in capsys.readouterr().err


# arguments -> exit code, what stderr says
USAGE = [
    (["check", "frozen"], 0, ""),
    (["check", "nowhere.yaml"], 2, "nowhere.yaml"),
    (["check", "frozen", "training.epoch=3"], 2, "did you mean 'epochs'?"),
    (["check"], 2, "RECIPE"),
    (["trian", "frozen"], 2, "trian"),
    (["train", "frozen", "--nope"], 2, "--nope"),
    (["recipes", "paste"], 2, "recipes copy NAME"),
    (["evaluate", "nowhere"], 2, "nowhere"),
    (["predict", "nowhere", "x"], 2, "nowhere"),
    (["compare", "training.epochs=1"], 2, "name recipes or run folders"),
    (["compare", "frozen", "fulll"], 2, "fulll"),
    (["explain", "frozen", "backbone=/no/such/folder"], 2, "/no/such/folder"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), USAGE)
def test_exit_codes(
    arguments: list[str],
    code: int,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == code
    printed = capsys.readouterr().err
    assert text in printed
    assert "Traceback" not in printed


def test_interrupted_is_130_and_failed_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_finetune.train as loop
    from hf_finetune.errors import TrainingError

    for error, code in ((KeyboardInterrupt(), 130), (TrainingError("it broke"), 1)):

        def ending(*args: Any, _error: BaseException = error) -> str:
            raise _error

        monkeypatch.setattr(loop, "_train", ending)
        assert call("train", recipe_file(tmp_path), "--output", str(tmp_path / str(code)), "-q") == code
        assert "Traceback" not in capsys.readouterr().err
    assert load_run(tmp_path / "1").status["why"] == "it broke"
    assert load_run(tmp_path / "130").status["status"] == "interrupted"


# ---- train and explain -------------------------------------------------------------------------------------------


def test_train_prints_a_line_an_evaluation_and_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(tmp_path, monitor={"evaluate": "2 steps"})
    assert call("train", path, "training.seed=3", "--output", str(tmp_path / "run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert lines[-1].startswith("done: best accuracy")
    assert re.search(r"; all steps done; [\d.]+ GB of memory at most; ", lines[-1])
    assert lines[-1].endswith(f"; {tmp_path / 'run'}")
    assert load_run(tmp_path / "run").status["status"] == "done"


def test_quiet_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("train", recipe_file(tmp_path), "--output", str(tmp_path / "run"), "--quiet") == 0
    assert capfd.readouterr() == ("", "")


def test_the_default_folder_names_recipe_and_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("train", recipe_file(tmp_path), "-q") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine-vit-")


def test_explain_shows_the_plan_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe_file(
        tmp_path,
        name="resnet",
        strategy={"name": "gradual", "every": "1 epoch"},
        training={"steps": 9},
        augment="light",
    )
    assert call("explain", path, "--output", str(tmp_path / "plan")) == 0
    printed = capsys.readouterr().out
    for text in (
        "block.3",
        "stem",
        "head",
        "optimizer.weight_decay",
        "of the backbone loaded",
        "parameters train",
        "9 steps",
        "note: the run of 9 steps ends before",
    ):
        assert text in printed, text
    assert (tmp_path / "plan" / "augment.png").stat().st_size > 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "adafactor", "lion", "muon"])
def test_explain_with_any_optimizer(
    optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(tmp_path, name="vit", strategy="full", optimizer={"name": optimizer, "lr": 1e-3})
    assert call("explain", path, "--output", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "Time on this machine" in printed
    assert re.search(r"(?m)^ *1 +all .* GB", printed), "what the phase takes of memory"


# ---- evaluate ----------------------------------------------------------------------------------------------------


def test_evaluate_prints_what_the_run_recorded(image_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", str(image_run.path)) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert image_run.best is not None
    assert f"recorded by the run: accuracy {image_run.best['value']:.4f}" in printed
    assert call("evaluate", str(image_run.model_folder), f"data={runs.images(6, 6)}", "split=train") == 0
    assert "split train: 6 rows" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["splitt=train"], "Did you mean 'split'?"),
        (["data"], "give data=… and split=…"),
        (["split=nowhere"], "nowhere"),
        (["data=/no/data"], "/no/data"),
    ],
)
def test_evaluate_errors(
    options: list[str], text: str, image_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("evaluate", str(image_run.path), *options) == 2
    printed = capsys.readouterr().err
    assert text in printed
    assert "Traceback" not in printed


def test_a_folder_without_a_recipe_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", runs.backbone("vit")) == 2
    assert "no recipe.yaml beside the model" in capsys.readouterr().err


# ---- predict -----------------------------------------------------------------------------------------------------


def test_predict_images(image_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(runs.images()) / "validation"
    files = sorted(folder.rglob("*.png"))
    assert call("predict", str(image_run.path), str(folder), "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["input"] for row in rows] == [str(file) for file in files]
    right = sum(row["label"] == file.parent.name for row, file in zip(rows, files, strict=True))
    assert image_run.best is not None
    assert right / len(files) == pytest.approx(image_run.best["value"])
    assert call("predict", str(image_run.model_folder), str(files[0]), "--format", "jsonl", "--top", "3") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {answer["label"] for answer in answers} == set(runs.CLASSES)
    assert sum(answer["probability"] for answer in answers) == pytest.approx(1)
    assert [a["probability"] for a in answers] == sorted((a["probability"] for a in answers), reverse=True)


def test_predict_texts(text_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["the good film", "the bad film", "very good " * 200]  # longer than a file's name may be
    assert call("predict", str(text_run.path), *texts, "--format", "jsonl") == 0
    direct = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["input"] for answer in direct] == texts
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    runs.table(tmp_path, [(text, "pos") for text in texts], name="a.csv")
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )
    (tmp_path / "bom.csv").write_text("\ufefftext\n" + "\n".join(texts), encoding="utf-8")
    for name in ("a.txt", "a.csv", "a.jsonl", "bom.csv"):
        assert call("predict", str(text_run.path), str(tmp_path / name), "--format", "jsonl") == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(a["input"], a["label"]) for a in found] == [(a["input"], a["label"]) for a in direct], name
    assert call("predict", str(text_run.path), "good") == 0
    assert "probability" in capsys.readouterr().out


def test_predict_errors(
    image_run: Run, text_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "a.csv").write_text("texts,label\ngood,pos\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "list.jsonl").write_text("[1]\n", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00good")
    (tmp_path / "empty.csv").write_text("text\n", encoding="utf-8")
    (tmp_path / "a.tsv").write_text("text\ngood\n", encoding="utf-8")
    cases = [
        (image_run, "nowhere.png", "there is no file or folder 'nowhere.png'; this model reads images"),
        (image_run, str(tmp_path / "empty"), "no image in"),
        (image_run, str(tmp_path / "broken.png"), "broken.png"),
        (text_run, str(tmp_path / "a.csv"), "has no column 'text'. Did you mean 'texts'?"),
        (text_run, str(tmp_path / "a.jsonl"), "a.jsonl:2 is not a JSON object"),
        (text_run, str(tmp_path / "list.jsonl"), "list.jsonl:1 is not a JSON object"),
        (text_run, str(tmp_path / "binary.txt"), "cannot be read as UTF-8 text"),
        (text_run, str(tmp_path / "empty.csv"), "no text in"),
        (text_run, str(tmp_path / "a.tsv"), "is not a file predict reads"),
        (text_run, "revews.csv", "there is no such file"),
    ]
    for run, given, text in cases:
        assert call("predict", str(run.path), given) == 2, given
        printed = capsys.readouterr().err
        assert text in printed
        assert "Traceback" not in printed
    assert call("predict", str(text_run.path), "good", "--format", "cvs") == 2
    assert "Did you mean 'csv'?" in capsys.readouterr().err


# ---- compare -----------------------------------------------------------------------------------------------------


def test_compare_recipes_with_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = [recipe_file(tmp_path, called="frozen"), recipe_file(tmp_path, called="full", strategy="full")]
    assert (
        call("compare", *arms, "training.steps=2", "--seeds", "2", "--output", str(tmp_path / "out"), "-q")
        == 0
    )
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "frozen-seed0", "frozen-seed1", "full-seed0", "full-seed1", "compare.png"}  # fmt: skip
    assert "± " in printed
    assert "frozen" in printed
    assert load_run(tmp_path / "out" / "full-seed1").status["total_steps"] == 2


def test_compare_finished_runs(image_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = runs.run("vit", tmp_path / "other", strategy="frozen")
    assert call("compare", str(image_run.path), str(other.path), "--output", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "run" in printed
    assert "other" in printed
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert call("compare", str(other.path), "training.epochs=3") == 2
    assert "cannot change a finished run" in capsys.readouterr().err


def test_compare_says_what_is_wrong_with_any_recipe_before_it_runs_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text("strategy: frozne\n", encoding="utf-8")
    assert (
        call(
            "compare", recipe_file(tmp_path), str(tmp_path / "wrong.yaml"), "--output", str(tmp_path / "out")
        )
        == 2
    )
    assert "frozne" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_compare_shows_the_arms_that_ran_when_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_finetune.train as loop

    real, calls = loop._train, []

    def second_fails(*args: Any) -> str:
        from hf_finetune.errors import TrainingError

        calls.append(1)
        if len(calls) == 2:
            raise TrainingError("it broke")
        return real(*args)

    monkeypatch.setattr(loop, "_train", second_fails)
    arms = [
        recipe_file(tmp_path, called="a"),
        recipe_file(tmp_path, called="b"),
        recipe_file(tmp_path, called="c"),
    ]
    assert call("compare", *arms, "--output", str(tmp_path / "out"), "-q") == 1
    printed = capsys.readouterr()
    assert "b: it broke" in printed.err
    assert "compare.png" in printed.out
    assert len(calls) == 3
