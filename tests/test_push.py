"""Pushing a run: what is sent where, and what is said when the Hub refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hf_finetune.hub.push as hub
import runs
from hf_finetune.cli import main
from hf_finetune.runfolder import Run

TOKEN = "hf_" + "s3cret" * 5


class Hub:
    """Stands in for the Hub's client: remembers what it was asked, or refuses."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refuses = ""

    def __call__(self) -> Hub:
        return self

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, {"repo_id": args[0], **kwargs} if args else kwargs))
            if name == self.refuses:
                raise OSError("403 Forbidden: you may not write here.\nRequest ID: 1")
            return SimpleNamespace(pr_url=None, commit_url="https://hub/commit/1")

        return call


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(hub, "HfApi", found)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runs.run("vit", tmp_path_factory.mktemp("push") / "run", strategy="frozen", training={"steps": 2})


def call(*words: str) -> int:
    try:
        main(list(words))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_push_sends_the_model_folder_in_one_commit(
    trained: Run, client: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("push", str(trained.path), "me/model", "--private", "--branch", "try", "--tag", "v1") == 0
    names = [name for name, _ in client.calls]
    assert names == ["create_repo", "create_branch", "upload_folder", "create_tag"]
    sent = dict(client.calls)
    assert sent["create_repo"]["private"] is True
    assert sent["upload_folder"]["folder_path"] == trained.model_folder
    assert sent["upload_folder"]["revision"] == "try"
    assert sent["upload_folder"]["commit_message"].startswith("accuracy ")
    assert "pushed: https://hub/commit/1" in capsys.readouterr().out


@pytest.mark.parametrize("refused", ["create_repo", "upload_folder"])
def test_a_refusal_is_one_message_and_costs_nothing(
    refused: str, trained: Run, client: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    client.refuses = refused
    before = {path: path.read_bytes() for path in trained.path.rglob("*") if path.is_file()}
    assert call("push", str(trained.path), "me/model") == 1
    printed = capsys.readouterr()
    assert "403 Forbidden: you may not write here." in printed.err
    assert "Traceback" not in printed.err
    assert TOKEN not in printed.err + printed.out
    if refused == "upload_folder":
        assert f"hf-finetune push {trained.path} me/model" in printed.err, "the command to try again"
    assert before == {path: path.read_bytes() for path in trained.path.rglob("*") if path.is_file()}


def test_rights_are_checked_before_training(
    tmp_path: Path, client: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    client.refuses = "create_repo"
    assert call("train", "frozen", "hub={repo_id: me/model}", "--output", str(tmp_path / "run"), "-q") == 1
    assert "cannot be written to" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("when", "uploads"), [("end", 1), ("best", 2)])
def test_a_recipe_pushes(when: str, uploads: int, tmp_path: Path, client: Hub) -> None:
    recipe = ["frozen", f"hub={{repo_id: me/model, when: {when}}}", "data.max_samples=20", "training.steps=1"]
    assert call("train", *recipe, "--output", str(tmp_path / "run"), "-q") == 0
    assert [name for name, _ in client.calls].count("upload_folder") == uploads


def test_a_failed_push_of_a_best_model_does_not_stop_the_run(
    tmp_path: Path, client: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    client.refuses = "upload_folder"
    recipe = ["frozen", "hub={repo_id: me/model, when: best}", "data.max_samples=20", "training.steps=1"]
    assert call("train", *recipe, "--output", str(tmp_path / "run"), "-q") == 1, "the push at the end counts"
    assert capsys.readouterr().err.count("push to me/model failed") == 2
    assert (tmp_path / "run" / "model" / "config.json").is_file()
