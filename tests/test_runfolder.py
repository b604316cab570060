import errno
import json
import math
import os
import sys
from pathlib import Path

import pytest

from hf_finetune.errors import FinetuneError, UserError
from hf_finetune.runfolder import RunFolder, hardware, load_run, read_metrics, read_status, versions


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finished(path, **status):
    """A small run on disk."""
    folder = RunFolder.create(str(path), "frozen", "resnet18")
    (folder.path / "recipe.yaml").write_text("task: auto\n")
    folder.log({"step": 1, "epoch": 1.0, "split": "validation", "loss": 0.5, "metrics": {"accuracy": 0.9}})
    best = {"metric": "accuracy", "value": 0.9, "step": 1, "epoch": 1.0}
    folder.write_status(status="done", best=best, **status)
    return folder


def test_default_name_tells_recipe_and_backbone_and_never_collides(here):
    folders = [RunFolder.create(None, "recipes/full.yaml", "timm/resnet18.a1_in1k") for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    for folder in folders:
        assert folder.path.parent == Path("runs")
        assert folder.path.name.startswith("full.yaml-resnet18.a1_in1k-")
        assert read_status(folder.path)["status"] == "running"


@pytest.mark.parametrize("name", ["../..", "a b/c?d*", "", "..."])
def test_default_name_stays_inside_runs(here, name):
    path = RunFolder.create(None, name, name).path.resolve()
    assert path.parent == here / "runs"


def test_a_folder_that_holds_a_run_is_refused(here):
    finished("kept")
    with pytest.raises(UserError) as error:
        RunFolder.create("kept", "full", "resnet18")
    assert "kept already holds a run (done" in str(error.value)
    assert "rm -r kept" in str(error.value)
    assert load_run("kept").best["value"] == 0.9


def test_a_folder_without_a_run_is_used(here):
    (here / "notes").mkdir()
    (here / "notes" / "mine.txt").write_text("keep")
    RunFolder.create("notes", "full", "resnet18")
    assert (here / "notes" / "mine.txt").read_text() == "keep"


def test_a_file_in_the_way_is_refused(here):
    (here / "out").write_text("")
    with pytest.raises(UserError, match="out is a file"):
        RunFolder.create("out", "full", "resnet18")
    with pytest.raises(FinetuneError, match="a part of this path is a file"):
        RunFolder.create("out/deeper", "full", "resnet18")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full. Free some space"),
        (errno.EROFS, "the disk is read-only. Give a folder elsewhere"),
        (errno.EACCES, "you may not write there"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_a_failed_write_is_told_in_plain_words(here, monkeypatch, number, words):
    folder = RunFolder.create("run", "full", "resnet18")

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number), "run/run.json")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(FinetuneError, match=words) as error:
        folder.write_status(status="done")
    assert str(error.value).startswith("cannot write run/run.json: ")
    assert read_status("run")["status"] == "running"  # the old one is whole


def test_rows_come_back_and_numbers_that_are_not_finite_are_null(here):
    folder = RunFolder.create("run", "full", "resnet18")
    np = pytest.importorskip("numpy")
    folder.log({"step": 1, "loss": math.nan, "metrics": {"f1": np.float32(0.5)}, "phase": "tête\u2028x"})
    folder.log({"step": np.int64(2), "loss": math.inf, "lr": {"head": 1e-3}, "where": Path("a/b")})
    assert read_metrics("run") == [
        {"step": 1, "loss": None, "metrics": {"f1": 0.5}, "phase": "tête\u2028x"},
        {"step": 2, "loss": None, "lr": {"head": 1e-3}, "where": "a/b"},
    ]


def test_a_last_line_cut_short_is_left_out_and_other_damage_is_named(here):
    folder = RunFolder.create("run", "full", "resnet18")
    assert read_metrics("run") == []
    folder.log({"step": 1})
    metrics = here / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 2, "lo')
    assert read_metrics("run") == [{"step": 1}]
    metrics.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: damaged"):
        read_metrics("run")


def test_status_is_merged_and_leaves_nothing_aside(here):
    folder = RunFolder.create("run", "full", "resnet18")
    folder.write_status(parameters={"total": 10, "trainable": 2})
    folder.write_status(status="failed", why="non-finite loss", best={"value": math.nan})
    status = read_status("run")
    assert status["parameters"]["total"] == 10
    assert (status["status"], status["why"], status["best"]) == ("failed", "non-finite loss", {"value": None})
    assert sorted(entry.name for entry in (here / "run").iterdir()) == ["run.json"]


def test_load_run(here):
    folder = finished("runs/a")
    folder.write_predictions([0, 1, 1], [0, 1, 0])
    run = load_run("runs/a")
    assert run.name == "a"
    assert run.recipe_path == Path("runs/a/recipe.yaml")
    assert run.model_folder == Path("runs/a/model")
    assert run.rows[0]["metrics"] == {"accuracy": 0.9}
    assert run.predictions() == ([0, 1, 1], [0, 1, 0])


def test_load_run_names_what_is_missing_and_the_nearest_runs(here):
    finished("runs/frozen-digits-1")
    finished("runs/full-digits-1")
    assert load_run("runs/full-digits-1").predictions() is None
    with pytest.raises(UserError, match=r"no such run folder. Nearest runs: runs/frozen-digits-1, runs/full"):
        load_run("runs/frozen-digit")
    with pytest.raises(
        UserError, match=r"runs: not a run folder, run.json and recipe.yaml missing. Nearest runs: "
    ):
        load_run("runs")
    with pytest.raises(UserError, match="a file was given"):
        load_run("runs/full-digits-1/run.json")
    (here / "runs/full-digits-1/run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json: damaged, not JSON"):
        load_run("runs/full-digits-1")


def test_versions_and_hardware_import_nothing_heavy():
    loaded = set(sys.modules)
    found, machine = versions(), hardware()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "pydantic" in found
    assert not {"torch", "timm", "transformers"} & (set(sys.modules) - loaded)
    assert machine["cores"] >= 1
    assert isinstance(machine["cpu"], str)
    json.dumps(machine)
