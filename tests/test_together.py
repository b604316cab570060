"""Two processes fail as one: whatever fails in whichever, both end, with exit code 1 and one message."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from hf_finetune.errors import UserError
from hf_finetune.recipe import dump_recipe
from hf_finetune.runfolder import load_run
from hf_finetune.runlock import LOCK, RunLock
from hf_finetune.train import finetune
from nursery import Process, ranks

SCRIPT = """
import errno, os, sys
import torch
import hf_finetune.freeze, hf_finetune.hub.artefact, hf_finetune.runfolder, hf_finetune.setup, hf_finetune.train
from hf_finetune import cli
from hf_finetune.errors import ModelError

torch.set_num_threads(1)
case, rank = sys.argv[1], int(os.environ["RANK"])


def after(module, name, calls, error):
    "Let the function fail once it has been called so often."
    real, count = getattr(module, name), iter(range(1, 1000))

    def failing(*args, **kwargs):
        if next(count) > calls:
            raise error
        return real(*args, **kwargs)

    setattr(module, name, failing)


full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
if case == "metrics" and rank == 0:
    real = hf_finetune.runfolder.RunFolder.log

    def log(self, row):
        if row["step"] > 1:
            with hf_finetune.runfolder.writing(self.path / "metrics.jsonl"):
                raise full
        real(self, row)

    hf_finetune.runfolder.RunFolder.log = log
if case == "model" and rank == 0:
    after(hf_finetune.hub.artefact, "save_backbone", 0, OSError(errno.EROFS, os.strerror(errno.EROFS)))
if case == "curves" and rank == 0:
    after(hf_finetune.hub.artefact.shutil, "copyfile", 0, full)
if case == "frozen" and rank == 1:
    real = hf_finetune.train.fingerprints
    hf_finetune.train.fingerprints = lambda tensors: dict.fromkeys(real(tensors), "other")
if case == "nan":
    hf_finetune.train.sample_losses = lambda kind, logits, *_, **__: logits.sum(1) * float("nan")
if case == "memory" and rank == 1:
    after(hf_finetune.train, "sample_losses", 1, torch.OutOfMemoryError("full"))
if case == "vanishes" and rank == 1:
    hf_finetune.setup.load_backbone = lambda *_, **__: os._exit(7)
if case == "backbone" and rank == 1:
    after(hf_finetune.setup, "load_backbone", 0, ModelError("backbone 'x': not on this machine."))
recipe = sys.argv[2]
if case == "recipe" and rank == 1:
    recipe += ".gone"
cli.main(["train", recipe, "--output", sys.argv[3], "-q"])
"""

# What fails -> the message, and whether the other process says that it was left.
CASES = {
    "metrics": ("cannot write {run}/metrics.jsonl: the disk is full", False),
    "model": ("cannot write {run}/.model.new: the disk is read-only", False),
    "curves": ("cannot write {run}/model: the disk is full", False),
    "frozen": ("frozen tensors moved, first of all", False),
    "nan": ("step 1, epoch 1: the loss is nan", False),
    "memory": ("out of memory at 4 samples per forward pass", True),
    "backbone": ("backbone 'x': not on this machine.", False),
    "vanishes": ("another process of this run has ended", False),
    "recipe": ("r.yaml.gone", False),
}


@pytest.mark.parametrize("case", CASES)
def test_both_end_with_one_message(case: str, tmp_path: Path) -> None:
    recipe, script = tmp_path / "r.yaml", tmp_path / "script.py"
    changes = {"strategy": "frozen", "monitor": {"evaluate": "2 steps"}}
    recipe.write_text(dump_recipe(runs.recipe("vit", **changes)), encoding="utf-8")
    script.write_text(SCRIPT, encoding="utf-8")
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    members = [
        Process(script, case, str(recipe), str(tmp_path / "run"), log=log, env=rank)
        for log, rank in zip(logs, ranks(2), strict=True)
    ]
    try:
        codes = [member.wait(120) for member in members]
    finally:
        for member in members:
            member.kill()
    printed = [log.read_text() for log in logs]
    message, is_left = CASES[case]
    code = 2 if case in ("backbone", "recipe") else 1
    other = {"vanishes": 7}.get(case, 1 if is_left else code)
    assert codes == [code, other], printed
    errors = [line for text in printed for line in text.splitlines() if line.startswith("error: ")]
    assert sum(message.format(run=tmp_path / "run") in line for line in errors) == 1, printed
    assert len(errors) == 1 + is_left, errors
    assert not any("Traceback" in text for text in printed), printed
    if is_left:
        left = (
            "error: another process of this run has ended; it said why, if it still could. `--resume` goes on"
        )
        assert any(line.startswith(left) for line in errors), errors
    if case in ("metrics", "frozen", "nan"):
        assert load_run(tmp_path / "run").status["status"] == "failed"


HOLD = "import sys, time, pathlib\nfrom hf_finetune.runlock import RunLock\nlock = RunLock(pathlib.Path(sys.argv[1]))\nlock.sign()\nprint('held', flush=True)\ntime.sleep(600)"


def test_a_run_is_resumed_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = runs.run("vit", tmp_path / "run", strategy="frozen")
    longer = runs.recipe("vit", run.path, strategy="frozen", training={"steps": 6})
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = run.recipe_path.read_bytes()
        with pytest.raises(UserError) as caught:
            finetune(longer, quiet=True, resume=True)
        start, _, rest = str(caught.value).partition(" since ")
        assert start == (
            f"{run.path}: this run is still going on, in process {holder.pid} on {socket.gethostname()}"
        )
        assert rest.endswith(
            "Wait for its end, or stop it there (SIGTERM saves its state) and use --resume then."
        )
        assert run.recipe_path.read_bytes() == before
    finally:
        holder.kill()
        holder.wait()
    assert (
        str(holder.pid) in (run.path / LOCK).read_text()
    )  # what a killed process leaves behind holds nobody up
    assert finetune(longer, quiet=True, resume=True).status["total_steps"] == 6


def test_a_folder_that_another_process_has_just_claimed_is_left_alone(tmp_path: Path) -> None:
    claimed = tmp_path / "run"
    claimed.mkdir()
    (claimed / "run.json").write_text('{"status": "running"}')
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(claimed)], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="this run is still going on"):
            finetune(runs.recipe("vit", claimed, strategy="frozen"), quiet=True, resume=True)
        assert (claimed / "run.json").exists()
    finally:
        holder.kill()
        holder.wait()


def test_where_nothing_can_be_locked_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("hf_finetune.runlock.fcntl.lockf", unsupported)
    said: list[str] = []
    RunLock(tmp_path, said.append).release()
    assert said == [
        f"{tmp_path} cannot be locked (No locks available): see to it that no other process runs it as well"
    ]
